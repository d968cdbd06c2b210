//! The verbs `wal push` and `wal fetch`: PostgreSQL's `archive_command` and `restore_command`.
//!
//! PostgreSQL believes their exit status and nothing else. `push` ends with 0 only once the segment is durable.
//! `fetch` ends with 1 only where it is proven that there is no such file: PostgreSQL takes every status up to 125
//! for the end of the WAL and opens the database there. Everything else ends above 125 (see [`crate::exit::Faults`]).
//! Twice 1 means something else: to a standby, which asks again, that a segment is not there yet; to a server that
//! waited at the end of the WAL, that this end stays ([`standby::is_behind_the_end`]).

use std::path::{Path, PathBuf};

use engine::io::durable;
use engine::repository::Repository;
use engine::wal::{Fetched, Pushed, WalArchive};

use crate::context::Context;
use crate::exit::{Exit, Failure};
use crate::options::{ClusterOption, RepositoryOption};
use crate::restore::{marker, staging, standby};

/// Options of `wal push`.
#[derive(clap::Args, Debug)]
pub(crate) struct PushArguments {
    #[command(flatten)]
    pub(crate) repository: RepositoryOption,
    #[command(flatten)]
    pub(crate) cluster: ClusterOption,
    /// The file to archive (%p)
    pub(crate) path: PathBuf,
}

/// Options of `wal fetch`.
#[derive(clap::Args, Debug)]
pub(crate) struct FetchArguments {
    #[command(flatten)]
    pub(crate) repository: RepositoryOption,
    #[command(flatten)]
    pub(crate) cluster: ClusterOption,
    /// The name of the file to bring (%f)
    pub(crate) name: String,
    /// Where to put it (%p)
    pub(crate) path: PathBuf,
}

pub(crate) fn push(arguments: &PushArguments, context: &Context) -> anyhow::Result<Exit> {
    refuse_from_copy(&arguments.path)?;
    let repository = context.repository(&arguments.repository)?;
    let cluster = context.cluster_name(&arguments.cluster)?;
    let archive = WalArchive::for_push(&repository, &cluster, &arguments.path)?;
    match archive.push(&arguments.path)? {
        Pushed::Stored => tracing::info!("{} is archived", arguments.path.display()),
        Pushed::AlreadyThere => tracing::info!("{} was archived before", arguments.path.display()),
    }
    Ok(Exit::Done)
}

pub(crate) fn fetch(arguments: &FetchArguments, context: &Context) -> anyhow::Result<Exit> {
    let data = data_directory(&arguments.path);
    if is_segment(&arguments.name) && standby::is_behind_the_end(data, &arguments.name)? {
        standby::note_absence(&beside(&arguments.path, staging::DIRECTORY), &arguments.name);
        tracing::info!("{} lies behind the end of this recovery", arguments.name);
        return Ok(Exit::NoSuchSegment);
    }
    if bring_staged(&arguments.name, &arguments.path)? {
        return Ok(Exit::Done);
    }
    let repository = context.repository_path(&arguments.repository)?;
    // Without an answer PostgreSQL must wait: any would end its recovery.
    let repository = Repository::open_patiently(&repository)?;
    let archive = repository.cluster(&context.cluster_name(&arguments.cluster)?)?.wal();
    match archive.fetch(&arguments.name, &arguments.path) {
        Ok(Fetched::Delivered) => Ok(Exit::Done),
        Ok(Fetched::Absent) => {
            standby::note_absence(&beside(&arguments.path, staging::DIRECTORY), &arguments.name);
            tracing::info!("{} is not in the archive", arguments.name);
            Ok(Exit::NoSuchSegment)
        }
        // A gap, and not a repository that is not there.
        Err(engine::Error::NotFound(gap)) if asks_again(&arguments.path) && archive.prove_readable().is_ok() => {
            tracing::warn!("{gap}");
            Ok(Exit::NoSuchSegment)
        }
        Err(error) => Err(error.into()),
    }
}

/// A standby takes no answer for the end of the WAL and asks again, so a gap that the archiver is about to close must not
/// bring it down; a restore of ours that runs as a standby is told of every gap.
fn asks_again(path: &Path) -> bool {
    data_directory(path).join(standby::STANDBY_SIGNAL).exists() && !beside(path, staging::DIRECTORY).exists()
}

/// Whose `pg_wal` the file that PostgreSQL names with %p lies in.
fn data_directory(path: &Path) -> &Path {
    path.parent().and_then(Path::parent).unwrap_or(Path::new(""))
}

fn is_segment(name: &str) -> bool {
    name.len() == 24 && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// A copy has its original's `archive_command`: what it archived would overwrite or contradict the original's.
fn refuse_from_copy(path: &Path) -> anyhow::Result<()> {
    let mark = beside(path, marker::PATH);
    match mark.symlink_metadata() {
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(cause) => Err(engine::Error::io("look for", mark, cause).into()),
        Ok(_) => Err(Failure::new(Exit::Failed, format!("{} is a restored copy: it does not archive", mark.display()))
            .hint(format!("if the original is gone for good, remove {} (or restore with --adopt)", mark.display()))
            .into()),
    }
}

/// A restore lays segments ready, synced and whole, beside `pg_wal/RECOVERYXLOG`: moving one is a rename. History
/// files are never staged: which timelines there are, the repository says.
fn bring_staged(name: &str, to: &Path) -> anyhow::Result<bool> {
    if !is_segment(name) {
        return Ok(false);
    }
    let staged = beside(to, staging::DIRECTORY).join(name);
    match durable::rename_in_place(&staged, to) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// What restores keep in `pg_wal` lies beside the file that PostgreSQL names with %p.
fn beside(path: &Path, in_data_directory: &str) -> PathBuf {
    let name = Path::new(in_data_directory).file_name().unwrap_or_default();
    path.with_file_name(name)
}
