//! Blocks of every kind, whole and in parts, and what damage is told as.

#![allow(clippy::unwrap_used)]

use super::*;
use crate::checksum::Hash;
use crate::codec::Compression;
use crate::store::{Existing, LocalStore};
use crate::units::PAGE_BYTES;

const SIZE: BlockSize = BlockSize::MIN;

/// Blocks of every kind but patches in one object, and the file they make.
fn sample(directory: &std::path::Path) -> (Blocks, FileRecord, Vec<u8>) {
    let store = LocalStore::new(directory);
    let mut content = Vec::new();
    for (index, page) in (0..SIZE.bytes() * 9 + 777).step_by(PAGE_BYTES).enumerate() {
        let fill = if (4..8).contains(&(index % 12)) { 0 } else { index as u8 };
        content.extend((0..PAGE_BYTES.min(SIZE.bytes() * 9 + 777 - page)).map(|at| fill.wrapping_mul((at / 64) as u8)));
    }
    let (mut stored, mut records) = (vec![0; 4096], Vec::new());
    for (index, raw) in content.chunks(SIZE.bytes()).enumerate() {
        let mut encoded = Vec::new();
        let codec = if index % 3 == 0 { Codec::Raw } else { Compression::Lz4.compress(raw, &mut encoded) };
        let run = if codec == Codec::Raw { raw } else { &encoded };
        let content = if raw.iter().all(|byte| *byte == 0) {
            Content::Zero
        } else {
            let offset = if codec == Codec::Raw { stored.len().next_multiple_of(4096) } else { stored.len() };
            stored.resize(offset, 0);
            stored.extend_from_slice(run);
            let at = Extent { pack: PackId(0), offset: offset as u32, stored: run.len() as u32 };
            Content::Stored { at, codec }
        };
        records.push(BlockRecord { hash: Hash::of(raw), content });
    }
    store.put("object", &stored, Existing::Replace).unwrap();
    let blocks = Blocks::of_object(Arc::new(store), "object", records, SIZE);
    let file = FileRecord {
        path: "base/5/16384".to_owned(),
        kind: crate::format::file::FileKind::Regular,
        mode: 0o600,
        uid: 0,
        gid: 0,
        modified: 0,
        bytes: content.len() as u64,
        crc32c: 0,
        first_block: BlockNumber(0),
    };
    (blocks, file, content)
}

#[test]
fn every_range_of_a_file_reads_as_it_was() {
    let directory = tempfile::tempdir().unwrap();
    let (blocks, file, content) = sample(directory.path());
    let mut scratch = Scratch::default();
    for offset in (0..content.len() + 5000).step_by(4099) {
        for bytes in [1, 4096, SIZE.bytes(), SIZE.bytes() * 3 + 1, content.len() + 1] {
            let mut out = vec![0xEE; bytes];
            let read = blocks.read_range(&file, offset as u64, &mut out, &mut scratch).unwrap();
            let expected = content.get(offset..).unwrap_or_default();
            let expected = &expected[..expected.len().min(bytes)];
            assert!(out[..read] == *expected, "{bytes} bytes at {offset}");
        }
    }
}

#[test]
fn damage_is_named_by_file_and_block_and_place() {
    let directory = tempfile::tempdir().unwrap();
    let (blocks, file, content) = sample(directory.path());
    let path = directory.path().join("object");
    let mut stored = std::fs::read(&path).unwrap();
    stored[4096 + 100] ^= 1;
    std::fs::write(&path, &stored).unwrap();
    let mut out = vec![0; content.len()];
    let error = blocks.read_range(&file, 0, &mut out, &mut Scratch::default()).unwrap_err();
    assert!(matches!(error, Error::Corrupt { offset: Some(4096), .. }), "{error}");
    assert!(error.to_string().contains("block 0 of base/5/16384: expected BLAKE3"), "{error}");
    assert!(blocks.read_range(&file, SIZE.bytes() as u64, &mut out, &mut Scratch::default()).is_ok());
    std::fs::write(&path, &stored[..stored.len() - 1]).unwrap();
    let last = file.bytes - 1;
    let error = blocks.read_range(&file, last, &mut out, &mut Scratch::default()).unwrap_err();
    assert!(error.to_string().contains("block 9 of base/5/16384: the file ends"), "{error}");
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn a_missing_pack_is_corruption() {
    let directory = tempfile::tempdir().unwrap();
    let (blocks, file, _) = sample(directory.path());
    std::fs::remove_file(directory.path().join("object")).unwrap();
    let error = blocks.read_range(&file, 0, &mut [0; 10], &mut Scratch::default()).unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    assert!(error.to_string().ends_with("the file is missing"), "{error}");
}

#[test]
fn a_run_that_no_block_can_have_is_refused_before_memory_is_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    let (blocks, _, _) = sample(directory.path());
    let at = Extent { pack: PackId(0), offset: 4096, stored: u32::MAX - 4096 };
    let record = BlockRecord { hash: Hash([0; 32]), content: Content::Stored { at, codec: Codec::Raw } };
    let (mut out, mut scratch) = ([0; 10], Scratch::default());
    let refused = blocks.read_block(&record, &mut out, &mut scratch);
    assert!(matches!(refused, Err(Error::Corrupt { .. })));
}

#[test]
fn a_patched_block_is_its_base_with_other_pages() {
    let base: Vec<u8> = (0..SIZE.bytes()).map(|at| (at / 100) as u8).collect();
    let mut new = base.clone();
    new[PAGE_BYTES..PAGE_BYTES * 2].fill(0xAB);
    let patch = patch::make(&base, &new).unwrap();
    let run = |offset, bytes: usize| Extent { pack: PackId(1), offset, stored: bytes as u32 };
    let content = Content::Patched {
        base: run(4096, base.len()),
        base_codec: Codec::Raw,
        patch: run(1 << 20, patch.len()),
        patch_codec: Codec::Raw,
    };
    let record = BlockRecord { hash: Hash::of(&new), content };
    let mut out = vec![0; SIZE.bytes()];
    let mut scratch = Scratch::default();
    assert!(*decode_verified(&record, &base, &patch, &mut out, &mut scratch).unwrap() == *new);
    let refused = decode_verified(&record, &base, &patch[..40], &mut out, &mut scratch).unwrap_err();
    assert!(refused.in_patch, "{refused}");
    let refused = decode_verified(&record, &base[1..], &patch, &mut out, &mut scratch).unwrap_err();
    assert!(!refused.in_patch, "{refused}");
}
