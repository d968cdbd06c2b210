//! Throw-away PostgreSQL clusters, and the instances that restores leave running.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use super::process::{Running, wait_until};
use super::tools::{postgres_bin_of, postgres_program, server_program};
use super::{Context, Finished, OsUser, Pghydrant, Repository, Result, Run, Scratch, bail, ensure};

/// A port that nobody listens on, and that no other test of this process is given.
pub fn free_port() -> Result<u16> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    for _ in 0..2000 {
        // Test processes start at different places, so that two of them seldom meet.
        let offset = std::process::id() % 10 * 1000 + u32::from(NEXT.fetch_add(1, Ordering::Relaxed));
        let port = 21_000 + u16::try_from(offset % 11_000)?;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return Ok(port);
        }
    }
    bail!("no free port")
}

/// A data directory and how to reach its server. Stops the server when dropped.
pub struct Instance {
    pub data: PathBuf,
    pub port: u16,
    pub sockets: PathBuf,
}

impl Instance {
    /// A running server that somebody else started: port and socket directory as its `postmaster.pid` has them.
    pub fn running_in(data: &Path) -> Result<Self> {
        let pid_file = data.join("postmaster.pid");
        let text = fs::read_to_string(&pid_file).with_context(|| format!("cannot read {}", pid_file.display()))?;
        let lines: Vec<&str> = text.lines().collect();
        let (Some(port), Some(sockets)) = (lines.get(3), lines.get(4)) else {
            bail!("{} has no port and socket directory: {text}", pid_file.display());
        };
        Ok(Self { data: data.to_owned(), port: port.trim().parse()?, sockets: PathBuf::from(sockets) })
    }

    /// For `--dbname`.
    pub fn connection_string(&self) -> String {
        format!("host={} port={} user=postgres dbname=postgres", self.sockets.display(), self.port)
    }

    /// A client program of PostgreSQL, told where this server is.
    pub fn client(&self, program: &str) -> Result<Run> {
        Ok(Run::new(postgres_program(program)?)
            .user(OsUser::server())
            .env("PGHOST", &self.sockets)
            .env("PGPORT", self.port.to_string())
            .env("PGUSER", "postgres")
            .env("PGDATABASE", "postgres")
            .env("PGCONNECT_TIMEOUT", "20"))
    }

    /// The result of a statement as `psql -At` prints it.
    pub fn sql(&self, statement: &str) -> Result<String> {
        self.sql_in("postgres", statement)
    }

    pub fn sql_in(&self, database: &str, statement: &str) -> Result<String> {
        let arguments = ["-XAtq", "-v", "ON_ERROR_STOP=1", "-d", database, "-c", statement];
        Ok(self.client("psql")?.args(arguments).succeed()?.stdout.trim_end().to_owned())
    }

    pub fn number(&self, statement: &str) -> Result<i64> {
        let text = self.sql(statement)?;
        text.parse().with_context(|| format!("{statement} gave \"{text}\""))
    }

    fn pg_ctl(&self, arguments: &[&str]) -> Result<Finished> {
        let pg_ctl = server_program(&self.data, "pg_ctl")?;
        Run::new(pg_ctl).user(OsUser::server()).arg("-D").arg(&self.data).args(arguments).finish()
    }

    pub fn is_running(&self) -> Result<bool> {
        Ok(self.pg_ctl(&["status"])?.code == Some(0))
    }

    pub fn start(&self) -> Result<()> {
        let log = self.log_file().display().to_string();
        let finished = self.pg_ctl(&["start", "-w", "-t", "120", "-l", &log])?;
        ensure!(finished.code == Some(0), "{finished}\n{}", fs::read_to_string(&log).unwrap_or_default());
        Ok(())
    }

    /// `mode`: smart, fast or immediate.
    pub fn stop(&self, mode: &str) -> Result<()> {
        self.pg_ctl(&["stop", "-w", "-t", "120", "-m", mode])?.expect_code(0)?;
        Ok(())
    }

    pub fn restart(&self) -> Result<()> {
        self.stop("fast")?;
        self.start()
    }

    /// Where [`Self::start`] puts the server's messages: beside the data directory.
    pub fn log_file(&self) -> PathBuf {
        self.data.with_extension("log")
    }

    /// A line of `postgresql.conf`; the last one wins.
    pub fn configure(&self, line: &str) -> Result<()> {
        let path = self.data.join("postgresql.conf");
        let text = fs::read_to_string(&path)?;
        fs::write(&path, format!("{text}{line}\n"))?;
        Ok(())
    }

    /// The current WAL position.
    pub fn wal_position(&self) -> Result<String> {
        self.sql("SELECT pg_current_wal_lsn()")
    }

    /// Ends the current WAL segment and waits until the archiver has sent it.
    pub fn archive_wal(&self) -> Result<()> {
        // A message of its own, so that the switch ends a segment with something in it.
        let segment = self
            .sql("SELECT pg_logical_emit_message(false, 'test', 'archive'); SELECT pg_walfile_name(pg_switch_wal())")?;
        let segment = segment.lines().last().unwrap_or_default().to_owned();
        wait_until(&format!("archiving of {segment}"), Duration::from_secs(180), || {
            let last = self.sql("SELECT coalesce(last_archived_wal, '') FROM pg_stat_archiver")?;
            // Of the same timeline: the last segment of the one before it may come in between, as a partial one.
            Ok(last >= segment)
        })
    }

    /// `pg_checksums --check` of a stopped cluster, `pg_amcheck` of a running one: nothing may be wrong in it.
    pub fn check_pages(&self) -> Result<()> {
        let data = self.data.as_os_str();
        Run::new(postgres_program("pg_checksums")?)
            .user(OsUser::server())
            .args(["--check".as_ref(), data])
            .succeed()?;
        Ok(())
    }

    pub fn check_relations(&self) -> Result<()> {
        let arguments = ["--all", "--install-missing", "--heapallindexed", "--jobs=2"];
        self.client("pg_amcheck")?.args(arguments).time_limit(Duration::from_secs(300)).succeed()?;
        Ok(())
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        if self.data.join("postmaster.pid").exists() {
            let _ = self.pg_ctl(&["stop", "-w", "-t", "30", "-m", "immediate"]);
        }
    }
}

/// What a throw-away cluster shall be like.
pub struct Builder<'s> {
    scratch: &'s Scratch,
    name: String,
    settings: Vec<String>,
    initdb: Vec<String>,
    /// Where `initdb` is.
    bin: Option<PathBuf>,
}

impl Builder<'_> {
    /// A line for `postgresql.conf`.
    pub fn setting(mut self, line: impl Into<String>) -> Self {
        self.settings.push(line.into());
        self
    }

    /// An argument for `initdb`.
    pub fn initdb(mut self, argument: impl Into<String>) -> Self {
        self.initdb.push(argument.into());
        self
    }

    /// A cluster of another major version.
    pub fn major(mut self, major: u32) -> Result<Self> {
        self.bin = Some(postgres_bin_of(major).with_context(|| format!("PostgreSQL {major} is missing"))?);
        Ok(self)
    }

    /// Archives with our own `wal push` to `repository`, under `cluster`.
    pub fn archive_to(self, pghydrant: &Pghydrant, repository: &Repository, cluster: &str) -> Self {
        let command = format!(
            "{} wal push --repo {} --cluster {cluster} %p",
            pghydrant.binary.display(),
            repository.path().display()
        );
        self.setting("archive_mode = on").setting(format!("archive_command = '{command}'"))
    }

    /// Makes the cluster, with page checksums, and starts it.
    pub fn start(self) -> Result<Cluster> {
        let data = self.scratch.directory(&self.name)?;
        // The path of a socket has at most 107 bytes.
        let sockets = self.scratch.directory(&format!("{}.s", self.name))?;
        let initdb = self.bin.map_or_else(|| postgres_program("initdb"), |bin| Ok(bin.join("initdb")))?;
        Run::new(initdb)
            .user(OsUser::server())
            .args(["-k", "-A", "trust", "-U", "postgres", "--no-sync", "-E", "UTF8", "--locale=C", "-D"])
            .arg(&data)
            .args(&self.initdb)
            .succeed()?;
        let instance = Instance { data, port: free_port()?, sockets };
        let own = [
            format!("port = {}", instance.port),
            format!("unix_socket_directories = '{}'", instance.sockets.display()),
            "listen_addresses = ''".to_owned(),
            "shared_buffers = 32MB".to_owned(),
            "max_wal_size = 256MB".to_owned(),
            // The tests crash pghydrant, not the machine.
            "fsync = off".to_owned(),
            "max_prepared_transactions = 8".to_owned(),
            // Tests count commits, files and bytes.
            "autovacuum = off".to_owned(),
        ];
        for line in own.iter().chain(&self.settings) {
            instance.configure(line)?;
        }
        instance.start()?;
        Ok(Cluster { instance })
    }
}

/// A cluster to back up.
pub struct Cluster {
    instance: Instance,
}

impl std::ops::Deref for Cluster {
    type Target = Instance;

    fn deref(&self) -> &Instance {
        &self.instance
    }
}

impl Cluster {
    /// A cluster in directory `name` of `scratch`.
    pub fn build<'s>(scratch: &'s Scratch, name: &str) -> Builder<'s> {
        Builder { scratch, name: name.to_owned(), settings: Vec::new(), initdb: Vec::new(), bin: None }
    }

    /// Fills `database` with pgbench's tables: 16 MB a unit of `scale`.
    pub fn pgbench_initialize(&self, scale: u32) -> Result<()> {
        let scale = scale.to_string();
        self.client("pgbench")?.args(["--initialize", "--quiet", "--scale", &scale, "postgres"]).succeed()?;
        Ok(())
    }

    /// Keeps changing the tables of pgbench until the guard is dropped.
    pub fn pgbench_load(&self) -> Result<Running> {
        let arguments = ["--client=2", "--no-vacuum", "--time=600", "--rate=400", "postgres"];
        let mut load = self.client("pgbench")?.args(arguments).time_limit(Duration::from_secs(600)).start()?;
        let before = self.number("SELECT count(*) FROM pgbench_history")?;
        wait_until("pgbench's first transactions", Duration::from_secs(120), || {
            ensure!(load.try_status()?.is_none(), "pgbench ended: {}", load.stderr_so_far()?);
            Ok(self.number("SELECT count(*) FROM pgbench_history")? > before + 10)
        })?;
        Ok(load)
    }

    /// Ends what [`Self::pgbench_load`] began: no transaction commits behind this.
    pub fn end_load(&self, load: Running) -> Result<()> {
        drop(load);
        // A server process that was in the middle of its commit has not noticed yet.
        wait_until("the end of pgbench's sessions", Duration::from_secs(120), || {
            Ok(self.number("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pgbench'")? == 0)
        })
    }

    /// A temporary slot goes when its server process notices that the backup has gone.
    pub fn wait_for_no_slot(&self) -> Result<()> {
        wait_until("the server to drop the slot", Duration::from_secs(60), || {
            Ok(self.number("SELECT count(*) FROM pg_replication_slots")? == 0)
        })
    }
}
