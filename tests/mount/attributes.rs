//! What a mount tells of its files: sizes, modes, owners, numbers, listings.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;

use fusefs::table;

use super::guard::{names, root};
use super::sample::{LARGE, MANY, Sample};
use crate::support::*;

/// Sizes, permission bits and modification times are those that the backup recorded.
#[test]
fn attributes() -> Result<()> {
    requires!(Fuse);
    let sample = Sample::new()?;
    let mounted = sample.mount(&root(), &[])?;
    for path in
        [LARGE, "PG_VERSION", "read only", "base/5", "base/5/empty", "with space/\u{fc}ml\u{e4}ut", "postgresql.conf"]
    {
        let (shown, original) =
            (fs::metadata(mounted.join("data").join(path))?, fs::metadata(sample.original.join(path))?);
        let size = if original.is_dir() { 0 } else { original.len() };
        assert_eq!((shown.len(), shown.mode(), shown.mtime()), (size, original.mode(), original.mtime()), "{path}");
    }
    Ok(())
}

/// Mounted by root, files have the owners that the backup recorded; mounted by anybody else, everything belongs to that
/// user.
#[test]
fn owners() -> Result<()> {
    requires!(Fuse, Root);
    let (sample, user) = (Sample::new()?, OsUser::server());
    let mounted = sample.mount(&root(), &[])?;
    let owner = |path: &str| fs::metadata(mounted.join(path)).map(|found| (found.uid(), found.gid()));
    assert_eq!(owner("data/PG_VERSION")?, (user.uid, user.gid));
    assert_eq!(owner("data/postgresql.conf")?, (0, 0));
    assert_eq!(owner("data")?, (user.uid, user.gid));
    drop(mounted);
    let mounted = sample.mount(user, &[])?;
    let files = ["data/PG_VERSION", "data/postgresql.conf", "data", "wal", "."].map(|path| mounted.join(path));
    let shown = Run::new("stat").args(["-c", "%u:%g"]).args(files).user(user).succeed()?;
    assert_eq!(shown.stdout.lines().collect::<BTreeSet<_>>(), [format!("{}:{}", user.uid, user.gid).as_str()].into());
    Ok(())
}

/// A file has one inode number as long as it is mounted, and a directory's listing tells the same one.
#[test]
fn inode_numbers() -> Result<()> {
    use std::os::unix::fs::DirEntryExt;
    requires!(Fuse);
    let sample = Sample::new()?;
    let mounted = sample.mount(&root(), &[])?;
    let mut seen = BTreeSet::new();
    for directory in [".", "data", "data/base/5", "data/pg_tblspc", "tablespaces", "wal"] {
        for entry in fs::read_dir(mounted.join(directory))? {
            let entry = entry?;
            let inode = fs::symlink_metadata(entry.path())?.ino();
            assert_eq!(entry.ino(), inode, "{}", entry.path().display());
            assert!(seen.insert(inode), "{} shares its number", entry.path().display());
        }
    }
    let of = |path: &str| fs::metadata(mounted.join(path)).map(|found| found.ino());
    let before = (of("data/PG_VERSION")?, of("wal/000000010000000000000003")?);
    fs::write("/proc/sys/vm/drop_caches", "2").or_else(|error| if tools::is_root() { Err(error) } else { Ok(()) })?;
    assert_eq!((of("data/PG_VERSION")?, of("wal/000000010000000000000003")?), before);
    Ok(())
}

/// A directory is listed completely, each name once, also when it has thousands of them and when the listing is rewound.
#[test]
fn a_large_directory() -> Result<()> {
    requires!(Fuse);
    let sample = Sample::new()?;
    let mounted = sample.mount(&root(), &[])?;
    let directory = File::open(mounted.join("data/base/5/many"))?;
    let mut listing = rustix::fs::Dir::read_from(&directory)?;
    let mut count = |limit: usize| -> Result<Vec<String>> {
        let listed = listing.by_ref().take(limit).map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
        let listed = listed.collect::<Result<Vec<_>>>()?;
        listing.rewind();
        Ok(listed)
    };
    count(1000)?;
    let listed = count(usize::MAX)?;
    assert_eq!(listed.len(), MANY + 2);
    let unique: BTreeSet<_> = listed.iter().map(String::as_str).filter(|name| !name.starts_with('.')).collect();
    assert_eq!(unique, names(&sample.original.join("base/5/many"))?.iter().map(String::as_str).collect());
    Ok(())
}

/// `statfs` tells the bytes and files of the backup, and no free space.
#[test]
fn the_size_of_the_file_system() -> Result<()> {
    requires!(Fuse);
    let sample = Sample::new()?;
    let mounted = sample.mount(&root(), &[])?;
    let found = rustix::fs::statvfs(&mounted.mountpoint)?;
    let totals = &sample.info.totals;
    assert_eq!(found.f_blocks, totals.bytes.div_ceil(found.f_frsize));
    assert_eq!(found.f_files, totals.files + totals.directories);
    assert_eq!((found.f_bfree, found.f_bavail, found.f_ffree), (0, 0, 0));
    Ok(())
}

/// The root's link `.pghydrant`, which no listing shows, tells the token that its server was started with and the
/// server's process id.
#[test]
fn who_serves_it() -> Result<()> {
    requires!(Fuse);
    let sample = Sample::new()?;
    let mounted = sample.mount(&root(), &[])?;
    let served = table::served(&mounted.mountpoint).context("the mount does not tell")?;
    assert_eq!(served.token.len(), 32);
    table::prove(&mounted.mountpoint, &served.token)?;
    assert!(table::prove(&mounted.mountpoint, "another").is_err());
    assert!(table::prove(&mounted.join("data"), &served.token).is_err());
    let program = fs::read_link(format!("/proc/{}/exe", served.process))?;
    assert_eq!(program.file_name(), mounted.pghydrant.binary.file_name());
    let text = fs::read_link(mounted.join(table::SERVED_LINK))?;
    assert_eq!(text.as_os_str(), format!("{} {}", served.token, served.process).as_str());
    let link = fs::symlink_metadata(mounted.join(table::SERVED_LINK))?;
    assert!(link.is_symlink() && link.len() == text.as_os_str().len() as u64);
    for directory in [mounted.join(""), mounted.join("data")] {
        let mut names = fs::read_dir(&directory)?.map(|entry| entry.map(|entry| entry.file_name()));
        assert!(names.all(|name| name.is_ok_and(|name| name != table::SERVED_LINK)));
    }
    assert_eq!(table::served(&mounted.join("data")), None);
    Ok(())
}

/// Nothing has extended attributes: asking for them is EOPNOTSUPP, and once that was said the server is not asked again.
/// For access control lists the kernel answers by itself, newer ones with ENODATA.
#[test]
fn extended_attributes() -> Result<()> {
    requires!(Fuse);
    let sample = Sample::new()?;
    let mounted = sample.mount(&root(), &[])?;
    for path in [mounted.mountpoint.clone(), mounted.join("data/PG_VERSION")] {
        for name in ["user.x", "security.capability"] {
            let value = rustix::fs::getxattr(&path, name, &mut [0; 64]);
            assert_eq!(value.unwrap_err(), rustix::io::Errno::OPNOTSUPP, "{name}");
        }
        let names = rustix::fs::listxattr(&path, &mut [0; 64]);
        assert_eq!(names.unwrap_err(), rustix::io::Errno::OPNOTSUPP);
        for name in ["system.posix_acl_access", "system.posix_acl_default"] {
            let value = rustix::fs::getxattr(&path, name, &mut [0; 64]);
            // Linux before 6.2, and a mount in a user namespace, say the one, others the other.
            let answers = [rustix::io::Errno::NODATA, rustix::io::Errno::OPNOTSUPP];
            assert!(value.is_err_and(|errno| answers.contains(&errno)), "{name}: {value:?}");
        }
    }
    // A server that was stopped could not say so.
    let server = rustix::process::Pid::from_raw(i32::try_from(mounted.server()?)?).context("no server")?;
    let open = File::open(mounted.join("data/PG_VERSION"))?;
    rustix::process::kill_process(server, rustix::process::Signal::STOP)?;
    let asked = rustix::fs::fgetxattr(&open, "security.capability", &mut [0; 64]);
    let list = rustix::fs::fgetxattr(&open, "system.posix_acl_access", &mut [0; 64]);
    rustix::process::kill_process(server, rustix::process::Signal::CONT)?;
    assert_eq!(asked.unwrap_err(), rustix::io::Errno::OPNOTSUPP);
    assert!(list.is_err());
    Ok(())
}
