//! The header of a WAL object: which file of `pg_wal` it holds, and a block record for each block of it.
//!
//! A WAL object stands alone, so that archiving a segment writes one file and nothing else: its block records lie
//! in its own header, refer to runs behind that header (pack 0 means "this object"), and are never patches. The
//! header is whole 4096-byte pages; its hash covers the records, the records' hashes cover the content.

use std::ops::Range;

use crate::checksum::Hash;
use crate::format::block::{BlockRecord, Content};
use crate::format::fields::{bytes_at, count_u32, shown, u16_at, u32_at, u64_at};
use crate::format::header::{self, check_versions};
use crate::format::repository::{RepositoryId, WAL_SEGMENT_BYTES_MAX};
use crate::format::{FORMAT, MINIMUM_READER, Malformed};
use crate::units::{BlockSize, DIRECT_BYTES, PackId, SystemIdentifier};

const MAGIC: &[u8; 8] = b"pghy-wal";
const SYSTEM_IDENTIFIER: Range<usize> = header::BODY..header::BODY + 8;
const CONTENT_BYTES: Range<usize> = SYSTEM_IDENTIFIER.end..SYSTEM_IDENTIFIER.end + 8;
const BLOCK_BYTES: Range<usize> = CONTENT_BYTES.end..CONTENT_BYTES.end + 4;
const BLOCKS: Range<usize> = BLOCK_BYTES.end..BLOCK_BYTES.end + 4;
/// The name, then zeros.
const NAME: Range<usize> = BLOCKS.end..BLOCKS.end + NAME_BYTES_MAX;
/// BLAKE3 of the whole header, records and padding included, with zeros in this place.
const HASH: Range<usize> = NAME.end..NAME.end + 32;
const RECORDS: usize = HASH.end;

const _: () = assert!(RECORDS == 160);

/// The longest name: 24 digits, `.`, 8 digits, `.backup` are 40.
pub const NAME_BYTES_MAX: usize = 64;
/// No file of `pg_wal` is larger than the largest segment.
pub const CONTENT_BYTES_MAX: u64 = WAL_SEGMENT_BYTES_MAX;

/// What a WAL object says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WalHeader {
    /// The repository it belongs to.
    pub repository: RepositoryId,
    /// The cluster that wrote the segment; 0 where the file does not tell (a history or backup file).
    pub system_identifier: SystemIdentifier,
    /// The file's name in `pg_wal`.
    pub name: String,
    /// The file's size.
    pub bytes: u64,
    /// The block size that it was cut with.
    pub block_size: BlockSize,
    /// Its blocks: zero, or stored in this object (pack 0, offsets from the object's beginning).
    pub blocks: Vec<BlockRecord>,
}

impl WalHeader {
    /// Bytes of the header of an object for `content_bytes`: where the first stored run may begin.
    pub fn bytes_for(content_bytes: u64, block_size: BlockSize) -> u64 {
        let records = block_size.blocks_of(content_bytes).saturating_mul(BlockRecord::BYTES as u64);
        records.saturating_add(RECORDS as u64).next_multiple_of(DIRECT_BYTES as u64)
    }

    /// How long the header is that begins with `page`, the object's first 4096 bytes: read as much, then call
    /// [`from_bytes`](Self::from_bytes).
    pub fn bytes_needed(page: &[u8]) -> Result<usize, Malformed> {
        let (bytes, block_size) = sizes(page)?;
        Ok(usize_of(Self::bytes_for(bytes, block_size)))
    }

    /// The header's pages. Refuses what [`from_bytes`](Self::from_bytes) would refuse.
    pub fn to_bytes(&self) -> Result<Vec<u8>, String> {
        self.check()?;
        let mut bytes = vec![0; usize_of(Self::bytes_for(self.bytes, self.block_size))];
        bytes[header::MAGIC].copy_from_slice(MAGIC);
        bytes[header::FORMAT_VERSION].copy_from_slice(&FORMAT.to_le_bytes());
        bytes[header::MINIMUM_READER_VERSION].copy_from_slice(&MINIMUM_READER.to_le_bytes());
        bytes[header::REPOSITORY].copy_from_slice(&self.repository.0);
        bytes[SYSTEM_IDENTIFIER].copy_from_slice(&self.system_identifier.0.to_le_bytes());
        bytes[CONTENT_BYTES].copy_from_slice(&self.bytes.to_le_bytes());
        bytes[BLOCK_BYTES].copy_from_slice(&u32::from(self.block_size).to_le_bytes());
        bytes[BLOCKS].copy_from_slice(&count_u32(self.blocks.len()));
        bytes[NAME][..self.name.len()].copy_from_slice(self.name.as_bytes());
        for (place, record) in bytes[RECORDS..].chunks_exact_mut(BlockRecord::BYTES).zip(&self.blocks) {
            place.copy_from_slice(&record.to_bytes());
        }
        let hash = Hash::of(&bytes);
        bytes[HASH].copy_from_slice(&hash.0);
        Ok(bytes)
    }

    /// The header that `bytes`, at least [`bytes_needed`](Self::bytes_needed), begin with.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Malformed> {
        let (content_bytes, block_size) = sizes(bytes)?;
        let needed = usize_of(Self::bytes_for(content_bytes, block_size));
        let Some(header) = bytes.get(..needed) else {
            let detail = format!("{} bytes are shorter than the header of this WAL object, {needed}", bytes.len());
            return Err(Malformed::damaged(bytes.len(), detail));
        };
        check_hash(header)?;
        let name = &header[NAME];
        let name_bytes = name.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        let name = std::str::from_utf8(&name[..name_bytes])
            .map_err(|_| Malformed::damaged(NAME.start, format!("the name {} is not text", shown(name))))?;
        let blocks = usize_of(block_size.blocks_of(content_bytes));
        let (records, padding) = header[RECORDS..].split_at(blocks * BlockRecord::BYTES);
        if padding.iter().any(|byte| *byte != 0) {
            return Err(Malformed::damaged(needed - padding.len(), "the padding of the header is not zero"));
        }
        let (records, _) = records.as_chunks::<{ BlockRecord::BYTES }>();
        let parsed = records.iter().enumerate().map(|(index, record)| {
            BlockRecord::from_bytes(record).map_err(|error| error.shifted(RECORDS + index * BlockRecord::BYTES))
        });
        let header = Self {
            repository: RepositoryId(bytes_at(header, header::REPOSITORY)),
            system_identifier: SystemIdentifier(u64_at(header, SYSTEM_IDENTIFIER)),
            name: name.to_owned(),
            bytes: content_bytes,
            block_size,
            blocks: parsed.collect::<Result<_, _>>()?,
        };
        header.check().map_err(|detail| Malformed::damaged(0, detail))?;
        Ok(header)
    }

    /// What holds for every header, written or read.
    fn check(&self) -> Result<(), String> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'.';
        if !(1..=NAME_BYTES_MAX).contains(&self.name.len())
            || !self.name.bytes().all(plain)
            || self.name.starts_with('.')
        {
            return Err(format!("\"{}\" is not the name of a WAL file", self.name.escape_debug()));
        }
        if self.bytes > CONTENT_BYTES_MAX {
            return Err(format!("a WAL file of {} bytes, more than {CONTENT_BYTES_MAX}", self.bytes));
        }
        let blocks = self.block_size.blocks_of(self.bytes);
        if self.blocks.len() as u64 != blocks {
            return Err(format!("{} block records for {blocks} blocks", self.blocks.len()));
        }
        let header_bytes = Self::bytes_for(self.bytes, self.block_size);
        for (index, record) in self.blocks.iter().enumerate() {
            match record.content {
                Content::Zero => {}
                Content::Stored { at, .. } if at.pack == PackId(0) && u64::from(at.offset) >= header_bytes => {}
                Content::Stored { at, .. } => {
                    return Err(format!(
                        "block {index} lies at byte {} of pack {}, not in this object",
                        at.offset, at.pack
                    ));
                }
                Content::Patched { .. } => return Err(format!("block {index} is a patch")),
            }
        }
        Ok(())
    }
}

/// Content bytes and block size, after everything that must be right before a number is believed.
fn sizes(bytes: &[u8]) -> Result<(u64, BlockSize), Malformed> {
    if bytes.len() < DIRECT_BYTES {
        let detail = format!("{} bytes are shorter than the header of a WAL object, {DIRECT_BYTES} bytes", bytes.len());
        return Err(Malformed::damaged(bytes.len(), detail));
    }
    if bytes[header::MAGIC] != *MAGIC {
        let found = shown(&bytes[header::MAGIC]);
        return Err(Malformed::damaged(
            0,
            format!("not a WAL object: begins with {found} instead of {}", shown(MAGIC)),
        ));
    }
    let version = |field| u16_at(bytes, field);
    check_versions(version(header::FORMAT_VERSION), version(header::MINIMUM_READER_VERSION), "WAL object")?;
    if bytes[header::ENCRYPTION] != [0; 8] {
        return Err(Malformed::unsupported("the WAL object is encrypted, which this version cannot read"));
    }
    let block_size = BlockSize::try_from(u32_at(bytes, BLOCK_BYTES))
        .map_err(|detail| Malformed::damaged(BLOCK_BYTES.start, detail))?;
    let content_bytes = u64_at(bytes, CONTENT_BYTES);
    if content_bytes > CONTENT_BYTES_MAX {
        let detail = format!("a WAL file of {content_bytes} bytes, more than {CONTENT_BYTES_MAX}");
        return Err(Malformed::damaged(CONTENT_BYTES.start, detail));
    }
    let blocks = u64::from(u32_at(bytes, BLOCKS));
    if blocks != block_size.blocks_of(content_bytes) {
        let detail = format!("{blocks} blocks for a WAL file of {content_bytes} bytes");
        return Err(Malformed::damaged(BLOCKS.start, detail));
    }
    Ok((content_bytes, block_size))
}

fn check_hash(header: &[u8]) -> Result<(), Malformed> {
    let expected = Hash(bytes_at(header, HASH));
    let mut hasher = blake3::Hasher::new();
    hasher.update(&header[..HASH.start]).update(&[0; 32]).update(&header[HASH.end..]);
    let found = Hash(*hasher.finalize().as_bytes());
    if found == expected {
        return Ok(());
    }
    let detail = format!("the header of the WAL object says it has BLAKE3 {expected}, but it has {found}");
    Err(Malformed::damaged(0, detail))
}

/// Headers are a few MiB at most, since [`CONTENT_BYTES_MAX`] is checked first.
fn usize_of(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]
    use super::*;
    use crate::codec::Codec;
    use crate::format::block::Extent;
    use proptest::prelude::*;

    fn header(bytes: u64) -> WalHeader {
        let block_size = BlockSize::DEFAULT;
        let start = WalHeader::bytes_for(bytes, block_size) as u32;
        let record = |index: u64| {
            let at = Extent { pack: PackId(0), offset: start + 100 * index as u32, stored: 100 };
            let content = if index % 3 == 2 { Content::Zero } else { Content::Stored { at, codec: Codec::Lz4 } };
            BlockRecord { hash: Hash([index as u8; 32]), content }
        };
        WalHeader {
            repository: RepositoryId([7; 16]),
            system_identifier: SystemIdentifier(7_300_000_000_000_000_001),
            name: "000000010000000A000000FE".to_owned(),
            bytes,
            block_size,
            blocks: (0..block_size.blocks_of(bytes)).map(record).collect(),
        }
    }

    #[test]
    fn headers_come_back_as_they_were() {
        for (bytes, pages) in [(0, 1), (80, 1), (16 << 20, 3), (1 << 30, 129)] {
            let header = header(bytes);
            let mut object = header.to_bytes().unwrap();
            assert_eq!(object.len(), pages * 4096);
            assert_eq!(WalHeader::bytes_needed(&object[..4096]), Ok(object.len()));
            object.extend_from_slice(b"runs");
            assert_eq!(WalHeader::from_bytes(&object), Ok(header));
        }
    }

    #[test]
    fn every_flipped_bit_is_refused() {
        let object = header(300_000).to_bytes().unwrap();
        for bit in 0..object.len() * 8 {
            let mut damaged = object.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(WalHeader::from_bytes(&damaged).is_err(), "bit {bit}");
        }
        for bytes in 0..object.len() {
            assert!(WalHeader::from_bytes(&object[..bytes]).is_err(), "{bytes} bytes");
        }
    }

    #[test]
    fn a_header_that_no_reader_would_accept_is_not_made() {
        let refused = |change: fn(&mut WalHeader)| {
            let mut header = header(300_000);
            change(&mut header);
            header.to_bytes().unwrap_err()
        };
        assert_eq!(refused(|header| header.name = "../x".to_owned()), "\"../x\" is not the name of a WAL file");
        assert_eq!(refused(|header| header.bytes = 1), "3 block records for 1 blocks");
        assert_eq!(refused(|header| header.bytes = 1 << 31), "a WAL file of 2147483648 bytes, more than 1073741824");
        let lies = refused(|header| {
            let at = Extent { pack: PackId(0), offset: 64, stored: 1 };
            header.blocks[1].content = Content::Stored { at, codec: Codec::Lz4 };
        });
        assert_eq!(lies, "block 1 lies at byte 64 of pack 00000000, not in this object");
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes: Vec<u8>, bits in prop::collection::vec(any::<prop::sample::Index>(), 1..4)) {
            let _ = WalHeader::from_bytes(&bytes);
            let mut object = header(300_000).to_bytes().unwrap();
            object.splice(8.., bytes.iter().copied().chain(std::iter::repeat_n(0, 4096)));
            let _ = WalHeader::from_bytes(&object);
            for bit in bits {
                let bit = bit.index(RECORDS * 8);
                object[bit / 8] ^= 1 << (bit % 8);
            }
            let _ = WalHeader::bytes_needed(&object).and_then(|_| WalHeader::from_bytes(&object));
        }
    }
}
