//! Where missing blocks come from: the files of a mount, or the packs themselves, on this machine or on another.
//!
//! All become reads into one buffer. What a mount gives was verified by its server, which hashed it on the way;
//! what comes from packs is verified here.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::layout::{Layout, Roots};
use super::plan::{self, From, Job, JobLimits, Missing, Piece, Read};
use crate::blocks::{Damage, Scratch, decode_verified};
use crate::checksum;
use crate::format::file::FileRecord;
use crate::io::disk::Part;
use crate::io::{Disk, Open, OpenFile, Root};
use crate::repository::{Backup, keys};
use crate::store::Store;
use crate::units::{ClusterName, PackId};
use crate::{Error, Result};

/// Where blocks are read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A mounted backup: `data/` and `tablespaces/<oid>/` below this directory. The caller has made sure that it is the
    /// mount of this very backup.
    Mount(PathBuf),
    /// The repository's packs.
    Blocks,
    /// The same, but files share raw blocks with the packs, where their file system can: nothing of these is copied.
    Reflink {
        /// They are not even read: what is in the packs is believed.
        trusted: bool,
    },
}

/// A source, open; shared by the workers.
pub(super) enum OpenSource {
    /// The directories of a mount.
    Mount(Roots),
    /// The directory of the packs.
    Packs(Root, ClusterName),
    /// A store whose packs are no files of this machine: each read is a call, which [`super::opener`] waits for.
    Store(Arc<dyn Store>, ClusterName),
}

impl OpenSource {
    pub(super) fn open(source: &Source, backup: &Backup, layout: &Layout, disk: &dyn Disk) -> Result<Self> {
        match source {
            Source::Mount(mount) => Ok(Self::Mount(Roots::open(&layout_of_mount(mount, layout), disk)?)),
            Source::Blocks | Source::Reflink { .. } => {
                let key = keys::packs(backup.cluster.name());
                let store = backup.cluster.repository().store();
                let cluster = backup.cluster.name().clone();
                Ok(match store.local_path(&key) {
                    Some(path) => Self::Packs(Root::open(&path)?, cluster),
                    None => Self::Store(Arc::clone(store), cluster),
                })
            }
        }
    }

    /// True where the bytes that arrive are the files' own, verified.
    pub(super) fn gives_files(&self) -> bool {
        matches!(self, Self::Mount(_))
    }

    /// True where others wait for the source in a worker's place: for its files to open, or for its bytes.
    pub(super) fn is_waited_for(&self) -> bool {
        matches!(self, Self::Mount(_) | Self::Store(..))
    }

    /// True where bytes are fetched by [`Self::fetch`], and no file is opened.
    pub(super) fn is_fetched(&self) -> bool {
        matches!(self, Self::Store(..))
    }

    /// Fills a buffer with all that a job reads: runs of one pack that follow each other are one call.
    pub(super) fn fetch(&self, reads: &[Read], buffer: &mut [u8]) -> Result<()> {
        let Self::Store(store, cluster) = self else {
            return Err(Error::Refused("a plan for another source".to_owned()));
        };
        let (mut rest, mut cut) = (buffer, 0);
        for run in reads.chunk_by(|one, next| pack_of(one).is_some() && pack_of(one) == pack_of(next)) {
            let pack = run.first().and_then(pack_of);
            let pack = pack.ok_or_else(|| Error::Refused("a plan for another source".to_owned()))?;
            let mut wanted = Vec::with_capacity(run.len());
            for read in run {
                // Places in the buffer are given out in the order of the reads.
                let ahead = std::mem::take(&mut rest).get_mut(read.at.wrapping_sub(cut)..);
                let parts = ahead.and_then(|ahead| ahead.split_at_mut_checked(read.bytes));
                let (out, behind) = parts.ok_or_else(|| Error::Refused("reads that overlap".to_owned()))?;
                (rest, cut) = (behind, read.at + read.bytes);
                wanted.push((read.offset, out));
            }
            store.read_ranges(&keys::pack(cluster, pack), &mut wanted)?;
        }
        Ok(())
    }

    pub(super) fn jobs(&self, missing: Vec<Missing>, backup: &Backup, limits: JobLimits) -> Result<Vec<Job>> {
        match self {
            Self::Mount(_) => Ok(plan::from_mount(missing, backup.info.block_bytes, limits)),
            Self::Packs(..) | Self::Store(..) => plan::from_packs(missing, limits),
        }
    }

    fn open_file(&self, from: &From, disk: &dyn Disk) -> Result<Arc<OpenFile>> {
        match (self, from) {
            (Self::Mount(roots), From::File(file)) => disk.open(roots.place(&file.path)?, Open::Read),
            (Self::Packs(root, cluster), From::Pack(pack)) => {
                let key = keys::pack(cluster, *pack);
                let place = root.at(Path::new(&key).file_name().unwrap_or_default());
                match disk.open(place, Open::Read) {
                    Err(Error::Io { source, path, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                        Err(Error::corrupt(path, "the file is missing"))
                    }
                    opened => opened,
                }
            }
            // The plan is made for the source that it is given to.
            _ => Err(Error::Refused("a plan for another source".to_owned())),
        }
    }
}

fn pack_of(read: &Read) -> Option<PackId> {
    match read.from {
        From::Pack(pack) => Some(pack),
        From::File(_) => None,
    }
}

/// The mount shows tablespaces by OID, beside the data directory.
fn layout_of_mount(mount: &Path, target: &Layout) -> Layout {
    let tablespaces = mount.join("tablespaces");
    let tablespaces = target.tablespaces.keys().map(|oid| (*oid, tablespaces.join(oid.to_string()))).collect();
    Layout { data: mount.join("data"), tablespaces, wal: None }
}

/// One worker's open source files: packs stay open, a mount's files until the next.
pub(super) struct SourceFiles {
    packs: BTreeMap<PackId, Arc<OpenFile>>,
    last: Option<(Arc<FileRecord>, Arc<OpenFile>)>,
}

/// Packs that a worker keeps open: a restore reads few at a time, in order.
pub(super) const PACKS_OPEN: usize = 32;

impl SourceFiles {
    pub(super) fn new() -> Self {
        Self { packs: BTreeMap::new(), last: None }
    }

    /// The reads of a job as the disk takes them, if their files are open.
    pub(super) fn parts_if_open(&self, reads: &[Read]) -> Option<Vec<Part>> {
        let parts = reads.iter().map(|read| {
            let file = match (&read.from, &self.last) {
                (From::Pack(pack), _) => self.packs.get(pack)?,
                (From::File(file), Some((last, open))) if Arc::ptr_eq(last, file) => open,
                (From::File(_), _) => return None,
            };
            Some(part(file, read))
        });
        parts.collect()
    }

    /// Remembers the last file of a job that was opened elsewhere: the next job begins with it, more often than not.
    pub(super) fn remember(&mut self, reads: &[Read], parts: &[Part]) {
        if let (Some(Read { from: From::File(file), .. }), Some(part)) = (reads.last(), parts.last()) {
            self.last = Some((Arc::clone(file), Arc::clone(&part.file)));
        }
    }

    /// The reads of a job as the disk takes them; opens what is not open.
    pub(super) fn parts(&mut self, source: &OpenSource, reads: &[Read], disk: &dyn Disk) -> Result<Vec<Part>> {
        reads.iter().map(|read| Ok(part(&self.file(source, &read.from, disk)?, read))).collect()
    }

    /// The file, which stays open for a while.
    pub(super) fn file(&mut self, source: &OpenSource, from: &From, disk: &dyn Disk) -> Result<Arc<OpenFile>> {
        match from {
            From::Pack(pack) => {
                if let Some(open) = self.packs.get(pack) {
                    return Ok(Arc::clone(open));
                }
                if self.packs.len() >= PACKS_OPEN {
                    self.packs.clear();
                }
                let open = source.open_file(from, disk)?;
                self.packs.insert(*pack, Arc::clone(&open));
                Ok(open)
            }
            From::File(file) => {
                if let Some((last, open)) = &self.last
                    && Arc::ptr_eq(last, file)
                {
                    return Ok(Arc::clone(open));
                }
                let open = source.open_file(from, disk)?;
                self.last = Some((Arc::clone(file), Arc::clone(&open)));
                Ok(open)
            }
        }
    }
}

fn part(file: &Arc<OpenFile>, read: &Read) -> Part {
    Part { file: Arc::clone(file), offset: read.offset, at: read.at, bytes: read.bytes }
}

/// Reads the blocks of a job again, each by itself, for the error that names pack and offset: a mount can only say
/// EIO, and a long read only where it began. The first error stays, if there is none this time.
pub(super) fn explain(failure: Error, job: &Job, backup: &Backup) -> Error {
    if matches!(failure, Error::Cancelled) {
        return failure;
    }
    let (blocks, mut scratch) = (backup.blocks(), Scratch::default());
    let mut out = vec![0; backup.info.block_bytes.bytes()];
    for Missing { file, index, bytes, .. } in job.pieces.iter().map(|piece| &piece.block) {
        let offset = index * backup.info.block_bytes.bytes() as u64;
        if let Err(precise) = blocks.read_range(file, offset, &mut out[..*bytes], &mut scratch) {
            return precise;
        }
    }
    failure
}

/// Decodes and verifies one piece of a job into `out`.
pub(super) fn decode_piece(
    piece: &Piece,
    stored: &[u8],
    out: &mut [u8],
    scratch: &mut Scratch,
    backup: &Backup,
) -> Result<()> {
    let (base, patch) = (&stored[piece.base.clone()], &stored[piece.patch.clone()]);
    match decode_verified(&piece.block.record, base, patch, out, scratch) {
        Ok(_) => Ok(()),
        Err(damage) => Err(damaged(piece, damage, backup)),
    }
}

/// Verifies a raw piece where it lies.
pub(super) fn verify_piece(piece: &Piece, stored: &[u8], backup: &Backup) -> Result<()> {
    let found = &stored[piece.base.clone()];
    let detail = if found.len() == piece.block.bytes {
        match checksum::verify(found, &piece.block.record.hash) {
            Ok(_) => return Ok(()),
            Err(mismatch) => mismatch.to_string(),
        }
    } else {
        format!("{} raw bytes are stored for {}", found.len(), piece.block.bytes)
    };
    Err(damaged(piece, Damage { in_patch: false, detail }, backup))
}

fn damaged(piece: &Piece, damage: Damage, backup: &Backup) -> Error {
    backup.blocks().damaged(&piece.block.record, damage, &piece.block.file.path, piece.block.index)
}
