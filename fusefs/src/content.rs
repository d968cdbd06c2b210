//! Where the bytes of a mount's files come from: the backup's blocks, the archive, or memory.

use std::cell::RefCell;
use std::fmt;
use std::sync::Arc;

use engine::blocks::{Blocks, Scratch};
use engine::format::file::FileRecord;
use engine::wal::WalObject;
use engine::{Error, Result};

use crate::budget::BUFFER_BYTES_MAX;

/// The bytes of one file.
pub trait Content: Send + Sync + fmt::Display {
    /// How many there are. They never change.
    fn bytes(&self) -> u64;

    /// The size of its blocks: what is decoded together. At most [`BUFFER_BYTES_MAX`].
    fn block_bytes(&self) -> u64;

    /// Fills `out`, which lies within the file, from `offset` on with verified bytes.
    fn read(&self, offset: u64, out: &mut [u8]) -> Result<()>;

    /// As [`Content::read`], for a reader that will not come back: nothing of it is left in a page cache.
    fn read_once(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.read(offset, out)
    }
}

/// A regular file of the backup.
pub(crate) struct BackupFile {
    pub(crate) file: FileRecord,
    pub(crate) blocks: Blocks,
    pub(crate) block_bytes: u64,
}

thread_local! {
    /// What the engine needs between two reads of a thread.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Content for BackupFile {
    fn bytes(&self) -> u64 {
        self.file.bytes
    }

    fn block_bytes(&self) -> u64 {
        self.block_bytes
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let read = SCRATCH.with_borrow_mut(|scratch| self.blocks.read_range(&self.file, offset, out, scratch))?;
        refuse_short(self, offset, read, out.len())
    }

    fn read_once(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let read = SCRATCH.with_borrow_mut(|scratch| self.blocks.read_range_once(&self.file, offset, out, scratch))?;
        refuse_short(self, offset, read, out.len())
    }
}

impl fmt::Display for BackupFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file.path)
    }
}

/// A file of the WAL archive.
pub(crate) struct ArchivedFile {
    pub(crate) name: String,
    pub(crate) object: WalObject,
    pub(crate) block_bytes: u64,
}

impl Content for ArchivedFile {
    fn bytes(&self) -> u64 {
        self.object.bytes()
    }

    fn block_bytes(&self) -> u64 {
        self.block_bytes
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let read = SCRATCH.with_borrow_mut(|scratch| self.object.read_at(offset, out, scratch))?;
        refuse_short(self, offset, read, out.len())
    }
}

impl fmt::Display for ArchivedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "wal/{}", self.name)
    }
}

/// A file that lies in memory.
pub(crate) struct Text(pub(crate) Arc<[u8]>);

impl Content for Text {
    fn bytes(&self) -> u64 {
        self.0.len() as u64
    }

    fn block_bytes(&self) -> u64 {
        BUFFER_BYTES_MAX as u64
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let from = usize::try_from(offset).ok().and_then(|offset| self.0.get(offset..)).unwrap_or_default();
        let length = from.len().min(out.len());
        out[..length].copy_from_slice(&from[..length]);
        refuse_short(self, offset, length, out.len())
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("backup.json")
    }
}

fn refuse_short(content: &dyn Content, offset: u64, read: usize, wanted: usize) -> Result<()> {
    if read == wanted {
        return Ok(());
    }
    let end = offset + read as u64;
    Err(Error::corrupt_at(content.to_string(), end, format!("it ends there, {} bytes early", wanted - read)))
}
