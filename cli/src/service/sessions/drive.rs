//! Carries out one order on one target: until it has ended there, or is given up here.
//!
//! ```text
//! reach the target        as often as the policy allows; found again, it goes on at once
//! begin the verb          unless it was begun before: then it runs on there, or was killed
//! follow it               what it says is kept, from where it was last heard
//! judge how it ended      done, refused, to be tried again, to wait for somebody
//! ```

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::super::plane::Wanted;
use super::super::target::{Agent, Trouble};
use super::super::tunnel::Tunnel;
use super::hearing::follow;
use super::{Live, Record, Sessions, State};
use crate::agent::{Order, RUNNING, Request};
use crate::exit::{Exit, Failure};

/// Between two attempts to reach a target that was there before.
const REACH_PAUSE: Duration = Duration::from_secs(3);
/// How long what we had put on a target may take to go; nothing was ordered there yet; or something was.
const TAKE_AWAY_MAX: [Duration; 2] = [Duration::from_secs(10), Duration::from_secs(120)];

/// How an attempt ended.
pub(super) enum Ended {
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
    /// See the module. The session is active until this returns.
    pub(super) async fn drive(self: Arc<Self>, live: Arc<Live>) {
        loop {
            let Some(order) = live.record().order.clone() else { return };
            let ended = self.carry_out(&live, &order).await;
            if self.settle(&live, &order, ended).await {
                return;
            }
        }
    }

    /// Tries until there is something to settle.
    async fn carry_out(&self, live: &Arc<Live>, order: &Order) -> Ended {
        let mut lost_since: Option<Instant> = None;
        loop {
            live.was_heard.store(false, Ordering::Release);
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
            if let (true, true, Order::Restore) = (is_lost, live.record().is_untouched(), order) {
                return Ended::Refused(Failure::new(Exit::Failed, again));
            }
            // It was there in between: this is another loss.
            if !is_lost || live.was_heard.load(Ordering::Acquire) {
                lost_since = None;
            }
            let since = *lost_since.get_or_insert_with(Instant::now);
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
            self.note_retry(live, &again, is_lost);
            let hurried = tokio::time::timeout(pause, live.hurry.notified());
            let _ = hurried.await;
        }
    }

    /// What is tried again, and why: told once.
    fn note_retry(&self, live: &Live, why: &str, is_lost: bool) {
        let changed = live.change(&self.records, |record| {
            let told = record.state == State::Retrying && record.message.as_deref() == Some(why);
            record.state = State::Retrying;
            record.message = Some(why.to_owned());
            if !is_lost {
                record.retries += 1;
                record.begun = false;
            }
            if !told {
                let message = format!("{why}; it is tried again");
                live.tell(json!({"event": "warning", "message": message}));
            }
        });
        if let Err(error) = changed {
            tracing::warn!("{error:#}");
        }
    }

    /// At every moment of it `cancel` is heard: a target that says nothing holds nobody up.
    async fn attempt(&self, live: &Arc<Live>, order: &Order) -> Ended {
        tokio::select! {
            biased;
            () = until_cancelled(live) => Ended::Cancelled,
            ended = self.work(live, order) => ended,
        }
    }

    async fn work(&self, live: &Arc<Live>, order: &Order) -> Ended {
        let before = live.record().clone();
        let id = &live.id;
        // Heard by a service that was killed before it could say what follows from it.
        if let Some(code) = live.events.ended_behind(before.since).filter(|_| before.begun) {
            return Ended::Verb(code);
        }
        let agent = match Agent::reach(&before.target, &self.program, id.as_str()).await {
            Ok(agent) => agent,
            Err(trouble) => return trouble.into(),
        };
        let since = if before.begun {
            before.since
        } else {
            match self.begin(live, order, &before, &agent).await {
                Ok(since) => since,
                Err(ended) => return ended,
            }
        };
        let changed = live.change(&self.records, |record| {
            (record.begun, record.since) = (true, since);
            record.state = State::Running;
        });
        if let Err(error) = changed {
            tracing::warn!("{error:#}");
        }
        follow(live, &self.records, &agent, since).await
    }

    /// Begins the verb, with a lease to read by; where its events begin.
    async fn begin(&self, live: &Live, order: &Order, before: &Record, agent: &Agent) -> Result<u64, Ended> {
        // What an earlier attempt has begun, and lost, may run on there: not beside this one.
        if !before.is_untouched() {
            agent.stop().await?;
        }
        let refused = |error: anyhow::Error, exit| Ended::Refused(Failure::new(exit, format!("{error:#}")));
        let wanted = Wanted { cluster: &before.cluster, rate_limit: before.rate_limit };
        let leased = self.plane.lease(&live.id, wanted, agent.seen_as.as_deref());
        let mut repository = leased.map_err(|error| {
            let exit = Failure::exit_of(&error);
            refused(error, exit)
        })?;
        self.lead(live, agent, &mut repository).await?;
        // On disk before it is sent: from now on the target may be at work.
        let sent = live.change(&self.records, |record| {
            record.sent += 1;
            record.asked = true;
        });
        sent.map_err(|error| refused(error, Exit::Failed))?;
        let (session, restore) = (live.id.clone(), before.restore.clone());
        let request = Request { session, number: before.sent + 1, order: order.clone(), restore, repository };
        let since = agent.begin(&request).await?;
        // Its events were taken away in between, and begin anew.
        if since < live.events.heard() {
            let noted = live.events.add(json!({"event": "begun"}), Some(since));
            noted.map_err(|error| Ended::Unreachable(format!("{error:#}")))?;
        }
        Ok(since)
    }

    /// Leads the target through a tunnel where it cannot reach the data plane by itself.
    async fn lead(&self, live: &Live, agent: &Agent, repository: &mut Value) -> Result<(), Trouble> {
        let mut address = live.tunnel().as_ref().and_then(Tunnel::address);
        if address.is_none() {
            // Not waited for, if it is lost: what reads now learns of another port.
            drop(live.tunnel().take());
            if !agent.reaches(repository).await? {
                address = Some(self.open_tunnel(live, repository).await?);
            }
        }
        let changed = live.change(&self.records, |record| record.tunnel = address.map(|address| address.port()));
        changed.map_err(|error| Trouble::Refused(Failure::new(Exit::Failed, format!("{error:#}"))))?;
        if let (Some(address), Some(fields)) = (address, repository.as_object_mut()) {
            fields.insert("address".to_owned(), json!(address));
        }
        Ok(())
    }

    async fn open_tunnel(&self, live: &Live, repository: &Value) -> Result<SocketAddr, Trouble> {
        let target = live.record().target.clone();
        let here = self.plane.address_here();
        let wanted = repository.get("address").and_then(Value::as_str).unwrap_or_default();
        // Whoever had that port there after us would be taken for the mount server, and given the token.
        if repository.get("certificate").is_none_or(Value::is_null) {
            let message = format!("{} does not reach the mount server at {wanted}", target.host);
            let hint = "a tunnel through SSH needs serve --data-plane tls; or name an address that it reaches with --data-listen";
            return Err(Trouble::Refused(Failure::new(Exit::Failed, message).hint(hint)));
        }
        let tunnel = Tunnel::open(self.program.ssh(&target), here).await?;
        let lost = || Trouble::Unreachable(format!("the tunnel to {} is lost", target.host));
        let address = tunnel.address().ok_or_else(lost)?;
        *live.tunnel() = Some(tunnel);
        let message = format!("{} does not reach {wanted}: blocks go through a tunnel of SSH", target.host);
        live.tell(json!({"event": "note", "message": message}));
        Ok(address)
    }

    /// What is left to do, and to be told, once nothing more is tried. False if the session has another order now.
    async fn settle(&self, live: &Arc<Live>, order: &Order, ended: Ended) -> bool {
        let ended = match ended {
            Ended::Cancelled if live.record().sent > 0 => return self.turn_to_cancel(live),
            ended => ended,
        };
        let is_lost = matches!(ended, Ended::Unreachable(_));
        let (state, code, message) = judge(&live.record(), order, ended);
        if state.is_over() {
            self.take_away(live).await;
        }
        // With its last word under one lock: who is told the end can give the next order, and hears nothing of this one.
        let mut record = live.record();
        if record.cancelled && !state.is_over() {
            drop(record);
            return self.turn_to_cancel(live);
        }
        if record.cancelled && state != State::Cancelled {
            live.tell(
                json!({"event": "warning", "message": format!("it was {} before it could be cancelled", state.text())}),
            );
        }
        if let Some(failure) = &message {
            let (message, hint) = (&failure.message, &failure.hint);
            live.tell(json!({"event": "error", "message": message, "hint": hint, "exit": failure.exit as u8}));
        }
        record.state = state;
        record.order = None;
        // What was lost may run on, and is followed by `retry`.
        record.begun &= is_lost;
        (record.progress, record.cancelled) = (None, false);
        match &message {
            Some(failure) => record.message = Some(failure.message.clone()),
            None if state != State::Waiting && state != State::Failed => record.message = None,
            None => {}
        }
        record.updated_at = jiff::Timestamp::now();
        if let Err(error) = self.records.write(&record) {
            tracing::warn!("{error:#}");
        }
        live.tell(json!({"event": "exit", "code": code}));
        true
    }

    /// The order was interrupted by another.
    fn turn_to_cancel(&self, live: &Arc<Live>) -> bool {
        let changed = live.change(&self.records, |record| {
            record.order = Some(Order::Cancel);
            (record.begun, record.asked, record.cancelled, record.retries) = (false, false, false, 0);
            record.state = State::Connecting;
        });
        if let Err(error) = changed {
            tracing::warn!("{error:#}");
        }
        false
    }

    /// Nothing of ours stays on the target, nor a way into the repository.
    async fn take_away(&self, live: &Arc<Live>) {
        let (target, sent) = {
            let record = live.record();
            (record.target.clone(), record.sent)
        };
        self.plane.end(&live.id);
        let gone = async { Agent::reach(&target, &self.program, live.id.as_str()).await?.end().await };
        let ended = tokio::time::timeout(TAKE_AWAY_MAX[usize::from(sent > 0)], gone).await;
        let ended = ended.unwrap_or_else(|_| Err(Trouble::Unreachable("it does not answer".to_owned())));
        if let Err(Trouble::Unreachable(why) | Trouble::Refused(Failure { message: why, .. })) = ended {
            let message = format!("what pghydrant had put on {} may still be there: {why}", target.host);
            live.tell(json!({"event": "warning", "message": message}));
        }
        drop(live.tunnel().take());
    }
}

/// Where the session stands now, what its watchers' command ends with, and what they are told besides.
pub(super) fn judge(record: &Record, order: &Order, ended: Ended) -> (State, u8, Option<Failure>) {
    let id = &record.id;
    let retry = format!("`pghydrant retry {id}` goes on from there, `pghydrant cancel {id}` gives it up");
    // Of what was never sent, the session stands where it stood.
    let stands = record.before.filter(|_| !record.asked).unwrap_or(State::Waiting);
    let waits = |message: String| {
        let failure = Failure::new(Exit::Waiting, message);
        let failure = if stands == State::Waiting { failure.hint(retry.clone()) } else { failure };
        (stands, Exit::Waiting as u8, Some(failure))
    };
    let is = |code: u8, exit: Exit| code == exit as u8;
    match ended {
        Ended::Verb(code) if is(code, Exit::Done) || is(code, Exit::DamagedPages) => {
            let stays =
                |result: &Value| matches!(result.get("state").and_then(Value::as_str), Some("paused" | "shut down"));
            let there = record.result.as_ref().and_then(|result| result.get("state")?.as_str());
            if *order == Order::Cancel && there == Some(RUNNING) {
                let message = format!("session {id} was finished before it could be cancelled");
                let hint = "stop that server and remove its directory to be rid of it";
                return (State::Finished, Exit::Usage as u8, Some(Failure::new(Exit::Usage, message).hint(hint)));
            }
            let state = match order {
                Order::Cancel => State::Cancelled,
                _ if record.result.as_ref().is_some_and(stays) => State::AtTarget,
                _ => State::Finished,
            };
            (state, code, None)
        }
        // Before anything was touched: of the very first that was sent.
        Ended::Verb(code) if *order == Order::Restore && (is(code, Exit::Refused) || is(code, Exit::Usage)) => {
            let is_first = record.sent <= 1 && record.before.is_none() && record.retries == 0;
            (if is_first { State::Failed } else { State::Waiting }, code, None)
        }
        // An order that was refused has changed nothing.
        Ended::Verb(code) if is(code, Exit::Refused) || is(code, Exit::Usage) => {
            (record.before.unwrap_or(State::Waiting), code, None)
        }
        Ended::Verb(code) => (State::Waiting, code, None),
        Ended::Gone => waits("the restore was ended on its target, each time that it was tried".to_owned()),
        Ended::Unreachable(why) => waits(why),
        Ended::Refused(failure) if *order == Order::Restore && record.is_untouched() => {
            (State::Failed, failure.exit as u8, Some(failure))
        }
        Ended::Refused(failure) => {
            (stands, Exit::Waiting as u8, Some(Failure { hint: failure.hint.or(Some(retry)), ..failure }))
        }
        // Nothing was ever sent there.
        Ended::Cancelled => (State::Cancelled, Exit::Done as u8, None),
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
        // A permit that was left before is taken; the flag has been set before it was.
        let hurried = live.hurry.notified();
        if live.record().cancelled {
            return;
        }
        hurried.await;
    }
}
