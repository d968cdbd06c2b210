//! The verb itself, in a process of its own session: no terminal and no connection can end it.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Parser as _;
use engine::Error;
use rustix::process::{Pid, Signal, kill_process, setsid};
use serde_json::json;

use super::request::{Does, EVENTS, REPOSITORY, REQUEST, Request, STATE, append};
use crate::arguments::Cli;
use crate::context::Context;
use crate::exit::{Exit, Failure};
use crate::output::Output;
use crate::restore::verbs;

/// What `agent begin` waits for.
pub(super) const STARTED: &[u8] = b"started\n";
/// How long a verb may take to clean up once it was interrupted.
const STOP_MAX: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(50);
/// Longer than anybody looks whether a verb runs.
const LOOK_MAX: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(5);

/// `agent run`.
pub(super) fn run(directory: &Path) -> anyhow::Result<Exit> {
    // A leader of its group already has no terminal either: it was started by our own `agent begin`.
    let _ = setsid();
    let _lock = lock(directory)?;
    let request = directory.join(REQUEST);
    let bytes = std::fs::read(&request).map_err(|cause| Error::io("read", &request, cause))?;
    let request: Request = serde_json::from_slice(&bytes).context("the request cannot be read")?;
    let state = directory.join(STATE);
    end_of_events(&directory.join(EVENTS))?;
    let events = append(&directory.join(EVENTS))?;
    let mut stdout = std::io::stdout();
    stdout.write_all(STARTED).and_then(|()| stdout.flush()).context("cannot answer")?;
    rustix::stdio::dup2_stdout(&events).context("cannot write events")?;
    let stands = verbs::standing(&request.session, &state);
    let exit = match stands.map(|stands| request.does(&directory.join(REPOSITORY), stands)) {
        Ok(Does::Verb(words)) => {
            let ours = ["pghydrant".into(), "--relay".into(), "--state".into(), state.into_os_string()];
            run_verb(ours.into_iter().chain(words.into_iter().map(Into::into)))
        }
        Ok(Does::Nothing(there)) => {
            let text = format!("session {} is {there} already", request.session);
            Output::relay().result(&text, &json!({"session": request.session, "state": there}));
            Exit::Done as u8
        }
        Err(error) => {
            Output::relay().error(&error);
            Failure::exit_of(&error) as u8
        }
    };
    Output::relay().exit(exit);
    events.sync_all().map_err(|cause| Error::io("sync", directory.join(EVENTS), cause))?;
    Ok(Exit::Done)
}

/// The verb, as `main` would run it; its exit code.
fn run_verb(words: impl Iterator<Item = std::ffi::OsString>) -> u8 {
    let ran = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let told = |error: anyhow::Error| {
            Output::relay().error(&error);
            Failure::exit_of(&error) as u8
        };
        let cli = match Cli::try_parse_from(words) {
            Ok(cli) => cli,
            Err(refusal) => return told(Failure::new(Exit::Usage, refusal.to_string()).into()),
        };
        let ran = Context::new(&cli.global, &cli.verb).and_then(|context| crate::dispatch(&cli.verb, &context));
        ran.map_or_else(told, |exit| exit as u8)
    }));
    ran.unwrap_or(Exit::Failed as u8)
}

/// Where the next run's events begin. A line that an earlier one was killed in is ended: it is nothing, and what follows
/// is whole.
pub(super) fn end_of_events(path: &Path) -> anyhow::Result<u64> {
    let failed = |cause| Error::io("write", path, cause);
    let mut options = OpenOptions::new();
    options.read(true).append(true).create(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    let mut file = options.open(path).map_err(failed)?;
    let length = file.metadata().map_err(failed)?.len();
    let mut last = [b'\n'];
    if length > 0 {
        file.read_exact_at(&mut last, length - 1).map_err(failed)?;
    }
    if last == *b"\n" {
        return Ok(length);
    }
    file.write_all(b"\n").map_err(failed)?;
    Ok(length + 1)
}

/// The session's lock, which ends with the process that holds it; it says which that is.
pub(super) fn lock(directory: &Path) -> anyhow::Result<File> {
    lock_in(directory, "lock", LOOK_MAX)
}

/// A lock of the session's directory. Waits a moment: who only looks holds it too.
pub(super) fn lock_in(directory: &Path, name: &str, patience: Duration) -> anyhow::Result<File> {
    let path = directory.join(name);
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    let mut file = options.open(&path).map_err(|cause| Error::io("open", &path, cause))?;
    let deadline = Instant::now() + patience;
    while file.try_lock().is_err() {
        if Instant::now() >= deadline {
            let message = format!("process {} is at work on this session", holder(&file));
            return Err(Failure::new(Exit::Failed, message).into());
        }
        std::thread::sleep(LOOK);
    }
    let written = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
    written.map_err(|cause| Error::io("write", &path, cause))?;
    Ok(file)
}

/// Whether a verb runs, and in which process.
pub(super) fn running(directory: &Path) -> anyhow::Result<Option<i32>> {
    let path = directory.join("lock");
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(cause) => return Err(Error::io("open", &path, cause).into()),
    };
    // Shared: who looks keeps nobody else from looking. 0: it has not yet said who it is.
    Ok(if file.try_lock_shared().is_ok() { None } else { Some(holder(&file).parse().unwrap_or_default()) })
}

fn holder(mut file: &File) -> String {
    let mut text = String::new();
    let _ = file.read_to_string(&mut text);
    text.trim().to_owned()
}

/// `agent stop`: as Ctrl-C would, and waits until it has ended.
pub(super) fn stop(directory: &Path) -> anyhow::Result<Exit> {
    if directory.exists() {
        // What is just being begun is stopped too.
        let _one = lock_in(directory, "begin.lock", STOP_MAX)?;
        stop_running(directory)?;
    }
    writeln!(std::io::stdout(), "stopped").context("cannot answer")?;
    Ok(Exit::Done)
}

pub(super) fn stop_running(directory: &Path) -> anyhow::Result<()> {
    let deadline = Instant::now() + STOP_MAX;
    let mut asked = None;
    while let Some(pid) = running(directory)? {
        if let (true, Some(process)) = (asked != Some(pid), Pid::from_raw(pid)) {
            // It may have ended by now.
            match kill_process(process, Signal::INT) {
                Ok(()) | Err(rustix::io::Errno::SRCH) => asked = Some(pid),
                Err(cause) => return Err(cause).context("cannot interrupt the restore"),
            }
        }
        if Instant::now() > deadline {
            return Err(Failure::new(Exit::Failed, format!("process {pid} does not end")).into());
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_line_that_a_run_was_killed_in_is_ended_before_the_next() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(EVENTS);
        assert_eq!(end_of_events(&path).unwrap(), 0);
        std::fs::write(&path, "{\"event\":\"step\"}\n{\"ev").unwrap();
        assert_eq!(end_of_events(&path).unwrap(), 22);
        assert_eq!(end_of_events(&path).unwrap(), 22);
        assert!(std::fs::read_to_string(&path).unwrap().ends_with("{\"ev\n"));
    }

    #[test]
    fn who_holds_the_lock_runs_though_it_has_not_said_who_it_is() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(running(directory.path()).unwrap(), None);
        let held = lock(directory.path()).unwrap();
        assert_eq!(running(directory.path()).unwrap(), Some(std::process::id() as i32));
        held.set_len(0).unwrap();
        assert_eq!(running(directory.path()).unwrap(), Some(0));
        drop(held);
        assert_eq!(running(directory.path()).unwrap(), None);
    }

    #[test]
    fn who_only_looks_keeps_nobody_from_beginning() {
        let directory = tempfile::tempdir().unwrap();
        drop(lock(directory.path()).unwrap());
        let looks = File::open(directory.path().join("lock")).unwrap();
        looks.lock_shared().unwrap();
        assert!(lock_in(directory.path(), "lock", Duration::ZERO).is_err());
        let waits = std::thread::spawn({
            let directory = directory.path().to_owned();
            move || lock_in(&directory, "lock", Duration::from_secs(60)).is_ok()
        });
        drop(looks);
        assert!(waits.join().unwrap());
    }
}
