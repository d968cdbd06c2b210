//! What a target says: each line is kept as an event, from where it was last heard, and the record follows it.

use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};

use super::super::target::{Agent, last_words};
use super::drive::Ended;
use super::events::LINE_BYTES_MAX;
use super::{Live, Record, Records};
use crate::exit::Exit;

/// The agent gives a sign of life every two seconds.
const SILENCE_MAX: Duration = Duration::from_secs(20);
/// What is kept of a target's figures and results in each record, which every listing copies.
const KEPT_BYTES_MAX: usize = 32 << 10;
/// And of its messages.
const MESSAGE_CHARS_MAX: usize = 2000;

/// Hears what the target says until it says how the run ended whose events begin behind `since`.
pub(super) async fn follow(live: &Live, records: &Records, agent: &Agent, since: u64) -> Ended {
    let mut heard = live.events.heard();
    let host = live.record().target.host.clone();
    let lost = |why: &str| Ended::Unreachable(format!("the connection to {host} is lost: {why}"));
    let mut child = match agent.follow(heard) {
        Ok(child) => child,
        Err(error) => return Ended::Unreachable(format!("{error:#}")),
    };
    let Some(stdout) = child.stdout.take() else { return lost("it has no output") };
    let mut lines = BufReader::new(stdout);
    let mut line = Vec::new();
    // A line longer than any of ours is passed over, in parts.
    let mut is_rest = false;
    loop {
        line.clear();
        let mut limited = (&mut lines).take(LINE_BYTES_MAX);
        match tokio::time::timeout(SILENCE_MAX, limited.read_until(b'\n', &mut line)).await {
            Err(_) => return lost("it is silent"),
            Ok(Err(cause)) => return lost(&cause.to_string()),
            Ok(Ok(_)) => {}
        }
        if !line.is_empty() {
            live.was_heard.store(true, Ordering::Release);
        }
        let is_whole = line.last() == Some(&b'\n');
        if !is_whole && (line.len() as u64) < LINE_BYTES_MAX {
            break;
        }
        let event = if is_whole && !is_rest { serde_json::from_slice::<Value>(&line).ok() } else { None };
        is_rest = !is_whole;
        let Some(event) = event else {
            // The last word of a process that was killed; what follows is a run of its own.
            heard += line.len() as u64;
            continue;
        };
        match event.get("event").and_then(Value::as_str) {
            Some("alive") => continue,
            Some("gone") => return Ended::Gone,
            _ => {}
        }
        heard += line.len() as u64;
        // An end that stands before is that of an earlier run.
        match hear(live, records, event, heard) {
            Some(code) if heard > since => return Ended::Verb(code),
            _ => {}
        }
    }
    lost(&last_words(child).await)
}

/// Keeps one event. Its exit code, if it is the last one: that is for us, who may try again, and not for who watches.
fn hear(live: &Live, records: &Records, event: Value, heard: u64) -> Option<u8> {
    // What a service that is started again would not hear once more.
    let keep = |change: &dyn Fn(&mut Record)| {
        if let Err(error) = live.change(records, change) {
            tracing::warn!("session {}: {error:#}", live.id);
        }
    };
    let text = |name: &str| {
        let text = event.get(name).and_then(Value::as_str)?;
        Some(text.chars().take(MESSAGE_CHARS_MAX).collect::<String>())
    };
    let kind = text("event").unwrap_or_default();
    match kind.as_str() {
        "exit" => {
            let code = event.get("code").and_then(Value::as_u64).and_then(|code| u8::try_from(code).ok());
            let code = code.unwrap_or(Exit::Failed as u8);
            if let Err(error) = live.events.add(json!({"event": "ended", "code": code}), Some(heard)) {
                tracing::warn!("{error:#}");
            }
            return Some(code);
        }
        // Ours alone: what a target says of it is not ours.
        "ended" | "accepted" | "begun" => return None,
        "step" if live.record().step == text("step") => live.note(|record| record.progress = None),
        "step" => keep(&|record| {
            record.step = text("step");
            record.progress = None;
        }),
        "progress" => live.note(|record| record.progress = small(event.clone())),
        "error" => live.note(|record| record.message = text("message")),
        "result" => keep(&|record| {
            let mut result = event.clone();
            if let Value::Object(fields) = &mut result {
                fields.remove("text");
            }
            record.result =
                small(result.clone()).or_else(|| Some(json!({"state": result.get("state")})).and_then(small));
        }),
        _ => {}
    }
    if let Err(error) = live.events.add(event, Some(heard)) {
        tracing::warn!("{error:#}");
    }
    None
}

/// What is small enough to be kept with each record.
fn small(value: Value) -> Option<Value> {
    Some(value).filter(|value| value.to_string().len() <= KEPT_BYTES_MAX)
}
