//! The demo's directory, the servers in it, and the commands that run there.
//!
//! As root there are two parts, and the servers' user is not to be trusted with root's: the directory, the program and
//! the settings in it are the caller's, as are the restore's sessions and mounts; the servers' user has directories in
//! it, made beforehand, and what is written into these is written as that user.
//!
//! Always true: whatever is started here is stopped by [`Playground::clear`], which also runs when the playground is
//! dropped on the way out of a failure.

use std::ffi::OsStr;
use std::io::Write as _;
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process_group};

use crate::context::Context;
use crate::exit::{Exit, Failure};
use crate::postgres::binaries::Binaries;
use crate::postgres::owner::Owner;
use crate::trust;

/// How often a command is looked at.
const POLL: Duration = Duration::from_millis(20);
/// A command that was interrupted has this long to clean up behind itself.
const GRACE: Duration = Duration::from_secs(15);
/// The archiver has this long for the last segment.
const ARCHIVE_TIMEOUT: Duration = Duration::from_secs(60);
/// `sun_path` of a Unix socket, without the final zero.
const SOCKET_PATH_BYTES_MAX: usize = 107;
/// The servers' first words.
const LOGS: &str = "logs";
/// Users that may run the servers when we are root, in the order of preference.
const OWNERS: [&str; 2] = ["postgres", "nobody"];

/// A directory with everything of one demo.
pub(super) struct Playground<'c> {
    context: &'c Context,
    directory: PathBuf,
    /// Removed at the end; `None` with `--keep`.
    temporary: Option<tempfile::TempDir>,
    owner: Owner,
    binaries: Binaries,
    program: PathBuf,
    cleared: bool,
}

impl<'c> Playground<'c> {
    /// Makes the directory, with a copy of our own program (a home directory is often closed to the servers' user) and
    /// a `pghydrant.toml` that the commands find because they run there.
    pub(super) fn prepare(keep: Option<&Path>, binaries: Binaries, context: &'c Context) -> Result<Self> {
        let owner = server_owner()?;
        let (directory, temporary) = match keep {
            Some(directory) => (empty_directory(directory)?, None),
            None => {
                // On disk, where /tmp may be memory.
                let made = tempfile::Builder::new().prefix("pghydrant-demo-").tempdir_in("/var/tmp");
                let made = made.map_err(|cause| engine::Error::io("make a directory in", "/var/tmp", cause))?;
                (made.path().to_owned(), Some(made))
            }
        };
        let program = directory.join("pghydrant");
        let playground = Self { context, directory, temporary, owner, binaries, program, cleared: false };
        playground.furnish()?;
        Ok(playground)
    }

    fn furnish(&self) -> Result<()> {
        let socket = self.directory.join("sockets/.s.PGSQL.65535");
        if socket.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
            let message = format!("{} is too long a path for a server's socket", self.directory.display());
            return Err(Failure::new(Exit::Refused, message).hint("choose a shorter one for --keep").into());
        }
        set_mode(&self.directory, 0o755)?;
        let own = env::current_exe().context("cannot find this program's own file")?;
        fs::copy(&own, &self.program).map_err(|cause| engine::Error::io("copy", &own, cause))?;
        set_mode(&self.program, 0o755)?;
        for (name, mode) in [("state", 0o700), ("mount", 0o755)] {
            self.directory(name, mode)?;
        }
        for name in ["sockets", "repository", LOGS] {
            self.owned_directory(name)?;
        }
        let text = format!(
            "repo = \"{0}/repository\"\ncluster = \"demo\"\nstate = \"{0}/state\"\nmount_dir = \"{0}/mount\"\npg_bin = \"{1}\"\n",
            self.directory.display(),
            self.binaries.directory().display()
        );
        let settings = self.directory.join("pghydrant.toml");
        fs::write(&settings, &text).map_err(|cause| engine::Error::io("write", &settings, cause))?;
        set_mode(&settings, 0o644)?;
        self.note(&format!("{}:\n{}", settings.display(), indented(&text)));
        Ok(())
    }

    pub(super) fn note(&self, text: &str) {
        self.context.output.note(text);
    }

    /// A new directory of the servers' user.
    pub(super) fn owned_directory(&self, name: &str) -> Result<PathBuf> {
        let path = self.directory(name, 0o700)?;
        chown(&path, Some(self.owner.uid), Some(self.owner.gid))
            .map_err(|cause| engine::Error::io("give away", &path, cause))?;
        Ok(path)
    }

    /// A new directory of the caller's.
    fn directory(&self, name: &str, mode: u32) -> Result<PathBuf> {
        let path = self.directory.join(name);
        fs::create_dir(&path).map_err(|cause| engine::Error::io("make", &path, cause))?;
        set_mode(&path, mode)?;
        Ok(path)
    }

    /// The line of `postgresql.conf` that archives with our own `wal push`.
    pub(super) fn archive_command(&self) -> String {
        let (program, repository) = (self.program.display(), self.directory.join("repository"));
        format!("archive_command = '{program} wal push --repo {} --cluster demo %p'", repository.display())
    }

    /// Why a restore cannot go through a mount here, if it cannot.
    pub(super) fn fuse_is_missing(&self) -> Option<String> {
        crate::doctor::fuse_is_missing()
    }

    /// Waits, unless the user has had enough.
    pub(super) fn pause(&self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.refuse_when_interrupted()?;
            thread::sleep(POLL);
        }
        Ok(())
    }

    fn refuse_when_interrupted(&self) -> Result<()> {
        if self.context.interrupted() {
            return Err(Failure::new(Exit::Interrupted, "interrupted").into());
        }
        Ok(())
    }

    /// Runs one of our verbs as the servers' user, its words going where ours go.
    pub(super) fn pghydrant_as_owner(&self, arguments: &[&str]) -> Result<()> {
        self.pghydrant(self.owner.command(&self.program)?, arguments)
    }

    /// Runs one of our verbs as whoever runs the demo.
    pub(super) fn pghydrant_as_caller(&self, arguments: &[&str]) -> Result<()> {
        let mut arguments = arguments.to_vec();
        if !self.owner.is_current() {
            arguments.extend(["--os-user", &self.owner.name]);
        }
        self.pghydrant(Command::new(&self.program), &arguments)
    }

    fn pghydrant(&self, mut command: Command, arguments: &[&str]) -> Result<()> {
        self.note(&format!(
            "\n$ pghydrant {}",
            arguments.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ")
        ));
        command.args(arguments).current_dir(&self.directory).stdin(Stdio::null());
        for (name, _) in env::vars_os() {
            if name.to_str().is_some_and(|name| name.starts_with("PGHYDRANT_") && name != "PGHYDRANT_LOG") {
                command.env_remove(name);
            }
        }
        let mut child = start(&mut command)?;
        let status = self.wait(&mut child)?;
        if status.success() {
            return Ok(());
        }
        // Its own words stand above; its exit code becomes ours where it is one of ours.
        let exit = match status.code() {
            Some(3) => Exit::Refused,
            Some(4) => Exit::Corrupt,
            Some(5) => Exit::Recovery,
            _ => Exit::Failed,
        };
        let verb = arguments.first().copied().unwrap_or_default();
        Err(Failure::new(exit, format!("pghydrant {verb} ended with {status}")).into())
    }

    /// Runs a program of PostgreSQL quietly; its words are in the error if it fails.
    fn postgres(&self, program: &str, arguments: &[&OsStr]) -> Result<String> {
        let mut command = self.owner.command(self.binaries.require(program)?)?;
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = start(&mut command)?;
        let output = self.wait_with_output(child)?;
        if !output.status.success() {
            let said = [output.stderr, output.stdout].concat();
            bail!("{program} failed: {}", String::from_utf8_lossy(&said).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
    }

    fn wait(&self, child: &mut Child) -> Result<std::process::ExitStatus> {
        let mut asked: Option<Instant> = None;
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            match asked {
                None if self.context.interrupted() => {
                    signal_group(child, Signal::INT);
                    asked = Some(Instant::now());
                }
                Some(since) if since.elapsed() > GRACE => signal_group(child, Signal::KILL),
                _ => {}
            }
            thread::sleep(POLL);
        };
        self.refuse_when_interrupted()?;
        Ok(status)
    }

    fn wait_with_output(&self, child: Child) -> Result<Output> {
        // A thread drains the pipes; this one watches for Ctrl-C.
        let group = child.id();
        let reader = thread::spawn(move || child.wait_with_output());
        let mut asked = false;
        while !reader.is_finished() {
            if self.context.interrupted() && !asked {
                signal_group_of(group, Signal::INT);
                asked = true;
            }
            thread::sleep(POLL);
        }
        self.refuse_when_interrupted()?;
        match reader.join() {
            Ok(output) => Ok(output?),
            Err(_) => bail!("the thread that reads a command's output panicked"),
        }
    }

    /// A port that nobody listens on, and the place of a server that does not exist yet.
    pub(super) fn server_at(&self, name: &str) -> Result<Server<'_>> {
        let port = TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr());
        let port = port.context("cannot find a free port")?.port();
        Ok(Server { playground: self, data_directory: self.directory.join(name), port })
    }

    /// A new cluster with page checksums, started.
    pub(super) fn make_server(&self, name: &str, settings: &[&str]) -> Result<Server<'_>> {
        let server = self.server_at(name)?;
        self.owned_directory(name)?;
        self.note(&format!("\n$ initdb --data-checksums {name}; pg_ctl start; pgbench --initialize"));
        let options = ["-k", "-A", "trust", "-U", "postgres", "--no-sync", "-E", "UTF8", "--locale=C", "-D"];
        let options: Vec<&OsStr> = options.iter().map(OsStr::new).chain([server.data_directory.as_os_str()]).collect();
        self.postgres("initdb", &options)?;
        let sockets = self.directory.join("sockets");
        let mut text = format!("port = {}\nunix_socket_directories = '{}'\n", server.port, sockets.display());
        text.push_str("listen_addresses = ''\narchive_mode = on\nmax_wal_size = 1GB\n");
        settings.iter().for_each(|line| text = format!("{text}{line}\n"));
        self.append_as_owner(&server.data_directory.join("postgresql.conf"), &text)?;
        server.pg_ctl(&["start", "-w"])?;
        Ok(server)
    }

    /// The file is the servers' user's, who may have put anything in its place.
    fn append_as_owner(&self, path: &Path, text: &str) -> Result<()> {
        let mut command = self.owner.command("tee")?;
        command.arg("-a").arg(path).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = start(&mut command)?;
        // What it could not write, it says at its end.
        let written = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(text.as_bytes()));
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("cannot write {}: {}", path.display(), String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(written?)
    }

    /// Stops the servers, takes mounts away, removes the directory. What cannot be done is said, and the rest goes on.
    pub(super) fn clear(&mut self) {
        if std::mem::replace(&mut self.cleared, true) {
            return;
        }
        for name in ["original", "restored"] {
            let data_directory = self.directory.join(name);
            if data_directory.join("postmaster.pid").exists() {
                self.tell(self.stop_server(&data_directory));
            }
        }
        for mountpoint in mounts_below(&self.directory) {
            let mut unmount = Command::new(&self.program);
            self.tell(run_to_end(unmount.arg("unmount").arg(&mountpoint).current_dir(&self.directory)));
        }
        match self.temporary.take() {
            None => self.note(&format!("kept: {}", self.directory.display())),
            Some(directory) => {
                let path = directory.path().to_owned();
                self.tell(directory.close().map_err(|cause| engine::Error::io("remove", path, cause).into()));
            }
        }
    }

    fn stop_server(&self, data_directory: &Path) -> Result<()> {
        let mut command = self.owner.command(self.binaries.program("pg_ctl"))?;
        run_to_end(command.args(["stop", "-w", "-m", "fast", "-D"]).arg(data_directory))
    }

    fn tell(&self, outcome: Result<()>) {
        if let Err(error) = outcome {
            self.context.output.warning(&format!("while clearing up: {error:#}"));
        }
    }
}

impl Drop for Playground<'_> {
    fn drop(&mut self) {
        self.clear();
    }
}

/// A PostgreSQL server of the demo.
pub(super) struct Server<'p> {
    playground: &'p Playground<'p>,
    pub(super) data_directory: PathBuf,
    pub(super) port: u16,
}

impl Server<'_> {
    /// For `--dbname`.
    pub(super) fn connection_string(&self) -> String {
        let sockets = self.playground.directory.join("sockets");
        format!("host={} port={} user=postgres", sockets.display(), self.port)
    }

    /// The result of a statement as `psql -At` prints it.
    pub(super) fn sql(&self, statement: &str) -> Result<String> {
        let connection = format!("{} dbname=postgres", self.connection_string());
        let arguments = ["-XAtq", "-v", "ON_ERROR_STOP=1", "-d", &connection, "-c", statement];
        self.playground.postgres("psql", &arguments.map(OsStr::new))
    }

    pub(super) fn pgbench(&self, arguments: &[&str]) -> Result<()> {
        let connection = format!("{} dbname=postgres", self.connection_string());
        let arguments: Vec<&OsStr> = arguments.iter().copied().chain([connection.as_str()]).map(OsStr::new).collect();
        self.playground.postgres("pgbench", &arguments)?;
        Ok(())
    }

    /// pgbench in the background; the caller ends it with [`end_group`].
    pub(super) fn start_pgbench(&self, arguments: &[&str]) -> Result<Child> {
        let mut command = self.playground.owner.command(self.playground.binaries.require("pgbench")?)?;
        command.args(arguments).arg(format!("{} dbname=postgres", self.connection_string()));
        start(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()))
    }

    /// Ends the current segment and waits until the archiver has sent it.
    pub(super) fn archive_wal(&self) -> Result<()> {
        let segment = self.sql("SELECT pg_walfile_name(pg_switch_wal())")?;
        let end = Instant::now() + ARCHIVE_TIMEOUT;
        while self.sql(&format!("SELECT last_archived_wal >= '{segment}' FROM pg_stat_archiver"))? != "t" {
            if Instant::now() > end {
                bail!("WAL segment {segment} was not archived within {} s", ARCHIVE_TIMEOUT.as_secs());
            }
            self.playground.pause(POLL * 5)?;
        }
        Ok(())
    }

    /// Runs to its end, Ctrl-C or not: a start that was interrupted would leave a server that nobody finds yet.
    fn pg_ctl(&self, arguments: &[&str]) -> Result<()> {
        let name = self.data_directory.file_name().unwrap_or_default();
        let log = self.playground.directory.join(LOGS).join(name).with_extension("log");
        let mut command = self.playground.owner.command(self.playground.binaries.require("pg_ctl")?)?;
        command.args(arguments).arg("-D").arg(&self.data_directory).arg("-l").arg(&log);
        run_to_end(&mut command)?;
        self.playground.refuse_when_interrupted()
    }
}

/// As root, an ordinary user for the servers, which PostgreSQL insists on.
fn server_owner() -> Result<Owner> {
    if !rustix::process::geteuid().is_root() {
        return Owner::current();
    }
    let found = OWNERS.iter().find_map(|name| Owner::named(name).ok());
    let refused = || Failure::new(Exit::Refused, "PostgreSQL does not run as root, and there is no user postgres");
    Ok(found.ok_or_else(|| refused().hint("useradd --system postgres, or run the demo as an ordinary user"))?)
}

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    let set = fs::set_permissions(path, fs::Permissions::from_mode(mode));
    Ok(set.map_err(|cause| engine::Error::io("set the mode of", path, cause))?)
}

fn empty_directory(path: &Path) -> Result<PathBuf> {
    let path = std::path::absolute(path)?;
    let refuse_foreign = |path: &Path| match trust::who_rules_over(path)? {
        None => Ok(()),
        Some(why) => Err(anyhow::Error::from(
            Failure::new(Exit::Refused, format!("{why}: root runs no program below it"))
                .hint("name a directory of root's for --keep"),
        )),
    };
    refuse_foreign(&path)?;
    fs::create_dir_all(&path).map_err(|cause| engine::Error::io("make", &path, cause))?;
    // Somebody else may have been quicker, and a link may lead elsewhere by now.
    let path = path.canonicalize().map_err(|cause| engine::Error::io("resolve", &path, cause))?;
    refuse_foreign(&path)?;
    let mut entries = fs::read_dir(&path).map_err(|cause| engine::Error::io("list", &path, cause))?;
    if entries.next().is_some() {
        let message = format!("{} is not empty", path.display());
        return Err(Failure::new(Exit::Refused, message).hint("name a new directory for --keep").into());
    }
    Ok(path)
}

/// In a group of its own: a Ctrl-C reaches us first, and we end it in order.
fn start(command: &mut Command) -> Result<Child> {
    let started = command.process_group(0).spawn();
    started.with_context(|| format!("cannot start {}", command.get_program().display()))
}

fn run_to_end(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_owned();
    let output = command.process_group(0).stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("cannot start {}", program.display()))?;
    if !output.status.success() {
        bail!("{} failed: {}", program.display(), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// Ends a background command and everything it started.
pub(super) fn end_group(child: &mut Child) {
    if matches!(child.try_wait(), Ok(None)) {
        signal_group(child, Signal::INT);
        // It is ours and was told to end: this returns.
        let _ = child.wait();
    }
}

fn signal_group(child: &Child, signal: Signal) {
    signal_group_of(child.id(), signal);
}

fn signal_group_of(group: u32, signal: Signal) {
    if let Some(group) = i32::try_from(group).ok().and_then(Pid::from_raw) {
        // It may have ended meanwhile.
        let _ = kill_process_group(group, signal);
    }
}

fn mounts_below(directory: &Path) -> Vec<PathBuf> {
    let places = fusefs::table::mounts().unwrap_or_default().into_iter().map(|mount| mount.mountpoint);
    places.filter(|place| place.starts_with(directory)).collect()
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("    {line}\n")).collect::<String>().trim_end().to_owned()
}

/// As it must be typed into a shell.
fn quoted(word: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./=:,%+".contains(&byte);
    if !word.is_empty() && word.bytes().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}
