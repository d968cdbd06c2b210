//! One worker of a delta's comparison: a queue of its own, a share of the buffers, and one loop.
//!
//! A buffer with blocks of the target that differ is held while the backup's blocks are fetched into others. Page by
//! page it becomes what it is to be, and the pages that changed are written out from where they lie.
//!
//! Always true: reads of the target leave [`Shape::reserve`] buffers, and a fetched block needs its buffer no longer than
//! it takes to decode, so every buffer that is held gets its blocks, sooner or later.
//!
//! [`Shape::reserve`]: super::fill::Shape

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crossbeam::channel::Sender;

use super::Hydration;
use super::compare::Shared;
use super::opener::{Fetched, Request};
use super::plan::{self, Job, Missing, Piece};
use super::source;
use super::source_reads::SourceReads;
use super::target::{TargetFiles, TargetReads, Writes};
use crate::blocks::Scratch;
use crate::checksum::Hash;
use crate::format::block::{BlockRecord, Content};
use crate::io::disk::{Finished, Part, Queue, Transfer, Way};
use crate::io::{Buffer, Open};
use crate::page::is_zero;
use crate::progress::Stage;
use crate::units::PAGE_BYTES;
use crate::{Error, Result};

/// See the module.
pub(super) struct Comparer<'a, 'b> {
    shared: &'a Shared<'b>,
    queue: Box<dyn Queue>,
    free: Vec<Buffer>,
    /// What each buffer is in the kernel for, by its index.
    flights: Vec<Option<Flight>>,
    /// Transfers of the target in the kernel, and of the source.
    looking: usize,
    fetching: usize,
    jobs: VecDeque<Job>,
    /// Buffers with blocks that differ, by their index, until all of those are fetched.
    held: Vec<Option<Held>>,
    /// What is to be fetched, and what of it is ready for that.
    fetches: VecDeque<Job>,
    reads: SourceReads<'a>,
    found: TargetReads,
    targets: TargetFiles,
    scratch: Scratch,
    /// The backup's block, decoded.
    wanted: Vec<u8>,
    records: Vec<BlockRecord>,
}

enum Flight {
    Looking(Job),
    Fetching(Job),
    Writing(Writes),
}

/// Blocks of the target, on their way to what they are in the backup.
struct Held {
    job: Job,
    buffer: Buffer,
    /// Jobs that fetch for it.
    fetches: usize,
    writes: Writes,
}

impl<'a, 'b> Comparer<'a, 'b> {
    pub(super) fn new(shared: &'a Shared<'b>, opener: Sender<Request>) -> Result<Self> {
        let (mut free, _) = crate::io::buffers(shared.shape.buffers)?;
        let Hydration { backup, disk, .. } = shared.hydration;
        let queue = disk.queue(&mut free)?;
        let reads = SourceReads::new(&shared.source, backup, &**disk, opener, free.len());
        Ok(Self {
            shared,
            queue,
            flights: free.iter().map(|_| None).collect(),
            held: free.iter().map(|_| None).collect(),
            free,
            looking: 0,
            fetching: 0,
            jobs: VecDeque::new(),
            fetches: VecDeque::new(),
            reads,
            found: TargetReads::default(),
            targets: TargetFiles::new(),
            scratch: Scratch::default(),
            wanted: Vec::new(),
            records: Vec::new(),
        })
    }

    pub(super) fn run(mut self) -> Result<()> {
        loop {
            self.shared.go_on()?;
            self.make_ready()?;
            self.take_fetched()?;
            self.start_fetches()?;
            self.start_reads()?;
            if self.looking + self.fetching > 0 {
                self.wait()?;
            } else if self.reads.are_opening() {
                self.wait_for_opened()?;
            } else {
                return Ok(());
            }
        }
    }

    /// Has the files of what is to be fetched opened, of as much as there is room for.
    fn make_ready(&mut self) -> Result<()> {
        self.reads.take_opened()?;
        while self.reads.has_room() {
            let Some(job) = self.fetches.pop_front() else { return Ok(()) };
            self.reads.open(job)?;
        }
        Ok(())
    }

    /// Goes on with what has come from another machine.
    fn take_fetched(&mut self) -> Result<()> {
        while let Some(Fetched { job, buffer, outcome }) = self.reads.next_fetched() {
            self.arrive(&job, buffer, outcome)?;
        }
        Ok(())
    }

    fn start_fetches(&mut self) -> Result<()> {
        while self.reads.first().is_some() {
            let Some(buffer) = self.free.pop() else { return Ok(()) };
            let Some((job, parts)) = self.reads.pop() else { return Ok(()) };
            if self.shared.source.is_fetched() {
                self.reads.fetch(job, buffer)?;
                continue;
            }
            self.fetching += 1;
            self.submit(Flight::Fetching(job), Way::Read, buffer, parts);
        }
        Ok(())
    }

    fn start_reads(&mut self) -> Result<()> {
        while self.free.len() > self.shared.shape.reserve {
            if self.jobs.is_empty() {
                let blocks = self.shared.next_blocks(&mut self.records)?;
                let block_size = self.shared.hydration.backup.info.block_bytes;
                self.jobs.extend(plan::from_mount(blocks, block_size, self.shared.shape.limits()));
            }
            let Some(job) = self.jobs.pop_front() else { return Ok(()) };
            let Hydration { roots, disk, .. } = self.shared.hydration;
            let parts = self.found.parts(&job, (roots, &**disk))?;
            let Some(buffer) = self.free.pop() else { return Ok(()) };
            self.looking += 1;
            self.submit(Flight::Looking(job), Way::Read, buffer, parts);
        }
        Ok(())
    }

    fn submit(&mut self, flight: Flight, way: Way, buffer: Buffer, parts: Vec<Part>) {
        let token = usize::from(buffer.index());
        self.flights[token] = Some(flight);
        self.queue.submit(Transfer { token, way, buffer, parts });
    }

    /// Sleeps until a transfer is finished, and counts the time for what most are waited for.
    fn wait(&mut self) -> Result<()> {
        let behind = if self.fetching > self.looking { Stage::Repository } else { Stage::Disk };
        let started = Instant::now();
        let finished = self.queue.reap(true)?;
        self.shared.waited(behind, started.elapsed());
        finished.map_or(Ok(()), |finished| self.settle(finished))
    }

    /// Sleeps until a job's files are open, when there is nothing else to wait for.
    fn wait_for_opened(&mut self) -> Result<()> {
        let started = Instant::now();
        self.reads.wait()?;
        self.shared.waited(Stage::Repository, started.elapsed());
        Ok(())
    }

    fn settle(&mut self, Finished { token, buffer, parts, outcome }: Finished) -> Result<()> {
        match self.flights.get_mut(token).and_then(Option::take) {
            Some(Flight::Looking(job)) => {
                self.looking -= 1;
                self.look(job, buffer, &parts, outcome.is_ok())
            }
            Some(Flight::Fetching(job)) => {
                self.fetching -= 1;
                self.arrive(&job, buffer, outcome)
            }
            Some(Flight::Writing(mut writes)) => {
                self.looking -= 1;
                outcome?;
                self.free.push(buffer);
                writes.parts = parts;
                self.shared.written(&writes)
            }
            None => Err(Error::Refused(format!("the disk finished transfer {token}, which was not submitted"))),
        }
    }

    /// Blocks of the backup were read.
    fn arrive(&mut self, job: &Job, buffer: Buffer, outcome: Result<()>) -> Result<()> {
        outcome.map_err(|failure| source::explain(failure, job, &self.shared.hydration.backup))?;
        let holder = self.apply(job, &buffer)?;
        self.free.push(buffer);
        self.write_if_complete(holder)
    }

    /// Compares the blocks of a buffer with the manifest. What differs is fetched; what could not be read is not ours.
    fn look(&mut self, job: Job, buffer: Buffer, parts: &[Part], is_read: bool) -> Result<()> {
        let disk = &self.shared.hydration.disk;
        // What lies in the page cache may never have reached the disk, and this kernel would not tell.
        if !disk.sync_file_system_tells() {
            parts.iter().filter(|part| !part.file.direct).try_for_each(|part| disk.sync(&part.file))?;
        }
        let started = Instant::now();
        let mut differing = Vec::new();
        for piece in &job.pieces {
            if !self.is_settled(piece, is_read.then(|| &buffer[piece.base.clone()]))? {
                differing.push(piece.block.clone());
            }
        }
        self.shared.waited(Stage::Decode, started.elapsed());
        if differing.is_empty() {
            self.free.push(buffer);
            return Ok(());
        }
        let token = usize::from(buffer.index());
        let jobs = self.shared.source.jobs(differing, &self.shared.hydration.backup, self.shared.shape.limits())?;
        self.held[token] = Some(Held { job, buffer, fetches: jobs.len(), writes: Writes::default() });
        self.fetches.extend(jobs);
        Ok(())
    }

    /// Compares one block with what was found in its place: nothing, if that could not be read. False if its pages are
    /// to be compared.
    fn is_settled(&self, Piece { block, .. }: &Piece, found: Option<&[u8]>) -> Result<bool> {
        let Shared { hydration, counts, progress, .. } = self.shared;
        let add = |counter: &AtomicU64, number: u64| counter.fetch_add(number, Ordering::Relaxed);
        let wanted_zero = block.record.content == Content::Zero;
        let same =
            found.is_some_and(|bytes| if wanted_zero { is_zero(bytes) } else { Hash::of(bytes) == block.record.hash });
        add(&counts.blocks, 1);
        if found.is_none() {
            add(&counts.unreadable_blocks, 1);
        }
        if wanted_zero && !same {
            self.make_zero(block)?;
            add(&counts.zeroed_blocks, 1);
        }
        if same {
            add(&counts.same_blocks, 1);
            add(&counts.same_bytes, block.bytes as u64);
        }
        if wanted_zero || same {
            hydration.map.mark(block.number());
        } else if found.is_some() {
            return Ok(false);
        }
        progress.advance(block.bytes as u64);
        Ok(true)
    }

    fn make_zero(&self, block: &Missing) -> Result<()> {
        let Hydration { roots, disk, .. } = self.shared.hydration;
        let file = disk.open(roots.place(&block.file.path)?, Open::WriteBuffered)?;
        disk.make_zero(&file, self.offset_of(block), block.bytes as u64)?;
        if !disk.sync_file_system_tells() {
            disk.sync(&file)?;
        }
        disk.set_modified(&file, block.file.modified)
    }

    fn offset_of(&self, block: &Missing) -> u64 {
        block.index * self.shared.hydration.backup.info.block_bytes.bytes() as u64
    }

    /// Puts what was fetched over the blocks that wait for it, and tells in which buffer they do.
    fn apply(&mut self, job: &Job, fetched: &Buffer) -> Result<usize> {
        let started = Instant::now();
        let place = job.pieces.first().and_then(|piece| self.holder_of(&piece.block));
        let holder = place.and_then(|place| Some((place, self.held[place].take()?)));
        let Some((place, mut held)) = holder else {
            return Err(Error::Refused("a block was fetched that nobody waits for".to_owned()));
        };
        for piece in &job.pieces {
            self.apply_piece(piece, job, fetched, &mut held)?;
        }
        held.fetches -= 1;
        self.held[place] = Some(held);
        self.shared.waited(Stage::Decode, started.elapsed());
        Ok(place)
    }

    fn holder_of(&self, block: &Missing) -> Option<usize> {
        let number = block.number();
        let holds = |held: &Held| held.job.pieces.iter().any(|piece| piece.block.number() == number);
        self.held.iter().position(|held| held.as_ref().is_some_and(holds))
    }

    fn apply_piece(&mut self, piece: &Piece, job: &Job, fetched: &Buffer, held: &mut Held) -> Result<()> {
        let Hydration { backup, roots, disk, .. } = self.shared.hydration;
        let block = &piece.block;
        self.wanted.resize(block.bytes, 0);
        let wanted = if self.shared.source.gives_files() {
            &fetched[piece.base.clone()]
        } else {
            source::decode_piece(piece, fetched, &mut self.wanted, &mut self.scratch, backup)
                .map_err(|failure| source::explain(failure, job, backup))?;
            &self.wanted
        };
        let found = held.job.pieces.iter().find(|found| found.block.number() == block.number());
        let Some(place) = found.map(|found| found.base.clone()) else {
            return Err(Error::Refused("a block was fetched that nobody waits for".to_owned()));
        };
        let offset = self.offset_of(block);
        for run in take_over(&mut held.buffer[place.clone()], wanted) {
            let bytes = offset + run.start as u64..offset + run.end as u64;
            self.targets.add_run(&mut held.writes, block, bytes, place.start + run.start, (roots, &**disk))?;
        }
        held.writes.blocks.push((block.number(), block.bytes));
        Ok(())
    }

    fn write_if_complete(&mut self, holder: usize) -> Result<()> {
        let complete = self.held[holder].take_if(|held| held.fetches == 0);
        let Some(Held { buffer, mut writes, .. }) = complete else { return Ok(()) };
        let parts = std::mem::take(&mut writes.parts);
        if parts.is_empty() {
            self.free.push(buffer);
            return self.shared.written(&writes);
        }
        self.looking += 1;
        self.submit(Flight::Writing(writes), Way::Write, buffer, parts);
        Ok(())
    }
}

/// Makes `found` the same as `wanted`, page by page, and tells the runs of pages that were not.
fn take_over(found: &mut [u8], wanted: &[u8]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    let pages = found.chunks_mut(PAGE_BYTES).zip(wanted.chunks(PAGE_BYTES)).enumerate();
    for (page, (found, wanted)) in pages.filter(|(_, (found, wanted))| found != wanted) {
        found.copy_from_slice(wanted);
        let run = page * PAGE_BYTES..page * PAGE_BYTES + wanted.len();
        match runs.last_mut() {
            Some(last) if last.end == run.start => last.end = run.end,
            _ => runs.push(run),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_differ_are_taken_over_in_runs() {
        let wanted: Vec<u8> = (0..=9).flat_map(|page| [page; PAGE_BYTES]).chain([10; 100]).collect();
        let mut found = wanted.clone();
        assert!(take_over(&mut found, &wanted).is_empty());
        for at in [0, 3 * PAGE_BYTES + 8191, 4 * PAGE_BYTES, 10 * PAGE_BYTES + 99] {
            found[at] ^= 1;
        }
        let runs = take_over(&mut found, &wanted);
        let pages = runs.iter().map(|run| (run.start / PAGE_BYTES, run.len()));
        assert_eq!(pages.collect::<Vec<_>>(), [(0, PAGE_BYTES), (3, 2 * PAGE_BYTES), (10, 100)]);
        assert_eq!(found, wanted);
    }
}
