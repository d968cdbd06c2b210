//! The first failure stops all workers and keeps its cause.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::{Error, Result};

/// Shared by workers: set once, seen by all.
#[derive(Default)]
pub(super) struct FirstFailure {
    set: AtomicBool,
    cause: Mutex<Option<Error>>,
}

impl FirstFailure {
    pub(super) fn new() -> Self {
        Self::default()
    }

    /// True once a worker failed: the others stop at their next step.
    pub(super) fn is_set(&self) -> bool {
        self.set.load(Ordering::Acquire)
    }

    /// Runs a worker's work and keeps its failure, if it is the first. A worker that stopped because another failed
    /// says [`Error::Cancelled`], which never hides a cause.
    pub(super) fn watch(&self, work: impl FnOnce() -> Result<()>) {
        if let Err(failure) = work() {
            self.keep(failure);
        }
    }

    /// Keeps a failure, if it is the first with a cause.
    pub(super) fn keep(&self, failure: Error) {
        let mut cause = self.cause.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if matches!(&*cause, None | Some(Error::Cancelled)) {
            *cause = Some(failure);
        }
        self.set.store(true, Ordering::Release);
    }

    /// The failure, once all workers have ended.
    pub(super) fn take(&self) -> Result<()> {
        let cause = self.cause.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
        cause.map_or(Ok(()), Err)
    }
}
