//! Tablespaces that the WAL creates on the way to the target: the replay uses the original's path, literally.

use std::fs;

use crate::support::compare::{same_trees, tree};
use crate::support::*;

#[test]
fn a_tablespace_created_after_the_backup_is_never_replayed_into_the_originals_files() -> Result<()> {
    requires!(Postgres);
    let world = World::new(0)?;
    world.backup()?;
    world.mark("a")?;
    let before = world.cluster.wal_position()?;
    let moment = || std::thread::sleep(std::time::Duration::from_millis(50));
    moment();
    let time = world.cluster.sql("SELECT clock_timestamp()")?;
    moment();
    // PostgreSQL stops at a commit: the record of a tablespace comes before its own.
    world.mark("between")?;
    let late = world.scratch.directory("late")?;
    world.cluster.sql(&format!("CREATE TABLESPACE late LOCATION '{}'", late.display()))?;
    world.cluster.sql("CREATE TABLE far TABLESPACE late AS SELECT generate_series(1, 1000) AS id")?;
    world.cluster.sql("UPDATE far SET id = id + 1; CHECKPOINT")?;
    world.mark("b")?;
    world.cluster.archive_wal()?;
    let originals = tree(&late)?;

    let shown = late.display().to_string();
    let to = world.target().display().to_string();
    let restore = |more: &[&str]| {
        world.repository.arguments(&["restore"], &[&["--to", &to, "--source", "blocks"], more].concat())
    };
    let refused = world.pghydrant.fail(restore(&[]), 3, &[&shown, "where a cluster has files", "hint: "])?;
    ensure!(refused.stderr.contains("choose a target before"), "{refused}");
    ensure!(!world.target().exists(), "something was touched");

    for earlier in [["--target-lsn", &before], ["--target-time", &time]] {
        let restored = world.restore(&earlier)?;
        assert_eq!(marks(&restored)?, "a", "{earlier:?}");
        drop(restored);
        fs::remove_dir_all(world.target())?;
    }
    same_trees(&originals, &tree(&late)?, |_| false)?;

    // Once the tablespace is dropped, its directory is nobody's: it comes and goes in the replay.
    world.cluster.sql("DROP TABLE far")?;
    world.cluster.sql("DROP TABLESPACE late")?;
    world.cluster.archive_wal()?;
    let restored = world.restore(&["--source", "blocks"])?;
    assert_eq!(marks(&restored)?, "a,b,between");
    ensure!(fs::read_dir(&late)?.next().is_none(), "files are left in {shown}");
    drop(restored);
    fs::remove_dir_all(world.target())?;
    fs::remove_dir(&late)?;
    world.pghydrant.fail(restore(&[]), 3, &[&shown, "which is not on this machine", "make that directory"])?;
    Ok(())
}

#[test]
fn a_restore_point_of_the_last_minutes_before_a_failover_is_found() -> Result<()> {
    requires!(Postgres);
    let world = World::new(0)?;
    world.backup()?;
    let data = world.scratch.join("standby");
    let run = world.cluster.client("pg_basebackup")?.args(["--checkpoint=fast", "--write-recovery-conf", "-D"]);
    run.arg(&data).succeed()?;
    let standby = Instance { data, port: cluster::free_port()?, sockets: world.cluster.sockets.clone() };
    standby.configure(&format!("port = {}", standby.port))?;
    standby.start()?;
    world.mark("a")?;
    let xid = world.mark("b")?;
    // The end of its record, which nothing else would flush: no transaction was committed by it.
    let position = world.cluster.sql("SELECT pg_create_restore_point('last_words')")?;
    process::wait_until("the standby", std::time::Duration::from_secs(180), || {
        Ok(standby.sql(&format!("SELECT pg_last_wal_replay_lsn() >= '{position}'"))? == "t")
    })?;
    // The primary dies with its last segment; the standby has all of it.
    world.cluster.sql("ALTER SYSTEM SET archive_command = '/bin/false'")?;
    world.cluster.sql("SELECT pg_reload_conf()")?;
    world.cluster.stop("immediate")?;
    standby.sql("SELECT pg_promote()")?;
    standby.sql("INSERT INTO marks (name) VALUES ('c')")?;
    standby.archive_wal()?;
    for (target, expected) in [(["--target-name", "last_words"], "a,b"), (["--target-xid", &xid], "a,b")] {
        let restored = world.restore(&[&target[..], &["--source", "blocks"]].concat())?;
        ensure!(marks(&restored)? == expected, "{target:?}: {}", marks(&restored)?);
        drop(restored);
        fs::remove_dir_all(world.target())?;
    }
    let restored = world.restore(&["--source", "blocks"])?;
    assert_eq!(marks(&restored)?, "a,b,c");
    Ok(())
}
