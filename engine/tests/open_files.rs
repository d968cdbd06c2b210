//! A delta in a process that may open few files, from blocks that lie in more packs than that.
//!
//! The limit is that of the process, so this test has one of its own.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use engine::codec::Compression;
use engine::format::backup::{ServerInfo, Snapshot, WalRange};
use engine::format::file::{FileKind, FileRecord};
use engine::format::manifest::cut::cut_groups;
use engine::hydration::{Existing, Fill, Hydration, Layout, Source};
use engine::io::LocalDisk;
use engine::progress::Counting;
use engine::repository::{Backup, ClusterInfo, Description, Parent, Repository};
use engine::units::{BlockNumber, BlockSize, Lsn, SystemIdentifier, Timeline};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const SIZE: BlockSize = BlockSize::MIN;
const OPEN_FILES: u64 = 128;
/// More than may be open, of what differs in the buffers of one worker.
const PACKS: usize = 192;
const SYSTEM: SystemIdentifier = SystemIdentifier(7_412_345_678_901_234_567);

/// One file, each block of it in a pack of its own.
fn back_up(place: &Path, content: &[u8]) -> Backup {
    let repository = Repository::init(place, Compression::None, SIZE).unwrap();
    let created = "2026-11-22T08:00:00Z".to_owned();
    let info = ClusterInfo::new("packs".parse().unwrap(), SYSTEM, 16 << 20, created);
    let cluster = repository.create_cluster(info).unwrap();
    let writer = cluster.begin_backup(Parent::Full).unwrap();
    let blocks: Vec<_> = content
        .chunks(SIZE.bytes())
        .map(|block| {
            let mut worker = writer.worker().unwrap();
            let record = worker.put(block, None, None).unwrap().0;
            worker.finish().unwrap();
            record
        })
        .collect();
    let file = FileRecord {
        path: "1259".to_owned(),
        kind: FileKind::Regular,
        mode: 0o600,
        uid: 0,
        gid: 0,
        modified: 1_700_000_000,
        bytes: content.len() as u64,
        crc32c: 0,
        first_block: BlockNumber(0),
    };
    assert_eq!(cut_groups([(file.path.as_str(), blocks.len() as u64)].into_iter()).count(), 1);
    let leaf = writer.commit_leaf(&blocks).unwrap();
    writer.commit_group(0, &[file], vec![leaf]).unwrap();
    let description = Description {
        stopped_at: "2026-11-22T08:15:00Z".to_owned(),
        stopped_unix: 1_795_335_300,
        server: ServerInfo {
            system_identifier: SYSTEM,
            version_num: 150_018,
            data_checksums: true,
            wal_segment_bytes: 16 << 20,
            data_directory: "/var/lib/postgresql/15/main".to_owned(),
            outside_files: Vec::new(),
            owner: "postgres".to_owned(),
            settings: BTreeMap::new(),
            environment: None,
        },
        wal: WalRange { timeline: Timeline(1), start: Lsn(0x0200_0028), stop: Lsn(0x0200_0100) },
        snapshot: Snapshot::default(),
        tablespaces: Vec::new(),
        bad_pages: Vec::new(),
    };
    let label = writer.finish(description).unwrap().label;
    cluster.backup(&label).unwrap()
}

#[test]
fn a_delta_of_more_packs_than_files_may_be_open_keeps_to_the_limit() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let content: Vec<u8> = (0..PACKS * SIZE.bytes()).map(|at| (at / SIZE.bytes() % 251) as u8 + 1).collect();
    let backup = back_up(&directory.path().join("repository"), &content);
    let target = directory.path().join("target");
    fs::create_dir(&target).unwrap();
    fs::write(target.join("1259"), vec![0xFF; content.len()]).unwrap();

    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: Some(OPEN_FILES), maximum }).unwrap();
    let layout = Layout { data: target.clone(), tablespaces: BTreeMap::new(), wal: None };
    let existing =
        Existing { homes: layout.homes().into_iter().map(|(home, _)| home).collect(), abandoned: Vec::new() };
    let (session, disk) = ("s-1".parse().unwrap(), Arc::new(LocalDisk::new()));
    let hydration = Hydration::begin_over(backup, &layout, existing, &session, None, disk).unwrap();
    hydration.make_unstartable().unwrap();
    hydration.outline(2, &Counting::default()).unwrap();
    let fill = Fill { source: Source::Blocks, workers: 2, memory_bytes: 64 << 20 };
    let compared = hydration.compare(&fill, &Counting::default()).unwrap();
    assert_eq!(compared.changed_blocks, PACKS as u64);
    assert_eq!(fs::read(target.join("1259")).unwrap(), content);
}
