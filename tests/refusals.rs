//! What bad input gets: one clear line, a hint, the right exit code, and nothing lost.

use std::fs;

use crate::support::compare::tree;
use crate::support::repository::resealed;
use crate::support::*;

/// A message: what went wrong in one line that starts with `error:`, and no panic.
fn refused(finished: Finished, code: i32, parts: &[&str]) -> Result<Finished> {
    let finished = finished.expect_code(code)?.expect_stderr(parts)?;
    ensure!(finished.stderr.lines().any(|line| line.starts_with("error: ")), "no error line\n{finished}");
    ensure!(!finished.stderr.contains("panicked"), "a panic\n{finished}");
    Ok(finished)
}

#[test]
fn a_wrong_repository_is_named() -> Result<()> {
    let scratch = Scratch::new()?;
    let pghydrant = Pghydrant::new(&scratch)?;
    let nowhere = scratch.join("nowhere").display().to_string();
    let empty = scratch.directory("empty")?.display().to_string();
    for path in [&nowhere, &empty] {
        for verb in [&["list"][..], &["verify"], &["show", "--cluster", "main"]] {
            let finished = pghydrant.run([verb, &["--repo", path]].concat())?;
            refused(finished, 1, &[path.as_str(), "hint: "])?;
        }
        let to = scratch.join("restored").display().to_string();
        let restore = ["restore", "--repo", path, "--cluster", "main", "--to", &to, "--no-start"];
        let finished = pghydrant.run(restore)?;
        ensure!(matches!(finished.code, Some(1 | 3)), "{finished}");
        ensure!(finished.stderr.contains(path.as_str()) && finished.stderr.contains("hint: "), "{finished}");
        ensure!(!scratch.join("restored").exists(), "{finished}");
    }
    refused(pghydrant.run(["list"])?, 2, &["no repository is named", "hint: "])?;
    Ok(())
}

#[test]
fn an_unknown_version_is_refused_by_its_number() -> Result<()> {
    let scratch = Scratch::new()?;
    let pghydrant = Pghydrant::new(&scratch)?;
    let repository = Repository::init(&scratch, &pghydrant)?;
    let description = repository.path().join("pghydrant.json");
    let text = fs::read_to_string(&description)?;
    let newer = text.replace("\"format\": 1", "\"format\": 99");
    fs::write(&description, newer.replace("\"minimum_reader\": 1", "\"minimum_reader\": 99"))?;
    refused(pghydrant.run(["list", "--repo", &repository.shown()])?, 1, &["99", "pghydrant.json"])?;
    // A newer writer that older readers may read is no reason to refuse.
    fs::write(&description, resealed(&newer)?)?;
    pghydrant.succeed(["list", "--repo", &repository.shown()])?;
    // What somebody edited and did not seal is not believed.
    fs::write(&description, &newer)?;
    refused(pghydrant.run(["list", "--repo", &repository.shown()])?, 4, &["BLAKE3", "pghydrant.json"])?;
    Ok(())
}

#[test]
fn a_repository_is_not_made_over_something_else() -> Result<()> {
    let scratch = Scratch::new()?;
    let pghydrant = Pghydrant::new(&scratch)?;
    let repository = Repository::init(&scratch, &pghydrant)?;
    let before = tree(repository.path())?;
    refused(pghydrant.run(["init", "--repo", &repository.shown()])?, 1, &[&repository.shown()])?;
    ensure!(tree(repository.path())? == before, "init changed a repository");
    let full = scratch.directory("full")?;
    fs::write(full.join("mine"), "precious")?;
    refused(pghydrant.run(["init", "--repo", &full.display().to_string()])?, 1, &["not empty"])?;
    for option in
        [["--compression", "gzip"], ["--compression", "zstd:99"], ["--block-size", "100"], ["--block-size", "2MiB"]]
    {
        let place = scratch.join("new").display().to_string();
        let finished = pghydrant.run([&["init", "--repo", &place], &option[..]].concat())?;
        finished.expect_code(2)?;
        ensure!(!scratch.join("new").exists(), "{option:?} made something");
    }
    Ok(())
}

#[test]
fn a_mistyped_setting_or_option_is_a_usage_error() -> Result<()> {
    let scratch = Scratch::new()?;
    let pghydrant = Pghydrant::new(&scratch)?;
    let settings = scratch.join("pghydrant.toml");
    fs::write(&settings, "clutser = \"main\"\n")?;
    let finished = pghydrant.run(["--config", &settings.display().to_string(), "doctor"])?;
    refused(finished, 2, &["clutser", "did you mean \"cluster\"?"])?;
    pghydrant.run(["restore", "--taget-time", "now"])?.expect_code(2)?;
    pghydrant.run(["no-such-verb"])?.expect_code(2)?;
    pghydrant.run(["list", "--repo", "/", "--cluster", "../x"])?.expect_code(2)?;
    Ok(())
}

/// What every refusal of a restore must leave: no directory, no session.
struct Refusals {
    world: World,
}

impl Refusals {
    fn restore(&self, code: i32, arguments: &[&str], parts: &[&str]) -> Result<Finished> {
        let arguments = [&["--source", "blocks"], arguments].concat();
        let finished = refused(self.world.restore_to(&self.world.target(), &arguments)?, code, parts)?;
        ensure!(!self.world.target().exists(), "{} was made\n{finished}", self.world.target().display());
        ensure!(open_sessions(&self.world.pghydrant)?.is_empty(), "a session is open\n{finished}");
        Ok(finished)
    }
}

#[test]
fn an_impossible_restore_is_refused_before_anything_is_touched() -> Result<()> {
    requires!(Postgres);
    let world = World::new(0)?;
    let before = world.cluster.sql("SELECT now() - interval '1 hour'")?;
    let lsn_before = world.cluster.wal_position()?;
    world.backup()?;
    world.mark("after")?;
    world.cluster.archive_wal()?;
    let cluster_port = world.cluster.port;
    let refusals = Refusals { world };

    refusals.restore(3, &["--target-time", &before], &["before", "hint: "])?;
    refusals.restore(3, &["--target-lsn", &lsn_before], &["before"])?;
    refusals.restore(3, &["--target-lsn", "FF/0"], &["FF/0"])?;
    refusals.restore(3, &["--target-name", "no_such_point"], &["no_such_point"])?;
    refusals.restore(3, &["--target-xid", "3"], &["3"])?;
    refusals.restore(3, &["--target-timeline", "7"], &["7"])?;
    refusals.restore(2, &["--target-time", "next tuesday-ish"], &["next tuesday-ish"])?;
    refusals.restore(2, &["--target-lsn", "nonsense"], &["nonsense"]).or_else(|_| {
        // The argument parser may be the one that refuses.
        refusals.restore(2, &["--target-lsn", "nonsense"], &["LSN"])
    })?;
    // PostgreSQL has no "just before" for these, and would ignore the word.
    for goal in [&["--target-name", "x"][..], &["--target-immediate"], &[]] {
        let arguments = [goal, &["--target-exclusive"]].concat();
        refusals.restore(2, &arguments, &["--target-exclusive", "hint: "])?;
    }
    let two = refusals.world.restore_to(&refusals.world.target(), &["--target-immediate", "--target-name", "x"])?;
    two.expect_code(2)?;
    let unknown = refusals.world.restore_to(&refusals.world.target(), &["--backup", "20200101T000000Z-F"])?;
    ensure!(matches!(unknown.code, Some(1 | 3)), "{unknown}");
    unknown.expect_stderr(&["20200101T000000Z-F"])?;
    refusals.restore(3, &["--pg-bin", "/nonexistent"], &["/nonexistent"])?;
    refusals.restore(3, &["--tablespace", "nosuch=/var/tmp/x"], &["nosuch"])?;
    // Two problems, one report.
    let two = ["--pg-bin", "/nonexistent", "--tablespace", "nosuch=/var/tmp/x"];
    refusals.restore(3, &two, &["/nonexistent", "nosuch"])?;
    // The original's own port: its socket is in use.
    let port = cluster_port.to_string();
    let target = refusals.world.target();
    let taken = refusals.world.repository.restore(&target, &["--port", &port, "--source", "blocks"])?;
    refused(taken, 3, &[&port])?;
    Ok(())
}

#[test]
fn a_missing_segment_is_refused_by_name() -> Result<()> {
    requires!(Postgres);
    let world = World::new(0)?;
    world.backup()?;
    for name in ["a", "b", "c"] {
        world.mark(name)?;
        world.cluster.archive_wal()?;
    }
    let wal = world.repository.wal();
    let segments = world.repository.segments()?;
    let gap = segments[segments.len() - 2].clone();
    fs::rename(wal.join(&gap), world.scratch.join("gap"))?;
    let refusals = Refusals { world };
    refusals.restore(3, &[], &[&gap])?;
    // Up to the gap there is a way.
    refusals
        .world
        .restore_to(&refusals.world.target(), &["--target-immediate", "--no-start", "--source", "blocks"])?
        .expect_code(0)?;
    Ok(())
}

#[test]
fn a_directory_that_is_not_ours_is_left_alone() -> Result<()> {
    requires!(Postgres);
    let world = World::new(0)?;
    world.backup()?;
    let target = world.target();
    // Somebody's files.
    let place = world.scratch.directory("restored")?;
    fs::write(place.join("precious"), "data")?;
    let arguments = ["--no-start", "--source", "blocks"];
    let before = tree(&target)?;
    refused(world.restore_to(&target, &arguments)?, 3, &[&target.display().to_string(), "empty"])?;
    assert_eq!(tree(&target)?, before);
    fs::remove_file(place.join("precious"))?;

    // The running original itself, and a restored copy that runs.
    let original = world.cluster.data.clone();
    refused(world.restore_to(&original, &arguments)?, 3, &[&original.display().to_string()])?;
    assert_eq!(world.cluster.sql("SELECT 1")?, "1");

    // An empty directory is fine; a finished copy is then somebody's data as well.
    world.restore_to(&target, &arguments)?.expect_code(0)?;
    let copied = tree(&target)?;
    refused(world.restore_to(&target, &arguments)?, 3, &[&target.display().to_string()])?;
    assert_eq!(tree(&target)?, copied);
    Ok(())
}

#[test]
fn a_second_restore_into_the_same_directory_is_refused_while_the_first_runs() -> Result<()> {
    requires!(Postgres, Fuse);
    let world = World::new(8)?;
    world.backup()?;
    let target = world.target();
    let to = target.display().to_string();
    let arguments = world.repository.arguments(&["restore"], &["--to", &to, "--no-start"]);
    let first = world.pghydrant.start(&arguments)?;
    process::wait_until("the copy", std::time::Duration::from_secs(120), || Ok(target.join("base").exists()))?;
    let second = world.pghydrant.run(&arguments)?;
    let first = first.wait()?.expect_code(0)?;
    refused(second, 3, &[&to]).with_context(|| format!("{first}"))?;
    Run::new(tools::postgres_program("pg_verifybackup")?).user(OsUser::server()).arg(&target).succeed()?;
    Ok(())
}

#[test]
fn unknown_sessions_and_mountpoints_are_named() -> Result<()> {
    let scratch = Scratch::new()?;
    let pghydrant = Pghydrant::new(&scratch)?;
    for verb in ["retry", "cancel", "promote"] {
        refused(pghydrant.run([verb, "no-such-session"])?, 1, &["no-such-session"])?;
    }
    let nowhere = scratch.join("nowhere").display().to_string();
    refused(pghydrant.run(["unmount", &nowhere])?, 1, &[&nowhere])?;
    Ok(())
}

#[test]
fn a_server_that_cannot_be_reached_is_named() -> Result<()> {
    let scratch = Scratch::new()?;
    let pghydrant = Pghydrant::new(&scratch)?;
    let repository = Repository::init(&scratch, &pghydrant)?;
    let connection = format!("host={} port=1 user=postgres", scratch.path().display());
    let finished = pghydrant.run(repository.arguments(&["backup"], &["--dbname", &connection]))?;
    refused(finished, 1, &[&scratch.path().display().to_string()])?;
    let list = pghydrant.succeed(["list", "--repo", &repository.shown(), "--json"])?;
    ensure!(!list.stdout.contains("\"label\""), "{list}");
    Ok(())
}

#[test]
fn the_exit_codes_of_the_help_and_of_the_readme_are_the_same() -> Result<()> {
    let scratch = Scratch::new()?;
    let help = Pghydrant::new(&scratch)?.succeed(["--help"])?.stdout;
    let readme = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md"))?;
    let table = readme.split("## Exit codes").nth(1).and_then(|rest| rest.split("\n## ").next()).context("no table")?;
    let number = |text: &str| text.trim().parse::<u8>().ok();
    let of_readme: Vec<u8> = table.lines().filter_map(|line| number(line.split('|').nth(1)?)).collect();
    let of_help: Vec<u8> = help
        .lines()
        .skip_while(|line| !line.starts_with("Exit codes"))
        .filter_map(|line| number(line.split_whitespace().next()?))
        .collect();
    assert_eq!(of_readme, of_help);
    assert!(of_help.len() >= 9, "{of_help:?}");
    Ok(())
}

#[test]
fn a_place_that_the_user_may_not_write_is_named_with_its_cause() -> Result<()> {
    requires!(Postgres, Root);
    let world = World::new(0)?;
    world.backup()?;
    let closed = world.scratch.directory("closed")?;
    std::os::unix::fs::chown(&closed, Some(0), Some(0))?;
    let arguments = ["--no-start", "--source", "blocks"];
    let finished =
        refused(world.restore_to(&closed.join("restored"), &arguments)?, 3, &["permission denied", "hint: "])?;
    ensure!(finished.stderr.contains(&closed.display().to_string()), "{finished}");
    ensure!(!finished.stderr.contains("os error"), "{finished}");
    Ok(())
}

#[test]
fn a_repository_that_goes_away_in_the_middle_is_not_called_corrupt() -> Result<()> {
    requires!(Postgres, Fuse);
    let world = World::new(8)?;
    world.backup()?;
    world.cluster.stop("fast")?;
    let target = world.target();
    let to = target.display().to_string();
    let away = world.scratch.join("away");
    let mut stopped = 0;
    for (source, milliseconds) in [("mount", 0), ("mount", 40), ("blocks", 0), ("blocks", 40), ("blocks", 100)] {
        let arguments = ["--to", &to, "--no-start", "--source", source];
        let running = world.pghydrant.start(world.repository.arguments(&["restore"], &arguments))?;
        process::wait_until("the target", std::time::Duration::from_secs(120), || Ok(target.exists()))?;
        std::thread::sleep(std::time::Duration::from_millis(milliseconds));
        // As a disk that is unmounted: what is open goes on being readable, nothing else is there.
        fs::rename(world.repository.path(), &away)?;
        let finished = running.wait();
        fs::rename(&away, world.repository.path())?;
        let finished = finished?;
        if finished.code != Some(0) {
            stopped += 1;
            let finished = refused(finished, 6, &[&world.repository.shown(), "hint: "])?;
            ensure!(!finished.stderr.contains("corrupt"), "{finished}");
            world.pghydrant.run(["retry", &open_session(&world.pghydrant)?])?.expect_code(0)?;
        }
        Run::new(tools::postgres_program("pg_verifybackup")?).user(OsUser::server()).arg(&target).succeed()?;
        fs::remove_dir_all(&target)?;
    }
    ensure!(stopped > 0, "no moment fell into the copy");
    Ok(())
}
