//! Repositories of every format that there was are kept in *samples/* and read by every version after.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "../samples/v1.rs"]
mod v1;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use engine::blocks::Scratch;
use engine::codec::Codec;
use engine::format::FORMAT;
use engine::format::block::Content;
use engine::format::file::{FileKind, FileRecord};
use engine::format::manifest::LEAF_RECORDS;
use engine::format::wal::WalHeader;
use engine::progress::Counting;
use engine::repository::{Backup, Repository, Verification};
use engine::wal::Fetched;
use engine::wal::name::WalFile;

fn sample(format: u16) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("samples").join(format!("v{format}"))
}

#[test]
fn every_format_has_a_sample_that_is_read() {
    for format in 1..=FORMAT {
        let root = sample(format);
        let name = root.display();
        assert!(root.join("pghydrant.json").exists(), "no sample of format {format} in {name}: keep one for ever");
        let repository = Repository::open(&root).unwrap();
        assert_eq!(repository.info().format, format, "{name}");
        for cluster in repository.clusters().unwrap() {
            let cluster = repository.cluster(&cluster).unwrap();
            let labels = cluster.labels().unwrap();
            assert!(!labels.is_empty(), "{name}");
            for label in labels {
                let backup = cluster.backup(&label).unwrap();
                backup.manifest.verify_all().unwrap();
                let files = backup.manifest.files().collect::<Result<Vec<_>, _>>().unwrap();
                files.iter().for_each(|file| drop(read(&backup, file)));
            }
        }
    }
}

#[test]
fn the_sample_of_format_1_has_what_was_put_into_it() {
    let repository = Repository::open(&sample(1)).unwrap();
    let cluster = repository.cluster(&v1::CLUSTER.parse().unwrap()).unwrap();
    assert_eq!(u32::from(repository.info().block_bytes), v1::BLOCK_BYTES);
    let labels = cluster.labels().unwrap();
    assert_eq!(labels.len(), 2);
    for (label, incremental) in labels.iter().zip([false, true]) {
        let backup = cluster.backup(label).unwrap();
        assert_eq!(backup.info.parent.is_some(), incremental);
        let files = backup.manifest.files().collect::<Result<Vec<_>, _>>().unwrap();
        let expected = v1::files(incremental);
        assert_eq!(files.len(), expected.len());
        for (file, (record, content)) in files.iter().zip(&expected) {
            assert_eq!(*file, FileRecord { first_block: file.first_block, ..record.clone() });
            assert!(read(&backup, file) == *content, "{}", file.path);
            assert_eq!(backup.manifest.file(&file.path).unwrap().as_ref(), Some(file));
        }
    }
}

/// Otherwise the sample would prove little.
#[test]
fn the_sample_of_format_1_has_one_of_everything() {
    let root = sample(1);
    let repository = Repository::open(&root).unwrap();
    let cluster = repository.cluster(&v1::CLUSTER.parse().unwrap()).unwrap();
    let mut found = BTreeSet::new();
    let mut leaves = 0;
    for label in cluster.labels().unwrap() {
        let backup = cluster.backup(&label).unwrap();
        let info = &backup.info;
        found.insert(if info.parent.is_some() { "incremental backup" } else { "full backup" });
        let lists = [!info.tablespaces.is_empty(), !info.bad_pages.is_empty(), !info.server.outside_files.is_empty()];
        assert_eq!(lists, [true; 3], "tablespaces, bad pages, files outside");
        leaves = leaves.max(backup.manifest.block_limit() / LEAF_RECORDS);
        for file in backup.manifest.files() {
            let file = file.unwrap();
            found.insert(match file.kind {
                FileKind::Regular => "regular file",
                FileKind::Directory => "directory",
                FileKind::Symlink { .. } => "symbolic link",
                FileKind::Tablespace { .. } => "tablespace",
            });
            let mut records = Vec::new();
            let blocks = info.block_bytes.blocks_of(file.bytes);
            backup.manifest.blocks(file.first_block, blocks, &mut records).unwrap();
            found.extend(records.iter().map(|record| kind_of(&record.content)));
        }
    }
    for timeline in cluster.wal().timelines().unwrap() {
        found.extend(cluster.wal().files(timeline).unwrap().into_iter().map(|file| match file {
            WalFile::Segment(_) => "segment",
            WalFile::Partial(_) => "partial segment",
            WalFile::BackupLabel(..) => "backup label",
            WalFile::History(_) => "history",
        }));
    }
    let expected = [
        "backup label",
        "directory",
        "full backup",
        "history",
        "incremental backup",
        "lz4 block",
        "partial segment",
        "patched block",
        "raw block",
        "regular file",
        "segment",
        "symbolic link",
        "tablespace",
        "zero block",
        "zstd block",
    ];
    assert_eq!(found.into_iter().collect::<Vec<_>>(), expected);
    assert!(leaves > 2, "a file with blocks in more than one leaf");
    assert_eq!(cluster.unfinished().unwrap().len(), 1, "a backup that was interrupted");

    let incremental = cluster.latest_backup().unwrap().unwrap();
    let used = incremental.manifest.manifests();
    assert!(used.len() == 2 && used.iter().all(|manifest| manifest.bytes > 0), "chunks of both backups: {used:?}");
    assert_eq!(incremental.manifest.packs().len(), 2, "blocks of both backups");
    // One object with lz4 runs, one with zstd runs.
    let codecs = ["000000020000000000000003", "000000020000000000000004"].map(|name| {
        let object = std::fs::read(root.join("clusters/main/wal/00000002").join(name)).unwrap();
        let header = WalHeader::from_bytes(&object).unwrap();
        header.blocks.iter().map(|record| kind_of(&record.content)).collect::<BTreeSet<_>>()
    });
    assert_eq!(codecs, [BTreeSet::from(["lz4 block", "zero block"]), BTreeSet::from(["zero block", "zstd block"])]);
}

fn kind_of(content: &Content) -> &'static str {
    match content {
        Content::Zero => "zero block",
        Content::Patched { .. } => "patched block",
        Content::Stored { codec: Codec::Raw, at } => {
            assert_eq!(at.offset % 4096, 0, "a raw run lies where it can be read directly");
            "raw block"
        }
        Content::Stored { codec: Codec::Lz4, .. } => "lz4 block",
        Content::Stored { codec: Codec::Zstd, .. } => "zstd block",
    }
}

#[test]
fn the_sample_of_format_1_gives_its_wal() {
    let repository = Repository::open(&sample(1)).unwrap();
    let wal = repository.cluster(&v1::CLUSTER.parse().unwrap()).unwrap().wal();
    let directory = tempfile::tempdir().unwrap();
    for (name, content) in v1::wal_files() {
        let to = directory.path().join(name);
        assert_eq!(wal.fetch(name, &to).unwrap(), Fetched::Delivered);
        assert!(std::fs::read(&to).unwrap() == content, "{name}");
    }
}

#[test]
fn the_samples_are_proven_whole() {
    for format in 1..=FORMAT {
        let repository = Repository::open(&sample(format)).unwrap();
        for cluster in repository.clusters().unwrap() {
            let cluster = repository.cluster(&cluster).unwrap();
            let proof = Verification::plan(&cluster, None).unwrap().run(&Counting::default()).unwrap();
            assert!(proof.findings.is_empty(), "{:?}", proof.findings);
        }
    }
}

fn read(backup: &Backup, file: &FileRecord) -> Vec<u8> {
    let mut content = vec![0; file.bytes as usize];
    let read = backup.blocks().read_range(file, 0, &mut content, &mut Scratch::default()).unwrap();
    assert_eq!(read, content.len());
    content
}
