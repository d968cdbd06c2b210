//! `pghydrant.json` and `cluster.json`: what a repository and a cluster in it are, readable by people.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::codec::Compression;
use crate::format::json::{read_json, write_json};
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
        check_segment_bytes(info.wal_segment_bytes).map_err(|detail| Malformed::damaged(0, detail))?;
        Ok(info)
    }
}

/// Refuses what PostgreSQL's segments cannot be.
pub(super) fn check_segment_bytes(bytes: u64) -> Result<(), String> {
    if (WAL_SEGMENT_BYTES_MIN..=WAL_SEGMENT_BYTES_MAX).contains(&bytes) && bytes.is_power_of_two() {
        return Ok(());
    }
    Err(format!("{bytes} bytes are no WAL segment size (1 MiB to 1 GiB)"))
}

/// `initdb --wal-segsize` takes 1 MiB to 1 GiB, in powers of two.
pub const WAL_SEGMENT_BYTES_MIN: u64 = 1 << 20;
/// See [`WAL_SEGMENT_BYTES_MIN`].
pub const WAL_SEGMENT_BYTES_MAX: u64 = 1 << 30;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::format::json::sealed;
    use crate::format::json::tests::resealed;

    fn info() -> RepositoryInfo {
        let id = RepositoryId::try_from("00112233445566778899aabbccddeeff".to_owned()).unwrap();
        RepositoryInfo::new(id, Compression::Lz4, BlockSize::DEFAULT, "2026-11-22T08:15:00Z".to_owned())
    }

    #[test]
    fn the_repository_file_is_readable_and_comes_back() {
        let text = String::from_utf8(info().to_json().unwrap()).unwrap();
        let expected = concat!(
            "{\n  \"format\": 1,\n  \"minimum_reader\": 1,\n  \"id\": \"00112233445566778899aabbccddeeff\",\n",
            "  \"compression\": \"lz4\",\n  \"block_bytes\": 131072,\n",
            "  \"created_at\": \"2026-11-22T08:15:00Z\",\n  \"encryption\": null,\n",
        );
        assert_eq!(text.as_bytes(), sealed(expected));
        assert_eq!(RepositoryInfo::from_json(text.as_bytes()), Ok(info()));
    }

    #[test]
    fn what_this_version_cannot_read_is_refused() {
        let json = info().to_json().unwrap();
        let refusal = |from: &str, to: &str| RepositoryInfo::from_json(&resealed(&json, from, to)).unwrap_err();
        // A newer format may look any way at all behind its versions.
        let newer = RepositoryInfo::from_json(br#"{"format": 3, "minimum_reader": 2, "id": 7}"#).unwrap_err();
        let words = "the repository needs a reader of format 2; this version reads up to 1";
        assert_eq!(newer, Malformed::unsupported(words));
        assert!(matches!(refusal("null", "\"age\""), Malformed::Unsupported { .. }));
        assert!(matches!(refusal("131072", "131073"), Malformed::Damaged { .. }));
        assert!(matches!(refusal("eeff", "eefg"), Malformed::Damaged { .. }));
        assert!(matches!(refusal("lz4", "lz5"), Malformed::Damaged { .. }));
        let Malformed::Damaged { offset, detail } = refusal("\"lz4\"", "lz4") else { panic!("not damage") };
        assert!(detail.starts_with("not a repository's JSON: "), "{detail}");
        assert_eq!(&resealed(&json, "\"lz4\"", "lz4")[offset - 1..offset + 2], b" lz");
        assert!(RepositoryInfo::from_json(b"").is_err());
        // A field of a later writer of this format is passed over.
        assert_eq!(RepositoryInfo::from_json(&resealed(&json, "{\n", "{\n  \"new\": [1],\n")), Ok(info()));
    }

    #[test]
    fn a_cluster_has_a_segment_size_that_postgresql_knows() {
        let cluster = |bytes| {
            let created = "2026-11-22T08:15:00Z".to_owned();
            ClusterInfo::new("main".parse().unwrap(), SystemIdentifier(u64::MAX), bytes, created)
        };
        let info = cluster(16 << 20);
        assert_eq!(ClusterInfo::from_json(&info.to_json().unwrap()), Ok(info));
        for bad in [0, 1 << 19, 3 << 20, 1 << 31] {
            assert!(ClusterInfo::from_json(&cluster(bad).to_json().unwrap()).is_err(), "{bad}");
        }
    }
}
