//! The rules on the target: a backup that leads to it, and WAL all the way.
//!
//! What PostgreSQL would find out at the end of its replay, hours later, is told here.

use engine::format::backup::BackupInfo;
use engine::wal::history::History;
use jiff::Timestamp;

use super::super::moment;
use super::super::survey::{Created, Location, Unbegun, WalFacts};
use super::super::target::{Action, Goal};
use super::{Problem, Request};

/// What is to be said about a target.
#[derive(Debug, Default)]
pub(crate) struct TargetJudgement {
    pub(crate) problems: Vec<Problem>,
    pub(crate) warnings: Vec<String>,
    /// See [`super::Plan::unproven`].
    pub(crate) unproven: Option<String>,
}

/// Judges the target, and the WAL all the way to it.
pub(super) fn judge(
    request: &Request,
    now: Timestamp,
    choice: &Result<(BackupInfo, History), Problem>,
    wal: &Result<WalFacts, String>,
) -> TargetJudgement {
    let mut judge = Judge { request, now, choice, wal, judgement: TargetJudgement::default() };
    judge.target();
    judge.wal();
    judge.tablespaces();
    judge.judgement
}

struct Judge<'a> {
    request: &'a Request,
    now: Timestamp,
    choice: &'a Result<(BackupInfo, History), Problem>,
    wal: &'a Result<WalFacts, String>,
    judgement: TargetJudgement,
}

impl Judge<'_> {
    fn refuse(&mut self, what: impl Into<String>, hint: impl Into<String>) {
        self.judgement.problems.push(Problem::new(what, hint));
    }

    fn target(&mut self) {
        if let Err(problem) = self.choice {
            self.refuse(problem.what.clone(), problem.hint.clone());
        }
        if let Goal::Time(moment) = &self.request.goal
            && *moment > self.now
        {
            self.refuse(
                format!(
                    "time {} is in the future: it is {} now",
                    moment::for_people(*moment),
                    moment::for_people(whole_second(self.now))
                ),
                "leave --target-time out to recover to the end of the WAL",
            );
        }
        let stops = self.request.action == Action::Shutdown;
        if stops && self.request.goal == Goal::Latest && self.request.no_start {
            self.refuse(
                "started by somebody else, PostgreSQL does not shut down at the end of the WAL",
                "name a target, such as --target-time, or leave --action or --no-start out",
            );
        }
    }

    fn wal(&mut self) {
        let Ok((info, path)) = self.choice else { return };
        let facts = match self.wal {
            Ok(facts) => facts,
            Err(refusal) => {
                return self
                    .refuse(format!("the WAL cannot be looked at: {refusal}"), "mend that, or choose another target");
            }
        };
        let segment_bytes = info.server.wal_segment_bytes;
        let goal = &self.request.goal;
        let end = facts.end.map_or_else(|| "nothing".to_owned(), |end| end.to_string());
        if let (Goal::Lsn(lsn), Some(archive_end)) = (goal, facts.end)
            && *lsn >= archive_end
        {
            // PostgreSQL stops at a record that begins there or later, or not at all.
            let place = if *lsn == archive_end { "is" } else { "lies after" };
            return self.refuse(
                format!("LSN {lsn} {place} the end of the archived WAL of timeline {} ({archive_end})", path.timeline),
                format!(
                    "leave --target-lsn out to recover to the end of the WAL, or archive the rest of it first{}",
                    other_timelines(facts)
                ),
            );
        }
        if let Some(first) = facts.missing.first() {
            let instead = facts.unbegun.as_ref().filter(|unbegun| unbegun.first == *first);
            let instead = instead.map(|unbegun| format!("; or follow --target-timeline {}", unbegun.instead));
            return self.refuse(
                format!(
                    "WAL segment {} is not in the archive, and {} in all are missing between the backup's start ({}) and the target",
                    first.file_name(segment_bytes),
                    facts.missing.len(),
                    info.wal.start
                ),
                format!(
                    "archive them with `pghydrant wal push`, or choose another backup or an earlier target{}",
                    instead.unwrap_or_default()
                ),
            );
        }
        // What is proven to lie before the end of the archive lies before the place where PostgreSQL goes astray.
        let unproven = matches!(goal, Goal::Time(_)) && facts.unsearchable.is_some();
        if let Some(Unbegun { first, left, instead }) =
            facts.unbegun.as_ref().filter(|_| *goal == Goal::Latest || unproven)
        {
            return self.refuse(
                format!(
                    "timeline {} left timeline {} at {}, and its WAL segment {} is not in the archive: PostgreSQL would \
                     follow timeline {} instead",
                    first.timeline,
                    left.timeline,
                    left.left_at,
                    first.file_name(segment_bytes),
                    left.timeline
                ),
                format!(
                    "archive it with `pghydrant wal push`, or restore with --target-timeline {instead}, whose end is \
                     another"
                ),
            );
        }
        if let Some(reason) = &facts.unsearchable {
            return self.unsearchable(reason, facts, info.server.version_num / 10_000);
        }
        let gap = facts.gaps.first().map(|segment| segment.file_name(segment_bytes));
        match (goal, gap) {
            (Goal::Latest, Some(gap)) => self.refuse(
                format!("WAL segment {gap} is missing before the end of the archive ({end})"),
                "archive it with `pghydrant wal push`, or choose a target before it",
            ),
            (Goal::Time(moment), gap) if facts.searched => {
                let reached = facts
                    .last_transaction
                    .is_some_and(|last| last > *moment || (self.request.exclusive && last == *moment));
                if !reached && *moment <= self.now {
                    let last = facts.last_transaction.map_or_else(|| "none".to_owned(), moment::for_people);
                    let place = gap.map_or_else(
                        || "in the archived WAL".to_owned(),
                        |gap| format!("before the missing WAL segment {gap}"),
                    );
                    self.refuse(
                        format!(
                            "time {} is not before the last transaction {place} ({last})",
                            moment::for_people(*moment)
                        ),
                        "leave --target-time out to recover to the end of the WAL, or archive the rest of it first",
                    );
                }
            }
            (Goal::Xid(_) | Goal::Name(_), gap) if facts.searched && facts.place.is_none() => {
                let place =
                    gap.map_or_else(|| format!("up to {end}"), |gap| format!("before the missing segment {gap}"));
                self.refuse(
                    format!(
                        "{goal} is not in the WAL of timeline {} after the backup's end ({}), {place}",
                        path.timeline, info.wal.stop
                    ),
                    format!(
                        "check it, choose an earlier backup with --backup, or archive the rest of the WAL first{}",
                        other_timelines(facts)
                    ),
                );
            }
            _ => {}
        }
    }
}

impl Judge<'_> {
    /// Replayed where the original has its files, they would be overwritten.
    fn tablespaces(&mut self) {
        let (Ok(_), Ok(facts)) = (self.choice, self.wal) else { return };
        let Some(created) = &facts.created else {
            if facts.missing.is_empty() {
                self.judgement.warnings.push(
                    "not proven: that no tablespace is created on the way, whose files would go where the original has \
                     them (pg_waldump is missing)"
                        .to_owned(),
                );
            }
            return;
        };
        for Created { oid, location, lsn, place } in created {
            let what = format!("the WAL on the way to the target creates tablespace {oid} in {}", location.display());
            let earlier = format!("or choose a target before {lsn}, or a backup from after it");
            match place {
                Location::Free => {}
                Location::Absent => self.refuse(
                    format!("{what}, which is not on this machine: PostgreSQL stops there"),
                    format!("make that directory, empty and owned by the instance's user, {earlier}"),
                ),
                Location::Taken => self.refuse(
                    format!("{what}, where a cluster has files: the replay would write into them"),
                    format!("restore on another machine, {earlier}"),
                ),
            }
        }
    }

    /// Where the WAL cannot be looked into. For a time that is only a proof which is missing, for a transaction that
    /// ended before a later backup as well; a restore point's place nobody knows.
    fn unsearchable(&mut self, reason: &str, facts: &WalFacts, major: u32) {
        let goal = &self.request.goal;
        match goal {
            Goal::Time(moment) => match facts.archived {
                Some(archived) if archived < *moment => self.refuse(
                    format!(
                        "time {} lies after the archived WAL, the last of which was archived at {}",
                        moment::for_people(*moment),
                        moment::for_people(archived)
                    ),
                    "leave --target-time out to recover to the end of the WAL, or archive the rest of it first",
                ),
                _ => self.doubt(format!("a transaction after {goal} in the archived WAL ({reason})")),
            },
            Goal::Xid(_) if facts.ended_by.is_some() => {
                self.doubt(format!("the end of {goal} in the archived WAL ({reason})"));
            }
            _ => self.refuse(
                format!("{goal} cannot be looked for in the WAL: {reason}"),
                format!(
                    "install the package that has pg_waldump (on Debian postgresql-{major}), or name its directory with --pg-bin"
                ),
            ),
        }
    }

    /// What only PostgreSQL will find out.
    fn doubt(&mut self, what: String) {
        self.judgement
            .warnings
            .push(format!("not proven: {what}; where there is none, PostgreSQL says so after its replay"));
        self.judgement.unproven = Some(what);
    }
}

/// What else there is: a target of a timeline that was left, or that came later, is on no other.
fn other_timelines(facts: &WalFacts) -> String {
    let others: Vec<String> = facts.other_timelines.iter().map(ToString::to_string).collect();
    if others.is_empty() {
        return String::new();
    }
    format!("; the archive also has what --target-timeline {} leads to", others.join(" or "))
}

fn whole_second(moment: Timestamp) -> Timestamp {
    Timestamp::from_second(moment.as_second()).unwrap_or(moment)
}
