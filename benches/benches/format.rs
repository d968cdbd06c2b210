//! What the block size costs and gains: encoding, decoding, hashing, patches, the manifest, incremental backups.
//!
//! Prints the tables of *benches/README.md* that no clock is needed for, then times the parts with criterion, in
//! processor time of the one thread that works, so that a busy neighbour counts little:
//! `cargo bench --package pghydrant-benches --bench format`, with `PGHYDRANT_BENCH_PAGES` set as in `pages.rs` for
//! the pages of a real cluster.

#![allow(clippy::print_stdout, clippy::expect_used, clippy::cast_possible_truncation, missing_docs)]

use std::hint::black_box;
use std::time::Duration;

use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group};
use engine::checksum::Hash;
use engine::codec::{Codec, Compression, decode};
use engine::format::file::{FileKind, FileRecord};
use engine::format::manifest::cut::cut_groups;
use engine::format::manifest::{ChunkRef, Group, IndexEntry, LEAF_RECORDS, Root, build_index};
use engine::format::manifest::{ManifestUse, PackUse, path};
use engine::format::patch;
use engine::page::{is_zero, page_checksum};
use engine::units::{BlockNumber, BlockSize, PAGE_BYTES, PackId};
use pghydrant_benches::pages::{Random, pages, update};
use rustix::time::{ClockId, clock_gettime};

const BLOCK_KIB: [u32; 4] = [32, 64, 128, 256];
const COMPRESSIONS: [Compression; 2] = [Compression::Lz4, Compression::Zstd { level: 1 }];
const SAMPLE_BYTES: usize = 64 << 20;

/// Processor time of this thread.
struct ThreadTime;

impl ThreadTime {
    fn now() -> Duration {
        let now = clock_gettime(ClockId::ThreadCPUTime);
        Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
    }
}

impl Measurement for ThreadTime {
    type Intermediate = Duration;
    type Value = Duration;

    fn start(&self) -> Duration {
        Self::now()
    }

    fn end(&self, start: Duration) -> Duration {
        Self::now() - start
    }

    fn add(&self, one: &Duration, other: &Duration) -> Duration {
        *one + *other
    }

    fn zero(&self) -> Duration {
        Duration::ZERO
    }

    fn to_f64(&self, time: &Duration) -> f64 {
        WallTime.to_f64(time)
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        WallTime.formatter()
    }
}

fn block_size(kib: u32) -> BlockSize {
    BlockSize::try_from(kib << 10).unwrap_or(BlockSize::DEFAULT)
}

/// Stored bytes of a run, padding of raw ones included.
fn stored_bytes(compression: Compression, run: &[u8], encoded: &mut Vec<u8>) -> usize {
    match compression.compress(run, encoded) {
        Codec::Raw => run.len().next_multiple_of(4096),
        Codec::Lz4 | Codec::Zstd => encoded.len(),
    }
}

/// Stored bytes of a full backup, and of one after 5 % of the pages changed, with and without patches.
fn sizes(pages: &[u8]) {
    println!("\n| block KiB | codec | stored | blocks touched | incremental, whole blocks | with patches |");
    println!("|---:|---|---:|---:|---:|---:|");
    let mut changed = pages.to_vec();
    update(&mut changed, 0.05, &mut Random(7));
    for kib in BLOCK_KIB {
        for compression in COMPRESSIONS {
            let (mut full, mut touched, mut whole, mut patched, mut blocks) = (0, 0, 0, 0, 0);
            let mut encoded = Vec::new();
            let bytes = block_size(kib).bytes();
            for (old, new) in pages.chunks_exact(bytes).zip(changed.chunks_exact(bytes)) {
                blocks += 1;
                full += stored_bytes(compression, old, &mut encoded);
                if old == new {
                    continue;
                }
                touched += 1;
                let new_whole = stored_bytes(compression, new, &mut encoded);
                whole += new_whole;
                let patch = patch::make(old, new).map(|patch| stored_bytes(compression, &patch, &mut encoded));
                patched += patch.unwrap_or(new_whole);
            }
            let of = |part: usize, whole: usize| format!("{:.1} %", 100.0 * part as f64 / whole as f64);
            let stored = of(full, pages.len());
            let (touched, whole, patched) = (of(touched, blocks), of(whole, full), of(patched, full));
            println!("| {kib} | {compression} | {stored} | {touched} | {whole} of the full | {patched} |");
        }
    }
}

/// The manifest of a cluster of 10 TiB in segments of 1 GiB and 100,000 small tables, as the format's own code
/// makes it.
fn manifest_sizes() {
    println!("\n| block KiB | block records | groups and index | read to open | then to reach a block |");
    println!("|---:|---:|---:|---:|---:|");
    for kib in BLOCK_KIB {
        let size = block_size(kib);
        let large = (0..10_240).map(|i| (format!("base/5/{:05}.{}", 20_000 + i / 100, i % 100), 1_u64 << 30));
        let mut files: Vec<_> = large.chain((0..100_000).map(|i| (format!("base/6/{i:06}"), 16_384))).collect();
        files.sort_by(|(left, _), (right, _)| path::order(left, right));
        let chunk = |bytes: usize| ChunkRef { hash: Hash([1; 32]), manifest: 0, bytes: bytes as u32, offset: 4096 };
        let (mut leaves, mut blocks, mut groups_bytes, mut entries) = (0, 0, 0, Vec::new());
        for range in cut_groups(files.iter().map(|(path, bytes)| (path, size.blocks_of(*bytes)))) {
            let record = |(path, bytes): &(String, u64)| FileRecord {
                path: path.clone(),
                kind: FileKind::Regular,
                mode: 0o600,
                uid: 26,
                gid: 26,
                modified: 0,
                bytes: *bytes,
                crc32c: 0,
                first_block: BlockNumber(0),
            };
            let records: Vec<_> = files[range].iter().map(record).collect();
            let group_blocks: u64 = records.iter().map(|file| size.blocks_of(file.bytes)).sum();
            let group_leaves = group_blocks.div_ceil(LEAF_RECORDS);
            let (first_path, count) = (records[0].path.clone(), records.len() as u64);
            let group = Group::new(size, records, vec![chunk(65_552); group_leaves as usize]).expect("a valid group");
            groups_bytes += group.to_bytes().len();
            entries.push(IndexEntry { chunk: chunk(1), first_path, files: count, leaves: group_leaves });
            leaves += group_leaves;
            blocks += group_blocks;
        }
        let (mut index_bytes, mut index_chunks, mut top_bytes) = (0, 0, 0);
        let groups = entries.len() as u64;
        let put = |bytes: Vec<u8>| {
            index_bytes += bytes.len();
            index_chunks += 1;
            top_bytes = bytes.len();
            Ok(chunk(bytes.len()))
        };
        let (top, index_level) = build_index(entries, put, |detail| detail).expect("a valid index");
        let root = Root {
            block_size: size,
            index: top.chunk,
            index_level,
            files: files.len() as u64,
            groups,
            leaves,
            blocks,
            bytes: files.iter().map(|(_, bytes)| bytes).sum(),
            manifests: vec![ManifestUse { label: "20261122T081500Z-F".parse().expect("a label"), bytes: 1 }],
            packs: (0..4096).map(|pack| PackUse { pack: PackId(pack), bytes: 1 }).collect(),
        };
        let root_bytes = root.to_bytes().expect("a valid root").len();
        let mib = |bytes: usize| format!("{:.2} MiB", bytes as f64 / f64::from(1 << 20));
        let gib = (blocks * 64 + leaves * 16) as f64 / f64::from(1 << 30);
        let (open, rest) = (root_bytes + top_bytes, mib(groups_bytes + index_bytes));
        // On average, below the topmost index chunk: one of each level, a group, a leaf.
        let indexes = index_bytes / index_chunks * usize::from(index_level);
        let reach = indexes + groups_bytes / groups as usize + (LEAF_RECORDS as usize * 64 + 16);
        println!("| {kib} | {gib:.2} GiB | {rest} | {} KiB | {} KiB |", open >> 10, reach >> 10);
    }
}

fn codecs(criterion: &mut Criterion<ThreadTime>) {
    let (pages, source) = pages(SAMPLE_BYTES);
    println!("\npages: {source}, {} MiB", pages.len() >> 20);
    sizes(&pages);
    manifest_sizes();
    println!();
    for compression in COMPRESSIONS {
        let mut compress = criterion.benchmark_group(format!("compress/{compression}"));
        for kib in BLOCK_KIB {
            let blocks: Vec<_> = pages.chunks_exact(block_size(kib).bytes()).collect();
            let mut random = Random(1);
            compress.throughput(Throughput::Bytes(u64::from(kib) << 10));
            compress.bench_function(BenchmarkId::from_parameter(kib), |bencher| {
                let mut out = Vec::new();
                bencher.iter(|| black_box(compression.compress(blocks[random.below(blocks.len())], &mut out)));
            });
        }
        compress.finish();
        // What a random 8 KiB read through the mount costs in processor time, where nothing is cached: a whole block
        // is decoded and hashed. By bytes it is what a restore decodes a second.
        let mut read = criterion.benchmark_group(format!("decode_and_hash/{compression}"));
        for kib in BLOCK_KIB {
            let bytes = block_size(kib).bytes();
            let encode = |block: &[u8]| {
                let mut out = Vec::new();
                let codec = compression.compress(block, &mut out);
                if codec == Codec::Raw { (codec, block.to_vec()) } else { (codec, out) }
            };
            let blocks: Vec<_> = pages.chunks_exact(bytes).map(encode).collect();
            for hashed in [false, true] {
                let mut random = Random(1);
                let mut out = vec![0; bytes];
                read.throughput(Throughput::Bytes(bytes as u64));
                read.bench_function(BenchmarkId::new(if hashed { "both" } else { "decode" }, kib), |bencher| {
                    bencher.iter(|| {
                        let (codec, stored) = &blocks[random.below(blocks.len())];
                        decode(*codec, stored, &mut out).expect("what was encoded");
                        hashed.then(|| black_box(Hash::of(&out)))
                    });
                });
            }
        }
        read.finish();
    }
}

fn checks(criterion: &mut Criterion<ThreadTime>) {
    let (pages, _) = pages(SAMPLE_BYTES);
    let mut hash = criterion.benchmark_group("hash");
    for kib in BLOCK_KIB {
        let blocks: Vec<_> = pages.chunks_exact(block_size(kib).bytes()).collect();
        let mut random = Random(1);
        hash.throughput(Throughput::Bytes(u64::from(kib) << 10));
        hash.bench_function(BenchmarkId::from_parameter(kib), |bencher| {
            bencher.iter(|| black_box(Hash::of(blocks[random.below(blocks.len())])));
        });
    }
    hash.finish();

    let mut page = criterion.benchmark_group("page");
    page.throughput(Throughput::Bytes(PAGE_BYTES as u64));
    let mut random = Random(1);
    let count = pages.len() / PAGE_BYTES;
    page.bench_function("checksum", |bencher| {
        bencher.iter(|| {
            let at = random.below(count);
            black_box(page_checksum(&pages[at * PAGE_BYTES..(at + 1) * PAGE_BYTES], at as u32))
        });
    });
    let zeros = vec![0; 1 << 20];
    page.throughput(Throughput::Bytes(zeros.len() as u64));
    page.bench_function("is_zero", |bencher| bencher.iter(|| black_box(is_zero(black_box(&zeros)))));
    page.finish();

    let mut patches = criterion.benchmark_group("patch");
    let base = &pages[..128 << 10];
    let mut new = base.to_vec();
    update(&mut new, 0.1, &mut Random(3));
    patches.throughput(Throughput::Bytes(base.len() as u64));
    patches.bench_function("make/128", |bencher| bencher.iter(|| black_box(patch::make(base, &new))));
    patches.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .with_measurement(ThreadTime)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = codecs, checks
}

fn main() {
    benches();
    Criterion::default().configure_from_args().final_summary();
}
