//! What dies beside a restore: its mount's server, the postmaster, the whole machine. `retry` goes on from each, and
//! nothing is written twice.
//!
//! Where `crashes.rs` picks moments by chance, these are the moments that a restore must have an answer to.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::support::compare::{same_trees, tree};
use crate::support::filesystem::fuse_mounts_below;
use crate::support::process::wait_until;
use crate::support::*;

/// A process ends this soon after `kill -9`, or something holds it.
const DEATH: Duration = Duration::from_secs(60);

fn kill(pid: u32) -> Result<()> {
    let pid = Pid::from_raw(i32::try_from(pid)?).context("no process")?;
    Ok(kill_process(pid, Signal::KILL)?)
}

/// Gone, or dead and not yet waited for.
fn is_gone(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    status.rsplit_once(')').is_none_or(|(_, rest)| rest.trim_start().starts_with('Z'))
}

/// The processes that serve mounts below `root`.
fn mount_servers(root: &Path) -> Result<BTreeSet<u32>> {
    let root = root.display().to_string();
    let mut servers = BTreeSet::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words = String::from_utf8_lossy(&words).into_owned();
        if words.contains("\0fuse-server\0") && words.contains(&root) && !is_gone(pid) {
            servers.insert(pid);
        }
    }
    Ok(servers)
}

/// Nothing of the session is left behind.
fn nothing_is_left(world: &World, what: &str) -> Result<()> {
    ensure!(fuse_mounts_below(world.scratch.path()).is_empty(), "{what}: a mount is left");
    ensure!(mount_servers(world.scratch.path())?.is_empty(), "{what}: a mount's server is left");
    ensure!(open_sessions(&world.pghydrant)?.is_empty(), "{what}: a session is left");
    Ok(())
}

fn tells_of_the_copy(path: &Path) -> bool {
    path.to_string_lossy().contains("pghydrant")
}

#[test]
fn a_mount_server_that_is_killed_stops_the_copy_and_a_retry_finishes_it() -> Result<()> {
    requires!(Postgres, Fuse);
    let world = World::new(8)?;
    world.backup()?;
    world.cluster.stop("fast")?;
    let target = world.target();
    world.restore_to(&target, &["--no-start"])?.expect_code(0)?;
    let expected = tree(&target)?;
    fs::remove_dir_all(&target)?;

    let mut stopped = 0;
    for milliseconds in [0, 5, 10, 20, 40, 80, 120, 160] {
        let running = world.start_copy()?;
        wait_until("the target", Duration::from_secs(120), || Ok(target.exists()))?;
        std::thread::sleep(Duration::from_millis(milliseconds));
        let servers = mount_servers(world.scratch.path())?;
        for server in &servers {
            // One that has just ended needs no kill.
            let _ = kill(*server);
        }
        let finished = running.wait()?;
        let what = format!("{milliseconds} ms after the target appeared\n{finished}");
        for server in servers {
            wait_until("the mount's server to be gone", DEATH, || Ok(is_gone(server)))?;
        }
        ensure!(!finished.stderr.contains("panicked"), "{what}");
        ensure!(fuse_mounts_below(world.scratch.path()).is_empty(), "a mount is left, {what}");
        if finished.code != Some(0) {
            stopped += 1;
            let finished = finished.expect_code(6)?.expect_stderr(&["error: ", "hint: "])?;
            ensure!(finished.stderr.matches("error: ").count() == 1, "one failure, one line\n{finished}");
            ensure!(!target.join("global/pg_control").exists(), "what is left could be started, {what}");
            world.pghydrant.run(["retry", &open_session(&world.pghydrant)?])?.expect_code(0)?;
        }
        same_trees(&expected, &tree(&target)?, tells_of_the_copy).with_context(|| what.clone())?;
        nothing_is_left(&world, &what)?;
        fs::remove_dir_all(&target)?;
    }
    ensure!(stopped > 0, "no moment fell into the copy");
    Ok(())
}

#[test]
fn both_killed_in_the_copy_leave_no_process_and_no_mount_that_a_retry_or_a_cancel_trips_over() -> Result<()> {
    requires!(Postgres, Fuse);
    let world = World::new(8)?;
    world.backup()?;
    world.cluster.stop("fast")?;
    let target = world.target();
    let mut open = 0;
    for (round, verb) in ["retry", "cancel", "retry", "cancel"].into_iter().enumerate() {
        let running = world.start_copy()?;
        wait_until("the target", Duration::from_secs(120), || Ok(target.exists()))?;
        std::thread::sleep(Duration::from_millis(30));
        let (restore, servers) = (running.pid(), mount_servers(world.scratch.path())?);
        // The one that could still clean up goes first in every other round.
        let all: Vec<u32> = servers.iter().copied().chain([restore]).collect();
        let all: Vec<u32> = if round % 2 == 0 { all } else { all.into_iter().rev().collect() };
        for pid in &all {
            let _ = kill(*pid);
        }
        running.wait()?;
        for pid in all {
            wait_until("the killed process to be gone", DEATH, || Ok(is_gone(pid)))?;
        }
        for id in open_sessions(&world.pghydrant)? {
            open += 1;
            world.pghydrant.run([verb, &id])?.expect_code(0)?;
            ensure!(target.exists() == (verb == "retry"), "{verb} left the wrong thing");
        }
        nothing_is_left(&world, verb)?;
        if target.exists() {
            fs::remove_dir_all(&target)?;
        }
    }
    ensure!(open > 0, "no moment fell into the copy");
    Ok(())
}

/// A restore with a server, killed at a step that it has told of.
struct Story {
    world: World,
    target: PathBuf,
    /// `postgresql.conf` of a restore that nothing disturbed.
    conf: String,
    auto: String,
}

impl Story {
    fn tell() -> Result<Self> {
        let world = World::new(2)?;
        // Files that PostgreSQL does not know: whoever writes them again is us.
        fs::write(world.cluster.data.join("stranger"), vec![7; 300_000])?;
        fs::write(world.cluster.data.join("visitor"), "from the backup")?;
        world.backup()?;
        let load = world.cluster.pgbench_load()?;
        std::thread::sleep(Duration::from_millis(500));
        drop(load);
        world.mark("wanted")?;
        world.cluster.sql("SELECT pg_create_restore_point('here')")?;
        world.mark("unwanted")?;
        world.cluster.archive_wal()?;
        let target = world.target();
        drop(world.restore(&["--target-name", "here"])?);
        let (conf, auto) =
            (configuration(&target, "postgresql.conf")?, configuration(&target, "postgresql.auto.conf")?);
        fs::remove_dir_all(&target)?;
        Ok(Self { world, target, conf, auto })
    }

    /// Begins a restore and kills it as soon as it has told of `step`.
    fn killed_after(&self, step: &str) -> Result<Finished> {
        let (to, port) = (self.target.display().to_string(), cluster::free_port()?.to_string());
        let arguments = ["--to", &to, "--port", &port, "--target-name", "here"];
        let mut running = self.world.pghydrant.start(self.world.repository.arguments(&["restore"], &arguments))?;
        let told = |seen: &str| seen.lines().any(|line| line.starts_with(&format!("  {step} ")));
        running.wait_for_output(step, told)?;
        running.kill()
    }

    /// `retry` ends with the right rows and the right configuration.
    fn is_finished_by_retry(&self, what: &str) -> Result<Instance> {
        let id = open_session(&self.world.pghydrant).with_context(|| what.to_owned())?;
        self.world.pghydrant.run(["retry", &id])?.expect_code(0).with_context(|| what.to_owned())?;
        let restored = Instance::running_in(&self.target)?;
        ensure!(restored.sql("SELECT pg_is_in_recovery()")? == "f", "{what}: still in recovery");
        ensure!(marks(&restored)? == "wanted", "{what}: {}", marks(&restored)?);
        let (conf, auto) =
            (configuration(&self.target, "postgresql.conf")?, configuration(&self.target, "postgresql.auto.conf")?);
        ensure!(conf == self.conf, "{what}: postgresql.conf differs:\n{conf}\ninstead of\n{}", self.conf);
        ensure!(auto == self.auto, "{what}: postgresql.auto.conf differs:\n{auto}\ninstead of\n{}", self.auto);
        ensure!(!self.target.join("pghydrant.session").exists(), "{what}: pghydrant.session is left");
        nothing_is_left(&self.world, what)?;
        Ok(restored)
    }
}

fn configuration(data: &Path, name: &str) -> Result<String> {
    let text = compare::without_session_ids(&fs::read(data.join(name))?);
    let text = String::from_utf8_lossy(&text).into_owned();
    Ok(text.lines().filter(|line| !line.trim_start().starts_with("port")).collect::<Vec<_>>().join("\n"))
}

#[test]
fn a_crash_between_edit_and_revert_is_put_right_by_a_retry() -> Result<()> {
    requires!(Postgres, Fuse);
    let story = Story::tell()?;
    for step in ["configure", "start", "act", "revert"] {
        let killed = story.killed_after(step)?;
        let what = format!("killed after {step}\n{killed}");
        // Whoever starts the server meanwhile gets the target, for as long as it has not left recovery.
        if step == "configure" && !killed.stderr.contains("  act ") {
            let conf = fs::read_to_string(story.target.join("postgresql.conf"))?;
            ensure!(conf.contains("recovery_target_name = 'here'"), "{what}");
        }
        if open_sessions(&story.world.pghydrant)?.is_empty() {
            // It was over before the kill; then all of it holds.
            ensure!(["act", "revert"].contains(&step), "{what}");
            let restored = Instance::running_in(&story.target)?;
            ensure!(marks(&restored)? == "wanted", "{what}");
        } else {
            drop(story.is_finished_by_retry(&what)?);
        }
        fs::remove_dir_all(&story.target)?;
    }
    Ok(())
}

/// Between the configuration and `pg_control`: what a resumed copy makes anew must be configured again.
#[test]
fn a_crash_just_before_pg_control_keeps_the_recovery_settings_of_a_first_start() -> Result<()> {
    requires!(Postgres, Fuse);
    let story = Story::tell()?;
    let (world, target) = (&story.world, &story.target);
    let arguments = ["--no-start", "--target-name", "here"];
    world.restore_to(target, &arguments)?.expect_code(0)?;
    let expected = tree(target)?;
    fs::remove_dir_all(target)?;
    let to = target.display().to_string();
    let arguments = [&["--to", &to], &arguments[..]].concat();
    let mut publishing = 0;
    for round in 0..40 {
        if publishing == 3 {
            break;
        }
        let mut running = world.pghydrant.start(world.repository.arguments(&["restore"], &arguments))?;
        running.wait_for_output("the WAL", |seen| seen.lines().any(|line| line.starts_with("  wal ")))?;
        let killed = running.kill()?;
        let sessions = world.pghydrant.succeed(["sessions", "--json"])?;
        publishing += u32::from(sessions.stdout.contains("\"publishing\""));
        for id in open_sessions(&world.pghydrant)? {
            world.pghydrant.run(["retry", &id])?.expect_code(0)?;
        }
        same_trees(&expected, &tree(target)?, tells_of_the_copy).with_context(|| format!("round {round}\n{killed}"))?;
        fs::remove_dir_all(target)?;
    }
    ensure!(publishing > 0, "no kill fell between the configuration and the end");
    Ok(())
}

/// Just behind `pg_control` somebody starts the server, before the journal knows that it can be started.
#[test]
fn what_a_server_wrote_that_somebody_started_after_a_crash_is_not_overwritten() -> Result<()> {
    requires!(Postgres, Fuse);
    let story = Story::tell()?;
    let control = story.target.join("global/pg_control");
    let mut met = 0;
    for _ in 0..40 {
        if met == 2 {
            break;
        }
        let (to, port) = (story.target.display().to_string(), cluster::free_port()?.to_string());
        let arguments = ["--to", &to, "--port", &port, "--target-name", "here"];
        let running = story.world.pghydrant.start(story.world.repository.arguments(&["restore"], &arguments))?;
        let began = std::time::Instant::now();
        while !control.exists() && began.elapsed() < Duration::from_secs(180) {
            std::thread::yield_now();
        }
        let killed = running.kill()?;
        let sessions = story.world.pghydrant.succeed(["sessions", "--json"])?;
        if !sessions.stdout.contains("\"publishing\"") {
            let id = open_session(&story.world.pghydrant)?;
            story.world.pghydrant.succeed(["retry", &id])?;
            drop(Instance::running_in(&story.target)?);
            fs::remove_dir_all(&story.target)?;
            continue;
        }
        met += 1;
        let by_hand = Instance { data: story.target.clone(), port: port.parse()?, sockets: session_directory(&story) };
        by_hand.start()?;
        wait_until("the promotion", Duration::from_secs(180), || {
            Ok(by_hand.sql("SELECT pg_is_in_recovery()").is_ok_and(|answer| answer == "f"))
        })?;
        by_hand.sql("CREATE TABLE since AS SELECT generate_series(1, 10000) AS id; CHECKPOINT")?;
        if met == 2 {
            by_hand.stop("immediate")?;
        }
        let id = open_session(&story.world.pghydrant)?;
        story.world.pghydrant.fail(["cancel", &id], 2, &["has left recovery", "hint: `pghydrant retry "])?;
        let restored = story.is_finished_by_retry(&format!("{killed}"))?;
        assert_eq!(restored.number("SELECT count(*) FROM since")?, 10_000);
        restored.check_relations()?;
        restored.stop("fast")?;
        restored.check_pages()?;
        fs::remove_dir_all(&story.target)?;
    }
    ensure!(met > 0, "no kill fell just behind pg_control");
    Ok(())
}

fn session_directory(story: &Story) -> PathBuf {
    story.target.join("pghydrant.session")
}

/// `pg_control` of a server that was killed while it stopped says neither "in production" nor "shut down".
#[test]
fn a_promoted_server_that_was_killed_while_it_stopped_is_finished_and_not_cancelled() -> Result<()> {
    requires!(Postgres, Fuse);
    let story = Story::tell()?;
    let (world, target) = (&story.world, &story.target);
    world.restore_to(target, &["--target-name", "here", "--action", "pause"])?.expect_code(0)?;
    let id = open_session(&world.pghydrant)?;
    let promote = Run::new(tools::postgres_program("pg_ctl")?).user(OsUser::server()).args(["promote", "-w", "-D"]);
    promote.arg(target).succeed()?;
    let promoted = Instance::running_in(target)?;
    promoted.sql("CREATE TABLE since (); CHECKPOINT")?;
    promoted.stop("immediate")?;
    const SHUTTING_DOWN: u32 = 3;
    let path = target.join("global/pg_control");
    let mut control = fs::read(&path)?;
    control[16..20].copy_from_slice(&SHUTTING_DOWN.to_le_bytes());
    let sum = crc32c::crc32c(&control[..288]);
    control[288..292].copy_from_slice(&sum.to_le_bytes());
    fs::write(&path, control)?;
    world.pghydrant.fail(["cancel", &id], 2, &["has left recovery", "hint: `pghydrant promote "])?;
    world.pghydrant.succeed(["promote", &id])?;
    let restored = Instance::running_in(target)?;
    assert_eq!(restored.sql("SELECT count(*) FROM since")?, "0");
    assert_eq!(marks(&restored)?, "wanted");
    Ok(())
}

#[test]
fn once_the_postmaster_has_started_no_block_and_no_control_file_is_written_again() -> Result<()> {
    requires!(Postgres, Fuse);
    let story = Story::tell()?;
    let killed = story.killed_after("start")?;
    let server = Instance::running_in(&story.target);
    // It may have come to its target already; stopped at once, it recovers again.
    if let Ok(server) = server {
        server.stop("immediate")?;
    }
    let at = |name: &str| story.target.join(name);
    fs::write(at("visitor"), "changed since")?;
    fs::remove_file(at("stranger"))?;
    let control = fs::metadata(at("global/pg_control"))?.ino();
    let label = at("backup_label").exists();
    let restored = story.is_finished_by_retry(&format!("{killed}"))?;
    assert_eq!(fs::read_to_string(at("visitor"))?, "changed since", "a block was written again");
    ensure!(!at("stranger").exists(), "a file was made again");
    // PostgreSQL writes into this file; a restore puts another in its place.
    assert_eq!(fs::metadata(at("global/pg_control"))?.ino(), control, "pg_control was put in place again");
    ensure!(label || !at("backup_label").exists(), "backup_label came back");
    restored.check_relations()?;
    restored.stop("fast")?;
    restored.check_pages()
}

#[test]
fn after_a_reboot_in_the_recovery_a_retry_ends_it() -> Result<()> {
    requires!(Postgres, Fuse);
    let story = Story::tell()?;
    for (round, step) in ["start", "recover", "act"].into_iter().enumerate() {
        let killed = story.killed_after(step)?;
        let what = format!("a reboot after {step}\n{killed}");
        let servers = mount_servers(story.world.scratch.path())?;
        for server in &servers {
            let _ = kill(*server);
        }
        let postmaster = fs::read_to_string(story.target.join("postmaster.pid")).ok();
        let postmaster = postmaster.and_then(|text| text.lines().next()?.trim().parse::<u32>().ok());
        if let Some(postmaster) = postmaster {
            let _ = kill(postmaster);
            // Not even a zombie, which PostgreSQL takes for a postmaster: after a reboot there is none.
            let process = PathBuf::from(format!("/proc/{postmaster}"));
            wait_until("the postmaster to be gone", DEATH, || Ok(!process.exists()))?;
            wait_until("its children to be gone", DEATH, || Ok(!has_children_in(&story.target)?))?;
        }
        // A reboot takes the mount and what is in memory; a crash of the processes alone leaves a dead mount behind.
        if round % 2 == 0 {
            for mountpoint in fuse_mounts_below(story.world.scratch.path()) {
                Run::new("umount").arg("--lazy").arg(&mountpoint).finish()?;
                let _ = fs::remove_dir(&mountpoint);
            }
        }
        if open_sessions(&story.world.pghydrant)?.is_empty() {
            fs::remove_dir_all(&story.target)?;
            continue;
        }
        drop(story.is_finished_by_retry(&what)?);
        fs::remove_dir_all(&story.target)?;
    }
    Ok(())
}

/// `/proc/self/exe` of the old one ends in `(deleted)`, and PostgreSQL would be given that to fetch WAL with.
#[test]
fn a_binary_that_is_replaced_while_a_restore_copies_fetches_the_wal() -> Result<()> {
    requires!(Postgres, Fuse);
    let story = Story::tell()?;
    let (to, port) = (story.target.display().to_string(), cluster::free_port()?.to_string());
    let arguments = ["--to", &to, "--port", &port, "--target-name", "here"];
    let binary = &story.world.pghydrant.binary;
    let update = binary.with_extension("new");
    // Another inode: a rename over a link to the same one does nothing.
    Run::new("cp").arg("--preserve=mode").arg(binary).arg(&update).succeed()?;
    let mut running = story.world.pghydrant.start(story.world.repository.arguments(&["restore"], &arguments))?;
    running.wait_for_output("the mount", |seen| seen.lines().any(|line| line.starts_with("  mount ")))?;
    fs::rename(&update, binary)?;
    running.wait()?.expect_code(0)?;
    assert_eq!(marks(&Instance::running_in(&story.target)?)?, "wanted");
    Ok(())
}

/// The signal file is gone by then, and the new timeline is not yet in `pg_control`.
#[test]
fn a_crash_in_the_checkpoint_at_the_end_of_the_recovery_does_not_lead_past_the_target() -> Result<()> {
    requires!(Postgres, Fuse);
    let story = Story::tell()?;
    let (world, target) = (&story.world, &story.target);
    for by_hand in [false, true] {
        let (id, promoting) = stopped_in_its_last_checkpoint(&story)?;
        wait_until("the end of the recovery", DEATH, || Ok(!target.join("recovery.signal").exists()))?;
        std::thread::sleep(Duration::from_millis(300));
        let all = servers_in(target)?;
        for (pid, _) in &all {
            // Without their postmaster the others end by themselves.
            let _ = kill(*pid);
        }
        let stopped = promoting.wait()?.expect_code(5)?;
        // Not even a zombie is left, which PostgreSQL takes for a postmaster.
        let is_there = |(pid, _): &(u32, String)| Path::new(&format!("/proc/{pid}")).exists();
        wait_until("the server to be gone", DEATH, || Ok(!all.iter().any(is_there)))?;
        if by_hand {
            let server =
                Instance { data: target.clone(), port: cluster::free_port()?, sockets: session_directory(&story) };
            server.start()?;
            let conf = fs::read(target.join("postgresql.conf"))?;
            world.pghydrant.fail(["promote", &id], 5, &["left recovery on timeline 1", "hint: "])?;
            assert_eq!(fs::read(target.join("postgresql.conf"))?, conf, "reverted");
            world.pghydrant.fail(["cancel", &id], 2, &["has left recovery"])?;
            server.stop("immediate")?;
        } else {
            drop(story.is_finished_by_retry(&format!("{stopped}"))?);
        }
        fs::remove_dir_all(target)?;
    }
    Ok(())
}

/// A promotion whose server cannot end the checkpoint at the end of the recovery, for its checkpointer is stopped.
fn stopped_in_its_last_checkpoint(story: &Story) -> Result<(String, Running)> {
    let (world, target) = (&story.world, &story.target);
    for _ in 0..10 {
        world.restore_to(target, &["--target-name", "here", "--action", "shutdown"])?.expect_code(0)?;
        let id = open_session(&world.pghydrant)?;
        let promoting = world.pghydrant.start(["promote", &id])?;
        let mut checkpointer = None;
        wait_until("the checkpointer", DEATH, || {
            checkpointer = servers_in(target)?.into_iter().find(|(_, words)| words.contains("checkpointer"));
            Ok(checkpointer.is_some())
        })?;
        let (checkpointer, _) = checkpointer.context("no checkpointer")?;
        let checkpointer = Pid::from_raw(i32::try_from(checkpointer)?).context("no process")?;
        kill_process(checkpointer, Signal::STOP)?;
        // It goes before that checkpoint is asked for: while it is there, the stop was in time.
        if target.join("recovery.signal").exists() {
            return Ok((id, promoting));
        }
        kill_process(checkpointer, Signal::CONT)?;
        promoting.wait()?;
        drop(Instance::running_in(target)?);
        fs::remove_dir_all(target)?;
    }
    bail!("the checkpointer was never stopped in time")
}

/// The processes of a server that works in `data`, with their titles.
fn servers_in(data: &Path) -> Result<Vec<(u32, String)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if fs::read_link(entry.path().join("cwd")).is_ok_and(|place| place == data) && !is_gone(pid) {
            let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            found.push((pid, String::from_utf8_lossy(&words).into_owned()));
        }
    }
    Ok(found)
}

/// Whether processes of a server that lost its postmaster still work in `data`.
fn has_children_in(data: &Path) -> Result<bool> {
    for entry in fs::read_dir("/proc")? {
        let place = entry?.path().join("cwd");
        if fs::read_link(&place).is_ok_and(|place| place == data) {
            return Ok(true);
        }
    }
    Ok(false)
}
