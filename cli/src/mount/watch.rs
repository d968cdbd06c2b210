//! Notices that the server of a restore's mount hangs: stopped, or waiting for a disk that does not answer.
//!
//! A server that dies gives its readers an error. One that hangs gives them nothing, and a reader whose request it has
//! taken cannot even be killed. So the mount is asked something harmless all the time; when it has not answered for
//! its patience, and no data came out of it meanwhile either, its connection is aborted, which wakes every reader with
//! an error, and the server is killed.
//!
//! The asking is done by a thread that may be stuck with its question; the watching by one that never touches the mount.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use fusefs::{mounting, table};
use rustix::process::{Pid, Signal, kill_process};

/// How long a mount may neither answer nor deliver where its repository is on this machine: longer than any disk that will still answer makes its readers wait.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);
/// Between two questions.
const PAUSE: Duration = Duration::from_secs(1);

/// The watch over one mount. Dropped, it ends.
#[derive(Debug)]
pub(super) struct Watch {
    shared: Arc<Shared>,
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Bytes that came out of the mount.
    delivered: AtomicU64,
    hung: AtomicBool,
}

impl Watch {
    /// Watches over the mount at `mountpoint` that `server`, a child of this process, serves.
    pub(super) fn begin(mountpoint: &Path, server: Option<Pid>, patience: Duration) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let (stop, stopped) = channel();
        let mountpoint = mountpoint.to_owned();
        let watcher = Watcher { mountpoint, server, patience, shared: Arc::clone(&shared), stopped };
        let thread = std::thread::Builder::new().name("watch-mount".to_owned()).spawn(move || watcher.run())?;
        Ok(Self { shared, stop: Some(stop), thread: Some(thread) })
    }

    /// Data came out of the mount.
    pub(super) fn delivered(&self, bytes: u64) {
        self.shared.delivered.fetch_add(bytes, Ordering::Relaxed);
    }

    /// The mount was given up.
    pub(super) fn gave_up(&self) -> bool {
        self.shared.hung.load(Ordering::Acquire)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // It never touches the mount, so it ends within a moment; its panic would be on stderr already.
            let _ = thread.join();
        }
    }
}

struct Watcher {
    mountpoint: PathBuf,
    server: Option<Pid>,
    patience: Duration,
    shared: Arc<Shared>,
    stopped: Receiver<()>,
}

impl Watcher {
    fn run(self) {
        while self.pause() {
            let answer = table::ask(&self.mountpoint);
            let mut silence = Silence::new(self.shared.delivered.load(Ordering::Relaxed), Instant::now());
            // Whatever it answers, it answers: that its server is gone its readers learn by themselves.
            while answer.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
                if !self.pause() {
                    return;
                }
                if silence.lasts(self.shared.delivered.load(Ordering::Relaxed), Instant::now()) > self.patience {
                    return self.give_up();
                }
            }
        }
    }

    /// False once the watch is over.
    fn pause(&self) -> bool {
        self.stopped.recv_timeout(PAUSE) == Err(RecvTimeoutError::Timeout)
    }

    fn give_up(&self) {
        self.shared.hung.store(true, Ordering::Release);
        tracing::warn!("the mount at {} neither answers nor delivers: taken away", self.mountpoint.display());
        // The owner of a mount may abort it, where the kernel shows the connections; killing the server does the same,
        // unless the server waits for a disk and cannot be killed either.
        if let Ok(Some(mount)) = table::mount_at(&self.mountpoint)
            && mount.is_ours()
            && let Err(error) = mounting::abort(&mount)
        {
            tracing::info!("{error}");
        }
        if let Some(server) = self.server {
            // Our child, not waited for while it is watched: its number stands for nobody else.
            let _ = kill_process(server, Signal::KILL);
        }
    }
}

/// How long nothing has been heard of a mount.
struct Silence {
    delivered: u64,
    since: Instant,
}

impl Silence {
    fn new(delivered: u64, now: Instant) -> Self {
        Self { delivered, since: now }
    }

    /// The time since the last byte, or since the question.
    fn lasts(&mut self, delivered: u64, now: Instant) -> Duration {
        if delivered != self.delivered {
            *self = Self::new(delivered, now);
        }
        now.saturating_duration_since(self.since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_ends_a_silence() {
        let start = Instant::now();
        let mut silence = Silence::new(5, start);
        assert_eq!(silence.lasts(5, start + PATIENCE), PATIENCE);
        assert_eq!(silence.lasts(6, start + PATIENCE), Duration::ZERO);
        assert_eq!(silence.lasts(6, start + 2 * PATIENCE), PATIENCE);
    }
}
