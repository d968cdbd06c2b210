//! What a lease covers, decided without a look at any disk: keys, and runs of packs.
//!
//! | | |
//! |---|---|
//! | the repository's and the cluster's description | whole |
//! | descriptions of the cluster's backups | whole, all of them: that a WAL segment never was is proven by them |
//! | the manifest files that the backup's manifest lies in | whole |
//! | packs | the runs of the backup's blocks, and zeros between them |
//! | WAL of the cluster | whole |
//!
//! Runs, not packs: a pack of an incremental chain has blocks of other backups in it, perhaps of tables that were dropped
//! long before this one. Readers ask for neighbouring runs with the gaps between them, so what a gap of up to
//! [`GAP_BYTES_MAX`] holds is blanked rather than refused. Runs are kept sorted and merged, 8 bytes each; a backup so
//! scattered that they are more than [`RUNS_MAX`] has those joined that lie closest, so that memory has a bound.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use crate::Result;
use crate::format::block::{Content, Extent};
use crate::repository::{Backup, keys};
use crate::units::{BackupLabel, BlockNumber, ClusterName, PackId};

/// The longest gap between covered runs that a request may span; what is in it is not sent.
pub(super) const GAP_BYTES_MAX: u64 = crate::blocks::GAP_BYTES_MAX;
/// Runs of one lease: 8 MiB of memory.
const RUNS_MAX: usize = 1 << 20;
/// Records looked at in one go.
const RECORDS_AT_ONCE: u64 = 8192;

/// What a lease covers.
#[derive(Clone, Debug)]
pub struct Coverage {
    cluster: ClusterName,
    manifests: BTreeSet<String>,
    packs: BTreeMap<PackId, Runs>,
}

/// Bytes of one pack: sorted, apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Runs(Arc<[(u32, u32)]>);

/// How much of a key is covered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach<'coverage> {
    /// Nothing: not even whether it is there is told.
    Nothing,
    /// All of it.
    Whole,
    /// These runs.
    Only(&'coverage Runs),
}

impl Coverage {
    /// For a choice among the cluster's backups: their descriptions and the WAL, and nothing that is in them.
    pub fn of_descriptions(cluster: &ClusterName) -> Self {
        Self { cluster: cluster.clone(), manifests: BTreeSet::new(), packs: BTreeMap::new() }
    }

    /// The backup whose manifest `key` is, if it is one of this cluster's.
    pub fn manifest(&self, key: &str) -> Option<BackupLabel> {
        let name = key.strip_prefix(&keys::manifests(&self.cluster))?.strip_prefix('/')?;
        keys::manifest_of(name)
    }

    /// For one backup and the WAL of its cluster. Reads all of the manifest.
    pub fn of_backup(backup: &Backup) -> Result<Self> {
        let cluster = backup.cluster.name().clone();
        let mut collected = Collected::new(RUNS_MAX);
        let mut records = Vec::new();
        for file in backup.manifest.files() {
            let file = file?;
            let blocks = backup.info.block_bytes.blocks_of(file.bytes);
            for first in (0..blocks).step_by(RECORDS_AT_ONCE as usize) {
                records.clear();
                let count = RECORDS_AT_ONCE.min(blocks - first);
                backup.manifest.blocks(BlockNumber(file.first_block.0 + first), count, &mut records)?;
                for record in &records {
                    match record.content {
                        Content::Zero => {}
                        Content::Stored { at, .. } => collected.add(&at),
                        Content::Patched { base, patch, .. } => {
                            collected.add(&base);
                            collected.add(&patch);
                        }
                    }
                }
            }
        }
        let used = backup.manifest.manifests().iter();
        let own = keys::manifest(&cluster, &backup.info.label);
        let manifests = used.map(|used| keys::manifest(&cluster, &used.label)).chain([own]).collect();
        Ok(Self { cluster, manifests, packs: collected.finish() })
    }

    /// How much of `key` may be read.
    pub fn reach(&self, key: &str) -> Reach<'_> {
        let below = |directory: String| key.strip_prefix(&directory).and_then(|rest| rest.strip_prefix('/'));
        if key == keys::REPOSITORY || key == keys::cluster_info(&self.cluster) || self.manifests.contains(key) {
            return Reach::Whole;
        }
        if let Some(name) = below(keys::packs(&self.cluster)) {
            let runs = keys::pack_of(name).and_then(|pack| self.packs.get(&pack));
            return runs.map_or(Reach::Nothing, Reach::Only);
        }
        let is_description = below(keys::backups(&self.cluster)).is_some_and(|name| keys::backup_of(name).is_some());
        let is_wal =
            below(keys::wal(&self.cluster)).and_then(|rest| rest.split_once('/')).is_some_and(|(line, name)| {
                keys::timeline_of(line).is_some() && !name.is_empty() && !name.starts_with('.') && !name.contains('/')
            });
        if is_description || is_wal { Reach::Whole } else { Reach::Nothing }
    }

    /// Whether `directory` may be listed, and which of the names in it are shown.
    pub fn lists(&self, directory: &str) -> Option<impl Fn(&str) -> bool> {
        let wal = keys::wal(&self.cluster);
        let timeline = directory.strip_prefix(&wal).and_then(|rest| rest.strip_prefix('/'));
        let of_cluster = [keys::backups(&self.cluster), keys::manifests(&self.cluster), wal.clone()]
            .iter()
            .any(|one| one == directory)
            || timeline.is_some_and(|name| keys::timeline_of(name).is_some());
        let only = (directory == keys::CLUSTERS).then(|| self.cluster.clone());
        (of_cluster || only.is_some())
            .then_some(move |name: &str| only.as_ref().is_none_or(|cluster| cluster.as_str() == name))
    }
}

impl Runs {
    /// Whether a request for these bytes is one that a reader of the backup makes.
    pub fn covers(&self, wanted: &Range<u64>) -> bool {
        let mut at = wanted.start;
        for run in self.within(wanted) {
            if run.start > at + GAP_BYTES_MAX {
                return false;
            }
            at = at.max(run.end);
        }
        // Whoever asks for a gap alone asks for nothing of the backup.
        at > wanted.start && wanted.end <= at + GAP_BYTES_MAX
    }

    /// Zeroes what is not covered of `bytes`, which are the pack's from `start` on.
    pub fn blank(&self, start: u64, bytes: &mut [u8]) {
        let mut done = 0;
        for run in self.within(&(start..start + bytes.len() as u64)) {
            let from = run.start.saturating_sub(start) as usize;
            if from > done {
                bytes[done..from].fill(0);
            }
            done = bytes.len().min((run.end - start) as usize);
        }
        bytes[done..].fill(0);
    }

    /// The runs that have bytes in `wanted`.
    fn within(&self, wanted: &Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let first = self.0.partition_point(|(_, end)| u64::from(*end) <= wanted.start);
        let end = wanted.end;
        let runs = self.0[first..].iter().map(|(start, end)| u64::from(*start)..u64::from(*end));
        runs.take_while(move |run| run.start < end)
    }
}

/// Runs as they are found; never more than twice as many as there may be at the end.
struct Collected {
    runs: Vec<(PackId, u32, u32)>,
    runs_max: usize,
    /// Runs with no more than this between them are one.
    gap: u32,
}

impl Collected {
    fn new(runs_max: usize) -> Self {
        Self { runs: Vec::new(), runs_max, gap: 0 }
    }

    fn add(&mut self, extent: &Extent) {
        // Blocks of a file mostly lie one behind the other.
        let (start, end) = (extent.offset, extent.offset.saturating_add(extent.stored));
        match self.runs.last_mut() {
            Some((pack, _, last)) if *pack == extent.pack && *last == start => *last = end,
            _ => self.runs.push((extent.pack, start, end)),
        }
        if self.runs.len() >= 2 * self.runs_max {
            self.merge();
            while self.runs.len() > self.runs_max && self.gap < u32::MAX / 2 {
                self.gap = (self.gap * 2).max(crate::units::DIRECT_BYTES as u32);
                self.merge();
            }
        }
    }

    fn merge(&mut self) {
        self.runs.sort_unstable();
        let gap = self.gap;
        self.runs.dedup_by(|next, kept| {
            let joins = next.0 == kept.0 && next.1 <= kept.2.saturating_add(gap);
            if joins {
                kept.2 = kept.2.max(next.2);
            }
            joins
        });
    }

    fn finish(mut self) -> BTreeMap<PackId, Runs> {
        self.merge();
        let packs = self.runs.chunk_by(|one, next| one.0 == next.0);
        let runs_of = |pack: &[(PackId, u32, u32)]| pack.iter().map(|(_, start, end)| (*start, *end)).collect();
        packs.map(|pack| (pack[0].0, Runs(runs_of(pack)))).collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn collect(extents: &[(u32, u32, u32)], runs_max: usize) -> BTreeMap<PackId, Runs> {
        let mut collected = Collected::new(runs_max);
        for (pack, offset, stored) in extents {
            collected.add(&Extent { pack: PackId(*pack), offset: *offset, stored: *stored });
        }
        collected.finish()
    }

    #[test]
    fn runs_are_merged_and_gaps_are_blanked() {
        let packs = collect(&[(1, 4096, 100), (1, 4196, 50), (2, 0, 10), (1, 5000, 10), (1, 4096, 100)], 100);
        let runs = &packs[&PackId(1)];
        assert_eq!(*runs, Runs([(4096, 4246), (5000, 5010)].into()));
        let mut bytes = [1; 1000];
        runs.blank(4090, &mut bytes);
        let kept: Vec<_> = (0..1000).filter(|at| bytes[*at] == 1).map(|at| at + 4090).collect();
        assert_eq!(kept, (4096..4246).chain(5000..5010).collect::<Vec<_>>());
    }

    #[test]
    fn a_request_may_span_small_gaps_and_nothing_else() {
        let far = 4096 + GAP_BYTES_MAX;
        let packs = collect(&[(1, 4096, 100), (1, 4196 + GAP_BYTES_MAX as u32, 100)], 100);
        let runs = &packs[&PackId(1)];
        for (wanted, covered) in [
            (4096..4196, true),
            (4100..4101, true),
            (0..4196, true),
            (4096..far + 200, true),
            (4196..4200, false),
            (0..4096, false),
            (4096..far + 200 + GAP_BYTES_MAX, true),
            (4096..far + 201 + GAP_BYTES_MAX, false),
            (1 << 40..(1 << 40) + 1, false),
        ] {
            assert_eq!(runs.covers(&wanted), covered, "{wanted:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// However few runs are kept, nothing of the backup is left out; and with room for all, nothing else is in.
        #[test]
        fn what_was_added_is_covered(
            extents in prop::collection::vec((0_u32..3, 0_u32..1 << 16, 1_u32..500), 1..100),
            runs_max in 4_usize..150,
        ) {
            let packs = collect(&extents, runs_max);
            for (pack, offset, stored) in &extents {
                let runs = &packs[&PackId(*pack)];
                let mut bytes = vec![1; *stored as usize];
                runs.blank(u64::from(*offset), &mut bytes);
                prop_assert!(bytes.iter().all(|byte| *byte == 1));
                prop_assert!(runs.covers(&(u64::from(*offset)..u64::from(offset + stored))));
            }
            if runs_max >= extents.len() {
                for (pack, runs) in &packs {
                    let mut bytes = vec![1; 1 << 17];
                    runs.blank(0, &mut bytes);
                    for (at, byte) in bytes.iter().enumerate().step_by(7) {
                        let wanted = extents.iter().any(|(of, offset, stored)| {
                            PackId(*of) == *pack && (*offset..offset + stored).contains(&(at as u32))
                        });
                        prop_assert_eq!(*byte == 1, wanted);
                    }
                }
            } else {
                prop_assert!(packs.values().map(|runs| runs.0.len()).sum::<usize>() <= 2 * runs_max);
            }
        }
    }
}
