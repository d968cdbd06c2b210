//! Transfers by io_uring: one ring per worker, all of its requests in flight at once, no thread of ours waiting.
//!
//! A transfer is cut into requests of at most 1 MiB. The ring's table owns the transfer, and with it the buffer,
//! until the completion of its last request has been seen; dropping the queue waits for that too, because a
//! kernel that still writes into memory does not ask whether somebody has freed it.
//!
//! Buffers are registered with the ring where the locked-memory limit allows, which saves looking their pages up
//! for each request; otherwise the same requests are made with plain addresses.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;

use io_uring::{IoUring, Probe, opcode, squeue, types};

use super::buffer::Buffer;
use super::disk::{Finished, Queue, Transfer, Way};
use super::transfer::{self, Next, REQUEST_BYTES_MAX};
use crate::{Error, Result};

/// Requests in the kernel at once, per worker: small files make many, large ones a few dozen.
const REQUESTS_MAX: u32 = 256;

const _: () = assert!(REQUESTS_MAX.is_power_of_two());

/// One worker's ring.
pub(super) struct RingQueue {
    ring: IoUring,
    registered: bool,
    transfers: Table<InFlight>,
    requests: Table<Request>,
    /// Requests that wait for a place in the ring.
    waiting: VecDeque<usize>,
    /// Requests that the kernel has, or will have at the next submission.
    running: usize,
    done: VecDeque<Finished>,
}

/// A transfer whose buffer belongs to the kernel.
struct InFlight {
    transfer: Transfer,
    /// The buffer's first byte, taken before the first request: nothing here touches the buffer after that.
    base: *mut u8,
    requests_left: usize,
    failure: Option<Error>,
}

/// The rest of one request: bytes `start..start + bytes` of a part.
struct Request {
    transfer: usize,
    part: usize,
    start: usize,
    bytes: usize,
}

impl RingQueue {
    /// A ring, with `buffers` registered where that is allowed. Fails where the kernel has no io_uring for us.
    pub(super) fn new(buffers: &mut [Buffer]) -> io::Result<Self> {
        // Completions are then handled when we ask for them, not by interrupting the decoder. Since Linux 6.1.
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .build(REQUESTS_MAX)
            .or_else(|_| IoUring::new(REQUESTS_MAX))?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        if !probe.is_supported(opcode::Read::CODE) || !probe.is_supported(opcode::Write::CODE) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let registered = register(&ring, buffers);
        Ok(Self {
            ring,
            registered,
            transfers: Table::new(),
            requests: Table::new(),
            waiting: VecDeque::new(),
            running: 0,
            done: VecDeque::new(),
        })
    }

    /// Whether the buffers are registered.
    pub(super) fn is_registered(&self) -> bool {
        self.registered
    }

    /// Moves waiting requests into the ring while it has places.
    fn push_waiting(&mut self) {
        while self.running < REQUESTS_MAX as usize {
            let Some(&index) = self.waiting.front() else { return };
            let Some(entry) = self.entry(index) else {
                self.waiting.pop_front();
                continue;
            };
            // SAFETY: the entry's address range lies within a buffer that `transfers` owns until the completion
            // of this request is seen (`settle`, and `drop` waits for it); `transfer::check` bounded the range.
            // The file is held open by the part, in the same table.
            if unsafe { self.ring.submission().push(&entry) }.is_err() {
                return;
            }
            self.waiting.pop_front();
            self.running += 1;
        }
    }

    fn entry(&self, index: usize) -> Option<squeue::Entry> {
        let request = self.requests.get(index)?;
        let InFlight { transfer, base, .. } = self.transfers.get(request.transfer)?;
        let part = &transfer.parts[request.part];
        let at = part.at + request.start;
        let room = transfer.buffer.len() - at;
        let bytes = transfer::request_bytes(transfer.way, part.file.direct, request.bytes, room, REQUEST_BYTES_MAX);
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let offset = part.offset + request.start as u64;
        let file = types::Fd(part.file.file.as_raw_fd());
        // SAFETY: `at` is within the buffer that begins at `base`, by `transfer::check`.
        let address = unsafe { base.add(at) };
        let entry = match (transfer.way, self.registered) {
            (Way::Read, false) => opcode::Read::new(file, address, bytes).offset(offset).build(),
            (Way::Write, false) => opcode::Write::new(file, address, bytes).offset(offset).build(),
            (Way::Read, true) => {
                opcode::ReadFixed::new(file, address, bytes, transfer.buffer.index()).offset(offset).build()
            }
            (Way::Write, true) => {
                opcode::WriteFixed::new(file, address, bytes, transfer.buffer.index()).offset(offset).build()
            }
        };
        Some(entry.user_data(index as u64))
    }

    /// Takes every completion that is there.
    fn take_completions(&mut self) {
        let mut seen = [(0, 0); 64];
        loop {
            let mut count = 0;
            for (place, entry) in seen.iter_mut().zip(self.ring.completion()) {
                *place = (usize::try_from(entry.user_data()).unwrap_or(usize::MAX), entry.result());
                count += 1;
            }
            for &(index, result) in &seen[..count] {
                self.running -= 1;
                self.settle(index, result);
            }
            if count < seen.len() {
                return;
            }
        }
    }

    /// One request came back: ask for the rest of it, or count it off its transfer.
    fn settle(&mut self, index: usize, result: i32) {
        let Some(request) = self.requests.get_mut(index) else { return };
        let Some(flight) = self.transfers.get_mut(request.transfer) else { return };
        let part = &flight.transfer.parts[request.part];
        // A negative result is minus errno.
        let result = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
        match transfer::next(flight.transfer.way, part.file.direct, request.bytes, result) {
            // After a failure the rest is not worth asking for.
            Next::Again { advanced } if flight.failure.is_none() => {
                request.start += advanced;
                request.bytes -= advanced;
                self.waiting.push_back(index);
                return;
            }
            Next::Again { .. } | Next::Done => {}
            Next::Failed(cause) => {
                let offset = part.offset + request.start as u64;
                let failure = transfer::failure(flight.transfer.way, part, offset, cause);
                flight.failure.get_or_insert(failure);
            }
        }
        let owner = request.transfer;
        flight.requests_left -= 1;
        let last = flight.requests_left == 0;
        self.requests.remove(index);
        if last && let Some(InFlight { transfer, failure, .. }) = self.transfers.remove(owner) {
            self.done.push_back(finished(transfer, failure));
        }
    }

    /// Enters the kernel: hands over what is queued and, with `wait`, sleeps until something is complete.
    fn enter(&mut self, wait: bool) -> io::Result<()> {
        match self.ring.submit_and_wait(usize::from(wait)) {
            Ok(_) => Ok(()),
            // Interrupted, or the completions must be taken first: the caller's loop does both.
            Err(cause) if matches!(cause.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => Ok(()),
            Err(cause) => Err(cause),
        }
    }
}

impl Queue for RingQueue {
    fn submit(&mut self, mut transfer: Transfer) {
        if let Err(refused) = transfer::check(transfer.way, &transfer.parts, transfer.buffer.len()) {
            return self.done.push_back(finished(transfer, Some(refused)));
        }
        let requests: usize = transfer.parts.iter().map(|part| transfer::cut(part.bytes).count()).sum();
        if requests == 0 {
            return self.done.push_back(finished(transfer, None));
        }
        let base = transfer.buffer.as_mut_ptr();
        let owner = self.transfers.insert(InFlight { transfer, base, requests_left: requests, failure: None });
        let Some(flight) = self.transfers.get(owner) else { return };
        for (part, whole) in flight.transfer.parts.iter().enumerate() {
            for (start, bytes) in transfer::cut(whole.bytes) {
                self.waiting.push_back(self.requests.insert(Request { transfer: owner, part, start, bytes }));
            }
        }
    }

    fn reap(&mut self, wait: bool) -> Result<Option<Finished>> {
        loop {
            if let Some(finished) = self.done.pop_front() {
                return Ok(Some(finished));
            }
            self.push_waiting();
            if self.running == 0 {
                return Ok(None);
            }
            self.enter(wait).map_err(|cause| Error::io("submit to", "the io_uring queue", cause))?;
            self.take_completions();
            if !wait && self.done.is_empty() {
                return Ok(None);
            }
        }
    }

    fn describe(&self) -> String {
        let buffers =
            if self.registered { "registered buffers" } else { "buffers not registered (locked-memory limit)" };
        format!("io_uring, {buffers}")
    }
}

impl Drop for RingQueue {
    fn drop(&mut self) {
        self.waiting.clear();
        while self.running > 0 {
            if self.enter(true).is_err() {
                // The kernel may still write into these buffers, and we cannot learn when it stops: they stay
                // mapped until the process ends.
                std::mem::forget(std::mem::replace(&mut self.transfers, Table::new()));
                return;
            }
            self.take_completions();
            self.waiting.clear();
        }
    }
}

/// Registers the buffers; false where that is not allowed or not known.
fn register(ring: &IoUring, buffers: &mut [Buffer]) -> bool {
    let in_order = buffers.iter().enumerate().all(|(place, buffer)| usize::from(buffer.index()) == place);
    if buffers.is_empty() || !in_order {
        return false;
    }
    let addresses: Vec<_> = buffers
        .iter_mut()
        .map(|buffer| libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() })
        .collect();
    // SAFETY: each range is a live mapping that its `Buffer` owns. The kernel takes references to the pages, so a
    // buffer that is dropped before the ring leaves them pinned and nothing dangling; the kernel checks each
    // request's address against the range registered under its index.
    unsafe { ring.submitter().register_buffers(&addresses) }.is_ok()
}

fn finished(transfer: Transfer, failure: Option<Error>) -> Finished {
    let Transfer { token, buffer, parts, .. } = transfer;
    Finished { token, buffer, parts, outcome: failure.map_or(Ok(()), Err) }
}

/// Things by number, numbers used again.
struct Table<T> {
    places: Vec<Option<T>>,
    free: Vec<usize>,
}

impl<T> Table<T> {
    fn new() -> Self {
        Self { places: Vec::new(), free: Vec::new() }
    }

    fn insert(&mut self, thing: T) -> usize {
        match self.free.pop() {
            Some(index) => {
                self.places[index] = Some(thing);
                index
            }
            None => {
                self.places.push(Some(thing));
                self.places.len() - 1
            }
        }
    }

    fn get(&self, index: usize) -> Option<&T> {
        self.places.get(index)?.as_ref()
    }

    fn get_mut(&mut self, index: usize) -> Option<&mut T> {
        self.places.get_mut(index)?.as_mut()
    }

    fn remove(&mut self, index: usize) -> Option<T> {
        let thing = self.places.get_mut(index)?.take();
        if thing.is_some() {
            self.free.push(index);
        }
        thing
    }
}
