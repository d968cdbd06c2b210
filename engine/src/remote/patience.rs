//! How long a read waits for a service that is not there.

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Says whether to go on, for as long as a session lives and wants to.
pub trait Patience: Send + Sync + Debug {
    /// Whether whoever has waited for `waited` without a byte should wait on. Asked about every second, by every reader.
    fn goes_on(&self, waited: Duration) -> bool;

    /// Whether nobody wants the answer any more: the wait is then cancelled, not given up.
    fn is_cancelled(&self) -> bool {
        false
    }
}

/// Waits until the process ends.
#[derive(Clone, Copy, Debug)]
pub struct Forever;

impl Patience for Forever {
    fn goes_on(&self, _: Duration) -> bool {
        true
    }
}

/// Waits for so long at a time.
#[derive(Clone, Copy, Debug)]
pub struct Until(pub Duration);

impl Patience for Until {
    fn goes_on(&self, waited: Duration) -> bool {
        waited < self.0
    }
}

/// Waits for so long at a time, and ends at once where it is interrupted.
#[derive(Clone, Debug)]
pub struct Interruptible {
    /// For how long at a time.
    pub until: Duration,
    /// Set by whoever has had enough.
    pub interrupted: Arc<AtomicBool>,
}

impl Patience for Interruptible {
    fn goes_on(&self, waited: Duration) -> bool {
        waited < self.until && !self.is_cancelled()
    }

    fn is_cancelled(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }
}
