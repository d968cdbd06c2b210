//! *fusefs/SEMANTICS.md*, item by item: each item is the doc comment of the test that proves it.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use fusefs::table::{self, SERVER_ATTRIBUTE, TOKEN_ATTRIBUTE};
use rustix::fs::{AtFlags, CWD, RenameFlags, XattrFlags};

use super::guard::errno;
use super::sample::{BLOCK_BYTES, LARGE, LARGE_BYTES, MANY, SEGMENT_BYTES, SPACE, Sample, relation, segment};
use crate::support::compare::{Entry, same_trees, tree};
use crate::support::process::wait_until;
use crate::support::repository::flip_bit;
use crate::support::*;

const SEMANTICS: &str = include_str!("../../fusefs/SEMANTICS.md");
const TESTS: [&str; 3] = [include_str!("semantics.rs"), include_str!("life.rs"), include_str!("model.rs")];

fn names(directory: &Path) -> Result<BTreeSet<String>> {
    let names = fs::read_dir(directory)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    names.collect()
}

fn direct(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path)
}

fn root() -> OsUser {
    OsUser::current()
}

#[test]
fn every_item_of_semantics_is_the_doc_comment_of_a_test() {
    let one_line = |lines: Vec<&str>| lines.join(" ").split_whitespace().collect::<Vec<_>>().join(" ");
    let mut items = Vec::new();
    for paragraph in SEMANTICS.split("\n\n") {
        for item in format!("\n{paragraph}").split("\n- ").skip(1) {
            items.push(one_line(item.lines().collect()));
        }
    }
    let mut proven = BTreeSet::new();
    for source in TESTS {
        let mut comment = Vec::new();
        for line in source.lines().map(str::trim) {
            match line.strip_prefix("/// ") {
                Some(text) => comment.push(text),
                None if line == "#[test]" => drop(proven.insert(one_line(std::mem::take(&mut comment)))),
                None => comment.clear(),
            }
        }
    }
    assert!(items.len() > 20, "{items:#?}");
    let unproven: Vec<_> = items.iter().filter(|item| !proven.contains(*item)).collect();
    assert!(unproven.is_empty(), "no test has these as its doc comment: {unproven:#?}");
}

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

/// The root's extended attribute `user.pghydrant.session` tells the token that its server was started with, and
/// `user.pghydrant.server` the server's process id; nothing else has extended attributes.
#[test]
fn extended_attributes() -> Result<()> {
    requires!(Fuse);
    let sample = Sample::new()?;
    let mounted = sample.mount(&root(), &[])?;
    let token = table::attribute(&mounted.mountpoint, TOKEN_ATTRIBUTE).context("no token")?;
    assert_eq!(token.len(), 32);
    table::prove(&mounted.mountpoint, &token)?;
    assert!(table::prove(&mounted.mountpoint, "another").is_err());
    assert!(table::prove(&mounted.join("data"), &token).is_err());
    let program = fs::read_link(format!("/proc/{}/exe", mounted.server()?))?;
    assert_eq!(program.file_name(), mounted.pghydrant.binary.file_name());
    let mut listed = [0; 256];
    let bytes = rustix::fs::listxattr(&mounted.mountpoint, &mut listed)?;
    let listed: BTreeSet<_> = listed[..bytes].split(|byte| *byte == 0).filter(|name| !name.is_empty()).collect();
    assert_eq!(listed, [TOKEN_ATTRIBUTE.as_bytes(), SERVER_ATTRIBUTE.as_bytes()].into());
    let small = rustix::fs::getxattr(&mounted.mountpoint, TOKEN_ATTRIBUTE, &mut [0; 4]);
    assert_eq!(small.unwrap_err(), rustix::io::Errno::RANGE);
    let absent = rustix::fs::getxattr(mounted.join("data/PG_VERSION"), TOKEN_ATTRIBUTE, &mut [0; 64]);
    assert_eq!(absent.unwrap_err(), rustix::io::Errno::NODATA);
    assert_eq!(rustix::fs::listxattr(mounted.join("data"), &mut [0; 64])?, 0);
    Ok(())
}

/// A read gives as many bytes as were asked for, but for the end of the file; behind that it gives none.
#[test]
fn the_end_of_a_file() -> Result<()> {
    requires!(Fuse);
    let sample = Sample::new()?;
    let mounted = sample.mount(&root(), &[])?;
    let (path, content, bytes) = (mounted.join("data").join(LARGE), relation(LARGE_BYTES, 1), LARGE_BYTES as u64);
    for file in [File::open(&path)?, direct(&path)?] {
        let mut out = vec![0; 1 << 20];
        assert_eq!(file.read_at(&mut out, BLOCK_BYTES - 5)?, out.len());
        let start = usize::try_from(BLOCK_BYTES)? - 5;
        assert!(out[..] == content[start..start + out.len()]);
        assert_eq!(file.read_at(&mut out, bytes - 1000)?, 1000);
        assert!(out[..1000] == content[LARGE_BYTES - 1000..]);
        for behind in [bytes, bytes + 1, bytes + (1 << 30)] {
            assert_eq!(file.read_at(&mut out, behind)?, 0);
        }
    }
    assert_eq!(File::open(mounted.join("data/base/5/empty"))?.read_at(&mut [0; 10], 0)?, 0);
    let mut file = File::open(&path)?;
    assert_eq!(file.seek(SeekFrom::End(-7))?, bytes - 7);
    assert_eq!(file.read_to_end(&mut Vec::new())?, 7);
    Ok(())
}

/// Bytes of a file that are in the page cache.
fn cached_bytes(path: &Path) -> Result<u64> {
    let shown = Run::new("fincore").args(["--bytes", "--noheadings", "--output", "RES"]).arg(path).succeed()?;
    Ok(shown.stdout.trim().parse()?)
}

/// With O_DIRECT any offset, length and address will do, and nothing is left in the page cache.
#[test]
fn direct_reads() -> Result<()> {
    requires!(Fuse, Tool("fincore", "util-linux-extra"));
    let sample = Sample::new()?;
    let mounted = sample.mount(&root(), &[])?;
    let (path, content) = (mounted.join("data").join(LARGE), relation(LARGE_BYTES, 1));
    let file = direct(&path)?;
    let mut out = vec![0; 1_500_001];
    for (offset, length, address) in
        [(0, 1 << 20, 0), (1, 1, 1), (4095, 8193, 7), (131_071, 1_400_000, 3), (LARGE_BYTES - 9, 9, 4095)]
    {
        let out = &mut out[address..address + length];
        file.read_exact_at(out, offset as u64)?;
        assert!(*out == content[offset..offset + length], "{length} bytes at {offset}");
    }
    assert_eq!(cached_bytes(&path)?, 0);
    Ok(())
}

/// Without O_DIRECT what was read stays in the page cache, also for whoever opens the file next.
#[test]
fn buffered_reads() -> Result<()> {
    requires!(Fuse, Tool("fincore", "util-linux-extra"));
    let sample = Sample::new()?;
    let mounted = sample.mount(&root(), &[])?;
    let path = mounted.join("data/base/5/one block");
    fs::read(&path)?;
    assert_eq!(cached_bytes(&path)?, BLOCK_BYTES);
    drop(File::open(&path)?);
    assert_eq!(cached_bytes(&path)?, BLOCK_BYTES);
    Ok(())
}

/// A file can be mapped into memory.
#[test]
fn mapped_reads() -> Result<()> {
    requires!(Fuse);
    let sample = Sample::new()?;
    let mounted = sample.mount(&root(), &[])?;
    let content = relation(LARGE_BYTES, 1);
    for file in [File::open(mounted.join("data").join(LARGE))?, direct(&mounted.join("data").join(LARGE))?] {
        use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
        // SAFETY: a new mapping of a file that nobody can change; the slice does not outlive it.
        unsafe {
            let place = mmap(std::ptr::null_mut(), LARGE_BYTES, ProtFlags::READ, MapFlags::PRIVATE, &file, 0)?;
            let same = std::slice::from_raw_parts(place.cast::<u8>(), LARGE_BYTES) == content;
            munmap(place, LARGE_BYTES)?;
            assert!(same);
        }
    }
    Ok(())
}

/// The server holds no more decoded bytes than `--memory` says, however many files are read at once.
#[test]
fn memory() -> Result<()> {
    requires!(Fuse);
    const BUDGET: u64 = 8 << 20;
    /// The program, the manifest's chunks, and the buffers of the threads that answer: they do not grow with readers.
    const FIXED: u64 = 72 << 20;
    let sample = Sample::new()?;
    let mounted = sample.mount(&root(), &["--memory", "8MiB"])?;
    let path = mounted.join("data").join(LARGE);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..64)
            .map(|reader: u64| {
                let path = &path;
                scope.spawn(move || -> Result<()> {
                    let file = File::open(path)?;
                    let mut out = vec![0; 8192];
                    for step in 0..40_u64 {
                        file.read_exact_at(&mut out, (reader * 131_072 + step * 8192) % (LARGE_BYTES as u64 - 8192))?;
                    }
                    Ok(())
                })
            })
            .collect();
        readers.into_iter().try_for_each(|reader| reader.join().expect("a reader panicked"))
    })?;
    let status = fs::read_to_string(format!("/proc/{}/status", mounted.server()?))?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse::<u64>()? << 10;
    assert!(peak < BUDGET + FIXED, "{peak} bytes");
    Ok(())
}

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
        ("removexattr", errno_of(rustix::fs::removexattr(&mounted.mountpoint, TOKEN_ATTRIBUTE))),
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

/// The pack of the sample: with lz4 or without, there is one.
fn pack(sample: &Sample) -> Result<PathBuf> {
    let packs: Vec<_> = fs::read_dir(sample.repository.join("clusters/main/packs"))?.collect::<std::io::Result<_>>()?;
    ensure!(packs.len() == 1, "{packs:?}");
    Ok(packs[0].path())
}

/// Damages the stored run of one block of [`LARGE`]; tells the pack's file and the offset in it.
fn damage_block(sample: &Sample, block: u64) -> Result<(PathBuf, u64)> {
    use engine::format::block::Content;
    let repository = engine::repository::Repository::open(&sample.repository)?;
    let cluster = repository.cluster(&"main".parse().map_err(anyhow::Error::msg)?)?;
    let backup = cluster.backup(&sample.info.label)?;
    let file = backup.manifest.file(LARGE)?.context("no large file")?;
    let record = backup.manifest.block(engine::units::BlockNumber(file.first_block.0 + block))?;
    let Content::Stored { at, .. } = record.content else { bail!("block {block} is not stored whole") };
    let pack = pack(sample)?;
    flip_bit(&pack, u64::from(at.offset) + u64::from(at.stored) / 2)?;
    Ok((pack, at.offset.into()))
}

/// A block that cannot be read or is not what was backed up fails the reads that touch it with EIO, and no others; the
/// server's log names file, block, pack and offset, once.
#[test]
fn a_damaged_block() -> Result<()> {
    requires!(Fuse);
    const BLOCK: u64 = 40;
    let sample = Sample::new()?;
    let (pack, offset) = damage_block(&sample, BLOCK)?;
    let mounted = sample.mount(&root(), &[])?;
    let (path, content) = (mounted.join("data").join(LARGE), relation(LARGE_BYTES, 1));
    let mut page = vec![0; 8192];
    for file in [File::open(&path)?, direct(&path)?] {
        for start in (0..content.len() - page.len()).step_by(page.len()) {
            let outcome = file.read_exact_at(&mut page, start as u64);
            if start as u64 / BLOCK_BYTES == BLOCK {
                assert_eq!(errno(outcome), Some(libc::EIO), "at {start}");
            } else {
                outcome.with_context(|| format!("at {start}"))?;
                assert!(page[..] == content[start..start + page.len()], "at {start}");
            }
        }
    }
    let log = mounted.log()?;
    let lines: Vec<_> = log.lines().filter(|line| line.contains("ERROR")).collect();
    assert_eq!(lines.len(), 1, "{log}");
    let pack = pack.file_name().context("no name")?.to_string_lossy().into_owned();
    for part in [LARGE, &format!("block={BLOCK}"), &pack, &format!("at byte {offset}")] {
        assert!(lines[0].contains(part), "no \"{part}\" in {log}");
    }
    fs::read(mounted.join("data/base/5/16384.1"))?;
    Ok(())
}

/// With O_DIRECT a read that begins before such a block ends before it.
#[test]
fn a_read_that_meets_a_damaged_block() -> Result<()> {
    requires!(Fuse);
    const BLOCK: u64 = 11;
    let sample = Sample::new()?;
    damage_block(&sample, BLOCK)?;
    let mounted = sample.mount(&root(), &[])?;
    let file = direct(&mounted.join("data").join(LARGE))?;
    let (mut out, content) = (vec![0; 1 << 20], relation(LARGE_BYTES, 1));
    let (start, until) = (8 * BLOCK_BYTES, BLOCK * BLOCK_BYTES);
    let read = file.read_at(&mut out, start)?;
    assert_eq!(read as u64, until - start);
    assert!(out[..read] == content[usize::try_from(start)?..usize::try_from(until)?]);
    assert_eq!(errno(file.read_at(&mut out, until)), Some(libc::EIO));
    assert_eq!(file.read_at(&mut out, until + BLOCK_BYTES)?, out.len());
    Ok(())
}

/// A repository that goes away under the mount makes reads fail with EIO and not the server; once it is back they
/// succeed.
#[test]
fn a_repository_that_goes_away() -> Result<()> {
    requires!(Fuse);
    let sample = Sample::new()?;
    let mounted = sample.mount(&root(), &[])?;
    let file = direct(&mounted.join("data/base/5/16384.1"))?;
    let (pack, away) = (pack(&sample)?, sample.scratch.join("away"));
    // The server may have the pack open: what is cut off is gone for whoever has it open too.
    fs::copy(&pack, &away)?;
    fs::write(&pack, "")?;
    let mut out = vec![0; 1 << 20];
    assert_eq!(errno(file.read_at(&mut out, 0)), Some(libc::EIO));
    assert_eq!(errno(fs::read(mounted.join("data").join(LARGE))), Some(libc::EIO));
    fs::write(&pack, fs::read(&away)?)?;
    file.read_exact_at(&mut out, 0)?;
    assert!(out[..] == relation(3 << 20, 2)[..1 << 20]);
    Ok(())
}

/// Files that have no blocks, or only zeros, need no pack.
#[test]
fn zeros_and_nothing() -> Result<()> {
    requires!(Fuse);
    let sample = Sample::new()?;
    let mounted = sample.mount(&root(), &[])?;
    assert!(fs::read(mounted.join("data/base/5/zeros"))?.iter().all(|byte| *byte == 0));
    let found = tree(&mounted.join("data/base/5"))?;
    assert!(matches!(found.get(Path::new("empty")), Some(Entry::File { bytes: 0, .. })));
    Ok(())
}
