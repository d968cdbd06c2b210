//! What clusters hold, restored: every kind of relation, link and file that PostgreSQL makes.

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use crate::support::compare::tree;
use crate::support::json::find_number;
use crate::support::process::wait_until;
use crate::support::tools::postgres_program;
use crate::support::*;

/// Everything a restored cluster is checked with: its relations while it runs, its pages once it is stopped.
fn check(restored: &Instance) -> Result<()> {
    restored.check_relations()?;
    restored.stop("fast")?;
    restored.check_pages()
}

#[test]
fn a_backup_under_load_is_accepted_by_postgresqls_own_tools() -> Result<()> {
    requires!(Postgres, Fuse);
    let world = World::new(5)?;
    let load = world.cluster.pgbench_load()?;
    world.backup()?;
    world.backup()?;
    world.cluster.end_load(load)?;
    let sums = "SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(delta) FROM pgbench_history), count(*) FROM pgbench_history";
    let expected = world.cluster.sql(sums)?;
    world.cluster.archive_wal()?;

    for source in ["mount", "blocks"] {
        let plain = world.scratch.join(source);
        world.restore_to(&plain, &["--no-start", "--source", source])?.expect_code(0)?;
        Run::new(postgres_program("pg_verifybackup")?).user(OsUser::server()).arg(&plain).succeed()?;
        Run::new(postgres_program("pg_checksums")?)
            .user(OsUser::server())
            .args(["--check", "-D"])
            .arg(&plain)
            .finish()?;
        fs::remove_dir_all(&plain)?;
    }

    let restored = world.restore(&[])?;
    assert_eq!(restored.sql(sums)?, expected);
    let (balances, _) = expected.split_once('|').unwrap_or_default();
    assert_eq!(expected.split('|').nth(1), Some(balances), "pgbench's books do not add up");
    check(&restored)
}

#[test]
fn what_postgresql_says_to_leave_out_is_left_out() -> Result<()> {
    requires!(Postgres);
    let world = World::new(0)?;
    world.cluster.sql("CREATE UNLOGGED TABLE fleeting AS SELECT generate_series(1, 1000) AS id")?;
    world.cluster.sql("CHECKPOINT")?;
    let fleeting = world.cluster.sql("SELECT pg_relation_filepath('fleeting')")?;
    let data = &world.cluster.data;
    fs::create_dir_all(data.join("base/pgsql_tmp"))?;
    fs::write(data.join("base/pgsql_tmp/pgsql_tmp1.0"), [1; 100])?;
    world.backup()?;
    let target = world.target();
    world.restore_to(&target, &["--no-start", "--source", "blocks"])?.expect_code(0)?;
    for absent in ["postmaster.pid", "postmaster.opts", "base/pgsql_tmp/pgsql_tmp1.0", &fleeting, "tablespace_map"] {
        assert!(!target.join(absent).exists(), "{absent} was restored");
    }
    for there in ["backup_label", "backup_manifest", "PG_VERSION", "global/pg_control", &format!("{fleeting}_init")] {
        assert!(target.join(there).exists(), "{there} is missing");
    }
    for empty in ["pg_replslot", "pg_dynshmem", "pg_notify", "pg_serial", "pg_snapshots", "pg_stat_tmp", "pg_subtrans"]
    {
        let count = fs::read_dir(target.join(empty)).with_context(|| format!("{empty} is missing"))?.count();
        assert_eq!(count, 0, "{empty} is not empty");
    }
    Ok(())
}

#[test]
fn many_tables_unlogged_tables_large_objects_and_prepared_transactions_come_back() -> Result<()> {
    requires!(Postgres, Fuse);
    let world = World::with(0, &[], &["max_locks_per_transaction = 256"])?;
    for part in 0..5 {
        let (from, to) = (part * 1000 + 1, part * 1000 + 1000);
        world.cluster.sql(&format!(
            "DO $$ BEGIN FOR i IN {from}..{to} LOOP EXECUTE format('CREATE TABLE small_%s AS SELECT %s AS id', i, i); END LOOP; END $$"
        ))?;
    }
    world.cluster.sql("CREATE TABLE empty (id int)")?;
    world.cluster.sql("CREATE UNLOGGED TABLE fleeting AS SELECT generate_series(1, 1000) AS id")?;
    world.cluster.sql("SELECT lo_from_bytea(424242, decode(repeat('0123456789abcdef', 40000), 'hex'))")?;
    world.cluster.sql("CREATE TABLE prepared (id int)")?;
    world.cluster.sql("BEGIN; INSERT INTO prepared VALUES (1); PREPARE TRANSACTION 'waiting'")?;
    world.backup()?;
    world.cluster.sql("COMMIT PREPARED 'waiting'")?;
    world.cluster.sql("BEGIN; INSERT INTO prepared VALUES (2); PREPARE TRANSACTION 'later'")?;
    world.cluster.archive_wal()?;

    let restored = world.restore(&[])?;
    let sum: i64 = restored.number("SELECT count(*) FROM pg_class WHERE relname LIKE 'small\\_%'")?;
    assert_eq!(sum, 5000);
    for i in [1, 2500, 5000] {
        assert_eq!(restored.number(&format!("SELECT id FROM small_{i}"))?, i);
    }
    assert_eq!(restored.number("SELECT count(*) FROM empty")?, 0);
    assert_eq!(restored.number("SELECT count(*) FROM fleeting")?, 0, "unlogged tables are empty after a recovery");
    restored.sql("INSERT INTO fleeting VALUES (1)")?;
    assert_eq!(restored.sql("SELECT md5(lo_get(424242)), length(lo_get(424242))")?, {
        world.cluster.sql("SELECT md5(lo_get(424242)), length(lo_get(424242))")?
    });
    assert_eq!(restored.number("SELECT count(*) FROM prepared")?, 1);
    assert_eq!(restored.sql("SELECT gid FROM pg_prepared_xacts")?, "later");
    restored.sql("COMMIT PREPARED 'later'")?;
    assert_eq!(restored.number("SELECT count(*) FROM prepared")?, 2);
    check(&restored)
}

#[test]
fn a_relation_over_a_gibibyte_has_all_of_its_segments() -> Result<()> {
    requires!(Postgres, Fuse);
    let world = World::new(0)?;
    world
        .cluster
        .sql("CREATE TABLE big AS SELECT id, repeat('x', 500) AS filler FROM generate_series(1, 2000) AS id")?;
    let path = world.cluster.sql("SELECT pg_relation_filepath('big')")?;
    world.cluster.stop("fast")?;
    // New pages are zero, and a file's hole costs no disk: the relation is extended to a gibibyte and a bit, and the
    // server goes on in the second segment.
    grow(&world.cluster.data.join(&path), 1 << 30)?;
    let second = world.cluster.data.join(format!("{path}.1"));
    fs::File::create(&second)?;
    std::os::unix::fs::chown(&second, Some(OsUser::server().uid), Some(OsUser::server().gid))?;
    grow(&second, 10 * 8192)?;
    world.cluster.start()?;
    world.cluster.sql("INSERT INTO big SELECT id, repeat('y', 500) FROM generate_series(2001, 6000) AS id")?;
    world.cluster.sql("CHECKPOINT")?;
    assert!(fs::metadata(&second)?.len() > 1 << 20, "the rows went elsewhere");
    let backup = world.backup()?;
    let added = find_number(&backup, "added_pack_bytes").context("no added_pack_bytes")?;
    assert!(added < 100 << 20, "{added} bytes for a hole");

    let restored = world.restore(&[])?;
    assert_eq!(restored.sql("SELECT count(*), sum(id) FROM big")?, "6000|18003000");
    assert_eq!(fs::metadata(world.target().join(&path))?.len(), 1 << 30);
    check(&restored)
}

fn grow(path: &Path, bytes: u64) -> Result<()> {
    fs::OpenOptions::new().write(true).open(path)?.set_len(bytes)?;
    Ok(())
}

#[test]
fn two_tablespaces_go_where_they_are_sent_and_the_originals_stay_untouched() -> Result<()> {
    requires!(Postgres, Fuse);
    let world = World::new(0)?;
    for name in ["one", "two"] {
        let place = world.scratch.directory(name)?;
        world.cluster.sql(&format!("CREATE TABLESPACE {name} LOCATION '{}'", place.display()))?;
        world
            .cluster
            .sql(&format!("CREATE TABLE in_{name} TABLESPACE {name} AS SELECT generate_series(1, 5000) AS id"))?;
    }
    world.backup()?;
    world.cluster.sql("INSERT INTO in_two SELECT generate_series(5001, 6000)")?;
    world.cluster.archive_wal()?;

    // Beside the original, both places are in use: all of that is said at once, and nothing is made.
    let refused = world.restore_to(&world.target(), &[])?.expect_code(3)?;
    for name in ["one", "two"] {
        let hint = format!("--tablespace {name}=DIR");
        assert!(refused.stderr.contains(&hint), "{hint} is not named\n{refused}");
    }
    assert!(!world.target().exists());

    let moved = ["one", "two"].map(|name| format!("{name}={}", world.scratch.join(&format!("new-{name}")).display()));
    let originals = || Ok::<_, anyhow::Error>((tree(&world.scratch.join("one"))?, tree(&world.scratch.join("two"))?));
    world.cluster.sql("CHECKPOINT")?;
    let before = originals()?;
    let restored = world.restore(&["--tablespace", &moved[0], "--tablespace", &moved[1]])?;
    assert_eq!(restored.number("SELECT count(*) FROM in_one")?, 5000);
    assert_eq!(restored.number("SELECT count(*) FROM in_two")?, 6000);
    restored.sql("DELETE FROM in_one; DELETE FROM in_two; CHECKPOINT")?;
    assert_eq!(originals()?, before, "the restored copy wrote into the original's tablespaces");
    for name in ["one", "two"] {
        let place =
            restored.sql(&format!("SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname = '{name}'"))?;
        assert_eq!(place, world.scratch.join(&format!("new-{name}")).display().to_string());
    }
    check(&restored)
}

#[test]
fn a_pg_wal_that_is_a_link_is_backed_up_and_restored_as_a_directory() -> Result<()> {
    requires!(Postgres, Fuse);
    let world = World::new(0)?;
    world.cluster.stop("fast")?;
    let (inside, outside) = (world.cluster.data.join("pg_wal"), world.scratch.join("wal"));
    fs::rename(&inside, &outside)?;
    symlink(&outside, &inside)?;
    world.cluster.start()?;
    world.mark("before")?;
    world.backup()?;
    world.mark("after")?;
    world.cluster.archive_wal()?;
    let restored = world.restore(&[])?;
    assert_eq!(marks(&restored)?, "after,before");
    assert!(fs::symlink_metadata(world.target().join("pg_wal"))?.is_dir(), "pg_wal leads out of the copy");
    check(&restored)
}

#[test]
fn a_copy_beside_its_original_archives_nothing_until_it_is_adopted() -> Result<()> {
    requires!(Postgres, Fuse);
    let world = World::new(0)?;
    world.mark("before")?;
    world.backup()?;
    let restored = world.restore(&[])?;
    assert_eq!(restored.sql("SHOW archive_mode")?, "off");
    assert_eq!(restored.sql("SHOW max_logical_replication_workers")?, "0");
    // Even if somebody switches it on, the command itself refuses.
    let segment = world.target().join("pg_wal/000000010000000000000099");
    fs::File::create(&segment)?.write_all(&vec![0; 16 << 20])?;
    let finished =
        world.pghydrant.run(world.repository.arguments(&["wal", "push"], &[&segment.display().to_string()]))?;
    assert_ne!(finished.code, Some(0), "{finished}");
    drop(restored);
    fs::remove_dir_all(world.target())?;

    let adopted = world.restore(&["--adopt"])?;
    assert_eq!(adopted.sql("SHOW archive_mode")?, "on");
    adopted.archive_wal()?;
    wait_until("timeline 2 in the archive", Duration::from_secs(120), || {
        Ok(world.repository.path().join("clusters/main/wal/00000002").is_dir())
    })
}

#[test]
fn a_cluster_that_archives_elsewhere_has_backups_that_restore_by_themselves() -> Result<()> {
    requires!(Postgres, Fuse);
    let scratch = Scratch::new()?;
    let pghydrant = Pghydrant::new(&scratch)?;
    let repository = Repository::init(&scratch, &pghydrant)?;
    let cluster = Cluster::build(&scratch, "original").start()?;
    cluster.pgbench_initialize(2)?;
    let load = cluster.pgbench_load()?;
    repository.backup(&cluster)?;
    cluster.end_load(load)?;
    cluster.wait_for_no_slot()?;
    let (target, port) = (scratch.join("restored"), cluster::free_port()?.to_string());
    repository.restore(&target, &["--port", &port])?.expect_code(0)?;
    let restored = Instance::running_in(&target)?;
    assert_eq!(restored.number("SELECT count(*) FROM pgbench_accounts")?, 200_000);
    let sums = restored
        .sql("SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(delta) FROM pgbench_history)")?;
    assert_eq!(sums, "t");
    check(&restored)
}
