//! The verb `demo`: a cluster, a backup, a disaster, a restore, and the proof, in a directory of its own.
//!
//! It does what a user would do, by running the very commands a user would run, and prints each; so it is also the
//! shortest tour of the program. As root it plays both parts: the cluster belongs to an ordinary user, who archives and
//! backs up, and root restores on that user's behalf. Without FUSE it restores with `--source blocks` and says so.
//!
//! Whatever happens, Ctrl-C included, its servers are stopped, its mounts are taken away and its directory is removed;
//! with `--keep` the directory stays.

mod ledger;
mod playground;

use std::path::PathBuf;
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::json;

use crate::context::Context;
use crate::exit::{Exit, Failure};
use crate::human;
use crate::postgres::binaries::Binaries;

use ledger::Ledger;
use playground::{Playground, Server};

/// pgbench's unit is 100,000 accounts: 15 MB.
const SCALE_DEFAULT: u32 = 20;
/// What the disaster is named after.
const RESTORE_POINT: &str = "before_the_disaster";
/// A server process that lost its client has this long to notice.
const SESSIONS_END: Duration = Duration::from_secs(60);
/// How long transactions run before the backup has something to share the disk with, and after it.
const LOAD: Duration = Duration::from_secs(4);

/// Options of the verb.
#[derive(clap::Args, Debug)]
pub(crate) struct Arguments {
    /// Work in DIR, which must not exist or be empty, and leave everything there
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    /// Size of the data, in units of pgbench's 15 MB
    #[arg(long, value_name = "N", default_value_t = SCALE_DEFAULT, value_parser = clap::value_parser!(u32).range(1..=1000))]
    scale: u32,
    /// Directory of the PostgreSQL server's programs [default: the newest installed]
    #[arg(long, value_name = "DIR")]
    pg_bin: Option<PathBuf>,
}

pub(crate) fn run(arguments: &Arguments, context: &Context) -> Result<Exit> {
    context.catch_interrupts()?;
    let chosen = context.settings.get("pg_bin", arguments.pg_bin.clone().map(Into::into)).map(|(path, _)| path);
    let binaries = Binaries::find(chosen.map(PathBuf::from).as_deref(), None)
        .map_err(|error| Failure::new(Exit::Refused, format!("{error:#}")).hint("apt-get install postgresql"))?;
    let mut playground = Playground::prepare(arguments.keep.as_deref(), binaries, context)?;
    let played = play(&playground, arguments.scale, context);
    playground.clear();
    played?;
    Ok(Exit::Done)
}

/// The story. Every line of it is something that a user does.
fn play(playground: &Playground<'_>, scale: u32, context: &Context) -> Result<()> {
    let mut steps = Steps::begin();
    playground.pghydrant_as_owner(&["init"])?;
    steps.ended("repository", "");

    let original = playground.make_server("original", &[&playground.archive_command()])?;
    let tablespace = playground.owned_directory("tablespace")?;
    original.sql(&format!("CREATE TABLESPACE demo_space LOCATION '{}'", tablespace.display()))?;
    let scale_text = scale.to_string();
    original.pgbench(&["--initialize", "--quiet", "--scale", &scale_text, "--index-tablespace", "demo_space"])?;
    let bytes = original.sql("SELECT sum(pg_database_size(oid))::bigint FROM pg_database")?.parse().unwrap_or(0);
    steps.ended("cluster", &format!("{} in two tablespaces, archived as it grew", human::bytes(bytes)));

    let load = Load::start(&original)?;
    playground.pause(LOAD / 2)?;
    let connection = original.connection_string();
    playground.pghydrant_as_owner(&["backup", "--dbname", &connection])?;
    steps.ended("backup", "while transactions ran");

    playground.pause(LOAD)?;
    load.stop(playground, &original)?;
    let before = Ledger::of(&original)?;
    steps.ended("more work", &format!("{} transactions by now", ledger::grouped(before.transactions)));

    original.sql(&format!("SELECT pg_create_restore_point('{RESTORE_POINT}')"))?;
    context.output.note("disaster: DROP TABLE pgbench_accounts");
    original.sql("DROP TABLE pgbench_accounts")?;
    // Committed after the point: it must not come back.
    original.sql("INSERT INTO pgbench_history (tid, bid, aid, delta, mtime) VALUES (1, 1, 1, 1000000, now())")?;
    original.archive_wal()?;
    steps.ended("disaster", "a table dropped, and work that went on");

    let restored = restore(playground)?;
    steps.ended("restore", &format!("beside the original, to \"{RESTORE_POINT}\""));

    let after = Ledger::of(&restored)?;
    let table = before.compared_with(&after)?;
    steps.ended("proof", "every row is back, every amount is right, nothing from after the point");

    let text = format!("\n{table}\n{}", steps.table());
    context.output.result(&text, &json!({"steps": steps.object(), "before": before, "restored": after}));
    Ok(())
}

fn restore<'p>(playground: &'p Playground<'_>) -> Result<Server<'p>> {
    let restored = playground.server_at("restored")?;
    let (port, to) = (restored.port.to_string(), restored.data_directory.display().to_string());
    let tablespace = playground.owned_directory("restored-tablespace")?;
    let tablespace = format!("demo_space={}", tablespace.display());
    let mut arguments = vec!["restore", "--to", &to, "--port", &port, "--target-name", RESTORE_POINT];
    arguments.extend(["--tablespace", &tablespace]);
    if let Some(reason) = playground.fuse_is_missing() {
        playground.note(&format!("{reason}: the copy reads the repository without a mount"));
        arguments.extend(["--source", "blocks"]);
    }
    playground.pghydrant_as_caller(&arguments)?;
    Ok(restored)
}

/// Transactions in the background; ended when dropped.
struct Load(Child);

impl Load {
    fn start(server: &Server<'_>) -> Result<Self> {
        // A rate that leaves the machine room for the backup, and ends by itself whatever happens to us.
        Ok(Self(server.start_pgbench(&["--client=2", "--no-vacuum", "--rate=500", "--time=300"])?))
    }

    /// Ends it for good: a server process in the middle of its commit, which nobody sees yet, commits before this
    /// returns.
    fn stop(mut self, playground: &Playground<'_>, server: &Server<'_>) -> Result<()> {
        anyhow::ensure!(self.0.try_wait()?.is_none(), "pgbench ended before it was asked to");
        self.end();
        let end = Instant::now() + SESSIONS_END;
        while server.sql("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pgbench'")? != "0" {
            anyhow::ensure!(Instant::now() < end, "pgbench's sessions did not end within {} s", SESSIONS_END.as_secs());
            playground.pause(LOAD / 50)?;
        }
        Ok(())
    }

    fn end(&mut self) {
        playground::end_group(&mut self.0);
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.end();
    }
}

/// The times of the steps, in their order.
struct Steps {
    began: Instant,
    last: Instant,
    ended: Vec<(&'static str, Duration, String)>,
}

impl Steps {
    fn begin() -> Self {
        Self { began: Instant::now(), last: Instant::now(), ended: Vec::new() }
    }

    fn ended(&mut self, name: &'static str, detail: &str) {
        self.ended.push((name, self.last.elapsed(), detail.to_owned()));
        self.last = Instant::now();
    }

    fn table(&self) -> String {
        let line = |name: &str, time: Duration, detail: &str| {
            format!("{name:<12} {:>9}  {detail}", human::duration(time)).trim_end().to_owned()
        };
        let mut lines: Vec<String> = self.ended.iter().map(|(name, time, detail)| line(name, *time, detail)).collect();
        lines.push(line("together", self.began.elapsed(), ""));
        lines.join("\n")
    }

    fn object(&self) -> Vec<serde_json::Value> {
        let object = |(name, time, detail): &(&str, Duration, String)| json!({"step": name, "seconds": time.as_secs_f64(), "detail": detail});
        self.ended.iter().map(object).collect()
    }
}
