//! The end of the WAL as a place to wait at.
//!
//! PostgreSQL ignores `recovery_target_action` where no target is set: with `recovery.signal` it replays everything and
//! opens. So a restore to the end of the WAL that is to pause or shut down there runs as a standby without a primary:
//! with `standby.signal` the server replays everything, then keeps asking its archive for more. Who notices that it has
//! come to the end, and tells it what to do there, is this file.
//!
//! That it has come to the end is proven by what it asks for. `wal fetch` notes each segment which it has proven absent.
//! The first question may be of the server's reading ahead, which is at most one buffer in front of the replay, and which
//! asks again only when the replay has caught up; so a segment that was absent three times comes after a replay of
//! everything before it. Where the WAL ends inside a segment, the server brings that one again and again instead.
//!
//! Once it waits there, that end is the one that was restored to: [`mark_end`] keeps what is archived since from every later
//! start, until `retarget` moves it on.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use engine::hydration::SESSION_DIRECTORY;
use engine::units::Lsn;
use engine::wal::name::{SegmentName, WalFile};

use super::plan::Plan;
use super::target::Action;
use super::{files, staging};
use crate::postgres::client::Client;
use crate::postgres::instance::{Instance, StopMode};
use crate::postgres::postmaster::Status;

/// Recover, then open.
pub(super) const RECOVERY_SIGNAL: &str = "recovery.signal";
/// Recover, then ask for more.
pub(crate) const STANDBY_SIGNAL: &str = "standby.signal";

/// Where a backup's recovery begins.
const BACKUP_LABEL: &str = "backup_label";
/// Where `wal fetch` notes what is not there, in the staging directory.
const ABSENT: &str = "absent";
/// How many times the segment behind the end must have been absent: see above.
const ABSENT_TIMES: usize = 3;
/// How many times in a row a segment was restored that the WAL ends in.
const RESTORED_TIMES: u32 = 5;
/// A hot standby takes connections before it asks for what is not there; its first login may take a moment.
const LOGIN_PATIENCE: Duration = Duration::from_secs(15);
/// How long a standby may take to stop: it writes its last restartpoint, and what was stopped at once instead would not
/// stand at the end of the WAL.
const STOP_PATIENCE: Duration = Duration::from_secs(15 * 60);

/// Whether PostgreSQL would recover in this directory: it removes both files when it has left recovery.
pub(super) fn is_signalled(data: &Path) -> bool {
    [RECOVERY_SIGNAL, STANDBY_SIGNAL].iter().any(|name| data.join(name).exists())
}

/// `wal fetch` has proven that there is no such segment: noted, if a restore watches over this server.
pub(crate) fn note_absence(staging_directory: &Path, name: &str) {
    if !staging_directory.is_dir() {
        return;
    }
    let noted = std::fs::File::options()
        .append(true)
        .create(true)
        .open(staging_directory.join(ABSENT))
        .and_then(|mut file| file.write_all(format!("{name}\n").as_bytes()));
    if let Err(cause) = noted {
        tracing::warn!("cannot note in {} that {name} is not in the archive: {cause}", staging_directory.display());
    }
}

/// Where the session's directory says from which segment on there is no WAL for this server.
const END: &str = "end_of_wal";

/// See [`mark_end`].
pub(super) fn end_mark(plan: &Plan) -> PathBuf {
    plan.session_directory().join(END)
}

/// Keeps the server from whatever is archived behind `reached`, the end of what it has replayed: `wal fetch` asks.
pub(super) fn mark_end(plan: &Plan, reached: Lsn, segment_bytes: u64) -> anyhow::Result<()> {
    let next = SegmentName { timeline: plan.target.timeline, number: reached.0.div_ceil(segment_bytes) };
    files::write(&end_mark(plan), next.file_name(segment_bytes).as_bytes(), 0o600, &plan.owner)
}

/// Whether the segment `name` lies behind the end at which the server in `data` waits, or waited.
pub(crate) fn is_behind_the_end(data: &Path, name: &str) -> anyhow::Result<bool> {
    let path = data.join(SESSION_DIRECTORY).join(END);
    let end = match std::fs::read_to_string(&path) {
        Ok(end) => end,
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(cause) => return Err(engine::Error::io("read", path, cause).into()),
    };
    // Of any timeline: what follows the number of the timeline is the segment's, in as many digits.
    match (name.get(8..24), end.get(8..24)) {
        (Some(wanted), Some(end)) => Ok(wanted >= end),
        _ => Ok(false),
    }
}

/// Whether the segment that was absent last was absent often enough, and lies behind the last one that was restored.
fn is_proven(absent: &str, restored: Option<u64>, segment_bytes: u64) -> bool {
    let names: Vec<&str> = absent.lines().collect();
    let Some(last) = names.last() else { return false };
    let Some(WalFile::Segment(segment)) = WalFile::parse(last, segment_bytes) else { return false };
    let times = names.iter().filter(|name| *name == last).count();
    times >= ABSENT_TIMES && restored.is_none_or(|restored| segment.number > restored)
}

/// What one look at the server showed that is of interest here.
#[derive(Debug)]
pub(super) struct Look<'a> {
    /// The last segment that it restored, and how many times in a row.
    pub(super) restored: Option<(u64, u32)>,
    pub(super) status: Option<Status>,
    /// Paused, by SQL.
    pub(super) paused: bool,
    pub(super) client: Option<&'a Client>,
}

/// How far the server is with waiting at the end of the WAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AtEnd {
    /// It still replays.
    NotYet,
    /// It has been told to pause or to stop.
    Told,
    /// Nobody can log in to have it pause, but it is a hot standby, which reads and waits.
    Readable,
    /// It is no hot standby: nobody can read it.
    Unreadable,
    /// The end of the backup is not among what there is.
    Inconsistent,
}

/// The watch over a standby that is to wait at the end of the WAL.
#[derive(Debug)]
pub(super) struct Vigil {
    action: Action,
    absent: PathBuf,
    segment_bytes: u64,
    since: Option<Instant>,
}

impl Vigil {
    /// For a server in `data` that is to do `action` at the end of the WAL.
    pub(super) fn new(action: Action, data: &Path, segment_bytes: u64) -> Self {
        Self { action, absent: data.join(staging::DIRECTORY).join(ABSENT), segment_bytes, since: None }
    }

    /// Looks whether the end has come, and has the server do there what it was told to.
    pub(super) fn look(&mut self, instance: &Instance, look: &Look<'_>) -> anyhow::Result<AtEnd> {
        if self.since.is_none() && !self.has_come(look) {
            // Paused by a run of ours that was killed: it would not ask for more.
            if let (true, Some(client)) = (look.paused, look.client) {
                client.batch("SELECT pg_wal_replay_resume()")?;
            }
            return Ok(AtEnd::NotYet);
        }
        // It puts the label aside once it has found the checkpoint to begin at: before that it has replayed nothing.
        let has_begun = || !instance.data_directory().join(BACKUP_LABEL).exists();
        if self.since.is_none() && !(has_begun() && instance.control()?.backup_start == Lsn(0)) {
            return Ok(AtEnd::Inconsistent);
        }
        let is_new = self.since.is_none();
        let since = *self.since.get_or_insert_with(Instant::now);
        match (self.action, look.client) {
            // Whoever watches it sees it go, and an interrupt is heard meanwhile.
            (Action::Shutdown, _) if is_new => instance.ask_to_stop(StopMode::Fast)?,
            (Action::Shutdown, _) => anyhow::ensure!(
                since.elapsed() < STOP_PATIENCE,
                "the server has come to the end of the WAL and was told to stop there, and did not within {} min",
                STOP_PATIENCE.as_secs() / 60
            ),
            (_, Some(client)) if !look.paused => client.batch("SELECT pg_wal_replay_pause()")?,
            (_, Some(_)) => {}
            (_, None) if since.elapsed() < LOGIN_PATIENCE => {}
            (_, None) if look.status == Some(Status::Ready) => return Ok(AtEnd::Readable),
            (_, None) => return Ok(AtEnd::Unreadable),
        }
        Ok(AtEnd::Told)
    }

    /// What the last look showed, of a server that is down since.
    pub(super) fn last(&self) -> AtEnd {
        if self.since.is_some() { AtEnd::Told } else { AtEnd::NotYet }
    }

    fn has_come(&self, look: &Look<'_>) -> bool {
        let restored = look.restored.map(|(number, _)| number);
        let inside = look.restored.is_some_and(|(_, times)| times >= RESTORED_TIMES);
        inside
            || std::fs::read_to_string(&self.absent)
                .is_ok_and(|absent| is_proven(&absent, restored, self.segment_bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEGMENT_BYTES: u64 = 16 << 20;

    #[test]
    fn a_segment_that_was_absent_three_times_ends_the_wal() {
        let (five, six) = ("000000010000000000000005\n", "000000010000000000000006\n");
        let proven = |absent: &str, restored| is_proven(absent, restored, SEGMENT_BYTES);
        assert!(!proven("", None));
        assert!(!proven(&five.repeat(2), Some(4)), "reading ahead, and once more");
        assert!(proven(&five.repeat(3), Some(4)));
        assert!(!proven(&format!("{}{six}", five.repeat(3)), Some(5)), "it was archived meanwhile");
        assert!(proven(&format!("{}{}", five.repeat(3), six.repeat(3)), Some(5)));
    }

    #[test]
    fn a_segment_of_another_timeline_ends_nothing_where_its_ancestor_has_it() {
        let (newer, older) = ("000000020000000000000005\n", "000000010000000000000006\n");
        assert!(!is_proven(&newer.repeat(3), Some(5), SEGMENT_BYTES));
        assert!(is_proven(&format!("{}{}", newer.repeat(3), older.repeat(3)), Some(5), SEGMENT_BYTES));
    }
}
