//! The waist: everything that hydration does to a disk passes these two traits.
//!
//! [`Disk`] changes names and sizes, one call at a time. [`Queue`] moves bytes, many transfers at a time: a worker
//! submits a [`Transfer`], which owns its buffer until [`Queue::reap`] hands both back. Because the waist is
//! narrow, a test can count every operation, fail any of them, move fewer bytes than asked, or cut the power
//! ([`super::simulated`]); and a machine without io_uring gets threads and `pread` ([`super::plain`]) with nothing else changed.
//!
//! Names are never plain paths but a [`Place`]: a root that was opened once, and a path below it. No component of
//! that path may be a symbolic link, or lead out of the root: whoever owns a target directory could otherwise
//! make a restore that runs as root write anywhere, and so could a damaged repository.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::buffer::Buffer;
use super::share::Sharing;
use crate::{Error, Result};

/// A directory under which names are looked up. The way to it may have links; the way below it may not.
#[derive(Debug)]
pub struct Root {
    path: PathBuf,
    directory: File,
}

impl Root {
    /// Opens the directory `path`.
    pub fn open(path: &Path) -> Result<Self> {
        let directory = File::open(path).map_err(|cause| Error::io("open", path, cause))?;
        let is_directory = directory.metadata().map_err(|cause| Error::io("examine", path, cause))?.is_dir();
        if !is_directory {
            return Err(Error::io("open", path, std::io::Error::from(std::io::ErrorKind::NotADirectory)));
        }
        Ok(Self::of(directory, path))
    }

    /// A directory that is open; `path` is what messages call it.
    pub fn of(directory: File, path: &Path) -> Self {
        Self { path: path.to_owned(), directory }
    }

    /// The place `path` below this root; the empty path is the root itself.
    pub fn at<'a>(&'a self, path: &'a (impl AsRef<Path> + ?Sized)) -> Place<'a> {
        Place { root: self, path: path.as_ref() }
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

/// A name below a root.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The root.
    pub root: &'a Root,
    /// Relative to it, no `..`; empty for the root itself.
    pub path: &'a Path,
}

impl Place<'_> {
    /// The whole path, for messages and for what is told to others; not for opening.
    pub fn full(&self) -> PathBuf {
        if self.path.as_os_str().is_empty() { self.root.path.clone() } else { self.root.path.join(self.path) }
    }
}

/// What a file is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Open {
    /// Reading whole 4 KiB, past the page cache where the file system can.
    Read,
    /// Reading any bytes, through the page cache.
    ReadBuffered,
    /// Writing whole 4 KiB of an existing file, past the page cache where the file system can.
    Write,
    /// Writing (and reading) any bytes of an existing file, through the page cache.
    WriteBuffered,
    /// A new file with this mode, for any bytes; one that exists is refused.
    Create(u32),
    /// A directory, to sync it or to change its attributes.
    Directory,
}

/// An open file, with what is needed to speak of it.
#[derive(Debug)]
pub struct OpenFile {
    /// The file.
    pub file: File,
    /// Its path, for messages.
    pub path: PathBuf,
    /// O_DIRECT: offsets and lengths must be multiples of [`crate::units::DIRECT_BYTES`].
    pub direct: bool,
}

/// Numbers of the user and group that own what is created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// A directory.
    Directory,
    /// A regular file of so many bytes.
    File(u64),
    /// A symbolic link, or something else that is neither file nor directory.
    Other,
}

/// Names, sizes, durability. Every method that fails says what it tried and where.
pub trait Disk: Send + Sync {
    /// How bytes move here, for the report: "io_uring".
    fn describe(&self) -> &'static str;
    /// What is at `place`, without following a link; nothing is no error.
    fn look(&self, place: Place<'_>) -> Result<Option<Found>>;
    /// The names in a directory, sorted.
    fn list(&self, place: Place<'_>) -> Result<Vec<std::ffi::OsString>>;
    /// Opens a file or directory.
    fn open(&self, place: Place<'_>, how: Open) -> Result<Arc<OpenFile>>;
    /// Makes a directory; false if there already was one.
    fn make_directory(&self, place: Place<'_>, mode: u32) -> Result<bool>;
    /// Makes a symbolic link with this text.
    fn make_link(&self, place: Place<'_>, text: &Path) -> Result<()>;
    /// Makes a file that was just created this large, and sure that the space is there: unwritten extents, which
    /// read as zeros. False where the file system can promise no space: the size alone is right then.
    fn allocate(&self, file: &OpenFile, bytes: u64) -> Result<bool>;
    /// Makes bytes of a file zero, without changing its size; the space stays allocated where the file system can.
    fn make_zero(&self, file: &OpenFile, offset: u64, bytes: u64) -> Result<()>;
    /// Lets `bytes` of `to` from `to_offset` on be those of `from` at `offset`, without moving any: whole blocks of the
    /// file system.
    fn share(&self, from: &OpenFile, offset: u64, to: &OpenFile, to_offset: u64, bytes: u64) -> Result<Sharing>;
    /// How many names a file has.
    fn names_of(&self, file: &OpenFile) -> Result<u64>;
    /// Sets a file's size.
    fn set_size(&self, file: &OpenFile, bytes: u64) -> Result<()>;
    /// Sets the permission bits and, where given, the owner.
    fn set_attributes(&self, file: &OpenFile, mode: u32, owner: Option<Owner>) -> Result<()>;
    /// Sets the owner of a symbolic link itself.
    fn set_link_owner(&self, place: Place<'_>, owner: Owner) -> Result<()>;
    /// Sets the modification time, in seconds since 1970.
    fn set_modified(&self, file: &OpenFile, seconds: i64) -> Result<()>;
    /// Reads a small file whole, refusing more than `limit` bytes.
    fn read_small(&self, file: &OpenFile, limit: u64) -> Result<Vec<u8>>;
    /// Writes few bytes at an offset.
    fn write_small(&self, file: &OpenFile, offset: u64, bytes: &[u8]) -> Result<()>;
    /// Makes a file or directory durable. A failure is final: see [`super::durable`].
    fn sync(&self, file: &OpenFile) -> Result<()>;
    /// Makes everything durable that was written to the file system that `file` lies in.
    fn sync_file_system(&self, file: &OpenFile) -> Result<()>;
    /// Whether that tells of writes through the page cache that were lost; else each file has to be synced.
    fn sync_file_system_tells(&self) -> bool;
    /// Gives a file another name, replacing what is there. Durable after the sync of the directories.
    fn rename(&self, from: Place<'_>, to: Place<'_>) -> Result<()>;
    /// Removes a file or link.
    fn remove_file(&self, place: Place<'_>) -> Result<()>;
    /// Removes an empty directory.
    fn remove_directory(&self, place: Place<'_>) -> Result<()>;
    /// A queue for one worker, to be made in the thread that uses it.
    fn queue(&self, buffers: &mut [Buffer]) -> Result<Box<dyn Queue>>;
}

/// Which way bytes move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the files into the buffer.
    Read,
    /// From the buffer into the files.
    Write,
}

/// One run of bytes between a file and a buffer.
#[derive(Clone, Debug)]
pub struct Part {
    /// The file.
    pub file: Arc<OpenFile>,
    /// First byte in the file.
    pub offset: u64,
    /// First byte in the buffer.
    pub at: usize,
    /// How many. A direct read may move up to the next 4 KiB boundary more, where the file has them: the
    /// buffer's bytes up to there belong to this part.
    pub bytes: usize,
}

/// Bytes to move between one buffer and any number of files.
#[derive(Debug)]
pub struct Transfer {
    /// The submitter's own number for it.
    pub token: usize,
    /// Which way.
    pub way: Way,
    /// Given away until the transfer is reaped.
    pub buffer: Buffer,
    /// All are moved at once, in no order; none overlap.
    pub parts: Vec<Part>,
}

/// A transfer that the disk is done with.
#[derive(Debug)]
pub struct Finished {
    /// The submitter's number.
    pub token: usize,
    /// Given back.
    pub buffer: Buffer,
    /// The parts, given back for the submitter's next use.
    pub parts: Vec<Part>,
    /// All bytes of all parts were moved; or the first failure, after the last part came to rest.
    pub outcome: Result<()>,
}

/// One worker's transfers.
pub trait Queue {
    /// Queues a transfer. It may start at once, and does at the next [`Queue::reap`].
    fn submit(&mut self, transfer: Transfer);
    /// A finished transfer. With `wait`, sleeps until there is one; none means that nothing is in flight (or, without
    /// `wait`, that nothing has finished). An error means that the queue itself is broken.
    fn reap(&mut self, wait: bool) -> Result<Option<Finished>>;
    /// How bytes move here, for the report: "io_uring with registered buffers".
    fn describe(&self) -> String;
}
