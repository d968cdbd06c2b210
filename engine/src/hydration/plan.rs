//! What to read and where it goes: pure, streaming, in the order of the files.
//!
//! A backup's workers lay the blocks of a file range beside each other, so the order of the files is the order of
//! the packs, and one pass over the manifest in path order reads each pack front to back. Sorting by pack would
//! hold the whole plan in memory and separate a patch from its base; here memory is one unit per worker.
//!
//! Where files can share blocks with packs ([`shareable`]), raw blocks that lie in a pack as they do in their file become
//! one [`Run`], however long.
//!
//! [`Units`] cuts the files into units, which workers take one at a time. A unit's missing blocks become [`Job`]s: what one
//! buffer holds, as few long reads as they need, and the pieces to make of it.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use crate::codec::Codec;
use crate::format::block::{BlockRecord, Content, Extent};
use crate::format::file::{FileKind, FileRecord};
use crate::units::{BlockNumber, BlockSize, DIRECT_BYTES, PackId};
use crate::{Error, Result};

/// Content of a unit: small enough that workers end together, large enough that a file is opened seldom.
const UNIT_BYTES: u64 = 32 << 20;
/// Files of a unit.
const UNIT_FILES: usize = 256;
/// Runs in a pack closer than this are read as one: what a disk reads in the time of another request.
const GAP_BYTES: u64 = 64 << 10;
/// How far back a job looks for a read to extend: bases and patches of a few generations.
const READS_LOOKED_AT: usize = 8;

/// Consecutive blocks of one file.
#[derive(Clone, Debug)]
pub struct Span {
    /// The file.
    pub file: Arc<FileRecord>,
    /// The first, counted within the file.
    pub first: u64,
    /// How many; none for an empty file.
    pub count: u64,
}

/// Cuts the regular files of a backup into units.
pub struct Units<F> {
    files: F,
    block_size: BlockSize,
    /// Paths that are none of the copier's business.
    left_out: fn(&str) -> bool,
    rest: Option<Span>,
}

impl<F: Iterator<Item = Result<FileRecord>>> Units<F> {
    /// Units of `files`, without those that `left_out` names.
    pub fn new(files: F, block_size: BlockSize, left_out: fn(&str) -> bool) -> Self {
        Self { files, block_size, left_out, rest: None }
    }

    fn next_span(&mut self) -> Option<Result<Span>> {
        if let Some(rest) = self.rest.take() {
            return Some(Ok(rest));
        }
        loop {
            let file = match self.files.next()? {
                Ok(file) => file,
                Err(cause) => return Some(Err(cause)),
            };
            if file.kind == FileKind::Regular && file.bytes > 0 && !(self.left_out)(&file.path) {
                let count = self.block_size.blocks_of(file.bytes);
                return Some(Ok(Span { file: Arc::new(file), first: 0, count }));
            }
        }
    }
}

impl<F: Iterator<Item = Result<FileRecord>>> Iterator for Units<F> {
    type Item = Result<Vec<Span>>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut unit = Vec::new();
        let mut room = UNIT_BYTES / self.block_size.bytes() as u64;
        while room > 0 && unit.len() < UNIT_FILES {
            match self.next_span() {
                None => break,
                Some(Err(cause)) => return Some(Err(cause)),
                Some(Ok(mut span)) => {
                    if span.count > room {
                        let rest = Span { first: span.first + room, count: span.count - room, ..span.clone() };
                        self.rest = Some(rest);
                        span.count = room;
                    }
                    room -= span.count;
                    unit.push(span);
                }
            }
        }
        (!unit.is_empty()).then_some(Ok(unit))
    }
}

/// A block that is not present yet, with content that has to be read.
#[derive(Clone, Debug)]
pub struct Missing {
    /// Its file.
    pub file: Arc<FileRecord>,
    /// Its place in the file.
    pub index: u64,
    /// Its length.
    pub bytes: usize,
    /// Its record.
    pub record: BlockRecord,
}

impl Missing {
    /// Its place in the manifest.
    pub fn number(&self) -> BlockNumber {
        BlockNumber(self.file.first_block.0 + self.index)
    }
}

/// Where a read comes from.
#[derive(Clone, Debug)]
pub enum From {
    /// A pack.
    Pack(PackId),
    /// A file of the mount.
    File(Arc<FileRecord>),
}

/// One run of bytes to read.
#[derive(Clone, Debug)]
pub struct Read {
    /// From where.
    pub from: From,
    /// First byte there.
    pub offset: u64,
    /// First byte in the buffer, aligned.
    pub at: usize,
    /// How many; the buffer has room up to the next alignment.
    pub bytes: usize,
}

/// One block of a job.
#[derive(Clone, Debug)]
pub struct Piece {
    /// The block.
    pub block: Missing,
    /// Where the buffer has its bytes: as stored (the base, for a patched block), or plain from a mount.
    pub base: Range<usize>,
    /// Where the buffer has its patch.
    pub patch: Range<usize>,
}

/// What one buffer holds.
#[derive(Clone, Debug, Default)]
pub struct Job {
    /// What to read into it.
    pub reads: Vec<Read>,
    /// What to make of it, in the order of the files.
    pub pieces: Vec<Piece>,
    /// The pieces are in their files already, which share them with the pack: they are only to be proven.
    pub is_shared: bool,
}

impl Job {
    /// Every piece lies in the buffer as it will in its file, at an aligned place: nothing to decode or to copy.
    pub fn is_in_place(&self) -> bool {
        self.pieces.iter().all(|piece| {
            let raw = matches!(piece.block.record.content, Content::Stored { codec: Codec::Raw, .. });
            raw && piece.base.start.is_multiple_of(DIRECT_BYTES)
        })
    }
}

/// Consecutive blocks of a file that lie in one pack in the same order, byte for byte.
#[derive(Clone, Debug)]
pub struct Run {
    /// The pack.
    pub pack: PackId,
    /// The first byte there.
    pub offset: u64,
    /// All of them together.
    pub bytes: u64,
    /// The blocks.
    pub blocks: Vec<Missing>,
}

/// Sorts blocks into those that their files can share with a pack, and the others, in their order: compressed and patched
/// ones, and the end of a file that is no whole number of 4 KiB.
pub fn shareable(missing: Vec<Missing>) -> (Vec<Run>, Vec<Missing>) {
    let (mut runs, mut others) = (Vec::<Run>::new(), Vec::new());
    for block in missing {
        let at = match block.record.content {
            Content::Stored { at, codec: Codec::Raw }
                if at.stored as usize == block.bytes && block.bytes.is_multiple_of(DIRECT_BYTES) =>
            {
                at
            }
            _ => {
                others.push(block);
                continue;
            }
        };
        let follows = |run: &&mut Run| {
            let last = run.blocks.last();
            run.pack == at.pack
                && run.offset + run.bytes == u64::from(at.offset)
                && last.is_some_and(|last| Arc::ptr_eq(&last.file, &block.file) && last.index + 1 == block.index)
        };
        match runs.last_mut().filter(follows) {
            Some(run) => {
                run.bytes += u64::from(at.stored);
                run.blocks.push(block);
            }
            None => runs.push(Run {
                pack: at.pack,
                offset: u64::from(at.offset),
                bytes: u64::from(at.stored),
                blocks: vec![block],
            }),
        }
    }
    (runs, others)
}

/// The limits of a job.
#[derive(Clone, Copy, Debug)]
pub struct JobLimits {
    /// Bytes of a buffer.
    pub buffer_bytes: usize,
    /// Files that a job may touch, and so keep open; as many packs, but two at least, as a patched block has.
    pub files: usize,
}

/// The jobs that read `missing` from packs.
pub fn from_packs(missing: Vec<Missing>, limits: JobLimits) -> Result<Vec<Job>> {
    let mut jobs = Vec::new();
    let mut draft = PackDraft::new(limits);
    for block in missing {
        if !draft.add(&block)? {
            jobs.push(draft.finish());
            draft = PackDraft::new(limits);
            if !draft.add(&block)? {
                let detail = format!("block {} of {} needs more than a buffer", block.index, block.file.path);
                return Err(Error::Refused(detail));
            }
        }
    }
    if !draft.blocks.is_empty() {
        jobs.push(draft.finish());
    }
    Ok(jobs)
}

/// The jobs that read `missing` from files: those of a mount, or the target's own.
pub fn from_mount(missing: Vec<Missing>, block_size: BlockSize, limits: JobLimits) -> Vec<Job> {
    let mut jobs = Vec::new();
    let mut job = Job::default();
    let (mut used, mut files) = (0, FileCount::new(limits.files));
    for block in missing {
        let room = block.bytes.next_multiple_of(DIRECT_BYTES);
        if used + room > limits.buffer_bytes || !files.admits(&block.file) {
            jobs.push(std::mem::take(&mut job));
            (used, files) = (0, FileCount::new(limits.files));
        }
        files.count(&block.file);
        let offset = block.index * block_size.bytes() as u64;
        match job.reads.last_mut() {
            Some(Read { from: From::File(file), offset: start, bytes, .. })
                if Arc::ptr_eq(file, &block.file) && *start + *bytes as u64 == offset =>
            {
                *bytes += block.bytes;
            }
            _ => {
                let from = From::File(Arc::clone(&block.file));
                job.reads.push(Read { from, offset, at: used, bytes: block.bytes });
            }
        }
        job.pieces.push(Piece { base: used..used + block.bytes, patch: 0..0, block });
        used += room;
    }
    if !job.pieces.is_empty() {
        jobs.push(job);
    }
    jobs
}

/// Counts the files of a job, whose blocks come file by file.
struct FileCount {
    limit: usize,
    files: usize,
    last: Option<Arc<FileRecord>>,
}

impl FileCount {
    fn new(limit: usize) -> Self {
        Self { limit: limit.max(1), files: 0, last: None }
    }

    fn admits(&self, file: &Arc<FileRecord>) -> bool {
        self.files < self.limit || self.last.as_ref().is_some_and(|last| Arc::ptr_eq(last, file))
    }

    fn count(&mut self, file: &Arc<FileRecord>) {
        if !self.last.as_ref().is_some_and(|last| Arc::ptr_eq(last, file)) {
            self.files += 1;
            self.last = Some(Arc::clone(file));
        }
    }
}

/// A job that still takes blocks: reads grow, so places in the buffer are given out at the end.
struct PackDraft {
    limits: JobLimits,
    reads: Vec<PackRead>,
    /// Sum of the aligned lengths of the reads.
    used: u64,
    files: FileCount,
    blocks: Vec<(Missing, Stored, Option<Stored>)>,
}

/// Bytes `start..end` of a pack, aligned at the start.
#[derive(Clone, Copy)]
struct PackRead {
    pack: PackId,
    start: u64,
    end: u64,
}

/// A stored run within one of the draft's reads.
#[derive(Clone, Copy)]
struct Stored {
    read: usize,
    extent: Extent,
}

impl PackDraft {
    fn new(limits: JobLimits) -> Self {
        Self { limits, reads: Vec::new(), used: 0, files: FileCount::new(limits.files), blocks: Vec::new() }
    }

    /// Adds a block; false, and nothing changed, if the buffer has no room for it.
    fn add(&mut self, block: &Missing) -> Result<bool> {
        let (base, patch) = match block.record.content {
            Content::Zero => return Err(Error::Refused("a zero block has nothing to read".to_owned())),
            Content::Stored { at, .. } => (at, None),
            Content::Patched { base, patch, .. } => (base, Some(patch)),
        };
        let before = (self.reads.clone(), self.used);
        let base = self.cover(base);
        let patch = patch.map(|patch| self.cover(patch));
        let full = self.used > self.limits.buffer_bytes as u64 || self.packs() > self.limits.files.max(2);
        if full || !self.files.admits(&block.file) {
            (self.reads, self.used) = before;
            return Ok(false);
        }
        self.files.count(&block.file);
        self.blocks.push((block.clone(), base, patch));
        Ok(true)
    }

    /// How many packs the reads are of.
    fn packs(&self) -> usize {
        self.reads.iter().map(|read| read.pack).collect::<BTreeSet<_>>().len()
    }

    /// Extends a read to contain `extent`, or begins one.
    fn cover(&mut self, extent: Extent) -> Stored {
        let start = u64::from(extent.offset);
        let end = start + u64::from(extent.stored);
        let near = |read: &PackRead| {
            read.pack == extent.pack && start >= read.start && start <= read.end.saturating_add(GAP_BYTES)
        };
        let from = self.reads.len().saturating_sub(READS_LOOKED_AT);
        let index = match self.reads[from..].iter().position(near) {
            Some(place) => from + place,
            None => {
                let start = start - start % DIRECT_BYTES as u64;
                self.reads.push(PackRead { pack: extent.pack, start, end: start });
                self.reads.len() - 1
            }
        };
        let read = &mut self.reads[index];
        let before = aligned_bytes(read);
        read.end = read.end.max(end);
        self.used += aligned_bytes(read) - before;
        Stored { read: index, extent }
    }

    fn finish(self) -> Job {
        let mut at = 0;
        let reads: Vec<_> = self
            .reads
            .iter()
            .map(|read| {
                let bytes = in_memory(read.end - read.start);
                let placed = Read { from: From::Pack(read.pack), offset: read.start, at, bytes };
                at += bytes.next_multiple_of(DIRECT_BYTES);
                placed
            })
            .collect();
        let place = |run: Stored| {
            let read = &reads[run.read];
            let start = read.at + in_memory(u64::from(run.extent.offset) - read.offset);
            start..start + run.extent.stored as usize
        };
        let pieces = self
            .blocks
            .into_iter()
            .map(|(block, base, patch)| Piece { block, base: place(base), patch: patch.map_or(0..0, place) })
            .collect();
        Job { reads, pieces, is_shared: false }
    }
}

/// A length within a buffer, as `add` has made sure of.
fn in_memory(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

fn aligned_bytes(read: &PackRead) -> u64 {
    (read.end - read.start).next_multiple_of(DIRECT_BYTES as u64)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;
    use crate::checksum::Hash;

    const LIMITS: JobLimits = JobLimits { buffer_bytes: 2 << 20, files: 16 };

    fn file(path: &str, bytes: u64, first_block: u64) -> FileRecord {
        FileRecord {
            path: path.to_owned(),
            kind: FileKind::Regular,
            mode: 0o600,
            uid: 0,
            gid: 0,
            modified: 0,
            bytes,
            crc32c: 0,
            first_block: BlockNumber(first_block),
        }
    }

    fn stored(pack: u32, offset: u32, bytes: u32) -> BlockRecord {
        let at = Extent { pack: PackId(pack), offset, stored: bytes };
        BlockRecord { hash: Hash([0; 32]), content: Content::Stored { at, codec: Codec::Lz4 } }
    }

    fn missing(file: &Arc<FileRecord>, index: u64, record: BlockRecord) -> Missing {
        let bytes = BlockSize::DEFAULT.block_bytes_at(file.bytes, index);
        Missing { file: Arc::clone(file), index, bytes, record }
    }

    #[test]
    fn every_block_of_every_file_is_in_one_unit() {
        let size = BlockSize::DEFAULT.bytes() as u64;
        let sizes = [0, 1, size, size + 1, 1000 * size, 3];
        let files = sizes.iter().enumerate().map(|(number, bytes)| Ok(file(&number.to_string(), *bytes, 0)));
        let mut next = [0; 6];
        for unit in Units::new(files, BlockSize::DEFAULT, |path| path == "3") {
            let unit = unit.unwrap();
            assert!(unit.iter().map(|span| span.count).sum::<u64>() * size <= UNIT_BYTES);
            for span in unit {
                let number: usize = span.file.path.parse().unwrap();
                assert_eq!(span.first, next[number]);
                next[number] += span.count;
            }
        }
        assert_eq!(next, [0, 1, 1, 0, 1000, 1]);
    }

    #[test]
    fn neighbours_in_a_pack_are_one_read_and_a_patch_lies_beside_its_base() {
        let file = Arc::new(file("base/5/1", 4 * 131_072, 0));
        let base = Extent { pack: PackId(1), offset: 105_000, stored: 50_000 };
        let patch = Extent { pack: PackId(7), offset: 4096, stored: 9_000 };
        let patched = BlockRecord {
            hash: Hash([0; 32]),
            content: Content::Patched { base, base_codec: Codec::Lz4, patch, patch_codec: Codec::Raw },
        };
        let blocks = vec![
            missing(&file, 0, stored(1, 5_000, 50_000)),
            missing(&file, 1, stored(1, 55_000, 50_000)),
            missing(&file, 2, patched),
            missing(&file, 3, stored(1, 900_000, 50_000)),
        ];
        let jobs = from_packs(blocks, LIMITS).unwrap();
        let [job] = &jobs[..] else { panic!("{jobs:?}") };
        let reads: Vec<_> = job.reads.iter().map(|read| (read.offset, read.bytes)).collect();
        assert_eq!(reads, [(4096, 150_904), (4096, 9_000), (897_024, 52_976)]);
        assert_eq!(job.pieces[2].base, 100_904..150_904);
        assert_eq!(job.pieces[2].patch, 151_552..160_552);
    }

    #[test]
    fn a_block_that_fits_no_buffer_is_refused() {
        let file = Arc::new(file("a", 131_072, 0));
        assert!(from_packs(vec![missing(&file, 0, stored(1, 0, u32::MAX))], LIMITS).is_err());
    }

    #[test]
    fn small_files_of_a_mount_share_a_buffer_up_to_the_limit_of_open_files() {
        let blocks = (0..40)
            .map(|number| missing(&Arc::new(file(&number.to_string(), 5_000, number)), 0, stored(1, 0, 1)))
            .collect();
        let jobs = from_mount(blocks, BlockSize::DEFAULT, LIMITS);
        assert_eq!(jobs.iter().map(|job| job.pieces.len()).collect::<Vec<_>>(), [16, 16, 8]);
        assert_eq!(jobs[0].reads[1].at, 8192);
    }

    proptest! {
        /// Whatever the records say: each block is in one job, in order; its runs lie inside of its job's reads;
        /// reads are aligned, do not overlap in the buffer and fit into it.
        #[test]
        fn jobs_hold_what_their_pieces_need(extents in prop::collection::vec((0u32..3, 0u32..4_000_000, 1u32..131_072, prop::option::of((0u32..3, 0u32..4_000_000, 1u32..60_000))), 1..200)) {
            let file = Arc::new(file("a", 200 * 131_072, 0));
            let blocks: Vec<_> = extents.iter().enumerate().map(|(index, (pack, offset, bytes, patch))| {
                let at = Extent { pack: PackId(*pack), offset: *offset, stored: *bytes };
                let content = match *patch {
                    None => Content::Stored { at, codec: Codec::Lz4 },
                    Some((pack, offset, stored)) => Content::Patched {
                        base: at,
                        base_codec: Codec::Lz4,
                        patch: Extent { pack: PackId(pack), offset, stored },
                        patch_codec: Codec::Raw,
                    },
                };
                missing(&file, index as u64, BlockRecord { hash: Hash([0; 32]), content })
            }).collect();
            let jobs = from_packs(blocks, LIMITS).unwrap();
            let order: Vec<_> = jobs.iter().flat_map(|job| &job.pieces).map(|piece| piece.block.index).collect();
            prop_assert_eq!(order, (0..extents.len() as u64).collect::<Vec<_>>());
            for job in &jobs {
                let mut end = 0;
                for read in &job.reads {
                    prop_assert_eq!(read.at, end);
                    prop_assert!(read.offset.is_multiple_of(DIRECT_BYTES as u64));
                    end += read.bytes.next_multiple_of(DIRECT_BYTES);
                }
                prop_assert!(end <= LIMITS.buffer_bytes);
                let holds = |place: &Range<usize>, extent: Extent| job.reads.iter().any(|read| {
                    let From::Pack(pack) = read.from else { return false };
                    let inside = read.at <= place.start && place.end <= read.at + read.bytes;
                    pack == extent.pack && inside && read.offset + (place.start - read.at) as u64 == u64::from(extent.offset)
                });
                for piece in &job.pieces {
                    match piece.block.record.content {
                        Content::Stored { at, .. } => prop_assert!(holds(&piece.base, at)),
                        Content::Patched { base, patch, .. } => {
                            prop_assert!(holds(&piece.base, base) && holds(&piece.patch, patch));
                        }
                        Content::Zero => prop_assert!(false),
                    }
                }
            }
        }
    }
}
