//! What a mount has: the data directory, tablespaces, links, the archive, the description.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use super::guard::{errno, names, root};
use super::sample::{MANY, SEGMENT_BYTES, SPACE, Sample, relation, segment};
use crate::support::compare::{same_trees, tree};
use crate::support::process::wait_until;
use crate::support::*;

/// The root has `backup.json`, `data`, `tablespaces` and `wal`, and nothing else.
#[test]
fn the_root() -> Result<()> {
    requires!(Fuse);
    let sample = Sample::new()?;
    let mounted = sample.mount(OsUser::server(), &[])?;
    assert_eq!(names(&mounted.mountpoint).err().map(|error| error.to_string()), root_is_refused());
    let as_user = Run::new("ls").arg("-A").arg(&mounted.mountpoint).user(OsUser::server()).succeed()?;
    assert_eq!(as_user.stdout.split_whitespace().collect::<Vec<_>>(), ["backup.json", "data", "tablespaces", "wal"]);
    Ok(())
}

/// Root does not see another user's mount.
fn root_is_refused() -> Option<String> {
    let refused = std::io::Error::from_raw_os_error(libc::EACCES).to_string();
    (OsUser::server().uid != root().uid).then_some(refused)
}

/// `data` is the data directory as the backup has it: every directory, file and link under its name, every file with its
/// bytes.
#[test]
fn the_data_directory() -> Result<()> {
    requires!(Fuse);
    let sample = Sample::new()?;
    let mounted = sample.mount(&root(), &[])?;
    let expected = sample.expected()?;
    assert!(expected.len() > MANY + 20);
    let mut found =
        tree(&mounted.join("data"))?.into_iter().map(|(path, entry)| (Path::new("data").join(path), entry)).collect();
    for (path, entry) in tree(&mounted.join("tablespaces"))? {
        std::collections::BTreeMap::insert(&mut found, Path::new("tablespaces").join(path), entry);
    }
    same_trees(&expected, &found, |path| path == Path::new("tablespaces").join(SPACE.to_string()))
}

/// `data/pg_tblspc/OID` is a link to `../../tablespaces/OID`, and behind it are the tablespace's files.
#[test]
fn a_tablespace() -> Result<()> {
    requires!(Fuse);
    let sample = Sample::new()?;
    let mounted = sample.mount(&root(), &[])?;
    let link = mounted.join(format!("data/pg_tblspc/{SPACE}"));
    assert_eq!(fs::read_link(&link)?, Path::new(&format!("../../tablespaces/{SPACE}")));
    assert_eq!(fs::read(link.join("PG_15_202209061/5/16401"))?, relation(300_000, 5));
    assert_eq!(names(&mounted.join("tablespaces"))?, [SPACE.to_string()].into());
    let directory = fs::symlink_metadata(mounted.join(format!("tablespaces/{SPACE}")))?;
    assert!(directory.is_dir());
    assert_eq!(directory.mode() & 0o7777, fs::metadata(sample.scratch.join("space"))?.mode() & 0o7777);
    assert_eq!(errno(fs::metadata(mounted.join("tablespaces/16401"))), Some(libc::ENOENT));
    Ok(())
}

/// Other links have the text that they had, wherever that leads.
#[test]
fn other_links() -> Result<()> {
    requires!(Fuse);
    let sample = Sample::new()?;
    let mounted = sample.mount(&root(), &[])?;
    assert_eq!(fs::read_link(mounted.join("data/dangling"))?, Path::new("/nonexistent/place"));
    assert_eq!(fs::symlink_metadata(mounted.join("data/dangling"))?.len(), "/nonexistent/place".len() as u64);
    assert_eq!(fs::read(mounted.join("data/base/link"))?, b"15\n");
    Ok(())
}

/// `wal` has the files of the archive that a recovery of the backup can ask for, under the names that PostgreSQL gives
/// them: segments, partial segments and labels of backups from the backup's first segment on, and every timeline's
/// history.
#[test]
fn the_archive() -> Result<()> {
    requires!(Fuse);
    let sample = Sample::new()?;
    let history = b"1\t0/400000\tno recovery target specified\n";
    sample.archive_file("00000002.history", history)?;
    sample.archive(2, 4)?;
    sample.archive_file("000000010000000000000006.partial", &segment(1, 6))?;
    let label = b"START WAL LOCATION: 0/200028 (file 000000010000000000000002)\n";
    sample.archive_file("000000010000000000000002.00000028.backup", label)?;
    sample.give_to_server_user()?;
    let mounted = sample.mount(&root(), &[])?;
    let wal = mounted.join("wal");
    let expected = [
        "000000010000000000000002",
        "000000010000000000000002.00000028.backup",
        "000000010000000000000003",
        "000000010000000000000004",
        "000000010000000000000005",
        "000000010000000000000006.partial",
        "000000020000000000000004",
        "00000002.history",
    ];
    assert_eq!(names(&wal)?, expected.map(str::to_owned).into());
    assert_eq!(fs::read(wal.join("000000010000000000000003"))?, segment(1, 3));
    assert_eq!(fs::metadata(wal.join("000000010000000000000003"))?.len(), u64::from(SEGMENT_BYTES));
    assert_eq!(fs::read(wal.join("000000010000000000000006.partial"))?, segment(1, 6));
    assert_eq!(fs::read(wal.join("00000002.history"))?, history);
    assert_eq!(fs::read(wal.join("000000010000000000000002.00000028.backup"))?, label);
    assert_eq!(errno(fs::metadata(wal.join("000000010000000000000001"))), Some(libc::ENOENT));
    Ok(())
}

/// A segment that arrives in the archive later appears in `wal` within a second.
#[test]
fn a_segment_that_arrives() -> Result<()> {
    requires!(Fuse);
    let sample = Sample::new()?;
    let mounted = sample.mount(&root(), &[])?;
    let (wal, name) = (mounted.join("wal"), "000000010000000000000006");
    assert_eq!(errno(fs::metadata(wal.join(name))), Some(libc::ENOENT));
    assert!(!names(&wal)?.contains(name));
    let arrived = sample.archive(1, 6)?;
    sample.give_to_server_user()?;
    wait_until("the segment", Duration::from_secs(1), || Ok(wal.join(name).exists() && names(&wal)?.contains(name)))?;
    assert_eq!(fs::read(wal.join(name))?, arrived);
    Ok(())
}

/// `backup.json` is the description of the backup, as the repository has it.
#[test]
fn the_description() -> Result<()> {
    requires!(Fuse);
    let sample = Sample::new()?;
    let mounted = sample.mount(&root(), &[])?;
    let shown = fs::read_to_string(mounted.join("backup.json"))?;
    let kept = sample.repository.join(format!("clusters/main/backups/{}.json", sample.info.label));
    assert!(shown.contains(sample.info.label.as_str()), "{shown}");
    assert_eq!(shown, fs::read_to_string(kept)?);
    Ok(())
}
