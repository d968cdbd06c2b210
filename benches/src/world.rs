//! Where the suite works, as whom, and how it starts programs; gone without a trace at the end.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use rustix::process::Signal;

use crate::options::{Options, Section};
use crate::processes;

/// What only this suite makes: a directory without it is never removed.
const MARK: &str = "pghydrant-bench";
/// How long what still runs at the end may take to stop.
const STOP_PATIENCE: Duration = Duration::from_secs(20);
const SEGMENT_BYTES: f64 = 16.0 * 1_048_576.0;
/// The data plane's own backups, one after the other.
const DATA_PLANE_BYTES: f64 = 1.1 * 1_073_741_824.0;
/// What three contestants leave in a round.
const SMALL_TARGETS_BYTES: f64 = 0.75 * 1_073_741_824.0;

/// The place, the user, the programs.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) options: Options,
    pub(crate) place: PathBuf,
    /// The server's programs.
    pub(crate) server: PathBuf,
    /// pghydrant, where the server's user may run it.
    pub(crate) program: PathBuf,
    user: Option<User>,
    interrupted: Arc<AtomicBool>,
}

#[derive(Clone, Copy, Debug)]
struct User {
    uid: u32,
    gid: u32,
}

impl World {
    pub(crate) fn new(options: &Options) -> anyhow::Result<Self> {
        let root = rustix::process::geteuid().is_root();
        ensure!(root || options.warm, "cold caches need root; --warm does without, and measures little");
        let server =
            newest_server().context("no PostgreSQL server in /usr/lib/postgresql: apt-get install postgresql")?;
        let user = if root { Some(user_named(&options.user)?) } else { None };
        processes::adopt_orphans().context("cannot become the parent of orphans")?;
        let interrupted = Arc::new(AtomicBool::new(false));
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM, signal_hook::consts::SIGHUP] {
            signal_hook::flag::register(signal, Arc::clone(&interrupted)).context("cannot handle signals")?;
        }
        let place = options.place.clone();
        if place.join(MARK).exists() {
            fs::remove_dir_all(&place).with_context(|| format!("cannot remove {} of a run before", place.display()))?;
        }
        fs::create_dir_all(&place).with_context(|| format!("cannot make {}", place.display()))?;
        let mut entries = fs::read_dir(&place).with_context(|| format!("cannot read {}", place.display()))?;
        ensure!(entries.next().is_none(), "{} is not empty", place.display());
        fs::write(place.join(MARK), "").with_context(|| format!("cannot write in {}", place.display()))?;
        let program = place.join("pghydrant");
        let world = Self { options: options.clone(), place, server, program, user, interrupted };
        world.give_to_server(&world.place)?;
        world.install_program()?;
        Ok(world)
    }

    /// The build lies where the server's user may not look.
    fn install_program(&self) -> anyhow::Result<()> {
        let beside = || Some(std::env::current_exe().ok()?.with_file_name("pghydrant"));
        let built = self.options.program.clone().or_else(beside).context("where is pghydrant? --program FILE")?;
        fs::copy(&built, &self.program).with_context(|| format!("cannot copy {}: make build", built.display()))?;
        Ok(())
    }

    /// Tells what is needed and what is there, and refuses too little.
    pub(crate) fn check_space(&self) -> anyhow::Result<()> {
        let needed = self.needed_bytes();
        let stat =
            rustix::fs::statvfs(&self.place).with_context(|| format!("cannot look at {}", self.place.display()))?;
        let free = stat.f_bavail * stat.f_frsize;
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        eprintln!("{}: {:.1} GiB needed at most, {:.1} GiB free", self.place.display(), gib(needed), gib(free));
        ensure!(free >= needed, "too little space: a smaller --size, fewer --codecs or another --place");
        Ok(())
    }

    /// Cluster, target and tar file; a repository of ours and one of pgBackRest for each compression; a base backup and
    /// the archives; targets of small files, which are kept until all rounds are over.
    fn needed_bytes(&self) -> u64 {
        let size = self.options.bytes() as f64;
        let codecs: f64 = self.options.codecs.iter().map(|codec| 2.0 * codec.share()).sum();
        let wants = |section, share: f64| if self.options.wants(section) { share } else { 0.0 };
        let segments = wants(Section::Wal, f64::from(self.options.segments) * SEGMENT_BYTES * 4.0);
        let extra = wants(Section::Wal, 1.0).max(wants(Section::Reflink, 1.1)).max(wants(Section::Delta, 0.5));
        let small = wants(Section::Small, SMALL_TARGETS_BYTES * f64::from(self.options.rounds));
        let plane = wants(Section::Network, DATA_PLANE_BYTES);
        (size * (3.0 + codecs + extra) + segments + small.max(plane)) as u64 + (1 << 30)
    }

    pub(crate) fn is_interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }

    pub(crate) fn check_interrupt(&self) -> anyhow::Result<()> {
        if self.is_interrupted() { bail!("interrupted") } else { Ok(()) }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.place.join(name)
    }

    /// Where all restores go.
    pub(crate) fn target(&self) -> PathBuf {
        self.place.join("target")
    }

    /// Makes `path` the server's user's, where that is another one.
    pub(crate) fn give_to_server(&self, path: &Path) -> anyhow::Result<()> {
        let Some(user) = self.user else { return Ok(()) };
        chown(path, Some(user.uid), Some(user.gid)).with_context(|| format!("cannot give {} away", path.display()))
    }

    /// An empty directory of the server's user.
    pub(crate) fn server_directory(&self, name: &str) -> anyhow::Result<PathBuf> {
        let path = self.path(name);
        remove(&path)?;
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        self.give_to_server(&path)?;
        Ok(path)
    }

    /// A program to run as whoever runs the suite.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command.current_dir(&self.place).env("PGHYDRANT_STATE", self.path("state")).env("LC_ALL", "C");
        command.env("HOME", &self.place).env_remove("PGDATA");
        command
    }

    /// The same as the server's user.
    pub(crate) fn as_server(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = self.command(program);
        command.env("PGHYDRANT_STATE", self.path("server-state"));
        if let Some(user) = self.user {
            command.uid(user.uid).gid(user.gid);
        }
        command
    }

    /// One of the server's programs, as its user.
    pub(crate) fn server_program(&self, name: &str) -> Command {
        self.as_server(self.server.join(name))
    }

    /// Runs a program to its end; what it said is in the error. Answers with its standard output, which is a file, as a
    /// daemon would hold a pipe open.
    pub(crate) fn run(&self, command: &mut Command) -> anyhow::Result<String> {
        let (out, err) = (self.path("last.out"), self.path("last.err"));
        let create = |path: &Path| File::create(path).with_context(|| format!("cannot write {}", path.display()));
        let shown = shown(command);
        let status = command
            .stdin(Stdio::null())
            .stdout(create(&out)?)
            .stderr(create(&err)?)
            .status()
            .with_context(|| format!("cannot run {shown}"))?;
        self.check_interrupt()?;
        let said = fs::read_to_string(&out).unwrap_or_default();
        if !status.success() {
            let words = fs::read_to_string(&err).unwrap_or_default() + &said;
            let lines: Vec<_> = words.lines().collect();
            bail!("{shown}: {status}\n{}", lines[lines.len().saturating_sub(8)..].join("\n"));
        }
        Ok(said)
    }

    /// A run's start: nothing dirty, nothing cached.
    pub(crate) fn drop_caches(&self) -> anyhow::Result<()> {
        if self.options.warm {
            return Ok(());
        }
        rustix::fs::sync();
        fs::write("/proc/sys/vm/drop_caches", "3").context("cannot drop the caches")
    }

    /// A run's end, as a child, so that its processor time counts.
    pub(crate) fn sync(&self) -> anyhow::Result<()> {
        self.run(&mut self.command("sync")).map(drop)
    }

    /// A program in PATH, or among those that `make bench-peers` puts beside the build.
    pub(crate) fn find(&self, name: &str) -> Option<PathBuf> {
        let peers = std::env::var_os("PGHYDRANT_BENCH_PEERS").map(PathBuf::from);
        let path = std::env::var_os("PATH").unwrap_or_default();
        let sbin = ["/usr/sbin".into(), "/sbin".into()];
        let directories = peers.into_iter().chain(std::env::split_paths(&path)).chain(sbin);
        directories.map(|directory| directory.join(name)).find(|program| program.is_file())
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let deadline = Instant::now() + STOP_PATIENCE;
        // Nothing below a mount may be taken for ours to remove.
        for mounted in ["mount", "reflink"].map(|name| self.path(name)).iter().filter(|path| path.exists()) {
            let _ = rustix::mount::unmount(mounted, rustix::mount::UnmountFlags::DETACH);
        }
        // A postmaster stops at once by SIGQUIT, the server of a mount unmounts by SIGTERM.
        let servers = ["cluster", "small", "target"];
        for data in servers.iter().map(|name| self.path(name)).filter(|data| data.join("postmaster.pid").exists()) {
            let mut stop = self.server_program("pg_ctl");
            stop.arg("-D").arg(data).args(["-m", "immediate", "-W", "stop"]);
            let _ = stop.stdout(Stdio::null()).stderr(Stdio::null()).status();
        }
        while !processes::descendants().is_empty() && Instant::now() < deadline {
            processes::signal(&processes::descendants(), Signal::TERM);
            std::thread::sleep(Duration::from_millis(50));
            processes::reap_orphans();
        }
        processes::signal(&processes::descendants(), Signal::KILL);
        processes::reap_orphans();
        if let Err(error) = remove(&self.place) {
            eprintln!("warning: {error:#}");
        }
    }
}

/// Removes a directory or file, if there is one.
pub(crate) fn remove(path: &Path) -> anyhow::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(_) => return Ok(()),
    };
    removed.with_context(|| format!("cannot remove {}", path.display()))
}

fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

fn newest_server() -> Option<PathBuf> {
    let majors = fs::read_dir("/usr/lib/postgresql").ok()?.flatten();
    let numbered = majors.filter_map(|entry| Some((entry.file_name().to_str()?.parse::<u32>().ok()?, entry.path())));
    let with_server =
        numbered.map(|(major, path)| (major, path.join("bin"))).filter(|(_, bin)| bin.join("postgres").exists());
    with_server.max_by_key(|(major, _)| *major).map(|(_, bin)| bin)
}

fn user_named(name: &str) -> anyhow::Result<User> {
    let passwd = fs::read_to_string("/etc/passwd").context("cannot read /etc/passwd")?;
    let fields = |line: &str| line.split(':').map(str::to_owned).collect::<Vec<_>>();
    let found = passwd.lines().map(fields).find(|fields| fields.first().is_some_and(|found| found == name));
    let found = found.with_context(|| format!("there is no user {name}: --user"))?;
    let number = |at: usize| found.get(at).and_then(|number| number.parse().ok());
    let (uid, gid) = number(2).zip(number(3)).with_context(|| format!("{name} has no numbers in /etc/passwd"))?;
    Ok(User { uid, gid })
}

/// Arguments of several kinds in one list.
pub(crate) fn words<const N: usize>(list: [&dyn AsRef<OsStr>; N]) -> Vec<OsString> {
    list.iter().map(|word| word.as_ref().to_owned()).collect()
}
