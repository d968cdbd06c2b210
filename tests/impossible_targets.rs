//! Targets that cannot be reached, and what is said of each, word for word.

use std::fs;

use crate::support::json::find_text;
use crate::support::*;

#[test]
fn an_hour_that_a_clock_change_repeats_or_skips_is_refused_and_says_what_to_type() -> Result<()> {
    let scratch = Scratch::new()?;
    // The rules of Berlin, without a time zone database.
    let pghydrant = Pghydrant::new(&scratch)?.env("TZ", "CET-1CEST,M3.5.0,M10.5.0/3");
    let [repository, to] = ["repo", "restored"].map(|name| scratch.join(name).display().to_string());
    let restore = |time: &str| {
        pghydrant.run(["restore", "--repo", &repository, "--cluster", "main", "--to", &to, "--target-time", time])
    };
    let said = |finished: &Finished| finished.stderr.lines().next().unwrap_or_default().to_owned();
    let twice = restore("2026-10-25 02:30")?.expect_code(2)?;
    assert_eq!(
        said(&twice),
        "error: \"2026-10-25 02:30\" exists twice in the local time zone: give the offset, \"2026-10-25 02:30:00+02\" or \"2026-10-25 02:30:00+01\""
    );
    let never = restore("2026-03-29 02:30")?.expect_code(2)?;
    assert_eq!(
        said(&never),
        "error: \"2026-03-29 02:30\" does not exist in the local time zone, whose clocks went from +01 to +02 then: give an offset"
    );
    if fs::exists("/usr/share/zoneinfo/Europe/Berlin")? {
        let named = restore("2026-10-25 02:30 Europe/Berlin")?.expect_code(2)?;
        assert_eq!(
            said(&named),
            "error: \"2026-10-25 02:30 Europe/Berlin\" exists twice in Europe/Berlin: give the offset, \"2026-10-25 02:30:00+02\" or \"2026-10-25 02:30:00+01\""
        );
    }
    // With its offset it is a moment; what is missing now is the repository.
    restore("2026-10-25 02:30:00+01")?.expect_code(1)?;
    Ok(())
}

#[test]
fn a_target_before_the_backup_or_of_another_timeline_is_refused_in_so_many_words() -> Result<()> {
    requires!(Postgres);
    let world = World::new(0)?;
    let early = world.cluster.wal_position()?;
    let backup = world.backup()?;
    let [label, stop] = ["label", "stop"].map(|name| find_text(&backup, name).unwrap_or_default());
    world.mark("trunk")?;
    world.cluster.sql("SELECT pg_create_restore_point('fork')")?;
    world.cluster.archive_wal()?;
    world.cluster.stop("fast")?;
    let branch = world.scratch.join("branch");
    world.restore_to(&branch, &["--source", "blocks", "--adopt", "--target-name", "fork"])?.expect_code(0)?;
    let branch = Instance::running_in(&branch)?;
    branch.sql("SELECT pg_create_restore_point('on_the_branch')")?;
    branch.archive_wal()?;
    branch.stop("fast")?;

    let refused = |arguments: &[&str]| -> Result<Vec<String>> {
        let arguments = [&["--source", "blocks", "--plan"], arguments].concat();
        let finished = world.restore_to(&world.target(), &arguments)?.expect_code(3)?;
        let lines = finished.stderr.lines().filter(|line| line.starts_with("error: ") || line.starts_with("hint: "));
        Ok(lines.map(str::to_owned).collect())
    };
    assert_eq!(
        refused(&["--target-lsn", &early])?,
        [
            format!("error: LSN {early} lies before the end of backup {label} ({stop})"),
            "hint: choose a later target; no backup of the cluster ends earlier".to_owned()
        ]
    );
    let [what, hint] = &refused(&["--target-time", "2001-02-03 04:05:06+00"])?[..] else { bail!("two lines") };
    let start = format!("error: time 2001-02-03 04:05:06+00 lies before the end of backup {label} (");
    ensure!(what.starts_with(&start), "{what}");
    assert_eq!(hint, "hint: choose a later target; no backup of the cluster ends earlier");

    // The trunk went on after the fork, and never had what the branch has.
    let [what, hint] = &refused(&["--target-name", "on_the_branch", "--target-timeline", "1"])?[..] else {
        bail!("two lines")
    };
    let start = format!(
        "error: restore point \"on_the_branch\" is not in the WAL of timeline 1 after the backup's end ({stop}), up to "
    );
    ensure!(what.starts_with(&start), "{what}");
    assert_eq!(
        hint,
        "hint: check it, choose an earlier backup with --backup, or archive the rest of the WAL first; \
         the archive also has what --target-timeline 2 leads to"
    );
    assert_eq!(
        refused(&["--target-timeline", "7"])?,
        [
            "error: timeline 7 is not in the archive".to_owned(),
            format!("hint: backup {label} is on timeline 1; histories in the archive: 2")
        ]
    );

    // Of the branch there is only the history yet: PostgreSQL would replay the trunk to its end, and call it the branch.
    let history = fs::read_to_string(branch.data.join("pg_wal/00000002.history"))?;
    let left_at = history.split_whitespace().nth(1).context("no place")?;
    let mut segments = Vec::new();
    for entry in fs::read_dir(world.repository.path().join("clusters/main/wal/00000002"))? {
        segments.push(entry?.path());
    }
    segments.retain(|path| path.file_name().is_some_and(|name| name.len() == 24));
    segments.sort();
    for path in &segments {
        fs::remove_file(path)?;
    }
    let first = segments[0].file_name().unwrap_or_default().to_string_lossy();
    assert_eq!(
        refused(&[])?,
        [
            format!(
                "error: timeline 2 left timeline 1 at {left_at}, and its WAL segment {first} is not in the archive: \
                 PostgreSQL would follow timeline 1 instead"
            ),
            "hint: archive it with `pghydrant wal push`, or restore with --target-timeline 1, whose end is another"
                .to_owned()
        ]
    );
    world.restore_to(&world.target(), &["--source", "blocks", "--plan", "--target-timeline", "1"])?.expect_code(0)?;
    Ok(())
}
