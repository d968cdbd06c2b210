//! The harness itself: a guard that does not guard would make every other test lie.

use std::fs;
use std::time::Duration;

use crate::support::compare::{same_trees, tree};
use crate::support::filesystem::{SmallFileSystem, is_mounted};
use crate::support::process::wait_until;
use crate::support::repository::Damage;
use crate::support::*;

#[test]
fn a_cluster_starts_takes_load_and_is_gone_with_its_guard() -> Result<()> {
    requires!(Postgres);
    let scratch = Scratch::new()?;
    let cluster = Cluster::build(&scratch, "original").setting("work_mem = 5MB").start()?;
    assert_eq!(cluster.sql("SHOW work_mem")?, "5MB");
    cluster.pgbench_initialize(1)?;
    let load = cluster.pgbench_load()?;
    assert_eq!(cluster.number("SELECT count(*) FROM pgbench_accounts")?, 100_000);
    drop(load);

    cluster.stop("fast")?;
    cluster.check_pages()?;
    cluster.start()?;
    cluster.check_relations()?;
    // As for a server that a restore left running: the guard finds it by its data directory, and stops it.
    let pid_file = cluster.data.join("postmaster.pid");
    let found = Instance::running_in(&cluster.data)?;
    assert_eq!((found.port, &found.sockets), (cluster.port, &cluster.sockets));
    drop(found);
    assert!(!pid_file.exists());
    Ok(())
}

#[test]
fn a_command_over_its_time_limit_is_killed_with_its_children() -> Result<()> {
    let scratch = Scratch::new()?;
    let mark = scratch.join("alive");
    let script = format!("(sleep 2; touch {}) & sleep 60", mark.display());
    let error = Run::new("sh").args(["-c", &script]).time_limit(Duration::from_millis(200)).finish().unwrap_err();
    assert!(error.to_string().contains("took longer than"), "{error}");
    std::thread::sleep(Duration::from_millis(2500));
    assert!(!mark.exists());
    Ok(())
}

#[test]
fn a_command_that_leaves_a_daemon_behind_still_ends() -> Result<()> {
    let finished = Run::new("sh").args(["-c", "echo done; sleep 60 &"]).succeed()?;
    assert_eq!(finished.stdout, "done\n");
    assert!(finished.took < Duration::from_secs(30), "{finished}");
    Ok(())
}

#[test]
fn trees_differ_by_content_mode_link_and_absence() -> Result<()> {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let scratch = Scratch::new()?;
    let (left, right) = (scratch.directory("left")?, scratch.directory("right")?);
    for root in [&left, &right] {
        fs::create_dir(root.join("below"))?;
        fs::write(root.join("below/file"), "same")?;
        symlink("below", root.join("link"))?;
    }
    let same = || same_trees(&tree(&left)?, &tree(&right)?, |_| false);
    same()?;
    fs::write(right.join("below/file"), "sane")?;
    assert!(same().unwrap_err().to_string().contains("below/file"));
    fs::write(right.join("below/file"), "same")?;
    fs::set_permissions(right.join("below/file"), fs::Permissions::from_mode(0o600))?;
    assert!(same().is_err());
    fs::remove_file(right.join("below/file"))?;
    assert!(same().is_err());
    same_trees(&tree(&left)?, &tree(&right)?, |path| path.ends_with("file"))?;
    fs::remove_file(right.join("link"))?;
    assert!(same_trees(&tree(&left)?, &tree(&right)?, |path| path.ends_with("file")).is_err());
    Ok(())
}

#[test]
fn damage_is_done_and_mended() -> Result<()> {
    let scratch = Scratch::new()?;
    let file = scratch.join("file");
    fs::write(&file, [0; 100])?;
    for (damage, seen) in [(Damage::Deleted, None), (Damage::Truncated, Some(vec![0; 50]))] {
        let mend = damage.inflict(&file)?;
        assert_eq!(fs::read(&file).ok(), seen);
        drop(mend);
        assert_eq!(fs::read(&file)?, [0; 100]);
    }
    let mend = Damage::BitFlipped.inflict(&file)?;
    assert_eq!(fs::read(&file)?.iter().filter(|&&byte| byte == 1).count(), 1);
    drop(mend);
    assert_eq!(fs::read(&file)?, [0; 100]);
    Ok(())
}

#[test]
fn a_small_file_system_fills_up_and_is_unmounted_with_its_guard() -> Result<()> {
    requires!(LoopDevice, Tool("mkfs.ext4", "e2fsprogs"));
    let scratch = Scratch::new()?;
    let small = SmallFileSystem::mount(&scratch, "small", "ext4", 16)?;
    let error = fs::write(small.path().join("file"), vec![1; 32 << 20]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    let mountpoint = small.path().to_owned();
    assert!(is_mounted(&mountpoint));
    drop(small);
    wait_until("the unmount", Duration::from_secs(60), || Ok(!is_mounted(&mountpoint)))
}

#[test]
fn only_the_ids_of_sessions_are_masked() {
    let mask = |text: &str| String::from_utf8(compare::without_session_ids(text.as_bytes())).unwrap();
    assert_eq!(mask("a 20261122T131215Z b"), "a SESSION b");
    assert_eq!(mask("20261122T131215Z-3f9a1c."), "SESSION.");
    assert_eq!(mask("20261122T131215Z-F 2026-11-22"), "SESSION-F 2026-11-22");
    assert_eq!(mask("20261122T13121"), "20261122T13121");
}
