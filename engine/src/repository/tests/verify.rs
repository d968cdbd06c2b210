//! What a verification finds.

use std::path::PathBuf;

use super::*;
use crate::wal::name::{SegmentName, WalFile};

fn segment_file(directory: &Path, number: u64) -> PathBuf {
    segment_of(directory, 1, number)
}

fn segment_of(directory: &Path, timeline: u32, number: u64) -> PathBuf {
    let name = SegmentName { timeline: Timeline(timeline), number };
    let path = directory.join(name.file_name(1 << 20));
    std::fs::write(&path, crate::wal::tests_segment(name, 7, 1 << 20)).unwrap();
    path
}

/// Two backups, the second of changed blocks, and WAL that both need and more.
fn proven_repository(directory: &Path) -> (Cluster, Vec<BackupLabel>) {
    let cluster = cluster_of(&repository_in(directory)).unwrap();
    let mut tree = sample_tree();
    let first = back_up(&cluster, &tree, Parent::Full).unwrap().label;
    change_some(&mut tree);
    let second = back_up(&cluster, &tree, Parent::Latest).unwrap().label;
    for number in 2..6 {
        cluster.wal().push(&segment_file(directory, number)).unwrap();
    }
    (cluster, vec![first, second])
}

fn prove(cluster: &Cluster, only: Option<&BackupLabel>) -> Proof {
    let fresh = Repository::open(cluster.repository().root()).unwrap().cluster(cluster.name()).unwrap();
    Verification::plan(&fresh, only).unwrap().run(&crate::progress::Counting::default()).unwrap()
}

#[test]
fn a_whole_repository_is_proven_and_shared_blocks_are_read_once() {
    let directory = tempfile::tempdir().unwrap();
    let (cluster, labels) = proven_repository(directory.path());
    let proof = prove(&cluster, None);
    assert!(proof.findings.is_empty(), "{:?}", proof.findings);
    let infos = cluster.backups().unwrap();
    let wal = 4 << 20;
    assert!(proof.bytes < infos[0].totals.bytes * 2 + wal && proof.bytes > infos[0].totals.bytes + wal);
    assert_eq!((proof.backups, proof.wal_files, proof.garbage_bytes), (2, 4, 0));
    assert_eq!(prove(&cluster, Some(&labels[1])).wal_files, 1);
    let unknown = "20200101T000000Z-F".parse().unwrap();
    assert!(matches!(Verification::plan(&cluster, Some(&unknown)), Err(Error::NotFound(_))));
}

#[test]
fn a_verification_stops_when_it_is_told_to() {
    struct Impatient;
    impl crate::progress::Progress for Impatient {
        fn advance(&self, _: u64) {}
        fn waited(&self, _: crate::progress::Stage, _: u64) {}
        fn cancelled(&self) -> bool {
            true
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let (cluster, _) = proven_repository(directory.path());
    assert!(matches!(Verification::plan(&cluster, None).unwrap().run(&Impatient), Err(Error::Cancelled)));
}

#[test]
fn every_file_that_is_deleted_truncated_or_flipped_is_found_and_named() {
    let directory = tempfile::tempdir().unwrap();
    let (cluster, labels) = proven_repository(directory.path());
    let mut files = Vec::new();
    collect_files(cluster.repository().root(), &mut files);
    assert!(files.len() > 10, "{files:?}");
    for path in files {
        let whole = std::fs::read(&path).unwrap();
        let mut flipped = whole.clone();
        flipped[whole.len() / 2] ^= 4;
        let mut first_bit = whole.clone();
        first_bit[0] ^= 1;
        let damages = [
            ("deleted", None),
            ("cut", Some(&whole[..whole.len() / 3])),
            ("flipped", Some(&flipped)),
            ("first", Some(&first_bit)),
        ];
        for (what, damaged) in damages {
            match damaged {
                None => std::fs::remove_file(&path).unwrap(),
                Some(bytes) => std::fs::write(&path, bytes).unwrap(),
            }
            let proof = Repository::open(cluster.repository().root())
                .and_then(|repository| repository.cluster(cluster.name()))
                .map(|_| prove(&cluster, None));
            let told = match proof {
                // The description of the cluster itself: nothing else can be looked at.
                Err(error) => error.to_string(),
                Ok(proof) => proof.findings.iter().map(|finding| finding.detail.clone()).collect::<Vec<_>>().join("\n"),
            };
            let name = path.file_name().unwrap().to_str().unwrap();
            // Nothing proves that the newest segment of an archive was there.
            let tolerated = what == "deleted" && name.ends_with("05");
            assert!(tolerated || !told.is_empty(), "{what} {name} is not found");
            assert!(tolerated || told.contains(name), "{what} {name}: {told}");
            std::fs::write(&path, &whole).unwrap();
        }
    }
    assert!(prove(&cluster, None).findings.is_empty());
    assert_eq!(cluster.labels().unwrap(), labels);
}

#[test]
fn damage_names_the_backups_that_need_it_and_the_rest_is_read_on() {
    let directory = tempfile::tempdir().unwrap();
    let (cluster, labels) = proven_repository(directory.path());
    let second = cluster.backup(&labels[1]).unwrap();
    let [shared, own] = second.manifest.packs() else { panic!("two packs expected") };
    let path_of = |pack| cluster.store().describe(&keys::pack(cluster.name(), pack));
    for pack in [shared.pack, own.pack] {
        let mut bytes = std::fs::read(path_of(pack)).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(path_of(pack), bytes).unwrap();
    }
    let findings = prove(&cluster, None).findings;
    let told: Vec<_> = findings.iter().map(|finding| (finding.path.clone(), finding.backups.len())).collect();
    assert_eq!(told, [(path_of(shared.pack), 2), (path_of(own.pack), 1)]);
    assert!(findings.iter().all(|finding| finding.kind == Kind::Corrupt));
    assert!(findings[0].detail.contains("block "), "{}", findings[0].detail);
}

#[test]
fn a_gap_is_a_finding_unless_backups_brought_their_own_wal() {
    let directory = tempfile::tempdir().unwrap();
    let (cluster, labels) = proven_repository(directory.path());
    let object = |number: u64| {
        let name = SegmentName { timeline: Timeline(1), number };
        cluster.wal().path_of(WalFile::Segment(name))
    };
    std::fs::remove_file(object(4)).unwrap();
    let findings = prove(&cluster, None).findings;
    assert_eq!(findings.len(), 1, "{findings:?}");
    assert_eq!((findings[0].kind, &findings[0].path), (Kind::Missing, &object(4)));
    assert_eq!(findings[0].backups.len(), 2);
    std::fs::remove_file(object(2)).unwrap();
    let one = prove(&cluster, Some(&labels[0])).findings;
    assert_eq!((one.len(), &one[0].path), (1, &object(2)));
}

#[test]
fn what_is_missing_where_a_timeline_left_another_is_found() {
    let directory = tempfile::tempdir().unwrap();
    let cluster = cluster_of(&repository_in(directory.path())).unwrap();
    let label = back_up_small(&cluster).unwrap().label;
    for (timeline, number) in [(1, 2), (1, 3), (1, 4), (2, 5), (2, 6), (2, 7)] {
        cluster.wal().push(&segment_of(directory.path(), timeline, number)).unwrap();
    }
    let history = directory.path().join("00000002.history");
    std::fs::write(&history, "1\t0/500800\tno recovery target specified\n").unwrap();
    cluster.wal().push(&history).unwrap();
    let proof = prove(&cluster, None);
    assert!(proof.findings.is_empty(), "{:?}", proof.findings);
    assert_eq!(proof.wal_files, 7);

    let segment = |timeline, number| WalFile::Segment(SegmentName { timeline: Timeline(timeline), number });
    let found_of = |file: WalFile, damage: fn(&Path)| {
        let path = cluster.wal().path_of(file);
        let whole = std::fs::read(&path).unwrap();
        damage(&path);
        let findings = prove(&cluster, None).findings;
        std::fs::write(&path, whole).unwrap();
        findings
            .into_iter()
            .map(|finding| (finding.path == path, finding.kind, finding.backups.len()))
            .collect::<Vec<_>>()
    };
    let delete: fn(&Path) = |path| std::fs::remove_file(path).unwrap();
    for file in
        [segment(1, 2), segment(1, 3), segment(1, 4), segment(2, 5), segment(2, 6), WalFile::History(Timeline(2))]
    {
        assert_eq!(found_of(file, delete), [(true, Kind::Missing, usize::from(file != segment(2, 6)))], "{file:?}");
    }
    // What the archive ended with, nobody can tell.
    assert_eq!(found_of(segment(2, 7), delete), []);
    for at in [0, 100, 4096, 4100] {
        let path = cluster.wal().path_of(WalFile::History(Timeline(2)));
        let mut bytes = std::fs::read(&path).unwrap();
        let whole = bytes.clone();
        bytes[at] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let findings = prove(&cluster, None).findings;
        assert_eq!(
            findings.iter().map(|finding| (&finding.path, finding.kind)).collect::<Vec<_>>(),
            [(&path, Kind::Corrupt)]
        );
        std::fs::write(&path, whole).unwrap();
    }
    assert_eq!(cluster.labels().unwrap(), [label]);
}

#[test]
fn a_wal_object_of_another_repository_is_none_of_ours() {
    let directory = tempfile::tempdir().unwrap();
    let (cluster, _) = proven_repository(directory.path());
    let (other, _) = proven_repository(&directory.path().join("base"));
    let object =
        |cluster: &Cluster| cluster.wal().path_of(WalFile::Segment(SegmentName { timeline: Timeline(1), number: 3 }));
    std::fs::copy(object(&other), object(&cluster)).unwrap();
    let findings = prove(&cluster, None).findings;
    assert_eq!(findings.iter().map(|finding| &finding.path).collect::<Vec<_>>(), [&object(&cluster)]);
}

fn collect_files(directory: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            if !path.ends_with("locks") {
                collect_files(&path, files);
            }
        } else {
            files.push(path);
        }
    }
}
