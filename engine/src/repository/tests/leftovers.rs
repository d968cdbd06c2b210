//! What belongs to no backup: swept where an interrupted backup's mark claims it, kept and told of where a backup is lost.

use super::*;
use crate::format::unfinished::UnfinishedInfo;
use crate::progress::Counting;
use std::path::PathBuf;

/// The names of everything in a cluster but its locks, with their sizes.
fn everything(cluster: &Cluster) -> BTreeMap<String, u64> {
    let directories = [keys::packs, keys::manifests, keys::backups];
    let entries = directories.iter().flat_map(|directory| {
        let entries = list_or_empty(cluster.store(), &directory(cluster.name()));
        entries.unwrap()
    });
    entries.map(|entry| (entry.key, entry.bytes)).collect()
}

/// What a verification finds but for the WAL, which these backups have not.
fn findings(cluster: &Cluster) -> Vec<Finding> {
    let fresh = Repository::open(cluster.repository().root()).unwrap().cluster(cluster.name()).unwrap();
    let proof = Verification::plan(&fresh, None).unwrap().run(&Counting::default()).unwrap();
    proof.findings.into_iter().filter(|finding| !finding.detail.contains("/wal/")).collect()
}

/// A cluster with a full and an incremental backup.
fn two_backups(directory: &Path) -> (Cluster, BackupInfo, BackupInfo) {
    let cluster = cluster_of(&repository_in(directory)).unwrap();
    let mut tree = sample_tree();
    let full = back_up(&cluster, &tree, Parent::Full).unwrap();
    change_some(&mut tree);
    let incremental = back_up(&cluster, &tree, Parent::Latest).unwrap();
    (cluster, full, incremental)
}

fn path_of_description(cluster: &Cluster, label: &BackupLabel) -> PathBuf {
    cluster.store().describe(&keys::backup(cluster.name(), label))
}

#[test]
fn a_backup_without_its_description_is_damage_and_nothing_of_it_is_swept() {
    for lost in [0, 1] {
        let directory = tempfile::tempdir().unwrap();
        let (cluster, full, incremental) = two_backups(directory.path());
        let label = [&full.label, &incremental.label][lost];
        let description = path_of_description(&cluster, label);
        let saved = std::fs::read(&description).unwrap();
        std::fs::remove_file(&description).unwrap();
        let before = everything(&cluster);

        assert_eq!(cluster.labels().unwrap(), [full.label.clone(), incremental.label.clone()]);
        let refused = cluster.backup_info(label).unwrap_err();
        assert!(matches!(&refused, Error::Corrupt { path, .. } if *path == description), "{refused}");
        let found = findings(&cluster);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!((found[0].kind, &found[0].path), (Kind::Corrupt, &description));

        // The next backups go on, without the lost one as a parent, and leave all of it alone.
        let next = back_up(&cluster, &sample_tree(), Parent::Latest).unwrap();
        assert_ne!(next.parent.as_ref(), Some(label));
        drop(cluster.begin_backup(Parent::Full).unwrap());
        let after = everything(&cluster);
        assert!(before.iter().all(|(key, bytes)| after.get(key) == Some(bytes)), "{before:?} {after:?}");
        std::fs::write(&description, saved).unwrap();
        cluster.backup(label).unwrap().manifest.verify_all().unwrap();
        read_back(&cluster.backup(label).unwrap()).unwrap();
    }
}

#[test]
fn packs_of_a_backup_that_lost_its_manifest_too_are_told_of_and_kept() {
    let directory = tempfile::tempdir().unwrap();
    let (cluster, full, incremental) = two_backups(directory.path());
    let own = cluster.backup(&incremental.label).unwrap().manifest.packs().last().unwrap().pack;
    std::fs::remove_file(path_of_description(&cluster, &incremental.label)).unwrap();
    std::fs::remove_file(cluster.store().describe(&keys::manifest(cluster.name(), &incremental.label))).unwrap();
    drop(cluster.begin_backup(Parent::Full).unwrap());
    let found = findings(&cluster);
    let pack = cluster.store().describe(&keys::pack(cluster.name(), own));
    assert_eq!(found.iter().map(|finding| &finding.path).collect::<Vec<_>>(), [&pack]);
    assert!(pack.exists());
    assert_eq!(cluster.labels().unwrap(), [full.label]);
}

#[test]
fn a_mark_that_outlives_the_commit_goes_and_the_backup_stays() {
    let directory = tempfile::tempdir().unwrap();
    let (cluster, _, incremental) = two_backups(directory.path());
    let before = everything(&cluster);
    let mark = UnfinishedInfo::new(incremental.label.clone(), now(), PackId(1));
    let key = keys::unfinished(cluster.name(), &incremental.label);
    cluster.store().put(&key, &mark.to_json().unwrap(), Existing::Refuse).unwrap();
    assert_eq!(cluster.unfinished().unwrap(), []);
    assert!(findings(&cluster).is_empty());
    let writer = cluster.begin_backup(Parent::Full).unwrap();
    let own = keys::unfinished(cluster.name(), writer.label());
    let mut after = everything(&cluster);
    assert!(after.remove(&own).is_some());
    assert_eq!(after, before);
}

#[test]
fn a_forged_or_damaged_mark_makes_no_backup_garbage() {
    let directory = tempfile::tempdir().unwrap();
    let (cluster, full, _) = two_backups(directory.path());
    // The full backup is said to be unfinished, but the incremental one builds on it.
    std::fs::remove_file(path_of_description(&cluster, &full.label)).unwrap();
    let mark = UnfinishedInfo::new(full.label.clone(), now(), PackId(1)).to_json().unwrap();
    let key = keys::unfinished(cluster.name(), &full.label);
    cluster.store().put(&key, &mark, Existing::Refuse).unwrap();
    let before = everything(&cluster);
    drop(cluster.begin_backup(Parent::Full).unwrap());
    let survives = || {
        let after = everything(&cluster);
        before.keys().all(|key| after.contains_key(key))
    };
    assert!(survives());
    assert_eq!(findings(&cluster)[0].path, path_of_description(&cluster, &full.label));

    let mut flipped = mark;
    flipped[40] ^= 1;
    std::fs::write(cluster.store().describe(&key), flipped).unwrap();
    drop(cluster.begin_backup(Parent::Full).unwrap());
    assert!(survives());
    assert!(!findings(&cluster).is_empty());
}

#[test]
fn a_new_backup_takes_no_label_that_anything_has() {
    let directory = tempfile::tempdir().unwrap();
    let (cluster, _, incremental) = two_backups(directory.path());
    let future: BackupLabel = "20991231T235958Z-F".parse().unwrap();
    cluster.store().put(&keys::manifest(cluster.name(), &future), b"x", Existing::Refuse).unwrap();
    let writer = cluster.begin_backup(Parent::Full).unwrap();
    assert_eq!(writer.label().as_str(), "20991231T235959Z-F");
    assert!(*writer.label() > incremental.label);
}
