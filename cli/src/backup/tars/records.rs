//! The block records of a backup whose files come in an order of their own.
//!
//! A manifest has files in path order, a tar as the server found them. So the records wait in a file without a name, each
//! at the place that its block got when its file's header was read, which no worker must wait for another to know. They
//! take 64 bytes a block, 1/2048 of the data at the usual block size: 5 GiB for 10 TiB, nothing of it in memory.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use engine::format::block::BlockRecord;
use engine::{Error, Result};

/// The file of records.
pub(super) struct Records {
    file: File,
    directory: PathBuf,
}

impl Records {
    pub(super) fn create() -> Result<Self> {
        let directory = scratch_directory();
        let file = tempfile::tempfile_in(&directory).map_err(|cause| Error::io("make a file in", &directory, cause))?;
        Ok(Self { file, directory })
    }

    /// Writes the records of blocks that follow each other, from number `first` on.
    pub(super) fn write(&self, first: u64, records: &[BlockRecord]) -> Result<()> {
        let bytes: Vec<u8> = records.iter().flat_map(BlockRecord::to_bytes).collect();
        let written = self.file.write_all_at(&bytes, first * BlockRecord::BYTES as u64);
        written.map_err(|cause| Error::io("write block records in", &self.directory, cause))
    }

    /// `count` of them, from number `first` on.
    pub(super) fn read(&self, first: u64, count: u64) -> Result<Vec<BlockRecord>> {
        let fault = |cause| Error::io("read block records in", &self.directory, cause);
        let count = usize::try_from(count).map_err(|_| fault(std::io::ErrorKind::OutOfMemory.into()))?;
        let mut bytes = vec![0; count * BlockRecord::BYTES];
        self.file.read_exact_at(&mut bytes, first * BlockRecord::BYTES as u64).map_err(fault)?;
        let (records, _) = bytes.as_chunks::<{ BlockRecord::BYTES }>();
        let parse = |bytes| BlockRecord::from_bytes(bytes).map_err(|detail| fault(std::io::Error::other(detail)));
        records.iter().map(parse).collect()
    }
}

/// On disk where `/tmp` may be memory; `TMPDIR` names another place.
pub(super) fn scratch_directory() -> PathBuf {
    let named = std::env::var_os("TMPDIR").filter(|name| !name.is_empty()).map(PathBuf::from);
    let usual = || Some(PathBuf::from("/var/tmp")).filter(|path| path.is_dir());
    named.or_else(usual).unwrap_or_else(std::env::temp_dir)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use engine::checksum::Hash;
    use engine::format::block::Content;

    use super::*;

    #[test]
    fn records_come_back_from_their_places_in_whatever_order_they_were_written() {
        let records = Records::create().unwrap();
        let all: Vec<_> = (0..100).map(|n| BlockRecord { hash: Hash([n; 32]), content: Content::Zero }).collect();
        for first in [50, 0, 75, 25] {
            records.write(first as u64, &all[first..first + 25]).unwrap();
        }
        assert_eq!(records.read(0, 100).unwrap(), all);
        assert_eq!(records.read(49, 2).unwrap(), all[49..51]);
        assert_eq!(records.read(7, 0).unwrap(), []);
        assert!(records.read(99, 2).is_err());
    }
}
