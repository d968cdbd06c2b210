//! What crashed backups and pushes left: removed by the next backup, under its lock.
//!
//! Only what an interrupted backup's mark claims is removed, and the mark after it; [`leftovers`](super::leftovers) tells
//! how that is known. Whatever else belongs to no backup stays for an operator to judge: `verify` names it.

use super::leftovers::Leftovers;
use super::{Cluster, Lock, LockKind, keys, list_or_empty};
use crate::{Error, Result};

/// What was removed, and what a new backup must stay clear of.
#[derive(Debug)]
pub(super) struct Swept {
    /// Higher than every pack that there is or that is referred to.
    pub(super) next_pack: u32,
    /// Bytes that were given back.
    pub(super) bytes: u64,
}

/// Removes garbage. The caller holds the backup lock.
pub(super) fn sweep(cluster: &Cluster) -> Result<Swept> {
    let leftovers = Leftovers::of(cluster)?;
    let all_is_known = match leftovers.unknown {
        None => true,
        Some(error @ (Error::Corrupt { .. } | Error::Unsupported { .. })) => {
            tracing::warn!("what crashed backups left is kept, because a backup cannot be read: {error}");
            false
        }
        Some(error) => return Err(error),
    };
    let mut swept = Swept { next_pack: leftovers.next_pack, bytes: 0 };
    let store = cluster.store();
    for entry in &leftovers.garbage {
        store.remove(&entry.key)?;
        swept.bytes += entry.bytes;
    }
    if all_is_known {
        // Last: what a crash of this sweep leaves is still claimed.
        for label in leftovers.names.marks() {
            store.remove(&keys::unfinished(cluster.name(), label))?;
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
