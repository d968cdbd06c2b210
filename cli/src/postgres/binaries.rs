//! Where the server's programs are, and which version they are.
//!
//! Distributions install several major versions beside each other, mostly outside `PATH`; so the places are
//! asked in the order in which a user would expect to be obeyed: `--pg-bin`, `PATH`, the packages' directories,
//! `pg_config`. A data directory names its major version in `PG_VERSION`, and only that version will do.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result, bail};

use super::owner::Owner;

/// Where packages put `bin` directories; `*` stands for one component.
const PACKAGE_PLACES: [(&str, &str); 4] = [
    ("/usr/lib/postgresql", "bin"), // Debian, Ubuntu
    ("/usr", "bin"),                // Red Hat: /usr/pgsql-17/bin
    ("/usr/lib", "bin"),            // Alpine: /usr/lib/postgresql17/bin
    ("/opt", "bin"),
];

/// What `postgres --version` said, by the very file that said it: every step of a restore wants to know.
static ASKED: Mutex<BTreeMap<(PathBuf, Mark), Version>> = Mutex::new(BTreeMap::new());

/// A program that was replaced, an upgrade in place say, has another.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Mark {
    device: u64,
    inode: u64,
    bytes: u64,
    /// Seconds and nanoseconds.
    changed: (i64, i64),
}

impl Mark {
    fn of(program: &Path) -> Option<Self> {
        let metadata = program.metadata().ok()?;
        let changed = (metadata.ctime(), metadata.ctime_nsec());
        Some(Self { device: metadata.dev(), inode: metadata.ino(), bytes: metadata.len(), changed })
    }
}

/// A PostgreSQL version as `server_version_num` has it: 150018 is 15.18.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version(pub(crate) u32);

impl Version {
    /// 15 of 15.18: what must be the same for the data directory and the programs.
    pub(crate) const fn major(self) -> u32 {
        self.0 / 10_000
    }

    /// The version in the output of `postgres --version`: `postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)`.
    /// Development versions (`18beta1`, `19devel`) count as minor 0.
    pub(crate) fn parse(output: &str) -> Option<Self> {
        let text = output.split_once("(PostgreSQL) ")?.1;
        let number = |text: &str| {
            let digits = text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len());
            text[..digits].parse::<u32>().ok().filter(|number| *number < 10_000)
        };
        let major = number(text)?;
        let minor = text
            .split_whitespace()
            .next()
            .and_then(|version| version.split_once('.'))
            .and_then(|(_, minor)| number(minor))
            .unwrap_or(0);
        Some(Self(major * 10_000 + minor))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major(), self.0 % 10_000)
    }
}

/// A directory with PostgreSQL's server programs, all of one version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Binaries {
    directory: PathBuf,
    version: Version,
}

impl Binaries {
    /// The programs in `directory`, which must hold `postgres`.
    pub(crate) fn in_directory(directory: &Path) -> Result<Self> {
        let postgres = directory.join("postgres");
        let mark = Mark::of(&postgres);
        let known = || ASKED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mark) = mark
            && let Some(version) = known().get(&(postgres.clone(), mark))
        {
            return Ok(Self { directory: directory.to_owned(), version: *version });
        }
        let output = asking(&postgres)?
            .arg("--version")
            .env("LC_ALL", "C")
            .output()
            .with_context(|| format!("cannot run {} --version", postgres.display()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version = Version::parse(&text).filter(|_| output.status.success()).with_context(|| {
            format!("{} --version gave no version: \"{}\"", postgres.display(), text.trim().escape_debug())
        })?;
        if let Some(mark) = mark {
            known().insert((postgres, mark), version);
        }
        Ok(Self { directory: directory.to_owned(), version })
    }

    /// The programs of version `major` (or of the newest, where none is asked for): from `chosen` alone if it is
    /// given, else from the first place that has them.
    pub(crate) fn find(chosen: Option<&Path>, major: Option<u32>) -> Result<Self> {
        if let Some(directory) = chosen {
            let found = Self::in_directory(directory)?;
            if let Some(major) = major
                && found.version.major() != major
            {
                bail!("{} holds PostgreSQL {}, not {major}", directory.display(), found.version);
            }
            return Ok(found);
        }
        let found = match major {
            // The first that fits: the places behind it need not be asked.
            Some(major) => installed().find(|found| found.version.major() == major),
            None => {
                let mut all = Self::installed();
                all.sort_by_key(|found| std::cmp::Reverse(found.version.major()));
                all.into_iter().next()
            }
        };
        match (found, major) {
            (Some(found), _) => Ok(found),
            (None, Some(major)) => bail!(
                "the server programs of PostgreSQL {major} are not installed here (looked in PATH and in {})",
                PACKAGE_PLACES.map(|(root, _)| root).join(", ")
            ),
            (None, None) => bail!("no PostgreSQL server programs are installed here"),
        }
    }

    /// Everything that is installed, in the order in which it would be chosen.
    pub(crate) fn installed() -> Vec<Self> {
        installed().collect()
    }

    /// The `bin` directory.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// The version of all programs in it.
    pub(crate) fn version(&self) -> Version {
        self.version
    }

    /// The path of a program, whether or not it exists.
    pub(crate) fn program(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Whether a program is there: `pg_waldump`, `pg_verifybackup`, … come in other packages on some systems.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.program(name).is_file()
    }

    /// The path of a program that must exist.
    pub(crate) fn require(&self, name: &str) -> Result<PathBuf> {
        let program = self.program(name);
        if !program.is_file() {
            bail!("{} is missing from {}", name, self.directory.display());
        }
        Ok(program)
    }
}

/// Everything that is installed, looked for as far as somebody asks.
fn installed() -> impl Iterator<Item = Binaries> {
    let mut known: Vec<PathBuf> = Vec::new();
    let places = candidate_directories().into_iter().chain(std::iter::once_with(told_by_pg_config).flatten());
    places.filter_map(move |directory| {
        // A link in PATH leads to the package's own directory, where the other programs are.
        let postgres = directory.join("postgres").canonicalize().ok()?;
        let directory = postgres.parent()?;
        // A directory without a working `postgres` is simply none of ours.
        if known.iter().any(|known| known == directory) {
            return None;
        }
        let binaries = Binaries::in_directory(directory).ok()?;
        known.push(directory.to_owned());
        Some(binaries)
    })
}

/// A command that only asks a program for something: as whoever could have put the program there, if that is not root.
fn asking(program: &Path) -> Result<Command> {
    if rustix::process::geteuid().is_root() {
        let cannot = || format!("cannot run {}", program.display());
        let program = program.canonicalize().with_context(cannot)?;
        for place in program.ancestors() {
            let metadata = place.metadata().with_context(cannot)?;
            if metadata.uid() != 0 {
                return Owner::numbered(metadata.uid(), metadata.gid())?.command(&program);
            }
        }
        return Ok(Command::new(program));
    }
    Ok(Command::new(program))
}

fn candidate_directories() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places: Vec<PathBuf> = std::env::split_paths(&path).filter(|place| place.is_absolute()).collect();
    for (root, leaf) in PACKAGE_PLACES {
        let mut versions: Vec<PathBuf> = std::fs::read_dir(root)
            .into_iter()
            .flatten()
            .flatten()
            .filter(|entry| root == "/usr/lib/postgresql" || is_package_directory(&entry.file_name()))
            .map(|entry| entry.path().join(leaf))
            .collect();
        versions.sort();
        places.extend(versions.into_iter().rev());
    }
    places
}

/// Debian's is a script, so it is asked last.
fn told_by_pg_config() -> Option<PathBuf> {
    let output = Command::new("pg_config").arg("--bindir").output().ok().filter(|output| output.status.success())?;
    Some(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim_end()))
}

/// `pgsql-17`, `postgresql17`, `postgresql-17`: a version's own tree.
fn is_package_directory(name: &OsStr) -> bool {
    name.to_str().is_some_and(|name| name.starts_with("pgsql") || name.starts_with("postgresql"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_what_postgres_prints() {
        let debian = Version::parse("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n");
        assert_eq!(debian, Some(Version(150_018)));
        assert_eq!(Version::parse("postgres (PostgreSQL) 18beta1"), Some(Version(180_000)));
        assert_eq!(Version::parse("postgres (PostgreSQL) 19devel"), Some(Version(190_000)));
        assert_eq!(Version::parse("pg_ctl 15"), None);
        assert_eq!(Version::parse("postgres (PostgreSQL) 99999999999"), None);
        assert_eq!(Version(150_018).to_string(), "15.18");
        assert_eq!(Version(150_018).major(), 15);
    }

    #[test]
    fn a_directory_without_postgres_is_refused_by_name() {
        let error = Binaries::find(Some(Path::new("/nonexistent")), None).map_err(|error| format!("{error:#}"));
        assert!(error.is_err_and(|text| text.contains("/nonexistent/postgres")));
    }
}
