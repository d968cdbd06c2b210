//! The operating system user that an instance runs as.
//!
//! PostgreSQL refuses to run as root, and a data directory belongs to one user. So when we are root, every program of
//! the instance is started as its owner, with the owner's supplementary groups too: Debian's servers read their TLS
//! key through the group `ssl-cert`.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result, bail};

/// How much a child of ours says: no setting of a cluster.
const LOG_VARIABLE: &str = "PGHYDRANT_LOG";

/// A user of the operating system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Owner {
    /// Login name.
    pub(crate) name: String,
    /// Number.
    pub(crate) uid: u32,
    /// Primary group.
    pub(crate) gid: u32,
    /// Home directory.
    pub(crate) home: PathBuf,
}

impl Owner {
    /// The user of that name.
    pub(crate) fn named(name: &str) -> Result<Self> {
        look_up(name)?.with_context(|| format!("there is no operating system user \"{}\"", name.escape_debug()))
    }

    /// The user with that number; users without an entry (containers) get their number for a name.
    pub(crate) fn numbered(uid: u32, gid: u32) -> Result<Self> {
        let unnamed = || Self { name: uid.to_string(), uid, gid, home: PathBuf::from("/") };
        Ok(look_up(&uid.to_string())?.filter(|owner| owner.uid == uid).unwrap_or_else(unnamed))
    }

    /// The owner of a file or directory.
    pub(crate) fn of(path: &Path) -> Result<Self> {
        let metadata = std::fs::metadata(path).with_context(|| format!("cannot stat {}", path.display()))?;
        Self::numbered(metadata.uid(), metadata.gid())
    }

    /// The user that we run as.
    pub(crate) fn current() -> Result<Self> {
        Self::numbered(rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw())
    }

    /// Whether we already are this user.
    pub(crate) fn is_current(&self) -> bool {
        rustix::process::geteuid().as_raw() == self.uid
    }

    /// Whether this user could open for reading what root has opened as `file` by way of `path`. A process of theirs judges
    /// the open file itself: a moment later the path may lead elsewhere.
    pub(crate) fn may_read(&self, path: &Path, file: BorrowedFd<'_>) -> Result<bool> {
        const OPENED: &str = "/proc/self/fd/0";
        let mut test = self.command("test")?;
        test.arg(path).args(["-ef", OPENED, "-a", "-r", OPENED]).stdin(file.try_clone_to_owned()?);
        let status = test.status().with_context(|| format!("cannot run test as {}", self.name))?;
        Ok(status.success())
    }

    /// What `test` says of `path` to this user, with `-r`, `-w` or `-x`.
    pub(crate) fn test(&self, flag: &str, path: &Path) -> Result<bool> {
        let status = self.command("test")?.arg(flag).arg(path).status();
        Ok(status.with_context(|| format!("cannot run test as {}", self.name))?.success())
    }

    /// A command that runs as this user, in `/`, without the `PG*` variables of our own environment (a `PGDATA` or a
    /// `PGOPTIONS` meant for another cluster must not reach this one) and without our own settings: what a server hands
    /// on to its `wal fetch` must not name a file that only our caller may read.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        let mut command = if self.is_current() {
            Command::new(program)
        } else if !rustix::process::geteuid().is_root() {
            bail!("only root or {0} can run {1} as {0}", self.name, program.as_ref().display());
        } else if let Some(setpriv) = setpriv() {
            let mut command = Command::new(setpriv);
            let groups = if self.name == self.uid.to_string() { "--clear-groups" } else { "--init-groups" };
            command.arg("--reuid").arg(self.uid.to_string()).arg("--regid").arg(self.gid.to_string());
            command.arg(groups).arg("--").arg(program);
            command
        } else {
            // Without the supplementary groups: all that the standard library can do.
            let mut command = Command::new(program);
            command.uid(self.uid).gid(self.gid);
            command
        };
        for (name, _) in std::env::vars_os() {
            if name.as_bytes().starts_with(b"PG") && name != LOG_VARIABLE {
                command.env_remove(name);
            }
        }
        command.current_dir("/").env("HOME", &self.home).env("USER", &self.name).env("LOGNAME", &self.name);
        Ok(command)
    }
}

fn setpriv() -> Option<PathBuf> {
    ["/usr/bin/setpriv", "/bin/setpriv"].map(PathBuf::from).into_iter().find(|path| path.is_file())
}

/// Users that were found: who somebody is does not change while a verb runs. One that was not found is asked for again.
static FOUND: Mutex<BTreeMap<String, Owner>> = Mutex::new(BTreeMap::new());

fn look_up(key: &str) -> Result<Option<Owner>> {
    let found = || FOUND.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(owner) = found().get(key) {
        return Ok(Some(owner.clone()));
    }
    let owner = ask(key)?;
    if let Some(owner) = &owner {
        found().insert(key.to_owned(), owner.clone());
    }
    Ok(owner)
}

/// Asks `getent`, which knows every source of users that the machine has; without it, `/etc/passwd`.
fn ask(key: &str) -> Result<Option<Owner>> {
    if key.is_empty() || key.starts_with('-') {
        return Ok(None);
    }
    if let Ok(output) = Command::new("getent").args(["passwd", key]).output() {
        return Ok(String::from_utf8_lossy(&output.stdout).lines().next().and_then(parse_passwd_line));
    }
    let text = std::fs::read_to_string("/etc/passwd").context("cannot read /etc/passwd")?;
    Ok(text.lines().filter_map(parse_passwd_line).find(|owner| owner.name == key || owner.uid.to_string() == key))
}

/// `postgres:x:101:104:PostgreSQL administrator,,,:/var/lib/postgresql:/bin/bash`
fn parse_passwd_line(line: &str) -> Option<Owner> {
    let fields: Vec<&str> = line.split(':').collect();
    let [name, _, uid, gid, _, home, ..] = fields[..] else { return None };
    Some(Owner { name: name.to_owned(), uid: uid.parse().ok()?, gid: gid.parse().ok()?, home: PathBuf::from(home) })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_passwd_line_is_read() {
        let owner = parse_passwd_line("postgres:x:101:104:PostgreSQL,,,:/var/lib/postgresql:/bin/bash").unwrap();
        assert_eq!((owner.name.as_str(), owner.uid, owner.gid), ("postgres", 101, 104));
        assert_eq!(parse_passwd_line("nonsense"), None);
        assert_eq!(parse_passwd_line("a:x:-1:0::/:/"), None);
    }

    #[test]
    fn root_is_found_by_name_and_number() {
        assert_eq!(Owner::named("root").unwrap().uid, 0);
        assert_eq!(Owner::numbered(0, 0).unwrap().name, "root");
        assert!(Owner::named("no such user").is_err());
        assert!(Owner::named("--help").is_err());
    }
}
