//! The copier: fills what is missing, on every core, as fast as the machine allows.
//!
//! Workers take units of the backup one after another ([`super::plan`]) and move them through their own queues
//! ([`super::worker`]). The calling thread keeps the map: every few seconds it notes what is written, syncs the file
//! systems, and only then puts the bits on disk. A crash costs the blocks since then, no more.
//!
//! A sync is of whole file systems: 5,000 files of 8 KiB that were written past the page cache into allocated space took
//! 0.01 s to sync that way, 0.1 to 0.7 s by an fsync each from eight threads, and 6.7 to 10 s by one fsync after the
//! other (ext4 on a virtio disk). Linux before 5.8 does not tell by it of writes that were lost on their way from the page
//! cache: there what went through the cache is synced by file as well, before its blocks are noted.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use super::crew::Crew;
use super::first::FirstFailure;
use super::layout::Roots;
use super::plan::{JobLimits, Missing, Span, Units};
use super::sharing::{self, SharedBlocks};
use super::source::{OpenSource, PACKS_OPEN, Source};
use super::target::{FILES_OPEN, Writes};
use super::worker::Worker;
use super::{Hydration, Map, is_left_out, is_placed_last};
use crate::format::file::FileRecord;
use crate::io::{BUFFER_BYTES, Disk};
use crate::progress::{Counting, Progress, Stage};
use crate::repository::Backup;
use crate::units::BlockNumber;
use crate::{Error, Result};

/// Buffers of a worker: enough to keep a disk busy both ways, and no fewer than decoding needs.
const BUFFERS_MAX: usize = 24;
const BUFFERS_MIN: usize = 4;
/// Buffers of a delta's worker, which writes little: what more there are costs the time to touch their memory first,
/// 0.1 to 0.2 s for 96 MiB on a virtual machine, and reads no faster. A mount's answers take longer: it has all.
const DELTA_BUFFERS_MAX: u16 = 8;

const _: () = assert!(DELTA_BUFFERS_MAX as usize >= BUFFERS_MIN && DELTA_BUFFERS_MAX as usize <= BUFFERS_MAX);
/// Files that a job may touch: with more, small files would only queue behind each other.
const JOB_FILES_MAX: usize = 64;
/// Open files that are left for everything but workers, the files that the store keeps open among it; half of what there
/// may be, where that is less.
const FILES_SPARED: u64 = 384;
/// Open files of a worker beside those of its jobs: what it keeps open between them, its queue, and two to spare.
const FILES_OF_WORKER: usize = PACKS_OPEN + 2 * FILES_OPEN + 4;
/// Open files of a buffer for each file of its job: in the source while the job waits or is read, in the target, once
/// or twice, while it is written.
const FILES_OF_BUFFER: usize = 3;

/// How to fill.
#[derive(Clone, Debug)]
pub struct Fill {
    /// Where the blocks come from.
    pub source: Source,
    /// Threads; as many as there are cores.
    pub workers: usize,
    /// Memory for buffers, all workers together.
    pub memory_bytes: usize,
}

/// What a fill did.
#[derive(Clone, Debug)]
pub struct Filled {
    /// Content bytes that were written, or are shared.
    pub bytes: u64,
    /// Those of them that files share with the repository.
    pub shared_bytes: u64,
    /// Why others were copied that could have been shared.
    pub unshared: Option<&'static str>,
    /// Blocks that were written.
    pub blocks: u64,
    /// Blocks of zeros, which need no writing.
    pub zero_blocks: u64,
    /// Blocks that an earlier run had written.
    pub present_blocks: u64,
    /// The way the bytes took: "io_uring, registered buffers, huge pages, O_DIRECT".
    pub io: String,
    /// Wall time, the last sync included.
    pub elapsed: Duration,
    /// How long workers waited for each stage, in the order of [`Stage::ALL`], summed over workers.
    pub waited: [Duration; 4],
    /// The stage that was waited for longest.
    pub bottleneck: Option<Stage>,
}

impl Hydration {
    /// Fills what is missing of all files but those that are placed last. When this returns, all of it is durable.
    pub fn fill(&self, fill: &Fill, progress: &dyn Progress) -> Result<Filled> {
        self.map.refuse_if_closed()?;
        self.refuse_unless_compared()?;
        let started = Instant::now();
        let source = OpenSource::open(&fill.source, &self.backup, self.roots.layout(), &*self.disk)?;
        let shared = Shared {
            backup: &self.backup,
            roots: &self.roots,
            map: &self.map,
            disk: &*self.disk,
            source,
            sharing: match fill.source {
                Source::Reflink { trusted } => Some(SharedBlocks::new(trusted, self.backup.manifest.block_limit())),
                Source::Mount(_) | Source::Blocks => None,
            },
            unshared: OnceLock::new(),
            shape: self.shape(fill),
            progress,
            units: Mutex::new(all_units(&self.backup)),
            failure: FirstFailure::new(),
            counts: Counts::default(),
            waits: Counting::default(),
            io: OnceLock::new(),
            direct: OnceLock::new(),
        };
        if let Some(blocks) = &shared.sharing {
            sharing::share_all(blocks, &shared)?;
        }
        let Shared { source, disk, failure, .. } = &shared;
        let crew = Crew { workers: shared.shape.workers, source, disk: *disk, failure };
        crew.run(|open| Worker::new(&shared, open)?.run(), || shared.go_on(), || self.checkpoint(&shared));
        if shared.failure.is_set() {
            if !shared.sync_failed() {
                // Saves the next run some work; the failure that stopped this one is what counts.
                let _ = self.checkpoint(&shared);
            }
            shared.failure.take()?;
            return Err(Error::Cancelled);
        }
        self.checkpoint(&shared)?;
        Ok(shared.filled(started.elapsed()))
    }

    /// Workers and buffers, of the comparison as of the copy.
    pub(super) fn shape(&self, fill: &Fill) -> Shape {
        let content_bytes = self.backup.info.totals.bytes;
        let shape = Shape::new(fill.workers, fill.memory_bytes, content_bytes, open_files_max());
        let from_packs = !matches!(fill.source, Source::Mount(_));
        if self.over.is_some() && from_packs { shape.of_a_delta() } else { shape }
    }

    /// Bytes, then their sync, then the bits.
    fn checkpoint(&self, shared: &Shared<'_>) -> Result<()> {
        let started = Instant::now();
        let batch = self.map.take_batch();
        let synced = self.roots.sync_file_systems(&*self.disk);
        shared.counts.sync_failures.fetch_add(u64::from(synced.is_err()), Ordering::Relaxed);
        synced?;
        self.map.commit(batch)?;
        shared.waited(Stage::Sync, started.elapsed());
        Ok(())
    }
}

/// How many workers, buffers and files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) workers: usize,
    /// Of each worker.
    pub(super) buffers: u16,
    /// Buffers that reads leave free for decoding into.
    pub(super) reserve: usize,
    job_files: usize,
}

impl Shape {
    /// As many workers as wanted, as the memory has buffers for them, the process may have files open for them, and the
    /// content is work for; then as many buffers of each, and files of a job, as that leaves.
    pub(super) fn new(workers: usize, memory_bytes: usize, content_bytes: u64, open_files_max: u64) -> Self {
        let all = (memory_bytes / BUFFER_BYTES).max(BUFFERS_MIN);
        let spared = FILES_SPARED.min(open_files_max / 2);
        let open_files = usize::try_from(open_files_max - spared).unwrap_or(usize::MAX);
        let served = open_files / (FILES_OF_WORKER + BUFFERS_MIN * FILES_OF_BUFFER);
        let workers = workers.min(all / BUFFERS_MIN).min(served).max(1);
        // Memory that would never be used is not made: it is zeroed and registered before the first read.
        let useful = usize::try_from(content_bytes).unwrap_or(usize::MAX) / BUFFER_BYTES * 2 / workers;
        let job_files_all = (open_files / workers).saturating_sub(FILES_OF_WORKER) / FILES_OF_BUFFER;
        let most = BUFFERS_MAX.min(useful).min(job_files_all).max(BUFFERS_MIN);
        let buffers = (all / workers).min(most);
        let job_files = (job_files_all / buffers).clamp(1, JOB_FILES_MAX);
        Self { workers, buffers: u16::try_from(buffers).unwrap_or(u16::MAX), reserve: buffers / 2, job_files }
    }

    /// The same with no more buffers than a delta from packs has use for.
    fn of_a_delta(self) -> Self {
        let buffers = self.buffers.min(DELTA_BUFFERS_MAX);
        Self { buffers, reserve: usize::from(buffers) / 2, ..self }
    }

    pub(super) fn limits(self) -> JobLimits {
        JobLimits { buffer_bytes: BUFFER_BYTES, files: self.job_files }
    }
}

fn open_files_max() -> u64 {
    rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX)
}

pub(super) type AllUnits<'a> = Units<Box<dyn Iterator<Item = Result<FileRecord>> + Send + 'a>>;

/// All files that the copier fills, cut into units.
pub(super) fn all_units(backup: &Backup) -> AllUnits<'_> {
    let left_out: fn(&str) -> bool = |path| is_left_out(path) || is_placed_last(path);
    Units::new(Box::new(backup.manifest.files()), backup.info.block_bytes, left_out)
}

/// What all workers share.
pub(super) struct Shared<'a> {
    pub(super) backup: &'a Backup,
    pub(super) roots: &'a Roots,
    pub(super) map: &'a Map,
    pub(super) disk: &'a dyn Disk,
    pub(super) source: OpenSource,
    /// Files share raw blocks with the packs, these.
    pub(super) sharing: Option<SharedBlocks>,
    unshared: OnceLock<&'static str>,
    pub(super) shape: Shape,
    progress: &'a dyn Progress,
    units: Mutex<AllUnits<'a>>,
    pub(super) failure: FirstFailure,
    counts: Counts,
    waits: Counting,
    io: OnceLock<String>,
    direct: OnceLock<bool>,
}

#[derive(Default)]
struct Counts {
    bytes: AtomicU64,
    shared_bytes: AtomicU64,
    blocks: AtomicU64,
    zero_blocks: AtomicU64,
    present_blocks: AtomicU64,
    sync_failures: AtomicU64,
}

impl Shared<'_> {
    /// An error once somebody failed or the caller has had enough.
    pub(super) fn go_on(&self) -> Result<()> {
        if self.failure.is_set() || self.progress.cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }

    pub(super) fn next_unit(&self) -> Result<Option<Vec<Span>>> {
        self.units.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).next().transpose()
    }

    /// All bytes of these writes are in their files.
    pub(super) fn written(&self, writes: &Writes) -> Result<()> {
        for (file, modified) in &writes.files {
            if !file.direct && !self.disk.sync_file_system_tells() {
                self.disk.sync(file)?;
            }
            self.disk.set_modified(file, *modified)?;
        }
        let mut bytes = 0;
        for (block, length) in &writes.blocks {
            self.map.mark(*block);
            bytes += *length as u64;
        }
        self.counts.blocks.fetch_add(writes.blocks.len() as u64, Ordering::Relaxed);
        self.counts.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.progress.advance(bytes);
        Ok(())
    }

    /// These bytes are shared.
    pub(super) fn count_shared<'b>(&self, blocks: impl IntoIterator<Item = &'b Missing>) {
        let bytes = blocks.into_iter().map(|block| block.bytes as u64).sum();
        self.counts.shared_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn note_unshared(&self, why: &'static str) {
        let _ = self.unshared.set(why);
    }

    /// A block of zeros is there since the outline was made.
    pub(super) fn count_zero(&self, block: BlockNumber, bytes: usize) {
        self.map.mark(block);
        self.counts.zero_blocks.fetch_add(1, Ordering::Relaxed);
        self.progress.advance(bytes as u64);
    }

    pub(super) fn count_present(&self, bytes: usize) {
        self.counts.present_blocks.fetch_add(1, Ordering::Relaxed);
        self.progress.advance(bytes as u64);
    }

    pub(super) fn waited(&self, stage: Stage, time: Duration) {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.waits.waited(stage, nanoseconds);
        self.progress.waited(stage, nanoseconds);
    }

    pub(super) fn note_io(&self, way: &str) {
        let _ = self.io.set(way.to_owned());
    }

    pub(super) fn note_direct(&self, direct: bool) {
        let _ = self.direct.set(direct);
    }

    fn sync_failed(&self) -> bool {
        self.counts.sync_failures.load(Ordering::Relaxed) > 0
    }

    fn filled(&self, elapsed: Duration) -> Filled {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let cache = match self.direct.get() {
            Some(true) => ", O_DIRECT",
            Some(false) => ", through the page cache (no O_DIRECT there)",
            None => "",
        };
        Filled {
            bytes: count(&self.counts.bytes),
            shared_bytes: count(&self.counts.shared_bytes),
            unshared: self.unshared.get().copied(),
            blocks: count(&self.counts.blocks),
            zero_blocks: count(&self.counts.zero_blocks),
            present_blocks: count(&self.counts.present_blocks),
            io: format!("{}{cache}", self.io.get().map_or("", String::as_str)),
            elapsed,
            waited: Stage::ALL.map(|stage| Duration::from_nanos(self.waits.waited_nanoseconds(stage))),
            bottleneck: self.waits.bottleneck(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_bounds_the_workers_and_the_process_its_open_files() {
        let shape = Shape::new(2, 64 << 20, 1 << 40, 1 << 20);
        assert_eq!((shape.workers, shape.buffers, shape.job_files), (2, 16, 64));
        let shape = Shape::new(64, 64 << 20, 1 << 40, 1 << 20);
        assert_eq!((shape.workers, shape.buffers), (8, 4));
        let shape = Shape::new(0, 0, 0, 0);
        assert_eq!((shape.workers, shape.buffers, shape.job_files), (1, 4, 1));
        assert!(shape.reserve >= 1);
        assert_eq!(Shape::new(2, 64 << 20, 10 << 20, 1 << 20).buffers, 5);
        let shape = Shape::new(2, 128 << 20, 1 << 40, 1 << 20).of_a_delta();
        assert_eq!((shape.workers, shape.buffers, shape.reserve), (2, 8, 4));
        assert_eq!(Shape::new(64, 64 << 20, 1 << 40, 1 << 20).of_a_delta().buffers, 4);
    }

    #[test]
    fn whatever_the_machine_the_open_files_fit_the_limit() {
        for open_files_max in [256, 512, 1024, 4096, 1 << 16, u64::MAX] {
            for workers in [1, 2, 8, 32, 256] {
                for memory_bytes in [8 << 20, 64 << 20, 1 << 30, 64 << 30] {
                    let shape = Shape::new(workers, memory_bytes, u64::MAX, open_files_max);
                    let of_jobs = usize::from(shape.buffers) * 3 * shape.job_files;
                    let open = shape.workers * (of_jobs + PACKS_OPEN + 2 * FILES_OPEN);
                    assert!(
                        open as u64 + FILES_SPARED.min(open_files_max / 2) <= open_files_max,
                        "{open} of {open_files_max}: {shape:?}"
                    );
                }
            }
        }
    }
}
