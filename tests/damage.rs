//! Damage: every kind of repository file deleted, truncated, one bit flipped.
//!
//! What must hold: a restore from a damaged repository ends with an error that names the damage and leaves nothing that
//! can be started, or, where the damaged bytes are none that it needs, it ends with exactly the right files. Never 0 with
//! wrong bytes, never a panic, and never a change of the repository.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::support::compare::{Entry, same_trees, tree};
use crate::support::json::find_text;
use crate::support::repository::Damage;
use crate::support::*;

/// Kinds of files by their place in the repository.
fn kind_of(path: &Path) -> Option<&'static str> {
    let text = path.to_str()?;
    Some(match text {
        "pghydrant.json" => "the repository's description",
        _ if text.ends_with("/cluster.json") => "a cluster's description",
        _ if text.ends_with(".pack") => "a pack",
        _ if text.ends_with(".manifest") => "a manifest",
        _ if text.contains("/backups/") => "a backup's description",
        _ if text.contains("/locks/") => return None,
        _ if text.contains("/wal/") && text.ends_with(".backup") => "a backup history file",
        _ if text.contains("/wal/") => "a WAL segment",
        _ => "something else",
    })
}

/// The largest file of each kind: the one a restore needs most of.
fn victims(repository: &Repository) -> Result<BTreeMap<&'static str, PathBuf>> {
    let mut victims: BTreeMap<&'static str, PathBuf> = BTreeMap::new();
    for path in repository.files()? {
        let Some(kind) = kind_of(&path) else { continue };
        ensure!(kind != "something else", "{} is a kind of file that this test does not know", path.display());
        let path = repository.path().join(path);
        let bytes = |path: &PathBuf| fs::metadata(path).map_or(0, |metadata| metadata.len());
        if victims.get(kind).is_none_or(|known| bytes(known) < bytes(&path)) {
            victims.insert(kind, path);
        }
    }
    // The one before the last: the newest backup needs it, and the one behind it proves that it was there.
    let mut segments = segments(repository)?;
    segments.pop();
    victims.insert("a WAL segment", segments.pop().context("too few WAL segments")?);
    for kind in [
        "the repository's description",
        "a cluster's description",
        "a pack",
        "a manifest",
        "a backup's description",
        "a WAL segment",
    ] {
        ensure!(victims.contains_key(kind), "{kind} is missing in the repository");
    }
    Ok(victims)
}

/// The segments of timeline 1, in order.
fn segments(repository: &Repository) -> Result<Vec<PathBuf>> {
    let is_segment =
        |path: &PathBuf| path.starts_with("clusters/main/wal") && path.file_name().is_some_and(|name| name.len() == 24);
    let mut segments: Vec<PathBuf> = repository.files()?.into_iter().filter(is_segment).collect();
    segments.sort();
    Ok(segments.into_iter().map(|path| repository.path().join(path)).collect())
}

/// Two backups and archived WAL behind them; the files that a restore must give.
fn prepared() -> Result<(World, String, BTreeMap<PathBuf, Entry>)> {
    let world = World::new(1)?;
    world.backup()?;
    world.mark("between")?;
    let label = find_text(&world.backup()?, "label").context("no label")?;
    world.mark("after")?;
    world.cluster.archive_wal()?;
    // Nothing may change the repository from here on.
    world.cluster.stop("fast")?;
    world.restore_to(&world.target(), &["--no-start", "--source", "blocks"])?.expect_code(0)?;
    let expected = tree(&world.target())?;
    fs::remove_dir_all(world.target())?;
    Ok((world, label, expected))
}

/// Files that say when and by which session a copy was made.
fn tells_of_the_copy(path: &Path) -> bool {
    path.to_string_lossy().contains("pghydrant")
}

fn harmless_or_refused(
    world: &World,
    label: &str,
    source: &str,
    what: &str,
    expected: &BTreeMap<PathBuf, Entry>,
    path: &Path,
) -> Result<()> {
    let target = world.target();
    // By its label: without its description the newest backup is none, and the one before it would be right.
    let finished = world.restore_to(&target, &["--no-start", "--source", source, "--backup", label])?;
    ensure!(!finished.stderr.contains("panicked"), "{what}: a panic\n{finished}");
    ensure!(finished.signal.is_none(), "{what}: killed\n{finished}");
    if finished.code == Some(0) {
        same_trees(expected, &tree(&target)?, tells_of_the_copy)
            .with_context(|| format!("{what}: 0 with wrong files"))?;
    } else {
        ensure!(finished.code.is_some_and(|code| [1, 3, 4, 6].contains(&code)), "{what}: exit code\n{finished}");
        ensure!(finished.stderr.contains("error: "), "{what}: no error line\n{finished}");
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let stem = name.split('.').next().unwrap_or_default();
        ensure!(finished.stderr.contains(stem), "{what}: {name} is not named\n{finished}");
        ensure!(!target.join("global/pg_control").exists(), "{what}: what is left could be started\n{finished}");
    }
    if target.exists() {
        fs::remove_dir_all(&target)?;
    }
    Ok(())
}

#[test]
fn no_damage_of_any_file_is_ever_restored() -> Result<()> {
    requires!(Postgres, Fuse);
    let (world, label, expected) = prepared()?;
    let before = tree(world.repository.path())?;
    for (kind, path) in victims(&world.repository)? {
        for damage in Damage::ALL {
            let what = format!("{kind}, {damage:?}");
            let mend = damage.inflict(&path)?;
            // As a restore meets it, and as verify does.
            let source = if damage == Damage::BitFlipped { "mount" } else { "blocks" };
            harmless_or_refused(&world, &label, source, &what, &expected, &path)?;
            let verify = world.pghydrant.run(["verify", "--repo", &world.repository.shown()])?;
            ensure!(!verify.stderr.contains("panicked"), "{what}: a panic\n{verify}");
            // Nobody needs the label that PostgreSQL archives, and nothing proves that it was there.
            if (kind, damage) != ("a backup history file", Damage::Deleted) {
                ensure!(verify.code == Some(4), "{what}: verify does not find it\n{verify}");
            }
            drop(mend);
        }
    }
    // Mended, it is whole, and nobody wrote into it meanwhile.
    world.pghydrant.succeed(["verify", "--repo", &world.repository.shown()])?;
    same_trees(&before, &tree(world.repository.path())?, |path| path.to_string_lossy().contains("/locks"))
}

#[test]
fn a_flipped_bit_anywhere_in_a_description_never_restores_wrong_files() -> Result<()> {
    requires!(Postgres);
    let (world, label, expected) = prepared()?;
    for (kind, path) in victims(&world.repository)? {
        if !kind.ends_with("description") {
            continue;
        }
        let bytes = fs::metadata(&path)?.len();
        // A dozen places, spread over the file.
        for byte in (0..bytes).step_by(usize::try_from(bytes / 12 + 1)?) {
            let _mend = Damage::BitFlipped.inflict_at(&path, byte)?;
            let what = format!("{kind}, bit at byte {byte}");
            harmless_or_refused(&world, &label, "blocks", &what, &expected, &path)?;
            let list = world.pghydrant.run(["list", "--repo", &world.repository.shown()])?;
            ensure!(list.code == Some(4), "{what}: list believes it\n{list}");
        }
    }
    Ok(())
}

#[test]
fn a_backup_without_its_description_does_not_vanish() -> Result<()> {
    requires!(Postgres);
    let (world, newest, _) = prepared()?;
    let description = world.repository.path().join(format!("clusters/main/backups/{newest}.json"));
    let mend = Damage::Deleted.inflict(&description)?;
    let file = format!("{newest}.json");
    for verb in [&["list"][..], &["verify"], &["show", "--cluster", "main"]] {
        let finished = world.pghydrant.run([verb, &["--repo", &world.repository.shown()]].concat())?;
        finished.expect_code(4)?.expect_stderr(&[&file])?;
    }
    // The newest backup is not silently another one.
    world
        .restore_to(&world.target(), &["--no-start", "--source", "blocks"])?
        .expect_code(4)?
        .expect_stderr(&[&file, "--backup"])?;
    let before = files_of_backups(&world)?;
    let older = world.repository.file(|path| path.contains("/backups/") && path.ends_with(".json"))?;
    let older = older.file_stem().context("no name")?.to_string_lossy().into_owned();
    let named = ["--no-start", "--source", "blocks", "--backup", &older];
    world.restore_to(&world.target(), &named)?.expect_code(0)?;
    fs::remove_dir_all(world.target())?;

    // A backup goes on without it and leaves all of it in place, so that a copy of the description mends it.
    world.cluster.start()?;
    world.backup()?;
    let after = files_of_backups(&world)?;
    ensure!(before.iter().all(|file| after.contains(file)), "swept: {before:?}\n{after:?}");
    drop(mend);
    world.cluster.archive_wal()?;
    world.pghydrant.succeed(["verify", "--repo", &world.repository.shown()])?;
    world.restore_to(&world.target(), &["--no-start", "--source", "blocks", "--backup", &newest])?.expect_code(0)?;
    Ok(())
}

fn files_of_backups(world: &World) -> Result<Vec<PathBuf>> {
    let files = world.repository.files()?.into_iter();
    Ok(files
        .filter(|file| {
            file.to_string_lossy().ends_with(".pack") || file.extension().is_some_and(|end| end == "manifest")
        })
        .collect())
}

#[test]
fn a_corrupt_block_is_an_io_error_of_the_mount_and_a_line_that_names_it() -> Result<()> {
    requires!(Postgres, Fuse);
    let (world, ..) = prepared()?;
    let pack = victims(&world.repository)?.remove("a pack").context("no pack")?;
    let _mend = Damage::BitFlipped.inflict(&pack)?;
    let mountpoint = world.scratch.directory("mounted")?;
    let shown = mountpoint.display().to_string();
    world.pghydrant.succeed(world.repository.arguments(&["mount"], &[&shown]))?;
    let read = Run::new("sh")
        .args(["-c", "find \"$0\" -type f -exec cat {} + >/dev/null"])
        .arg(&mountpoint)
        .user(OsUser::server())
        .time_limit(Duration::from_secs(60))
        .finish();
    let unmounted = world.pghydrant.run(["unmount", &shown]);
    let read = read?;
    unmounted?.expect_code(0)?;
    assert_ne!(read.code, Some(0), "every block was read");
    assert!(read.stderr.contains("Input/output error"), "{read}");
    assert!(!filesystem::is_mounted(&mountpoint));
    Ok(())
}

#[test]
fn a_repository_whose_disk_goes_away_is_an_error_and_not_a_signal() -> Result<()> {
    requires!(Postgres, Fuse, LoopDevice);
    use crate::support::filesystem::SmallFileSystem;
    let scratch = Scratch::new()?;
    let disk = SmallFileSystem::mount(&scratch, "disk", "ext4", 300)?;
    let pghydrant = Pghydrant::new(&scratch)?;
    let repository = Repository::init_at(&disk.path().join("repo"), &pghydrant, &[])?;
    let cluster = Cluster::build(&scratch, "original").start()?;
    cluster.pgbench_initialize(2)?;
    repository.backup(&cluster)?;
    let mountpoint = scratch.directory("mounted")?;
    let shown = mountpoint.display().to_string();
    pghydrant.succeed(repository.arguments(&["mount"], &[&shown]))?;

    // The bytes go from under the file system: what was cached stays readable, the rest does not.
    fs::OpenOptions::new().write(true).open(scratch.join("disk.image"))?.set_len(1 << 20)?;
    fs::write("/proc/sys/vm/drop_caches", "3")?;
    let read = Run::new("sh").args(["-c", "find \"$0\" -type f -exec cat {} + >/dev/null"]).arg(&mountpoint);
    let read = read.user(OsUser::server()).time_limit(Duration::from_secs(60)).finish();
    let listed = Run::new("ls").arg(&mountpoint).user(OsUser::server()).time_limit(Duration::from_secs(20)).finish();
    let restored = repository.restore(&scratch.join("restored"), &["--no-start", "--source", "blocks"]);
    let unmounted = pghydrant.run(["unmount", &shown]);
    assert_ne!(read?.code, Some(0), "bytes that are gone were read");
    assert_eq!(listed?.code, Some(0), "the mount's server has died");
    let restored = restored?;
    assert!(restored.signal.is_none() && restored.code != Some(0), "{restored}");
    assert!(!restored.stderr.contains("panicked"), "{restored}");
    assert!(!scratch.join("restored/global/pg_control").exists());
    unmounted?.expect_code(0)?;
    Ok(())
}
