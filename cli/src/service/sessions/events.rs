//! What was said in a session: a file that only grows, followed by as many as like.
//!
//! Each line is an object with an `event`. A line that came from the target has `at`: how far in the target's own file it
//! ends. So the file itself says where to go on listening, after a lost connection as after a restart.

use std::fs::{File, OpenOptions};
use std::io::{BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use engine::Error;
use serde_json::Value;
use tokio::sync::watch;

/// See the module.
#[derive(Debug)]
pub(super) struct Events {
    path: PathBuf,
    file: Mutex<File>,
    /// The file's length, to who waits for more.
    length: watch::Sender<u64>,
}

/// At most so much is handed on at once.
const PIECE_BYTES: u64 = 64 << 10;

impl Events {
    /// Opens or makes the file. What a crash left of a last line is cut off.
    pub(super) fn open(path: &Path) -> anyhow::Result<Self> {
        let failed = |cause| Error::io("open", path, cause);
        let mut options = OpenOptions::new();
        let mut file = options.read(true).append(true).create(true).mode(0o600).open(path).map_err(failed)?;
        let mut whole = Vec::new();
        file.read_to_end(&mut whole).map_err(failed)?;
        let length = whole.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at as u64 + 1);
        file.set_len(length).map_err(failed)?;
        Ok(Self { path: path.to_owned(), file: Mutex::new(file), length: watch::Sender::new(length) })
    }

    /// Adds a line; `at` is where it ended on the target, if it came from there.
    pub(super) fn add(&self, mut event: Value, at: Option<u64>) -> anyhow::Result<()> {
        if let (Value::Object(fields), Some(at)) = (&mut event, at) {
            fields.insert("at".to_owned(), at.into());
        }
        let line = format!("{event}\n");
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.write_all(line.as_bytes()).map_err(|cause| Error::io("write", &self.path, cause))?;
        self.length.send_modify(|length| *length += line.len() as u64);
        Ok(())
    }

    /// How long it is now: who follows from here hears only what is new.
    pub(super) fn length(&self) -> u64 {
        *self.length.borrow()
    }

    /// How far the target's own events were heard.
    pub(super) fn heard(&self) -> anyhow::Result<u64> {
        let file = File::open(&self.path).map_err(|cause| Error::io("open", &self.path, cause))?;
        let mut heard = 0;
        for line in BufReader::new(file).lines() {
            let line = line.map_err(|cause| Error::io("read", &self.path, cause))?;
            let at = serde_json::from_str::<Value>(&line).ok().and_then(|event| event.get("at")?.as_u64());
            heard = at.unwrap_or(heard);
        }
        Ok(heard)
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

    /// The next whole lines; waits for them. None once nobody will add any.
    pub(crate) async fn next(&mut self) -> Option<String> {
        let from = self.position;
        let length = *self.length.wait_for(|length| *length > from).await.ok()?;
        // Small, and just written: it is in the page cache.
        let mut lines = self.read((length - from).min(PIECE_BYTES)).ok()?;
        if !lines.contains(&b'\n') {
            lines = self.read(length - from).ok()?;
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
        assert_eq!(events.heard().unwrap(), 0);
        events.add(json!({"event": "step"}), Some(17)).unwrap();
        events.add(json!({"event": "note", "message": "ours"}), None).unwrap();
        drop(events);
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"event\":\"ste").unwrap();
        let events = Events::open(&path).unwrap();
        assert_eq!(events.heard().unwrap(), 17);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let mut follower = events.follow(0).unwrap();
        let said = runtime.block_on(follower.next()).unwrap();
        assert_eq!(said.lines().count(), 2);
        let long = "x".repeat(3 * PIECE_BYTES as usize);
        events.add(json!({"event": "note", "message": long}), None).unwrap();
        events.add(json!({"event": "note"}), None).unwrap();
        let said = runtime.block_on(follower.next()).unwrap();
        assert!(said.contains(&long) && said.ends_with("\n{\"event\":\"note\"}\n"));
        drop(events);
        assert_eq!(runtime.block_on(follower.next()), None);
    }
}
