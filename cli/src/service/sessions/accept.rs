//! Which order a session takes, by where it stands.

use super::{Record, State};
use crate::agent::Order;
use crate::exit::{Exit, Failure};

/// What becomes of an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Accepted {
    /// It is carried out.
    Begin,
    /// It is what is being done.
    Watch,
    /// It is what waits to be done again: now.
    Hurry,
    /// What is being done ends, and then this is done.
    Cancel,
}

/// See the module. What is refused has changed nothing.
pub(super) fn accept(record: &Record, order: &Order) -> Result<Accepted, Failure> {
    let (id, state) = (&record.id, record.state);
    let refuse = |message: String, hint: String| Err(Failure::new(Exit::Usage, message).hint(hint));
    let more = format!("`pghydrant sessions` tells more, `pghydrant retry {id}` goes on with one that waits");
    let cancels = record.cancelled || record.order == Some(Order::Cancel);
    match (order, state) {
        (_, State::Finished | State::Failed | State::Cancelled) => {
            refuse(format!("session {id} is {}", state.text()), "`pghydrant sessions` lists what is not".into())
        }
        (Order::Promote | Order::Retarget(_) | Order::Cancel, State::AtTarget) => Ok(Accepted::Begin),
        (Order::Restore | Order::SkipCheck, State::AtTarget) => {
            let hint = format!("`pghydrant promote {id}` ends recovery, `pghydrant retarget {id}` moves it on");
            refuse(format!("session {id} is at its target and waits: there is nothing to retry"), hint)
        }
        (Order::Promote | Order::Retarget(_), _) => {
            refuse(format!("session {id} is not at its target: it is {}", state.text()), more)
        }
        (Order::Restore | Order::SkipCheck | Order::Cancel, State::Waiting) => Ok(Accepted::Begin),
        // Ordered twice, it is still one: the second does not interrupt the first.
        (Order::Cancel, State::Retrying) if cancels => Ok(Accepted::Hurry),
        (Order::Cancel, State::Connecting | State::Running) if cancels => Ok(Accepted::Watch),
        (Order::Cancel, State::Connecting | State::Running | State::Retrying) => Ok(Accepted::Cancel),
        (Order::Restore, State::Retrying) if !cancels => Ok(Accepted::Hurry),
        (Order::Restore | Order::SkipCheck, State::Connecting | State::Running | State::Retrying) => {
            refuse(format!("session {id} is being worked on"), "wait for it, or cancel it".into())
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn record(state: State, order: Option<Order>, cancelled: bool) -> Record {
        serde_json::from_value(serde_json::json!({
            "id": "20261122T081500Z-3f9a1c", "cluster": "main",
            "target": super::super::Target::parse("db2", None, &[], false).unwrap(), "restore": [], "data": "/srv/pg",
            "ordered_by": "dba", "created_at": "2026-11-22T08:15:00Z", "updated_at": "2026-11-22T08:15:00Z",
            "state": state.name(), "order": order, "begun": false, "retries": 0, "cancelled": cancelled,
        }))
        .unwrap()
    }

    #[test]
    fn every_order_in_every_state_has_one_answer() {
        use Accepted::{Begin, Cancel, Hurry, Watch};
        let orders = [
            Order::Restore,
            Order::SkipCheck,
            Order::Cancel,
            Order::Promote,
            Order::Retarget(vec!["--target-immediate".to_owned()]),
        ];
        let no = None;
        for (state, expected) in [
            (State::Connecting, [no, no, Some(Cancel), no, no]),
            (State::Running, [no, no, Some(Cancel), no, no]),
            (State::Retrying, [Some(Hurry), no, Some(Cancel), no, no]),
            (State::AtTarget, [no, no, Some(Begin), Some(Begin), Some(Begin)]),
            (State::Waiting, [Some(Begin), Some(Begin), Some(Begin), no, no]),
            (State::Finished, [no; 5]),
            (State::Failed, [no; 5]),
            (State::Cancelled, [no; 5]),
        ] {
            let active = state.is_active().then_some(Order::Restore);
            for (order, expected) in orders.iter().zip(expected) {
                let accepted = accept(&record(state, active.clone(), false), order).ok();
                assert_eq!(accepted, expected, "{order:?} of a session that is {}", state.text());
            }
        }
        // While it is cancelled, or is going to be.
        for (order, cancelled) in [(Order::Cancel, false), (Order::Restore, true)] {
            let accepted = |state, then: &Order| accept(&record(state, Some(order.clone()), cancelled), then).ok();
            assert_eq!(accepted(State::Running, &Order::Cancel), Some(Watch));
            assert_eq!(accepted(State::Retrying, &Order::Cancel), Some(Hurry));
            assert_eq!(accepted(State::Retrying, &Order::Restore), None);
        }
    }
}
