//! The copier: a backup's blocks into a directory, outline, bytes and the final sync, as a restore with `--source blocks`
//! does it.
//!
//! One large file of pages, raw and with lz4, and a few thousand small ones. Wall time, on the disk of cargo's target
//! directory: PGHYDRANT_BENCH_DIR names another. Small files are removed when all is done: for some seconds ext4 does not
//! give the inodes of removed files away again, and a copy would look for others most of its time.

#![allow(clippy::expect_used, missing_docs)]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use engine::codec::Compression;
use engine::hydration::{Fill, Hydration, Layout, Source};
use engine::io::LocalDisk;
use engine::progress::Counting;
use engine::repository::Backup;
use pghydrant_benches::backup::{directory, file, small_files, write};
use pghydrant_benches::pages::pages;

const LARGE_BYTES: u64 = 64 << 20;
const SMALL_FILES: usize = 2000;
const SMALL_BYTES: u64 = 8192;
/// As a restore has it.
const MEMORY_BYTES: usize = 128 << 20;

fn hydration(criterion: &mut Criterion) {
    let place =
        std::env::var_os("PGHYDRANT_BENCH_DIR").map_or_else(|| env!("CARGO_TARGET_TMPDIR").into(), PathBuf::from);
    let place = tempfile::tempdir_in(place).expect("a directory for the benchmark");
    let mut group = criterion.benchmark_group("hydration");
    group.sample_size(10).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(3));
    group.sampling_mode(SamplingMode::Flat);
    let mut targets = (0..).map(|number| place.path().join(format!("target-{number}")));
    let (content, _) = pages(LARGE_BYTES as usize);
    for (compression, name) in [(Compression::None, "raw"), (Compression::Lz4, "lz4")] {
        let large = vec![directory("base"), file("base/large", content.len() as u64)];
        let small = small_files(SMALL_FILES, SMALL_BYTES);
        for (kind, files) in [("large file", large), ("small files", small)] {
            let bytes = files.iter().map(|file| file.bytes).sum();
            let mut next = 0;
            let repository = place.path().join(format!("{kind} {name}"));
            let backup = write(&repository, compression, files, |file, out| {
                let from = next % (content.len() - file.bytes as usize + 1);
                out.extend_from_slice(&content[from..from + file.bytes as usize]);
                next += file.bytes as usize;
            });
            let backup = backup.expect("a backup");
            group.throughput(Throughput::Bytes(bytes));
            group.bench_function(BenchmarkId::new(kind, name), |bencher| {
                bencher.iter_custom(|rounds| {
                    targets.by_ref().zip(0..rounds).map(|(target, _)| timed_fill(&backup, target)).sum()
                });
            });
        }
    }
    group.finish();
}

/// The time of one fill. A target of few files is removed again, which is not counted.
fn timed_fill(backup: &Backup, target: PathBuf) -> Duration {
    let layout = Layout { data: target.clone(), tablespaces: BTreeMap::new(), wal: None };
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let fill = Fill { source: Source::Blocks, workers, memory_bytes: MEMORY_BYTES };
    let session = "bench".parse().expect("a session's name");
    let began = Instant::now();
    let hydration = Hydration::begin(backup.clone(), &layout, &session, None, Arc::new(LocalDisk::new()));
    let hydration = hydration.expect("an empty target");
    let outlined = hydration.outline(workers, &Counting::default()).expect("an outline");
    hydration.fill(&fill, &Counting::default()).expect("all blocks");
    let took = began.elapsed();
    drop(hydration);
    if outlined.files == 1 {
        std::fs::remove_dir_all(target).expect("the target goes");
    }
    took
}

criterion_group!(benches, hydration);
criterion_main!(benches);
