//! What a restore will do, decided from what was seen: pure, so that `--plan` is free and tested without a disk.
//!
//! The plan is complete: the journal of a session holds it, and `retry` follows it without deciding anything again.

use std::path::{Path, PathBuf};

use engine::units::{BackupLabel, ClusterName};
use serde::{Deserialize, Serialize};

use super::check::Thoroughness;
use super::delta::Delta;
use super::handover::Handover;
use super::target::Target;
use super::way::Io;

/// Where the copier reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Source {
    /// A FUSE mount of the backup
    #[default]
    Mount,
    /// The repository's blocks, without FUSE
    Blocks,
}

/// What is at a place before the restore: what `cancel` goes back to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Before {
    /// Nothing: the directory is made, and removed by `cancel`.
    Absent,
    /// An empty directory: emptied again by `cancel`.
    Empty,
    /// The cluster that a delta overwrites, or its files in a tablespace: never removed.
    Existing,
}

/// A directory that the restore fills.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Place {
    /// Absolute, without links.
    pub(crate) path: PathBuf,
    pub(crate) before: Before,
    /// Directories above it that are missing, the outermost first.
    pub(crate) missing_parents: Vec<PathBuf>,
}

/// A tablespace and the directory that it gets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TablespacePlan {
    pub(crate) oid: u32,
    pub(crate) name: String,
    pub(crate) place: Place,
}

/// The instance's operating system user.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// Everything that a restore will do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Plan {
    pub(crate) repository: PathBuf,
    pub(crate) cluster: ClusterName,
    pub(crate) backup: BackupLabel,
    pub(crate) target: Target,
    pub(crate) data: Place,
    pub(crate) tablespaces: Vec<TablespacePlan>,
    /// Chosen with `--port`; else the configuration's.
    pub(crate) port: Option<u16>,
    pub(crate) owner: User,
    /// The server's programs.
    pub(crate) programs: PathBuf,
    /// Our own binary, which the owner can run; a journal of an earlier version names none.
    #[serde(default)]
    pub(crate) program: PathBuf,
    pub(crate) source: Source,
    /// How bytes get into the target; a journal of an earlier version leaves it to the machine.
    #[serde(default)]
    pub(crate) io: Option<Io>,
    /// What files share with the repository is not hashed.
    #[serde(default)]
    pub(crate) trust_repository: bool,
    /// Where the session's mount goes, if the user says where.
    pub(crate) mount_directory: Option<PathBuf>,
    /// The copy takes the original's place: it archives and replicates as the original did.
    pub(crate) adopt: bool,
    /// Copy only; the first start recovers.
    pub(crate) no_start: bool,
    /// Where the instance is handed over to.
    #[serde(default)]
    pub(crate) handover: Handover,
    /// How the server is checked before it opens for others, if it is.
    #[serde(default)]
    pub(crate) check: Option<Thoroughness>,
    /// The archive has a gap somewhere behind the target, and goes on after it.
    #[serde(default)]
    pub(crate) gap_behind: bool,
    /// What could not be proven beforehand, and PostgreSQL will find out.
    #[serde(default)]
    pub(crate) unproven: Option<String>,
    pub(crate) bytes: u64,
    pub(crate) files: u64,
    /// Over the cluster that is there.
    #[serde(default)]
    pub(crate) delta: Option<Delta>,
}

impl Plan {
    /// The data directory.
    pub(crate) fn data(&self) -> &Path {
        &self.data.path
    }

    /// The `postgresql.conf` that is the instance's own, once it is restored.
    pub(crate) fn configuration_file(&self) -> PathBuf {
        let directory = self.handover.configuration.as_ref().map_or(self.data(), |placed| &placed.place.path);
        directory.join("postgresql.conf")
    }

    /// Every directory that the restore fills, the data directory first.
    pub(crate) fn places(&self) -> impl Iterator<Item = &Place> {
        std::iter::once(&self.data).chain(self.tablespaces.iter().map(|tablespace| &tablespace.place))
    }

    /// The session's own directory in the target: map, original configuration, socket. Gone when the session ends.
    pub(crate) fn session_directory(&self) -> PathBuf {
        self.data().join(SESSION_DIRECTORY)
    }
}

/// See [`Plan::session_directory`].
pub(crate) const SESSION_DIRECTORY: &str = "pghydrant.session";
