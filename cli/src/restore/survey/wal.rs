//! Looking into the archive: how far it reaches, what is missing on the way, and where the target lies in it.
//!
//! Restore points, transactions, and tablespaces that the replay would create ([`super::created`]) are found with
//! `pg_waldump`, segment by segment, along the timelines of the path.

use std::ops::ControlFlow;
use std::path::Path;

use anyhow::Context as _;
use engine::format::backup::BackupInfo;
use engine::units::{Lsn, Timeline};
use engine::wal::history::{Ancestor, History};
use engine::wal::name::SegmentName;
use engine::wal::{Fetched, WalArchive};
use jiff::Timestamp;

use super::super::choose::{self, Choice, Histories};
use super::super::preflight::Request;
use super::super::target::Goal;
use super::Aim;
use super::created::{Created, created};
use crate::postgres::binaries::Binaries;
use crate::postgres::waldump::{self, Event, Kind};

/// What the archive has for the chosen path.
#[derive(Clone, Debug, Default)]
pub(crate) struct WalFacts {
    /// Segments that are missing up to where recovery must come at least.
    pub(crate) missing: Vec<SegmentName>,
    /// Segments that are missing between there and the end of the archive.
    pub(crate) gaps: Vec<SegmentName>,
    /// The path's timeline has not begun in the archive.
    pub(crate) unbegun: Option<Unbegun>,
    /// The end of the archive on the path.
    pub(crate) end: Option<Lsn>,
    /// The last transaction before the first gap, or before the end.
    pub(crate) last_transaction: Option<Timestamp>,
    /// Where the goal is, for a transaction or a restore point.
    pub(crate) place: Option<Lsn>,
    /// The WAL was searched for the goal.
    pub(crate) searched: bool,
    /// Why it cannot be searched: the server's programs are here without those that look into WAL.
    pub(crate) unsearchable: Option<String>,
    /// When the last segment before the first gap, or before the end, was archived: nothing in it is younger.
    pub(crate) archived: Option<Timestamp>,
    /// The end of a later backup by whose snapshot the transaction had ended.
    pub(crate) ended_by: Option<Lsn>,
    /// Timelines in the archive besides the one that is followed.
    pub(crate) other_timelines: Vec<Timeline>,
    /// The tablespaces that the replay would create; none where the WAL was not searched for them.
    pub(crate) created: Option<Vec<Created>>,
}

/// A timeline of which the archive has the history, and not the segment in which it left another. PostgreSQL takes the
/// other's instead, and replays past the fork what this timeline never had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unbegun {
    pub(crate) first: SegmentName,
    pub(crate) left: Ancestor,
    /// The nearest one on the way to it that has begun.
    pub(crate) instead: Timeline,
}

/// What is known before the archive is looked into.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Known {
    /// Where the replay begins, if that is not the backup's start.
    pub(super) from: Option<Lsn>,
    /// Where the goal is, for a restore point.
    pub(super) place: Option<Lsn>,
    /// See [`WalFacts::ended_by`].
    pub(super) ended_by: Option<Lsn>,
}

/// What looks into WAL; some packages of the server are without it.
pub(super) const PG_WALDUMP: &str = "pg_waldump";

pub(super) fn histories(archive: &WalArchive) -> anyhow::Result<Histories> {
    let mut histories = Histories::new();
    for timeline in archive.timelines()? {
        if let Some(history) = archive.history(timeline)? {
            histories.insert(timeline, history);
        }
    }
    Ok(histories)
}

/// Where the goal lies, if it is a restore point: the newest backup's WAL first, since the newest backup that can
/// reach the target is wanted.
pub(super) fn locate(
    request: &Request,
    backups: &[BackupInfo],
    from: Option<Lsn>,
    histories: &Histories,
    archive: &WalArchive,
    binaries: Option<&Binaries>,
) -> anyhow::Result<Option<Lsn>> {
    let (Goal::Name(wanted), Some(binaries)) = (&request.goal, binaries.filter(|found| found.has(PG_WALDUMP))) else {
        return Ok(None);
    };
    let candidates: Vec<&BackupInfo> =
        backups.iter().filter(|info| request.backup.as_ref().is_none_or(|label| info.label == *label)).collect();
    let mut until = None;
    for info in candidates.into_iter().rev() {
        let chosen = choose::choose(std::slice::from_ref(info), None, request.timeline, &Goal::Latest, None, histories);
        let Ok(Choice { path, .. }) = chosen else { continue };
        let mut place = None;
        let start = from.unwrap_or(info.wal.start);
        scan(archive, binaries, &path, start, until, Kind::RestorePoints, &mut |record| match record.event {
            Event::RestorePoint { name } if name == *wanted => {
                place = Some(record.lsn);
                ControlFlow::Break(())
            }
            _ => ControlFlow::Continue(()),
        })?;
        // PostgreSQL stops at the first point of that name. One during the backup comes too early for this one.
        if place.is_some_and(|place| place >= info.wal.stop) {
            return Ok(place);
        }
        until = place.map(|place| Lsn(place.0 + 1)).or(Some(info.wal.stop));
    }
    Ok(None)
}

/// Looks at the records of a path from `from` to `to` (none: the end of the archive), timeline by timeline.
pub(super) fn scan(
    archive: &WalArchive,
    binaries: &Binaries,
    path: &History,
    from: Lsn,
    to: Option<Lsn>,
    kind: Kind,
    visit: &mut dyn FnMut(waldump::Record) -> ControlFlow<()>,
) -> anyhow::Result<()> {
    let program = binaries.require(PG_WALDUMP)?;
    let directory = tempfile::tempdir().context("cannot make a temporary directory for WAL")?;
    let segment_bytes = archive.cluster().info().wal_segment_bytes;
    let mut from = from;
    for (timeline, left_at) in pieces(path) {
        let to = match (left_at, to) {
            (Some(left_at), Some(to)) => Some(left_at.min(to)),
            (left_at, to) => left_at.or(to),
        };
        if to.is_some_and(|to| to <= from) {
            continue;
        }
        let mut stopped = false;
        let range = waldump::Range { timeline, from, to, segment_bytes };
        let mut fetch = |name: &str, to: &Path| match archive.contains(name)? {
            true => Ok(matches!(archive.fetch(name, to)?, Fetched::Delivered)),
            false => Ok(false),
        };
        let mut watched = |record| {
            let flow = visit(record);
            stopped |= flow.is_break();
            flow
        };
        waldump::scan(&program, directory.path(), range, kind, &mut fetch, &mut watched)?;
        let (false, Some(left_at)) = (stopped, left_at) else { return Ok(()) };
        // Where it was left within a segment that never got whole, the next timeline's first segment repeats it.
        let last = SegmentName::ending_at(timeline, left_at, segment_bytes);
        let is_whole = archive.contains(&last.file_name(segment_bytes))?;
        from = if is_whole { left_at } else { from.max(last.start(segment_bytes)) };
    }
    Ok(())
}

/// The timelines of a path and where each is left.
fn pieces(path: &History) -> impl Iterator<Item = (Timeline, Option<Lsn>)> {
    let ancestors = path.ancestors.iter().map(|ancestor| (ancestor.timeline, Some(ancestor.left_at)));
    ancestors.chain(std::iter::once((path.timeline, None)))
}

/// Whether recovery from a backup of timeline `own` would miss the beginning of the path's last timeline.
fn unbegun(archive: &WalArchive, path: &History, own: Timeline) -> anyhow::Result<Option<Unbegun>> {
    let segment_bytes = archive.cluster().info().wal_segment_bytes;
    let mut found: Option<Unbegun> = None;
    let mut timeline = path.timeline;
    for left in path.ancestors.iter().rev().take_while(|left| left.timeline >= own) {
        let first = SegmentName { timeline, number: left.left_at.0 / segment_bytes };
        if archive.contains(&first.file_name(segment_bytes))? {
            break;
        }
        timeline = left.timeline;
        found = Some(match found {
            Some(newest) => Unbegun { instead: timeline, ..newest },
            None => Unbegun { first, left: *left, instead: timeline },
        });
    }
    Ok(found)
}

pub(super) fn wal_facts(
    request: &Request,
    info: &BackupInfo,
    path: &History,
    known: Known,
    archive: &WalArchive,
    binaries: Option<&Binaries>,
) -> anyhow::Result<WalFacts> {
    let Known { from, place, ended_by } = known;
    let segment_bytes = info.server.wal_segment_bytes;
    let start = from.unwrap_or(info.wal.start);
    let mut end = None;
    for (timeline, left_at) in pieces(path) {
        // An abandoned timeline may go on far behind the place where this path left it.
        let on_the_path = |end: &Lsn| left_at.is_none_or(|left_at| *end <= left_at);
        let ends = archive.segments(timeline)?.into_iter().map(|segment| segment.end(segment_bytes));
        end = ends.filter(on_the_path).max().max(end);
    }
    let blind = binaries.filter(|found| request.goal.is_searched_for() && !found.has(PG_WALDUMP));
    let unsearchable = blind.map(|found| format!("{PG_WALDUMP} is missing from {}", found.directory().display()));
    let ended_by = ended_by.filter(|_| unsearchable.is_some());
    let mut facts = WalFacts { end, place, unsearchable, ended_by, ..WalFacts::default() };
    facts.unbegun = unbegun(archive, path, info.wal.timeline)?;
    facts.other_timelines = archive.timelines()?.into_iter().filter(|timeline| *timeline != path.timeline).collect();
    let needed = match &request.goal {
        Goal::Lsn(lsn) => (*lsn).max(info.wal.stop),
        Goal::Name(_) => place.unwrap_or(info.wal.stop).max(info.wal.stop),
        Goal::Xid(_) => ended_by.unwrap_or(info.wal.stop),
        Goal::Latest | Goal::Time(_) | Goal::Immediate => info.wal.stop,
    };
    facts.missing = archive.missing_between(start, path, Some(needed))?;
    if let Some(end) = end.filter(|end| *end > needed) {
        let all = archive.missing_between(start, path, Some(end))?;
        facts.gaps = all.into_iter().filter(|segment| !facts.missing.contains(segment)).collect();
    }
    if facts.unsearchable.is_some() {
        let reach = archive.reaches(info)?.into_iter().find(|reach| reach.timeline == path.timeline);
        facts.archived = reach.and_then(|reach| Timestamp::from_second(reach.archived?).ok());
        return Ok(facts);
    }
    let searcher = binaries.filter(|found| facts.missing.is_empty() && found.has(PG_WALDUMP));
    let Some(binaries) = searcher else { return Ok(facts) };
    match &request.goal {
        Goal::Time(_) => {
            let until = facts.gaps.first().map(|gap| gap.start(segment_bytes)).or(end);
            facts.last_transaction = last_transaction(archive, binaries, path, start, until, segment_bytes)?;
            facts.searched = true;
        }
        Goal::Xid(xid) => {
            let short = u32::try_from(xid & 0xFFFF_FFFF).unwrap_or_default();
            scan(
                archive,
                binaries,
                path,
                start.max(info.wal.stop),
                None,
                Kind::Transactions,
                &mut |record| match record.event {
                    Event::Commit { xid, .. } | Event::Abort { xid, .. } if xid == short => {
                        facts.place = Some(record.lsn);
                        ControlFlow::Break(())
                    }
                    _ => ControlFlow::Continue(()),
                },
            )?;
            facts.searched = true;
        }
        Goal::Name(_) => facts.searched = true,
        Goal::Latest | Goal::Lsn(_) | Goal::Immediate => {}
    }
    let until = match &request.goal {
        Goal::Immediate => Some(info.wal.stop),
        Goal::Lsn(lsn) => Some(*lsn),
        Goal::Name(_) | Goal::Xid(_) => facts.place,
        Goal::Latest | Goal::Time(_) => None,
    };
    let mut created = created(archive, binaries, path, start, until)?;
    if let Goal::Time(moment) = &request.goal {
        let mut on_the_way = Vec::new();
        for tablespace in created {
            let before = last_transaction(archive, binaries, path, start, Some(tablespace.lsn), segment_bytes)?;
            if before.is_none_or(|before| before <= *moment) {
                on_the_way.push(tablespace);
            }
        }
        created = on_the_way;
    }
    facts.created = Some(created);
    Ok(facts)
}

impl Aim {
    /// The commit time of the last transaction before a place, where the WAL can be looked into.
    pub(in crate::restore) fn time_before(
        &self,
        archive: &WalArchive,
        info: &BackupInfo,
        path: &History,
        until: Lsn,
    ) -> anyhow::Result<Option<Timestamp>> {
        let Some(searcher) = self.searcher.as_ref().filter(|found| found.has(PG_WALDUMP)) else { return Ok(None) };
        last_transaction(archive, searcher, path, info.wal.start, Some(until), info.server.wal_segment_bytes)
    }
}

/// The commit time of the last transaction before `until`, looked for backwards, a few segments at a time.
fn last_transaction(
    archive: &WalArchive,
    binaries: &Binaries,
    path: &History,
    start: Lsn,
    until: Option<Lsn>,
    segment_bytes: u64,
) -> anyhow::Result<Option<Timestamp>> {
    /// Segments of one look.
    const SEGMENTS: u64 = 4;
    let Some(mut to) = until else { return Ok(None) };
    while to > start {
        let from = Lsn(to.0.saturating_sub(SEGMENTS * segment_bytes)).max(start);
        let mut last = None;
        scan(archive, binaries, path, from, Some(to), Kind::Transactions, &mut |record| {
            if let Event::Commit { time_micros, .. } | Event::Abort { time_micros, .. } = record.event {
                last = last.max(Some(time_micros));
            }
            ControlFlow::Continue(())
        })?;
        if let Some(micros) = last {
            return Ok(Timestamp::from_microsecond(micros).ok());
        }
        to = from;
    }
    Ok(None)
}
