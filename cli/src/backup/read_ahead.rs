//! A worker's reads of the data directory: the next ones are in the kernel while it hashes and compresses.
//!
//! Reads go the way of a restore's: io_uring, buffers in huge pages, past the page cache. What the ring cannot read, because
//! the file ended early or its file system is not as it says, is read again by [`SourceFile`], which knows how.
//!
//! Always true: between two files nothing is in flight, and all buffers are free.

use std::sync::Arc;

use engine::io::disk::{Finished, Part, Queue, Transfer, Way};
use engine::io::{BUFFER_BYTES, Buffer, Disk as _, LocalDisk};
use engine::units::{BlockSize, DIRECT_BYTES, PAGE_BYTES};
use engine::{Error, Result};

use super::source::SourceFile;

/// Bytes of one read. The rest of the buffer is for a page that is read again.
pub(super) const READ_BYTES: usize = 1 << 20;
/// Reads of a worker that are under way, or wait for it: two keep a disk busy, and two arrive meanwhile.
const READS: u16 = 4;

const _: () = assert!(READ_BYTES >= BlockSize::MAX.bytes() && READ_BYTES.is_multiple_of(DIRECT_BYTES));
const _: () = assert!(READ_BYTES + PAGE_BYTES <= BUFFER_BYTES);

/// See the module. Belongs to the thread that made it.
pub(super) struct ReadAhead {
    queue: Box<dyn Queue>,
    free: Vec<Buffer>,
    /// Where the read of each buffer began, by its index, while it is in flight.
    offsets: Vec<u64>,
    in_flight: usize,
    arrived: Vec<(u64, Buffer, bool)>,
}

impl ReadAhead {
    pub(super) fn new() -> Result<Self> {
        let (mut free, _) = engine::io::buffers(READS)?;
        let queue = LocalDisk::new().queue(&mut free)?;
        Ok(Self { queue, free, offsets: vec![0; usize::from(READS)], in_flight: 0, arrived: Vec::new() })
    }

    /// Whether another read may begin.
    pub(super) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Begins to read `bytes` at `offset`.
    pub(super) fn begin(&mut self, source: &SourceFile, offset: u64, bytes: usize) {
        let Some(buffer) = self.free.pop() else { return };
        let token = usize::from(buffer.index());
        let part = Part { file: Arc::clone(source.file()), offset, at: 0, bytes };
        self.offsets[token] = offset;
        self.in_flight += 1;
        self.queue.submit(Transfer { token, way: Way::Read, buffer, parts: vec![part] });
    }

    /// Waits for the read that began at `offset`: its buffer, and how much of `bytes` is in it, less only where the file
    /// ends.
    pub(super) fn take(&mut self, source: &SourceFile, offset: u64, bytes: usize) -> Result<(Buffer, usize)> {
        let (buffer, whole) = loop {
            if let Some(place) = self.arrived.iter().position(|(at, ..)| *at == offset) {
                let (_, buffer, whole) = self.arrived.swap_remove(place);
                break (buffer, whole);
            }
            self.reap()?;
        };
        if whole {
            return Ok((buffer, bytes));
        }
        Self::read_into(buffer, source, offset, bytes)
    }

    /// Reads at once what [`Self::take`] would wait for: for files that are mostly in the page cache.
    pub(super) fn read(&mut self, source: &SourceFile, offset: u64, bytes: usize) -> Result<(Buffer, usize)> {
        let buffer = self.free.pop();
        let buffer = buffer.ok_or_else(|| Error::Refused("more reads than there are buffers for".to_owned()))?;
        Self::read_into(buffer, source, offset, bytes)
    }

    fn read_into(mut buffer: Buffer, source: &SourceFile, offset: u64, bytes: usize) -> Result<(Buffer, usize)> {
        let read = source.read_at(offset, &mut buffer[..bytes.next_multiple_of(DIRECT_BYTES)])?;
        Ok((buffer, read.min(bytes)))
    }

    pub(super) fn give_back(&mut self, buffer: Buffer) {
        self.free.push(buffer);
    }

    /// Nobody waits any more for what was begun.
    pub(super) fn end(&mut self) -> Result<()> {
        while self.in_flight > 0 {
            self.reap()?;
        }
        self.free.extend(self.arrived.drain(..).map(|(_, buffer, _)| buffer));
        Ok(())
    }

    fn reap(&mut self) -> Result<()> {
        let Some(Finished { token, buffer, outcome, .. }) = self.queue.reap(true)? else {
            return Err(Error::Refused("a read that was never begun is waited for".to_owned()));
        };
        self.in_flight -= 1;
        self.arrived.push((self.offsets[token], buffer, outcome.is_ok()));
        Ok(())
    }
}
