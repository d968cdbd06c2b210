//! Locks of a cluster: flock'ed files, so a lock ends with its holder, however that ends.
//!
//! | lock | exclusive | shared |
//! |---|---|---|
//! | `backup` | the one backup that runs | |
//! | `push` | the sweep of what crashed pushes left | every push |
//!
//! The text in the file names an exclusive holder for whoever is refused. It is a hint: the lock is the flock.

use std::fs::File;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::{keys, now};
use crate::store::Store;
use crate::units::ClusterName;
use crate::{Error, Result};

/// How long a push waits for a sweep, which lists a few directories.
const SHARED_WAIT_MAX: Duration = Duration::from_secs(30);
const SHARED_RETRY: Duration = Duration::from_millis(20);
/// The holder's line is shorter; a longer text is not ours.
const HOLDER_BYTES_MAX: u64 = 512;

/// Which lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockKind {
    /// One backup at a time.
    Backup,
    /// Pushes share it; a sweep has it alone.
    Push,
}

impl LockKind {
    const fn file(self) -> &'static str {
        match self {
            Self::Backup => "backup",
            Self::Push => "push",
        }
    }
}

/// A lock that is held until it is dropped or its process ends.
#[derive(Debug)]
pub struct Lock {
    file: File,
    exclusive: bool,
}

impl Lock {
    /// Takes a lock alone, or tells who holds it.
    pub fn exclusive(store: &dyn Store, cluster: &ClusterName, kind: LockKind) -> Result<Self> {
        let (file, path) = open(store, cluster, kind)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(held(cluster, kind, &file)),
            Err(cause) => return Err(Error::io("lock", &path, cause)),
        }
        let mut lock = Self { file, exclusive: true };
        // Only a hint: a full disk must not keep away the sweep that makes room on it.
        let _ = lock.name_holder();
        Ok(lock)
    }

    /// Takes a lock together with others, waiting for whoever has it alone.
    pub(crate) fn shared(store: &dyn Store, cluster: &ClusterName, kind: LockKind) -> Result<Self> {
        let (file, path) = open(store, cluster, kind)?;
        let deadline = Instant::now() + SHARED_WAIT_MAX;
        loop {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared) {
                Ok(()) => return Ok(Self { file, exclusive: false }),
                Err(Errno::WOULDBLOCK) if Instant::now() < deadline => thread::sleep(SHARED_RETRY),
                Err(Errno::WOULDBLOCK) => return Err(held(cluster, kind, &file)),
                Err(cause) => return Err(Error::io("lock", &path, cause)),
            }
        }
    }

    fn name_holder(&mut self) -> std::io::Result<()> {
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        self.file.set_len(0)?;
        self.file.write_all(format!("process {} on {host} since {}\n", std::process::id(), now()).as_bytes())
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        if self.exclusive {
            // Only a hint, and nobody is refused by it.
            let _ = self.file.set_len(0);
        }
        // Said, not left to the closing: a process that another thread is just starting still has the file, until it
        // is the other program. If it fails, the closing does it all the same.
        let _ = rustix::fs::flock(&self.file, FlockOperation::Unlock);
    }
}

fn open(store: &dyn Store, cluster: &ClusterName, kind: LockKind) -> Result<(File, PathBuf)> {
    let key = key(cluster, kind);
    Ok((store.open_lock(&key)?, store.describe(&key)))
}

fn key(cluster: &ClusterName, kind: LockKind) -> String {
    format!("{}/{}", keys::locks(cluster), kind.file())
}

fn held(cluster: &ClusterName, kind: LockKind, file: &File) -> Error {
    let mut holder = String::new();
    let named = file.take(HOLDER_BYTES_MAX).read_to_string(&mut holder).is_ok() && !holder.trim().is_empty();
    let holder = if named { holder.trim().to_owned() } else { "another process".to_owned() };
    Error::Locked { what: format!("the {} lock of cluster {cluster}", kind.file()), holder }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::store::LocalStore;

    #[test]
    fn a_second_holder_is_refused_and_told_of_the_first() {
        let directory = tempfile::tempdir().unwrap();
        let store = LocalStore::new(directory.path());
        let cluster = "main".parse().unwrap();
        let first = Lock::exclusive(&store, &cluster, LockKind::Backup).unwrap();
        let refused = Lock::exclusive(&store, &cluster, LockKind::Backup).unwrap_err();
        assert!(refused.to_string().contains(&format!("process {} on ", std::process::id())), "{refused}");
        drop(first);
        Lock::exclusive(&store, &cluster, LockKind::Backup).unwrap();
    }

    #[test]
    fn sharers_exclude_only_whoever_wants_it_alone() {
        let directory = tempfile::tempdir().unwrap();
        let store = LocalStore::new(directory.path());
        let cluster = "main".parse().unwrap();
        let one = Lock::shared(&store, &cluster, LockKind::Push).unwrap();
        let other = Lock::shared(&store, &cluster, LockKind::Push).unwrap();
        assert!(matches!(Lock::exclusive(&store, &cluster, LockKind::Push), Err(Error::Locked { .. })));
        drop((one, other));
        Lock::exclusive(&store, &cluster, LockKind::Push).unwrap();
    }

    #[test]
    fn a_lock_ends_with_its_killed_holder() {
        let directory = tempfile::tempdir().unwrap();
        let store = LocalStore::new(directory.path());
        let cluster: ClusterName = "main".parse().unwrap();
        drop(Lock::exclusive(&store, &cluster, LockKind::Backup).unwrap());
        let path = store.describe(&key(&cluster, LockKind::Backup));
        let mut holder = std::process::Command::new("flock")
            .arg("--no-fork")
            .arg(&path)
            .args(["sh", "-c", "echo held; exec sleep 60"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = [0; 5];
        holder.stdout.as_mut().unwrap().read_exact(&mut line).unwrap();
        assert!(matches!(Lock::exclusive(&store, &cluster, LockKind::Backup), Err(Error::Locked { .. })));
        holder.kill().unwrap();
        holder.wait().unwrap();
        Lock::exclusive(&store, &cluster, LockKind::Backup).unwrap();
    }
}
