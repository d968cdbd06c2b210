//! `backup --from`: what `pg_basebackup` made becomes a backup that restores like any other, or is refused by name.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::repository::flip_bit;
use crate::support::tools::postgres_program;
use crate::support::*;

/// `pg_basebackup` of `cluster` into `name`.
fn base_backup(world: &World, name: &str, arguments: &[&str]) -> Result<PathBuf> {
    let place = world.scratch.join(name);
    let run = world.cluster.client("pg_basebackup")?.args(["--checkpoint=fast", "--no-sync", "-D"]).arg(&place);
    run.args(arguments).succeed()?;
    Ok(place)
}

fn adopt(world: &World, directory: &Path, arguments: &[&str]) -> Vec<String> {
    let directory = directory.display().to_string();
    world.repository.arguments(&["backup"], &[&["--from", &directory], arguments].concat())
}

fn verify_restored(world: &World) -> Result<()> {
    let verified = world.cluster.client("pg_verifybackup")?.arg(world.target()).finish()?;
    ensure!(verified.code == Some(0), "{verified}");
    Ok(())
}

#[test]
fn a_base_backup_without_wal_is_adopted_beside_the_archive_and_reaches_every_target() -> Result<()> {
    requires!(Postgres);
    let world = World::new(1)?;
    world.mark("before")?;
    let load = world.cluster.pgbench_load()?;
    let base = base_backup(&world, "base", &["--wal-method=none"])?;
    drop(load);
    // The archive has the backup's WAL once the segment after it is there.
    world.cluster.archive_wal()?;
    let first = world.pghydrant.succeed(adopt(&world, &base, &["--json"]))?.json()?;
    assert_eq!(first["parent"], serde_json::Value::Null);
    ensure!(first["wal_origin"] == "archive", "{first}");
    // The end of such a backup is known to the second, and a second is added.
    std::thread::sleep(std::time::Duration::from_secs(3));
    let xid = world.mark("a")?;
    let time = world.cluster.sql("SELECT clock_timestamp()")?;
    world.mark("b")?;
    world.cluster.archive_wal()?;
    let balance = "SELECT sum(abalance) = (SELECT sum(delta) FROM pgbench_history) FROM pgbench_accounts";
    for (target, expected) in [
        (&[][..], "a,b,before"),
        (&["--target-time", &time], "a,before"),
        (&["--target-xid", &xid], "a,before"),
        (&["--target-immediate"], "before"),
    ] {
        let restored = world.restore(target)?;
        ensure!(marks(&restored)? == expected, "{target:?}: {}", marks(&restored)?);
        ensure!(restored.sql(balance)? == "t", "{target:?}: the balances are wrong");
        restored.check_relations()?;
        drop(restored);
        fs::remove_dir_all(world.target())?;
    }
    world.restore_to(&world.target(), &["--no-start"])?.expect_code(0)?;
    verify_restored(&world)?;
    // A backup of the running cluster goes on from it, and so does the next base backup.
    let second = world.backup()?;
    assert_eq!(second["parent"], first["label"]);
    let again = base_backup(&world, "again", &["--wal-method=none", "--manifest-checksums=SHA256"])?;
    world.cluster.archive_wal()?;
    let third = world.pghydrant.succeed(adopt(&world, &again, &["--json"]))?.json()?;
    assert_eq!(third["parent"], second["label"]);
    world.pghydrant.succeed(["verify", "--repo", &world.repository.shown()])?;
    Ok(())
}

#[test]
fn a_base_backup_that_streamed_its_wal_needs_no_archive() -> Result<()> {
    requires!(Postgres);
    let scratch = Scratch::new()?;
    let pghydrant = Pghydrant::new(&scratch)?;
    let repository = Repository::init(&scratch, &pghydrant)?;
    let cluster = Cluster::build(&scratch, "original").start()?;
    let world = World { cluster, repository, pghydrant, scratch };
    world.mark("before")?;
    for method in ["stream", "fetch"] {
        let base = base_backup(&world, method, &["--wal-method", method, "--manifest-checksums=NONE"])?;
        let adopted = world.pghydrant.succeed(adopt(&world, &base, &[]))?;
        ensure!(adopted.stdout.contains("from the base backup's own pg_wal"), "{adopted}");
        let restored = world.restore(&["--source", "blocks"])?;
        assert_eq!(marks(&restored)?, "before");
        drop(restored);
        fs::remove_dir_all(world.target())?;
        world.restore_to(&world.target(), &["--no-start"])?.expect_code(0)?;
        verify_restored(&world)?;
        fs::remove_dir_all(world.target())?;
    }
    Ok(())
}

#[test]
fn tablespaces_go_by_their_oids() -> Result<()> {
    requires!(Postgres);
    let world = World::new(0)?;
    let mut mapping = Vec::new();
    for name in ["one", "two"] {
        let place = world.scratch.directory(name)?;
        world.cluster.sql(&format!("CREATE TABLESPACE {name} LOCATION '{}'", place.display()))?;
        world
            .cluster
            .sql(&format!("CREATE TABLE in_{name} TABLESPACE {name} AS SELECT generate_series(1, 1000) AS n"))?;
        let mapped = world.scratch.join(&format!("base_{name}"));
        mapping.push(format!("--tablespace-mapping={}={}", place.display(), mapped.display()));
    }
    let base = base_backup(&world, "base", &["--wal-method=stream", &mapping[0], &mapping[1]])?;
    let adopted = world.pghydrant.succeed(adopt(&world, &base, &[]))?;
    let oids = world.cluster.sql("SELECT oid FROM pg_tablespace WHERE spcname IN ('one', 'two') ORDER BY oid")?;
    let oids: Vec<&str> = oids.lines().collect();
    let show = world.pghydrant.succeed(world.repository.arguments(&["show", "latest"], &[]))?;
    for oid in &oids {
        ensure!(adopted.stdout.contains("names are not known") && adopted.stdout.contains(oid), "{adopted}");
        ensure!(show.stdout.contains("name unknown, in") && show.stdout.contains(oid), "{show}");
    }
    let places = ["new_one", "new_two"].map(|name| world.scratch.join(name).display().to_string());
    let options = [format!("{}={}", oids[0], places[0]), format!("{}={}", oids[1], places[1])];
    let restored = world.restore(&["--tablespace", &options[0], "--tablespace", &options[1]])?;
    assert_eq!(restored.number("SELECT (SELECT count(*) FROM in_one) + (SELECT count(*) FROM in_two)")?, 2000);
    let location = restored.sql("SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname = 'two'")?;
    assert_eq!(location, places[1]);
    Ok(())
}

#[test]
fn what_pg_basebackup_did_not_leave_like_that_is_refused_by_name() -> Result<()> {
    requires!(Postgres);
    let world = World::new(0)?;
    let base = base_backup(&world, "base", &["--wal-method=stream"])?;
    let copy = |name: &str| -> Result<PathBuf> {
        let place = world.scratch.join(name);
        Run::new("cp").arg("-a").arg(&base).arg(&place).succeed()?;
        Ok(place)
    };
    let refused =
        |directory: &Path, code: i32, parts: &[&str]| world.pghydrant.fail(adopt(&world, directory, &[]), code, parts);

    let damaged = copy("damaged")?;
    flip_bit(&damaged.join("global/1260"), 5000)?;
    refused(&damaged, 1, &["global/1260 has another checksum"])?;
    let shorter = copy("shorter")?;
    fs::OpenOptions::new().write(true).open(shorter.join("global/1260"))?.set_len(4096)?;
    refused(&shorter, 1, &["global/1260 has 4096 bytes, not"])?;
    let missing = copy("missing")?;
    fs::remove_file(missing.join("global/1260"))?;
    refused(&missing, 3, &["global/1260 is missing"])?;
    let strange = copy("strange")?;
    fs::write(strange.join("base/1/4711"), "")?;
    refused(&strange, 3, &["base/1/4711 is not in backup_manifest"])?;
    let newer = copy("newer")?;
    fs::write(newer.join("PG_VERSION"), "19\n")?;
    refused(&newer, 3, &["the directory is of PostgreSQL 19; 13 to 18 can be backed up"])?;
    let list = copy("list")?;
    flip_bit(&list.join("backup_manifest"), 200)?;
    refused(&list, 3, &["backup_manifest cannot be used", "its own checksum is wrong"])?;
    let unlisted = copy("unlisted")?;
    fs::remove_file(unlisted.join("backup_manifest"))?;
    refused(&unlisted, 3, &["has no backup_manifest"])?;
    let no_wal = copy("no_wal")?;
    fs::remove_dir_all(no_wal.join("pg_wal"))?;
    fs::create_dir(no_wal.join("pg_wal"))?;
    let other = Repository::init_at(&world.scratch.join("empty"), &world.pghydrant, &[])?;
    let arguments = ["--from", &no_wal.display().to_string()].map(str::to_owned);
    let arguments = [other.arguments(&["backup"], &[]), arguments.to_vec()].concat();
    world.pghydrant.fail(
        arguments,
        3,
        &["WAL segment 0000000100000000", "neither in the archive nor in its pg_wal"],
    )?;
    // A segment whose rest was never received would end every recovery there.
    let cut = copy("cut")?;
    let list: serde_json::Value = serde_json::from_str(&fs::read_to_string(cut.join("backup_manifest"))?)?;
    let stop = list["WAL-Ranges"][0]["End-LSN"].as_str().and_then(|lsn| lsn.split_once('/')).context("no end")?;
    let (high, low) = (u32::from_str_radix(stop.0, 16)?, usize::from_str_radix(stop.1, 16)?);
    let segment = cut.join("pg_wal").join(format!("00000001{high:08X}{:08X}", low >> 24));
    let stop = low % (16 << 20);
    let mut bytes = fs::read(&segment)?;
    bytes[stop..].fill(0);
    fs::write(&segment, bytes)?;
    let arguments = ["--from", &cut.display().to_string()].map(str::to_owned);
    let arguments = [other.arguments(&["backup"], &[]), arguments.to_vec()].concat();
    world.pghydrant.fail(arguments, 3, &["ends before the server had finished it"])?;

    let started = copy("started")?;
    let server =
        Instance { data: started.clone(), port: cluster::free_port()?, sockets: world.cluster.sockets.clone() };
    server.configure(&format!("port = {}\narchive_mode = off", server.port))?;
    server.start()?;
    refused(&started, 3, &["it has a postmaster.pid"])?;
    server.stop("fast")?;
    refused(&started, 3, &["it has no backup_label"])?;
    fs::rename(started.join("backup_label.old"), started.join("backup_label"))?;
    fs::copy(base.join("postgresql.conf"), started.join("postgresql.conf"))?;
    let again = world.pghydrant.run(adopt(&world, &started, &[]))?;
    ensure!(matches!(again.code, Some(1 | 3)) && again.stderr.contains("not as pg_basebackup left it"), "{again}");

    let incremental = copy("incremental")?;
    let label = fs::read_to_string(incremental.join("backup_label"))?;
    fs::write(incremental.join("backup_label"), format!("{label}INCREMENTAL FROM LSN: 0/2000028\n"))?;
    refused(&incremental, 3, &["is an incremental base backup"])?;
    refused(&world.cluster.data, 3, &["it has a postmaster.pid"])?;
    refused(&world.scratch.join("nowhere"), 3, &["nowhere"])?;
    let both = adopt(&world, &base, &["--dbname", "host=/nowhere"]);
    world.pghydrant.fail(both, 2, &["--dbname"])?;

    // Nothing of all that became a backup; the one as it was made does, and another cluster's does not.
    let list = world.pghydrant.succeed(world.repository.arguments(&["list"], &[]))?;
    ensure!(list.stdout.contains("cluster main: no backups"), "{list}");
    world.pghydrant.succeed(adopt(&world, &base, &[]))?;
    let stranger = Cluster::build(&world.scratch, "stranger").start()?;
    let place = world.scratch.join("strangers");
    stranger.client("pg_basebackup")?.args(["--checkpoint=fast", "-D"]).arg(&place).succeed()?;
    refused(&place, 3, &["system identifier"])?;
    world.pghydrant.succeed(["verify", "--repo", &world.repository.shown()])?;
    Ok(())
}

#[test]
fn without_pg_waldump_the_end_is_bounded_by_the_files_times() -> Result<()> {
    requires!(Postgres);
    let world = World::new(0)?;
    world.mark("before")?;
    let programs = world.scratch.directory("programs")?;
    for program in ["postgres", "pg_ctl", "initdb"] {
        std::os::unix::fs::symlink(postgres_program(program)?, programs.join(program))?;
    }
    let without = world.pghydrant.env("PGHYDRANT_PG_BIN", programs.display().to_string());
    let streamed = base_backup(&world, "streamed", &["--wal-method=stream"])?;
    let other = Repository::init_at(&world.scratch.join("empty"), &world.pghydrant, &[])?;
    let from = streamed.display().to_string();
    let arguments = other.arguments(&["backup"], &["--from", &from]);
    without.fail(arguments, 3, &["cannot be proven whole without pg_waldump"])?;

    world.cluster.archive_wal()?;
    let during = world.cluster.sql("SELECT clock_timestamp()")?;
    let xid = world.mark("a")?;
    // A copy has later times, which is as good.
    fs::File::open(streamed.join("backup_manifest"))?
        .set_modified(std::time::SystemTime::now() + std::time::Duration::from_secs(1))?;
    without.succeed(adopt(&world, &streamed, &[]))?;
    std::thread::sleep(std::time::Duration::from_secs(3));
    let time = world.cluster.sql("SELECT clock_timestamp()")?;
    world.mark("b")?;
    world.cluster.archive_wal()?;
    let restored = world.restore(&["--target-time", &time])?;
    assert_eq!(marks(&restored)?, "a,before");
    drop(restored);
    fs::remove_dir_all(world.target())?;
    // What may lie before the end is refused: too early a stop would never be consistent.
    for target in [["--target-time", &during], ["--target-xid", &xid]] {
        let refused = world.restore_to(&world.target(), &target)?;
        ensure!(refused.code == Some(3), "{refused}");
    }
    Ok(())
}
