//! `pghydrant.json` and `cluster.json`: what a repository and a cluster in it are, readable by people.

use std::fmt;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::codec::Compression;
use crate::format::header::check_versions;
use crate::format::{FORMAT, MINIMUM_READER, Malformed};
use crate::units::{BlockSize, ClusterName, SystemIdentifier};

/// 128 random bits that every pack, manifest and WAL object of a repository repeats, so that a file of another
/// repository is not taken for one of its own. Printed as 32 hex digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RepositoryId(pub [u8; 16]);

impl fmt::Display for RepositoryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl TryFrom<String> for RepositoryId {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let plain = text.len() == 32 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        match u128::from_str_radix(&text, 16) {
            Ok(number) if plain => Ok(Self(number.to_be_bytes())),
            _ => Err(format!("\"{}\" is not a repository id of 32 lower-case hex digits", text.escape_debug())),
        }
    }
}

impl From<RepositoryId> for String {
    fn from(id: RepositoryId) -> Self {
        id.to_string()
    }
}

/// `pghydrant.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RepositoryInfo {
    /// Format of the version that made it.
    pub format: u16,
    /// The oldest reader that understands it.
    pub minimum_reader: u16,
    /// Its id.
    pub id: RepositoryId,
    /// What new blocks are compressed with.
    pub compression: Compression,
    /// The size of all its blocks.
    pub block_bytes: BlockSize,
    /// UTC, RFC 3339.
    pub created_at: String,
    /// Always null in format 1; anything else is refused.
    pub encryption: Option<serde_json::Value>,
}

/// `clusters/<cluster>/cluster.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClusterInfo {
    /// Format of the version that made it.
    pub format: u16,
    /// The oldest reader that understands it.
    pub minimum_reader: u16,
    /// The user's name for it; the name of its directory too.
    pub name: ClusterName,
    /// Whose backups and WAL it holds: no other cluster's are taken.
    pub system_identifier: SystemIdentifier,
    /// `wal_segment_size`, bytes.
    pub wal_segment_bytes: u64,
    /// UTC, RFC 3339.
    pub created_at: String,
}

impl RepositoryInfo {
    /// A new repository's description.
    pub fn new(id: RepositoryId, compression: Compression, block_bytes: BlockSize, created_at: String) -> Self {
        Self {
            format: FORMAT,
            minimum_reader: MINIMUM_READER,
            id,
            compression,
            block_bytes,
            created_at,
            encryption: None,
        }
    }

    /// The file's content.
    pub fn to_json(&self) -> Result<Vec<u8>, Malformed> {
        write_json(self)
    }

    /// What the file's content says.
    pub fn from_json(bytes: &[u8]) -> Result<Self, Malformed> {
        let info: Self = read_json(bytes, "repository")?;
        if info.encryption.is_some() {
            return Err(Malformed::unsupported("the repository is encrypted, which this version cannot read"));
        }
        Ok(info)
    }
}

impl ClusterInfo {
    /// A new cluster's description.
    pub fn new(
        name: ClusterName,
        system_identifier: SystemIdentifier,
        wal_segment_bytes: u64,
        created_at: String,
    ) -> Self {
        Self { format: FORMAT, minimum_reader: MINIMUM_READER, name, system_identifier, wal_segment_bytes, created_at }
    }

    /// The file's content.
    pub fn to_json(&self) -> Result<Vec<u8>, Malformed> {
        write_json(self)
    }

    /// What the file's content says.
    pub fn from_json(bytes: &[u8]) -> Result<Self, Malformed> {
        let info: Self = read_json(bytes, "cluster")?;
        let sizes = WAL_SEGMENT_BYTES_MIN..=WAL_SEGMENT_BYTES_MAX;
        if !sizes.contains(&info.wal_segment_bytes) || !info.wal_segment_bytes.is_power_of_two() {
            let found = info.wal_segment_bytes;
            return Err(Malformed::damaged(0, format!("{found} bytes are no WAL segment size (1 MiB to 1 GiB)")));
        }
        Ok(info)
    }
}

/// `initdb --wal-segsize` takes 1 MiB to 1 GiB, in powers of two.
pub const WAL_SEGMENT_BYTES_MIN: u64 = 1 << 20;
/// See [`WAL_SEGMENT_BYTES_MIN`].
pub const WAL_SEGMENT_BYTES_MAX: u64 = 1 << 30;

/// What every one of the readable files begins with, whatever its version.
#[derive(Deserialize)]
struct Versions {
    format: u16,
    minimum_reader: u16,
}

/// Readable JSON with a line feed at its end.
pub(super) fn write_json(value: &impl Serialize) -> Result<Vec<u8>, Malformed> {
    let refuse = |error: serde_json::Error| Malformed::damaged(0, format!("cannot be written as JSON: {error}"));
    let mut bytes = serde_json::to_vec_pretty(value).map_err(refuse)?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// Versions first: only what this version may read is looked at further. Unknown fields are passed over, since
/// later writers of the same format add some.
pub(super) fn read_json<T: DeserializeOwned>(bytes: &[u8], what: &str) -> Result<T, Malformed> {
    let refuse = |error: serde_json::Error| {
        Malformed::damaged(offset_of(bytes, error.line(), error.column()), format!("not a {what}'s JSON: {error}"))
    };
    let versions: Versions = serde_json::from_slice(bytes).map_err(refuse)?;
    check_versions(versions.format, versions.minimum_reader, what)?;
    serde_json::from_slice(bytes).map_err(refuse)
}

/// The byte at which serde_json stopped, from the line and column that it tells.
fn offset_of(bytes: &[u8], line: usize, column: usize) -> usize {
    let before: usize =
        bytes.split_inclusive(|byte| *byte == b'\n').take(line.saturating_sub(1)).map(<[u8]>::len).sum();
    before.saturating_add(column.saturating_sub(1)).min(bytes.len())
}
