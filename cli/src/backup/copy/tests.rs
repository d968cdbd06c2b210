//! A plain directory copied into a real repository and read back, with what a running server does to its files.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::AtomicU64;

use engine::blocks::Scratch;
use engine::codec::Compression;
use engine::format::backup::{BackupInfo, ServerInfo, Snapshot, WalRange};
use engine::page;
use engine::progress::Counting;
use engine::repository::{Backup, Cluster, ClusterInfo, Description, Parent, Repository};
use engine::units::{Lsn, SystemIdentifier, Timeline};

use super::*;
use crate::backup::scan::Source;
use crate::postgres::owner::Owner;

const BLOCK: BlockSize = BlockSize::MIN;
/// Large enough to be a group by itself, of two leaves and a short block.
const LARGE_BYTES: usize = 33 * (1 << 20) + 100;

struct World {
    data: tempfile::TempDir,
    root: tempfile::TempDir,
    cluster: Cluster,
}

impl World {
    fn new() -> Self {
        let (data, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let repository = Repository::init(&root.path().join("repo"), Compression::Lz4, BLOCK).unwrap();
        let name = "main".parse().unwrap();
        let info = ClusterInfo::new(name, SystemIdentifier(7), 1 << 20, "2026-11-22T08:15:00Z".to_owned());
        Self { data, root, cluster: repository.create_cluster(info).unwrap() }
    }

    fn write(&self, path: &str, content: &[u8]) {
        let path = self.data.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    fn places(&self) -> Places {
        Places::open(self.data.path(), &Owner::current().unwrap()).unwrap()
    }

    fn list(&self) -> Vec<FileRecord> {
        let owner = Owner::current().unwrap();
        let source = Source {
            owner: &owner,
            data: self.data.path(),
            tablespaces: &BTreeMap::new(),
            version_directory: "PG_15_202209061",
            statistics: None,
            wal_summaries: false,
        };
        source.scan().unwrap().records
    }

    /// Copies what was listed as it is now.
    fn back_up(&self, files: &[FileRecord], prepare: impl FnOnce(&Copy<'_>)) -> (Backup, Copied) {
        let (plan, progress) = (Plan::new(files, BLOCK), Counting::default());
        let writer = self.cluster.begin_backup(Parent::Latest).unwrap();
        let places = self.places();
        let copy = Copy::new(&places, files, &plan, &writer, BLOCK, true, &progress);
        prepare(&copy);
        let copied = copy.run(2, &mut || Ok(())).unwrap();
        let info: BackupInfo = writer.finish(description()).unwrap();
        assert_eq!(progress.bytes(), info.totals.bytes);
        (self.cluster.backup(&info.label).unwrap(), copied)
    }
}

fn description() -> Description {
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

/// A file of the backup, whole; none if it is not in it. Its checksum is checked on the way.
fn content(backup: &Backup, path: &str) -> Option<Vec<u8>> {
    let file = backup.manifest.file(path).unwrap()?;
    let mut bytes = vec![0; usize::try_from(file.bytes).unwrap()];
    let read = backup.blocks().read_range(&file, 0, &mut bytes, &mut Scratch::default()).unwrap();
    assert_eq!((read, file.crc32c), (bytes.len(), crc32c::crc32c(&bytes)), "{path}");
    Some(bytes)
}

/// Bytes that neither compress nor repeat.
fn noise(bytes: usize) -> Vec<u8> {
    static SEED: AtomicU64 = AtomicU64::new(1);
    let mut state = SEED.fetch_add(1, Ordering::Relaxed).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 32).to_le_bytes()
    };
    (0..bytes.div_ceil(4)).flat_map(|_| next()[..4].to_vec()).take(bytes).collect()
}

/// Pages of a relation with right checksums, all with `lsn`.
fn pages(count: u32, lsn: u32) -> Vec<u8> {
    let page = |number: u32| {
        let mut page = noise(PAGE_BYTES);
        page[..4].fill(0);
        page[4..8].copy_from_slice(&lsn.to_le_bytes());
        page[14] = 1;
        let checksum = page::page_checksum(&page, number);
        page[8..10].copy_from_slice(&checksum.to_le_bytes());
        page
    };
    (0..count).flat_map(page).collect()
}

#[test]
fn files_of_every_size_come_back_and_a_second_backup_shares_them() {
    let world = World::new();
    let sizes = [0, 1, 4095, 4096, BLOCK.bytes(), BLOCK.bytes() + 1, (1 << 20) - 1, (2 << 20) + 5, LARGE_BYTES];
    let files: Vec<_> = sizes.iter().map(|size| (format!("mine/{size}"), noise(*size))).collect();
    for (path, bytes) in &files {
        world.write(path, bytes);
    }
    let (first, copied) = world.back_up(&world.list(), |_| {});
    for (path, bytes) in &files {
        assert_eq!(content(&first, path).as_ref(), Some(bytes), "{path}");
    }
    assert_eq!(first.manifest.file("mine").unwrap().unwrap().kind, FileKind::Directory);
    assert_eq!(copied.read.iter().flatten().count(), files.len());
    first.manifest.verify_all().unwrap();

    let mut changed = files[8].1.clone();
    changed[20 << 20] ^= 1;
    world.write(&files[8].0, &changed);
    let (second, _) = world.back_up(&world.list(), |_| {});
    assert_eq!(content(&second, &files[8].0), Some(changed));
    assert!(second.info.totals.added_pack_bytes <= 2 * BLOCK.bytes() as u64, "{:?}", second.info.totals);
    assert_eq!(second.info.parent, Some(first.info.label));
}

#[test]
fn files_that_vanish_grow_or_shrink_after_they_were_listed_are_normal() {
    let world = World::new();
    for path in ["a/vanishes", "b/grows", "c/shrinks", "d/becomes_a_directory"] {
        world.write(path, &noise(10_000));
    }
    for path in ["large/vanishes", "large/grows", "large/shrinks"] {
        world.write(path, &noise(LARGE_BYTES));
    }
    let listed = world.list();
    for path in ["a/vanishes", "large/vanishes", "d/becomes_a_directory"] {
        fs::remove_file(world.data.path().join(path)).unwrap();
    }
    fs::create_dir(world.data.path().join("d/becomes_a_directory")).unwrap();
    let (grown, shrunk) = (noise(3 << 20), noise(77));
    let (large_grown, large_shrunk) = (noise(LARGE_BYTES + 5_000_000), noise(17));
    world.write("b/grows", &grown);
    world.write("c/shrinks", &shrunk);
    world.write("large/grows", &large_grown);
    world.write("large/shrinks", &large_shrunk);

    let (backup, _) = world.back_up(&listed, |_| {});
    for path in ["a/vanishes", "large/vanishes", "d/becomes_a_directory"] {
        assert_eq!(content(&backup, path), None, "{path}");
    }
    assert_eq!(content(&backup, "b/grows"), Some(grown));
    assert_eq!(content(&backup, "c/shrinks"), Some(shrunk));
    // Several workers read a large file: no further than its end when the work was cut.
    assert_eq!(content(&backup, "large/grows").unwrap(), large_grown[..LARGE_BYTES]);
    assert_eq!(content(&backup, "large/shrinks"), Some(large_shrunk));
    backup.manifest.verify_all().unwrap();
}

#[test]
fn a_large_file_that_shrinks_while_it_is_read_is_filled_up_with_zeros() {
    let world = World::new();
    let whole = noise(LARGE_BYTES);
    world.write("large", &whole);
    let listed = world.list();
    let half = LARGE_BYTES / 2;
    let (backup, _) = world.back_up(&listed, |copy| {
        // Opened at its full size, then cut, then read.
        copy.open_large(0).unwrap().unwrap();
        fs::File::options().write(true).open(world.data.path().join("large")).unwrap().set_len(half as u64).unwrap();
    });
    let mut expected = whole[..half].to_vec();
    expected.resize(LARGE_BYTES, 0);
    assert_eq!(content(&backup, "large"), Some(expected));
}

#[test]
fn damaged_pages_are_found_in_relations_of_every_size_and_nowhere_else() {
    let world = World::new();
    let damage = |count, page: usize| {
        let mut bytes = pages(count, 5);
        bytes[page * PAGE_BYTES + 4000] ^= 1;
        bytes
    };
    world.write("base/5/1", &damage(3, 2));
    world.write("base/5/2", &damage(4500, 4400));
    world.write("base/5/3_fsm", &damage(2, 0));
    world.write("base/5/4", &pages(20, 5));
    world.write("base/5/PG_VERSION", &damage(1, 0));
    world.write("pg_xact/0000", &damage(2, 1));
    let listed = world.list();
    let (_, copied) = world.back_up(&listed, |_| {});
    let mut found: Vec<_> =
        copied.suspects.iter().map(|(file, page)| (listed[*file].path.as_str(), page.page)).collect();
    found.sort_unstable();
    assert_eq!(found, [("base/5/1", 2), ("base/5/2", 4400), ("base/5/3_fsm", 0)]);
}

#[test]
fn blocks_whose_parents_cannot_be_read_are_stored_whole() {
    let world = World::new();
    let bytes = noise(LARGE_BYTES);
    world.write("large", &bytes);
    let (first, _) = world.back_up(&world.list(), |_| {});
    // Behind the manifest's header comes its first leaf.
    let manifests = world.root.path().join("repo/clusters/main/manifests");
    let manifest = manifests.join(format!("{}.manifest", first.info.label));
    let mut damaged = fs::read(&manifest).unwrap();
    damaged[4096 + 200] ^= 1;
    fs::write(&manifest, damaged).unwrap();
    let (second, _) = world.back_up(&world.list(), |_| {});
    assert_eq!(second.info.parent, Some(first.info.label));
    assert_eq!(content(&second, "large"), Some(bytes));
    second.manifest.verify_all().unwrap();
}

#[test]
fn the_first_failure_stops_all_and_is_the_one_that_is_told() {
    let world = World::new();
    for number in 0..50 {
        world.write(&format!("{number}"), &noise(100_000));
    }
    let files = world.list();
    let (plan, progress) = (Plan::new(&files, BLOCK), Counting::default());
    let writer = world.cluster.begin_backup(Parent::Full).unwrap();
    let places = world.places();
    let copy = Copy::new(&places, &files, &plan, &writer, BLOCK, true, &progress);
    copy.fail(anyhow::anyhow!("the session is gone"));
    assert_eq!(copy.run(2, &mut || Ok(())).err().unwrap().to_string(), "the session is gone");
    assert_eq!(progress.bytes(), 0);
}
