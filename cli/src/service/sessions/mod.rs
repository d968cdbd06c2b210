//! The recovery service: restores on targets, each watched to its end.
//!
//! A session is one restore on one target. One order at a time is carried out for it: restore, retry, promote, retarget,
//! cancel. What the target says is kept and handed to whoever watches, so nobody's connection matters: not that of the
//! command line, and not that to the target, which is made again.
//!
//! Always true: a session that is not over is on disk with what was ordered, and a service that is started again goes on
//! with it; what is promised to a client has been written before.

mod accept;
mod drive;
mod events;
mod hearing;
mod record;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use engine::units::{ClusterName, SessionId};
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::sync::Notify;

use super::address::Target;
use super::plane::Plane;
pub(super) use super::target::Program;
use super::tunnel::Tunnel;
use crate::agent::Order;
use crate::exit::{Exit, Failure};
use crate::random;
use accept::{Accepted, accept};
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
    id: SessionId,
    record: Mutex<Record>,
    events: Events,
    /// The target said something since the last attempt began.
    was_heard: AtomicBool,
    /// Ends a wait before its time.
    hurry: Notify,
    /// By which the target reaches the data plane, if it cannot by itself.
    tunnel: Mutex<Option<Tunnel>>,
}

/// All of them.
pub(super) struct Sessions {
    records: Records,
    policy: Policy,
    program: Program,
    plane: Arc<dyn Plane>,
    live: Mutex<BTreeMap<SessionId, Arc<Live>>>,
    /// Held by who makes a session active: one at a time, so that the limit holds.
    ordering: Mutex<()>,
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
        records.tidy()?;
        let mut live = BTreeMap::new();
        for record in records.read()? {
            let events = Events::open(&records.events(&record.id))?;
            live.insert(record.id.clone(), Arc::new(Live::new(record, events)));
        }
        let sessions =
            Arc::new(Self { records, policy, program, plane, live: Mutex::new(live), ordering: Mutex::new(()) });
        let open = |live: &Arc<Live>| Some(live.id.clone()).filter(|_| !live.record().state.is_over());
        sessions.plane.keep_only(&sessions.all().iter().filter_map(open).collect());
        for live in sessions.all() {
            let (target, port) = {
                let record = live.record();
                (record.target.clone(), record.tunnel.filter(|_| !record.state.is_over()))
            };
            if let Some(port) = port {
                let tunnel = Tunnel::again(sessions.program.ssh(&target), sessions.plane.address_here(), port);
                *live.tunnel() = Some(tunnel);
            }
            if live.record().state.is_active() {
                tokio::spawn(Arc::clone(&sessions).drive(live));
            }
        }
        Ok(sessions)
    }

    /// Begins a restore; how its events are followed.
    pub(super) fn restore(self: &Arc<Self>, ordered: Ordered) -> anyhow::Result<(SessionId, Follower)> {
        let _one = self.ordering.lock().unwrap_or_else(PoisonError::into_inner);
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
            since: 0,
            sent: 0,
            asked: false,
            cancelled: false,
            tunnel: None,
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
        let live = Arc::new(live);
        self.locked().insert(id.clone(), Arc::clone(&live));
        self.forget_the_oldest();
        tokio::spawn(Arc::clone(self).drive(live));
        Ok((id, follower))
    }

    /// Carries out an order for a session; how what comes of it is followed.
    pub(super) fn order(self: &Arc<Self>, id: &SessionId, order: Order) -> anyhow::Result<Follower> {
        let live = self.find(id)?;
        let _one = self.ordering.lock().unwrap_or_else(PoisonError::into_inner);
        {
            // Under its lock: what is told from here on is told to who ordered this, its end included.
            let mut record = live.record();
            let follower = live.events.follow(live.events.length())?;
            match accept(&record, &order)? {
                Accepted::Begin => {}
                Accepted::Watch => return Ok(follower),
                // Tried again at once; who asked follows what is going on anyway.
                Accepted::Hurry => {
                    live.hurry.notify_one();
                    return Ok(follower);
                }
                Accepted::Cancel => {
                    record.cancelled = true;
                    if let Err(error) = self.records.write(&record) {
                        record.cancelled = false;
                        return Err(error);
                    }
                    live.hurry.notify_one();
                    return Ok(follower);
                }
            }
        }
        // Nobody but who holds `ordering` makes a session active.
        self.refuse_too_many()?;
        let before = live.record().clone();
        let ordered = live.change(&self.records, |record| {
            (record.order, record.before) = (Some(order.clone()), Some(record.state));
            // A restore that was lost may run on there: it is followed, and not begun beside itself.
            record.begun &= order == Order::Restore;
            (record.asked, record.cancelled) = (record.begun, false);
            (record.retries, record.message) = (0, None);
            record.state = State::Connecting;
        });
        if let Err(error) = ordered {
            *live.record() = before;
            return Err(error);
        }
        let follower = live.events.follow(live.events.length())?;
        tokio::spawn(Arc::clone(self).drive(live));
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
            id: record.id.clone(),
            record: Mutex::new(record),
            events,
            was_heard: AtomicBool::new(false),
            hurry: Notify::new(),
            tunnel: Mutex::default(),
        }
    }

    fn record(&self) -> std::sync::MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tunnel(&self) -> std::sync::MutexGuard<'_, Option<Tunnel>> {
        self.tunnel.lock().unwrap_or_else(PoisonError::into_inner)
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

    /// Tells who watches. Takes no lock of the record: it may be held.
    fn tell(&self, event: Value) {
        if let Err(error) = self.events.add(event, None) {
            tracing::warn!("session {}: {error:#}", self.id);
        }
    }
}
