//! Transfers by `pread` and `pwrite` on a few threads: for kernels and containers without io_uring.
//!
//! The threads take whole transfers, buffer and all, so a worker's reading, decoding and writing still overlap.

use std::io;
use std::os::unix::fs::FileExt;
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, Sender, unbounded};

use super::buffer::Buffer;
use super::disk::{Finished, Part, Queue, Transfer, Way};
use super::transfer::{self, Next, REQUEST_BYTES_MAX};
use crate::{Error, Result};

/// Threads per worker: one reads while another writes and two queue behind them, which keeps a disk busy.
const THREADS: usize = 4;

/// One worker's threads. They end with it: dropping the sender ends each after the transfer it is at.
pub(super) struct PlainQueue {
    submit: Option<Sender<Transfer>>,
    finished: Receiver<Finished>,
    in_flight: usize,
    threads: Vec<JoinHandle<()>>,
}

impl PlainQueue {
    /// Starts the threads. No call moves more than `request_bytes`: tests make every transfer a short one.
    pub(super) fn new(request_bytes: usize) -> Result<Self> {
        let (submit, submitted) = unbounded::<Transfer>();
        let (finish, finished) = unbounded();
        let threads = (0..THREADS)
            .map(|_| {
                let (submitted, finish) = (submitted.clone(), finish.clone());
                std::thread::Builder::new().name("disk".to_owned()).spawn(move || {
                    for transfer in submitted {
                        // Nobody listens once the queue is dropped; the buffer then goes with the message.
                        let _ = finish.send(run(transfer, request_bytes));
                    }
                })
            })
            .collect::<io::Result<_>>()
            .map_err(|cause| Error::io("start", "a disk thread", cause))?;
        Ok(Self { submit: Some(submit), finished, in_flight: 0, threads })
    }
}

impl Queue for PlainQueue {
    fn submit(&mut self, transfer: Transfer) {
        if let Some(submit) = &self.submit
            && submit.send(transfer).is_ok()
        {
            self.in_flight += 1;
        }
    }

    fn reap(&mut self, wait: bool) -> Result<Option<Finished>> {
        if self.in_flight == 0 {
            return Ok(None);
        }
        let finished = if wait {
            let gone = |_| Error::io("wait for", "the disk threads", io::Error::from(io::ErrorKind::BrokenPipe));
            Some(self.finished.recv().map_err(gone)?)
        } else {
            self.finished.try_recv().ok()
        };
        self.in_flight -= usize::from(finished.is_some());
        Ok(finished)
    }

    fn describe(&self) -> String {
        format!("pread and pwrite on {THREADS} threads a worker")
    }
}

impl Drop for PlainQueue {
    fn drop(&mut self) {
        self.submit = None;
        for thread in self.threads.drain(..) {
            // A thread has no way to fail but to panic, which its message would have been missed for already.
            let _ = thread.join();
        }
    }
}

fn run(mut transfer: Transfer, request_bytes: usize) -> Finished {
    let outcome = transfer::check(transfer.way, &transfer.parts, transfer.buffer.len()).and_then(|()| {
        transfer.parts.iter().try_for_each(|part| move_part(transfer.way, part, &mut transfer.buffer, request_bytes))
    });
    Finished { token: transfer.token, buffer: transfer.buffer, parts: transfer.parts, outcome }
}

fn move_part(way: Way, part: &Part, buffer: &mut Buffer, request_bytes: usize) -> Result<()> {
    let mut done = 0;
    while done < part.bytes {
        let (at, offset) = (part.at + done, part.offset + done as u64);
        let room = buffer.len() - at;
        let wanted = part.bytes - done;
        let limit = request_bytes.min(REQUEST_BYTES_MAX);
        let bytes = transfer::request_bytes(way, part.file.direct, wanted, room, limit);
        let result = match way {
            Way::Read => part.file.file.read_at(&mut buffer[at..at + bytes], offset),
            Way::Write => part.file.file.write_at(&buffer[at..at + bytes], offset),
        };
        match transfer::next(way, part.file.direct, wanted, result) {
            Next::Done => break,
            Next::Again { advanced } => done += advanced,
            Next::Failed(cause) => return Err(transfer::failure(way, part, offset, cause)),
        }
    }
    Ok(())
}
