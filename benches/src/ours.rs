//! The contestant this is all about.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;

use crate::cluster;
use crate::hosts::{Host, Server};
use crate::options::CodecName;
use crate::world::{World, remove};

/// The cluster's name in every repository.
const CLUSTER: &str = "bench";

/// One repository of ours.
#[derive(Clone, Debug)]
pub(crate) struct Repository<'w> {
    world: &'w World,
    pub(crate) path: PathBuf,
    codec: CodecName,
}

impl<'w> Repository<'w> {
    pub(crate) fn new(world: &'w World, codec: CodecName) -> Self {
        Self::named(world, &format!("repository-{codec}"), codec)
    }

    pub(crate) fn named(world: &'w World, name: &str, codec: CodecName) -> Self {
        Self { world, path: world.path(name), codec }
    }

    /// An empty one, whatever was there.
    pub(crate) fn init(&self) -> anyhow::Result<()> {
        remove(&self.path)?;
        let mut init = self.world.as_server(&self.world.program);
        init.arg("init").arg("--repo").arg(&self.path).args(["--compression", self.codec.ours()]);
        self.world.run(&mut init).map(drop)
    }

    fn verb(&self, mut command: Command, verb: &[&str]) -> Command {
        command.args(verb).arg("--repo").arg(&self.path).args(["--cluster", CLUSTER]);
        command
    }

    /// Of the running cluster.
    pub(crate) fn backup(&self) -> anyhow::Result<()> {
        let mut backup = self.verb(self.world.as_server(&self.world.program), &["backup"]);
        self.world.run(backup.arg("--dbname").arg(cluster::connection(self.world))).map(drop)
    }

    /// A restore that ends with the copy.
    pub(crate) fn restore(&self, source: &str, more: &[&str]) -> anyhow::Result<()> {
        self.restore_to(&self.world.target(), source, &[&["--target-immediate", "--no-start"], more].concat())
    }

    /// A restore to its end.
    pub(crate) fn restore_to(&self, target: &Path, source: &str, more: &[&str]) -> anyhow::Result<()> {
        let mut restore = self.verb(self.world.command(&self.world.program), &["restore"]);
        restore.arg("--to").arg(target).args(["--source", source]).arg("--pg-bin").arg(&self.world.server).args(more);
        if rustix::process::geteuid().is_root() {
            restore.arg("--os-user").arg(&self.world.options.user);
        }
        self.world.run(&mut restore).map(drop)
    }

    /// `list` or `show`.
    pub(crate) fn ask(&self, verb: &str) -> anyhow::Result<()> {
        self.world.run(&mut self.verb(self.world.command(&self.world.program), &[verb])).map(drop)
    }

    /// A mount of the newest backup, for everybody.
    pub(crate) fn mount(&self, at: &Path) -> anyhow::Result<()> {
        let mut mount = self.verb(self.world.command(&self.world.program), &["mount"]);
        self.world.run(mount.arg(at)).map(drop)
    }

    pub(crate) fn unmount(&self, at: &Path) -> anyhow::Result<()> {
        let mut unmount = self.world.command(&self.world.program);
        self.world.run(unmount.arg("unmount").arg(at)).map(drop)
    }

    /// `archive_command` or `restore_command`, up to what PostgreSQL adds.
    pub(crate) fn wal_command(&self, verb: &str) -> String {
        let (program, path) = (self.world.program.display(), self.path.display());
        format!(
            "PGHYDRANT_STATE={}/server-state {program} wal {verb} --repo {path} --cluster {CLUSTER}",
            self.world.place.display()
        )
    }

    pub(crate) fn bytes(&self) -> anyhow::Result<u64> {
        cluster::tree_bytes(&self.path)
    }

    /// Makes the first backup where no section has made it.
    pub(crate) fn ensure_backup(&self) -> anyhow::Result<()> {
        if self.path.exists() {
            return Ok(());
        }
        self.init()?;
        with_server(self.world, || self.backup()).with_context(|| format!("the backup into {}", self.path.display()))
    }
}

/// A mount server beside the repository, and a target that it restores to.
#[derive(Debug)]
pub(crate) struct MountServer<'w> {
    world: &'w World,
    /// What leads `restore` to it and to the target.
    options: Vec<String>,
    _server: Server,
}

impl<'w> MountServer<'w> {
    /// One that protects blocks on their way as `protection` says, plain or TLS.
    pub(crate) fn start(
        world: &'w World,
        repository: &Repository<'_>,
        host: &Host<'_>,
        protection: &str,
    ) -> anyhow::Result<Self> {
        let protection = protection.to_lowercase();
        let name = format!("mount-server-{protection}");
        let (state, token) = (world.path(&name), world.path(&format!("{name}.token")));
        let serve = || {
            let mut serve = world.command(&world.program);
            serve.arg("serve").arg("--state").arg(&state);
            serve
        };
        let issued = world.run(serve().args(["--issue-token", "bench"]))?;
        fs::write(&token, issued).with_context(|| format!("cannot write {}", token.display()))?;
        let [control, blocks] = if protection == "tls" { [7432, 7433] } else { [7434, 7435] };
        let [listen, data] = [control, blocks].map(|port| format!("{}:{port}", host.seen_as));
        let mut command = serve();
        command.arg("--repo").arg(&repository.path).arg("--ssh-config").arg(host.ssh_config());
        command.args(["--listen", &listen, "--data-listen", &data, "--data-plane", &protection, "--retries", "0"]);
        let server = Server::start(world, &name, &mut command, "SHA256:")?;
        let said = server.said();
        let fingerprint = said.split_ascii_whitespace().find(|word| word.starts_with("SHA256:"));
        let fingerprint = fingerprint.context("the mount server tells no fingerprint")?;
        let (url, target) = (format!("https://{listen}"), format!("root@{}", host.address));
        let (token, identity) = (token.display().to_string(), host.identity().display().to_string());
        let options = [
            ["--server", &url],
            ["--token-file", &token],
            ["--fingerprint", fingerprint],
            ["--target", &target],
            ["--identity", &identity],
            ["--os-user", &world.options.user],
        ];
        let options = options.as_flattened().iter().map(|&word| word.to_owned()).collect();
        Ok(Self { world, options, _server: server })
    }

    /// A restore through the target's mount.
    pub(crate) fn restore(&self, more: &[&str]) -> anyhow::Result<()> {
        let mut restore = self.world.command(&self.world.program);
        restore.args(["restore", "--cluster", CLUSTER, "--source", "mount", "--to"]).arg(self.world.target());
        restore.arg("--pg-bin").arg(&self.world.server).args(&self.options).args(more);
        self.world.run(&mut restore).map(drop)
    }
}

/// While the cluster runs, which is stopped again.
pub(crate) fn with_server<T>(world: &World, act: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let data = cluster::data(world);
    cluster::start(world, &data)?;
    let outcome = act();
    let stopped = cluster::stop(world, &data);
    outcome.and_then(|outcome| stopped.map(|()| outcome))
}

/// True where `restore` has this option.
pub(crate) fn restore_has(world: &World, option: &str) -> anyhow::Result<bool> {
    let help = world.run(world.command(&world.program).args(["restore", "--help"]))?;
    Ok(help.contains(option))
}
