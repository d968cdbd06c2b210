//! Every supported major version: backup, WAL, restore.
//!
//! The builds for the tests have `initdb`, `pg_ctl` and `postgres` only. What needs `pg_waldump` (times, restore points
//! and transactions behind a backup), `pg_amcheck`, `pg_checksums` or `pg_verifybackup` is proven on PostgreSQL 15;
//! `psql` and `pgbench` are 15's too, which speak to all of them.

use crate::support::json::find_text;
use crate::support::*;

/// Everything that differs between versions is met: the names of the backup functions, the control file, the defaults
/// of `initdb`, what a backup leaves out, which settings a recovery knows.
fn backed_up_and_restored(major: u32) -> Result<()> {
    let world = World::of_major(major, 1)?;
    let tablespace = world.scratch.directory("space")?;
    world.cluster.sql(&format!("CREATE TABLESPACE space LOCATION '{}'", tablespace.display()))?;
    world.cluster.sql("CREATE TABLE far (id int) TABLESPACE space; INSERT INTO far SELECT generate_series(1, 1000)")?;
    world.cluster.sql("CREATE UNLOGGED TABLE unlogged AS SELECT generate_series(1, 1000) AS id")?;
    world.mark("before")?;
    let load = world.cluster.pgbench_load()?;
    let first = world.backup()?;
    drop(load);
    let second = world.backup()?;
    ensure!(find_text(&first, "label") != find_text(&second, "label"), "one backup only");
    world.mark("a")?;
    let lsn = world.cluster.sql("SELECT pg_current_wal_insert_lsn()")?;
    world.mark("b")?;
    world.cluster.archive_wal()?;
    let balance = "SELECT sum(abalance) = (SELECT sum(delta) FROM pgbench_history) FROM pgbench_accounts";

    for (target, expected) in
        [(&[][..], "a,b,before"), (&["--target-immediate"], "before"), (&["--target-lsn", &lsn], "a,before")]
    {
        let elsewhere = world.scratch.join("space-restored");
        let remapped = format!("space={}", elsewhere.display());
        let restored = world.restore(&[target, &["--tablespace", &remapped]].concat())?;
        let context = || format!("PostgreSQL {major}, {target:?}");
        ensure!(marks(&restored)? == expected, "{}: {}", context(), marks(&restored)?);
        ensure!(restored.sql(balance)? == "t", "{}: the balances are wrong", context());
        ensure!(restored.number("SELECT count(*) FROM far")? == 1000, "{}: the tablespace's rows", context());
        ensure!(restored.number("SELECT count(*) FROM unlogged")? == 0, "{}: unlogged rows", context());
        ensure!(restored.sql("SELECT pg_is_in_recovery()")? == "f", "{}: still in recovery", context());
        ensure!(restored.sql("SHOW restore_command")?.is_empty(), "{}: settings are left", context());
        ensure!(restored.number("SHOW server_version_num")? / 10_000 == i64::from(major), "{}", context());
        drop(restored);
        std::fs::remove_dir_all(world.target())?;
        std::fs::remove_dir_all(elsewhere)?;
    }

    let id = session_of(
        &world
            .restore_to(
                &world.target(),
                &[
                    "--target-lsn",
                    &lsn,
                    "--action",
                    "pause",
                    "--json",
                    "--tablespace",
                    &format!("space={}", world.scratch.join("p").display()),
                ],
            )?
            .expect_code(0)?,
    )?;
    let paused = Instance::running_in(&world.target())?;
    ensure!(marks(&paused)? == "a,before", "PostgreSQL {major}: paused at {}", marks(&paused)?);
    world.pghydrant.succeed(["promote", &id])?;
    let promoted = Instance::running_in(&world.target())?;
    ensure!(promoted.sql("SELECT pg_is_in_recovery()")? == "f", "PostgreSQL {major}: not promoted");
    drop(promoted);
    std::fs::remove_dir_all(world.target())?;

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
