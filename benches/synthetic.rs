//! Backups of any size that take no room: what opens, lists, shows, plans and mounts them sees a manifest of that size.
//!
//! Every block is the same one, so packs and leaves take no room; groups and index are those of any backup of this size.
//! The backup's one WAL segment is in the archive, so a restore of it can be planned.

use std::path::Path;

use engine::codec::Compression;
use engine::format::file::FileRecord;
use engine::format::manifest::{LEAF_RECORDS, cut::cut_groups, path};
use engine::repository::Backup;
use engine::units::BlockSize;
use engine::{Error, Result};

use crate::backup::{SEGMENT_BYTES, SYSTEM, begin, directory, file, finish, small_files};

/// A table's file, as PostgreSQL cuts it.
const FILE_BYTES: u64 = 1 << 30;
/// Small tables beside each GiB of large ones.
const TABLES_A_FILE: u64 = 10;
/// The first segment of every generated backup.
const SEGMENT: &str = "000000010000000000000002";

/// The files of a cluster of so many GiB: segments of 1 GiB, and ten small tables for each.
pub fn large_tables(gibibytes: u64) -> Vec<FileRecord> {
    let mut files = vec![directory("base"), directory("base/5")];
    files.extend((0..gibibytes).map(|n| file(format!("base/5/16384.{n}"), FILE_BYTES)));
    let small = BlockSize::DEFAULT.bytes() as u64;
    files.extend((0..gibibytes * TABLES_A_FILE).map(|n| file(format!("base/5/{}", 20_000 + n), small)));
    files
}

/// The files of a cluster of so many tables of 8 KiB.
pub fn small_tables(files: usize) -> Vec<FileRecord> {
    small_files(files, 8192)
}

/// Writes a backup of `files` into a new repository in `place`.
pub fn write(place: &Path, mut files: Vec<FileRecord>) -> Result<Backup> {
    let block = BlockSize::DEFAULT;
    files.sort_by(|one, other| path::order(&one.path, &other.path));
    let (cluster, writer) = begin(place, Compression::Lz4)?;
    let mut worker = writer.worker()?;
    let bytes = files.iter().map(|file| file.bytes).max().unwrap_or(0).min(block.bytes() as u64);
    let bytes = usize::try_from(bytes).unwrap_or(block.bytes());
    let (record, _) = worker.put(&b"a row of some table ".repeat(block.bytes())[..bytes], None, None)?;
    worker.finish()?;
    let full = writer.commit_leaf(&[record; LEAF_RECORDS as usize])?;
    let sizes = files.iter().map(|file| (file.path.as_str(), block.blocks_of(file.bytes)));
    for (position, range) in cut_groups(sizes).enumerate() {
        let blocks: u64 = files[range.clone()].iter().map(|file| block.blocks_of(file.bytes)).sum();
        let mut leaves = vec![full.clone(); usize::try_from(blocks / LEAF_RECORDS).unwrap_or(usize::MAX)];
        let rest = vec![record; usize::try_from(blocks % LEAF_RECORDS).unwrap_or(usize::MAX)];
        if !rest.is_empty() {
            leaves.push(writer.commit_leaf(&rest)?);
        }
        writer.commit_group(position as u64, &files[range], leaves)?;
    }
    let backup = finish(&cluster, writer)?;
    let pushed = place.join(SEGMENT);
    let cannot = |operation| move |error| Error::io(operation, SEGMENT, error);
    std::fs::write(&pushed, segment()).map_err(cannot("write"))?;
    cluster.wal().push(&pushed)?;
    std::fs::remove_file(&pushed).map_err(cannot("remove"))?;
    Ok(backup)
}

/// That segment, with the header that PostgreSQL gives it and nothing behind.
fn segment() -> Vec<u8> {
    /// `XLOG_PAGE_MAGIC` of version 15, and `XLP_LONG_HEADER`.
    const MAGIC_AND_FLAGS: [u16; 2] = [0xD110, 2];
    let mut bytes: Vec<u8> = MAGIC_AND_FLAGS.iter().flat_map(|field| field.to_le_bytes()).collect();
    bytes.extend(1_u32.to_le_bytes()); // timeline
    bytes.extend((2 * SEGMENT_BYTES).to_le_bytes()); // address
    bytes.extend([0; 8]);
    bytes.extend(SYSTEM.0.to_le_bytes());
    bytes.extend((SEGMENT_BYTES as u32).to_le_bytes());
    bytes.extend(8192_u32.to_le_bytes()); // page
    bytes.resize(SEGMENT_BYTES as usize, 0);
    bytes
}
