//! Which bytes of a buffer go where in the target's files.
//!
//! Whole 4 KiB are written past the page cache. What is left at the end of a file goes through it, so that no
//! write ever reaches past the end of a file and no size has to be put right.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use super::fill::Shared;
use super::layout::Roots;
use super::plan::{From, Job, Missing};
use crate::format::file::FileRecord;
use crate::io::disk::Part;
use crate::io::{Disk, Open, OpenFile};
use crate::units::{BlockNumber, DIRECT_BYTES};
use crate::{Error, Result};

/// Files that stay open for the next block: jobs come back in any order, but near each other.
pub(super) const FILES_OPEN: usize = 16;

/// The writes of one buffer, and what they complete.
#[derive(Default)]
pub(super) struct Writes {
    pub(super) parts: Vec<Part>,
    /// Blocks that are there once all parts are written.
    pub(super) blocks: Vec<(BlockNumber, usize)>,
    /// Files to give their modification time back, which writing has changed.
    pub(super) files: Vec<(Arc<OpenFile>, i64)>,
}

/// One worker's open files of the target.
pub(super) struct TargetFiles {
    open: VecDeque<(Arc<FileRecord>, Handles)>,
    /// Whether whole 4 KiB go past the page cache; none before the first of them.
    direct: Option<bool>,
}

/// The two ways into a file, opened when they are first needed.
#[derive(Default)]
struct Handles {
    whole: Option<Arc<OpenFile>>,
    tail: Option<Arc<OpenFile>>,
}

impl TargetFiles {
    pub(super) fn new() -> Self {
        Self { open: VecDeque::new(), direct: None }
    }

    /// Adds the block whose bytes begin at `at` of the buffer.
    pub(super) fn add(&mut self, writes: &mut Writes, block: &Missing, at: usize, shared: &Shared<'_>) -> Result<()> {
        let first = block.index * shared.backup.info.block_bytes.bytes() as u64;
        self.add_run(writes, block, first..first + block.bytes as u64, at, (shared.roots, shared.disk))?;
        if let Some(direct) = self.direct {
            shared.note_direct(direct);
        }
        writes.blocks.push((block.number(), block.bytes));
        Ok(())
    }

    /// Adds bytes `run` of a block's file, which begin at `at` of the buffer. They end at a multiple of 4 KiB, or where the
    /// file ends.
    pub(super) fn add_run(
        &mut self,
        writes: &mut Writes,
        block: &Missing,
        run: Range<u64>,
        at: usize,
        target: (&Roots, &dyn Disk),
    ) -> Result<()> {
        let tail = run.end - run.end % DIRECT_BYTES as u64;
        for (part, how) in [(run.start..tail, Open::Write), (tail.max(run.start)..run.end, Open::WriteBuffered)] {
            if !part.is_empty() {
                let file = self.file(block, how, target)?;
                if how == Open::Write {
                    self.direct = Some(file.direct);
                }
                // Both are within a block.
                let (skipped, bytes) = ((part.start - run.start) as usize, (part.end - part.start) as usize);
                push(writes, &file, part.start, at + skipped, bytes, block.file.modified);
            }
        }
        Ok(())
    }

    fn file(&mut self, block: &Missing, how: Open, (roots, disk): (&Roots, &dyn Disk)) -> Result<Arc<OpenFile>> {
        if !self.open.iter().any(|(file, _)| Arc::ptr_eq(file, &block.file)) {
            if self.open.len() == FILES_OPEN {
                self.open.pop_front();
            }
            self.open.push_back((Arc::clone(&block.file), Handles::default()));
        }
        let open = || disk.open(roots.place(&block.file.path)?, how);
        // The file was made sure of just above.
        let Some((_, handles)) = self.open.iter_mut().find(|(file, _)| Arc::ptr_eq(file, &block.file)) else {
            return open();
        };
        let handle = if how == Open::Write { &mut handles.whole } else { &mut handles.tail };
        match handle {
            Some(file) => Ok(Arc::clone(file)),
            None => Ok(Arc::clone(handle.insert(open()?))),
        }
    }
}

/// Reads of what the target has, for one worker: its jobs come file by file, so one open file is enough.
#[derive(Default)]
pub(super) struct TargetReads {
    last: Option<(Arc<FileRecord>, Arc<OpenFile>)>,
}

impl TargetReads {
    /// The reads of a job as the disk takes them: of the target's own files.
    pub(super) fn parts(&mut self, job: &Job, (roots, disk): (&Roots, &dyn Disk)) -> Result<Vec<Part>> {
        let mut parts = Vec::with_capacity(job.reads.len());
        for read in &job.reads {
            let From::File(file) = &read.from else {
                return Err(Error::Refused("a plan for another source".to_owned()));
            };
            let open = match &self.last {
                Some((last, open)) if Arc::ptr_eq(last, file) => Arc::clone(open),
                _ => disk.open(roots.place(&file.path)?, Open::Read)?,
            };
            self.last = Some((Arc::clone(file), Arc::clone(&open)));
            parts.push(Part { file: open, offset: read.offset, at: read.at, bytes: read.bytes });
        }
        Ok(parts)
    }
}

/// Adds a run of bytes, as a part of its own or at the end of the last.
fn push(writes: &mut Writes, file: &Arc<OpenFile>, offset: u64, at: usize, bytes: usize, modified: i64) {
    if let Some(last) = writes.parts.last_mut()
        && Arc::ptr_eq(&last.file, file)
        && last.offset + last.bytes as u64 == offset
        && last.at + last.bytes == at
    {
        last.bytes += bytes;
        return;
    }
    if !writes.files.last().is_some_and(|(last, _)| Arc::ptr_eq(last, file)) {
        writes.files.push((Arc::clone(file), modified));
    }
    writes.parts.push(Part { file: Arc::clone(file), offset, at, bytes });
}
