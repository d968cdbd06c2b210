//! The header of a manifest file, `manifests/<label>.manifest`. Chunks follow it, one after another, without gaps.

use std::ops::Range;

use crate::format::Malformed;
use crate::format::fields::{count_u16, shown, u16_at};
use crate::format::header::{self, BODY};
use crate::format::repository::RepositoryId;
use crate::units::BackupLabel;

const MAGIC: &[u8; 8] = b"pghymani";
const LABEL_BYTES: Range<usize> = BODY..BODY + 2;
const LABEL: Range<usize> = LABEL_BYTES.end..LABEL_BYTES.end + 64;

/// What a manifest file says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestHeader {
    /// The repository it belongs to.
    pub repository: RepositoryId,
    /// The backup that wrote it.
    pub label: BackupLabel,
}

impl ManifestHeader {
    /// Bytes of the header; the first chunk begins here.
    pub const BYTES: usize = header::HEADER_BYTES;

    /// The header page.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut page = header::begin(MAGIC, &self.repository);
        let label = self.label.as_str().as_bytes();
        page[LABEL_BYTES].copy_from_slice(&count_u16(label.len()));
        page[LABEL][..label.len()].copy_from_slice(label);
        header::seal(&mut page);
        page
    }

    /// The header that `bytes` begin with.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Malformed> {
        let (page, repository) = header::open(bytes, MAGIC, "manifest")?;
        let label_bytes = usize::from(u16_at(page, LABEL_BYTES));
        let text = page[LABEL].get(..label_bytes).and_then(|label| std::str::from_utf8(label).ok());
        let refuse = || {
            let found = shown(&page[LABEL]);
            Malformed::damaged(LABEL.start, format!("no backup label in {label_bytes} bytes of {found}"))
        };
        let label = text.and_then(|text| text.parse().ok()).ok_or_else(refuse)?;
        Ok(Self { repository, label })
    }
}
