//! Where recovery stops, and what the server does there.
//!
//! A target is complete before the copy begins: a time is an instant with its offset, a name fits PostgreSQL's limit,
//! the timeline is a number. What PostgreSQL is told ([`Target::settings`]) sets every `recovery_target*` parameter:
//! those that are not used are emptied first, since PostgreSQL refuses two targets, wherever they come from.

use std::fmt;

use engine::units::{Lsn, Timeline};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};

use super::conf::Setting;
use super::moment;
use crate::exit::{Exit, Failure};

/// `MAXFNAMELEN - 1`: longer names are refused by `pg_create_restore_point` as well.
const NAME_BYTES_MAX: usize = 63;
/// The first transaction id that is not PostgreSQL's own.
const XID_FIRST: u64 = 3;

/// Of the options in `--help`.
pub(crate) const HEADING: &str = "Recovery target (the end of the WAL unless one is given)";

/// The options that say where to stop.
#[derive(clap::Args, Clone, Debug, Default)]
#[group(id = "where_to_stop", multiple = false)]
pub(crate) struct Goals {
    /// Recover to this moment: "2026-11-22 08:15:00+00", "yesterday 17:30", "10 minutes ago"
    #[arg(long, value_name = "TIME", help_heading = HEADING)]
    pub(crate) target_time: Option<String>,
    /// Recover to this position of the write-ahead log
    #[arg(long, value_name = "LSN", help_heading = HEADING)]
    pub(crate) target_lsn: Option<Lsn>,
    /// Recover to the end of this transaction
    #[arg(long, value_name = "XID", help_heading = HEADING)]
    pub(crate) target_xid: Option<u64>,
    /// Recover to this restore point
    #[arg(long, value_name = "NAME", help_heading = HEADING)]
    pub(crate) target_name: Option<String>,
    /// Recover to the end of the backup, as soon as it is consistent
    #[arg(long, help_heading = HEADING)]
    pub(crate) target_immediate: bool,
}

/// Where recovery stops.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Goal {
    /// The end of the WAL.
    Latest,
    /// A moment.
    Time(Timestamp),
    /// A position.
    Lsn(Lsn),
    /// A transaction: 32 bits, or 64 with its epoch.
    Xid(u64),
    /// A restore point.
    Name(String),
    /// The end of the backup.
    Immediate,
}

impl Goal {
    /// Reads the options; `now` and `local` are the clock of whoever typed them.
    pub(crate) fn of(goals: &Goals, now: Timestamp, local: &TimeZone) -> Result<Self, String> {
        if let Some(text) = &goals.target_time {
            return moment::parse(text, now, local).map(Self::Time);
        }
        if let Some(lsn) = goals.target_lsn {
            return Ok(Self::Lsn(lsn));
        }
        if let Some(xid) = goals.target_xid {
            let normal = xid >= XID_FIRST && xid & 0xFFFF_FFFF >= XID_FIRST;
            return normal.then_some(Self::Xid(xid)).ok_or_else(|| format!("{xid} is not a transaction's id"));
        }
        if let Some(name) = &goals.target_name {
            let fits = (1..=NAME_BYTES_MAX).contains(&name.len()) && !name.contains(char::is_control);
            let refuse =
                || format!("\"{}\" cannot be a restore point: 1 to {NAME_BYTES_MAX} bytes", name.escape_debug());
            return fits.then(|| Self::Name(name.clone())).ok_or_else(refuse);
        }
        Ok(if goals.target_immediate { Self::Immediate } else { Self::Latest })
    }
}

impl Goal {
    /// Whether its place in the WAL is found by looking at the records.
    pub(crate) const fn is_searched_for(&self) -> bool {
        matches!(self, Self::Time(_) | Self::Xid(_) | Self::Name(_))
    }

    /// Whether a server that gave this reason for its new timeline left recovery without having come to the goal. Of a
    /// goal that it looked for and did not find, PostgreSQL fills in nothing: transaction 0, position 0/0, the year 2000.
    pub(crate) fn is_missed_by(&self, reason: &str) -> bool {
        let nothing: &[&str] = match self {
            Self::Latest => return false,
            Self::Immediate => &[],
            // In the server's own time zone.
            Self::Time(_) => &[" 2000-01-01 ", " 1999-12-31 "],
            Self::Lsn(_) => &[" LSN 0/0"],
            Self::Xid(_) => &[" transaction 0"],
            Self::Name(_) => &["\"\""],
        };
        reason == "no recovery target specified" || nothing.iter().any(|nothing| reason.contains(nothing))
    }

    /// `--target-exclusive` where there is no "before".
    pub(crate) fn refuse_empty_before(&self, exclusive: bool) -> anyhow::Result<()> {
        if !exclusive || self.has_a_before() {
            return Ok(());
        }
        let message = format!("--target-exclusive says nothing about {self}");
        Err(Failure::new(Exit::Usage, message).hint("it goes with --target-time, --target-lsn and --target-xid").into())
    }

    /// The option that asks for it.
    pub(crate) fn option(&self) -> String {
        match self {
            Self::Latest => String::new(),
            Self::Time(moment) => format!("--target-time '{}'", moment::for_people(*moment)),
            Self::Lsn(lsn) => format!("--target-lsn {lsn}"),
            Self::Xid(xid) => format!("--target-xid {xid}"),
            Self::Name(name) => format!("--target-name '{}'", name.replace('\'', r"'\''")),
            Self::Immediate => "--target-immediate".to_owned(),
        }
    }

    /// Whether PostgreSQL can stop just before it: a restore point and the end of a backup have no "before".
    pub(crate) const fn has_a_before(&self) -> bool {
        matches!(self, Self::Time(_) | Self::Lsn(_) | Self::Xid(_))
    }
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Latest => f.write_str("the end of the WAL"),
            Self::Time(moment) => write!(f, "time {}", moment::for_people(*moment)),
            Self::Lsn(lsn) => write!(f, "LSN {lsn}"),
            Self::Xid(xid) => write!(f, "transaction {xid}"),
            Self::Name(name) => write!(f, "restore point \"{name}\""),
            Self::Immediate => f.write_str("the end of the backup"),
        }
    }
}

/// Which history recovery follows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum TimelineChoice {
    /// The newest in the archive that descends from the backup's.
    #[default]
    Latest,
    /// The backup's own.
    Current,
    /// This one.
    Number(Timeline),
}

impl std::str::FromStr for TimelineChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = match text.strip_prefix("0x") {
            Some(hex) => u32::from_str_radix(hex, 16).ok(),
            None => text.parse().ok(),
        };
        match (text, number) {
            ("latest", _) => Ok(Self::Latest),
            ("current", _) => Ok(Self::Current),
            (_, Some(number)) if number > 0 => Ok(Self::Number(Timeline(number))),
            _ => Err(format!("\"{text}\" is not a timeline: latest, current, or a number from 1 on")),
        }
    }
}

/// What the server does at the target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Action {
    /// Ends recovery and runs as a primary.
    #[default]
    Promote,
    /// Waits, readable, for `pghydrant promote`.
    Pause,
    /// Stops, for `pghydrant promote`.
    Shutdown,
}

impl Action {
    /// `recovery_target_action`.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Promote => "promote",
            Self::Pause => "pause",
            Self::Shutdown => "shutdown",
        }
    }
}

/// All that PostgreSQL is told about the end of recovery.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Target {
    pub(crate) goal: Goal,
    /// Stop just before the goal instead of just after.
    pub(crate) exclusive: bool,
    /// Resolved: never "latest", so that a new timeline in the archive changes nothing on the way.
    pub(crate) timeline: Timeline,
    pub(crate) action: Action,
}

impl Target {
    /// The end of the WAL is no target to PostgreSQL, so it neither pauses nor shuts down there by itself: see
    /// [`super::standby`].
    pub(crate) fn waits_at_the_end(&self) -> bool {
        self.goal == Goal::Latest && self.action != Action::Promote
    }

    /// Every `recovery_target*` parameter, the unused goals first.
    pub(crate) fn settings(&self) -> Vec<Setting> {
        let (ours, value) = match &self.goal {
            Goal::Latest => (None, String::new()),
            Goal::Time(moment) => (Some("recovery_target_time"), moment::for_postgresql(*moment)),
            Goal::Lsn(lsn) => (Some("recovery_target_lsn"), lsn.to_string()),
            Goal::Xid(xid) => (Some("recovery_target_xid"), xid.to_string()),
            Goal::Name(name) => (Some("recovery_target_name"), name.clone()),
            Goal::Immediate => (Some("recovery_target"), "immediate".to_owned()),
        };
        let unused = GOALS.iter().filter(|name| Some(**name) != ours).map(|name| Setting::new(name, ""));
        unused
            .chain(ours.map(|name| Setting::new(name, value)))
            .chain([
                Setting::new("recovery_target_inclusive", if self.exclusive { "off" } else { "on" }),
                Setting::new("recovery_target_timeline", self.timeline.to_string()),
                Setting::new("recovery_target_action", self.action.name()),
            ])
            .collect()
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let before = if self.exclusive { "just before " } else { "" };
        write!(f, "{before}{} on timeline {}", self.goal, self.timeline)
    }
}

/// The parameters that each name a goal; at most one may be set.
const GOALS: [&str; 5] =
    ["recovery_target", "recovery_target_time", "recovery_target_lsn", "recovery_target_xid", "recovery_target_name"];

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn goal(goals: Goals) -> Result<Goal, String> {
        Goal::of(&goals, Timestamp::UNIX_EPOCH, &TimeZone::UTC)
    }

    #[test]
    fn unused_goals_are_emptied_before_ours_is_set() {
        let target =
            Target { goal: Goal::Name("it's".into()), exclusive: true, timeline: Timeline(3), action: Action::Pause };
        let settings: Vec<_> = target.settings().into_iter().map(|setting| (setting.name, setting.value)).collect();
        let wanted = [
            ("recovery_target", ""),
            ("recovery_target_time", ""),
            ("recovery_target_lsn", ""),
            ("recovery_target_xid", ""),
            ("recovery_target_name", "it's"),
            ("recovery_target_inclusive", "off"),
            ("recovery_target_timeline", "3"),
            ("recovery_target_action", "pause"),
        ];
        assert_eq!(settings, wanted.map(|(name, value)| (name.to_owned(), value.to_owned())));
    }

    #[test]
    fn impossible_goals_are_refused_before_anything_is_looked_at() {
        assert_eq!(goal(Goals::default()), Ok(Goal::Latest));
        assert!(goal(Goals { target_xid: Some(2), ..Goals::default() }).is_err());
        assert!(goal(Goals { target_xid: Some(1 << 32), ..Goals::default() }).is_err());
        assert!(goal(Goals { target_name: Some("x".repeat(64)), ..Goals::default() }).is_err());
        assert!(goal(Goals { target_name: Some(String::new()), ..Goals::default() }).is_err());
        assert!(goal(Goals { target_time: Some("soon".into()), ..Goals::default() }).is_err());
    }

    #[test]
    fn a_timelines_history_tells_whether_the_goal_was_come_to() {
        let none = "no recovery target specified";
        assert!(!Goal::Latest.is_missed_by(none) && Goal::Immediate.is_missed_by(none));
        assert!(!Goal::Immediate.is_missed_by("reached consistency"));
        for (goal, reached, missed) in [
            (Goal::Name("x".into()), "at restore point \"x\"", "at restore point \"\""),
            (Goal::Xid(7), "after transaction 742", "before transaction 0"),
            (Goal::Lsn(Lsn(7)), "after LSN 0/5000028", "before LSN 0/0"),
            (Goal::Time(Timestamp::UNIX_EPOCH), "before 2026-11-22 08:15:00.5+00", "before 2000-01-01 00:00:00+00"),
        ] {
            assert!(!goal.is_missed_by(reached) && goal.is_missed_by(missed) && goal.is_missed_by(none), "{goal}");
        }
    }

    #[test]
    fn a_timeline_is_a_number_as_postgresql_writes_it() {
        assert_eq!("0x1f".parse(), Ok(TimelineChoice::Number(Timeline(31))));
        assert_eq!("7".parse(), Ok(TimelineChoice::Number(Timeline(7))));
        for bad in ["", "0", "-1", "newest"] {
            assert!(bad.parse::<TimelineChoice>().is_err(), "{bad}");
        }
    }
}
