//! `<label>.unfinished`: what a backup that runs, or was interrupted, was going to write, readable by people.
//!
//! It is there before anything of the backup is, and goes when the backup's description is there. So whatever belongs to no
//! backup and is not claimed by such a mark was not left by a crash: something of a backup is lost.

use serde::{Deserialize, Serialize};

use crate::format::json::{read_json, write_json};
use crate::format::{FORMAT, MINIMUM_READER, Malformed};
use crate::units::{BackupLabel, PackId};

/// The mark of a backup that is not committed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UnfinishedInfo {
    /// Format of the version that wrote it.
    pub format: u16,
    /// The oldest reader that understands it.
    pub minimum_reader: u16,
    /// The backup.
    pub label: BackupLabel,
    /// UTC, RFC 3339.
    pub started_at: String,
    /// It writes no pack of a lower number, and those before it had been swept.
    pub first_pack: PackId,
}

impl UnfinishedInfo {
    /// The mark of a backup that begins.
    pub fn new(label: BackupLabel, started_at: String, first_pack: PackId) -> Self {
        Self { format: FORMAT, minimum_reader: MINIMUM_READER, label, started_at, first_pack }
    }

    /// The file's content.
    pub fn to_json(&self) -> Result<Vec<u8>, Malformed> {
        write_json(self)
    }

    /// What the file's content says.
    pub fn from_json(bytes: &[u8]) -> Result<Self, Malformed> {
        read_json(bytes, "unfinished backup")
    }
}
