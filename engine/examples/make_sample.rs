//! Makes the sample repository of the current format:
//! `cargo run --package pghydrant-engine --example make_sample -- engine/samples/v1`, into a directory that does not exist.
//!
//! It has one of everything that the format knows; *tests/samples.rs* fails where something is missing. Run once for a format, when it is new; what it wrote is kept in the tree for ever, and *tests/samples.rs* reads
//! it with every version that comes after.

#![allow(clippy::cast_possible_truncation)]

#[path = "../samples/v1.rs"]
mod v1;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use engine::codec::Compression;
use engine::format::backup::{BadPage, ServerInfo, Snapshot, Tablespace, WalRange};
use engine::format::block::BlockRecord;
use engine::format::file::FileRecord;
use engine::format::manifest::LEAF_RECORDS;
use engine::format::manifest::cut::cut_groups;
use engine::repository::{
    BackupWriter, Cluster, ClusterInfo, Description, PackWriter, Parent, Repository, RepositoryInfo,
};
use engine::units::{BlockNumber, BlockSize, Lsn, SystemIdentifier, Timeline};

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let root = PathBuf::from(std::env::args_os().nth(1).ok_or("usage: make_sample DIRECTORY")?);
    let repository = Repository::init(&root, Compression::Lz4, BlockSize::try_from(v1::BLOCK_BYTES)?)?;
    let cluster = repository.create_cluster(ClusterInfo::new(
        v1::CLUSTER.parse()?,
        SystemIdentifier(v1::SYSTEM_IDENTIFIER),
        v1::WAL_SEGMENT_BYTES,
        "2026-11-22T08:00:00Z".to_owned(),
    ))?;
    let wal = v1::wal_files();
    let (first, rest) = wal.split_first().ok_or("no WAL")?;
    back_up(&cluster, &v1::files(false))?;
    push(&cluster, first)?;

    // From here on with zstd, as somebody may well decide later.
    let zstd = RepositoryInfo { compression: Compression::Zstd { level: 1 }, ..repository.info().clone() };
    fs::write(root.join("pghydrant.json"), zstd.to_json()?)?;
    let cluster = Repository::open(&root)?.cluster(&v1::CLUSTER.parse()?)?;
    back_up(&cluster, &v1::files(true))?;
    rest.iter().try_for_each(|file| push(&cluster, file))?;
    // A third one that is interrupted.
    drop(cluster.begin_backup(Parent::Latest)?);
    // Made again by whoever takes one.
    fs::remove_dir_all(root.join("clusters").join(v1::CLUSTER).join("locks"))?;
    Ok(())
}

fn push(cluster: &Cluster, (name, content): &(&str, Vec<u8>)) -> Result<(), Failure> {
    let staging = cluster.repository().root().with_extension("staging");
    fs::create_dir_all(&staging)?;
    fs::write(staging.join(name), content)?;
    cluster.wal().push(&staging.join(name))?;
    fs::remove_dir_all(&staging)?;
    Ok(())
}

/// As the verb `backup` does, with one worker: groups of files, leaves of their blocks, each with the parent's record.
fn back_up(cluster: &Cluster, files: &[(FileRecord, Vec<u8>)]) -> Result<(), Failure> {
    let writer = cluster.begin_backup(Parent::Latest)?;
    let mut worker = writer.worker()?;
    let size = cluster.repository().info().block_bytes;
    let groups = cut_groups(files.iter().map(|(file, _)| (&file.path, size.blocks_of(file.bytes))));
    for (position, group) in groups.enumerate() {
        let mut records = Vec::new();
        for (file, content) in &files[group.clone()] {
            put_file(&writer, &mut worker, file, content, &mut records)?;
        }
        let leaves = records.chunks(LEAF_RECORDS as usize).map(|leaf| writer.commit_leaf(leaf));
        let members: Vec<_> = files[group].iter().map(|(file, _)| file.clone()).collect();
        writer.commit_group(position as u64, &members, leaves.collect::<Result<_, _>>()?)?;
    }
    worker.finish()?;
    writer.finish(description())?;
    Ok(())
}

fn put_file(
    writer: &BackupWriter,
    worker: &mut PackWriter,
    file: &FileRecord,
    content: &[u8],
    records: &mut Vec<BlockRecord>,
) -> Result<(), Failure> {
    let size = BlockSize::try_from(v1::BLOCK_BYTES)?;
    for (index, raw) in content.chunks(size.bytes()).enumerate() {
        let mut before = None;
        if let Some(parent) = writer.parent()
            && let Some(same) = parent.manifest.file(&file.path)?
            && size.block_bytes_at(same.bytes, index as u64) == raw.len()
        {
            before = Some(parent.manifest.block(BlockNumber(same.first_block.0 + index as u64))?);
        }
        records.push(worker.put(raw, None, before.as_ref())?.0);
    }
    Ok(())
}

fn description() -> Description {
    Description {
        stopped_at: "2026-11-22T08:15:00Z".to_owned(),
        stopped_unix: 1_795_335_300,
        server: ServerInfo {
            system_identifier: SystemIdentifier(v1::SYSTEM_IDENTIFIER),
            version_num: 150_018,
            data_checksums: true,
            wal_segment_bytes: v1::WAL_SEGMENT_BYTES,
            data_directory: "/var/lib/postgresql/15/main".to_owned(),
            outside_files: vec!["/etc/postgresql/15/main/postgresql.conf".to_owned()],
            owner: "postgres".to_owned(),
            settings: BTreeMap::from([("port".to_owned(), "5432".to_owned())]),
            environment: None,
        },
        wal: WalRange { timeline: Timeline(2), start: Lsn(0x30_0028), stop: Lsn(0x30_0100) },
        snapshot: Snapshot { xmin: 745, xmax: 747, in_progress: vec![746] },
        tablespaces: vec![Tablespace {
            oid: 16400,
            name: "fast".to_owned(),
            location: "/srv/fast".to_owned(),
            bytes: 16384,
        }],
        bad_pages: vec![BadPage { path: "base/5/16387".to_owned(), page: 3, stored: 1, computed: 2 }],
    }
}
