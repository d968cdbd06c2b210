//! What a test needs of the machine; where that is missing, [`left_out`](super::left_out) tells and counts it.

use std::fs::OpenOptions;
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
    super::left_out::leave_out(test.trim_end_matches("::here"), &missing.join(", "));
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
