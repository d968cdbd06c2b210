//! A group: the records of files that follow each other in path order, and the leaves with their blocks.

use std::cmp::Ordering;
use std::ops::Range;

use crate::format::Malformed;
use crate::format::fields::{count_u16, count_u32, i64_at, u16_at, u32_at, u64_at};
use crate::format::file::{FileKind, FileRecord};
use crate::format::manifest::cut::GROUP_FILES_MAX;
use crate::format::manifest::{
    ChunkRef, LEAF_RECORDS, LEAVES_MAX, VERSION, begin_chunk, expect_length, open_chunk, path, take_text,
};
use crate::units::{BlockNumber, BlockSize};

const MAGIC: [u8; 4] = *b"pghG";
const FILES: Range<usize> = VERSION.end + 2..VERSION.end + 6;
const LEAVES: Range<usize> = FILES.end..FILES.end + 4;
const BLOCK_BYTES: Range<usize> = LEAVES.end..LEAVES.end + 4;
const TEXT_BYTES: Range<usize> = BLOCK_BYTES.end..BLOCK_BYTES.end + 4;
const HEADER_BYTES: usize = TEXT_BYTES.end + 8;

const _: () = assert!(HEADER_BYTES == 32);

/// A file in the chunk; its path and its link's target lie, in this order, in the text at the chunk's end.
mod file {
    use std::ops::Range;

    pub(super) const KIND: usize = 0;
    pub(super) const PATH_BYTES: Range<usize> = KIND + 2..KIND + 4;
    pub(super) const TARGET_BYTES: Range<usize> = PATH_BYTES.end..PATH_BYTES.end + 2;
    pub(super) const MODE: Range<usize> = TARGET_BYTES.end..TARGET_BYTES.end + 2;
    pub(super) const UID: Range<usize> = MODE.end..MODE.end + 4;
    pub(super) const GID: Range<usize> = UID.end..UID.end + 4;
    pub(super) const MODIFIED: Range<usize> = GID.end..GID.end + 8;
    pub(super) const CONTENT_BYTES: Range<usize> = MODIFIED.end..MODIFIED.end + 8;
    pub(super) const CRC32C: Range<usize> = CONTENT_BYTES.end..CONTENT_BYTES.end + 4;
    pub(super) const BYTES: usize = CRC32C.end + 4;

    const _: () = assert!(BYTES == 40);
}

/// Linux has no larger file: offsets are signed.
const FILE_BYTES_MAX: u64 = i64::MAX as u64;

const DIRECTORY: u8 = 0;
const REGULAR: u8 = 1;
const SYMLINK: u8 = 2;
const TABLESPACE: u8 = 3;

/// A few files of a backup, and where their block records are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    block_size: BlockSize,
    files: Vec<FileRecord>,
    leaves: Vec<ChunkRef>,
    blocks: u64,
}

impl Group {
    /// A group of `files` in path order, whose blocks' records lie, file after file, in `leaves`. Sets each file's
    /// `first_block`, counted from the group's first; refuses what no reader would accept.
    pub fn new(block_size: BlockSize, mut files: Vec<FileRecord>, leaves: Vec<ChunkRef>) -> Result<Self, String> {
        if files.is_empty() || files.len() > GROUP_FILES_MAX {
            return Err(format!("a group of {} files, expected 1 to {GROUP_FILES_MAX}", files.len()));
        }
        files.iter().try_for_each(check_file)?;
        for pair in files.windows(2) {
            if path::order(&pair[0].path, &pair[1].path) != Ordering::Less {
                return Err(format!("\"{}\" stands before \"{}\"", pair[0].path, pair[1].path));
            }
            check_below(&pair[0], &pair[1].path)?;
        }
        let mut blocks = 0_u64;
        for file in &mut files {
            file.first_block = BlockNumber(blocks);
            blocks = blocks
                .checked_add(block_size.blocks_of(file.bytes))
                .filter(|blocks| *blocks <= LEAVES_MAX * LEAF_RECORDS)
                .ok_or_else(|| format!("\"{}\" of {} bytes is too large", file.path, file.bytes))?;
        }
        let expected = blocks.div_ceil(LEAF_RECORDS);
        if leaves.len() as u64 != expected {
            return Err(format!("{} leaves for {blocks} blocks, expected {expected}", leaves.len()));
        }
        leaves.iter().try_for_each(ChunkRef::check)?;
        Ok(Self { block_size, files, leaves, blocks })
    }

    /// The files in path order; `first_block` counts from the group's first block.
    pub fn files(&self) -> &[FileRecord] {
        &self.files
    }

    /// The files, for a caller who goes on to number their blocks over the whole backup.
    pub fn into_files(self) -> Vec<FileRecord> {
        self.files
    }

    /// The leaves, in order.
    pub fn leaves(&self) -> &[ChunkRef] {
        &self.leaves
    }

    /// How many block records leaf number `leaf` of this group holds: all are full but the last.
    pub fn leaf_records(&self, leaf: usize) -> u64 {
        self.blocks.saturating_sub(leaf as u64 * LEAF_RECORDS).min(LEAF_RECORDS)
    }

    /// Blocks of all files.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// The block size that files were cut with.
    pub fn block_size(&self) -> BlockSize {
        self.block_size
    }

    /// The group's chunk.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut chunk = begin_chunk(MAGIC, HEADER_BYTES);
        let mut text = String::new();
        chunk.reserve(self.files.len() * file::BYTES + self.leaves.len() * ChunkRef::BYTES);
        for record in &self.files {
            chunk.extend_from_slice(&file_to_bytes(record));
            text.push_str(&record.path);
            text.push_str(target_of(&record.kind));
        }
        for leaf in &self.leaves {
            chunk.extend_from_slice(&leaf.to_bytes());
        }
        chunk[FILES].copy_from_slice(&count_u32(self.files.len()));
        chunk[LEAVES].copy_from_slice(&count_u32(self.leaves.len()));
        chunk[BLOCK_BYTES].copy_from_slice(&u32::from(self.block_size).to_le_bytes());
        chunk[TEXT_BYTES].copy_from_slice(&count_u32(text.len()));
        chunk.extend_from_slice(text.as_bytes());
        chunk
    }

    /// The group of a chunk.
    pub fn from_bytes(chunk: &[u8]) -> Result<Self, Malformed> {
        open_chunk(chunk, MAGIC, HEADER_BYTES, "group")?;
        let number = |field| u32_at(chunk, field) as usize;
        let (file_count, leaf_count, text_bytes) = (number(FILES), number(LEAVES), number(TEXT_BYTES));
        let files_end = file_count.checked_mul(file::BYTES).and_then(|bytes| bytes.checked_add(HEADER_BYTES));
        let leaves_end = leaf_count.checked_mul(ChunkRef::BYTES).and_then(|bytes| bytes.checked_add(files_end?));
        expect_length(chunk, leaves_end.and_then(|end| end.checked_add(text_bytes)), "group")?;
        if chunk[VERSION.end..FILES.start] != [0; 2] || chunk[TEXT_BYTES.end..HEADER_BYTES] != [0; 8] {
            return Err(Malformed::damaged(VERSION.end, "an unused field of a group is not zero"));
        }
        let block_size = BlockSize::try_from(u32_at(chunk, BLOCK_BYTES))
            .map_err(|detail| Malformed::damaged(BLOCK_BYTES.start, detail))?;

        // From here on the counts are those of bytes that are there.
        let leaves_start = HEADER_BYTES + file_count * file::BYTES;
        let text_start = leaves_start + leaf_count * ChunkRef::BYTES;
        let (records, _) = chunk[HEADER_BYTES..leaves_start].as_chunks::<{ file::BYTES }>();
        let mut text = &chunk[text_start..];
        let files = records
            .iter()
            .enumerate()
            .map(|(index, record)| file_from_bytes(record, &mut text, HEADER_BYTES + index * file::BYTES))
            .collect::<Result<_, _>>()?;
        if !text.is_empty() {
            let detail = format!("{} bytes of text that belong to no file", text.len());
            return Err(Malformed::damaged(text_start, detail));
        }
        let leaves = (0..leaf_count).map(|index| ChunkRef::read(chunk, leaves_start + index * ChunkRef::BYTES));
        Self::new(block_size, files, leaves.collect::<Result<_, _>>()?)
            .map_err(|detail| Malformed::damaged(HEADER_BYTES, detail))
    }
}

/// Whether `path` may stand directly behind `before`: nothing lies below what is no directory. What lies below a name
/// stands directly behind it, so this finds all of it, and no file is ever written through a link.
pub(crate) fn check_below(before: &FileRecord, path: &str) -> Result<(), String> {
    match before.kind {
        FileKind::Directory | FileKind::Tablespace { .. } => Ok(()),
        FileKind::Regular | FileKind::Symlink { .. } if !path::is_below(path, &before.path) => Ok(()),
        FileKind::Regular | FileKind::Symlink { .. } => {
            Err(format!("\"{path}\" lies below \"{}\", which is no directory", before.path))
        }
    }
}

/// What holds for every file, written or read.
fn check_file(record: &FileRecord) -> Result<(), String> {
    path::check(&record.path)?;
    if record.bytes > FILE_BYTES_MAX {
        return Err(format!("\"{}\" of {} bytes is too large", record.path, record.bytes));
    }
    if record.mode > 0o7777 {
        return Err(format!("\"{}\" has the mode {:o}", record.path, record.mode));
    }
    match &record.kind {
        FileKind::Regular => return Ok(()),
        FileKind::Directory => {}
        FileKind::Symlink { target } => path::check_target(target)?,
        FileKind::Tablespace { location } if path::tablespace_oid(&record.path).is_some() => {
            path::check_target(location)?;
        }
        FileKind::Tablespace { .. } => return Err(format!("\"{}\" cannot be a tablespace", record.path)),
    }
    if record.bytes != 0 || record.crc32c != 0 {
        return Err(format!("\"{}\" is no regular file but has {} bytes", record.path, record.bytes));
    }
    Ok(())
}

fn target_of(kind: &FileKind) -> &str {
    match kind {
        FileKind::Directory | FileKind::Regular => "",
        FileKind::Symlink { target } | FileKind::Tablespace { location: target } => target,
    }
}

fn file_to_bytes(record: &FileRecord) -> [u8; file::BYTES] {
    let mut bytes = [0; file::BYTES];
    bytes[file::KIND] = match record.kind {
        FileKind::Directory => DIRECTORY,
        FileKind::Regular => REGULAR,
        FileKind::Symlink { .. } => SYMLINK,
        FileKind::Tablespace { .. } => TABLESPACE,
    };
    // `check_file` has bounded these three far below 16 bits.
    bytes[file::PATH_BYTES].copy_from_slice(&count_u16(record.path.len()));
    bytes[file::TARGET_BYTES].copy_from_slice(&count_u16(target_of(&record.kind).len()));
    bytes[file::MODE].copy_from_slice(&count_u16(record.mode as usize));
    bytes[file::UID].copy_from_slice(&record.uid.to_le_bytes());
    bytes[file::GID].copy_from_slice(&record.gid.to_le_bytes());
    bytes[file::MODIFIED].copy_from_slice(&record.modified.to_le_bytes());
    bytes[file::CONTENT_BYTES].copy_from_slice(&record.bytes.to_le_bytes());
    bytes[file::CRC32C].copy_from_slice(&record.crc32c.to_le_bytes());
    bytes
}

/// The file of the record at `at` of the chunk; takes its path and target off the `text`.
fn file_from_bytes(bytes: &[u8; file::BYTES], text: &mut &[u8], at: usize) -> Result<FileRecord, Malformed> {
    if bytes[file::KIND + 1] != 0 || bytes[file::CRC32C.end..] != [0; 4] {
        return Err(Malformed::damaged(at, "an unused field of a file record is not zero"));
    }
    let path = take_text(text, u16_at(bytes, file::PATH_BYTES).into(), "path", at)?.to_owned();
    let target = take_text(text, u16_at(bytes, file::TARGET_BYTES).into(), "link's target", at)?.to_owned();
    let kind = match bytes[file::KIND] {
        DIRECTORY | REGULAR if !target.is_empty() => {
            return Err(Malformed::damaged(at, format!("\"{path}\" is no link but has a target")));
        }
        DIRECTORY => FileKind::Directory,
        REGULAR => FileKind::Regular,
        SYMLINK => FileKind::Symlink { target },
        TABLESPACE => FileKind::Tablespace { location: target },
        other => return Err(Malformed::damaged(at, format!("\"{path}\" is of kind {other}, expected 0 to 3"))),
    };
    Ok(FileRecord {
        path,
        kind,
        mode: u16_at(bytes, file::MODE).into(),
        uid: u32_at(bytes, file::UID),
        gid: u32_at(bytes, file::GID),
        modified: i64_at(bytes, file::MODIFIED),
        bytes: u64_at(bytes, file::CONTENT_BYTES),
        crc32c: u32_at(bytes, file::CRC32C),
        first_block: BlockNumber(0),
    })
}
