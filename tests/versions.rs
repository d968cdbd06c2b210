//! Every supported major version: backup, WAL, restore.
//!
//! The builds for the tests have `initdb`, `pg_ctl` and `postgres` only. What needs `pg_waldump` (restore points and
//! transactions behind a backup), `pg_amcheck`, `pg_checksums` or `pg_verifybackup` is proven on PostgreSQL 15;
//! `psql` and `pgbench` are 15's too, which speak to all of them.

use std::time::Duration;

use serde_json::Value;

use crate::support::json::{find, find_text};
use crate::support::*;

/// What a server does at its target. Each version gets another one at each target, so that over all versions every target
/// is met with every action; where restore points can be looked for, they and transactions are met with all of them.
const ACTIONS: [&str; 3] = ["promote", "pause", "shutdown"];

fn looks_into_wal(major: u32) -> bool {
    tools::postgres_bin_of(major).is_some_and(|bin| bin.join("pg_waldump").is_file())
}

/// One cell of the matrix: what is there at the target, that the server does there what it was told, and that it is a
/// database like any other once it has been promoted.
fn ends_as_asked(world: &World, major: u32, target: &[&str], action: &str, expected: &str) -> Result<()> {
    let context = || format!("PostgreSQL {major}, {target:?}, {action}");
    let elsewhere = world.scratch.join("space-restored");
    let remapped = format!("space={}", elsewhere.display());
    let source = if action == "pause" { "blocks" } else { "mount" };
    let own = ["--action", action, "--source", source, "--json", "--tablespace", &remapped];
    let finished = world.restore_to(&world.target(), &[target, &own].concat())?.expect_code(0)?;
    let down = !world.target().join("postmaster.pid").exists();
    ensure!(down == (action == "shutdown"), "{}: {finished}", context());
    if action == "pause" {
        let paused = std::mem::ManuallyDrop::new(Instance::running_in(&world.target())?);
        ensure!(paused.sql("SELECT pg_get_wal_replay_pause_state()")? == "paused", "{}: not paused", context());
        ensure!(marks(&paused)? == expected, "{}: paused with {}", context(), marks(&paused)?);
        if major < 15 {
            assert_eq!(paused.sql("SHOW stats_temp_directory")?, "pg_stat_tmp", "{}: while it recovers", context());
        }
    }
    if action != "promote" {
        world.pghydrant.succeed(["promote", &session_of(&finished)?])?;
    }
    let restored = Instance::running_in(&world.target())?;
    let balance = "SELECT sum(abalance) = (SELECT sum(delta) FROM pgbench_history) FROM pgbench_accounts";
    ensure!(marks(&restored)? == expected, "{}: {}", context(), marks(&restored)?);
    ensure!(restored.sql(balance)? == "t", "{}: the balances are wrong", context());
    ensure!(restored.number("SELECT count(*) FROM far")? == 1000, "{}: the tablespace's rows", context());
    ensure!(restored.number("SELECT count(*) FROM unlogged")? == 0, "{}: unlogged rows", context());
    ensure!(restored.sql("SELECT pg_is_in_recovery()")? == "f", "{}: still in recovery", context());
    ensure!(restored.sql("SHOW restore_command")?.is_empty(), "{}: settings are left", context());
    ensure!(restored.number("SHOW server_version_num")? / 10_000 == i64::from(major), "{}", context());
    for left in ["standby.signal", "recovery.signal", "pghydrant.session"] {
        ensure!(!world.target().join(left).exists(), "{}: {left} is left", context());
    }
    drop(restored);
    std::fs::remove_dir_all(world.target())?;
    std::fs::remove_dir_all(elsewhere)?;
    Ok(())
}

/// Everything that differs between versions is met: the names of the backup functions, the control file, the defaults
/// of `initdb`, what a backup leaves out, which settings a recovery knows.
fn backed_up_and_restored(major: u32) -> Result<()> {
    let world = World::of_major(major, 1)?;
    let statistics = world.scratch.directory("statistics")?;
    if major < 15 {
        // As Debian has it: outside the data directory, of a server that runs beside its copy.
        world.cluster.configure(&format!("stats_temp_directory = '{}'", statistics.display()))?;
        world.cluster.sql("SELECT pg_reload_conf()")?;
    }
    let tablespace = world.scratch.directory("space")?;
    world.cluster.sql(&format!("CREATE TABLESPACE space LOCATION '{}'", tablespace.display()))?;
    world.cluster.sql("CREATE TABLE far (id int) TABLESPACE space; INSERT INTO far SELECT generate_series(1, 1000)")?;
    world.cluster.sql("CREATE UNLOGGED TABLE unlogged AS SELECT generate_series(1, 1000) AS id")?;
    world.mark("before")?;
    // From PostgreSQL 16 on a build without ICU has a collation of it as well.
    let has_icu = world.cluster.sql("CREATE COLLATION german (provider = icu, locale = 'de')").is_ok();
    if has_icu {
        world.cluster.sql("CREATE INDEX ON marks (name COLLATE german)")?;
    }
    let load = world.cluster.pgbench_load()?;
    let first = world.backup()?;
    drop(load);
    what_its_databases_need_is_known(&first, major, has_icu)?;
    let second = world.backup()?;
    ensure!(find_text(&first, "label") != find_text(&second, "label"), "one backup only");
    world.mark("a")?;
    let lsn = world.cluster.sql("SELECT pg_current_wal_insert_lsn()")?;
    world.cluster.sql("SELECT pg_create_restore_point('here')")?;
    // Commit times have microseconds; a target between two of them needs a moment.
    std::thread::sleep(Duration::from_millis(50));
    let time = world.cluster.sql("SELECT clock_timestamp()")?;
    std::thread::sleep(Duration::from_millis(50));
    let xid = world.mark("b")?;
    let late = world.cluster.sql("SELECT clock_timestamp()")?;
    // When a segment was archived is known to the second.
    std::thread::sleep(Duration::from_millis(1100));
    world.cluster.archive_wal()?;
    let cells = [
        (vec![], "a,b,before"),
        (vec!["--target-immediate"], "before"),
        (vec!["--target-lsn", &lsn], "a,before"),
        (vec!["--target-time", &time], "a,before"),
    ];
    for (number, (target, expected)) in (0..).zip(&cells) {
        ends_as_asked(&world, major, target, ACTIONS[(number + major as usize) % ACTIONS.len()], expected)?;
    }
    if looks_into_wal(major) {
        for action in ACTIONS {
            ends_as_asked(&world, major, &["--target-xid", &xid], action, "a,b,before")?;
            ends_as_asked(&world, major, &["--target-name", "here"], action, "a,before")?;
        }
    }
    what_cannot_be_proven_is_told(&world, major, &late, &xid)?;

    let elsewhere = format!("space={}", world.scratch.join("e").display());
    let arguments = ["--action", "pause", "--json", "--tablespace", &elsewhere];
    let id = session_of(&world.restore_to(&world.target(), &arguments)?.expect_code(0)?)?;
    let paused = Instance::running_in(&world.target())?;
    ensure!(paused.sql("SELECT pg_get_wal_replay_pause_state()")? == "paused", "PostgreSQL {major}: not paused");
    ensure!(marks(&paused)? == "a,b,before", "PostgreSQL {major}: {} at the end of the WAL", marks(&paused)?);
    world.pghydrant.succeed(["promote", &id])?;
    let promoted = Instance::running_in(&world.target())?;
    ensure!(promoted.sql("SELECT pg_is_in_recovery()")? == "f", "PostgreSQL {major}: not promoted");
    ensure!(!world.target().join("standby.signal").exists(), "PostgreSQL {major}: standby.signal is left");
    world.pghydrant.succeed(["verify", "--repo", &world.repository.shown()])?;
    Ok(())
}

/// The catalogs tell it in other words in almost every version.
fn what_its_databases_need_is_known(backup: &Value, major: u32, has_icu: bool) -> Result<()> {
    let environment = find(backup, "environment").context("nothing is recorded")?;
    let databases = environment["databases"].as_array().context("no databases")?;
    let main = databases.iter().find(|one| one["name"] == "postgres").context("no database postgres")?;
    ensure!(main["unknown"] == Value::Null, "PostgreSQL {major}: {}", main["unknown"]);
    ensure!(main["locale"]["provider"] == "libc" && main["locale"]["ctype"] == "C", "PostgreSQL {major}: {main}");
    ensure!(main["extensions"][0]["name"] == "plpgsql", "PostgreSQL {major}: {main}");
    ensure!(environment["libc_version"].is_string(), "PostgreSQL {major}: {environment}");
    if has_icu {
        ensure!(environment["icu_version"].is_string(), "PostgreSQL {major}: {environment}");
        let collations = main["collations"].as_array().context("no collations")?;
        let german = collations.iter().find(|one| one["name"] == "german").context("no collation")?;
        let known = german["indexes"] == 1 && german["locale"]["name"] == "de" && german["locale"]["provider"] == "icu";
        ensure!(known, "PostgreSQL {major}: {german}");
    }
    Ok(())
}

/// Where there is no `pg_waldump`, nobody knows before the replay whether a transaction behind a time is in the WAL; the
/// end of a transaction is known to lie before a later backup. With it, all is known.
fn what_cannot_be_proven_is_told(world: &World, major: u32, late: &str, xid: &str) -> Result<()> {
    let target = world.target();
    let elsewhere = format!("space={}", world.scratch.join("u").display());
    let restore = |arguments: &[&str]| world.restore_to(&target, &[arguments, &["--tablespace", &elsewhere]].concat());
    if looks_into_wal(major) {
        restore(&["--target-time", late])?.expect_code(3)?.expect_stderr(&["is not before the last transaction"])?;
        return Ok(());
    }
    let plan = restore(&["--target-time", late, "--plan"])?.expect_code(0)?;
    ensure!(plan.stdout.contains("not proven") && plan.stderr.contains("pg_waldump is missing"), "{plan}");
    let missed = restore(&["--target-time", late])?.expect_code(5)?;
    missed.expect_stderr(&["recovery ended before configured recovery target was reached", "hint: "])?;
    // The copy is good, and has replayed everything: what it could not reach is no reason to copy again.
    let id = open_session(&world.pghydrant)?;
    world.pghydrant.succeed(["retarget", &id, "--action", "pause"])?;
    let paused = Instance::running_in(&target)?;
    ensure!(marks(&paused)? == "a,b,before", "PostgreSQL {major}: moved on to {}", marks(&paused)?);
    world.pghydrant.succeed(["cancel", &id])?;
    for goal in [["--target-name", "x"], ["--target-xid", xid]] {
        let refused = restore(&goal)?.expect_code(3)?;
        refused
            .expect_stderr(&["cannot be looked for in the WAL: pg_waldump is missing", "hint: install the package"])?;
    }
    world.backup()?;
    let restored = restore(&["--target-xid", xid])?.expect_code(0)?.expect_stderr(&["not proven: the end of "])?;
    let instance = Instance::running_in(&target)?;
    ensure!(marks(&instance)? == "a,b,before", "PostgreSQL {major}: {}\n{restored}", marks(&instance)?);
    drop(instance);
    std::fs::remove_dir_all(&target)?;
    std::fs::remove_dir_all(world.scratch.join("u"))?;
    Ok(())
}

#[test]
fn postgresql_14_is_backed_up_and_restored() -> Result<()> {
    requires!(Postgres, Fuse, Major(14));
    backed_up_and_restored(14)
}

#[test]
fn postgresql_15_is_backed_up_and_restored() -> Result<()> {
    requires!(Postgres, Fuse, Major(15));
    backed_up_and_restored(15)
}

#[test]
fn postgresql_16_is_backed_up_and_restored() -> Result<()> {
    requires!(Postgres, Fuse, Major(16));
    backed_up_and_restored(16)
}

#[test]
fn postgresql_17_is_backed_up_and_restored() -> Result<()> {
    requires!(Postgres, Fuse, Major(17));
    backed_up_and_restored(17)
}

#[test]
fn postgresql_18_is_backed_up_and_restored() -> Result<()> {
    requires!(Postgres, Fuse, Major(18));
    backed_up_and_restored(18)
}
