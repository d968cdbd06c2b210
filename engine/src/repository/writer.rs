//! Writing a backup: blocks into packs, records into the manifest, and at the very end the name that commits it.
//!
//! Workers go on by themselves: each has a [`PackWriter`], and whichever is done with a group of files commits it,
//! in any order. Of a group that is written only the reference to its chunk is kept, so memory does not grow with the
//! blocks. A chunk that the parent has, byte for byte, is referred to and not written.
//!
//! Always true: `<label>.json` appears after everything that it leads to is durable, and until then `<label>.unfinished`
//! claims what there is of the backup.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;

use super::chunks::read_chunk;
use super::leftovers::Names;
use super::packs::Packs;
use super::sweep::sweep;
use super::{Backup, Cluster, Lock, LockKind, PackWriter, keys, now, put};
use crate::blocks::Blocks;
use crate::checksum::Hash;
use crate::format::backup::{BackupInfo, BadPage, ManifestInfo, ServerInfo, Snapshot, Tablespace, Totals, WalRange};
use crate::format::block::{BlockRecord, Content};
use crate::format::file::{FileKind, FileRecord};
use crate::format::manifest::{
    ChunkRef, Group, IndexEntry, LEAF_RECORDS, ManifestHeader, ManifestUse, PackUse, Root, build_index, leaf_to_bytes,
};
use crate::format::unfinished::UnfinishedInfo;
use crate::format::{FORMAT, MINIMUM_READER};
use crate::store::{Existing, Upload};
use crate::units::{BackupLabel, PackId};
use crate::{Error, Result};

/// What a backup compares its blocks with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parent {
    /// With nothing: every block is stored.
    Full,
    /// With the newest backup, where there is one.
    Latest,
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

/// A leaf of the manifest that is written: 1 to [`LEAF_RECORDS`] block records.
#[derive(Clone, Debug)]
pub struct LeafRef {
    chunk: ChunkRef,
    records: u64,
    packs: BTreeMap<PackId, Referred>,
}

/// What of a pack is referred to.
#[derive(Clone, Copy, Debug, Default)]
struct Referred {
    bytes: u64,
    /// Behind the last run: no pack may be shorter.
    end: u64,
}

impl Referred {
    fn and(self, other: Self) -> Self {
        Self { bytes: self.bytes + other.bytes, end: self.end.max(other.end) }
    }
}

/// A backup on its way. `&self` methods are for all workers at once. Dropped unfinished, it leaves only garbage that
/// the next one sweeps.
#[derive(Debug)]
pub struct BackupWriter {
    cluster: Cluster,
    label: BackupLabel,
    started_at: String,
    began: Instant,
    parent: Option<Backup>,
    packs: Arc<Packs>,
    /// The manifest files that chunks may lie in: the parent's, then this backup's own.
    manifests: Vec<BackupLabel>,
    /// The parent's chunks.
    known: HashMap<Hash, ChunkRef>,
    manifest: Mutex<ManifestFile>,
    tree: Mutex<Tree>,
    _lock: Lock,
}

/// The file that new chunks are appended to.
struct ManifestFile {
    upload: Box<dyn Upload + Send>,
}

/// What is known of the groups that were committed.
#[derive(Debug, Default)]
struct Tree {
    groups: BTreeMap<u64, IndexEntry>,
    manifest_bytes: BTreeMap<u32, u64>,
    packs: BTreeMap<PackId, Referred>,
    totals: Totals,
}

impl BackupWriter {
    pub(super) fn begin(cluster: &Cluster, parent: Parent) -> Result<Self> {
        let lock = Lock::exclusive(cluster.store(), cluster.name(), LockKind::Backup)?;
        let swept = sweep(cluster)?;
        if swept.bytes > 0 {
            tracing::info!("swept {} bytes that crashed backups left", swept.bytes);
        }
        let parent = match parent {
            Parent::Full => None,
            Parent::Latest => newest_readable(cluster)?,
        };
        let (parent, known) = parent.map_or_else(Default::default, |(parent, known)| (Some(parent), known));
        let label = new_label(cluster, parent.is_some())?;
        let (started_at, first_pack) = (now(), swept.next_pack);
        let mark = UnfinishedInfo::new(label.clone(), started_at.clone(), PackId(first_pack));
        // Before anything else of the backup: what there is of it is claimed.
        put(cluster.store(), &keys::unfinished(cluster.name(), &label), mark.to_json())?;
        let inherited = parent.iter().flat_map(|parent| parent.manifest.manifests());
        let manifests = inherited.map(|used| used.label.clone()).chain([label.clone()]).collect();

        let repository = cluster.repository();
        let header = ManifestHeader { repository: repository.info().id, label: label.clone() };
        let mut upload = repository.store().create(&keys::manifest(cluster.name(), &label), Existing::Refuse)?;
        upload.append(&header.to_bytes())?;
        let packs = Packs {
            store: Arc::clone(repository.store()),
            cluster: cluster.name().clone(),
            repository: repository.info().id,
            block_size: repository.info().block_bytes,
            compression: repository.info().compression,
            parent: parent.as_ref().map(Backup::blocks),
            next_pack: AtomicU32::new(first_pack),
            unfinished: AtomicU32::new(0),
            added_bytes: AtomicU64::new(0),
            shared_bytes: AtomicU64::new(0),
        };
        Ok(Self {
            cluster: cluster.clone(),
            label,
            started_at,
            began: Instant::now(),
            known,
            parent,
            packs: Arc::new(packs),
            manifests,
            manifest: Mutex::new(ManifestFile { upload }),
            tree: Mutex::default(),
            _lock: lock,
        })
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

    /// Says which cluster it is that [`Repository::begin_first_backup`](super::Repository::begin_first_backup) did not know.
    pub fn of_cluster(self, cluster: &Cluster) -> Result<Self> {
        if cluster.name() != self.cluster.name() {
            return Err(Error::Refused(format!(
                "a backup of {} cannot be one of {}",
                self.cluster.name(),
                cluster.name()
            )));
        }
        Ok(Self { cluster: cluster.clone(), ..self })
    }

    /// The blocks of workers that have finished, before the backup is: to look again at what was stored.
    pub fn stored(&self) -> Blocks {
        Blocks::of_unfinished(Arc::clone(&self.packs.store), self.cluster.name(), self.packs.block_size)
    }

    /// A pack for one worker. A `PackWriter` is `Send` and owns what it needs; end it with [`PackWriter::finish`].
    pub fn worker(&self) -> Result<PackWriter> {
        PackWriter::new(&self.packs)
    }

    /// Writes 1 to [`LEAF_RECORDS`] records of a group as a leaf. Every leaf of a group but its last is full.
    pub fn commit_leaf(&self, records: &[BlockRecord]) -> Result<LeafRef> {
        if records.is_empty() || records.len() as u64 > LEAF_RECORDS {
            return Err(Error::Refused(format!("a leaf of {} records", records.len())));
        }
        let mut packs = BTreeMap::<PackId, Referred>::new();
        let runs = records.iter().flat_map(|record| match record.content {
            Content::Zero => [None, None],
            Content::Stored { at, .. } => [Some(at), None],
            Content::Patched { base, patch, .. } => [Some(base), Some(patch)],
        });
        for run in runs.flatten() {
            let bytes = u64::from(run.stored);
            let referred = packs.entry(run.pack).or_default();
            *referred = referred.and(Referred { bytes, end: run.end() });
        }
        let bytes = leaf_to_bytes(records);
        // Any other leaf that the parent has as well was read to find that out.
        let never_read = packs.is_empty();
        let chunk = if never_read { self.put_unread_chunk(&bytes)? } else { self.put_chunk(&bytes)? };
        Ok(LeafRef { chunk, records: records.len() as u64, packs })
    }

    /// Writes the files of a group, in path order, with the group's leaves, which hold the records of the files' blocks
    /// one file after another. What the files say of `first_block` does not matter. Groups come in any order; `position` is a group's place
    /// among them all, in path order (numbers may be left out).
    pub fn commit_group(&self, position: u64, files: &[FileRecord], leaves: Vec<LeafRef>) -> Result<()> {
        let refuse = |detail: String| Error::Refused(format!("group {position} of backup {}: {detail}", self.label));
        let chunks = leaves.iter().map(|leaf| leaf.chunk).collect();
        let group = Group::new(self.packs.block_size, files.to_vec(), chunks).map_err(refuse)?;
        for (number, leaf) in leaves.iter().enumerate() {
            let expected = group.leaf_records(number);
            if leaf.records != expected {
                return Err(refuse(format!("leaf {number} has {} records instead of {expected}", leaf.records)));
            }
        }
        let chunk = self.put_chunk(&group.to_bytes())?;
        let first_path = group.files().first().map(|file| file.path.clone()).unwrap_or_default();
        let entry =
            IndexEntry { chunk, first_path, files: group.files().len() as u64, leaves: group.leaves().len() as u64 };

        let mut tree = lock(&self.tree);
        tree.count(&group, &leaves, &chunk);
        if tree.groups.insert(position, entry).is_some() {
            return Err(refuse("it was committed before".to_owned()));
        }
        Ok(())
    }

    /// Makes everything durable, then commits. Every worker must have finished.
    pub fn finish(self, description: Description) -> Result<BackupInfo> {
        let unfinished = self.packs.unfinished.load(Ordering::SeqCst);
        if unfinished > 0 {
            return Err(Error::Refused(format!("backup {}: {unfinished} workers have not finished", self.label)));
        }
        let Description { server, .. } = &description;
        self.cluster.refuse_stranger(server.system_identifier, server.wal_segment_bytes)?;
        let tree = std::mem::take(&mut *lock(&self.tree));
        let Tree { groups, mut manifest_bytes, packs, mut totals } = tree;
        let (files, group_count) = (totals.files + totals.directories, groups.len() as u64);
        let mut index_chunks = Vec::new();
        let put_index = |bytes: Vec<u8>| {
            let chunk = self.put_chunk(&bytes)?;
            index_chunks.push(chunk);
            Ok(chunk)
        };
        let refuse = |detail| Error::Refused(format!("backup {}: {detail}", self.label));
        let (top, index_level) = build_index(groups.into_values().collect(), put_index, refuse)?;
        for chunk in index_chunks {
            *manifest_bytes.entry(chunk.manifest).or_default() += u64::from(chunk.bytes);
        }
        let manifest_use = |(number, label): (usize, &BackupLabel)| ManifestUse {
            label: label.clone(),
            bytes: manifest_bytes.get(&(number as u32)).copied().unwrap_or(0),
        };
        // Those of the parent, too: one may have been lost, or lost its end, before or since the backup began.
        refuse_lost_packs(&self.cluster, packs.iter().map(|(pack, referred)| (*pack, referred.end)))?;
        let packs = packs.into_iter().map(|(pack, Referred { bytes, .. })| PackUse { pack, bytes }).collect();
        let root = Root {
            block_size: self.packs.block_size,
            index: top.chunk,
            index_level,
            files,
            groups: group_count,
            leaves: top.leaves,
            blocks: totals.blocks,
            bytes: totals.bytes,
            manifests: self.manifests.iter().enumerate().map(manifest_use).collect(),
            packs,
        };
        let root = root.to_bytes().map_err(refuse)?;

        let mut file = self.manifest.into_inner().unwrap_or_else(PoisonError::into_inner);
        let root_offset = file.upload.written();
        file.upload.append(&root)?;
        totals.added_manifest_bytes = file.upload.written();
        totals.added_pack_bytes = self.packs.added_bytes.load(Ordering::Relaxed);
        totals.shared_bytes = self.packs.shared_bytes.load(Ordering::Relaxed);
        file.upload.commit()?;
        totals.milliseconds = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);

        let info = BackupInfo {
            format: FORMAT,
            minimum_reader: MINIMUM_READER,
            label: self.label,
            cluster: self.cluster.name().clone(),
            parent: self.parent.map(|parent| parent.info.label),
            started_at: self.started_at,
            stopped_at: description.stopped_at,
            stopped_unix: description.stopped_unix,
            server: description.server,
            wal: description.wal,
            snapshot: description.snapshot,
            tablespaces: description.tablespaces,
            bad_pages: description.bad_pages,
            compression: self.packs.compression,
            block_bytes: self.packs.block_size,
            manifest: ManifestInfo {
                root_hash: Hash::of(&root).to_string(),
                root_offset,
                root_bytes: u32::try_from(root.len()).unwrap_or(u32::MAX),
            },
            totals,
        };
        // Read before it is written: what no reader would take must not be a backup.
        let json = info.to_json().and_then(|json| BackupInfo::from_json(&json).map(|_| json));
        put(self.cluster.store(), &keys::backup(self.cluster.name(), &info.label), json)?;
        if let Err(error) = self.cluster.store().remove(&keys::unfinished(self.cluster.name(), &info.label)) {
            // The backup exists; the next one removes the mark.
            tracing::warn!("the mark of a backup that is finished stays: {error}");
        }
        Ok(info)
    }

    /// The same for one that the parent may have, damaged, without anybody having noticed.
    fn put_unread_chunk(&self, bytes: &[u8]) -> Result<ChunkRef> {
        let known = self.known.get(&Hash::of(bytes));
        let known = known.and_then(|known| Some((known, self.manifests.get(known.manifest as usize)?)));
        let Some((known, label)) = known else { return self.put_chunk(bytes) };
        match read_chunk(self.cluster.store(), &keys::manifest(self.cluster.name(), label), known) {
            Ok(_) => Ok(*known),
            Err(Error::Corrupt { .. }) => self.append_chunk(bytes),
            Err(error) => Err(error),
        }
    }

    /// The place of a chunk: the parent's, if it has the same, else at the end of this backup's manifest.
    fn put_chunk(&self, bytes: &[u8]) -> Result<ChunkRef> {
        match self.known.get(&Hash::of(bytes)) {
            Some(known) => Ok(*known),
            None => self.append_chunk(bytes),
        }
    }

    fn append_chunk(&self, bytes: &[u8]) -> Result<ChunkRef> {
        let own = (self.manifests.len() - 1) as u32;
        let mut chunk = ChunkRef::to(bytes, own, 0);
        let mut file = lock(&self.manifest);
        chunk.offset = file.upload.written();
        file.upload.append(bytes)?;
        Ok(chunk)
    }
}

impl std::fmt::Debug for ManifestFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ManifestFile").field("written", &self.upload.written()).finish()
    }
}

impl Tree {
    fn count(&mut self, group: &Group, leaves: &[LeafRef], chunk: &ChunkRef) {
        for chunk in group.leaves().iter().chain([chunk]) {
            *self.manifest_bytes.entry(chunk.manifest).or_default() += u64::from(chunk.bytes);
        }
        for (pack, referred) in leaves.iter().flat_map(|leaf| &leaf.packs) {
            let all = self.packs.entry(*pack).or_default();
            *all = all.and(*referred);
        }
        for file in group.files() {
            match file.kind {
                FileKind::Regular => self.totals.files += 1,
                FileKind::Directory | FileKind::Symlink { .. } | FileKind::Tablespace { .. } => {
                    self.totals.directories += 1;
                }
            }
            self.totals.bytes += file.bytes;
        }
        self.totals.blocks += group.blocks();
    }
}

/// The newest backup that can be a parent, and where its chunks lie, by their hashes. One that is damaged must not stop
/// all backups to come.
fn newest_readable(cluster: &Cluster) -> Result<Option<(Backup, HashMap<Hash, ChunkRef>)>> {
    for label in cluster.labels()?.into_iter().rev() {
        let readable = cluster.backup(&label).and_then(|backup| {
            refuse_lost_packs(cluster, backup.manifest.packs().iter().map(|used| (used.pack, used.bytes)))?;
            Ok((chunks_of(&backup)?, backup))
        });
        match readable.map(|(known, backup)| (backup, known)) {
            Ok((backup, _)) if backup.info.block_bytes != cluster.repository().info().block_bytes => {}
            Ok(found) => return Ok(Some(found)),
            Err(error @ (Error::Corrupt { .. } | Error::Unsupported { .. })) => {
                tracing::warn!("backup {label} cannot be a parent: {error}");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// A backup that refers to the blocks of a lost pack could not be restored, nor could any that goes on from it. Each pack
/// comes with the bytes that it must have at least. What is in the packs is for `verify` to read.
fn refuse_lost_packs(cluster: &Cluster, packs: impl Iterator<Item = (PackId, u64)>) -> Result<()> {
    for (pack, least) in packs {
        let key = keys::pack(cluster.name(), pack);
        let found = cluster.store().size(&key)?;
        if found.is_none_or(|bytes| bytes < least) {
            let detail = match found {
                None => "it is missing; a backup with --full does not build on it".to_owned(),
                Some(bytes) => format!(
                    "it has {bytes} bytes, and backups refer to {least} of it; a backup with --full does not build on it"
                ),
            };
            return Err(Error::corrupt(cluster.store().describe(&key), detail));
        }
    }
    Ok(())
}

fn chunks_of(backup: &Backup) -> Result<HashMap<Hash, ChunkRef>> {
    let mut known = HashMap::new();
    for group in backup.manifest.groups() {
        let placed = group?;
        let chunks = placed.group.leaves().iter().copied().chain([placed.chunk]);
        known.extend(chunks.map(|chunk| (chunk.hash, chunk)));
    }
    Ok(known)
}

/// The second of now, in UTC, and `F` or `I`: later than every label there is, so that their order is that of the
/// backups even where a clock was set back.
fn new_label(cluster: &Cluster, incremental: bool) -> Result<BackupLabel> {
    const FORMAT: &str = "%Y%m%dT%H%M%SZ";
    let refuse = |detail: String| Error::Refused(format!("cannot name a backup: {detail}"));
    let second_of = |label: &BackupLabel| {
        let text = label.as_str().split('-').next()?;
        let time = DateTime::strptime(FORMAT, text).ok()?;
        Some(time.to_zoned(TimeZone::UTC).ok()?.timestamp().as_second())
    };
    let taken = Names::of(cluster)?.taken().filter_map(second_of).max();
    let second = taken.map_or(i64::MIN, |taken| taken + 1).max(Timestamp::now().as_second());
    let time = Timestamp::from_second(second).map_err(|cause| refuse(cause.to_string()))?;
    let kind = if incremental { 'I' } else { 'F' };
    format!("{}-{kind}", time.strftime(FORMAT)).parse().map_err(refuse)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A worker that panicked leaves no half-made change: each is one insertion or one append, and an append that
    // failed fails the backup.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
