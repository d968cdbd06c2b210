//! Watching a server that recovers, until it has done something: promoted, paused, shut down, or died.
//!
//! What the server did is read from what it left behind, never from what it was told: `recovery.signal` or
//! `standby.signal` (which it removes at the end of recovery), `pg_control`, `postmaster.pid`, its log and, where a login is possible, SQL through
//! the private socket. [`verdict`] decides from these alone and is pure.
//!
//! Traps that this file steps around:
//! - A server asked to pause where no hot standby was active promotes instead, and says so only in its log.
//! - A server whose target is missing replays everything, then dies: the copy is good, the target was not.
//! - A hot standby with fewer connections than its primary had pauses on its own, before the target.
//! - In a fresh copy `pg_control` still says "in production", as the backup found it.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use engine::units::{Lsn, SessionId, Timeline};
use engine::wal::name::{SegmentName, WalFile};
use serde::Serialize;

use super::claim;
use super::conf::Setting;
use super::staging::Stager;
use super::standby::{self, AtEnd, Look, Vigil};
use super::target::Action;

use crate::context::Context;
use crate::exit::{Exit, Failure};
use crate::human;
use crate::postgres::client::Client;
use crate::postgres::conninfo::Conninfo;
use crate::postgres::control::State;
use crate::postgres::instance::{Condition, Instance, StopMode};
use crate::postgres::log;
use crate::postgres::postmaster::Status;

/// Between two looks: what the user waits for at the end of a recovery. A look asks the server by SQL and reads its log, so
/// of a recovery that takes long it is a longer pause, a share of what it took so far.
const POLL_MIN: Duration = Duration::from_millis(2);
const POLL_MAX: Duration = Duration::from_millis(20);
const POLL_SHARE: u32 = 50;
/// Between two attempts to log in while the server is not ready for it.
const LOGIN_PAUSE: Duration = Duration::from_millis(500);
/// Between two objects for a program, and two lines in a log.
const TELL_PAUSE: Duration = Duration::from_secs(1);
/// A server that was asked to leave its pause does so at once; a request that was lost must not be waited for.
const PROMOTE_PATIENCE: Duration = Duration::from_secs(30);
/// How long a server may take to stop after an interrupt before it is stopped at once.
const STOP_PATIENCE: Duration = Duration::from_secs(60);
/// The same once it has begun a timeline: it writes the checkpoint that ends the recovery, and without that a start by
/// somebody else, with no signal file any more, would replay past the target.
const LAST_CHECKPOINT: Duration = Duration::from_secs(15 * 60);

/// What the server did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Left recovery.
    Promoted,
    /// Waits at the target, readable.
    Paused,
    /// Stopped at the target.
    ShutDown,
    /// Paused before its target: a hot standby needs at least this value of this setting.
    TooSmall(Setting),
    /// Waits at the end of the WAL, and nobody can read it.
    Unreadable,
    /// Died, or stopped somewhere else.
    Failed(String),
}

/// How far the replay is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Position {
    /// Last record replayed.
    pub(crate) lsn: Option<Lsn>,
    /// Commit time of the last transaction replayed, as the server prints it.
    pub(crate) time: Option<String>,
}

/// A recovery that ended.
#[derive(Clone, Debug)]
pub(crate) struct Recovered {
    pub(crate) outcome: Outcome,
    pub(crate) position: Position,
    /// Where the server says that it stopped: `recovery stopping before commit of transaction 742, time …`.
    pub(crate) stopped_at: Option<String>,
    /// The timeline that a promotion began.
    pub(crate) new_timeline: Option<Timeline>,
}

/// What is watched.
#[derive(Debug)]
pub(crate) struct Watch<'a> {
    pub(crate) context: &'a Context,
    pub(crate) instance: &'a Instance,
    /// Told which segments the server has restored.
    pub(crate) stager: Option<&'a Stager>,
    pub(crate) segment_bytes: u64,
    pub(crate) log: PathBuf,
    /// Where in the log this run of the server begins: what an earlier one did says nothing of this one.
    pub(crate) log_start: u64,
    pub(crate) socket_directory: PathBuf,
    pub(crate) port: u16,
    /// Users and databases to try: none of them must be there.
    pub(crate) logins: Vec<(String, &'static str)>,
    /// The server waited at its target and was asked to leave recovery.
    pub(crate) promoting: bool,
    /// The target's: a promotion begins a later one.
    pub(crate) timeline: Timeline,
    /// What a standby is told to do at the end of the WAL.
    pub(crate) waits_at_the_end: Option<Action>,
    /// Shown beside the position.
    pub(crate) target: String,
}

impl Watch<'_> {
    /// Watches until the server has done something. An interrupt stops the server, for `retry`.
    pub(crate) fn until_it_stops(&self) -> anyhow::Result<Recovered> {
        let mut words = Log::new(&self.log, self.log_start);
        let mut login = Login { candidates: self.logins.clone(), client: None, next: Instant::now() };
        let mut position = Position::default();
        let mut told = Instant::now();
        let began = Instant::now();
        let data = self.instance.data_directory();
        let mut vigil = self.waits_at_the_end.map(|action| Vigil::new(action, data, self.segment_bytes));
        loop {
            if self.context.interrupted() {
                words.read_on();
                let patience = if words.facts.new_timeline.is_some() { LAST_CHECKPOINT } else { STOP_PATIENCE };
                self.instance.stop(StopMode::Fast, patience)?;
                return Err(Failure::new(Exit::Interrupted, "interrupted while the server was recovering").into());
            }
            // In this order: what is read later is never older than what is read first.
            let sql = login.look(self);
            words.read_on();
            self.tell_stager(&words.facts);
            let at_end = match &mut vigil {
                Some(vigil) => self.keep(vigil, sql.as_ref(), &login, &words.facts)?,
                None => AtEnd::NotYet,
            };
            let seen = Seen { at_end, ..self.look(sql.as_ref(), &words.facts)? };
            if let Some(sql) = sql {
                position = Position { lsn: sql.lsn.or(position.lsn), time: sql.time.or(position.time) };
            } else if words.facts.lsn > position.lsn {
                position.lsn = words.facts.lsn;
            }
            let outcome = verdict(&seen);
            if outcome == Some(Outcome::Paused) && self.promoting && began.elapsed() < PROMOTE_PATIENCE {
                // It was asked to go on, and has not yet.
            } else if let Some(outcome) = outcome {
                let Facts { stopped_at, new_timeline, .. } = words.facts;
                return Ok(Recovered { outcome, position, stopped_at, new_timeline });
            }
            if told.elapsed() >= TELL_PAUSE {
                told = Instant::now();
                self.tell(&position, &words.facts);
            }
            std::thread::sleep((began.elapsed() / POLL_SHARE).clamp(POLL_MIN, POLL_MAX));
        }
    }

    fn look<'b>(&self, sql: Option<&Answer>, log: &'b Facts) -> anyhow::Result<Seen<'b>> {
        let condition = self.instance.condition()?;
        let signal = standby::is_signalled(self.instance.data_directory());
        // While the server starts, the file may be between two versions of itself: read again at the next look.
        let control = self.instance.control()?;
        let reason = match condition {
            Condition::Down => self.instance.failure_since_start()?,
            Condition::Up(_) => None,
        };
        Ok(Seen {
            condition,
            signal,
            state: control.state,
            is_a_primarys: claim::is_a_primarys(&control, self.timeline),
            in_recovery: sql.map(|sql| sql.in_recovery),
            paused: sql.is_some_and(|sql| sql.paused),
            at_end: AtEnd::NotYet,
            log,
            reason,
        })
    }

    /// The watch for the end of the WAL, where a standby is told what to do.
    fn keep(&self, vigil: &mut Vigil, sql: Option<&Answer>, login: &Login, log: &Facts) -> anyhow::Result<AtEnd> {
        let Condition::Up(status) = self.instance.condition()? else { return Ok(vigil.last()) };
        // It paused by itself, and is started again with what it lacks.
        if log.too_small.is_some() {
            return Ok(AtEnd::NotYet);
        }
        let restored = self.restored(log).map(|segment| (segment.number, log.segment_times));
        let paused = sql.is_some_and(|sql| sql.paused);
        vigil.look(self.instance, &Look { restored, status, paused, client: login.client.as_ref() })
    }

    fn tell_stager(&self, log: &Facts) {
        if let (Some(stager), Some(segment)) = (self.stager, self.restored(log)) {
            stager.restored(segment);
        }
    }

    /// The segment that the server has restored last.
    fn restored(&self, log: &Facts) -> Option<SegmentName> {
        match WalFile::parse(log.segment.as_ref()?, self.segment_bytes)? {
            WalFile::Segment(segment) => Some(segment),
            _ => None,
        }
    }

    fn tell(&self, position: &Position, log: &Facts) {
        let lsn = position.lsn.map_or_else(|| "starting".to_owned(), |lsn| format!("at {lsn}"));
        let time = position.time.as_ref().map(|time| format!(", {time}")).unwrap_or_default();
        let file = log.segment.as_ref().map(|name| format!(", {name}")).unwrap_or_default();
        self.context.output.live(&format!("recovering: {lsn}{time}{file}, to {}", self.target));
        self.context.output.event(
            "recovery",
            &serde_json::json!({"lsn": position.lsn, "time": position.time, "segment": log.segment, "target": self.target}),
        );
    }
}

/// What one look showed.
#[derive(Clone, Debug)]
struct Seen<'a> {
    condition: Condition,
    /// `recovery.signal` or `standby.signal` is there.
    signal: bool,
    state: State,
    /// `pg_control`, without the signal, is that of a server that has left recovery.
    is_a_primarys: bool,
    /// By SQL.
    in_recovery: Option<bool>,
    /// By SQL: `pg_get_wal_replay_pause_state()` is `paused`.
    paused: bool,
    /// A standby at the end of the WAL.
    at_end: AtEnd,
    log: &'a Facts,
    /// The log's last `FATAL`, where the server is down.
    reason: Option<String>,
}

/// What the server has done; nothing while it is still at it.
fn verdict(seen: &Seen<'_>) -> Option<Outcome> {
    let log = seen.log;
    match seen.condition {
        Condition::Up(status) => {
            if let Some(setting) = &log.too_small {
                return Some(Outcome::TooSmall(setting.clone()));
            }
            match seen.at_end {
                AtEnd::Told if seen.paused && seen.in_recovery == Some(true) => return Some(Outcome::Paused),
                AtEnd::Readable => return Some(Outcome::Paused),
                AtEnd::Unreadable => return Some(Outcome::Unreadable),
                AtEnd::Inconsistent => {
                    let reason = "the archived WAL ends before the end of the backup: the data are not consistent";
                    return Some(Outcome::Failed(reason.to_owned()));
                }
                AtEnd::NotYet | AtEnd::Told => {}
            }
            // It says so before it leaves recovery as well, and no more after that.
            if log.pausing
                && seen.signal
                && seen.in_recovery != Some(false)
                && (seen.paused || seen.in_recovery.is_none())
            {
                return Some(Outcome::Paused);
            }
            let left = match seen.in_recovery {
                Some(in_recovery) => !in_recovery,
                None => status == Some(Status::Ready) && seen.state == State::InProduction,
            };
            (left && !seen.signal).then_some(Outcome::Promoted)
        }
        Condition::Down
            if seen.state == State::ShutDownInRecovery && (log.shut_down_at_target || seen.at_end == AtEnd::Told) =>
        {
            Some(Outcome::ShutDown)
        }
        Condition::Down if log.too_small.is_some() => log.too_small.clone().map(Outcome::TooSmall),
        Condition::Down if !seen.signal && seen.is_a_primarys => Some(Outcome::Promoted),
        Condition::Down => {
            let reason =
                seen.reason.clone().unwrap_or_else(|| "the server was stopped before it reached its target".to_owned());
            Some(Outcome::Failed(reason))
        }
    }
}

/// What SQL says.
#[derive(Clone, Debug)]
struct Answer {
    in_recovery: bool,
    paused: bool,
    lsn: Option<Lsn>,
    time: Option<String>,
}

const QUESTION: &str = "SELECT in_recovery, \
    CASE WHEN in_recovery THEN pg_get_wal_replay_pause_state() = 'paused' ELSE false END, \
    pg_last_wal_replay_lsn()::text, pg_last_xact_replay_timestamp()::text FROM pg_is_in_recovery() AS in_recovery";

/// A session through the private socket, once one is possible.
struct Login {
    candidates: Vec<(String, &'static str)>,
    client: Option<Client>,
    next: Instant,
}

/// Refusals that stay: of a role or a database that is not there, or lets nobody in.
const NO_LOGIN: [&str; 3] = ["does not exist", "is not permitted to log in", "is not currently accepting connections"];

impl Login {
    fn look(&mut self, watch: &Watch<'_>) -> Option<Answer> {
        if self.client.is_none() {
            self.connect(watch);
        }
        match self.client.as_ref()?.row(QUESTION, &[]).and_then(|row| answer(&row)) {
            Ok(answer) => Some(answer),
            Err(error) => {
                tracing::debug!("the server answers no more: {error:#}");
                self.client = None;
                self.next = Instant::now() + LOGIN_PAUSE;
                None
            }
        }
    }

    fn connect(&mut self, watch: &Watch<'_>) {
        let ready = matches!(watch.instance.condition(), Ok(Condition::Up(Some(Status::Ready | Status::Standby))));
        if !ready || Instant::now() < self.next {
            return;
        }
        let Some((user, database)) = self.candidates.first() else { return };
        let conninfo = Conninfo::local(&watch.socket_directory, watch.port, user, database);
        match Client::connect(&conninfo) {
            Ok(client) => self.client = Some(client),
            Err(error) => {
                tracing::debug!("{error:#}");
                self.next = Instant::now() + LOGIN_PAUSE;
                let error = format!("{error:#}");
                if NO_LOGIN.iter().any(|refusal| error.contains(refusal)) {
                    // The next one at once; without any, the log and pg_control must do.
                    self.candidates.remove(0);
                    self.next = Instant::now();
                }
            }
        }
    }
}

fn answer(row: &tokio_postgres::Row) -> anyhow::Result<Answer> {
    use crate::postgres::client::value;
    let lsn: Option<String> = value(row, 2)?;
    Ok(Answer {
        in_recovery: value(row, 0)?,
        paused: value(row, 1)?,
        lsn: lsn.and_then(|text| text.parse().ok()),
        time: value(row, 3)?,
    })
}

/// What the log says of the server's present run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Facts {
    stopped_at: Option<String>,
    pausing: bool,
    shut_down_at_target: bool,
    /// What a hot standby lacks.
    too_small: Option<Setting>,
    expects_too_small: bool,
    new_timeline: Option<Timeline>,
    segment: Option<String>,
    /// How many times in a row it was restored.
    segment_times: u32,
    lsn: Option<Lsn>,
}

impl Facts {
    /// Takes in one line. `lc_messages` is `C` and the prefix is ours while the server recovers.
    fn absorb(&mut self, line: &str) {
        let after = |marker: &str| line.split_once(marker).map(|(_, rest)| rest.trim_end());
        if after("LOG:  starting PostgreSQL").is_some() {
            *self = Self::default();
        }
        if let Some(rest) = after("LOG:  recovery stopping ") {
            self.stopped_at = Some(format!("recovery stopping {rest}"));
        }
        if let Some(rest) = after("LOG:  restored log file \"") {
            let segment = rest.split('"').next().map(str::to_owned);
            self.segment_times = if segment == self.segment { self.segment_times + 1 } else { 1 };
            self.segment = segment;
        }
        if let Some(rest) = after("current LSN: ") {
            self.lsn = rest.parse().ok().or(self.lsn);
        }
        if let Some(rest) = after("LOG:  selected new timeline ID: ") {
            self.new_timeline = rest.parse().ok().map(Timeline);
        }
        self.pausing |= after("LOG:  pausing at the end of recovery").is_some();
        self.shut_down_at_target |= after("LOG:  shutdown at recovery target").is_some();
        // Before it is consistent it does not pause: it gives up, and knows more at its next start.
        if after("hot standby is not possible because of insufficient parameter settings").is_some()
            || after("FATAL:  recovery aborted because of insufficient parameter settings").is_some()
        {
            self.expects_too_small = true;
        } else if let (true, Some(detail)) = (self.expects_too_small, after("DETAIL:  ")) {
            self.expects_too_small = false;
            self.too_small = wanted_setting(detail);
        }
    }
}

/// `max_connections = 100 is a lower setting than on the primary server, where its value was 150.`
fn wanted_setting(detail: &str) -> Option<Setting> {
    let (name, rest) = detail.split_once(" = ")?;
    let (_, value) = rest.split_once("where its value was ")?;
    let value: u32 = value.trim_end_matches('.').parse().ok()?;
    Some(Setting::new(name, value.to_string()))
}

/// The server's log, read on from where it was.
struct Log {
    path: PathBuf,
    offset: u64,
    facts: Facts,
}

impl Log {
    /// From `offset` on; every start of the server in it begins anew.
    fn new(path: &Path, offset: u64) -> Self {
        Self { path: path.to_owned(), offset, facts: Facts::default() }
    }

    /// Takes in the whole lines that came since. A log that cannot be read is no reason to stop watching.
    fn read_on(&mut self) {
        if let Err(cause) = self.try_read_on() {
            tracing::debug!("cannot read {}: {cause}", self.path.display());
        }
    }

    fn try_read_on(&mut self) -> std::io::Result<()> {
        let mut file = File::open(&self.path)?;
        file.seek(SeekFrom::Start(self.offset))?;
        let mut lines = BufReader::new(file);
        let mut line = Vec::new();
        loop {
            line.clear();
            let bytes = lines.read_until(b'\n', &mut line)?;
            if line.last() != Some(&b'\n') {
                return Ok(());
            }
            self.offset += bytes as u64;
            self.facts.absorb(&String::from_utf8_lossy(&line));
        }
    }
}

/// The reason of a failed recovery, with the cure where there is one.
pub(crate) fn failure(reason: &str, id: &SessionId, log: &Path) -> anyhow::Error {
    let missed = reason.contains("recovery ended before configured recovery target was reached");
    let early = reason.contains("requested recovery stop point is before consistent recovery point");
    let fault = reason.contains(" from archive").then(|| fetch_fault(log)).flatten();
    let hint = if missed {
        format!(
            "the archived WAL ends before the target; `pghydrant retarget {id}` takes it to the end of the WAL, `pghydrant cancel {id}` removes the copy"
        )
    } else if early {
        format!("`pghydrant cancel {id}`, then choose an earlier backup with --backup")
    } else {
        let log = log.display();
        format!("its log is {log}; `pghydrant retry {id}` starts it again, `pghydrant cancel {id}` removes the copy")
    };
    let corrupt = fault.as_ref().is_some_and(|fault| fault.contains(" is corrupt"));
    let exit = if corrupt { Exit::Corrupt } else { Exit::Recovery };
    let fault = fault.map(|fault| format!(" ({fault})")).unwrap_or_default();
    Failure::new(exit, format!("recovery failed: {reason}{fault}")).hint(hint).into()
}

/// What `wal fetch` said last: its words are in the server's log, before the server's own.
fn fetch_fault(path: &Path) -> Option<String> {
    let text = log::tail(path, 0).ok()?;
    text.lines().rev().find_map(|line| line.strip_prefix("error: ")).map(str::to_owned)
}

/// `0/8A9A490, 2026-11-22 11:42:09+00`.
impl std::fmt::Display for Position {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (&self.lsn, &self.time) {
            (Some(lsn), Some(time)) => write!(f, "{lsn}, last transaction {time}"),
            (Some(lsn), None) => write!(f, "{lsn}"),
            (None, _) => f.write_str("its target"),
        }
    }
}

/// For the report: bytes of WAL a second.
pub(crate) fn replay_rate(from: Lsn, to: Option<Lsn>, time: Duration) -> Option<String> {
    let bytes = to?.0.checked_sub(from.0)?;
    (bytes > 0).then(|| format!("{} of WAL, {}", human::bytes(bytes), human::rate(bytes, time)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(lines: &[&str]) -> Facts {
        let mut facts = Facts::default();
        for line in lines {
            facts.absorb(&format!("2026-11-22 11:42:17.121 UTC [13837] {line}\n"));
        }
        facts
    }

    fn seen(condition: Condition, state: State, log: &Facts) -> Seen<'_> {
        Seen {
            condition,
            signal: true,
            state,
            is_a_primarys: state == State::InProduction,
            in_recovery: None,
            paused: false,
            at_end: AtEnd::NotYet,
            log,
            reason: None,
        }
    }

    #[test]
    fn a_fresh_copy_in_production_has_not_been_promoted() {
        let log = Facts::default();
        let starting = seen(Condition::Up(Some(Status::Starting)), State::InProduction, &log);
        assert_eq!(verdict(&starting), None);
        let ready = Seen { condition: Condition::Up(Some(Status::Ready)), ..starting.clone() };
        assert_eq!(verdict(&ready), None, "recovery.signal is still there");
        assert_eq!(verdict(&Seen { signal: false, ..ready }), Some(Outcome::Promoted));
        let by_sql = Seen { in_recovery: Some(true), signal: false, ..starting };
        assert_eq!(verdict(&by_sql), None);
    }

    #[test]
    fn a_pause_counts_at_the_target_alone() {
        let log = facts(&[
            "LOG:  recovery stopping at restore point \"rp2\", time x",
            "LOG:  pausing at the end of recovery",
        ]);
        assert_eq!(log.stopped_at.as_deref(), Some("recovery stopping at restore point \"rp2\", time x"));
        let up = seen(Condition::Up(Some(Status::Ready)), State::InArchiveRecovery, &log);
        assert_eq!(verdict(&up), Some(Outcome::Paused));
        assert_eq!(verdict(&Seen { in_recovery: Some(true), paused: true, ..up.clone() }), Some(Outcome::Paused));
        let resumed = Seen { in_recovery: Some(false), signal: false, ..up };
        assert_eq!(verdict(&resumed), Some(Outcome::Promoted));
        let unseen = Seen { in_recovery: None, ..resumed };
        assert_eq!(verdict(&unseen), None, "the end of recovery is being written");
        assert_eq!(verdict(&Seen { state: State::InProduction, ..unseen }), Some(Outcome::Promoted));
        let nothing = Facts::default();
        let elsewhere = seen(Condition::Up(Some(Status::Ready)), State::InArchiveRecovery, &nothing);
        assert_eq!(verdict(&Seen { in_recovery: Some(true), paused: true, ..elsewhere }), None, "somebody paused it");
    }

    #[test]
    fn a_server_that_is_down_has_shut_down_at_its_target_or_failed() {
        let log = facts(&["LOG:  shutdown at recovery target"]);
        let down = seen(Condition::Down, State::ShutDownInRecovery, &log);
        assert_eq!(verdict(&down), Some(Outcome::ShutDown));
        let nothing = Facts::default();
        let stopped = seen(Condition::Down, State::ShutDownInRecovery, &nothing);
        assert!(matches!(verdict(&stopped), Some(Outcome::Failed(_))));
        let died =
            Seen { reason: Some("FATAL:  x".to_owned()), ..seen(Condition::Down, State::InArchiveRecovery, &nothing) };
        assert_eq!(verdict(&died), Some(Outcome::Failed("FATAL:  x".to_owned())));
    }

    #[test]
    fn a_hot_standby_that_lacks_connections_says_how_many_it_needs() {
        let log = facts(&[
            "WARNING:  hot standby is not possible because of insufficient parameter settings",
            "DETAIL:  max_connections = 10 is a lower setting than on the primary server, where its value was 100.",
        ]);
        let up = seen(Condition::Up(Some(Status::Ready)), State::InArchiveRecovery, &log);
        assert_eq!(verdict(&up), Some(Outcome::TooSmall(Setting::new("max_connections", "100"))));
        let log = facts(&[
            "FATAL:  recovery aborted because of insufficient parameter settings",
            "DETAIL:  max_wal_senders = 10 is a lower setting than on the primary server, where its value was 12.",
        ]);
        let down = seen(Condition::Down, State::InArchiveRecovery, &log);
        assert_eq!(verdict(&down), Some(Outcome::TooSmall(Setting::new("max_wal_senders", "12"))));
    }

    #[test]
    fn each_start_in_the_log_begins_anew() {
        let log = facts(&["LOG:  shutdown at recovery target", "LOG:  starting PostgreSQL 15.18 on x86_64"]);
        assert_eq!(log, Facts::default());
        assert_eq!(
            facts(&["LOG:  redo in progress, elapsed time: 10.00 s, current LSN: 0/8A9A490"]).lsn,
            Some(Lsn(0x8A9_A490))
        );
    }
}
