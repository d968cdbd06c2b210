//! Which backup, and along which timeline: pure.
//!
//! A restore begins at the newest backup that can still reach the target: everything after it is replayed. A target
//! lies after the *end* of a backup, since before it the data are not consistent. "Latest" is resolved to a number
//! here, so that a timeline which appears in the archive on the way changes nothing.

use std::collections::BTreeMap;

use engine::format::backup::{BackupInfo, Snapshot};
use engine::units::{BackupLabel, Lsn, Timeline};
use engine::wal::history::History;
use jiff::Timestamp;

use super::preflight::Problem;
use super::target::{Goal, TimelineChoice};

/// The histories in the archive, by timeline; a timeline without a history file is its own root.
pub(crate) type Histories = BTreeMap<Timeline, History>;

/// The backup to begin with, and the history to follow.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Choice<'a> {
    pub(crate) backup: &'a BackupInfo,
    pub(crate) path: History,
}

/// Picks them. `place` is where a restore point lies, for a goal that is a name.
pub(crate) fn choose<'a>(
    backups: &'a [BackupInfo],
    wanted: Option<&BackupLabel>,
    timeline: TimelineChoice,
    goal: &Goal,
    place: Option<Lsn>,
    histories: &Histories,
) -> Result<Choice<'a>, Problem> {
    let candidates: Vec<&BackupInfo> = match wanted {
        None => backups.iter().collect(),
        Some(label) => backups.iter().filter(|info| info.label == *label).collect(),
    };
    let Some(newest) = candidates.last() else {
        return Err(match wanted {
            Some(label) => Problem::new(format!("there is no backup {label}"), "`pghydrant list` names them"),
            None => Problem::new("the cluster has no backup", "take one with `pghydrant backup`"),
        });
    };
    let path_of = |info: &BackupInfo| path_for(info, timeline, histories);
    let reachable: Vec<Choice<'_>> =
        candidates.iter().filter_map(|info| Some(Choice { backup: info, path: path_of(info)? })).collect();
    // The newest timeline that any backup leads to; a backup of a branch that was left does not hold it back.
    let Some(last) = reachable.iter().map(|choice| choice.path.timeline).max() else {
        return Err(unreachable_timeline(newest, timeline, histories));
    };
    let on_it =
        reachable.into_iter().filter(|choice| choice.path.timeline == last || timeline == TimelineChoice::Current);
    let mut refusal = None;
    for choice in on_it.collect::<Vec<_>>().into_iter().rev() {
        match before_its_end(choice.backup, goal, place) {
            None => return Ok(choice),
            Some(problem) => refusal = Some(problem),
        }
    }
    // The oldest backup's refusal: nothing earlier can be reached.
    Err(refusal.unwrap_or_else(|| unreachable_timeline(newest, timeline, histories)))
}

/// The history that leads from a backup to the timeline asked for; nothing if it does not lead there.
fn path_for(info: &BackupInfo, timeline: TimelineChoice, histories: &Histories) -> Option<History> {
    let own = info.wal.timeline;
    let history = |number: Timeline| histories.get(&number).cloned();
    let leads = |path: &History| path.includes(own, info.wal.stop);
    match timeline {
        TimelineChoice::Current => Some(history(own).unwrap_or_else(|| History::root(own))),
        TimelineChoice::Number(number) if number == own => Some(history(own).unwrap_or_else(|| History::root(own))),
        TimelineChoice::Number(number) => history(number).filter(leads),
        TimelineChoice::Latest => {
            let newest = histories.values().rev().find(|path| path.timeline > own && leads(path)).cloned();
            Some(newest.or_else(|| history(own)).unwrap_or_else(|| History::root(own)))
        }
    }
}

fn unreachable_timeline(info: &BackupInfo, timeline: TimelineChoice, histories: &Histories) -> Problem {
    let own = info.wal.timeline;
    let known = histories.keys().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    match timeline {
        TimelineChoice::Number(number) if !histories.contains_key(&number) => Problem::new(
            format!("timeline {number} is not in the archive"),
            format!(
                "backup {} is on timeline {own}; histories in the archive: {}",
                info.label,
                if known.is_empty() { "none" } else { &known }
            ),
        ),
        _ => Problem::new(
            format!(
                "no backup leads to the timeline that was asked for: {} ends at {} of timeline {own}",
                info.label, info.wal.stop
            ),
            "choose a backup taken before that timeline branched off with --backup, or another --target-timeline",
        ),
    }
}

/// Why a backup cannot reach the goal: its end lies behind it.
fn before_its_end(info: &BackupInfo, goal: &Goal, place: Option<Lsn>) -> Option<Problem> {
    let late = |what: String, end: String| {
        Some(Problem::new(
            format!("{what} lies before the end of backup {} ({end})", info.label),
            "choose a later target; no backup of the cluster ends earlier",
        ))
    };
    match goal {
        Goal::Latest | Goal::Immediate => None,
        Goal::Time(moment) => {
            let end = end_of(info);
            if *moment >= end { None } else { late(goal.to_string(), super::moment::for_people(end)) }
        }
        Goal::Lsn(lsn) => {
            if *lsn >= info.wal.stop {
                None
            } else {
                late(goal.to_string(), info.wal.stop.to_string())
            }
        }
        Goal::Name(_) => match place {
            Some(lsn) if lsn < info.wal.stop => late(goal.to_string(), info.wal.stop.to_string()),
            _ => None,
        },
        Goal::Xid(xid) => {
            let finished = is_finished(&info.snapshot, *xid);
            if finished { late(goal.to_string(), "it had ended by then".to_owned()) } else { None }
        }
    }
}

/// The end of the first later backup on the path by whose snapshot a transaction had ended: it ends before that.
pub(crate) fn ended_by(backups: &[BackupInfo], first: &BackupInfo, path: &History, xid: u64) -> Option<Lsn> {
    let later = backups.iter().filter(|info| info.wal.stop > first.wal.stop);
    let mut on_path = later.filter(|info| path.includes(info.wal.timeline, info.wal.stop));
    on_path.find(|info| is_finished(&info.snapshot, xid)).map(|info| info.wal.stop)
}

/// The end of a backup by the server's clock: its fraction where it was recorded, else the whole second after.
fn end_of(info: &BackupInfo) -> Timestamp {
    let whole = || Timestamp::from_second(info.stopped_unix.saturating_add(1)).unwrap_or(Timestamp::MAX);
    info.stopped_at.parse().ok().filter(|end: &Timestamp| end.subsec_nanosecond() != 0).unwrap_or_else(whole)
}

/// Whether a transaction had ended in a snapshot. 32 bits of an id are taken for the nearest 64-bit id.
fn is_finished(snapshot: &Snapshot, xid: u64) -> bool {
    let full = if xid >> 32 == 0 { nearest(snapshot.xmax, xid) } else { xid };
    full < snapshot.xmin || (full < snapshot.xmax && !snapshot.in_progress.contains(&full))
}

/// The 64-bit id with these low 32 bits that lies within 2^31 of `reference`, as `TransactionIdPrecedes` compares.
fn nearest(reference: u64, low: u64) -> u64 {
    let same_epoch = (reference & !0xFFFF_FFFF) | low;
    if same_epoch > reference.saturating_add(1 << 31) {
        same_epoch.checked_sub(1 << 32).unwrap_or(same_epoch)
    } else if same_epoch.saturating_add(1 << 31) < reference {
        same_epoch.saturating_add(1 << 32)
    } else {
        same_epoch
    }
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    pub(in crate::restore) fn backup(label: &str, timeline: u32, stop: u64, stopped_unix: i64) -> BackupInfo {
        serde_json::from_value(serde_json::json!({
            "format": 1, "minimum_reader": 1, "label": label, "cluster": "main", "parent": null,
            "started_at": "", "stopped_at": "", "stopped_unix": stopped_unix,
            "server": {
                "system_identifier": "1", "version_num": 150018, "data_checksums": true, "wal_segment_bytes": 16 << 20,
                "data_directory": "/srv/pg", "outside_files": [], "owner": "postgres", "settings": {}
            },
            "wal": {"timeline": timeline, "start": "0/1", "stop": Lsn(stop).to_string()},
            "snapshot": {"xmin": 100, "xmax": 110, "in_progress": [100, 105]},
            "tablespaces": [], "bad_pages": [], "compression": "lz4", "block_bytes": 131_072,
            "manifest": {"root_hash": "", "root_offset": 0, "root_bytes": 0},
            "totals": {"files": 0, "directories": 0, "bytes": 0, "blocks": 0, "added_pack_bytes": 0,
                "added_manifest_bytes": 0, "shared_bytes": 0, "milliseconds": 0}
        }))
        .unwrap()
    }

    fn histories(texts: &[(u32, &str)]) -> Histories {
        let parsed =
            |(number, text): &(u32, &str)| (Timeline(*number), History::parse(Timeline(*number), text).unwrap());
        texts.iter().map(parsed).collect()
    }

    fn chosen(
        backups: &[BackupInfo],
        timeline: TimelineChoice,
        goal: &Goal,
        histories: &Histories,
    ) -> Result<(String, u32), String> {
        choose(backups, None, timeline, goal, None, histories)
            .map(|choice| (choice.backup.label.to_string(), choice.path.timeline.0))
            .map_err(|problem| problem.what)
    }

    #[test]
    fn the_newest_backup_that_ended_before_the_target_is_taken() {
        let backups = [backup("a", 1, 0x1000, 1000), backup("b", 1, 0x2000, 2000)];
        let none = Histories::new();
        let pick = |goal| chosen(&backups, TimelineChoice::Latest, &goal, &none).map(|(label, _)| label);
        assert_eq!(pick(Goal::Latest).as_deref(), Ok("b"));
        assert_eq!(pick(Goal::Immediate).as_deref(), Ok("b"));
        assert_eq!(pick(Goal::Lsn(Lsn(0x2000))).as_deref(), Ok("b"));
        assert_eq!(pick(Goal::Lsn(Lsn(0x1FFF))).as_deref(), Ok("a"));
        assert!(pick(Goal::Lsn(Lsn(0xFFF))).unwrap_err().contains("before the end of backup a"));
        assert_eq!(pick(Goal::Time(Timestamp::from_second(2001).unwrap())).as_deref(), Ok("b"));
        // The end is known to the second only: within that second the backup before it is the safe one.
        assert_eq!(pick(Goal::Time(Timestamp::from_second(2000).unwrap())).as_deref(), Ok("a"));
    }

    #[test]
    fn a_transaction_that_had_ended_needs_an_earlier_backup() {
        let backups = [backup("a", 1, 0x1000, 1000)];
        for (xid, possible) in [(99, false), (100, true), (101, false), (105, true), (110, true), (4_000_000_000, true)]
        {
            let picked = chosen(&backups, TimelineChoice::Latest, &Goal::Xid(xid), &Histories::new());
            assert_eq!(picked.is_ok(), possible, "{xid}");
        }
    }

    #[test]
    fn a_transaction_that_ended_between_two_backups_is_in_the_wal_between_them() {
        let mut backups = [backup("a", 1, 0x1000, 1000), backup("b", 1, 0x2000, 2000), backup("c", 2, 0x3000, 3000)];
        backups[1].snapshot.xmin = 200;
        backups[1].snapshot.xmax = 200;
        backups[2].snapshot = backups[1].snapshot.clone();
        let path = History::root(Timeline(1));
        assert_eq!(ended_by(&backups, &backups[0], &path, 150), Some(Lsn(0x2000)));
        assert_eq!(ended_by(&backups, &backups[0], &path, 200), None, "not yet begun at the later backup");
        assert_eq!(ended_by(&backups[..1], &backups[0], &path, 150), None);
        assert_eq!(ended_by(&backups, &backups[1], &path, 150), None, "the later one is on another timeline");
    }

    #[test]
    fn a_short_id_is_the_nearest_one_with_an_epoch() {
        assert_eq!(nearest(0x1_0000_0005, 3), 0x1_0000_0003);
        assert_eq!(nearest(0x1_0000_0005, 0xFFFF_FFF0), 0xFFFF_FFF0);
        assert_eq!(nearest(0xFFFF_FFF0, 5), 0x1_0000_0005);
    }

    #[test]
    fn latest_follows_the_newest_timeline_that_the_backup_leads_to() {
        let backups = [backup("a", 1, 0x1000, 1000), backup("b", 1, 0x3000, 3000)];
        // Timeline 2 left timeline 1 between the two backups; timeline 3 left timeline 2.
        let known = histories(&[(2, "1\t0/2000\tx\n"), (3, "1\t0/2000\tx\n2\t0/4000\tx\n")]);
        let pick = |timeline| chosen(&backups, timeline, &Goal::Latest, &known);
        assert_eq!(pick(TimelineChoice::Latest), Ok(("a".to_owned(), 3)));
        assert_eq!(pick(TimelineChoice::Current), Ok(("b".to_owned(), 1)));
        assert_eq!(pick(TimelineChoice::Number(Timeline(2))), Ok(("a".to_owned(), 2)));
        assert_eq!(pick(TimelineChoice::Number(Timeline(1))), Ok(("b".to_owned(), 1)));
        assert!(pick(TimelineChoice::Number(Timeline(9))).unwrap_err().contains("timeline 9 is not in the archive"));
        let b_only = &backups[1..];
        let refused = chosen(b_only, TimelineChoice::Number(Timeline(2)), &Goal::Latest, &known);
        assert!(refused.unwrap_err().contains("no backup leads to the timeline"));
    }
}
