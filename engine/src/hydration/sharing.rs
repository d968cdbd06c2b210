//! Blocks that a target's files share with the repository's packs, instead of a copy.
//!
//! All of it is shared first, and only then read or written: a pack is shared only when no read of it is in flight, and while
//! both went on at once each waited for the other (13 s for 3 GiB, where sharing alone takes 0.05 s). What is proven is what the
//! target's files have: a pack may be another by then, mended or replaced, and the shared bytes are still the old ones.
//! The order of durability stays: a block's bit is set when its bytes have been read and their hash was right, and gets
//! on disk behind a sync. What is shared and not proven is one more block that is missing.
//!
//! What the file system refuses to share is copied like any other block.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use super::fill::{Shared, all_units};
use super::plan::{self, From, Missing, Run};
use super::source::SourceFiles;
use crate::format::file::FileRecord;
use crate::io::{Open, OpenFile, Sharing, can_share};
use crate::progress::Stage;
use crate::repository::{Backup, keys};
use crate::units::{BlockNumber, DIRECT_BYTES};
use crate::{Error, Result};

/// Which blocks files share with the packs: a bit for each of the backup's.
pub(super) struct SharedBlocks {
    /// They count without being read.
    pub(super) trusted: bool,
    words: Vec<AtomicU64>,
}

impl SharedBlocks {
    /// None yet, of a backup with so many blocks.
    pub(super) fn new(trusted: bool, blocks: u64) -> Self {
        let words = (0..blocks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self { trusted, words }
    }

    fn add(&self, BlockNumber(block): BlockNumber) {
        if let Some(word) = self.word(block) {
            word.fetch_or(1 << (block % 64), Ordering::Relaxed);
        }
    }

    pub(super) fn contains(&self, BlockNumber(block): BlockNumber) -> bool {
        self.word(block).is_some_and(|word| word.load(Ordering::Relaxed) & (1 << (block % 64)) != 0)
    }

    fn word(&self, block: u64) -> Option<&AtomicU64> {
        usize::try_from(block / 64).ok().and_then(|word| self.words.get(word))
    }
}

/// Shares all that is missing and can be shared, on every core, and proves nothing.
pub(super) fn share_all(blocks: &SharedBlocks, shared: &Shared<'_>) -> Result<()> {
    let units = Mutex::new(all_units(shared.backup));
    let next = || units.lock().unwrap_or_else(PoisonError::into_inner).next().transpose();
    let work = || -> Result<()> {
        let (mut sources, mut records) = (SourceFiles::new(), Vec::new());
        while let Some(unit) = next()? {
            shared.go_on()?;
            let started = Instant::now();
            let mut missing = Vec::new();
            for span in unit {
                records.clear();
                let first = BlockNumber(span.file.first_block.0 + span.first);
                shared.backup.manifest.blocks(first, span.count, &mut records)?;
                missing.extend((span.first..).zip(&records).filter_map(|(index, record)| {
                    let bytes = shared.backup.info.block_bytes.block_bytes_at(span.file.bytes, index);
                    let block = Missing { file: Arc::clone(&span.file), index, bytes, record: *record };
                    (!shared.map.is_present(block.number())).then_some(block)
                }));
            }
            let (runs, _) = plan::shareable(missing);
            share(runs, &mut sources, blocks, shared)?;
            shared.waited(Stage::Disk, started.elapsed());
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        for _ in 0..shared.shape.workers {
            scope.spawn(|| shared.failure.watch(work));
        }
    });
    if shared.failure.is_set() {
        shared.failure.take()?;
        return Err(Error::Cancelled);
    }
    Ok(())
}

/// Shares `runs`, and notes their blocks, but for those that the file system refuses.
fn share(runs: Vec<Run>, sources: &mut SourceFiles, blocks: &SharedBlocks, shared: &Shared<'_>) -> Result<()> {
    // Runs come file by file, so one open file is enough.
    let mut last: Option<(Arc<FileRecord>, Arc<OpenFile>)> = None;
    for run in runs {
        let Some(first) = run.blocks.first() else { continue };
        let target = match &last {
            Some((file, open)) if Arc::ptr_eq(file, &first.file) => Arc::clone(open),
            _ => {
                finish(last.take(), shared)?;
                shared.disk.open(shared.roots.place(&first.file.path)?, Open::Write)?
            }
        };
        let pack = sources.file(&shared.source, &From::Pack(run.pack), shared.disk)?;
        let offset = first.index * shared.backup.info.block_bytes.bytes() as u64;
        last = Some((Arc::clone(&first.file), Arc::clone(&target)));
        match shared.disk.share(&pack, run.offset, &target, offset, run.bytes)? {
            Sharing::Done => run.blocks.iter().for_each(|block| blocks.add(block.number())),
            Sharing::Refused(why) => shared.note_unshared(why),
        }
    }
    finish(last, shared)
}

/// Gives a file its modification time back, which sharing has changed.
fn finish(done: Option<(Arc<FileRecord>, Arc<OpenFile>)>, shared: &Shared<'_>) -> Result<()> {
    done.map_or(Ok(()), |(file, open)| shared.disk.set_modified(&open, file.modified))
}

/// Whether files in `directory`, which is there, could share blocks with the packs of `backup`. Leaves nothing behind.
pub fn can_share_with(backup: &Backup, directory: &Path) -> Result<Sharing> {
    let store = backup.cluster.repository().store();
    let packs = keys::packs(backup.cluster.name());
    let no_file = || Error::NotFound("a pack that is a file of this machine".to_owned());
    // A store elsewhere need not be asked which packs it has.
    store.local_path(&packs).ok_or_else(no_file)?;
    let listed = store.list(&packs)?.into_iter().map(|entry| store.local_path(&entry.key));
    let packs = listed.collect::<Option<Vec<_>>>().unwrap_or_default();
    if packs.iter().any(|pack| pack.is_symlink()) {
        return Ok(Sharing::Refused("a pack of the repository is a symbolic link, and is read through a mount only"));
    }
    let is_whole = |pack: &&PathBuf| pack.metadata().is_ok_and(|found| found.len() >= DIRECT_BYTES as u64);
    match packs.iter().find(is_whole) {
        Some(pack) => can_share(pack, DIRECT_BYTES as u64, directory),
        None => Err(no_file()),
    }
}
