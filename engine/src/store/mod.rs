//! Where the repository's bytes live.
//!
//! One trait, one conformance suite that every implementation passes. Keys are relative paths with `/`
//! between components. What is written under a key appears as a whole and durable, or not at all: an
//! [`Upload`] is invisible until it is committed.
//!
//! Always true: a key that can be read has all of its bytes behind it, after any crash; and a key written with
//! [`Existing::Refuse`] never changes.

use std::fmt::Debug;
use std::fs::File;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use crate::Result;

#[cfg(test)]
pub(crate) mod conformance;
#[cfg(test)]
pub(crate) mod failing;
mod large;
mod local;

pub use local::LocalStore;

/// What happens when the key is there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// The write fails with `EEXIST` and the old bytes stay. The way of everything but the two below.
    Refuse,
    /// The new bytes take the place of the old at once: for small descriptions that may change.
    Replace,
}

/// A key and its size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The whole key.
    pub key: String,
    /// Its bytes; 0 for a directory.
    pub bytes: u64,
    /// When it was written, seconds since 1970 by the store's clock: for people.
    pub modified: i64,
    /// True where the key is a prefix of others.
    pub is_directory: bool,
}

impl Entry {
    /// The last component of the key.
    pub fn name(&self) -> &str {
        self.key.rsplit('/').next().unwrap_or(&self.key)
    }
}

/// A place for the repository's bytes.
pub trait Store: Send + Sync + Debug {
    /// Fills `out` from byte `offset` of `key`. A key that ends before that is [`Error::Corrupt`](crate::Error):
    /// nobody asks for bytes that were not written. A key that is not there is `ENOENT`. The bytes may come from
    /// an open file that is kept: only for keys that never change.
    fn read_at(&self, key: &str, offset: u64, out: &mut [u8]) -> Result<()>;

    /// The same for several buffers, each from its own byte: one call, where calls take long.
    fn read_ranges(&self, key: &str, wanted: &mut [(u64, &mut [u8])]) -> Result<()> {
        wanted.iter_mut().try_for_each(|(offset, out)| self.read_at(key, *offset, out))
    }

    /// The size of `key`, or none if there is no such key.
    fn size(&self, key: &str) -> Result<Option<u64>>;

    /// What lies directly under `directory`, by name. A directory that is not there is `ENOENT`: whoever wants to
    /// take that for empty says so.
    fn list(&self, directory: &str) -> Result<Vec<Entry>>;

    /// All bytes of a small key; more than `limit` is [`Error::Corrupt`](crate::Error).
    fn get(&self, key: &str, limit: u64) -> Result<Vec<u8>>;

    /// Writes a small key at once, durably.
    fn put(&self, key: &str, bytes: &[u8], existing: Existing) -> Result<()> {
        let mut upload = self.create(key, existing)?;
        upload.append(bytes)?;
        upload.commit()
    }

    /// Begins a key of any size.
    fn create(&self, key: &str, existing: Existing) -> Result<Box<dyn Upload + Send>>;

    /// The same for very many bytes, from the thread that begins it.
    fn create_large(&self, key: &str, existing: Existing) -> Result<Box<dyn Upload>> {
        Ok(self.create(key, existing)?)
    }

    /// Makes durable that `key` exists, for whoever found it there but did not write it.
    fn settle(&self, key: &str) -> Result<()>;

    /// Removes `key` durably; one that is not there is no error.
    fn remove(&self, key: &str) -> Result<()>;

    /// Removes what crashed uploads left under `directory` and tells how many bytes that were. Only for the
    /// holder of a lock that excludes every upload there.
    fn sweep_uploads(&self, directory: &str) -> Result<u64>;

    /// Opens the file of `key`, making it if it is new, for a lock that ends with its holder.
    fn open_lock(&self, key: &str) -> Result<File>;

    /// How people find `key`: for error messages.
    fn describe(&self, key: &str) -> PathBuf;

    /// The file of `key` where the store is a directory of this machine, for readers with their own I/O.
    fn local_path(&self, key: &str) -> Option<PathBuf>;

    /// Lets it hold so many bytes that were asked for before they are read. How many of them it has a use for: none, where
    /// reading takes no longer than asking.
    fn allow_ahead(&self, _bytes: usize) -> usize {
        0
    }

    /// How many bytes are worth being asked for now, before they are read.
    fn ahead_room(&self) -> u64 {
        0
    }

    /// Asks for bytes of `key` that somebody will read soon; false if there is no room for them. What becomes of it shows
    /// only in how long the read takes.
    fn fetch_ahead(&self, _key: &str, _range: Range<u64>) -> bool {
        false
    }
}

/// A key on its way. Dropped without a commit, it leaves nothing that a reader can see.
pub trait Upload {
    /// Adds `bytes` at the end. After an error only dropping it is of use.
    fn append(&mut self, bytes: &[u8]) -> Result<()>;

    /// Writes `bytes` over the first ones that were appended: a header that tells of what lies behind it.
    fn replace_head(&mut self, bytes: &[u8]) -> Result<()>;

    /// Bytes appended so far.
    fn written(&self) -> u64;

    /// How long whoever appends was kept waiting for the store.
    fn waited(&self) -> Duration {
        Duration::ZERO
    }

    /// Makes the bytes durable, then the name.
    fn commit(self: Box<Self>) -> Result<()>;
}
