//! Block n of file f, verified.
//!
//! A [`Blocks`] knows where the stored runs of one backup, or of one WAL object, lie. It reads neighbouring runs with
//! one request: a [`Window`] holds the bytes of as many runs as lie beside each other, and is filled when the next
//! block needs a run outside of it. Each block is then decoded from the window, straight into the caller's buffer
//! where all of the block is wanted, and its BLAKE3 compared before anybody sees it. Raw blocks that are wanted whole
//! take no window: as many as lie beside each other are read into their place by one request, and hashed there.
//!
//! Where reading takes long after asking, whoever reads in order has the store ask for the blocks that come next
//! ([`ahead`]).
//!
//! What will be read once ([`Blocks::read_range_once`]) is read past the page cache.
//!
//! Always true: no byte leaves this file without the hash of its block having been right.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

mod ahead;
mod direct;
#[cfg(test)]
mod tests;
mod window;

use ahead::Streams;
use direct::DirectFiles;
use window::{WINDOW_BYTES_MAX, Window, span_end};

use crate::checksum::{Verified, verify};
use crate::codec::{Codec, decode, decode_within};
use crate::format::block::{BlockRecord, Content, Extent};
use crate::format::file::FileRecord;
use crate::format::patch::{self, PATCH_BYTES_MAX};
use crate::io::BUFFER_BYTES;
use crate::repository::{Backup, Manifest, keys};
use crate::store::Store;
use crate::units::{BlockNumber, BlockSize, ClusterName, DIRECT_BYTES, PackId};
use crate::{Error, Result};

const _: () = assert!(BlockSize::MAX.bytes() as u64 <= WINDOW_BYTES_MAX);

/// The longest stretch between the runs of a backup that is read together with them.
pub(crate) const GAP_BYTES_MAX: u64 = window::WINDOW_GAP_BYTES_MAX;

const _: () = assert!(GAP_BYTES_MAX >= DIRECT_BYTES as u64);

/// Blocks that are looked up at once to be asked for ahead.
const BLOCKS_AHEAD: u64 = 256;

/// A reader of blocks; cheap to clone, shared by threads.
#[derive(Clone, Debug)]
pub struct Blocks {
    store: Arc<dyn Store>,
    place: Place,
    block_size: BlockSize,
    direct: Arc<DirectFiles>,
    streams: Arc<Mutex<Streams>>,
    /// What is read are files of this machine.
    is_local: bool,
}

/// Whether stored bytes will be wanted again.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    /// Perhaps: the page cache may keep them.
    Again,
    /// No: they are read past the page cache.
    Once,
}

/// Where runs lie, and where the records of a file's blocks come from.
#[derive(Clone, Debug)]
enum Place {
    /// In the packs of a cluster; the manifest knows the records.
    Packs(ClusterName, Manifest),
    /// In the packs of a cluster; only the caller knows the records yet.
    Unfinished(ClusterName),
    /// All in one WAL object, which has the records in its header.
    Object(Arc<str>, Arc<[BlockRecord]>),
}

/// The most that a [`Scratch`] holds, but for a few records: two windows, a patch and a block.
pub const SCRATCH_BYTES_MAX: usize = 2 * BUFFER_BYTES + PATCH_BYTES_MAX + BlockSize::MAX.bytes();

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
    /// Time that reading took, and decoding and hashing, since somebody last asked.
    spent: (Duration, Duration),
}

impl Scratch {
    /// How long reading took, and decoding and hashing, since this was last asked.
    pub(crate) fn take_spent(&mut self) -> (Duration, Duration) {
        std::mem::take(&mut self.spent)
    }
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
        Self::new(store, place, backup.info.block_bytes)
    }

    /// Of a backup that has no manifest yet: single blocks alone, by their records.
    pub(crate) fn of_unfinished(store: Arc<dyn Store>, cluster: &ClusterName, block_size: BlockSize) -> Self {
        Self::new(store, Place::Unfinished(cluster.clone()), block_size)
    }

    pub(crate) fn of_object(
        store: Arc<dyn Store>,
        key: &str,
        records: Vec<BlockRecord>,
        block_size: BlockSize,
    ) -> Self {
        Self::new(store, Place::Object(key.into(), records.into()), block_size)
    }

    fn new(store: Arc<dyn Store>, place: Place, block_size: BlockSize) -> Self {
        let is_local = store.local_path(keys::REPOSITORY).is_some();
        Self { store, place, block_size, direct: Arc::default(), streams: Arc::default(), is_local }
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
        self.decode_from_windows(std::slice::from_ref(record), out, scratch, Wanted::Again)
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
                let run = scratch.base.run(&base).unwrap_or_default();
                let decoded = decode(base_codec, run, out).map_err(|error| Fault::Damage(Damage::in_base(error)));
                decoded.map_err(|fault| self.error(record, fault, None))?;
                Ok(Some((base, base_codec)))
            }
        }
    }

    /// Reads bytes of a file: as many as `out` holds or the file has from `offset` on. Every block they come from is
    /// verified whole.
    pub fn read_range(&self, file: &FileRecord, offset: u64, out: &mut [u8], scratch: &mut Scratch) -> Result<usize> {
        self.read_range_as(Wanted::Again, file, offset, out, scratch)
    }

    /// As [`Blocks::read_range`], for a reader that will not come back: what is read stays in no page cache. `out` had
    /// better begin at a multiple of [`DIRECT_BYTES`].
    pub fn read_range_once(
        &self,
        file: &FileRecord,
        offset: u64,
        out: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<usize> {
        self.read_range_as(Wanted::Once, file, offset, out, scratch)
    }

    fn read_range_as(
        &self,
        wanted: Wanted,
        file: &FileRecord,
        offset: u64,
        out: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<usize> {
        let bytes = file.bytes.saturating_sub(offset).min(out.len() as u64);
        if bytes == 0 {
            return Ok(0);
        }
        // Only files of this machine have a page cache to be read past, and units to begin at.
        let wanted = if self.is_local { wanted } else { Wanted::Again };
        let out = &mut out[..bytes as usize];
        let block_bytes = self.block_size.bytes() as u64;
        let (first, last) = (offset / block_bytes, (offset + bytes - 1) / block_bytes);
        let mut records = std::mem::take(&mut scratch.records);
        records.clear();
        let found = self.records(file, first, last - first + 1, &mut records);
        if found.is_ok() && self.store.ahead_room() > 0 {
            self.ask_ahead(file.first_block.0 + first, &records);
        }
        scratch.base.clear();
        scratch.patch.clear();
        let read = found.and_then(|()| {
            let (mut filled, mut index) = (0, first);
            while index <= last {
                let ahead = &records[(index - first) as usize..];
                // Only the first block can begin before what is wanted, only the last can end after it.
                let skip = (offset + filled as u64 - index * block_bytes) as usize;
                let lengths = (index..).map(|index| self.block_size.block_bytes_at(file.bytes, index));
                let room = &mut out[filled..];
                let raw = if skip == 0 { raw_blocks(ahead, lengths.clone(), room, wanted) } else { 0 };
                let part = if raw > 0 {
                    self.read_raw(&ahead[..raw], lengths, room, wanted)
                } else {
                    let bytes = self.block_size.block_bytes_at(file.bytes, index);
                    self.read_part(ahead, bytes, skip, room, scratch, wanted).map_err(|fault| (0, fault))
                };
                filled += part.map_err(|(place, fault)| {
                    self.error(&ahead[place], fault, Some((&file.path, index + place as u64)))
                })?;
                index += raw.max(1) as u64;
            }
            Ok(filled)
        });
        scratch.records = records;
        read
    }

    /// Has the store ask for what will be read next: the rest of this read, and what lies behind it if it is one of many in
    /// order. Who comes for that meanwhile waits here, rather than to ask for the same.
    fn ask_ahead(&self, first: u64, records: &[BlockRecord]) {
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        let mut next = streams.observe(&(first..first + records.len() as u64));
        let mut now = streams.close_gaps(spans(records)).into_iter();
        // The first is read right away.
        now.next();
        if !now.all(|(pack, span)| self.store.fetch_ahead(&self.key(pack), span)) {
            return;
        }
        let Place::Packs(_, manifest) = &self.place else { return };
        let mut ahead = Vec::new();
        while next.start < next.end {
            let room = self.store.ahead_room().div_ceil(self.block_size.bytes() as u64);
            let count = room.min(next.end - next.start).min(BLOCKS_AHEAD);
            // In pieces, each as long as one request: as its reader will ask for it.
            if room < self.blocks_of_window() && count < next.end - next.start {
                return;
            }
            ahead.clear();
            // What cannot be found, its reader will hear of.
            let Ok(Some(behind)) = manifest.blocks_in_leaf(BlockNumber(next.start), count, &mut ahead) else { return };
            let mut asked = streams.close_gaps(spans(&ahead)).into_iter();
            if !asked.all(|(pack, span)| self.store.fetch_ahead(&self.key(pack), span)) {
                return;
            }
            next.start = streams.push_on(next.start, behind.0);
        }
    }

    fn blocks_of_window(&self) -> u64 {
        WINDOW_BYTES_MAX / self.block_size.bytes() as u64
    }

    /// Reads raw blocks that lie beside each other into their place, by one request, and proves each there. An error
    /// comes with the number of the block that it is about.
    fn read_raw(
        &self,
        blocks: &[BlockRecord],
        lengths: impl Iterator<Item = usize> + Clone,
        out: &mut [u8],
        wanted: Wanted,
    ) -> Result<usize, (usize, Fault)> {
        let Some(first) = blocks.first().and_then(base_of) else { return Ok(0) };
        let bytes = lengths.clone().take(blocks.len()).sum();
        let out = &mut out[..bytes];
        self.read_stored(first.pack, u64::from(first.offset), bytes, out, wanted).map_err(|fault| (0, fault))?;
        let mut rest = &*out;
        for (place, (record, length)) in blocks.iter().zip(lengths).enumerate() {
            let (block, behind) = rest.split_at(length);
            verify(block, &record.hash).map_err(|cause| (place, Fault::Damage(Damage::in_base(cause))))?;
            rest = behind;
        }
        Ok(bytes)
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
            if let Err(fault) = self.decode_from_windows(&records[place..], &mut block, scratch, Wanted::Again) {
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
        wanted: Wanted,
    ) -> Result<usize, Fault> {
        if skip == 0 && room.len() >= bytes {
            self.decode_from_windows(ahead, &mut room[..bytes], scratch, wanted)?;
            return Ok(bytes);
        }
        let mut block = std::mem::take(&mut scratch.block);
        block.resize(bytes, 0);
        let part = room.len().min(bytes - skip);
        let decoded = self.decode_from_windows(ahead, &mut block, scratch, wanted).map(|whole| {
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
        wanted: Wanted,
    ) -> Result<Verified<&'out mut [u8]>, Fault> {
        let Scratch { base, patch, patch_pages, spent, .. } = scratch;
        let began = Instant::now();
        let base = self.window_on(base, ahead.iter().map(base_of), wanted)?;
        let patch = self.window_on(patch, ahead.iter().map(patch_of), wanted)?;
        let read = Instant::now();
        let decoded = decode_runs(&ahead[0], base, patch, out, patch_pages).map_err(Fault::Damage);
        spent.0 += read - began;
        spent.1 += read.elapsed();
        decoded
    }

    /// The bytes of the first of `runs` (none for a block without such a run), read together with those that lie behind it.
    fn window_on<'window>(
        &self,
        window: &'window mut Window,
        mut runs: impl Iterator<Item = Option<Extent>>,
        wanted: Wanted,
    ) -> Result<&'window [u8], Fault> {
        let Some(first) = runs.next().flatten() else { return Ok(&[]) };
        if window.run(&first).is_none() {
            let (start, end) = (u64::from(first.offset), span_end(&first, runs.flatten()));
            if end - start > WINDOW_BYTES_MAX {
                // Only a run that is longer than any block can be: nothing is allocated for it.
                return Err(Fault::Oversized(first));
            }
            let unit = DIRECT_BYTES as u64;
            let whole = match wanted {
                Wanted::Again => start..end,
                Wanted::Once => start - start % unit..end.next_multiple_of(unit),
            };
            let bytes = (end - whole.start) as usize;
            window.fill(first.pack, whole.clone(), |memory| {
                self.read_stored(first.pack, whole.start, bytes, memory, wanted)
            })?;
        }
        Ok(window.run(&first).unwrap_or_default())
    }

    /// Fills the first `bytes` of `out` with what is stored from `offset` on.
    fn read_stored(
        &self,
        pack: PackId,
        offset: u64,
        bytes: usize,
        out: &mut [u8],
        wanted: Wanted,
    ) -> Result<(), Fault> {
        let key = self.key(pack);
        if wanted == Wanted::Once && self.direct.read(&*self.store, &key, offset, bytes, out) {
            return Ok(());
        }
        self.store.read_at(&key, offset, &mut out[..bytes]).map_err(Fault::Read)
    }

    fn records(&self, file: &FileRecord, first: u64, count: u64, out: &mut Vec<BlockRecord>) -> Result<()> {
        match &self.place {
            Place::Packs(_, manifest) => manifest.blocks(BlockNumber(file.first_block.0 + first), count, out),
            Place::Unfinished(_) => Err(Error::Refused(format!("the blocks of {} have no manifest yet", file.path))),
            Place::Object(_, records) => {
                out.extend(records.iter().skip(first as usize).take(count as usize));
                Ok(())
            }
        }
    }

    fn key(&self, pack: PackId) -> String {
        match &self.place {
            Place::Packs(cluster, _) | Place::Unfinished(cluster) => keys::pack(cluster, pack),
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
            Place::Unfinished(cluster) => keys::packs(cluster),
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

/// How many blocks at the beginning of `ahead` are raw, lie beside each other, and are wanted whole: they fit into
/// `room`. What is read once must begin and end at whole units, in the pack and in memory.
fn raw_blocks(ahead: &[BlockRecord], lengths: impl Iterator<Item = usize>, room: &[u8], wanted: Wanted) -> usize {
    if wanted == Wanted::Once && !direct::begins_aligned(room) {
        return 0;
    }
    let (mut count, mut bytes, mut expected) = (0, 0, None);
    for (record, length) in ahead.iter().zip(lengths) {
        let Content::Stored { at, codec: Codec::Raw } = record.content else { break };
        let beside = expected.is_none_or(|(pack, end)| pack == at.pack && end == u64::from(at.offset));
        let whole = at.stored as usize == length && bytes + length <= room.len();
        let aligned = length.is_multiple_of(DIRECT_BYTES) && at.offset.is_multiple_of(DIRECT_BYTES as u32);
        if !beside || !whole || (wanted == Wanted::Once && !aligned) {
            break;
        }
        (count, bytes, expected) = (count + 1, bytes + length, Some((at.pack, at.end())));
    }
    count
}

/// The requests that bring what these records tell of.
fn spans(records: &[BlockRecord]) -> Vec<(PackId, Range<u64>)> {
    let mut all = Vec::new();
    for of in [base_of as fn(&BlockRecord) -> Option<Extent>, patch_of] {
        let mut runs = records.iter().filter_map(of).peekable();
        while let Some(first) = runs.next() {
            let end = span_end(&first, runs.clone());
            while runs
                .peek()
                .is_some_and(|run| run.pack == first.pack && run.offset >= first.offset && run.end() <= end)
            {
                runs.next();
            }
            // A run longer than any block: refused by whoever reads it.
            if end - u64::from(first.offset) <= WINDOW_BYTES_MAX {
                all.push((first.pack, first.offset.into()..end));
            }
        }
    }
    all
}

/// Why a block could not be had, before it is known which one it was.
enum Fault {
    Read(Error),
    Damage(Damage),
    Oversized(Extent),
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Read(error)
    }
}
