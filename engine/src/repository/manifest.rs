//! A backup's manifest, read chunk by chunk.

use crate::Result;
use crate::format::backup::BackupInfo;
use crate::format::block::BlockRecord;
use crate::format::file::FileRecord;
use crate::repository::Cluster;
use crate::units::BlockNumber;

/// The files and blocks of a backup; cheap to clone, shared by threads.
#[derive(Clone, Debug)]
pub struct Manifest {
    info: std::sync::Arc<BackupInfo>,
}

#[allow(unused_variables, clippy::unimplemented, missing_docs, clippy::missing_errors_doc)]
impl Manifest {
    pub fn open(cluster: &Cluster, info: &BackupInfo) -> Result<Self> {
        unimplemented!()
    }
    pub fn info(&self) -> &BackupInfo {
        &self.info
    }
    /// All files in path order.
    pub fn files(&self) -> impl Iterator<Item = Result<FileRecord>> + '_ {
        std::iter::empty()
    }
    pub fn file_count(&self) -> u64 {
        unimplemented!()
    }
    pub fn file(&self, path: &str) -> Result<Option<FileRecord>> {
        unimplemented!()
    }
    /// The file at `index` of the path order, or none past the end.
    pub fn file_at(&self, index: u64) -> Result<Option<FileRecord>> {
        unimplemented!()
    }
    /// Where `path` is in the path order.
    pub fn index_of(&self, path: &str) -> Result<Option<u64>> {
        unimplemented!()
    }
    /// The index of the first file behind `path` and everything below it.
    pub fn index_after(&self, path: &str) -> Result<u64> {
        unimplemented!()
    }
    /// The direct children of a directory ("" is the root).
    pub fn children(&self, directory: &str) -> Result<Vec<FileRecord>> {
        unimplemented!()
    }
    pub fn block(&self, number: BlockNumber) -> Result<BlockRecord> {
        unimplemented!()
    }
    /// Appends `count` records from `first` on.
    pub fn blocks(&self, first: BlockNumber, count: u64, out: &mut Vec<BlockRecord>) -> Result<()> {
        unimplemented!()
    }
    pub fn block_limit(&self) -> u64 {
        unimplemented!()
    }
    pub fn verify_all(&self) -> Result<()> {
        unimplemented!()
    }
}
