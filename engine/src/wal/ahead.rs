//! Several segments in one push.
//!
//! PostgreSQL calls `archive_command` for one segment at a time, so a server that is behind pays for a process, a lock and
//! the waits for the disk with each. What waits to be archived it names in `archive_status`, by a file `….ready` for each;
//! so the push of a segment takes those along that follow it, on all cores. `archive_status` is only read: the server calls
//! for each of them all the same. Those calls are told at once, by a note of what was read, that the file is still the one
//! which is in the archive; where the note does not fit, they compare as always.
//!
//! Only the segment that was asked for decides what the push ends with. One of the others that is refused, or in the
//! archive already, ends what is taken along, and its own call says why.
//!
//! Always true: a segment appears in the archive after those before it, so what is killed here leaves no gap; and a note
//! speaks only of what is durable.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use super::WalArchive;
use super::name::{SegmentName, WalFile};
use super::push::{Pushed, file_name, open};
use crate::repository::{Lock, LockKind, keys};
use crate::store::Existing;
use crate::{Error, Result};

/// Content that one push takes along: 32 segments of the usual size, none of the largest.
const BYTES_MAX: u64 = 512 << 20;
/// After this no further segment is begun: a server that stops waits for its `archive_command`.
const TIME_MAX: Duration = Duration::from_secs(5);
/// Encoded segments that are held in memory at once.
const THREADS_MAX: usize = 4;
/// A file that was changed later than this before it was read could be changed again without its times telling.
const QUIET: Duration = Duration::from_secs(1);
/// A line of the note has about 200 bytes.
const NOTE_BYTES_MAX: u64 = 64 << 10;

impl WalArchive {
    /// [`WalArchive::push`], which takes along the segments that wait to be archived behind this one.
    pub fn push_with_following(&self, path: &Path) -> Result<Pushed> {
        self.push_as_of(path, SystemTime::now())
    }

    pub(super) fn push_as_of(&self, path: &Path, now: SystemTime) -> Result<Pushed> {
        let WalFile::Segment(segment) = self.parse(file_name(path)?)? else { return self.push(path) };
        if self.is_noted(path) {
            return Ok(Pushed::AlreadyThere);
        }
        let following = self.following(segment, path);
        if following.is_empty() {
            return self.push(path);
        }
        self.push_all(path, &following, now)
    }

    /// The segments behind `first` that wait, in their order, without a gap.
    fn following(&self, first: SegmentName, path: &Path) -> Vec<PathBuf> {
        let status = path.with_file_name("archive_status");
        let most = (BYTES_MAX / self.segment_bytes()).saturating_sub(1);
        let segments = std::iter::successors(Some(first.next()), |segment| Some(segment.next()));
        let names = segments.map(|segment| segment.file_name(self.segment_bytes()));
        let waits = |name: &String| status.join(format!("{name}.ready")).exists();
        names.take(most as usize).take_while(waits).map(|name| path.with_file_name(name)).collect()
    }

    fn push_all(&self, path: &Path, following: &[PathBuf], now: SystemTime) -> Result<Pushed> {
        let _shared = Lock::shared(&**self.store(), self.cluster().name(), LockKind::Push)?;
        let paths: Vec<&Path> = std::iter::once(path).chain(following.iter().map(PathBuf::as_path)).collect();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let work = Work {
            archive: self,
            paths: &paths,
            next: AtomicU64::new(0),
            now,
            until: Instant::now() + TIME_MAX,
            turns: Turns::default(),
            asked: Mutex::new(None),
            notes: Mutex::new(Vec::new()),
        };
        std::thread::scope(|scope| {
            for _ in 0..cores.min(THREADS_MAX).min(paths.len()) {
                scope.spawn(|| work.run());
            }
        });
        let notes = std::mem::take(&mut *locked(&work.notes));
        if !notes.is_empty() {
            self.note(&notes);
        }
        let asked = locked(&work.asked).take();
        asked.unwrap_or_else(|| Err(Error::Refused(format!("{} was not archived", path.display()))))
    }

    /// Whether the file at `path` is what an earlier push took along. Whatever is wrong with the note, or with what it
    /// speaks of, is found by who looks at all of it.
    fn is_noted(&self, path: &Path) -> bool {
        let (Ok(name), Ok(note)) = (file_name(path), self.store().get(&self.note_key(), NOTE_BYTES_MAX)) else {
            return false;
        };
        let Some(line) = std::str::from_utf8(&note).ok().and_then(|note| note.lines().find(|l| l.starts_with(name)))
        else {
            return false;
        };
        let Ok(source) = std::fs::symlink_metadata(path) else { return false };
        self.line(name, &source).is_ok_and(|now| now.as_deref() == Some(line))
    }

    /// What is noted of a segment: its name, the very file that was read, and what the archive has of it; nothing if that
    /// has none.
    fn line(&self, name: &str, source: &Metadata) -> Result<Option<String>> {
        let (Some(object), Some(stored)) = (self.open(name)?, self.stored_bytes(self.parse(name)?)?) else {
            return Ok(None);
        };
        Ok(Some(format!("{name} {} {} {stored}", identity(source), object.content())))
    }

    /// Only saves time: where it cannot be written, the calls for what it would speak of compare.
    fn note(&self, lines: &[String]) {
        if let Err(error) = self.store().put(&self.note_key(), lines.concat().as_bytes(), Existing::Replace) {
            tracing::warn!("what was archived ahead is not noted: {error}");
        }
    }

    fn note_key(&self) -> String {
        keys::archived_ahead(self.cluster().name())
    }
}

/// One push of several segments.
struct Work<'a> {
    archive: &'a WalArchive,
    paths: &'a [&'a Path],
    next: AtomicU64,
    /// By the clock of the files' times.
    now: SystemTime,
    until: Instant,
    turns: Turns,
    /// What became of the first, which was asked for.
    asked: Mutex<Option<Result<Pushed>>>,
    notes: Mutex<Vec<String>>,
}

impl Work<'_> {
    fn run(&self) {
        loop {
            let turn = Turn { turns: &self.turns, number: self.next.fetch_add(1, Ordering::Relaxed), done: false };
            let Some(path) = usize::try_from(turn.number).ok().and_then(|number| self.paths.get(number)) else {
                return;
            };
            if turn.number == 0 {
                let pushed = self.push_first(path, turn);
                *locked(&self.asked) = Some(pushed);
            } else if Instant::now() >= self.until {
                return;
            } else {
                match self.take_along(path, turn) {
                    Ok(Some(line)) => locked(&self.notes).push(format!("{line}\n")),
                    Ok(None) => return,
                    Err(error) => {
                        tracing::info!("{} waits for its own call: {error}", path.display());
                        return;
                    }
                }
            }
        }
    }

    fn push_first(&self, path: &Path, turn: Turn<'_>) -> Result<Pushed> {
        let pushed = self.archive.push_locked(path)?;
        turn.pass();
        Ok(pushed)
    }

    /// Stores a segment that nobody has asked for yet; the line that notes it, or nothing if that is left to its own call.
    fn take_along(&self, path: &Path, turn: Turn<'_>) -> Result<Option<String>> {
        let source = open(path)?;
        let look = || source.metadata().map_err(|cause| Error::io("look at", path, cause));
        let before = look()?;
        let name = file_name(path)?;
        if !is_quiet(&before, self.now) || self.archive.contains(name)? {
            return Ok(None);
        }
        let upload = self.archive.upload(&source, path)?;
        if !turn.comes() {
            return Ok(None);
        }
        upload.commit()?;
        turn.pass();
        let line = self.archive.line(name, &before)?;
        let unchanged = identity(&look()?) == identity(&before);
        Ok(line.filter(|_| unchanged))
    }
}

/// In which order segments appear.
#[derive(Default)]
struct Turns {
    state: Mutex<Whose>,
    changed: Condvar,
}

#[derive(Default)]
struct Whose {
    next: u64,
    /// One that was not stored: none behind it is.
    ended: Option<u64>,
}

/// The turn of one segment; dropped before it has passed, it ends all behind it.
struct Turn<'a> {
    turns: &'a Turns,
    number: u64,
    done: bool,
}

impl Turn<'_> {
    /// Waits for those before it; false if one of them was not stored.
    fn comes(&self) -> bool {
        let mut whose = locked(&self.turns.state);
        while whose.next < self.number && whose.ended.is_none_or(|ended| ended > self.number) {
            whose = self.turns.changed.wait(whose).unwrap_or_else(PoisonError::into_inner);
        }
        whose.next == self.number
    }

    fn pass(mut self) {
        self.done = true;
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut whose = locked(&self.turns.state);
        match self.done {
            true => whose.next = self.number + 1,
            false => whose.ended = Some(whose.ended.map_or(self.number, |ended| ended.min(self.number))),
        }
        drop(whose);
        self.turns.changed.notify_all();
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic elsewhere leaves each of these as it was before or after a statement.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Another file has another number; one that was written or renamed since has other times.
fn identity(of: &Metadata) -> String {
    let modified = format!("{}.{:09}", of.mtime(), of.mtime_nsec());
    format!("{}:{}:{}:{modified}:{}.{:09}", of.dev(), of.ino(), of.len(), of.ctime(), of.ctime_nsec())
}

/// Whether a change from now on would show in the file's times, however coarse these are.
fn is_quiet(of: &Metadata, now: SystemTime) -> bool {
    let changed = of.ctime().max(of.mtime());
    let Ok(now) = now.duration_since(SystemTime::UNIX_EPOCH) else { return false };
    u64::try_from(changed).is_ok_and(|changed| now > Duration::from_secs(changed) + Duration::from_secs(1) + QUIET)
}
