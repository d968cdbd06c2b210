//! What crashed backups and pushes left: found and removed by the next backup, under its lock.
//!
//! A pack or a manifest that no committed backup refers to is garbage, because only a backup makes them and only one
//! backup runs at a time. Where a committed backup cannot be read, nobody knows what it refers to, and nothing is
//! removed.

use std::collections::HashSet;

use super::{Cluster, Lock, LockKind, Manifest, keys, list_or_empty};
use crate::units::{BackupLabel, PackId};
use crate::{Error, Result};

/// What is in use, and what a new backup must stay clear of.
#[derive(Debug, Default)]
pub(super) struct Swept {
    /// Higher than every pack that there is or that is referred to.
    pub(super) next_pack: u32,
    /// Bytes that were given back.
    pub(super) bytes: u64,
}

/// Removes garbage. The caller holds the backup lock.
pub(super) fn sweep(cluster: &Cluster) -> Result<Swept> {
    let in_use = match InUse::of(cluster) {
        Ok(in_use) => Some(in_use),
        Err(error @ (Error::Corrupt { .. } | Error::Unsupported { .. })) => {
            tracing::warn!("what crashed backups left is kept, because a backup cannot be read: {error}");
            None
        }
        Err(error) => return Err(error),
    };
    let mut swept = Swept::default();
    let store = cluster.store();
    for entry in list_or_empty(store, &keys::packs(cluster.name()))? {
        let Some(pack) = keys::pack_of(entry.name()) else { continue };
        if in_use.as_ref().is_some_and(|in_use| !in_use.packs.contains(&pack)) {
            store.remove(&entry.key)?;
            swept.bytes += entry.bytes;
        } else {
            swept.next_pack = swept.next_pack.max(pack.0.saturating_add(1));
        }
    }
    if let Some(in_use) = &in_use {
        // One that is referred to but lost keeps its number.
        let referred = in_use.packs.iter().map(|pack| pack.0.saturating_add(1)).max();
        swept.next_pack = swept.next_pack.max(referred.unwrap_or(0));
        for entry in list_or_empty(store, &keys::manifests(cluster.name()))? {
            if keys::manifest_of(entry.name()).is_some_and(|label| !in_use.manifests.contains(&label)) {
                store.remove(&entry.key)?;
                swept.bytes += entry.bytes;
            }
        }
    }
    for directory in [keys::packs, keys::manifests, keys::backups] {
        swept.bytes += store.sweep_uploads(&directory(cluster.name()))?;
    }
    swept.bytes += sweep_pushes(cluster)?;
    Ok(swept)
}

/// Removes what crashed pushes left, unless one is under way.
fn sweep_pushes(cluster: &Cluster) -> Result<u64> {
    let _alone = match Lock::exclusive(cluster.store(), cluster.name(), LockKind::Push) {
        Ok(lock) => lock,
        Err(Error::Locked { .. }) => return Ok(0),
        Err(error) => return Err(error),
    };
    let timelines = list_or_empty(cluster.store(), &keys::wal(cluster.name()))?;
    timelines.iter().filter(|entry| entry.is_directory).map(|entry| cluster.store().sweep_uploads(&entry.key)).sum()
}

/// Everything that committed backups refer to.
#[derive(Debug, Default)]
struct InUse {
    packs: HashSet<PackId>,
    manifests: HashSet<BackupLabel>,
}

impl InUse {
    fn of(cluster: &Cluster) -> Result<Self> {
        let mut in_use = Self::default();
        for label in cluster.labels()? {
            let manifest = Manifest::open(cluster, &cluster.backup_info(&label)?)?;
            in_use.packs.extend(manifest.packs().iter().map(|used| used.pack));
            in_use.manifests.extend(manifest.manifests().iter().map(|used| used.label.clone()));
            in_use.manifests.insert(label);
        }
        Ok(in_use)
    }
}
