//! The contestant this is all about.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;

use crate::cluster;
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
