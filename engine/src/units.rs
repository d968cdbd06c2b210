//! Typed numbers: a block index is not a byte offset, a timeline is not a pack.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A PostgreSQL page. Clusters built with another `BLCKSZ` are refused at backup.
pub const PAGE_BYTES: usize = 8192;
/// What O_DIRECT asks of offsets, lengths and addresses on every disk and file system that we support.
pub const DIRECT_BYTES: usize = 4096;
/// PostgreSQL cuts relations into files of this size (`RELSEG_SIZE` pages).
pub const RELATION_SEGMENT_BYTES: u64 = 1 << 30;

const _: () = assert!(PAGE_BYTES.is_multiple_of(DIRECT_BYTES));

/// The size of a repository's blocks: a power of two of whole pages, 32 KiB to 1 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct BlockSize(u32);

impl BlockSize {
    /// The smallest block: below it the manifest weighs more than the read-ahead gains.
    pub const MIN: Self = Self(32 << 10);
    /// The largest block: one request of the mount.
    pub const MAX: Self = Self(1 << 20);
    /// 128 KiB: lz4's sweet spot; see *benches/README.md*.
    pub const DEFAULT: Self = Self(128 << 10);

    /// Bytes of a whole block.
    pub const fn bytes(self) -> usize {
        self.0 as usize
    }

    /// How many blocks a file of `file_bytes` has.
    pub const fn blocks_of(self, file_bytes: u64) -> u64 {
        file_bytes.div_ceil(self.0 as u64)
    }

    /// The length of block `index` of a file of `file_bytes`: whole, but for the last. Zero past the end.
    pub fn block_bytes_at(self, file_bytes: u64, index: u64) -> usize {
        let start = index.saturating_mul(u64::from(self.0));
        file_bytes.saturating_sub(start).min(u64::from(self.0)) as usize
    }
}

impl TryFrom<u32> for BlockSize {
    type Error = String;

    fn try_from(bytes: u32) -> Result<Self, String> {
        let size = Self(bytes);
        if bytes.is_power_of_two() && size >= Self::MIN && size <= Self::MAX {
            Ok(size)
        } else {
            Err(format!("block size {bytes} is not a power of two from 32 KiB to 1 MiB"))
        }
    }
}

impl From<BlockSize> for u32 {
    fn from(size: BlockSize) -> Self {
        size.0
    }
}

/// A pack of a cluster: file `packs/<8 hex digits>.pack`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PackId(pub u32);

impl fmt::Display for PackId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

/// The place of a block record in a manifest: `leaf * LEAF_RECORDS + slot`. Files' blocks are consecutive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockNumber(pub u64);

/// A position in the write-ahead log, printed as PostgreSQL does: `0/3000028`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Lsn(pub u64);

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

impl FromStr for Lsn {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse = || format!("\"{text}\" is not an LSN such as 0/3000028");
        let (high, low) = text.split_once('/').ok_or_else(refuse)?;
        let half = |digits: &str| {
            let plain = (1..=8).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
            plain.then(|| u32::from_str_radix(digits, 16).ok()).flatten().ok_or_else(refuse)
        };
        Ok(Self(u64::from(half(high)?) << 32 | u64::from(half(low)?)))
    }
}

impl TryFrom<String> for Lsn {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Lsn> for String {
    fn from(lsn: Lsn) -> Self {
        lsn.to_string()
    }
}

/// A timeline of a cluster, from 1 on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Timeline(pub u32);

impl fmt::Display for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The number that `initdb` gives a cluster and all its copies keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SystemIdentifier(pub u64);

impl fmt::Display for SystemIdentifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl TryFrom<String> for SystemIdentifier {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse().map(Self).map_err(|_| format!("\"{text}\" is not a system identifier"))
    }
}

impl From<SystemIdentifier> for String {
    fn from(identifier: SystemIdentifier) -> Self {
        identifier.to_string()
    }
}

macro_rules! name_type {
    ($(#[$meta:meta])* $name:ident, $what:literal) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name as text; safe as one path component.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = String;

            fn try_from(text: String) -> Result<Self, String> {
                let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
                if (1..=64).contains(&text.len()) && text.bytes().all(plain) && !text.starts_with(['.', '-']) {
                    Ok(Self(text))
                } else {
                    Err(format!(
                        concat!("\"{}\" is not a ", $what, ": 1 to 64 letters, digits, \"-\", \"_\", \".\", not starting with \".\" or \"-\""),
                        text.escape_debug()
                    ))
                }
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }

        impl FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                Self::try_from(text.to_owned())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name_type!(
    /// The user's name for a cluster in a repository.
    ClusterName,
    "cluster name"
);
name_type!(
    /// A backup's name: the UTC second of its start, `F` (full) or `I` (incremental): `20261122T081500Z-F`.
    BackupLabel,
    "backup label"
);
name_type!(
    /// A session's name: what `retry`, `cancel` and `promote` take.
    SessionId,
    "session id"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_lsn_is_read_and_printed_as_postgresql_does() {
        assert_eq!("0/3000028".parse(), Ok(Lsn(0x0300_0028)));
        assert_eq!("1A/FF".parse::<Lsn>().map(|lsn| lsn.to_string()), Ok("1A/FF".to_owned()));
        for bad in ["", "0", "0/", "/0", "0/123456789", "0/-1", "0/+1", "x/1", "0/1/2"] {
            assert!(bad.parse::<Lsn>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_name_is_one_safe_path_component() {
        for bad in ["", ".", "..", "a/b", "-x", "a b", "a\0"] {
            assert!(bad.parse::<ClusterName>().is_err(), "{bad:?}");
        }
        assert!("main-15.prod_1".parse::<ClusterName>().is_ok());
    }

    #[test]
    fn the_last_block_of_a_file_is_as_long_as_what_is_left() {
        let size = BlockSize::DEFAULT;
        assert_eq!(size.blocks_of(0), 0);
        assert_eq!(size.blocks_of(131_073), 2);
        assert_eq!(size.block_bytes_at(131_073, 1), 1);
        assert_eq!(size.block_bytes_at(131_073, 2), 0);
    }
}
