//! One worker's reads of the source, on their way to be submitted: the files of each are opened first.
//!
//! Files of packs are opened here. Those of a mount, where an open waits behind the reads that are in flight, go to
//! [`super::opener`] and come back, in any order, while the worker does something else. So do, with a buffer, jobs whose
//! packs are on another machine: these come back read.
//!
//! Always true: files are open ahead for no more jobs than the worker was made with, so that what it keeps open fits
//! what [`super::fill::Shape`] has counted.

use std::collections::VecDeque;

use crossbeam::channel::{Receiver, Sender, unbounded};

use super::opener::{Answer, Fetched, Request};
use super::plan::Job;
use super::source::{self, OpenSource, SourceFiles};
use crate::io::disk::Part;
use crate::io::{Buffer, Disk};
use crate::repository::Backup;
use crate::{Error, Result};

/// See the module.
pub(super) struct SourceReads<'a> {
    source: &'a OpenSource,
    backup: &'a Backup,
    disk: &'a dyn Disk,
    files: SourceFiles,
    /// Where jobs go to have the files of a mount opened, and where they come back.
    opener: Sender<Request>,
    opened: (Sender<Answer>, Receiver<Answer>),
    /// Those of them that are not back.
    opening: usize,
    /// Jobs that came back read.
    fetched: VecDeque<Fetched>,
    /// Jobs whose files are open.
    ready: VecDeque<(Job, Vec<Part>)>,
    /// Jobs that are opened and ready at once.
    jobs_max: usize,
}

impl<'a> SourceReads<'a> {
    /// For a worker with so many buffers: half as many jobs are opened ahead.
    pub(super) fn new(
        source: &'a OpenSource,
        backup: &'a Backup,
        disk: &'a dyn Disk,
        opener: Sender<Request>,
        buffers: usize,
    ) -> Self {
        Self {
            source,
            backup,
            disk,
            files: SourceFiles::new(),
            opener,
            opened: unbounded(),
            opening: 0,
            fetched: VecDeque::new(),
            ready: VecDeque::new(),
            jobs_max: buffers / 2 + 1,
        }
    }

    /// True if another job may be opened.
    pub(super) fn has_room(&self) -> bool {
        self.opening + self.ready.len() < self.jobs_max
    }

    /// Has the files of a job opened.
    pub(super) fn open(&mut self, job: Job) -> Result<()> {
        if self.source.is_fetched() {
            self.push(job, Vec::new());
            return Ok(());
        }
        if let Some(parts) = self.files.parts_if_open(&job.reads) {
            self.push(job, parts);
            return Ok(());
        }
        if self.source.gives_files() {
            return self.send(job, None);
        }
        let parts = self.files.parts(self.source, &job.reads, self.disk);
        self.keep(job, parts)
    }

    /// Has a job fetched into a buffer.
    pub(super) fn fetch(&mut self, job: Job, buffer: Buffer) -> Result<()> {
        self.send(job, Some(buffer))
    }

    /// A job that was fetched.
    pub(super) fn next_fetched(&mut self) -> Option<Fetched> {
        self.fetched.pop_front()
    }

    fn send(&mut self, job: Job, buffer: Option<Buffer>) -> Result<()> {
        let request = Request { job, buffer, reply: self.opened.0.clone() };
        self.opener.send(request).map_err(|_| Error::Cancelled)?;
        self.opening += 1;
        Ok(())
    }

    /// Adds a job whose files are open already.
    pub(super) fn push(&mut self, job: Job, parts: Vec<Part>) {
        self.ready.push_back((job, parts));
    }

    /// Takes back what was opened meanwhile.
    pub(super) fn take_opened(&mut self) -> Result<()> {
        while let Ok(opened) = self.opened.1.try_recv() {
            self.take(opened)?;
        }
        Ok(())
    }

    /// Files of a job are on their way to be open, or its bytes to come.
    pub(super) fn are_opening(&self) -> bool {
        self.opening > 0
    }

    /// Sleeps until those of one are there.
    pub(super) fn wait(&mut self) -> Result<()> {
        let opened = self.opened.1.recv().map_err(|_| Error::Cancelled)?;
        self.take(opened)
    }

    /// The job that is ready first.
    pub(super) fn first(&self) -> Option<&Job> {
        self.ready.front().map(|(job, _)| job)
    }

    /// Takes it, with its reads as the disk takes them.
    pub(super) fn pop(&mut self) -> Option<(Job, Vec<Part>)> {
        self.ready.pop_front()
    }

    fn take(&mut self, answer: Answer) -> Result<()> {
        self.opening -= 1;
        let (job, parts) = match answer {
            Answer::Opened(job, parts) => (job, parts),
            Answer::Fetched(fetched) => {
                self.fetched.push_back(fetched);
                return Ok(());
            }
        };
        if let Ok(parts) = &parts {
            self.files.remember(&job.reads, parts);
        }
        self.keep(job, parts)
    }

    fn keep(&mut self, job: Job, parts: Result<Vec<Part>>) -> Result<()> {
        let parts = parts.map_err(|failure| source::explain(failure, &job, self.backup))?;
        self.push(job, parts);
        Ok(())
    }
}
