//! One worker of the copier: a queue of its own, a share of the buffers, and one loop.
//!
//! While some buffers are being read into and others written out, the worker decodes. A buffer that arrives with
//! its blocks as the file has them (raw in a pack, or plain from a mount) is written out from where it lies, without
//! a copy; compressed blocks are decoded into a second buffer, which is written when it is full.
//!
//! Where files share raw blocks with the packs ([`super::sharing`]), what is read is only proven, and noted once it is.
//!
//! Always true: reads of jobs that need decoding leave [`Shape::reserve`] buffers, so decoding always finds one to
//! decode into, sooner or later, and the loop cannot wait for itself.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use crossbeam::channel::Sender;

use super::fill::Shared;
use super::opener::{Fetched, Request};
use super::plan::{self, Job, Missing, Piece, Span};
use super::sharing::SharedBlocks;
use super::source;
use super::source_reads::SourceReads;
use super::target::{TargetFiles, TargetReads, Writes};
use crate::blocks::Scratch;
use crate::format::block::{BlockRecord, Content};
use crate::io::disk::{Finished, Queue, Transfer, Way};
use crate::io::{BUFFER_BYTES, Buffer, Open};
use crate::progress::Stage;
use crate::units::{BlockNumber, DIRECT_BYTES};
use crate::{Error, Result};

/// See the module.
pub(super) struct Worker<'a, 'b> {
    shared: &'a Shared<'b>,
    queue: Box<dyn Queue>,
    free: Vec<Buffer>,
    /// What each buffer is in the kernel for, by its index.
    flights: Vec<Option<Flight>>,
    reading: usize,
    writing: usize,
    jobs: VecDeque<Job>,
    reads: SourceReads<'a>,
    /// Jobs that were read and wait to be decoded.
    arrived: VecDeque<(Job, Buffer)>,
    decoding: Option<Decoding>,
    targets: TargetFiles,
    shared_blocks: TargetReads,
    scratch: Scratch,
    records: Vec<BlockRecord>,
}

enum Flight {
    Reading(Job),
    Writing(Writes),
}

/// A job of which pieces from `next` on are still to be decoded, and where they go.
struct Decoding {
    job: Job,
    stored: Buffer,
    next: usize,
}

impl<'a, 'b> Worker<'a, 'b> {
    pub(super) fn new(shared: &'a Shared<'b>, opener: Sender<Request>) -> Result<Self> {
        let (mut free, pages) = crate::io::buffers(shared.shape.buffers)?;
        let queue = shared.disk.queue(&mut free)?;
        shared.note_io(&format!("{}, {pages}", queue.describe()));
        let flights = free.iter().map(|_| None).collect();
        let reads = SourceReads::new(&shared.source, shared.backup, shared.disk, opener, free.len());
        Ok(Self {
            shared,
            queue,
            free,
            flights,
            reading: 0,
            writing: 0,
            jobs: VecDeque::new(),
            reads,
            arrived: VecDeque::new(),
            decoding: None,
            targets: TargetFiles::new(),
            shared_blocks: TargetReads::default(),
            scratch: Scratch::default(),
            records: Vec::new(),
        })
    }

    pub(super) fn run(mut self) -> Result<()> {
        loop {
            self.shared.go_on()?;
            self.make_ready()?;
            self.take_fetched()?;
            self.start_reads()?;
            if self.decode_one_buffer()? {
                self.settle_finished()?;
            } else if self.reading + self.writing > 0 {
                self.wait()?;
                self.settle_finished()?;
            } else if self.reads.are_opening() {
                self.wait_for_opened()?;
            } else if self.reads.first().is_none() {
                return Ok(());
            }
        }
    }

    /// Plans jobs and has their files opened, for as many as there is room for.
    fn make_ready(&mut self) -> Result<()> {
        self.reads.take_opened()?;
        while self.reads.has_room() {
            if self.jobs.is_empty() {
                self.take_unit()?;
            }
            let Some(job) = self.jobs.pop_front() else { return Ok(()) };
            if job.is_shared {
                let parts = self.shared_blocks.parts(&job, (self.shared.roots, self.shared.disk))?;
                self.reads.push(job, parts);
            } else {
                self.reads.open(job)?;
            }
        }
        Ok(())
    }

    /// Submits reads while there are buffers and jobs that are ready.
    fn start_reads(&mut self) -> Result<()> {
        while let Some(job) = self.reads.first() {
            let kept_free = if self.is_decoded(job) { self.shared.shape.reserve } else { 0 };
            if self.free.len() <= kept_free {
                return Ok(());
            }
            let (Some((job, parts)), Some(buffer)) = (self.reads.pop(), self.free.pop()) else { return Ok(()) };
            if self.shared.source.is_fetched() {
                self.reads.fetch(job, buffer)?;
                continue;
            }
            let token = usize::from(buffer.index());
            self.flights[token] = Some(Flight::Reading(job));
            self.reading += 1;
            self.queue.submit(Transfer { token, way: Way::Read, buffer, parts });
        }
        Ok(())
    }

    /// Goes on with what has come from another machine.
    fn take_fetched(&mut self) -> Result<()> {
        while let Some(Fetched { job, buffer, outcome }) = self.reads.next_fetched() {
            self.arrive(job, buffer, outcome)?;
        }
        Ok(())
    }

    fn is_decoded(&self, job: &Job) -> bool {
        !self.shared.source.gives_files() && !job.is_shared && !job.is_in_place()
    }

    /// Takes the next unit that has anything missing, and plans its jobs.
    fn take_unit(&mut self) -> Result<()> {
        while self.jobs.is_empty() {
            self.shared.go_on()?;
            let Some(unit) = self.shared.next_unit()? else { return Ok(()) };
            let mut missing = Vec::new();
            for span in unit {
                self.records.clear();
                let first = BlockNumber(span.file.first_block.0 + span.first);
                self.shared.backup.manifest.blocks(first, span.count, &mut self.records)?;
                self.find_missing(&span, &mut missing)?;
            }
            if let Some(blocks) = &self.shared.sharing {
                missing = self.take_shared(missing, blocks)?;
            }
            self.jobs.extend(self.shared.source.jobs(missing, self.shared.backup, self.shared.shape.limits())?);
        }
        Ok(())
    }

    /// Notes the blocks that their files share, or has them proven first; returns what has to be copied.
    fn take_shared(&mut self, missing: Vec<Missing>, blocks: &SharedBlocks) -> Result<Vec<Missing>> {
        let (there, copied): (Vec<_>, Vec<_>) = missing.into_iter().partition(|block| blocks.contains(block.number()));
        if blocks.trusted {
            self.shared.count_shared(&there);
            let blocks = there.iter().map(|block| (block.number(), block.bytes)).collect();
            self.shared.written(&Writes { blocks, ..Writes::default() })?;
        } else {
            let proofs = plan::from_mount(there, self.shared.backup.info.block_bytes, self.shared.shape.limits());
            self.jobs.extend(proofs.into_iter().map(|job| Job { is_shared: true, ..job }));
        }
        Ok(copied)
    }

    /// Sorts the blocks of a span, of which `records` has the records, into those to read and those that are there.
    fn find_missing(&self, span: &Span, missing: &mut Vec<Missing>) -> Result<()> {
        let Shared { backup, map, .. } = self.shared;
        let (before, mut zeros) = (missing.len(), 0);
        for (index, record) in (span.first..).zip(&self.records) {
            let bytes = backup.info.block_bytes.block_bytes_at(span.file.bytes, index);
            let block = Missing { file: Arc::clone(&span.file), index, bytes, record: *record };
            if map.is_present(block.number()) {
                self.shared.count_present(bytes);
            } else if record.content == Content::Zero {
                self.shared.count_zero(block.number(), bytes);
                zeros += 1;
            } else {
                missing.push(block);
            }
        }
        // A file of zeros is never written, so nothing else gives it its time.
        if zeros > 0 && missing.len() == before {
            let file = self.shared.disk.open(self.shared.roots.place(&span.file.path)?, Open::WriteBuffered)?;
            self.shared.disk.set_modified(&file, span.file.modified)?;
        }
        Ok(())
    }

    /// Decodes into one buffer, as far as it goes; false if there is nothing to decode or nothing to decode into.
    fn decode_one_buffer(&mut self) -> Result<bool> {
        if self.decoding.is_none() {
            let Some((job, stored)) = self.arrived.pop_front() else { return Ok(false) };
            self.decoding = Some(Decoding { job, stored, next: 0 });
        }
        let Some(mut out) = self.free.pop() else { return Ok(false) };
        let Some(Decoding { job, stored, mut next }) = self.decoding.take() else { return Ok(false) };
        let started = Instant::now();
        let mut writes = Writes::default();
        let mut used = 0;
        while let Some(piece) = job.pieces.get(next) {
            let bytes = piece.block.bytes;
            if used + bytes > BUFFER_BYTES {
                break;
            }
            let place = used..used + bytes;
            source::decode_piece(piece, &stored, &mut out[place.clone()], &mut self.scratch, self.shared.backup)
                .map_err(|failure| source::explain(failure, &job, self.shared.backup))?;
            self.targets.add(&mut writes, &piece.block, place.start, self.shared)?;
            used += bytes.next_multiple_of(DIRECT_BYTES);
            next += 1;
        }
        self.shared.waited(Stage::Decode, started.elapsed());
        if next == job.pieces.len() {
            self.free.push(stored);
        } else {
            self.decoding = Some(Decoding { job, stored, next });
        }
        self.submit_writes(out, writes);
        Ok(true)
    }

    fn submit_writes(&mut self, buffer: Buffer, mut writes: Writes) {
        let token = usize::from(buffer.index());
        let parts = std::mem::take(&mut writes.parts);
        self.flights[token] = Some(Flight::Writing(writes));
        self.writing += 1;
        self.queue.submit(Transfer { token, way: Way::Write, buffer, parts });
    }

    /// Sleeps until a transfer is finished, and counts the time for the stage that is behind.
    fn wait(&mut self) -> Result<()> {
        let behind = if self.writing > self.reading { Stage::Disk } else { Stage::Repository };
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

    fn settle_finished(&mut self) -> Result<()> {
        while let Some(finished) = self.queue.reap(false)? {
            self.settle(finished)?;
        }
        Ok(())
    }

    fn settle(&mut self, finished: Finished) -> Result<()> {
        let Finished { token, buffer, outcome, .. } = finished;
        match self.flights.get_mut(token).and_then(Option::take) {
            Some(Flight::Reading(job)) => {
                self.reading -= 1;
                if job.is_shared && outcome.is_ok() {
                    return self.prove(job, buffer);
                }
                self.arrive(job, buffer, outcome)
            }
            Some(Flight::Writing(writes)) => {
                self.writing -= 1;
                outcome?;
                self.free.push(buffer);
                self.shared.written(&writes)
            }
            None => Err(Error::Refused(format!("the disk finished transfer {token}, which was not submitted"))),
        }
    }

    /// A job was read: it is decoded when its turn comes, or written as it is.
    fn arrive(&mut self, job: Job, buffer: Buffer, outcome: Result<()>) -> Result<()> {
        outcome.map_err(|failure| source::explain(failure, &job, self.shared.backup))?;
        if self.is_decoded(&job) {
            self.arrived.push_back((job, buffer));
            Ok(())
        } else {
            self.write_in_place(&job, buffer)
        }
    }

    /// Writes a buffer out from where its blocks arrived.
    fn write_in_place(&mut self, job: &Job, buffer: Buffer) -> Result<()> {
        if !self.shared.source.gives_files() {
            let started = Instant::now();
            for piece in &job.pieces {
                source::verify_piece(piece, &buffer, self.shared.backup)
                    .map_err(|failure| source::explain(failure, job, self.shared.backup))?;
            }
            self.shared.waited(Stage::Decode, started.elapsed());
        }
        let mut writes = Writes::default();
        for piece in &job.pieces {
            self.targets.add(&mut writes, &piece.block, piece.base.start, self.shared)?;
        }
        self.submit_writes(buffer, writes);
        Ok(())
    }

    /// Proves what files share by what arrived of them. A block that is not as it should be is copied: who reads it from
    /// the pack finds out whether the damage is there.
    fn prove(&mut self, job: Job, buffer: Buffer) -> Result<()> {
        let started = Instant::now();
        let proven = |piece: &Piece| source::verify_piece(piece, &buffer, self.shared.backup).is_ok();
        let (there, differing): (Vec<_>, Vec<_>) = job.pieces.into_iter().partition(proven);
        self.shared.waited(Stage::Decode, started.elapsed());
        self.free.push(buffer);
        if !differing.is_empty() {
            let differing = differing.into_iter().map(|piece| piece.block).collect();
            self.jobs.extend(self.shared.source.jobs(differing, self.shared.backup, self.shared.shape.limits())?);
        }
        self.shared.count_shared(there.iter().map(|piece| &piece.block));
        let blocks = there.iter().map(|piece| (piece.block.number(), piece.block.bytes)).collect();
        self.shared.written(&Writes { blocks, ..Writes::default() })
    }
}
