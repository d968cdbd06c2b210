//! `wal push` and `wal fetch`: PostgreSQL trusts their exit codes with the data.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::support::process::wait_until;
use crate::support::repository::Damage;
use crate::support::*;

/// What `wal fetch` ends with where it cannot tell.
const FAULT: i32 = 254;
/// What `wal fetch` ends with where there is proven to be none.
const ABSENT: i32 = 1;

/// A world whose archive has a few segments of timeline 1, and the name of its last one.
fn archived() -> Result<(World, Vec<String>)> {
    let world = World::new(0)?;
    for name in ["a", "b", "c"] {
        world.mark(name)?;
        world.cluster.archive_wal()?;
    }
    let segments = world.repository.segments()?;
    ensure!(segments.len() >= 3, "{segments:?}");
    Ok((world, segments))
}

fn fetch(world: &World, name: &str) -> Result<(Finished, PathBuf)> {
    let to = world.scratch.join("fetched");
    let _ = fs::remove_file(&to);
    let finished =
        world.pghydrant.run(world.repository.arguments(&["wal", "fetch"], &[name, &to.display().to_string()]))?;
    Ok((finished, to))
}

fn push(world: &World, path: &Path) -> Result<Finished> {
    world.pghydrant.run(world.repository.arguments(&["wal", "push"], &[&path.display().to_string()]))
}

fn object(world: &World, name: &str) -> PathBuf {
    world.repository.wal().join(name)
}

#[test]
fn what_was_pushed_is_fetched_byte_for_byte() -> Result<()> {
    requires!(Postgres);
    let (world, segments) = archived()?;
    let (finished, fetched) = fetch(&world, &segments[1])?;
    finished.expect_code(0)?;
    let bytes = fs::read(&fetched)?;
    assert_eq!(bytes.len(), 16 << 20);
    // Pushing the same again is fine; something else under the same name is refused and changes nothing.
    let again = world.scratch.join(&segments[1]);
    fs::rename(&fetched, &again)?;
    push(&world, &again)?.expect_code(0)?;
    let mut other = bytes.clone();
    other[1 << 20] ^= 1;
    fs::write(&again, &other)?;
    push(&world, &again)?.expect_code(1)?.expect_stderr(&["error: ", &segments[1]])?;
    let (finished, fetched) = fetch(&world, &segments[1])?;
    finished.expect_code(0)?;
    assert!(fs::read(fetched)? == bytes, "a refused push changed the archive");
    Ok(())
}

#[test]
fn only_a_proven_absence_is_the_end_of_the_wal() -> Result<()> {
    requires!(Postgres);
    let (world, segments) = archived()?;
    let code = |name: &str| -> Result<Option<i32>> {
        let (finished, to) = fetch(&world, name)?;
        ensure!(finished.code == Some(0) || !to.exists(), "a failed fetch left a file\n{finished}");
        Ok(finished.code)
    };
    let (second, last) = (&segments[1], &segments[segments.len() - 1]);
    // Behind the last one; a timeline that is not there; histories and backups that are not there.
    for absent in ["0000000100000000000000FF", "000000020000000000000001", "00000002.history", "00000009.history"] {
        assert_eq!(code(absent)?, Some(ABSENT), "{absent}");
    }
    // Later ones are there, so this one is a gap and not the end.
    let mend = Damage::Deleted.inflict(&object(&world, second))?;
    assert_eq!(code(second)?, Some(FAULT), "a gap");
    drop(mend);
    for damage in [Damage::Truncated, Damage::BitFlipped] {
        let _mend = damage.inflict(&object(&world, last))?;
        assert_eq!(code(last)?, Some(FAULT), "{damage:?}");
    }
    // Names that PostgreSQL never asks for, and mistakes in the command itself.
    for nonsense in ["", "../../pghydrant.json", "00000001", "00000001000000000000000g"] {
        assert_eq!(code(nonsense)?, Some(FAULT), "{nonsense:?}");
    }
    let bare = |arguments: &[&str]| Ok::<_, anyhow::Error>(world.pghydrant.run(arguments)?.code);
    assert_eq!(bare(&["wal", "fetch"])?, Some(FAULT));
    assert_eq!(bare(&["wal", "fetch", "--no-such-option", last, "/nonexistent/x"])?, Some(FAULT));
    assert_eq!(bare(&["wal", "fetch", "--repo", "/nonexistent", "--cluster", "main", last, "x"])?, Some(FAULT));
    let arguments = world.repository.arguments(&["wal", "fetch"], &[last, "/nonexistent/directory/x"]);
    assert_eq!(world.pghydrant.run(arguments)?.code, Some(FAULT), "a target that cannot be written");
    let unknown = ["wal", "fetch", "--repo", &world.repository.shown(), "--cluster", "other", last, "x"];
    assert_eq!(bare(&unknown)?, Some(FAULT), "an unknown cluster");
    // A settings file that cannot be read must not look like the end either.
    let misspelt = world.scratch.join("misspelt.toml");
    fs::write(&misspelt, "rep = \"x\"")?;
    assert_eq!(bare(&["--config", &misspelt.display().to_string(), "wal", "fetch", last, "x"])?, Some(FAULT));
    // Nothing of it counts where everything is named, as in the `restore_command` of a restore.
    let to = world.scratch.directory("unsettled")?.join(last).display().to_string();
    let named = world.repository.arguments(&["wal", "fetch"], &[last, &to]);
    for unreadable in [misspelt.as_path(), Path::new("/nonexistent.toml")] {
        world.pghydrant.env("PGHYDRANT_CONFIG", unreadable.display().to_string()).succeed(&named)?;
    }
    Ok(())
}

/// PostgreSQL stops a standby at any status above 125, and a gap may be closed by the archiver a moment later.
#[test]
fn a_standby_asks_again_for_what_the_archiver_has_not_sent_yet() -> Result<()> {
    requires!(Postgres);
    let (world, segments) = archived()?;
    let pg_wal = world.scratch.directory("standby")?.join("pg_wal");
    Run::new("mkdir").user(OsUser::server()).arg(&pg_wal).succeed()?;
    let to = pg_wal.join("RECOVERYXLOG").display().to_string();
    let code = |name: &str| -> Result<Option<i32>> {
        Ok(world.pghydrant.run(world.repository.arguments(&["wal", "fetch"], &[name, &to]))?.code)
    };
    let mend = Damage::Deleted.inflict(&object(&world, &segments[1]))?;
    assert_eq!(code(&segments[1])?, Some(FAULT), "a gap");
    fs::write(pg_wal.with_file_name("standby.signal"), "")?;
    assert_eq!(code(&segments[1])?, Some(ABSENT), "a gap that a standby may wait for");
    // A restore of ours that waits at the end of the WAL must not take a gap for it.
    let staging = pg_wal.join("pghydrant.staging");
    fs::create_dir(&staging)?;
    assert_eq!(code(&segments[1])?, Some(FAULT), "a gap in a restore");
    fs::remove_dir(&staging)?;
    drop(mend);
    let damaged = Damage::BitFlipped.inflict(&object(&world, &segments[1]))?;
    assert_eq!(code(&segments[1])?, Some(FAULT), "damage");
    drop(damaged);
    let away = world.scratch.join("away");
    fs::rename(world.repository.path(), &away)?;
    assert_eq!(code(&segments[1])?, Some(FAULT), "a repository that is not there");
    fs::rename(&away, world.repository.path())?;
    assert_eq!(code(&segments[1])?, Some(0));
    Ok(())
}

#[test]
fn an_archive_that_cannot_be_read_is_a_fault_for_an_ordinary_user() -> Result<()> {
    requires!(Postgres, Root);
    let (world, segments) = archived()?;
    let unreadable = |path: &Path| -> Result<()> {
        let before = fs::metadata(path)?.permissions();
        fs::set_permissions(path, fs::Permissions::from_mode(0o000))?;
        let beyond = fetch(&world, "0000000100000000000000FF");
        let known = fetch(&world, &segments[0]);
        fs::set_permissions(path, before)?;
        for (finished, _) in [known?, beyond?] {
            ensure!(finished.code == Some(FAULT), "{} unreadable\n{finished}", path.display());
        }
        Ok(())
    };
    unreadable(world.repository.path())?;
    unreadable(&world.repository.path().join("pghydrant.json"))?;
    unreadable(&world.repository.path().join("clusters/main"))?;
    unreadable(&world.repository.path().join("clusters/main/wal"))?;
    unreadable(&world.repository.wal())
}

/// The promise itself, with PostgreSQL as the judge: whatever happens to a segment in the middle of the archive, a
/// server that recovers from it stops, and opens with everything once the archive is whole again.
#[test]
fn postgresql_never_opens_early() -> Result<()> {
    requires!(Postgres);
    let world = World::new(0)?;
    world.mark("before")?;
    world.backup()?;
    for name in ["a", "b", "c"] {
        world.mark(name)?;
        world.cluster.archive_wal()?;
    }
    let segments = world.repository.segments()?;
    let middle = object(&world, &segments[segments.len() - 2]);
    let target = world.target();
    world.repository.restore(&target, &["--no-start", "--source", "blocks"])?.expect_code(0)?;
    let pristine = world.scratch.join("pristine");
    Run::new("cp").arg("-a").arg(&target).arg(&pristine).succeed()?;

    for damage in Damage::ALL {
        let mend = damage.inflict(&middle)?;
        let server = recovering(&world, &pristine)?;
        let log = outcome(&server)?;
        ensure!(!log.contains("archive recovery complete"), "{damage:?}: it opened early\n{log}");
        drop(mend);
        drop(server);
    }
    let server = recovering(&world, &pristine)?;
    wait_until("the end of recovery", Duration::from_secs(180), || {
        Ok(fs::read_to_string(server.log_file())?.contains("ready to accept connections"))
    })?;
    assert_eq!(marks(&server)?, "a,b,before,c");
    Ok(())
}

/// A server on a copy of `pristine` whose `restore_command` is ours, without any of the WAL at hand.
fn recovering(world: &World, pristine: &Path) -> Result<Instance> {
    let data = world.target();
    let _ = fs::remove_dir_all(&data);
    let _ = fs::remove_file(data.with_extension("log"));
    Run::new("cp").arg("-a").arg(pristine).arg(&data).succeed()?;
    Run::new("sh")
        .args(["-c", "rm -f \"$0\"/pg_wal/0* && touch \"$0\"/recovery.signal && chown \"$1\" \"$0\"/recovery.signal"])
        .arg(&data)
        .arg(&OsUser::server().name)
        .succeed()?;
    let instance = Instance { data, port: cluster::free_port()?, sockets: world.cluster.sockets.clone() };
    let command = format!(
        "{} wal fetch --repo {} --cluster main %f %p",
        world.pghydrant.binary.display(),
        world.repository.shown()
    );
    instance.configure(&format!("restore_command = '{command}'"))?;
    instance.configure(&format!("port = {}", instance.port))?;
    instance.configure("archive_mode = off")?;
    instance.configure("recovery_target_action = 'promote'")?;
    // It may end by itself at once: that is what most of these tests want.
    let _ = instance.start();
    Ok(instance)
}

/// The log of a server once it has stopped by itself or opened.
fn outcome(server: &Instance) -> Result<String> {
    let log = || Ok::<_, anyhow::Error>(fs::read_to_string(server.log_file())?);
    wait_until("an end of recovery", Duration::from_secs(180), || {
        Ok(!server.is_running()? || log()?.contains("archive recovery complete"))
    })?;
    log()
}

#[test]
fn a_push_that_is_killed_leaves_nothing_that_counts() -> Result<()> {
    requires!(Postgres);
    let (world, segments) = archived()?;
    let last = &segments[segments.len() - 1];
    let (_, fetched) = fetch(&world, last)?;
    let segment = world.scratch.join(last);
    fs::rename(&fetched, &segment)?;
    let arguments = world.repository.arguments(&["wal", "push"], &[&segment.display().to_string()]);
    for wait in [1, 3, 6, 10, 15, 25, 40] {
        let _ = fs::remove_file(object(&world, last));
        let running = world.pghydrant.start(&arguments)?;
        std::thread::sleep(Duration::from_millis(wait));
        let killed = running.kill()?;
        let (fetching, to) = fetch(&world, last)?;
        match fetching.code {
            Some(ABSENT) => {}
            Some(0) => ensure!(fs::read(&to)? == fs::read(&segment)?, "half a segment after {wait} ms"),
            _ => bail!("after a push killed at {wait} ms ({killed}):\n{fetching}"),
        }
    }
    push(&world, &segment)?.expect_code(0)?;
    Ok(())
}
