//! `backup`, `list`, `show`, `verify`: what a backup takes, says and survives.

use std::fs;
use std::time::Duration;

use crate::support::json::{find_number, find_text};
use crate::support::repository::flip_bit;
use crate::support::tools::postgres_program;
use crate::support::*;

#[test]
fn a_second_backup_stores_only_what_changed() -> Result<()> {
    requires!(Postgres);
    let world = World::new(5)?;
    world.cluster.sql("CHECKPOINT")?;
    let first = find_number(&world.backup()?, "added_pack_bytes").context("no added_pack_bytes")?;
    world.cluster.sql("UPDATE pgbench_accounts SET abalance = 1 WHERE aid = 4242")?;
    world.cluster.sql("CHECKPOINT")?;
    let second = find_number(&world.backup()?, "added_pack_bytes").context("no added_pack_bytes")?;
    assert!(second * 10 < first, "{first} bytes, then {second}");
    let connection = world.cluster.connection_string();
    let full = ["--dbname", &connection, "--full", "--json"];
    let full = world.pghydrant.succeed(world.repository.arguments(&["backup"], &full))?.json()?;
    let full = find_number(&full, "added_pack_bytes").context("no added_pack_bytes")?;
    assert!(full * 10 > first * 9, "{first} bytes, and in full {full}");
    world.cluster.archive_wal()?;
    world.pghydrant.succeed(["verify", "--repo", &world.repository.shown()])?;
    let list = world.pghydrant.succeed(world.repository.arguments(&["list"], &[]))?;
    assert_eq!(list.stdout.lines().filter(|line| line.contains("Z-")).count(), 3, "{list}");
    Ok(())
}

#[test]
fn a_rate_limit_holds_and_one_that_is_none_is_refused() -> Result<()> {
    requires!(Postgres);
    let world = World::new(1)?;
    let connection = world.cluster.connection_string();
    let limited = |limit| ["--dbname", connection.as_str(), "--json", "--rate-limit", limit];
    let backup = |limit| world.repository.arguments(&["backup", "--full"], &limited(limit));
    for (limit, part) in [("0", "would never end"), ("fast", "is not a size")] {
        let refused = world.pghydrant.run(backup(limit))?.expect_code(2)?;
        ensure!(refused.stdout.contains(part), "{refused}");
    }
    // A lower bound, which no busy machine can break: what was read takes so long, but for what goes at once.
    let limited = world.pghydrant.succeed(backup("16M"))?;
    let named = |line: &serde_json::Value| find_text(line, "bottleneck").is_some();
    ensure!(named(&limited.json()?), "no bottleneck is named\n{limited}");
    let verified = world.pghydrant.succeed(["verify", "--repo", &world.repository.shown(), "--json"])?;
    ensure!(verified.json_lines()?.iter().any(named), "no bottleneck is named\n{verified}");
    let copy = limited.json_lines()?.into_iter().find(|line| line["step"] == "copy" && line["state"] == "done");
    let seconds = copy.as_ref().and_then(|copy| copy["seconds"].as_f64()).with_context(|| format!("{limited}"))?;
    let bytes = find_number(&limited.json()?, "bytes").with_context(|| format!("{limited}"))? as f64;
    let least = (bytes / f64::from(16 << 20) - 0.5) * 0.9;
    ensure!(least > 0.5 && seconds > least, "{bytes} bytes in {seconds} s\n{limited}");
    Ok(())
}

#[test]
fn every_compression_and_block_size_restores_the_same_files() -> Result<()> {
    requires!(Postgres);
    let scratch = Scratch::new()?;
    let pghydrant = Pghydrant::new(&scratch)?;
    let cluster = Cluster::build(&scratch, "original").start()?;
    cluster.pgbench_initialize(1)?;
    for options in [["none", "128KiB"], ["lz4", "32KiB"], ["zstd", "1MiB"], ["zstd:9", "64KiB"]] {
        let place = scratch.join("repo");
        let repository =
            Repository::init_with(&scratch, &pghydrant, &["--compression", options[0], "--block-size", options[1]])?;
        repository.backup(&cluster)?;
        let target = scratch.join("restored");
        repository.restore(&target, &["--no-start", "--source", "blocks"])?.expect_code(0)?;
        Run::new(postgres_program("pg_verifybackup")?).user(OsUser::server()).arg(&target).succeed()?;
        pghydrant.succeed(["verify", "--repo", &repository.shown()])?;
        fs::remove_dir_all(&target)?;
        fs::remove_dir_all(&place)?;
    }
    Ok(())
}

#[test]
fn a_damaged_page_is_named_and_the_backup_completes_with_its_own_exit_code() -> Result<()> {
    requires!(Postgres);
    let world = World::new(1)?;
    let path = world.cluster.sql("SELECT pg_relation_filepath('pgbench_accounts')")?;
    world.cluster.stop("fast")?;
    flip_bit(&world.cluster.data.join(&path), 7 * 8192 + 5000)?;
    world.cluster.start()?;
    let connection = world.cluster.connection_string();
    let arguments = world.repository.arguments(&["backup"], &["--dbname", &connection]);
    let backup = world.pghydrant.fail(arguments, 7, &[&path])?;
    assert!(backup.stderr.contains('7'), "{backup}");
    let show = world.pghydrant.succeed(world.repository.arguments(&["show"], &["--json"]))?;
    assert!(show.stdout.contains(&path), "{show}");
    // It restores: a damaged page is better than no backup.
    world.restore_to(&world.target(), &["--no-start", "--source", "blocks"])?.expect_code(0)?;
    Ok(())
}

#[test]
fn another_cluster_under_the_same_name_is_refused() -> Result<()> {
    requires!(Postgres);
    let world = World::new(0)?;
    world.backup()?;
    let other = Cluster::build(&world.scratch, "other").start()?;
    let arguments = world.repository.arguments(&["backup"], &["--dbname", &other.connection_string()]);
    let refused = world.pghydrant.run(arguments)?;
    ensure!(refused.code.is_some_and(|code| code != 0), "{refused}");
    refused.expect_stderr(&["system identifier"])?;
    let segment = Run::new("sh").args(["-c", "ls \"$0\"/pg_wal/0* | head -n 1"]).arg(&other.data).succeed()?;
    let arguments = world.repository.arguments(&["wal", "push"], &[segment.stdout.trim()]);
    let refused = world.pghydrant.run(arguments)?;
    ensure!(refused.code.is_some_and(|code| code != 0), "a segment of another cluster was taken\n{refused}");
    Ok(())
}

#[test]
fn two_backups_of_one_cluster_at_once_are_refused_and_the_first_completes() -> Result<()> {
    requires!(Postgres);
    let world = World::new(5)?;
    let connection = world.cluster.connection_string();
    let arguments = || world.repository.arguments(&["backup"], &["--dbname", &connection, "--json"]);
    let mut finished = Vec::new();
    let running = [world.pghydrant.start(arguments())?, world.pghydrant.start(arguments())?];
    for run in running {
        finished.push(run.wait()?);
    }
    finished.sort_by_key(|finished| finished.code);
    ensure!(finished[0].code == Some(0), "neither completed\n{}\n{}", finished[0], finished[1]);
    // Both may complete where they did not meet.
    if finished[1].code != Some(0) {
        ensure!(format!("{}", finished[1]).contains("lock"), "{}", finished[1]);
    }
    // The archiver may be behind, and what it has not brought yet is a gap.
    world.cluster.archive_wal()?;
    world.pghydrant.succeed(["verify", "--repo", &world.repository.shown()])?;
    Ok(())
}

#[test]
fn a_killed_backup_leaves_nothing_that_counts() -> Result<()> {
    requires!(Postgres);
    let world = World::new(5)?;
    world.backup()?;
    world.cluster.sql("UPDATE pgbench_accounts SET abalance = abalance + 1")?;
    let connection = world.cluster.connection_string();
    let list =
        || Ok::<_, anyhow::Error>(world.pghydrant.succeed(world.repository.arguments(&["list"], &["--json"]))?.stdout);
    // Those that count; unfinished ones are listed as such.
    let finished = |listed: &str| -> Vec<String> {
        listed.lines().filter(|line| line.contains("\"event\":\"backup\"")).map(str::to_owned).collect()
    };
    let before = finished(&list()?);
    for milliseconds in [20, 100, 300, 600] {
        let running =
            world.pghydrant.start(world.repository.arguments(&["backup"], &["--full", "--dbname", &connection]))?;
        std::thread::sleep(Duration::from_millis(milliseconds));
        running.kill()?;
        world.cluster.archive_wal()?;
        world.pghydrant.succeed(["verify", "--repo", &world.repository.shown()])?;
        // It counts when it was killed behind its last step, and is then whole.
        let after = finished(&list()?);
        if after != before {
            let added: Vec<&String> = after.iter().filter(|line| !before.contains(line)).collect();
            ensure!(added.len() == 1 && after.len() == before.len() + 1, "{before:?}, then {after:?}");
            let label = find_text(&serde_json::from_str(added[0])?, "label").context("no label")?;
            let options = ["--repo", &world.repository.shown(), "--cluster", "main", "--backup", &label];
            world.pghydrant.succeed(["verify"].iter().chain(&options))?;
            break;
        }
    }
    // One that has begun to write for certain.
    let mut running =
        world.pghydrant.start(world.repository.arguments(&["backup"], &["--full", "--dbname", &connection]))?;
    running.wait_for_output("the scan", |seen| seen.contains("  scan "))?;
    running.kill()?;
    world.cluster.archive_wal()?;
    let verified = world.pghydrant.succeed(["verify", "--repo", &world.repository.shown()])?;
    assert!(list()?.contains("unfinished") && verified.stdout.contains("unfinished"), "{verified}");
    // The server has left backup mode with the connection, and the next one works.
    world.backup()?;
    assert!(!list()?.contains("unfinished"), "the mark of a swept backup stays");
    world.cluster.archive_wal()?;
    world.pghydrant.succeed(["verify", "--repo", &world.repository.shown()])?;
    Ok(())
}

/// A virtual machine set back to a snapshot writes other WAL under the names that the archive has.
#[test]
fn a_backup_is_never_committed_with_the_wal_of_another_history() -> Result<()> {
    requires!(Postgres);
    let world = World::new(0)?;
    let (data, snapshot) = (&world.cluster.data, world.scratch.join("snapshot"));
    world.cluster.stop("fast")?;
    Run::new("cp").arg("-a").arg(data).arg(&snapshot).succeed()?;
    world.cluster.start()?;
    world.mark("first")?;
    let first = find_text(&world.backup()?, "label").context("no label")?;
    world.mark("more")?;
    for _ in 0..3 {
        world.cluster.archive_wal()?;
    }
    world.cluster.stop("fast")?;
    fs::remove_dir_all(data)?;
    fs::rename(&snapshot, data)?;
    world.cluster.start()?;
    world.mark("other")?;
    let connection = world.cluster.connection_string();
    let arguments = world.repository.arguments(&["backup"], &["--dbname", &connection]);
    world.pghydrant.fail(arguments, 3, &["is there already and differs", "another history", "--cluster"])?;
    let list = world.pghydrant.succeed(world.repository.arguments(&["list"], &["--json"]))?.stdout;
    ensure!(list.matches("\"event\":\"backup\"").count() == 1 && list.contains(&first), "{list}");
    world.cluster.stop("immediate")?;
    let restored = world.restore(&["--source", "blocks"])?;
    assert_eq!(restored.sql("SELECT string_agg(name, ',' ORDER BY name) FROM marks")?, "first,more");
    Ok(())
}

/// The archiver is behind, and the backup's own WAL has overtaken it: no recovery comes along there.
#[test]
fn a_gap_before_the_first_backup_is_no_finding() -> Result<()> {
    requires!(Postgres);
    let world = World::new(0)?;
    world.cluster.archive_wal()?;
    world.cluster.archive_wal()?;
    let backup = world.backup()?;
    let start = find_text(&backup, "start").context("no start")?;
    let last = format!("SELECT pg_walfile_name('{start}'::pg_lsn - 16777216)");
    let last = world.cluster.sql(&last)?;
    world.cluster.archive_wal()?;
    world.cluster.archive_wal()?;
    let wal = world.repository.wal();
    fs::remove_file(wal.join(&last))?;
    let verify = || world.pghydrant.run(["verify", "--repo", &world.repository.shown()]);
    let verified = verify()?.expect_code(0)?;
    ensure!(verified.stdout.contains("each backup has its own WAL") && verified.stdout.contains(&last), "{verified}");
    let behind = world.cluster.sql(&format!("SELECT pg_walfile_name('{start}'::pg_lsn + 16777216)"))?;
    fs::remove_file(wal.join(&behind))?;
    let found = verify()?.expect_code(4)?;
    ensure!(format!("{found}").contains(&behind), "{found}");
    Ok(())
}

#[test]
fn show_names_gaps_and_the_recovery_window() -> Result<()> {
    requires!(Postgres);
    let world = World::new(0)?;
    world.backup()?;
    for name in ["a", "b", "c"] {
        world.mark(name)?;
        world.cluster.archive_wal()?;
    }
    let show = |arguments: &[&str]| world.pghydrant.succeed(world.repository.arguments(&["show"], arguments));
    let whole = show(&["--json"])?;
    let label = find_text(&whole.json()?, "label").context("no label")?;
    let one = show(&[&label])?;
    assert!(one.stdout.contains(&label), "{one}");

    let wal = world.repository.wal();
    let segments = world.repository.segments()?;
    let gap = &segments[segments.len() - 2];
    fs::remove_file(wal.join(gap))?;
    let with_gap = show(&[])?;
    assert!(with_gap.stdout.contains(gap.as_str()), "the gap is not named\n{with_gap}");
    let verify = world.pghydrant.run(["verify", "--repo", &world.repository.shown()])?;
    assert_eq!(verify.code, Some(4), "{verify}");
    Ok(())
}
