//! Every kind of chunk: there and back, and hostile bytes.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::collections::HashMap;

use proptest::prelude::*;

use super::cut::{GROUP_FILES_MAX, cut_groups};
use super::*;
use crate::format::block::tests::any_record;
use crate::format::block::{BlockRecord, Content};
use crate::format::file::{FileKind, FileRecord};
use crate::format::repository::RepositoryId;
use crate::units::{BlockSize, PackId};

fn any_chunk_ref() -> impl Strategy<Value = ChunkRef> {
    (any::<[u8; 32]>(), 0_u32..9, 1..=CHUNK_BYTES_MAX, 0..i64::MAX as u64 / 2)
        .prop_map(|(hash, manifest, bytes, offset)| ChunkRef { hash: Hash(hash), manifest, bytes, offset })
}

fn any_block_size() -> impl Strategy<Value = BlockSize> {
    (15_u32..=20).prop_map(|bits| BlockSize::try_from(1 << bits).unwrap())
}

fn any_path() -> impl Strategy<Value = String> {
    prop::collection::vec("[a-zäß_.-]{0,6}[a-z0-9]", 1..5).prop_map(|components| components.join("/"))
}

fn any_file() -> impl Strategy<Value = FileRecord> {
    let kind = prop_oneof![
        Just(FileKind::Directory),
        Just(FileKind::Regular),
        "[a-z/.]{1,20}".prop_map(|target| FileKind::Symlink { target }),
        "/[a-z/]{1,20}".prop_map(|location| FileKind::Tablespace { location }),
    ];
    (any_path(), kind, 0_u32..=0o7777, any::<[u32; 2]>(), any::<i64>(), 0_u64..1 << 36, any::<u32>()).prop_map(
        |(path, kind, mode, [uid, gid], modified, bytes, crc32c)| {
            let path = match kind {
                FileKind::Tablespace { .. } => format!("pg_tblspc/{}", uid.max(1)),
                _ => path,
            };
            let (bytes, crc32c) = if kind == FileKind::Regular { (bytes, crc32c) } else { (0, 0) };
            FileRecord { path, kind, mode, uid, gid, modified, bytes, crc32c, first_block: BlockNumber(0) }
        },
    )
}

fn any_group() -> impl Strategy<Value = Group> {
    (prop::collection::vec(any_file(), 1..40), any_block_size(), any_chunk_ref()).prop_map(|(mut files, size, leaf)| {
        files.sort_by(|left, right| path::order(&left.path, &right.path));
        // The later of two is gone where both are one name, or it lies below what is no directory.
        files.dedup_by(|later, before| later.path == before.path || check_below(before, &later.path).is_err());
        let blocks: u64 = files.iter().map(|file| size.blocks_of(file.bytes)).sum();
        let leaves = (0..blocks.div_ceil(LEAF_RECORDS)).map(|at| ChunkRef { offset: leaf.offset + at, ..leaf });
        Group::new(size, files, leaves.collect()).unwrap()
    })
}

fn any_index() -> impl Strategy<Value = IndexChunk> {
    let entry = (any_chunk_ref(), any_path(), 1_u64..1000, 0_u64..1000)
        .prop_map(|(chunk, first_path, files, leaves)| IndexEntry { chunk, first_path, files, leaves });
    (0_u8..8, prop::collection::vec(entry, 1..50)).prop_map(|(level, mut entries)| {
        entries.sort_by(|left, right| path::order(&left.first_path, &right.first_path));
        entries.dedup_by(|left, right| left.first_path == right.first_path);
        IndexChunk::new(level, entries).unwrap()
    })
}

fn any_root() -> impl Strategy<Value = Root> {
    let manifests = prop::collection::vec(("[0-9]{8}T[0-9]{6}Z-[FI]", any::<u64>()), 9..12);
    let packs = prop::collection::btree_map(any::<u32>(), any::<u64>(), 0..20);
    (any_block_size(), any_chunk_ref(), 0_u8..8, any::<[u32; 4]>(), any::<u64>(), manifests, packs).prop_map(
        |(block_size, index, index_level, [files, groups, leaves, blocks], bytes, manifests, packs)| {
            let groups = u64::from(groups) + 1;
            let leaves = u64::from(leaves);
            let label = |label: String| label.parse().unwrap();
            Root {
                block_size,
                index,
                index_level,
                files: groups + u64::from(files),
                groups,
                leaves,
                blocks: leaves + u64::from(blocks).min(leaves * (LEAF_RECORDS - 1)),
                bytes,
                manifests: manifests.into_iter().map(|(l, bytes)| ManifestUse { label: label(l), bytes }).collect(),
                packs: packs.into_iter().map(|(pack, bytes)| PackUse { pack: PackId(pack), bytes }).collect(),
            }
        },
    )
}

/// Every parser, on anything: it may refuse, it may not panic; what it takes it writes as it was.
fn parse_all(bytes: &[u8]) {
    if let Ok(records) = leaf_from_bytes(bytes) {
        assert_eq!(leaf_to_bytes(&records), bytes);
    }
    if let Ok(group) = Group::from_bytes(bytes) {
        assert_eq!(group.to_bytes(), bytes);
    }
    if let Ok(index) = IndexChunk::from_bytes(bytes) {
        assert_eq!(index.to_bytes(), bytes);
    }
    if let Ok(root) = Root::from_bytes(bytes) {
        assert_eq!(root.to_bytes().unwrap(), bytes);
    }
    let _ = ManifestHeader::from_bytes(bytes);
}

proptest! {
    #[test]
    fn leaves_come_back_as_they_were(records in prop::collection::vec(any_record(), 1..100)) {
        prop_assert_eq!(leaf_from_bytes(&leaf_to_bytes(&records)), Ok(records));
    }

    #[test]
    fn groups_come_back_as_they_were(group in any_group()) {
        prop_assert_eq!(Group::from_bytes(&group.to_bytes()), Ok(group));
    }

    #[test]
    fn index_chunks_come_back_as_they_were(index in any_index()) {
        prop_assert_eq!(IndexChunk::from_bytes(&index.to_bytes()), Ok(index));
    }

    #[test]
    fn roots_come_back_as_they_were(root in any_root()) {
        prop_assert_eq!(Root::from_bytes(&root.to_bytes().unwrap()), Ok(root));
    }

    #[test]
    fn random_bytes_never_panic(bytes: Vec<u8>, kind in prop::sample::select(b"LGIR".to_vec())) {
        parse_all(&bytes);
        let mut chunk = [b"pgh".as_slice(), &[kind, 1, 0], &bytes].concat();
        parse_all(&chunk);
        chunk.resize(chunk.len() + 200, 0);
        parse_all(&chunk);
    }

    #[test]
    fn a_flipped_bit_or_a_cut_never_panics(
        group in any_group(), index in any_index(), root in any_root(), records in prop::collection::vec(any_record(), 1..9),
        at: prop::sample::Index, bit in 0_u8..8, cut: prop::sample::Index,
    ) {
        for mut chunk in [group.to_bytes(), index.to_bytes(), root.to_bytes().unwrap(), leaf_to_bytes(&records)] {
            let position = at.index(chunk.len());
            chunk[position] ^= 1 << bit;
            parse_all(&chunk);
            parse_all(&chunk[..cut.index(chunk.len())]);
        }
    }
}

fn file(path: &str, bytes: u64) -> FileRecord {
    let path = path.to_owned();
    let first_block = BlockNumber(0);
    let kind = FileKind::Regular;
    FileRecord { path, kind, mode: 0o600, uid: 1, gid: 1, modified: 0, bytes, crc32c: 0, first_block }
}

fn chunk_at(offset: u64) -> ChunkRef {
    ChunkRef { hash: Hash([offset as u8; 32]), manifest: 0, bytes: 100, offset }
}

#[test]
fn a_group_numbers_its_blocks_and_counts_its_leaves() {
    let files = vec![file("a", 0), file("b", 1), file("c", 1500 << 17), file("d", 1 << 17)];
    let group = Group::new(BlockSize::DEFAULT, files, vec![chunk_at(0), chunk_at(1)]).unwrap();
    let firsts: Vec<_> = group.files().iter().map(|file| file.first_block.0).collect();
    assert_eq!(firsts, [0, 0, 1, 1501]);
    assert_eq!((group.blocks(), group.leaf_records(0), group.leaf_records(1)), (1502, 1024, 478));
    assert_eq!(group.leaf_records(2), 0);
    assert_eq!(BlockNumber(1501).leaf_and_slot(), (1, 477));
}

#[test]
fn a_group_that_no_reader_would_accept_is_not_made() {
    let refused = |files: Vec<FileRecord>, leaves| Group::new(BlockSize::DEFAULT, files, leaves).unwrap_err();
    assert_eq!(refused(vec![], vec![]), "a group of 0 files, expected 1 to 512");
    let many = (0..=GROUP_FILES_MAX).map(|i| file(&format!("{i:04}"), 0)).collect();
    assert_eq!(refused(many, vec![]), "a group of 513 files, expected 1 to 512");
    assert_eq!(refused(vec![file("b", 0), file("a", 0)], vec![]), "\"b\" stands before \"a\"");
    assert_eq!(refused(vec![file("a", 0), file("a", 0)], vec![]), "\"a\" stands before \"a\"");
    assert_eq!(refused(vec![file("a", 1)], vec![]), "0 leaves for 1 blocks, expected 1");
    assert!(refused(vec![file("../a", 0)], vec![]).contains("relative to another"));
    assert!(refused(vec![file("a", 1 << 63)], vec![]).contains("too large"));
    let directory = FileRecord { kind: FileKind::Directory, ..file("a", 1) };
    assert_eq!(refused(vec![directory], vec![]), "\"a\" is no regular file but has 1 bytes");
    let link = FileRecord { kind: FileKind::Symlink { target: String::new() }, ..file("a", 0) };
    assert_eq!(refused(vec![link], vec![]), "\"\" cannot be the target of a link");
}

#[test]
fn refusals_say_what_was_found() {
    let chunk = leaf_to_bytes(&[BlockRecord { hash: Hash([1; 32]), content: Content::Zero }]);
    let refusal = |bytes: &[u8]| leaf_from_bytes(bytes).unwrap_err().to_string();
    assert_eq!(refusal(&chunk[..9]), "a leaf of 9 bytes, expected 16 to 16777216 (byte 9)");
    assert_eq!(refusal(&chunk[..79]), "a leaf of 79 bytes, its header says 80 (byte 79)");
    let with = |at: usize, byte: u8| {
        let mut bytes = chunk.clone();
        bytes[at] = byte;
        bytes
    };
    assert_eq!(refusal(&with(3, b'G')), "not a leaf: begins with \"pghG\" instead of \"pghL\" (byte 0)");
    assert_eq!(refusal(&with(4, 2)), "a leaf of format 2; this version reads up to 1");
    assert_eq!(refusal(&with(9, 5)), "a leaf of 1281 records, expected 1 to 1024 (byte 8)");
    assert_eq!(refusal(&with(16 + 56, 7)), "block kind 7, expected 0 to 2 (byte 72)");
    let error = leaf_from_bytes(&with(4, 2)).unwrap_err().in_file("x.manifest", 4096);
    assert!(matches!(error, crate::Error::Unsupported { .. }), "{error}");
    let error = leaf_from_bytes(&with(72, 7)).unwrap_err().in_file("x.manifest", 4096);
    assert_eq!(error.to_string(), "x.manifest is corrupt at byte 4168: block kind 7, expected 0 to 2");
}

/// Index chunks by their place, as a manifest file would hold them.
#[derive(Default)]
struct Chunks {
    stored: HashMap<ChunkRef, Vec<u8>>,
    bytes: u64,
}

impl Chunks {
    fn put(&mut self, chunk: Vec<u8>) -> Result<ChunkRef, String> {
        let reference = ChunkRef::to(&chunk, 0, self.bytes);
        self.bytes += chunk.len() as u64;
        self.stored.insert(reference, chunk);
        Ok(reference)
    }
}

fn entries(count: u64) -> Vec<IndexEntry> {
    let entry = |i: u64| IndexEntry { chunk: chunk_at(i), first_path: format!("base/{i:08}"), files: 3, leaves: i % 3 };
    (0..count).map(entry).collect()
}

#[test]
fn the_index_leads_to_every_group_by_path_and_by_leaf() {
    for count in [1, 2, 64, 65, 1024, 5000, 100_000] {
        let entries = entries(count);
        let mut chunks = Chunks::default();
        let (top, level) = build_index(entries.clone(), |chunk| chunks.put(chunk), |detail| detail).unwrap();
        assert_eq!((top.files, top.leaves), (3 * count, entries.iter().map(|entry| entry.leaves).sum()));
        assert!(level <= 2, "{level} levels for {count}");
        let parse = |at: &ChunkRef| IndexChunk::from_bytes(&chunks.stored[at]).unwrap();
        let mut first_leaf = 0;
        for (place, expected) in entries.iter().enumerate() {
            if place % 997 == 0 || place + 1 == entries.len() {
                let mut by_path = parse(&top.chunk);
                let within = format!("{}/x", expected.first_path);
                while by_path.level() > 0 {
                    by_path = parse(&by_path.entries()[by_path.find_path(&within).unwrap()].chunk);
                }
                assert_eq!(&by_path.entries()[by_path.find_path(&within).unwrap()], expected);

                let mut by_leaf = parse(&top.chunk);
                let mut leaf = first_leaf + expected.leaves.saturating_sub(1);
                while by_leaf.level() > 0 {
                    let (entry, rest) = by_leaf.find_leaf(leaf).unwrap_or_default();
                    by_leaf = parse(&by_leaf.entries()[entry].chunk);
                    leaf = rest;
                }
                if expected.leaves > 0 {
                    let (entry, rest) = by_leaf.find_leaf(leaf).unwrap();
                    assert_eq!((&by_leaf.entries()[entry], rest), (expected, expected.leaves - 1));
                }
            }
            first_leaf += expected.leaves;
        }
        assert_eq!(parse(&top.chunk).find_leaf(first_leaf), None);
        assert_eq!(parse(&top.chunk).find_path("a"), None);
    }
}

#[test]
fn an_unchanged_part_of_the_index_is_the_same_chunks() {
    let build = |entries| {
        let mut chunks = Chunks::default();
        build_index(entries, |chunk| chunks.put(chunk), |detail| detail).unwrap();
        chunks.stored.into_keys().map(|chunk| chunk.hash).collect::<std::collections::HashSet<_>>()
    };
    let old = entries(50_000);
    let mut new = old.clone();
    new.insert(20_000, IndexEntry { first_path: "base/00019999x".to_owned(), ..old[0].clone() });
    new[40_000].chunk.hash = Hash([9; 32]);
    let (old, new) = (build(old), build(new));
    assert!(old.len() > 100, "{}", old.len());
    assert!(new.difference(&old).count() <= 6, "{}", new.difference(&old).count());
}

#[test]
fn nothing_at_all_has_no_index() {
    let refused = build_index(vec![], |_| Ok(chunk_at(0)), |detail| detail);
    assert_eq!(refused, Err("a backup without any file".to_owned()));
}

#[test]
fn a_manifest_header_comes_back_and_its_damage_is_told_from_a_newer_format() {
    let header = ManifestHeader { repository: RepositoryId([3; 16]), label: "20261122T081500Z-F".parse().unwrap() };
    let page = header.to_bytes();
    assert_eq!(page.len(), ManifestHeader::BYTES);
    assert_eq!(ManifestHeader::from_bytes(&page), Ok(header));
    for at in 0..page.len() {
        let mut damaged = page.clone();
        damaged[at] ^= 4;
        let refused = ManifestHeader::from_bytes(&damaged);
        assert!(matches!(refused, Err(Malformed::Damaged { .. })), "byte {at}: {refused:?}");
    }
}

#[test]
fn groups_of_a_large_cluster_are_few_and_small() {
    // 10 TiB of 1 GiB segments, and 100,000 small tables.
    let large = (0..10_240).map(|i| (format!("base/5/{:05}.{}", 20_000 + i / 100, i % 100), 8192));
    let small = (0..100_000).map(|i| (format!("base/6/{i:06}"), 2));
    let groups: Vec<_> = cut_groups(large.chain(small)).collect();
    assert!((11_000..14_000).contains(&groups.len()), "{}", groups.len());
}

/// The bytes of a group as a forger would change them: `from` and `to` are as long as each other.
fn forged_group(files: &[(&str, FileKind)], from: &[u8], to: &[u8]) -> Malformed {
    let record = |(path, kind): &(&str, FileKind)| FileRecord {
        path: (*path).to_owned(),
        kind: kind.clone(),
        mode: 0o600,
        uid: 0,
        gid: 0,
        modified: 0,
        bytes: 0,
        crc32c: 0,
        first_block: BlockNumber(0),
    };
    let bytes = Group::new(BlockSize::DEFAULT, files.iter().map(record).collect(), Vec::new()).unwrap().to_bytes();
    let at = bytes.windows(from.len()).position(|window| window == from).unwrap();
    let mut forged = bytes;
    forged[at..at + to.len()].copy_from_slice(to);
    Group::from_bytes(&forged).unwrap_err()
}

#[test]
fn a_path_that_leads_elsewhere_is_refused_in_a_forged_group() {
    let link = FileKind::Symlink { target: "/etc".to_owned() };
    let tablespace = FileKind::Tablespace { location: "/fast".to_owned() };
    let files = [("base", link), ("basf/passwd", FileKind::Regular), ("pg_tblspc/16400", tablespace)];
    for (from, to, why) in [
        ("basf/passwd", "base/passwd", "lies below \"base\", which is no directory"),
        ("basf/passwd", "/etc/passwd", "is absolute"),
        ("basf/passwd", "../../paswd", "names a directory relative to another"),
        ("basf/passwd", "base.passw\0", "contains a zero byte"),
        ("basf/passwd", "basf//asswd", "has an empty component"),
        ("pg_tblspc/16400", "pg_tblspc/16/00", "cannot be a tablespace"),
        ("pg_tblspc/16400", "pg_tblspc/../..", "names a directory relative to another"),
        ("pg_tblspc/16400", "pg_tblspc/06400", "cannot be a tablespace"),
        ("pg_tblspc/16400", "pg_wal_/archive", "cannot be a tablespace"),
        ("base/etcbasf", "baso/etcbasf", "stands before"),
    ] {
        let refused = forged_group(&files, from.as_bytes(), to.as_bytes()).to_string();
        assert!(refused.contains(why), "{to:?}: {refused}");
    }
}
