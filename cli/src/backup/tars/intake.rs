//! From a stream of files into packs, on every core.
//!
//! One thread reads the stream into batches; workers check the pages of a batch, hash, compare with the parent's blocks,
//! compress and store. A batch is whole blocks that follow each other in the stream, a piece of a large file or many small
//! files, so what one worker stores lies together, and the block records of a batch too ([`Records`]). There are so many
//! batches and no more: who reads faster than the workers store waits for one to come back.
//!
//! Always true: memory does not grow with the stream, but for what is kept of each file, and of files under way.
//!
//! The first failure stops all, and is the one that is told.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use anyhow::Result;
use crossbeam::channel::{Receiver, Sender, bounded};
use engine::Error;
use engine::progress::{Progress, Stage};
use engine::repository::{BackupWriter, Manifest, PackWriter};
use engine::units::{BlockSize, PAGE_BYTES};

use super::super::BAD_PAGES_MAX;
use super::super::copy::{ParentFile, comparable_parent, relation_first_page};
use super::super::pages::{Checker, Suspect};
use super::records::Records;

/// Content of a batch: long enough that what lies together in a pack is read in long requests.
const BATCH_BYTES: usize = 4 << 20;
/// Pieces of a batch: what is kept of them stays below what they hold.
const BATCH_PIECES_MAX: usize = 4096;
/// Batches beside the one that each worker has: the one that is read, and two that wait.
const BATCHES_AHEAD: usize = 3;

const _: () = assert!(BATCH_BYTES.is_multiple_of(BlockSize::MAX.bytes()));

/// What workers share.
pub(super) struct Intake<'a> {
    writer: &'a BackupWriter,
    records: &'a Records,
    block: BlockSize,
    parent: Option<Manifest>,
    progress: &'a dyn Progress,
    /// Pages are checked until nobody wants to know of more.
    checking: AtomicBool,
    stopped: AtomicBool,
    failure: Mutex<Option<Error>>,
    found: Mutex<Found>,
}

/// What the workers found out.
#[derive(Default)]
pub(super) struct Found {
    /// Of each file, by its number in the stream.
    crc32c: Vec<u32>,
    /// Files that are not whole yet.
    parts: HashMap<usize, Parts>,
    /// Pages that are wrong, with their file's number.
    pub(super) suspects: Vec<(usize, Suspect)>,
}

/// What there is of a file.
#[derive(Default)]
struct Parts {
    bytes: u64,
    /// Where each piece begins, its CRC and its bytes.
    pieces: Vec<(u64, u32, usize)>,
}

/// The content of a file, or a part of it that begins with a block.
struct Piece {
    file: usize,
    path: Arc<str>,
    file_bytes: u64,
    first_block: u64,
    place: Range<usize>,
}

/// What a worker takes at once.
struct Batch {
    memory: Vec<u8>,
    filled: usize,
    pieces: Vec<Piece>,
    /// The number of its first block among those of the whole stream.
    first_record: u64,
}

/// What a worker has for itself.
struct Worker {
    pack: PackWriter,
    /// The file that it had last.
    parent: Option<(usize, Option<ParentFile>)>,
}

/// The reader's end.
pub(super) struct Feed<'a> {
    intake: &'a Intake<'a>,
    full: Sender<Batch>,
    free: Receiver<Vec<u8>>,
    current: Option<Batch>,
    next_file: usize,
    next_record: u64,
}

impl<'a> Intake<'a> {
    pub(super) fn new(
        writer: &'a BackupWriter,
        records: &'a Records,
        block: BlockSize,
        progress: &'a dyn Progress,
    ) -> Self {
        Self {
            writer,
            records,
            block,
            parent: comparable_parent(writer, block),
            progress,
            checking: AtomicBool::new(true),
            stopped: AtomicBool::new(false),
            failure: Mutex::default(),
            found: Mutex::default(),
        }
    }

    /// Runs `workers` threads on what `read` feeds them with, to the end of it.
    pub(super) fn run<T>(self, workers: usize, read: impl FnOnce(&mut Feed<'_>) -> Result<T>) -> Result<(T, Found)> {
        let batches = workers + BATCHES_AHEAD;
        let fed = std::thread::scope(|scope| {
            let intake = &self;
            let (full, to_do) = bounded(batches);
            let (done, free) = bounded(batches);
            for _ in 0..batches {
                // There is room for all of them.
                let _ = done.send(Vec::new());
            }
            for _ in 0..workers {
                let (to_do, done) = (to_do.clone(), done.clone());
                let thread = std::thread::Builder::new().name("backup".to_owned());
                let spawned = thread.spawn_scoped(scope, move || {
                    if let Err(error) = intake.work(&to_do, &done) {
                        intake.fail(error);
                    }
                });
                if let Err(error) = spawned {
                    intake.fail(Error::io("start", "a worker thread", error));
                }
            }
            // The channels end with the threads, so that nobody waits for one that is gone.
            drop((to_do, done));
            let mut feed = Feed { intake, full, free, current: None, next_file: 0, next_record: 0 };
            let fed = read(&mut feed).and_then(|fed| feed.flush().map(|()| fed));
            if fed.is_err() {
                intake.stopped.store(true, Ordering::Relaxed);
            }
            fed
        });
        // Whoever was stopped by the other's failure says no more than that.
        match self.failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
            None => Ok((fed?, self.found.into_inner().unwrap_or_else(PoisonError::into_inner))),
            Some(Error::Cancelled) => Err(fed.err().unwrap_or_else(|| Error::Cancelled.into())),
            Some(error) => Err(error.into()),
        }
    }

    fn fail(&self, error: Error) {
        // Later ones are mostly its echo.
        lock(&self.failure).get_or_insert(error);
        self.stopped.store(true, Ordering::Relaxed);
    }

    fn work(&self, to_do: &Receiver<Batch>, done: &Sender<Vec<u8>>) -> engine::Result<()> {
        let mut worker = Worker { pack: self.writer.worker()?, parent: None };
        loop {
            let began = Instant::now();
            let Ok(batch) = to_do.recv() else { break };
            self.waited(Stage::Disk, began);
            self.go_on()?;
            let began = Instant::now();
            self.store(&batch, &mut worker)?;
            self.waited(Stage::Decode, began);
            // The reader may have ended.
            let _ = done.send(batch.memory);
        }
        self.go_on()?;
        let began = Instant::now();
        let finished = worker.pack.finish();
        self.waited(Stage::Sync, began);
        finished
    }

    fn store(&self, batch: &Batch, worker: &mut Worker) -> engine::Result<()> {
        let mut records = Vec::new();
        let mut suspects = Vec::new();
        let mut crcs = Vec::with_capacity(batch.pieces.len());
        for piece in &batch.pieces {
            let content = &batch.memory[piece.place.clone()];
            suspects.extend(self.check_pages(piece, content).into_iter().map(|suspect| (piece.file, suspect)));
            crcs.push((piece, crc32c::crc32c(content)));
            let mut parent = self.parent_of(piece, &mut worker.parent)?;
            for (index, block) in (piece.first_block..).zip(content.chunks(self.block.bytes())) {
                let same_place = match &mut parent {
                    Some(parent) => parent.record(index, block.len())?,
                    None => None,
                };
                records.push(worker.pack.put(block, None, same_place.as_ref())?.0);
                self.progress.advance(block.len() as u64);
            }
        }
        self.records.write(batch.first_record, &records)?;
        let mut found = lock(&self.found);
        for (piece, crc32c) in crcs {
            found.add(piece, crc32c);
        }
        found.suspects.extend(suspects);
        if found.suspects.len() >= BAD_PAGES_MAX {
            // A cluster without checksums, which is only known at the stream's end, or one that has lost a disk.
            self.checking.store(false, Ordering::Relaxed);
        }
        Ok(())
    }

    fn check_pages(&self, piece: &Piece, content: &[u8]) -> Vec<Suspect> {
        let Some(first_page) = relation_first_page(&piece.path) else { return Vec::new() };
        if !self.checking.load(Ordering::Relaxed) {
            return Vec::new();
        }
        let page = piece.first_block * (self.block.bytes() / PAGE_BYTES) as u64;
        let mut checker = Checker::new(first_page);
        checker.check_once(content, u32::try_from(page).unwrap_or(u32::MAX));
        checker.into_suspects()
    }

    /// The same file in the parent backup, looked up once where a worker has several pieces of it.
    fn parent_of<'w>(
        &self,
        piece: &Piece,
        last: &'w mut Option<(usize, Option<ParentFile>)>,
    ) -> engine::Result<Option<&'w mut ParentFile>> {
        let Some(manifest) = &self.parent else { return Ok(None) };
        if last.as_ref().is_none_or(|(file, _)| *file != piece.file) {
            *last = Some((piece.file, ParentFile::find(manifest, &piece.path, self.block)?));
        }
        Ok(last.as_mut().and_then(|(_, parent)| parent.as_mut()))
    }

    fn go_on(&self) -> engine::Result<()> {
        if self.stopped.load(Ordering::Relaxed) || self.progress.cancelled() {
            return Err(Error::Cancelled);
        }
        Ok(())
    }

    fn waited(&self, stage: Stage, began: Instant) {
        self.progress.waited(stage, u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX));
    }
}

impl Feed<'_> {
    /// Takes the content of a file of `bytes` bytes: its number among the files, and that of its first block.
    pub(super) fn file(&mut self, path: &str, bytes: u64, content: &mut dyn std::io::Read) -> Result<(usize, u64)> {
        let (file, first_record) = (self.next_file, self.next_record);
        self.next_file += 1;
        let path: Arc<str> = path.into();
        let block = self.intake.block;
        let mut at = 0;
        while at < bytes {
            let mut batch = match self.current.take() {
                Some(batch) => batch,
                None => self.begin_batch()?,
            };
            let left = usize::try_from(bytes - at).unwrap_or(usize::MAX);
            let room = batch.memory.len() - batch.filled;
            // Whole blocks, but for the last of a file.
            let taken = if left <= room { left } else { room / block.bytes() * block.bytes() };
            let place = batch.filled..batch.filled + taken;
            if taken > 0 {
                content.read_exact(&mut batch.memory[place.clone()])?;
                let first_block = at / block.bytes() as u64;
                batch.pieces.push(Piece { file, path: Arc::clone(&path), file_bytes: bytes, first_block, place });
                batch.filled += taken;
                at += taken as u64;
                self.next_record += block.blocks_of(taken as u64);
            }
            let full = batch.pieces.len() >= BATCH_PIECES_MAX;
            self.current = Some(batch);
            if at < bytes || full {
                self.flush()?;
            }
        }
        Ok((file, first_record))
    }

    fn begin_batch(&self) -> Result<Batch> {
        self.intake.go_on()?;
        let mut memory = self.free.recv().map_err(|_| Error::Cancelled)?;
        memory.resize(BATCH_BYTES, 0);
        Ok(Batch { memory, filled: 0, pieces: Vec::new(), first_record: self.next_record })
    }

    fn flush(&mut self) -> Result<()> {
        if let Some(batch) = self.current.take() {
            // Without workers there is a failure, which is told instead of this.
            self.full.send(batch).map_err(|_| Error::Cancelled)?;
        }
        Ok(())
    }
}

impl Found {
    fn add(&mut self, piece: &Piece, crc32c: u32) {
        if self.crc32c.len() <= piece.file {
            self.crc32c.resize(piece.file + 1, 0);
        }
        if piece.place.len() as u64 == piece.file_bytes {
            self.crc32c[piece.file] = crc32c;
            return;
        }
        let parts = self.parts.entry(piece.file).or_default();
        parts.bytes += piece.place.len() as u64;
        parts.pieces.push((piece.first_block, crc32c, piece.place.len()));
        if parts.bytes == piece.file_bytes {
            parts.pieces.sort_unstable();
            let joined = |whole, (_, crc32c, bytes): &(u64, u32, usize)| crc32c::crc32c_combine(whole, *crc32c, *bytes);
            let whole = parts.pieces.iter().fold(0, joined);
            self.parts.remove(&piece.file);
            self.crc32c[piece.file] = whole;
        }
    }

    /// The CRC-32C of a file, by its number; that of nothing for an empty one.
    pub(super) fn crc32c(&self, file: usize) -> u32 {
        self.crc32c.get(file).copied().unwrap_or_default()
    }
}

/// A panic elsewhere poisons the lock; what is behind it is only looked at to end in order.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
