//! What of a cluster belongs to no backup, and why: an interrupted backup left it, or a backup has lost its description.
//!
//! A backup writes `<label>.unfinished` before anything else and removes it behind its description. So the names tell:
//!
//! | description | mark | manifest | |
//! |---|---|---|---|
//! | there | any | any | a backup |
//! | | there | any | it runs, or was interrupted: garbage |
//! | | | there | a backup that has lost its description: damage |
//!
//! A pack that no backup refers to is garbage where an interrupted backup's mark claims its number, and else a backup lost
//! both its description and its manifest. Where a backup cannot be read, nobody knows what it refers to, and nothing is garbage.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use super::{Cluster, Manifest, get, keys, list_or_empty};
use crate::format::unfinished::UnfinishedInfo;
use crate::store::Entry;
use crate::units::{BackupLabel, PackId};
use crate::{Error, Result};

/// The backups of a cluster, by the names in the store.
#[derive(Debug)]
pub(super) struct Names {
    described: BTreeSet<BackupLabel>,
    marked: BTreeSet<BackupLabel>,
    manifests: BTreeMap<BackupLabel, Entry>,
}

impl Names {
    pub(super) fn of(cluster: &Cluster) -> Result<Self> {
        let (store, name) = (cluster.store(), cluster.name());
        // Manifests first: one that is there has its mark, or a moment later its description.
        let manifests = list_or_empty(store, &keys::manifests(name))?;
        let backups = list_or_empty(store, &keys::backups(name))?;
        let described: BTreeSet<_> = backups.iter().filter_map(|entry| keys::backup_of(entry.name())).collect();
        let marked: BTreeSet<_> = backups.iter().filter_map(|entry| keys::unfinished_of(entry.name())).collect();
        let mut found = BTreeMap::new();
        for (label, entry) in manifests.into_iter().filter_map(|entry| Some((keys::manifest_of(entry.name())?, entry)))
        {
            // One that has neither may have been swept between the two looks.
            let known = described.contains(&label) || marked.contains(&label);
            if known || store.size(&entry.key)?.is_some() {
                found.insert(label, entry);
            }
        }
        Ok(Self { described, marked, manifests: found })
    }

    /// The backups that were committed, whether or not they can be read, oldest first.
    pub(super) fn committed(&self) -> Vec<BackupLabel> {
        let lost = self.manifests.keys().filter(|label| !self.marked.contains(label));
        self.described.iter().chain(lost).collect::<BTreeSet<_>>().into_iter().cloned().collect()
    }

    /// Those that run or were interrupted.
    pub(super) fn unfinished(&self) -> impl Iterator<Item = &BackupLabel> {
        self.marked.difference(&self.described)
    }

    /// Every label that a new backup must not take.
    pub(super) fn taken(&self) -> impl Iterator<Item = &BackupLabel> {
        self.described.iter().chain(&self.marked).chain(self.manifests.keys())
    }

    /// Marks, those of committed backups as well: a crash may fall between the two.
    pub(super) fn marks(&self) -> &BTreeSet<BackupLabel> {
        &self.marked
    }
}

/// What belongs to no backup.
#[derive(Debug)]
pub(super) struct Leftovers {
    pub(super) names: Names,
    /// What interrupted backups left: packs, then manifests. Nothing while [`unknown`](Self::unknown) says why.
    pub(super) garbage: Vec<Entry>,
    /// Packs that no backup refers to and no interrupted one claims.
    pub(super) strays: Vec<Entry>,
    /// Higher than every pack that there is or that is referred to.
    pub(super) next_pack: u32,
    /// Why nobody can tell what is garbage.
    pub(super) unknown: Option<Error>,
}

impl Leftovers {
    pub(super) fn of(cluster: &Cluster) -> Result<Self> {
        // Packs before names, for the same reason as manifests.
        let packs = list_or_empty(cluster.store(), &keys::packs(cluster.name()))?;
        let packs: Vec<_> = packs.into_iter().filter_map(|entry| Some((keys::pack_of(entry.name())?, entry))).collect();
        let names = Names::of(cluster)?;
        let in_use = InUse::of(cluster, &names);
        let highest = packs.iter().map(|(pack, _)| *pack).chain(in_use.packs.iter().copied()).max();
        let next_pack = highest.map_or(1, |pack| pack.0.saturating_add(1));
        let mut leftovers = Self { names, garbage: Vec::new(), strays: Vec::new(), next_pack, unknown: in_use.unknown };
        if leftovers.unknown.is_some() {
            return Ok(leftovers);
        }
        for (pack, entry) in packs.into_iter().filter(|(pack, _)| !in_use.packs.contains(pack)) {
            let claimed = in_use.claimed_from.is_some_and(|first| pack >= first);
            if claimed { &mut leftovers.garbage } else { &mut leftovers.strays }.push(entry);
        }
        let manifests = leftovers.names.unfinished().filter_map(|label| leftovers.names.manifests.get(label));
        leftovers.garbage.extend(manifests.cloned().collect::<Vec<_>>());
        Ok(leftovers)
    }
}

/// What backups refer to, and what interrupted ones claim.
#[derive(Debug, Default)]
struct InUse {
    packs: HashSet<PackId>,
    claimed_from: Option<PackId>,
    /// Why that may not be all.
    unknown: Option<Error>,
}

impl InUse {
    fn of(cluster: &Cluster, names: &Names) -> Self {
        let mut in_use = Self::default();
        for label in names.committed() {
            let added = in_use.add_backup(cluster, names, &label);
            in_use.unknown = in_use.unknown.or(added.err());
        }
        for label in names.unfinished() {
            match first_pack(cluster, label) {
                Ok(first) => in_use.claimed_from = in_use.claimed_from.into_iter().chain(first).min(),
                Err(error) => in_use.unknown = in_use.unknown.or(Some(error)),
            }
        }
        in_use
    }

    fn add_backup(&mut self, cluster: &Cluster, names: &Names, label: &BackupLabel) -> Result<()> {
        let manifest = Manifest::open(cluster, &cluster.backup_info(label)?)?;
        self.packs.extend(manifest.packs().iter().map(|used| used.pack));
        let mut inherited = manifest.manifests().iter().map(|used| &used.label);
        match inherited.find(|used| names.unfinished().any(|unfinished| unfinished == *used)) {
            None => Ok(()),
            Some(used) => {
                let path = cluster.store().describe(&keys::backup(cluster.name(), used));
                Err(Error::corrupt(
                    path,
                    format!("the description is missing, but backup {label} builds on the backup"),
                ))
            }
        }
    }
}

/// Where the claim of an unfinished backup begins; none if it was committed or swept since the names were listed.
fn first_pack(cluster: &Cluster, label: &BackupLabel) -> Result<Option<PackId>> {
    let key = keys::unfinished(cluster.name(), label);
    match get(cluster.store(), &key, UnfinishedInfo::from_json)? {
        None => Ok(None),
        Some(info) if info.label == *label => Ok(Some(info.first_pack)),
        Some(info) => {
            Err(Error::corrupt(cluster.store().describe(&key), format!("it is the mark of backup {}", info.label)))
        }
    }
}
