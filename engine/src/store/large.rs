//! A large file on its way into a store: past the page cache, while its writer goes on.
//!
//! What is appended is collected in buffers of one huge page; a full one is written by the kernel while the next is
//! filled. Through the page cache a backup of 3 GB was first copied there, then written out by the sync at its end, the
//! disk idle before and the processors idle after. Space is allocated ahead, since a write beyond the end of a file
//! waits for every other: no more than is written already, and nothing where the file system is filling up, since others
//! write there as well. What was too much goes at the end.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, OFlags};

use crate::io::disk::{Finished, Part, Queue, Transfer, Way};
use crate::io::{BUFFER_BYTES, Buffer, Disk as _, LocalDisk, OpenFile, buffers};
use crate::units::DIRECT_BYTES;
use crate::{Error, Result};

/// One is filled while the others are written.
const BUFFERS: u16 = 3;
/// Space is allocated in steps of this at most.
const ALLOCATED_BYTES: u64 = 64 << 20;
/// So many times a step has to be free for it: workers allocate beside each other, and ext4 takes all that there is before
/// it says that it is not enough.
const FREE_STEPS_MIN: u64 = 64;

const _: () = assert!(ALLOCATED_BYTES.is_multiple_of(BUFFER_BYTES as u64));

/// See the module. Belongs to the thread that made it.
pub(super) struct LargeFile {
    file: Arc<OpenFile>,
    queue: Box<dyn Queue>,
    free: Vec<Buffer>,
    /// The buffer that is filled, and how much of it is.
    filling: Option<(Buffer, usize)>,
    /// Bytes in buffers that were full.
    submitted: u64,
    allocated: u64,
    allocates: bool,
    waited: Duration,
}

impl LargeFile {
    /// Writes `file` from its beginning; `path` is what messages call it.
    pub(super) fn new(file: File, path: &Path) -> Result<Self> {
        let (mut free, _) = buffers(BUFFERS)?;
        let queue = LocalDisk::new().queue(&mut free)?;
        let direct = set_direct(&file, true);
        let file = Arc::new(OpenFile { file, path: path.to_owned(), direct });
        Ok(Self {
            file,
            queue,
            free,
            filling: None,
            submitted: 0,
            allocated: 0,
            allocates: true,
            waited: Duration::ZERO,
        })
    }

    pub(super) fn append(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let (mut buffer, used) = match self.filling.take() {
                Some(filling) => filling,
                None => (self.free_buffer()?, 0),
            };
            let (now, rest) = bytes.split_at(bytes.len().min(BUFFER_BYTES - used));
            buffer[used..used + now.len()].copy_from_slice(now);
            self.filling = Some((buffer, used + now.len()));
            bytes = rest;
            if used + now.len() == BUFFER_BYTES {
                self.submit(BUFFER_BYTES)?;
            }
        }
        Ok(())
    }

    /// Writes `bytes`, less than a buffer, over the first ones.
    pub(super) fn replace_head(&mut self, bytes: &[u8]) -> Result<()> {
        if let (0, Some((buffer, _))) = (self.submitted, &mut self.filling) {
            buffer[..bytes.len()].copy_from_slice(bytes);
            return Ok(());
        }
        while let Some(finished) = self.reap()? {
            self.settle(finished)?;
        }
        let OpenFile { file, path, direct } = &*self.file;
        set_direct(file, false);
        let written = file.write_all_at(bytes, 0).map_err(|cause| Error::io_at("write", path, 0, cause));
        set_direct(file, *direct);
        written
    }

    /// How long the writer waited for the disk.
    pub(super) fn waited(&self) -> Duration {
        self.waited
    }

    /// Everything is written, though not durable; the file ends behind the last byte.
    pub(super) fn finish(&mut self) -> Result<()> {
        let used = self.filling.as_ref().map_or(0, |(_, used)| *used);
        let end = self.submitted + used as u64;
        if let Some((buffer, used)) = &mut self.filling {
            let whole = used.next_multiple_of(DIRECT_BYTES);
            buffer[*used..whole].fill(0);
            self.submit(whole)?;
        }
        while let Some(finished) = self.reap()? {
            self.settle(finished)?;
        }
        let OpenFile { file, path, .. } = &*self.file;
        file.set_len(end).map_err(|cause| Error::io("set the size of", path, cause))
    }

    /// Has the first `bytes` of the buffer that is filled written.
    fn submit(&mut self, bytes: usize) -> Result<()> {
        let Some((buffer, _)) = self.filling.take() else { return Ok(()) };
        let end = self.submitted + bytes as u64;
        if self.allocates && end > self.allocated {
            self.allocates = self.allocate_ahead();
        }
        let part = Part { file: Arc::clone(&self.file), offset: self.submitted, at: 0, bytes };
        let token = usize::from(buffer.index());
        self.queue.submit(Transfer { token, way: Way::Write, buffer, parts: vec![part] });
        self.submitted = end;
        // Submitted requests start with the next call.
        match self.queue.reap(false)? {
            Some(finished) => self.settle(finished),
            None => Ok(()),
        }
    }

    /// Allocates the next step; false where there is no room to spare, or no such call: only speed is lost.
    fn allocate_ahead(&mut self) -> bool {
        let file = &self.file.file;
        let step = self.submitted.clamp(BUFFER_BYTES as u64, ALLOCATED_BYTES);
        let free = rustix::fs::fstatvfs(file).map_or(0, |room| room.f_bavail.saturating_mul(room.f_frsize));
        let allocated = free / FREE_STEPS_MIN >= step
            && rustix::fs::fallocate(file, FallocateFlags::empty(), self.allocated, step).is_ok();
        self.allocated += if allocated { step } else { 0 };
        allocated
    }

    fn free_buffer(&mut self) -> Result<Buffer> {
        loop {
            if let Some(buffer) = self.free.pop() {
                return Ok(buffer);
            }
            match self.reap()? {
                Some(finished) => self.settle(finished)?,
                None => return Err(Error::Refused("an earlier write failed".to_owned())),
            }
        }
    }

    fn reap(&mut self) -> Result<Option<Finished>> {
        let began = Instant::now();
        let finished = self.queue.reap(true);
        self.waited += began.elapsed();
        finished
    }

    fn settle(&mut self, Finished { buffer, parts, outcome, .. }: Finished) -> Result<()> {
        match outcome {
            Err(Error::Io { source, .. }) if self.file.direct && source.kind() == ErrorKind::InvalidInput => {
                // The file system took the flag and does not mean it.
                set_direct(&self.file.file, false);
                parts.iter().try_for_each(|part| self.write_plainly(part, &buffer))?;
            }
            outcome => outcome?,
        }
        self.free.push(buffer);
        Ok(())
    }

    fn write_plainly(&self, part: &Part, buffer: &Buffer) -> Result<()> {
        let written = self.file.file.write_all_at(&buffer[part.at..part.at + part.bytes], part.offset);
        written.map_err(|cause: io::Error| Error::io_at("write", &self.file.path, part.offset, cause))
    }

    pub(super) fn file(&self) -> &File {
        &self.file.file
    }
}

/// Sets the flag on the open file; false where the file system refuses.
fn set_direct(file: &File, on: bool) -> bool {
    let Ok(flags) = rustix::fs::fcntl_getfl(file) else { return false };
    let flags = if on { flags | OFlags::DIRECT } else { flags - OFlags::DIRECT };
    rustix::fs::fcntl_setfl(file, flags).is_ok()
}
