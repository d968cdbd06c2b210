//! A backup's manifest: its files, and the records of their blocks.
//!
//! The tree of chunks is walked from the root, which alone is read when the manifest is opened; so a backup of any
//! size opens with one read, and finding a file or a block reads a chunk a level. What a chunk says of the one below
//! (how many files and leaves are in it) is compared when that is read: a tree that does not add up is corrupt, and
//! nobody walks it in circles.

use std::cmp::Ordering;
use std::sync::Arc;

use super::chunks::{Chunks, read_chunk};
use super::walk::{Begin, Files, Groups};
use super::{Cluster, keys};
use crate::checksum::Hash;
use crate::format::backup::BackupInfo;
use crate::format::block::BlockRecord;
use crate::format::file::{FileKind, FileRecord};
use crate::format::manifest::{
    ChunkRef, Group, IndexChunk, LEAF_RECORDS, ManifestUse, PackUse, Root, check_below, path,
};
use crate::units::BlockNumber;
use crate::{Error, Result};

/// The files and blocks of a backup; cheap to clone, shared by threads.
#[derive(Clone, Debug)]
pub struct Manifest {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    info: BackupInfo,
    root: Root,
    chunks: Chunks,
}

/// A group with its place in the whole.
#[derive(Clone, Debug)]
pub(super) struct PlacedGroup {
    pub(super) group: Arc<Group>,
    /// Its first leaf and its first file, counted over the manifest.
    pub(super) first_leaf: u64,
    pub(super) first_file: u64,
    pub(super) chunk: ChunkRef,
}

impl Manifest {
    /// Opens the manifest of a backup: reads its root.
    pub fn open(cluster: &Cluster, info: &BackupInfo) -> Result<Self> {
        let key = keys::manifest(cluster.name(), &info.label);
        let described = || cluster.store().describe(&keys::backup(cluster.name(), &info.label));
        let hash = Hash::from_hex(&info.manifest.root_hash)
            .ok_or_else(|| Error::corrupt(described(), "the hash of the manifest's root is not 64 hex digits"))?;
        let (bytes, offset) = (info.manifest.root_bytes, info.manifest.root_offset);
        let place = ChunkRef { hash, manifest: 0, bytes, offset };
        place.check().map_err(|detail| Error::corrupt(described(), format!("the manifest's root: {detail}")))?;
        let path = cluster.store().describe(&key);
        let root = Root::from_bytes(&read_chunk(cluster.store(), &key, &place)?)
            .map_err(|malformed| malformed.in_file(&path, offset))?;
        if root.block_size != info.block_bytes {
            let (found, expected) = (root.block_size.bytes(), info.block_bytes.bytes());
            return Err(Error::corrupt_at(
                path,
                offset,
                format!("blocks of {found} bytes, the backup's have {expected}"),
            ));
        }
        let store = Arc::clone(cluster.repository().store());
        let chunks = Chunks::new(store, cluster.name().clone(), root.manifests.clone());
        Ok(Self { inner: Arc::new(Inner { info: info.clone(), root, chunks }) })
    }

    /// The backup's description.
    pub fn info(&self) -> &BackupInfo {
        &self.inner.info
    }

    /// How many files, directories and links there are.
    pub fn file_count(&self) -> u64 {
        self.inner.root.files
    }

    /// The numbers of all block records are below this; not every number below it is in use. The size of a map.
    pub fn block_limit(&self) -> u64 {
        self.inner.root.leaves * LEAF_RECORDS
    }

    /// The packs that blocks lie in, ascending.
    pub fn packs(&self) -> &[PackUse] {
        &self.inner.root.packs
    }

    /// The manifest files that chunks lie in.
    pub fn manifests(&self) -> &[ManifestUse] {
        &self.inner.root.manifests
    }

    /// All files, directories and links in path order: a directory before what is in it.
    pub fn files(&self) -> impl Iterator<Item = Result<FileRecord>> + '_ {
        Files::from(self, Begin::Start).map(|file| file.map(|(_, file)| file))
    }

    /// The file, directory or link of that path.
    pub fn file(&self, wanted: &str) -> Result<Option<FileRecord>> {
        Ok(self.find(wanted)?.map(|(_, file)| file))
    }

    /// The place of that path in the path order.
    pub fn index_of(&self, wanted: &str) -> Result<Option<u64>> {
        Ok(self.find(wanted)?.map(|(index, _)| index))
    }

    /// The place of the first file behind `directory` and all that is below it.
    pub fn index_after(&self, directory: &str) -> Result<u64> {
        let next = Files::from(self, Begin::AfterSubtree(directory.to_owned())).next().transpose()?;
        Ok(next.map_or(self.file_count(), |(index, _)| index))
    }

    /// What has that place in the path order.
    pub fn file_at(&self, index: u64) -> Result<Option<FileRecord>> {
        let next = Files::from(self, Begin::Index(index)).next().transpose()?;
        Ok(next.map(|(_, file)| file))
    }

    /// What is directly in a directory (the empty path is the data directory), in path order.
    pub fn children(&self, directory: &str) -> Result<Vec<FileRecord>> {
        let mut children = Vec::new();
        let first = if directory.is_empty() { Begin::Start } else { Begin::After(directory.to_owned()) };
        let mut files = Files::from(self, first);
        while let Some((_, file)) = files.next().transpose()? {
            if !path::is_below(&file.path, directory) {
                break;
            }
            if matches!(file.kind, FileKind::Directory | FileKind::Tablespace { .. }) {
                files = Files::from(self, Begin::AfterSubtree(file.path.clone()));
            }
            children.push(file);
        }
        Ok(children)
    }

    fn find(&self, wanted: &str) -> Result<Option<(u64, FileRecord)>> {
        let found = Files::from(self, Begin::Path(wanted.to_owned())).next().transpose()?;
        Ok(found.filter(|(_, file)| file.path == wanted))
    }

    /// The record of a block.
    pub fn block(&self, number: BlockNumber) -> Result<BlockRecord> {
        let mut one = Vec::with_capacity(1);
        self.blocks(number, 1, &mut one)?;
        one.pop().ok_or_else(|| self.no_such_block(number))
    }

    /// Appends the records of `count` blocks from `first` on, which belong to one file.
    pub fn blocks(&self, first: BlockNumber, count: u64, out: &mut Vec<BlockRecord>) -> Result<()> {
        let end = first.0.checked_add(count).filter(|end| *end <= self.block_limit());
        let end = end.ok_or_else(|| self.no_such_block(first))?;
        let mut next = first;
        while next.0 < end {
            let (leaf, slot) = next.leaf_and_slot();
            let records = self.leaf(leaf)?;
            let wanted = (end - next.0).min(LEAF_RECORDS - slot as u64);
            let found = records.get(slot..slot + wanted as usize).ok_or_else(|| self.no_such_block(next))?;
            out.extend_from_slice(found);
            next.0 += wanted;
        }
        Ok(())
    }

    /// Appends the records of up to `count` blocks from `first` on, of whatever file, as far as one leaf goes. The block
    /// behind them, or none at the end.
    pub(crate) fn blocks_in_leaf(
        &self,
        first: BlockNumber,
        count: u64,
        out: &mut Vec<BlockRecord>,
    ) -> Result<Option<BlockNumber>> {
        if first.0 >= self.block_limit() {
            return Ok(None);
        }
        let (leaf, slot) = first.leaf_and_slot();
        let records = self.leaf(leaf)?;
        let end = usize::try_from(count).map_or(records.len(), |count| slot.saturating_add(count).min(records.len()));
        out.extend_from_slice(records.get(slot..end).unwrap_or_default());
        // The last leaf of a group may be shorter than others; numbers go on with the next.
        let next = if end < records.len() { first.0 - slot as u64 + end as u64 } else { (leaf + 1) * LEAF_RECORDS };
        Ok(Some(BlockNumber(next)))
    }

    /// Reads the whole tree: every chunk is what its reference says, the counts add up, paths are in order.
    pub fn verify_all(&self) -> Result<()> {
        let mut audit = Audit::default();
        for group in self.groups() {
            let placed = group?;
            self.audit_group(&placed, &mut audit)?;
            for (number, place) in placed.group.leaves().iter().enumerate() {
                self.group_leaf(&placed.group, number, place)?;
            }
        }
        self.audit_totals(&audit)
    }

    /// Adds a group to what was found, in path order.
    pub(super) fn audit_group(&self, placed: &PlacedGroup, audit: &mut Audit) -> Result<()> {
        let files = placed.group.files();
        if let (Some(last), Some(first)) = (&audit.last, files.first()) {
            let refuse = |detail: String| self.inner.chunks.corrupt(&placed.chunk, detail);
            if path::order(&last.path, &first.path) != Ordering::Less {
                return Err(refuse(format!("\"{}\" is out of order", first.path)));
            }
            check_below(last, &first.path).map_err(refuse)?;
        }
        audit.last = files.last().cloned();
        audit.counted.groups += 1;
        audit.counted.files += files.len() as u64;
        audit.counted.blocks += placed.group.blocks();
        audit.counted.bytes += files.iter().map(|file| file.bytes).sum::<u64>();
        Ok(())
    }

    /// Compares what was found with what the root says.
    pub(super) fn audit_totals(&self, audit: &Audit) -> Result<()> {
        let root = &self.inner.root;
        let expected = Counted { files: root.files, groups: root.groups, blocks: root.blocks, bytes: root.bytes };
        if audit.counted == expected {
            return Ok(());
        }
        Err(self.root_is_corrupt(format!("the manifest's root counts {expected:?}, found {:?}", audit.counted)))
    }

    /// All groups in path order.
    pub(super) fn groups(&self) -> impl Iterator<Item = Result<PlacedGroup>> + '_ {
        Groups::from(self, &Begin::Start)
    }

    /// The records of a leaf of a group.
    pub(super) fn group_leaf(&self, group: &Group, number: usize, place: &ChunkRef) -> Result<Arc<[BlockRecord]>> {
        let records = self.inner.chunks.leaf(place)?;
        let expected = group.leaf_records(number);
        if records.len() as u64 == expected {
            return Ok(records);
        }
        Err(self.inner.chunks.corrupt(place, format!("a leaf of {} records, its group says {expected}", records.len())))
    }

    fn leaf(&self, number: u64) -> Result<Arc<[BlockRecord]>> {
        let no_such = || self.no_such_block(BlockNumber(number.saturating_mul(LEAF_RECORDS)));
        let (mut index, mut within) = (self.top()?, number);
        loop {
            let (entry, rest) = index.find_leaf(within).ok_or_else(no_such)?;
            within = rest;
            if index.level() == 0 {
                let group = self.group_below(&index, entry)?;
                let leaf =
                    usize::try_from(within).ok().filter(|leaf| *leaf < group.leaves().len()).ok_or_else(no_such)?;
                return self.group_leaf(&group, leaf, &group.leaves()[leaf]);
            }
            index = self.index_below(&index, entry)?;
        }
    }

    pub(super) fn top(&self) -> Result<Arc<IndexChunk>> {
        let root = &self.inner.root;
        let top = self.inner.chunks.index(&root.index)?;
        if top.level() == root.index_level && top.files() == root.files && top.leaves() == root.leaves {
            return Ok(top);
        }
        Err(self.inner.chunks.corrupt(&root.index, "the index does not have the level and the counts of the root"))
    }

    pub(super) fn index_below(&self, index: &IndexChunk, entry: usize) -> Result<Arc<IndexChunk>> {
        let entry = &index.entries()[entry];
        let below = self.inner.chunks.index(&entry.chunk)?;
        let first = below.entries().first().map(|first| first.first_path.as_str());
        let fits = (below.files(), below.leaves()) == (entry.files, entry.leaves) && first == Some(&entry.first_path);
        if fits && below.level() + 1 == index.level() {
            return Ok(below);
        }
        Err(self.inner.chunks.corrupt(&entry.chunk, "an index chunk that is not what the one above it says"))
    }

    pub(super) fn group_below(&self, index: &IndexChunk, entry: usize) -> Result<Arc<Group>> {
        let entry = &index.entries()[entry];
        let group = self.inner.chunks.group(&entry.chunk)?;
        let counts = (group.files().len() as u64, group.leaves().len() as u64);
        let first = group.files().first().map(|file| file.path.as_str());
        let fits = counts == (entry.files, entry.leaves) && first == Some(&entry.first_path);
        if fits && group.block_size() == self.inner.root.block_size {
            return Ok(group);
        }
        Err(self.inner.chunks.corrupt(&entry.chunk, "a group that is not what the index says"))
    }

    fn no_such_block(&self, number: BlockNumber) -> Error {
        self.root_is_corrupt(format!("there is no block number {}", number.0))
    }

    fn root_is_corrupt(&self, detail: String) -> Error {
        self.inner.chunks.corrupt(&self.inner.root.index, detail)
    }
}

/// What a walk over the whole manifest has found so far.
#[derive(Debug, Default)]
pub(super) struct Audit {
    counted: Counted,
    last: Option<FileRecord>,
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Counted {
    files: u64,
    groups: u64,
    blocks: u64,
    bytes: u64,
}
