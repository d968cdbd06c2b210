//! The program under test, as a user runs it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Finished, OsUser, Result, Run, Running, Scratch};

/// The binary in a place that the server's user can reach (a home directory is often closed), and its state there.
#[derive(Clone)]
pub struct Pghydrant {
    pub binary: PathBuf,
    pub state: PathBuf,
    user: OsUser,
    environment: Vec<(String, String)>,
    time_limit: Duration,
}

impl Pghydrant {
    /// Runs as the server's user unless [`Self::as_user`] says otherwise.
    pub fn new(scratch: &Scratch) -> Result<Self> {
        let binary = scratch.join("pghydrant");
        let built = Path::new(env!("CARGO_BIN_EXE_pghydrant"));
        // A link costs nothing; across file systems it must be a copy.
        if !binary.exists() && fs::hard_link(built, &binary).is_err() {
            // By another process: one that is forked here meanwhile would keep it open for writing, and unable to run.
            Run::new("cp").arg("--preserve=mode").arg(built).arg(&binary).succeed()?;
        }
        let state = scratch.join("state");
        if !state.exists() {
            scratch.directory("state")?;
        }
        let user = OsUser::server().clone();
        Ok(Self { binary, state, user, environment: Vec::new(), time_limit: super::process::TIME_LIMIT })
    }

    /// With a state of its own: root refuses to act upon another user's.
    pub fn as_user(&self, user: &OsUser) -> Self {
        let name = if user.uid == OsUser::server().uid { "state" } else { "own-state" };
        Self { user: user.clone(), state: self.state.with_file_name(name), ..self.clone() }
    }

    pub fn env(&self, name: &str, value: impl Into<String>) -> Self {
        let mut other = self.clone();
        other.environment.push((name.to_owned(), value.into()));
        other
    }

    pub fn time_limit(&self, time_limit: Duration) -> Self {
        Self { time_limit, ..self.clone() }
    }

    /// A command about to run: `pghydrant.command(["list", "--repo", repo])`.
    pub fn command<A: AsRef<std::ffi::OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Run {
        self.command_of(&self.binary).args(arguments)
    }

    /// The same for `program`, which runs the binary.
    pub fn command_of(&self, program: impl AsRef<std::ffi::OsStr>) -> Run {
        let run = Run::new(program)
            .user(&self.user)
            .env("PGHYDRANT_STATE", &self.state)
            // A mount that is left behind is seen where the test looks for it.
            .env("PGHYDRANT_MOUNT_DIR", self.state.with_file_name("mounts"))
            .env("RUST_BACKTRACE", "1")
            .env_remove("PGHYDRANT_REPO")
            .env_remove("PGHYDRANT_CLUSTER")
            .time_limit(self.time_limit);
        self.environment.iter().fold(run, |run, (name, value)| run.env(name, value))
    }

    /// Runs it to its end, whatever its exit code.
    pub fn run<A: AsRef<std::ffi::OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Result<Finished> {
        self.command(arguments).finish()
    }

    /// Runs it; another exit code than 0 is an error that shows everything.
    pub fn succeed<A: AsRef<std::ffi::OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Result<Finished> {
        self.command(arguments).succeed()
    }

    /// Runs it; it must fail with `code`, one `error:` line that has every one of `parts`, and no panic.
    pub fn fail<A: AsRef<std::ffi::OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = A>,
        code: i32,
        parts: &[&str],
    ) -> Result<Finished> {
        let finished = self.run(arguments)?.expect_code(code)?.expect_stderr(parts)?;
        super::ensure!(!finished.stderr.contains("panicked"), "a panic\n{finished}");
        Ok(finished)
    }

    pub fn start<A: AsRef<std::ffi::OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Result<Running> {
        self.command(arguments).start()
    }
}
