//! Backups written, read back, and failed at every operation.

use super::*;
use crate::store::failing::FailingStore;

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
        let proof = Verification::plan(&cluster, None).unwrap().run(&crate::progress::Counting::default()).unwrap();
        // Their WAL was never pushed; an interrupted backup is no damage.
        let damage =
            proof.findings.iter().find(|finding| finding.kind != Kind::Missing || !finding.detail.contains("/wal/"));
        assert!(damage.is_none(), "operation {fail_at}: {damage:?}");
        // An error while the name was made durable may leave the backup committed: it is whole then.
        for label in &found {
            cluster.backup(label).unwrap().manifest.verify_all().unwrap();
        }
        assert!(labels.iter().all(|label| found.contains(label)), "operation {fail_at}");
        labels = found;
    }
    let cluster = cluster_of(&Repository::open(&root).unwrap()).unwrap();
    drop(cluster.begin_backup(Parent::Latest).unwrap());
    let proof = Verification::plan(&cluster, None).unwrap().run(&crate::progress::Counting::default()).unwrap();
    assert_eq!((proof.unfinished.len(), proof.garbage_bytes), (1, 0), "only the one just begun");
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
    store.put(&keys::manifest(cluster.name(), writer.label()), b"x", Existing::Refuse).unwrap();
    assert_eq!(cluster.unfinished().unwrap(), [writer.label().clone()]);
    drop(writer);
    assert_eq!(cluster.labels().unwrap(), std::slice::from_ref(&kept.label));
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
fn a_backup_whose_packs_are_lost_is_no_parent() {
    let directory = tempfile::tempdir().unwrap();
    let cluster = cluster_of(&repository_in(directory.path())).unwrap();
    let tree = sample_tree();
    back_up(&cluster, &tree, Parent::Full).unwrap();
    let pack = std::fs::read_dir(cluster.store().describe(&keys::packs(cluster.name()))).unwrap();
    let pack = pack.map(|entry| entry.unwrap().path()).next().unwrap();
    let whole = std::fs::read(&pack).unwrap();
    for damage in ["shorter", "gone"] {
        match damage {
            "shorter" => std::fs::write(&pack, &whole[..whole.len() / 2]).unwrap(),
            _ => std::fs::remove_file(&pack).unwrap(),
        }
        let cluster = cluster_of(&Repository::open(cluster.repository().root()).unwrap()).unwrap();
        let next = back_up(&cluster, &tree, Parent::Latest).unwrap();
        assert_eq!(next.parent, None, "{damage}");
        assert!(read_back(&cluster.backup(&next.label).unwrap()).unwrap() == tree);
        std::fs::remove_file(cluster.store().describe(&keys::backup(cluster.name(), &next.label))).unwrap();
        std::fs::write(&pack, &whole).unwrap();
    }
}

/// More is left of it than is referred to, as the rest belonged to blocks that have changed since.
#[test]
fn a_pack_that_lost_its_end_is_noticed_before_the_next_backup_is_one() {
    let directory = tempfile::tempdir().unwrap();
    let cluster = cluster_of(&repository_in(directory.path())).unwrap();
    let file = |seed| (format!("base/5/{seed}"), Some(pages(400, seed)));
    let first = Tree::from([file(1), file(2)]);
    back_up(&cluster, &first, Parent::Full).unwrap();
    let pack = std::fs::read_dir(cluster.store().describe(&keys::packs(cluster.name()))).unwrap();
    let pack = pack.map(|entry| entry.unwrap().path()).next().unwrap();
    // Groups are put in from the last on: the second file's blocks lie behind the first's, or before them.
    for gone in [1, 2] {
        let whole = std::fs::read(&pack).unwrap();
        let mut tree = first.clone();
        tree.insert(format!("base/5/{gone}"), Some(pages(400, 9)));
        let second = back_up(&cluster, &tree, Parent::Latest).unwrap();
        std::fs::write(&pack, &whole[..whole.len() * 7 / 10]).unwrap();
        tree.insert("base/5/3".to_owned(), Some(pages(3, 3)));
        match back_up(&cluster, &tree, Parent::Latest) {
            Ok(third) => assert!(read_back(&cluster.backup(&third.label).unwrap()).unwrap() == tree, "{gone}"),
            Err(refused) => assert!(refused.to_string().contains("--full"), "{gone}: {refused}"),
        }
        let full = back_up(&cluster, &tree, Parent::Full).unwrap();
        for made in [&second, &full] {
            std::fs::remove_file(cluster.store().describe(&keys::backup(cluster.name(), &made.label))).unwrap();
            std::fs::remove_file(cluster.store().describe(&keys::manifest(cluster.name(), &made.label))).unwrap();
        }
        std::fs::write(&pack, &whole).unwrap();
    }
}

#[test]
fn a_damaged_leaf_of_zeros_is_written_anew() {
    let directory = tempfile::tempdir().unwrap();
    let cluster = cluster_of(&repository_in(directory.path())).unwrap();
    let mut tree = sample_tree();
    let zeros = 3 * usize::try_from(LEAF_RECORDS).unwrap() * SIZE.bytes();
    tree.insert("base/5/16387".to_owned(), Some(vec![0; zeros]));
    let first = back_up(&cluster, &tree, Parent::Full).unwrap();
    let (mut seen, mut twice) = (BTreeMap::new(), Vec::new());
    for group in cluster.backup(&first.label).unwrap().manifest.groups() {
        for leaf in group.unwrap().group.leaves() {
            twice.extend(seen.insert(leaf.hash, *leaf).map(|other| [other, *leaf]));
        }
    }
    assert!(!twice.is_empty(), "leaves of zeros are alike");
    let path = cluster.store().describe(&keys::manifest(cluster.name(), &first.label));
    let mut damaged = std::fs::read(&path).unwrap();
    for leaf in twice.into_iter().flatten() {
        damaged[usize::try_from(leaf.offset).unwrap() + 20] ^= 1;
    }
    std::fs::write(&path, damaged).unwrap();
    let cluster = cluster_of(&Repository::open(cluster.repository().root()).unwrap()).unwrap();
    let second = back_up(&cluster, &tree, Parent::Latest).unwrap();
    assert!(read_back(&cluster.backup(&first.label).unwrap()).is_err());
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
    assert!(matches!(writer.commit_group(0, std::slice::from_ref(&file), vec![leaf]), Err(Error::Refused(_))));
    assert!(matches!(writer.commit_group(0, &[file], Vec::new()), Err(Error::Refused(_))));
    assert!(writer.commit_leaf(&[]).is_err());
}

mod model {
    //! Any tree, changed in any way, against the maps it was made from.

    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;

    /// Files under few directories, of lengths around page and block borders.
    fn any_tree() -> impl Strategy<Value = Tree> {
        let name = "(base|global|pg_tblspc)/[1-3](/[0-9]{1,3})?(_fsm|\\.1)?";
        let bytes = prop_oneof![
            Just(0_usize),
            1..200_usize,
            (1..12_usize).prop_map(|pages| pages * PAGE_BYTES),
            (1..12_usize, 1..PAGE_BYTES).prop_map(|(pages, more)| pages * PAGE_BYTES + more)
        ];
        proptest::collection::btree_map(name, (bytes, any::<u8>()), 1..80).prop_map(|files| {
            let mut tree = Tree::new();
            for (path, (bytes, seed)) in &files {
                let content: Vec<u8> = (0..*bytes).map(|at| (at / 512) as u8 ^ seed).collect();
                // A name that is a directory of another one's is made a file's neighbour.
                if !files.keys().any(|other| path::is_below(other, path)) {
                    tree.insert(path.clone(), Some(content));
                }
                let parents = path.match_indices('/').map(|(at, _)| path[..at].to_owned());
                tree.extend(parents.map(|parent| (parent, None)));
            }
            tree
        })
    }

    fn change(tree: &mut Tree, changes: &[(Index, Index, u8)]) {
        let mut files: Vec<_> = tree.values_mut().flatten().filter(|content| !content.is_empty()).collect();
        for (file, at, with) in changes.iter().filter(|_| !files.is_empty()).collect::<Vec<_>>() {
            let file = file.get_mut(&mut files);
            let at = at.index(file.len());
            match with {
                0..32 => file.truncate(at + 1),
                32..64 => file.resize(at + file.len(), *with),
                _ => file[at] ^= with,
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

        #[test]
        fn every_backup_of_a_changing_tree_is_the_tree(
            first in any_tree(),
            changes in prop::collection::vec(prop::collection::vec(any::<(Index, Index, u8)>(), 0..12), 1..4),
            reads in prop::collection::vec(any::<(Index, Index, u16)>(), 20),
        ) {
            let directory = tempfile::tempdir().unwrap();
            let cluster = cluster_of(&repository_in(directory.path())).unwrap();
            let mut tree = first;
            let mut kept = Vec::new();
            for step in &changes {
                kept.push((back_up(&cluster, &tree, Parent::Latest).unwrap().label, tree.clone()));
                change(&mut tree, step);
            }
            for (label, tree) in &kept {
                let backup = cluster.backup(label).unwrap();
                backup.manifest.verify_all().unwrap();
                prop_assert!(read_back(&backup).unwrap() == *tree);
                compare_listings(&backup, tree);
                compare_reads(&backup, tree, &reads);
            }
            let proof = Verification::plan(&cluster, None).unwrap().run(&crate::progress::Counting::default()).unwrap();
            // Their WAL was never pushed; everything else is there.
            prop_assert!(proof.findings.iter().all(|finding| finding.kind == Kind::Missing), "{:?}", proof.findings);
        }
    }

    fn compare_listings(backup: &Backup, tree: &Tree) {
        let directories = tree.iter().filter(|(_, content)| content.is_none()).map(|(path, _)| path.as_str());
        for directory in directories.chain([""]) {
            let depth = if directory.is_empty() { 0 } else { directory.matches('/').count() + 1 };
            let is_child = |path: &&String| path::is_below(path, directory) && path.matches('/').count() == depth;
            let mut expected: Vec<_> = tree.keys().filter(is_child).cloned().collect();
            expected.sort_by(|one, other| path::order(one, other));
            let found = backup.manifest.children(directory).unwrap();
            assert_eq!(found.into_iter().map(|file| file.path).collect::<Vec<_>>(), expected, "in {directory:?}");
        }
    }

    fn compare_reads(backup: &Backup, tree: &Tree, reads: &[(Index, Index, u16)]) {
        let files: Vec<_> = tree.iter().filter_map(|(path, content)| Some((path, content.as_ref()?))).collect();
        let (blocks, mut scratch) = (backup.blocks(), Scratch::default());
        for (file, at, bytes) in reads.iter().filter(|_| !files.is_empty()) {
            let (path, content) = file.get(&files);
            let record = backup.manifest.file(path).unwrap().unwrap();
            let offset = at.index(content.len() + 10);
            let mut out = vec![0xEE; usize::from(*bytes)];
            let read = blocks.read_range(&record, offset as u64, &mut out, &mut scratch).unwrap();
            let expected = content.get(offset..).unwrap_or_default();
            assert_eq!(read, expected.len().min(out.len()));
            assert!(out[..read] == expected[..read], "{bytes} bytes of {path} at {offset}");
        }
    }
}
