//! A backup of generated files, written through the engine: no server is needed to make one.

use std::collections::BTreeMap;
use std::path::Path;

use engine::codec::Compression;
use engine::format::backup::{ServerInfo, Snapshot, WalRange};
use engine::format::file::{FileKind, FileRecord};
use engine::format::manifest::{LEAF_RECORDS, cut::cut_groups, path};
use engine::repository::{Backup, BackupWriter, Cluster, ClusterInfo, Description, Parent, Repository};
use engine::units::{BlockNumber, BlockSize, Lsn, SystemIdentifier, Timeline};
use engine::{Error, Result};

pub(crate) const SEGMENT_BYTES: u64 = 16 << 20;
pub(crate) const SYSTEM: SystemIdentifier = SystemIdentifier(7_412_345_678_901_234_567);

/// A directory of a backup to be written.
pub fn directory(path: impl Into<String>) -> FileRecord {
    FileRecord { kind: FileKind::Directory, mode: 0o700, ..file(path, 0) }
}

/// A file of so many bytes.
pub fn file(path: impl Into<String>, bytes: u64) -> FileRecord {
    FileRecord {
        path: path.into(),
        kind: FileKind::Regular,
        mode: 0o600,
        uid: rustix::process::getuid().as_raw(),
        gid: rustix::process::getgid().as_raw(),
        modified: 1_700_000_000,
        bytes,
        crc32c: 0,
        first_block: BlockNumber(0),
    }
}

/// `files` files of `bytes` each: three in ten in the directory `base/1`, a thousand in each of the others.
pub fn small_files(files: usize, bytes: u64) -> Vec<FileRecord> {
    let in_one = files * 3 / 10;
    let mut records = vec![directory("base"), directory("base/1")];
    records.extend((0..in_one).map(|number| file(format!("base/1/{number}"), bytes)));
    for first in (in_one..files).step_by(1000) {
        let below = format!("base/{}", 2 + first / 1000);
        records.push(directory(&below));
        records.extend((first..files.min(first + 1000)).map(|number| file(format!("{below}/{number}"), bytes)));
    }
    records
}

/// Writes a backup of `files`, whose bytes `content` makes, into a new repository in `place`.
pub fn write(
    place: &Path,
    compression: Compression,
    mut files: Vec<FileRecord>,
    mut content: impl FnMut(&FileRecord, &mut Vec<u8>),
) -> Result<Backup> {
    files.sort_by(|one, other| path::order(&one.path, &other.path));
    let (cluster, writer) = begin(place, compression)?;
    let mut worker = writer.worker()?;
    let sizes = files.iter().map(|file| (file.path.as_str(), BlockSize::DEFAULT.blocks_of(file.bytes)));
    let mut bytes = Vec::new();
    for (position, range) in cut_groups(sizes).enumerate() {
        let mut blocks = Vec::new();
        for file in files[range.clone()].iter().filter(|file| file.bytes > 0) {
            bytes.clear();
            content(file, &mut bytes);
            for block in bytes.chunks(BlockSize::DEFAULT.bytes()) {
                blocks.push(worker.put(block, None, None)?.0);
            }
        }
        let leaves = blocks.chunks(LEAF_RECORDS as usize).map(|leaf| writer.commit_leaf(leaf));
        writer.commit_group(position as u64, &files[range], leaves.collect::<Result<Vec<_>>>()?)?;
    }
    worker.finish()?;
    finish(&cluster, writer)
}

/// Begins a backup in a new repository in `place`.
pub fn begin(place: &Path, compression: Compression) -> Result<(Cluster, BackupWriter)> {
    let repository = Repository::init(place, compression, BlockSize::DEFAULT)?;
    let name = "bench".parse().map_err(Error::Refused)?;
    let created = "2026-11-22T08:00:00Z".to_owned();
    let cluster = repository.create_cluster(ClusterInfo::new(name, SYSTEM, SEGMENT_BYTES, created))?;
    let writer = cluster.begin_backup(Parent::Full)?;
    Ok((cluster, writer))
}

/// Ends it.
pub fn finish(cluster: &Cluster, writer: BackupWriter) -> Result<Backup> {
    let info = writer.finish(Description {
        stopped_at: "2026-11-22T08:15:00Z".to_owned(),
        stopped_unix: 1_795_335_300,
        server: ServerInfo {
            system_identifier: SYSTEM,
            version_num: 150_018,
            data_checksums: true,
            wal_segment_bytes: SEGMENT_BYTES,
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
    })?;
    cluster.backup(&info.label)
}
