//! The way that bytes take into the target: decided beforehand, shown by `--plan`, forced by `--io`.
//!
//! Where files can share blocks with the repository's packs, nothing is faster; next come io_uring's rings, then threads.
//! What the machine refuses is known here already. What a single file refuses shows only during the copy, which then takes
//! the next best way, and says so.

use std::path::Path;

use engine::codec::Compression;
use engine::hydration::{self, Filled, Outlined};
use engine::io::{Engine, LocalDisk, Sharing, try_ring};
use engine::repository::Backup;
use serde::{Deserialize, Serialize};

use super::plan::{Plan, Source};
use super::preflight::Problem;
use crate::human;

/// What the user asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Wanted {
    /// The best that the machine has
    #[default]
    Auto,
    /// io_uring, past the page cache
    Uring,
    /// Files share raw blocks with the repository, on XFS and btrfs
    Reflink,
    /// pread and pwrite on threads
    Plain,
}

/// What the plan has decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Io {
    Uring,
    Reflink,
    Plain,
}

/// What was seen: why a way cannot be taken.
#[derive(Clone, Debug)]
pub(crate) struct WayFacts {
    pub(crate) uring: Result<(), String>,
    pub(crate) reflink: Result<(), String>,
    /// The repository is on another machine and FUSE cannot be used here: only its blocks are left.
    pub(crate) only_blocks: bool,
}

/// Looks, with files that never have a name.
pub(crate) fn look<'a>(
    only_blocks: bool,
    backup: Option<&Backup>,
    directories: impl Iterator<Item = &'a Path>,
) -> WayFacts {
    let uring = try_ring().map_err(|cause| uring_refusal(&cause));
    WayFacts { uring, reflink: look_at_sharing(backup, directories), only_blocks }
}

fn uring_refusal(cause: &std::io::Error) -> String {
    let switch = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
    match switch.trim() {
        "" | "0" if cause.kind() == std::io::ErrorKind::OutOfMemory => {
            format!("the locked-memory limit has no room for its rings: {cause}")
        }
        "" | "0" => format!("the kernel, or a container's filter, refuses it: {cause}"),
        disabled => format!("kernel.io_uring_disabled is {disabled}"),
    }
}

fn look_at_sharing<'a>(backup: Option<&Backup>, mut directories: impl Iterator<Item = &'a Path>) -> Result<(), String> {
    let Some(backup) = backup else { return Err("there is no backup to restore".to_owned()) };
    match backup.info.compression {
        Compression::None => {}
        compressed => return Err(format!("the backup's blocks are compressed ({compressed})")),
    }
    directories.try_for_each(|directory| match hydration::can_share_with(backup, directory) {
        Ok(Sharing::Done) => Ok(()),
        Ok(Sharing::Refused(why)) => Err(format!("{}: {why}", directory.display())),
        Err(error) => Err(error.to_string()),
    })
}

/// Chooses where the copy reads, and how.
pub(crate) fn choose(wanted: Wanted, source: Option<Source>, facts: &WayFacts) -> Result<(Source, Io), Problem> {
    let other = "leave --io out: the next best way is taken then";
    let reading = source.unwrap_or(if facts.only_blocks { Source::Blocks } else { Source::default() });
    match (wanted, &facts.reflink, &facts.uring) {
        (Wanted::Reflink, ..) if source == Some(Source::Mount) => Err(Problem::new(
            "--io reflink shares blocks of the repository itself, and --source mount reads a mount",
            "leave one of them out",
        )),
        (Wanted::Reflink, Err(why), _) => {
            Err(Problem::new(format!("--io reflink: no blocks can be shared with the repository: {why}"), other))
        }
        (Wanted::Uring, _, Err(why)) => Err(Problem::new(
            format!("--io uring: io_uring cannot be used: {why}"),
            format!("`pghydrant doctor` tells the cure; or {other}"),
        )),
        (Wanted::Reflink, Ok(()), _) => Ok((Source::Blocks, Io::Reflink)),
        (Wanted::Auto, Ok(()), _) if source != Some(Source::Mount) => Ok((Source::Blocks, Io::Reflink)),
        (Wanted::Plain, ..) | (Wanted::Auto, _, Err(_)) => Ok((reading, Io::Plain)),
        (Wanted::Uring | Wanted::Auto, _, Ok(())) => Ok((reading, Io::Uring)),
    }
}

/// What is worth knowing of a way that was chosen.
pub(crate) fn warnings(wanted: Wanted, trusts: bool, io: Io, facts: &WayFacts) -> Vec<String> {
    let mut warnings = Vec::new();
    if let (Wanted::Auto, Io::Plain, Err(why)) = (wanted, io, &facts.uring) {
        warnings.push(format!(
            "io_uring cannot be used ({why}): bytes move by threads, at a higher cost (cure: pghydrant doctor)"
        ));
    }
    if trusts && io != Io::Reflink {
        let why = facts.reflink.as_ref().err().map(|why| format!(" ({why})")).unwrap_or_default();
        warnings.push(format!("--trust-repository changes nothing: blocks are copied{why}, and verified on their way"));
    }
    warnings
}

impl Plan {
    /// The disk that goes the plan's way, or the next best one where the machine has changed since.
    pub(super) fn disk(&self) -> LocalDisk {
        match self.io {
            Some(Io::Plain) => LocalDisk::with(Engine::Plain, true),
            Some(Io::Uring | Io::Reflink) | None => LocalDisk::new(),
        }
    }

    /// In words, for `--plan`.
    pub(super) fn way(&self) -> &'static str {
        match (self.io, self.trust_repository) {
            (Some(Io::Reflink), false) => {
                "reflink: files share blocks with the repository, all hashed before a server can start"
            }
            (Some(Io::Reflink), true) => {
                "reflink: files share blocks with the repository, not hashed (--trust-repository)"
            }
            (Some(Io::Plain), _) => "pread and pwrite on threads",
            (Some(Io::Uring) | None, _) => "io_uring",
        }
    }
}

/// The way that a copy has taken, on one line.
pub(super) fn taken(filled: &Filled, outlined: &Outlined, trusted: bool) -> String {
    let mut parts = Vec::new();
    if filled.shared_bytes > 0 {
        let proof = if trusted { "not hashed (--trust-repository)" } else { "hashed" };
        parts.push(format!("{} shared with the repository, {proof}", human::bytes(filled.shared_bytes)));
    } else if trusted && filled.present_blocks > 0 {
        parts.push("what was shared with the repository before was not hashed (--trust-repository)".to_owned());
    }
    if let Some(why) = filled.unshared {
        parts.push(format!("blocks copied that could have been shared: {why}"));
    }
    if !trusted || filled.shared_bytes < filled.bytes {
        parts.push(filled.io.clone());
    }
    if outlined.unallocated {
        parts.push("space not allocated beforehand (the file system cannot)".to_owned());
    }
    parts.join("; ")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn facts(uring: bool, reflink: bool) -> WayFacts {
        let fact = |is_there: bool, why: &str| if is_there { Ok(()) } else { Err(why.to_owned()) };
        WayFacts { uring: fact(uring, "switched off"), reflink: fact(reflink, "ext4 cannot"), only_blocks: false }
    }

    #[test]
    fn the_best_way_that_there_is_is_taken() {
        let auto = |source, uring, reflink| choose(Wanted::Auto, source, &facts(uring, reflink)).unwrap();
        assert_eq!(auto(None, true, true), (Source::Blocks, Io::Reflink));
        assert_eq!(auto(Some(Source::Blocks), false, true), (Source::Blocks, Io::Reflink));
        assert_eq!(auto(Some(Source::Mount), true, true), (Source::Mount, Io::Uring));
        assert_eq!(auto(None, true, false), (Source::Mount, Io::Uring));
        assert_eq!(auto(None, false, false), (Source::Mount, Io::Plain));
        let told = warnings(Wanted::Auto, true, Io::Plain, &facts(false, false));
        assert!(told[0].contains("switched off") && told[1].contains("ext4 cannot"), "{told:?}");
        assert!(warnings(Wanted::Auto, true, Io::Reflink, &facts(true, true)).is_empty());
        assert!(warnings(Wanted::Plain, false, Io::Plain, &facts(false, false)).is_empty());
    }

    #[test]
    fn what_is_forced_is_taken_or_refused_with_the_reason() {
        for (wanted, io) in [(Wanted::Uring, Io::Uring), (Wanted::Plain, Io::Plain)] {
            assert_eq!(choose(wanted, None, &facts(true, true)), Ok((Source::Mount, io)));
            assert_eq!(choose(wanted, Some(Source::Blocks), &facts(true, true)), Ok((Source::Blocks, io)));
        }
        assert_eq!(choose(Wanted::Reflink, None, &facts(true, true)), Ok((Source::Blocks, Io::Reflink)));
        let afar = WayFacts { only_blocks: true, ..facts(true, false) };
        assert_eq!(choose(Wanted::Auto, None, &afar), Ok((Source::Blocks, Io::Uring)));
        assert_eq!(choose(Wanted::Auto, Some(Source::Mount), &afar), Ok((Source::Mount, Io::Uring)));
        assert_eq!(choose(Wanted::Plain, None, &facts(false, false)), Ok((Source::Mount, Io::Plain)));
        let refused = |wanted, source, why: &str| {
            let problem = choose(wanted, source, &facts(false, false)).unwrap_err();
            assert!(problem.what.contains(why), "{problem}");
        };
        refused(Wanted::Uring, None, "switched off");
        refused(Wanted::Reflink, None, "ext4 cannot");
        refused(Wanted::Reflink, Some(Source::Mount), "--source mount");
    }
}
