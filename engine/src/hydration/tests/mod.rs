//! Hydration against a plain copy: every way of moving bytes, every failure, every crash.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::cast_possible_truncation)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use super::*;
use crate::codec::Compression;
use crate::format::file::{FileKind, FileRecord};
use crate::format::manifest::{LEAF_RECORDS, cut::cut_groups, path};
use crate::io::{Engine, LocalDisk};
use crate::progress::{Counting, Progress};
use crate::repository::tests::{cluster_of, description};
use crate::repository::{Cluster, Parent, Repository};
use crate::units::{BlockNumber, BlockSize, PAGE_BYTES};

mod copy;
mod crashes;
mod delta;
mod faults;
mod sharing;

const SIZE: BlockSize = BlockSize::MIN;
const OID: u32 = 16400;
const MODIFIED: i64 = 1_700_000_000;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Entry {
    Directory,
    File(Vec<u8>),
    Link(String),
    Tablespace,
}

type Tree = BTreeMap<String, Entry>;

/// A directory on the file system of the build, which has O_DIRECT more often than that of temporary files.
fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(concat!(env!("CARGO_MANIFEST_DIR"), "/../target")).or_else(|_| tempfile::tempdir()).unwrap()
}

/// Pages that compress, none like another; every seventh is zero.
fn pages(count: usize, seed: usize) -> Vec<u8> {
    let mut bytes = vec![0; count * PAGE_BYTES];
    for (page, content) in bytes.chunks_mut(PAGE_BYTES).enumerate().filter(|(page, _)| page % 7 != 3) {
        for (at, byte) in content.iter_mut().enumerate().take(PAGE_BYTES / 2) {
            *byte = ((at * 31) ^ (page * 17) ^ (seed * 101)) as u8 ^ (at >> 5) as u8;
        }
    }
    bytes
}

/// One of everything.
fn sample_tree() -> Tree {
    let mut tree = skeleton();
    tree.insert("base/5/1259".to_owned(), Entry::File(pages(23, 1)));
    tree.insert("base/5/2600".to_owned(), Entry::File(pages(300, 7)));
    tree.insert("base/5/empty".to_owned(), Entry::File(Vec::new()));
    tree.insert("base/5/zeros".to_owned(), Entry::File(vec![0; 3 * SIZE.bytes() + 10]));
    for number in 0..40 {
        tree.insert(format!("base/5/small_{number}"), Entry::File(pages(1, number)));
    }
    tree.insert("PG_VERSION".to_owned(), Entry::File(b"15\n".to_vec()));
    tree.insert("base/5/tail".to_owned(), Entry::File(pages(9, 3)[..9 * PAGE_BYTES - 4095].to_vec()));
    tree.insert("log".to_owned(), Entry::Link("/somewhere/else".to_owned()));
    tree.insert(format!("pg_tblspc/{OID}"), Entry::Tablespace);
    tree.insert(format!("pg_tblspc/{OID}/PG_15_202209061"), Entry::Directory);
    tree.insert(format!("pg_tblspc/{OID}/PG_15_202209061/16500"), Entry::File(pages(11, 4)));
    tree.insert("tablespace_map".to_owned(), Entry::File(b"16400 /original\n".to_vec()));
    tree
}

/// What every cluster has.
fn skeleton() -> Tree {
    let mut tree = Tree::new();
    for directory in ["base", "base/5", "global", "pg_tblspc", "pg_wal", "pg_wal/archive_status"] {
        tree.insert(directory.to_owned(), Entry::Directory);
    }
    tree.insert("backup_label".to_owned(), Entry::File(b"START WAL LOCATION: 0/2000028\n".to_vec()));
    tree.insert("global/pg_control".to_owned(), Entry::File(pages(1, 99)));
    tree
}

fn back_up(cluster: &Cluster, tree: &Tree, parent: Parent) -> Backup {
    let writer = cluster.begin_backup(parent).unwrap();
    let mut files: Vec<_> = tree.iter().collect();
    files.sort_by(|one, other| path::order(one.0, other.0));
    let content = |entry: &Entry| if let Entry::File(content) = entry { content.clone() } else { Vec::new() };
    let sizes = files.iter().map(|(path, entry)| (path.as_str(), SIZE.blocks_of(content(entry).len() as u64)));
    let groups: Vec<_> = cut_groups(sizes).collect();
    let mut worker = writer.worker().unwrap();
    for (position, range) in groups.into_iter().enumerate() {
        let (mut records, mut members) = (Vec::new(), Vec::new());
        for (path, entry) in &files[range] {
            let content = content(entry);
            let before = writer.parent().and_then(|parent| parent.manifest.file(path).unwrap().zip(Some(parent)));
            for (index, raw) in content.chunks(SIZE.bytes()).enumerate() {
                let before = before.as_ref().and_then(|(file, parent)| {
                    let same = SIZE.block_bytes_at(file.bytes, index as u64) == raw.len();
                    let number = BlockNumber(file.first_block.0 + index as u64);
                    same.then(|| parent.manifest.block(number).unwrap())
                });
                records.push(worker.put(raw, None, before.as_ref()).unwrap().0);
            }
            members.push(record(path, entry, &content));
        }
        let leaves = records.chunks(LEAF_RECORDS as usize).map(|leaf| writer.commit_leaf(leaf).unwrap()).collect();
        writer.commit_group(position as u64, &members, leaves).unwrap();
    }
    worker.finish().unwrap();
    let info = writer.finish(description()).unwrap();
    cluster.backup(&info.label).unwrap()
}

fn record(path: &str, entry: &Entry, content: &[u8]) -> FileRecord {
    let (kind, mode) = match entry {
        Entry::Directory if path == "keys" => (FileKind::Directory, 0o500),
        Entry::Directory => (FileKind::Directory, 0o750),
        Entry::File(_) if path.ends_with(".key") => (FileKind::Regular, 0o400),
        Entry::File(_) => (FileKind::Regular, 0o640),
        Entry::Link(target) => (FileKind::Symlink { target: target.clone() }, 0o777),
        Entry::Tablespace => (FileKind::Tablespace { location: "/original".to_owned() }, 0o777),
    };
    FileRecord {
        path: path.to_owned(),
        kind,
        mode,
        uid: 1,
        gid: 1,
        modified: MODIFIED,
        bytes: content.len() as u64,
        crc32c: crc32c::crc32c(content),
        first_block: BlockNumber(0),
    }
}

/// A repository with one backup, or with a second one on top that has every fifth page changed.
struct Sample {
    directory: tempfile::TempDir,
    tree: Tree,
    backup: Backup,
}

impl Sample {
    fn new(compression: Compression, tree: Tree) -> Self {
        let directory = directory();
        let repository = Repository::init(&directory.path().join("repository"), compression, SIZE).unwrap();
        let backup = back_up(&cluster_of(&repository).unwrap(), &tree, Parent::Full);
        Self { directory, tree, backup }
    }

    fn incremental(compression: Compression, tree: &Tree) -> Self {
        let mut sample = Self::new(compression, tree.clone());
        for content in sample.tree.values_mut() {
            let Entry::File(content) = content else { continue };
            content.chunks_mut(PAGE_BYTES).skip(2).step_by(5).for_each(|page| page[0] ^= 0x55);
        }
        sample.backup = back_up(&sample.backup.cluster, &sample.tree, Parent::Latest);
        sample
    }

    fn target(&self, name: &str) -> Layout {
        let base = self.directory.path().join(name);
        layout_below(&base)
    }

    /// The backup as a mount shows it, as plain files.
    fn mount(&self) -> PathBuf {
        let mount = self.directory.path().join("mount");
        if mount.exists() {
            return mount;
        }
        let layout = Layout {
            data: mount.join("data"),
            tablespaces: [(OID, mount.join(format!("tablespaces/{OID}")))].into(),
            wal: None,
        };
        fs::create_dir_all(&layout.data).unwrap();
        for (path, entry) in &self.tree {
            let target = layout.target_path(path);
            match entry {
                Entry::Directory | Entry::Tablespace => fs::create_dir_all(target).unwrap(),
                Entry::File(content) => fs::write(target, content).unwrap(),
                Entry::Link(_) => {}
            }
        }
        mount
    }
}

fn layout_below(base: &Path) -> Layout {
    Layout { data: base.join("data"), tablespaces: [(OID, base.join("fast"))].into(), wal: Some(base.join("wal")) }
}

fn session() -> SessionId {
    "s-1".parse().unwrap()
}

fn fill_from(source: Source) -> Fill {
    Fill { source, workers: 2, memory_bytes: 32 << 20 }
}

/// The whole way of a copy.
fn hydrate(sample: &Sample, layout: &Layout, source: Source, disk: Arc<dyn Disk>) -> Result<Filled> {
    hydrate_with(sample, layout, source, disk, &Counting::default())
}

fn hydrate_with(
    sample: &Sample,
    layout: &Layout,
    source: Source,
    disk: Arc<dyn Disk>,
    progress: &dyn Progress,
) -> Result<Filled> {
    let hydration = Hydration::begin(sample.backup.clone(), layout, &session(), None, disk)?;
    hydration.outline(2, progress)?;
    let filled = hydration.fill(&fill_from(source), progress)?;
    hydration.place_last(&filled)?;
    Ok(filled)
}

/// Whether a server could start.
fn is_startable(layout: &Layout) -> bool {
    layout.data.join("global/pg_control").exists()
}

/// The target is the tree: nothing else, nothing less, attributes and all.
fn assert_same(tree: &Tree, layout: &Layout) {
    let mut expected = 0;
    for (path, entry) in tree {
        let target = layout.target_path(path);
        if LEFT_OUT.contains(&path.as_str()) {
            assert!(!target.exists(), "{path}");
            continue;
        }
        expected += 1;
        let metadata = fs::symlink_metadata(&target).unwrap_or_else(|cause| panic!("{path}: {cause}"));
        let mode = metadata.permissions().mode() & 0o7777;
        match entry {
            Entry::Directory => assert!(metadata.is_dir() && mode == 0o750, "{path} {mode:o}"),
            Entry::File(content) => {
                assert_eq!(mode, 0o640, "{path}");
                assert_eq!(metadata.modified().unwrap(), UNIX_EPOCH + Duration::from_secs(MODIFIED as u64), "{path}");
                let found = fs::read(&target).unwrap();
                assert_eq!(found.len(), content.len(), "{path}");
                let differs = found.iter().zip(content).position(|(one, other)| one != other);
                assert_eq!(differs, None, "first byte that differs in {path}");
            }
            Entry::Link(text) => assert_eq!(fs::read_link(&target).unwrap(), Path::new(text)),
            Entry::Tablespace => {
                assert_eq!(fs::read_link(layout.data.join(path)).unwrap(), target, "{path}");
                assert_eq!(mode, 0o700);
            }
        }
    }
    if let Some(wal) = &layout.wal {
        assert_eq!(fs::read_link(layout.data.join("pg_wal")).unwrap(), *wal);
    }
    let found: u64 = layout.homes().iter().map(|(_, home)| count_names(home)).sum();
    // Each of the other directories has a link in the data directory, of which the tree knows.
    assert_eq!(found, expected, "names in the target");
}

/// Names below `path`, without those of the session.
fn count_names(path: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(path) else { return 0 };
    entries
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.file_name() != SESSION_DIRECTORY)
        .map(|entry| 1 + if entry.file_type().unwrap().is_dir() { count_names(&entry.path()) } else { 0 })
        .sum()
}

fn allocated_bytes(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}
