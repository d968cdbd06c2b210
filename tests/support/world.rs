//! A cluster with pgbench's tables that archives into a repository of its own: where most tests begin.

use std::path::{Path, PathBuf};

use super::cluster::free_port;
use super::tools::postgres_bin_of;
use super::{Cluster, Context, Finished, Instance, Pghydrant, Repository, Result, Running, Scratch};

/// The cluster, the repository, and the directory that holds both. Gone in that order.
pub struct World {
    pub cluster: Cluster,
    pub repository: Repository,
    pub pghydrant: Pghydrant,
    pub scratch: Scratch,
}

impl World {
    /// An archiving cluster with `scale` units (16 MB each) of pgbench's tables; no backup yet.
    pub fn new(scale: u32) -> Result<Self> {
        Self::with(scale, &[], &[])
    }

    /// As [`Self::new`], with options for `init` and lines for `postgresql.conf`.
    pub fn with(scale: u32, init: &[&str], settings: &[&str]) -> Result<Self> {
        let scratch = Scratch::new()?;
        let pghydrant = Pghydrant::new(&scratch)?;
        Self::build(scratch, pghydrant, None, scale, init, settings)
    }

    /// A cluster of another major version; `pghydrant` is told where its server is.
    pub fn of_major(major: u32, scale: u32) -> Result<Self> {
        let scratch = Scratch::new()?;
        let bin = postgres_bin_of(major).with_context(|| format!("PostgreSQL {major} is missing"))?;
        let pghydrant = Pghydrant::new(&scratch)?.env("PGHYDRANT_PG_BIN", bin.display().to_string());
        Self::build(scratch, pghydrant, Some(major), scale, &[], &[])
    }

    fn build(
        scratch: Scratch,
        pghydrant: Pghydrant,
        major: Option<u32>,
        scale: u32,
        init: &[&str],
        settings: &[&str],
    ) -> Result<Self> {
        let repository = Repository::init_with(&scratch, &pghydrant, init)?;
        let builder = Cluster::build(&scratch, "original").archive_to(&pghydrant, &repository, "main");
        let builder = match major {
            Some(major) => builder.major(major)?,
            None => builder,
        };
        let cluster = settings.iter().fold(builder, |builder, line| builder.setting(*line)).start()?;
        if scale > 0 {
            cluster.pgbench_initialize(scale)?;
        }
        Ok(Self { cluster, repository, pghydrant, scratch })
    }

    /// Backs the cluster up; the result of `--json`.
    pub fn backup(&self) -> Result<serde_json::Value> {
        self.repository.backup(&self.cluster)
    }

    /// Where restores of this world go.
    pub fn target(&self) -> PathBuf {
        self.scratch.join("restored")
    }

    /// `restore --to TARGET --port FREE ARGUMENTS`, which must succeed and leave a server running.
    pub fn restore(&self, arguments: &[&str]) -> Result<Instance> {
        self.restore_to(&self.target(), arguments)?.expect_code(0)?;
        Instance::running_in(&self.target())
    }

    /// `restore --to DIRECTORY --port FREE ARGUMENTS`, whatever its exit code.
    pub fn restore_to(&self, to: &Path, arguments: &[&str]) -> Result<Finished> {
        let port = free_port()?.to_string();
        let port: &[&str] = if arguments.contains(&"--no-start") { &[] } else { &["--port", &port] };
        self.repository.restore(to, &[port, arguments].concat())
    }

    /// `restore --to TARGET --no-start`, under way.
    pub fn start_copy(&self) -> Result<Running> {
        let to = self.target().display().to_string();
        self.pghydrant.start(self.repository.arguments(&["restore"], &["--to", &to, "--no-start"]))
    }

    /// Inserts a row named `mark` into the table `marks`, in a transaction of its own; its XID.
    pub fn mark(&self, mark: &str) -> Result<String> {
        self.cluster.sql(
            "CREATE TABLE IF NOT EXISTS marks (name text PRIMARY KEY, at timestamptz DEFAULT clock_timestamp())",
        )?;
        // Two statements of one implicit transaction: the XID is the insert's.
        self.cluster.sql(&format!("WITH inserted AS (INSERT INTO marks (name) VALUES ('{mark}') RETURNING 1) SELECT pg_current_xact_id() FROM inserted"))
    }
}

/// The marks that an instance has, in order of their names, separated by commas.
pub fn marks(instance: &Instance) -> Result<String> {
    instance.sql("SELECT coalesce(string_agg(name, ',' ORDER BY name), '') FROM marks")
}
