//! Programs and users of this machine.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use super::{Context, Result};

/// An operating system user, by numbers.
#[derive(Clone, Debug)]
pub struct OsUser {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
}

impl OsUser {
    fn lookup(name: &str) -> Option<Self> {
        let number = |flag: &str| -> Option<u32> {
            let output = Command::new("id").args([flag, name]).output().ok()?;
            String::from_utf8(output.stdout).ok()?.trim().parse().ok()
        };
        Some(Self { name: name.to_owned(), uid: number("-u")?, gid: number("-g")? })
    }

    /// Who runs the tests.
    pub fn current() -> Self {
        let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        let name = Command::new("id").arg("-un").output().ok().and_then(|output| String::from_utf8(output.stdout).ok());
        Self { name: name.unwrap_or_default().trim().to_owned(), uid, gid }
    }

    /// Who runs the servers, and owns repositories: `postgres` (or `nobody`) under root, else the tests' own user.
    pub fn server() -> &'static Self {
        static USER: OnceLock<OsUser> = OnceLock::new();
        USER.get_or_init(|| {
            let others = || Self::lookup("postgres").or_else(|| Self::lookup("nobody"));
            if is_root() { others().unwrap_or_else(Self::current) } else { Self::current() }
        })
    }
}

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A program of PATH or of the system directories, which an ordinary user's PATH lacks.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from);
    env::split_paths(&path).chain(system).map(|dir| dir.join(name)).find(|candidate| candidate.is_file())
}

/// The major version that the tests run with unless they say otherwise; the only one with all client programs.
const MAJOR: u32 = 15;

/// The directory of the server's binaries: `PGHYDRANT_TEST_PG_BIN`, PostgreSQL 15's, or the newest one's.
pub fn postgres_bin() -> Option<&'static Path> {
    static BIN: OnceLock<Option<PathBuf>> = OnceLock::new();
    BIN.get_or_init(|| {
        let named = env::var_os("PGHYDRANT_TEST_PG_BIN").map(PathBuf::from);
        let preferred = [MAJOR].into_iter().chain((13..=18).rev()).map(packaged_bin);
        named.into_iter().chain(preferred).find(|bin| has_server(bin))
    })
    .as_deref()
}

/// The server of one major version: Debian's package, or the build that `scripts/postgresql-builds.sh` fetched, which
/// has `initdb`, `pg_ctl` and `postgres` only.
pub fn postgres_bin_of(major: u32) -> Option<PathBuf> {
    let fetched = builds_directory().join(major.to_string()).join("bin");
    // The fetched build first: where both are there, all machines test the same one.
    [fetched, packaged_bin(major)].into_iter().find(|bin| has_server(bin))
}

fn packaged_bin(major: u32) -> PathBuf {
    PathBuf::from(format!("/usr/lib/postgresql/{major}/bin"))
}

fn has_server(bin: &Path) -> bool {
    bin.join("postgres").is_file()
}

/// As in `scripts/postgresql-builds.sh`.
fn builds_directory() -> PathBuf {
    let named = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = || named("XDG_CACHE_HOME").or_else(|| Some(named("HOME")?.join(".cache"))).unwrap_or_default();
    let default = || if is_root() { "/var/cache".into() } else { cache() }.join("pghydrant/postgresql");
    named("PGHYDRANT_TEST_POSTGRESQL").unwrap_or_else(default)
}

/// A program of PostgreSQL: `psql`, `pg_amcheck`, …
pub fn postgres_program(name: &str) -> Result<PathBuf> {
    let program = postgres_bin().context("PostgreSQL is missing: start the test with requires!(Postgres)")?.join(name);
    super::ensure!(program.is_file(), "{} is missing", program.display());
    Ok(program)
}

/// `pg_ctl` and the like of the version that a data directory belongs to.
pub fn server_program(data: &Path, name: &str) -> Result<PathBuf> {
    let text = std::fs::read_to_string(data.join("PG_VERSION")).unwrap_or_default();
    let major = text.trim().parse().unwrap_or(MAJOR);
    match postgres_program(name) {
        Ok(program) if program.starts_with(packaged_bin(major)) => Ok(program),
        other => postgres_bin_of(major).map_or(other, |bin| Ok(bin.join(name))),
    }
}
