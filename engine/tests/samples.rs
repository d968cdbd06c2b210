//! Repositories of every format that there was are kept in *samples/* and read by every version after.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "../samples/v1.rs"]
mod v1;

use std::path::{Path, PathBuf};

use engine::blocks::Scratch;
use engine::checksum::Hash;
use engine::codec::Codec;
use engine::format::FORMAT;
use engine::format::block::{BlockRecord, Content};
use engine::format::file::FileRecord;
use engine::repository::{Backup, Repository};
use engine::units::BlockNumber;
use engine::wal::Fetched;

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
fn the_sample_of_format_1_has_a_block_of_every_kind() {
    let repository = Repository::open(&sample(1)).unwrap();
    let cluster = repository.cluster(&v1::CLUSTER.parse().unwrap()).unwrap();
    let incremental = cluster.latest_backup().unwrap().unwrap();
    let block = |path: &str, index| {
        let file = incremental.manifest.file(path).unwrap().unwrap();
        incremental.manifest.block(BlockNumber(file.first_block.0 + index)).unwrap()
    };
    assert!(matches!(block("PG_VERSION", 0).content, Content::Stored { codec: Codec::Raw, .. }));
    assert!(matches!(block("base/5/16384", 0).content, Content::Patched { .. }));
    assert!(matches!(block("base/5/16384", 1).content, Content::Stored { codec: Codec::Lz4, .. }));
    assert!(matches!(block("base/5/16385", 0).content, Content::Stored { codec: Codec::Raw, .. }));
    let zeros = BlockRecord { hash: Hash::of(&[0; 8192]), content: Content::Zero };
    assert_eq!(block("base/5/16386", 2), zeros);
    let used = incremental.manifest.manifests();
    assert!(used.len() == 2 && used.iter().all(|manifest| manifest.bytes > 0), "chunks of both backups: {used:?}");
    assert_eq!(incremental.manifest.packs().len(), 2, "blocks of both backups");
}

#[test]
fn the_sample_of_format_1_gives_its_wal() {
    let repository = Repository::open(&sample(1)).unwrap();
    let wal = repository.cluster(&v1::CLUSTER.parse().unwrap()).unwrap().wal();
    let directory = tempfile::tempdir().unwrap();
    for (name, content) in [v1::HISTORY, (v1::SEGMENT, &v1::segment())] {
        let to = directory.path().join(name);
        assert_eq!(wal.fetch(name, &to).unwrap(), Fetched::Delivered);
        assert!(std::fs::read(&to).unwrap() == content, "{name}");
    }
}

fn read(backup: &Backup, file: &FileRecord) -> Vec<u8> {
    let mut content = vec![0; file.bytes as usize];
    let read = backup.blocks().read_range(file, 0, &mut content, &mut Scratch::default()).unwrap();
    assert_eq!(read, content.len());
    content
}
