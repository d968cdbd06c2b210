//! `backup --from` a stream or files of tar: what `pg_basebackup -Ft` made becomes a backup, read once and never laid down.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Signal;

use crate::support::compare::{same_trees, tree};
use crate::support::process::wait_until;
use crate::support::repository::flip_bit;
use crate::support::tools::postgres_program;
use crate::support::*;

/// `pg_basebackup -D - -Ft ARGUMENTS`, for a shell.
fn stream(world: &World, arguments: &str) -> Result<String> {
    let Instance { sockets, port, .. } = &*world.cluster;
    let program = postgres_program("pg_basebackup")?;
    let (program, sockets) = (program.display(), sockets.display());
    Ok(format!("'{program}' -h '{sockets}' -p {port} -U postgres --checkpoint=fast --no-password -D - -Ft {arguments}"))
}

/// Runs `script` as the server's user, with what `pghydrant` is to be told in the environment.
fn shell(world: &World, script: &str) -> Run {
    world.pghydrant.command_of("bash").args(["-c", &format!("set -o pipefail; {script}")])
}

/// `backup ... --from FROM`, for a shell.
fn adopting(world: &World, repository: &Repository, from: &str, arguments: &str) -> String {
    let (program, repository) = (world.pghydrant.binary.display(), repository.shown());
    format!("'{program}' backup --repo '{repository}' --cluster main --from {from} {arguments}")
}

/// The stream in a file of the server's user.
fn save(world: &World, name: &str, arguments: &str) -> Result<PathBuf> {
    let path = world.scratch.join(name);
    shell(world, &format!("{} > '{}'", stream(world, arguments)?, path.display())).succeed()?;
    Ok(path)
}

fn adopt(repository: &Repository, from: &Path) -> Vec<String> {
    let from = from.display().to_string();
    repository.arguments(&["backup"], &["--from", &from])
}

/// Adopts it; the result of `--json`.
fn adopted(repository: &Repository, from: &Path) -> Result<serde_json::Value> {
    let arguments = [adopt(repository, from), vec!["--json".to_owned()]].concat();
    repository.pghydrant.succeed(arguments)?.json()
}

fn another_repository(world: &World, name: &str) -> Result<Repository> {
    Repository::init_at(&world.scratch.join(name), &world.pghydrant, &[])
}

/// No cluster, no backup: nothing that counts.
fn is_empty(repository: &Repository) -> Result<()> {
    let list = repository.pghydrant.succeed(["list", "--repo", &repository.shown()])?;
    ensure!(!list.stdout.contains("Z-") && !list.stdout.contains("cluster main"), "{list}");
    Ok(())
}

#[test]
fn the_stream_of_a_busy_server_becomes_a_backup_and_the_next_goes_on_from_it() -> Result<()> {
    requires!(Postgres);
    let world = World::new(1)?;
    world.mark("before")?;
    let load = world.cluster.pgbench_load()?;
    let pipe =
        format!("{} | {}", stream(&world, "--wal-method=none")?, adopting(&world, &world.repository, "-", "--json"));
    let first = shell(&world, &pipe).succeed()?.json()?;
    drop(load);
    assert_eq!(first["parent"], serde_json::Value::Null);
    ensure!(first["wal_origin"] == "archive", "{first}");
    world.mark("a")?;
    world.cluster.archive_wal()?;
    let restored = world.restore(&[])?;
    assert_eq!(marks(&restored)?, "a,before");
    let balance = "SELECT sum(abalance) = (SELECT sum(delta) FROM pgbench_history) FROM pgbench_accounts";
    ensure!(restored.sql(balance)? == "t", "the balances are wrong");
    restored.check_relations()?;
    drop(restored);
    fs::remove_dir_all(world.target())?;

    // Unchanged blocks are the parent's, whoever made the backups, and digests are those of what was stored.
    let second = world.backup()?;
    assert_eq!(second["parent"], first["label"]);
    for (digest, compress) in [("SHA256", "client-gzip:1"), ("SHA512", "client-lz4"), ("NONE", "client-zstd")] {
        let options = format!("--wal-method=none --manifest-checksums={digest} --compress={compress}");
        let pipe = format!("{} | {}", stream(&world, &options)?, adopting(&world, &world.repository, "-", "--json"));
        let next = shell(&world, &pipe).succeed()?.json()?;
        let number = |pointer: &str| next.pointer(pointer).and_then(serde_json::Value::as_u64).context("no number");
        let (all, shared) = (number("/totals/bytes")?, number("/totals/shared_bytes")?);
        ensure!(shared * 10 > all * 9, "{compress}: {shared} of {all} bytes are shared");
    }
    world.restore_to(&world.target(), &["--no-start"])?.expect_code(0)?;
    world.cluster.client("pg_verifybackup")?.arg(world.target()).succeed()?;
    world.pghydrant.succeed(["verify", "--repo", &world.repository.shown()])?;
    Ok(())
}

/// What a clone streams has the names of what its original has archived, and other WAL in it.
#[test]
fn a_tar_with_the_wal_of_another_history_is_refused() -> Result<()> {
    requires!(Postgres);
    let world = World::new(0)?;
    let saved = save(&world, "base.tar", "--wal-method=fetch")?;
    world.cluster.archive_wal()?;
    // The archive as it would be, had another server sent the segment.
    let segment =
        shell(&world, &format!("tar -tf '{}' | grep '^pg_wal/0*[0-9A-F]\\{{24\\}}$' | tail -n 1", saved.display()));
    let segment = segment.succeed()?.stdout.trim().trim_start_matches("pg_wal/").to_owned();
    let archived = world.repository.wal().join(&segment);
    let other = world.scratch.join(&segment);
    let shown = other.display().to_string();
    world.pghydrant.succeed(world.repository.arguments(&["wal", "fetch"], &[&segment, &shown]))?;
    flip_bit(&other, 60)?;
    fs::remove_file(&archived)?;
    world.pghydrant.succeed(world.repository.arguments(&["wal", "push"], &[&shown]))?;
    world.pghydrant.fail(adopt(&world.repository, &saved), 3, &[&segment, "another history", "hint: "])?;
    let list = world.pghydrant.succeed(world.repository.arguments(&["list"], &["--json"]))?.stdout;
    ensure!(!list.contains("\"event\":\"backup\""), "{list}");
    Ok(())
}

#[test]
fn tar_files_restore_to_the_same_as_the_plain_directory_that_they_unpack_to() -> Result<()> {
    requires!(Postgres);
    let world = World::new(0)?;
    let place = world.scratch.directory("space")?;
    world.cluster.sql(&format!("CREATE TABLESPACE space LOCATION '{}'", place.display()))?;
    world.cluster.sql("CREATE TABLE far TABLESPACE space AS SELECT generate_series(1, 1000) AS n")?;
    world
        .cluster
        .sql("CREATE TABLE large AS SELECT n, repeat(md5(n::text), 20) FROM generate_series(1, 60000) AS n")?;
    world.cluster.sql("CREATE UNLOGGED TABLE unlogged AS SELECT generate_series(1, 1000) AS n")?;
    let oid = world.cluster.sql("SELECT oid FROM pg_tablespace WHERE spcname = 'space'")?;
    let tars = world.scratch.join("tars");
    let base_backup =
        world.cluster.client("pg_basebackup")?.args(["--checkpoint=fast", "--no-sync", "-Ft", "-z", "-D"]);
    base_backup.arg(&tars).succeed()?;

    // What a DBA would do by hand with them.
    let plain = world.scratch.directory("plain")?;
    let far = world.scratch.directory("far")?;
    for (tar, directory) in [("base", plain.clone()), (oid.as_str(), far.clone()), ("pg_wal", plain.join("pg_wal"))] {
        let tar = tars.join(format!("{tar}.tar.gz"));
        Run::new("tar").user(OsUser::server()).arg("-xpf").arg(&tar).arg("-C").arg(&directory).succeed()?;
    }
    let list = tars.join("backup_manifest");
    Run::new("cp").user(OsUser::server()).arg("-p").arg(&list).arg(&plain).succeed()?;
    let link = plain.join("pg_tblspc").join(&oid);
    symlink(&far, &link)?;
    std::os::unix::fs::lchown(&link, Some(OsUser::server().uid), Some(OsUser::server().gid))?;

    let mut trees = Vec::new();
    // The directory, and its base alone, in another compression: the others are found beside it.
    for (name, from) in [("plain", plain.clone()), ("tars", tars.clone()), ("base", tars.join("base.tar"))] {
        if name == "base" {
            Run::new("gunzip").user(OsUser::server()).arg(tars.join("base.tar.gz")).succeed()?;
        }
        let repository = another_repository(&world, &format!("repo-{name}"))?;
        let adopted = adopted(&repository, &from)?;
        ensure!(adopted["wal_origin"] == "directory", "{adopted}");
        let [to, space] = ["restored", "space"].map(|what| world.scratch.join(&format!("{what}-{name}")));
        let remap = format!("{oid}={}", space.display());
        repository.restore(&to, &["--no-start", "--tablespace", &remap])?.expect_code(0)?;
        let server = world.cluster.client("pg_verifybackup")?.arg(&to).finish()?;
        ensure!(server.code == Some(0), "{server}");
        trees.push((tree(&to)?, tree(&space)?));
        if name == "base" {
            repository.pghydrant.succeed(["verify", "--repo", &repository.shown()])?;
            let instance = Instance { data: to, port: cluster::free_port()?, sockets: world.cluster.sockets.clone() };
            instance.configure(&format!("port = {}", instance.port))?;
            instance.start()?;
            let count = "SELECT (SELECT count(*) FROM far) + (SELECT count(*) FROM large)";
            assert_eq!(instance.number(count)?, 61_000);
        }
    }
    // What a restore writes itself differs from one to the next.
    let own = |path: &Path| {
        let path = path.to_string_lossy();
        path == "backup_manifest"
            || path.starts_with("pg_tblspc/")
            || path.contains("pghydrant")
            || path == "postgresql.auto.conf"
    };
    let (plain, others) = trees.split_first().context("nothing was restored")?;
    for (restored, space) in others {
        same_trees(&plain.0, restored, own)?;
        same_trees(&plain.1, space, |_| false)?;
        ensure!(plain.0.len() > 900 && plain.1.len() > 2, "the trees are too small to prove anything");
    }

    // Files that are missing beside the base, and two for one.
    let repository = another_repository(&world, "empty")?;
    let refused = |parts: &[&str]| world.pghydrant.fail(adopt(&repository, &tars), 3, parts);
    let hide = |name: &str| fs::rename(tars.join(name), tars.join("hidden"));
    let tablespace = format!("{oid}.tar.gz");
    hide(&tablespace)?;
    refused(&[&format!("tablespace {oid}"), &format!("{oid}.tar beside it")])?;
    fs::rename(tars.join("hidden"), tars.join(&tablespace))?;
    hide("pg_wal.tar.gz")?;
    refused(&["WAL segment 0000000100000000", "neither in the archive nor in its pg_wal"])?;
    fs::rename(tars.join("hidden"), tars.join("pg_wal.tar.gz"))?;
    hide("backup_manifest")?;
    refused(&["has no backup_manifest"])?;
    fs::rename(tars.join("hidden"), tars.join("backup_manifest"))?;
    fs::write(tars.join("base.tar.zst"), "")?;
    refused(&["are both there"])?;
    is_empty(&repository)
}

#[test]
fn a_stream_that_brings_its_wal_needs_no_archive_and_one_that_was_cut_or_changed_leaves_nothing() -> Result<()> {
    requires!(Postgres);
    let world = World::new(0)?;
    world.mark("before")?;
    let path = save(&world, "whole.tar", "--wal-method=fetch")?;
    let whole = fs::read(&path)?;
    let repository = another_repository(&world, "empty")?;
    let changed = world.scratch.join("changed.tar");
    let refused = |bytes: &[u8], code: i32, parts: &[&str]| -> Result<()> {
        fs::write(&changed, bytes)?;
        world.pghydrant.fail(adopt(&repository, &changed), code, parts)?;
        is_empty(&repository)
    };
    let place_of = |wanted: &str| -> Result<usize> {
        let mut archive = tar::Archive::new(whole.as_slice());
        for entry in archive.entries()?.raw(true) {
            let entry = entry?;
            if *entry.path_bytes() == *wanted.as_bytes() {
                return Ok(usize::try_from(entry.raw_file_position())?);
            }
        }
        bail!("no {wanted}")
    };
    let (in_table, in_list) = (place_of("global/1260")?, place_of("backup_manifest")?);

    for cut in [0, 100, 512, in_table + 4000, in_table + 8192, in_list - 512, in_list + 1000, whole.len() - 1024] {
        refused(&whole[..cut], 1, &["ends early", "nothing was taken over"])?;
    }
    // A whole tar without its list, and one that goes on.
    refused(&[&whole[..in_list - 512], &[0; 1024]].concat(), 3, &["has no backup_manifest"])?;
    refused(&[whole.as_slice(), b"more"].concat(), 3, &["something follows behind its end"])?;
    let flipped = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        bytes
    };
    refused(&flipped(in_table + 5000), 1, &["global/1260 has another checksum than backup_manifest says"])?;
    refused(&flipped(in_table - 512), 1, &["is damaged"])?;
    refused(&flipped(in_list + 300), 3, &["backup_manifest cannot be used", "its own checksum is wrong"])?;
    refused(&flipped(place_of("global/pg_control")? + 40), 3, &["global/pg_control is not a control file"])?;
    refused(
        &b"no tar at all, but words. ".repeat(30),
        3,
        &["is no tar of a base backup", "it does not begin like one"],
    )?;
    refused(b"\xFD7zXZ\0\0\0", 3, &["compressed with xz"])?;

    // A list that a later PostgreSQL wrote.
    let list = String::from_utf8(whole[in_list..].split(|byte| *byte == 0).next().unwrap_or_default().to_vec())?;
    let end = list.find("\"Manifest-Checksum\"").context("no checksum")?;
    let newer = list[..end].replacen("Manifest-Version\": 1", "Manifest-Version\": 9", 1);
    let digest = <sha2::Sha256 as sha2::Digest>::digest(newer.as_bytes());
    let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    let newer = format!("{newer}\"Manifest-Checksum\": \"{digest}\"}}\n");
    let mut bytes = whole.clone();
    bytes[in_list..in_list + newer.len()].copy_from_slice(newer.as_bytes());
    refused(&bytes, 3, &["its version is 9, and 1 and 2 are known"])?;

    // The one as it was made is a backup of a cluster that the repository has not heard of.
    let from = format!("- < '{}'", path.display());
    let adopted = shell(&world, &adopting(&world, &repository, &from, "--json")).succeed()?.json()?;
    ensure!(adopted["wal_origin"] == "directory", "{adopted}");
    let to = world.scratch.join("restored");
    repository.restore(&to, &["--port", &cluster::free_port()?.to_string()])?.expect_code(0)?;
    assert_eq!(marks(&Instance::running_in(&to)?)?, "before");
    world.pghydrant.succeed(["verify", "--repo", &repository.shown()])?;

    // And of no other cluster.
    let stranger =
        Cluster::build(&world.scratch, "stranger").archive_to(&world.pghydrant, &repository, "main").start()?;
    let base = world.scratch.join("strangers");
    stranger.client("pg_basebackup")?.args(["--checkpoint=fast", "-Ft", "-D"]).arg(&base).succeed()?;
    world.pghydrant.fail(adopt(&repository, &base), 3, &["system identifier", "it is another cluster"])?;
    let list = world.pghydrant.succeed(repository.arguments(&["list"], &[]))?;
    assert_eq!(list.stdout.matches("Z-F").count(), 1, "{list}");
    Ok(())
}

/// A header of PostgreSQL's kind.
fn header(path: &[u8], kind: u8, size: u64) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    header.as_old_mut().name[..path.len()].copy_from_slice(path);
    header.set_entry_type(tar::EntryType::new(kind));
    header.set_mode(0o600);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1_700_000_000);
    header.set_size(size);
    if kind == b'1' || kind == b'2' {
        header.as_old_mut().linkname[..11].copy_from_slice(b"/etc/passwd");
    }
    header.set_cksum();
    header
}

#[test]
fn hostile_tars_are_refused_by_name() -> Result<()> {
    requires!(Postgres);
    let world = World::new(0)?;
    let whole = fs::read(save(&world, "whole.tar", "--wal-method=fetch")?)?;
    let members = &whole[..whole.len() - 1024];
    ensure!(whole[members.len()..].iter().all(|byte| *byte == 0), "the tar ends in another way");
    let repository = another_repository(&world, "empty")?;
    let hostile = world.scratch.join("hostile.tar");
    let refused = |member: tar::Header, code: i32, part: &str| -> Result<()> {
        // Behind all that is good, so that nothing else is wrong.
        fs::write(&hostile, [members, member.as_bytes(), &[0; 1024]].concat())?;
        world.pghydrant.fail(adopt(&repository, &hostile), code, &[part])?;
        is_empty(&repository)
    };
    let file = |path: &str| header(path.as_bytes(), b'0', 0);
    refused(file("/etc/cron.d/evil"), 3, "is absolute")?;
    refused(file("base/../../evil"), 3, "names a directory relative to another")?;
    refused(file("base//evil"), 3, "has an empty component")?;
    refused(header(b"base/\xFFevil", b'0', 0), 3, "not UTF-8")?;
    refused(header(b"evil", b'1', 0), 3, "\"evil\" is a hard link")?;
    refused(header(b"evil", b'2', 0), 3, "\"evil\" is a link")?;
    refused(header(b"evil", b'3', 0), 3, "\"evil\" is a device")?;
    refused(header(b"evil", b'6', 0), 3, "\"evil\" is a device or a pipe")?;
    refused(header(b"././@LongLink", b'L', 100), 3, "is of kind 'L'")?;
    refused(header(b"PaxHeader", b'x', 100), 3, "is of kind 'x'")?;
    refused(header(b"evil/", b'5', 100), 3, "has a size of 100 bytes")?;
    refused(header(b"base/1/4711", b'0', u64::MAX), 1, "size overflow")?;
    refused(header(b"base/1/4711", b'0', 1 << 40), 1, "cannot take over base/1/4711")?;
    refused(header(b"postgresql.conf.d", b'0', 1 << 62), 1, "ends early")?;
    refused(file("PG_VERSION"), 3, "has PG_VERSION twice")?;
    refused(file("global/1260"), 3, "has global/1260 twice")?;
    refused(file("global/1260/below"), 3, "but not the directory that it lies in")?;
    refused(file("nowhere/1"), 3, "but not the directory that it lies in")?;
    refused(file("base/1/4711"), 3, "base/1/4711 is not in backup_manifest")?;
    refused(file("base/1/INCREMENTAL.1260"), 3, "is an incremental base backup")?;
    refused(header(b"pg_tblspc/16400/", b'2', 0), 3, "there is no 16400.tar beside it")?;
    Ok(())
}

#[test]
fn a_backup_of_a_stream_that_was_interrupted_or_killed_counts_for_nothing() -> Result<()> {
    requires!(Postgres);
    let world = World::new(0)?;
    let whole = save(&world, "whole.tar", "--wal-method=fetch")?;
    let bytes = fs::read(&whole)?;
    let scratch = world.scratch.directory("tmp")?;
    let pghydrant = world.pghydrant.env("TMPDIR", scratch.display().to_string());
    let repository = another_repository(&world, "empty")?.with(&pghydrant);
    let fifo = world.scratch.join("fifo");
    Run::new("mkfifo").user(OsUser::server()).arg(&fifo).succeed()?;
    fs::set_permissions(&fifo, fs::Permissions::from_mode(0o666))?;
    for signal in [Signal::INT, Signal::KILL] {
        let mut running = pghydrant.command(adopt(&repository, &fifo)).start()?;
        // Half of the stream, and then it stays open without a word.
        let mut pipe = fs::OpenOptions::new().write(true).open(&fifo)?;
        pipe.write_all(&bytes[..bytes.len() / 2])?;
        running.signal(signal)?;
        wait_until("the backup's end", Duration::from_secs(60), || Ok(running.try_status()?.is_some()))?;
        let finished = running.wait()?;
        match signal {
            Signal::INT => drop(finished.expect_code(130)?),
            _ => ensure!(finished.signal == Some(Signal::KILL.as_raw()), "{finished}"),
        }
        drop(pipe);
        is_empty(&repository)?;
    }
    // The next one sweeps what they left.
    let adopted = adopted(&repository, &whole)?;
    world.pghydrant.succeed(["verify", "--repo", &repository.shown()])?;
    let packs = repository.files()?.into_iter().filter(|path| path.extension().is_some_and(|it| it == "pack")).count();
    ensure!(packs <= 64 && adopted["label"].is_string(), "{packs} packs");
    let marks = repository.files()?.into_iter().filter(|path| path.to_string_lossy().ends_with(".unfinished")).count();
    assert_eq!(marks, 0);
    assert_eq!(fs::read_dir(&scratch)?.count(), 0);
    Ok(())
}

#[test]
fn pages_that_were_damaged_at_the_source_are_named_and_those_without_checksums_are_not() -> Result<()> {
    requires!(Postgres);
    let world = World::new(0)?;
    world.cluster.sql("CREATE TABLE damaged AS SELECT n, repeat('x', 100) FROM generate_series(1, 1000) AS n")?;
    let path = world.cluster.sql("SELECT pg_relation_filepath('damaged')")?;
    world.cluster.stop("fast")?;
    flip_bit(&world.cluster.data.join(&path), 3 * 8192 + 5000)?;
    world.cluster.start()?;
    let pipe = |arguments: &str| -> Result<Finished> {
        let stream = stream(&world, "--wal-method=fetch --no-verify-checksums")?;
        shell(&world, &format!("{stream} | {}", adopting(&world, &world.repository, "-", arguments))).finish()
    };
    pipe("--full")?.expect_code(7)?.expect_stderr(&[&format!("{path} page 3 (stored ")])?;
    world.cluster.stop("fast")?;
    let checksums = Run::new(postgres_program("pg_checksums")?).user(OsUser::server()).args(["--disable", "--no-sync"]);
    checksums.arg(&world.cluster.data).succeed()?;
    world.cluster.start()?;
    pipe("")?.expect_code(0)?;
    Ok(())
}
