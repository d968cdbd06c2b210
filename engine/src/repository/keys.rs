//! The names of things in the store: the one place that knows the layout.

use crate::units::{BackupLabel, ClusterName, PackId, Timeline};

/// The description of the repository.
pub(crate) const REPOSITORY: &str = "pghydrant.json";
/// All clusters.
pub(crate) const CLUSTERS: &str = "clusters";

const PACK_SUFFIX: &str = ".pack";
const MANIFEST_SUFFIX: &str = ".manifest";
const BACKUP_SUFFIX: &str = ".json";
const UNFINISHED_SUFFIX: &str = ".unfinished";

pub(crate) fn cluster_info(cluster: &ClusterName) -> String {
    format!("{CLUSTERS}/{cluster}/cluster.json")
}

pub(crate) fn locks(cluster: &ClusterName) -> String {
    format!("{CLUSTERS}/{cluster}/locks")
}

pub(crate) fn packs(cluster: &ClusterName) -> String {
    format!("{CLUSTERS}/{cluster}/packs")
}

pub(crate) fn pack(cluster: &ClusterName, id: PackId) -> String {
    format!("{CLUSTERS}/{cluster}/packs/{id}{PACK_SUFFIX}")
}

/// The pack of a file name in [`packs`].
pub(crate) fn pack_of(name: &str) -> Option<PackId> {
    let digits = name.strip_suffix(PACK_SUFFIX)?;
    let id = PackId(u32::from_str_radix(digits, 16).ok()?);
    (id.to_string() == digits).then_some(id)
}

pub(crate) fn manifests(cluster: &ClusterName) -> String {
    format!("{CLUSTERS}/{cluster}/manifests")
}

pub(crate) fn manifest(cluster: &ClusterName, label: &BackupLabel) -> String {
    format!("{CLUSTERS}/{cluster}/manifests/{label}{MANIFEST_SUFFIX}")
}

/// The backup of a file name in [`manifests`].
pub(crate) fn manifest_of(name: &str) -> Option<BackupLabel> {
    name.strip_suffix(MANIFEST_SUFFIX)?.parse().ok()
}

pub(crate) fn backups(cluster: &ClusterName) -> String {
    format!("{CLUSTERS}/{cluster}/backups")
}

pub(crate) fn backup(cluster: &ClusterName, label: &BackupLabel) -> String {
    format!("{CLUSTERS}/{cluster}/backups/{label}{BACKUP_SUFFIX}")
}

/// The backup of a file name in [`backups`].
pub(crate) fn backup_of(name: &str) -> Option<BackupLabel> {
    name.strip_suffix(BACKUP_SUFFIX)?.parse().ok()
}

/// The mark of a backup that is not committed, beside the descriptions.
pub(crate) fn unfinished(cluster: &ClusterName, label: &BackupLabel) -> String {
    format!("{CLUSTERS}/{cluster}/backups/{label}{UNFINISHED_SUFFIX}")
}

/// The backup of a mark's file name in [`backups`].
pub(crate) fn unfinished_of(name: &str) -> Option<BackupLabel> {
    name.strip_suffix(UNFINISHED_SUFFIX)?.parse().ok()
}

pub(crate) fn wal(cluster: &ClusterName) -> String {
    format!("{CLUSTERS}/{cluster}/wal")
}

pub(crate) fn wal_timeline(cluster: &ClusterName, timeline: Timeline) -> String {
    format!("{CLUSTERS}/{cluster}/wal/{:08X}", timeline.0)
}

/// The timeline of a directory name in [`wal`].
pub(crate) fn timeline_of(name: &str) -> Option<Timeline> {
    let timeline = Timeline(u32::from_str_radix(name, 16).ok()?);
    (format!("{:08X}", timeline.0) == name).then_some(timeline)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn names_come_back_as_what_they_stand_for() {
        assert_eq!(pack_of("0000002a.pack"), Some(PackId(42)));
        for stranger in ["2a.pack", "0000002A.pack", "0000002a.pack.old", "+000002a.pack"] {
            assert_eq!(pack_of(stranger), None, "{stranger}");
        }
        let label: BackupLabel = "20261122T081500Z-F".parse().unwrap();
        assert_eq!(manifest_of("20261122T081500Z-F.manifest"), Some(label.clone()));
        assert_eq!(backup_of("20261122T081500Z-F.json"), Some(label.clone()));
        assert_eq!(unfinished_of("20261122T081500Z-F.unfinished"), Some(label));
        assert_eq!(timeline_of("0000000A"), Some(Timeline(10)));
        assert_eq!(timeline_of("A"), None);
    }
}
