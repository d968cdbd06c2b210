//! The first page of a pack and of a manifest file: what the file is, whose it is, and a hash over all of that.
//!
//! The magic, the two versions and the place of the hash are the same in every format there will be, so a reader
//! can tell "a newer version wrote this" (refused politely) from "this is damaged".

use std::ops::Range;

use crate::checksum::Hash;
use crate::format::fields::{bytes_at, shown, u16_at};
use crate::format::repository::RepositoryId;
use crate::format::{FORMAT, MINIMUM_READER, Malformed};
use crate::units::DIRECT_BYTES;

/// Bytes of a header page: what follows it may be read with O_DIRECT.
pub const HEADER_BYTES: usize = DIRECT_BYTES;

pub(super) const MAGIC: Range<usize> = 0..8;
pub(super) const FORMAT_VERSION: Range<usize> = MAGIC.end..MAGIC.end + 2;
pub(super) const MINIMUM_READER_VERSION: Range<usize> = FORMAT_VERSION.end..FORMAT_VERSION.end + 2;
/// Cipher (u8), three zero bytes, key id (u32): zero in format 1.
pub(super) const ENCRYPTION: Range<usize> = MINIMUM_READER_VERSION.end..MINIMUM_READER_VERSION.end + 8;
pub(super) const REPOSITORY: Range<usize> = ENCRYPTION.end + 4..ENCRYPTION.end + 20;
/// Where the fields of the particular file begin.
pub(super) const BODY: usize = REPOSITORY.end;
/// BLAKE3 of everything before it.
pub(super) const HASH: Range<usize> = HEADER_BYTES - 32..HEADER_BYTES;

const _: () = assert!(BODY == 40);

/// A page with the common fields; the hash is still to come.
pub(super) fn begin(magic: &[u8; 8], repository: &RepositoryId) -> Vec<u8> {
    let mut page = vec![0; HEADER_BYTES];
    page[MAGIC].copy_from_slice(magic);
    page[FORMAT_VERSION].copy_from_slice(&FORMAT.to_le_bytes());
    page[MINIMUM_READER_VERSION].copy_from_slice(&MINIMUM_READER.to_le_bytes());
    page[REPOSITORY].copy_from_slice(&repository.0);
    page
}

/// Puts the hash in its place.
pub(super) fn seal(page: &mut [u8]) {
    let hash = Hash::of(&page[..HASH.start]);
    page[HASH].copy_from_slice(&hash.0);
}

/// The page, if `bytes` begin with one of this `magic` that this version may read, and the repository it names.
pub(super) fn open<'a>(
    bytes: &'a [u8],
    magic: &[u8; 8],
    what: &str,
) -> Result<(&'a [u8; HEADER_BYTES], RepositoryId), Malformed> {
    let Some(page) = bytes.first_chunk::<HEADER_BYTES>() else {
        let detail = format!("{} bytes are shorter than the header of a {what}, {HEADER_BYTES} bytes", bytes.len());
        return Err(Malformed::damaged(bytes.len(), detail));
    };
    if page[MAGIC] != *magic {
        let detail = format!("not a {what}: begins with {} instead of {}", shown(&page[MAGIC]), shown(magic));
        return Err(Malformed::damaged(MAGIC.start, detail));
    }
    let expected = Hash(bytes_at(page, HASH));
    let found = Hash::of(&page[..HASH.start]);
    if found != expected {
        let detail = format!("the header of the {what} says it has BLAKE3 {expected}, but it has {found}");
        return Err(Malformed::damaged(MAGIC.start, detail));
    }
    check_versions(u16_at(page, FORMAT_VERSION), u16_at(page, MINIMUM_READER_VERSION), what)?;
    if page[ENCRYPTION] != [0; 8] {
        let cipher = page[ENCRYPTION.start];
        return Err(Malformed::unsupported(format!("the {what} is encrypted (cipher {cipher}); this version cannot")));
    }
    Ok((page, RepositoryId(bytes_at(page, REPOSITORY))))
}

/// Whether this version may read what says it is of `format` and needs `minimum_reader`.
pub(super) fn check_versions(format: u16, minimum_reader: u16, what: &str) -> Result<(), Malformed> {
    if format == 0 || minimum_reader == 0 || minimum_reader > format {
        let detail = format!("the {what} says it is of format {format} for readers from {minimum_reader} on");
        return Err(Malformed::damaged(FORMAT_VERSION.start, detail));
    }
    if minimum_reader > FORMAT {
        let detail = format!("the {what} needs a reader of format {minimum_reader}; this version reads up to {FORMAT}");
        return Err(Malformed::unsupported(detail));
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The page as a version would write it that knows one format more, which this version cannot read.
    pub(in crate::format) fn as_of_a_newer_format(mut page: Vec<u8>) -> Vec<u8> {
        page[FORMAT_VERSION].copy_from_slice(&(FORMAT + 1).to_le_bytes());
        page[MINIMUM_READER_VERSION].copy_from_slice(&(FORMAT + 1).to_le_bytes());
        seal(&mut page);
        page
    }

    #[test]
    fn a_newer_writer_may_still_be_understood() {
        assert_eq!(check_versions(FORMAT + 1, FORMAT, "pack"), Ok(()));
        assert!(matches!(check_versions(FORMAT + 1, FORMAT + 1, "pack"), Err(Malformed::Unsupported { .. })));
        for (format, minimum_reader) in [(0, 0), (1, 0), (0, 1), (1, 2)] {
            assert!(matches!(check_versions(format, minimum_reader, "pack"), Err(Malformed::Damaged { .. })));
        }
    }
}
