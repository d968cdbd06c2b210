//! Opens the files of a mount ahead of their reads.
//!
//! On a FUSE mount an open is a request like any other and waits behind the reads that are in flight: 30 ms each,
//! where a worker opened its files itself and stood still meanwhile, which halved the speed of a copy. A few threads
//! open instead; the worker gets jobs whose files are open.
//!
//! Where packs are on another machine, the same threads wait for their bytes, each for one buffer that a worker has sent
//! along: as many requests are on the way as there are threads, and nothing is held but the workers' own buffers.

use crossbeam::channel::{Receiver, Sender};

use super::plan::Job;
use super::source::{OpenSource, SourceFiles};
use crate::Result;
use crate::io::disk::Part;
use crate::io::{Buffer, Disk};

/// What waits for the server at once: more would only queue there.
pub(super) const THREADS: usize = 16;

/// A job to open the files of; or to fetch, where it comes with a buffer.
pub(super) struct Request {
    pub(super) job: Job,
    pub(super) buffer: Option<Buffer>,
    pub(super) reply: Sender<Answer>,
}

/// What became of it.
pub(super) enum Answer {
    /// Its reads as the disk takes them.
    Opened(Job, Result<Vec<Part>>),
    /// Its buffer is filled, or as far as that went.
    Fetched(Fetched),
}

/// A job that was read.
pub(super) struct Fetched {
    pub(super) job: Job,
    pub(super) buffer: Buffer,
    pub(super) outcome: Result<()>,
}

/// Serves requests until all workers have ended.
pub(super) fn serve(
    requests: &Receiver<Request>,
    source: &OpenSource,
    disk: &dyn Disk,
    go_on: impl Fn() -> Result<()>,
) {
    for Request { job, buffer, reply } in requests {
        // After a failure nobody reads any more.
        let answer = match buffer {
            None => {
                let parts = go_on().and_then(|()| SourceFiles::new().parts(source, &job.reads, disk));
                Answer::Opened(job, parts)
            }
            Some(mut buffer) => {
                let outcome = go_on().and_then(|()| source.fetch(&job.reads, &mut buffer));
                Answer::Fetched(Fetched { job, buffer, outcome })
            }
        };
        // A worker that has ended needs no answer.
        let _ = reply.send(answer);
    }
}
