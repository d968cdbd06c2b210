//! What the agent is told, and how it begins.

use std::fs::{File, OpenOptions};
use std::io::{BufRead as _, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use engine::Error;
use engine::io::durable;
use engine::units::SessionId;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::run;
use crate::exit::{Exit, Failure};
use crate::restore::verbs::Standing;
use crate::trust;

/// Longer than any request.
const REQUEST_BYTES_MAX: u64 = 1 << 20;
/// How long the process that runs the verb may take to say that it does.
const BEGIN_MAX: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(5);

/// One order for a session.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Request {
    pub(crate) session: SessionId,
    /// Of the orders of a session, which: one that comes late, behind the next, is not carried out.
    #[serde(default)]
    pub(crate) number: u32,
    pub(crate) order: Order,
    /// Options of `restore`, without the repository and the session.
    pub(crate) restore: Vec<String>,
    /// How the repository is reached: the content of `repository.json`.
    pub(crate) repository: Value,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Order {
    /// Restores, or goes on with it if it has begun.
    Restore,
    Cancel,
    Promote,
    /// With the options of `retarget`.
    Retarget(Vec<String>),
    /// Goes on, without the check that was asked for.
    SkipCheck,
}

/// What an order comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Does {
    /// This command line, the state directory apart.
    Verb(Vec<String>),
    /// Nothing: the session is in this state.
    Nothing(&'static str),
}

impl Request {
    /// What is to be done, by where the session stands there: an earlier run may have been killed before it could say
    /// where it had got. None: it has not begun, or everything of it is gone.
    pub(super) fn does(&self, repository: &Path, stands: Option<Standing>) -> Does {
        let id = self.session.to_string();
        let on_session =
            |verb: &str, options: &[String]| Does::Verb([&[verb.to_owned(), id.clone()][..], options].concat());
        match (&self.order, stands) {
            (Order::Restore, None) => {
                let ours = ["restore", "--repo", &repository.to_string_lossy(), "--session", &id];
                Does::Verb(ours.into_iter().map(str::to_owned).chain(self.restore.iter().cloned()).collect())
            }
            (Order::Cancel, None) => Does::Nothing("cancelled"),
            // Not to be cancelled any more either.
            (Order::Restore | Order::SkipCheck | Order::Promote | Order::Cancel, Some(Standing::Finished)) => {
                Does::Nothing(RUNNING)
            }
            (Order::Restore | Order::SkipCheck, Some(Standing::AtTarget(state))) => Does::Nothing(state),
            // Ordered before, and killed on the way: the journal says whereto.
            (Order::Promote | Order::Retarget(_), Some(Standing::OnItsWay)) => on_session("retry", &[]),
            (Order::Restore, _) => on_session("retry", &[]),
            (Order::SkipCheck, _) => on_session("retry", &["--skip-check".to_owned()]),
            (Order::Cancel, _) => on_session("cancel", &[]),
            (Order::Promote, _) => on_session("promote", &[]),
            (Order::Retarget(options), _) => on_session("retarget", options),
        }
    }
}

/// `agent begin`.
pub(super) fn begin(directory: &Path) -> anyhow::Result<Exit> {
    let mut text = Vec::new();
    let stdin = std::io::stdin().lock();
    stdin.take(REQUEST_BYTES_MAX).read_until(b'\n', &mut text).context("cannot read the request")?;
    let request: Request = serde_json::from_slice(&text)
        .map_err(|cause| Failure::new(Exit::Usage, format!("this is no request of a recovery service: {cause}")))?;
    let mut builder = std::fs::DirBuilder::new();
    // The instance's own user passes through, to the repository's address and to its restore_command.
    builder.recursive(true).mode(0o711);
    builder.create(directory).map_err(|cause| Error::io("create", directory, cause))?;
    trust::refuse_foreign_place(directory)?;
    // One order after the other, however many connections bring them.
    let _one = run::lock_in(directory, "begin.lock", BEGIN_MAX)?;
    let earlier = std::fs::read(directory.join(REQUEST)).ok();
    let earlier: Option<Request> = earlier.and_then(|text| serde_json::from_slice(&text).ok());
    if comes_late(earlier.as_ref(), &request) {
        return Err(Failure::new(Exit::Failed, "this order comes late: another has come behind it").into());
    }
    // Before anything is written: a verb that runs must not find another's request.
    run::stop_running(directory)?;
    drop(run::lock(directory)?);
    let repository = directory.join(REPOSITORY);
    let address = serde_json::to_vec(&request.repository)?;
    if std::fs::read(&repository).ok().as_deref() != Some(&address[..]) {
        durable::write_atomically(&repository, &address, 0o600)?;
    }
    durable::write_atomically(&directory.join(REQUEST), &serde_json::to_vec(&request)?, 0o600)?;
    let since = run::end_of_events(&directory.join(EVENTS))?;
    start(directory)?;
    writeln!(std::io::stdout(), "{BEGUN} {since}").context("cannot answer")?;
    Ok(Exit::Done)
}

/// Whether it was overtaken by the next: its connection was given up, and brought it all the same.
fn comes_late(earlier: Option<&Request>, request: &Request) -> bool {
    earlier.is_some_and(|earlier| earlier.number > 0 && earlier.number >= request.number)
}

/// Starts the process that runs the verb, and waits until it holds the lock: who follows then finds it.
fn start(directory: &Path) -> anyhow::Result<()> {
    let log = directory.join(LOG);
    let log = append(&log)?;
    let program = std::env::current_exe().context("cannot find our own binary")?;
    let mut command = Command::new(program);
    command.args(["agent", "run"]).arg(directory).current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
    let mut child = command.spawn().context("cannot start the agent")?;
    let deadline = Instant::now() + BEGIN_MAX;
    // Its stdout is closed as soon as it has the lock and the events; or when it has ended.
    let mut said = Vec::new();
    if let Some(mut stdout) = child.stdout.take() {
        stdout.read_to_end(&mut said).context("cannot hear the agent")?;
    }
    if said == run::STARTED {
        return Ok(());
    }
    while Instant::now() < deadline && child.try_wait().context("cannot wait for the agent")?.is_none() {
        std::thread::sleep(POLL);
    }
    let mut words = String::new();
    let mut log = File::open(directory.join(LOG)).map_err(|cause| Error::io("open", directory.join(LOG), cause))?;
    let _ = log.read_to_string(&mut words);
    let last = words.lines().last().unwrap_or("it said nothing").to_owned();
    Err(Failure::new(Exit::Failed, format!("the agent did not start: {last}")).into())
}

pub(super) fn append(path: &Path) -> anyhow::Result<File> {
    let mut options = OpenOptions::new();
    options.append(true).create(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    Ok(options.open(path).map_err(|cause| Error::io("open", path, cause))?)
}

/// `agent end`: only once no verb runs.
pub(super) fn end(directory: &Path) -> anyhow::Result<Exit> {
    if directory.exists() {
        trust::refuse_foreign_place(directory)?;
        drop(run::lock(directory)?);
        std::fs::remove_dir_all(directory).map_err(|cause| Error::io("remove", directory, cause))?;
        // The directories above it, and the binary, are of use to others only while there are others.
        take_away_unused(directory);
    }
    writeln!(std::io::stdout(), "ended").context("cannot answer")?;
    Ok(Exit::Done)
}

/// `<cache>/sessions/<id>` was the last: then the binary beside it goes as well, and what it lay in.
fn take_away_unused(directory: &Path) {
    let Some(sessions) = directory.parent() else { return };
    let Some(cache) = sessions.parent() else { return };
    if sessions.file_name() != Some("sessions".as_ref()) || std::fs::remove_dir(sessions).is_err() {
        return;
    }
    // Only where it is as the recovery service made it.
    if std::env::current_exe().is_ok_and(|program| program.starts_with(cache.join("bin"))) {
        let _ = std::fs::remove_dir_all(cache.join("bin"));
    }
    let _ = std::fs::remove_dir(cache);
}

/// What `agent begin` answers, and behind it where in the events those of the run begin.
pub(crate) const BEGUN: &str = "begun";
/// How the result of a restore calls one that is finished.
pub(crate) const RUNNING: &str = "running";
pub(super) const REPOSITORY: &str = "repository.json";
pub(super) const REQUEST: &str = "request.json";
pub(super) const EVENTS: &str = "events";
pub(super) const LOG: &str = "log";
pub(super) const STATE: &str = "state";

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use clap::Parser as _;

    use super::*;
    use crate::arguments::Cli;

    #[test]
    fn every_order_is_a_command_line_of_ours() {
        let request = |order| Request {
            session: "20261122T081500Z-3f9a1c".to_owned().try_into().unwrap(),
            number: 1,
            order,
            restore: ["--cluster", "main", "--to", "/srv/pg", "--port", "5433"].map(str::to_owned).to_vec(),
            repository: Value::Null,
        };
        let retarget = || Order::Retarget(["--target-lsn".to_owned(), "0/5000000".to_owned()].to_vec());
        let at_target = Some(Standing::AtTarget("paused"));
        let orders = [
            (
                Order::Restore,
                None,
                "restore --repo /d/repository.json --session 20261122T081500Z-3f9a1c --cluster main",
            ),
            (Order::Restore, Some(Standing::Down), "retry 20261122T081500Z-3f9a1c"),
            (Order::Promote, Some(Standing::Down), "promote 20261122T081500Z-3f9a1c"),
            (Order::Restore, Some(Standing::OnItsWay), "retry 20261122T081500Z-3f9a1c"),
            (Order::SkipCheck, Some(Standing::OnItsWay), "retry 20261122T081500Z-3f9a1c --skip-check"),
            (Order::Cancel, Some(Standing::OnItsWay), "cancel 20261122T081500Z-3f9a1c"),
            (Order::Cancel, at_target, "cancel 20261122T081500Z-3f9a1c"),
            (Order::Promote, at_target, "promote 20261122T081500Z-3f9a1c"),
            (retarget(), at_target, "retarget 20261122T081500Z-3f9a1c --target-lsn 0/5000000"),
            // Killed on the way to what was ordered.
            (Order::Promote, Some(Standing::OnItsWay), "retry 20261122T081500Z-3f9a1c"),
            (retarget(), Some(Standing::OnItsWay), "retry 20261122T081500Z-3f9a1c"),
        ];
        for (order, stands, expected) in orders {
            let Does::Verb(words) = request(order).does(Path::new("/d/repository.json"), stands) else {
                panic!("{expected}")
            };
            assert!(words.join(" ").starts_with(expected), "{words:?}");
            Cli::try_parse_from([vec!["pghydrant".to_owned(), "--relay".to_owned()], words].concat()).unwrap();
        }
        // Killed behind it, before it was told.
        for (order, stands, state) in [
            (Order::Restore, Some(Standing::Finished), "running"),
            (Order::Promote, Some(Standing::Finished), "running"),
            (Order::Restore, at_target, "paused"),
            (Order::Cancel, None, "cancelled"),
            (Order::Cancel, Some(Standing::Finished), "running"),
        ] {
            assert_eq!(request(order).does(Path::new("/d"), stands), Does::Nothing(state));
        }
    }

    #[test]
    fn an_order_that_comes_late_is_not_carried_out() {
        let request = |number| Request {
            session: "20261122T081500Z-3f9a1c".to_owned().try_into().unwrap(),
            number,
            order: Order::Restore,
            restore: Vec::new(),
            repository: Value::Null,
        };
        assert!(!comes_late(None, &request(1)) && !comes_late(Some(&request(1)), &request(2)));
        assert!(comes_late(Some(&request(2)), &request(1)) && comes_late(Some(&request(1)), &request(1)));
        // And no two at once.
        let directory = tempfile::tempdir().unwrap();
        let _held = run::lock_in(directory.path(), "begin.lock", Duration::ZERO).unwrap();
        assert!(run::lock_in(directory.path(), "begin.lock", Duration::from_millis(20)).is_err());
    }
}
