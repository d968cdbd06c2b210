//! The verbs on sessions: what they make of a journal before [`super::drive`] goes on with it.

use engine::units::SessionId;
use jiff::Timestamp;
use serde_json::json;

use super::configure::Configuration;
use super::plan::{Before, Place, SESSION_DIRECTORY};
use super::recover;
use super::session::{Claim, Journal, Phase, Session, Store};
use super::target::Action;
use super::{files, staging};
use crate::context::Context;
use crate::exit::{Exit, Failure};
use crate::human;
use crate::postgres::instance::{Condition, StopMode};

/// `sessions`: the oldest first.
pub(crate) fn list(context: &Context) -> anyhow::Result<Exit> {
    let store = Store::of(&context.state_directory()?);
    let mut lines = Vec::new();
    let mut objects = Vec::new();
    for entry in store.list()? {
        match entry {
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

/// `retry ID`: goes on where the session stopped.
pub(crate) fn retry(id: &SessionId, context: &Context) -> anyhow::Result<Exit> {
    context.catch_interrupts()?;
    let mut session = Store::of(&context.state_directory()?).open(id)?;
    let journal = &session.journal;
    if journal.phase == Phase::Finished {
        return Err(finished(id));
    }
    if journal.at_target.is_some() && journal.plan.target.action != Action::Promote {
        let message = format!("session {id} is at its target and waits: there is nothing to retry");
        return Err(Failure::new(Exit::Usage, message)
            .hint(format!("`pghydrant promote {id}` ends recovery, `pghydrant cancel {id}` removes the copy"))
            .into());
    }
    session.journal.attempts += 1;
    super::drive(session, context)
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
        return Err(Failure::new(Exit::Usage, message).hint(format!("`pghydrant retry {id}` goes on with it")).into());
    }
    // In the journal first: after a crash from here on, `retry` promotes.
    session.journal.plan.target.action = Action::Promote;
    super::drive(session, context)
}

/// `cancel ID`: takes away what the session made.
pub(crate) fn cancel(id: &SessionId, context: &Context) -> anyhow::Result<Exit> {
    let session = Store::of(&context.state_directory()?).open(id)?;
    let journal = &session.journal;
    match journal.phase {
        Phase::Finished => return Err(finished(id)),
        Phase::Reverting => {
            let message = format!("session {id} has left recovery: its server is a database of its own now");
            return Err(Failure::new(Exit::Usage, message)
                .hint(format!("`pghydrant retry {id}` finishes it; stop that server and remove its directory to be rid of it"))
                .into());
        }
        Phase::Copying | Phase::Configuring | Phase::Publishing | Phase::Recovering => {}
    }
    let step = context.output.step("cancel");
    refuse_unless_ours(&session)?;
    remove(&session)?;
    let data = journal.plan.data().display().to_string();
    step.done(&data);
    let text = format!("cancelled {id}: nothing of it is left in {data}");
    let object = json!({"session": id, "state": "cancelled", "data": journal.plan.data()});
    session.forget()?;
    context.output.result(&text, &object);
    Ok(Exit::Done)
}

fn finished(id: &SessionId) -> anyhow::Error {
    Failure::new(Exit::Usage, format!("session {id} is finished")).hint("`pghydrant sessions` lists what is not").into()
}

/// Nothing is removed from a directory that does not say that it is this session's.
fn refuse_unless_ours(session: &Session) -> anyhow::Result<()> {
    let journal = &session.journal;
    let claim = Claim::read(&journal.plan.session_directory())?;
    if claim.as_ref().is_some_and(|claim| claim.session == journal.id) || !has_anything(&journal.plan.data)? {
        return Ok(());
    }
    let message = format!("{} does not say that it belongs to session {}", journal.plan.data().display(), journal.id);
    Err(Failure::new(Exit::Refused, message).hint("look at that directory, and remove it yourself if it is not needed").into())
}

fn has_anything(place: &Place) -> anyhow::Result<bool> {
    match std::fs::read_dir(&place.path) {
        // A session's directory without its claim is one that a crash left at the very beginning.
        Ok(entries) => Ok(entries.flatten().any(|entry| {
            let name = entry.file_name();
            name != files::LOST_AND_FOUND && name != SESSION_DIRECTORY
        })),
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(cause) => Err(engine::Error::io("list", &place.path, cause).into()),
    }
}

/// The server is stopped, then everything goes: `pg_control` first, so that nothing half removed can start, and the
/// claim last, so that a cancel that was interrupted can be done again.
fn remove(session: &Session) -> anyhow::Result<()> {
    let journal = &session.journal;
    let plan = &journal.plan;
    if journal.phase == Phase::Recovering {
        let instance = recover::instance(plan)?;
        if instance.condition()? != Condition::Down {
            instance.stop(StopMode::Immediate, std::time::Duration::from_secs(60))?;
        }
    }
    files::remove(&plan.data().join(crate::postgres::control::PATH))?;
    files::remove(&plan.data().join(staging::DIRECTORY))?;
    for tablespace in &plan.tablespaces {
        take_away(&tablespace.place)?;
    }
    let socket = Configuration::socket_directory_of(plan, &journal.id);
    if socket != plan.session_directory() {
        files::remove(&socket)?;
    }
    files::empty_but(plan.data(), SESSION_DIRECTORY)?;
    files::remove(&plan.session_directory())?;
    take_away(&plan.data)
}

/// Back to what was there before.
fn take_away(place: &Place) -> anyhow::Result<()> {
    files::empty(&place.path)?;
    if place.before == Before::Absent {
        files::remove(&place.path)?;
    }
    for parent in place.missing_parents.iter().rev() {
        // Somebody else may use it by now.
        if std::fs::remove_dir(parent).is_err() {
            break;
        }
    }
    Ok(())
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
    let mut text = format!("{id}  {state}, {age} ago  {} of {} to {}", plan.backup, plan.cluster, plan.data().display());
    if let (Some(broken), None) = (&journal.broken, driver) {
        text.push_str(&format!("\n    {}", broken.message));
    }
    if journal.phase != Phase::Finished && driver.is_none() {
        let next = if journal.at_target.is_some() { "promote" } else { "retry" };
        text.push_str(&format!("\n    pghydrant {next} {id}, or pghydrant cancel {id}"));
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
