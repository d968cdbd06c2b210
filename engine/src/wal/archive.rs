//! The archive of one cluster.

use std::path::Path;

use super::history::History;
use super::name::{SegmentName, WalFile};
use crate::Result;
use crate::repository::{Cluster, Repository};
use crate::units::{ClusterName, Lsn, Timeline};

/// What became of a push.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pushed {
    /// It is in the archive now, durable.
    Stored,
    /// The same content was there.
    AlreadyThere,
}

/// What became of a fetch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fetched {
    /// It is in place.
    Delivered,
    /// Proven: the archive is readable, has no such file, and nothing later of that timeline.
    Absent,
}

/// The WAL of a cluster.
#[derive(Clone, Debug)]
pub struct WalArchive {
    cluster: Cluster,
}

/// One file of the archive, open for reading; cheap to clone, shared by threads.
#[derive(Clone, Debug)]
pub struct WalObject {
    bytes: u64,
}

#[allow(unused_variables, clippy::unimplemented)]
impl WalArchive {
    pub(crate) fn new(cluster: Cluster) -> Self {
        Self { cluster }
    }
    /// Its cluster.
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }
    /// The archive that `path` belongs to: that of the cluster, which is made if `path` is its first segment.
    pub fn for_push(repository: &Repository, cluster: &ClusterName, path: &Path) -> Result<Self> {
        unimplemented!()
    }
    /// Stores the file `path` under its name: durable when it returns. The same content again is no error, another
    /// content under the same name is [`Error::Refused`](crate::Error).
    pub fn push(&self, path: &Path) -> Result<Pushed> {
        unimplemented!()
    }
    /// Writes the file `name` to `to`, verified.
    pub fn fetch(&self, name: &str, to: &Path) -> Result<Fetched> {
        unimplemented!()
    }
    /// Whether the archive has a file of that name.
    pub fn contains(&self, name: &str) -> Result<bool> {
        unimplemented!()
    }
    /// Opens a file of the archive, for a mount; none if there is no such file.
    pub fn open(&self, name: &str) -> Result<Option<WalObject>> {
        unimplemented!()
    }
    /// Timelines with anything in the archive, ascending.
    pub fn timelines(&self) -> Result<Vec<Timeline>> {
        unimplemented!()
    }
    /// Whole segments of a timeline, ascending.
    pub fn segments(&self, timeline: Timeline) -> Result<Vec<SegmentName>> {
        unimplemented!()
    }
    /// Every file of a timeline: segments, the partial one, labels of backups, its history.
    pub fn files(&self, timeline: Timeline) -> Result<Vec<WalFile>> {
        unimplemented!()
    }
    /// The history of a timeline; timeline 1 has none, so has one that was not archived.
    pub fn history(&self, timeline: Timeline) -> Result<Option<History>> {
        unimplemented!()
    }
    /// The segments that are missing to replay from `start` to `stop` (none: only `start`'s own) along `path`.
    pub fn missing_between(&self, start: Lsn, path: &History, stop: Option<Lsn>) -> Result<Vec<SegmentName>> {
        unimplemented!()
    }
}

#[allow(unused_variables, clippy::unimplemented)]
impl WalObject {
    /// The length of the file's content.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
    /// Reads content from `offset` on, verified; how much, at the end less than `out` holds.
    pub fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<usize> {
        unimplemented!()
    }
}
