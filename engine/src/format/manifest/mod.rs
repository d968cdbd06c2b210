//! The manifest of a backup: every file, and for every block its hash and where its bytes lie. Pure: bytes to
//! structs and back; `repository::manifest` reads and writes them through a store.
//!
//! ```text
//! <label>.json -> root -> index ... index -> group -> leaf      (each arrow is a hash and a place: ChunkRef)
//!                                            group -> leaf
//! ```
//!
//! A manifest is a tree of *chunks*. A [`Root`] holds the counts; [`IndexChunk`]s lead to *groups*; a [`Group`]
//! holds the records of a few files that follow each other in path order, and refers to the *leaves* that hold
//! those files' block records, [`LEAF_RECORDS`] to a leaf. Every reference is a [`ChunkRef`] with the chunk's
//! BLAKE3, so the root's hash, in the backup's JSON, proves all of it, and any part can be checked by itself when
//! it is first needed.
//!
//! Nothing in a group says where the group stands: block numbers count from its own first block, and where groups
//! are cut depends on paths alone ([`cut`]). A group in which nothing changed is therefore the same bytes in the
//! next backup, which refers to the older backup's chunks instead of writing them: a reference names the manifest
//! file that holds the chunk.
//!
//! Always true: a chunk that parses is valid as far as one chunk can tell (order, counts, lengths, paths), and
//! writing it gives the same bytes again.

use std::ops::Range;

use crate::checksum::Hash;
use crate::format::fields::{bytes_at, shown, u16_at, u32_at, u64_at};
use crate::format::{FORMAT, Malformed};
use crate::units::BlockNumber;

pub mod cut;
mod group;
mod header;
mod index;
mod leaf;
pub mod path;
mod root;
#[cfg(test)]
mod tests;

pub use group::Group;
pub(crate) use group::check_below;
pub use header::ManifestHeader;
pub use index::{IndexChunk, IndexEntry, build_index};
pub use leaf::{leaf_from_bytes, leaf_to_bytes};
pub use root::{ManifestUse, PackUse, Root};

/// Block records in a full leaf: 64 KiB of them.
pub const LEAF_RECORDS: u64 = 1024;
/// No chunk is larger. Usual ones stay below 64 KiB; a group's grows by 48 bytes for every leaf of a large file,
/// and this is enough for one of 11 TiB at the smallest block size.
pub const CHUNK_BYTES_MAX: u32 = 16 << 20;
/// No manifest has more leaves: block numbers and byte counts of what is smaller cannot overflow.
pub const LEAVES_MAX: u64 = 1 << 40;

const _: () = assert!(LEAVES_MAX.checked_mul(LEAF_RECORDS).is_some());

impl BlockNumber {
    /// The leaf that its record is in, counted over the whole manifest, and the place within the leaf.
    pub const fn leaf_and_slot(self) -> (u64, usize) {
        (self.0 / LEAF_RECORDS, (self.0 % LEAF_RECORDS) as usize)
    }
}

/// A chunk of a manifest: the hash that proves it and the place where it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChunkRef {
    /// BLAKE3 of the chunk's bytes.
    pub hash: Hash,
    /// Which manifest file holds it: a place in the root's table [`Root::manifests`].
    pub manifest: u32,
    /// Its bytes.
    pub bytes: u32,
    /// Where it begins in that file.
    pub offset: u64,
}

impl ChunkRef {
    /// Bytes of a reference in a chunk.
    pub const BYTES: usize = 48;

    const HASH: Range<usize> = 0..32;
    const MANIFEST: Range<usize> = Self::HASH.end..Self::HASH.end + 4;
    const LENGTH: Range<usize> = Self::MANIFEST.end..Self::MANIFEST.end + 4;
    const OFFSET: Range<usize> = Self::LENGTH.end..Self::LENGTH.end + 8;

    /// The reference to `chunk`, which lies at `offset` of the manifest number `manifest`.
    pub fn to(chunk: &[u8], manifest: u32, offset: u64) -> Self {
        Self { hash: Hash::of(chunk), manifest, bytes: u32::try_from(chunk.len()).unwrap_or(u32::MAX), offset }
    }

    fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[Self::HASH].copy_from_slice(&self.hash.0);
        bytes[Self::MANIFEST].copy_from_slice(&self.manifest.to_le_bytes());
        bytes[Self::LENGTH].copy_from_slice(&self.bytes.to_le_bytes());
        bytes[Self::OFFSET].copy_from_slice(&self.offset.to_le_bytes());
        bytes
    }

    /// The reference at `at` of a chunk, which holds it whole.
    fn read(chunk: &[u8], at: usize) -> Result<Self, Malformed> {
        let field = |range: Range<usize>| at + range.start..at + range.end;
        let reference = Self {
            hash: Hash(bytes_at(chunk, field(Self::HASH))),
            manifest: u32_at(chunk, field(Self::MANIFEST)),
            bytes: u32_at(chunk, field(Self::LENGTH)),
            offset: u64_at(chunk, field(Self::OFFSET)),
        };
        reference.check().map_err(|detail| Malformed::damaged(at, detail))?;
        Ok(reference)
    }

    /// What holds for every reference, written or read.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.bytes == 0 || self.bytes > CHUNK_BYTES_MAX {
            return Err(format!("a chunk of {} bytes, expected 1 to {CHUNK_BYTES_MAX}", self.bytes));
        }
        if self.offset.checked_add(u64::from(self.bytes)).is_none_or(|end| end > i64::MAX as u64) {
            return Err(format!("a chunk at byte {}, past the end of any file", self.offset));
        }
        Ok(())
    }
}

/// What every chunk begins with: four bytes of magic, then a version.
const MAGIC: Range<usize> = 0..4;
const VERSION: Range<usize> = MAGIC.end..MAGIC.end + 2;

/// A chunk's first bytes, with room for the rest of its header.
fn begin_chunk(magic: [u8; 4], header_bytes: usize) -> Vec<u8> {
    let mut chunk = vec![0; header_bytes];
    chunk[MAGIC].copy_from_slice(&magic);
    chunk[VERSION].copy_from_slice(&FORMAT.to_le_bytes());
    chunk
}

/// Length, magic, version: after this the chunk's header may be read.
fn open_chunk(chunk: &[u8], magic: [u8; 4], header_bytes: usize, what: &str) -> Result<(), Malformed> {
    if chunk.len() < header_bytes || chunk.len() > CHUNK_BYTES_MAX as usize {
        let detail = format!("a {what} of {} bytes, expected {header_bytes} to {CHUNK_BYTES_MAX}", chunk.len());
        return Err(Malformed::damaged(chunk.len(), detail));
    }
    if chunk[MAGIC] != magic {
        let (found, expected) = (shown(&chunk[MAGIC]), shown(&magic));
        return Err(Malformed::damaged(0, format!("not a {what}: begins with {found} instead of {expected}")));
    }
    match u16_at(chunk, VERSION) {
        0 => Err(Malformed::damaged(VERSION.start, format!("a {what} of format 0"))),
        version if version > FORMAT => {
            let detail = format!("a {what} of format {version}; this version reads up to {FORMAT}");
            Err(Malformed::unsupported(detail))
        }
        _ => Ok(()),
    }
}

/// The chunk must be as long as its header says, to the byte.
fn expect_length(chunk: &[u8], expected: Option<usize>, what: &str) -> Result<(), Malformed> {
    if expected == Some(chunk.len()) {
        return Ok(());
    }
    let expected = expected.map_or_else(|| "an impossible number".to_owned(), |bytes| bytes.to_string());
    let detail = format!("a {what} of {} bytes, its header says {expected}", chunk.len());
    Err(Malformed::damaged(chunk.len(), detail))
}

/// The next `bytes` of a chunk's text heap.
fn take_text<'a>(heap: &mut &'a [u8], bytes: usize, what: &str, at: usize) -> Result<&'a str, Malformed> {
    let Some((text, rest)) = heap.split_at_checked(bytes) else {
        let detail = format!("a {what} of {bytes} bytes, but only {} are left for text", heap.len());
        return Err(Malformed::damaged(at, detail));
    };
    *heap = rest;
    std::str::from_utf8(text)
        .map_err(|_| Malformed::damaged(at, format!("a {what} that is not UTF-8: {}", shown(text))))
}
