//! Proving a repository without restoring: every block of the backups, and their WAL, read and compared.
//!
//! Backups share most of their blocks. A leaf of the manifest that was proven for one backup is not read again for the
//! next, so verifying all backups reads little more than the newest. Leaves are proven by all cores; whatever is
//! wrong is told at once, by the file that is damaged, and the rest is read on.
//!
//! Always true: [`Proof::findings`] is empty only if everything was read and was what it should be.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rayon::iter::{ParallelBridge, ParallelIterator};

use super::manifest::{Audit, PlacedGroup};
use super::{Backup, Cluster, keys, list_or_empty};
use crate::blocks::{Blocks, Scratch};
use crate::checksum::Hash;
use crate::format::backup::BackupInfo;
use crate::format::header::HEADER_BYTES;
use crate::format::manifest::{LEAF_RECORDS, ManifestHeader};
use crate::format::pack::PackHeader;
use crate::progress::Progress;
use crate::units::{BackupLabel, PackId};
use crate::wal::history::History;
use crate::wal::name::{SegmentName, WalFile};
use crate::wal::{SegmentHeader, WalArchive};
use crate::{Error, Result};

/// What kind of trouble.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Stored bytes are not what was written.
    Corrupt,
    /// Something that should be there is not.
    Missing,
    /// It could not be read, so nothing is known.
    Unreadable,
}

/// Something wrong with one file of the repository.
#[derive(Clone, Debug)]
pub struct Finding {
    /// What kind.
    pub kind: Kind,
    /// The file.
    pub path: PathBuf,
    /// The first thing found in it, as a sentence.
    pub detail: String,
    /// How many blocks or chunks of it are concerned.
    pub count: u64,
    /// The backups that need it.
    pub backups: BTreeSet<BackupLabel>,
}

/// What a verification came to.
#[derive(Clone, Debug, Default)]
pub struct Proof {
    /// Backups looked at.
    pub backups: u64,
    /// Content bytes proven, zeros included; what backups share is counted once.
    pub bytes: u64,
    /// Files of the WAL archive proven.
    pub wal_files: u64,
    /// What is wrong, by file.
    pub findings: Vec<Finding>,
    /// WAL that is not there between backups that each have their own: they restore, but not beyond.
    pub islands: Vec<String>,
    /// Bytes that belong to no backup: what crashed ones left, swept by the next backup.
    pub garbage_bytes: u64,
}

/// A verification that is planned: its size is known, nothing is read yet but the backups' descriptions.
#[derive(Debug)]
pub struct Verification {
    cluster: Cluster,
    all: bool,
    backups: Vec<Backup>,
    found: Found,
    wal_bytes: u64,
}

impl Verification {
    /// Of one backup with its WAL, or of everything the cluster has.
    pub fn plan(cluster: &Cluster, only: Option<&BackupLabel>) -> Result<Self> {
        let found = Found::default();
        let mut backups = Vec::new();
        let labels = match only {
            // An unknown label is a mistake of the caller's, not a finding.
            Some(label) if !cluster.labels()?.contains(label) => return Err(cluster.no_such_backup(label)?),
            Some(label) => vec![label.clone()],
            None => cluster.labels()?,
        };
        for label in labels {
            match cluster.backup(&label) {
                Ok(backup) => backups.push(backup),
                Err(error) => {
                    found.add(&error, &label, &cluster.store().describe(&keys::backup(cluster.name(), &label)));
                }
            }
        }
        let mut verification = Self { cluster: cluster.clone(), all: only.is_none(), backups, found, wal_bytes: 0 };
        let segments = verification.wal_files()?.len() as u64;
        verification.wal_bytes = segments.saturating_mul(cluster.info().wal_segment_bytes);
        Ok(verification)
    }

    /// Content bytes that [`run`](Self::run) will report as progress, about.
    pub fn bytes(&self) -> u64 {
        self.backups.iter().map(|backup| backup.info.totals.bytes).sum::<u64>().saturating_add(self.wal_bytes)
    }

    /// Reads everything. An error is a reason to stop; what is wrong with the repository is in the proof.
    pub fn run(self, progress: &dyn Progress) -> Result<Proof> {
        let proven = Proven::default();
        let mut packs = BTreeMap::<PackId, BTreeSet<BackupLabel>>::new();
        for backup in &self.backups {
            self.prove_headers(backup);
            for used in backup.manifest.packs() {
                packs.entry(used.pack).or_default().insert(backup.info.label.clone());
            }
            self.prove_backup(backup, &proven, progress)?;
        }
        for (pack, labels) in &packs {
            if let Err(error) = self.prove_pack_header(*pack) {
                let path = self.cluster.store().describe(&keys::pack(self.cluster.name(), *pack));
                self.found.add_for(&error, labels, &path);
            }
        }
        let (wal_files, islands) = self.prove_wal(&proven, progress)?;
        let garbage_bytes = if self.all { self.garbage(&packs)? } else { 0 };
        Ok(Proof {
            backups: self.backups.len() as u64,
            bytes: proven.bytes.into_inner(),
            wal_files,
            findings: self.found.into_findings(),
            islands,
            garbage_bytes,
        })
    }

    fn prove_headers(&self, backup: &Backup) {
        for used in backup.manifest.manifests().iter().filter(|used| used.bytes > 0) {
            let key = keys::manifest(self.cluster.name(), &used.label);
            let path = self.cluster.store().describe(&key);
            let proven = self.header(&key).and_then(|page| {
                let header = ManifestHeader::from_bytes(&page).map_err(|malformed| malformed.in_file(&path, 0))?;
                let expected =
                    ManifestHeader { repository: self.cluster.repository().info().id, label: used.label.clone() };
                if header == expected {
                    return Ok(());
                }
                Err(Error::corrupt(&path, format!("its header is that of {} in {}", header.label, header.repository)))
            });
            if let Err(error) = proven {
                self.found.add(&error, &backup.info.label, &path);
            }
        }
    }

    fn prove_pack_header(&self, pack: PackId) -> Result<()> {
        let key = keys::pack(self.cluster.name(), pack);
        let path = self.cluster.store().describe(&key);
        let page = self.header(&key)?;
        let header = PackHeader::from_bytes(&page).map_err(|malformed| malformed.in_file(&path, 0))?;
        let info = self.cluster.repository().info();
        let expected = PackHeader { repository: info.id, pack, block_size: header.block_size };
        if header == expected {
            return Ok(());
        }
        Err(Error::corrupt(path, format!("its header is that of pack {} in {}", header.pack, header.repository)))
    }

    fn header(&self, key: &str) -> Result<Vec<u8>> {
        let mut page = vec![0; HEADER_BYTES];
        self.cluster.store().read_at(key, 0, &mut page).map(|()| page)
    }

    /// Walks the manifest here, and proves its leaves on all cores.
    fn prove_backup(&self, backup: &Backup, proven: &Proven, progress: &dyn Progress) -> Result<()> {
        let label = &backup.info.label;
        let manifest = self.cluster.store().describe(&keys::manifest(self.cluster.name(), label));
        let blocks = backup.blocks();
        let mut audit = Some(Audit::default());
        let leaves = backup.manifest.groups().flat_map(|group| {
            let audited = group.and_then(|placed| {
                audit.as_mut().map_or(Ok(()), |audit| backup.manifest.audit_group(&placed, audit)).map(|()| placed)
            });
            let placed = audited.map_err(|error| {
                // The totals cannot be right any more.
                audit = None;
                self.found.add(&error, label, &manifest);
            });
            placed
                .into_iter()
                .flat_map(|placed| (0..placed.group.leaves().len()).map(move |leaf| (placed.clone(), leaf)))
        });
        // The first error is a wish to stop: what is wrong with the repository goes to `found`.
        leaves.par_bridge().try_for_each_init(Scratch::default, |scratch, (placed, leaf)| {
            if progress.cancelled() {
                return Err(Error::Cancelled);
            }
            self.prove_leaf(backup, &blocks, &placed, leaf, proven, scratch, progress);
            Ok(())
        })?;
        if let Some(audit) = audit {
            if let Err(error) = backup.manifest.audit_totals(&audit) {
                self.found.add(&error, label, &manifest);
            }
        }
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    fn prove_leaf(
        &self,
        backup: &Backup,
        blocks: &Blocks,
        placed: &PlacedGroup,
        leaf: usize,
        proven: &Proven,
        scratch: &mut Scratch,
        progress: &dyn Progress,
    ) {
        let label = &backup.info.label;
        let manifest = self.cluster.store().describe(&keys::manifest(self.cluster.name(), label));
        let place = &placed.group.leaves()[leaf];
        let parts = parts_of(placed, leaf, backup);
        let bytes = parts.iter().map(|part| part.bytes).sum();
        if let Some(damaged) = proven.claim(place.hash) {
            // Read for another backup already: what was wrong then is wrong for this one too.
            damaged.iter().for_each(|path| self.found.name(path, label));
        } else {
            match backup.manifest.group_leaf(&placed.group, leaf, place) {
                Err(error) => proven.failed(place.hash, self.found.add(&error, label, &manifest)),
                Ok(records) => {
                    let mut from = 0;
                    for part in parts {
                        let size = backup.info.block_bytes;
                        let records = &records[from..from + part.blocks];
                        let bytes_of = |index| size.block_bytes_at(part.file_bytes, index);
                        blocks.prove(&part.path, part.first, records, bytes_of, scratch, |error| {
                            proven.failed(place.hash, self.found.add(&error, label, &manifest));
                        });
                        from += part.blocks;
                    }
                    proven.bytes.fetch_add(bytes, Ordering::Relaxed);
                }
            }
        }
        progress.advance(bytes);
    }

    /// The files of the archive that are to be proven.
    fn wal_files(&self) -> Result<Vec<WalFile>> {
        let wal = self.cluster.wal();
        let mut files = BTreeSet::new();
        if self.all {
            for timeline in wal.timelines()? {
                files.extend(wal.files(timeline)?);
            }
        }
        for backup in &self.backups {
            files.extend(own_segments(&backup.info).map(WalFile::Segment));
        }
        Ok(files.into_iter().collect())
    }

    fn prove_wal(&self, proven: &Proven, progress: &dyn Progress) -> Result<(u64, Vec<String>)> {
        let wal = self.cluster.wal();
        let needed = |file: WalFile| {
            let backups = self.backups.iter().filter(move |backup| is_needed(&backup.info, file));
            backups.map(|backup| &backup.info.label)
        };
        let count = AtomicU64::new(0);
        self.wal_files()?.into_iter().par_bridge().try_for_each(|file| {
            if progress.cancelled() {
                return Err(Error::Cancelled);
            }
            match prove_wal_file(&wal, file, progress) {
                Ok(Some(bytes)) => {
                    count.fetch_add(1, Ordering::Relaxed);
                    proven.bytes.fetch_add(bytes, Ordering::Relaxed);
                }
                Ok(None) => {
                    let path = wal.path_of(file);
                    let detail = format!("{} is missing, and a backup needs it to become consistent", path.display());
                    self.found.insert(Kind::Missing, &path, detail, needed(file));
                }
                Err(error) => {
                    self.found.add_for(&error, needed(file), &wal.path_of(file));
                }
            }
            Ok(())
        })?;
        let islands = if self.all { self.judge_gaps(&wal)? } else { Vec::new() };
        Ok((count.into_inner(), islands))
    }

    /// Gaps are findings, but for those between backups that each brought their own WAL, as they do where PostgreSQL
    /// archives to another place.
    fn judge_gaps(&self, wal: &WalArchive) -> Result<Vec<String>> {
        let segment_bytes = wal.segment_bytes();
        let mut islands = Vec::new();
        for gap in wal.gaps()? {
            let next = SegmentName { timeline: gap.first.timeline, number: gap.first.number + gap.segments };
            let ends = |info: &BackupInfo| own_segments(info).last().is_some_and(|last| last.next() == gap.first);
            let begins = |info: &BackupInfo| own_segments(info).next() == Some(next);
            let infos = || self.backups.iter().map(|backup| &backup.info);
            if infos().any(ends) && infos().any(begins) {
                islands.push(gap.describe(segment_bytes));
            } else {
                let path = wal.path_of(WalFile::Segment(gap.first));
                let more = match gap.segments {
                    1 => String::new(),
                    segments => format!(" with the {} after it", segments - 1),
                };
                let detail = format!("{} is missing{more}, but the archive goes on behind", path.display());
                // Recovery from any backup before it ends here.
                let stopped = infos().filter(|info| {
                    info.wal.timeline == gap.first.timeline && info.wal.stop <= gap.first.start(segment_bytes)
                });
                self.found.insert(Kind::Missing, &path, detail, stopped.map(|info| &info.label));
            }
        }
        Ok(islands)
    }

    /// Bytes of packs that no backup refers to. With an unreadable backup nobody can tell.
    fn garbage(&self, packs: &BTreeMap<PackId, BTreeSet<BackupLabel>>) -> Result<u64> {
        if self.backups.len() != self.cluster.labels()?.len() {
            return Ok(0);
        }
        let entries = list_or_empty(self.cluster.store(), &keys::packs(self.cluster.name()))?;
        let is_garbage = |name: &str| keys::pack_of(name).is_some_and(|pack| !packs.contains_key(&pack));
        Ok(entries.iter().filter(|entry| is_garbage(entry.name())).map(|entry| entry.bytes).sum())
    }
}

/// Blocks of one file that lie in one leaf.
struct Part {
    path: String,
    file_bytes: u64,
    /// The first of them, counted in the file.
    first: u64,
    blocks: usize,
    /// Their content.
    bytes: u64,
}

fn parts_of(placed: &PlacedGroup, leaf: usize, backup: &Backup) -> Vec<Part> {
    let size = backup.info.block_bytes;
    let leaf_start = leaf as u64 * LEAF_RECORDS;
    let leaf_end = leaf_start + LEAF_RECORDS;
    let part = |file: &crate::format::file::FileRecord| {
        let (start, end) = (file.first_block.0, file.first_block.0 + size.blocks_of(file.bytes));
        let (from, to) = (start.max(leaf_start), end.min(leaf_end));
        let (first, block_bytes) = (from.checked_sub(start)?, size.bytes() as u64);
        let blocks = to.checked_sub(from).filter(|blocks| *blocks > 0)?;
        let bytes = ((first + blocks) * block_bytes).min(file.bytes) - first * block_bytes;
        Some(Part { path: file.path.clone(), file_bytes: file.bytes, first, blocks: blocks as usize, bytes })
    };
    placed.group.files().iter().filter_map(part).collect()
}

/// The segments that a backup needs to become consistent.
fn own_segments(info: &BackupInfo) -> impl Iterator<Item = SegmentName> + use<> {
    let (timeline, segment_bytes) = (info.wal.timeline, info.server.wal_segment_bytes.max(1));
    let first = SegmentName::holding(timeline, info.wal.start, segment_bytes).number;
    let last = SegmentName::ending_at(timeline, info.wal.stop, segment_bytes).number;
    (first..=last).map(move |number| SegmentName { timeline, number })
}

fn is_needed(info: &BackupInfo, file: WalFile) -> bool {
    matches!(file, WalFile::Segment(segment) if own_segments(info).any(|own| own == segment))
}

/// Reads a file of the archive; its content bytes, or none if it is not there.
fn prove_wal_file(wal: &WalArchive, file: WalFile, progress: &dyn Progress) -> Result<Option<u64>> {
    let segment_bytes = wal.segment_bytes();
    let path = wal.path_of(file);
    let Some(object) = wal.open(&file.file_name(segment_bytes))? else { return Ok(None) };
    let mut head = Vec::new();
    object.read_all(|piece| {
        if head.len() < HEADER_BYTES {
            head.extend_from_slice(&piece[..piece.len().min(HEADER_BYTES)]);
        }
        progress.advance(piece.len() as u64);
        Ok(())
    })?;
    let corrupt = |detail: String| Error::corrupt(&path, detail);
    match file {
        WalFile::Segment(segment) | WalFile::Partial(segment) => {
            let header = SegmentHeader::parse(&head).map_err(corrupt)?;
            header.agrees_with(segment).map_err(corrupt)?;
            let whole = matches!(file, WalFile::Segment(_));
            if whole && object.bytes() != segment_bytes {
                return Err(corrupt(format!("a segment of {} bytes, not {segment_bytes}", object.bytes())));
            }
        }
        WalFile::History(timeline) => {
            let text = String::from_utf8_lossy(&head);
            History::parse(timeline, &text).map_err(corrupt)?;
        }
        WalFile::BackupLabel(..) => {}
    }
    Ok(Some(object.bytes()))
}

/// Leaves that were read for one backup need not be read for another.
#[derive(Debug, Default)]
struct Proven {
    /// By the leaf's hash: the files in which something was wrong.
    leaves: Mutex<HashMap<Hash, Vec<PathBuf>>>,
    bytes: AtomicU64,
}

impl Proven {
    /// None where the caller has to read the leaf; else what was wrong when it was read before.
    fn claim(&self, leaf: Hash) -> Option<Vec<PathBuf>> {
        match lock(&self.leaves).entry(leaf) {
            Entry::Occupied(known) => Some(known.get().clone()),
            Entry::Vacant(new) => {
                new.insert(Vec::new());
                None
            }
        }
    }

    fn failed(&self, leaf: Hash, path: PathBuf) {
        let mut leaves = lock(&self.leaves);
        let damaged = leaves.entry(leaf).or_default();
        if !damaged.contains(&path) {
            damaged.push(path);
        }
    }
}

/// Findings by the file they are in.
#[derive(Debug, Default)]
struct Found {
    by_path: Mutex<BTreeMap<PathBuf, Finding>>,
}

impl Found {
    /// Adds what `error` tells, of the file it names or else of `fallback`; that file.
    fn add(&self, error: &Error, label: &BackupLabel, fallback: &Path) -> PathBuf {
        self.add_for(error, [label], fallback)
    }

    fn add_for<'a>(
        &self,
        error: &Error,
        labels: impl IntoIterator<Item = &'a BackupLabel>,
        fallback: &Path,
    ) -> PathBuf {
        let (kind, path) = told_by(error);
        let path = path.unwrap_or(fallback).to_owned();
        self.insert(kind, &path, error.to_string(), labels);
        path
    }

    fn insert<'a>(&self, kind: Kind, path: &Path, detail: String, labels: impl IntoIterator<Item = &'a BackupLabel>) {
        let mut by_path = lock(&self.by_path);
        let new = || Finding { kind, path: path.to_owned(), detail, count: 0, backups: BTreeSet::new() };
        let finding = by_path.entry(path.to_owned()).or_insert_with(new);
        finding.count += 1;
        finding.backups.extend(labels.into_iter().cloned());
    }

    /// `label` needs the file too.
    fn name(&self, path: &Path, label: &BackupLabel) {
        if let Some(finding) = lock(&self.by_path).get_mut(path) {
            finding.backups.insert(label.clone());
        }
    }

    fn into_findings(self) -> Vec<Finding> {
        self.by_path.into_inner().unwrap_or_else(PoisonError::into_inner).into_values().collect()
    }
}

fn told_by(error: &Error) -> (Kind, Option<&Path>) {
    match error {
        Error::Corrupt { path, .. } | Error::Unsupported { path, .. } => (Kind::Corrupt, Some(path)),
        Error::Io { path, .. } if super::is_absent(error) => (Kind::Missing, Some(path)),
        Error::Io { path, .. } => (Kind::Unreadable, Some(path)),
        Error::NotFound(_) => (Kind::Missing, None),
        Error::Locked { .. } | Error::Refused(_) | Error::Cancelled => (Kind::Unreadable, None),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A worker that panicked leaves no half-made change: each is one insertion.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
