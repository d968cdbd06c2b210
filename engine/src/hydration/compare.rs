//! A delta's comparison: which blocks of the backup are in their places already.
//!
//! Workers read the target's own files past the page cache, many reads in flight, and hash what arrives. A block with the
//! hash that the manifest has is marked in the map, as if it had been written; [`super::fill`] brings the others. A
//! block of zeros is made one where it is not: the fill takes those for granted. A block that cannot be read is one
//! that differs.
//!
//! What is marked here gets on disk like any other bit, behind a sync of the file systems: that the bytes were read says
//! nothing of their being durable.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam::channel::{RecvTimeoutError, bounded};

use super::fill::{AllUnits, CHECKPOINT, Shape, open_files_max};
use super::first::FirstFailure;
use super::plan::{self, From, Job, Missing, Piece, Units};
use super::{Hydration, is_left_out, is_placed_last};
use crate::checksum::Hash;
use crate::format::block::{BlockRecord, Content};
use crate::format::file::FileRecord;
use crate::io::disk::{Finished, Part, Queue, Transfer, Way};
use crate::io::{Buffer, Open, OpenFile};
use crate::page::is_zero;
use crate::progress::{Progress, Stage};
use crate::units::BlockNumber;
use crate::{Error, Result};

/// What a comparison found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compared {
    /// Blocks that were looked at.
    pub blocks: u64,
    /// Those that are as in the backup, and their bytes.
    pub same_blocks: u64,
    /// See `same_blocks`.
    pub same_bytes: u64,
    /// Blocks that were made zero.
    pub zeroed_blocks: u64,
    /// Blocks that could not be read: they are written anew.
    pub unreadable_blocks: u64,
}

#[derive(Default)]
struct Counts {
    blocks: AtomicU64,
    same_blocks: AtomicU64,
    same_bytes: AtomicU64,
    zeroed_blocks: AtomicU64,
    unreadable_blocks: AtomicU64,
}

struct Shared<'a> {
    hydration: &'a Hydration,
    shape: Shape,
    progress: &'a dyn Progress,
    units: Mutex<AllUnits<'a>>,
    failure: FirstFailure,
    counts: Counts,
}

impl Hydration {
    /// Marks the blocks of a delta that are as in the backup; those that the map has already are not looked at. Comes
    /// after [`Hydration::outline`] in each run, and before [`Hydration::fill`].
    pub fn compare(&self, workers: usize, memory_bytes: usize, progress: &dyn Progress) -> Result<Compared> {
        self.map.refuse_if_closed()?;
        let files: Box<dyn Iterator<Item = Result<FileRecord>> + Send + '_> = Box::new(self.backup.manifest.files());
        let left_out: fn(&str) -> bool = |path| is_left_out(path) || is_placed_last(path);
        let shared = Shared {
            hydration: self,
            shape: Shape::new(workers, memory_bytes, self.backup.info.totals.bytes, open_files_max()),
            progress,
            units: Mutex::new(Units::new(files, self.backup.info.block_bytes, left_out)),
            failure: FirstFailure::new(),
            counts: Counts::default(),
        };
        std::thread::scope(|scope| {
            // Each worker holds a sender and sends nothing: the channel closes when the last one ends.
            let (alive, all_ended) = bounded::<()>(0);
            for _ in 0..shared.shape.workers {
                let (alive, shared) = (alive.clone(), &shared);
                scope.spawn(move || {
                    shared.failure.watch(|| Comparer::new(shared)?.run());
                    drop(alive);
                });
            }
            drop(alive);
            while all_ended.recv_timeout(CHECKPOINT) == Err(RecvTimeoutError::Timeout) {
                if !shared.failure.is_set() {
                    shared.failure.watch(|| shared.checkpoint());
                }
            }
        });
        if shared.failure.is_set() {
            shared.failure.take()?;
            return Err(Error::Cancelled);
        }
        self.compared.store(true, Ordering::Release);
        Ok(shared.counts.compared())
    }
}

impl Counts {
    fn compared(&self) -> Compared {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Compared {
            blocks: count(&self.blocks),
            same_blocks: count(&self.same_blocks),
            same_bytes: count(&self.same_bytes),
            zeroed_blocks: count(&self.zeroed_blocks),
            unreadable_blocks: count(&self.unreadable_blocks),
        }
    }
}

impl Shared<'_> {
    fn go_on(&self) -> Result<()> {
        if self.failure.is_set() || self.progress.cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }

    /// Bytes, then their sync, then the bits.
    fn checkpoint(&self) -> Result<()> {
        let Hydration { map, roots, disk, .. } = self.hydration;
        let started = Instant::now();
        let batch = map.take_batch();
        roots.sync_file_systems(&**disk)?;
        map.commit(batch)?;
        self.waited(Stage::Sync, started.elapsed());
        Ok(())
    }

    fn waited(&self, stage: Stage, time: Duration) {
        self.progress.waited(stage, u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }

    /// Of the next unit that has any, the blocks that have to be compared; none at the end.
    fn next_blocks(&self, records: &mut Vec<BlockRecord>) -> Result<Vec<Missing>> {
        let Hydration { backup, map, fresh, .. } = self.hydration;
        loop {
            self.go_on()?;
            let unit = self.units.lock().unwrap_or_else(PoisonError::into_inner).next().transpose()?;
            let Some(unit) = unit else { return Ok(Vec::new()) };
            let mut blocks = Vec::new();
            for span in unit {
                let is_fresh = fresh.lock().unwrap_or_else(PoisonError::into_inner).contains(&span.file.first_block);
                records.clear();
                if !is_fresh {
                    let first = BlockNumber(span.file.first_block.0 + span.first);
                    backup.manifest.blocks(first, span.count, records)?;
                }
                let mut skipped = 0;
                for index in span.first..span.first + span.count {
                    let bytes = backup.info.block_bytes.block_bytes_at(span.file.bytes, index);
                    let number = BlockNumber(span.file.first_block.0 + index);
                    let record = usize::try_from(index - span.first).ok().and_then(|at| records.get(at));
                    match record.filter(|_| !map.is_present(number)) {
                        Some(record) => {
                            blocks.push(Missing { file: Arc::clone(&span.file), index, bytes, record: *record });
                        }
                        None => skipped += bytes as u64,
                    }
                }
                self.progress.advance(skipped);
            }
            if !blocks.is_empty() {
                return Ok(blocks);
            }
        }
    }
}

/// One worker: a queue of its own, a share of the buffers, reads in flight in all of them.
struct Comparer<'a, 'b> {
    shared: &'a Shared<'b>,
    queue: Box<dyn Queue>,
    free: Vec<Buffer>,
    /// What each buffer is in the kernel for, by its index.
    flights: Vec<Option<Job>>,
    reading: usize,
    jobs: VecDeque<Job>,
    last: Option<(Arc<FileRecord>, Arc<OpenFile>)>,
    records: Vec<BlockRecord>,
}

impl<'a, 'b> Comparer<'a, 'b> {
    fn new(shared: &'a Shared<'b>) -> Result<Self> {
        let (mut free, _) = crate::io::buffers(shared.shape.buffers)?;
        let queue = shared.hydration.disk.queue(&mut free)?;
        let flights = free.iter().map(|_| None).collect();
        Ok(Self { shared, queue, free, flights, reading: 0, jobs: VecDeque::new(), last: None, records: Vec::new() })
    }

    fn run(mut self) -> Result<()> {
        loop {
            self.shared.go_on()?;
            self.start_reads()?;
            if self.reading == 0 {
                return Ok(());
            }
            let started = Instant::now();
            let finished = self.queue.reap(true)?;
            self.shared.waited(Stage::Disk, started.elapsed());
            if let Some(finished) = finished {
                self.settle(finished)?;
            }
        }
    }

    fn start_reads(&mut self) -> Result<()> {
        while !self.free.is_empty() {
            if self.jobs.is_empty() {
                let blocks = self.shared.next_blocks(&mut self.records)?;
                let block_size = self.shared.hydration.backup.info.block_bytes;
                self.jobs.extend(plan::from_mount(blocks, block_size, self.shared.shape.limits()));
            }
            let Some(job) = self.jobs.pop_front() else { return Ok(()) };
            let parts = self.parts(&job)?;
            let Some(buffer) = self.free.pop() else { return Ok(()) };
            let token = usize::from(buffer.index());
            self.flights[token] = Some(job);
            self.reading += 1;
            self.queue.submit(Transfer { token, way: Way::Read, buffer, parts });
        }
        Ok(())
    }

    fn parts(&mut self, job: &Job) -> Result<Vec<Part>> {
        let mut parts = Vec::with_capacity(job.reads.len());
        for read in &job.reads {
            let From::File(file) = &read.from else {
                return Err(Error::Refused("a plan for another source".to_owned()));
            };
            let file = self.file(file)?;
            parts.push(Part { file, offset: read.offset, at: read.at, bytes: read.bytes });
        }
        Ok(parts)
    }

    fn file(&mut self, file: &Arc<FileRecord>) -> Result<Arc<OpenFile>> {
        if let Some((last, open)) = &self.last
            && Arc::ptr_eq(last, file)
        {
            return Ok(Arc::clone(open));
        }
        let Hydration { roots, disk, .. } = self.shared.hydration;
        let open = disk.open(roots.place(&file.path)?, Open::Read)?;
        self.last = Some((Arc::clone(file), Arc::clone(&open)));
        Ok(open)
    }

    fn settle(&mut self, finished: Finished) -> Result<()> {
        let Finished { token, buffer, parts, outcome } = finished;
        let Some(job) = self.flights.get_mut(token).and_then(Option::take) else {
            return Err(Error::Refused(format!("the disk finished transfer {token}, which was not submitted")));
        };
        self.reading -= 1;
        let disk = &self.shared.hydration.disk;
        // What lies in the page cache may never have reached the disk, and this kernel would not tell.
        if !disk.sync_file_system_tells() {
            parts.iter().filter(|part| !part.file.direct).try_for_each(|part| disk.sync(&part.file))?;
        }
        let started = Instant::now();
        for piece in &job.pieces {
            self.judge(piece, outcome.is_ok().then(|| &buffer[piece.base.clone()]))?;
        }
        self.shared.waited(Stage::Decode, started.elapsed());
        self.free.push(buffer);
        Ok(())
    }

    /// Compares one block with what was found in its place: nothing, if that could not be read.
    fn judge(&self, Piece { block, .. }: &Piece, found: Option<&[u8]>) -> Result<()> {
        let Shared { hydration, counts, progress, .. } = self.shared;
        let add = |counter: &AtomicU64, number: u64| counter.fetch_add(number, Ordering::Relaxed);
        let wanted_zero = block.record.content == Content::Zero;
        let same = match found {
            None => {
                add(&counts.unreadable_blocks, 1);
                false
            }
            Some(bytes) if wanted_zero => is_zero(bytes),
            Some(bytes) => Hash::of(bytes) == block.record.hash,
        };
        if wanted_zero && !same {
            self.make_zero(block)?;
            add(&counts.zeroed_blocks, 1);
        }
        if wanted_zero || same {
            hydration.map.mark(block.number());
        }
        if same {
            add(&counts.same_blocks, 1);
            add(&counts.same_bytes, block.bytes as u64);
        }
        add(&counts.blocks, 1);
        progress.advance(block.bytes as u64);
        Ok(())
    }

    fn make_zero(&self, block: &Missing) -> Result<()> {
        let Hydration { roots, disk, backup, .. } = self.shared.hydration;
        let offset = block.index * backup.info.block_bytes.bytes() as u64;
        let file = disk.open(roots.place(&block.file.path)?, Open::WriteBuffered)?;
        disk.make_zero(&file, offset, block.bytes as u64)?;
        if !disk.sync_file_system_tells() {
            disk.sync(&file)?;
        }
        disk.set_modified(&file, block.file.modified)
    }
}
