//! What a server needs of its machine besides its files, and what an isolated copy of it is kept from.

use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::support::json::{find, find_text};
use crate::support::repository::resealed;
use crate::support::*;

/// A cluster that needs much: libraries of a directory of its own, one of them called `pg_cron` and loaded at the start;
/// an extension, a function without one, another order of text; peers of every kind.
struct Furnished {
    world: World,
    libraries: PathBuf,
    /// PostgreSQL's own.
    server_libraries: String,
}

impl Furnished {
    fn new() -> Result<Self> {
        let world = World::new(0)?;
        let libraries = world.scratch.directory("lib")?;
        let server_libraries = world.cluster.sql("SELECT setting FROM pg_config() WHERE name = 'PKGLIBDIR'")?;
        // A library that does nothing by itself, in the place of one that would.
        for (library, name) in [("passwordcheck", "pg_cron"), ("moddatetime", "ours")] {
            let from = PathBuf::from(&server_libraries).join(format!("{library}.so"));
            fs::copy(&from, libraries.join(format!("{name}.so"))).with_context(|| from.display().to_string())?;
        }
        for line in [
            "wal_level = logical",
            &format!("dynamic_library_path = '$libdir:{}'", libraries.display()),
            "shared_preload_libraries = 'pg_cron, auto_explain'",
            "synchronous_standby_names = 's1'",
            "synchronous_commit = local",
            "primary_conninfo = 'host=/nonexistent password=hush'",
        ] {
            world.cluster.configure(line)?;
        }
        world.cluster.restart()?;
        for statement in [
            "CREATE EXTENSION hstore",
            "CREATE FUNCTION ours() RETURNS trigger AS 'ours', 'moddatetime' LANGUAGE c",
            "CREATE COLLATION german (provider = icu, locale = 'de')",
            "CREATE TABLE words (word text PRIMARY KEY)",
            "CREATE INDEX ON words (word COLLATE german)",
            "SELECT pg_create_physical_replication_slot('standby_one')",
            "CREATE PUBLICATION everything FOR ALL TABLES",
            "CREATE SUBSCRIPTION news CONNECTION 'host=/nonexistent password=hush' PUBLICATION p \
                WITH (connect = false, slot_name = 'news_slot')",
            "ALTER SUBSCRIPTION news ENABLE",
            "CREATE DATABASE hidden",
        ] {
            world.cluster.sql(statement)?;
        }
        let hba = world.cluster.data.join("pg_hba.conf");
        fs::write(&hba, format!("local hidden all reject\n{}", fs::read_to_string(&hba)?))?;
        world.cluster.sql("SELECT pg_reload_conf()")?;
        Ok(Self { world, libraries, server_libraries })
    }

    /// Takes a library away, or brings it back.
    fn move_library(&self, name: &str, away: bool) -> Result<()> {
        let here = self.libraries.join(format!("{name}.so"));
        let there = self.world.scratch.join(&format!("{name}.away"));
        if away {
            fs::rename(here, there)?;
        } else {
            fs::rename(there, here)?;
        }
        Ok(())
    }

    fn plan(&self, arguments: &[&str]) -> Result<Finished> {
        self.world.restore_to(&self.world.target(), &[&["--source", "blocks", "--plan"], arguments].concat())
    }
}

fn named<'a>(list: &'a Value, name: &str) -> Result<&'a Value> {
    let list = list.as_array().context("no list")?;
    list.iter().find(|one| one["name"] == name).with_context(|| format!("no {name} in {list:?}"))
}

#[test]
fn a_backup_records_what_its_databases_need_and_whom_they_follow_and_no_password() -> Result<()> {
    requires!(Postgres);
    let furnished = Furnished::new()?;
    furnished.world.backup()?;
    let shown =
        furnished.world.pghydrant.succeed(furnished.world.repository.arguments(&["show"], &["latest", "--json"]))?;
    ensure!(!shown.stdout.contains("hush"), "a password is in it: {shown}");
    let shown = shown.json()?;
    let environment = find(&shown, "environment").context("nothing is recorded")?;
    let databases = &environment["databases"];
    let main = named(databases, "postgres")?;
    assert_eq!(main["encoding"], "UTF8");
    assert_eq!(main["locale"]["collate"], "C");
    assert_eq!(main["unknown"], Value::Null);
    named(&main["extensions"], "hstore")?;
    assert_eq!(named(&main["libraries"], "$libdir/hstore")?["extensions"], json!(["hstore"]));
    assert_eq!(named(&main["libraries"], "ours")?["extensions"], json!([]));
    let german = named(&main["collations"], "german")?;
    assert_eq!((&german["indexes"], &german["locale"]["provider"]), (&json!(1), &json!("icu")));
    assert_eq!(named(databases, "template1")?["extensions"][0]["name"], "plpgsql");
    // What lets nobody in is unknown, and no failure.
    assert_eq!(named(databases, "template0")?["allows_connections"], false);
    let reason = find_text(named(databases, "hidden")?, "unknown").context("hidden was let in")?;
    ensure!(reason.contains("hidden"), "{reason}");

    let replication = &environment["replication"];
    let slot = named(&replication["slots"], "standby_one")?;
    assert_eq!((&slot["kind"], &slot["active"]), (&json!("physical"), &json!(false)));
    let subscription = named(&replication["subscriptions"], "news")?;
    assert_eq!((&subscription["enabled"], &subscription["slot"]), (&json!(true), &json!("news_slot")));
    assert_eq!(named(&replication["publications"], "everything")?["database"], "postgres");
    ensure!(environment["icu_version"].is_string(), "{environment}");
    Ok(())
}

#[test]
fn an_isolated_copy_follows_nobody_runs_no_jobs_and_tells_what_lifts_each() -> Result<()> {
    requires!(Postgres);
    let furnished = Furnished::new()?;
    furnished.world.backup()?;
    // The copy is without it.
    furnished.move_library("pg_cron", true)?;
    let target = furnished.world.target();
    let finished = furnished.world.restore_to(&target, &["--source", "blocks"])?.expect_code(0)?;
    let wanted = "an isolated copy, by its postgresql.auto.conf; each is lifted by\n\
        \x20 archive_mode (was on): ALTER SYSTEM RESET archive_mode\n\
        \x20 max_logical_replication_workers (was 4): ALTER SYSTEM RESET max_logical_replication_workers\n\
        \x20 synchronous_standby_names (was s1): ALTER SYSTEM RESET synchronous_standby_names\n\
        \x20 primary_conninfo: ALTER SYSTEM RESET primary_conninfo\n\
        \x20 shared_preload_libraries (was pg_cron, auto_explain): ALTER SYSTEM RESET shared_preload_libraries\n\
        \x20 pg_wal/pghydrant.copy, which keeps `wal push` from archiving: remove it\n\
        subscriptions: postgres.news (off)\n\
        publications, which nobody follows here: postgres.everything\n\
        replication slots, which no backup contains: standby_one (physical)\n";
    ensure!(finished.stdout.ends_with(wanted), "{finished}");
    let copy = Instance::running_in(&target)?;
    for (setting, value) in [
        ("archive_mode", "off"),
        ("max_logical_replication_workers", "0"),
        ("synchronous_standby_names", ""),
        ("primary_conninfo", ""),
        ("shared_preload_libraries", "auto_explain"),
    ] {
        assert_eq!(copy.sql(&format!("SHOW {setting}"))?, value, "{setting}");
    }
    let workers = "SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'logical replication%'";
    assert_eq!(copy.sql(workers)?, "0");
    assert_eq!(copy.sql("SELECT subenabled FROM pg_subscription")?, "t", "the catalogs are the original's");
    // A copy that became a cluster of its own, and is copied again: what its original was kept from, it is kept from.
    fs::remove_file(target.join("pg_wal/pghydrant.copy"))?;
    let (connection, again) = (copy.connection_string(), furnished.world.scratch.join("again"));
    let repository = furnished.world.repository.shown();
    let second = ["--repo", &repository, "--cluster", "second"];
    furnished.world.pghydrant.succeed([&["backup", "--dbname", &connection], &second[..]].concat())?;
    copy.stop("fast")?;
    let (to, port) = (again.display().to_string(), cluster::free_port()?.to_string());
    let arguments = ["restore", "--to", &to, "--port", &port, "--source", "blocks"];
    let finished = furnished.world.pghydrant.succeed([&arguments, &second[..]].concat())?;
    ensure!(finished.stdout.contains("shared_preload_libraries (was pg_cron, auto_explain)"), "{finished}");
    assert_eq!(Instance::running_in(&again)?.sql("SHOW shared_preload_libraries")?, "auto_explain");
    drop(copy);
    fs::remove_dir_all(&target)?;
    furnished.move_library("pg_cron", false)?;

    let finished = furnished.world.restore_to(&target, &["--source", "blocks", "--adopt", "--json"])?.expect_code(0)?;
    let result = finished.json()?;
    let isolation = find(&result, "isolation").context("no isolation")?;
    assert_eq!((&isolation["adopted"], &isolation["switched_off"]), (&json!(true), &Value::Null));
    named(&isolation["replication"]["slots"], "standby_one")?;
    ensure!(!finished.stdout.contains("hush"), "{finished}");
    let adopted = Instance::running_in(&target)?;
    for (setting, value) in [
        ("archive_mode", "on"),
        ("max_logical_replication_workers", "4"),
        ("synchronous_standby_names", "s1"),
        ("primary_conninfo", "host=/nonexistent password=hush"),
        ("shared_preload_libraries", "pg_cron, auto_explain"),
    ] {
        assert_eq!(adopted.sql(&format!("SHOW {setting}"))?, value, "{setting}");
    }
    Ok(())
}

#[test]
fn what_this_machine_lacks_is_told_before_anything_is_touched() -> Result<()> {
    requires!(Postgres);
    let furnished = Furnished::new()?;
    // For the next start, which does not come.
    furnished.world.cluster.configure("max_connections = 21")?;
    furnished.world.backup()?;
    let doctor = || -> Result<String> {
        let finished = furnished.world.pghydrant.run(furnished.world.repository.arguments(&["doctor"], &[]))?;
        let lines = finished.stdout.lines().filter(|line| line.contains("newest backup"));
        Ok(lines.collect::<Vec<_>>().join("\n"))
    };
    let place = &furnished.server_libraries;
    let complete = furnished.plan(&["--adopt"])?.expect_code(0)?;
    ensure!(!complete.stderr.contains("ours") && !complete.stderr.contains("pg_cron"), "{complete}");
    furnished.move_library("ours", true)?;
    furnished.move_library("pg_cron", true)?;
    // Functions fail until it comes; a server that does not start is another matter.
    let warned = format!("warning: ours is not in {place}: what uses it fails (functions of database postgres)");
    let refusal = format!(
        "error: shared_preload_libraries names pg_cron, which is not in {place}: the server would not start\nhint: "
    );
    furnished.plan(&["--adopt"])?.expect_code(3)?.expect_stderr(&[&warned, &refusal])?;
    let isolated = furnished.plan(&[])?.expect_code(0)?.expect_stderr(&[&warned])?;
    ensure!(!isolated.stderr.contains("pg_cron"), "{isolated}");
    ensure!(doctor()?.contains("missing  newest backup      shared_preload_libraries names pg_cron"), "{}", doctor()?);
    furnished.move_library("ours", false)?;
    furnished.move_library("pg_cron", false)?;

    // As if the original had been on another machine.
    let description = furnished.world.repository.file(|path| path.contains("/backups/") && path.ends_with(".json"))?;
    let text = fs::read_to_string(&description)?;
    let mut moved = text.replace("\"collate\": \"C\"", "\"collate\": \"xx_XX.UTF-8\"");
    moved = moved.replace("\"lc_time\": \"C\"", "\"lc_time\": \"yy_YY.ISO-8859-1@euro\"");
    moved = moved.replace("\"huge_pages\": \"try\"", "\"huge_pages\": \"on\"");
    let size = find_text(&serde_json::from_str(&text)?, "shared_memory_size").context("no size of shared memory")?;
    moved = moved.replace(&format!("\"shared_memory_size\": \"{size}\""), "\"shared_memory_size\": \"9000GB\"");
    let icu = find_text(&serde_json::from_str(&text)?, "icu_version").context("no ICU")?;
    moved = moved.replace(&format!("\"icu_version\": \"{icu}\""), "\"icu_version\": \"7\"");
    fs::write(&description, resealed(&moved)?)?;
    let unreadable = "lc_time = yy_YY.ISO-8859-1@euro, a locale that this machine lacks: the server would not start";
    let stops = [
        "this machine lacks the locale xx_XX.UTF-8 of databases hidden, postgres, template1: nobody could connect to any database",
        "huge_pages is on, and shared_memory_size of 8.8 TiB takes ",
    ];
    let order =
        format!("1 index of database postgres, sorted by ICU 7, may be out of order by ICU {icu} of this machine");
    let refused = furnished.plan(&[])?.expect_code(3)?.expect_stderr(&[&order])?.expect_stderr(&stops)?;
    let refused = refused.expect_stderr(&[
        unreadable,
        "the restore is refused for 3 reasons; nothing was touched",
        "hint: localedef -i xx_XX -f UTF-8 xx_XX.UTF-8, as root",
        "hint: localedef -i yy_YY@euro -f ISO-8859-1 yy_YY.ISO-8859-1@euro, as root",
        "hint: sysctl vm.nr_hugepages=",
    ])?;
    ensure!(!furnished.world.target().exists(), "{refused}");
    for stop in stops.iter().chain([&unreadable]) {
        ensure!(doctor()?.contains(&format!("missing  newest backup      {stop}")), "{}", doctor()?);
    }
    // Who only copies may cure it before the start; but PostgreSQL must read the configuration that is prepared.
    let refused = furnished.plan(&["--no-start"])?.expect_code(3)?;
    let too_few = "warning: max_connections is 21 in the backup's configuration, and its first start needs 100 (cure: ";
    refused.expect_stderr(&stops)?.expect_stderr(&[too_few, &format!("error: {unreadable}")])?;
    Ok(())
}
