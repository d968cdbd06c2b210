//! The threads of a fill or a comparison: its workers, those that wait for a mount or another machine for them, and the caller's own,
//! which keeps the map.

use std::time::Duration;

use crossbeam::channel::{RecvTimeoutError, Sender, bounded, unbounded};

use super::first::FirstFailure;
use super::opener::{self, Request};
use super::source::OpenSource;
use crate::Result;
use crate::io::Disk;

/// How often the map is put on disk: what a crash may cost.
const CHECKPOINT: Duration = Duration::from_secs(10);

/// What the threads work with.
pub(super) struct Crew<'a> {
    pub(super) workers: usize,
    pub(super) source: &'a OpenSource,
    pub(super) disk: &'a dyn Disk,
    pub(super) failure: &'a FirstFailure,
}

impl Crew<'_> {
    /// Runs `work` on each worker until all have ended, and `checkpoint` now and then. The first failure of any is kept.
    pub(super) fn run(
        &self,
        work: impl Fn(Sender<Request>) -> Result<()> + Sync,
        go_on: impl Fn() -> Result<()> + Sync,
        checkpoint: impl Fn() -> Result<()>,
    ) {
        let (work, go_on) = (&work, &go_on);
        std::thread::scope(|scope| {
            // Each worker holds a sender and sends nothing: the channel closes when the last one ends.
            let (alive, all_ended) = bounded::<()>(0);
            let (open, to_open) = unbounded();
            for _ in 0..self.workers {
                let (alive, open) = (alive.clone(), open.clone());
                scope.spawn(move || {
                    self.failure.watch(|| work(open));
                    drop(alive);
                });
            }
            drop((alive, open));
            if self.source.is_waited_for() {
                for _ in 0..opener::THREADS {
                    let to_open = to_open.clone();
                    scope.spawn(move || opener::serve(&to_open, self.source, self.disk, go_on));
                }
            }
            while all_ended.recv_timeout(CHECKPOINT) == Err(RecvTimeoutError::Timeout) {
                if !self.failure.is_set() {
                    self.failure.watch(&checkpoint);
                }
            }
        });
    }
}
