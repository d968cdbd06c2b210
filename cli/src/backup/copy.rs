//! Reading the data directory into the repository, on every core.
//!
//! Workers take units from one list. Each reads ahead into a few aligned buffers ([`super::read_ahead`]) and goes over what
//! has arrived once: page checksums, CRC-32C, then the pack writer, which hashes, compares with the parent's block at the
//! same place, and stores what is new while the disk writes what was stored before. What is kept of a file is its record;
//! of a block, 64 bytes until its leaf is written. So memory does not grow with the cluster's bytes.
//!
//! Every file is read, also one that has the size and time it had in the parent backup: PostgreSQL writes to its files
//! without any promise as to their times, which are of the second here, can be set, and come back with a snapshot or a
//! restore. What has not changed is recognised by its hash, and costs its reading.
//!
//! What the server does meanwhile: a file that has vanished is not in the backup. One that grows is read to the size at
//! which it was opened. One that shrinks is recorded as far as it could be read; a large one, of which several workers
//! read, is filled up with zeros instead, as `pg_basebackup` does. The WAL of the backup makes all of it right.
//!
//! The first failure stops all workers, and is the one that is told.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use engine::format::block::BlockRecord;
use engine::format::file::{FileKind, FileRecord};
use engine::format::manifest::LEAF_RECORDS;
use engine::progress::{Progress, Stage};
use engine::repository::{BackupWriter, LeafRef, Manifest, PackWriter};
use engine::throttle::Throttle;
use engine::units::{BlockNumber, BlockSize, PAGE_BYTES};
use engine::{Error, Result};

use super::pages::{Checker, Suspect};
use super::places::Places;
use super::plan::{Plan, Unit};
use super::read_ahead::{READ_BYTES, ReadAhead};
use super::relation::{self, RelationFile};
use super::source::SourceFile;

/// Memory of a worker: what it reads ahead, what is on its way into its pack, and what it decodes and encodes.
pub(super) const WORKER_BYTES: u64 = 16 << 20;

/// What a file turned out to be when it was read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Read {
    pub(super) bytes: u64,
    pub(super) crc32c: u32,
    pub(super) modified: i64,
}

/// What a thread has for itself.
struct Worker {
    pack: PackWriter,
    reads: ReadAhead,
}

/// The copy of one backup.
pub(super) struct Copy<'a> {
    places: &'a Places,
    files: &'a [FileRecord],
    plan: &'a Plan,
    writer: &'a BackupWriter,
    block: BlockSize,
    parent: Option<Manifest>,
    check_pages: bool,
    throttle: Option<Throttle>,
    progress: &'a dyn Progress,
    large: Vec<Mutex<LargeState>>,
    next: AtomicUsize,
    stopped: AtomicBool,
    failure: Mutex<Option<anyhow::Error>>,
    read: Vec<OnceLock<Read>>,
    suspects: Mutex<Vec<(usize, Suspect)>>,
}

#[derive(Default)]
struct LargeState {
    opened: bool,
    /// None if it has vanished.
    source: Option<Arc<SourceFile>>,
    pieces: Vec<Option<Piece>>,
    done: usize,
}

/// What is recorded of a file that became shorter since it was opened.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shrunk {
    /// What could be read.
    EndsThere,
    /// The size it had.
    ZerosFollow,
}

struct Piece {
    leaf: LeafRef,
    crc32c: u32,
    bytes: u64,
}

/// What the workers found out.
pub(super) struct Copied {
    /// For each file of the list; none for directories, links, and what had vanished.
    pub(super) read: Vec<Option<Read>>,
    /// Pages that stayed wrong, with their file's place in the list.
    pub(super) suspects: Vec<(usize, Suspect)>,
}

impl<'a> Copy<'a> {
    pub(super) fn new(
        places: &'a Places,
        files: &'a [FileRecord],
        plan: &'a Plan,
        writer: &'a BackupWriter,
        block: BlockSize,
        check_pages: bool,
        progress: &'a dyn Progress,
    ) -> Self {
        Self {
            places,
            files,
            plan,
            writer,
            block,
            parent: comparable_parent(writer, block),
            check_pages,
            throttle: None,
            progress,
            large: plan.large.iter().map(|_| Mutex::default()).collect(),
            next: AtomicUsize::new(0),
            stopped: AtomicBool::new(false),
            failure: Mutex::new(None),
            read: files.iter().map(|_| OnceLock::new()).collect(),
            suspects: Mutex::default(),
        }
    }

    /// Reads no more than `bytes_a_second` from the data directory.
    pub(super) fn limited_to(self, bytes_a_second: Option<u64>) -> Self {
        Self { throttle: bytes_a_second.map(Throttle::new), ..self }
    }

    /// Runs `workers` threads to the end of the work. `watch` is called on this thread about once a second; its failure
    /// stops the workers like one of their own.
    pub(super) fn run(self, workers: usize, watch: &mut dyn FnMut() -> anyhow::Result<()>) -> anyhow::Result<Copied> {
        std::thread::scope(|scope| {
            let copy = &self;
            let (ended, all_ended) = crossbeam::channel::bounded::<()>(0);
            for _ in 0..workers {
                let ended = ended.clone();
                let thread = std::thread::Builder::new().name("backup".to_owned());
                let spawned = thread.spawn_scoped(scope, move || {
                    // Closing the channel is the message, even from a panic.
                    let _ended = ended;
                    if let Err(error) = copy.work() {
                        copy.fail(error.into());
                    }
                });
                if let Err(error) = spawned {
                    copy.fail(Error::io("start", "a worker thread", error).into());
                }
            }
            drop(ended);
            while all_ended.recv_timeout(Duration::from_secs(1)).is_err_and(|error| error.is_timeout()) {
                if let Err(error) = watch() {
                    copy.fail(error);
                }
            }
        });
        if let Some(error) = lock(&self.failure).take() {
            return Err(error);
        }
        Ok(Copied {
            read: self.read.into_iter().map(OnceLock::into_inner).collect(),
            suspects: self.suspects.into_inner().unwrap_or_else(PoisonError::into_inner),
        })
    }

    fn fail(&self, error: anyhow::Error) {
        // Later ones are mostly its echo.
        lock(&self.failure).get_or_insert(error);
        self.stopped.store(true, Ordering::Relaxed);
    }

    fn work(&self) -> Result<()> {
        let mut worker = Worker { pack: self.writer.worker()?, reads: ReadAhead::new()? };
        while let Some(unit) = self.plan.units.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            match unit {
                Unit::Group { position, files } => self.group(*position, files.clone(), &mut worker)?,
                Unit::Piece { large, leaf } => self.piece(*large, *leaf, &mut worker)?,
            }
        }
        let began = Instant::now();
        let finished = worker.pack.finish();
        self.waited(Stage::Sync, began);
        finished
    }

    fn group(&self, position: u64, places: Range<usize>, worker: &mut Worker) -> Result<()> {
        let mut group = GroupInProgress::default();
        for place in places {
            let listed = &self.files[place];
            if listed.kind != FileKind::Regular {
                group.files.push(listed.clone());
                continue;
            }
            let Some(source) = self.places.source(&listed.path)? else { continue };
            let first_block = BlockNumber(group.block_count());
            let mut reading = self.reading(place, 0)?;
            self.read_blocks(&source, 0..source.bytes, Shrunk::EndsThere, &mut reading, worker, &mut |record| {
                group.push_block(record, self.writer)
            })?;
            let (crc32c, bytes) = (reading.crc32c, reading.bytes);
            self.keep_suspects(place, reading);
            let _ = self.read[place].set(Read { bytes, crc32c, modified: source.modified });
            group.files.push(FileRecord { bytes, crc32c, first_block, ..record_of(listed, &source) });
        }
        group.commit(position, self.writer)
    }

    fn piece(&self, large: usize, leaf: usize, worker: &mut Worker) -> Result<()> {
        let plan = &self.plan.large[large];
        let listed = &self.files[plan.file];
        let source = self.open_large(large)?;
        let piece_bytes = LEAF_RECORDS * self.block.bytes() as u64;
        let start = leaf as u64 * piece_bytes;
        let mut piece = None;
        if let Some(source) = &source {
            // Beyond the size at which it was listed the WAL has it.
            let end = listed.bytes.min(source.bytes).min(start + piece_bytes);
            if start < end {
                let mut records = Vec::new();
                let mut reading = self.reading(plan.file, start)?;
                self.read_blocks(source, start..end, Shrunk::ZerosFollow, &mut reading, worker, &mut |record| {
                    records.push(record);
                    Ok(())
                })?;
                let crc32c = reading.crc32c;
                self.keep_suspects(plan.file, reading);
                piece = Some(Piece { leaf: self.writer.commit_leaf(&records)?, crc32c, bytes: end - start });
            }
        }
        let mut state = lock(&self.large[large]);
        state.pieces[leaf] = piece;
        state.done += 1;
        if state.done < plan.leaves {
            return Ok(());
        }
        let Some(source) = source else { return Ok(()) };
        let (mut crc32c, mut bytes, mut leaves) = (0, 0, Vec::with_capacity(plan.leaves));
        for piece in std::mem::take(&mut state.pieces).into_iter().flatten() {
            let piece_bytes = usize::try_from(piece.bytes).unwrap_or(usize::MAX);
            crc32c = crc32c::crc32c_combine(crc32c, piece.crc32c, piece_bytes);
            bytes += piece.bytes;
            leaves.push(piece.leaf);
        }
        let _ = self.read[plan.file].set(Read { bytes, crc32c, modified: source.modified });
        let record = FileRecord { bytes, crc32c, first_block: BlockNumber(0), ..record_of(listed, &source) };
        self.writer.commit_group(plan.position, &[record], leaves)
    }

    /// The file of large file number `large`, opened by whichever worker comes first.
    fn open_large(&self, large: usize) -> Result<Option<Arc<SourceFile>>> {
        let plan = &self.plan.large[large];
        let mut state = lock(&self.large[large]);
        if !state.opened {
            state.source = self.places.source(&self.files[plan.file].path)?.map(Arc::new);
            state.pieces.resize_with(plan.leaves, || None);
            state.opened = true;
        }
        Ok(state.source.clone())
    }

    fn reading(&self, place: usize, start: u64) -> Result<Reading> {
        let path = &self.files[place].path;
        let first_page = if self.check_pages { relation_first_page(path) } else { None };
        let parent = match &self.parent {
            Some(parent) => ParentFile::find(parent, path, self.block)?,
            None => None,
        };
        Ok(Reading { crc32c: 0, bytes: 0, start, checker: first_page.map(Checker::new), parent })
    }

    /// Reads `range` of a file and puts its blocks.
    fn read_blocks(
        &self,
        source: &SourceFile,
        range: Range<u64>,
        shrunk: Shrunk,
        reading: &mut Reading,
        worker: &mut Worker,
        keep: &mut dyn FnMut(BlockRecord) -> Result<()>,
    ) -> Result<()> {
        let wanted_at = |at| usize::try_from(range.end - at).unwrap_or(READ_BYTES).min(READ_BYTES);
        let (mut at, mut begun) = (range.start, range.start);
        while at < range.end {
            self.go_on()?;
            let wanted = wanted_at(at);
            let alone = range.end - range.start <= READ_BYTES as u64;
            while !alone && begun < range.end && worker.reads.has_room() {
                self.throttle(wanted_at(begun))?;
                worker.reads.begin(source, begun, wanted_at(begun));
                begun += wanted_at(begun) as u64;
            }
            if alone {
                self.throttle(wanted)?;
            }
            let began = Instant::now();
            let (mut buffer, read) =
                if alone { worker.reads.read(source, at, wanted)? } else { worker.reads.take(source, at, wanted)? };
            source.forget(at, read as u64);
            self.waited(Stage::Disk, began);
            let (content, scratch) = buffer.split_at_mut(READ_BYTES);
            let began = Instant::now();
            if let Some(checker) = &mut reading.checker {
                let page = u32::try_from(at / PAGE_BYTES as u64).unwrap_or(u32::MAX);
                checker.check(&mut content[..read], page, &mut |page, into| {
                    let scratch = &mut scratch[..PAGE_BYTES];
                    let there = source.read_at(u64::from(page) * PAGE_BYTES as u64, scratch)? == PAGE_BYTES;
                    if there {
                        into.copy_from_slice(scratch);
                    }
                    Ok::<_, Error>(there)
                })?;
            }
            self.waited(Stage::Decode, began);
            let taken = match shrunk {
                Shrunk::EndsThere => read,
                Shrunk::ZerosFollow => {
                    content[read..wanted].fill(0);
                    wanted
                }
            };
            self.put_blocks(&content[..taken], reading, &mut worker.pack, keep)?;
            worker.reads.give_back(buffer);
            at += taken as u64;
            if taken < wanted {
                break;
            }
        }
        worker.reads.end()
    }

    /// Waits until so many bytes may be read.
    fn throttle(&self, bytes: usize) -> Result<()> {
        match &self.throttle {
            Some(throttle) => throttle.wait(bytes as u64, &|| self.go_on().is_err()),
            None => Ok(()),
        }
    }

    fn put_blocks(
        &self,
        content: &[u8],
        reading: &mut Reading,
        pack: &mut PackWriter,
        keep: &mut dyn FnMut(BlockRecord) -> Result<()>,
    ) -> Result<()> {
        for block in content.chunks(self.block.bytes()) {
            let (began, waited) = (Instant::now(), pack.waited());
            reading.crc32c = crc32c::crc32c_append(reading.crc32c, block);
            let index = (reading.start + reading.bytes) / self.block.bytes() as u64;
            let parent = match &mut reading.parent {
                Some(parent) => parent.record(index, block.len())?,
                None => None,
            };
            keep(pack.put(block, None, parent.as_ref())?.0)?;
            reading.bytes += block.len() as u64;
            let written = pack.waited().saturating_sub(waited);
            self.spent(Stage::Repository, written);
            self.spent(Stage::Decode, began.elapsed().saturating_sub(written));
            self.progress.advance(block.len() as u64);
        }
        Ok(())
    }

    fn keep_suspects(&self, place: usize, reading: Reading) {
        let suspects = reading.checker.map(Checker::into_suspects).unwrap_or_default();
        if !suspects.is_empty() {
            lock(&self.suspects).extend(suspects.into_iter().map(|suspect| (place, suspect)));
        }
    }

    fn go_on(&self) -> Result<()> {
        if self.stopped.load(Ordering::Relaxed) || self.progress.cancelled() {
            return Err(Error::Cancelled);
        }
        Ok(())
    }

    fn waited(&self, stage: Stage, began: Instant) {
        self.spent(stage, began.elapsed());
    }

    fn spent(&self, stage: Stage, time: Duration) {
        self.progress.waited(stage, u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }
}

/// One file, or a piece of it, on its way.
struct Reading {
    /// Where the piece begins in the file.
    start: u64,
    /// Bytes put so far.
    bytes: u64,
    crc32c: u32,
    checker: Option<Checker>,
    parent: Option<ParentFile>,
}

/// The same path in the parent backup.
pub(super) struct ParentFile {
    manifest: Manifest,
    path: String,
    block: BlockSize,
    bytes: u64,
    first_block: BlockNumber,
    /// Records from number `ahead_from` on, read a leaf at a time.
    ahead: Vec<BlockRecord>,
    ahead_from: u64,
}

impl ParentFile {
    pub(super) fn find(manifest: &Manifest, path: &str, block: BlockSize) -> Result<Option<Self>> {
        let file = match manifest.file(path) {
            Ok(file) => file.filter(|file| file.kind == FileKind::Regular),
            Err(error) => dispensable(path, error)?,
        };
        Ok(file.map(|file| Self {
            manifest: manifest.clone(),
            path: file.path,
            block,
            bytes: file.bytes,
            first_block: file.first_block,
            ahead: Vec::new(),
            ahead_from: 0,
        }))
    }

    /// The record of block `index`, if that block had `bytes` bytes there.
    pub(super) fn record(&mut self, index: u64, bytes: usize) -> Result<Option<BlockRecord>> {
        if self.block.block_bytes_at(self.bytes, index) != bytes {
            return Ok(None);
        }
        let place = index.checked_sub(self.ahead_from).and_then(|place| usize::try_from(place).ok());
        if let Some(record) = place.and_then(|place| self.ahead.get(place)) {
            return Ok(Some(*record));
        }
        let left = self.block.blocks_of(self.bytes) - index;
        self.ahead.clear();
        self.ahead_from = index;
        let first = BlockNumber(self.first_block.0 + index);
        if let Err(error) = self.manifest.blocks(first, left.min(LEAF_RECORDS), &mut self.ahead) {
            // Nothing of this file is compared any more.
            self.ahead.clear();
            self.bytes = 0;
            return dispensable(&self.path, error);
        }
        Ok(self.ahead.first().copied())
    }
}

/// What cannot be compared is stored: a damaged parent must not stop the backup that makes it dispensable.
fn dispensable<T>(path: &str, error: Error) -> Result<Option<T>> {
    if !matches!(error, Error::Corrupt { .. }) {
        return Err(error);
    }
    tracing::warn!("{path} is stored whole, because the parent backup cannot be read: {error}");
    Ok(None)
}

/// The manifest to compare with: blocks of another size have no counterpart.
pub(super) fn comparable_parent(writer: &BackupWriter, block: BlockSize) -> Option<Manifest> {
    writer.parent().filter(|parent| parent.info.block_bytes == block).map(|parent| parent.manifest.clone())
}

/// A group whose files come one after another; full leaves are written at once.
#[derive(Default)]
pub(super) struct GroupInProgress {
    pub(super) files: Vec<FileRecord>,
    leaves: Vec<LeafRef>,
    records: Vec<BlockRecord>,
}

impl GroupInProgress {
    fn block_count(&self) -> u64 {
        self.leaves.len() as u64 * LEAF_RECORDS + self.records.len() as u64
    }

    pub(super) fn push_block(&mut self, record: BlockRecord, writer: &BackupWriter) -> Result<()> {
        self.records.push(record);
        if self.records.len() as u64 == LEAF_RECORDS {
            self.leaves.push(writer.commit_leaf(&self.records)?);
            self.records.clear();
        }
        Ok(())
    }

    pub(super) fn commit(mut self, position: u64, writer: &BackupWriter) -> Result<()> {
        if !self.records.is_empty() {
            self.leaves.push(writer.commit_leaf(&self.records)?);
        }
        // All of its files may have vanished.
        if self.files.is_empty() { Ok(()) } else { writer.commit_group(position, &self.files, self.leaves) }
    }
}

/// The record with what the file was when it was opened.
fn record_of(listed: &FileRecord, source: &SourceFile) -> FileRecord {
    FileRecord { mode: source.mode, uid: source.uid, gid: source.gid, modified: source.modified, ..listed.clone() }
}

/// The number of the file's first page within its relation, if it has a relation's pages.
pub(super) fn relation_first_page(path: &str) -> Option<u32> {
    let (directory, name) = path.rsplit_once('/')?;
    let file = RelationFile::parse(name).filter(|_| relation::is_relation_directory(directory))?;
    Some(file.first_page())
}

/// A panic elsewhere poisons the lock; what is behind it is only looked at to end in order.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
