//! A block's record in the manifest: its hash, and where its bytes lie. 64 bytes, little-endian.
//!
//! The unused fields of a record are zero and are checked to be, so a record has one form only: the same blocks make
//! the same leaf chunk, byte for byte, and a later format can give the zeros a meaning that this version refuses.

use std::ops::Range;

use crate::checksum::Hash;
use crate::codec::Codec;
use crate::format::Malformed;
use crate::units::{DIRECT_BYTES, PackId};

const HASH: Range<usize> = 0..32;
const AT: Range<usize> = HASH.end..HASH.end + Extent::BYTES;
const PATCH: Range<usize> = AT.end..AT.end + Extent::BYTES;
const KIND: usize = PATCH.end;
const CODEC: usize = KIND + 1;
const PATCH_CODEC: usize = CODEC + 1;
const CIPHER: usize = PATCH_CODEC + 1;
const KEY_ID: Range<usize> = CIPHER + 1..CIPHER + 5;

const _: () = assert!(KEY_ID.end == BlockRecord::BYTES);

const KIND_ZERO: u8 = 0;
const KIND_STORED: u8 = 1;
const KIND_PATCHED: u8 = 2;

/// A run of stored bytes in a pack. Packs stay below 4 GiB, so 32 bits hold an offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Extent {
    /// Which pack.
    pub pack: PackId,
    /// First byte in the pack.
    pub offset: u32,
    /// Stored bytes.
    pub stored: u32,
}

/// Where the bytes of a block come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// All zero: nothing is stored; in a target it is an unwritten extent.
    Zero,
    /// Stored whole.
    Stored {
        /// Where.
        at: Extent,
        /// How to decode.
        codec: Codec,
    },
    /// The changed pages over a block stored whole: one level deep, never more.
    Patched {
        /// The block that most pages come from, always stored whole.
        base: Extent,
        /// How to decode the base.
        base_codec: Codec,
        /// The patch: a bitmap of replaced pages, then those pages.
        patch: Extent,
        /// How to decode the patch.
        patch_codec: Codec,
    },
}

/// One block of one file, as a backup has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRecord {
    /// BLAKE3-256 of the decoded bytes.
    pub hash: Hash,
    /// Where they lie.
    pub content: Content,
}

impl Extent {
    /// Bytes of an extent in a record.
    pub const BYTES: usize = 12;

    /// The first byte after the run.
    pub const fn end(&self) -> u64 {
        self.offset as u64 + self.stored as u64
    }

    fn write(&self, bytes: &mut [u8]) {
        bytes[0..4].copy_from_slice(&self.pack.0.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.offset.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.stored.to_le_bytes());
    }

    /// The run at `field` of a record, stored with `codec`.
    fn read(bytes: &[u8; BlockRecord::BYTES], field: Range<usize>, codec: Codec) -> Result<Self, Malformed> {
        let number = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let start = field.start;
        let extent = Self { pack: PackId(number(start)), offset: number(start + 4), stored: number(start + 8) };
        if extent.stored == 0 {
            return Err(Malformed::damaged(start + 8, "a stored run of 0 bytes"));
        }
        if extent.offset.checked_add(extent.stored).is_none() {
            let detail = format!("a run of {} bytes at {} passes the end of any pack", extent.stored, extent.offset);
            return Err(Malformed::damaged(start + 4, detail));
        }
        if codec == Codec::Raw && !(extent.offset as usize).is_multiple_of(DIRECT_BYTES) {
            let detail = format!("a raw run at {}, which is not a multiple of {DIRECT_BYTES}", extent.offset);
            return Err(Malformed::damaged(start + 4, detail));
        }
        Ok(extent)
    }
}

impl BlockRecord {
    /// Bytes of a record.
    pub const BYTES: usize = 64;

    /// The record as it lies in a leaf chunk or a WAL object.
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[HASH].copy_from_slice(&self.hash.0);
        match &self.content {
            Content::Zero => bytes[KIND] = KIND_ZERO,
            Content::Stored { at, codec } => {
                bytes[KIND] = KIND_STORED;
                at.write(&mut bytes[AT]);
                bytes[CODEC] = *codec as u8;
            }
            Content::Patched { base, base_codec, patch, patch_codec } => {
                bytes[KIND] = KIND_PATCHED;
                base.write(&mut bytes[AT]);
                bytes[CODEC] = *base_codec as u8;
                patch.write(&mut bytes[PATCH]);
                bytes[PATCH_CODEC] = *patch_codec as u8;
            }
        }
        bytes
    }

    /// The record that [`to_bytes`](Self::to_bytes) made, or what is wrong with it.
    pub fn from_bytes(bytes: &[u8; Self::BYTES]) -> Result<Self, Malformed> {
        if bytes[CIPHER] != 0 || bytes[KEY_ID] != [0; 4] {
            let detail = format!("the block is encrypted (cipher {}), which this version cannot read", bytes[CIPHER]);
            return Err(Malformed::unsupported(detail));
        }
        let codec = codec_at(bytes, CODEC)?;
        let patch_codec = codec_at(bytes, PATCH_CODEC)?;
        let content = match bytes[KIND] {
            KIND_ZERO => {
                require_zero(bytes, AT.start..PATCH.end)?;
                require_zero(bytes, CODEC..PATCH_CODEC + 1)?;
                Content::Zero
            }
            KIND_STORED => {
                require_zero(bytes, PATCH)?;
                require_zero(bytes, PATCH_CODEC..PATCH_CODEC + 1)?;
                Content::Stored { at: Extent::read(bytes, AT, codec)?, codec }
            }
            KIND_PATCHED => Content::Patched {
                base: Extent::read(bytes, AT, codec)?,
                base_codec: codec,
                patch: Extent::read(bytes, PATCH, patch_codec)?,
                patch_codec,
            },
            other => return Err(Malformed::damaged(KIND, format!("block kind {other}, expected 0 to 2"))),
        };
        let mut hash = [0; 32];
        hash.copy_from_slice(&bytes[HASH]);
        Ok(Self { hash: Hash(hash), content })
    }
}

fn codec_at(bytes: &[u8; BlockRecord::BYTES], at: usize) -> Result<Codec, Malformed> {
    let refuse = || Malformed::damaged(at, format!("codec {}, expected 0 (raw), 1 (lz4) or 2 (zstd)", bytes[at]));
    Codec::from_byte(bytes[at]).ok_or_else(refuse)
}

fn require_zero(bytes: &[u8; BlockRecord::BYTES], unused: Range<usize>) -> Result<(), Malformed> {
    match bytes[unused.clone()].iter().position(|byte| *byte != 0) {
        None => Ok(()),
        Some(at) => Err(Malformed::damaged(unused.start + at, "an unused field of a block record is not zero")),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]
    use super::*;
    use proptest::prelude::*;

    fn any_codec() -> impl Strategy<Value = Codec> {
        prop_oneof![Just(Codec::Raw), Just(Codec::Lz4), Just(Codec::Zstd)]
    }

    fn any_run() -> impl Strategy<Value = (Extent, Codec)> {
        (any::<u32>(), 0..u32::MAX, any::<u32>(), any_codec()).prop_map(|(pack, offset, stored, codec)| {
            let offset = if codec == Codec::Raw { offset - offset % DIRECT_BYTES as u32 } else { offset };
            (Extent { pack: PackId(pack), offset, stored: 1 + stored % (u32::MAX - offset) }, codec)
        })
    }

    /// Any record that a writer may make.
    pub(crate) fn any_record() -> impl Strategy<Value = BlockRecord> {
        let content = prop_oneof![
            Just(Content::Zero),
            any_run().prop_map(|(at, codec)| Content::Stored { at, codec }),
            (any_run(), any_run()).prop_map(|((base, base_codec), (patch, patch_codec))| Content::Patched {
                base,
                base_codec,
                patch,
                patch_codec
            }),
        ];
        (any::<[u8; 32]>(), content).prop_map(|(hash, content)| BlockRecord { hash: Hash(hash), content })
    }

    proptest! {
        #[test]
        fn a_record_comes_back_as_it_was(record in any_record()) {
            prop_assert_eq!(BlockRecord::from_bytes(&record.to_bytes()), Ok(record));
        }

        #[test]
        fn a_record_has_one_form_only(record in any_record(), at in HASH.end..BlockRecord::BYTES, bit in 0_u8..8) {
            let mut bytes = record.to_bytes();
            bytes[at] ^= 1 << bit;
            if let Ok(other) = BlockRecord::from_bytes(&bytes) {
                prop_assert_eq!(other.to_bytes(), bytes);
            }
        }
    }

    #[test]
    fn refusals_say_what_was_found() {
        let at = Extent { pack: PackId(1), offset: 4096, stored: 100 };
        let good = BlockRecord { hash: Hash([7; 32]), content: Content::Stored { at, codec: Codec::Raw } }.to_bytes();
        let refusal = |at: usize, byte: u8| {
            let mut bytes = good;
            bytes[at] = byte;
            BlockRecord::from_bytes(&bytes).unwrap_err().to_string()
        };
        assert_eq!(refusal(KIND, 9), "block kind 9, expected 0 to 2 (byte 56)");
        assert_eq!(refusal(CODEC, 3), "codec 3, expected 0 (raw), 1 (lz4) or 2 (zstd) (byte 57)");
        assert_eq!(refusal(CIPHER, 1), "the block is encrypted (cipher 1), which this version cannot read");
        assert_eq!(refusal(AT.start + 4, 1), "a raw run at 4097, which is not a multiple of 4096 (byte 36)");
        assert_eq!(refusal(PATCH.start, 1), "an unused field of a block record is not zero (byte 44)");
        assert_eq!(refusal(AT.start + 8, 0), "a stored run of 0 bytes (byte 40)");
    }
}
