//! `retarget`: a restore that stopped at its target moves on to a later one, without a new copy.
//!
//! The server replays from where it is, so it can only go forward: a target behind that place needs a new restore, and the
//! refusal says which. What a restore proves of its target before it copies anything is proven here as well, before the
//! server is touched. Then the new target goes into the journal, and [`super::drive`] goes on as it does after any
//! interruption: it stops the server that waits with the old settings, writes the new ones, mounts the backup for its WAL,
//! starts the server and watches it. From the journal's word on, `retry` does the same.

use engine::units::{Lsn, SessionId};
use engine::wal::history::History;
use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::preflight::{self, Problem, Request};
use super::session::{Phase, Session, Store};
use super::survey::{self, Aim};
use super::target::{self, Action, Goal, Goals, Target, TimelineChoice};
use super::{Restore, claim, handover, recover, report, verbs, way};
use crate::context::Context;
use crate::exit::{Exit, Failure};
use crate::options::JsonOption;
use crate::postgres::client::{Client, value};
use crate::postgres::conninfo::Conninfo;
use crate::postgres::instance::Condition;

/// Options of the verb.
#[derive(clap::Args, Debug)]
pub(crate) struct Arguments {
    /// The session, as `pghydrant sessions` names it
    pub(crate) id: SessionId,
    #[command(flatten)]
    pub(crate) goals: Goals,
    /// Stop just before the target instead of just after it
    #[arg(long, help_heading = target::HEADING)]
    pub(crate) target_exclusive: bool,
    /// What the server does at its target [default: as it did at the last one]
    #[arg(long, value_enum, help_heading = target::HEADING)]
    pub(crate) action: Option<Action>,
    #[command(flatten)]
    pub(crate) output: JsonOption,
}

/// How far a server has recovered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Reached {
    /// Everything before it is replayed; the data may even be those of a place behind it.
    lsn: Lsn,
    /// The last transaction that was replayed.
    time: Option<Timestamp>,
}

pub(crate) fn run(arguments: &Arguments, context: &Context) -> anyhow::Result<Exit> {
    context.catch_interrupts()?;
    let usage = |message: String| Failure::new(Exit::Usage, message);
    let goal = Goal::of(&arguments.goals, Timestamp::now(), &TimeZone::system()).map_err(usage)?;
    goal.refuse_empty_before(arguments.target_exclusive)?;
    let mut session = Store::of(&context.state_directory()?).open(&arguments.id)?;
    refuse_unless_it_waits(&session)?;
    let plan = &session.journal.plan;
    let request = Request {
        repository: plan.repository.clone(),
        cluster: plan.cluster.clone(),
        backup: Some(plan.backup.clone()),
        data: plan.data().to_owned(),
        delta: false,
        goal,
        timeline: TimelineChoice::Number(plan.target.timeline),
        exclusive: arguments.target_exclusive,
        action: arguments.action.unwrap_or(plan.target.action),
        port: plan.port,
        tablespaces: Vec::new(),
        source: Some(plan.source),
        io: way::Wanted::Auto,
        trust_repository: plan.trust_repository,
        adopt: plan.adopt,
        no_start: false,
        check: None,
        handover: handover::Wanted::default(),
        owner: None,
        programs: Some(plan.programs.clone()),
        mount_directory: plan.mount_directory.clone(),
        program: std::env::current_exe()?,
    };
    let step = context.output.step("validate");
    let restore = Restore::open(&mut session, context)?;
    let aim = survey::aim(&request, &restore.backup.cluster, restore.restart_point()?)?;
    let reached = restore.reached(&aim)?;
    let mut judged = preflight::judge_target(&request, &aim);
    if let Some(behind) = backward(&request, &aim, reached) {
        judged.problems = vec![behind];
    }
    for warning in &judged.warnings {
        context.output.warning(warning);
    }
    if !judged.problems.is_empty() {
        drop(step);
        return Err(report::problems(&judged.problems, context).into());
    }
    let Request { goal, exclusive, action, .. } = request;
    let plan = &mut session.journal.plan;
    plan.target = Target { goal, exclusive, timeline: plan.target.timeline, action };
    plan.unproven = judged.unproven;
    plan.gap_behind = aim.wal.as_ref().is_ok_and(|wal| !wal.gaps.is_empty());
    step.done(&format!("from {} to {}", reached.lsn, plan.target));
    session.journal.at_target = None;
    session.journal.moves_on = true;
    session.save()?;
    super::drive(session, context)
}

/// Only a server that waits for somebody can be moved on: at its target, or where it found that it cannot reach it.
fn refuse_unless_it_waits(session: &Session) -> anyhow::Result<()> {
    let journal = &session.journal;
    let (id, plan) = (&journal.id, &journal.plan);
    let refuse = |what: &str, hint: String| -> anyhow::Result<()> {
        Err(Failure::new(Exit::Usage, format!("session {id} {what}")).hint(hint).into())
    };
    if journal.phase == Phase::Finished {
        return Err(verbs::finished(id));
    }
    if journal.phase != Phase::Recovering {
        return refuse(&format!("is not recovering: it is {}", journal.phase.text()), verbs::retry_hint(id));
    }
    claim::look(journal)?;
    let instance = recover::instance(plan)?;
    let waits = journal.at_target.is_some() && plan.target.action != Action::Promote;
    if claim::has_left_recovery(plan, &instance)? {
        let verb = if waits { "promote" } else { "retry" };
        return refuse(
            "has left recovery: its server is a database of its own now",
            format!("`pghydrant {verb} {id}` finishes it; a new restore reaches another target"),
        );
    }
    if !waits && instance.condition()? != Condition::Down {
        return refuse("is still on its way, and its server runs", verbs::retry_hint(id));
    }
    Ok(())
}

impl Restore<'_> {
    /// Where the server goes on, if the archive has no longer all WAL before that, which it does not need again. While it
    /// has, all of it is looked at: what lies behind is then refused for that.
    fn restart_point(&self) -> anyhow::Result<Option<Lsn>> {
        let plan = self.plan();
        let archive = self.backup.cluster.wal();
        let timeline = plan.target.timeline;
        let path = archive.history(timeline)?.unwrap_or_else(|| History::root(timeline));
        let restart = self.replay_start(&recover::instance(plan)?)?;
        let missing = archive.missing_between(self.backup.info.wal.start, &path, Some(restart))?;
        Ok((!missing.is_empty()).then_some(restart))
    }

    /// How far the server is: what it says, else what `pg_control` says of the data.
    fn reached(&self, aim: &Aim) -> anyhow::Result<Reached> {
        let instance = recover::instance(self.plan())?;
        if instance.condition()? != Condition::Down
            && let Some(reached) = self.ask_how_far()?
        {
            return Ok(reached);
        }
        let lsn = instance.control()?.min_recovery_point.max(self.backup.info.wal.stop);
        let time = match &aim.choice {
            Ok((info, path)) => aim.time_before(&self.backup.cluster.wal(), info, path, lsn)?,
            Err(_) => None,
        };
        Ok(Reached { lsn, time })
    }

    /// By SQL; nothing where nobody can log in.
    fn ask_how_far(&self) -> anyhow::Result<Option<Reached>> {
        const QUESTION: &str = "SELECT pg_last_wal_replay_lsn()::text, \
            (extract(epoch FROM pg_last_xact_replay_timestamp()) * 1000000)::bigint";
        let configuration = self.configuration()?;
        let (directory, port) = (configuration.socket_directory(), configuration.recovery_port());
        let client = self.logins().iter().find_map(|(user, database)| {
            Client::connect(&Conninfo::local(&directory, port, user, database))
                .inspect_err(|error| tracing::debug!("{error:#}"))
                .ok()
        });
        let Some(client) = client else { return Ok(None) };
        let row = client.row(QUESTION, &[])?;
        let lsn: Option<String> = value(&row, 0)?;
        let micros: Option<i64> = value(&row, 1)?;
        let time = micros.and_then(|micros| Timestamp::from_microsecond(micros).ok());
        Ok(lsn.and_then(|text| text.parse().ok()).map(|lsn| Reached { lsn, time }))
    }
}

/// Why a target cannot be reached from here: it lies behind.
fn backward(request: &Request, aim: &Aim, reached: Reached) -> Option<Problem> {
    let place = aim.wal.as_ref().ok().and_then(|wal| wal.place);
    let behind = match &request.goal {
        Goal::Latest => false,
        Goal::Immediate => true,
        Goal::Lsn(lsn) => *lsn < reached.lsn,
        Goal::Name(_) | Goal::Xid(_) => place.is_some_and(|place| place < reached.lsn),
        Goal::Time(moment) => reached.time.is_some_and(|time| time > *moment || (request.exclusive && time == *moment)),
    };
    let at = match (&request.goal, reached.time) {
        (Goal::Time(_), Some(time)) => format!("{}, {}", reached.lsn, super::moment::for_people(time)),
        _ => reached.lsn.to_string(),
    };
    behind.then(|| {
        Problem::new(
            format!("{} lies before {at}, where the server is: recovery only goes forward", request.goal),
            format!(
                "a new restore reaches it: pghydrant restore --repo {} --cluster {} --to DATADIR {}",
                request.repository.display(),
                request.cluster,
                request.goal.option()
            ),
        )
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::survey::WalFacts;
    use super::*;

    fn refused(goal: Goal, exclusive: bool, place: Option<Lsn>) -> bool {
        let second = |second| Timestamp::from_second(second).unwrap();
        let reached = Reached { lsn: Lsn(0x5000), time: Some(second(500)) };
        let aim = Aim {
            binaries: Err(String::new()),
            searcher: None,
            choice: Err(Problem::new("", "")),
            wal: Ok(WalFacts { place, ..WalFacts::default() }),
        };
        backward(&preflight::tests::request_for(goal, exclusive), &aim, reached).is_some()
    }

    #[test]
    fn what_lies_behind_is_refused() {
        let second = |second| Goal::Time(Timestamp::from_second(second).unwrap());
        assert!(refused(Goal::Immediate, false, None));
        assert!(!refused(Goal::Latest, false, None));
        assert!(refused(Goal::Lsn(Lsn(0x4FFF)), false, None) && !refused(Goal::Lsn(Lsn(0x5000)), false, None));
        assert!(refused(Goal::Xid(7), false, Some(Lsn(0x4FFF))) && !refused(Goal::Xid(7), false, Some(Lsn(0x5000))));
        assert!(refused(second(499), false, None) && !refused(second(500), false, None));
        assert!(refused(second(500), true, None), "just before a transaction that is replayed already");
    }
}
