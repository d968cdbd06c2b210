//! A file's record in the manifest.

use crate::units::BlockNumber;

/// What a record stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A directory.
    Directory,
    /// A regular file with content.
    Regular,
    /// A symbolic link, with its target.
    Symlink {
        /// The link's text.
        target: String,
    },
    /// The root of a tablespace, `pg_tblspc/<oid>`: a link in the original, whose files follow under this path.
    Tablespace {
        /// Where the original's link points.
        location: String,
    },
}

/// One file, directory or link of a backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileRecord {
    /// Relative to the data directory, `/` between components: `base/5/16384`, `pg_tblspc/16400/PG_15_202209061/5/16401`.
    /// Never absolute, no `.` or `..`, no empty component: a reader refuses anything else.
    pub path: String,
    /// What it is.
    pub kind: FileKind,
    /// Permission bits only (`0o7777`).
    pub mode: u32,
    /// Owner's number at the source.
    pub uid: u32,
    /// Group's number at the source.
    pub gid: u32,
    /// Modification time, seconds since 1970.
    pub modified: i64,
    /// Content bytes; 0 for what is not a regular file.
    pub bytes: u64,
    /// CRC-32C of the content, as `backup_manifest` and `pg_verifybackup` have it.
    pub crc32c: u32,
    /// The first of its block records; `BlockSize::blocks_of(bytes)` follow without a gap.
    pub first_block: BlockNumber,
}
