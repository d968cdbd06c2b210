//! What a test needs of the machine, and what happens where it is missing.
//!
//! Never silent: the test's name and what it lacks go to stderr and to the file that `scripts/run-tests.sh` counts.
//! With `CI=true` or `PGHYDRANT_REQUIRE_ALL=1` the test fails instead.

use std::env;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;

use super::tools;

/// Something that a machine may lack.
#[derive(Clone, Copy, Debug)]
pub enum Requirement {
    /// The tests run as root: they switch users, mount file systems, drop caches.
    Root,
    /// `/dev/fuse` can be opened by the server's user, and `fusermount3` is there.
    Fuse,
    /// The server's binaries, and a user that may run them.
    Postgres,
    /// The server of a major version; `scripts/postgresql-builds.sh` fetches those that Debian's package is not.
    Major(u32),
    /// Loop devices, to mount small file systems (root as well).
    LoopDevice,
    /// A program in PATH, and the Debian package that has it.
    Tool(&'static str, &'static str),
}

impl Requirement {
    /// What is missing, in words, with the cure; `None` where it is there.
    fn missing(self) -> Option<String> {
        match self {
            Self::Root => (!tools::is_root()).then(|| "root".to_owned()),
            Self::Fuse => missing_fuse(),
            Self::Postgres => tools::postgres_bin().is_none().then(|| "PostgreSQL (package postgresql)".to_owned()),
            Self::Major(major) => tools::postgres_bin_of(major)
                .is_none()
                .then(|| format!("PostgreSQL {major} (scripts/postgresql-builds.sh)")),
            Self::LoopDevice => {
                let there = tools::is_root() && Path::new("/dev/loop-control").exists();
                (!there).then(|| "loop devices, as root".to_owned())
            }
            Self::Tool(program, package) => {
                tools::find_program(program).is_none().then(|| format!("{program} (package {package})"))
            }
        }
    }
}

fn missing_fuse() -> Option<String> {
    let open = || OpenOptions::new().read(true).write(true).open("/dev/fuse");
    if let Err(error) = open() {
        return Some(format!("FUSE (/dev/fuse: {error})"));
    }
    tools::find_program("fusermount3").is_none().then(|| "fusermount3 (package fuse3)".to_owned())
}

/// True where `test` must be left out, which has been told and counted then.
pub fn leave_out(test: &str, requirements: &[Requirement]) -> bool {
    let missing: Vec<String> = requirements.iter().filter_map(|requirement| requirement.missing()).collect();
    if missing.is_empty() {
        return false;
    }
    let test = test.trim_end_matches("::here");
    let line = format!("{test}: lacks {}", missing.join(", "));
    let strict = |name: &str| env::var(name).is_ok_and(|value| !value.is_empty() && value != "0" && value != "false");
    assert!(!strict("CI") && !strict("PGHYDRANT_REQUIRE_ALL"), "{line}; no test may be left out here");
    eprintln!("left out: {line}");
    if let Ok(path) = env::var("PGHYDRANT_TESTS_LEFT_OUT") {
        // One short O_APPEND write: lines of parallel tests do not mix.
        let told = OpenOptions::new()
            .append(true)
            .create(true)
            .open(&path)
            .and_then(|mut file| file.write_all(format!("{line}\n").as_bytes()));
        assert!(told.is_ok(), "cannot write {path}: {told:?}");
    }
    true
}

/// `requires!(Postgres, Fuse);` at the start of a test that returns `Result<()>`.
macro_rules! requires {
    ($($requirement:expr),+ $(,)?) => {
        fn here() {}
        if $crate::support::requirements::leave_out(std::any::type_name_of_val(&here), &[$($requirement),+]) {
            return Ok(());
        }
    };
}
