//! WAL ahead of the replay: a bounded window of segments on the target's file system.
//!
//! Threads copy the next segments, each verified and synced before it gets its name. For a recovery that opens the server
//! they are laid into `pg_wal` itself ([`super::laid`]). One that waits at the end of the WAL tells by what it restores that
//! it has come there ([`super::standby`]), so there they lie in `pg_wal/pghydrant.staging/`, and `wal fetch` moves them
//! into place, a rename. A segment that is not there (yet), or was delivered before, `wal fetch` brings from the
//! repository. So staging only saves time: nothing waits for it and nothing depends on it. Segments are never linked:
//! PostgreSQL recycles and overwrites them.
//!
//! Always true: at most [`WINDOW_SEGMENTS`] segments lie ready, or are on their way.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
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
use super::laid::{self, Held};
use super::plan::User;

/// Where `wal fetch` looks first, below the data directory.
pub(crate) const DIRECTORY: &str = "pg_wal/pghydrant.staging";
/// The same within `pg_wal`.
pub(crate) const NAME: &str = "pghydrant.staging";
/// Segments that lie ready: 256 MiB at the usual size, a quarter of a second of the fastest replay.
pub(crate) const WINDOW_SEGMENTS: u64 = 16;
/// Between two looks whether the window has room: a segment is replayed in ten milliseconds at best.
const POLL: Duration = Duration::from_millis(5);
/// While one waits for a sync, the other reads, decodes and hashes.
const THREADS: usize = 2;

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
    let found = (first..).map_while(|number| at(number).map(|timeline| SegmentName { timeline, number }));
    // Once it has read of a timeline, PostgreSQL asks for none of an older one.
    let mut newest = Timeline(0);
    let goes_on = |segment: &SegmentName| std::mem::replace(&mut newest, segment.timeline) <= segment.timeline;
    found.take_while(goes_on).collect()
}

/// How segments are handed to the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// In `pg_wal`, under their own names; one that `archives` is not to archive them again.
    Laid {
        /// Whether the server archives.
        archives: bool,
    },
    /// Beside it, for `wal fetch` to move.
    Moved,
}

/// The threads that stage, while the server recovers.
#[derive(Debug)]
pub(crate) struct Stager {
    work: Arc<Work>,
    threads: Vec<JoinHandle<anyhow::Result<()>>>,
    data: PathBuf,
}

impl Stager {
    /// Begins to stage `segments` for the server in `data`.
    pub(crate) fn begin(
        feed: Feed,
        data: &Path,
        segments: Vec<SegmentName>,
        segment_bytes: u64,
        way: Way,
        owner: &User,
    ) -> anyhow::Result<Self> {
        let directory = data.join(DIRECTORY);
        laid::clear(data, way.archives(), owner)?;
        files::make_directory(&directory, owner)?;
        let place = match way {
            Way::Laid { archives } => Some(laid::Place::open(&data.join("pg_wal"), archives, owner)?),
            Way::Moved => None,
        };
        let work = Arc::new(Work {
            feed,
            directory: Held::new(hold(&directory)?),
            place,
            segment_bytes,
            way,
            owner: owner.clone(),
            stop: AtomicBool::new(false),
            passed: AtomicU64::new(0),
            window: Mutex::new(Window { next: segments.into(), ..Window::default() }),
        });
        let mut stager = Self { work, threads: Vec::new(), data: data.to_owned() };
        for _ in 0..THREADS {
            let work = Arc::clone(&stager.work);
            let thread = std::thread::Builder::new().name("wal staging".to_owned()).spawn(move || work.run());
            stager.threads.push(thread?);
        }
        Ok(stager)
    }

    /// The server has restored this segment: nothing up to it is asked for again.
    pub(crate) fn restored(&self, segment: SegmentName) {
        self.work.passed.fetch_max(segment.number + 1, Ordering::Relaxed);
    }

    /// Ends it and takes away what the server has not asked for; how many segments were staged.
    pub(crate) fn finish(mut self) -> anyhow::Result<u64> {
        let ended = self.end();
        laid::clear(&self.data, self.work.way.archives(), &self.work.owner)?;
        ended?;
        Ok(self.work.window().count)
    }

    fn end(&mut self) -> anyhow::Result<()> {
        self.work.stop.store(true, Ordering::Relaxed);
        let ended: Vec<_> = self.threads.drain(..).map(JoinHandle::join).collect();
        ended
            .into_iter()
            .try_for_each(|ended| ended.unwrap_or_else(|_| Err(anyhow::anyhow!("a thread that stages WAL panicked"))))
    }
}

impl Drop for Stager {
    fn drop(&mut self) {
        // What went wrong with the staging is not what ended the restore.
        let _ = self.end();
    }
}

impl Way {
    const fn archives(self) -> bool {
        matches!(self, Self::Laid { archives: true })
    }
}

/// Opens the directory itself, not what a link in its place leads to.
pub(super) fn hold(directory: &Path) -> anyhow::Result<File> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = rustix::fs::open(directory, flags, Mode::empty());
    Ok(opened.map(File::from).map_err(|cause| Error::io("open", directory, cause))?)
}

#[derive(Debug)]
struct Work {
    feed: Feed,
    directory: Held,
    place: Option<laid::Place>,
    segment_bytes: u64,
    way: Way,
    owner: User,
    stop: AtomicBool,
    /// The number of the last segment that the server has restored, plus one.
    passed: AtomicU64,
    window: Mutex<Window>,
}

/// What is ready, and what comes.
#[derive(Debug, Default)]
struct Window {
    next: VecDeque<SegmentName>,
    on_their_way: u64,
    ready: Vec<SegmentName>,
    count: u64,
}

impl Work {
    fn run(&self) -> anyhow::Result<()> {
        while !self.stop.load(Ordering::Relaxed) {
            let Some(segment) = self.next()? else {
                if self.window().next.is_empty() {
                    return Ok(());
                }
                std::thread::sleep(POLL);
                continue;
            };
            let name = segment.file_name(self.segment_bytes);
            let staged = self.stage(&name).with_context(|| format!("cannot stage WAL segment {name}"));
            let mut window = self.window();
            window.on_their_way -= 1;
            match staged {
                Ok(true) => {
                    window.ready.push(segment);
                    window.count += 1;
                }
                // What comes behind it is of no use without it.
                Ok(false) => window.next.clear(),
                Err(error) => {
                    window.next.clear();
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn window(&self) -> std::sync::MutexGuard<'_, Window> {
        // What a thread that panicked left is counted right: it changes nothing between two statements that may.
        self.window.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The segment to bring next, if there is room for it.
    fn next(&self) -> anyhow::Result<Option<SegmentName>> {
        let passed = self.passed.load(Ordering::Relaxed);
        let mut window = self.window();
        let ready = std::mem::take(&mut window.ready);
        for segment in ready {
            let name = segment.file_name(self.segment_bytes);
            if segment.number < passed {
                self.forget(&name)?;
            } else if self.waits(&name) {
                window.ready.push(segment);
            }
        }
        // The server was faster and brought it itself.
        while window.next.front().is_some_and(|segment| segment.number < passed) {
            window.next.pop_front();
        }
        if window.ready.len() as u64 + window.on_their_way >= WINDOW_SEGMENTS {
            return Ok(None);
        }
        let next = window.next.pop_front();
        window.on_their_way += u64::from(next.is_some());
        Ok(next)
    }

    /// Whether the server has not asked for it yet.
    fn waits(&self, name: &str) -> bool {
        self.place.as_ref().map_or_else(|| self.directory.join(name).exists(), |place| place.waits(name))
    }

    /// Nobody will ask for it.
    fn forget(&self, name: &str) -> anyhow::Result<()> {
        self.place.as_ref().map_or_else(|| files::remove(&self.directory.join(name)), |place| place.forget(name))
    }

    fn stage(&self, name: &str) -> anyhow::Result<bool> {
        let part = self.directory.join(&format!(".{name}.part"));
        if !self.feed.bring(name, &part)? {
            return Ok(false);
        }
        let bytes = std::fs::symlink_metadata(&part).map_err(|cause| Error::io("examine", &part, cause))?.len();
        anyhow::ensure!(bytes == self.segment_bytes, "it has {bytes} bytes, a segment has {}", self.segment_bytes);
        files::give(&part, &self.owner)?;
        match &self.place {
            Some(place) => place.lay(&part, name)?,
            None => durable::rename_durably(&part, &self.directory.join(name))?,
        }
        Ok(true)
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
        assert_eq!(names, [(1, 3), (1, 4), (2, 5), (2, 6)], "and never back to an older one");
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
