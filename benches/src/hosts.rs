//! Another machine, for as long as a section needs it: a network namespace with an sshd of its own, on this machine's
//! file system, at the other end of a pair of virtual network devices.
//!
//! Always true: dropped, its processes, its namespace and its end of the pair are gone. What programs keep in `/var/cache`
//! and `/run` there is in the place and in memory, and goes with it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use rustix::process::Signal;

use crate::processes;
use crate::world::World;

/// How long a server may take to start.
const START_PATIENCE: Duration = Duration::from_secs(60);
/// How long one may take to stop before it is ended.
const STOP_PATIENCE: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(20);
/// Networks of two hosts in 198.18.0.0/15, which is for benchmarks.
const NETWORKS: u32 = 1 << 15;
/// What is run in the mount namespace of the host, before its sshd.
const PREPARE: &str =
    "set -e; mount --bind \"$CACHE\" /var/cache; mount -t tmpfs tmpfs /run; mkdir /run/sshd; exec \"$@\"";

/// A server that runs until this is dropped.
#[derive(Debug)]
pub(crate) struct Server {
    child: Child,
    /// What it says, both ways.
    said: PathBuf,
}

impl Server {
    /// Started, once it has said `word`.
    pub(crate) fn start(world: &World, name: &str, command: &mut Command, word: &str) -> anyhow::Result<Self> {
        let said = world.path(&format!("{name}.said"));
        let out = File::create(&said).with_context(|| format!("cannot write {}", said.display()))?;
        let err = out.try_clone().context("cannot open a file twice")?;
        command.stdin(Stdio::null()).stdout(out).stderr(err);
        let child = command.spawn().with_context(|| format!("cannot run {name}"))?;
        let mut server = Self { child, said };
        let deadline = Instant::now() + START_PATIENCE;
        while !server.said().contains(word) {
            world.check_interrupt()?;
            if server.child.try_wait().context("cannot wait for a server")?.is_some() || Instant::now() > deadline {
                bail!("{name} does not serve\n{}", server.said());
            }
            std::thread::sleep(LOOK);
        }
        Ok(server)
    }

    pub(crate) fn said(&self) -> String {
        fs::read_to_string(&self.said).unwrap_or_default()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let Ok(pid) = i32::try_from(self.child.id()) else { return };
        processes::signal(&[pid], Signal::TERM);
        let deadline = Instant::now() + STOP_PATIENCE;
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                // Nobody else has waited for it, so the number is still its own.
                let _ = self.child.kill();
            }
            std::thread::sleep(LOOK);
        }
    }
}

/// The other machine.
#[derive(Debug)]
pub(crate) struct Host<'w> {
    world: &'w World,
    name: String,
    /// Its address.
    pub(crate) address: String,
    /// This machine's, as it sees it.
    pub(crate) seen_as: String,
    sshd: Option<Server>,
}

impl<'w> Host<'w> {
    pub(crate) fn new(world: &'w World) -> anyhow::Result<Self> {
        let run = std::process::id();
        let at = |offset| std::net::Ipv4Addr::from(u32::from_be_bytes([198, 18, 0, 0]) + run % NETWORKS * 4 + offset);
        let (address, seen_as) = (at(2).to_string(), at(1).to_string());
        let host = Self { world, name: format!("pghb{}", run % 100_000_000), address, seen_as, sshd: None };
        let (near, far, name) = (host.near(), format!("{}b", host.name), &host.name);
        let words = |text: String| world.run(world.command("ip").args(text.split(' '))).map(drop);
        words(format!("netns add {name}"))?;
        words(format!("link add {near} type veth peer name {far} netns {name}"))?;
        words(format!("addr add {}/30 dev {near}", host.seen_as))?;
        words(format!("link set {near} up"))?;
        words(format!("-n {name} addr add {}/30 dev {far}", host.address))?;
        words(format!("-n {name} link set {far} up"))?;
        words(format!("-n {name} link set lo up"))?;
        host.with_sshd()
    }

    /// This machine's end of the pair. A name has 15 characters at most.
    fn near(&self) -> String {
        format!("{}a", self.name)
    }

    pub(crate) fn identity(&self) -> PathBuf {
        self.world.path("target.key")
    }

    /// An ssh_config(5) that knows the host.
    pub(crate) fn ssh_config(&self) -> PathBuf {
        self.world.path("ssh.conf")
    }

    fn with_sshd(mut self) -> anyhow::Result<Self> {
        let world = self.world;
        let (identity, host_key, known) = (self.identity(), world.path("host.key"), world.path("known"));
        for key in [&identity, &host_key] {
            world.run(world.command("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(key))?;
        }
        let write = |path: &Path, text: String| {
            fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
        };
        let public = host_key.with_extension("key.pub");
        let public = fs::read_to_string(&public).with_context(|| format!("cannot read {}", public.display()))?;
        write(&known, format!("{} {public}", self.address))?;
        let client = format!("UserKnownHostsFile {}\nIdentityFile {}\n", known.display(), identity.display());
        write(&self.ssh_config(), client + "IdentitiesOnly yes\nBatchMode yes\nStrictHostKeyChecking yes\n")?;
        let configuration = world.path("sshd.conf");
        let text = format!(
            "ListenAddress {}\nHostKey {}\nAuthorizedKeysFile {}\nPasswordAuthentication no\nStrictModes no\nUsePAM no\n\
             PermitRootLogin yes\nPidFile none\nSubsystem sftp internal-sftp\n",
            self.address,
            host_key.display(),
            identity.with_extension("key.pub").display(),
        );
        write(&configuration, text)?;
        let cache = world.path("target-cache");
        fs::create_dir_all(&cache).with_context(|| format!("cannot make {}", cache.display()))?;
        let sshd = world.find("sshd").context("no sshd")?;
        let mut command = self.command("sh");
        command.env("CACHE", cache).args(["-c", PREPARE, "sh"]).arg(sshd).args(["-D", "-e", "-f"]).arg(configuration);
        self.sshd = Some(Server::start(world, "sshd", &mut command, "Server listening")?);
        Ok(self)
    }

    /// A program that runs there.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = self.world.command("ip");
        command.args(["netns", "exec", &self.name, program]);
        command
    }

    /// A program that runs there as the server's user.
    pub(crate) fn as_server(&self, program: &Path) -> Command {
        let mut command = self.command("runuser");
        command.args(["-u", &self.world.options.user, "--"]).arg(program);
        command
    }

    fn ip(&self, words: &[&str]) -> String {
        let run = self.world.command("ip").args(words).stdin(Stdio::null()).stderr(Stdio::null()).output();
        run.map_or_else(|_| String::new(), |output| String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Its processes: nobody else starts any in this namespace.
    fn pids(&self) -> Vec<i32> {
        let listed = self.ip(&["netns", "pids", &self.name]);
        listed.lines().filter_map(|line| line.trim().parse().ok()).collect()
    }
}

impl Drop for Host<'_> {
    fn drop(&mut self) {
        self.sshd = None;
        let deadline = Instant::now() + STOP_PATIENCE;
        loop {
            let left = self.pids();
            if left.is_empty() {
                break;
            }
            let late = Instant::now() > deadline;
            processes::signal(&left, if late { Signal::KILL } else { Signal::TERM });
            std::thread::sleep(LOOK);
            processes::reap_orphans();
            if late {
                break;
            }
        }
        self.ip(&["link", "del", &self.near()]);
        self.ip(&["netns", "del", &self.name]);
    }
}
