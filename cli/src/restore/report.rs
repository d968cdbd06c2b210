//! What the user is told: the plan, the problems, the end.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use engine::format::backup::BackupInfo;
use serde_json::{Value, json};

use super::finish::log_path;
use super::isolation;
use super::plan::{Before, Place, Plan};
use super::preflight::{Problem, Request};
use super::session::{Journal, Phase, Session};
use super::target::Action;
use crate::context::Context;
use crate::exit::{Exit, Failure};
use crate::human;

/// Tells all problems; what is returned ends the command.
pub(super) fn problems(problems: &[Problem], context: &Context) -> Failure {
    match problems {
        [only] => {
            // The error that follows says the same.
            context.output.event("problem", &json!({"what": only.what, "hint": only.hint, "only": true}));
            Failure::new(Exit::Refused, only.what.clone()).hint(only.hint.clone())
        }
        all => {
            for problem in all {
                if context.output.is_json() {
                    context.output.event("problem", problem);
                } else {
                    context.output.note(&format!("problem: {problem}"));
                }
            }
            Failure::new(
                Exit::Refused,
                format!("the restore is refused for {} reasons; nothing was touched", all.len()),
            )
        }
    }
}

/// `--plan`.
pub(super) fn plan(plan: &Plan, request: &Request, context: &Context) {
    let mut lines = vec![
        ("cluster", format!("{} in {}", plan.cluster, plan.repository.display())),
        ("backup", format!("{}, {}, {} files", plan.backup, human::bytes(plan.bytes), plan.files)),
        ("target", plan.target.to_string()),
        ("data directory", place(&plan.data)),
    ];
    lines.extend(plan.unproven.iter().map(|what| ("not proven", what.clone())));
    for tablespace in &plan.tablespaces {
        lines.push(("tablespace", format!("{} in {}", tablespace.name, place(&tablespace.place))));
    }
    lines.extend(super::delta::planned(plan));
    let how = match plan.source {
        super::Source::Mount => "through a FUSE mount of the backup",
        super::Source::Blocks => "from the repository's blocks",
    };
    lines.push(("copy", how.to_owned()));
    lines.push(("i/o", plan.way().to_owned()));
    lines.push(("user", plan.owner.name.clone()));
    lines.push(("programs", plan.programs.display().to_string()));
    lines.push(("port", plan.port.map_or_else(|| "as in its configuration".to_owned(), |port| port.to_string())));
    let end = match (plan.no_start, plan.target.action) {
        (true, _) => "none: the server is not started; its first start recovers",
        (false, Action::Promote) => "promote",
        (false, Action::Pause) => "pause, readable, until `pghydrant promote`",
        (false, Action::Shutdown) => "shut down, until `pghydrant promote`",
    };
    lines.push(("action", end.to_owned()));
    if let Some(check) = plan.check {
        lines.push(("check", format!("pg_amcheck, {}, before the server opens for others", check.name())));
    }
    if let Some(placed) = &plan.handover.configuration {
        let cluster = placed.cluster.as_ref().map(|cluster| format!(", cluster {cluster} of pg_lsclusters"));
        lines.push(("configuration", format!("{}{}", place(&placed.place), cluster.unwrap_or_default())));
    }
    lines.extend(plan.handover.unit.iter().map(|unit| ("systemd unit", unit.display().to_string())));
    let isolation = if plan.adopt {
        "adopted: it archives and replicates as the original did"
    } else {
        "an isolated copy: it archives nowhere, subscribes to nothing and runs no jobs (--adopt lifts it)"
    };
    lines.push(("isolation", isolation.to_owned()));
    let text = lines.iter().map(|(name, value)| format!("{name:<15} {value}")).collect::<Vec<_>>().join("\n");
    let mut object = json!({"plan": plan, "mount_directory": request.mount_directory});
    if let Value::Object(fields) = &mut object {
        fields.insert("target".to_owned(), plan.target.to_string().into());
    }
    context.output.result(&text, &object);
}

fn place(place: &Place) -> String {
    match place.before {
        Before::Absent => format!("{} (is made)", place.path.display()),
        Before::Empty => format!("{} (is empty)", place.path.display()),
        Before::Existing => format!("{} (is overwritten where it differs)", place.path.display()),
    }
}

/// The restore is done and its server runs.
pub(super) fn finished(session: &Session, info: &BackupInfo, port: Option<u16>, context: &Context) {
    let plan = &session.journal.plan;
    let port_text = port.map(|port| format!(" on port {port}")).unwrap_or_default();
    let mut text = format!(
        "{}\nrestored {} of {} to {}: running{port_text}, recovered to {}",
        steps(&session.journal, context),
        plan.backup,
        plan.cluster,
        plan.data().display(),
        plan.target
    );
    for line in plan.handover.words(plan.data(), true) {
        text.push_str(&format!("\n{line}"));
    }
    if let Some(checked) = session.journal.checked.as_ref().filter(|checked| checked.failed > 0) {
        text.push_str(
            "\nthe check found something wrong, at the source already or because text sorts differently here:",
        );
        text.extend(checked.findings.iter().map(|finding| format!("\n  {finding}")));
        let more = checked.failed.saturating_sub(checked.findings.len() as u64);
        if more > 0 {
            text.push_str(&format!("\n  and {more} more: pg_amcheck tells all"));
        }
    }
    push_isolation(&mut text, session, info);
    text.extend(super::delta::saved_wal(&session.journal).map(|saved| format!("\n{saved}")));
    context.output.result(&text, &object(session, info, "running", port));
}

/// `--no-start`. What was `left` in `postgresql.auto.conf` says nothing to the server itself once it has recovered, but
/// all the more to a standby made from it.
pub(super) fn not_started(session: &Session, info: &BackupInfo, left: &[String], context: &Context) {
    let plan = &session.journal.plan;
    let mut text = format!(
        "{}\nrestored {} of {} to {}: not started; `pg_ctl -D {} start` recovers to {}",
        steps(&session.journal, context),
        plan.backup,
        plan.cluster,
        plan.data().display(),
        plan.handover.start_directory(plan.data()).display(),
        plan.target
    );
    for line in plan.handover.words(plan.data(), false) {
        text.push_str(&format!("\n{line}"));
    }
    text.push_str("\nonce it has, psql takes out what a standby made from it would follow as well:");
    text.extend(left.iter().map(|name| format!("\nALTER SYSTEM RESET {name};")));
    push_isolation(&mut text, session, info);
    text.extend(super::delta::saved_wal(&session.journal).map(|saved| format!("\n{saved}")));
    let mut object = object(session, info, "not_started", None);
    if let Value::Object(fields) = &mut object {
        fields.insert("first_start_settings".to_owned(), json!(left));
    }
    context.output.result(&text, &object);
}

/// The server waits at its target.
pub(super) fn waiting(session: &Session, info: &BackupInfo, socket: &Path, port: u16, context: &Context) {
    let (journal, id) = (&session.journal, &session.journal.id);
    let paused = journal.plan.target.action == Action::Pause;
    let state = if paused { "paused" } else { "shut down" };
    let mut text = format!(
        "{}\nrestored {} to {}: {state} at its target\n`pghydrant promote {id}` ends recovery, `pghydrant retarget {id} --target-…` moves it on, `pghydrant cancel {id}` {}",
        steps(journal, context),
        journal.plan.backup,
        journal.plan.data().display(),
        if journal.plan.delta.is_some() { "leaves what cannot be started" } else { "removes the copy" }
    );
    if let Some(check) = journal.plan.check {
        text.push_str(&format!("\nbefore it opens for others it is checked (--check {})", check.name()));
    }
    if paused {
        text.push_str(&format!(
            "\nto look at it, as {}: psql -h {} -p {port} postgres",
            journal.plan.owner.name,
            socket.display()
        ));
    }
    text.extend(super::delta::saved_wal(journal).map(|saved| format!("\n{saved}")));
    let object = json!({
        "session": id, "state": state, "backup": journal.plan.backup, "data": journal.plan.data(),
        "socket_directory": paused.then_some(socket), "port": paused.then_some(port),
        "stopped_at": journal.at_target, "steps": journal.steps, "log": log_path(journal.plan.data()),
        "isolation": isolation::object(journal.isolation.as_ref(), info, journal.plan.adopt),
        "saved_wal": journal.saved_wal,
    });
    context.output.result(&text, &object);
}

fn push_isolation(text: &mut String, session: &Session, info: &BackupInfo) {
    let journal = &session.journal;
    for line in isolation::text(journal.isolation.as_ref(), info, journal.plan.adopt) {
        text.push('\n');
        text.push_str(&line);
    }
}

fn object(session: &Session, info: &BackupInfo, state: &str, port: Option<u16>) -> Value {
    let journal = &session.journal;
    json!({
        "session": journal.id, "state": state, "backup": info.label, "cluster": info.cluster,
        "data": journal.plan.data(), "port": port, "target": journal.plan.target.to_string(),
        "adopted": journal.plan.adopt, "bytes": journal.plan.bytes, "files": journal.plan.files,
        "isolation": isolation::object(journal.isolation.as_ref(), info, journal.plan.adopt),
        "steps": journal.steps, "log": journal.plan.handover.log(journal.plan.data()),
        "configuration_file": journal.plan.configuration_file(), "registered": journal.plan.handover.cluster(),
        "systemd_unit": journal.plan.handover.unit, "check": journal.checked,
        "saved_wal": journal.saved_wal,
    })
}

/// The steps with their times; only their sum for who has just seen them.
fn steps(journal: &Journal, context: &Context) -> String {
    let seconds = |seconds: f64| human::duration(Duration::try_from_secs_f64(seconds).unwrap_or_default());
    let line = |name: &str, time: f64, detail: &str| {
        format!("{name:<10} {:>10}  {detail}", seconds(time)).trim_end().to_owned()
    };
    let shown = if context.output.is_followed() { &[][..] } else { &journal.steps };
    let mut lines: Vec<String> = shown.iter().map(|step| line(&step.step, step.seconds, &step.detail)).collect();
    lines.push(line("all", journal.steps.iter().map(|step| step.seconds).sum(), ""));
    lines.join("\n")
}

/// Where a disk is full: how much room there is on each file system of the restore.
fn no_space(error: &anyhow::Error, session: &Session) -> Option<String> {
    let is_full = |cause: &(dyn std::error::Error + 'static)| {
        let source = match cause.downcast_ref::<engine::Error>() {
            Some(engine::Error::Io { source, .. }) => Some(source),
            _ => cause.downcast_ref::<std::io::Error>(),
        };
        use std::io::ErrorKind::{QuotaExceeded, StorageFull};
        source.is_some_and(|source| matches!(source.kind(), StorageFull | QuotaExceeded))
    };
    if !error.chain().any(is_full) {
        return None;
    }
    let mut devices = BTreeSet::new();
    let free = session.journal.plan.places().filter_map(|place| {
        let room = rustix::fs::statvfs(&place.path).ok()?;
        let free_bytes = room.f_bavail.saturating_mul(room.f_frsize);
        let first = devices.insert(std::fs::metadata(&place.path).ok()?.dev());
        let text = || format!("{} are free on the file system of {}", human::bytes(free_bytes), place.path.display());
        first.then(text)
    });
    Some(format!("make room: {}", free.collect::<Vec<_>>().join(", ")))
}

/// The error that stopped a session, with what can be done now, where the error itself does not say.
pub(super) fn with_next_step(error: anyhow::Error, session: &Session) -> anyhow::Error {
    if session.journal.phase == Phase::Finished {
        return error;
    }
    let id = &session.journal.id;
    let exit = match Failure::exit_of(&error) {
        Exit::Failed => Exit::Waiting,
        known => known,
    };
    let next = || {
        let room = no_space(&error, session).map(|room| format!("{room}; then ")).unwrap_or_default();
        format!("{room}`pghydrant retry {id}` goes on from here, `pghydrant cancel {id}` gives it up")
    };
    let hint = Failure::hint_of(&error).unwrap_or_else(next);
    Failure::new(exit, format!("{error:#}")).hint(hint).into()
}
