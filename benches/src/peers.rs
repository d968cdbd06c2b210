//! The other tools, each as its own manual would have it on this machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;

use crate::cluster;
use crate::options::CodecName;
use crate::world::{World, remove};

/// As many processes as the suite's bars compare with.
pub(crate) const PGBACKREST_PROCESSES: u32 = 2;

/// A peer that runs here, or the reason why it does not.
pub(crate) fn peer(world: &World, name: &str) -> Result<PathBuf, String> {
    if !world.options.wants_peer(name) {
        return Err("not asked for (--peers)".to_owned());
    }
    world.find(name).ok_or_else(|| "not installed: make bench-peers, or its own releases".to_owned())
}

/// pgBackRest with a repository of one compression.
#[derive(Clone, Debug)]
pub(crate) struct PgBackRest<'w> {
    world: &'w World,
    pub(crate) program: PathBuf,
    codec: CodecName,
    name: String,
    asynchronous: bool,
}

impl<'w> PgBackRest<'w> {
    pub(crate) fn find(world: &'w World, codec: CodecName) -> Result<Self, String> {
        let program = peer(world, "pgbackrest")?;
        Ok(Self { world, program, codec, name: format!("pgbackrest-{codec}"), asynchronous: false })
    }

    /// For the archive's sake, with another repository.
    pub(crate) fn asynchronous(mut self) -> Self {
        self.name.push_str("-wal");
        self.asynchronous = true;
        self
    }

    pub(crate) fn repository(&self) -> PathBuf {
        self.world.path(&self.name)
    }

    pub(crate) fn configuration(&self) -> PathBuf {
        self.world.path(&format!("{}.conf", self.name))
    }

    /// Bundles since 2.39; block incrementals since 2.46, told in the name.
    pub(crate) fn has_blocks(&self) -> bool {
        let said = self.world.run(self.world.command(&self.program).arg("version")).unwrap_or_default();
        let version = said.split_ascii_whitespace().nth(1).unwrap_or_default();
        let mut numbers = version.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
        (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (2, 46)
    }

    /// An empty repository.
    pub(crate) fn init(&self) -> anyhow::Result<()> {
        self.world.server_directory(&self.name)?;
        for kind in ["log", "lock", "spool"] {
            self.world.server_directory(&format!("{}-{kind}", self.name))?;
        }
        let place = self.world.place.display();
        let name = &self.name;
        let block = if self.has_blocks() { "repo1-block=y\n" } else { "" };
        let asynchronous = if self.asynchronous { "archive-async=y\n" } else { "" };
        let text = format!(
            "[global]\nrepo1-path={place}/{name}\nrepo1-bundle=y\n{block}{asynchronous}process-max={PGBACKREST_PROCESSES}\n\
             compress-type={}\nlog-path={place}/{name}-log\nlock-path={place}/{name}-lock\nspool-path={place}/{name}-spool\n\
             start-fast=y\narchive-check=n\nlog-level-console=warn\nlog-level-file=off\n\n[bench]\npg1-path={}\n\
             pg1-port={}\npg1-socket-path={place}\npg1-user=postgres\n",
            self.codec.pgbackrest(),
            cluster::data(self.world).display(),
            cluster::PORT,
        );
        let path = self.configuration();
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        // From pg_control: the server may be down.
        self.world.run(&mut self.command("stanza-create", &["--no-online"])).map(drop)
    }

    fn command(&self, verb: &str, options: &[&str]) -> Command {
        let mut command = self.world.as_server(&self.program);
        command.arg("--config").arg(self.configuration()).arg("--stanza=bench").args(options).arg(verb);
        command
    }

    /// Of the running cluster: `full` or `incr`.
    pub(crate) fn backup(&self, kind: &str) -> anyhow::Result<()> {
        self.world.run(&mut self.command("backup", &[&format!("--type={kind}")])).map(drop)
    }

    pub(crate) fn restore(&self, options: &[&str]) -> anyhow::Result<()> {
        let target = self.world.target();
        if !target.exists() {
            self.world.server_directory("target")?;
            fs::set_permissions(&target, std::os::unix::fs::PermissionsExt::from_mode(0o700))
                .with_context(|| format!("cannot close {}", target.display()))?;
        }
        let path = format!("--pg1-path={}", target.display());
        self.world.run(&mut self.command("restore", &[&[path.as_str()], options].concat())).map(drop)
    }

    /// `archive_command` or `restore_command`, up to what PostgreSQL adds.
    pub(crate) fn wal_command(&self, verb: &str, data: &Path) -> String {
        let (program, configuration) = (self.program.display(), self.configuration());
        format!("{program} --config={} --stanza=bench --pg1-path={} {verb}", configuration.display(), data.display())
    }

    pub(crate) fn ensure_backup(&self) -> anyhow::Result<()> {
        if self.repository().exists() {
            return Ok(());
        }
        crate::ours::with_server(self.world, || {
            self.init()?;
            self.backup("full")
        })
    }
}

/// Barman, local, with `pg_basebackup` and the archive in its own directory.
#[derive(Clone, Debug)]
pub(crate) struct Barman<'w> {
    world: &'w World,
    program: PathBuf,
}

impl<'w> Barman<'w> {
    pub(crate) fn find(world: &'w World) -> Result<Self, String> {
        Ok(Self { world, program: peer(world, "barman")? })
    }

    /// As whoever runs the suite: it may lie where the server's user cannot look.
    fn command(&self) -> Command {
        let mut command = self.world.command(&self.program);
        command.arg("-c").arg(self.world.path("barman.conf"));
        command
    }

    /// Its backup of the running cluster. It starts none before it has seen a segment of WAL.
    pub(crate) fn backup(&self) -> anyhow::Result<()> {
        let world = self.world;
        let home = world.server_directory("barman")?;
        for name in ["barman.d", "barman/bench", "barman/bench/incoming"] {
            world.server_directory(name)?;
        }
        let (place, connection) = (world.place.display(), cluster::connection(world));
        let user = world.run(world.command("id").arg("-un"))?;
        let text = format!(
            "[barman]\nbarman_user = {}\nconfiguration_files_directory = {place}/barman.d\nbarman_home = {}\n\
             log_file = {place}/barman/barman.log\n\n[bench]\ndescription = bench\nconninfo = {connection}\n\
             streaming_conninfo = {connection}\nbackup_method = postgres\narchiver = on\npath_prefix = {}\n",
            user.trim(),
            home.display(),
            world.server.display(),
        );
        let path = world.path("barman.conf");
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        world.run(self.command().arg("cron"))?;
        let archive = format!("cp %p {}/bench/incoming/%f", home.display());
        cluster::sql(world, &format!("ALTER SYSTEM SET archive_command = '{archive}'"))?;
        cluster::sql(world, "SELECT pg_reload_conf()")?;
        let backed_up = world
            .run(self.command().args(["switch-wal", "--force", "--archive", "bench"]))
            .and_then(|_| world.run(self.command().args(["backup", "bench"])));
        cluster::sql(world, "ALTER SYSTEM RESET archive_command")?;
        cluster::sql(world, "SELECT pg_reload_conf()")?;
        backed_up.map(drop)
    }

    pub(crate) fn restore(&self) -> anyhow::Result<()> {
        let mut recover = self.command();
        self.world.run(recover.args(["recover", "bench", "latest"]).arg(self.world.target())).map(drop)
    }
}

/// WAL-G with a repository in a directory; lz4, as it has it by default.
#[derive(Clone, Debug)]
pub(crate) struct WalG<'w> {
    world: &'w World,
    program: PathBuf,
}

impl<'w> WalG<'w> {
    pub(crate) fn find(world: &'w World) -> Result<Self, String> {
        Ok(Self { world, program: peer(world, "wal-g")? })
    }

    fn command(&self) -> Command {
        let mut command = self.world.as_server(&self.program);
        command.env("WALG_FILE_PREFIX", self.world.path("wal-g")).env("PGHOST", &self.world.place);
        command.env("PGPORT", cluster::PORT.to_string()).env("PGUSER", "postgres");
        command.env("WALG_DOWNLOAD_CONCURRENCY", "2").env("WALG_UPLOAD_CONCURRENCY", "2");
        command
    }

    /// Of the running cluster.
    pub(crate) fn backup(&self) -> anyhow::Result<()> {
        self.world.server_directory("wal-g")?;
        let data = cluster::data(self.world);
        self.world.run(self.command().arg("backup-push").arg(data).arg("--full")).map(drop)
    }

    pub(crate) fn restore(&self) -> anyhow::Result<()> {
        self.world.run(self.command().arg("backup-fetch").arg(self.world.target()).arg("LATEST")).map(drop)
    }
}

/// rustic, of the stopped cluster's files.
#[derive(Clone, Debug)]
pub(crate) struct Rustic<'w> {
    world: &'w World,
    program: PathBuf,
}

impl<'w> Rustic<'w> {
    pub(crate) fn find(world: &'w World) -> Result<Self, String> {
        Ok(Self { world, program: peer(world, "rustic")? })
    }

    fn command(&self) -> Command {
        let mut command = self.world.command(&self.program);
        command.arg("-r").arg(self.world.path("rustic")).args(["--password", "bench", "--no-cache"]);
        command
    }

    /// Of files at rest.
    pub(crate) fn backup(&self) -> anyhow::Result<()> {
        remove(&self.world.path("rustic"))?;
        self.world.run(self.command().arg("init"))?;
        self.world.run(self.command().arg("backup").arg(cluster::data(self.world))).map(drop)
    }

    pub(crate) fn restore(&self) -> anyhow::Result<()> {
        let snapshot = format!("latest:{}", cluster::data(self.world).display());
        self.world.run(self.command().args(["restore", &snapshot]).arg(self.world.target())).map(drop)
    }
}
