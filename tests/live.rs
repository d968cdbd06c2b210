//! What a running server does while it is backed up: files that come and go, WAL that is archived here, elsewhere or
//! nowhere, users who stop the backup or may not take it.

use std::fs;
use std::time::Duration;

use rustix::process::Signal;

use crate::support::json::find_text;
use crate::support::process::wait_until;
use crate::support::tools::postgres_program;
use crate::support::*;

/// A cluster that archives nowhere, and an empty repository.
fn without_archive(scratch: &Scratch) -> Result<(Cluster, Repository)> {
    let pghydrant = Pghydrant::new(scratch)?;
    let repository = Repository::init(scratch, &pghydrant)?;
    Ok((Cluster::build(scratch, "original").start()?, repository))
}

/// Files are created, filled, truncated, rewritten and dropped as fast as the server can.
fn churn(cluster: &Cluster) -> Result<Running> {
    let script = cluster.data.with_extension("churn.sql");
    let statements = "\
        CREATE TABLE churn_:client_id AS SELECT g AS id, repeat('x', 500) AS filler FROM generate_series(1, 3000) g;\n\
        CREATE INDEX ON churn_:client_id (id);\n\
        TRUNCATE churn_:client_id;\n\
        INSERT INTO churn_:client_id SELECT g, 'y' FROM generate_series(1, 20000) g;\n\
        DELETE FROM churn_:client_id WHERE id > 10;\n\
        VACUUM churn_:client_id;\n\
        VACUUM FULL churn_:client_id;\n\
        DROP TABLE churn_:client_id;\n";
    fs::write(&script, statements)?;
    let load = cluster
        .client("pgbench")?
        .args(["--client=3", "--no-vacuum", "--time=600", "--file"])
        .arg(&script)
        .arg("postgres")
        .time_limit(Duration::from_secs(600))
        .start()?;
    let files = || cluster.number("SELECT max(oid)::bigint FROM pg_class");
    let before = files()?;
    wait_until("the first new tables", Duration::from_secs(120), || Ok(files()? > before + 20))?;
    Ok(load)
}

#[test]
fn files_that_come_and_go_leave_a_backup_that_restores() -> Result<()> {
    requires!(Postgres);
    let scratch = Scratch::new()?;
    let (cluster, repository) = without_archive(&scratch)?;
    cluster.pgbench_initialize(3)?;
    let load = churn(&cluster)?;
    for _ in 0..3 {
        repository.backup(&cluster)?;
    }
    drop(load);
    repository.pghydrant.succeed(["verify", "--repo", &repository.shown()])?;

    let plain = scratch.join("plain");
    repository.restore(&plain, &["--no-start", "--source", "blocks"])?.expect_code(0)?;
    Run::new(postgres_program("pg_verifybackup")?).user(OsUser::server()).arg(&plain).succeed()?;
    let (target, port) = (scratch.join("restored"), cluster::free_port()?.to_string());
    repository.restore(&target, &["--port", &port, "--source", "blocks"])?.expect_code(0)?;
    let restored = Instance::running_in(&target)?;
    assert_eq!(restored.number("SELECT count(*) FROM pgbench_accounts")?, 300_000);
    restored.check_relations()?;
    restored.stop("fast")?;
    restored.check_pages()
}

#[test]
fn a_backup_with_its_own_wal_restores_although_the_archive_goes_on_behind_a_gap() -> Result<()> {
    requires!(Postgres);
    let scratch = Scratch::new()?;
    let (cluster, repository) = without_archive(&scratch)?;
    cluster.sql("CREATE TABLE kept AS SELECT 1 AS id")?;
    let label = find_text(&repository.backup(&cluster)?, "label").context("no label")?;
    for _ in 0..3 {
        cluster.sql("INSERT INTO kept VALUES (2)")?;
        cluster.sql("SELECT pg_switch_wal()")?;
    }
    repository.backup(&cluster)?;
    // Each backup brought its own WAL: that is no damage.
    let verify = repository.pghydrant.succeed(["verify", "--repo", &repository.shown()])?;
    ensure!(verify.stdout.contains("each backup has its own WAL"), "{verify}");

    let (target, port) = (scratch.join("restored"), cluster::free_port()?.to_string());
    let arguments = ["--backup", &label, "--target-immediate", "--port", &port, "--source", "blocks"];
    repository.restore(&target, &arguments)?.expect_code(0)?;
    assert_eq!(Instance::running_in(&target)?.number("SELECT count(*) FROM kept")?, 1);
    Ok(())
}

#[test]
fn the_wal_comes_from_the_archive_once_it_has_shown_that_it_comes_here() -> Result<()> {
    requires!(Postgres);
    let world = World::new(15)?;
    // The archiver may be slower than a small backup: then the WAL is read from the server, and that is fine, too.
    let mut origins = Vec::new();
    while origins.len() < 12 && origins.last().is_none_or(|origin| origin != "archive") {
        world.cluster.sql("UPDATE pgbench_branches SET bbalance = 1")?;
        world.cluster.archive_wal()?;
        origins.push(find_text(&world.backup()?, "wal_origin").unwrap_or_default());
        world.cluster.wait_for_no_slot()?;
    }
    assert!(origins.iter().any(|origin| origin == "archive"), "{origins:?}");
    world.cluster.archive_wal()?;
    world.pghydrant.succeed(["verify", "--repo", &world.repository.shown()])?;
    assert_eq!(world.cluster.number("SELECT failed_count FROM pg_stat_archiver")?, 0);
    Ok(())
}

#[test]
fn an_archive_that_fails_or_goes_elsewhere_is_not_relied_on() -> Result<()> {
    requires!(Postgres);
    let scratch = Scratch::new()?;
    let pghydrant = Pghydrant::new(&scratch)?;
    let repository = Repository::init(&scratch, &pghydrant)?;
    let build = Cluster::build(&scratch, "original").setting("archive_mode = on");
    let cluster = build.setting("archive_command = 'false'").start()?;
    assert_eq!(find_text(&repository.backup(&cluster)?, "wal_origin").as_deref(), Some("server"));
    cluster.configure("archive_command = 'true'")?;
    cluster.sql("SELECT pg_reload_conf()")?;
    assert_eq!(find_text(&repository.backup(&cluster)?, "wal_origin").as_deref(), Some("server"));
    pghydrant.succeed(["verify", "--repo", &repository.shown()])?;
    Ok(())
}

#[test]
fn without_a_slot_and_without_an_archive_the_backup_is_refused() -> Result<()> {
    requires!(Postgres);
    let scratch = Scratch::new()?;
    let pghydrant = Pghydrant::new(&scratch)?;
    let repository = Repository::init(&scratch, &pghydrant)?;
    let cluster = Cluster::build(&scratch, "original").setting("max_replication_slots = 0").start()?;
    let arguments = ["--dbname", &cluster.connection_string()];
    pghydrant.fail(repository.arguments(&["backup"], &arguments), 3, &["archiving is off", "hint: "])?;
    Ok(())
}

#[test]
fn a_backup_that_is_interrupted_ends_at_once_and_leaves_nothing() -> Result<()> {
    requires!(Postgres);
    let scratch = Scratch::new()?;
    let (cluster, repository) = without_archive(&scratch)?;
    cluster.pgbench_initialize(10)?;
    let connection = cluster.connection_string();
    let arguments = repository.arguments(&["backup"], &["--dbname", &connection]);
    let mut interrupted = 0;
    for milliseconds in [30, 60, 100, 150, 250] {
        let running = repository.pghydrant.start(&arguments)?;
        std::thread::sleep(Duration::from_millis(milliseconds));
        running.signal(Signal::INT)?;
        let finished = running.wait()?;
        if finished.code == Some(130) {
            interrupted += 1;
            finished.expect_stderr(&["error: "])?;
        }
        cluster.wait_for_no_slot()?;
    }
    ensure!(interrupted > 0, "no backup was slow enough to be interrupted");
    repository.backup(&cluster)?;
    repository.pghydrant.succeed(["verify", "--repo", &repository.shown()])?;
    Ok(())
}

#[test]
fn a_name_and_a_transaction_are_found_many_segments_behind_the_backup() -> Result<()> {
    requires!(Postgres);
    let world = World::new(0)?;
    world.mark("early")?;
    world.backup()?;
    let mut xid = String::new();
    for segment in 0..22 {
        world.cluster.archive_wal()?;
        if segment == 9 {
            world.mark("named")?;
            world.cluster.sql("SELECT pg_create_restore_point('far away')")?;
        }
        if segment == 17 {
            xid = world.mark("transaction")?;
            world.mark("beyond")?;
        }
    }
    for (arguments, expected) in
        [(["--target-name", "far away"], "early,named"), (["--target-xid", &xid], "early,named,transaction")]
    {
        let restored = world.restore(&[&arguments[..], &["--source", "blocks"]].concat())?;
        assert_eq!(marks(&restored)?, expected, "{arguments:?}");
        restored.stop("immediate")?;
        fs::remove_dir_all(world.target())?;
    }
    Ok(())
}

#[test]
fn a_user_without_the_rights_is_told_which_are_missing() -> Result<()> {
    requires!(Postgres);
    let scratch = Scratch::new()?;
    let (cluster, repository) = without_archive(&scratch)?;
    cluster.sql("CREATE ROLE plain LOGIN")?;
    cluster.sql("CREATE ROLE keeper LOGIN REPLICATION")?;
    let connect = |user: &str| cluster.connection_string().replace("user=postgres", &format!("user={user}"));
    let backup = |user: &str| repository.arguments(&["backup"], &["--dbname", &connect(user)]);
    repository.pghydrant.fail(backup("plain"), 3, &["data directory", "hint: "])?;
    // The rights of the documentation are enough, without a superuser.
    cluster.sql("GRANT pg_read_all_settings TO keeper")?;
    cluster.sql("GRANT EXECUTE ON FUNCTION pg_backup_start, pg_backup_stop TO keeper")?;
    repository.pghydrant.succeed(backup("keeper"))?;
    Ok(())
}

#[test]
fn a_user_who_may_not_read_the_data_directory_is_told_who_may() -> Result<()> {
    requires!(Postgres, Root);
    let scratch = Scratch::new()?;
    let (cluster, _) = without_archive(&scratch)?;
    let nobody = OsUser { name: "nobody".to_owned(), uid: 65534, gid: 65534 };
    let place = tempfile::tempdir()?;
    std::os::unix::fs::chown(place.path(), Some(nobody.uid), None)?;
    // The socket is in a directory of the server's own: opened, the data directory beside it stays closed.
    let everyone = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(&cluster.sockets, everyone)?;
    let repository = Repository::init_at(&place.path().join("repo"), &Pghydrant::new(&scratch)?.as_user(&nobody), &[])?;
    let arguments = repository.arguments(&["backup"], &["--dbname", &cluster.connection_string()]);
    repository.pghydrant.fail(arguments, 3, &["cannot read the server's data directory", "as the owner"])?;
    Ok(())
}

#[test]
fn a_directory_that_the_server_does_not_run_in_is_not_taken_for_its_own() -> Result<()> {
    requires!(Postgres, Root);
    let scratch = Scratch::new()?;
    let (cluster, repository) = without_archive(&scratch)?;
    // As if the server were on another machine, and a copy of its cluster lay here in the same place.
    let pid_file = cluster.data.join("postmaster.pid");
    let text = fs::read_to_string(&pid_file)?;
    let mut lines: Vec<&str> = text.lines().collect();
    lines[2] = "1000000000";
    let kept = scratch.join("kept.pid");
    fs::rename(&pid_file, &kept)?;
    fs::write(&pid_file, lines.join("\n"))?;
    let arguments = repository.arguments(&["backup"], &["--dbname", &cluster.connection_string()]);
    let refused =
        repository.pghydrant.as_user(&OsUser::current()).fail(arguments, 3, &["is not the directory", "hint: "]);
    fs::rename(&kept, &pid_file)?;
    refused?;
    Ok(())
}
