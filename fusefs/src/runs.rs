//! Decoded runs of blocks, kept while somebody will read them.
//!
//! A [`Run`] is one buffer with consecutive decoded blocks of one file: a single block that a random reader came for,
//! or up to 1 MiB that was read ahead. It is decoded once, whoever asks: the first to claim it decodes, the others wait
//! for that one. A run that waits for a worker of the read-ahead can be claimed by the reader who needs it, so nobody
//! waits behind other handles' read-ahead.
//!
//! When the budget is spent, the run that was read longest ago makes room. A run of the read-ahead goes as soon as all
//! of it was read, or its handle jumps or closes; read-ahead never pushes out what was read ahead for somebody else.
//! A run that fails to decode is dropped and leaves no trace: whoever needs its blocks reads them one by one and meets
//! the error at the block that has it.
//!
//! Always true: two runs of one file never overlap; a `Ready` run holds verified bytes.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::budget::{Budget, Buffer};

/// Who wanted a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A reader that needs it now and may come back.
    Demand,
    /// The read-ahead.
    Ahead,
}

/// Consecutive blocks of one file, decoded or about to be.
#[derive(Debug)]
pub struct Run {
    /// The file's inode.
    pub file: u64,
    /// First byte in the file.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    origin: Origin,
    /// Bytes that readers took, to know when a run of the read-ahead is used up.
    taken: AtomicU64,
    used_at: AtomicU64,
    state: Mutex<State>,
    settled: Condvar,
}

#[derive(Debug)]
enum State {
    /// Wanted; nobody decodes it yet.
    Queued(Buffer),
    /// Claimed: one thread decodes it.
    Decoding,
    /// Decoded and verified.
    Ready(Arc<Buffer>),
    /// Given up.
    Failed,
}

/// The right, and the duty, to decode a run. Dropped without [`Claim::finish`], by an error or a panic, the run fails
/// and its waiters go on.
#[derive(Debug)]
pub struct Claim<'a> {
    run: &'a Run,
    buffer: Option<Buffer>,
}

impl Claim<'_> {
    /// The memory to decode into.
    pub fn buffer(&mut self) -> &mut [u8] {
        self.buffer.as_deref_mut().unwrap_or_default()
    }

    /// The buffer is filled with verified bytes.
    pub fn finish(mut self) -> Option<Arc<Buffer>> {
        let buffer = Arc::new(self.buffer.take()?);
        self.run.settle(State::Ready(buffer.clone()));
        Some(buffer)
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        if self.buffer.take().is_some() {
            self.run.settle(State::Failed);
        }
    }
}

/// What a reader finds in a run.
#[derive(Debug)]
pub enum Found<'a> {
    /// Its bytes.
    Bytes(Arc<Buffer>),
    /// The duty to decode it.
    Claimed(Claim<'a>),
    /// It failed.
    Failed,
}

impl Run {
    /// One past its last byte.
    pub fn end(&self) -> u64 {
        self.start + self.length
    }

    /// The read-ahead wanted it: it is given up once it was read.
    pub fn is_ahead(&self) -> bool {
        self.origin == Origin::Ahead
    }

    /// The run's bytes, waiting for the thread that decodes them; or the claim to decode them here.
    pub fn get(&self) -> Found<'_> {
        let mut state = self.lock();
        loop {
            match &*state {
                State::Ready(buffer) => return Found::Bytes(buffer.clone()),
                State::Failed => return Found::Failed,
                State::Queued(_) => break,
                State::Decoding => state = self.settled.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
        match self.take_queued(state) {
            Some(claim) => Found::Claimed(claim),
            None => Found::Failed,
        }
    }

    /// The claim to decode it, if nobody has it yet.
    pub fn claim(&self) -> Option<Claim<'_>> {
        self.take_queued(self.lock())
    }

    fn take_queued(&self, mut state: MutexGuard<'_, State>) -> Option<Claim<'_>> {
        match std::mem::replace(&mut *state, State::Decoding) {
            State::Queued(buffer) => Some(Claim { run: self, buffer: Some(buffer) }),
            other => {
                *state = other;
                None
            }
        }
    }

    fn settle(&self, state: State) {
        *self.lock() = state;
        self.settled.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is replaced as a whole, so a panic elsewhere cannot leave half of one.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All runs of a mount, under one budget.
#[derive(Debug)]
pub struct Runs {
    budget: Arc<Budget>,
    clock: AtomicU64,
    by_place: Mutex<BTreeMap<(u64, u64), Arc<Run>>>,
}

impl Runs {
    /// No runs yet, and `budget` for those to come.
    pub fn new(budget: Arc<Budget>) -> Self {
        Self { budget, clock: AtomicU64::new(0), by_place: Mutex::default() }
    }

    /// The budget of these runs.
    pub fn budget(&self) -> &Arc<Budget> {
        &self.budget
    }

    /// The run that holds byte `offset` of `file`.
    pub fn find(&self, file: u64, offset: u64) -> Option<Arc<Run>> {
        let runs = self.lock();
        let run = run_at(&runs, file, offset)?;
        run.used_at.store(self.clock.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
        Some(run.clone())
    }

    /// The first byte from `offset` on, before `end`, that lies in a run; `end` if none does.
    pub fn next_start(&self, file: u64, offset: u64, end: u64) -> u64 {
        let runs = self.lock();
        runs.range((file, offset)..(file, end)).next().map_or(end, |((_, start), _)| *start)
    }

    /// A new run, queued; nothing where one overlaps it or the budget has no room. Only a reader pushes out what
    /// others still want.
    pub fn insert(&self, file: u64, start: u64, length: u64, origin: Origin) -> Option<Arc<Run>> {
        let buffer = self.room_for(usize::try_from(length).ok()?, origin)?;
        let mut runs = self.lock();
        let end = start.checked_add(length)?;
        if run_at(&runs, file, start).is_some() || runs.range((file, start)..(file, end)).next().is_some() {
            return None;
        }
        let run = Arc::new(Run {
            file,
            start,
            length,
            origin,
            taken: AtomicU64::new(0),
            used_at: AtomicU64::new(self.clock.fetch_add(1, Ordering::Relaxed)),
            state: Mutex::new(State::Queued(buffer)),
            settled: Condvar::new(),
        });
        runs.insert((file, start), run.clone());
        Some(run)
    }

    /// A reader took `bytes` of `run`. Once all of a run of the read-ahead was taken, it is given up.
    pub fn taken(&self, run: &Run, bytes: u64) {
        let taken = run.taken.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if run.origin == Origin::Ahead && taken >= run.length {
            self.remove(run);
        }
    }

    /// Drops `run`; whoever holds its bytes keeps them.
    pub fn remove(&self, run: &Run) {
        let mut runs = self.lock();
        if runs.get(&(run.file, run.start)).is_some_and(|found| std::ptr::eq(&**found, run)) {
            runs.remove(&(run.file, run.start));
        }
    }

    /// Drops what was read ahead of `file`: its handle jumped or was closed.
    pub fn forget_ahead(&self, file: u64) {
        self.lock().retain(|(owner, _), run| *owner != file || run.origin == Origin::Demand);
    }

    /// How many runs were read ahead of `file` and not taken.
    #[cfg(test)]
    pub(crate) fn ahead_of(&self, file: u64) -> usize {
        self.lock().values().filter(|run| run.file == file && run.origin == Origin::Ahead).count()
    }

    fn room_for(&self, bytes: usize, origin: Origin) -> Option<Buffer> {
        loop {
            if let Some(buffer) = self.budget.buffer(bytes) {
                return Some(buffer);
            }
            let mut runs = self.lock();
            let may_go = |run: &&Arc<Run>| origin == Origin::Demand || run.origin == Origin::Demand;
            let oldest = runs.values().filter(may_go).min_by_key(|run| run.used_at.load(Ordering::Relaxed))?;
            let place = (oldest.file, oldest.start);
            runs.remove(&place);
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<(u64, u64), Arc<Run>>> {
        self.by_place.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn run_at(runs: &BTreeMap<(u64, u64), Arc<Run>>, file: u64, offset: u64) -> Option<&Arc<Run>> {
    let (_, run) = runs.range((file, 0)..=(file, offset)).next_back()?;
    (offset < run.end()).then_some(run)
}
