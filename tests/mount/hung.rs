//! A server that hangs: stopped by a signal, which looks from outside like one whose repository's disk does not answer.

use std::fs;
use std::path::Path;
use std::sync::mpsc::channel;
use std::time::Duration;

use engine::io::disk::{Part, Queue, Transfer, Way};
use engine::io::{Disk, LocalDisk, Open, Root, buffers};
use fusefs::{mounting, table};
use rustix::process::{Pid, Signal, kill_process};

use super::guard::runs;
use super::sample::{LARGE, Sample};
use crate::support::compare::{same_trees, tree};
use crate::support::filesystem::fuse_mounts_below;
use crate::support::process::wait_until;
use crate::support::*;

const SOON: Duration = Duration::from_secs(30);
/// What the restore itself waits, and a slow machine's time to find out and to clean up.
const GIVEN_UP: Duration = Duration::from_secs(75);

/// A server that hangs keeps its readers waiting until it goes on or is ended; `unmount` leaves its mount in place, and
/// says which process to end.
#[test]
fn readers_of_a_hung_server() -> Result<()> {
    requires!(Fuse);
    let sample = Sample::new()?;
    let mounted = sample.mount(&OsUser::current(), &[])?;
    let server = mounted.server()?;
    let stopped = Stopped::new(server)?;
    let from = format!("if={}", mounted.join("data").join(LARGE).display());
    let read = |flags: &[&str]| Run::new("dd").args([&from, "of=/dev/null", "bs=1M"]).args(flags).time_limit(GIVEN_UP);
    let mut readers = [read(&[]).start()?, read(&["iflag=direct"]).start()?];
    let kill = format!("kill -KILL {server}");
    mounted.unmount()?.expect_code(1)?.expect_stderr(&["its server does not answer", &kill])?;
    assert!(mounted.is_mounted());
    for reader in &mut readers {
        assert!(reader.try_status()?.is_none(), "it has read from a server that is stopped");
    }
    drop(stopped);
    for reader in readers {
        reader.wait()?.expect_code(0)?;
    }
    let stopped = Stopped::new(server)?;
    let reader = read(&["iflag=direct"]).start()?;
    std::thread::sleep(Duration::from_millis(300));
    stopped.kill()?;
    reader.wait()?.expect_code(1)?;
    mounted.unmount()?.expect_code(0)?;
    Ok(())
}

/// A ring with requests to a mount that hangs: dropping it waits for them, and they end with the connection.
#[test]
fn a_ring_on_a_hung_server() -> Result<()> {
    requires!(Fuse);
    let sample = Sample::new()?;
    let mounted = sample.mount(&OsUser::current(), &[])?;
    for disk in [LocalDisk::new(), LocalDisk::with(engine::io::local::Engine::Plain, true)] {
        let file = disk.open(Root::open(&mounted.join("data"))?.at(LARGE), Open::Read)?;
        let (server, (tell, told)) = (mounted.server()?, channel());
        let reader = std::thread::spawn(move || -> Result<Stopped> {
            let (mut free, _) = buffers(3)?;
            let mut queue: Box<dyn Queue> = disk.queue(&mut free)?;
            let mut transfers = free.into_iter().enumerate().map(|(token, buffer)| {
                let part = Part { file: file.clone(), offset: (token << 21) as u64, at: 0, bytes: 2 << 20 };
                Transfer { token, way: Way::Read, buffer, parts: vec![part] }
            });
            // The first request asks the server whether its files can be polled, and waits for that.
            queue.submit(transfers.next().context("no buffer")?);
            queue.reap(true)?.context("nothing was read")?.outcome?;
            let stopped = Stopped::new(server)?;
            transfers.for_each(|transfer| queue.submit(transfer));
            ensure!(queue.reap(false)?.is_none(), "a server that is stopped has answered");
            tell.send("submitted")?;
            drop(queue);
            tell.send("dropped")?;
            Ok(stopped)
        });
        assert_eq!(told.recv_timeout(SOON)?, "submitted");
        assert!(told.recv_timeout(Duration::from_millis(500)).is_err(), "the kernel still has the buffers");
        let mount = table::mount_at(&mounted.mountpoint)?.context("no mount")?;
        mounting::abort(&mount)?;
        assert_eq!(told.recv_timeout(SOON)?, "dropped");
        drop(reader.join().expect("the reader panicked")?);
        // It finds that the kernel has left it.
        wait_until("the end of the server", SOON, || Ok(!runs(server)))?;
        assert!(!mounted.is_mounted());
        sample.pghydrant(&OsUser::current()).succeed(sample.mount_arguments(&mounted.mountpoint, &[]))?;
    }
    Ok(())
}

/// A restore whose server hangs gives it up after half a minute without data or an answer, says so, takes the mount away
/// and waits for `retry`; killed before that, it wakes a server that was stopped, which ends too.
#[test]
fn a_restore_from_a_hung_server() -> Result<()> {
    requires!(Postgres, Fuse);
    let world = World::new(16)?;
    world.backup()?;
    world.cluster.stop("fast")?;
    let target = world.target();
    world.restore_to(&target, &["--no-start"])?.expect_code(0)?;
    let expected = tree(&target)?;
    for killed in [false, true] {
        fs::remove_dir_all(&target)?;
        let arguments = ["--to", &target.display().to_string(), "--no-start"];
        let mut restore = world
            .pghydrant
            .command(world.repository.arguments(&["restore"], &arguments))
            .time_limit(GIVEN_UP)
            .start()?;
        restore.wait_for_output("mount", |seen| seen.contains("  mount "))?;
        let server = server_below(world.scratch.path())?;
        let stopped = Stopped::new(server)?;
        if killed {
            std::thread::sleep(Duration::from_millis(300));
            restore.signal(Signal::KILL)?;
            wait_until("the end of the restore", SOON, || Ok(restore.try_status()?.is_some()))?;
            wait_until("the end of the server", SOON, || Ok(!runs(server)))?;
        } else {
            let ended = restore.wait()?.expect_code(6)?;
            let ended = ended.expect_stderr(&["the mount's server hung", "no answer for 30 s", "pghydrant retry"])?;
            assert!(ended.took >= Duration::from_secs(30), "{ended}");
            assert!(!runs(server), "the server that hung is still there");
        }
        assert_eq!(fuse_mounts_below(world.scratch.path()), Vec::<std::path::PathBuf>::new());
        let sessions = open_sessions(&world.pghydrant)?;
        ensure!(sessions.len() == 1, "{sessions:?}");
        world.pghydrant.run(["retry", &sessions[0]])?.expect_code(0)?;
        same_trees(&expected, &tree(&target)?, |path| path.to_string_lossy().contains("pghydrant"))?;
        assert_eq!(fuse_mounts_below(world.scratch.path()), Vec::<std::path::PathBuf>::new());
        drop(stopped);
    }
    Ok(())
}

/// A process that is stopped; it goes on when dropped, if it is still there.
struct Stopped(Pid);

impl Stopped {
    fn new(process: u32) -> Result<Self> {
        let process = i32::try_from(process).ok().and_then(Pid::from_raw).context("no process")?;
        kill_process(process, Signal::STOP)?;
        // A thread that has not noticed yet could still take a request, and answers the next one's reader never.
        let all_stopped = || -> Result<bool> {
            let tasks = fs::read_dir(format!("/proc/{process}/task"))?;
            // A thread that has ended meanwhile takes no request either.
            let mut states = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("stat")).ok());
            Ok(states.all(|state| state.contains(") T ")))
        };
        wait_until("the process to be stopped", SOON, all_stopped)?;
        Ok(Self(process))
    }

    fn kill(self) -> Result<()> {
        Ok(kill_process(self.0, Signal::KILL)?)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = kill_process(self.0, Signal::CONT);
    }
}

/// The process that serves the only mount below `directory`.
fn server_below(directory: &Path) -> Result<u32> {
    let processes = fs::read_dir("/proc")?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let serves = |process: &u32| {
        let command = fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
        let mut words = command.split(|byte| *byte == 0).skip_while(|word| *word != b"fuse-server");
        words.nth(1).is_some_and(|word| word.starts_with(directory.as_os_str().as_encoded_bytes()))
    };
    let serving: Vec<u32> = processes.filter(serves).collect();
    ensure!(serving.len() == 1, "servers below {}: {serving:?}", directory.display());
    Ok(serving[0])
}
