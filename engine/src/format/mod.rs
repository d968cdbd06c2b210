//! The repository's bytes: structs to bytes and back, pure. *FORMAT.md* describes them; a test holds it true.
//!
//! Bytes are hostile: every parser checks length, magic, version and checksum, and only then computes with what it
//! reads. None panics, none allocates by a number it has not checked, and every refusal says what was found.

use std::path::Path;

use crate::error::Error;

pub mod backup;
pub mod block;
pub mod environment;
pub(crate) mod fields;
pub mod file;
pub mod header;
mod json;
pub mod manifest;
pub mod pack;
pub mod patch;
pub mod repository;
pub mod unfinished;
pub mod wal;

/// The format that this version writes, and the newest that it reads.
pub const FORMAT: u16 = 1;
/// The oldest reader that understands what this version writes.
pub const MINIMUM_READER: u16 = 1;

/// Why bytes were refused. The parsers know no path: the caller, who does, makes an [`Error`] of it with
/// [`Malformed::in_file`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// The bytes are not what was written.
    #[error("{detail} (byte {offset})")]
    Damaged {
        /// Where in the parsed bytes.
        offset: usize,
        /// What was expected and what was found.
        detail: String,
    },
    /// The bytes are whole, but a newer version wrote them.
    #[error("{detail}")]
    Unsupported {
        /// What it needs and what this version has.
        detail: String,
    },
}

impl Malformed {
    /// Damage at a byte of the parsed bytes.
    pub fn damaged(offset: usize, detail: impl Into<String>) -> Self {
        Self::Damaged { offset, detail: detail.into() }
    }

    /// Something that this version cannot read.
    pub fn unsupported(detail: impl Into<String>) -> Self {
        Self::Unsupported { detail: detail.into() }
    }

    /// The error for a caller who parsed bytes that lie in the file `path` from byte `start` on.
    pub fn in_file(self, path: impl AsRef<Path>, start: u64) -> Error {
        match self {
            Self::Damaged { offset, detail } => Error::corrupt_at(path, start.saturating_add(offset as u64), detail),
            Self::Unsupported { detail } => Error::Unsupported { path: path.as_ref().to_owned(), detail },
        }
    }

    /// The same damage, seen from bytes that hold the parsed ones from `offset` on.
    pub(crate) fn shifted(self, by: usize) -> Self {
        match self {
            Self::Damaged { offset, detail } => Self::Damaged { offset: offset.saturating_add(by), detail },
            unsupported @ Self::Unsupported { .. } => unsupported,
        }
    }
}
