//! Blocks that a target's files share with the repository's packs, instead of a copy.
//!
//! Sharing comes before the proof, as the plan has the runs and the proof has only what a buffer holds. The order of
//! durability stays: a block's bit is set when its bytes have been read from the pack and their hash was right, and gets on
//! disk behind a sync. What is shared and not proven is one more block that is missing.
//!
//! What the file system refuses to share is copied like any other block.

use std::path::Path;
use std::sync::Arc;

use super::fill::Shared;
use super::plan::{From, Missing, Run};
use super::source::SourceFiles;
use crate::format::file::FileRecord;
use crate::io::{Open, OpenFile, Sharing, can_share};
use crate::repository::{Backup, keys};
use crate::units::DIRECT_BYTES;
use crate::{Error, Result};

/// Shares `runs`; the blocks that are shared now, and those that are left to copy, `others` among them.
pub(super) fn share(
    runs: Vec<Run>,
    others: Vec<Missing>,
    sources: &mut SourceFiles,
    shared: &Shared<'_>,
) -> Result<(Vec<Missing>, Vec<Missing>)> {
    let (mut there, mut copied) = (Vec::new(), others);
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
            Sharing::Done => {
                shared.count_shared(run.bytes);
                there.extend(run.blocks);
            }
            Sharing::Refused(why) => {
                shared.note_unshared(why);
                copied.extend(run.blocks);
            }
        }
    }
    finish(last, shared)?;
    Ok((there, copied))
}

/// Gives a file its modification time back, which sharing has changed.
fn finish(done: Option<(Arc<FileRecord>, Arc<OpenFile>)>, shared: &Shared<'_>) -> Result<()> {
    done.map_or(Ok(()), |(file, open)| shared.disk.set_modified(&open, file.modified))
}

/// Whether files in `directory`, which is there, could share blocks with the packs of `backup`. Leaves nothing behind.
pub fn can_share_with(backup: &Backup, directory: &Path) -> Result<Sharing> {
    let store = backup.cluster.repository().store();
    let packs = keys::packs(backup.cluster.name());
    let pack = store.list(&packs)?.into_iter().find(|entry| entry.bytes >= DIRECT_BYTES as u64);
    let Some(pack) = pack.and_then(|entry| store.local_path(&entry.key)) else {
        return Err(Error::NotFound("a pack that is a file of this machine".to_owned()));
    };
    can_share(&pack, DIRECT_BYTES as u64, directory)
}
