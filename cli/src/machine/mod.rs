//! What this machine has of what a backup's server needs besides its files: libraries, locales, memory.
//!
//! A server that was moved to a machine without one of them does not start, lets nobody in, or sorts its text by other
//! rules than its indexes; and says so only when everything is copied. [`look`] finds out, touching nothing;
//! [`judge::judge`] is pure. Preflight and `doctor` ask the same question and get the same answer.
//!
//! What needs no look: `wal_segment_size`, which stands in `pg_control`, and every build takes it from there; and what a
//! hot standby needs more of, which a restore raises by itself (see [`crate::restore`]).

mod judge;
mod libraries;
mod locales;
mod memory;
mod needs;
mod packages;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

pub(crate) use judge::{Finding, Weight, judge};
pub(crate) use libraries::{directory as library_directory, names as library_names, stem as library_stem};
pub(crate) use memory::Memory;
pub(crate) use needs::Needs;

use crate::postgres::binaries::Binaries;

/// What was found.
#[derive(Clone, Debug, Default)]
pub(crate) struct Facts {
    /// Where the programs look for libraries (`pkglibdir`); without it nothing is known of libraries.
    pub(crate) library_directory: Option<PathBuf>,
    /// Of the libraries that are needed, those that are not here, by their names.
    pub(crate) missing_libraries: BTreeSet<String>,
    /// Of the locales that are needed, those that are not here.
    pub(crate) missing_locales: BTreeSet<String>,
    /// `2.36`.
    pub(crate) libc_version: Option<String>,
    /// The major version of the ICU that the programs run with.
    pub(crate) icu_version: Option<String>,
    /// How the programs were built.
    pub(crate) build: Option<Build>,
    pub(crate) memory: Memory,
    /// `apt-get` is here.
    pub(crate) has_apt: bool,
}

/// What is decided when PostgreSQL is compiled, and a data directory must match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Build {
    pub(crate) page_bytes: u32,
    pub(crate) relation_segment_pages: u32,
    pub(crate) wal_page_bytes: u32,
}

/// Looks at the machine, for a server that would run with `binaries`.
pub(crate) fn look(binaries: Option<&Binaries>, needs: &Needs) -> Facts {
    let library_directory = binaries.and_then(library_directory);
    let missing = |directory: &PathBuf| {
        let is_missing = |name: &&String| !libraries::is_there(name, directory, &needs.library_path());
        needs.libraries().iter().filter(is_missing).cloned().collect()
    };
    // Programs answer these; side by side they cost the time of the slowest.
    let (libc_version, icu_version, build) = std::thread::scope(|scope| {
        let libc = scope.spawn(libc_version);
        let icu = scope.spawn(|| binaries.and_then(icu_of_programs));
        let build = binaries.and_then(build);
        (libc.join().ok().flatten(), icu.join().ok().flatten(), build)
    });
    Facts {
        missing_libraries: library_directory.as_ref().map(missing).unwrap_or_default(),
        library_directory,
        missing_locales: locales::missing(needs.locales().into_iter()),
        libc_version,
        icu_version,
        build,
        memory: Memory::look(needs.huge_page_bytes()),
        has_apt: Path::new("/usr/bin/apt-get").exists(),
    }
}

/// How many locales there are, if the machine tells.
pub(crate) fn locale_count() -> Option<usize> {
    locales::count()
}

/// glibc's version; no other C library says one, and none sorts text by more than its bytes.
pub(crate) fn libc_version() -> Option<String> {
    static ASKED: OnceLock<Option<String>> = OnceLock::new();
    let ask = || {
        let text = output(Command::new("getconf").arg("GNU_LIBC_VERSION"))?;
        text.trim().strip_prefix("glibc ").map(str::to_owned)
    };
    ASKED.get_or_init(ask).clone()
}

/// The ICU that a running server has loaded.
pub(crate) fn icu_of_process(pid: u32) -> Option<String> {
    icu_version(&std::fs::read_to_string(format!("/proc/{pid}/maps")).ok()?)
}

/// The ICU that programs would load.
pub(crate) fn icu_of_programs(binaries: &Binaries) -> Option<String> {
    icu_version(&output(Command::new("ldd").arg(binaries.program("postgres")))?)
}

/// The number behind `libicui18n.so.`: each major version has its own order of text.
fn icu_version(text: &str) -> Option<String> {
    let (_, rest) = text.split_once("libicui18n.so.")?;
    let digits = rest.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(rest.len());
    (digits > 0).then(|| rest[..digits].to_owned())
}

/// Asked of the programs themselves, without a data directory: root may do that as well.
fn build(binaries: &Binaries) -> Option<Build> {
    let ask = |name: &str| -> Option<u32> {
        let mut command = Command::new(binaries.program("postgres"));
        output(command.args(["-C", name, "-c", "config_file=/dev/null", "-D", "/"]))?.trim().parse().ok()
    };
    std::thread::scope(|scope| {
        let asked = ["block_size", "segment_size", "wal_block_size"].map(|name| scope.spawn(move || ask(name)));
        let [page_bytes, relation_segment_pages, wal_page_bytes] = asked.map(|asked| asked.join().ok().flatten());
        Some(Build {
            page_bytes: page_bytes?,
            relation_segment_pages: relation_segment_pages?,
            wal_page_bytes: wal_page_bytes?,
        })
    })
}

/// What a program prints, if it is here and content.
fn output(command: &mut Command) -> Option<String> {
    let output = command.env("LC_ALL", "C").stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn icu_is_known_by_the_name_of_its_library() {
        let loaded = "7f00-7f01 r-xp 0 08:01 42 /usr/lib/x86_64-linux-gnu/libicui18n.so.72.1\n";
        assert_eq!(icu_version(loaded).as_deref(), Some("72"));
        let linked = "\tlibicui18n.so.60 => /opt/lib/libicui18n.so.60 (0x7f13)\n\tlibc.so.6 => /lib/libc.so.6\n";
        assert_eq!(icu_version(linked).as_deref(), Some("60"));
        assert_eq!(icu_version("\tlibc.so.6 => /lib/libc.so.6\n"), None);
        assert_eq!(icu_version("libicui18n.so.x"), None);
    }
}
