//! A store whose n-th operation fails, to fail every one of them in turn.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Entry, Existing, LocalStore, Store, Upload};
use crate::{Error, Result};

/// Passes everything to a local store, counts, and fails operation `fail_at` (from 1; 0 fails none) and all
/// that follow when `sticky`, as a disk that is gone does.
#[derive(Debug)]
pub(crate) struct FailingStore {
    inner: LocalStore,
    turn: Arc<Turn>,
}

#[derive(Debug)]
struct Turn {
    count: AtomicU64,
    fail_at: u64,
    sticky: bool,
    errno: i32,
}

impl Turn {
    fn next(&self, operation: &'static str, path: PathBuf) -> Result<()> {
        let number = self.count.fetch_add(1, Ordering::SeqCst) + 1;
        if self.fail_at != 0 && (number == self.fail_at || (self.sticky && number > self.fail_at)) {
            return Err(Error::io(operation, path, std::io::Error::from_raw_os_error(self.errno)));
        }
        Ok(())
    }
}

impl FailingStore {
    pub(crate) fn new(inner: LocalStore, fail_at: u64, sticky: bool, errno: i32) -> Self {
        Self { inner, turn: Arc::new(Turn { count: AtomicU64::new(0), fail_at, sticky, errno }) }
    }

    /// Operations so far.
    pub(crate) fn count(&self) -> u64 {
        self.turn.count.load(Ordering::SeqCst)
    }
}

impl Store for FailingStore {
    fn read_at(&self, key: &str, offset: u64, out: &mut [u8]) -> Result<()> {
        self.turn.next("read", self.describe(key))?;
        self.inner.read_at(key, offset, out)
    }

    fn size(&self, key: &str) -> Result<Option<u64>> {
        self.turn.next("look at", self.describe(key))?;
        self.inner.size(key)
    }

    fn list(&self, directory: &str) -> Result<Vec<Entry>> {
        self.turn.next("list", self.describe(directory))?;
        self.inner.list(directory)
    }

    fn get(&self, key: &str, limit: u64) -> Result<Vec<u8>> {
        self.turn.next("read", self.describe(key))?;
        self.inner.get(key, limit)
    }

    fn create(&self, key: &str, existing: Existing) -> Result<Box<dyn Upload + Send>> {
        self.turn.next("create", self.describe(key))?;
        let upload = self.inner.create(key, existing)?;
        Ok(Box::new(FailingUpload { upload, path: self.describe(key), turn: Arc::clone(&self.turn) }))
    }

    fn create_large(&self, key: &str, existing: Existing) -> Result<Box<dyn Upload>> {
        self.turn.next("create", self.describe(key))?;
        let upload = self.inner.create_large(key, existing)?;
        Ok(Box::new(FailingUpload { upload, path: self.describe(key), turn: Arc::clone(&self.turn) }))
    }

    fn settle(&self, key: &str) -> Result<()> {
        self.turn.next("sync", self.describe(key))?;
        self.inner.settle(key)
    }

    fn remove(&self, key: &str) -> Result<()> {
        self.turn.next("remove", self.describe(key))?;
        self.inner.remove(key)
    }

    fn sweep_uploads(&self, directory: &str) -> Result<u64> {
        self.turn.next("sweep", self.describe(directory))?;
        self.inner.sweep_uploads(directory)
    }

    fn open_lock(&self, key: &str) -> Result<File> {
        self.turn.next("open", self.describe(key))?;
        self.inner.open_lock(key)
    }

    fn describe(&self, key: &str) -> PathBuf {
        self.inner.describe(key)
    }

    fn local_path(&self, key: &str) -> Option<PathBuf> {
        self.inner.local_path(key)
    }
}

struct FailingUpload<U: ?Sized> {
    upload: Box<U>,
    path: PathBuf,
    turn: Arc<Turn>,
}

impl<U: Upload + ?Sized> Upload for FailingUpload<U> {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.turn.next("write", self.path.clone())?;
        self.upload.append(bytes)
    }

    fn replace_head(&mut self, bytes: &[u8]) -> Result<()> {
        self.turn.next("write", self.path.clone())?;
        self.upload.replace_head(bytes)
    }

    fn written(&self) -> u64 {
        self.upload.written()
    }

    fn commit(self: Box<Self>) -> Result<()> {
        self.turn.next("sync", self.path.clone())?;
        self.upload.commit()
    }
}
