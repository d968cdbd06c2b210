//! The WAL of a base backup that is adopted: in the archive already, or in the directory's own `pg_wal`.
//!
//! What the archive has is taken from there, since it came from the server whole. `pg_basebackup --wal-method=stream` may end
//! in the middle of the last segment and fill it with zeros; archived like that, it would end every recovery too early,
//! and the server's own copy of it would be refused later. So the last segment is taken only if `pg_waldump` finds the
//! record behind which the server itself left it (`SWITCH`), or if it is full.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context as _, Result};
use engine::format::backup::{Snapshot, WalRange};
use engine::units::Lsn;
use engine::wal::name::{SegmentName, WalFile};
use engine::wal::{Fetched, WalArchive};

use super::server::Server;
use super::wal::{Origin, unless_another_history};
use crate::context::Context;
use crate::exit::{Exit, Failure};
use crate::output::Output;
use crate::postgres::binaries::Binaries;
use crate::postgres::waldump::{self, Event, Kind};

/// No base backup sees more transactions begin; half of those that lie behind a 32-bit id, so that all of them, and as many
/// before, are told from later ones.
const XIDS_MAX: u64 = 1 << 30;

/// What is known of a base backup's end.
pub(super) struct End {
    /// Microseconds since 1970.
    pub(super) at_micros: i64,
    pub(super) snapshot: Snapshot,
}

/// Refuses a base backup of which WAL is missing in both places, before anything is written.
pub(super) fn refuse_gap(
    archive: Option<&WalArchive>,
    pg_wal: &Path,
    range: &WalRange,
    segment_bytes: u64,
) -> Result<()> {
    for segment in needed(range, segment_bytes) {
        let name = segment.file_name(segment_bytes);
        let archived = archive.map_or(Ok(false), |archive| archive.contains(&name))?;
        if !archived && !pg_wal.join(&name).is_file() {
            let message =
                format!("WAL segment {name}, which the base backup needs, is neither in the archive nor in its pg_wal");
            let hint = "archive to this repository with `pghydrant wal push`, or let the base backup bring it: pg_basebackup \
                --wal-method=stream, or fetch where it goes to standard output";
            return Err(Failure::new(Exit::Refused, message).hint(hint).into());
        }
    }
    Ok(())
}

/// Refuses a last segment of the base backup's own, if the archive has none, that cannot be proven whole.
pub(super) fn refuse_unfinished(
    archive: Option<&WalArchive>,
    server: &Server,
    pg_wal: &Path,
    range: &WalRange,
    pg_waldump: Option<&Path>,
) -> Result<()> {
    let segment_bytes = server.info.wal_segment_bytes;
    let last = SegmentName::ending_at(range.timeline, range.stop, segment_bytes);
    let name = last.file_name(segment_bytes);
    if last.end(segment_bytes) == range.stop || archive.map_or(Ok(false), |archive| archive.contains(&name))? {
        return Ok(());
    }
    let why = match pg_waldump {
        Some(program) if switches(program, pg_wal, range, last.end(segment_bytes))? => return Ok(()),
        Some(_) => "ends before the server had finished it".to_owned(),
        None => "cannot be proven whole without pg_waldump".to_owned(),
    };
    let message = format!("WAL segment {name} in the pg_wal of {} {why}", server.data.display());
    Err(Failure::new(Exit::Refused, message)
        .hint("bring it from the server: `pghydrant wal push`; then adopt the base backup again")
        .into())
}

/// The program that reads WAL, of the server's version.
pub(super) fn pg_waldump(server: &Server, context: &Context) -> Option<PathBuf> {
    let chosen = context.settings.get("pg_bin", None).map(|(path, _)| PathBuf::from(path));
    let binaries = Binaries::find(chosen.as_deref(), Some(server.version().major())).ok();
    binaries.and_then(|binaries| binaries.require("pg_waldump").ok())
}

/// Where the WAL comes from.
pub(super) struct Supply<'a> {
    archive: WalArchive,
    server: &'a Server,
    /// Where the base backup's own segments lie.
    pg_wal: &'a Path,
    pg_waldump: Option<PathBuf>,
}

impl<'a> Supply<'a> {
    pub(super) fn new(archive: WalArchive, server: &'a Server, pg_wal: &'a Path, pg_waldump: Option<PathBuf>) -> Self {
        Self { archive, server, pg_wal, pg_waldump }
    }

    /// Brings every segment of `range` into the archive, and the history of its timeline.
    pub(super) fn bring(&self, range: &WalRange, output: &Output) -> Result<Origin> {
        let segment_bytes = self.server.info.wal_segment_bytes;
        let mut missing = Vec::new();
        for segment in needed(range, segment_bytes) {
            let name = segment.file_name(segment_bytes);
            if !self.archive.contains(&name)? {
                missing.push(segment);
            } else if self.pg_wal.join(&name).is_file() {
                // Of the last one the rest may never have been received.
                let told = segment_bytes.min(range.stop.0.saturating_sub(segment.start(segment_bytes).0));
                let another = self.archive.refuse_another(&self.pg_wal.join(&name), told);
                another.map_err(unless_another_history)?;
            }
        }
        for segment in &missing {
            self.push(&segment.file_name(segment_bytes))?;
        }
        self.bring_history(range, output)?;
        Ok(if missing.is_empty() { Origin::Archive } else { Origin::Directory })
    }

    fn push(&self, name: &str) -> Result<()> {
        let path = self.pg_wal.join(name);
        let pushed = self.archive.push(&path).map_err(unless_another_history);
        pushed.with_context(|| format!("cannot bring {name} into the archive"))?;
        Ok(())
    }

    fn bring_history(&self, range: &WalRange, output: &Output) -> Result<()> {
        let name = WalFile::History(range.timeline).file_name(self.server.info.wal_segment_bytes);
        if range.timeline.0 <= 1 || self.archive.contains(&name)? {
            return Ok(());
        }
        if self.pg_wal.join(&name).is_file() {
            return self.push(&name);
        }
        output.warning(&format!(
            "{name} is neither in the archive nor in pg_wal: recovery cannot come from an older timeline"
        ));
        Ok(())
    }

    /// When the base backup had ended, and what was finished by then.
    ///
    /// Both may be later than the truth, never earlier. Recovery to a time stops at the first commit behind it. What ended
    /// before the backup's WAL begins ended before `pg_control`, of a later moment, was written; what ended in it is looked
    /// at; so nothing that the backup has is newer than this time, and nothing in its WAL stops recovery before the files
    /// are consistent. `newest_time` bounds it where the WAL cannot be read. Of transactions, all up to the newest that ended
    /// in this WAL count as finished, as they do in a standby's backup; unread, all there can be.
    pub(super) fn end_of(&self, range: &WalRange, newest_time: impl FnOnce() -> Result<i64>) -> Result<End> {
        let control = &self.server.control;
        let Some(program) = &self.pg_waldump else {
            let all = control.next_xid.saturating_add(XIDS_MAX);
            let snapshot = Snapshot { xmin: all, xmax: all, in_progress: Vec::new() };
            return Ok(End { at_micros: newest_time()?, snapshot });
        };
        // What had begun before the checkpoint counts as finished as well.
        let mut next_xid = control.next_xid;
        // By the server's clock, and by its primary's where it is a standby; the second is not over.
        let written = control.modified_unix.max(control.checkpoint_unix).saturating_add(1);
        let mut at_micros = written.saturating_mul(1_000_000);
        let directory = tempfile::tempdir().context("cannot make a temporary directory for WAL")?;
        let segment_bytes = self.server.info.wal_segment_bytes;
        let piece = waldump::Range { timeline: range.timeline, from: range.start, to: Some(range.stop), segment_bytes };
        let mut fetch = |name: &str, to: &Path| match self.archive.contains(name)? {
            true => Ok(matches!(self.archive.fetch(name, to)?, Fetched::Delivered)),
            false => Ok(false),
        };
        let mut visit = |record: waldump::Record| {
            if let Event::Commit { xid, time_micros } | Event::Abort { xid, time_micros } = record.event {
                at_micros = at_micros.max(time_micros);
                next_xid = next_xid.max(near(control.next_xid, xid) + 1);
            }
            ControlFlow::Continue(())
        };
        let scanned = waldump::scan(program, directory.path(), piece, Kind::Transactions, &mut fetch, &mut visit)?;
        if scanned.reached_end {
            let message = format!("the WAL of the base backup ends before {}, where it is consistent", range.stop);
            return Err(Failure::new(Exit::Failed, message).hint("make the base backup again").into());
        }
        Ok(End { at_micros, snapshot: Snapshot { xmin: next_xid, xmax: next_xid, in_progress: Vec::new() } })
    }
}

/// The 64-bit id of `xid`, which lies within half a cycle of `next`.
fn near(next: u64, xid: u32) -> u64 {
    let low = u32::try_from(next & u64::from(u32::MAX)).unwrap_or_default();
    let distance = xid.wrapping_sub(low).cast_signed();
    next.saturating_add_signed(i64::from(distance))
}

/// The segments of `range`.
pub(super) fn needed(range: &WalRange, segment_bytes: u64) -> impl Iterator<Item = SegmentName> {
    let first = SegmentName::holding(range.timeline, range.start, segment_bytes);
    let last = SegmentName::ending_at(range.timeline, range.stop, segment_bytes);
    std::iter::successors(Some(first), |segment| Some(segment.next())).take_while(move |segment| *segment <= last)
}

/// Whether the WAL from the backup's end on comes to the record that ends a segment early, before `end`. Without that the
/// program would wait five seconds for the next segment.
fn switches(pg_waldump: &Path, directory: &Path, range: &WalRange, end: Lsn) -> Result<bool> {
    let dump = std::process::Command::new(pg_waldump)
        .env("LC_ALL", "C")
        .arg("--path")
        .arg(directory)
        .args(["--rmgr", "XLOG", "--timeline", &range.timeline.0.to_string(), "--start", &range.stop.to_string()])
        .args(["--end", &end.to_string()])
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {}", pg_waldump.display()))?;
    Ok(String::from_utf8_lossy(&dump.stdout).lines().any(|line| line.contains("desc: SWITCH")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_those_of_the_nearest_epoch() {
        assert_eq!(near(724, 730), 730);
        assert_eq!(near((1 << 32) + 5, 0xFFFF_FFF0), 0xFFFF_FFF0);
        assert_eq!(near(0xFFFF_FFF0, 7), (1 << 32) + 7);
    }
}
