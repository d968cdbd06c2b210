//! The root: the counts of a backup, its index, and the tables of manifest files and packs that it needs.

use std::ops::Range;

use crate::format::Malformed;
use crate::format::fields::{count_u16, count_u32, u16_at, u32_at, u64_at};
use crate::format::manifest::index::LEVELS_MAX;
use crate::format::manifest::{
    ChunkRef, LEAF_RECORDS, LEAVES_MAX, VERSION, begin_chunk, expect_length, open_chunk, take_text,
};
use crate::units::{BackupLabel, BlockSize, PackId};

const MAGIC: [u8; 4] = *b"pghR";
const INDEX_LEVEL: usize = VERSION.end;
const BLOCK_BYTES: Range<usize> = INDEX_LEVEL + 2..INDEX_LEVEL + 6;
const MANIFESTS: Range<usize> = BLOCK_BYTES.end..BLOCK_BYTES.end + 4;
const PACKS: Range<usize> = MANIFESTS.end..MANIFESTS.end + 4;
const TEXT_BYTES: Range<usize> = PACKS.end..PACKS.end + 4;
const FILES: Range<usize> = TEXT_BYTES.end..TEXT_BYTES.end + 8;
const GROUPS: Range<usize> = FILES.end..FILES.end + 8;
const LEAVES: Range<usize> = GROUPS.end..GROUPS.end + 8;
const BLOCKS: Range<usize> = LEAVES.end..LEAVES.end + 8;
const CONTENT_BYTES: Range<usize> = BLOCKS.end..BLOCKS.end + 8;
const INDEX: Range<usize> = CONTENT_BYTES.end..CONTENT_BYTES.end + ChunkRef::BYTES;
const HEADER_BYTES: usize = INDEX.end;

const _: () = assert!(HEADER_BYTES == 112);

/// A manifest file in the table: bytes referred to, label's length; the label lies in the text at the chunk's end.
const MANIFEST_USE_BYTES: usize = 10;
/// A pack in the table: its number, bytes referred to.
const PACK_USE_BYTES: usize = 12;

/// A manifest file that a backup's chunks lie in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestUse {
    /// The backup that wrote it.
    pub label: BackupLabel,
    /// Bytes of its chunks that this backup refers to. With 0 the entry only keeps the numbers of the others.
    pub bytes: u64,
}

/// A pack that a backup's blocks lie in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackUse {
    /// The pack.
    pub pack: PackId,
    /// Stored bytes in it that this backup's blocks refer to.
    pub bytes: u64,
}

/// Where reading a manifest begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root {
    /// The block size of all its files.
    pub block_size: BlockSize,
    /// The topmost index chunk.
    pub index: ChunkRef,
    /// That chunk's level.
    pub index_level: u8,
    /// Files, directories and links.
    pub files: u64,
    /// Groups that they are in.
    pub groups: u64,
    /// Leaves of all groups: block numbers go from 0 to this many times [`LEAF_RECORDS`].
    pub leaves: u64,
    /// Block records.
    pub blocks: u64,
    /// Content bytes.
    pub bytes: u64,
    /// What a [`ChunkRef::manifest`] counts in; the last is the backup's own. A child's table begins with its
    /// parent's, so that the numbers in shared chunks stay right.
    pub manifests: Vec<ManifestUse>,
    /// The packs, ascending.
    pub packs: Vec<PackUse>,
}

impl Root {
    /// The chunk. Refuses what [`from_bytes`](Self::from_bytes) would refuse.
    pub fn to_bytes(&self) -> Result<Vec<u8>, String> {
        self.check()?;
        let mut chunk = begin_chunk(MAGIC, HEADER_BYTES);
        chunk[INDEX_LEVEL] = self.index_level;
        chunk[BLOCK_BYTES].copy_from_slice(&u32::from(self.block_size).to_le_bytes());
        chunk[MANIFESTS].copy_from_slice(&count_u32(self.manifests.len()));
        chunk[PACKS].copy_from_slice(&count_u32(self.packs.len()));
        let counts = [self.files, self.groups, self.leaves, self.blocks, self.bytes];
        for (place, count) in chunk[FILES.start..CONTENT_BYTES.end].chunks_exact_mut(8).zip(counts) {
            place.copy_from_slice(&count.to_le_bytes());
        }
        chunk[INDEX].copy_from_slice(&self.index.to_bytes());
        let mut text = String::new();
        for manifest in &self.manifests {
            let label = manifest.label.as_str();
            chunk.extend_from_slice(&manifest.bytes.to_le_bytes());
            chunk.extend_from_slice(&count_u16(label.len()));
            text.push_str(label);
        }
        for pack in &self.packs {
            chunk.extend_from_slice(&pack.pack.0.to_le_bytes());
            chunk.extend_from_slice(&pack.bytes.to_le_bytes());
        }
        chunk[TEXT_BYTES].copy_from_slice(&count_u32(text.len()));
        chunk.extend_from_slice(text.as_bytes());
        Ok(chunk)
    }

    /// The root of a chunk.
    pub fn from_bytes(chunk: &[u8]) -> Result<Self, Malformed> {
        open_chunk(chunk, MAGIC, HEADER_BYTES, "root")?;
        let number = |field| u32_at(chunk, field) as usize;
        let (manifest_count, pack_count, text_bytes) = (number(MANIFESTS), number(PACKS), number(TEXT_BYTES));
        let manifests_end =
            manifest_count.checked_mul(MANIFEST_USE_BYTES).and_then(|end| end.checked_add(HEADER_BYTES));
        let packs_end = pack_count.checked_mul(PACK_USE_BYTES).and_then(|bytes| bytes.checked_add(manifests_end?));
        expect_length(chunk, packs_end.and_then(|end| end.checked_add(text_bytes)), "root")?;
        if chunk[INDEX_LEVEL + 1] != 0 {
            return Err(Malformed::damaged(INDEX_LEVEL + 1, "an unused field of a root is not zero"));
        }
        let block_size = BlockSize::try_from(u32_at(chunk, BLOCK_BYTES))
            .map_err(|detail| Malformed::damaged(BLOCK_BYTES.start, detail))?;

        // From here on the counts are those of bytes that are there.
        let packs_start = HEADER_BYTES + manifest_count * MANIFEST_USE_BYTES;
        let text_start = packs_start + pack_count * PACK_USE_BYTES;
        let mut text = &chunk[text_start..];
        let (manifests, _) = chunk[HEADER_BYTES..packs_start].as_chunks::<MANIFEST_USE_BYTES>();
        let manifests = manifests.iter().enumerate().map(|(index, entry)| {
            let at = HEADER_BYTES + index * MANIFEST_USE_BYTES;
            let label = take_text(&mut text, u16_at(entry, 8..10).into(), "backup label", at)?;
            let label = label.parse().map_err(|detail: String| Malformed::damaged(at, detail))?;
            Ok(ManifestUse { label, bytes: u64_at(entry, 0..8) })
        });
        let manifests = manifests.collect::<Result<_, Malformed>>()?;
        if !text.is_empty() {
            let detail = format!("{} bytes of text that belong to no label", text.len());
            return Err(Malformed::damaged(text_start, detail));
        }
        let (packs, _) = chunk[packs_start..text_start].as_chunks::<PACK_USE_BYTES>();
        let packs =
            packs.iter().map(|entry| PackUse { pack: PackId(u32_at(entry, 0..4)), bytes: u64_at(entry, 4..12) });
        let root = Self {
            block_size,
            index: ChunkRef::read(chunk, INDEX.start)?,
            index_level: chunk[INDEX_LEVEL],
            files: u64_at(chunk, FILES),
            groups: u64_at(chunk, GROUPS),
            leaves: u64_at(chunk, LEAVES),
            blocks: u64_at(chunk, BLOCKS),
            bytes: u64_at(chunk, CONTENT_BYTES),
            manifests,
            packs: packs.collect(),
        };
        root.check().map_err(|detail| Malformed::damaged(0, detail))?;
        Ok(root)
    }

    /// What holds for every root, written or read.
    fn check(&self) -> Result<(), String> {
        self.index.check()?;
        if self.index_level >= LEVELS_MAX {
            return Err(format!("an index of level {}, expected below {LEVELS_MAX}", self.index_level));
        }
        if self.leaves > LEAVES_MAX {
            return Err(format!("{} leaves, more than {LEAVES_MAX}", self.leaves));
        }
        if self.blocks < self.leaves || self.blocks > self.leaves * LEAF_RECORDS {
            return Err(format!("{} blocks in {} leaves", self.blocks, self.leaves));
        }
        if self.groups == 0 || self.files < self.groups {
            return Err(format!("{} files in {} groups", self.files, self.groups));
        }
        if self.index.manifest as usize >= self.manifests.len() {
            return Err(format!("the index lies in manifest {} of {}", self.index.manifest, self.manifests.len()));
        }
        if let Some(pair) = self.packs.windows(2).find(|pair| pair[0].pack >= pair[1].pack) {
            return Err(format!("pack {} stands before pack {}", pair[0].pack, pair[1].pack));
        }
        Ok(())
    }
}
