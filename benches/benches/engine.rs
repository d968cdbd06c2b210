//! The engine's parts: a manifest opened and scanned, a map marked, counted and put on disk, a queue by its depth.
//!
//! Wall time, on the disk of cargo's target directory: PGHYDRANT_BENCH_DIR names another.

#![allow(clippy::expect_used, clippy::cast_possible_truncation, missing_docs)]

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use engine::checksum::Hash;
use engine::codec::Compression;
use engine::hydration::Map;
use engine::hydration::map::Identity;
use engine::io::disk::{Part, Transfer, Way};
use engine::io::{BUFFER_BYTES, Disk, LocalDisk, Open, Root, buffers};
use engine::repository::Repository;
use engine::units::{BlockNumber, BlockSize};
use pghydrant_benches::backup::{small_files, write};
use pghydrant_benches::pages::Random;

const FILES: usize = 100_000;
/// 1 TiB in blocks of 128 KiB.
const BLOCKS: u64 = 8 << 20;
/// A batch of the copier: a few seconds of a fast disk.
const BATCH_BLOCKS: u64 = 32 << 10;
const QUEUED_BYTES: u64 = 256 << 20;
const DEPTHS: [u16; 5] = [1, 2, 4, 8, 16];

fn place() -> tempfile::TempDir {
    let place =
        std::env::var_os("PGHYDRANT_BENCH_DIR").map_or_else(|| env!("CARGO_TARGET_TMPDIR").into(), PathBuf::from);
    tempfile::tempdir_in(place).expect("a directory for the benchmark")
}

/// Of 100,000 files of a block each.
fn manifest(criterion: &mut Criterion) {
    let place = place();
    let root = place.path().join("repository");
    let written = write(&root, Compression::Lz4, small_files(FILES, 8192), |file, out| {
        out.resize(file.bytes as usize, file.path.len() as u8);
    });
    let label = written.expect("a backup").info.label.clone();
    let open = || {
        let repository = Repository::open(&root).expect("the repository");
        let cluster = repository.cluster(&"bench".parse().expect("a name")).expect("the cluster");
        cluster.backup(&label).expect("the backup")
    };
    let mut group = criterion.benchmark_group("manifest");
    group.bench_function("open", |bencher| bencher.iter(|| black_box(open())));
    group.sample_size(10).throughput(Throughput::Elements(FILES as u64));
    group.bench_function("scan files", |bencher| {
        bencher.iter(|| open().manifest.files().map(|file| file.expect("a file").bytes).sum::<u64>());
    });
    group.bench_function("scan blocks", |bencher| {
        bencher.iter(|| {
            let (backup, mut records) = (open(), Vec::new());
            for file in backup.manifest.files().map(|file| file.expect("a file")) {
                let blocks = BlockSize::DEFAULT.blocks_of(file.bytes);
                backup.manifest.blocks(file.first_block, blocks, &mut records).expect("the records");
            }
            black_box(records.len())
        });
    });
    group.throughput(Throughput::Elements(1));
    group.bench_function("find a file", |bencher| {
        let backup = open();
        let mut random = Random(1);
        bencher.iter(|| backup.manifest.file_at(random.below(FILES) as u64).expect("a file"));
    });
    group.finish();
}

/// Of a cluster of 1 TiB.
fn map(criterion: &mut Criterion) {
    let place = place();
    let disk: Arc<dyn Disk> = Arc::new(LocalDisk::new());
    let root = Root::open(place.path()).expect("the directory");
    let identity =
        Identity { blocks: BLOCKS, backup_root: Hash([7; 32]), session: "bench".parse().expect("a session's name") };
    let map = Map::create(Arc::clone(&disk), root.at("map"), root.at("map.new"), identity.clone()).expect("a map");
    let mut group = criterion.benchmark_group("map");
    let mut random = Random(1);
    group.throughput(Throughput::Elements(1));
    group.bench_function("mark", |bencher| {
        bencher.iter(|| map.mark(BlockNumber(random.number() % BLOCKS)));
    });
    group.throughput(Throughput::Elements(BLOCKS));
    group.bench_function("count", |bencher| bencher.iter(|| black_box(map.count())));
    group.sample_size(10).throughput(Throughput::Elements(BATCH_BLOCKS));
    group.bench_function("persist a batch", |bencher| {
        let mut first = 0;
        bencher.iter(|| {
            first = (first + BATCH_BLOCKS) % BLOCKS;
            (first..first + BATCH_BLOCKS).for_each(|block| map.mark(BlockNumber(block)));
            map.commit(map.take_batch()).expect("the map on disk");
        });
    });
    group.throughput(Throughput::Elements(BLOCKS));
    group.bench_function("open", |bencher| {
        bencher.iter(|| Map::open(Arc::clone(&disk), root.at("map"), &identity).expect("the map"));
    });
    group.finish();
}

/// A file read past the page cache, with so many buffers in flight.
fn queue(criterion: &mut Criterion) {
    let place = place();
    let mut random = Random(5);
    let chunk: Vec<u8> = (0..BUFFER_BYTES).map(|_| random.number() as u8).collect();
    let file = place.path().join("file");
    {
        let mut out = std::fs::File::create(&file).expect("a file");
        for _ in 0..QUEUED_BYTES / BUFFER_BYTES as u64 {
            std::io::Write::write_all(&mut out, &chunk).expect("room for the file");
        }
        out.sync_all().expect("a durable file");
    }
    let mut group = criterion.benchmark_group("queue");
    group.sample_size(10).warm_up_time(Duration::from_millis(500)).throughput(Throughput::Bytes(QUEUED_BYTES));
    for depth in DEPTHS {
        group.bench_function(BenchmarkId::new("read", depth), |bencher| bencher.iter(|| read(place.path(), depth)));
    }
    group.finish();
}

fn read(directory: &Path, depth: u16) -> u64 {
    let disk = LocalDisk::new();
    let root = Root::open(directory).expect("the directory");
    let file = disk.open(root.at("file"), Open::Read).expect("the file");
    let (mut free, _) = buffers(depth).expect("buffers");
    let mut queue = disk.queue(&mut free).expect("a queue");
    let (mut next, mut done) = (0, 0);
    while done < QUEUED_BYTES {
        while next < QUEUED_BYTES
            && let Some(buffer) = free.pop()
        {
            let part = Part { file: Arc::clone(&file), offset: next, at: 0, bytes: BUFFER_BYTES };
            queue.submit(Transfer { token: 0, way: Way::Read, buffer, parts: vec![part] });
            next += BUFFER_BYTES as u64;
        }
        let finished = queue.reap(true).expect("a queue that works").expect("a transfer in flight");
        finished.outcome.expect("bytes");
        free.push(finished.buffer);
        done += BUFFER_BYTES as u64;
    }
    done
}

criterion_group!(benches, manifest, map, queue);
criterion_main!(benches);
