//! Starting, watching, promoting and stopping an instance, as its owner.
//!
//! `pg_ctl` does the work, but never the waiting: `pg_ctl -w` gives up after a minute, and a recovery takes as long as
//! it takes. So everything is started with `-W` and watched here, by `postmaster.pid`, the process itself, and the log.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::binaries::Binaries;
use super::owner::Owner;
use super::postmaster::{self, PostmasterFile, Status};
use super::{control, log};

/// Between two looks at a server that starts or stops: a look is a file and a signal, and the user waits.
const POLL: Duration = Duration::from_millis(2);
/// `pg_ctl start -W` returns before the postmaster has written its file; a server that is not there by then has ended.
const APPEAR_TIMEOUT: Duration = Duration::from_secs(60);

/// How an instance is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StopMode {
    /// Sessions are ended, a checkpoint is written.
    Fast,
    /// At once; the next start recovers.
    Immediate,
}

impl StopMode {
    const fn name(self) -> &'static str {
        match self {
            Self::Fast => "fast",
            Self::Immediate => "immediate",
        }
    }
}

/// What an instance is doing, seen from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Condition {
    /// No postmaster runs in the directory.
    Down,
    /// A postmaster runs; its status line says this, once it is written.
    Up(Option<Status>),
}

/// A data directory with the programs and the user that run it.
#[derive(Clone, Debug)]
pub(crate) struct Instance {
    binaries: Binaries,
    data_directory: PathBuf,
    owner: Owner,
    log: PathBuf,
    /// Where this start's part of the log begins.
    log_start: u64,
}

impl Instance {
    /// An instance in `data_directory`, started with `binaries` as `owner`; the server's first words, until it opens
    /// a log of its own, go to `log`.
    pub(crate) fn new(binaries: Binaries, data_directory: &Path, owner: Owner, log: &Path) -> Self {
        Self {
            binaries,
            data_directory: data_directory.to_owned(),
            owner,
            log: log.to_owned(),
            log_start: std::fs::metadata(log).map_or(0, |metadata| metadata.len()),
        }
    }

    /// Its data directory.
    pub(crate) fn data_directory(&self) -> &Path {
        &self.data_directory
    }

    /// Where the server's first words go.
    pub(crate) fn log(&self) -> &Path {
        &self.log
    }

    /// Starts the postmaster with `options` (`-c name=value` pairs, given as name and value) and returns once it has
    /// written `postmaster.pid`, long before it accepts connections. Nothing is returned of a server that has ended by
    /// itself before anybody looked: one that shuts down at a target which is near lives for some milliseconds.
    pub(crate) fn start(&mut self, options: &[(&str, &str)]) -> Result<Option<PostmasterFile>> {
        if let Some(running) = postmaster::running_in(&self.data_directory)? {
            bail!("a server (process {}) already runs in {}", running.pid, self.data_directory.display());
        }
        self.log_start = std::fs::metadata(&self.log).map_or(0, |metadata| metadata.len());
        let mut command = self.pg_ctl("start")?;
        command.arg("-W").arg("-l").arg(&self.log);
        if !options.is_empty() {
            command.arg("-o").arg(shell_options(options));
        }
        self.run(command, "start")?;
        let deadline = Instant::now() + APPEAR_TIMEOUT;
        loop {
            if let Some(file) = postmaster::running_in(&self.data_directory)? {
                return Ok(Some(file));
            }
            let words = self.log_since_start()?;
            // A server that failed at once has said why, and leaves no file behind.
            if let Some(reason) = log::last_failure(&words) {
                // It may have written its reason just before its file: one more look decides.
                std::thread::sleep(POLL);
                if let Some(file) = postmaster::running_in(&self.data_directory)? {
                    return Ok(Some(file));
                }
                bail!("the server in {} did not start: {reason}", self.data_directory.display());
            }
            if log::tells_of_an_end(&words) {
                return Ok(None);
            }
            if Instant::now() >= deadline {
                bail!(
                    "the server in {} did not start within {} s; its log is {}",
                    self.data_directory.display(),
                    APPEAR_TIMEOUT.as_secs(),
                    self.log.display()
                );
            }
            std::thread::sleep(POLL);
        }
    }

    /// What the instance is doing now.
    pub(crate) fn condition(&self) -> Result<Condition> {
        Ok(match postmaster::running_in(&self.data_directory)? {
            Some(file) => Condition::Up(file.status),
            None => Condition::Down,
        })
    }

    /// The control file as it is now.
    pub(crate) fn control(&self) -> Result<control::ControlFile> {
        control::read(&self.data_directory)
    }

    /// Stops the instance and returns once its process is gone; false if none ran. After `patience` a fast stop becomes
    /// an immediate one.
    pub(crate) fn stop(&self, mode: StopMode, patience: Duration) -> Result<bool> {
        let Some(file) = postmaster::running_in(&self.data_directory)? else { return Ok(false) };
        let mut mode = mode;
        loop {
            let asked = self.ask_to_stop(mode);
            let deadline = Instant::now() + patience;
            while Instant::now() < deadline {
                if !file.is_alive(&self.data_directory) {
                    return Ok(true);
                }
                std::thread::sleep(POLL);
            }
            asked?;
            if mode == StopMode::Immediate {
                bail!("process {} in {} did not end", file.pid, self.data_directory.display());
            }
            mode = StopMode::Immediate;
        }
    }

    /// Asks the server to stop, and waits for nothing.
    pub(crate) fn ask_to_stop(&self, mode: StopMode) -> Result<()> {
        let mut command = self.pg_ctl("stop")?;
        command.arg("-W").arg("-m").arg(mode.name());
        match self.run(command, "stop") {
            Err(_) if self.condition()? == Condition::Down => Ok(()),
            asked => asked,
        }
    }

    /// Asks the server to leave recovery. It does so after the record that it is replaying: watch for it.
    pub(crate) fn promote(&self) -> Result<()> {
        let mut command = self.pg_ctl("promote")?;
        command.arg("-W");
        self.run(command, "promote")
    }

    /// The log's words since the last start, at most 64 KiB.
    pub(crate) fn log_since_start(&self) -> Result<String> {
        log::tail(&self.log, self.log_start)
    }

    /// The last `FATAL` or `PANIC` since the last start, with its detail and hint.
    pub(crate) fn failure_since_start(&self) -> Result<Option<String>> {
        Ok(log::last_failure(&self.log_since_start()?))
    }

    fn pg_ctl(&self, verb: &str) -> Result<Command> {
        let mut command = self.owner.command(self.binaries.require("pg_ctl")?)?;
        command.arg(verb).arg("-D").arg(&self.data_directory).arg("-s");
        Ok(command)
    }

    fn run(&self, mut command: Command, verb: &str) -> Result<()> {
        // Not piped: the postmaster inherits these, and a pipe would stay open as long as it runs.
        let words = tempfile::tempfile().context("cannot create a temporary file")?;
        let copy = || words.try_clone().context("cannot duplicate a file descriptor");
        let status = command
            .stdin(std::process::Stdio::null())
            .stdout(copy()?)
            .stderr(copy()?)
            .status()
            .with_context(|| format!("cannot run pg_ctl {verb}"))?;
        if status.success() {
            return Ok(());
        }
        let said = read_back(words).unwrap_or_default();
        let reason = self.failure_since_start()?.unwrap_or_else(|| said.trim().to_owned());
        bail!("pg_ctl {verb} failed in {} ({status}): {reason}", self.data_directory.display());
    }
}

fn read_back(mut file: std::fs::File) -> std::io::Result<String> {
    use std::io::{Read as _, Seek as _};
    file.rewind()?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The options as `pg_ctl -o` passes them through a shell: each in single quotes.
fn shell_options(options: &[(&str, &str)]) -> String {
    let quoted = |text: String| format!("'{}'", text.replace('\'', r"'\''"));
    options
        .iter()
        .map(|(name, value)| format!("-c {}", quoted(format!("{name}={value}"))))
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_survive_the_shell() {
        let options = [("port", "5433"), ("restore_command", "cp '/a b/%f' \"%p\" $HOME")];
        assert_eq!(shell_options(&options), r#"-c 'port=5433' -c 'restore_command=cp '\''/a b/%f'\'' "%p" $HOME'"#);
    }
}
