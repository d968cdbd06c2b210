//! The way of the bytes: chosen by the plan, forced by `--io`, and the same files whichever it is.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::support::compare::{Entry, same_trees, tree};
use crate::support::filesystem::SmallFileSystem;
use crate::support::repository::Damage;
use crate::support::*;

/// Files that say when and by which session a copy was made.
fn tells_of_the_copy(path: &Path) -> bool {
    path.to_string_lossy().contains("pghydrant")
}

/// The same of a copy from another repository, whose path stands in its `restore_command`.
fn tells_of_the_repository(path: &Path) -> bool {
    tells_of_the_copy(path) || path.ends_with("postgresql.auto.conf")
}

/// A world with one backup, and the files that a restore of it must give.
fn prepared(init: &[&str]) -> Result<(World, BTreeMap<PathBuf, Entry>)> {
    let world = World::with(2, init, &[])?;
    world.backup()?;
    world.cluster.archive_wal()?;
    world.cluster.stop("fast")?;
    let plain = ["--no-start", "--source", "blocks", "--io", "plain"];
    let finished = world.restore_to(&world.target(), &plain)?.expect_code(0)?;
    ensure!(told(&finished).contains("pread and pwrite on"), "{finished}");
    let expected = tree(&world.target())?;
    fs::remove_dir_all(world.target())?;
    Ok((world, expected))
}

/// Everything that a command said.
fn told(finished: &Finished) -> String {
    format!("{}{}", finished.stdout, finished.stderr)
}

/// A copy of the world's repository at `to`, and a restore from it.
struct Moved<'a> {
    world: &'a World,
    repository: PathBuf,
}

impl<'a> Moved<'a> {
    fn to(world: &'a World, to: &Path) -> Result<Self> {
        let repository = to.join("repository");
        Run::new("cp").args(["-a", "--reflink=never"]).arg(world.repository.path()).arg(&repository).succeed()?;
        Ok(Self { world, repository })
    }

    fn restore(&self, to: &Path, arguments: &[&str]) -> Result<Finished> {
        let (repository, to) = (self.repository.display().to_string(), to.display().to_string());
        let own = ["restore", "--repo", &repository, "--cluster", "main", "--to", &to];
        self.world.pghydrant.run([&own[..], arguments].concat())
    }

    fn pack(&self) -> Result<PathBuf> {
        let packs = fs::read_dir(self.repository.join("clusters/main/packs"))?;
        let paths = packs.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
        paths.into_iter().max_by_key(|path| fs::metadata(path).map_or(0, |found| found.len())).context("no pack")
    }
}

fn free_bytes(path: &Path) -> Result<u64> {
    Run::new("sync").arg("--file-system").arg(path).succeed()?;
    let room = rustix::fs::statvfs(path)?;
    Ok(room.f_bfree * room.f_frsize)
}

fn shares_with_its_repository(kind: &str, mebibytes: u64) -> Result<()> {
    let (world, expected) = prepared(&["--compression", "none"])?;
    let disk = SmallFileSystem::mount(&world.scratch, kind, kind, mebibytes)?;
    let moved = Moved::to(&world, disk.path())?;
    let target = disk.path().join("restored");
    let data_bytes: u64 =
        expected.values().map(|entry| if let Entry::File { bytes, .. } = entry { *bytes } else { 0 }).sum();

    let plan = moved.restore(&target, &["--no-start", "--plan", "--json"])?.expect_code(0)?.json()?;
    assert_eq!((&plan["plan"]["io"], &plan["plan"]["source"]), (&"reflink".into(), &"blocks".into()), "{plan}");
    ensure!(!target.exists(), "--plan has made it");

    // What is damaged is found before a server could start, and mended by a retry.
    let pack = moved.pack()?;
    let mend = Damage::BitFlipped.inflict(&pack)?;
    let damaged = moved.restore(&target, &["--no-start"])?.expect_code(4)?;
    ensure!(damaged.stderr.contains(&pack.display().to_string()), "{damaged}");
    ensure!(!target.join("global/pg_control").exists(), "it could be started\n{damaged}");
    let believed = disk.path().join("believed");
    let trusting = ["--no-start", "--io", "reflink", "--trust-repository"];
    let planned = moved.restore(&believed, &[&trusting[..], &["--plan"]].concat())?.expect_code(0)?;
    ensure!(planned.stdout.contains("not hashed (--trust-repository)"), "{planned}");
    let finished = moved.restore(&believed, &trusting)?.expect_code(0)?;
    ensure!(told(&finished).contains("not hashed (--trust-repository)"), "{finished}");
    fs::remove_dir_all(&believed)?;
    let away = disk.path().join("moved.pack");
    fs::rename(&pack, &away)?;
    std::os::unix::fs::symlink(&away, &pack)?;
    let linked = moved.restore(&believed, &["--no-start", "--plan", "--json"])?.expect_code(0)?.json()?;
    assert_eq!(linked["plan"]["io"], "uring", "{linked}");
    fs::rename(&away, &pack)?;
    drop(mend);
    let before = free_bytes(disk.path())?;
    let retried = world.pghydrant.run(["retry", &open_session(&world.pghydrant)?])?.expect_code(0)?;
    same_trees(&expected, &tree(&target)?, tells_of_the_repository).with_context(|| format!("{retried}"))?;
    fs::remove_dir_all(&target)?;

    // A whole one shares nearly all: what it takes is the WAL, the ends of files, and the file system's own.
    let after = before.max(free_bytes(disk.path())?);
    let finished = moved.restore(&target, &["--no-start"])?.expect_code(0)?;
    ensure!(told(&finished).contains("shared with the repository, hashed"), "{finished}");
    same_trees(&expected, &tree(&target)?, tells_of_the_repository).with_context(|| format!("{finished}"))?;
    let taken = after.saturating_sub(free_bytes(disk.path())?);
    let wal_bytes = 16 << 20;
    ensure!(taken < data_bytes / 2 + 2 * wal_bytes, "{taken} bytes are taken for {data_bytes}\n{finished}");
    fs::remove_dir_all(&target)?;

    // And what the server changes is its own.
    let packed = fs::read(&pack)?;
    let port = cluster::free_port()?.to_string();
    let finished = moved.restore(&target, &["--port", &port])?.expect_code(0)?;
    let instance = Instance::running_in(&target)?;
    instance.sql("UPDATE pgbench_accounts SET abalance = aid")?;
    instance.sql("CHECKPOINT")?;
    instance.stop("fast")?;
    ensure!(fs::read(&pack)? == packed, "the server has written into the repository\n{finished}");
    if kind == "btrfs" {
        refuses_where_copy_on_write_is_off(&moved, disk.path(), &expected)?;
    }
    Ok(())
}

fn refuses_where_copy_on_write_is_off(
    moved: &Moved<'_>,
    disk: &Path,
    expected: &BTreeMap<PathBuf, Entry>,
) -> Result<()> {
    let target = disk.join("without");
    fs::create_dir(&target)?;
    let user = OsUser::server();
    std::os::unix::fs::chown(&target, Some(user.uid), Some(user.gid))?;
    Run::new("chattr").arg("+C").arg(&target).succeed()?;
    let refused = moved.restore(&target, &["--no-start", "--io", "reflink"])?.expect_code(3)?;
    ensure!(refused.stderr.contains("chattr +C"), "{refused}");
    let finished = moved.restore(&target, &["--no-start", "--source", "blocks"])?.expect_code(0)?;
    ensure!(!told(&finished).contains("shared with the repository"), "{finished}");
    same_trees(expected, &tree(&target)?, tells_of_the_repository).with_context(|| format!("{finished}"))
}

#[test]
fn files_share_raw_blocks_with_the_repository_on_xfs() -> Result<()> {
    requires!(Postgres, LoopDevice, Tool("mkfs.xfs", "xfsprogs"));
    shares_with_its_repository("xfs", 700)
}

#[test]
fn files_share_raw_blocks_with_the_repository_on_btrfs() -> Result<()> {
    requires!(Postgres, LoopDevice, Tool("mkfs.btrfs", "btrfs-progs"));
    shares_with_its_repository("btrfs", 900)
}

#[test]
fn a_way_that_is_forced_and_cannot_be_taken_is_refused_with_the_reason() -> Result<()> {
    requires!(Postgres);
    let world = World::new(0)?;
    world.backup()?;
    let refused = |arguments: &[&str], parts: &[&str]| -> Result<()> {
        let finished = world.restore_to(&world.target(), &[&["--no-start"], arguments].concat())?;
        finished.expect_code(3)?.expect_stderr(&[&["error: ", "hint: "], parts].concat())?;
        ensure!(!world.target().exists(), "the target was touched");
        Ok(())
    };
    refused(&["--io", "reflink"], &["no blocks can be shared", "compressed (lz4)"])?;
    refused(&["--io", "reflink", "--source", "mount"], &["--source mount"])?;
    let trusting = ["--no-start", "--source", "blocks", "--trust-repository", "--plan"];
    let finished = world.restore_to(&world.target(), &trusting)?.expect_code(0)?;
    ensure!(finished.stderr.contains("--trust-repository changes nothing"), "{finished}");
    Ok(())
}

/// Takes something away from a process, by a filter or a switch of its own, and becomes the program behind it.
const WITHOUT: &str = r#"
import ctypes, os, struct, sys
libc = ctypes.CDLL(None)
def prctl(*numbers):
    assert libc.prctl(*[ctypes.c_ulong(number) for number in numbers]) == 0
if sys.argv[1] == "io_uring":
    # load the number of the call; io_uring_setup is not permitted, all else is allowed
    code = [(0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    program = ctypes.create_string_buffer(struct.pack("HP", 4, ctypes.addressof(code)))
    prctl(38, 1, 0, 0, 0)
    prctl(22, 2, ctypes.addressof(program), 0, 0)
else:
    prctl(41, 1, 0, 0, 0)
os.execv(sys.argv[2], sys.argv[2:])
"#;

#[test]
fn what_a_machine_lacks_is_told_and_the_files_are_the_same() -> Result<()> {
    requires!(Root, Postgres, LoopDevice, Tool("python3", "python3"), Tool("mkfs.ext3", "e2fsprogs"));
    let (world, expected) = prepared(&[])?;
    let disk = SmallFileSystem::mount(&world.scratch, "old", "ext3", 300)?;
    let target = disk.path().join("restored");
    let to = target.display().to_string();
    let binary = world.pghydrant.binary.display().to_string();
    let run = |wrapper: &[&str], arguments: &[&str]| {
        let own = ["--to", &to, "--no-start", "--source", "blocks"];
        let arguments = world.repository.arguments(&["restore"], &[&own, arguments].concat());
        let (program, before) = wrapper.split_first().context("no wrapper")?;
        world.pghydrant.command_of(program).args(before).arg(&binary).args(arguments).finish()
    };
    let without_io_uring = ["python3", "-c", WITHOUT, "io_uring"];
    // Since Linux 6.14 rings count as locked memory as well.
    let unlocked: &[&str] = &["buffers not registered (locked-memory limit)", "limit has no room for its rings"];
    let cases: [(&[&str], &[&[&str]]); 3] = [
        (&without_io_uring, &[&["io_uring cannot be used"], &["pread and pwrite on"]]),
        (&["python3", "-c", WITHOUT, "huge pages"], &[&["4 KiB pages"]]),
        (&["prlimit", "--memlock=0:0"], &[unlocked]),
    ];
    for (wrapper, parts) in cases {
        let finished = run(wrapper, &[])?.expect_code(0)?;
        for part in parts.iter().chain(&[&["space not allocated beforehand"][..]]) {
            let told: usize = part.iter().map(|words| finished.stderr.matches(words).count()).sum();
            assert_eq!(told, 1, "{part:?}: {finished}");
        }
        same_trees(&expected, &tree(&target)?, tells_of_the_copy).with_context(|| format!("{finished}"))?;
        fs::remove_dir_all(&target)?;
    }
    run(&without_io_uring, &["--io", "uring"])?
        .expect_code(3)?
        .expect_stderr(&["io_uring cannot be used", "hint: "])?;
    let doctor = world.pghydrant.command_of("python3").args(["-c", WITHOUT, "io_uring"]).arg(&binary).arg("doctor");
    let told = doctor.finish()?;
    ensure!(told.stdout.contains("refuses it; the copier uses threads instead"), "{told}");
    Ok(())
}
