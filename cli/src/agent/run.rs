//! The verb itself, in a process of its own session: no terminal and no connection can end it.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Parser as _;
use engine::Error;
use rustix::process::{Pid, Signal, kill_process, setsid};

use super::request::{EVENTS, REPOSITORY, REQUEST, Request, STATE, append};
use crate::arguments::Cli;
use crate::context::Context;
use crate::exit::{Exit, Failure};
use crate::output::Output;

/// What `agent begin` waits for.
pub(super) const STARTED: &[u8] = b"started\n";
/// How long a verb may take to clean up once it was interrupted.
const STOP_MAX: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(50);

/// `agent run`.
pub(super) fn run(directory: &Path) -> anyhow::Result<Exit> {
    // A leader of its group already has no terminal either: it was started by our own `agent begin`.
    let _ = setsid();
    let _lock = lock(directory)?;
    let request = directory.join(REQUEST);
    let bytes = std::fs::read(&request).map_err(|cause| Error::io("read", &request, cause))?;
    let request: Request = serde_json::from_slice(&bytes).context("the request cannot be read")?;
    let state = directory.join(STATE);
    let journal = state.join("sessions").join(format!("{}.json", request.session));
    let words = request.words(&directory.join(REPOSITORY), journal.exists());
    let events = append(&directory.join(EVENTS))?;
    let mut stdout = std::io::stdout();
    stdout.write_all(STARTED).and_then(|()| stdout.flush()).context("cannot answer")?;
    rustix::stdio::dup2_stdout(&events).context("cannot write events")?;
    let ours = ["pghydrant".into(), "--relay".into(), "--state".into(), state.into_os_string()];
    let exit = run_verb(ours.into_iter().chain(words.into_iter().map(Into::into)));
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

/// The session's lock, which ends with the process that holds it; it says which that is.
pub(super) fn lock(directory: &Path) -> anyhow::Result<File> {
    let path = directory.join("lock");
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    let mut file = options.open(&path).map_err(|cause| Error::io("open", &path, cause))?;
    if file.try_lock().is_err() {
        return Err(Failure::new(Exit::Failed, format!("process {} is at work on this session", holder(&file))).into());
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
    // Shared: who looks keeps nobody else from looking.
    Ok(if file.try_lock_shared().is_ok() { None } else { holder(&file).parse().ok() })
}

fn holder(mut file: &File) -> String {
    let mut text = String::new();
    let _ = file.read_to_string(&mut text);
    text.trim().to_owned()
}

/// `agent stop`: as Ctrl-C would, and waits until it has ended.
pub(super) fn stop(directory: &Path) -> anyhow::Result<Exit> {
    let deadline = Instant::now() + STOP_MAX;
    let mut asked = false;
    while let Some(pid) = running(directory)? {
        if let (false, Some(pid)) = (asked, Pid::from_raw(pid)) {
            kill_process(pid, Signal::INT).context("cannot interrupt the restore")?;
            asked = true;
        }
        if Instant::now() > deadline {
            return Err(Failure::new(Exit::Failed, format!("process {pid} does not end")).into());
        }
        std::thread::sleep(POLL);
    }
    writeln!(std::io::stdout(), "stopped").context("cannot answer")?;
    Ok(Exit::Done)
}
