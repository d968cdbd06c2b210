//! Block n of file f, verified.

use crate::Result;
use crate::checksum::Verified;
use crate::format::block::BlockRecord;
use crate::format::file::FileRecord;
use crate::repository::Backup;

/// A reader of blocks; cheap to clone, shared by threads.
#[derive(Clone, Debug)]
pub struct Blocks {
    _backup: (),
}

/// Buffers that a reader keeps between calls.
#[derive(Debug, Default)]
pub struct Scratch {
    _stored: Vec<u8>,
}

/// Stored bytes that are not the block of their record.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub struct Damage {
    /// True where the patch is at fault and not the base.
    pub in_patch: bool,
    /// What was expected and what was found.
    pub detail: String,
}

#[allow(unused_variables, clippy::unimplemented)]
impl Blocks {
    pub(crate) fn of_backup(backup: &Backup) -> Self {
        unimplemented!()
    }
    /// Reads one block into `out`, which has the block's length.
    pub fn read_block<'out>(
        &self,
        record: &BlockRecord,
        out: &'out mut [u8],
        scratch: &mut Scratch,
    ) -> Result<Verified<&'out mut [u8]>> {
        unimplemented!()
    }
    /// Reads bytes of a file, as many as `out` holds or the file has from `offset` on; every block they come from is
    /// verified.
    pub fn read_range(&self, file: &FileRecord, offset: u64, out: &mut [u8], scratch: &mut Scratch) -> Result<usize> {
        unimplemented!()
    }
}

/// Decodes a block whose stored runs the caller has read: `base` is the run of [`Content::Stored`]'s `at` or
/// [`Content::Patched`]'s `base`, `patch` that of its `patch` (else empty); both empty for a zero block.
///
/// [`Content::Stored`]: crate::format::block::Content::Stored
/// [`Content::Patched`]: crate::format::block::Content::Patched
#[allow(unused_variables, clippy::unimplemented)]
pub fn decode_verified<'out>(
    record: &BlockRecord,
    base: &[u8],
    patch: &[u8],
    out: &'out mut [u8],
    scratch: &mut Scratch,
) -> Result<Verified<&'out mut [u8]>, Damage> {
    unimplemented!()
}
