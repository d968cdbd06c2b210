//! A delta's comparison: which blocks of the backup are in their places already, and the pages of the others.
//!
//! Workers ([`super::comparer`]) read the target's own files past the page cache, many reads in flight, and hash what
//! arrives. A block with the hash that the manifest has is marked in the map, as if it had been written. Of any other
//! the backup's block is read, compared with what is in memory anyway, and the pages that differ are written: a server
//! that changed one page of a block costs one page, not the block. A block of zeros is made one where it is not.
//!
//! What cannot be read, and files that were made anew, are left to [`super::fill`], which writes whole blocks.
//!
//! What is marked here gets on disk like any other bit, behind a sync of the file systems: that the bytes were read says
//! nothing of their being durable. A block of which only some pages were written when the power went differs again.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::comparer::Comparer;
use super::crew::Crew;
use super::fill::{AllUnits, Fill, Shape};
use super::first::FirstFailure;
use super::plan::{Missing, Units};
use super::source::OpenSource;
use super::target::Writes;
use super::{Hydration, is_left_out, is_placed_last};
use crate::format::block::BlockRecord;
use crate::format::file::FileRecord;
use crate::progress::{Progress, Stage};
use crate::units::BlockNumber;
use crate::{Error, Result};

/// What a comparison found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compared {
    /// Blocks that were looked at.
    pub blocks: u64,
    /// Those that are as in the backup, and their bytes.
    pub same_blocks: u64,
    /// See `same_blocks`.
    pub same_bytes: u64,
    /// Blocks of which pages were written.
    pub changed_blocks: u64,
    /// The bytes of those pages.
    pub written_bytes: u64,
    /// Blocks that were made zero.
    pub zeroed_blocks: u64,
    /// Blocks that could not be read: they are written anew.
    pub unreadable_blocks: u64,
}

#[derive(Default)]
pub(super) struct Counts {
    pub(super) blocks: AtomicU64,
    pub(super) same_blocks: AtomicU64,
    pub(super) same_bytes: AtomicU64,
    pub(super) changed_blocks: AtomicU64,
    pub(super) written_bytes: AtomicU64,
    pub(super) zeroed_blocks: AtomicU64,
    pub(super) unreadable_blocks: AtomicU64,
}

/// What all workers share.
pub(super) struct Shared<'a> {
    pub(super) hydration: &'a Hydration,
    pub(super) source: OpenSource,
    pub(super) shape: Shape,
    pub(super) progress: &'a dyn Progress,
    pub(super) counts: Counts,
    units: Mutex<AllUnits<'a>>,
    failure: FirstFailure,
}

impl Hydration {
    /// Makes the blocks of a delta what they are in the backup, and marks them; those that the map has already are not
    /// looked at. Comes after [`Hydration::outline`] in each run, and before [`Hydration::fill`].
    pub fn compare(&self, fill: &Fill, progress: &dyn Progress) -> Result<Compared> {
        self.map.refuse_if_closed()?;
        let files: Box<dyn Iterator<Item = Result<FileRecord>> + Send + '_> = Box::new(self.backup.manifest.files());
        let left_out: fn(&str) -> bool = |path| is_left_out(path) || is_placed_last(path);
        let shared = Shared {
            hydration: self,
            source: OpenSource::open(&fill.source, &self.backup, self.roots.layout(), &*self.disk)?,
            shape: self.shape(fill),
            progress,
            counts: Counts::default(),
            units: Mutex::new(Units::new(files, self.backup.info.block_bytes, left_out)),
            failure: FirstFailure::new(),
        };
        let Shared { source, failure, .. } = &shared;
        let crew = Crew { workers: shared.shape.workers, source, disk: &*self.disk, failure };
        crew.run(|open| Comparer::new(&shared, open)?.run(), || shared.go_on(), || shared.checkpoint());
        if shared.failure.is_set() {
            shared.failure.take()?;
            return Err(Error::Cancelled);
        }
        self.compared.store(true, Ordering::Release);
        Ok(shared.counts.compared())
    }
}

impl Counts {
    fn compared(&self) -> Compared {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Compared {
            blocks: count(&self.blocks),
            same_blocks: count(&self.same_blocks),
            same_bytes: count(&self.same_bytes),
            changed_blocks: count(&self.changed_blocks),
            written_bytes: count(&self.written_bytes),
            zeroed_blocks: count(&self.zeroed_blocks),
            unreadable_blocks: count(&self.unreadable_blocks),
        }
    }
}

impl Shared<'_> {
    pub(super) fn go_on(&self) -> Result<()> {
        if self.failure.is_set() || self.progress.cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }

    /// Bytes, then their sync, then the bits.
    fn checkpoint(&self) -> Result<()> {
        let Hydration { map, roots, disk, .. } = self.hydration;
        let started = Instant::now();
        let batch = map.take_batch();
        roots.sync_file_systems(&**disk)?;
        map.commit(batch)?;
        self.waited(Stage::Sync, started.elapsed());
        Ok(())
    }

    /// All pages of these writes are in their files.
    pub(super) fn written(&self, writes: &Writes) -> Result<()> {
        let Hydration { disk, map, .. } = self.hydration;
        for (file, modified) in &writes.files {
            if !file.direct && !disk.sync_file_system_tells() {
                disk.sync(file)?;
            }
            disk.set_modified(file, *modified)?;
        }
        for (block, bytes) in &writes.blocks {
            map.mark(*block);
            self.progress.advance(*bytes as u64);
        }
        let bytes: usize = writes.parts.iter().map(|part| part.bytes).sum();
        self.counts.changed_blocks.fetch_add(writes.blocks.len() as u64, Ordering::Relaxed);
        self.counts.written_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(())
    }

    pub(super) fn waited(&self, stage: Stage, time: Duration) {
        self.progress.waited(stage, u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }

    /// Of the next unit that has any, the blocks that have to be compared; none at the end.
    pub(super) fn next_blocks(&self, records: &mut Vec<BlockRecord>) -> Result<Vec<Missing>> {
        let Hydration { backup, map, fresh, .. } = self.hydration;
        loop {
            self.go_on()?;
            let unit = self.units.lock().unwrap_or_else(PoisonError::into_inner).next().transpose()?;
            let Some(unit) = unit else { return Ok(Vec::new()) };
            let mut blocks = Vec::new();
            for span in unit {
                let is_fresh = fresh.lock().unwrap_or_else(PoisonError::into_inner).contains(&span.file.first_block);
                records.clear();
                if !is_fresh {
                    let first = BlockNumber(span.file.first_block.0 + span.first);
                    backup.manifest.blocks(first, span.count, records)?;
                }
                let mut skipped = 0;
                for index in span.first..span.first + span.count {
                    let bytes = backup.info.block_bytes.block_bytes_at(span.file.bytes, index);
                    let number = BlockNumber(span.file.first_block.0 + index);
                    let record = usize::try_from(index - span.first).ok().and_then(|at| records.get(at));
                    match record.filter(|_| !map.is_present(number)) {
                        Some(record) => {
                            blocks.push(Missing { file: Arc::clone(&span.file), index, bytes, record: *record });
                        }
                        None => skipped += bytes as u64,
                    }
                }
                self.progress.advance(skipped);
            }
            if !blocks.is_empty() {
                return Ok(blocks);
            }
        }
    }
}
