//! How mounts come and go: asked to, killed, and in use.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use fusefs::backup_fs::{BackupFs, View};
use fusefs::mounting::{self, MountOptions};
use fusefs::session::Session;
use fusefs::table::{self, Health};
use rustix::process::{Pid, Signal, kill_process};

use super::guard::{Mounted, errno, runs};
use super::sample::{LARGE, LARGE_BYTES, Sample, relation};
use crate::support::process::wait_until;
use crate::support::*;

const SOON: Duration = Duration::from_secs(30);

fn signal(process: u32, signal: Signal) -> Result<()> {
    let pid = i32::try_from(process).ok().and_then(Pid::from_raw).context("no process")?;
    Ok(kill_process(pid, signal)?)
}

fn users() -> Vec<OsUser> {
    let (own, server) = (OsUser::current(), OsUser::server().clone());
    if own.uid == server.uid { vec![own] } else { vec![own, server] }
}

/// `mount` returns when the mount answers, and tells the server's own reason when it does not.
#[test]
fn mount_waits() -> Result<()> {
    requires!(Fuse);
    let sample = Sample::new()?;
    for user in users() {
        let mounted = sample.mount(&user, &[])?;
        let version = Run::new("cat").arg(mounted.join("data/PG_VERSION")).user(&user).succeed()?;
        assert_eq!(version.stdout, "15\n");
        assert!(runs(mounted.server_as(&user)?));
    }
    let user = OsUser::server();
    let (pghydrant, mountpoint) = (sample.pghydrant(user), sample.mountpoint(user)?);
    let unknown = sample.mount_arguments(&mountpoint, &["--backup", "20200101T000000Z-F"]);
    pghydrant.fail(unknown, 1, &["has no backup 20200101T000000Z-F", sample.info.label.as_str()])?;
    // The manifest is what only the server reads.
    let manifest = sample.repository.join(format!("clusters/main/manifests/{}.manifest", sample.info.label));
    fs::write(&manifest, "")?;
    let arguments = sample.mount_arguments(&mountpoint, &[]);
    pghydrant.fail(arguments, 4, &["is corrupt", &manifest.display().to_string()])?;
    assert_eq!(table::mount_at(&mountpoint)?, None);
    Ok(())
}

/// `mount` refuses a directory that is not empty or where something is mounted already.
#[test]
fn mount_refuses() -> Result<()> {
    requires!(Fuse);
    let sample = Sample::new()?;
    let user = OsUser::current();
    let mounted = sample.mount(&user, &[])?;
    let pghydrant = sample.pghydrant(&user);
    let again = sample.mount_arguments(&mounted.mountpoint, &[]);
    pghydrant.fail(again, 1, &["is in use: pghydrant:main/", "is mounted there"])?;
    let full = sample.scratch.directory("full")?;
    fs::write(full.join("file"), "")?;
    pghydrant.fail(sample.mount_arguments(&full, &[]), 1, &["is not empty: it has file"])?;
    let absent = sample.scratch.join("absent");
    pghydrant.fail(sample.mount_arguments(&absent, &[]), 1, &["cannot read directory", "no such file"])?;
    assert_eq!(fs::read(mounted.join("data/PG_VERSION"))?, b"15\n");
    Ok(())
}

/// `unmount` returns when the server has ended; a mount that is in use it leaves in place, and names who uses it; what is
/// no mount of pghydrant it refuses.
#[test]
fn unmount_waits() -> Result<()> {
    requires!(Fuse);
    let sample = Sample::new()?;
    for user in users() {
        let mounted = sample.mount(&user, &[])?;
        let server = mounted.server_as(&user)?;
        let mut holder = Run::new("sleep").arg("60").current_dir(mounted.mountpoint.join("data"));
        // As a process of that user; its directory is on the mount.
        holder = holder.user(&user);
        let holder = holder.start()?;
        mounted.unmount()?.expect_code(1)?.expect_stderr(&["busy", &format!("in use by sleep ({})", holder.pid())])?;
        assert!(mounted.is_mounted());
        drop(holder);
        mounted.unmount()?.expect_code(0)?;
        assert!(!runs(server) && !mounted.is_mounted());
        mounted.unmount()?.expect_code(1)?.expect_stderr(&["is not a mount of pghydrant"])?;
    }
    let pghydrant = sample.pghydrant(&OsUser::current());
    pghydrant.fail(["unmount", "/proc"], 1, &["/proc is a mount of type proc, not one of pghydrant"])?;
    Ok(())
}

/// A server that is killed leaves its readers with an error and never waiting; `unmount` takes such a mount away, and so
/// does the next `mount` at the same place.
#[test]
fn a_killed_server() -> Result<()> {
    requires!(Fuse);
    let sample = Sample::new()?;
    for user in users() {
        let mounted = sample.mount(&user, &[])?;
        let script = format!("while cat '{}' > /dev/null; do :; done", mounted.join("data").join(LARGE).display());
        let reader = Run::new("sh").args(["-c", &script]).user(&user).time_limit(SOON).start()?;
        std::thread::sleep(Duration::from_millis(200));
        signal(mounted.server_as(&user)?, Signal::KILL)?;
        let ended = reader.wait()?;
        ensure!(
            ended.stderr.contains("Transport endpoint is not connected")
                || ended.stderr.contains("Software caused connection abort"),
            "{ended}"
        );
        assert!(mounted.is_mounted());
        if user.uid == OsUser::current().uid {
            assert!(matches!(table::health(&mounted.mountpoint), Health::Stale));
        }
        mounted.unmount()?.expect_code(0)?;
        assert!(!mounted.is_mounted());

        let mounted = sample.mount(&user, &[])?;
        signal(mounted.server_as(&user)?, Signal::KILL)?;
        wait_until("the end of the server", SOON, || Ok(!sample.answers(&mounted, &user)))?;
        let again = sample.pghydrant(&user).succeed(sample.mount_arguments(&mounted.mountpoint, &[]))?;
        assert!(again.stderr.contains("took away a mount"), "{again}");
        Run::new("cat").arg(mounted.join("data/PG_VERSION")).user(&user).succeed()?;
        mounted.unmount()?.expect_code(0)?;
    }
    Ok(())
}

/// A reader that is killed in the middle of a read ends, and the mount goes on.
#[test]
fn a_killed_reader() -> Result<()> {
    requires!(Fuse);
    let sample = Sample::new()?;
    let mounted = sample.mount(&OsUser::current(), &[])?;
    let path = mounted.join("data").join(LARGE);
    for flags in ["", "iflag=direct"] {
        for pause in [1, 5, 20, 50] {
            let script = format!("while dd if='{}' of=/dev/null bs=1M {flags} status=none; do :; done", path.display());
            let reader = Run::new("sh").args(["-c", &format!("exec sh -c \"{script}\"")]).time_limit(SOON).start()?;
            std::thread::sleep(Duration::from_millis(pause));
            reader.kill()?;
        }
    }
    assert!(fs::read(&path)? == relation(LARGE_BYTES, 1));
    wait_until("the readers' files to be closed", SOON, || Ok(mounted.unmount()?.code == Some(0)))
}

/// A server that is asked to end by SIGTERM, SIGINT or SIGHUP takes its mount away, even from under its readers.
#[test]
fn a_server_that_is_asked_to_end() -> Result<()> {
    requires!(Fuse);
    let sample = Sample::new()?;
    for asked in [Signal::TERM, Signal::INT, Signal::HUP] {
        let mounted = sample.mount(&OsUser::current(), &[])?;
        let server = mounted.server()?;
        let file = File::open(mounted.join("data").join(LARGE))?;
        signal(server, asked)?;
        wait_until("the end of the server", SOON, || Ok(!runs(server)))?;
        assert!(!mounted.is_mounted());
        assert!(matches!(errno(file.read_at(&mut [0; 10], 0)), Some(libc::ENOTCONN | libc::ECONNABORTED | libc::EIO)));
    }
    let mountpoint = sample.mountpoint(&OsUser::current())?;
    let foreground = sample.pghydrant(&OsUser::current());
    let server = foreground.start(sample.mount_arguments(&mountpoint, &["--foreground"]))?;
    let mounted = sample.watch(&OsUser::current(), &mountpoint)?;
    wait_until("the mount", SOON, || Ok(mounted.join("data").exists()))?;
    server.signal(Signal::INT)?;
    server.wait()?.expect_code(0)?;
    assert!(!mounted.is_mounted());
    Ok(())
}

/// A server whose mount was taken away leaves the next one at the same place alone, whenever and however it ends.
#[test]
fn a_server_that_has_a_successor() -> Result<()> {
    requires!(Fuse);
    let sample = Sample::new()?;
    let (mountpoint, user) = (sample.mountpoint(&OsUser::current())?, OsUser::current());
    let repository = engine::repository::Repository::open(&sample.repository)?;
    let cluster = repository.cluster(&"main".parse().map_err(anyhow::Error::msg)?)?;
    let backup = cluster.backup(&sample.info.label)?;
    let start = || -> Result<Session> {
        let view = View { owner: None, token: String::new(), memory_bytes: 1 << 20 };
        let (mountpoint, source) = (mountpoint.clone(), "pghydrant:test".to_owned());
        let options = MountOptions { mountpoint, source, allow_other: false };
        Ok(Session::start(BackupFs::new(&backup, view)?, &options)?)
    };
    // Its end is noticed only after the next one is there.
    let former = start()?;
    mounting::unmount(&mountpoint, false)?;
    let mounted = sample.mount(&user, &[])?;
    former.wait()?;
    assert!(mounted.is_mounted());
    mounted.unmount()?.expect_code(0)?;
    // It still has a reader, and is asked to end.
    let former = start()?;
    let reader = Run::new("sleep").arg("60").current_dir(mountpoint.join("data")).start()?;
    std::thread::sleep(Duration::from_millis(100));
    mounting::unmount(&mountpoint, true)?;
    let mounted = sample.mount(&user, &[])?;
    former.own().unmount()?;
    assert!(mounted.is_mounted());
    drop(reader);
    drop(former);
    assert!(mounted.is_mounted());
    Ok(())
}

/// A server with its parent's end of the pipe, as a restore has one.
fn serve_for_parent(sample: &Sample, mountpoint: &Path) -> Result<(Child, String)> {
    let request = serde_json::json!({
        "repository": sample.repository, "cluster": "main", "backup": sample.info.label, "mountpoint": mountpoint,
        "owner": null, "allow_other": false, "memory_bytes": 16 << 20, "token": "token", "with_parent": true,
    });
    let mut server = Command::new(sample.pghydrant(&OsUser::current()).binary)
        .arg("fuse-server")
        .arg(mountpoint)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    writeln!(server.stdin.as_mut().context("no stdin")?, "{request}")?;
    let mut answer = [0; 64];
    let bytes = server.stdout.as_mut().context("no stdout")?.read(&mut answer)?;
    Ok((server, String::from_utf8_lossy(&answer[..bytes]).into_owned()))
}

/// The server of a restore ends, and takes its mount away, when the restore does, however that ends.
#[test]
fn a_parent_that_ends() -> Result<()> {
    requires!(Fuse);
    let sample = Sample::new()?;
    let mountpoint = sample.mountpoint(&OsUser::current())?;
    for in_use in [false, true] {
        let (mut server, answer) = serve_for_parent(&sample, &mountpoint)?;
        let mounted = sample.watch(&OsUser::current(), &mountpoint)?;
        assert_eq!(answer, "\"mounted\"\n");
        table::prove(&mountpoint, "token")?;
        let file = File::open(mounted.join("data").join(LARGE))?;
        let used = in_use.then_some(file);
        // What the kernel does for a process that is killed: it closes what that had open.
        drop(server.stdin.take());
        wait_until("the end of the server", SOON, || Ok(server.try_wait()?.is_some()))?;
        assert!(!mounted.is_mounted());
        if let Some(file) = used {
            assert!(file.read_at(&mut [0; 10], 0).is_err());
        }
    }
    Ok(())
}

/// A server that is started by hand says who starts it, and mounts nothing.
#[test]
fn a_server_without_a_request() -> Result<()> {
    let scratch = Scratch::new()?;
    let pghydrant = Pghydrant::new(&scratch)?;
    pghydrant.fail(["fuse-server", "/nonexistent"], 2, &["fuse-server is started by mount and restore"])?;
    Ok(())
}

impl Mounted {
    /// The server's process id, as the mount tells it to the user that may ask.
    fn server_as(&self, user: &OsUser) -> Result<u32> {
        if user.uid == OsUser::current().uid {
            return self.server();
        }
        let processes = fs::read_dir("/proc")?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let serves = |process: &u32| {
            let command = fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
            let words: Vec<_> = command.split(|byte| *byte == 0).collect();
            words.get(1) == Some(&&b"fuse-server"[..])
                && words.get(2) == Some(&self.mountpoint.as_os_str().as_encoded_bytes())
        };
        let mut serving: Vec<u32> = processes.filter(serves).collect();
        ensure!(serving.len() == 1, "servers of {}: {serving:?}", self.mountpoint.display());
        serving.pop().context("no server")
    }
}

impl Sample {
    /// Whether the mount answers that user.
    fn answers(&self, mounted: &Mounted, user: &OsUser) -> bool {
        let asked = Run::new("stat").arg("-f").arg(&mounted.mountpoint).user(user).time_limit(SOON).finish();
        asked.is_ok_and(|asked| asked.code == Some(0))
    }
}
