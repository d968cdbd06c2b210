//! Block n of file f, verified.
//!
//! A [`Blocks`] knows where the stored runs of one backup, or of one WAL object, lie. It reads neighbouring runs with
//! one request: a [`Window`] holds the bytes of as many runs as lie beside each other, and is filled when the next
//! block needs a run outside of it. Each block is then decoded from the window, straight into the caller's buffer
//! where all of the block is wanted, and its BLAKE3 compared before anybody sees it.
//!
//! Always true: no byte leaves this file without the hash of its block having been right.

use std::sync::Arc;

use crate::checksum::{Verified, verify};
use crate::codec::{Codec, decode, decode_within};
use crate::format::block::{BlockRecord, Content, Extent};
use crate::format::file::FileRecord;
use crate::format::patch::{self, PATCH_BYTES_MAX};
use crate::repository::{Backup, Manifest, keys};
use crate::store::Store;
use crate::units::{BlockNumber, BlockSize, ClusterName, PackId};
use crate::{Error, Result};

/// One request to the store: long enough to hide its latency, short enough to stay in the cache of a core.
const WINDOW_BYTES_MAX: u64 = 1 << 20;
/// Bytes between two runs that are read and thrown away rather than asked for around: a short seek costs as much.
const WINDOW_GAP_BYTES_MAX: u64 = 64 << 10;

const _: () = assert!(BlockSize::MAX.bytes() as u64 <= WINDOW_BYTES_MAX);

/// A reader of blocks; cheap to clone, shared by threads.
#[derive(Clone, Debug)]
pub struct Blocks {
    store: Arc<dyn Store>,
    place: Place,
    block_size: BlockSize,
}

/// Where runs lie, and where the records of a file's blocks come from.
#[derive(Clone, Debug)]
enum Place {
    /// In the packs of a cluster; the manifest knows the records.
    Packs(ClusterName, Manifest),
    /// All in one WAL object, which has the records in its header.
    Object(Arc<str>, Arc<[BlockRecord]>),
}

/// Buffers that a reader keeps between calls, so that nothing is allocated per block.
#[derive(Debug, Default)]
pub struct Scratch {
    base: Window,
    patch: Window,
    /// A patch, decoded.
    patch_pages: Vec<u8>,
    /// A block of which only a part is wanted.
    block: Vec<u8>,
    records: Vec<BlockRecord>,
}

/// Stored bytes that are not the block of their record.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub struct Damage {
    /// The run of the patch is at fault, not the base.
    pub in_patch: bool,
    /// What was expected and what was found.
    pub detail: String,
}

impl Damage {
    fn in_base(cause: impl ToString) -> Self {
        Self { in_patch: false, detail: cause.to_string() }
    }

    fn in_patch(cause: impl ToString) -> Self {
        Self { in_patch: true, detail: cause.to_string() }
    }
}

impl Blocks {
    pub(crate) fn of_backup(backup: &Backup) -> Self {
        let place = Place::Packs(backup.cluster.name().clone(), backup.manifest.clone());
        let store = Arc::clone(backup.cluster.repository().store());
        Self { store, place, block_size: backup.info.block_bytes }
    }

    pub(crate) fn of_object(
        store: Arc<dyn Store>,
        key: &str,
        records: Vec<BlockRecord>,
        block_size: BlockSize,
    ) -> Self {
        Self { store, place: Place::Object(key.into(), records.into()), block_size }
    }

    /// The size of all blocks but the last of a file.
    pub fn block_size(&self) -> BlockSize {
        self.block_size
    }

    /// Reads one block into `out`, which has the block's length.
    pub fn read_block<'out>(
        &self,
        record: &BlockRecord,
        out: &'out mut [u8],
        scratch: &mut Scratch,
    ) -> Result<Verified<&'out mut [u8]>> {
        scratch.base.clear();
        scratch.patch.clear();
        self.decode_from_windows(std::slice::from_ref(record), out, scratch)
            .map_err(|fault| self.error(record, fault, None))
    }

    /// Reads the block stored whole that `record` is, or is a patch of, into `out`, after proving `record`'s own block.
    /// None for a zero block.
    pub(crate) fn read_base(
        &self,
        record: &BlockRecord,
        out: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<Option<(Extent, Codec)>> {
        self.read_block(record, out, scratch)?;
        match record.content {
            Content::Zero => Ok(None),
            Content::Stored { at, codec } => Ok(Some((at, codec))),
            Content::Patched { base, base_codec, .. } => {
                let run = scratch.base.run(&base);
                let decoded = decode(base_codec, run, out).map_err(|error| Fault::Damage(Damage::in_base(error)));
                decoded.map_err(|fault| self.error(record, fault, None))?;
                Ok(Some((base, base_codec)))
            }
        }
    }

    /// Reads bytes of a file: as many as `out` holds or the file has from `offset` on. Every block they come from is
    /// verified whole.
    pub fn read_range(&self, file: &FileRecord, offset: u64, out: &mut [u8], scratch: &mut Scratch) -> Result<usize> {
        let wanted = file.bytes.saturating_sub(offset).min(out.len() as u64);
        if wanted == 0 {
            return Ok(0);
        }
        let block_bytes = self.block_size.bytes() as u64;
        let (first, last) = (offset / block_bytes, (offset + wanted - 1) / block_bytes);
        let mut records = std::mem::take(&mut scratch.records);
        records.clear();
        let found = self.records(file, first, last - first + 1, &mut records);
        scratch.base.clear();
        scratch.patch.clear();
        let read = found.and_then(|()| {
            (first..=last).try_fold(0, |filled, index| {
                let ahead = &records[(index - first) as usize..];
                let bytes = self.block_size.block_bytes_at(file.bytes, index);
                // Only the first block can begin before what is wanted, only the last can end after it.
                let skip = (offset + filled as u64 - index * block_bytes) as usize;
                let room = &mut out[filled..wanted as usize];
                self.read_part(ahead, bytes, skip, room, scratch)
                    .map(|part| filled + part)
                    .map_err(|fault| self.error(&ahead[0], fault, Some((&file.path, index))))
            })
        });
        scratch.records = records;
        read
    }

    /// Reads and proves consecutive blocks of the file `path`, from block `first` on; `bytes_of` gives the length of each.
    /// Tells of every one that is not what its record says, and goes on behind it.
    pub(crate) fn prove(
        &self,
        path: &str,
        first: u64,
        records: &[BlockRecord],
        bytes_of: impl Fn(u64) -> usize,
        scratch: &mut Scratch,
        mut found: impl FnMut(Error),
    ) {
        scratch.base.clear();
        scratch.patch.clear();
        let mut block = std::mem::take(&mut scratch.block);
        for (place, record) in records.iter().enumerate() {
            let index = first + place as u64;
            block.resize(bytes_of(index), 0);
            if let Err(fault) = self.decode_from_windows(&records[place..], &mut block, scratch) {
                found(self.error(record, fault, Some((path, index))));
            }
        }
        scratch.block = block;
    }

    /// The error for a block that the caller read and decoded by itself.
    pub fn damaged(&self, record: &BlockRecord, damage: Damage, path: &str, index: u64) -> Error {
        self.error(record, Fault::Damage(damage), Some((path, index)))
    }

    /// Reads as much of the block `ahead[0]` as fits into `room`, after its first `skip` bytes.
    fn read_part(
        &self,
        ahead: &[BlockRecord],
        bytes: usize,
        skip: usize,
        room: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<usize, Fault> {
        if skip == 0 && room.len() >= bytes {
            self.decode_from_windows(ahead, &mut room[..bytes], scratch)?;
            return Ok(bytes);
        }
        let mut block = std::mem::take(&mut scratch.block);
        block.resize(bytes, 0);
        let part = room.len().min(bytes - skip);
        let decoded = self.decode_from_windows(ahead, &mut block, scratch).map(|whole| {
            room[..part].copy_from_slice(&whole[skip..skip + part]);
        });
        scratch.block = block;
        decoded.map(|()| part)
    }

    /// Decodes `ahead[0]` into `out`; the records after it tell what will be wanted next.
    fn decode_from_windows<'out>(
        &self,
        ahead: &[BlockRecord],
        out: &'out mut [u8],
        scratch: &mut Scratch,
    ) -> Result<Verified<&'out mut [u8]>, Fault> {
        let Scratch { base, patch, patch_pages, .. } = scratch;
        let base = self.window_on(base, ahead.iter().map(base_of))?;
        let patch = self.window_on(patch, ahead.iter().map(patch_of))?;
        decode_runs(&ahead[0], base, patch, out, patch_pages).map_err(Fault::Damage)
    }

    /// The bytes of the first of `runs` (none for a block without such a run), read together with those that lie behind it.
    fn window_on<'window>(
        &self,
        window: &'window mut Window,
        mut runs: impl Iterator<Item = Option<Extent>>,
    ) -> Result<&'window [u8], Fault> {
        let Some(first) = runs.next().flatten() else { return Ok(&[]) };
        if !window.holds(&first) {
            let end = span_end(&first, runs.flatten());
            if end - u64::from(first.offset) > WINDOW_BYTES_MAX {
                // Only a run that is longer than any block can be: nothing is allocated for it.
                return Err(Fault::Oversized(first));
            }
            self.fill(window, first.pack, u64::from(first.offset)..end)?;
        }
        Ok(window.run(&first))
    }

    fn fill(&self, window: &mut Window, pack: PackId, span: std::ops::Range<u64>) -> Result<(), Fault> {
        let bytes = usize::try_from(span.end - span.start).unwrap_or(usize::MAX);
        window.clear();
        window.bytes.resize(bytes, 0);
        self.store.read_at(&self.key(pack), span.start, &mut window.bytes).map_err(Fault::Read)?;
        window.place = Some((pack, span.start));
        Ok(())
    }

    fn records(&self, file: &FileRecord, first: u64, count: u64, out: &mut Vec<BlockRecord>) -> Result<()> {
        match &self.place {
            Place::Packs(_, manifest) => manifest.blocks(BlockNumber(file.first_block.0 + first), count, out),
            Place::Object(_, records) => {
                out.extend(records.iter().skip(first as usize).take(count as usize));
                Ok(())
            }
        }
    }

    fn key(&self, pack: PackId) -> String {
        match &self.place {
            Place::Packs(cluster, _) => keys::pack(cluster, pack),
            Place::Object(key, _) => key.to_string(),
        }
    }

    fn error(&self, record: &BlockRecord, fault: Fault, block: Option<(&str, u64)>) -> Error {
        let run = match (&fault, record.content) {
            (Fault::Damage(Damage { in_patch: true, .. }), Content::Patched { patch, .. }) => Some(patch),
            _ => base_of(record),
        };
        let block = block.map(|(path, index)| format!("block {index} of {path}: ")).unwrap_or_default();
        let place = run.map(|run| (self.store.describe(&self.key(run.pack)), u64::from(run.offset)));
        match (fault, place) {
            (Fault::Read(Error::Io { source, path, .. }), _) if source.kind() == std::io::ErrorKind::NotFound => {
                Error::corrupt(path, format!("{block}the file is missing"))
            }
            (Fault::Read(Error::Corrupt { path, offset, detail }), _) => {
                Error::Corrupt { path, offset, detail: format!("{block}{detail}") }
            }
            (Fault::Read(error), _) => error,
            (Fault::Damage(damage), Some((path, offset))) => {
                Error::corrupt_at(path, offset, format!("{block}{damage}"))
            }
            // A zero block whose hash is not that of zeros: the record itself is at fault.
            (Fault::Damage(damage), None) => {
                Error::corrupt(self.store.describe(&self.records_key()), format!("{block}{damage}"))
            }
            (Fault::Oversized(run), _) => {
                let path = self.store.describe(&self.key(run.pack));
                Error::corrupt_at(path, run.offset.into(), format!("{block}a stored run of {} bytes", run.stored))
            }
        }
    }

    fn records_key(&self) -> String {
        match &self.place {
            Place::Packs(cluster, manifest) => keys::manifest(cluster, &manifest.info().label),
            Place::Object(key, _) => key.to_string(),
        }
    }
}

/// Decodes a block whose stored runs the caller has: `base` is that of [`Content::Stored`]'s `at` or
/// [`Content::Patched`]'s `base`, `patch` that of its `patch`; a run that the block has not is empty. `out` has the
/// block's length.
pub fn decode_verified<'out>(
    record: &BlockRecord,
    base: &[u8],
    patch: &[u8],
    out: &'out mut [u8],
    scratch: &mut Scratch,
) -> Result<Verified<&'out mut [u8]>, Damage> {
    decode_runs(record, base, patch, out, &mut scratch.patch_pages)
}

fn decode_runs<'out>(
    record: &BlockRecord,
    base: &[u8],
    patch: &[u8],
    out: &'out mut [u8],
    patch_pages: &mut Vec<u8>,
) -> Result<Verified<&'out mut [u8]>, Damage> {
    match record.content {
        Content::Zero => out.fill(0),
        Content::Stored { codec, .. } => decode(codec, base, out).map_err(Damage::in_base)?,
        Content::Patched { base_codec, patch_codec, .. } => {
            decode(base_codec, base, out).map_err(Damage::in_base)?;
            patch_pages.resize(PATCH_BYTES_MAX, 0);
            let bytes = decode_within(patch_codec, patch, patch_pages).map_err(Damage::in_patch)?;
            patch::apply(&patch_pages[..bytes], out).map_err(Damage::in_patch)?;
        }
    }
    verify(out, &record.hash).map_err(Damage::in_base)
}

/// The run that holds the block, or most of it.
const fn base_of(record: &BlockRecord) -> Option<Extent> {
    match record.content {
        Content::Zero => None,
        Content::Stored { at, .. } => Some(at),
        Content::Patched { base, .. } => Some(base),
    }
}

const fn patch_of(record: &BlockRecord) -> Option<Extent> {
    match record.content {
        Content::Zero | Content::Stored { .. } => None,
        Content::Patched { patch, .. } => Some(patch),
    }
}

/// Where one request should end that begins with `first` and has `next` to come.
fn span_end(first: &Extent, next: impl Iterator<Item = Extent>) -> u64 {
    let start = u64::from(first.offset);
    let mut end = first.end();
    for run in next {
        let offset = u64::from(run.offset);
        let beside = run.pack == first.pack && offset >= start && offset <= end + WINDOW_GAP_BYTES_MAX;
        if !beside || run.end() - start > WINDOW_BYTES_MAX {
            break;
        }
        end = end.max(run.end());
    }
    end
}

/// Stored bytes of one pack, from some byte on.
#[derive(Debug, Default)]
struct Window {
    place: Option<(PackId, u64)>,
    bytes: Vec<u8>,
}

impl Window {
    fn clear(&mut self) {
        self.place = None;
        self.bytes.clear();
    }

    fn holds(&self, run: &Extent) -> bool {
        self.place.is_some_and(|(pack, start)| {
            pack == run.pack && u64::from(run.offset) >= start && run.end() <= start + self.bytes.len() as u64
        })
    }

    fn run(&self, run: &Extent) -> &[u8] {
        let start = self.place.map_or(0, |(_, start)| start);
        let from = (u64::from(run.offset) - start) as usize;
        &self.bytes[from..from + run.stored as usize]
    }
}

/// Why a block could not be had, before it is known which one it was.
enum Fault {
    Read(Error),
    Damage(Damage),
    Oversized(Extent),
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::checksum::Hash;
    use crate::codec::Compression;
    use crate::store::{Existing, LocalStore};
    use crate::units::PAGE_BYTES;

    const SIZE: BlockSize = BlockSize::MIN;

    /// Blocks of every kind but patches in one object, and the file they make.
    fn sample(directory: &std::path::Path) -> (Blocks, FileRecord, Vec<u8>) {
        let store = LocalStore::new(directory);
        let mut content = Vec::new();
        for (index, page) in (0..SIZE.bytes() * 9 + 777).step_by(PAGE_BYTES).enumerate() {
            let fill = if (4..8).contains(&(index % 12)) { 0 } else { index as u8 };
            content.extend(
                (0..PAGE_BYTES.min(SIZE.bytes() * 9 + 777 - page)).map(|at| fill.wrapping_mul((at / 64) as u8)),
            );
        }
        let (mut stored, mut records) = (vec![0; 4096], Vec::new());
        for (index, raw) in content.chunks(SIZE.bytes()).enumerate() {
            let mut encoded = Vec::new();
            let codec = if index % 3 == 0 { Codec::Raw } else { Compression::Lz4.compress(raw, &mut encoded) };
            let run = if codec == Codec::Raw { raw } else { &encoded };
            let content = if raw.iter().all(|byte| *byte == 0) {
                Content::Zero
            } else {
                let offset = if codec == Codec::Raw { stored.len().next_multiple_of(4096) } else { stored.len() };
                stored.resize(offset, 0);
                stored.extend_from_slice(run);
                let at = Extent { pack: PackId(0), offset: offset as u32, stored: run.len() as u32 };
                Content::Stored { at, codec }
            };
            records.push(BlockRecord { hash: Hash::of(raw), content });
        }
        store.put("object", &stored, Existing::Replace).unwrap();
        let blocks = Blocks::of_object(Arc::new(store), "object", records, SIZE);
        let file = FileRecord {
            path: "base/5/16384".to_owned(),
            kind: crate::format::file::FileKind::Regular,
            mode: 0o600,
            uid: 0,
            gid: 0,
            modified: 0,
            bytes: content.len() as u64,
            crc32c: 0,
            first_block: BlockNumber(0),
        };
        (blocks, file, content)
    }

    #[test]
    fn every_range_of_a_file_reads_as_it_was() {
        let directory = tempfile::tempdir().unwrap();
        let (blocks, file, content) = sample(directory.path());
        let mut scratch = Scratch::default();
        for offset in (0..content.len() + 5000).step_by(4099) {
            for bytes in [1, 4096, SIZE.bytes(), SIZE.bytes() * 3 + 1, content.len() + 1] {
                let mut out = vec![0xEE; bytes];
                let read = blocks.read_range(&file, offset as u64, &mut out, &mut scratch).unwrap();
                let expected = content.get(offset..).unwrap_or_default();
                let expected = &expected[..expected.len().min(bytes)];
                assert!(out[..read] == *expected, "{bytes} bytes at {offset}");
            }
        }
    }

    #[test]
    fn damage_is_named_by_file_and_block_and_place() {
        let directory = tempfile::tempdir().unwrap();
        let (blocks, file, content) = sample(directory.path());
        let path = directory.path().join("object");
        let mut stored = std::fs::read(&path).unwrap();
        stored[4096 + 100] ^= 1;
        std::fs::write(&path, &stored).unwrap();
        let mut out = vec![0; content.len()];
        let error = blocks.read_range(&file, 0, &mut out, &mut Scratch::default()).unwrap_err();
        assert!(matches!(error, Error::Corrupt { offset: Some(4096), .. }), "{error}");
        assert!(error.to_string().contains("block 0 of base/5/16384: expected BLAKE3"), "{error}");
        assert!(blocks.read_range(&file, SIZE.bytes() as u64, &mut out, &mut Scratch::default()).is_ok());
        std::fs::write(&path, &stored[..stored.len() - 1]).unwrap();
        let last = file.bytes - 1;
        let error = blocks.read_range(&file, last, &mut out, &mut Scratch::default()).unwrap_err();
        assert!(error.to_string().contains("block 9 of base/5/16384: the file ends"), "{error}");
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_missing_pack_is_corruption() {
        let directory = tempfile::tempdir().unwrap();
        let (blocks, file, _) = sample(directory.path());
        std::fs::remove_file(directory.path().join("object")).unwrap();
        let error = blocks.read_range(&file, 0, &mut [0; 10], &mut Scratch::default()).unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }), "{error}");
        assert!(error.to_string().ends_with("the file is missing"), "{error}");
    }

    #[test]
    fn a_run_that_no_block_can_have_is_refused_before_memory_is_asked_for() {
        let directory = tempfile::tempdir().unwrap();
        let (blocks, _, _) = sample(directory.path());
        let at = Extent { pack: PackId(0), offset: 4096, stored: u32::MAX - 4096 };
        let record = BlockRecord { hash: Hash([0; 32]), content: Content::Stored { at, codec: Codec::Raw } };
        let (mut out, mut scratch) = ([0; 10], Scratch::default());
        let refused = blocks.read_block(&record, &mut out, &mut scratch);
        assert!(matches!(refused, Err(Error::Corrupt { .. })));
    }

    #[test]
    fn a_request_spans_neighbours_and_small_gaps_only() {
        let run = |pack, offset, stored| Extent { pack: PackId(pack), offset, stored };
        let first = run(1, 4096, 1000);
        assert_eq!(span_end(&first, [].into_iter()), 5096);
        assert_eq!(span_end(&first, [run(1, 5096, 10), run(1, 60_000, 10)].into_iter()), 60_010);
        assert_eq!(span_end(&first, [run(1, 5096 + 65_537, 10)].into_iter()), 5096);
        assert_eq!(span_end(&first, [run(2, 5096, 10)].into_iter()), 5096);
        assert_eq!(span_end(&first, [run(1, 0, 10)].into_iter()), 5096);
        let chain = (0..20).map(|index| run(1, 5096 + index * 60_000, 60_000));
        assert_eq!(span_end(&first, chain), 5096 + 17 * 60_000);
    }

    #[test]
    fn a_patched_block_is_its_base_with_other_pages() {
        let base: Vec<u8> = (0..SIZE.bytes()).map(|at| (at / 100) as u8).collect();
        let mut new = base.clone();
        new[PAGE_BYTES..PAGE_BYTES * 2].fill(0xAB);
        let patch = patch::make(&base, &new).unwrap();
        let run = |offset, bytes: usize| Extent { pack: PackId(1), offset, stored: bytes as u32 };
        let content = Content::Patched {
            base: run(4096, base.len()),
            base_codec: Codec::Raw,
            patch: run(1 << 20, patch.len()),
            patch_codec: Codec::Raw,
        };
        let record = BlockRecord { hash: Hash::of(&new), content };
        let mut out = vec![0; SIZE.bytes()];
        let mut scratch = Scratch::default();
        assert!(*decode_verified(&record, &base, &patch, &mut out, &mut scratch).unwrap() == *new);
        let refused = decode_verified(&record, &base, &patch[..40], &mut out, &mut scratch).unwrap_err();
        assert!(refused.in_patch, "{refused}");
        let refused = decode_verified(&record, &base[1..], &patch, &mut out, &mut scratch).unwrap_err();
        assert!(!refused.in_patch, "{refused}");
    }
}
