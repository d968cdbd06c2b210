//! A systemd unit for a restored instance.
//!
//! systemd starts `postgres` itself, not `pg_ctl`: it then watches the server and no helper. A server built with systemd
//! says when it is ready (`Type=notify`); any other is taken for ready as soon as it runs. The timeouts are off, since a
//! recovery takes as long as it takes and a shutdown must write its checkpoint.

use std::path::Path;

use anyhow::Context as _;
use engine::io::durable;
use engine::units::SessionId;

use super::super::files;
use super::super::plan::Plan;
use crate::exit::{Exit, Failure};

/// Who administrates the machine reads it, and writes it alone.
const MODE: u32 = 0o644;

/// A name that systemd takes for a service: it makes no template of it, and needs no escapes.
pub(in crate::restore) fn suits(path: &Path) -> bool {
    let stem = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(".service"));
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "-_.:".contains(letter);
    stem.is_some_and(|stem| !stem.is_empty() && stem.chars().all(plain))
}

/// Writes the unit, unless this session did so before.
pub(super) fn write(plan: &Plan, id: &SessionId, path: &Path) -> anyhow::Result<()> {
    let postgres = plan.programs.join("postgres");
    let bytes = std::fs::read(&postgres).map_err(|cause| engine::Error::io("read", &postgres, cause))?;
    let text = text(plan, id, built_with_systemd(&bytes))?;
    if let Some(found) = files::read(path)? {
        if is_of(&found, id) {
            return Ok(());
        }
        let message = format!("{} has appeared meanwhile: it is not written over", path.display());
        return Err(Failure::new(Exit::Failed, message)
            .hint(format!("move it away, then `pghydrant retry {id}`"))
            .into());
    }
    let part = path.with_file_name(format!(".{id}.pghydrant.part"));
    durable::write_atomically(&part, text.as_bytes(), MODE)?;
    let directory = path.parent().unwrap_or(Path::new("/"));
    let opened = std::fs::File::open(directory).map_err(|cause| engine::Error::io("open", directory, cause))?;
    let name = |path: &Path| path.file_name().unwrap_or_default().to_owned();
    Ok(durable::Directory::new(opened, directory).rename_new(&name(&part), &name(path))?)
}

/// Removes the unit of a session, and no other.
pub(super) fn take_away(path: &Path, id: &SessionId) -> anyhow::Result<()> {
    files::remove(&path.with_file_name(format!(".{id}.pghydrant.part")))?;
    match files::read(path)? {
        Some(found) if is_of(&found, id) => Ok(durable::remove_durably(path)?),
        _ => Ok(()),
    }
}

fn is_of(text: &[u8], id: &SessionId) -> bool {
    text.starts_with(first_line(id).as_bytes())
}

fn first_line(id: &SessionId) -> String {
    format!("# Written by pghydrant restore {id}.\n")
}

/// The server names the library that it tells systemd with.
fn built_with_systemd(postgres: &[u8]) -> bool {
    const LIBRARY: &[u8] = b"libsystemd.so";
    postgres.windows(LIBRARY.len()).any(|window| window == LIBRARY)
}

fn text(plan: &Plan, id: &SessionId, notifies: bool) -> anyhow::Result<String> {
    let shown = |path: &Path| path.to_str().map(str::to_owned).context("a path is not UTF-8");
    let start = plan.handover.start_directory(plan.data());
    let mut mounts = vec![quoted(&shown(plan.data())?)];
    if start != plan.data() {
        mounts.push(quoted(&shown(start)?));
    }
    for tablespace in &plan.tablespaces {
        mounts.push(quoted(&shown(&tablespace.place.path)?));
    }
    let command = |path: &Path| Ok::<_, anyhow::Error>(quoted(&shown(path)?).replace('$', "$$"));
    let mut text = first_line(id);
    for line in [
        "[Unit]",
        &format!("Description=PostgreSQL database server, {} of pghydrant's cluster {}", id, plan.cluster),
        "Documentation=man:postgres(1)",
        "After=network-online.target",
        "Wants=network-online.target",
        &format!("RequiresMountsFor={}", mounts.join(" ")),
        "",
        "[Service]",
        if notifies { "Type=notify" } else { "Type=exec" },
        &format!("User={}", plan.owner.name),
        &format!("ExecStart={} -D {}", command(&plan.programs.join("postgres"))?, command(start)?),
        "ExecReload=/bin/kill -HUP $MAINPID",
        // A fast shutdown; the server's children are its own business.
        "KillMode=mixed",
        "KillSignal=SIGINT",
        "TimeoutSec=infinity",
        // The postmaster outlives a memory shortage, its children need not.
        "OOMScoreAdjust=-900",
        "Environment=PG_OOM_ADJUST_FILE=/proc/self/oom_score_adj PG_OOM_ADJUST_VALUE=0",
        "",
        "[Install]",
        "WantedBy=multi-user.target",
    ] {
        text.push_str(line);
        text.push('\n');
    }
    Ok(text)
}

/// A word as systemd reads it back: its specifiers begin with `%`.
fn quoted(word: &str) -> String {
    let mut out = String::from("\"");
    for letter in word.chars() {
        match letter {
            '"' | '\\' => out.extend(['\\', letter]),
            '%' => out.push_str("%%"),
            '\n' => out.push_str("\\n"),
            other => out.push(other),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_quoted_as_systemd_reads_it() {
        assert_eq!(quoted("/srv/my \"100%\" \\data"), "\"/srv/my \\\"100%%\\\" \\\\data\"");
    }

    #[test]
    fn a_unit_has_a_name_that_systemd_takes() {
        for good in ["/etc/systemd/system/postgresql-15.service", "/x/a_b.c.service"] {
            assert!(suits(Path::new(good)), "{good}");
        }
        for bad in ["/x/a", "/x/.service", "/x/a@.service", "/x/a b.service", "/x/a.target", "/"] {
            assert!(!suits(Path::new(bad)), "{bad}");
        }
    }

    #[test]
    fn a_server_that_tells_systemd_names_its_library() {
        assert!(built_with_systemd(b"\0libc.so.6\0libsystemd.so.0\0"));
        assert!(!built_with_systemd(b"\0libc.so.6\0"));
    }
}
