//! A small data directory in memory, backed up and read back; and repositories as such.

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
use crate::units::{BackupLabel, BlockNumber, Lsn, PAGE_BYTES, PackId, SystemIdentifier, Timeline};

mod backups;
mod hostile;
mod leftovers;
mod verify;

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
            environment: None,
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
            Some((file, backup)) => match backup.manifest.block(BlockNumber(file.first_block.0 + index as u64)) {
                // Then there is nothing to compare with.
                Err(Error::Corrupt { .. }) => None,
                found => Some(found?),
            },
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
