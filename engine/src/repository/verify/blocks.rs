//! Proving the blocks of a backup, leaf by leaf of its manifest, on all cores.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::iter::{ParallelBridge, ParallelIterator};

use super::found::Found;
use super::lock;
use crate::blocks::{Blocks, Scratch};
use crate::checksum::Hash;
use crate::format::file::FileRecord;
use crate::format::manifest::LEAF_RECORDS;
use crate::progress::{Progress, Stage};
use crate::repository::manifest::{Audit, PlacedGroup};
use crate::repository::{Backup, keys};
use crate::{Error, Result};

/// Walks the manifest here and proves its leaves on all cores. What is wrong goes to `found`; an error is a wish to stop.
pub(super) fn prove(backup: &Backup, proven: &Proven, found: &Found, progress: &dyn Progress) -> Result<()> {
    let (cluster, label) = (&backup.cluster, &backup.info.label);
    let manifest = cluster.store().describe(&keys::manifest(cluster.name(), label));
    let mut audit = Some(Audit::default());
    let leaves = backup.manifest.groups().flat_map(|group| {
        let audited = group.and_then(|placed| {
            audit.as_mut().map_or(Ok(()), |audit| backup.manifest.audit_group(&placed, audit)).map(|()| placed)
        });
        let placed = audited.map_err(|error| {
            // The totals cannot be right any more.
            audit = None;
            found.add(&error, label, &manifest);
        });
        placed.into_iter().flat_map(|placed| (0..placed.group.leaves().len()).map(move |leaf| (placed.clone(), leaf)))
    });
    let reader = Reader { backup, blocks: backup.blocks(), manifest: &manifest, proven, found };
    leaves.par_bridge().try_for_each_init(Scratch::default, |scratch, (placed, leaf)| {
        if progress.cancelled() {
            return Err(Error::Cancelled);
        }
        progress.advance(reader.prove_leaf(&placed, leaf, scratch));
        let (reading, decoding) = scratch.take_spent();
        for (stage, time) in [(Stage::Repository, reading), (Stage::Decode, decoding)] {
            progress.waited(stage, u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
        }
        Ok(())
    })?;
    if let Some(Err(error)) = audit.map(|audit| backup.manifest.audit_totals(&audit)) {
        found.add(&error, label, &manifest);
    }
    Ok(())
}

/// What all workers of a backup share.
struct Reader<'a> {
    backup: &'a Backup,
    blocks: Blocks,
    manifest: &'a std::path::Path,
    proven: &'a Proven,
    found: &'a Found,
}

impl Reader<'_> {
    /// Proves a leaf and the blocks it lists; their content bytes.
    fn prove_leaf(&self, placed: &PlacedGroup, leaf: usize, scratch: &mut Scratch) -> u64 {
        let label = &self.backup.info.label;
        let place = &placed.group.leaves()[leaf];
        let parts = parts_of(placed, leaf, self.backup);
        let bytes = parts.iter().map(|part| part.bytes).sum();
        if let Some(damaged) = self.proven.claim(place.hash) {
            // Read for another backup already: what was wrong then is wrong for this one too.
            damaged.iter().for_each(|path| self.found.name(path, label));
            return bytes;
        }
        let add = |error: Error| self.proven.failed(place.hash, self.found.add(&error, label, self.manifest));
        match self.backup.manifest.group_leaf(&placed.group, leaf, place) {
            Err(error) => add(error),
            Ok(records) => {
                let mut rest = &records[..];
                for part in parts {
                    let (records, behind) = rest.split_at(part.blocks.min(rest.len()));
                    let bytes_of = |index| self.backup.info.block_bytes.block_bytes_at(part.file_bytes, index);
                    self.blocks.prove(&part.path, part.first, records, bytes_of, scratch, add);
                    rest = behind;
                }
                self.proven.bytes.fetch_add(bytes, Ordering::Relaxed);
            }
        }
        bytes
    }
}

/// Blocks of one file that lie in one leaf.
struct Part {
    path: String,
    file_bytes: u64,
    /// The first of them, counted in the file.
    first: u64,
    blocks: usize,
    /// Their content.
    bytes: u64,
}

fn parts_of(placed: &PlacedGroup, leaf: usize, backup: &Backup) -> Vec<Part> {
    let size = backup.info.block_bytes;
    let leaf_start = leaf as u64 * LEAF_RECORDS;
    let leaf_end = leaf_start + LEAF_RECORDS;
    let part = |file: &FileRecord| {
        let (start, end) = (file.first_block.0, file.first_block.0 + size.blocks_of(file.bytes));
        let (from, to) = (start.max(leaf_start), end.min(leaf_end));
        let (first, block_bytes) = (from.checked_sub(start)?, size.bytes() as u64);
        let blocks = to.checked_sub(from).filter(|blocks| *blocks > 0)?;
        let bytes = ((first + blocks) * block_bytes).min(file.bytes) - first * block_bytes;
        Some(Part { path: file.path.clone(), file_bytes: file.bytes, first, blocks: blocks as usize, bytes })
    };
    placed.group.files().iter().filter_map(part).collect()
}

/// Leaves that were read for one backup need not be read for another.
#[derive(Debug, Default)]
pub(super) struct Proven {
    /// By the leaf's hash: the files in which something was wrong.
    leaves: Mutex<HashMap<Hash, Vec<PathBuf>>>,
    /// Content bytes read.
    pub(super) bytes: AtomicU64,
}

impl Proven {
    /// None where the caller has to read the leaf; else what was wrong when it was read before.
    fn claim(&self, leaf: Hash) -> Option<Vec<PathBuf>> {
        match lock(&self.leaves).entry(leaf) {
            Entry::Occupied(known) => Some(known.get().clone()),
            Entry::Vacant(new) => {
                new.insert(Vec::new());
                None
            }
        }
    }

    fn failed(&self, leaf: Hash, path: PathBuf) {
        let mut leaves = lock(&self.leaves);
        let damaged = leaves.entry(leaf).or_default();
        if !damaged.contains(&path) {
            damaged.push(path);
        }
    }
}
