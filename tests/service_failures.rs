//! Restores on other machines whose parts fail at random moments; what it costs, and what comes of it.
//!
//! The seed is printed: `PGHYDRANT_SEED` repeats a run, as far as two machines' processes let themselves be repeated.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Signal, kill_process};
use serde_json::Value;

use crate::crashes::Random;
use crate::service::Stage;
use crate::support::compare::{Entry, same_trees, tree};
use crate::support::process::wait_until;
use crate::support::*;

fn shuffled<T>(random: &mut Random, mut of: Vec<T>) -> Vec<T> {
    for at in (1..of.len()).rev() {
        of.swap(at, random.below(at as u64 + 1) as usize);
    }
    of
}

#[derive(Clone, Copy, Debug)]
enum Failing {
    Link,
    Services,
    Agent,
    /// Any process of ours there: the agent, the mount, who follows them.
    Any,
}

/// To the end of the backup and no further, then stopped: two of them can be compared.
const TO_COMPARE: &[&str] = &["--target-immediate", "--action", "shutdown"];

/// A batch of each of the copier's workers, and the descriptions that a new process reads again.
const LOST_BYTES_MAX: u64 = 8 * (2 << 20);

/// What the mount there had read ahead, at most, which ends with it: half of its memory.
const READ_AHEAD_MAX: u64 = 32 << 20;

/// The line, and what a copier that is killed has not noted yet: it does so every ten seconds.
const MEGABITS: u32 = 40;
const UNNOTED: Duration = Duration::from_secs(10);
const UNNOTED_BYTES_MAX: u64 = MEGABITS as u64 * 1_000_000 / 8 * UNNOTED.as_secs();

/// What recovery to one position makes the same byte by byte: tables, indexes and the state of transactions. Not compared:
/// what a server notes for itself (control file, statistics, free space, WAL it has recycled) and what restores are told
/// apart by (port, marker, log).
fn of_recovery(data: &Path) -> Result<BTreeMap<PathBuf, Entry>> {
    let mut entries = tree(data)?;
    entries.retain(|path, entry| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let first = path.iter().next().unwrap_or_default().to_string_lossy().into_owned();
        matches!(entry, Entry::File { .. })
            && ["base", "global", "pg_xact", "pg_multixact", "PG_VERSION"].contains(&first.as_str())
            && !name.ends_with("_fsm")
            && !["pg_control", "pg_internal.init"].contains(&name.as_str())
    });
    Ok(entries)
}

fn copied(stage: &Stage) -> Result<Option<u64>> {
    let session = stage.server.sessions()?.pop().context("no session")?;
    let is_copy = session.get("step") == Some(&"copy".into());
    Ok(session.pointer("/progress/bytes").and_then(Value::as_u64).filter(|_| is_copy))
}

/// Slows the line down once our binary is over it.
fn slow_once_there(stage: &Stage, megabits: u32) -> Result<()> {
    wait_until("an agent", Duration::from_secs(120), || Ok(!stage.host.our_pids()?.is_empty()))?;
    stage.host.slow(megabits)
}

fn kill_agent(stage: &Stage) -> Result<()> {
    let lock = std::fs::read_to_string(stage.agent_directory()?.join("lock"))?;
    // It may be between two runs.
    if let Some(pid) = lock.trim().parse().ok().and_then(rustix::process::Pid::from_raw)
        && stage.host.our_pids()?.contains(&pid)
    {
        let _ = kill_process(pid, Signal::KILL);
    }
    Ok(())
}

#[test]
fn failures_at_random_moments_cost_a_batch_each_and_change_nothing() -> Result<()> {
    requires_network!();
    let mut random = Random::new();
    let world = World::with(5, &["--compression", "none"], &[])?;
    let mut stage = Stage::of(world, &["--retries", "100", "--retry-every", "1s"])?;
    // Here, without any service.
    let local = stage.world.scratch.join("local");
    stage.world.restore_to(&local, TO_COMPARE)?.expect_code(0)?;
    let expected = of_recovery(&local)?;
    assert!(expected.len() > 500, "{} files", expected.len());
    // There, and nothing fails: what it costs.
    stage.server.restore(&stage.host, &stage.target(), TO_COMPARE).succeed()?;
    same_trees(&expected, &of_recovery(&stage.target())?, |_| false)?;
    let undisturbed = stage.server.bytes_sent()?;
    stage.server.command(["cancel", &stage.session_id()?]).succeed()?;
    stage.server.kill()?;
    stage.server.start_again()?;

    let client = stage.server.restore(&stage.host, &stage.target(), &[TO_COMPARE, &["--json"]].concat()).start()?;
    slow_once_there(&stage, MEGABITS)?;
    let mut sent = 0;
    let (mut failures, mut may_be_lost) = (0, 0);
    for failing in shuffled(&mut random, vec![Failing::Link, Failing::Services, Failing::Agent, Failing::Any]) {
        let moment = random.below(undisturbed / 8).max(1);
        let mut now = None;
        wait_until("a copy that goes on", Duration::from_secs(120), || {
            now = copied(&stage)?;
            Ok(stage.is_over_the_copy()? || now.is_some_and(|bytes| bytes >= moment))
        })?;
        let Some(bytes) = now else { break };
        eprintln!("{failing:?} at {bytes} bytes of this attempt");
        failures += 1;
        may_be_lost += LOST_BYTES_MAX;
        if matches!(failing, Failing::Agent | Failing::Any) {
            may_be_lost += UNNOTED_BYTES_MAX;
        }
        match failing {
            Failing::Link => {
                stage.host.cut()?;
                std::thread::sleep(Duration::from_millis(random.below(6000)));
                stage.host.mend()?;
            }
            Failing::Services => {
                sent += stage.server.bytes_sent()?;
                stage.server.kill()?;
                stage.server.start_again()?;
            }
            Failing::Agent => kill_agent(&stage)?,
            Failing::Any => {
                let pids = stage.host.our_pids()?;
                if !pids.is_empty() {
                    let _ = kill_process(pids[random.below(pids.len() as u64) as usize], Signal::KILL);
                }
            }
        }
    }
    assert!(failures > 0, "the copy was over before anything failed");
    stage.host.speed_up()?;
    client.wait()?.expect_code(0)?;
    sent += stage.server.bytes_sent()?;
    same_trees(&expected, &of_recovery(&stage.target())?, |_| false)?;
    eprintln!("{sent} bytes sent with {failures} failures, {undisturbed} without");
    let most = undisturbed + may_be_lost;
    assert!(sent <= most, "{sent} bytes were sent, of {undisturbed} and {failures} failures");
    stage.server.wait_for("at_target")?;
    stage.server.command(["cancel", &stage.session_id()?]).succeed()?;
    assert!(!stage.target().exists());
    Ok(())
}

#[test]
fn a_target_that_is_started_again_gets_only_what_is_missing() -> Result<()> {
    requires_network!();
    let world = World::with(5, &["--compression", "none"], &[])?;
    let mut stage = Stage::of(world, &["--retries", "1", "--retry-every", "1s"])?;
    stage.server.restore(&stage.host, &stage.target(), TO_COMPARE).succeed()?;
    let undisturbed = stage.server.bytes_sent()?;
    let expected = of_recovery(&stage.target())?;
    stage.server.command(["cancel", &stage.session_id()?]).succeed()?;
    let before = stage.server.bytes_sent()?;

    let client = stage.server.restore(&stage.host, &stage.target(), TO_COMPARE).start()?;
    slow_once_there(&stage, MEGABITS)?;
    stage.wait_for_copy()?;
    // Who began from nothing would fetch more again than was read ahead.
    wait_until("most of the copy", Duration::from_secs(120), || {
        Ok(stage.server.bytes_sent()? - before > undisturbed / 3 * 2)
    })?;
    stage.host.cut()?;
    // Down for longer than the services look for it.
    client.wait()?.expect_code(6)?.expect_stderr(&["pghydrant retry "])?;
    stage.server.wait_for("waiting")?;
    // By then it is noted on disk what has arrived.
    std::thread::sleep(UNNOTED + Duration::from_secs(5));
    stage.host.mend()?;
    stage.host.reboot()?;
    stage.host.speed_up()?;
    let id = stage.session_id()?;
    stage.server.command(["retry", &id]).succeed()?;
    stage.server.wait_for("at_target")?;
    same_trees(&expected, &of_recovery(&stage.target())?, |_| false)?;
    let sent = stage.server.bytes_sent()? - before;
    eprintln!("{sent} bytes sent, {undisturbed} without a failure");
    assert!(undisturbed / 3 * 2 > READ_AHEAD_MAX + LOST_BYTES_MAX, "{undisturbed} bytes are too few to tell");
    let most = undisturbed + READ_AHEAD_MAX + LOST_BYTES_MAX;
    assert!(sent <= most, "{sent} bytes were sent, of {undisturbed}");
    // It moves on though it was started again: the server there is ended, and waits nowhere but in the session.
    stage.server.command(["promote", &id]).succeed()?;
    Instance::running_in(&stage.target())?.stop("fast")
}

#[test]
fn a_copy_that_is_cancelled_ends_and_leaves_nothing() -> Result<()> {
    requires_network!();
    let world = World::with(5, &["--compression", "none"], &[])?;
    let stage = Stage::of(world, &["--retries", "5", "--retry-every", "1s"])?;
    let client = stage.server.restore(&stage.host, &stage.target(), &[]).start()?;
    slow_once_there(&stage, 16)?;
    stage.wait_for_copy()?;
    let id = stage.session_id()?;
    stage.server.command(["cancel", &id]).succeed()?;
    client.wait()?;
    assert_eq!(stage.server.wait_for("cancelled")?.get("message"), Some(&Value::Null));
    assert!(!stage.target().exists());
    assert!(stage.host.our_pids()?.is_empty());
    Ok(())
}

#[test]
fn a_repository_that_is_away_and_a_token_that_is_revoked_do_not_end_a_session() -> Result<()> {
    requires_network!();
    let stage =
        Stage::of(World::with(5, &["--compression", "none"], &[])?, &["--retries", "100", "--retry-every", "1s"])?;
    let client = stage.server.restore(&stage.host, &stage.target(), &[]).start()?;
    slow_once_there(&stage, 16)?;
    stage.wait_for_copy()?;
    // The whole repository, as if its disk were gone.
    let (place, away) = (stage.world.repository.path().to_owned(), stage.world.scratch.join("away"));
    std::fs::rename(&place, &away)?;
    stage.host.speed_up()?;
    let files_are_open = || {
        let session = stage.server.sessions()?.pop().context("no session")?;
        Ok(session.get("state") == Some(&"retrying".into()) || session.get("step") != Some(&"copy".into()))
    };
    wait_until("a restore that misses its repository", Duration::from_secs(120), files_are_open)?;
    std::fs::rename(&away, &place)?;
    // Who ordered it may not any more.
    let root = stage.world.pghydrant.as_user(&OsUser::current());
    let state = stage.world.scratch.join("server-state").display().to_string();
    root.succeed(["serve", "--state", &state, "--revoke-token", "tests"])?;
    stage.server.command(["sessions"]).finish()?.expect_code(1)?.expect_stderr(&["does not know this token"])?;
    // The answer that was under way goes on to the end of what was ordered.
    client.wait()?.expect_code(0)?;
    let restored = Instance::running_in(&stage.target())?;
    assert_eq!(restored.number("SELECT count(*) FROM pgbench_accounts")?, 500_000);
    assert_eq!(restored.number("SELECT count(*) FROM later")?, 1);
    restored.stop("fast")
}
