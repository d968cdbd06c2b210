//! Crashes: `kill -9` at any moment, then `retry`, then every file compared.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::support::compare::{Entry, same_trees, tree};
use crate::support::filesystem::fuse_mounts_below;
use crate::support::*;

/// `make soak` asks for many more.
const KILLS: u64 = 20;

/// A small generator of our own, so that a failing run can be repeated from the seed that it prints.
pub struct Random(u64);

impl Random {
    pub fn new() -> Self {
        let now = || {
            SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(1, |time| u64::from(time.subsec_nanos()))
        };
        let seed = std::env::var("PGHYDRANT_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(now);
        eprintln!("PGHYDRANT_SEED={seed}");
        Self(seed)
    }

    /// splitmix64.
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub fn up_to(&mut self, limit: Duration) -> Duration {
        limit.mul_f64(f64::from(u32::try_from(self.next() >> 32).unwrap_or(0)) / f64::from(u32::MAX))
    }
}

fn kills() -> u64 {
    std::env::var("PGHYDRANT_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(KILLS)
}

fn tells_of_the_copy(path: &Path) -> bool {
    path.to_string_lossy().contains("pghydrant")
}

/// Nothing that is half done can be started: without a control file PostgreSQL refuses.
fn cannot_start_or_is_whole(target: &Path, expected: &BTreeMap<PathBuf, Entry>) -> Result<()> {
    if target.join("global/pg_control").exists() {
        same_trees(expected, &tree(target)?, tells_of_the_copy).context("pg_control is there before the rest is")?;
    }
    Ok(())
}

#[test]
fn copies_killed_at_random_moments_are_finished_by_retry() -> Result<()> {
    requires!(Postgres, Fuse);
    let world = World::new(8)?;
    world.backup()?;
    world.cluster.stop("fast")?;
    let target = world.target();
    let clean = world.restore_to(&target, &["--no-start"])?.expect_code(0)?;
    let expected = tree(&target)?;
    std::fs::remove_dir_all(&target)?;

    let mut random = Random::new();
    for round in 0..kills() {
        let source = if round % 4 == 3 { "blocks" } else { "mount" };
        let to = target.display().to_string();
        let arguments = ["--to", &to, "--no-start", "--source", source];
        let running = world.pghydrant.start(world.repository.arguments(&["restore"], &arguments))?;
        let moment = random.up_to(clean.took);
        std::thread::sleep(moment);
        let killed = running.kill()?;
        let what = format!("round {round}, {source}, killed after {moment:?} of {:?}", clean.took);
        cannot_start_or_is_whole(&target, &expected).with_context(|| what.clone())?;
        finish(&world, &target, &what)?;
        same_trees(&expected, &tree(&target)?, tells_of_the_copy).with_context(|| format!("{what}\n{killed}"))?;
        ensure!(fuse_mounts_below(world.scratch.path()).is_empty(), "{what}: a mount is left");
        ensure!(open_sessions(&world.pghydrant)?.is_empty(), "{what}: a session is left open");
        std::fs::remove_dir_all(&target)?;
    }
    Ok(())
}

/// `retry` of what the crash left; where it left no session the same restore begins again.
fn finish(world: &World, target: &Path, what: &str) -> Result<()> {
    match open_sessions(&world.pghydrant)?.as_slice() {
        [] if target.join("global/pg_control").exists() => Ok(()),
        [] => world.restore_to(target, &["--no-start"])?.expect_code(0).map(drop),
        [id] => world.pghydrant.run(["retry", id])?.expect_code(0).map(drop),
        several => bail!("{several:?} are open"),
    }
    .with_context(|| what.to_owned())
}

/// Files are written under another name first; a crash leaves that.
#[test]
fn what_a_crash_left_of_a_file_that_was_being_written_goes() -> Result<()> {
    requires!(Postgres, Fuse);
    let world = World::new(8)?;
    world.backup()?;
    let target = world.target();
    let running = world.start_copy()?;
    process::wait_until("the outline", Duration::from_secs(120), || Ok(target.join("pg_wal").exists()))?;
    let killed = running.kill()?;
    ensure!(!target.join("global/pg_control").exists(), "the kill came too late\n{killed}");
    let left = [".postgresql.conf.4711.3.part", ".recovery.signal.4711.4.part", "pg_wal/.pghydrant.copy.4711.5.part"];
    for name in left {
        std::fs::write(target.join(name), "half")?;
    }
    world.pghydrant.succeed(["retry", &open_session(&world.pghydrant)?])?;
    for name in left {
        ensure!(!target.join(name).exists(), "{name} is left");
    }
    Ok(())
}

/// The same with a server in the end: the crash may fall into the copy, the configuration, or the recovery itself.
#[test]
fn restores_killed_at_random_moments_end_with_the_right_rows_and_the_right_configuration() -> Result<()> {
    requires!(Postgres, Fuse);
    let world = World::new(2)?;
    world.backup()?;
    world.mark("wanted")?;
    world.cluster.sql("SELECT pg_create_restore_point('here')")?;
    world.mark("unwanted")?;
    world.cluster.archive_wal()?;
    let target = world.target();
    let began = std::time::Instant::now();
    drop(world.restore(&["--target-name", "here"])?);
    let whole = began.elapsed();
    let configuration = without_port(&target)?;
    std::fs::remove_dir_all(&target)?;

    let mut random = Random::new();
    for round in 0..kills().div_ceil(4) {
        let (to, port) = (target.display().to_string(), cluster::free_port()?.to_string());
        let arguments = ["--to", &to, "--port", &port, "--target-name", "here"];
        let running = world.pghydrant.start(world.repository.arguments(&["restore"], &arguments))?;
        let moment = random.up_to(whole);
        std::thread::sleep(moment);
        let killed = running.kill()?;
        let what = format!("round {round}, killed after {moment:?} of {whole:?}");
        match open_sessions(&world.pghydrant)?.as_slice() {
            // Without a session a server in the target is one that was finished, if only just before the kill.
            [] if killed.code == Some(0) || target.join("postmaster.pid").exists() => {}
            [] => {
                let again = world.pghydrant.run(world.repository.arguments(&["restore"], &arguments))?;
                again.expect_code(0).with_context(|| what.clone())?;
            }
            [id] => {
                world.pghydrant.run(["retry", id])?.expect_code(0).with_context(|| format!("{what}\n{killed}"))?;
            }
            several => bail!("{what}: {several:?} are open"),
        }
        let restored = Instance::running_in(&target).with_context(|| what.clone())?;
        ensure!(restored.sql("SELECT pg_is_in_recovery()")? == "f", "{what}: still in recovery");
        ensure!(marks(&restored)? == "wanted", "{what}: {}", marks(&restored)?);
        let found = without_port(&target)?;
        ensure!(
            found == configuration,
            "{what}: postgresql.conf differs:
{found}
instead of
{configuration}"
        );
        ensure!(fuse_mounts_below(world.scratch.path()).is_empty(), "{what}: a mount is left");
        drop(restored);
        std::fs::remove_dir_all(&target)?;
    }
    Ok(())
}

fn without_port(data: &Path) -> Result<String> {
    let text = compare::without_session_ids(&std::fs::read(data.join("postgresql.conf"))?);
    let text = String::from_utf8_lossy(&text).into_owned();
    Ok(text.lines().filter(|line| !line.trim_start().starts_with("port")).collect::<Vec<_>>().join("\n"))
}

#[test]
fn a_cancelled_restore_leaves_no_trace() -> Result<()> {
    requires!(Postgres, Fuse);
    let world = World::new(4)?;
    world.backup()?;
    let target = world.target();
    let mut cancelled = 0;
    for moment in [None, Some(100), Some(250), Some(400), Some(700)] {
        let running = world.start_copy()?;
        if let Some(milliseconds) = moment {
            std::thread::sleep(Duration::from_millis(milliseconds));
        } else {
            process::wait_until("the outline", Duration::from_secs(120), || Ok(target.join("pg_wal").exists()))?;
        }
        running.kill()?;
        for id in open_sessions(&world.pghydrant)? {
            world.pghydrant.run(["cancel", &id])?.expect_code(0)?;
            cancelled += 1;
            ensure!(!target.exists(), "{} is left after {moment:?} ms", target.display());
        }
        ensure!(open_sessions(&world.pghydrant)?.is_empty(), "a session is left");
        ensure!(fuse_mounts_below(world.scratch.path()).is_empty(), "a mount is left");
        if target.exists() {
            std::fs::remove_dir_all(&target)?;
        }
    }
    ensure!(cancelled > 0, "no moment fell into a copy");
    Ok(())
}

#[test]
fn an_interrupted_restore_ends_with_130_and_can_be_retried() -> Result<()> {
    requires!(Postgres, Fuse);
    let world = World::new(8)?;
    world.backup()?;
    let target = world.target();
    let running = world.start_copy()?;
    process::wait_until("the copy", Duration::from_secs(120), || Ok(target.join("base").exists()))?;
    running.signal(rustix::process::Signal::INT)?;
    let finished = running.wait()?;
    // It may have been faster than the signal.
    if finished.code != Some(0) {
        let finished = finished.expect_code(130)?.expect_stderr(&["interrupted while "])?;
        ensure!(!target.join("global/pg_control").exists(), "{finished}");
        let id = open_session(&world.pghydrant).with_context(|| format!("{finished}"))?;
        world.pghydrant.run(["retry", &id])?.expect_code(0)?;
    }
    Run::new(tools::postgres_program("pg_verifybackup")?).user(OsUser::server()).arg(&target).succeed()?;
    ensure!(fuse_mounts_below(world.scratch.path()).is_empty(), "a mount is left");
    Ok(())
}
