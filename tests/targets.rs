//! Every kind of recovery target and action, checked by what must be there and what must not.

use std::path::PathBuf;
use std::time::Duration;

use crate::support::json::find_all;
use crate::support::process::wait_until;
use crate::support::repository::Damage;
use crate::support::*;

/// Marks a, b, c in transactions of their own after a backup, with a restore point before c; all of it archived.
struct Story {
    world: World,
    lsn_after_a: String,
    time_after_a: String,
    xid_of_b: String,
}

impl Story {
    fn tell() -> Result<Self> {
        let world = World::new(1)?;
        world.mark("before")?;
        world.backup()?;
        world.mark("a")?;
        let lsn_after_a = world.cluster.sql("SELECT pg_current_wal_insert_lsn()")?;
        // Commit times have microseconds; a target between two of them needs a moment.
        std::thread::sleep(Duration::from_millis(50));
        let time_after_a = world.cluster.sql("SELECT clock_timestamp()")?;
        std::thread::sleep(Duration::from_millis(50));
        let xid_of_b = world.mark("b")?;
        world.cluster.sql("SELECT pg_create_restore_point('after_b')")?;
        world.mark("c")?;
        world.cluster.archive_wal()?;
        Ok(Self { world, lsn_after_a, time_after_a, xid_of_b })
    }

    /// Restores, and the marks must be these; the server is up, read-write, out of recovery.
    fn ends_with(&self, arguments: &[&str], expected: &str) -> Result<()> {
        let restored = self.world.restore(arguments)?;
        ensure!(marks(&restored)? == expected, "{arguments:?}: {} instead of {expected}", marks(&restored)?);
        ensure!(restored.sql("SELECT pg_is_in_recovery()")? == "f", "{arguments:?}: still in recovery");
        restored.sql("CREATE TABLE writable ()")?;
        ensure!(
            restored.number("SELECT count(*) FROM pgbench_accounts")? == 100_000,
            "{arguments:?}: rows are missing"
        );
        self.settings_are_gone(&restored)?;
        drop(restored);
        std::fs::remove_dir_all(self.world.target())?;
        ensure!(filesystem::fuse_mounts_below(self.world.scratch.path()).is_empty(), "{arguments:?}: a mount is left");
        Ok(())
    }

    /// `postgresql.conf` says what the original's says, but for the port.
    fn settings_are_gone(&self, restored: &Instance) -> Result<()> {
        for setting in ["restore_command", "recovery_target", "recovery_target_name", "recovery_target_time"] {
            ensure!(restored.sql(&format!("SHOW {setting}"))?.is_empty(), "{setting} is still set");
        }
        ensure!(!restored.data.join("recovery.signal").exists(), "recovery.signal is left");
        ensure!(!restored.data.join("pghydrant.session").exists(), "pghydrant.session is left");
        Ok(())
    }
}

#[test]
fn every_kind_of_target_ends_where_it_should() -> Result<()> {
    requires!(Postgres, Fuse);
    let story = Story::tell()?;
    story.ends_with(&[], "a,b,before,c")?;
    story.ends_with(&["--target-immediate"], "before")?;
    story.ends_with(&["--target-time", &story.time_after_a], "a,before")?;
    story.ends_with(&["--target-lsn", &story.lsn_after_a], "a,before")?;
    story.ends_with(&["--target-xid", &story.xid_of_b], "a,b,before")?;
    story.ends_with(&["--target-xid", &story.xid_of_b, "--target-exclusive"], "a,before")?;
    story.ends_with(&["--target-name", "after_b"], "a,b,before")?;
    story.ends_with(&["--target-name", "after_b", "--source", "blocks"], "a,b,before")
}

#[test]
fn a_paused_restore_is_promoted_by_its_id() -> Result<()> {
    requires!(Postgres, Fuse);
    let story = Story::tell()?;
    let finished =
        story.world.restore_to(&story.world.target(), &["--target-name", "after_b", "--action", "pause", "--json"])?;
    let id = session_of(&finished.expect_code(0)?)?;
    let paused = Instance::running_in(&story.world.target())?;
    assert_eq!(paused.sql("SELECT pg_is_in_recovery(), pg_get_wal_replay_pause_state()")?, "t|paused");
    assert_eq!(marks(&paused)?, "a,b,before");
    // A reload before the promotion must not lose the target.
    paused.sql("SELECT pg_reload_conf()")?;
    assert_eq!(paused.sql("SHOW recovery_target_name")?, "after_b");
    let sessions = story.world.pghydrant.succeed(["sessions", "--json"])?;
    assert!(sessions.stdout.contains(&id), "{sessions}");

    story.world.pghydrant.succeed(["promote", &id])?;
    let promoted = Instance::running_in(&story.world.target())?;
    assert_eq!(promoted.sql("SELECT pg_is_in_recovery()")?, "f");
    assert_eq!(marks(&promoted)?, "a,b,before");
    story.settings_are_gone(&promoted)
}

#[test]
fn a_paused_restore_that_somebody_promotes_by_hand_is_finished_and_not_cancelled() -> Result<()> {
    requires!(Postgres, Fuse);
    let story = Story::tell()?;
    let finished =
        story.world.restore_to(&story.world.target(), &["--target-name", "after_b", "--action", "pause", "--json"])?;
    let id = session_of(&finished.expect_code(0)?)?;
    let target = story.world.target();
    let promote = Run::new(tools::postgres_program("pg_ctl")?).user(OsUser::server()).args(["promote", "-w", "-D"]);
    promote.arg(&target).succeed()?;
    let paused = Instance::running_in(&target)?;
    paused.sql("CREATE TABLE since ()")?;
    // What it holds by now is nowhere else.
    story.world.pghydrant.fail(["cancel", &id], 2, &["has left recovery", "hint: `pghydrant promote "])?;
    story.world.pghydrant.succeed(["promote", &id])?;
    let promoted = Instance::running_in(&target)?;
    assert_eq!(promoted.sql("SELECT count(*) FROM since")?, "0");
    assert_eq!(marks(&promoted)?, "a,b,before");
    story.settings_are_gone(&promoted)
}

#[test]
fn a_session_whose_directory_was_replaced_leaves_the_new_one_alone() -> Result<()> {
    requires!(Postgres, Fuse);
    let story = Story::tell()?;
    let target = story.world.target();
    let paused = ["--target-name", "after_b", "--action", "pause", "--json"];
    let first = session_of(&story.world.restore_to(&target, &paused)?.expect_code(0)?)?;
    // Somebody gives it up by hand, and restores again.
    Instance::running_in(&target)?.stop("immediate")?;
    std::fs::remove_dir_all(&target)?;
    let second = session_of(&story.world.restore_to(&target, &paused)?.expect_code(0)?)?;
    let configuration = std::fs::read(target.join("postgresql.conf"))?;
    let server = std::fs::read(target.join("postmaster.pid"))?;
    story.world.pghydrant.fail(["promote", &first], 3, &[&second, "hint: "])?;
    story.world.pghydrant.succeed(["cancel", &first])?;
    assert_eq!(open_session(&story.world.pghydrant)?, second);
    assert_eq!(std::fs::read(target.join("postgresql.conf"))?, configuration);
    assert_eq!(std::fs::read(target.join("postmaster.pid"))?, server);
    assert_eq!(Instance::running_in(&target)?.sql("SELECT pg_is_in_recovery()")?, "t");
    story.world.pghydrant.succeed(["cancel", &second])?;
    assert!(!target.exists());
    Ok(())
}

#[test]
fn a_restore_that_shuts_down_at_its_target_is_promoted_by_its_id() -> Result<()> {
    requires!(Postgres, Fuse);
    let story = Story::tell()?;
    let arguments = ["--target-name", "after_b", "--action", "shutdown", "--json"];
    let id = session_of(&story.world.restore_to(&story.world.target(), &arguments)?.expect_code(0)?)?;
    assert!(!story.world.target().join("postmaster.pid").exists());

    story.world.pghydrant.succeed(["promote", &id])?;
    let promoted = Instance::running_in(&story.world.target())?;
    assert_eq!(marks(&promoted)?, "a,b,before");
    story.settings_are_gone(&promoted)
}

/// PostgreSQL has no target at the end of the WAL to pause at: a standby waits there.
#[test]
fn a_restore_to_the_end_of_the_wal_waits_there_until_it_is_promoted() -> Result<()> {
    requires!(Postgres, Fuse);
    let story = Story::tell()?;
    let (world, target) = (&story.world, story.world.target());
    let plan = world.restore_to(&target, &["--action", "pause", "--plan"])?.expect_code(0)?;
    assert!(plan.stdout.contains("pause, readable, until `pghydrant promote`"), "{plan}");

    let id = session_of(&world.restore_to(&target, &["--action", "pause", "--json"])?.expect_code(0)?)?;
    let paused = Instance::running_in(&target)?;
    assert_eq!(paused.sql("SELECT pg_is_in_recovery(), pg_get_wal_replay_pause_state()")?, "t|paused");
    assert_eq!(marks(&paused)?, "a,b,before,c");
    ensure!(target.join("standby.signal").exists() && !target.join("recovery.signal").exists(), "the signal files");
    ensure!(!target.join("pg_wal/pghydrant.staging").exists(), "the staging directory is left");
    world.pghydrant.succeed(["promote", &id])?;
    let promoted = Instance::running_in(&target)?;
    assert_eq!(promoted.sql("SELECT pg_is_in_recovery()")?, "f");
    assert_eq!(marks(&promoted)?, "a,b,before,c");
    ensure!(!target.join("standby.signal").exists(), "standby.signal is left");
    story.settings_are_gone(&promoted)?;
    drop(promoted);
    std::fs::remove_dir_all(&target)?;

    let id = session_of(&world.restore_to(&target, &["--action", "shutdown", "--json"])?.expect_code(0)?)?;
    ensure!(!target.join("postmaster.pid").exists(), "it runs");
    let sessions = world.pghydrant.succeed(["sessions"])?;
    assert!(sessions.stdout.contains("shut down at its target"), "{sessions}");
    // What is archived from now on comes too late for it.
    world.mark("d")?;
    world.cluster.archive_wal()?;
    world.pghydrant.succeed(["promote", &id])?;
    let promoted = Instance::running_in(&target)?;
    assert_eq!(marks(&promoted)?, "a,b,before,c");
    ensure!(!target.join("standby.signal").exists(), "standby.signal is left");
    story.settings_are_gone(&promoted)?;
    drop(promoted);
    std::fs::remove_dir_all(&target)?;

    let id = session_of(&world.restore_to(&target, &["--action", "pause", "--json"])?.expect_code(0)?)?;
    world.pghydrant.succeed(["cancel", &id])?;
    ensure!(!target.exists(), "something is left");
    let refused = world.restore_to(&target, &["--action", "shutdown", "--no-start"])?.expect_code(3)?;
    refused.expect_stderr(&["PostgreSQL does not shut down at the end of the WAL", "hint: "])?;
    Ok(())
}

/// After a reboot, say: `retry` brings it back to where it waited, not to the end of what was archived meanwhile.
#[test]
fn a_server_that_was_paused_and_is_down_waits_again_where_it_did() -> Result<()> {
    requires!(Postgres, Fuse);
    let story = Story::tell()?;
    let (world, target) = (&story.world, story.world.target());
    for (arguments, expected) in [
        (&["--action", "pause", "--json"][..], "a,b,before,c"),
        (&["--action", "pause", "--json", "--target-name", "after_b"], "a,b,before"),
    ] {
        let id = session_of(&world.restore_to(&target, arguments)?.expect_code(0)?)?;
        Instance::running_in(&target)?.stop("immediate")?;
        world.mark("later")?;
        world.cluster.archive_wal()?;
        world.pghydrant.succeed(["retry", &id])?;
        let paused = Instance::running_in(&target)?;
        assert_eq!(paused.sql("SELECT pg_is_in_recovery(), pg_get_wal_replay_pause_state()")?, "t|paused");
        assert_eq!(marks(&paused)?, expected);
        world.pghydrant.fail(["retry", &id], 2, &["nothing to retry"])?;
        world.pghydrant.succeed(["promote", &id])?;
        let promoted = Instance::running_in(&target)?;
        assert_eq!(marks(&promoted)?, expected);
        world.pghydrant.fail(["retry", &id], 2, &["is finished"])?;
        drop(promoted);
        std::fs::remove_dir_all(&target)?;
        world.cluster.sql("DELETE FROM marks WHERE name = 'later'")?;
        world.cluster.archive_wal()?;
    }
    Ok(())
}

/// Started with a configuration of somebody else's, say Debian's in `/etc`, it replays past its target and opens.
#[test]
fn a_server_that_opened_without_its_target_is_not_called_recovered() -> Result<()> {
    requires!(Postgres, Fuse);
    let story = Story::tell()?;
    let (world, target) = (&story.world, story.world.target());
    let paused = ["--target-name", "after_b", "--action", "pause", "--json"];
    let id = session_of(&world.restore_to(&target, &paused)?.expect_code(0)?)?;
    let server = Instance::running_in(&target)?;
    server.stop("fast")?;
    let conf = std::fs::read_to_string(target.join("postgresql.conf"))?;
    let other: Vec<&str> = conf.lines().filter(|line| !line.contains("recovery_target")).collect();
    let other_path = world.scratch.join("other.conf");
    std::fs::write(&other_path, other.join("\n") + "\n")?;
    let start = Run::new(tools::postgres_program("pg_ctl")?).user(OsUser::server()).args(["start", "-w", "-D"]);
    let options = format!("-c config_file={}", other_path.display());
    start.arg(&target).arg("-l").arg(world.scratch.join("other.log")).args(["-o", &options]).succeed()?;
    wait_until("the end of the recovery", Duration::from_secs(120), || {
        Ok(!target.join("recovery.signal").exists() && server.sql("SELECT pg_is_in_recovery()")? == "f")
    })?;
    world.pghydrant.fail(
        ["promote", &id],
        5,
        &["did not stop at its target", "no recovery target specified", "hint: "],
    )?;
    server.stop("immediate")?;
    Ok(())
}

#[test]
fn a_restore_that_waits_at_the_end_of_the_wal_survives_a_crash_of_pghydrant() -> Result<()> {
    requires!(Postgres, Fuse);
    let story = Story::tell()?;
    let (world, target) = (&story.world, story.world.target());
    let (to, port) = (target.display().to_string(), cluster::free_port()?.to_string());
    for (step, action) in [("start", "pause"), ("recover", "pause"), ("recover", "shutdown")] {
        let arguments = ["--to", &to, "--port", &port, "--action", action];
        let mut running = world.pghydrant.start(world.repository.arguments(&["restore"], &arguments))?;
        running.wait_for_output(step, |seen| seen.lines().any(|line| line.starts_with(&format!("  {step} "))))?;
        let killed = running.kill()?;
        let what = || format!("killed after {step}, {action}\n{killed}");
        let id = open_session(&world.pghydrant).with_context(what)?;
        // It may have come to its target just before.
        if !world.pghydrant.succeed(["sessions", "--json"])?.stdout.contains("\"at_target\":\"") {
            world.pghydrant.run(["retry", &id])?.expect_code(0).with_context(what)?;
        }
        match action {
            "pause" => ensure!(marks(&Instance::running_in(&target)?)? == "a,b,before,c", "{}", what()),
            _ => ensure!(!target.join("postmaster.pid").exists(), "{}", what()),
        }
        world.pghydrant.run(["cancel", &id])?.expect_code(0).with_context(what)?;
    }
    Ok(())
}

/// A backup whose last WAL went missing after preflight had seen it: nothing is consistent there.
#[test]
fn the_end_of_the_wal_before_the_end_of_the_backup_is_no_place_to_wait_at() -> Result<()> {
    requires!(Postgres, Fuse);
    let world = World::new(1)?;
    world.mark("before")?;
    let (dbname, target) = (world.cluster.connection_string(), world.target());
    // A checkpoint with much to write: its record is then mostly in a later segment than the place to replay from, and
    // without that record the server does not even begin.
    world.cluster.sql("UPDATE pgbench_accounts SET abalance = abalance + 1")?;
    // Ends a segment twenty times a second, so that the backup does not end in the one that it began in.
    let switches = "DO $$ BEGIN FOR i IN 1..200 LOOP PERFORM pg_logical_emit_message(false, 'test', 'x'); \
        PERFORM pg_switch_wal(); PERFORM pg_sleep(0.05); END LOOP; END $$";
    let switching = world.cluster.client("psql")?.args(["-XAtqc", switches]).start()?;
    std::thread::sleep(Duration::from_millis(300));
    world.pghydrant.succeed(world.repository.arguments(&["backup"], &["--dbname", &dbname]))?;
    switching.kill()?;
    // Its server process would go on to the end.
    world.cluster.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'DO %'")?;
    world.cluster.archive_wal()?;
    let (to, port) = (target.display().to_string(), cluster::free_port()?.to_string());
    let arguments = ["--to", &to, "--port", &port, "--action", "shutdown"];
    let mut running = world.pghydrant.start(world.repository.arguments(&["restore"], &arguments))?;
    running.wait_for_output("configure", |seen| seen.lines().any(|line| line.starts_with("  configure ")))?;
    let killed = running.kill()?;
    let history = world.repository.file(|path| path.ends_with(".backup"))?;
    let first = history.file_name().and_then(|name| name.to_str()?.get(..24)).unwrap_or_default().to_owned();
    let later = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        path.starts_with("clusters/main/wal") && name.len() == 24 && name > first
    };
    let later: Vec<PathBuf> = world.repository.files()?.into_iter().filter(later).collect();
    ensure!(!first.is_empty() && later.len() > 1, "{later:?} after \"{first}\"\n{killed}");
    let mends: Result<Vec<_>> =
        later.iter().map(|path| Damage::Deleted.inflict(&world.repository.path().join(path))).collect();
    let mends = mends?;
    let id = open_session(&world.pghydrant)?;
    world.pghydrant.fail(["retry", &id], 5, &["is missing from the archive, which goes on with backup", "hint: "])?;
    drop(mends);
    world.pghydrant.succeed(["retry", &id])?;
    ensure!(!target.join("postmaster.pid").exists(), "it runs");
    world.pghydrant.succeed(["promote", &id])?;
    assert_eq!(marks(&Instance::running_in(&target)?)?, "before");
    Ok(())
}

/// `hot_standby = off` turns PostgreSQL's pause into a shutdown.
#[test]
fn a_pause_is_kept_where_the_original_allows_no_hot_standby() -> Result<()> {
    requires!(Postgres, Fuse);
    let world = World::with(1, &[], &["hot_standby = off"])?;
    world.backup()?;
    world.mark("a")?;
    world.cluster.sql("SELECT pg_create_restore_point('after_a')")?;
    world.cluster.archive_wal()?;
    for arguments in [&["--target-name", "after_a"][..], &[]] {
        let arguments = [arguments, &["--action", "pause", "--json"]].concat();
        let id = session_of(&world.restore_to(&world.target(), &arguments)?.expect_code(0)?)?;
        let paused = Instance::running_in(&world.target())?;
        ensure!(paused.sql("SELECT pg_get_wal_replay_pause_state()")? == "paused", "{arguments:?}");
        ensure!(marks(&paused)? == "a", "{arguments:?}");
        world.pghydrant.succeed(["cancel", &id])?;
    }
    Ok(())
}

/// What the server did is read from its log, in the words of its defaults.
#[test]
fn an_action_is_seen_however_the_original_logs() -> Result<()> {
    requires!(Postgres, Fuse);
    let settings = ["log_error_verbosity = verbose", "log_min_messages = fatal"];
    let world = World::with(1, &[], &settings)?;
    world.backup()?;
    world.mark("a")?;
    world.cluster.sql("SELECT pg_create_restore_point('after_a')")?;
    world.mark("b")?;
    world.cluster.archive_wal()?;
    for action in ["pause", "shutdown"] {
        world.restore_to(&world.target(), &["--target-name", "after_a", "--action", action])?.expect_code(0)?;
        let id = open_session(&world.pghydrant)?;
        world.pghydrant.succeed(["promote", &id])?;
        let promoted = Instance::running_in(&world.target())?;
        ensure!(marks(&promoted)? == "a", "{action}");
        drop(promoted);
        std::fs::remove_dir_all(world.target())?;
    }
    Ok(())
}

/// Whether a superuser other than `postgres` says so, and in another database, or nobody can: a pause ends.
#[test]
fn a_pause_is_promoted_where_neither_the_role_nor_the_database_is_called_postgres() -> Result<()> {
    requires!(Postgres, Fuse);
    let scratch = Scratch::new()?;
    let pghydrant = Pghydrant::new(&scratch)?;
    let repository = Repository::init(&scratch, &pghydrant)?;
    let build = Cluster::build(&scratch, "original").archive_to(&pghydrant, &repository, "main");
    let cluster = build.initdb("--username=app").start()?;
    let ask = |instance: &Instance, statement: &str| -> Result<String> {
        let psql = instance.client("psql")?.env("PGUSER", "app").args(["-XAtq", "-d", "template1", "-c", statement]);
        Ok(psql.succeed()?.stdout.trim_end().to_owned())
    };
    ask(&cluster, "DROP DATABASE postgres")?;
    let login = cluster.connection_string().replace("user=postgres dbname=postgres", "user=app dbname=template1");
    pghydrant.succeed(repository.arguments(&["backup"], &["--dbname", &login]))?;
    ask(&cluster, "SELECT pg_create_restore_point('here')")?;
    let segment = ask(&cluster, "SELECT pg_walfile_name(pg_switch_wal())")?;
    wait_until("archiving", Duration::from_secs(180), || {
        Ok(ask(&cluster, "SELECT coalesce(last_archived_wal, '') FROM pg_stat_archiver")? >= segment)
    })?;
    let target = scratch.join("restored");
    for nobody in [false, true] {
        let port = cluster::free_port()?.to_string();
        let arguments = ["--port", &port, "--target-name", "here", "--action", "pause"];
        repository.restore(&target, &arguments)?.expect_code(0)?;
        let paused = Instance::running_in(&target)?;
        assert_eq!(ask(&paused, "SELECT pg_get_wal_replay_pause_state()")?, "paused");
        if nobody {
            std::fs::write(target.join("pghydrant.session/pg_hba.conf"), "local all all reject\n")?;
            ask(&paused, "SELECT pg_reload_conf()")?;
        }
        let id = open_session(&pghydrant)?;
        pghydrant.succeed(["promote", &id])?;
        let promoted = Instance::running_in(&target)?;
        assert_eq!(ask(&promoted, "SELECT pg_is_in_recovery()")?, "f");
        drop((paused, promoted));
        std::fs::remove_dir_all(&target)?;
    }
    Ok(())
}

/// Replay stops for the first of them, and a hot standby refuses to start without the others.
#[test]
fn several_settings_that_the_original_raised_after_the_backup_are_raised_for_the_recovery() -> Result<()> {
    requires!(Postgres, Fuse);
    let world = World::new(1)?;
    world.backup()?;
    for line in ["max_connections = 150", "max_wal_senders = 14", "max_locks_per_transaction = 90"] {
        world.cluster.configure(line)?;
    }
    world.cluster.restart()?;
    world.mark("a")?;
    world.cluster.sql("SELECT pg_create_restore_point('after_a')")?;
    world.cluster.archive_wal()?;
    let arguments = ["--target-name", "after_a", "--action", "pause"];
    let restored = world.restore_to(&world.target(), &arguments)?.expect_code(0)?;
    restored.expect_stderr(&["max_connections = 150", "max_wal_senders = 14", "max_locks_per_transaction = 90"])?;
    assert_eq!(marks(&Instance::running_in(&world.target())?)?, "a");
    world.pghydrant.succeed(["promote", &open_session(&world.pghydrant)?])?;
    let promoted = Instance::running_in(&world.target())?;
    assert_eq!(promoted.sql("SHOW max_connections")?, "100", "only for the recovery");
    Ok(())
}

/// A transaction with more subtransactions than a standby is told of, open from the backup to the end.
#[test]
fn a_pause_that_nobody_can_look_into_is_a_failure() -> Result<()> {
    requires!(Postgres, Fuse);
    let world = World::new(1)?;
    world.mark("before")?;
    let savepoints: String =
        (0..70).map(|number| format!("SAVEPOINT s{number}; INSERT INTO marks (name) VALUES ('{number}'); ")).collect();
    let script = format!("BEGIN; {savepoints} SELECT 'open' FROM pg_sleep(600)");
    let _open = world.cluster.client("psql")?.args(["-XAtq", "-c", &script]).start()?;
    wait_until("the transaction", Duration::from_secs(120), || {
        Ok(world.cluster.number("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'")? == 1)
    })?;
    world.backup()?;
    world.mark("a")?;
    world.cluster.sql("SELECT pg_create_restore_point('after_a')")?;
    world.mark("b")?;
    world.cluster.archive_wal()?;
    let target = world.target();
    let restored = world.restore_to(&target, &["--action", "pause"])?.expect_code(5)?;
    restored.expect_stderr(&["no hot standby", "hint: ", "pghydrant promote "])?;
    let id = open_session(&world.pghydrant)?;
    world.pghydrant.succeed(["promote", &id])?;
    let promoted = Instance::running_in(&target)?;
    assert_eq!(marks(&promoted)?, "a,b,before");
    drop(promoted);
    std::fs::remove_dir_all(&target)?;

    let restored = world.restore_to(&target, &["--action", "pause", "--target-name", "after_a"])?.expect_code(5)?;
    restored.expect_stderr(&["promoted instead of pausing", "hint: "])?;
    assert_eq!(marks(&Instance::running_in(&target)?)?, "a,before");
    Ok(())
}

#[test]
fn a_timeline_is_followed_or_refused_as_asked() -> Result<()> {
    requires!(Postgres, Fuse);
    let story = Story::tell()?;
    // A promoted copy that is adopted archives timeline 2 into the same repository.
    let adopted = story.world.restore(&["--target-name", "after_b", "--adopt"])?;
    adopted.sql("INSERT INTO marks (name) VALUES ('on_two')")?;
    adopted.archive_wal()?;
    wait_until("the history file", Duration::from_secs(120), || {
        Ok(story.world.repository.files()?.iter().any(|path| path.ends_with("00000002.history")))
    })?;
    drop(adopted);
    std::fs::remove_dir_all(story.world.target())?;

    story.ends_with(&["--target-timeline", "1"], "a,b,before,c")?;
    story.ends_with(&["--target-timeline", "latest"], "a,b,before,on_two")?;
    story.ends_with(&["--target-timeline", "2"], "a,b,before,on_two")
}

#[test]
fn the_newest_backup_that_reaches_the_target_is_picked() -> Result<()> {
    requires!(Postgres, Fuse);
    let story = Story::tell()?;
    let first = label(&story.world)?;
    story.world.backup()?;
    let second = label(&story.world)?;
    assert_ne!(first, second);
    story.world.mark("d")?;
    story.world.cluster.archive_wal()?;
    for (arguments, expected) in [
        (vec![], &second),
        (vec!["--target-time", story.time_after_a.as_str()], &first),
        (vec!["--target-lsn", story.lsn_after_a.as_str()], &first),
        (vec!["--target-xid", story.xid_of_b.as_str()], &first),
        (vec!["--target-name", "after_b"], &first),
    ] {
        let arguments = [&arguments[..], &["--plan", "--json"]].concat();
        let plan = story.world.restore_to(&story.world.target(), &arguments)?.expect_code(0)?;
        assert!(plan.stdout.contains(expected.as_str()), "{arguments:?}\n{plan}");
    }
    assert!(!story.world.target().exists(), "--plan made something");
    Ok(())
}

#[test]
fn a_restore_as_root_gives_everything_to_the_owner() -> Result<()> {
    requires!(Root, Postgres, Fuse);
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let story = Story::tell()?;
    // What PostgreSQL starts runs as the owner, who cannot read root's settings.
    let settings = story.world.scratch.join("of-root.toml");
    std::fs::write(&settings, "workers = 2\n")?;
    std::fs::set_permissions(&settings, std::fs::Permissions::from_mode(0o600))?;
    let root =
        story.world.pghydrant.as_user(&OsUser::current()).env("PGHYDRANT_CONFIG", settings.display().to_string());
    let theirs = story.world.pghydrant.state.display().to_string();
    root.fail(["--state", &theirs, "sessions"], 3, &["belongs to", "--state"])?;
    let as_root = story.world.repository.with(&root);
    let owner = OsUser::server();
    let port = cluster::free_port()?.to_string();
    let target = story.world.target();
    as_root.restore(&target, &["--port", &port, "--os-user", &owner.name])?.expect_code(0)?;
    let restored = Instance::running_in(&target)?;
    assert_eq!(marks(&restored)?, "a,b,before,c");
    for path in compare::files_below(&target)? {
        let metadata = std::fs::metadata(target.join(&path));
        // The server is running: a file may be gone by now.
        assert!(
            metadata.map_or(true, |metadata| metadata.uid() == owner.uid),
            "{} is not {}'s",
            path.display(),
            owner.name
        );
    }
    Ok(())
}

/// The label of the newest backup.
fn label(world: &World) -> Result<String> {
    let list = world.pghydrant.succeed(world.repository.arguments(&["list"], &["--json"]))?;
    let objects = list.json_lines()?;
    let labels = objects.iter().flat_map(|object| find_all(object, "label")).filter_map(serde_json::Value::as_str);
    labels.max().map(str::to_owned).with_context(|| format!("no label in\n{list}"))
}
