//! What a verb says, to whoever is connected: the file of its events, from an offset on, as it grows.
//!
//! Lines of our own are no part of the file: `alive`, so that a connection that is dead is found out by both sides, and
//! `gone`, where the verb was killed before it could say how it ended.

use std::fs::File;
use std::io::{BufRead as _, BufReader, ErrorKind, Seek as _, SeekFrom, Write as _};
use std::path::Path;
use std::time::{Duration, Instant};

use engine::Error;

use super::request::EVENTS;
use super::run;
use crate::exit::Exit;

/// Between two looks at the file.
const POLL: Duration = Duration::from_millis(20);
/// Between two signs of life.
const ALIVE: Duration = Duration::from_secs(2);

/// `agent follow`. Ends with the run, or when nobody listens any more.
pub(super) fn follow(directory: &Path, from: u64) -> anyhow::Result<Exit> {
    let path = directory.join(EVENTS);
    let failed = |cause| Error::io("read", &path, cause);
    let mut events = BufReader::new(File::open(&path).map_err(failed)?);
    events.seek(SeekFrom::Start(from)).map_err(failed)?;
    let mut stdout = std::io::stdout().lock();
    let mut said = Instant::now();
    let mut line = Vec::new();
    loop {
        // In this order: what was said before it was seen to be gone has been read.
        let runs = run::running(directory)?.is_some();
        let mut ended = false;
        while events.read_until(b'\n', &mut line).map_err(failed)? > 0 {
            if line.last() != Some(&b'\n') {
                break;
            }
            ended = is_exit(&line);
            if !listened(stdout.write_all(&line))? {
                return Ok(Exit::Done);
            }
            line.clear();
            said = Instant::now();
        }
        if !runs {
            // A run that ended has said so last; what stands behind an earlier end is of a later run.
            if !ended && !ends_with_exit(&path)? {
                listened(stdout.write_all(b"{\"event\":\"gone\"}\n"))?;
            }
            listened(stdout.flush())?;
            return Ok(Exit::Done);
        }
        if said.elapsed() >= ALIVE {
            said = Instant::now();
            if !listened(stdout.write_all(b"{\"event\":\"alive\"}\n"))? {
                return Ok(Exit::Done);
            }
        }
        if !listened(stdout.flush())? {
            return Ok(Exit::Done);
        }
        std::thread::sleep(POLL);
    }
}

fn is_exit(line: &[u8]) -> bool {
    let event: Option<serde_json::Value> = serde_json::from_slice(line).ok();
    event.is_some_and(|event| event.get("event").and_then(serde_json::Value::as_str) == Some("exit"))
}

/// Whether the last thing that was said is how it ended.
fn ends_with_exit(path: &Path) -> anyhow::Result<bool> {
    let text = std::fs::read(path).map_err(|cause| Error::io("read", path, cause))?;
    let last = text.strip_suffix(b"\n").and_then(|text| text.rsplit(|byte| *byte == b'\n').next());
    Ok(last.is_some_and(is_exit))
}

/// False where the connection is gone.
fn listened(written: std::io::Result<()>) -> anyhow::Result<bool> {
    match written {
        Ok(()) => Ok(true),
        Err(cause) if cause.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(cause) => Err(Error::io("write to", "stdout", cause).into()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_run_that_was_killed_has_not_said_how_it_ended() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(EVENTS);
        for (text, ended) in [
            ("", false),
            ("{\"event\":\"note\",\"message\":\"exit\"}\n", false),
            ("{\"event\":\"exit\",\"code\":0}\n{\"event\":\"st", false),
            ("{\"event\":\"exit\",\"code\":0}\n{\"event\":\"step\"}\n", false),
            ("{\"event\":\"step\"}\n{\"code\":6,\"event\":\"exit\"}\n", true),
        ] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(ends_with_exit(&path).unwrap(), ended, "{text}");
        }
    }
}
