//! Sessions whose target says nothing, or is not there, and services that were killed at a bad moment.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::time::Instant;

use super::super::plane::Wanted;
use super::drive::{Ended, judge};
use super::*;

/// Leases nothing, and remembers what it was told.
#[derive(Default)]
struct NoPlane {
    kept: Mutex<Option<BTreeSet<SessionId>>>,
}

impl Plane for NoPlane {
    fn lease(&self, _: &SessionId, _: Wanted<'_>, _: Option<&str>) -> anyhow::Result<Value> {
        anyhow::bail!("nothing to lease")
    }

    fn address_here(&self) -> std::net::SocketAddr {
        ([127, 0, 0, 1], 7433).into()
    }

    fn end(&self, _: &SessionId) {}

    fn keep_only(&self, sessions: &BTreeSet<SessionId>) {
        *self.kept.lock().unwrap() = Some(sessions.clone());
    }
}

const ID: &str = "20261122T081500Z-3f9a1c";

fn record(state: State, order: Option<Order>) -> Record {
    serde_json::from_value(json!({
        "id": ID, "cluster": "main", "target": Target::parse("db2", None, &[], false).unwrap(), "restore": [],
        "data": "/srv/pg", "ordered_by": "dba", "created_at": "2026-11-22T08:15:00Z",
        "updated_at": "2026-11-22T08:15:00Z", "state": state.name(), "order": order, "begun": false, "retries": 0,
    }))
    .unwrap()
}

/// A service in `directory`; its targets answer as `proxy` does.
fn service(directory: &Path, proxy: &str, retries: u32) -> (Arc<Sessions>, Arc<NoPlane>) {
    let config = directory.join("ssh.conf");
    std::fs::write(&config, format!("Host *\n  ProxyCommand {proxy}\n")).unwrap();
    let policy = Policy { retries, retry_every: Duration::from_secs(1), sessions_max: 2 };
    let plane = Arc::new(NoPlane::default());
    let program = Program::own(Some(config)).unwrap();
    (Sessions::open(directory, policy, program, Arc::clone(&plane) as Arc<dyn Plane>).unwrap(), plane)
}

fn on_disk(directory: &Path, record: &Record) {
    Records::of(directory).unwrap().write(record).unwrap();
}

async fn until(sessions: &Sessions, id: &SessionId, is: impl Fn(&Record) -> bool) -> Record {
    let began = Instant::now();
    loop {
        let record = sessions.record(id).unwrap();
        if is(&record) {
            return record;
        }
        assert!(began.elapsed() < Duration::from_secs(120), "it stays {record:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn id() -> SessionId {
    ID.to_owned().try_into().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn cancel_ends_a_session_whose_target_says_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let (sessions, _) = service(directory.path(), "sleep 600", 10);
    let ordered = Ordered {
        cluster: "main".to_owned().try_into().unwrap(),
        target: Target::parse("db2", None, &[], false).unwrap(),
        restore: Vec::new(),
        data: "/srv/pg".into(),
        by: "dba".to_owned(),
        rate_limit: None,
    };
    let (id, _) = sessions.restore(ordered).unwrap();
    let mut told = sessions.order(&id, Order::Cancel).unwrap();
    // Twice is once.
    sessions.order(&id, Order::Cancel).unwrap();
    until(&sessions, &id, |record| record.state == State::Cancelled).await;
    let said = told.next().await.unwrap();
    assert!(said.contains("\"exit\""), "{said}");
    assert!(sessions.order(&id, Order::Cancel).is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_that_a_killed_service_had_heard_is_settled_by_the_next() {
    for (code, expected) in [(0, State::Finished), (1, State::Waiting)] {
        let directory = tempfile::tempdir().unwrap();
        let mut was = record(State::Running, Some(Order::Restore));
        (was.begun, was.asked, was.sent, was.since) = (true, true, 1, 40);
        on_disk(directory.path(), &was);
        let events = Events::open(&Records::of(directory.path()).unwrap().events(&was.id)).unwrap();
        events.add(json!({"event": "ended", "code": code}), Some(90)).unwrap();
        // Nobody is there to be asked again.
        let (sessions, _) = service(directory.path(), "false", 10);
        let settled = until(&sessions, &was.id, |record| !record.state.is_active()).await;
        assert_eq!((settled.state, settled.order, settled.begun), (expected, None, false));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_of_an_earlier_run_is_not_taken_for_that_of_the_last() {
    let directory = tempfile::tempdir().unwrap();
    let mut was = record(State::Running, Some(Order::Promote));
    (was.begun, was.asked, was.sent, was.since) = (true, true, 2, 90);
    on_disk(directory.path(), &was);
    let events = Events::open(&Records::of(directory.path()).unwrap().events(&was.id)).unwrap();
    events.add(json!({"event": "ended", "code": 0}), Some(90)).unwrap();
    let (sessions, _) = service(directory.path(), "false", 100);
    let tried = until(&sessions, &was.id, |record| record.state != State::Running).await;
    assert_eq!((tried.state, tried.order, tried.begun), (State::Retrying, Some(Order::Promote), true));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_that_was_promised_outlives_the_service() {
    let directory = tempfile::tempdir().unwrap();
    let mut was = record(State::Running, Some(Order::Restore));
    (was.begun, was.asked, was.sent, was.cancelled) = (true, true, 1, true);
    on_disk(directory.path(), &was);
    let (sessions, _) = service(directory.path(), "false", 100);
    let tried = until(&sessions, &was.id, |record| record.state == State::Retrying).await;
    assert_eq!((tried.order, tried.begun), (Some(Order::Cancel), false));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_that_was_sent_is_no_fresh_one_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let mut was = record(State::Connecting, Some(Order::Restore));
    (was.asked, was.sent) = (true, 1);
    on_disk(directory.path(), &was);
    let (sessions, _) = service(directory.path(), "false", 0);
    // A fresh one would be given up as failed, with what may run there.
    let given_up = until(&sessions, &was.id, |record| !record.state.is_active()).await;
    assert_eq!(given_up.state, State::Waiting);
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_and_events_of_no_session_are_taken_away() {
    let directory = tempfile::tempdir().unwrap();
    on_disk(directory.path(), &record(State::AtTarget, None));
    let mut over = record(State::Finished, None);
    over.id = "20261121T081500Z-3f9a1c".to_owned().try_into().unwrap();
    on_disk(directory.path(), &over);
    let nobodys = directory.path().join("sessions/20261120T081500Z-3f9a1c.events");
    std::fs::write(&nobodys, "{}\n").unwrap();
    let (sessions, plane) = service(directory.path(), "false", 0);
    assert_eq!(*plane.kept.lock().unwrap(), Some(BTreeSet::from([id()])));
    assert!(!nobodys.exists());
    assert_eq!(sessions.records().len(), 2);
}

#[test]
fn where_a_session_stands_after_each_end_of_each_order() {
    let lost = || Ended::Unreachable("it is silent".to_owned());
    let refused = || Ended::Refused(Failure::new(Exit::Failed, "Permission denied"));
    let verb = |exit: Exit| Ended::Verb(exit as u8);
    // Before, was the order sent, orders sent in all.
    let of = |before, asked, sent| {
        let mut record = record(State::Connecting, None);
        (record.before, record.asked, record.sent) = (before, asked, sent);
        record
    };
    let first = || of(None, true, 1);
    let again = || of(Some(State::Waiting), true, 2);
    let finished = || {
        let mut record = of(None, true, 2);
        record.result = Some(json!({"event": "result", "state": "running"}));
        record
    };
    let at_target = |asked| of(Some(State::AtTarget), asked, 2);
    for (record, order, ended, expected) in [
        (first(), Order::Restore, verb(Exit::Done), State::Finished),
        (first(), Order::Restore, verb(Exit::Refused), State::Failed),
        (first(), Order::Restore, verb(Exit::Failed), State::Waiting),
        (first(), Order::Restore, Ended::Gone, State::Waiting),
        (first(), Order::Restore, lost(), State::Waiting),
        (of(None, false, 0), Order::Restore, refused(), State::Failed),
        // What an earlier attempt has made is not forgotten because the next one is refused.
        (of(None, true, 2), Order::Restore, verb(Exit::Refused), State::Waiting),
        (again(), Order::Restore, verb(Exit::Refused), State::Waiting),
        (again(), Order::Restore, refused(), State::Waiting),
        (again(), Order::Cancel, verb(Exit::Done), State::Cancelled),
        // It was quicker.
        (finished(), Order::Cancel, verb(Exit::Done), State::Finished),
        // At its target it stays until an order was sent.
        (at_target(false), Order::Promote, lost(), State::AtTarget),
        (at_target(false), Order::Promote, refused(), State::AtTarget),
        (at_target(true), Order::Promote, verb(Exit::Refused), State::AtTarget),
        (at_target(true), Order::Promote, lost(), State::Waiting),
        (of(None, false, 0), Order::Restore, Ended::Cancelled, State::Cancelled),
    ] {
        let (state, ..) = judge(&record, &order, ended);
        assert_eq!(state, expected, "{order:?} of {record:?}");
    }
}
