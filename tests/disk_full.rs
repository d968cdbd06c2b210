//! A target that fills up: refused beforehand where that can be seen, survived where it cannot.

use std::fs;
use std::time::Duration;

use crate::support::compare::tree;
use crate::support::filesystem::SmallFileSystem;
use crate::support::process::wait_until;
use crate::support::tools::postgres_program;
use crate::support::*;

#[test]
fn a_target_without_room_is_refused_before_anything_is_touched() -> Result<()> {
    requires!(Postgres, LoopDevice);
    let world = World::new(4)?;
    world.backup()?;
    let disk = SmallFileSystem::mount(&world.scratch, "disk", "ext4", 64)?;
    let target = disk.path().join("restored");
    let refused = world.restore_to(&target, &["--no-start", "--source", "blocks"])?.expect_code(3)?;
    let refused = refused.expect_stderr(&["error: ", "hint: ", "free"])?;
    ensure!(tree(disk.path())?.is_empty(), "something was made\n{refused}");
    Ok(())
}

/// Neither space that is allocated ahead nor what was allocated in vain is in anybody's way.
#[test]
fn a_backup_that_fits_needs_no_room_to_spare() -> Result<()> {
    requires!(Postgres, LoopDevice);
    let scratch = Scratch::new()?;
    let pghydrant = Pghydrant::new(&scratch)?;
    let disk = SmallFileSystem::mount(&scratch, "disk", "ext4", 64)?;
    let repository = Repository::init_at(&disk.path().join("repo"), &pghydrant, &["--compression", "none"])?;
    let cluster = Cluster::build(&scratch, "original").archive_to(&pghydrant, &repository, "main").start()?;
    // Past the first step that is allocated, and less than there is.
    cluster.sql("CREATE TABLE filler AS SELECT repeat(md5(n::text), 30) AS text FROM generate_series(1, 8000) AS n")?;
    repository.backup(&cluster)?;
    pghydrant.succeed(["verify", "--repo", &repository.shown()])?;
    Ok(())
}

#[test]
fn a_disk_that_fills_during_the_copy_stops_it_and_a_retry_goes_on() -> Result<()> {
    requires!(Postgres, Fuse, LoopDevice);
    let world = World::new(8)?;
    world.backup()?;
    world.cluster.stop("fast")?;
    let mut filled = 0;
    // The moment is the kernel's choice: several are tried, and at least one must have stopped the copy.
    for (round, milliseconds) in [0, 5, 20, 60].into_iter().enumerate() {
        let disk = SmallFileSystem::mount(&world.scratch, &format!("disk-{round}"), "ext4", 500)?;
        let target = disk.path().join("restored");
        let to = target.display().to_string();
        let arguments = world.repository.arguments(&["restore"], &["--to", &to, "--no-start"]);
        let running = world.pghydrant.start(arguments)?;
        // Preflight has seen the room by the time the target appears; then it goes.
        wait_until("the target", Duration::from_secs(120), || Ok(target.exists()))?;
        std::thread::sleep(Duration::from_millis(milliseconds));
        let ballast = disk.path().join("ballast");
        // All at once, then the crumbs.
        let eat = "fallocate --length 1GiB \"$0\" 2>/dev/null; cat /dev/zero >>\"$0\" 2>/dev/null || true";
        let eat = Run::new("sh").args(["-c", eat]).arg(&ballast).succeed();
        let finished = running.wait()?;
        eat?;
        ensure!(!finished.stderr.contains("panicked"), "a panic\n{finished}");
        if finished.code != Some(0) {
            filled += 1;
            ensure!(matches!(finished.code, Some(1 | 6)), "{finished}");
            let finished = finished.expect_stderr(&["error: ", "no space left on device", "are free on"])?;
            ensure!(finished.stderr.matches("error: ").count() == 1, "one failure, one line\n{finished}");
            ensure!(!target.join("global/pg_control").exists(), "what is left could be started\n{finished}");
            fs::remove_file(&ballast)?;
            let id = open_session(&world.pghydrant).with_context(|| format!("{finished}"))?;
            world.pghydrant.run(["retry", &id])?.expect_code(0)?;
        }
        Run::new(postgres_program("pg_verifybackup")?).user(OsUser::server()).arg(&target).succeed()?;
        drop(disk);
        fs::remove_file(world.scratch.join(&format!("disk-{round}.image")))?;
    }
    ensure!(filled > 0, "no moment stopped a copy");
    Ok(())
}
