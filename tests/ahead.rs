//! Segments that are handed over ahead of time: laid into `pg_wal` for a replay, and archived together with the one that
//! PostgreSQL calls for.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::archive::{archived, fetch, object, outcome, push, recovering_with};
use crate::support::process::wait_until;
use crate::support::repository::Damage;
use crate::support::*;

/// Lays a segment into `data`'s `pg_wal` as a restore does, with its mark.
fn lay(world: &World, data: &Path, name: &str) -> Result<PathBuf> {
    let (finished, fetched) = fetch(world, name)?;
    finished.expect_code(0)?;
    let laid = data.join("pg_wal").join(name);
    fs::rename(fetched, &laid)?;
    let staging = data.join("pg_wal/pghydrant.staging");
    fs::create_dir_all(&staging)?;
    let metadata = fs::metadata(&laid)?;
    let (dev, ino, bytes) = (metadata.dev(), metadata.ino(), metadata.len());
    let identity = format!("{dev}:{ino}:{bytes}:{}.{:09}", metadata.mtime(), metadata.mtime_nsec());
    std::os::unix::fs::symlink(identity, staging.join(format!("{name}.laid")))?;
    Run::new("chown").args(["-hR", &OsUser::server().name]).arg(&laid).arg(&staging).succeed()?;
    Ok(laid)
}

/// With PostgreSQL as the judge: it reads what was laid, and whatever else lies there, or is missing from the archive,
/// is never the end of the WAL for it.
#[test]
fn a_replay_reads_what_was_laid_and_takes_no_fault_for_the_end() -> Result<()> {
    requires!(Postgres);
    let world = World::new(0)?;
    world.mark("before")?;
    world.backup()?;
    for name in ["a", "b", "c"] {
        world.mark(name)?;
        world.cluster.archive_wal()?;
    }
    let segments = world.repository.segments()?;
    let middle = &segments[segments.len() - 2];
    let target = world.target();
    world.repository.restore(&target, &["--no-start", "--source", "blocks"])?.expect_code(0)?;
    let pristine = world.scratch.join("pristine");
    Run::new("cp").arg("-a").arg(&target).arg(&pristine).succeed()?;
    let mark_of = |data: &Path| data.join(format!("pg_wal/pghydrant.staging/{middle}.laid"));

    for case in ["whole", "torn", "replaced", "gone"] {
        let prepare = |data: &Path| -> Result<()> {
            for name in &segments {
                lay(&world, data, name)?;
            }
            let laid = data.join("pg_wal").join(middle);
            let owned = |path: &Path| Run::new("chown").arg(&OsUser::server().name).arg(path).succeed().map(drop);
            match case {
                "torn" => {
                    let mut torn = fs::read(&laid)?;
                    torn[8192..].fill(0);
                    fs::write(&laid, torn)?;
                }
                "replaced" => {
                    // As PostgreSQL recycles: an old segment under a new name.
                    let old = data.join("pg_wal").join(&segments[0]);
                    fs::copy(&old, laid.with_extension("new"))?;
                    fs::rename(laid.with_extension("new"), &laid)?;
                    owned(&laid)?;
                }
                "gone" => fs::remove_file(&laid)?,
                _ => {}
            }
            Ok(())
        };
        let server = recovering_with(&world, &pristine, prepare)?;
        wait_until("the end of recovery", Duration::from_secs(180), || {
            Ok(fs::read_to_string(server.log_file())?.contains("ready to accept connections"))
        })?;
        assert_eq!(marks(&server)?, "a,b,before,c", "{case}");
        let log = fs::read_to_string(server.log_file())?;
        let brought = log.contains(&format!("restored log file \"{middle}\""));
        ensure!(brought == (case != "whole"), "{case}: brought is {brought}\n{log}");
        ensure!(mark_of(&server.data).symlink_metadata().is_err(), "{case}: the mark is still there");
    }

    // Something under the segment's name without a mark, and a fault in the archive.
    for damage in [Damage::Deleted, Damage::BitFlipped] {
        let mut mend = None;
        let server = recovering_with(&world, &pristine, |data| {
            for name in &segments {
                lay(&world, data, name)?;
            }
            fs::remove_file(mark_of(data))?;
            mend = Some(damage.inflict(&object(&world, middle))?);
            Ok(())
        })?;
        let log = outcome(&server)?;
        ensure!(!log.contains("archive recovery complete"), "{damage:?}: it opened early\n{log}");
    }
    Ok(())
}

/// A `pg_wal` whose segments wait to be archived, finished long enough ago; the archive has none of them.
fn behind(world: &World, segments: &[String]) -> Result<Vec<PathBuf>> {
    let status = world.scratch.directory("behind")?.join("pg_wal/archive_status");
    fs::create_dir_all(&status)?;
    let mut paths = Vec::new();
    for name in segments {
        let (finished, fetched) = fetch(world, name)?;
        finished.expect_code(0)?;
        let path = status.with_file_name(name);
        fs::rename(fetched, &path)?;
        fs::write(status.join(format!("{name}.ready")), "")?;
        paths.push(path);
    }
    for name in segments {
        fs::remove_file(object(world, name))?;
    }
    wait_until("the times of the segments to be past", Duration::from_secs(60), || {
        let newest = fs::metadata(&paths[paths.len() - 1])?.ctime();
        Ok(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs() as i64 > newest + 2)
    })?;
    Ok(paths)
}

#[test]
fn an_archiver_that_is_killed_with_several_segments_leaves_no_gap() -> Result<()> {
    requires!(Postgres);
    let (world, mut segments) = archived()?;
    segments.retain(|name| object(&world, name).exists());
    let paths = behind(&world, &segments)?;
    let there = || segments.iter().map(|name| object(&world, name).exists()).collect::<Vec<_>>();
    let first = world.repository.arguments(&["wal", "push"], &[&paths[0].display().to_string()]);
    for wait in [1, 5, 10, 20, 40, 80, 160] {
        let running = world.pghydrant.start(&first)?;
        std::thread::sleep(Duration::from_millis(wait));
        let killed = running.kill()?;
        ensure!(there().is_sorted_by(|a, b| a >= b), "a gap after {wait} ms ({killed}): {:?}", there());
        for name in &segments {
            let _ = fs::remove_file(object(&world, name));
        }
    }
    // One call archives them all; the others are told so, and what was changed since is not taken for the same.
    push(&world, &paths[0])?.expect_code(0)?;
    ensure!(there().iter().all(|there| *there), "{:?}", there());
    for path in &paths[1..] {
        push(&world, path)?.expect_code(0)?;
    }
    let (last, name) = (&paths[paths.len() - 1], &segments[segments.len() - 1]);
    let mut other = fs::read(last)?;
    other[1 << 20] ^= 1;
    fs::write(last, other)?;
    push(&world, last)?.expect_code(1)?.expect_stderr(&["error: ", name])?;
    let status = paths[0].with_file_name("archive_status");
    assert_eq!(fs::read_dir(status)?.count(), segments.len(), "the status files are PostgreSQL's alone");
    Ok(())
}
