//! Settings that stay in a restored configuration: what keeps the copy out of its original's directories, and the port.
//!
//! PostgreSQL itself says what it makes of the configuration, so nothing that it includes is overlooked. A place within
//! the data directory is the copy's own, whatever the setting says; one outside is the original's, or may be missing here.

use std::path::{Component, Path, PathBuf};

use anyhow::Context as _;

use super::conf::Setting;
use super::effective::Effective;
use super::plan::Plan;
use crate::postgres::binaries::Binaries;
use crate::postgres::owner::Owner;

/// What may lead a copy to where its original works.
const ASKS_FOR: [&str; 8] = [
    "data_directory",
    "hba_file",
    "ident_file",
    "external_pid_file",
    "log_directory",
    "ssl",
    "unix_socket_directories",
    "port",
];
/// A server with TLS reads them at its start.
const TLS_FILES: [&str; 5] = ["ssl_cert_file", "ssl_key_file", "ssl_ca_file", "ssl_crl_file", "ssl_dh_params_file"];

/// What would lead the copy into the original's directories, made explicit; and the port.
pub(super) fn settings(
    plan: &Plan,
    own_statistics: Option<Setting>,
    binaries: &Binaries,
    owner: &Owner,
) -> anyhow::Result<Vec<Setting>> {
    let data = plan.data();
    let mut names = ASKS_FOR.to_vec();
    names.extend(own_statistics.iter().map(|own| own.name.as_str()));
    let known = Effective::ask(binaries, owner, data, &names)?;
    let effective = |name: &str| known.of(name);
    let mut kept = Vec::new();
    let data_text = data.to_str().context("the data directory's path is not UTF-8")?;
    if Path::new(&effective("data_directory")?) != data {
        kept.push(Setting::new("data_directory", data_text));
    }
    for (name, file) in [("hba_file", "pg_hba.conf"), ("ident_file", "pg_ident.conf")] {
        if leads_outside(&effective(name)?, data) {
            kept.push(Setting::new(name, format!("{data_text}/{file}")));
        }
    }
    if !plan.adopt {
        if leads_outside(&effective("external_pid_file")?, data) {
            kept.push(Setting::new("external_pid_file", ""));
        }
        if let Some(own) = own_statistics
            && leads_outside(&effective(&own.name)?, data)
        {
            kept.push(own);
        }
    }
    let logs = effective("log_directory")?;
    if leads_outside(&logs, data) && !(plan.adopt && owner_may("-w", &resolved(&logs, data), owner)) {
        kept.push(Setting::new("log_directory", "log"));
    }
    // Another machine: with one of these missing the server would not start.
    if effective("ssl")? == "on" {
        let known = Effective::ask(binaries, owner, data, &TLS_FILES)?;
        for name in TLS_FILES {
            let path = known.of(name)?;
            if leads_outside(&path, data) && !owner_may("-r", &resolved(&path, data), owner) {
                kept.push(Setting::new("ssl", "off"));
                break;
            }
        }
    }
    let sockets = effective("unix_socket_directories")?;
    if !sockets.split(',').all(|directory| is_usable(directory.trim(), data, owner)) {
        kept.push(Setting::new("unix_socket_directories", "/tmp"));
    }
    if let Some(port) = plan.port
        && effective("port")? != port.to_string()
    {
        kept.push(Setting::new("port", port.to_string()));
    }
    Ok(kept)
}

/// Whether a file setting names a place that is not in the data directory, where the server works.
fn leads_outside(value: &str, data: &Path) -> bool {
    !resolved(value, data).starts_with(data)
}

/// The place that a file setting names, without `.` and `..`; PostgreSQL takes these out as text, too.
fn resolved(value: &str, data: &Path) -> PathBuf {
    let mut place = PathBuf::new();
    for part in data.join(value).components() {
        match part {
            Component::ParentDir => drop(place.pop()),
            Component::CurDir => {}
            other => place.push(other),
        }
    }
    place
}

/// Whether the owner can make a socket there. An abstract socket (`@`) needs no directory.
fn is_usable(directory: &str, data: &Path, owner: &Owner) -> bool {
    directory.is_empty() || directory.starts_with('@') || owner_may("-w", &resolved(directory, data), owner)
}

fn owner_may(flag: &str, path: &Path, owner: &Owner) -> bool {
    owner.test(flag, path).unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_outside_however_it_is_written() {
        let data = Path::new("/srv/pg/data");
        for outside in ["/var/log", "../log", "log/../../log", "/srv/pg/data/../log", "./.."] {
            assert!(leads_outside(outside, data), "{outside}");
        }
        for inside in ["", "log", "./log", "../data/log", "/srv/pg/data/log"] {
            assert!(!leads_outside(inside, data), "{inside}");
        }
    }
}
