//! A bounded cache of decoded blocks, for readers that come back: the mount.

use std::sync::Arc;

use crate::Result;
use crate::blocks::Blocks;
use crate::checksum::Verified;
use crate::format::block::BlockRecord;

/// Decoded blocks, at most so many bytes of them; shared by threads.
#[derive(Debug)]
pub struct BlockCache {
    _bytes_max: usize,
}

#[allow(unused_variables, clippy::unimplemented)]
impl BlockCache {
    /// A cache of `bytes_max`.
    pub fn new(bytes_max: usize) -> Self {
        unimplemented!()
    }
    /// The block of `record`, `bytes` long, from the cache or read. Several that ask for one block at once wait for one
    /// read of it.
    pub fn block(&self, blocks: &Blocks, record: &BlockRecord, bytes: usize) -> Result<Arc<Verified<Box<[u8]>>>> {
        unimplemented!()
    }
}
