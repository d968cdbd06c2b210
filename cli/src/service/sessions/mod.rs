//! The recovery service: restores on targets, each watched to its end.
//!
//! A session is one restore on one target. One order at a time is carried out for it: restore, retry, promote, retarget,
//! cancel. What the target says is kept and handed to whoever watches, so nobody's connection matters: not that of the
//! command line, and not that to the target, which is made again.
//!
//! Always true: a session that is not over is on disk with what was ordered, and a service that is started again goes on
//! with it; what is promised to a client has been written before.

mod drive;
mod events;
mod record;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use engine::units::{ClusterName, SessionId};
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::sync::Notify;

use super::address::Target;
use super::plane::Plane;
pub(super) use super::target::Program;
use crate::agent::Order;
use crate::exit::{Exit, Failure};
use crate::random;
use events::Events;
pub(super) use events::Follower;
use record::Records;
pub(super) use record::{Record, State};

/// Sessions that are over and still told of.
const OVER_KEPT: usize = 50;

/// What the operator chose.
#[derive(Clone, Copy, Debug)]
pub(super) struct Policy {
    /// How often something that failed is tried again by itself.
    pub(super) retries: u32,
    /// The time between.
    pub(super) retry_every: Duration,
    /// Sessions that are worked on at once.
    pub(super) sessions_max: usize,
}

/// A restore that is ordered.
#[derive(Clone, Debug)]
pub(super) struct Ordered {
    pub(super) cluster: ClusterName,
    pub(super) target: Target,
    pub(super) restore: Vec<String>,
    pub(super) data: std::path::PathBuf,
    pub(super) rate_limit: Option<u64>,
    pub(super) by: String,
}

/// One session, live.
struct Live {
    record: Mutex<Record>,
    events: Events,
    /// An order is being carried out.
    busy: AtomicBool,
    /// `cancel` was ordered while another order is carried out.
    cancelled: AtomicBool,
    /// Ends a wait before its time.
    hurry: Notify,
}

/// All of them.
pub(super) struct Sessions {
    records: Records,
    policy: Policy,
    program: Program,
    plane: Arc<dyn Plane>,
    live: Mutex<BTreeMap<SessionId, Arc<Live>>>,
}

impl Sessions {
    /// Reads what an earlier service left, and goes on with what was not over.
    pub(super) fn open(
        directory: &Path,
        policy: Policy,
        program: Program,
        plane: Arc<dyn Plane>,
    ) -> anyhow::Result<Arc<Self>> {
        let records = Records::of(directory)?;
        let mut live = BTreeMap::new();
        for record in records.read()? {
            let events = Events::open(&records.events(&record.id))?;
            live.insert(record.id.clone(), Arc::new(Live::new(record, events)));
        }
        let sessions = Arc::new(Self { records, policy, program, plane, live: Mutex::new(live) });
        for live in sessions.all() {
            let order =
                Some(live.record()).filter(|record| record.state.is_active()).and_then(|record| record.order.clone());
            if let Some(order) = order {
                live.busy.store(true, Ordering::Release);
                tokio::spawn(Arc::clone(&sessions).drive(live, order));
            }
        }
        Ok(sessions)
    }

    /// Begins a restore; how its events are followed.
    pub(super) fn restore(self: &Arc<Self>, ordered: Ordered) -> anyhow::Result<(SessionId, Follower)> {
        self.refuse_too_many()?;
        let id = format!("{}-{}", Timestamp::now().strftime("%Y%m%dT%H%M%SZ"), random::digits()?);
        let id = SessionId::try_from(id).map_err(anyhow::Error::msg)?;
        let now = Timestamp::now();
        let record = Record {
            id: id.clone(),
            cluster: ordered.cluster,
            target: ordered.target,
            restore: ordered.restore,
            data: ordered.data,
            rate_limit: ordered.rate_limit,
            ordered_by: ordered.by,
            created_at: now,
            updated_at: now,
            state: State::Connecting,
            order: Some(Order::Restore),
            before: None,
            begun: false,
            retries: 0,
            message: None,
            step: None,
            progress: None,
            result: None,
        };
        let live = Live::new(record.clone(), Events::open(&self.records.events(&id))?);
        live.events.add(json!({"event": "accepted", "session": id}), None)?;
        self.records.write(&record)?;
        let follower = live.events.follow(0)?;
        live.busy.store(true, Ordering::Release);
        let live = Arc::new(live);
        self.locked().insert(id.clone(), Arc::clone(&live));
        self.forget_the_oldest();
        tokio::spawn(Arc::clone(self).drive(live, Order::Restore));
        Ok((id, follower))
    }

    /// Carries out an order for a session; how what comes of it is followed.
    pub(super) fn order(self: &Arc<Self>, id: &SessionId, order: Order) -> anyhow::Result<Follower> {
        let live = self.find(id)?;
        let from = live.events.length();
        let state = live.record().state;
        let refuse = |message: String, hint: String| Err(Failure::new(Exit::Usage, message).hint(hint).into());
        match (&order, state) {
            (_, over) if over.is_over() => {
                return refuse(
                    format!("session {id} is {}", over.text()),
                    "`pghydrant sessions` lists what is not".into(),
                );
            }
            (Order::Restore | Order::SkipCheck, State::AtTarget) => {
                let hint = format!("`pghydrant promote {id}` ends recovery, `pghydrant retarget {id}` moves it on");
                return refuse(format!("session {id} is at its target and waits: there is nothing to retry"), hint);
            }
            (Order::Promote | Order::Retarget(_), state) if state != State::AtTarget => {
                let hint =
                    format!("`pghydrant sessions` tells more, `pghydrant retry {id}` goes on with one that waits");
                return refuse(format!("session {id} is not at its target: it is {}", state.text()), hint);
            }
            // Tried again at once; who asked follows what is going on anyway.
            (Order::Restore, State::Retrying) => {
                live.hurry.notify_one();
                return live.events.follow(from);
            }
            (Order::Cancel, state) if state.is_active() => {
                live.cancelled.store(true, Ordering::Release);
                live.hurry.notify_one();
                return live.events.follow(from);
            }
            _ => {}
        }
        self.refuse_too_many()?;
        if live.busy.swap(true, Ordering::AcqRel) {
            return refuse(format!("session {id} is being worked on"), "wait for it, or cancel it".into());
        }
        let ordered = live.change(&self.records, |record| {
            (record.order, record.before) = (Some(order.clone()), Some(state));
            (record.begun, record.retries, record.message) = (false, 0, None);
            record.state = State::Connecting;
        });
        if let Err(error) = ordered {
            live.busy.store(false, Ordering::Release);
            return Err(error);
        }
        let follower = live.events.follow(from)?;
        tokio::spawn(Arc::clone(self).drive(live, order));
        Ok(follower)
    }

    /// Every record, the oldest first.
    pub(super) fn records(&self) -> Vec<Record> {
        self.all().iter().map(|live| live.record().clone()).collect()
    }

    /// One record.
    pub(super) fn record(&self, id: &SessionId) -> anyhow::Result<Record> {
        Ok(self.find(id)?.record().clone())
    }

    /// Events of a session from byte `from` of them on.
    pub(super) fn follow(&self, id: &SessionId, from: u64) -> anyhow::Result<Follower> {
        let live = self.find(id)?;
        live.events.follow(from.min(live.events.length()))
    }

    fn find(&self, id: &SessionId) -> anyhow::Result<Arc<Live>> {
        self.locked().get(id).cloned().ok_or_else(|| {
            let message = format!("the mount server knows no session {id}");
            Failure::new(Exit::Failed, message).hint("`pghydrant sessions --all` lists them").into()
        })
    }

    fn all(&self) -> Vec<Arc<Live>> {
        self.locked().values().cloned().collect()
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, BTreeMap<SessionId, Arc<Live>>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn refuse_too_many(&self) -> anyhow::Result<()> {
        let active = self.all().iter().filter(|live| live.record().state.is_active()).count();
        if active < self.policy.sessions_max {
            return Ok(());
        }
        let message = format!("the mount server works on {active} sessions already, which is its limit");
        Err(Failure::new(Exit::Refused, message).hint("wait for one of them, or raise serve --max-sessions").into())
    }

    fn forget_the_oldest(&self) {
        let over: Vec<SessionId> =
            self.records().into_iter().filter(|record| record.state.is_over()).map(|record| record.id).collect();
        for id in over.iter().rev().skip(OVER_KEPT) {
            self.locked().remove(id);
            if let Err(error) = self.records.remove(id) {
                tracing::warn!("cannot forget session {id}: {error:#}");
            }
        }
    }
}

impl Live {
    fn new(record: Record, events: Events) -> Self {
        Self {
            record: Mutex::new(record),
            events,
            busy: AtomicBool::new(false),
            cancelled: AtomicBool::new(false),
            hurry: Notify::new(),
        }
    }

    fn record(&self) -> std::sync::MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing was begun on its target.
    fn is_untouched(&self) -> bool {
        let record = self.record();
        !record.begun && record.step.is_none() && record.retries == 0
    }

    /// Changes the record, and puts it on disk.
    fn change(&self, records: &Records, change: impl FnOnce(&mut Record)) -> anyhow::Result<()> {
        let mut record = self.record();
        change(&mut record);
        record.updated_at = Timestamp::now();
        records.write(&record)
    }

    /// Changes what is not worth a write: figures of a step that runs.
    fn note(&self, change: impl FnOnce(&mut Record)) {
        let mut record = self.record();
        change(&mut record);
        record.updated_at = Timestamp::now();
    }

    /// Tells who watches.
    fn tell(&self, event: Value) {
        if let Err(error) = self.events.add(event, None) {
            tracing::warn!("session {}: {error:#}", self.record().id);
        }
    }
}
