//! What a mount refuses: changes, names, other users.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, RenameFlags, XattrFlags};

use super::guard::{errno, root};
use super::sample::Sample;
use crate::support::*;

/// Whatever would change something fails with EROFS, also for root.
#[test]
fn changes() -> Result<()> {
    requires!(Fuse);
    let sample = Sample::new()?;
    let mounted = sample.mount(&root(), &[])?;
    let (data, file, new) = (mounted.join("data"), mounted.join("data/PG_VERSION"), mounted.join("data/new"));
    let errno_of = |outcome: rustix::io::Result<()>| outcome.map_err(std::io::Error::from);
    let outcomes = [
        ("create", File::create(&new).map(drop)),
        ("open for writing", OpenOptions::new().write(true).open(&file).map(drop)),
        ("open for both", OpenOptions::new().read(true).write(true).open(&file).map(drop)),
        ("append", OpenOptions::new().append(true).open(&file).map(drop)),
        ("truncate", truncate(&file)),
        ("mkdir", fs::create_dir(&new)),
        ("rmdir", fs::remove_dir(data.join("pg_wal"))),
        ("unlink", fs::remove_file(&file)),
        ("rename", fs::rename(&file, &new)),
        (
            "exchange",
            errno_of(rustix::fs::renameat_with(CWD, &file, CWD, data.join("read only"), RenameFlags::EXCHANGE)),
        ),
        ("link", fs::hard_link(&file, &new)),
        ("symlink", symlink("x", &new)),
        ("mknod", errno_of(rustix::fs::mknodat(CWD, &new, rustix::fs::FileType::Fifo, 0o600.into(), 0))),
        ("chmod", fs::set_permissions(&file, fs::Permissions::from_mode(0o666))),
        ("chown", std::os::unix::fs::chown(&file, Some(1), Some(1))),
        ("utimes", File::open(&file)?.set_times(fs::FileTimes::new().set_modified(std::time::SystemTime::now()))),
        ("setxattr", errno_of(rustix::fs::setxattr(&file, "user.x", b"x", XattrFlags::empty()))),
        ("removexattr", errno_of(rustix::fs::removexattr(&mounted.mountpoint, "user.x"))),
        ("access", errno_of(rustix::fs::accessat(CWD, &file, rustix::fs::Access::WRITE_OK, AtFlags::empty()))),
    ];
    for (call, outcome) in outcomes {
        assert_eq!(errno(outcome), Some(libc::EROFS), "{call}");
    }
    Ok(())
}

/// `truncate(2)`, which takes a path and no open file.
fn truncate(path: &Path) -> std::io::Result<()> {
    let path = std::ffi::CString::new(path.as_os_str().as_encoded_bytes())?;
    // SAFETY: a path that ends with NUL and outlives the call.
    match unsafe { libc::truncate(path.as_ptr(), 1) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// A name that is not there is ENOENT, one that is too long is ENAMETOOLONG, and what lies below a file is ENOTDIR.
#[test]
fn names_that_are_not_there() -> Result<()> {
    requires!(Fuse);
    let sample = Sample::new()?;
    let mounted = sample.mount(&root(), &[])?;
    for absent in [
        "x",
        "data/x",
        "data/base/5/1638",
        "data/base/5/163840",
        "wal/x",
        "tablespaces/pg_tblspc",
        "data/base/5/many/-1",
    ] {
        assert_eq!(errno(fs::metadata(mounted.join(absent))), Some(libc::ENOENT), "{absent}");
    }
    assert_eq!(errno(fs::metadata(mounted.join("data/PG_VERSION/x"))), Some(libc::ENOTDIR));
    assert_eq!(errno(fs::metadata(mounted.join("data").join("x".repeat(2000)))), Some(libc::ENAMETOOLONG));
    assert_eq!(errno(fs::read(mounted.join("data"))), Some(libc::EISDIR));
    Ok(())
}

/// Only the user that mounted can look into the mount; everybody else, root included, is refused with EACCES.
#[test]
fn other_users() -> Result<()> {
    requires!(Fuse, Root);
    let (sample, user) = (Sample::new()?, OsUser::server());
    let mounted = sample.mount(user, &[])?;
    Run::new("cat").arg(mounted.join("data/PG_VERSION")).user(user).succeed()?;
    assert_eq!(errno(fs::metadata(mounted.join("data"))), Some(libc::EACCES));
    drop(mounted);
    let mounted = sample.mount(&root(), &[])?;
    assert!(fs::metadata(mounted.join("data")).is_ok());
    let refused = Run::new("stat").arg(mounted.join("data")).user(user).finish()?;
    refused.expect_code(1)?.expect_stderr(&["Permission denied"])?;
    Ok(())
}

/// With `--allow-other` the permission bits decide, for everybody as they would in the original.
#[test]
fn allow_other() -> Result<()> {
    requires!(Fuse, Root);
    let (sample, user) = (Sample::new()?, OsUser::server());
    let mounted = sample.mount(&root(), &["--allow-other"])?;
    fs::read(mounted.join("data/PG_VERSION"))?;
    Run::new("cat").arg(mounted.join("data/PG_VERSION")).user(user).succeed()?;
    let nobody = OsUser { name: "nobody".into(), uid: 65534, gid: 65534 };
    Run::new("ls").arg(&mounted.mountpoint).user(&nobody).succeed()?;
    for closed in ["data/PG_VERSION", "wal/000000010000000000000003", "backup.json"] {
        Run::new("cat")
            .arg(mounted.join(closed))
            .user(&nobody)
            .finish()?
            .expect_code(1)?
            .expect_stderr(&["Permission denied"])?;
    }
    drop(mounted);
    if fs::read_to_string("/etc/fuse.conf").unwrap_or_default().lines().all(|line| line.trim() != "user_allow_other") {
        let mountpoint = sample.scratch.directory("of user")?;
        let arguments = sample.mount_arguments(&mountpoint, &["--allow-other"]);
        sample.pghydrant(user).fail(
            arguments,
            1,
            &["/etc/fuse.conf has no user_allow_other", "hint: as root: echo"],
        )?;
    }
    Ok(())
}
