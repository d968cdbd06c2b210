//! Backups written and read back, failed at every operation, damaged in every file.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use super::*;
use crate::blocks::Scratch;
use crate::format::backup::{BackupInfo, ServerInfo, Snapshot, WalRange};
use crate::format::block::BlockRecord;
use crate::format::file::{FileKind, FileRecord};
use crate::format::manifest::{LEAF_RECORDS, cut::cut_groups, path};
use crate::store::failing::FailingStore;
use crate::units::{BackupLabel, BlockNumber, Lsn, PAGE_BYTES, PackId, SystemIdentifier, Timeline};

/// A data directory in memory: what a backup must give back.
pub(crate) type Tree = BTreeMap<String, Option<Vec<u8>>>;

const SIZE: BlockSize = BlockSize::MIN;

pub(crate) fn pages(count: usize, seed: usize) -> Vec<u8> {
    let mut bytes = vec![0; count * PAGE_BYTES];
    for (page, content) in bytes.chunks_mut(PAGE_BYTES).enumerate().filter(|(page, _)| page % 7 != 3) {
        for (at, byte) in content.iter_mut().enumerate().take(PAGE_BYTES / 2) {
            *byte = ((at * 31) ^ (page * 17) ^ seed).to_le_bytes()[0] ^ (at >> 5) as u8;
        }
    }
    bytes
}

pub(crate) fn sample_tree() -> Tree {
    let mut tree = Tree::new();
    for directory in ["base", "base/1", "base/5", "global", "pg_wal"] {
        tree.insert(directory.to_owned(), None);
    }
    for number in 0..300 {
        tree.insert(format!("base/1/{number}"), Some(pages(number % 5, number)));
    }
    tree.insert("base/5/16384".to_owned(), Some(pages(4 * 1300, 1)));
    tree.insert("base/5/16385".to_owned(), Some(vec![0; 9 * PAGE_BYTES]));
    tree.insert("base/5/16386".to_owned(), Some(b"short".to_vec()));
    tree.insert("PG_VERSION".to_owned(), Some(b"15\n".to_vec()));
    tree.insert("global/pg_control".to_owned(), Some(pages(1, 9)));
    tree
}

pub(crate) fn cluster_of(repository: &Repository) -> Result<Cluster> {
    let name = "main".parse().unwrap();
    repository.create_cluster(ClusterInfo::new(name, SystemIdentifier(7), 1 << 20, now()))
}

pub(crate) fn description() -> Description {
    Description {
        stopped_at: "2026-11-22T08:15:00Z".to_owned(),
        stopped_unix: 1_795_335_300,
        server: ServerInfo {
            system_identifier: SystemIdentifier(7),
            version_num: 150_018,
            data_checksums: true,
            wal_segment_bytes: 1 << 20,
            data_directory: "/data".to_owned(),
            outside_files: Vec::new(),
            owner: "postgres".to_owned(),
            settings: BTreeMap::new(),
        },
        wal: WalRange { timeline: Timeline(1), start: Lsn(0x20_0028), stop: Lsn(0x20_0100) },
        snapshot: Snapshot::default(),
        tablespaces: Vec::new(),
        bad_pages: Vec::new(),
    }
}

/// A backup of next to nothing, for what only needs one.
pub(crate) fn back_up_small(cluster: &Cluster) -> Result<BackupInfo> {
    let tree = Tree::from([("PG_VERSION".to_owned(), Some(b"15\n".to_vec()))]);
    back_up(cluster, &tree, Parent::Full)
}

/// Backs `tree` up, as a caller does: groups of files, leaves of their blocks, each with the parent's record.
pub(crate) fn back_up(cluster: &Cluster, tree: &Tree, parent: Parent) -> Result<BackupInfo> {
    let writer = cluster.begin_backup(parent)?;
    let mut files: Vec<_> = tree.iter().collect();
    files.sort_by(|one, other| path::order(one.0, other.0));
    let bytes = |content: &Option<Vec<u8>>| content.as_ref().map_or(0, |content| content.len() as u64);
    let sizes = files.iter().map(|(path, content)| (path.as_str(), SIZE.blocks_of(bytes(content))));
    let mut worker = writer.worker()?;
    let groups: Vec<_> = cut_groups(sizes).collect();
    // Last first: any order must do.
    for (position, range) in groups.into_iter().enumerate().rev() {
        let mut records = Vec::new();
        let mut members = Vec::new();
        for (path, content) in &files[range] {
            put_file(&writer, &mut worker, path, content.as_deref().unwrap_or_default(), &mut records)?;
            let kind = if content.is_some() { FileKind::Regular } else { FileKind::Directory };
            members.push(FileRecord {
                path: (*path).clone(),
                kind,
                mode: 0o600,
                uid: 1,
                gid: 1,
                modified: 1,
                bytes: bytes(content),
                crc32c: content.as_ref().map_or(0, |content| crc32c::crc32c(content)),
                first_block: BlockNumber(0),
            });
        }
        let leaves = records.chunks(LEAF_RECORDS as usize).map(|leaf| writer.commit_leaf(leaf));
        let leaves = leaves.collect::<Result<Vec<_>>>()?;
        writer.commit_group(position as u64, &members, leaves)?;
    }
    worker.finish()?;
    writer.finish(description())
}

fn put_file(
    writer: &BackupWriter,
    worker: &mut PackWriter,
    path: &str,
    content: &[u8],
    records: &mut Vec<BlockRecord>,
) -> Result<()> {
    let parent = writer.parent().map(|parent| parent.manifest.file(path)).transpose()?.flatten();
    for (index, raw) in content.chunks(SIZE.bytes()).enumerate() {
        let same_length = |file: &&FileRecord| SIZE.block_bytes_at(file.bytes, index as u64) == raw.len();
        let before = match parent.as_ref().filter(same_length).zip(writer.parent()) {
            Some((file, backup)) => Some(backup.manifest.block(BlockNumber(file.first_block.0 + index as u64))?),
            None => None,
        };
        records.push(worker.put(raw, None, before.as_ref())?.0);
    }
    Ok(())
}

/// Reads a backup whole.
pub(crate) fn read_back(backup: &Backup) -> Result<Tree> {
    let (blocks, mut scratch) = (backup.blocks(), Scratch::default());
    let mut tree = Tree::new();
    for file in backup.manifest.files() {
        let file = file?;
        let content = if file.kind == FileKind::Regular {
            let mut content = vec![0; file.bytes as usize];
            let read = blocks.read_range(&file, 0, &mut content, &mut scratch)?;
            assert_eq!(read, content.len());
            assert_eq!(crc32c::crc32c(&content), file.crc32c);
            Some(content)
        } else {
            None
        };
        tree.insert(file.path, content);
    }
    Ok(tree)
}

fn repository_in(directory: &Path) -> Repository {
    Repository::init(&directory.join("repo"), Compression::Lz4, SIZE).unwrap()
}

fn change_some(tree: &mut Tree) {
    let large = tree.get_mut("base/5/16384").unwrap().as_mut().unwrap();
    for page in [0, 1, 40, 41, 42, 43, 999] {
        large[page * PAGE_BYTES + 100] ^= 0x55;
    }
    tree.remove("base/1/17");
    tree.insert("base/1/9999".to_owned(), Some(pages(3, 77)));
    tree.insert("base/5/16386".to_owned(), Some(b"shorter".to_vec()));
}

#[test]
fn every_backup_reads_back_whole_and_stores_only_what_changed() {
    let directory = tempfile::tempdir().unwrap();
    let cluster = cluster_of(&repository_in(directory.path())).unwrap();
    let mut tree = sample_tree();
    let full = back_up(&cluster, &tree, Parent::Latest).unwrap();
    assert!(full.parent.is_none() && full.label.as_str().ends_with("-F"));
    let mut trees = vec![(full.label.clone(), tree.clone())];
    for _ in 0..3 {
        change_some(&mut tree);
        let next = back_up(&cluster, &tree, Parent::Latest).unwrap();
        assert_eq!(next.parent.as_ref(), trees.last().map(|(label, _)| label));
        assert!(next.totals.added_pack_bytes < full.totals.added_pack_bytes / 4, "{:?} {:?}", full.totals, next.totals);
        assert!(next.totals.added_manifest_bytes < full.totals.added_manifest_bytes, "{:?}", next.totals);
        trees.push((next.label.clone(), tree.clone()));
    }
    let same = back_up(&cluster, &tree, Parent::Latest).unwrap();
    assert_eq!(same.totals.added_pack_bytes, 0);
    assert_eq!(same.totals.shared_bytes, same.totals.bytes);
    trees.push((same.label, tree));
    for (label, tree) in trees {
        let backup = cluster.backup(&label).unwrap();
        backup.manifest.verify_all().unwrap();
        assert!(read_back(&backup).unwrap() == tree, "{label}");
    }
}

#[test]
fn files_and_children_are_found_by_path() {
    let directory = tempfile::tempdir().unwrap();
    let cluster = cluster_of(&repository_in(directory.path())).unwrap();
    let tree = sample_tree();
    let info = back_up(&cluster, &tree, Parent::Full).unwrap();
    let manifest = cluster.backup(&info.label).unwrap().manifest;
    assert_eq!(manifest.file_count(), tree.len() as u64);
    for (path, content) in &tree {
        let file = manifest.file(path).unwrap().expect(path);
        assert_eq!(file.bytes, content.as_ref().map_or(0, |content| content.len() as u64));
    }
    for absent in ["", "A", "base/1/", "base/1/30000", "base/5/16383", "zzz"] {
        assert_eq!(manifest.file(absent).unwrap(), None, "{absent}");
    }
    for (index, file) in manifest.files().enumerate() {
        let (index, file) = (index as u64, file.unwrap());
        assert_eq!(manifest.index_of(&file.path).unwrap(), Some(index));
        assert_eq!(manifest.file_at(index).unwrap(), Some(file));
    }
    assert_eq!(manifest.file_at(tree.len() as u64).unwrap(), None);
    assert_eq!(manifest.index_after("base").unwrap(), manifest.index_of("global").unwrap().unwrap());
    assert_eq!(manifest.index_after("pg_wal").unwrap(), tree.len() as u64);
    let names = |directory| {
        let children = manifest.children(directory).unwrap();
        children.into_iter().map(|file| file.path).collect::<Vec<_>>()
    };
    assert_eq!(names(""), ["PG_VERSION", "base", "global", "pg_wal"]);
    assert_eq!(names("base"), ["base/1", "base/5"]);
    assert_eq!(names("base/5"), ["base/5/16384", "base/5/16385", "base/5/16386"]);
    assert_eq!(names("base/1").len(), 300);
    assert_eq!(names("pg_wal"), Vec::<String>::new());
    assert!(matches!(manifest.block(BlockNumber(manifest.block_limit())), Err(Error::Corrupt { .. })));
}

#[test]
fn every_operation_of_a_backup_may_fail_once_or_for_ever_and_nothing_committed_is_lost() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("repo");
    let before = {
        let cluster = cluster_of(&Repository::init(&root, Compression::Lz4, SIZE).unwrap()).unwrap();
        let mut tree = sample_tree();
        tree.retain(|path, _| !path.starts_with("base/5/"));
        (back_up(&cluster, &tree, Parent::Full).unwrap().label, tree)
    };
    let mut tree = before.1.clone();
    tree.insert("base/1/9999".to_owned(), Some(pages(3, 77)));
    let attempt = |fail_at, sticky| {
        let store = Arc::new(FailingStore::new(LocalStore::new(&root), fail_at, sticky, libc::EIO));
        let done = Repository::with_store(&root, Arc::clone(&store) as Arc<dyn Store>)
            .and_then(|repository| cluster_of(&repository))
            .and_then(|cluster| back_up(&cluster, &tree, Parent::Latest));
        (done, store.count())
    };
    let (clean, operations) = attempt(0, false);
    let mut labels = vec![before.0.clone(), clean.unwrap().label];
    assert!(operations > 20, "{operations}");
    for fail_at in 1..=operations + 5 {
        let (done, _) = attempt(fail_at, fail_at % 2 == 0);
        let cluster = cluster_of(&Repository::open(&root).unwrap()).unwrap();
        if let Ok(info) = done {
            labels.push(info.label);
        }
        let found = cluster.labels().unwrap();
        // An error while the name was made durable may leave the backup committed: it is whole then.
        for label in &found {
            cluster.backup(label).unwrap().manifest.verify_all().unwrap();
        }
        assert!(labels.iter().all(|label| found.contains(label)), "operation {fail_at}");
        labels = found;
    }
    let cluster = cluster_of(&Repository::open(&root).unwrap()).unwrap();
    assert!(read_back(&cluster.backup(&before.0).unwrap()).unwrap() == before.1);
    assert!(read_back(&cluster.latest_backup().unwrap().unwrap()).unwrap() == tree);
}

#[test]
fn what_a_crash_leaves_is_swept_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let repository = repository_in(directory.path());
    let cluster = cluster_of(&repository).unwrap();
    let tree = sample_tree();
    let kept = back_up(&cluster, &tree, Parent::Full).unwrap();
    let store = repository.store();
    let names = |directory: String| {
        let entries = store.list(&directory).unwrap();
        entries.iter().map(|entry| entry.name().to_owned()).collect::<Vec<_>>()
    };
    let before = (names(keys::packs(cluster.name())), names(keys::manifests(cluster.name())));

    // A backup that dies before its commit: a whole pack, a whole manifest, and uploads under way.
    let writer = cluster.begin_backup(Parent::Full).unwrap();
    let mut worker = writer.worker().unwrap();
    worker.put(&pages(4, 5), None, None).unwrap();
    worker.finish().unwrap();
    std::mem::forget(store.create(&keys::pack(cluster.name(), PackId(77)), Existing::Refuse).unwrap());
    store.put(&keys::manifest(cluster.name(), &"20200101T000000Z-F".parse().unwrap()), b"x", Existing::Refuse).unwrap();
    drop(writer);
    assert_ne!(names(keys::packs(cluster.name())), before.0);

    drop(cluster.begin_backup(Parent::Latest).unwrap());
    assert_eq!((names(keys::packs(cluster.name())), names(keys::manifests(cluster.name()))), before);
    let hidden = std::fs::read_dir(store.describe(&keys::packs(cluster.name()))).unwrap();
    assert_eq!(hidden.count(), before.0.len());
    assert!(read_back(&cluster.backup(&kept.label).unwrap()).unwrap() == tree);
}

#[test]
fn nothing_is_swept_while_a_backup_cannot_be_read_and_backups_go_on() {
    let directory = tempfile::tempdir().unwrap();
    let cluster = cluster_of(&repository_in(directory.path())).unwrap();
    let mut tree = sample_tree();
    let first = back_up(&cluster, &tree, Parent::Full).unwrap();
    let broken = cluster.store().describe(&keys::backup(cluster.name(), &first.label));
    let whole = std::fs::read(&broken).unwrap();
    std::fs::write(&broken, b"{").unwrap();
    change_some(&mut tree);
    let second = back_up(&cluster, &tree, Parent::Latest).unwrap();
    assert_eq!(second.parent, None);
    std::fs::write(&broken, whole).unwrap();
    assert!(read_back(&cluster.backup(&first.label).unwrap()).unwrap() == sample_tree());
    assert!(read_back(&cluster.backup(&second.label).unwrap()).unwrap() == tree);
}

#[test]
fn a_damaged_manifest_is_no_parent_and_does_not_stop_backups() {
    let directory = tempfile::tempdir().unwrap();
    let cluster = cluster_of(&repository_in(directory.path())).unwrap();
    let tree = sample_tree();
    let first = back_up(&cluster, &tree, Parent::Full).unwrap();
    let path = cluster.store().describe(&keys::manifest(cluster.name(), &first.label));
    let whole = std::fs::read(&path).unwrap();
    let mut damaged = whole.clone();
    // The groups' chunks, in the middle, but not the root at the end.
    damaged[whole.len() / 2..whole.len() - 20_000].fill(0xEE);
    std::fs::write(&path, damaged).unwrap();
    let cluster = cluster_of(&Repository::open(cluster.repository().root()).unwrap()).unwrap();
    let second = back_up(&cluster, &tree, Parent::Latest).unwrap();
    assert_eq!(second.parent, None);
    assert!(read_back(&cluster.backup(&second.label).unwrap()).unwrap() == tree);
}

#[test]
fn a_cluster_without_its_description_is_damaged_not_absent() {
    let directory = tempfile::tempdir().unwrap();
    let repository = repository_in(directory.path());
    let cluster = cluster_of(&repository).unwrap();
    back_up_small(&cluster).unwrap();
    std::fs::remove_file(repository.store().describe(&keys::cluster_info(cluster.name()))).unwrap();
    assert_eq!(repository.clusters().unwrap(), [cluster.name().clone()]);
    assert!(matches!(repository.cluster(cluster.name()), Err(Error::Corrupt { .. })));
    assert!(matches!(cluster_of(&repository), Err(Error::Corrupt { .. })));
}

#[test]
fn one_backup_at_a_time_and_a_worker_that_did_not_finish_is_no_backup() {
    let directory = tempfile::tempdir().unwrap();
    let cluster = cluster_of(&repository_in(directory.path())).unwrap();
    let writer = cluster.begin_backup(Parent::Full).unwrap();
    assert!(matches!(cluster.begin_backup(Parent::Full), Err(Error::Locked { .. })));
    drop(writer.worker().unwrap());
    let refused = writer.finish(description()).unwrap_err();
    assert!(refused.to_string().contains("have not finished"), "{refused}");
    assert_eq!(cluster.labels().unwrap(), []);
    cluster.begin_backup(Parent::Full).unwrap();
}

#[test]
fn a_group_that_no_reader_would_accept_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let cluster = cluster_of(&repository_in(directory.path())).unwrap();
    let writer = cluster.begin_backup(Parent::Full).unwrap();
    let mut worker = writer.worker().unwrap();
    let (record, _) = worker.put(&pages(4, 1), None, None).unwrap();
    let leaf = writer.commit_leaf(&[record, record]).unwrap();
    let file = FileRecord {
        path: "a".to_owned(),
        kind: FileKind::Regular,
        mode: 0,
        uid: 0,
        gid: 0,
        modified: 0,
        bytes: SIZE.bytes() as u64,
        crc32c: 0,
        first_block: BlockNumber(0),
    };
    assert!(matches!(writer.commit_group(0, &[file.clone()], vec![leaf]), Err(Error::Refused(_))));
    assert!(matches!(writer.commit_group(0, &[file], Vec::new()), Err(Error::Refused(_))));
    assert!(writer.commit_leaf(&[]).is_err());
}

fn make(root: &Path) -> Repository {
    Repository::init(root, Compression::Lz4, BlockSize::DEFAULT).unwrap()
}

fn info(identifier: u64, segment: u64) -> ClusterInfo {
    ClusterInfo::new("main".parse().unwrap(), SystemIdentifier(identifier), segment, now())
}

#[test]
fn a_repository_is_made_once_and_opened_as_it_was() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("deep/repo");
    let made = make(&root);
    assert_eq!(Repository::open(&root).unwrap().info(), made.info());
    assert!(matches!(Repository::init(&root, Compression::None, BlockSize::MIN), Err(Error::Refused(_))));
    assert_eq!(Repository::open(&root).unwrap().clusters().unwrap(), []);
}

#[test]
fn a_directory_with_something_in_it_is_refused_and_one_without_is_not_a_repository() {
    let directory = tempfile::tempdir().unwrap();
    assert!(matches!(Repository::open(directory.path()), Err(Error::NotFound(_))));
    assert!(matches!(Repository::open(&directory.path().join("no")), Err(Error::NotFound(_))));
    std::fs::write(directory.path().join("precious"), b"x").unwrap();
    let refused = Repository::init(directory.path(), Compression::Lz4, BlockSize::DEFAULT).unwrap_err();
    assert!(refused.to_string().contains("precious"), "{refused}");
}

#[test]
fn a_newer_repository_is_refused_whatever_its_other_fields_are() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join(keys::REPOSITORY), br#"{"format": 2, "minimum_reader": 2, "id": []}"#)
        .unwrap();
    assert!(matches!(Repository::open(directory.path()), Err(Error::Unsupported { .. })));
    std::fs::write(directory.path().join(keys::REPOSITORY), br#"{"format": 2, "minimum_reader": 1, "id": []}"#)
        .unwrap();
    assert!(matches!(Repository::open(directory.path()), Err(Error::Corrupt { .. })));
}

#[test]
fn two_clusters_never_share_a_name() {
    let directory = tempfile::tempdir().unwrap();
    let repository = make(directory.path());
    let name = "main".parse().unwrap();
    assert!(matches!(repository.cluster(&name), Err(Error::NotFound(_))));
    repository.create_cluster(info(7, 16 << 20)).unwrap();
    repository.create_cluster(info(7, 16 << 20)).unwrap();
    assert!(matches!(repository.create_cluster(info(8, 16 << 20)), Err(Error::Refused(_))));
    assert!(matches!(repository.create_cluster(info(7, 1 << 20)), Err(Error::Refused(_))));
    assert_eq!(repository.clusters().unwrap(), [name]);
}

fn segment_file(directory: &Path, number: u64) -> PathBuf {
    let name = crate::wal::name::SegmentName { timeline: Timeline(1), number };
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
    collect_files(&cluster.repository().root().join("clusters"), &mut files);
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
            // The padding of a header, a description's white space or text for people, a backup nobody knows of any
            // more, and the newest segment of an archive can be what they are.
            let tolerated = (what == "deleted" && (name.ends_with(".json") || name.ends_with("05")))
                || (what == "flipped" && name.ends_with(".json"));
            assert!(tolerated || !told.is_empty(), "{what} {name} is not found");
            assert!(tolerated || told.contains(name) || told.contains("main"), "{what} {name}: {told}");
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
        let name = crate::wal::name::SegmentName { timeline: Timeline(1), number };
        cluster.wal().path_of(crate::wal::name::WalFile::Segment(name))
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
