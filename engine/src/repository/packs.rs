//! Writing blocks into packs.
//!
//! Every worker of a backup appends to a pack of its own, so the blocks that it reads one after another lie beside each
//! other. What the parent has already is referred to, not written; of a block of which the parent has most pages, only
//! the others are written.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use super::keys;
use crate::blocks::{Blocks, Scratch};
use crate::checksum::Hash;
use crate::codec::{Codec, Compression};
use crate::format::block::{BlockRecord, Content, Extent};
use crate::format::pack::{PACK_BYTES_MAX, PackHeader};
use crate::format::patch;
use crate::format::repository::RepositoryId;
use crate::page::is_zero;
use crate::store::{Existing, Store, Upload};
use crate::units::{BlockSize, ClusterName, DIRECT_BYTES, PackId};
use crate::{Error, Result};

const _: () = assert!(PACK_BYTES_MAX <= u32::MAX as u64);

/// What became of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All zero.
    Zero,
    /// The same as the parent's.
    Shared,
    /// Stored as the changed pages over the parent's.
    Patched,
    /// Stored whole.
    Stored,
}

/// What the workers of one backup share.
#[derive(Debug)]
pub(super) struct Packs {
    pub(super) store: Arc<dyn Store>,
    pub(super) cluster: ClusterName,
    pub(super) repository: RepositoryId,
    pub(super) block_size: BlockSize,
    pub(super) compression: Compression,
    pub(super) parent: Option<Blocks>,
    pub(super) next_pack: AtomicU32,
    /// Workers that were made and have not finished.
    pub(super) unfinished: AtomicU32,
    pub(super) added_bytes: AtomicU64,
    pub(super) shared_bytes: AtomicU64,
}

/// One worker's way into the packs: blocks that it puts one after another lie beside each other.
pub struct PackWriter {
    shared: Arc<Packs>,
    pack: Option<OpenPack>,
    scratch: Scratch,
    /// The parent's block that a patch is made against.
    base: Vec<u8>,
    encoded: Vec<u8>,
    /// For packs that are ended.
    waited: Duration,
}

struct OpenPack {
    id: PackId,
    upload: Box<dyn Upload>,
}

impl PackWriter {
    pub(super) fn new(shared: &Arc<Packs>) -> Result<Self> {
        shared.unfinished.fetch_add(1, Ordering::SeqCst);
        let shared = Arc::clone(shared);
        Ok(Self {
            shared,
            pack: None,
            scratch: Scratch::default(),
            base: Vec::new(),
            encoded: Vec::new(),
            waited: Duration::ZERO,
        })
    }

    /// Stores one block. `hash` saves hashing again; `parent` is the record at the same place in the parent backup, of
    /// a block of the same length.
    pub fn put(
        &mut self,
        raw: &[u8],
        hash: Option<Hash>,
        parent: Option<&BlockRecord>,
    ) -> Result<(BlockRecord, Outcome)> {
        let hash = hash.unwrap_or_else(|| Hash::of(raw));
        if let Some(same) = parent.filter(|parent| parent.hash == hash) {
            self.shared.shared_bytes.fetch_add(raw.len() as u64, Ordering::Relaxed);
            return Ok((*same, Outcome::Shared));
        }
        if is_zero(raw) {
            return Ok((BlockRecord { hash, content: Content::Zero }, Outcome::Zero));
        }
        if let Some(parent) = parent
            && let Some(patched) = self.put_patch(raw, hash, parent)?
        {
            return Ok(patched);
        }
        let (at, codec) = self.store(raw)?;
        Ok((BlockRecord { hash, content: Content::Stored { at, codec } }, Outcome::Stored))
    }

    /// Makes the last pack durable. A worker that is dropped without it makes [`BackupWriter::finish`] fail.
    ///
    /// [`BackupWriter::finish`]: super::BackupWriter::finish
    pub fn finish(mut self) -> Result<()> {
        self.end_pack()?;
        self.shared.unfinished.fetch_sub(1, Ordering::SeqCst);
        Ok(())
    }

    /// How long this worker has waited for packs to be written so far.
    pub fn waited(&self) -> Duration {
        self.waited + self.pack.as_ref().map_or(Duration::ZERO, |pack| pack.upload.waited())
    }

    /// Stores the pages in which `raw` differs from the parent's base, where those are few.
    fn put_patch(&mut self, raw: &[u8], hash: Hash, parent: &BlockRecord) -> Result<Option<(BlockRecord, Outcome)>> {
        let Some(blocks) = &self.shared.parent else { return Ok(None) };
        self.base.resize(raw.len(), 0);
        let (base, base_codec) = match blocks.read_base(parent, &mut self.base, &mut self.scratch) {
            Ok(Some(base)) => base,
            Ok(None) => return Ok(None),
            Err(error) => {
                // A damaged parent must not stop the backup that makes it dispensable.
                tracing::warn!("a block is stored whole, because its parent cannot be read: {error}");
                return Ok(None);
            }
        };
        if self.base == raw {
            // Changed back to what it was before the parent.
            self.shared.shared_bytes.fetch_add(raw.len() as u64, Ordering::Relaxed);
            let content = Content::Stored { at: base, codec: base_codec };
            return Ok(Some((BlockRecord { hash, content }, Outcome::Shared)));
        }
        let Some(patch) = patch::make(&self.base, raw) else { return Ok(None) };
        let (patch, patch_codec) = self.store(&patch)?;
        let content = Content::Patched { base, base_codec, patch, patch_codec };
        Ok(Some((BlockRecord { hash, content }, Outcome::Patched)))
    }

    /// Appends a run, encoded where that pays.
    fn store(&mut self, raw: &[u8]) -> Result<(Extent, Codec)> {
        let mut encoded = std::mem::take(&mut self.encoded);
        let codec = self.shared.compression.compress(raw, &mut encoded);
        let run = if codec == Codec::Raw { raw } else { &encoded };
        let stored = self.append(run, codec);
        self.encoded = encoded;
        stored.map(|at| (at, codec))
    }

    fn append(&mut self, run: &[u8], codec: Codec) -> Result<Extent> {
        let needed = (run.len() as u64).saturating_add(2 * DIRECT_BYTES as u64);
        if self.pack.as_ref().is_some_and(|pack| pack.end() + needed > PACK_BYTES_MAX) {
            self.end_pack()?;
        }
        let pack = match &mut self.pack {
            Some(pack) => pack,
            none => none.insert(OpenPack::begin(&self.shared)?),
        };
        if codec == Codec::Raw {
            pack.pad()?;
        }
        let offset = pack.end();
        pack.upload.append(run)?;
        if codec == Codec::Raw {
            pack.pad()?;
        }
        // A pack ends below `PACK_BYTES_MAX`, and a run is no longer than a block.
        Ok(Extent { pack: pack.id, offset: offset as u32, stored: run.len() as u32 })
    }

    fn end_pack(&mut self) -> Result<()> {
        let Some(pack) = self.pack.take() else { return Ok(()) };
        self.waited += pack.upload.waited();
        self.shared.added_bytes.fetch_add(pack.upload.written(), Ordering::Relaxed);
        pack.upload.commit()
    }
}

impl std::fmt::Debug for PackWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PackWriter").field("pack", &self.pack.as_ref().map(|pack| pack.id)).finish_non_exhaustive()
    }
}

impl OpenPack {
    fn begin(shared: &Packs) -> Result<Self> {
        let id = PackId(shared.next_pack.fetch_add(1, Ordering::SeqCst));
        let key = keys::pack(&shared.cluster, id);
        if id.0 == u32::MAX {
            return Err(Error::Refused(format!(
                "{} would be the last pack there can be",
                shared.store.describe(&key).display()
            )));
        }
        let mut upload = shared.store.create_large(&key, Existing::Refuse)?;
        let header = PackHeader { repository: shared.repository, pack: id, block_size: shared.block_size };
        upload.append(&header.to_bytes())?;
        Ok(Self { id, upload })
    }

    fn end(&self) -> u64 {
        self.upload.written()
    }

    /// To the next multiple of [`DIRECT_BYTES`].
    fn pad(&mut self) -> Result<()> {
        const ZEROS: [u8; DIRECT_BYTES] = [0; DIRECT_BYTES];
        let over = self.end() % DIRECT_BYTES as u64;
        if over == 0 { Ok(()) } else { self.upload.append(&ZEROS[over as usize..]) }
    }
}
