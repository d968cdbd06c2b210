//! What the sample repository of format 1 holds: shared by the example that makes it and the test that reads it.

use engine::format::file::{FileKind, FileRecord};
use engine::units::{BlockNumber, PAGE_BYTES};

/// A page of a real cluster.
const PAGE: &[u8; PAGE_BYTES] = include_bytes!("pg_class-page-5.bin");

/// Its block size: the smallest, so that little data makes many blocks.
pub(crate) const BLOCK_BYTES: u32 = 32 << 10;
/// Its one cluster.
pub(crate) const CLUSTER: &str = "main";
/// That cluster's identifier.
pub(crate) const SYSTEM_IDENTIFIER: u64 = 7_300_000_000_000_000_001;
/// That cluster's segment size: the smallest.
pub(crate) const WAL_SEGMENT_BYTES: u64 = 1 << 20;
/// The segment that is archived while the repository compresses with lz4; what follows is compressed with zstd.
pub(crate) const SEGMENT: &str = "000000020000000000000003";
/// More blocks of this file than fit into one leaf; all are zero.
pub(crate) const LONG: (&str, u64) = ("base/5/16388", 1030);

/// The files of a backup with their content, in path order. The second backup, an incremental one, has a page of a
/// table changed, a table grown, a file less and a file more.
pub(crate) fn files(incremental: bool) -> Vec<(FileRecord, Vec<u8>)> {
    let mut table = pages(10, 0);
    let mut grown = pages(5, 1);
    if incremental {
        table[PAGE_BYTES..PAGE_BYTES + 8].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 2]);
        grown.extend(pages(2, 2));
    }
    let target = "/var/log/postgresql".to_owned();
    let location = "/srv/fast".to_owned();
    let mut files = vec![
        regular("PG_VERSION", b"15\n".to_vec()),
        special("base", FileKind::Directory),
        special("base/5", FileKind::Directory),
        regular("base/5/16384", table),
        regular("base/5/16385", incompressible(PAGE_BYTES + 100)),
        regular("base/5/16386", vec![0; 9 * PAGE_BYTES]),
        regular("base/5/16387", grown),
        regular(LONG.0, vec![0; LONG.1 as usize * BLOCK_BYTES as usize]),
    ];
    files.extend((0..120).map(|table| regular(&format!("base/5/{}", 20_000 + table), Vec::new())));
    files.push(regular(if incremental { "base/5/30001" } else { "base/5/30000" }, pages(1, 3)));
    files.extend([
        special("log", FileKind::Symlink { target }),
        special("pg_tblspc", FileKind::Directory),
        special("pg_tblspc/16400", FileKind::Tablespace { location }),
        special("pg_tblspc/16400/PG_15_202209061", FileKind::Directory),
        regular("pg_tblspc/16400/PG_15_202209061/16401", pages(2, 4)),
    ]);
    files
}

/// The files of the archive, one of every kind, [`SEGMENT`] first.
pub(crate) fn wal_files() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        (SEGMENT, segment(2, 3)),
        ("000000020000000000000004", segment(2, 4)),
        ("000000010000000000000003.partial", segment(1, 3)),
        ("000000020000000000000003.00000028.backup", b"START WAL LOCATION: 0/300028\n".to_vec()),
        ("00000002.history", b"1\t0/300028\tno recovery target specified\n".to_vec()),
    ]
}

/// A segment: a first page as PostgreSQL 15 writes it, a little content, zeros.
fn segment(timeline: u32, number: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&0xD110_u16.to_le_bytes());
    bytes.extend_from_slice(&2_u16.to_le_bytes());
    bytes.extend_from_slice(&timeline.to_le_bytes());
    bytes.extend_from_slice(&(number * WAL_SEGMENT_BYTES).to_le_bytes());
    bytes.extend_from_slice(&0_u64.to_le_bytes());
    bytes.extend_from_slice(&SYSTEM_IDENTIFIER.to_le_bytes());
    bytes.extend_from_slice(&(WAL_SEGMENT_BYTES as u32).to_le_bytes());
    bytes.extend_from_slice(&8192_u32.to_le_bytes());
    bytes.extend(pages(20, 5));
    bytes.resize(WAL_SEGMENT_BYTES as usize, 0);
    bytes
}

fn pages(count: u8, seed: u8) -> Vec<u8> {
    let page = |number| {
        let mut page = *PAGE;
        page[0..2].copy_from_slice(&[number, seed]);
        page
    };
    (0..count).flat_map(page).collect()
}

fn incompressible(bytes: usize) -> Vec<u8> {
    let mut out = vec![0; bytes];
    blake3::Hasher::new().update(b"sample").finalize_xof().fill(&mut out);
    out
}

fn regular(path: &str, content: Vec<u8>) -> (FileRecord, Vec<u8>) {
    let record = FileRecord {
        bytes: content.len() as u64,
        crc32c: crc32c::crc32c(&content),
        mode: 0o600,
        ..special(path, FileKind::Regular).0
    };
    (record, content)
}

fn special(path: &str, kind: FileKind) -> (FileRecord, Vec<u8>) {
    let record = FileRecord {
        path: path.to_owned(),
        kind,
        mode: 0o700,
        uid: 26,
        gid: 26,
        modified: 1_795_334_400,
        bytes: 0,
        crc32c: 0,
        first_block: BlockNumber(0),
    };
    (record, Vec::new())
}
