//! Opens the files of a mount ahead of their reads.
//!
//! On a FUSE mount an open is a request like any other and waits behind the reads that are in flight: 30 ms each,
//! where a worker opened its files itself and stood still meanwhile, which halved the speed of a copy. A few threads
//! open instead; the worker gets jobs whose files are open.

use crossbeam::channel::{Receiver, Sender};

use super::plan::Job;
use super::source::{OpenSource, SourceFiles};
use crate::Result;
use crate::io::Disk;
use crate::io::disk::Part;

/// Opens that wait for the mount's server at once: more would only queue there.
pub(super) const THREADS: usize = 16;

/// A job to open the files of.
pub(super) struct Request {
    pub(super) job: Job,
    pub(super) reply: Sender<Opened>,
}

/// A job with its reads as the disk takes them.
pub(super) struct Opened {
    pub(super) job: Job,
    pub(super) parts: Result<Vec<Part>>,
}

/// Serves requests until all workers have ended.
pub(super) fn serve(
    requests: &Receiver<Request>,
    source: &OpenSource,
    disk: &dyn Disk,
    go_on: impl Fn() -> Result<()>,
) {
    for Request { job, reply } in requests {
        // After a failure nobody reads any more.
        let parts = go_on().and_then(|()| SourceFiles::new().parts(source, &job.reads, disk));
        // A worker that has ended needs no answer.
        let _ = reply.send(Opened { job, parts });
    }
}
