//! The reads of a mount: from what is decoded already, or decoded for this read.
//!
//! Three kinds of reader meet here, and each gets the shortest way:
//! - The restore's copier opens with O_DIRECT and keeps several large requests in flight. Its blocks are read past the
//!   page cache and decoded straight into the reply, raw ones read straight into it; nothing is kept, nothing is read
//!   ahead.
//! - A program that reads in order, one request after the other (`cp`, `tar`), has its next megabytes decoded by all
//!   cores while it looks at the last; replies borrow the decoded run.
//! - A program that jumps (PostgreSQL itself) reads 8 KiB here and there; the block around it is decoded once and kept
//!   for the next 8 KiB, within the budget.
//!
//! Always true: what a reply holds was verified. A block that cannot be read fails the reads that touch it and no
//! others: a read-ahead that meets it gives up in silence, and a direct read that begins before it ends before it.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, Sender, TrySendError, bounded};

use crate::budget::{BUFFER_BYTES_MAX, Budget, Buffer};
use crate::content::Content;
use crate::errno;
use crate::read_ahead::{Pattern, RUN_BYTES, Window, window_bytes_max};
use crate::runs::{Found, Origin, Run, Runs};

/// Read-ahead that waits for a worker, per worker. What finds no place is read on demand.
const QUEUE_PER_WORKER: usize = 16;
/// Damaged blocks that are remembered so as not to be logged again: the kernel asks for each page of one.
const REPORTED_MAX: usize = 1024;

/// One open file.
pub struct OpenFile {
    inode: u64,
    content: Box<dyn Content>,
    /// Opened with O_DIRECT: no page cache, and short replies are allowed.
    direct: bool,
    /// A direct reader had several requests in flight: it reads ahead by itself.
    pipelined: AtomicBool,
    in_flight: AtomicUsize,
    window: Mutex<Window>,
}

impl OpenFile {
    /// A file that was just opened.
    pub fn new(inode: u64, content: Box<dyn Content>, direct: bool) -> Arc<Self> {
        Arc::new(Self {
            inode,
            content,
            direct,
            pipelined: AtomicBool::new(false),
            in_flight: AtomicUsize::new(0),
            window: Mutex::default(),
        })
    }

    /// Decodes a run. What was read ahead for a reader past the page cache stays in no other either.
    fn read_run(&self, run: &Run, out: &mut [u8]) -> engine::Result<()> {
        match self.direct && run.is_ahead() {
            true => self.content.read_once(run.start, out),
            false => self.content.read(run.start, out),
        }
    }

    fn block_around(&self, offset: u64) -> Range<u64> {
        let block_bytes = self.content.block_bytes();
        let start = offset - offset % block_bytes;
        start..(start + block_bytes).min(self.content.bytes())
    }
}

impl fmt::Debug for OpenFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenFile").field("path", &self.content.to_string()).field("direct", &self.direct).finish()
    }
}

/// Counts a read that is under way.
struct InFlight<'a>(&'a AtomicUsize);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[derive(Debug)]
struct Job {
    file: Arc<OpenFile>,
    run: Arc<Run>,
}

/// Serves the reads of a mount.
#[derive(Debug)]
pub struct Reader {
    runs: Arc<Runs>,
    /// Handles that have a window.
    windows: AtomicUsize,
    reported: Mutex<BTreeSet<(u64, u64)>>,
    queue: Option<Sender<Job>>,
    workers: Vec<JoinHandle<()>>,
}

/// What a thread may hold for the read that it is at: a reply, a block, and what the engine needs.
pub const THREAD_BYTES_MAX: usize = engine::io::BUFFER_BYTES + BUFFER_BYTES_MAX + engine::blocks::SCRATCH_BYTES_MAX;

// As SEMANTICS.md says.
const _: () = assert!(THREAD_BYTES_MAX <= 9 << 20);

thread_local! {
    /// Where a reply is put together, in a huge page where the machine has them; made by the first reply.
    static REPLY: RefCell<Option<engine::io::Buffer>> = const { RefCell::new(None) };
    /// Where a block is decoded that the budget has no room for, at most [`BUFFER_BYTES_MAX`] in size. One of each for
    /// every thread that serves reads.
    static BLOCK: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl Reader {
    /// A reader that keeps at most the budget, with `workers` threads for read-ahead.
    pub fn new(budget: Arc<Budget>, workers: usize) -> std::io::Result<Self> {
        let runs = Arc::new(Runs::new(budget));
        let (queue, jobs) = bounded(QUEUE_PER_WORKER * workers);
        let mut reader = Self {
            runs,
            windows: AtomicUsize::new(0),
            reported: Mutex::default(),
            queue: Some(queue),
            workers: vec![],
        };
        for number in 0..workers {
            let (jobs, runs) = (jobs.clone(), reader.runs.clone());
            let thread = std::thread::Builder::new().name(format!("read-ahead-{number}"));
            reader.workers.push(thread.spawn(move || decode_ahead(&jobs, &runs))?);
        }
        Ok(reader)
    }

    /// Calls `reply` with up to `length` bytes of `file` from `offset` on, or with an errno. Fewer bytes than asked
    /// for mean the end of the file or, for a direct reader only, a block that cannot be read.
    pub fn read(&self, file: &Arc<OpenFile>, offset: u64, length: usize, reply: impl FnOnce(Result<&[u8], i32>)) {
        let left = file.content.bytes().saturating_sub(offset);
        let length = usize::try_from(left).map_or(length, |left| left.min(length));
        if length == 0 {
            return reply(Ok(&[]));
        }
        let _in_flight = self.enter(file, offset, length as u64);
        if let Some((bytes, range)) = self.in_one_run(file, offset, length) {
            return reply(Ok(&bytes[range]));
        }
        REPLY.with_borrow_mut(|memory| {
            let out = match reply_memory(memory, length) {
                Ok(out) => out,
                Err(error) => {
                    tracing::error!(file = %file.content, "cannot serve a read: {error}");
                    return reply(Err(errno::of(&error)));
                }
            };
            let (done, outcome) = self.assemble(file, offset, out);
            match outcome {
                Ok(()) => reply(Ok(&out[..done])),
                // The read that begins at the bad block will say so.
                Err(_) if file.direct && done > 0 => reply(Ok(&out[..done])),
                Err(error) => {
                    self.report(file, offset + done as u64, &error);
                    reply(Err(errno::of_read(&error)));
                }
            }
        });
    }

    /// `file` is closed: what was read ahead for it goes.
    pub fn close(&self, file: &OpenFile) {
        let mut window = file.window.lock().unwrap_or_else(PoisonError::into_inner);
        if window.is_open() {
            self.windows.fetch_sub(1, Ordering::Relaxed);
        }
        if window.close() == Pattern::Jump {
            self.runs.forget_ahead(file.inode);
        }
    }

    /// Counts the read, and asks for what this reader will want next.
    fn enter<'a>(&self, file: &'a Arc<OpenFile>, offset: u64, length: u64) -> InFlight<'a> {
        let others = file.in_flight.fetch_add(1, Ordering::Relaxed);
        let in_flight = InFlight(&file.in_flight);
        if file.direct && others > 0 {
            file.pipelined.store(true, Ordering::Relaxed);
        }
        let mut window = file.window.lock().unwrap_or_else(PoisonError::into_inner);
        let was_open = window.is_open();
        let pattern = if file.pipelined.load(Ordering::Relaxed) {
            window.close()
        } else {
            let most = window_bytes_max(self.runs.budget().limit(), self.windows.load(Ordering::Relaxed));
            window.observe(offset, length, file.content.bytes(), most)
        };
        match (was_open, window.is_open()) {
            (false, true) => self.windows.fetch_add(1, Ordering::Relaxed),
            (true, false) => self.windows.fetch_sub(1, Ordering::Relaxed),
            _ => 0,
        };
        // With the window locked: runs that another thread adds for a window that was given up meanwhile would stay.
        match pattern {
            Pattern::Unknown => {}
            Pattern::Jump => self.runs.forget_ahead(file.inode),
            Pattern::InOrder(range) => self.fetch_ahead(file, range),
        }
        drop(window);
        in_flight
    }

    fn fetch_ahead(&self, file: &Arc<OpenFile>, range: Range<u64>) {
        let Some(queue) = &self.queue else { return };
        let mut start = range.start;
        while start < range.end {
            let length = RUN_BYTES.min(range.end - start);
            if let Some(run) = self.runs.insert(file.inode, start, length, Origin::Ahead) {
                match queue.try_send(Job { file: file.clone(), run }) {
                    Ok(()) => {}
                    Err(TrySendError::Full(job) | TrySendError::Disconnected(job)) => {
                        return self.runs.remove(&job.run);
                    }
                }
            }
            start += length;
        }
    }

    /// The bytes, where one run has them all: the reply can borrow them.
    fn in_one_run(&self, file: &OpenFile, offset: u64, length: usize) -> Option<(Arc<Buffer>, Range<usize>)> {
        let run = self.runs.find(file.inode, offset)?;
        if offset + length as u64 > run.end() {
            return None;
        }
        let bytes = self.bytes_of(file, &run)?;
        self.runs.taken(&run, length as u64);
        let start = usize::try_from(offset - run.start).ok()?;
        Some((bytes, start..start + length))
    }

    /// Fills `out` from `offset` on; tells how far it came.
    fn assemble(&self, file: &OpenFile, offset: u64, out: &mut [u8]) -> (usize, engine::Result<()>) {
        let mut done = 0;
        while done < out.len() {
            match self.advance(file, offset + done as u64, &mut out[done..]) {
                Ok(bytes) => done += bytes,
                Err(error) => return (done, Err(error)),
            }
        }
        (done, Ok(()))
    }

    /// Fills the beginning of `out`: the rest of a run, the rest of a block, or as many whole blocks as there are
    /// before the next run.
    fn advance(&self, file: &OpenFile, at: u64, out: &mut [u8]) -> engine::Result<usize> {
        if let Some(run) = self.runs.find(file.inode, at)
            && let Some(bytes) = self.bytes_of(file, &run)
        {
            let copied = copy_from(&bytes, at - run.start, out);
            self.runs.taken(&run, copied as u64);
            return Ok(copied);
        }
        let block = file.block_around(at);
        let end = at + out.len() as u64;
        if at > block.start || end < block.end {
            return self.part_of_block(file, &block, at, out);
        }
        let gap_end = self.runs.next_start(file.inode, at + 1, end).max(block.end);
        let whole_end = if gap_end == file.content.bytes() { gap_end } else { file.block_around(gap_end).start };
        let whole = usize::try_from(whole_end - at).unwrap_or(out.len()).min(out.len());
        // Who goes past the page cache with whole blocks does not come back for them.
        let read = |out: &mut [u8]| match file.direct {
            true => file.content.read_once(at, out),
            false => file.content.read(at, out),
        };
        match read(&mut out[..whole]) {
            Ok(()) => Ok(whole),
            // One of several: find out which, so that the blocks before it are served and it is named.
            Err(_) if block.end < whole_end => {
                let first = usize::try_from(block.end - at).unwrap_or(whole).min(whole);
                read(&mut out[..first]).map(|()| first)
            }
            Err(error) => Err(error),
        }
    }

    /// A reader wants less than a block: it may come back for the rest.
    fn part_of_block(&self, file: &OpenFile, block: &Range<u64>, at: u64, out: &mut [u8]) -> engine::Result<usize> {
        let length = block.end - block.start;
        if let Some(run) = self.runs.insert(file.inode, block.start, length, Origin::Demand)
            && let Some(bytes) = self.bytes_of(file, &run)
        {
            return Ok(copy_from(&bytes, at - block.start, out));
        }
        BLOCK.with_borrow_mut(|scratch| {
            let decoded = sized(scratch, usize::try_from(length).unwrap_or_default());
            file.content.read(block.start, decoded)?;
            Ok(copy_from(decoded, at - block.start, out))
        })
    }

    /// The run's bytes, decoded here if nobody does it yet; nothing if they cannot be read as one.
    fn bytes_of(&self, file: &OpenFile, run: &Run) -> Option<Arc<Buffer>> {
        match run.get() {
            Found::Bytes(bytes) => return Some(bytes),
            Found::Failed => {}
            Found::Claimed(mut claim) => {
                if file.read_run(run, claim.buffer()).is_ok() {
                    return claim.finish();
                }
            }
        }
        self.runs.remove(run);
        None
    }

    /// Logs a damaged block, once: here the error ends, the reader sees no more than an errno.
    fn report(&self, file: &OpenFile, at: u64, error: &engine::Error) {
        let block = at / file.content.block_bytes();
        let mut reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        if reported.len() >= REPORTED_MAX {
            reported.clear();
        }
        if reported.insert((file.inode, block)) {
            tracing::error!(file = %file.content, block, offset = at, "cannot serve a block: {error}");
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.queue = None;
        for worker in self.workers.drain(..) {
            // Its panics were caught and logged.
            let _ = worker.join();
        }
    }
}

fn decode_ahead(jobs: &Receiver<Job>, runs: &Runs) {
    for Job { file, run } in jobs {
        // Ours alone: its handle jumped or closed, or the run made room for another.
        if Arc::strong_count(&run) == 1 {
            continue;
        }
        let Some(mut claim) = run.claim() else { continue };
        let read = catch_unwind(AssertUnwindSafe(|| file.read_run(&run, claim.buffer())));
        match read {
            Ok(Ok(())) => {
                claim.finish();
                continue;
            }
            Ok(Err(error)) => tracing::debug!(file = %file.content, "read-ahead gave up: {error}"),
            Err(_) => tracing::error!(file = %file.content, offset = run.start, "read-ahead panicked"),
        }
        drop(claim);
        runs.remove(&run);
    }
}

/// The first `length` bytes of a thread's reply. The kernel asks for [`BUFFER_BYTES_MAX`] at most.
fn reply_memory(memory: &mut Option<engine::io::Buffer>, length: usize) -> engine::Result<&mut [u8]> {
    let memory = match memory {
        Some(memory) => memory,
        empty => empty.insert(engine::io::Buffer::alone()?),
    };
    let limit = BUFFER_BYTES_MAX.min(engine::io::BUFFER_BYTES);
    let too_long = || engine::Error::Refused(format!("{length} bytes are asked for at once, {limit} are the most"));
    memory[..limit].get_mut(..length).ok_or_else(too_long)
}

fn sized(scratch: &mut Vec<u8>, bytes: usize) -> &mut [u8] {
    if scratch.len() < bytes {
        scratch.resize(bytes, 0);
    }
    &mut scratch[..bytes]
}

/// Copies what `from` has from byte `skip` on, as far as `out` goes.
fn copy_from(from: &[u8], skip: u64, out: &mut [u8]) -> usize {
    let from = usize::try_from(skip).ok().and_then(|skip| from.get(skip..)).unwrap_or_default();
    let copied = from.len().min(out.len());
    out[..copied].copy_from_slice(&from[..copied]);
    copied
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

    use super::*;
    use proptest::prelude::*;
    use std::sync::atomic::AtomicU64;

    const BLOCK: u64 = 32 << 10;

    /// A file whose byte `i` is known, with blocks that may be bad; counts what it is asked to decode.
    #[derive(Clone)]
    struct Pattern {
        bytes: u64,
        bad: Option<u64>,
        decoded: Arc<AtomicU64>,
    }

    impl Pattern {
        fn new(bytes: u64) -> Self {
            Self { bytes, bad: None, decoded: Arc::default() }
        }

        fn expected(offset: u64, length: usize) -> Vec<u8> {
            (offset..).take(length).map(|at| (at ^ (at >> 8) ^ (at >> 16)) as u8).collect()
        }
    }

    impl fmt::Display for Pattern {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("base/1/1")
        }
    }

    impl Content for Pattern {
        fn bytes(&self) -> u64 {
            self.bytes
        }

        fn block_bytes(&self) -> u64 {
            BLOCK
        }

        fn read(&self, offset: u64, out: &mut [u8]) -> engine::Result<()> {
            let end = offset + out.len() as u64;
            assert!(offset.is_multiple_of(BLOCK) && end <= self.bytes, "{offset} {end}");
            assert!(end.is_multiple_of(BLOCK) || end == self.bytes, "{offset} {end}");
            if self.bad.is_some_and(|bad| offset < (bad + 1) * BLOCK && end > bad * BLOCK) {
                return Err(engine::Error::corrupt("pack", "bad"));
            }
            self.decoded.fetch_add(out.len() as u64, Ordering::Relaxed);
            out.copy_from_slice(&Self::expected(offset, out.len()));
            Ok(())
        }
    }

    fn reader(budget_bytes: usize) -> Reader {
        Reader::new(Budget::new(budget_bytes), 2).unwrap()
    }

    fn read(reader: &Reader, file: &Arc<OpenFile>, offset: u64, length: usize) -> Result<Vec<u8>, i32> {
        let mut reply = None;
        reader.read(file, offset, length, |result| reply = Some(result.map(<[u8]>::to_vec)));
        reply.unwrap()
    }

    #[test]
    fn small_reads_of_one_block_decode_it_once() {
        let (reader, content) = (reader(1 << 20), Pattern::new(1 << 20));
        let file = OpenFile::new(1, Box::new(content.clone()), false);
        for page in [1, 3, 0, 2] {
            assert_eq!(read(&reader, &file, 5 * BLOCK + page * 8192, 8192).unwrap().len(), 8192);
        }
        assert_eq!(content.decoded.load(Ordering::Relaxed), BLOCK);
    }

    #[test]
    fn a_reader_in_order_is_read_ahead_for_and_nothing_is_decoded_twice() {
        let (reader, content) = (reader(64 << 20), Pattern::new(40 << 20));
        let file = OpenFile::new(1, Box::new(content.clone()), false);
        for offset in (0..content.bytes).step_by(128 << 10) {
            assert_eq!(read(&reader, &file, offset, 128 << 10).unwrap(), Pattern::expected(offset, 128 << 10));
        }
        assert_eq!(content.decoded.load(Ordering::Relaxed), content.bytes);
        reader.close(&file);
    }

    #[test]
    fn four_readers_in_order_share_the_budget_and_a_random_one_beside_them_is_left_alone() {
        const IN_ORDER: u64 = 4;
        const REQUEST: u64 = 128 << 10;
        let reader = reader(64 << 20);
        let content: Vec<_> = (0..=IN_ORDER).map(|_| Pattern::new(24 << 20)).collect();
        let open = |(inode, content): (usize, &Pattern)| OpenFile::new(inode as u64, Box::new(content.clone()), false);
        let files: Vec<_> = content.iter().enumerate().map(open).collect();
        let (random, in_order) = files.split_last().unwrap();
        let mut most_ahead = [0; IN_ORDER as usize];
        let mut jumps = 0;
        for offset in (0..24 << 20).step_by(REQUEST as usize) {
            for file in in_order {
                let expected = Pattern::expected(offset, REQUEST as usize);
                assert_eq!(read(&reader, file, offset, REQUEST as usize).unwrap(), expected);
                let most = &mut most_ahead[file.inode as usize];
                *most = reader.runs.ahead_of(file.inode).max(*most);
            }
            // Another block each time, and never the next one.
            let block = jumps * 331 % (24 << 20 >> 15);
            assert_eq!(read(&reader, random, block * BLOCK, 8192).unwrap(), Pattern::expected(block * BLOCK, 8192));
            jumps += 1;
            assert_eq!(reader.runs.ahead_of(random.inode), 0);
            assert!(reader.runs.budget().held() <= reader.runs.budget().limit());
        }
        assert!(most_ahead.iter().all(|runs| *runs > 1), "{most_ahead:?} runs ahead");
        assert_eq!(reader.windows.load(Ordering::Relaxed), in_order.len());
        // The random reader paid for its own blocks only, and no neighbour's work was thrown away.
        let decoded: Vec<_> = content.iter().map(|content| content.decoded.load(Ordering::Relaxed)).collect();
        assert_eq!(decoded, [[24 << 20; IN_ORDER as usize].as_slice(), &[jumps * BLOCK]].concat());
    }

    #[test]
    fn a_thousand_handles_hold_no_more_than_the_budget() {
        let reader = reader(8 << 20);
        let files: Vec<_> =
            (0..1000).map(|inode| OpenFile::new(inode, Box::new(Pattern::new(16 << 20)), false)).collect();
        for step in 0..3 {
            for file in &files {
                let offset = step * (128 << 10);
                assert_eq!(read(&reader, file, offset, 128 << 10).unwrap(), Pattern::expected(offset, 128 << 10));
                assert!(reader.runs.budget().held() <= reader.runs.budget().limit());
            }
        }
    }

    #[test]
    fn a_window_that_was_taken_back_leaves_nothing_when_its_handle_closes() {
        let reader = reader(16 << 20);
        let open = |inode| OpenFile::new(inode, Box::new(Pattern::new(64 << 20)), false);
        let files: Vec<_> = (0..20).map(open).collect();
        for file in &files {
            for offset in [0, 128 << 10, 256 << 10] {
                read(&reader, file, offset, 128 << 10).unwrap();
            }
        }
        let taken_back =
            |file: &Arc<OpenFile>| !file.window.lock().unwrap().is_open() && reader.runs.ahead_of(file.inode) > 0;
        assert!(files.iter().any(taken_back), "the budget is for fewer windows than there are handles");
        files.iter().for_each(|file| reader.close(file));
        assert_eq!(files.iter().map(|file| reader.runs.ahead_of(file.inode)).sum::<usize>(), 0);
        assert_eq!(reader.windows.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_jump_beside_a_read_in_order_leaves_nothing_that_was_read_ahead() {
        let reader = reader(64 << 20);
        let file = OpenFile::new(1, Box::new(Pattern::new(64 << 20)), false);
        let begin = std::sync::Barrier::new(2);
        let mut left = 0;
        for _ in 0..200 {
            for offset in [0, 8192] {
                read(&reader, &file, offset, 8192).unwrap();
            }
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    begin.wait();
                    read(&reader, &file, 60 << 20, 8192)
                });
                begin.wait();
                read(&reader, &file, 2 * 8192, 8192).unwrap();
            });
            // Whichever came first, the other was a jump.
            left += reader.runs.ahead_of(1);
        }
        assert_eq!(left, 0);
    }

    #[test]
    fn a_bad_block_fails_the_reads_that_touch_it_and_no_others() {
        let mut content = Pattern::new(4 << 20);
        content.bad = Some(40);
        let reader = reader(16 << 20);
        let buffered = OpenFile::new(1, Box::new(content.clone()), false);
        for block in 0..content.bytes / BLOCK {
            let result = read(&reader, &buffered, block * BLOCK, usize::try_from(BLOCK).unwrap());
            assert_eq!(result.is_err(), block == 40, "block {block}");
        }
        assert_eq!(read(&reader, &buffered, 40 * BLOCK + 8192, 8192), Err(libc::EIO));
        let direct = OpenFile::new(1, Box::new(content), true);
        assert_eq!(read(&reader, &direct, 1 << 20, 1 << 20), Ok(Pattern::expected(1 << 20, 8 * BLOCK as usize)));
        assert_eq!(read(&reader, &direct, 40 * BLOCK, 1 << 20), Err(libc::EIO));
        assert_eq!(read(&reader, &direct, 41 * BLOCK, 8192), Ok(Pattern::expected(41 * BLOCK, 8192)));
    }

    #[test]
    fn many_threads_read_what_is_there() {
        let reader = reader(4 << 20);
        let file = OpenFile::new(1, Box::new(Pattern::new((8 << 20) + 77)), false);
        std::thread::scope(|scope| {
            for thread in 0..4_u64 {
                let (reader, file) = (&reader, &file);
                scope.spawn(move || {
                    for step in 0..64_u64 {
                        let offset = (step * 131_072 + thread * 8192) % (8 << 20);
                        assert_eq!(read(reader, file, offset, 131_072).unwrap()[..77], Pattern::expected(offset, 77));
                    }
                });
            }
        });
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_reads_give_the_bytes_of_the_file(
            bytes in 0_u64..(3 << 20),
            budget in prop::sample::select(vec![0_usize, 64 << 10, 1 << 20, 16 << 20]),
            direct in any::<bool>(),
            reads in prop::collection::vec((0_u64..(3 << 20), 1_usize..(1 << 20), any::<bool>()), 1..24),
        ) {
            let reader = reader(budget);
            let file = OpenFile::new(1, Box::new(Pattern::new(bytes)), direct);
            let mut next = 0;
            for (offset, length, in_order) in reads {
                let offset = if in_order { next } else { offset };
                next = offset + length as u64;
                let expected = Pattern::expected(offset, length.min(bytes.saturating_sub(offset) as usize));
                prop_assert_eq!(read(&reader, &file, offset, length), Ok(expected));
            }
            prop_assert!(reader.runs.budget().held() <= budget);
        }
    }
}
