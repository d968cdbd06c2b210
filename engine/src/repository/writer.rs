//! Writing a backup.

use crate::Result;
use crate::checksum::Hash;
use crate::format::backup::{BackupInfo, BadPage, ServerInfo, Snapshot, Tablespace, WalRange};
use crate::format::block::BlockRecord;
use crate::format::file::FileRecord;
use crate::repository::{Backup, Cluster};
use crate::units::BackupLabel;

/// What a backup compares its blocks with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parent {
    /// With nothing: every block is stored.
    Full,
    /// With the newest backup, where there is one.
    Latest,
}

/// What became of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All zero.
    Zero,
    /// The same as the parent's.
    Shared,
    /// Stored as the changed pages over the parent's.
    Patched,
    /// Stored whole.
    Stored,
}

/// What only the caller knows of a backup; the writer adds the rest of [`BackupInfo`].
#[derive(Clone, Debug)]
pub struct Description {
    /// See [`BackupInfo::stopped_at`].
    pub stopped_at: String,
    /// See [`BackupInfo::stopped_unix`].
    pub stopped_unix: i64,
    /// See [`BackupInfo::server`].
    pub server: ServerInfo,
    /// See [`BackupInfo::wal`].
    pub wal: WalRange,
    /// See [`BackupInfo::snapshot`].
    pub snapshot: Snapshot,
    /// See [`BackupInfo::tablespaces`].
    pub tablespaces: Vec<Tablespace>,
    /// See [`BackupInfo::bad_pages`].
    pub bad_pages: Vec<BadPage>,
}

/// A leaf of the manifest that is written: 1 to `LEAF_RECORDS` block records.
#[derive(Clone, Debug)]
pub struct LeafRef {
    _reference: (),
}

/// A backup on its way. `&self` methods are for all workers at once. Dropped unfinished, it leaves only garbage that
/// the next one sweeps.
#[derive(Debug)]
pub struct BackupWriter {
    label: BackupLabel,
    parent: Option<Backup>,
}

/// One worker's way into the packs: blocks that it puts one after another lie beside each other.
#[derive(Debug)]
pub struct PackWriter {
    _shared: (),
}

#[allow(unused_variables, clippy::unimplemented)]
impl BackupWriter {
    pub(super) fn begin(cluster: &Cluster, parent: Parent) -> Result<Self> {
        unimplemented!()
    }
    /// Its name.
    pub fn label(&self) -> &BackupLabel {
        &self.label
    }
    /// The backup that blocks are compared with. Its `manifest.file(path)` and `manifest.blocks(..)` give the parents
    /// of a file's blocks.
    pub fn parent(&self) -> Option<&Backup> {
        self.parent.as_ref()
    }
    /// A pack for one worker. `PackWriter` is `Send` and owns what it needs; end it with [`PackWriter::finish`].
    pub fn worker(&self) -> Result<PackWriter> {
        unimplemented!()
    }
    /// Writes up to `LEAF_RECORDS` records of a group as a leaf, or shares the parent's equal one. Every leaf of a group
    /// but its last is full.
    pub fn commit_leaf(&self, records: &[BlockRecord]) -> Result<LeafRef> {
        unimplemented!()
    }
    /// Writes the files of a group, in path order, with the group's leaves. `first_block` of a file counts from the
    /// group's first leaf (`leaf * LEAF_RECORDS + slot`). Groups come in any order; `position` is a group's place among
    /// them all, in path order (numbers may be left out).
    pub fn commit_group(&self, position: u64, files: &[FileRecord], leaves: Vec<LeafRef>) -> Result<()> {
        unimplemented!()
    }
    /// Makes everything durable, then commits.
    pub fn finish(self, description: Description) -> Result<BackupInfo> {
        unimplemented!()
    }
}

#[allow(unused_variables, clippy::unimplemented)]
impl PackWriter {
    /// Stores one block. `hash` saves hashing again; `parent` is the record at the same place in the parent backup, of
    /// a block of the same length.
    pub fn put(
        &mut self,
        raw: &[u8],
        hash: Option<Hash>,
        parent: Option<&BlockRecord>,
    ) -> Result<(BlockRecord, Outcome)> {
        unimplemented!()
    }
    /// Makes the last pack durable. A worker that is dropped without it makes [`BackupWriter::finish`] fail.
    pub fn finish(self) -> Result<()> {
        unimplemented!()
    }
}
