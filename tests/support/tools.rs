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

/// The directory of the server's binaries: `PGHYDRANT_TEST_PG_BIN`, PostgreSQL 15's, or the newest one's.
pub fn postgres_bin() -> Option<&'static Path> {
    static BIN: OnceLock<Option<PathBuf>> = OnceLock::new();
    BIN.get_or_init(|| {
        let named = env::var_os("PGHYDRANT_TEST_PG_BIN").map(PathBuf::from);
        let of = |major: u32| PathBuf::from(format!("/usr/lib/postgresql/{major}/bin"));
        let preferred = [15].into_iter().chain((13..=18).rev()).map(of);
        named.into_iter().chain(preferred).find(|bin| bin.join("postgres").is_file())
    })
    .as_deref()
}

/// A program of the server: `initdb`, `pg_amcheck`, …
pub fn postgres_program(name: &str) -> Result<PathBuf> {
    let program = postgres_bin().context("PostgreSQL is missing: start the test with requires!(Postgres)")?.join(name);
    super::ensure!(program.is_file(), "{} is missing", program.display());
    Ok(program)
}
