//! Processes with an end: every one has a time limit, and is killed with its group when its guard goes.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Seek};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

use super::{Context, OsUser, Result, bail, ensure};

/// No test waits longer for one command unless it says so.
pub const TIME_LIMIT: Duration = Duration::from_secs(180);
/// How often a process is looked at.
const POLL: Duration = Duration::from_millis(10);

/// A command about to run. Output goes to unnamed files: a server that a command starts cannot hold a pipe open.
pub struct Run {
    command: Command,
    time_limit: Duration,
}

impl Run {
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        let mut command = Command::new(program);
        command.stdin(Stdio::null()).process_group(0).current_dir("/");
        Self { command, time_limit: TIME_LIMIT }
    }

    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.command.arg(argument);
        self
    }

    pub fn args<A: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.command.args(arguments);
        self
    }

    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    pub fn env_remove(mut self, name: &str) -> Self {
        self.command.env_remove(name);
        self
    }

    pub fn current_dir(mut self, directory: impl AsRef<Path>) -> Self {
        self.command.current_dir(directory);
        self
    }

    /// Runs as `user`; only root may name another than itself.
    pub fn user(mut self, user: &OsUser) -> Self {
        if user.uid != rustix::process::getuid().as_raw() {
            self.command
                .uid(user.uid)
                .gid(user.gid)
                .env("USER", &user.name)
                .env("LOGNAME", &user.name)
                .env("HOME", "/");
        }
        self
    }

    pub fn time_limit(mut self, limit: Duration) -> Self {
        self.time_limit = limit;
        self
    }

    pub fn start(mut self) -> Result<Running> {
        let shown = self.to_string();
        let unnamed = || tempfile::tempfile().context("cannot make a file for a command's output");
        let (stdout, stderr) = (unnamed()?, unnamed()?);
        self.command.stdout(stdout.try_clone()?).stderr(stderr.try_clone()?);
        let child = self.command.spawn().with_context(|| format!("cannot start {shown}"))?;
        Ok(Running { shown, child, stdout, stderr, started: Instant::now(), time_limit: self.time_limit, ended: None })
    }

    /// Runs it to its end, whatever its exit code.
    pub fn finish(self) -> Result<Finished> {
        self.start()?.wait()
    }

    /// Runs it; an exit code other than 0 is an error that shows everything.
    pub fn succeed(self) -> Result<Finished> {
        self.finish()?.expect_code(0)
    }
}

impl std::fmt::Display for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.command.get_program().display())?;
        self.command.get_args().try_for_each(|argument| write!(f, " {}", argument.display()))
    }
}

/// A process under way; killed with its whole group when dropped.
pub struct Running {
    shown: String,
    child: Child,
    stdout: File,
    stderr: File,
    started: Instant,
    time_limit: Duration,
    ended: Option<ExitStatus>,
}

impl Running {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn group(&self) -> Option<Pid> {
        i32::try_from(self.child.id()).ok().and_then(Pid::from_raw)
    }

    /// `None` while it runs.
    pub fn try_status(&mut self) -> Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait()?;
        }
        Ok(self.ended)
    }

    /// Sends a signal to the process alone, as a user's `kill` does.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = self.group().context("no process")?;
        rustix::process::kill_process(pid, signal).with_context(|| format!("cannot signal {}", self.shown))
    }

    /// `kill -9` of the process alone, reaped.
    pub fn kill(mut self) -> Result<Finished> {
        if self.try_status()?.is_none() {
            self.signal(Signal::KILL)?;
        }
        self.wait()
    }

    /// What it has written to stderr until now.
    pub fn stderr_so_far(&self) -> Result<String> {
        read_all(&self.stderr)
    }

    /// What it has written to stdout until now.
    pub fn stdout_so_far(&self) -> Result<String> {
        read_all(&self.stdout)
    }

    /// Waits until `condition` holds for what it wrote to stderr and stdout; an error when it ends or takes too long first.
    pub fn wait_for_output(&mut self, what: &str, condition: impl Fn(&str) -> bool) -> Result<()> {
        loop {
            let ended = self.try_status()?.is_some();
            let seen = format!("{}{}", self.stderr_so_far()?, self.stdout_so_far()?);
            if condition(&seen) {
                return Ok(());
            }
            ensure!(!ended, "{} ended before {what}:\n{seen}", self.shown);
            ensure!(self.started.elapsed() < self.time_limit, "{}: no {what} in time:\n{seen}", self.shown);
            thread::sleep(POLL);
        }
    }

    /// Waits for its end; over the time limit it is killed with its group, and that is an error.
    pub fn wait(mut self) -> Result<Finished> {
        let status = loop {
            if let Some(status) = self.try_status()? {
                break status;
            }
            if self.started.elapsed() > self.time_limit {
                self.kill_group();
                let (stdout, stderr) = (self.stdout_so_far()?, self.stderr_so_far()?);
                bail!("{} took longer than {:?}\nstdout:\n{stdout}\nstderr:\n{stderr}", self.shown, self.time_limit);
            }
            thread::sleep(POLL);
        };
        Ok(Finished {
            shown: self.shown.clone(),
            code: status.code(),
            signal: status.signal(),
            stdout: self.stdout_so_far()?,
            stderr: self.stderr_so_far()?,
            took: self.started.elapsed(),
        })
    }

    fn kill_group(&mut self) {
        if let Some(group) = self.group() {
            let _ = kill_process_group(group, Signal::KILL);
        }
        self.ended = self.child.wait().ok();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.ended.is_none() {
            self.kill_group();
        }
    }
}

fn read_all(file: &File) -> Result<String> {
    // A file of its own offset: the child's writes go on at theirs.
    let mut file = File::open(PathBuf::from(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file))))?;
    file.rewind()?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// A process that has ended.
#[derive(Debug)]
pub struct Finished {
    pub shown: String,
    pub code: Option<i32>,
    pub signal: Option<i32>,
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
}

impl Finished {
    /// An error that shows everything unless the exit code is `code`.
    pub fn expect_code(self, code: i32) -> Result<Self> {
        ensure!(self.code == Some(code), "expected exit code {code}\n{self}");
        Ok(self)
    }

    /// An error unless stderr has every one of `parts`.
    pub fn expect_stderr(self, parts: &[&str]) -> Result<Self> {
        for part in parts {
            ensure!(self.stderr.contains(part), "expected \"{part}\" in stderr\n{self}");
        }
        Ok(self)
    }

    /// Stdout's lines as JSON objects (`--json`).
    pub fn json_lines(&self) -> Result<Vec<serde_json::Value>> {
        let parse = |line: &str| serde_json::from_str(line).with_context(|| format!("not JSON: {line}\n{self}"));
        self.stdout.lines().filter(|line| !line.trim().is_empty()).map(parse).collect()
    }

    /// The last JSON object of stdout: a command's result.
    pub fn json(&self) -> Result<serde_json::Value> {
        self.json_lines()?.pop().with_context(|| format!("no JSON on stdout\n{self}"))
    }
}

impl std::fmt::Display for Finished {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { shown, code, signal, stdout, stderr, took } = self;
        writeln!(f, "{shown}\nexit code {code:?}, signal {signal:?}, after {took:?}")?;
        write!(f, "stdout:\n{stdout}\nstderr:\n{stderr}")
    }
}

/// Looks at `condition` until it holds; an error that names `what` when it does not in time.
pub fn wait_until(what: &str, limit: Duration, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let started = Instant::now();
    loop {
        // Before the look: whoever slept past the limit looks once more.
        let late = started.elapsed() >= limit;
        if condition()? {
            return Ok(());
        }
        ensure!(!late, "{what}: not within {limit:?}");
        thread::sleep(POLL);
    }
}
