//! Debian's list of clusters (package postgresql-common): a directory of configurations is the list.
//!
//! `pg_createcluster` can adopt a data directory, and is not used: it moves the configuration out of it, which then does not
//! start by itself any more, and writes the machine's defaults over the original's settings.

use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, fchown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::super::plan::User;
use super::DebianCluster;
use crate::output::Output;

/// The configurations: `<major>/<name>`.
pub(in crate::restore) const CONFIGURATIONS: &str = "/etc/postgresql";
/// Logs of all clusters.
pub(in crate::restore) const LOGS: &str = "/var/log/postgresql";
/// Where Debian's programs look for the server's: `<major>/bin`.
pub(in crate::restore) const PROGRAMS: &str = "/usr/lib/postgresql";
/// systemd runs the machine.
const SYSTEMD: &str = "/run/systemd/system";
/// Who may read logs on Debian.
const LOG_READERS: &str = "adm";
const LOG_MODE: u32 = 0o640;

/// Where a cluster's first words go.
pub(in crate::restore) fn log_of(major: u32, name: &str) -> PathBuf {
    Path::new(LOGS).join(format!("postgresql-{major}-{name}.log"))
}

/// The files beside the configuration that Debian's programs read, as `pg_createcluster` writes them.
pub(super) const FILES: [(&str, &str); 3] = [
    (
        "start.conf",
        "# Automatic startup configuration\n\
         #   auto: automatically start the cluster\n\
         #   manual: manual startup with pg_ctlcluster/postgresql@.service only\n\
         #   disabled: refuse to start cluster\n\
         # See pg_createcluster(1) for details. When running from systemd,\n\
         # invoke 'systemctl daemon-reload' after editing this file.\n\
         \n\
         auto\n",
    ),
    (
        "pg_ctl.conf",
        "# Automatic pg_ctl configuration\n\
         # This configuration file contains cluster specific options to be passed to\n\
         # pg_ctl(1).\n\
         \n\
         pg_ctl_options = ''\n",
    ),
    (
        "environment",
        "# environment variables for postgres processes\n\
         # This file has the same syntax as postgresql.conf:\n\
         #  VARIABLE = simple_value\n\
         #  VARIABLE2 = 'any value!'\n\
         # I. e. you need to enclose any value which does not only consist of letters,\n\
         # numbers, and '-', '_', '.' in single quotes. Shell commands are not\n\
         # evaluated.\n",
    ),
];

/// Makes the cluster's log, unless it is there: the server's user need not be allowed to.
pub(super) fn make_log(cluster: &DebianCluster, owner: &User) -> anyhow::Result<()> {
    let path = log_of(cluster.major, &cluster.name);
    let mut options = std::fs::OpenOptions::new();
    // Others write in that directory as well: neither a link nor a pipe of theirs is followed.
    options.append(true).mode(LOG_MODE).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    // One that is there is opened without "create", which fs.protected_regular refuses even root in such a directory.
    let file = match options.open(&path) {
        Err(cause) if cause.kind() == ErrorKind::NotFound => options.create_new(true).open(&path),
        opened => opened,
    };
    let file = file.map_err(|cause| engine::Error::io("create", &path, cause))?;
    let metadata = file.metadata().map_err(|cause| engine::Error::io("examine", &path, cause))?;
    let new = metadata.is_file() && metadata.len() == 0 && metadata.uid() == 0 && metadata.nlink() == 1;
    if new && rustix::process::geteuid().is_root() {
        let group = group(LOG_READERS).unwrap_or(owner.gid);
        fchown(&file, Some(owner.uid), Some(group))
            .map_err(|cause| engine::Error::io("change the owner of", &path, cause))?;
    }
    Ok(())
}

/// A group's number; a machine without it has nothing to share with it.
fn group(name: &str) -> Option<u32> {
    let output = Command::new("getent").args(["group", name]).output().ok()?;
    String::from_utf8_lossy(&output.stdout).split(':').nth(2)?.trim().parse().ok()
}

/// systemd makes its units of the list when it is told to.
pub(super) fn tell_systemd(output: &Output) {
    if !Path::new(SYSTEMD).is_dir() {
        return;
    }
    let told = Command::new("systemctl")
        .args(["daemon-reload", "--no-ask-password"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if !told.is_ok_and(|status| status.success()) {
        output.warning("systemd does not know of the new cluster yet: `systemctl daemon-reload`, as root");
    }
}
