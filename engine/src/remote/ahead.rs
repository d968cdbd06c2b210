//! Bytes that were asked for before anybody reads them.
//!
//! Whoever knows what is read next says so ([`Ahead::fetch`]); threads of ours ask for it, each for one span at a time,
//! spread over the connections as all requests are. A read takes what is here, waits for what is on its way, and asks by
//! itself for the rest. How much that may be, [`Pace`](super::pace::Pace) says, and the memory that we were given.
//!
//! A span that could not be had leaves no trace: who needs it asks for it, and gets the error that belongs to it.
//!
//! Always true: the memory of all spans never exceeds what was given. Bytes are taken once.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::client::Client;
use crate::Error;

/// Requests on their way at once, a thread each: at 1 MiB, 1.6 GB/s over 20 ms.
const THREADS_MAX: usize = 32;
/// A span that is here and that nobody has come for in so long is given up: its reader went elsewhere.
const STALE: Duration = Duration::from_secs(5);
/// How often whoever waits for a span looks whether there still is one.
const TICK: Duration = Duration::from_millis(500);
/// Memory is made in multiples of this, so that it fits the next span too.
const UNIT_BYTES: usize = 64 << 10;

/// See the module.
#[derive(Debug)]
pub(super) struct Ahead {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    client: Arc<Client>,
    budget_bytes: AtomicUsize,
    table: Mutex<Table>,
    /// A span has arrived, or is given up.
    arrived: Condvar,
    /// There is something to fetch, or nothing any more.
    work: Condvar,
}

#[derive(Debug, Default)]
struct Table {
    spans: HashMap<String, BTreeMap<u64, Span>>,
    queue: VecDeque<(String, u64)>,
    /// Memory of all spans.
    held: usize,
    /// Memory for those to come.
    free: Vec<Vec<u8>>,
    threads: usize,
    idle: usize,
    ended: bool,
}

#[derive(Debug)]
struct Span {
    bytes: usize,
    taken: usize,
    state: State,
    touched: Instant,
}

#[derive(Debug)]
enum State {
    Asked(Vec<u8>),
    Fetching(usize),
    Here(Arc<Vec<u8>>),
}

/// What there is of what a read wants.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// So many bytes, which are in place.
    Here(usize),
    /// Nothing of the next so many.
    Nothing(usize),
}

impl Ahead {
    pub(super) fn new(client: Arc<Client>, budget_bytes: usize) -> Self {
        let shared = Shared {
            client,
            budget_bytes: AtomicUsize::new(budget_bytes),
            table: Mutex::default(),
            arrived: Condvar::new(),
            work: Condvar::new(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// From now on it may hold so much; what is here stays until it was read.
    pub(super) fn allow(&self, budget_bytes: usize) {
        self.shared.budget_bytes.store(budget_bytes, Ordering::Relaxed);
    }

    /// How much more is worth being asked for now.
    pub(super) fn room(&self) -> u64 {
        let budget = self.shared.budget_bytes.load(Ordering::Relaxed) as u64;
        let window = self.shared.client.window_bytes().min(budget);
        if window == 0 {
            return 0;
        }
        let mut table = self.shared.table();
        if table.held as u64 >= window {
            table.drop_stale(Instant::now());
        }
        window.saturating_sub(table.held as u64)
    }

    /// Has `range` of `key` fetched; false if there is no room for it.
    pub(super) fn fetch(&self, key: &str, range: Range<u64>) -> bool {
        let Some(bytes) = range.end.checked_sub(range.start).and_then(|bytes| usize::try_from(bytes).ok()) else {
            return false;
        };
        let budget = self.shared.budget_bytes.load(Ordering::Relaxed);
        let mut table = self.shared.table();
        if bytes == 0 || table.overlaps(key, &range) {
            return true;
        }
        let Some(memory) = table.memory(bytes, budget) else { return false };
        let span = Span { bytes, taken: 0, state: State::Asked(memory), touched: Instant::now() };
        table.spans.entry(key.to_owned()).or_default().insert(range.start, span);
        table.queue.push_back((key.to_owned(), range.start));
        if table.idle == 0 && table.threads < THREADS_MAX {
            let shared = Arc::clone(&self.shared);
            let thread = std::thread::Builder::new().name("fetch-ahead".to_owned());
            match thread.spawn(move || shared.fetch_all()) {
                Ok(_) => table.threads += 1,
                Err(_) if table.threads > 0 => {}
                // Nobody would fetch it.
                Err(_) => {
                    table.queue.pop_back();
                    table.remove(key, range.start);
                    return false;
                }
            }
        }
        drop(table);
        self.shared.work.notify_one();
        true
    }

    /// Takes what is here, or will be, of the beginning of `out`, which are the bytes of `key` from `offset` on.
    pub(super) fn take(&self, key: &str, offset: u64, out: &mut [u8]) -> Taken {
        let mut table = self.shared.table();
        loop {
            let (start, bytes) = match table.around(key, offset) {
                Ok(found) => found,
                // As much as there is before the next span.
                Err(next) => {
                    let gap = next.map_or(out.len(), |next| usize::try_from(next - offset).unwrap_or(usize::MAX));
                    return Taken::Nothing(gap.min(out.len()));
                }
            };
            let Some(span) = table.spans.get_mut(key).and_then(|spans| spans.get_mut(&start)) else { continue };
            span.touched = Instant::now();
            let State::Here(memory) = &span.state else {
                let waited = self.shared.arrived.wait_timeout(table, TICK);
                table = waited.unwrap_or_else(PoisonError::into_inner).0;
                continue;
            };
            let memory = Arc::clone(memory);
            drop(table);
            let skip = (offset - start) as usize;
            let part = out.len().min(bytes - skip);
            out[..part].copy_from_slice(&memory[skip..skip + part]);
            drop(memory);
            self.shared.table().taken(key, start, part);
            return Taken::Here(part);
        }
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        // Threads that wait for an answer end when they have it, or when the session gives up.
        let mut table = self.shared.table();
        table.ended = true;
        table.queue.clear();
        drop(table);
        self.shared.work.notify_all();
    }
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        // A panic elsewhere loses a span at worst, whose memory then stays counted.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One thread's work, to the end.
    fn fetch_all(&self) {
        let mut table = self.table();
        while !table.ended {
            let Some((key, start)) = table.queue.pop_front() else {
                table.idle += 1;
                table = self.work.wait(table).unwrap_or_else(PoisonError::into_inner);
                table.idle -= 1;
                continue;
            };
            let Some((mut memory, bytes)) = table.begin(&key, start) else { continue };
            drop(table);
            let wanted = AssertUnwindSafe(|| self.client.read_ranges(&key, &mut [(start, &mut memory[..bytes])]));
            // A panic is on stderr already, and nobody must wait for what it leaves.
            let read = catch_unwind(wanted).unwrap_or(Err(Error::Cancelled));
            table = self.table();
            match (read, table.spans.get_mut(&key).and_then(|spans| spans.get_mut(&start))) {
                (Ok(()), Some(span)) => {
                    (span.state, span.touched) = (State::Here(Arc::new(memory)), Instant::now());
                }
                (failed, _) => {
                    if let Err(error) = failed {
                        tracing::debug!("read-ahead gave up: {error}");
                    }
                    table.remove(&key, start);
                }
            }
            self.arrived.notify_all();
        }
    }
}

impl Table {
    /// The span that has byte `offset`, or where the next one begins.
    fn around(&self, key: &str, offset: u64) -> Result<(u64, usize), Option<u64>> {
        let Some(spans) = self.spans.get(key) else { return Err(None) };
        match spans.range(..=offset).next_back() {
            Some((start, span)) if offset < start + span.bytes as u64 => Ok((*start, span.bytes)),
            _ => Err(spans.range(offset..).next().map(|(start, _)| *start)),
        }
    }

    fn overlaps(&self, key: &str, range: &Range<u64>) -> bool {
        match self.around(key, range.start) {
            Ok(_) => true,
            Err(next) => next.is_some_and(|next| next < range.end),
        }
    }

    /// Memory for so many bytes, if there is room.
    fn memory(&mut self, bytes: usize, budget: usize) -> Option<Vec<u8>> {
        if let Some(place) =
            self.free.iter().position(|memory| memory.len() >= bytes && memory.len() <= 2 * bytes.max(UNIT_BYTES))
            && self.held + self.free[place].len() <= budget
        {
            let memory = self.free.swap_remove(place);
            self.held += memory.len();
            return Some(memory);
        }
        let length = bytes.next_multiple_of(UNIT_BYTES);
        if self.held + length > budget {
            return None;
        }
        // What is kept for others makes room.
        while self.held + self.free.iter().map(Vec::len).sum::<usize>() + length > budget && self.free.pop().is_some() {
        }
        self.held += length;
        Some(vec![0; length])
    }

    /// The memory of a span that is wanted still, for the thread that fetches it.
    fn begin(&mut self, key: &str, start: u64) -> Option<(Vec<u8>, usize)> {
        let span = self.spans.get_mut(key)?.get_mut(&start)?;
        let State::Asked(memory) = &mut span.state else { return None };
        let memory = std::mem::take(memory);
        span.state = State::Fetching(memory.len());
        Some((memory, span.bytes))
    }

    fn taken(&mut self, key: &str, start: u64, bytes: usize) {
        let Some(span) = self.spans.get_mut(key).and_then(|spans| spans.get_mut(&start)) else { return };
        span.taken += bytes;
        if span.taken >= span.bytes {
            self.remove(key, start);
        }
    }

    fn remove(&mut self, key: &str, start: u64) {
        let Some(spans) = self.spans.get_mut(key) else { return };
        let removed = spans.remove(&start);
        if spans.is_empty() {
            self.spans.remove(key);
        }
        match removed.map(|span| span.state) {
            Some(State::Fetching(length)) => self.held -= length,
            Some(State::Asked(memory)) => self.give_back(memory.len(), Some(memory)),
            Some(State::Here(memory)) => self.give_back(memory.len(), Arc::into_inner(memory)),
            None => {}
        }
    }

    fn give_back(&mut self, length: usize, memory: Option<Vec<u8>>) {
        self.held -= length;
        self.free.extend(memory);
    }

    fn drop_stale(&mut self, now: Instant) {
        let is_stale =
            |span: &Span| matches!(span.state, State::Here(_)) && now.saturating_duration_since(span.touched) > STALE;
        let stale = self.spans.iter().flat_map(|(key, spans)| {
            spans.iter().filter(|(_, span)| is_stale(span)).map(|(start, _)| (key.clone(), *start))
        });
        for (key, start) in stale.collect::<Vec<_>>() {
            self.remove(&key, start);
        }
    }
}
