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

impl Request {
    /// The command line that does it, the state directory and the repository apart. `has_begun`: there is a journal.
    pub(super) fn words(&self, repository: &Path, has_begun: bool) -> Vec<String> {
        let id = self.session.to_string();
        let on_session = |verb: &str| vec![verb.to_owned(), id.clone()];
        match &self.order {
            Order::Restore if has_begun => on_session("retry"),
            Order::SkipCheck => [on_session("retry"), vec!["--skip-check".to_owned()]].concat(),
            Order::Cancel => on_session("cancel"),
            Order::Promote => on_session("promote"),
            Order::Retarget(options) => [on_session("retarget"), options.clone()].concat(),
            Order::Restore => {
                let ours = ["restore", "--repo", &repository.to_string_lossy(), "--session", &id];
                ours.into_iter().map(str::to_owned).chain(self.restore.iter().cloned()).collect()
            }
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
    // Before anything is written: a verb that runs must not find another's request.
    drop(run::lock(directory)?);
    let repository = directory.join(REPOSITORY);
    let address = serde_json::to_vec(&request.repository)?;
    if std::fs::read(&repository).ok().as_deref() != Some(&address[..]) {
        durable::write_atomically(&repository, &address, 0o600)?;
    }
    durable::write_atomically(&directory.join(REQUEST), &serde_json::to_vec(&request)?, 0o600)?;
    start(directory)?;
    Ok(Exit::Done)
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
            order,
            restore: ["--cluster", "main", "--to", "/srv/pg", "--port", "5433"].map(str::to_owned).to_vec(),
            repository: Value::Null,
        };
        let orders = [
            (
                Order::Restore,
                false,
                "restore --repo /d/repository.json --session 20261122T081500Z-3f9a1c --cluster main",
            ),
            (Order::Restore, true, "retry 20261122T081500Z-3f9a1c"),
            (Order::SkipCheck, true, "retry 20261122T081500Z-3f9a1c --skip-check"),
            (Order::Cancel, true, "cancel 20261122T081500Z-3f9a1c"),
            (Order::Promote, true, "promote 20261122T081500Z-3f9a1c"),
            (
                Order::Retarget(["--target-lsn".to_owned(), "0/5000000".to_owned()].to_vec()),
                true,
                "retarget 20261122T081500Z-3f9a1c --target-lsn 0/5000000",
            ),
        ];
        for (order, has_begun, expected) in orders {
            let words = request(order).words(Path::new("/d/repository.json"), has_begun);
            assert!(words.join(" ").starts_with(expected), "{words:?}");
            Cli::try_parse_from([vec!["pghydrant".to_owned(), "--relay".to_owned()], words].concat()).unwrap();
        }
    }
}
