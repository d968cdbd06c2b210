//! `restore --check`: what `pg_amcheck` finds, what it leaves behind, and what becomes of a restore that cannot check.

use std::os::unix::fs::symlink;
use std::time::Duration;

use rustix::process::Signal;

use crate::support::json::{find, find_number, find_text};
use crate::support::process::wait_until;
use crate::support::tools::postgres_bin;
use crate::support::*;

/// An index whose order is another than that of its operator class, as after a change of collations; and one whose
/// expression gives other values than it was built with: no page of either is damaged.
const WRONG: &str = "
    CREATE FUNCTION up(a int4, b int4) RETURNS int4 LANGUAGE sql IMMUTABLE AS 'SELECT btint4cmp($1, $2)';
    CREATE FUNCTION down(a int4, b int4) RETURNS int4 LANGUAGE sql IMMUTABLE AS 'SELECT btint4cmp($2, $1)';
    CREATE OPERATOR CLASS fickle FOR TYPE int4 USING btree AS OPERATOR 1 <, OPERATOR 2 <=, OPERATOR 3 =,
        OPERATOR 4 >=, OPERATOR 5 >, FUNCTION 1 up(int4, int4);
    CREATE TABLE turned AS SELECT generate_series(1, 500) AS i;
    CREATE INDEX turned_index ON turned (i fickle);
    CREATE FUNCTION value(a int4) RETURNS int4 LANGUAGE sql IMMUTABLE AS 'SELECT a + 1';
    CREATE TABLE lost AS SELECT generate_series(1, 500) AS i;
    CREATE INDEX lost_index ON lost (value(i));";
const TURN: &str = "UPDATE pg_amproc SET amproc = 'down'::regproc WHERE amproc = 'up'::regproc";
const LOSE: &str = "CREATE OR REPLACE FUNCTION value(a int4) RETURNS int4 LANGUAGE sql IMMUTABLE AS 'SELECT a + 1000'";
/// Databases, and whether each has the extension.
const EXTENSIONS: &str = "SELECT count(*) FROM pg_extension WHERE extname = 'amcheck'";

#[test]
fn a_check_finds_what_no_checksum_can_and_leaves_nothing_behind() -> Result<()> {
    requires!(Postgres);
    let world = World::new(0)?;
    world.cluster.sql("CREATE DATABASE \"another one\"")?;
    world.cluster.sql_in("another one", "CREATE EXTENSION amcheck")?;
    // A trigger that refuses every command, and defaults that are in the way.
    world.cluster.sql(
        "CREATE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN RAISE ''no''; END';
         ALTER DATABASE postgres SET default_transaction_read_only = on;
         ALTER DATABASE \"another one\" SET statement_timeout = 1",
    )?;
    let set = "SET transaction_read_only = off;";
    world.cluster.sql(&format!("{set} {WRONG}"))?;
    world.cluster.sql(&format!("{set} CREATE TABLE marks (name text); INSERT INTO marks VALUES ('there')"))?;
    world.cluster.sql(&format!("{set} CREATE EVENT TRIGGER refuse ON ddl_command_start EXECUTE FUNCTION refuse()"))?;
    world.backup()?;
    let check = |how: &str| {
        let target = world.scratch.join(how);
        let finished = world.restore_to(&target, &["--source", "blocks", "--json", "--check", how])?;
        ensure!(matches!(finished.code, Some(0 | 7)), "{finished}");
        let instance = Instance::running_in(&target)?;
        assert_eq!(instance.sql(EXTENSIONS)?, "0");
        assert_eq!(instance.sql_in("template1", EXTENSIONS)?, "0");
        let patient =
            instance.client("psql")?.env("PGOPTIONS", "-c statement_timeout=0").env("PGDATABASE", "another one");
        assert_eq!(patient.args(["-XAtqc", EXTENSIONS]).succeed()?.stdout.trim(), "1");
        Ok::<_, anyhow::Error>((finished, instance))
    };
    let (finished, fine) = check("full")?;
    let result = finished.expect_code(0)?.json()?;
    ensure!(find_number(&result, "relations").is_some_and(|count| count > 100), "{result}");
    ensure!(find_number(&result, "failed") == Some(0), "{result}");
    drop(fine);
    std::fs::remove_dir_all(world.scratch.join("full"))?;

    world.cluster.sql(&format!("{set} SET session_replication_role = replica; {TURN}; {LOSE}"))?;
    world.cluster.archive_wal()?;
    for (how, indexes) in [("fast", &["turned_index"][..]), ("full", &["lost_index", "turned_index"])] {
        let (finished, restored) = check(how)?;
        let finished = finished.expect_code(7)?;
        let result = finished.json()?;
        ensure!(find_number(&result, "failed") == Some(indexes.len() as u64), "{how}: {result}");
        let found = find(&result, "findings").map(ToString::to_string).unwrap_or_default();
        ensure!(indexes.iter().all(|index| found.contains(index)), "{how}: {found}");
        ensure!(find_text(&result, "state").as_deref() == Some("running"), "{result}");
        // It is finished like any other: only the exit code and the report tell.
        assert_eq!(open_sessions(&world.pghydrant)?, [""; 0]);
        assert_eq!((marks(&restored)?.as_str(), restored.sql("SHOW archive_mode")?.as_str()), ("there", "off"));
    }
    Ok(())
}

#[test]
fn a_check_that_is_killed_is_done_again_by_retry() -> Result<()> {
    requires!(Postgres);
    let world = World::new(0)?;
    world.mark("there")?;
    // A lock that outlives the restore: the check waits for it.
    world.cluster.sql("CREATE TABLE held (i int)")?;
    world.cluster.sql("BEGIN; LOCK TABLE held; INSERT INTO held VALUES (1); PREPARE TRANSACTION 'holds'")?;
    world.backup()?;
    let (target, port) = (world.target(), cluster::free_port()?.to_string());
    let to = target.display().to_string();
    let arguments = ["--to", &to, "--port", &port, "--source", "blocks", "--check", "fast"];
    let waiting =
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pg_amcheck' AND wait_event_type = 'Lock'";
    let until_it_waits = || {
        wait_until("the check to wait for its lock", Duration::from_secs(120), || {
            let Ok(instance) = Instance::running_in(&target).map(std::mem::ManuallyDrop::new) else { return Ok(false) };
            Ok(instance.number(waiting).is_ok_and(|count| count > 0))
        })
    };
    let restore = world.pghydrant.start(world.repository.arguments(&["restore"], &arguments))?;
    until_it_waits()?;
    restore.signal(Signal::TERM)?;
    restore.wait()?.expect_code(130)?;
    let id = open_session(&world.pghydrant)?;
    let private = std::mem::ManuallyDrop::new(Instance::running_in(&target)?);
    wait_until("the end of the check's sessions", Duration::from_secs(60), || Ok(private.number(waiting)? == 0))?;
    let listed = world.pghydrant.succeed(["sessions"])?;
    ensure!(listed.stdout.contains("checking") && listed.stdout.contains("retry"), "{listed}");
    // Nobody may take the copy away: it is a database.
    world.pghydrant.run(["cancel", &id])?.expect_code(2)?;

    let retry = world.pghydrant.start(["retry", &id])?;
    until_it_waits()?;
    retry.kill()?;
    private.stop("immediate")?;
    let retry = world.pghydrant.start(["retry", &id])?;
    until_it_waits()?;
    private.sql("ROLLBACK PREPARED 'holds'")?;
    let finished = retry.wait()?.expect_code(0)?;
    ensure!(finished.stdout.contains("nothing wrong"), "{finished}");
    let restored = Instance::running_in(&target)?;
    assert_eq!((marks(&restored)?.as_str(), restored.sql(EXTENSIONS)?.as_str()), ("there", "0"));
    assert_eq!(restored.port.to_string(), port);
    Ok(())
}

#[test]
fn what_cannot_be_checked_is_refused_before_or_left_out_after() -> Result<()> {
    requires!(Postgres);
    let world = World::new(0)?;
    world.mark("there")?;
    world.backup()?;
    let target = world.target();
    // The programs of the server, but for the one that checks.
    let programs = world.scratch.directory("programs")?;
    for entry in std::fs::read_dir(postgres_bin().context("no server")?)? {
        let entry = entry?;
        if entry.file_name() != "pg_amcheck" {
            symlink(entry.path(), programs.join(entry.file_name()))?;
        }
    }
    let bin = programs.display().to_string();
    let arguments = ["--source", "blocks", "--check", "fast", "--pg-bin", &bin];
    let refused = world.restore_to(&target, &[&arguments[..], &["--no-start"]].concat())?.expect_code(3)?;
    let both = ["pg_amcheck is missing", "--no-start starts none", "for 2 reasons"];
    refused.expect_stderr(&both)?;
    ensure!(!target.exists(), "something was touched");

    // One that ends in an error.
    symlink("/bin/false", programs.join("pg_amcheck"))?;
    let stopped = world.restore_to(&target, &arguments)?.expect_code(6)?;
    stopped.expect_stderr(&["could not be checked", "pg_amcheck ended with", "--skip-check"])?;
    let id = open_session(&world.pghydrant)?;
    world.pghydrant.run(["retry", &id])?.expect_code(6)?;
    world.pghydrant.succeed(["retry", &id, "--skip-check"])?;
    let restored = Instance::running_in(&target)?;
    assert_eq!((marks(&restored)?.as_str(), restored.sql(EXTENSIONS)?.as_str()), ("there", "0"));
    Ok(())
}
