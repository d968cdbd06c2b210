//! One file of the archive, open for reading.

use std::sync::Arc;

use crate::blocks::{Blocks, Scratch};
use crate::format::file::{FileKind, FileRecord};
use crate::format::repository::RepositoryId;
use crate::format::wal::WalHeader;
use crate::repository::is_absent;
use crate::store::Store;
use crate::units::{BlockNumber, BlockSize, DIRECT_BYTES, SystemIdentifier};
use crate::{Error, Result};

/// One file of the archive, open for reading; cheap to clone, shared by threads.
#[derive(Clone, Debug)]
pub struct WalObject {
    blocks: Blocks,
    file: Arc<FileRecord>,
    system_identifier: SystemIdentifier,
    repository: RepositoryId,
}

impl WalObject {
    /// Opens the object `key`, which should hold the file `name`; none if there is no such key.
    pub(super) fn open(store: &Arc<dyn Store>, key: &str, name: &str) -> Result<Option<Self>> {
        let mut bytes = vec![0; DIRECT_BYTES];
        match store.read_at(key, 0, &mut bytes) {
            Ok(()) => {}
            Err(error) if is_absent(&error) => return Ok(None),
            Err(error) => return Err(error),
        }
        let path = store.describe(key);
        let needed = WalHeader::bytes_needed(&bytes).map_err(|malformed| malformed.in_file(&path, 0))?;
        bytes.resize(needed, 0);
        if needed > DIRECT_BYTES {
            store.read_at(key, DIRECT_BYTES as u64, &mut bytes[DIRECT_BYTES..])?;
        }
        let header = WalHeader::from_bytes(&bytes).map_err(|malformed| malformed.in_file(&path, 0))?;
        if header.name != name {
            return Err(Error::corrupt(path, format!("it holds {}", header.name)));
        }
        let file = FileRecord {
            path: header.name,
            kind: FileKind::Regular,
            mode: 0o600,
            uid: 0,
            gid: 0,
            modified: 0,
            bytes: header.bytes,
            crc32c: 0,
            first_block: BlockNumber(0),
        };
        let blocks = Blocks::of_object(Arc::clone(store), key, header.blocks, header.block_size);
        let (system_identifier, repository) = (header.system_identifier, header.repository);
        Ok(Some(Self { blocks, file: Arc::new(file), system_identifier, repository }))
    }

    /// The length of the file's content.
    pub fn bytes(&self) -> u64 {
        self.file.bytes
    }

    /// The size of the blocks that are verified one by one.
    pub fn block_size(&self) -> BlockSize {
        self.blocks.block_size()
    }

    /// The cluster that wrote it; 0 where the file does not tell.
    pub fn system_identifier(&self) -> SystemIdentifier {
        self.system_identifier
    }

    /// The repository that it was written for.
    pub fn repository(&self) -> RepositoryId {
        self.repository
    }

    /// Reads content from `offset` on, verified; how much, at the end less than `out` holds.
    pub fn read_at(&self, offset: u64, out: &mut [u8], scratch: &mut Scratch) -> Result<usize> {
        self.blocks.read_range(&self.file, offset, out, scratch)
    }

    /// Gives all of the content, piece by piece, to `take`.
    pub fn read_all(&self, mut take: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let mut scratch = Scratch::default();
        let mut piece = vec![0; BlockSize::MAX.bytes().min(usize::try_from(self.bytes()).unwrap_or(usize::MAX))];
        let mut offset = 0;
        while offset < self.bytes() {
            let read = self.read_at(offset, &mut piece, &mut scratch)?;
            take(&piece[..read])?;
            offset += read as u64;
        }
        Ok(())
    }
}
