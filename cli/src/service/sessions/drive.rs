//! Carries out one order on one target: until it has ended there, or is given up here.
//!
//! ```text
//! reach the target        as often as the policy allows; found again, it goes on at once
//! begin the verb          unless it was begun before: then it runs on there, or was killed
//! follow it               what it says is kept, from where it was last heard
//! judge how it ended      done, refused, to be tried again, to wait for somebody
//! ```

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};

use super::super::plane::Wanted;
use super::super::target::{Agent, Trouble, last_words};
use super::{Live, Sessions, State};
use crate::agent::{Order, Request};
use crate::exit::{Exit, Failure};

/// The agent gives a sign of life every two seconds.
const SILENCE_MAX: Duration = Duration::from_secs(20);
/// Between two attempts to reach a target that was there before.
const REACH_PAUSE: Duration = Duration::from_secs(3);
/// Longer than any line of ours.
const LINE_BYTES_MAX: u64 = 1 << 20;

/// How an attempt ended.
enum Ended {
    /// The verb said so, with its exit code.
    Verb(u8),
    /// It was killed, or its machine went down.
    Gone,
    /// Nothing is known of it.
    Unreachable(String),
    /// Another attempt would end the same way.
    Refused(Failure),
    /// Somebody wants it to end.
    Cancelled,
}

impl Sessions {
    /// See the module. The session is `busy` until this returns.
    pub(super) async fn drive(self: Arc<Self>, live: Arc<Live>, order: Order) {
        let ended = self.carry_out(&live, &order).await;
        self.settle(&live, &order, ended).await;
        live.cancelled.store(false, Ordering::Release);
        live.busy.store(false, Ordering::Release);
    }

    /// Tries until there is something to settle.
    async fn carry_out(&self, live: &Arc<Live>, order: &Order) -> Ended {
        let mut lost_since: Option<Instant> = None;
        loop {
            let ended = self.attempt(live, order).await;
            let again = match &ended {
                // The verb is killed but not its work: it goes on at once, for the first time.
                Ended::Gone => "the restore was ended there".to_owned(),
                Ended::Verb(code) if *code == Exit::Waiting as u8 => {
                    live.record().message.clone().unwrap_or_else(|| "it failed".to_owned())
                }
                Ended::Unreachable(why) => why.clone(),
                Ended::Verb(_) | Ended::Refused(_) | Ended::Cancelled => return ended,
            };
            let is_lost = matches!(ended, Ended::Unreachable(_));
            // Never there: who ordered it is told at once, as of any other mistake.
            if let (true, true, Order::Restore) = (is_lost, live.is_untouched(), order) {
                return Ended::Refused(Failure::new(Exit::Failed, again));
            }
            let since = *lost_since.get_or_insert_with(Instant::now);
            if !is_lost {
                lost_since = None;
            }
            let policy = self.policy;
            let retries = live.record().retries;
            // A target that cannot be reached is looked for all the time that the retries would have taken.
            let patience = policy.retry_every.saturating_mul(policy.retries);
            let give_up = if is_lost { since.elapsed() >= patience } else { retries >= policy.retries };
            if give_up {
                return ended;
            }
            let pause = match ended {
                Ended::Unreachable(_) => REACH_PAUSE.min(policy.retry_every),
                Ended::Gone if retries == 0 => Duration::ZERO,
                _ => policy.retry_every,
            };
            let changed = live.change(&self.records, |record| {
                let told = record.state == State::Retrying && record.message.as_ref() == Some(&again);
                record.state = State::Retrying;
                record.message = Some(again.clone());
                if !is_lost {
                    record.retries += 1;
                    record.begun = false;
                }
                if !told {
                    let message = format!("{again}; it is tried again");
                    live.tell(json!({"event": "warning", "message": message}));
                }
            });
            if let Err(error) = changed {
                tracing::warn!("{error:#}");
            }
            let hurried = tokio::time::timeout(pause, live.hurry.notified());
            let _ = hurried.await;
            if live.cancelled.load(Ordering::Acquire) {
                return Ended::Cancelled;
            }
        }
    }

    async fn attempt(&self, live: &Arc<Live>, order: &Order) -> Ended {
        let (id, target, cluster) = {
            let record = live.record();
            (record.id.clone(), record.target.clone(), record.cluster.clone())
        };
        let agent = match Agent::reach(&target, &self.program, id.as_str()).await {
            Ok(agent) => agent,
            Err(trouble) => return trouble.into(),
        };
        if !live.record().begun {
            // What an earlier attempt has begun, and lost, may run on there: not beside this one.
            if !live.is_untouched()
                && let Err(trouble) = agent.stop().await
            {
                return trouble.into();
            }
            let wanted = Wanted { cluster: &cluster, rate_limit: live.record().rate_limit };
            let repository = match self.plane.lease(&id, wanted, agent.seen_as.as_deref()) {
                Ok(repository) => repository,
                Err(error) => return Ended::Refused(Failure::new(Failure::exit_of(&error), format!("{error:#}"))),
            };
            let restore = live.record().restore.clone();
            let request = Request { session: id, order: order.clone(), restore, repository };
            if let Err(trouble) = agent.begin(&request).await {
                return trouble.into();
            }
        }
        let changed = live.change(&self.records, |record| {
            record.begun = true;
            record.state = State::Running;
        });
        if let Err(error) = changed {
            tracing::warn!("{error:#}");
        }
        let heard = match live.events.heard() {
            Ok(heard) => heard,
            Err(error) => return Ended::Unreachable(format!("{error:#}")),
        };
        tokio::select! {
            ended = follow(live, &agent, heard) => ended,
            () = until_cancelled(live) => match agent.stop().await {
                Ok(()) => Ended::Cancelled,
                Err(trouble) => trouble.into(),
            },
        }
    }

    /// What is left to do, and to be told, once nothing more is tried.
    async fn settle(&self, live: &Arc<Live>, order: &Order, ended: Ended) {
        if matches!(ended, Ended::Cancelled) && *order != Order::Cancel {
            let changed = live.change(&self.records, |record| {
                record.order = Some(Order::Cancel);
                (record.begun, record.retries) = (false, 0);
                record.state = State::Connecting;
            });
            if let Err(error) = changed {
                tracing::warn!("{error:#}");
            }
            live.cancelled.store(false, Ordering::Release);
            let ended = self.carry_out(live, &Order::Cancel).await;
            return Box::pin(self.settle(live, &Order::Cancel, ended)).await;
        }
        let (state, code, message) = judge(live, order, ended);
        if let Some(failure) = &message {
            let (message, hint) = (&failure.message, &failure.hint);
            live.tell(json!({"event": "error", "message": message, "hint": hint, "exit": failure.exit as u8}));
        }
        if state.is_over() {
            self.take_away(live).await;
        }
        let changed = live.change(&self.records, |record| {
            record.state = state;
            record.order = None;
            record.begun = false;
            record.progress = None;
            match &message {
                Some(failure) => record.message = Some(failure.message.clone()),
                None if state != State::Waiting && state != State::Failed => record.message = None,
                None => {}
            }
        });
        if let Err(error) = changed {
            tracing::warn!("{error:#}");
        }
        live.tell(json!({"event": "exit", "code": code}));
    }

    /// Nothing of ours stays on the target, nor a way into the repository.
    async fn take_away(&self, live: &Arc<Live>) {
        let (id, target) = {
            let record = live.record();
            (record.id.clone(), record.target.clone())
        };
        self.plane.end(&id);
        let ended = match Agent::reach(&target, &self.program, id.as_str()).await {
            Ok(agent) => agent.end().await,
            Err(trouble) => Err(trouble),
        };
        if let Err(Trouble::Unreachable(why) | Trouble::Refused(Failure { message: why, .. })) = ended {
            let message = format!("what pghydrant had put on {} may still be there: {why}", target.host);
            live.tell(json!({"event": "warning", "message": message}));
        }
    }
}

/// Where the session stands now, what its watchers' command ends with, and what they are told besides.
fn judge(live: &Live, order: &Order, ended: Ended) -> (State, u8, Option<Failure>) {
    let id = live.record().id.clone();
    let retry = format!("`pghydrant retry {id}` goes on from there, `pghydrant cancel {id}` gives it up");
    let waits = |message: String| {
        let failure = Failure::new(Exit::Waiting, message).hint(retry.clone());
        (State::Waiting, Exit::Waiting as u8, Some(failure))
    };
    let is = |code: u8, exit: Exit| code == exit as u8;
    match ended {
        Ended::Verb(code) if is(code, Exit::Done) || is(code, Exit::DamagedPages) => {
            let stays =
                |result: &Value| matches!(result.get("state").and_then(Value::as_str), Some("paused" | "shut down"));
            let state = match order {
                Order::Cancel => State::Cancelled,
                _ if live.record().result.as_ref().is_some_and(stays) => State::AtTarget,
                _ => State::Finished,
            };
            (state, code, None)
        }
        // Before anything was touched.
        Ended::Verb(code) if *order == Order::Restore && (is(code, Exit::Refused) || is(code, Exit::Usage)) => {
            let had_begun = live.record().retries > 0;
            (if had_begun { State::Waiting } else { State::Failed }, code, None)
        }
        // An order that was refused has changed nothing.
        Ended::Verb(code) if is(code, Exit::Refused) || is(code, Exit::Usage) => {
            (live.record().before.unwrap_or(State::Waiting), code, None)
        }
        Ended::Verb(code) => (State::Waiting, code, None),
        Ended::Gone => waits("the restore was ended on its target, each time that it was tried".to_owned()),
        Ended::Unreachable(why) => waits(why),
        Ended::Refused(failure) if *order == Order::Restore && live.is_untouched() => {
            (State::Failed, failure.exit as u8, Some(failure))
        }
        Ended::Refused(failure) => {
            (State::Waiting, Exit::Waiting as u8, Some(Failure { hint: failure.hint.or(Some(retry)), ..failure }))
        }
        Ended::Cancelled => waits("it was interrupted".to_owned()),
    }
}

impl From<Trouble> for Ended {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Unreachable(why) => Self::Unreachable(why),
            Trouble::Refused(failure) => Self::Refused(failure),
        }
    }
}

async fn until_cancelled(live: &Live) {
    loop {
        let hurried = live.hurry.notified();
        if live.cancelled.load(Ordering::Acquire) {
            return;
        }
        hurried.await;
    }
}

/// Hears what the target says until it says how it ended.
async fn follow(live: &Live, agent: &Agent, mut heard: u64) -> Ended {
    let lost =
        |why: &str| Ended::Unreachable(format!("the connection to {} is lost: {why}", live.record().target.host));
    let mut child = match agent.follow(heard) {
        Ok(child) => child,
        Err(error) => return Ended::Unreachable(format!("{error:#}")),
    };
    let Some(stdout) = child.stdout.take() else { return lost("it has no output") };
    let mut lines = BufReader::new(stdout);
    let mut line = Vec::new();
    loop {
        line.clear();
        let mut limited = (&mut lines).take(LINE_BYTES_MAX);
        match tokio::time::timeout(SILENCE_MAX, limited.read_until(b'\n', &mut line)).await {
            Err(_) => return lost("it is silent"),
            Ok(Err(cause)) => return lost(&cause.to_string()),
            Ok(Ok(_)) if line.last() != Some(&b'\n') => break,
            Ok(Ok(_)) => {}
        }
        let Ok(event) = serde_json::from_slice::<Value>(&line) else {
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
        if let Some(code) = hear(live, event, heard) {
            return Ended::Verb(code);
        }
    }
    lost(&last_words(child).await)
}

/// Keeps one event. Its exit code, if it is the last one: that is for us, who may try again, and not for who watches.
fn hear(live: &Live, event: Value, heard: u64) -> Option<u8> {
    let text = |name: &str| event.get(name).and_then(Value::as_str).map(str::to_owned);
    let kind = text("event").unwrap_or_default();
    match kind.as_str() {
        "exit" => {
            let code = event.get("code").and_then(Value::as_u64).and_then(|code| u8::try_from(code).ok());
            if let Err(error) = live.events.add(json!({"event": "ended", "code": code}), Some(heard)) {
                tracing::warn!("{error:#}");
            }
            return Some(code.unwrap_or(Exit::Failed as u8));
        }
        "step" => live.note(|record| {
            record.step = text("step");
            record.progress = None;
        }),
        "progress" => live.note(|record| record.progress = Some(event.clone())),
        "error" => live.note(|record| record.message = text("message")),
        "result" => live.note(|record| {
            let mut result = event.clone();
            if let Value::Object(fields) = &mut result {
                fields.remove("text");
            }
            record.result = Some(result);
        }),
        _ => {}
    }
    if let Err(error) = live.events.add(event, Some(heard)) {
        tracing::warn!("{error:#}");
    }
    None
}
