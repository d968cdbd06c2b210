//! Starting a FUSE server, and waiting until its mount answers.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use engine::Error;
use fusefs::table;
use rustix::process::Pid;

use super::protocol::{Answer, Request, receive, send};
use crate::exit::{Exit, Failure};

/// How much of the end of a log goes into an error.
const LAST_WORDS_BYTES: u64 = 2048;
const TOKEN_BYTES: usize = 16;
/// How long a server that was killed may take to end.
const KILLED_WAIT: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(2);

/// A server process, child of this one.
#[derive(Debug)]
pub(super) struct Server {
    child: Child,
    /// Its end is the server's sign that we are gone.
    stdin: Option<ChildStdin>,
    log: PathBuf,
}

impl Server {
    /// Starts a server and waits until the mount answers, or until the server has said why not.
    pub(super) fn start(request: &Request, log: &Path) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("cannot find this program's file")?;
        let mut child = Command::new(&program)
            .arg("fuse-server")
            .arg(&request.mountpoint)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(create_log(log)?)
            .spawn()
            .map_err(|cause| Error::io("run", &program, cause))?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let mut server = Self { child, stdin, log: log.to_owned() };
        let answer = match (&mut server.stdin, stdout) {
            // A server that is gone already is told apart by its missing answer.
            (Some(stdin), Some(stdout)) => {
                send(stdin, request).ok().and_then(|()| receive(BufReader::new(stdout)).ok())
            }
            _ => None,
        };
        match answer.flatten().map(Answer::into_result) {
            Some(Ok(())) => {}
            Some(Err(refusal)) => {
                server.end(Duration::from_secs(2));
                return Err(refusal.into());
            }
            None => return Err(server.died()),
        }
        if let Err(error) = table::prove(&request.mountpoint, &request.token) {
            server.end(Duration::ZERO);
            return Err(error.into());
        }
        Ok(server)
    }

    /// Leaves the server to itself: it outlives this process.
    pub(super) fn leave(self) {}

    /// Where the server logs.
    pub(super) fn log(&self) -> &Path {
        &self.log
    }

    /// Its process.
    pub(super) fn pid(&self) -> Option<Pid> {
        i32::try_from(self.child.id()).ok().and_then(Pid::from_raw)
    }

    /// Tells the server that we are done, and ends it if it has not ended by itself after `patience`. Nothing if it cannot
    /// be ended: it waits for a disk, and ends when that answers.
    pub(super) fn end(&mut self, patience: Duration) -> Option<ExitStatus> {
        self.stdin = None;
        self.ended_within(patience).or_else(|| {
            // It is ours and was not waited for, so its number stands for nobody else.
            let _ = self.child.kill();
            self.ended_within(KILLED_WAIT)
        })
    }

    fn ended_within(&mut self, patience: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + patience;
        loop {
            match self.child.try_wait() {
                Ok(None) if Instant::now() < deadline => std::thread::sleep(POLL),
                Ok(status) => return status,
                Err(_) => return None,
            }
        }
    }

    fn died(&mut self) -> anyhow::Error {
        let how =
            self.end(Duration::from_secs(2)).map_or_else(|| "unknown status".to_owned(), |status| status.to_string());
        let failure = Failure::new(Exit::Failed, format!("the FUSE server ended before it answered ({how})"));
        match last_words(&self.log) {
            Some(words) => failure.hint(format!("its last words in {}: {words}", self.log.display())),
            None => failure,
        }
        .into()
    }
}

/// The end of a log.
pub(super) fn last_words(log: &Path) -> Option<String> {
    let mut file = File::open(log).ok()?;
    let bytes = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(bytes.saturating_sub(LAST_WORDS_BYTES))).ok()?;
    let mut words = Vec::new();
    file.take(LAST_WORDS_BYTES).read_to_end(&mut words).ok()?;
    let words = String::from_utf8_lossy(&words).trim().to_owned();
    (!words.is_empty()).then_some(words)
}

/// A log's file name: the mountpoint's, as one component.
pub(super) fn log_name(mountpoint: &Path) -> String {
    let plain = |letter: char| if letter.is_ascii_alphanumeric() || "-_.".contains(letter) { letter } else { '-' };
    let name: String = mountpoint.to_string_lossy().trim_matches('/').chars().map(plain).collect();
    format!("{}.log", name.get(name.len().saturating_sub(128)..).unwrap_or(&name))
}

/// 128 random bits, in hex.
pub(super) fn new_token() -> engine::Result<String> {
    let path = "/dev/urandom";
    let mut bytes = [0; TOKEN_BYTES];
    let mut file = File::open(path).map_err(|cause| Error::io("open", path, cause))?;
    file.read_exact(&mut bytes).map_err(|cause| Error::io("read", path, cause))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn create_log(log: &Path) -> engine::Result<File> {
    if let Some(directory) = log.parent() {
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o750).create(directory);
        made.map_err(|cause| Error::io("create", directory, cause))?;
    }
    let file = File::options().create(true).write(true).truncate(true).mode(0o640).open(log);
    file.map_err(|cause| Error::io("create", log, cause))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_log_is_named_after_its_mountpoint() {
        assert_eq!(log_name(Path::new("/mnt/my backup")), "mnt-my-backup.log");
    }

    #[test]
    fn no_two_tokens_are_the_same() {
        let (one, other) = (new_token().unwrap(), new_token().unwrap());
        assert_eq!(one.len(), 2 * TOKEN_BYTES);
        assert_ne!(one, other);
    }
}
