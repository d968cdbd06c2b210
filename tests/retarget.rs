//! A restore that waits at its target moves on: the same copy, a later target.

use std::fs;
use std::path::PathBuf;

use crate::support::filesystem::fuse_mounts_below;
use crate::support::*;

/// Marks a, b, c, d after a backup, with a restore point behind each; all of it archived.
struct Story {
    world: World,
    target: PathBuf,
    lsn_after_a: String,
    time_after_a: String,
    xid_of_b: String,
    lsn_after_c: String,
}

impl Story {
    fn tell() -> Result<Self> {
        let world = World::new(1)?;
        world.mark("before")?;
        world.backup()?;
        let told = |mark: &str| -> Result<(String, String, String)> {
            let xid = world.mark(mark)?;
            let lsn = world.cluster.sql("SELECT pg_current_wal_insert_lsn()")?;
            std::thread::sleep(std::time::Duration::from_millis(50));
            let time = world.cluster.sql("SELECT clock_timestamp()")?;
            std::thread::sleep(std::time::Duration::from_millis(50));
            world.cluster.sql(&format!("SELECT pg_create_restore_point('after_{mark}')"))?;
            Ok((xid, lsn, time))
        };
        let ((_, lsn_after_a, time_after_a), (xid_of_b, ..), (_, lsn_after_c, _)) =
            (told("a")?, told("b")?, told("c")?);
        told("d")?;
        world.cluster.archive_wal()?;
        let target = world.target();
        Ok(Self { world, target, lsn_after_a, time_after_a, xid_of_b, lsn_after_c })
    }

    /// Restores to a restore point and waits there; the session.
    fn wait_at(&self, name: &str, action: &str) -> Result<String> {
        let arguments = ["--target-name", name, "--action", action, "--json"];
        session_of(&self.world.restore_to(&self.target, &arguments)?.expect_code(0)?)
    }

    fn retarget(&self, id: &str, arguments: &[&str]) -> Result<Finished> {
        self.world.pghydrant.run([&["retarget", id], arguments].concat())
    }

    fn is_paused_with(&self, expected: &str) -> Result<()> {
        let paused = std::mem::ManuallyDrop::new(Instance::running_in(&self.target)?);
        let state = paused.sql("SELECT pg_is_in_recovery(), pg_get_wal_replay_pause_state()")?;
        ensure!(state == "t|paused", "{state} instead of a pause");
        ensure!(marks(&paused)? == expected, "{} instead of {expected}", marks(&paused)?);
        ensure!(fuse_mounts_below(self.world.scratch.path()).is_empty(), "a mount is left");
        Ok(())
    }
}

#[test]
fn a_paused_restore_moves_on_from_target_to_target() -> Result<()> {
    requires!(Postgres, Fuse);
    let story = Story::tell()?;
    let id = story.wait_at("after_a", "pause")?;
    story.is_paused_with("a,before")?;
    // The same copy: what somebody put into it stays.
    fs::write(story.target.join("visitor"), "still here")?;
    let moved = story.retarget(&id, &["--target-name", "after_b"])?.expect_code(0)?;
    ensure!(moved.stdout.contains("paused at its target") && moved.stdout.contains("pghydrant retarget"), "{moved}");
    story.is_paused_with("a,b,before")?;
    story.retarget(&id, &["--target-lsn", &story.lsn_after_c])?.expect_code(0)?;
    story.is_paused_with("a,b,before,c")?;
    // The end of the WAL is where it is by then.
    story.world.mark("e")?;
    story.world.cluster.archive_wal()?;
    story.retarget(&id, &[])?.expect_code(0)?;
    story.is_paused_with("a,b,before,c,d,e")?;
    story.world.mark("f")?;
    story.world.cluster.archive_wal()?;
    story.retarget(&id, &["--action", "promote"])?.expect_code(0)?;
    let promoted = Instance::running_in(&story.target)?;
    assert_eq!(promoted.sql("SELECT pg_is_in_recovery()")?, "f");
    assert_eq!(marks(&promoted)?, "a,b,before,c,d,e,f");
    assert_eq!(promoted.sql("SHOW restore_command")?, "");
    assert_eq!(fs::read_to_string(story.target.join("visitor"))?, "still here");
    for left in ["recovery.signal", "standby.signal", "pghydrant.session"] {
        ensure!(!story.target.join(left).exists(), "{left} is left");
    }
    ensure!(open_sessions(&story.world.pghydrant)?.is_empty(), "a session is open");
    story.world.pghydrant.fail(["retarget", &id], 2, &["is finished", "hint: "])?;
    promoted.check_relations()
}

#[test]
fn a_restore_that_shut_down_moves_on() -> Result<()> {
    requires!(Postgres, Fuse);
    let story = Story::tell()?;
    let id = story.wait_at("after_a", "shutdown")?;
    story.retarget(&id, &["--target-xid", &story.xid_of_b])?.expect_code(0)?;
    ensure!(!story.target.join("postmaster.pid").exists(), "it runs");
    let behind = ["recovery only goes forward", "hint: a new restore reaches it: pghydrant restore --repo "];
    story.retarget(&id, &["--target-time", &story.time_after_a])?.expect_code(3)?.expect_stderr(&behind)?;
    story.retarget(&id, &["--target-name", "after_a"])?.expect_code(3)?.expect_stderr(&behind)?;
    story.retarget(&id, &["--target-name", "after_c", "--action", "pause"])?.expect_code(0)?;
    story.is_paused_with("a,b,before,c")?;
    story.world.pghydrant.succeed(["cancel", &id])?;
    ensure!(!story.target.exists(), "something is left");
    Ok(())
}

#[test]
fn what_cannot_be_reached_from_here_is_refused_before_anything_is_touched() -> Result<()> {
    requires!(Postgres, Fuse);
    let story = Story::tell()?;
    let id = story.wait_at("after_b", "pause")?;
    let seen = || -> Result<_> {
        let files = ["postgresql.conf", "postmaster.pid", "postgresql.auto.conf"];
        files.iter().map(|name| Ok(fs::read(story.target.join(name))?)).collect::<Result<Vec<_>>>()
    };
    let before = seen()?;
    let behind = ["recovery only goes forward", "hint: a new restore reaches it: pghydrant restore --repo "];
    for goal in [
        &["--target-immediate"][..],
        &["--target-name", "after_a"],
        &["--target-lsn", &story.lsn_after_a],
        &["--target-time", &story.time_after_a],
        &["--target-xid", &story.xid_of_b],
    ] {
        story.retarget(&id, goal)?.expect_code(3)?.expect_stderr(&behind).with_context(|| format!("{goal:?}"))?;
    }
    for (goal, refusal) in [
        (["--target-name", "nowhere"], "is not in the WAL"),
        (["--target-lsn", "7F/0"], "lies after the end of the archived WAL"),
        (["--target-xid", "900000"], "is not in the WAL"),
        (["--target-time", "2100-01-01 00:00:00+00"], "in the future"),
    ] {
        story.retarget(&id, &goal)?.expect_code(3)?.expect_stderr(&[refusal, "hint: "])?;
    }
    story.retarget(&id, &["--target-name", "after_c", "--target-exclusive"])?.expect_code(2)?;
    ensure!(seen()? == before, "something was touched");
    story.is_paused_with("a,b,before")?;
    // Who promotes it by hand has a database, and nothing to move on.
    let paused = Instance::running_in(&story.target)?;
    paused.sql("SELECT pg_promote()")?;
    story.world.pghydrant.fail(["retarget", &id], 2, &["has left recovery", "hint: "])?;
    story.world.pghydrant.succeed(["promote", &id])?;
    assert_eq!(marks(&Instance::running_in(&story.target)?)?, "a,b,before");
    Ok(())
}

#[test]
fn wal_that_the_copy_has_behind_it_is_not_asked_for_again() -> Result<()> {
    requires!(Postgres, Fuse);
    let world = World::new(0)?;
    world.mark("before")?;
    world.backup()?;
    world.mark("a")?;
    world.cluster.archive_wal()?;
    // Where it stops, the copy makes this checkpoint its own.
    world.cluster.sql("CHECKPOINT")?;
    world.mark("b")?;
    world.cluster.sql("SELECT pg_create_restore_point('after_b')")?;
    world.mark("c")?;
    world.cluster.archive_wal()?;
    let story = Story {
        target: world.target(),
        world,
        lsn_after_a: String::new(),
        time_after_a: String::new(),
        xid_of_b: String::new(),
        lsn_after_c: String::new(),
    };
    let id = story.wait_at("after_b", "shutdown")?;
    let repository = &story.world.repository;
    let segments = repository.segments()?;
    ensure!(segments.len() >= 3, "{segments:?}");
    for name in &segments[..segments.len() - 1] {
        fs::remove_file(repository.wal().join(name))?;
    }
    story.retarget(&id, &["--action", "pause"])?.expect_code(0)?;
    story.is_paused_with("a,b,before,c")?;
    story.world.pghydrant.succeed(["cancel", &id])?;
    Ok(())
}

#[test]
fn a_crash_on_the_way_to_the_next_target_is_put_right_by_a_retry() -> Result<()> {
    requires!(Postgres, Fuse);
    let story = Story::tell()?;
    let pghydrant = &story.world.pghydrant;
    let mut retried = 0;
    for (step, action) in [("validate", "pause"), ("start", "shutdown"), ("start", "promote"), ("recover", "pause")] {
        let id = story.wait_at("after_a", "pause")?;
        let mut running = pghydrant.start(["retarget", &id, "--target-name", "after_b", "--action", action])?;
        running.wait_for_output(step, |seen| seen.lines().any(|line| line.starts_with(&format!("  {step} "))))?;
        let killed = running.kill()?;
        let what = || format!("killed after {step}, {action}\n{killed}");
        let listed = pghydrant.succeed(["sessions", "--json"])?;
        if listed.stdout.contains("\"stopped\"") {
            retried += 1;
            // Nothing, where the kill came before the journal knew of the new target.
            pghydrant.run(["retry", &id])?.expect_code(0).with_context(what)?;
        }
        match action {
            "shutdown" => {
                ensure!(!story.target.join("postmaster.pid").exists(), "{}", what());
                pghydrant.run(["promote", &id])?.expect_code(0).with_context(what)?;
            }
            "pause" if !listed.stdout.contains("after_b") => story.is_paused_with("a,before").with_context(what)?,
            "pause" => story.is_paused_with("a,b,before").with_context(what)?,
            _ => {}
        }
        let instance = Instance::running_in(&story.target).with_context(what)?;
        if action != "pause" {
            ensure!(marks(&instance)? == "a,b,before", "{}", what());
            ensure!(instance.sql("SELECT pg_is_in_recovery()")? == "f", "{}", what());
            drop(instance);
            fs::remove_dir_all(&story.target)?;
        } else {
            pghydrant.run(["cancel", &id])?.expect_code(0).with_context(what)?;
        }
        ensure!(fuse_mounts_below(story.world.scratch.path()).is_empty(), "{}: a mount is left", what());
    }
    ensure!(retried > 0, "no kill fell between two targets");
    Ok(())
}
