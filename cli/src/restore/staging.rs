//! WAL ahead of the replay: a bounded window of segments on the target's file system.
//!
//! A thread copies the next segments into `pg_wal/pghydrant.staging/`, each synced and then renamed to its name, so a
//! file that is there is whole. `wal fetch` moves them into place, a rename within one file system; a segment that is
//! not there (yet), or was delivered before, it brings from the repository itself. So staging only saves time: nothing
//! waits for it and nothing depends on it. Segments are never linked: PostgreSQL recycles and overwrites them.
//!
//! Always true: at most [`WINDOW_SEGMENTS`] files lie in the directory.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use engine::Error;
use engine::io::durable;
use engine::units::{Lsn, Timeline};
use engine::wal::history::History;
use engine::wal::name::SegmentName;
use engine::wal::{Fetched, WalArchive};
use rustix::fs::{Mode, OFlags};

use super::files;
use super::plan::User;

/// Where `wal fetch` looks first, below the data directory.
pub(crate) const DIRECTORY: &str = "pg_wal/pghydrant.staging";
/// Segments that lie ready: 256 MiB at the usual size, a quarter of a second of the fastest replay.
pub(crate) const WINDOW_SEGMENTS: u64 = 16;
/// Between two looks whether the window has room: a segment is replayed in ten milliseconds at best.
const POLL: Duration = Duration::from_millis(5);

/// Where segments come from.
#[derive(Clone, Debug)]
pub(crate) enum Feed {
    /// The session's mount: its `wal` directory; and the repository behind it, which tells what is damaged.
    Mount(PathBuf, WalArchive),
    /// The repository.
    Archive(WalArchive),
}

impl Feed {
    /// Writes a segment to `to`, verified on its way; false if there is none.
    pub(crate) fn bring(&self, name: &str, to: &Path) -> anyhow::Result<bool> {
        match self {
            Self::Mount(directory, archive) => match copy(&directory.join(name), to) {
                // A mount says only EIO, or that its server is gone: the repository names the block, or delivers after all.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EIO | libc::ENOTCONN | libc::ECONNABORTED)) => {
                    fetch(archive, name, to)
                }
                copied => Ok(copied?),
            },
            Self::Archive(archive) => fetch(archive, name, to),
        }
    }
}

/// Copies a segment out of the mount; false if there is none.
fn copy(from: &Path, to: &Path) -> engine::Result<bool> {
    let mut source = match File::open(from) {
        Ok(source) => source,
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(cause) => return Err(Error::io("open", from, cause)),
    };
    // New, and under no name that somebody put there: the directory belongs to the server's user, and we may be root.
    files::remove(to).map_err(|cause| Error::Refused(format!("{cause:#}")))?;
    let opened = File::options().write(true).create_new(true).mode(0o600).open(to);
    let mut file = opened.map_err(|cause| Error::io("create", to, cause))?;
    std::io::copy(&mut source, &mut file).map_err(|cause| Error::io("copy", from, cause))?;
    durable::sync_content(&file, to)?;
    Ok(true)
}

/// Brings a segment from the repository; false if there is none.
fn fetch(archive: &WalArchive, name: &str, to: &Path) -> anyhow::Result<bool> {
    if !archive.contains(name)? || archive.fetch(name, to)? == Fetched::Absent {
        return Ok(false);
    }
    let file = File::open(to).map_err(|cause| Error::io("open", to, cause))?;
    durable::sync_content(&file, to)?;
    Ok(true)
}

/// The segments that a recovery asks for, in order: of each number the newest timeline on the path that has it, as
/// PostgreSQL looks for them.
pub(crate) fn segments(archive: &WalArchive, path: &History, start: Lsn) -> anyhow::Result<Vec<SegmentName>> {
    let segment_bytes = archive.cluster().info().wal_segment_bytes;
    let mut present = BTreeMap::new();
    for timeline in path.ancestors.iter().map(|ancestor| ancestor.timeline).chain([path.timeline]) {
        let numbers: BTreeSet<u64> = archive.segments(timeline)?.into_iter().map(|segment| segment.number).collect();
        present.insert(timeline, numbers);
    }
    Ok(in_order(path, &present, start.0 / segment_bytes, segment_bytes))
}

fn in_order(
    path: &History,
    present: &BTreeMap<Timeline, BTreeSet<u64>>,
    first: u64,
    segment_bytes: u64,
) -> Vec<SegmentName> {
    // Newest first, each with the segment in which it begins.
    let begins = path.ancestors.iter().map(|ancestor| ancestor.left_at.0 / segment_bytes);
    let timelines = path.ancestors.iter().map(|ancestor| ancestor.timeline).chain([path.timeline]);
    let pieces: Vec<(Timeline, u64)> = timelines.zip(std::iter::once(0).chain(begins)).collect();
    let has = |timeline: Timeline, number: u64| present.get(&timeline).is_some_and(|numbers| numbers.contains(&number));
    let at = |number: u64| {
        let candidates = pieces.iter().rev().filter(|(_, begin)| *begin <= number);
        candidates.map(|(timeline, _)| *timeline).find(|timeline| has(*timeline, number))
    };
    (first..).map_while(|number| at(number).map(|timeline| SegmentName { timeline, number })).collect()
}

/// The thread that stages, while the server recovers.
#[derive(Debug)]
pub(crate) struct Stager {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<anyhow::Result<u64>>>,
    directory: PathBuf,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    /// The number of the last segment that the server has restored, plus one.
    replayed: AtomicU64,
}

impl Stager {
    /// Begins to stage `segments` for the server in `data`.
    pub(crate) fn begin(
        feed: Feed,
        data: &Path,
        segments: Vec<SegmentName>,
        segment_bytes: u64,
        owner: &User,
    ) -> anyhow::Result<Self> {
        let directory = data.join(DIRECTORY);
        files::remove(&directory)?;
        files::make_directory(&directory, owner)?;
        let shared = Arc::new(Shared::default());
        let held = hold(&directory)?;
        let work = Work {
            feed,
            directory: PathBuf::from(format!("/proc/self/fd/{}", held.as_raw_fd())),
            _held: held,
            segments,
            segment_bytes,
            owner: owner.clone(),
            shared: Arc::clone(&shared),
        };
        let thread = std::thread::Builder::new().name("wal staging".to_owned()).spawn(move || work.run())?;
        Ok(Self { shared, thread: Some(thread), directory })
    }

    /// The server has restored this segment: nothing up to it is asked for again.
    pub(crate) fn restored(&self, segment: SegmentName) {
        self.shared.replayed.fetch_max(segment.number + 1, Ordering::Relaxed);
    }

    /// Ends it and takes its directory away; how many segments it staged.
    pub(crate) fn finish(mut self) -> anyhow::Result<u64> {
        self.shared.stop.store(true, Ordering::Relaxed);
        let staged = match self.thread.take().map(JoinHandle::join) {
            Some(Ok(staged)) => staged,
            Some(Err(_)) => Err(anyhow::anyhow!("the thread that stages WAL panicked")),
            None => Ok(0),
        };
        files::remove(&self.directory)?;
        staged
    }
}

impl Drop for Stager {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // What went wrong with the staging is not what ended the restore.
            let _ = thread.join();
        }
    }
}

/// Opens the directory itself, not what a link in its place leads to.
pub(super) fn hold(directory: &Path) -> anyhow::Result<File> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = rustix::fs::open(directory, flags, Mode::empty());
    Ok(opened.map(File::from).map_err(|cause| Error::io("open", directory, cause))?)
}

struct Work {
    feed: Feed,
    /// By way of `_held`: whatever the server's user puts in the directory's place, nothing is written elsewhere.
    directory: PathBuf,
    _held: File,
    segments: Vec<SegmentName>,
    segment_bytes: u64,
    owner: User,
    shared: Arc<Shared>,
}

impl Work {
    fn run(self) -> anyhow::Result<u64> {
        let mut staged = Vec::new();
        let mut count = 0;
        for segment in &self.segments {
            loop {
                if self.shared.stop.load(Ordering::Relaxed) {
                    return Ok(count);
                }
                self.drop_gone(&mut staged)?;
                if (staged.len() as u64) < WINDOW_SEGMENTS {
                    break;
                }
                std::thread::sleep(POLL);
            }
            // The server was faster and brought it itself.
            if segment.number < self.shared.replayed.load(Ordering::Relaxed) {
                continue;
            }
            let name = segment.file_name(self.segment_bytes);
            let part = self.directory.join(format!(".{name}.part"));
            let path = self.directory.join(&name);
            if !self.stage(&name, &part, &path).with_context(|| format!("cannot stage WAL segment {name}"))? {
                return Ok(count);
            }
            staged.push((segment.number, path));
            count += 1;
        }
        Ok(count)
    }

    fn stage(&self, name: &str, part: &Path, path: &Path) -> anyhow::Result<bool> {
        if !self.feed.bring(name, part)? {
            return Ok(false);
        }
        files::give(part, &self.owner)?;
        durable::rename_durably(part, path)?;
        Ok(true)
    }

    /// Forgets what was taken, and removes what nobody will ask for.
    fn drop_gone(&self, staged: &mut Vec<(u64, PathBuf)>) -> anyhow::Result<()> {
        let replayed = self.shared.replayed.load(Ordering::Relaxed);
        for (_, path) in staged.extract_if(.., |(number, path)| *number < replayed || !path.exists()) {
            files::remove(&path)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn of_each_number_the_newest_timeline_that_has_begun_is_taken() {
        // Timeline 2 left timeline 1 in segment 5; the archive has that segment of both.
        let path = History::parse(Timeline(2), "1\t0/5000100\tx\n").unwrap();
        let present = [(Timeline(1), (3..=7).collect()), (Timeline(2), [5, 6].into())].into();
        let names: Vec<_> =
            in_order(&path, &present, 3, 16 << 20).into_iter().map(|s| (s.timeline.0, s.number)).collect();
        assert_eq!(names, [(1, 3), (1, 4), (2, 5), (2, 6), (1, 7)]);
    }

    #[test]
    fn nothing_is_written_through_what_lies_in_a_segments_place() {
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name);
        std::fs::write(at("segment"), "wal").unwrap();
        std::fs::write(at("victim"), "precious").unwrap();
        std::os::unix::fs::symlink("victim", at("link")).unwrap();
        std::fs::hard_link(at("victim"), at("name")).unwrap();
        for part in ["link", "name"] {
            assert!(copy(&at("segment"), &at(part)).unwrap());
            assert_eq!(std::fs::read(at(part)).unwrap(), b"wal");
            assert_eq!(std::fs::read(at("victim")).unwrap(), b"precious");
        }
        std::fs::create_dir(at("directory")).unwrap();
        std::os::unix::fs::symlink("directory", at("led")).unwrap();
        assert!(hold(&at("directory")).is_ok());
        assert!(hold(&at("led")).is_err());
    }

    #[test]
    fn staging_ends_at_a_gap() {
        let present = [(Timeline(1), [3, 4, 6].into())].into();
        assert_eq!(in_order(&History::root(Timeline(1)), &present, 3, 16 << 20).len(), 2);
    }
}
