//! The mount server: restores on other hosts, ordered from anywhere, and what becomes of them when something fails.

use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::support::process::wait_until;
use crate::support::target::{MountServer, TargetHost};
use crate::support::*;

/// A cluster with a backup and WAL behind it, a host, and a mount server.
pub struct Stage {
    pub server: MountServer,
    pub host: TargetHost,
    pub world: World,
}

const ROWS: i64 = 200_000;

impl Stage {
    pub fn new(options: &[&str]) -> Result<Self> {
        Self::of(World::new(2)?, options)
    }

    pub fn of(world: World, options: &[&str]) -> Result<Self> {
        Self::on(world, TargetHost::new, options)
    }

    fn on(world: World, host: impl FnOnce(&Scratch) -> Result<TargetHost>, options: &[&str]) -> Result<Self> {
        world.backup()?;
        world.cluster.sql("CREATE TABLE later AS SELECT 1 AS id")?;
        world.cluster.archive_wal()?;
        let host = host(&world.scratch)?;
        let server = MountServer::start(&world.scratch, &world.repository, &host, options)?;
        Ok(Self { server, host, world })
    }

    pub fn target(&self) -> std::path::PathBuf {
        self.world.scratch.join("restored")
    }

    /// The restored server has every row, of the backup and of the WAL, and every page is right.
    pub fn check(&self) -> Result<()> {
        let restored = Instance::running_in(&self.target())?;
        assert_eq!(restored.number("SELECT count(*) FROM pgbench_accounts")?, ROWS);
        assert_eq!(restored.number("SELECT count(*) FROM later")?, 1);
        restored.check_relations()?;
        restored.stop("fast")?;
        restored.check_pages()
    }

    pub fn session_id(&self) -> Result<String> {
        let session = self.server.sessions()?.pop().context("no session")?;
        Ok(session.get("session").and_then(Value::as_str).context("no id")?.to_owned())
    }

    /// What a session has on its target while it is not over.
    pub fn agent_directory(&self) -> Result<std::path::PathBuf> {
        Ok(Path::new("/var/cache/pghydrant/sessions").join(self.session_id()?))
    }

    /// Waits until the copy runs.
    /// The session has nothing more to copy.
    pub fn is_over_the_copy(&self) -> Result<bool> {
        let session = self.server.sessions()?.pop().context("no session")?;
        let is = |what: &str, of: &[&str]| session.get(what).and_then(Value::as_str).is_some_and(|it| of.contains(&it));
        Ok(is("step", &["configure", "start", "recover", "unmount"])
            || is("state", &["at_target", "finished", "failed"]))
    }

    pub fn wait_for_copy(&self) -> Result<()> {
        wait_until("a copy that has begun", Duration::from_secs(120), || {
            let Some(session) = self.server.sessions()?.pop() else { return Ok(false) };
            let bytes = session.pointer("/progress/bytes").and_then(Value::as_u64);
            Ok(session.get("step") == Some(&"copy".into()) && bytes.is_some_and(|bytes| bytes > 0))
        })
    }
}

/// What a restore to another host needs, and what else a test does.
macro_rules! requires_network {
    ($($more:expr),*) => {
        requires!(
            Root,
            Postgres,
            Fuse,
            Tool("ip", "iproute2"),
            Tool("sshd", "openssh-server"),
            Tool("ssh", "openssh-client"),
            // Asks for figures.
            Tool("curl", "curl")
            $(, $more)*
        );
    };
}

#[test]
fn a_restore_on_another_host_leaves_a_running_server_there_and_nothing_else() -> Result<()> {
    requires_network!();
    let stage = Stage::new(&[])?;
    let restored = stage.server.restore(&stage.host, &stage.target(), &["--json"]).succeed()?;
    let result = restored.json()?;
    assert_eq!(result.get("state"), Some(&"running".into()), "{restored}");
    assert!(result.get("text").is_none() && result.get("at").is_none(), "{restored}");
    stage.check()?;
    let session = stage.server.sessions()?.pop().context("no session")?;
    assert_eq!(session.get("state"), Some(&"finished".into()));
    assert!(!stage.agent_directory()?.exists());
    assert!(!Path::new("/run/media/pghydrant").join(stage.session_id()?).exists());
    assert_eq!(std::fs::read_dir(stage.world.scratch.join("server-state/service/leases"))?.count(), 0);
    // The commands on the repository say what they say beside it.
    for verb in [&["list"][..], &["show"], &["list", "--json"]] {
        let words = stage.world.repository.arguments(verb, &[]);
        let here = stage.world.pghydrant.succeed(words)?;
        let there = stage.server.command([verb, &["--cluster", "main"]].concat()).succeed()?;
        assert_eq!(here.stdout, there.stdout);
    }
    Ok(())
}

#[test]
fn a_host_without_fuse_copies_blocks_from_the_mount_server() -> Result<()> {
    requires_network!();
    let mut stage = Stage::on(World::new(2)?, TargetHost::without_fuse, &["--retries", "20", "--retry-every", "3s"])?;
    let plan = stage.server.restore(&stage.host, &stage.target(), &["--plan"]).succeed()?;
    assert!(plan.stdout.contains("from the repository's blocks") && plan.stdout.contains("(is made)"), "{plan}");
    assert!(!stage.target().exists() && !stage.agent_directory()?.exists());
    let mount = stage.server.restore(&stage.host, &stage.target(), &["--source", "mount", "--plan"]).finish()?;
    mount.expect_code(3)?.expect_stderr(&["FUSE cannot be used", "--source blocks"])?;
    let mount = stage.server.restore(&stage.host, &stage.target(), &["--source", "mount"]).finish()?;
    mount.expect_code(3)?.expect_stderr(&["FUSE cannot be used", "--source blocks"])?;
    assert!(!stage.target().exists());
    stage.host.slow(16)?;
    let client = stage.server.restore(&stage.host, &stage.target(), &[]).start()?;
    stage.wait_for_copy()?;
    // Requests that are on the way are made again.
    stage.server.kill()?;
    stage.server.start_again()?;
    stage.host.speed_up()?;
    client.wait()?.expect_code(0)?.expect_stderr(&["blocks are copied from the mount server directly"])?;
    stage.check()
}

#[test]
fn a_restore_goes_on_when_the_cable_the_services_and_the_agent_are_lost() -> Result<()> {
    requires_network!();
    let mut stage = Stage::new(&["--retries", "20", "--retry-every", "3s"])?;
    stage.host.slow(8)?;
    let client = stage.server.restore(&stage.host, &stage.target(), &["--json"]).start()?;
    stage.wait_for_copy()?;
    // The cable, for longer than SSH waits.
    stage.host.cut()?;
    std::thread::sleep(Duration::from_secs(18));
    stage.host.mend()?;
    // Both services.
    stage.server.kill()?;
    stage.server.start_again()?;
    // The restore itself, on its host.
    let agent = stage.agent_directory()?;
    let pid: i32 = std::fs::read_to_string(agent.join("lock"))?.trim().parse()?;
    let pid = rustix::process::Pid::from_raw(pid).context("no process")?;
    rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
    stage.host.speed_up()?;
    let finished = client.wait()?.expect_code(0)?;
    assert_eq!(finished.json()?.get("state"), Some(&"running".into()), "{finished}");
    stage.check()?;
    assert!(!agent.exists());
    Ok(())
}

#[test]
fn a_restore_that_is_given_up_waits_for_retry_and_goes_on_from_there() -> Result<()> {
    requires_network!();
    let stage = Stage::new(&["--retries", "1", "--retry-every", "1s"])?;
    stage.host.slow(8)?;
    let client = stage.server.restore(&stage.host, &stage.target(), &[]).start()?;
    stage.wait_for_copy()?;
    stage.host.cut()?;
    let given_up = client.wait()?.expect_code(6)?.expect_stderr(&["pghydrant retry "])?;
    assert!(!given_up.stderr.contains("panicked"));
    let session = stage.server.wait_for("waiting")?;
    let id = stage.session_id()?;
    assert!(session.get("message").and_then(Value::as_str).is_some_and(|message| !message.is_empty()));
    stage.host.mend()?;
    stage.host.speed_up()?;
    stage.server.command(["retry", &id]).succeed()?;
    stage.check()
}

#[test]
fn a_server_that_is_paused_over_there_is_moved_on_promoted_or_taken_away() -> Result<()> {
    requires_network!();
    let stage = Stage::new(&[])?;
    let pause = ["--target-immediate", "--action", "pause"];
    stage.server.restore(&stage.host, &stage.target(), &pause).succeed()?;
    let first = stage.session_id()?;
    stage.server.wait_for("at_target")?;
    // A refused order changes nothing.
    stage.server.command(["retarget", &first, "--target-name", "nowhere"]).finish()?.expect_code(3)?;
    stage.server.wait_for("at_target")?;
    stage.server.command(["retry", &first]).finish()?.expect_code(2)?.expect_stderr(&["there is nothing to retry"])?;
    stage.server.command(["cancel", &first]).succeed()?;
    assert!(!stage.target().exists());
    stage.server.restore(&stage.host, &stage.target(), &pause).succeed()?;
    let second = stage.session_id()?;
    assert_ne!(first, second);
    stage.server.command(["promote", &second]).succeed()?;
    let restored = Instance::running_in(&stage.target())?;
    assert_eq!(restored.number("SELECT count(*) FROM pgbench_accounts")?, ROWS);
    stage.server.command(["promote", &second]).finish()?.expect_code(2)?.expect_stderr(&["is finished"])?;
    Ok(())
}

#[test]
fn what_cannot_be_done_over_there_is_refused_with_one_line() -> Result<()> {
    requires_network!();
    let stage = Stage::new(&[])?;
    let (target, server) = (stage.target(), &stage.server);
    let to = target.display().to_string();
    let restore = ["restore", "--cluster", "main", "--to", &to];
    let with = |more: &[&str]| server.command([&restore[..], more].concat()).finish();
    let identity = stage.world.scratch.join("target.key").display().to_string();
    let address = format!("root@{}", stage.host.address);
    let nobody = format!("root@{}", stage.host.seen_as);
    // Refused before anything is sent anywhere.
    with(&[])?.expect_code(2)?.expect_stderr(&["--target [USER@]HOST[:PORT]"])?;
    with(&["--target=-oProxyCommand=touch x"])?.expect_code(2)?.expect_stderr(&["is not a target"])?;
    with(&["--target", &address, "--ssh-option", "ProxyCommand=id"])?
        .expect_code(2)?
        .expect_stderr(&["may not set"])?;
    with(&["--target", &address, "--repo", "/x"])?.expect_code(2)?.expect_stderr(&["--server and --repo"])?;
    // No host key, no key, no sshd, no host.
    let known = stage.world.scratch.join("target.known");
    let kept = std::fs::read(&known)?;
    std::fs::write(&known, "")?;
    with(&["--target", &address, "--identity", &identity])?
        .expect_code(1)?
        .expect_stderr(&["Host key", "known_hosts"])?;
    std::fs::write(&known, kept)?;
    let inject = format!("HostName=x'$(touch {to})'");
    with(&["--target", &address, "--ssh-option", &inject])?.expect_code(2)?.expect_stderr(&["may not set"])?;
    with(&["--target", &address])?.expect_code(1)?.expect_stderr(&["Permission denied", "--identity"])?;
    let closed = format!("{nobody}:1");
    with(&["--target", &closed])?.expect_code(1)?.expect_stderr(&["cannot reach", "refused"])?;
    // The target's own preflight.
    let occupied = stage.world.scratch.path().display().to_string();
    let all = [&["restore", "--cluster", "main", "--to", &occupied][..]].concat();
    let words: Vec<String> = all.iter().map(|&word| word.to_owned()).chain(stage.host.options()).collect();
    server.command(words).finish()?.expect_code(3)?.expect_stderr(&["error: "])?;
    assert!(
        !target.exists() && server.sessions()?.iter().all(|session| session.get("state") == Some(&"failed".into()))
    );
    // Tokens and certificates.
    let wrong = stage.world.scratch.join("wrong-token");
    std::fs::write(&wrong, format!("pgh_{}", "0".repeat(64)))?;
    let wrong = wrong.display().to_string();
    let root = stage.world.pghydrant.as_user(&OsUser::current());
    let sessions = ["sessions", "--server", &server.url(), "--token-file", &wrong].map(str::to_owned);
    root.run(&sessions)?.expect_code(1)?.expect_stderr(&["does not know this token"])?;
    let other = format!("SHA256:{}", "00".repeat(32));
    server
        .command(["sessions", "--fingerprint", &other])
        .finish()?
        .expect_code(1)?
        .expect_stderr(&["another certificate"])?;
    let state = stage.world.scratch.join("server-state").display().to_string();
    root.succeed(["serve", "--state", &state, "--revoke-token", "tests"])?;
    server.command(["sessions"]).finish()?.expect_code(1)?.expect_stderr(&["does not know this token"])?;
    Ok(())
}
