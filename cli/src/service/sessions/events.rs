//! What was said in a session: a file that only grows, followed by as many as like.
//!
//! Each line is an object with an `event`. A line that came from the target has `at`: how far in the target's own file it
//! ends. So the file itself says where to go on listening, after a lost connection as after a restart.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use engine::Error;
use serde_json::Value;
use tokio::sync::watch;

/// See the module.
#[derive(Debug)]
pub(super) struct Events {
    path: PathBuf,
    file: Mutex<Kept>,
    /// The file's length, to who waits for more.
    length: watch::Sender<u64>,
}

/// The file, and what its last line of the target's says.
#[derive(Debug)]
struct Kept {
    file: File,
    /// How far the target's own events were heard.
    heard: u64,
    /// The exit code, if the last thing that was heard is how a run ended.
    ended: Option<u8>,
    /// When figures of a step were last kept.
    figures: Option<Instant>,
}

/// At most so much is handed on at once.
const PIECE_BYTES: u64 = 64 << 10;
/// Longer than any line of ours.
pub(super) const LINE_BYTES_MAX: u64 = 1 << 20;
/// From here on figures are kept seldom: days of a restore that tells them each second are no more than this.
const FIGURES_BYTES_MAX: u64 = 4 << 20;
const FIGURES_EVERY: Duration = Duration::from_secs(60);
/// From here on a target is no longer quoted, but for how its runs ended: none of ours says so much.
const TARGET_BYTES_MAX: u64 = 16 << 20;
const _: () = assert!(FIGURES_BYTES_MAX < TARGET_BYTES_MAX && LINE_BYTES_MAX < TARGET_BYTES_MAX);

impl Events {
    /// Opens or makes the file. What a crash left of a last line is cut off.
    pub(super) fn open(path: &Path) -> anyhow::Result<Self> {
        let failed = |cause| Error::io("open", path, cause);
        let mut options = OpenOptions::new();
        let mut file = options.read(true).append(true).create(true).mode(0o600).open(path).map_err(failed)?;
        let (length, heard, ended) = end_of(&mut file).map_err(failed)?;
        file.set_len(length).map_err(failed)?;
        let kept = Kept { file, heard, ended, figures: None };
        Ok(Self { path: path.to_owned(), file: Mutex::new(kept), length: watch::Sender::new(length) })
    }

    /// Adds a line; `at` is where it ended on the target, if it came from there.
    pub(super) fn add(&self, mut event: Value, at: Option<u64>) -> anyhow::Result<()> {
        let mut kept = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let ended = code_of(&event);
        if let Some(at) = at {
            let length = self.length();
            // Heard, and heard again after a restart: what is left out once is left out then.
            let is_figures = event.get("event").and_then(Value::as_str) == Some("progress");
            let often = kept.figures.is_some_and(|figures| figures.elapsed() < FIGURES_EVERY);
            let left_out =
                ended.is_none() && (length >= TARGET_BYTES_MAX || (is_figures && length >= FIGURES_BYTES_MAX && often));
            if left_out {
                (kept.heard, kept.ended) = (at, None);
                return Ok(());
            }
            if is_figures {
                kept.figures = Some(Instant::now());
            }
            if let Value::Object(fields) = &mut event {
                fields.insert("at".to_owned(), at.into());
            }
        }
        let line = format!("{event}\n");
        if let Err(cause) = kept.file.write_all(line.as_bytes()) {
            // No half a line: the next one would be lost with it.
            let _ = kept.file.set_len(self.length());
            return Err(Error::io("write", &self.path, cause).into());
        }
        if let Some(at) = at {
            (kept.heard, kept.ended) = (at, ended);
        }
        self.length.send_modify(|length| *length += line.len() as u64);
        Ok(())
    }

    /// How long it is now: who follows from here hears only what is new.
    pub(super) fn length(&self) -> u64 {
        *self.length.borrow()
    }

    /// How far the target's own events were heard.
    pub(super) fn heard(&self) -> u64 {
        self.file.lock().unwrap_or_else(PoisonError::into_inner).heard
    }

    /// How the run ended whose events begin behind `since`, if that was heard.
    pub(super) fn ended_behind(&self, since: u64) -> Option<u8> {
        let kept = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        kept.ended.filter(|_| kept.heard > since)
    }

    /// A reader of what stands behind byte `from`.
    pub(super) fn follow(&self, from: u64) -> anyhow::Result<Follower> {
        let file = File::open(&self.path).map_err(|cause| Error::io("open", &self.path, cause))?;
        Ok(Follower { file, position: from, length: self.length.subscribe() })
    }
}

/// Reads events as they come.
#[derive(Debug)]
pub(crate) struct Follower {
    file: File,
    position: u64,
    length: watch::Receiver<u64>,
}

impl Follower {
    /// Where the next line begins.
    pub(crate) fn position(&self) -> u64 {
        self.position
    }

    /// Nothing more was said so far.
    pub(crate) fn is_at_end(&self) -> bool {
        *self.length.borrow() <= self.position
    }

    /// The next whole lines; waits for them. None once nobody will add any.
    pub(crate) async fn next(&mut self) -> Option<String> {
        let from = self.position;
        let length = *self.length.wait_for(|length| *length > from).await.ok()?;
        // Small, and just written: it is in the page cache.
        let mut lines = self.read((length - from).min(PIECE_BYTES)).ok()?;
        if !lines.contains(&b'\n') {
            lines = self.read((length - from).min(2 * LINE_BYTES_MAX)).ok()?;
        }
        let end = lines.iter().rposition(|byte| *byte == b'\n')? + 1;
        let text = String::from_utf8_lossy(&lines[..end]).into_owned();
        self.position = from + end as u64;
        Some(text)
    }

    fn read(&mut self, bytes: u64) -> std::io::Result<Vec<u8>> {
        self.file.seek(SeekFrom::Start(self.position))?;
        let mut read = Vec::new();
        (&self.file).take(bytes).read_to_end(&mut read)?;
        Ok(read)
    }
}

/// The end of the last whole line, how far the target was heard, and the exit code if it ended there. Read backwards: the
/// last lines nearly always say it.
fn end_of(file: &mut File) -> std::io::Result<(u64, u64, Option<u8>)> {
    let whole = file.metadata()?.len();
    let mut wanted = PIECE_BYTES;
    loop {
        let from = whole.saturating_sub(wanted);
        file.seek(SeekFrom::Start(from))?;
        let mut tail = Vec::new();
        (&mut *file).take(whole - from).read_to_end(&mut tail)?;
        let end = tail.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let said = tail[..end].split(|byte| *byte == b'\n').rev().find_map(|line| {
            let event: Value = serde_json::from_slice(line).ok()?;
            Some((event.get("at")?.as_u64()?, code_of(&event)))
        });
        if from == 0 || (end > 0 && said.is_some()) {
            let (heard, ended) = said.unwrap_or_default();
            return Ok((from + end as u64, heard, ended));
        }
        wanted = wanted.saturating_mul(4);
    }
}

/// The exit code, where an event is how a run ended.
fn code_of(event: &Value) -> Option<u8> {
    if event.get("event").and_then(Value::as_str) != Some("ended") {
        return None;
    }
    event.get("code").and_then(Value::as_u64).and_then(|code| u8::try_from(code).ok())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;

    #[test]
    fn events_outlive_the_service_and_say_how_far_the_target_was_heard() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.events");
        let events = Events::open(&path).unwrap();
        assert_eq!(events.heard(), 0);
        events.add(json!({"event": "step"}), Some(17)).unwrap();
        events.add(json!({"event": "note", "message": "ours"}), None).unwrap();
        drop(events);
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"event\":\"ste").unwrap();
        let events = Events::open(&path).unwrap();
        assert_eq!(events.heard(), 17);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let mut follower = events.follow(0).unwrap();
        let said = runtime.block_on(follower.next()).unwrap();
        assert_eq!(said.lines().count(), 2);
        assert!(follower.is_at_end() && !events.follow(0).unwrap().is_at_end());
        let long = "x".repeat(3 * PIECE_BYTES as usize);
        events.add(json!({"event": "note", "message": long}), None).unwrap();
        events.add(json!({"event": "note"}), None).unwrap();
        let said = runtime.block_on(follower.next()).unwrap();
        assert!(said.contains(&long) && said.ends_with("\n{\"event\":\"note\"}\n"));
        drop(events);
        assert_eq!(runtime.block_on(follower.next()), None);
    }
    #[test]
    fn how_a_run_ended_is_known_after_a_restart_and_not_taken_for_the_end_of_the_next() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.events");
        let events = Events::open(&path).unwrap();
        assert_eq!(events.ended_behind(0), None);
        events.add(json!({"event": "ended", "code": 6}), Some(100)).unwrap();
        events.add(json!({"event": "warning", "message": "x".repeat(200 << 10)}), None).unwrap();
        for events in [&events, &Events::open(&path).unwrap()] {
            assert_eq!(events.heard(), 100);
            assert_eq!(events.ended_behind(40), Some(6));
            assert_eq!(events.ended_behind(100), None);
        }
        events.add(json!({"event": "step"}), Some(120)).unwrap();
        assert_eq!(Events::open(&path).unwrap().ended_behind(40), None);
    }

    #[test]
    fn a_target_that_says_too_much_is_heard_and_not_quoted() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.events");
        let events = Events::open(&path).unwrap();
        let long = "x".repeat(512 << 10);
        let mut at = 0;
        while events.length() < TARGET_BYTES_MAX {
            at += 1;
            events.add(json!({"event": "note", "message": long}), Some(at)).unwrap();
        }
        let length = events.length();
        events.add(json!({"event": "note", "message": long}), Some(at + 1)).unwrap();
        assert_eq!((events.length(), events.heard()), (length, at + 1));
        // How it ended is always told, and so is what we say ourselves.
        events.add(json!({"event": "ended", "code": 0}), Some(at + 2)).unwrap();
        events.add(json!({"event": "exit", "code": 0}), None).unwrap();
        assert!(events.length() > length && events.ended_behind(at) == Some(0));
        assert_eq!(Events::open(&path).unwrap().heard(), at + 2);
    }

    #[test]
    fn figures_of_a_very_long_step_become_seldom() {
        let directory = tempfile::tempdir().unwrap();
        let events = Events::open(&directory.path().join("x.events")).unwrap();
        let figures = || json!({"event": "progress", "bytes": 1});
        events.add(figures(), Some(1)).unwrap();
        let before = events.length();
        events.add(figures(), Some(2)).unwrap();
        assert!(events.length() > before);
        events.add(json!({"event": "note", "message": "x".repeat(FIGURES_BYTES_MAX as usize)}), Some(3)).unwrap();
        let before = events.length();
        events.add(figures(), Some(4)).unwrap();
        assert_eq!((events.length(), events.heard()), (before, 4));
        events.add(json!({"event": "step"}), Some(5)).unwrap();
        assert!(events.length() > before);
    }
}
