//! The header of a pack. Stored runs follow it: raw ones at multiples of 4096 and padded to it, encoded ones
//! without gaps.

use std::ops::Range;

use crate::format::Malformed;
use crate::format::fields::u32_at;
use crate::format::header::{self, BODY};
use crate::format::repository::RepositoryId;
use crate::units::{BlockSize, PackId};

pub use crate::format::header::HEADER_BYTES;

const MAGIC: &[u8; 8] = b"pghypack";
const PACK: Range<usize> = BODY..BODY + 4;
const BLOCK_BYTES: Range<usize> = PACK.end..PACK.end + 4;

/// A pack is closed before it grows beyond this: small enough to move and to rewrite, large enough to read in sequence.
/// The records' 32-bit offsets would carry four times as much.
pub const PACK_BYTES_MAX: u64 = 1 << 30;

/// What a pack says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackHeader {
    /// The repository it belongs to.
    pub repository: RepositoryId,
    /// Its number, as in its file name.
    pub pack: PackId,
    /// The block size it was written with.
    pub block_size: BlockSize,
}

impl PackHeader {
    /// The header page.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut page = header::begin(MAGIC, &self.repository);
        page[PACK].copy_from_slice(&self.pack.0.to_le_bytes());
        page[BLOCK_BYTES].copy_from_slice(&u32::from(self.block_size).to_le_bytes());
        header::seal(&mut page);
        page
    }

    /// The header that `bytes` begin with.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Malformed> {
        let (page, repository) = header::open(bytes, MAGIC, "pack")?;
        let block_size = BlockSize::try_from(u32_at(page, BLOCK_BYTES))
            .map_err(|detail| Malformed::damaged(BLOCK_BYTES.start, detail))?;
        Ok(Self { repository, pack: PackId(u32_at(page, PACK)), block_size })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::format::header::tests::as_of_a_newer_format;
    use proptest::prelude::*;

    fn header() -> PackHeader {
        PackHeader { repository: RepositoryId([0xAB; 16]), pack: PackId(0x1F), block_size: BlockSize::DEFAULT }
    }

    #[test]
    fn a_header_comes_back_as_it_was_whatever_follows() {
        let mut bytes = header().to_bytes();
        assert_eq!(bytes.len(), HEADER_BYTES);
        bytes.extend_from_slice(b"runs");
        assert_eq!(PackHeader::from_bytes(&bytes), Ok(header()));
    }

    #[test]
    fn every_flipped_bit_is_damage() {
        let page = header().to_bytes();
        for bit in 0..page.len() * 8 {
            let mut damaged = page.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(matches!(PackHeader::from_bytes(&damaged), Err(Malformed::Damaged { .. })), "bit {bit}");
        }
    }

    #[test]
    fn a_newer_format_is_refused_as_such() {
        let refused = PackHeader::from_bytes(&as_of_a_newer_format(header().to_bytes())).unwrap_err();
        let words = "the pack needs a reader of format 2; this version reads up to 1";
        assert_eq!(refused, Malformed::unsupported(words));
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes: Vec<u8>) {
            prop_assert!(PackHeader::from_bytes(&bytes).is_err());
        }
    }
}
