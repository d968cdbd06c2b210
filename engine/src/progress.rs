//! What a long operation tells while it runs. The library prints nothing: it knows this trait.

use std::sync::atomic::{AtomicU64, Ordering};

/// Where an operation's time goes: each stage's wait for the next names the bottleneck.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Reading packs, or the mount (in a backup: writing packs).
    Repository,
    /// Decompressing and hashing (or, in a backup, hashing and compressing).
    Decode,
    /// Writing the target (in a backup: reading the data directory).
    Disk,
    /// Making it durable.
    Sync,
}

impl Stage {
    /// All stages, in the way of the data.
    pub const ALL: [Self; 4] = [Self::Repository, Self::Decode, Self::Disk, Self::Sync];

    /// The name that users see.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Repository => "repository",
            Self::Decode => "decode",
            Self::Disk => "disk",
            Self::Sync => "sync",
        }
    }
}

/// Told by workers, from any thread; must be cheap.
pub trait Progress: Sync {
    /// `bytes` more are done (logical bytes, zeros included).
    fn advance(&self, bytes: u64);
    /// A worker spent `nanoseconds` waiting in `stage`.
    fn waited(&self, stage: Stage, nanoseconds: u64);
    /// True once the operation should stop at the next block.
    fn cancelled(&self) -> bool {
        false
    }
}

/// Counts, and shows nothing: for tests and for whoever reads the figures at the end.
#[derive(Debug, Default)]
pub struct Counting {
    bytes: AtomicU64,
    waits: [AtomicU64; Stage::ALL.len()],
}

impl Counting {
    /// Bytes done so far.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Nanoseconds that workers waited in `stage`, summed over workers.
    pub fn waited_nanoseconds(&self, stage: Stage) -> u64 {
        self.waits[stage as usize].load(Ordering::Relaxed)
    }

    /// The stage that was waited for longest, once anything was.
    pub fn bottleneck(&self) -> Option<Stage> {
        let longest = Stage::ALL.into_iter().max_by_key(|stage| self.waited_nanoseconds(*stage))?;
        (self.waited_nanoseconds(longest) > 0).then_some(longest)
    }
}

impl Progress for Counting {
    fn advance(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn waited(&self, stage: Stage, nanoseconds: u64) {
        self.waits[stage as usize].fetch_add(nanoseconds, Ordering::Relaxed);
    }
}
