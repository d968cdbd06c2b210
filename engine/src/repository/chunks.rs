//! The chunks of one backup's manifest: read on first touch, proven by the hash in the reference, kept while there is
//! room.
//!
//! Chunks are read, not mapped: a disk that goes away gives an error, never a signal.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::keys;
use crate::checksum::{Hash, verify};
use crate::format::Malformed;
use crate::format::block::BlockRecord;
use crate::format::manifest::{ChunkRef, Group, IndexChunk, ManifestUse, leaf_from_bytes};
use crate::store::Store;
use crate::units::ClusterName;
use crate::{Error, Result};

/// Chunks kept, by their stored bytes: the index of any backup and the leaves that a few readers are at. In memory a
/// chunk takes more, three to four times as much by a server's resident memory.
const KEPT_BYTES_MAX: usize = 16 << 20;

/// A chunk, parsed.
#[derive(Clone, Debug)]
enum Chunk {
    Index(Arc<IndexChunk>),
    Group(Arc<Group>),
    Leaf(Arc<[BlockRecord]>),
}

/// Reads the chunks of a manifest.
#[derive(Debug)]
pub(super) struct Chunks {
    store: Arc<dyn Store>,
    cluster: ClusterName,
    /// What [`ChunkRef::manifest`] counts in.
    manifests: Vec<ManifestUse>,
    kept: Mutex<Kept>,
}

impl Chunks {
    pub(super) fn new(store: Arc<dyn Store>, cluster: ClusterName, manifests: Vec<ManifestUse>) -> Self {
        Self { store, cluster, manifests, kept: Mutex::default() }
    }

    pub(super) fn index(&self, place: &ChunkRef) -> Result<Arc<IndexChunk>> {
        let parse = |bytes: &[u8]| IndexChunk::from_bytes(bytes).map(|index| Chunk::Index(Arc::new(index)));
        match self.chunk(place, parse)? {
            Chunk::Index(index) => Ok(index),
            other => Err(self.corrupt(place, format!("{} where the index goes on", other.name()))),
        }
    }

    pub(super) fn group(&self, place: &ChunkRef) -> Result<Arc<Group>> {
        let parse = |bytes: &[u8]| Group::from_bytes(bytes).map(|group| Chunk::Group(Arc::new(group)));
        match self.chunk(place, parse)? {
            Chunk::Group(group) => Ok(group),
            other => Err(self.corrupt(place, format!("{} where a group is expected", other.name()))),
        }
    }

    pub(super) fn leaf(&self, place: &ChunkRef) -> Result<Arc<[BlockRecord]>> {
        let parse = |bytes: &[u8]| leaf_from_bytes(bytes).map(|records| Chunk::Leaf(records.into()));
        match self.chunk(place, parse)? {
            Chunk::Leaf(records) => Ok(records),
            other => Err(self.corrupt(place, format!("{} where a leaf is expected", other.name()))),
        }
    }

    /// The error for a chunk that is not what refers to it says.
    pub(super) fn corrupt(&self, place: &ChunkRef, detail: impl Into<String>) -> Error {
        match self.key(place) {
            Ok(key) => Error::corrupt_at(self.store.describe(&key), place.offset, detail),
            Err(error) => error,
        }
    }

    fn chunk(&self, place: &ChunkRef, parse: impl Fn(&[u8]) -> Result<Chunk, Malformed>) -> Result<Chunk> {
        if let Some(chunk) = self.kept().get(&place.hash) {
            return Ok(chunk);
        }
        let key = self.key(place)?;
        // `ChunkRef` was checked when it was parsed: at most `CHUNK_BYTES_MAX`.
        let bytes = read_chunk(&*self.store, &key, place)?;
        let chunk = parse(&bytes).map_err(|malformed| malformed.in_file(self.store.describe(&key), place.offset))?;
        self.kept().insert(place, &chunk);
        Ok(chunk)
    }

    fn key(&self, place: &ChunkRef) -> Result<String> {
        match self.manifests.get(place.manifest as usize) {
            Some(manifest) => Ok(keys::manifest(&self.cluster, &manifest.label)),
            None => {
                let path: PathBuf = self.store.describe(&keys::manifests(&self.cluster));
                Err(Error::corrupt(path, format!("a chunk in manifest {} of {}", place.manifest, self.manifests.len())))
            }
        }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        // A panic elsewhere cannot leave the table half changed.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads a chunk and proves it.
pub(super) fn read_chunk(store: &dyn Store, key: &str, place: &ChunkRef) -> Result<Vec<u8>> {
    let mut bytes = vec![0; place.bytes as usize];
    store.read_at(key, place.offset, &mut bytes).map_err(|error| match error {
        Error::Io { source, path, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            Error::corrupt(path, "the manifest file is missing")
        }
        other => other,
    })?;
    let damaged =
        |mismatch| Error::corrupt_at(store.describe(key), place.offset, format!("manifest chunk: {mismatch}"));
    verify(bytes, &place.hash).map(crate::checksum::Verified::into_inner).map_err(damaged)
}

impl Chunk {
    const fn name(&self) -> &'static str {
        match self {
            Self::Index(_) => "an index chunk",
            Self::Group(_) => "a group",
            Self::Leaf(_) => "a leaf",
        }
    }
}

/// Parsed chunks by hash; the one that was not used for longest makes room.
#[derive(Debug, Default)]
struct Kept {
    chunks: HashMap<Hash, (Chunk, u64, usize)>,
    by_use: BTreeMap<u64, Hash>,
    bytes: usize,
    clock: u64,
}

impl Kept {
    fn get(&mut self, hash: &Hash) -> Option<Chunk> {
        let (chunk, used, _) = self.chunks.get_mut(hash)?;
        self.clock += 1;
        self.by_use.remove(used);
        self.by_use.insert(self.clock, *hash);
        *used = self.clock;
        Some(chunk.clone())
    }

    fn insert(&mut self, place: &ChunkRef, chunk: &Chunk) {
        let bytes = place.bytes as usize;
        if self.chunks.contains_key(&place.hash) || bytes > KEPT_BYTES_MAX {
            return;
        }
        while self.bytes + bytes > KEPT_BYTES_MAX {
            let Some((_, oldest)) = self.by_use.pop_first() else { break };
            self.bytes -= self.chunks.remove(&oldest).map_or(0, |(_, _, bytes)| bytes);
        }
        self.clock += 1;
        self.bytes += bytes;
        self.by_use.insert(self.clock, place.hash);
        self.chunks.insert(place.hash, (chunk.clone(), self.clock, bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_stays_within_its_limit_and_forgets_the_oldest() {
        let mut kept = Kept::default();
        let place = |number: u8| ChunkRef { hash: Hash([number; 32]), manifest: 0, bytes: 6 << 20, offset: 0 };
        let chunk = Chunk::Leaf(Arc::from([]));
        kept.insert(&place(1), &chunk);
        kept.insert(&place(2), &chunk);
        assert!(kept.get(&place(1).hash).is_some());
        kept.insert(&place(3), &chunk);
        assert!(kept.get(&place(2).hash).is_none());
        assert!(kept.get(&place(1).hash).is_some() && kept.get(&place(3).hash).is_some());
        assert!(kept.bytes <= KEPT_BYTES_MAX && kept.by_use.len() == kept.chunks.len());
    }
}
