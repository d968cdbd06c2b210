//! Backups of a standby: they restore like any other, and what a standby cannot do is waited for or refused.

use std::time::Duration;

use crate::support::process::wait_until;
use crate::support::*;

/// A streaming standby of the world's cluster.
fn standby_of(world: &World) -> Result<Instance> {
    let data = world.scratch.join("standby");
    let run = world.cluster.client("pg_basebackup")?.args(["--checkpoint=fast", "--write-recovery-conf", "-D"]);
    run.arg(&data).succeed()?;
    let standby = Instance { data, port: cluster::free_port()?, sockets: world.cluster.sockets.clone() };
    standby.configure(&format!("port = {}", standby.port))?;
    standby.start()?;
    Ok(standby)
}

fn caught_up(world: &World, standby: &Instance) -> Result<()> {
    let position = world.cluster.wal_position()?;
    wait_until("the standby", Duration::from_secs(180), || {
        Ok(standby.sql(&format!("SELECT pg_last_wal_replay_lsn() >= '{position}'"))? == "t")
    })
}

fn backup_arguments(world: &World, server: &Instance, more: &[&str]) -> Vec<String> {
    let connection = server.connection_string();
    world.repository.arguments(&["backup"], &[&["--dbname", &connection], more].concat())
}

#[test]
fn a_backup_of_a_standby_under_load_restores_to_every_moment_behind_it() -> Result<()> {
    requires!(Postgres, Fuse);
    let world = World::new(1)?;
    let standby = standby_of(&world)?;
    world.mark("before")?;
    caught_up(&world, &standby)?;
    let load = world.cluster.pgbench_load()?;
    let primary = world.cluster.connection_string();
    let backup = world.pghydrant.succeed(backup_arguments(&world, &standby, &["--primary", &primary]))?;
    drop(load);
    ensure!(backup.stderr.contains("a standby"), "{backup}");
    let xid = world.mark("a")?;
    world.mark("b")?;
    world.cluster.archive_wal()?;
    let balance = "SELECT sum(abalance) = (SELECT sum(delta) FROM pgbench_history) FROM pgbench_accounts";
    for (target, expected) in
        [(&[][..], "a,b,before"), (&["--target-immediate"], "before"), (&["--target-xid", &xid], "a,before")]
    {
        let restored = world.restore(target)?;
        ensure!(marks(&restored)? == expected, "{target:?}: {}", marks(&restored)?);
        ensure!(restored.sql(balance)? == "t", "{target:?}: the balances are wrong");
        ensure!(restored.sql("SELECT pg_is_in_recovery()")? == "f", "{target:?}: still a standby");
        restored.check_relations()?;
        drop(restored);
        std::fs::remove_dir_all(world.target())?;
    }
    // Of the same cluster, so its primary's backup goes on where it ended.
    let of_primary = world.backup()?;
    ensure!(of_primary["parent"].is_string(), "{of_primary}");
    world.restore_to(&world.target(), &["--no-start"])?.expect_code(0)?;
    let data = world.target();
    let verified = world.cluster.client("pg_verifybackup")?.arg("-n").arg(&data).finish()?;
    ensure!(verified.code == Some(0), "{verified}");
    Ok(())
}

#[test]
fn without_an_archive_the_wal_is_read_from_the_standby() -> Result<()> {
    requires!(Postgres);
    let world = World::new(0)?;
    let standby = standby_of(&world)?;
    world.cluster.sql("ALTER SYSTEM SET archive_command = '/bin/false'")?;
    world.cluster.sql("SELECT pg_reload_conf()")?;
    world.mark("before")?;
    caught_up(&world, &standby)?;
    // Nothing ends the segment but the primary's own work.
    let mut backup = world.pghydrant.start(backup_arguments(&world, &standby, &[]))?;
    wait_until("the note that names the segment", Duration::from_secs(180), || {
        ensure!(backup.try_status()?.is_none(), "the backup ended: {}", backup.stderr_so_far()?);
        Ok(backup.stderr_so_far()?.contains("pg_switch_wal()"))
    })?;
    world.cluster.sql("SELECT pg_switch_wal()")?;
    let finished = backup.wait()?.expect_code(0)?;
    ensure!(finished.stdout.contains("read from the server"), "{finished}");
    let restored = world.restore(&["--source", "blocks"])?;
    assert_eq!(marks(&restored)?, "before");
    Ok(())
}

#[test]
fn a_standby_that_is_promoted_meanwhile_has_no_backup() -> Result<()> {
    requires!(Postgres);
    let world = World::new(0)?;
    let standby = standby_of(&world)?;
    // The backup's end is in the middle of a segment then.
    world.mark("before")?;
    world.cluster.sql("CHECKPOINT")?;
    caught_up(&world, &standby)?;
    let mut backup = world.pghydrant.start(backup_arguments(&world, &standby, &[]))?;
    wait_until("the note that names the segment", Duration::from_secs(180), || {
        ensure!(backup.try_status()?.is_none(), "the backup ended: {}", backup.stderr_so_far()?);
        Ok(backup.stderr_so_far()?.contains("pg_switch_wal()"))
    })?;
    // The backup itself is over, but its last segment never comes: it stays on the old timeline.
    standby.sql("SELECT pg_promote()")?;
    world.cluster.stop("immediate")?;
    let finished = backup.wait()?;
    ensure!(finished.code == Some(1), "{finished}");
    ensure!(finished.stderr.contains("promoted"), "{finished}");
    Ok(())
}

#[test]
fn a_primary_that_is_none_is_refused() -> Result<()> {
    requires!(Postgres);
    let world = World::new(0)?;
    let standby = standby_of(&world)?;
    let itself = standby.connection_string();
    world.pghydrant.fail(backup_arguments(&world, &standby, &["--primary", &itself]), 3, &["is a standby itself"])?;
    let other = Cluster::build(&world.scratch, "other").start()?;
    let stranger = other.connection_string();
    world.pghydrant.fail(
        backup_arguments(&world, &standby, &["--primary", &stranger]),
        3,
        &["system identifiers differ"],
    )?;
    world.pghydrant.fail(
        backup_arguments(&world, &world.cluster, &["--primary", &stranger]),
        2,
        &["this server is a primary"],
    )?;
    Ok(())
}
