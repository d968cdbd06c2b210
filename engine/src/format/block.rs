//! A block's record in the manifest: its hash, and where its bytes lie.

use crate::checksum::Hash;
use crate::codec::Codec;
use crate::units::PackId;

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
