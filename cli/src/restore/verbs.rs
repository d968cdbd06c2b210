//! The verbs on sessions: what they make of a journal before [`super::drive`] goes on with it.

use engine::hydration;
use engine::io::{LocalDisk, durable};
use engine::units::SessionId;
use jiff::Timestamp;
use serde_json::json;

use super::configure::Configuration;
use super::plan::Before;
use super::session::{Journal, Phase, Session, Store};
use super::target::Action;
use super::{claim, copy, files, handover, recover};
use crate::context::Context;
use crate::exit::{Exit, Failure};
use crate::human;
use crate::postgres::instance::{Condition, StopMode};

/// A server that is stopped at once ends at once.
const STOP_PATIENCE: std::time::Duration = std::time::Duration::from_secs(60);

/// `sessions`: the oldest first; finished ones only with `all`.
pub(crate) fn list(all: bool, context: &Context) -> anyhow::Result<Exit> {
    let store = Store::of(&context.state_directory()?);
    let mut lines = Vec::new();
    let mut objects = Vec::new();
    for entry in store.list()? {
        match entry {
            Ok((journal, _)) if journal.phase == Phase::Finished && !all => {}
            Ok((journal, driver)) => {
                lines.push(line(&journal, driver));
                objects.push(object(&journal, driver));
            }
            Err(error) => context.output.warning(&format!("{error:#}")),
        }
    }
    if lines.is_empty() {
        lines.push("no sessions".to_owned());
    }
    context.output.result(&lines.join("\n"), &json!({"sessions": objects}));
    Ok(Exit::Done)
}

/// `retry ID`: goes on where the session stopped; without the check, if the user is done with it.
pub(crate) fn retry(id: &SessionId, skip_check: bool, context: &Context) -> anyhow::Result<Exit> {
    context.catch_interrupts()?;
    let mut session = Store::of(&context.state_directory()?).open(id)?;
    let journal = &session.journal;
    if journal.phase == Phase::Finished {
        return Err(finished(id));
    }
    if waits_and_is_down(journal)? {
        // After a reboot: it is started, and comes to wait where it did.
        session.journal.at_target = None;
    } else if journal.at_target.is_some() && journal.plan.target.action != Action::Promote {
        let message = format!("session {id} is at its target and waits: there is nothing to retry");
        return Err(Failure::new(Exit::Usage, message)
            .hint(format!("`pghydrant promote {id}` ends recovery, `pghydrant retarget {id}` moves it on, `pghydrant cancel {id}` removes the copy"))
            .into());
    }
    if skip_check {
        session.journal.plan.check = None;
    }
    session.journal.attempts += 1;
    super::drive(session, context)
}

/// Where a session stands that somebody else orders things of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    OnItsWay,
    /// It waits there; how the result of its restore calls that.
    AtTarget(&'static str),
    /// It waited there, and its server was ended.
    Down,
    Finished,
}

/// None if there is no such session.
pub(crate) fn standing(id: &SessionId, state: &std::path::Path) -> anyhow::Result<Option<Standing>> {
    let store = Store::of(state);
    if !store.journal_path(id).exists() {
        return Ok(None);
    }
    let journal = store.open(id)?.journal;
    Ok(Some(match journal.plan.target.action {
        _ if journal.phase == Phase::Finished => Standing::Finished,
        Action::Promote => Standing::OnItsWay,
        _ if journal.at_target.is_none() => Standing::OnItsWay,
        _ if waits_and_is_down(&journal)? => Standing::Down,
        Action::Pause => Standing::AtTarget("paused"),
        Action::Shutdown => Standing::AtTarget("shut down"),
    }))
}

/// A server that was paused at its target, and does not run any more.
fn waits_and_is_down(journal: &Journal) -> anyhow::Result<bool> {
    if journal.at_target.is_none() || journal.plan.target.action != Action::Pause || !claim::is_ours(journal)? {
        return Ok(false);
    }
    let instance = recover::instance(&journal.plan)?;
    Ok(instance.condition()? == Condition::Down && !claim::has_left_recovery(&journal.plan, &instance)?)
}

/// `promote ID`: ends the recovery of a server that waits at its target.
pub(crate) fn promote(id: &SessionId, context: &Context) -> anyhow::Result<Exit> {
    context.catch_interrupts()?;
    let mut session = Store::of(&context.state_directory()?).open(id)?;
    if session.journal.phase == Phase::Finished {
        return Err(finished(id));
    }
    if session.journal.at_target.is_none() {
        let message = format!("session {id} is not at its target: it is {}", session.journal.phase.text());
        return Err(Failure::new(Exit::Usage, message).hint(retry_hint(id)).into());
    }
    // In the journal first: after a crash from here on, `retry` promotes.
    session.journal.plan.target.action = Action::Promote;
    super::drive(session, context)
}

/// `cancel ID`: takes away what the session made.
pub(crate) fn cancel(id: &SessionId, context: &Context) -> anyhow::Result<Exit> {
    let session = Store::of(&context.state_directory()?).open(id)?;
    let journal = &session.journal;
    let ours = claim::is_ours(journal)?;
    if journal.phase == Phase::Finished {
        return Err(finished(id));
    }
    // Stopped first, and looked at again: it may have been promoted in between.
    if ours && (is_a_database(journal)? || (stop_server(journal)? && is_a_database(journal)?)) {
        let message = format!("session {id} has left recovery: its server is a database of its own now");
        let waits = journal.at_target.is_some() && journal.plan.target.action != Action::Promote;
        let verb = if waits { "promote" } else { "retry" };
        return Err(Failure::new(Exit::Usage, message)
            .hint(format!(
                "`pghydrant {verb} {id}` finishes it; stop that server and remove its directory to be rid of it"
            ))
            .into());
    }
    if journal.plan.delta.is_some() {
        return super::delta::cancel(session, ours, context);
    }
    let step = context.output.step("cancel");
    let removed = remove(&session, ours)?;
    let data = journal.plan.data().display().to_string();
    step.done(&data);
    let left = if removed { "nothing of it is left in" } else { "it has no claim any more on what is in" };
    let text = format!("cancelled {id}: {left} {data}");
    let object = json!({"session": id, "state": "cancelled", "data": journal.plan.data(), "removed": removed});
    session.forget()?;
    context.output.result(&text, &object);
    Ok(Exit::Done)
}

/// What to do with a session that has stopped on its way.
pub(super) fn retry_hint(id: &SessionId) -> String {
    format!("`pghydrant retry {id}` goes on with it")
}

pub(super) fn finished(id: &SessionId) -> anyhow::Error {
    Failure::new(Exit::Usage, format!("session {id} is finished")).hint("`pghydrant sessions` lists what is not").into()
}

/// Everything goes: `pg_control` first, so that nothing half removed can start, and the map, which says whose the
/// directory is, last, so that a cancel that was interrupted can be done again. False where somebody else's files have
/// taken the place: they are left alone.
fn remove(session: &Session, ours: bool) -> anyhow::Result<bool> {
    let journal = &session.journal;
    let plan = &journal.plan;
    let disk = LocalDisk::new();
    if ours {
        durable::remove_durably(&plan.data().join(crate::postgres::control::PATH))?;
        let socket = Configuration::socket_directory_of(plan, &journal.id);
        if socket != plan.session_directory() {
            files::remove(&socket)?;
        }
    }
    // Any other restore hands over when there is no way back.
    if ours && plan.no_start {
        handover::take_away(plan, &journal.id)?;
    }
    match hydration::remove_all(&copy::layout(plan), &journal.id, &disk) {
        Err(engine::Error::Refused(_)) if !ours => {
            copy::take_away_leftover(journal)?;
            return Ok(false);
        }
        removed => removed?,
    }
    // What a crash left before the map could say that we made it. None of this removes what is not empty.
    for place in plan.places().filter(|place| place.before == Before::Absent) {
        let made = std::iter::once(&place.path).chain(place.missing_parents.iter().rev());
        let _ = made.map(std::fs::remove_dir).take_while(Result::is_ok).count();
    }
    copy::take_away_leftover(journal)?;
    Ok(true)
}

/// Whether the server has left recovery: as the journal says, or because somebody started or promoted it by hand.
fn is_a_database(journal: &Journal) -> anyhow::Result<bool> {
    Ok(match journal.phase {
        Phase::Checking | Phase::Reverting => true,
        // Not there yet, or taken away already by a cancel that was interrupted.
        _ if !journal.plan.data().join(crate::postgres::control::PATH).exists() => false,
        Phase::Publishing | Phase::Recovering => {
            claim::has_left_recovery(&journal.plan, &recover::instance(&journal.plan)?)?
        }
        Phase::Saving | Phase::Copying | Phase::Configuring | Phase::Finished => false,
    })
}

/// Stops the server, if one runs: from `pg_control` on anybody can have started it. False if none did.
fn stop_server(journal: &Journal) -> anyhow::Result<bool> {
    if !matches!(journal.phase, Phase::Publishing | Phase::Recovering) {
        return Ok(false);
    }
    let instance = recover::instance(&journal.plan)?;
    Ok(instance.condition()? != Condition::Down && instance.stop(StopMode::Immediate, STOP_PATIENCE)?)
}

/// Where a session stands, in a word for programs.
fn state(journal: &Journal, driver: Option<u32>) -> &'static str {
    match (driver, &journal.broken, &journal.at_target, journal.phase) {
        (_, _, _, Phase::Finished) => "finished",
        (Some(_), ..) => "running",
        (None, None, Some(_), _) => "at_target",
        // No reason in the journal: the process that drove it was killed, or the machine went down.
        (None, ..) => "stopped",
    }
}

fn line(journal: &Journal, driver: Option<u32>) -> String {
    let (id, plan) = (&journal.id, &journal.plan);
    let state = match (state(journal, driver), driver) {
        ("finished", _) => "finished".to_owned(),
        ("running", Some(pid)) => format!("{} (process {pid})", journal.phase.text()),
        ("at_target", _) if plan.target.action == Action::Shutdown => "shut down at its target".to_owned(),
        ("at_target", _) => "paused at its target".to_owned(),
        _ => format!("stopped while {}", journal.phase.text()),
    };
    let age = Timestamp::now().duration_since(journal.updated_at);
    let age = human::duration(age.try_into().unwrap_or_default());
    let mut text =
        format!("{id}  {state}, {age} ago  {} of {} to {}", plan.backup, plan.cluster, plan.data().display());
    if let (Some(broken), None) = (&journal.broken, driver) {
        text.push_str(&format!("\n    {}", broken.message));
    }
    if journal.phase != Phase::Finished && driver.is_none() {
        let next = match &journal.at_target {
            Some(_) => format!("pghydrant promote {id}, pghydrant retarget {id}"),
            None => format!("pghydrant retry {id}"),
        };
        text.push_str(&format!("\n    {next}, or pghydrant cancel {id}"));
    }
    text
}

fn object(journal: &Journal, driver: Option<u32>) -> serde_json::Value {
    json!({
        "session": journal.id, "state": state(journal, driver), "phase": journal.phase, "process": driver,
        "cluster": journal.plan.cluster, "backup": journal.plan.backup, "data": journal.plan.data(),
        "target": journal.plan.target.to_string(), "action": journal.plan.target.action,
        "created_at": journal.created_at, "updated_at": journal.updated_at, "attempts": journal.attempts,
        "at_target": journal.at_target, "error": journal.broken, "steps": journal.steps,
    })
}
