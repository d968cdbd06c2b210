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
//!
//! To find the runs takes a walk through all of the manifest, seconds for 10 TB. What is found is known at once: requests
//! are answered while the walk goes on, and only those wait of which it is not known yet whether they are covered.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock};

use crate::Result;
use crate::format::block::{BlockRecord, Content, Extent};
use crate::repository::{Backup, keys};
use crate::units::{BackupLabel, BlockNumber, ClusterName, PackId};

/// The longest gap between covered runs that a request may span; what is in it is not sent.
pub(super) const GAP_BYTES_MAX: u64 = crate::blocks::GAP_BYTES_MAX;
/// Runs of one lease: 8 MiB of memory.
const RUNS_MAX: usize = 1 << 20;
/// Records looked at in one go.
const RECORDS_AT_ONCE: u64 = 8192;
/// Records that were looked at and are not made known yet, at most: 3 MiB of memory.
const RECORDS_UNKNOWN_MAX: u64 = 1 << 17;

/// What a lease covers.
#[derive(Debug)]
pub struct Coverage {
    cluster: ClusterName,
    manifests: BTreeSet<String>,
    /// Packs of the backup, and how many bytes of each its blocks refer to.
    used: BTreeMap<PackId, u64>,
    packs: RwLock<Packs>,
}

/// Bytes of one pack: sorted, apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Runs {
    runs: Arc<[(u32, u32)]>,
    /// No more will be found.
    is_final: bool,
}

/// How much of a key is covered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Nothing: not even whether it is there is told.
    Nothing,
    /// All of it.
    Whole,
    /// These runs.
    Only(Runs),
}

impl Coverage {
    /// For a choice among the cluster's backups: their descriptions and the WAL, and nothing that is in them.
    pub fn of_descriptions(cluster: &ClusterName) -> Self {
        let (manifests, used) = (BTreeSet::new(), BTreeMap::new());
        Self { cluster: cluster.clone(), manifests, used, packs: RwLock::new(Packs::new(RUNS_MAX)) }
    }

    /// The backup whose manifest `key` is, if it is one of this cluster's.
    pub fn manifest(&self, key: &str) -> Option<BackupLabel> {
        let name = key.strip_prefix(&keys::manifests(&self.cluster))?.strip_prefix('/')?;
        keys::manifest_of(name)
    }

    /// For one backup and the WAL of its cluster: nothing of its packs, until it is walked.
    pub fn begin(backup: &Backup) -> Self {
        let cluster = backup.cluster.name().clone();
        let used = backup.manifest.manifests().iter();
        let own = keys::manifest(&cluster, &backup.info.label);
        let manifests = used.map(|used| keys::manifest(&cluster, &used.label)).chain([own]).collect();
        let used = backup.manifest.packs().iter().map(|used| (used.pack, used.bytes)).collect();
        Self { cluster, manifests, used, packs: RwLock::new(Packs::new(RUNS_MAX)) }
    }

    /// For one backup and the WAL of its cluster. Reads all of the manifest.
    pub fn of_backup(backup: &Backup) -> Result<Self> {
        let coverage = Self::begin(backup);
        coverage.walk(backup, &mut || true)?;
        Ok(coverage)
    }

    /// Reads all of the manifest, front to back, as a restore does, and makes known what it finds on the way: a pack for
    /// good as soon as all bytes that the backup refers to in it were met. `go_on` hears each time, and says whether to.
    /// After an error it may be called again.
    pub fn walk(&self, backup: &Backup, go_on: &mut dyn FnMut() -> bool) -> Result<()> {
        self.packs.write().unwrap_or_else(PoisonError::into_inner).begin_again();
        let (mut found, mut walked) = (Found::default(), 0_u64);
        let mut records = Vec::new();
        for file in backup.manifest.files() {
            let file = file?;
            let blocks = backup.info.block_bytes.blocks_of(file.bytes);
            for first in (0..blocks).step_by(RECORDS_AT_ONCE as usize) {
                records.clear();
                let count = RECORDS_AT_ONCE.min(blocks - first);
                backup.manifest.blocks(BlockNumber(file.first_block.0 + first), count, &mut records)?;
                records.iter().for_each(|record| found.add(record));
                walked += count;
                // The first are waited for; later on there is more to look through each time.
                if found.records >= (walked / 16).clamp(RECORDS_AT_ONCE / 8, RECORDS_UNKNOWN_MAX) {
                    self.publish(&mut found, false);
                    if !go_on() {
                        return Err(crate::Error::Cancelled);
                    }
                }
            }
        }
        self.publish(&mut found, true);
        Ok(())
    }

    fn publish(&self, found: &mut Found, is_all: bool) {
        // It is changed by whole packs, so a panic elsewhere leaves less than there could be.
        self.packs.write().unwrap_or_else(PoisonError::into_inner).take(found, &self.used, is_all);
    }

    /// How much of `key` may be read.
    pub fn reach(&self, key: &str) -> Reach {
        let below = |directory: String| key.strip_prefix(&directory).and_then(|rest| rest.strip_prefix('/'));
        if key == keys::REPOSITORY || key == keys::cluster_info(&self.cluster) || self.manifests.contains(key) {
            return Reach::Whole;
        }
        if let Some(name) = below(keys::packs(&self.cluster)) {
            let Some(pack) = keys::pack_of(name).filter(|pack| self.used.contains_key(pack)) else {
                return Reach::Nothing;
            };
            return Reach::Only(self.packs.read().unwrap_or_else(PoisonError::into_inner).runs(pack));
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
    /// Whether a request for these bytes is one that a reader of the backup makes; none if that is not known yet. What is
    /// asked for with gaps is not known before no more can be found in them.
    pub fn answer(&self, wanted: &Range<u64>) -> Option<bool> {
        if self.is_final {
            return Some(self.covers(wanted));
        }
        let holds = |run: Range<u64>| run.start <= wanted.start && wanted.end <= run.end;
        (!wanted.is_empty() && self.within(wanted).next().is_some_and(holds)).then_some(true)
    }

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
        let first = self.runs.partition_point(|(_, end)| u64::from(*end) <= wanted.start);
        let end = wanted.end;
        let runs = self.runs[first..].iter().map(|(start, end)| u64::from(*start)..u64::from(*end));
        runs.take_while(move |run| run.start < end)
    }
}

/// What was met, and is not known yet.
#[derive(Debug, Default)]
struct Found {
    runs: Vec<(PackId, u32, u32)>,
    referred: BTreeMap<PackId, u64>,
    records: u64,
}

impl Found {
    fn add(&mut self, record: &BlockRecord) {
        self.records += 1;
        match record.content {
            Content::Zero => {}
            Content::Stored { at, .. } => self.add_run(&at),
            Content::Patched { base, patch, .. } => {
                self.add_run(&base);
                self.add_run(&patch);
            }
        }
    }

    fn add_run(&mut self, extent: &Extent) {
        *self.referred.entry(extent.pack).or_default() += u64::from(extent.stored);
        // Blocks of a file mostly lie one behind the other.
        let (start, end) = (extent.offset, extent.offset.saturating_add(extent.stored));
        match self.runs.last_mut() {
            Some((pack, _, last)) if *pack == extent.pack && *last == start => *last = end,
            _ => self.runs.push((extent.pack, start, end)),
        }
    }
}

/// Runs by pack; never more than there may be.
#[derive(Debug)]
struct Packs {
    known: BTreeMap<PackId, Known>,
    runs: usize,
    runs_max: usize,
    /// Runs with no more than this between them are one.
    gap: u32,
    is_all: bool,
}

#[derive(Debug)]
struct Known {
    runs: Arc<[(u32, u32)]>,
    referred: u64,
    is_final: bool,
}

impl Packs {
    fn new(runs_max: usize) -> Self {
        Self { known: BTreeMap::new(), runs: 0, runs_max, gap: 0, is_all: false }
    }

    fn runs(&self, pack: PackId) -> Runs {
        match self.known.get(&pack) {
            Some(known) => Runs { runs: Arc::clone(&known.runs), is_final: known.is_final || self.is_all },
            None => Runs { runs: Arc::default(), is_final: self.is_all },
        }
    }

    /// The manifest is read from the beginning: what was counted is counted again.
    fn begin_again(&mut self) {
        self.known.values_mut().for_each(|known| known.referred = 0);
    }

    fn take(&mut self, found: &mut Found, used: &BTreeMap<PackId, u64>, is_all: bool) {
        found.runs.sort_unstable();
        for of_pack in found.runs.chunk_by(|one, next| one.0 == next.0) {
            let pack = of_pack[0].0;
            let known = self.known.entry(pack).or_insert_with(Known::new);
            let more = of_pack.iter().map(|(_, start, end)| (*start, *end));
            self.runs -= known.runs.len();
            known.runs = merged(known.runs.iter().copied().chain(more).collect(), self.gap);
            self.runs += known.runs.len();
        }
        for (pack, bytes) in std::mem::take(&mut found.referred) {
            let Some(known) = self.known.get_mut(&pack) else { continue };
            known.referred += bytes;
            known.is_final |= used.get(&pack).is_some_and(|used| known.referred >= *used);
        }
        (found.runs, found.records, self.is_all) = (Vec::new(), 0, self.is_all || is_all);
        while self.runs > self.runs_max && self.gap < u32::MAX / 2 {
            self.gap = (self.gap * 2).max(crate::units::DIRECT_BYTES as u32);
            let gap = self.gap;
            self.known.values_mut().for_each(|known| known.runs = merged(known.runs.to_vec(), gap));
            self.runs = self.known.values().map(|known| known.runs.len()).sum();
        }
    }
}

impl Known {
    fn new() -> Self {
        Self { runs: Arc::default(), referred: 0, is_final: false }
    }
}

fn merged(mut runs: Vec<(u32, u32)>, gap: u32) -> Arc<[(u32, u32)]> {
    runs.sort_unstable();
    runs.dedup_by(|next, kept| {
        let joins = next.0 <= kept.1.saturating_add(gap);
        if joins {
            kept.1 = kept.1.max(next.1);
        }
        joins
    });
    runs.into()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn collect(extents: &[(u32, u32, u32)], runs_max: usize) -> BTreeMap<PackId, Runs> {
        let (mut packs, mut found) = (Packs::new(runs_max), Found::default());
        for (number, (pack, offset, stored)) in extents.iter().enumerate() {
            found.add_run(&Extent { pack: PackId(*pack), offset: *offset, stored: *stored });
            if number % 7 == 6 {
                packs.take(&mut found, &BTreeMap::new(), false);
            }
        }
        packs.take(&mut found, &BTreeMap::new(), true);
        packs.known.keys().map(|pack| (*pack, packs.runs(*pack))).collect()
    }

    #[test]
    fn runs_are_merged_and_gaps_are_blanked() {
        let packs = collect(&[(1, 4096, 100), (1, 4196, 50), (2, 0, 10), (1, 5000, 10), (1, 4096, 100)], 100);
        let runs = &packs[&PackId(1)];
        assert_eq!(*runs.runs, [(4096, 4246), (5000, 5010)]);
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

    #[test]
    fn what_is_not_known_yet_is_neither_served_nor_refused() {
        let run = |pack, offset, stored| Extent { pack: PackId(pack), offset, stored };
        let used = BTreeMap::from([(PackId(1), 200), (PackId(2), 50)]);
        let (mut packs, mut found) = (Packs::new(100), Found::default());
        found.add_run(&run(1, 4096, 100));
        packs.take(&mut found, &used, false);
        let runs = packs.runs(PackId(1));
        let answers = [4096..4196, 4100..4101, 4096..4197, 0..4196, 8192..8292].map(|wanted| runs.answer(&wanted));
        assert_eq!(answers, [Some(true), Some(true), None, None, None]);
        assert_eq!(packs.runs(PackId(2)).answer(&(0..1)), None);
        // All that the backup has of it was met: what lies between is sent as zeros, what lies behind is refused.
        found.add_run(&run(1, 8192, 100));
        packs.take(&mut found, &used, false);
        let runs = packs.runs(PackId(1));
        let answers = [4096..8292, 8192..8292, 4300..4400, 1 << 20..(1 << 20) + 1].map(|wanted| runs.answer(&wanted));
        assert_eq!(answers, [Some(true), Some(true), Some(false), Some(false)]);
        assert_eq!(packs.runs(PackId(2)).answer(&(0..1)), None);
        packs.take(&mut found, &used, true);
        assert_eq!(packs.runs(PackId(2)).answer(&(0..1)), Some(false));
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
                prop_assert!(packs.values().map(|runs| runs.runs.len()).sum::<usize>() <= runs_max.max(packs.len()));
            }
        }
    }
}
