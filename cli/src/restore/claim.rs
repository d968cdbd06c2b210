//! Whose the data directory is when a session is taken up again: between two runs anything may have happened to it.
//!
//! The map in it says which session it belongs to. A user may have removed the directory and put another cluster, or
//! another restore, in its place; a session must not stop that server, nor write into its configuration.

use engine::hydration;
use engine::io::LocalDisk;
use engine::units::{SessionId, Timeline};

use super::plan::Plan;
use super::session::{Journal, Phase};
use crate::exit::{Exit, Failure};
use crate::postgres::control::{self, ControlFile, State};
use crate::postgres::instance::Instance;

/// What a session may do in its data directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// All that its phase says; in an early phase the copy itself looks once more.
    Holds,
    /// Nothing: the session's mark is taken away last, and it is gone.
    Done,
}

/// Looks whose the directory is; an error if the session has no more business there.
pub(super) fn look(journal: &Journal) -> anyhow::Result<Claim> {
    let plan = &journal.plan;
    let found = marked(plan)?;
    if found.as_ref() == Some(&journal.id) {
        return Ok(Claim::Holds);
    }
    let startable = || plan.data().join(control::PATH).exists();
    match journal.phase {
        // By then a delta has marked it: what has no mark has come into its place since, and a delta removes.
        Phase::Copying | Phase::Configuring if plan.delta.is_some() => Err(not_ours(journal, found.as_ref())),
        Phase::Saving | Phase::Copying | Phase::Configuring | Phase::Finished => Ok(Claim::Holds),
        // Unmarked and complete: the crash fell between the last trace and the journal's last word.
        Phase::Publishing if found.is_none() && plan.no_start && startable() => Ok(Claim::Done),
        Phase::Publishing => Ok(Claim::Holds),
        Phase::Reverting => Ok(Claim::Done),
        Phase::Recovering | Phase::Checking => Err(not_ours(journal, found.as_ref())),
    }
}

fn not_ours(journal: &Journal, found: Option<&SessionId>) -> anyhow::Error {
    let (data, id) = (journal.plan.data().display(), &journal.id);
    let whose = found.map_or_else(|| "no restore".to_owned(), |other| format!("restore {other}"));
    let hint = format!("`pghydrant cancel {id}` forgets the session and leaves the directory as it is");
    Failure::new(Exit::Refused, format!("{data} belongs to {whose}, not to {id} any more")).hint(hint).into()
}

/// Whether the directory carries the session's mark.
pub(super) fn is_ours(journal: &Journal) -> anyhow::Result<bool> {
    Ok(marked(&journal.plan)?.as_ref() == Some(&journal.id))
}

/// The server ended recovery, and may have stopped since, in whatever way: its signal file is gone and `pg_control` is
/// a primary's. In this order: a copy's `pg_control` says "in production" until the server has read the signal.
pub(super) fn has_left_recovery(plan: &Plan, instance: &Instance) -> anyhow::Result<bool> {
    Ok(!super::standby::is_signalled(plan.data()) && is_a_primarys(&instance.control()?, plan.target.timeline))
}

/// Whether a control file without a signal beside it is a primary's. One that was killed while it stopped, or while it
/// recovered from a crash, shows it by its timeline alone; after a fast promotion only the end of recovery has that.
pub(super) fn is_a_primarys(control: &ControlFile, target: Timeline) -> bool {
    matches!(control.state, State::InProduction | State::ShutDown) || began_a_timeline(control, target)
}

/// Whether a promotion has begun a timeline of its own behind the target's.
pub(super) fn began_a_timeline(control: &ControlFile, target: Timeline) -> bool {
    control.timeline.max(control.min_recovery_timeline) > target
}

fn marked(plan: &Plan) -> anyhow::Result<Option<SessionId>> {
    Ok(hydration::session_in(plan.data(), &LocalDisk::new())?.map(|(id, _)| id))
}
