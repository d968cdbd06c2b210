//! The index: from a path, a place or a block number to the group that has it.
//!
//! An index chunk lists groups, or index chunks one level below, each with its first path and the counts of all that is
//! under it. Counts, not positions, so that a chunk whose groups did not change is the same bytes in the next backup;
//! a reader adds them up. Chunks are cut as groups are, by the hash of a path.

use std::cmp::Ordering;
use std::ops::Range;

use crate::checksum::Hash;
use crate::format::Malformed;
use crate::format::fields::{count_u16, count_u32, u16_at, u32_at, u64_at};
use crate::format::manifest::{ChunkRef, LEAVES_MAX, VERSION, begin_chunk, expect_length, open_chunk, path, take_text};

const MAGIC: [u8; 4] = *b"pghI";
const LEVEL: usize = VERSION.end;
const ENTRIES: Range<usize> = LEVEL + 2..LEVEL + 6;
const TEXT_BYTES: Range<usize> = ENTRIES.end..ENTRIES.end + 4;
const HEADER_BYTES: usize = TEXT_BYTES.end;

const _: () = assert!(HEADER_BYTES == 16);

/// An entry in the chunk; its first path lies in the text at the chunk's end.
mod entry {
    use std::ops::Range;

    use crate::format::manifest::ChunkRef;

    pub(super) const FILES: Range<usize> = ChunkRef::BYTES..ChunkRef::BYTES + 8;
    pub(super) const LEAVES: Range<usize> = FILES.end..FILES.end + 8;
    pub(super) const PATH_BYTES: Range<usize> = LEAVES.end..LEAVES.end + 2;
    pub(super) const BYTES: usize = PATH_BYTES.end + 6;

    const _: () = assert!(BYTES == 72);
}

/// An index chunk other than a level's last has at least so many entries: each level is much smaller than the one
/// below.
const ENTRIES_MIN: usize = 64;
/// An index chunk has no more entries.
const ENTRIES_MAX: usize = 1024;
/// One path in so many begins an index chunk, once there are enough entries in the one before.
const ENTRIES_MEAN: usize = 256;
/// More levels than any number of files needs.
pub(super) const LEVELS_MAX: u8 = 8;

/// What an index chunk leads to: a group, or an index chunk one level below.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexEntry {
    /// The chunk.
    pub chunk: ChunkRef,
    /// The first path in it.
    pub first_path: String,
    /// Files in it.
    pub files: u64,
    /// Leaves in it.
    pub leaves: u64,
}

/// A part of the index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexChunk {
    level: u8,
    entries: Vec<IndexEntry>,
}

impl IndexChunk {
    /// A chunk of `entries` in path order. Those of level 0 lead to groups, those of a higher one to index chunks.
    pub fn new(level: u8, entries: Vec<IndexEntry>) -> Result<Self, String> {
        if level >= LEVELS_MAX {
            return Err(format!("an index chunk of level {level}, expected below {LEVELS_MAX}"));
        }
        if entries.is_empty() || entries.len() > ENTRIES_MAX {
            return Err(format!("an index chunk of {} entries, expected 1 to {ENTRIES_MAX}", entries.len()));
        }
        for pair in entries.windows(2) {
            let (left, right) = (&pair[0].first_path, &pair[1].first_path);
            if path::order(left, right) != Ordering::Less {
                return Err(format!("\"{left}\" stands before \"{right}\""));
            }
        }
        for entry in &entries {
            path::check(&entry.first_path)?;
            entry.chunk.check()?;
            if entry.files == 0 {
                return Err(format!("the chunk from \"{}\" on has no file", entry.first_path));
            }
        }
        let chunk = Self { level, entries };
        let total = |count: fn(&IndexEntry) -> u64| chunk.total(count).ok_or("counts that exceed any manifest's");
        total(|entry| entry.files)?;
        if total(|entry| entry.leaves)? > LEAVES_MAX {
            return Err(format!("more than {LEAVES_MAX} leaves"));
        }
        Ok(chunk)
    }

    fn total(&self, count: fn(&IndexEntry) -> u64) -> Option<u64> {
        self.entries.iter().try_fold(0_u64, |total, entry| total.checked_add(count(entry)))
    }

    /// 0 where the entries lead to groups, else one more than the level of the chunks they lead to.
    pub fn level(&self) -> u8 {
        self.level
    }

    /// What it leads to, in path order.
    pub fn entries(&self) -> &[IndexEntry] {
        &self.entries
    }

    /// Files under this chunk.
    pub fn files(&self) -> u64 {
        self.total(|entry| entry.files).unwrap_or(0)
    }

    /// Leaves under this chunk.
    pub fn leaves(&self) -> u64 {
        self.total(|entry| entry.leaves).unwrap_or(0)
    }

    /// The entry that has `path`, if any has: the last that does not begin after it.
    pub fn find_path(&self, path: &str) -> Option<usize> {
        self.entries.partition_point(|entry| path::order(&entry.first_path, path) != Ordering::Greater).checked_sub(1)
    }

    /// The entry that has leaf number `leaf`, counted from this chunk's first, and the leaf's number within the entry.
    pub fn find_leaf(&self, leaf: u64) -> Option<(usize, u64)> {
        let mut within = leaf;
        for (index, entry) in self.entries.iter().enumerate() {
            match within.checked_sub(entry.leaves) {
                None => return Some((index, within)),
                Some(rest) => within = rest,
            }
        }
        None
    }

    /// The chunk's bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut chunk = begin_chunk(MAGIC, HEADER_BYTES);
        let mut text = String::new();
        chunk.reserve(self.entries.len() * entry::BYTES);
        for entry in &self.entries {
            chunk.extend_from_slice(&entry_to_bytes(entry));
            text.push_str(&entry.first_path);
        }
        chunk[LEVEL] = self.level;
        chunk[ENTRIES].copy_from_slice(&count_u32(self.entries.len()));
        chunk[TEXT_BYTES].copy_from_slice(&count_u32(text.len()));
        chunk.extend_from_slice(text.as_bytes());
        chunk
    }

    /// The index chunk of these bytes.
    pub fn from_bytes(chunk: &[u8]) -> Result<Self, Malformed> {
        open_chunk(chunk, MAGIC, HEADER_BYTES, "index chunk")?;
        let (count, text_bytes) = (u32_at(chunk, ENTRIES) as usize, u32_at(chunk, TEXT_BYTES) as usize);
        let entries_end = count.checked_mul(entry::BYTES).and_then(|bytes| bytes.checked_add(HEADER_BYTES));
        expect_length(chunk, entries_end.and_then(|end| end.checked_add(text_bytes)), "index chunk")?;
        if chunk[LEVEL + 1] != 0 {
            return Err(Malformed::damaged(LEVEL + 1, "an unused field of an index chunk is not zero"));
        }
        let text_start = HEADER_BYTES + count * entry::BYTES;
        let (records, _) = chunk[HEADER_BYTES..text_start].as_chunks::<{ entry::BYTES }>();
        let mut text = &chunk[text_start..];
        let entries = records
            .iter()
            .enumerate()
            .map(|(index, record)| {
                let at = HEADER_BYTES + index * entry::BYTES;
                entry_from_bytes(record, &mut text).map_err(|error| error.shifted(at))
            })
            .collect::<Result<_, _>>()?;
        if !text.is_empty() {
            let detail = format!("{} bytes of text that belong to no entry", text.len());
            return Err(Malformed::damaged(text_start, detail));
        }
        Self::new(chunk[LEVEL], entries).map_err(|detail| Malformed::damaged(HEADER_BYTES, detail))
    }
}

fn entry_to_bytes(entry: &IndexEntry) -> [u8; entry::BYTES] {
    let mut bytes = [0; entry::BYTES];
    bytes[..ChunkRef::BYTES].copy_from_slice(&entry.chunk.to_bytes());
    bytes[entry::FILES].copy_from_slice(&entry.files.to_le_bytes());
    bytes[entry::LEAVES].copy_from_slice(&entry.leaves.to_le_bytes());
    // `path::check` has bounded it far below 16 bits.
    bytes[entry::PATH_BYTES].copy_from_slice(&count_u16(entry.first_path.len()));
    bytes
}

fn entry_from_bytes(bytes: &[u8; entry::BYTES], text: &mut &[u8]) -> Result<IndexEntry, Malformed> {
    if bytes[entry::PATH_BYTES.end..] != [0; 6] {
        return Err(Malformed::damaged(entry::PATH_BYTES.end, "an unused field of an index entry is not zero"));
    }
    let path_bytes = u16_at(bytes, entry::PATH_BYTES).into();
    Ok(IndexEntry {
        chunk: ChunkRef::read(bytes, 0)?,
        first_path: take_text(text, path_bytes, "path", entry::PATH_BYTES.start)?.to_owned(),
        files: u64_at(bytes, entry::FILES),
        leaves: u64_at(bytes, entry::LEAVES),
    })
}

/// Builds the index over the `entries` of all groups, in path order, giving each chunk to `put`, which stores it
/// (or finds it in the parent's manifest) and says where it is. Returns the entry of the topmost chunk and its level.
///
/// Fails with what `put` failed with; entries that no reader would accept, or none at all, fail through `refuse`.
pub fn build_index<E>(
    entries: Vec<IndexEntry>,
    mut put: impl FnMut(Vec<u8>) -> Result<ChunkRef, E>,
    refuse: impl Fn(String) -> E,
) -> Result<(IndexEntry, u8), E> {
    let mut below = entries;
    let mut level = 0;
    loop {
        let mut above = Vec::with_capacity(below.len() / ENTRIES_MIN + 1);
        let mut rest = below;
        while !rest.is_empty() {
            let after = rest.split_off(next_chunk(&rest, level));
            let first_path = rest[0].first_path.clone();
            let index = IndexChunk::new(level, rest).map_err(&refuse)?;
            let chunk = put(index.to_bytes())?;
            above.push(IndexEntry { chunk, first_path, files: index.files(), leaves: index.leaves() });
            rest = after;
        }
        if above.len() > 1 {
            below = above;
            level += 1;
            continue;
        }
        return above.pop().map(|top| (top, level)).ok_or_else(|| refuse("a backup without any file".to_owned()));
    }
}

/// How many of `entries` the next chunk of `level` takes.
fn next_chunk(entries: &[IndexEntry], level: u8) -> usize {
    let limit = entries.len().min(ENTRIES_MAX);
    // The first byte of the hash made the groups; each level has a byte of its own.
    let byte = 1 + usize::from(level);
    let begins = |entry: &IndexEntry| usize::from(Hash::of(entry.first_path.as_bytes()).0[byte]) % ENTRIES_MEAN == 0;
    (ENTRIES_MIN..limit).find(|at| begins(&entries[*at])).unwrap_or(limit)
}
