//! What the data plane has done, and whom it has cut off and why.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters, each growing only; but for the number of open connections.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    counters: [AtomicU64; Event::COUNT],
}

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub(super) enum Event {
    Opened,
    Closed,
    Let,
    Request,
    Bytes,
    RefusedRequest,
    FailedRequest,
    TooMany,
    NotLetIn,
    Garbage,
    Slow,
    Idle,
}

impl Event {
    const COUNT: usize = Self::Idle as usize + 1;
}

/// The counters at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Connections now.
    pub(crate) open: u64,
    /// Connections that were let in.
    pub(crate) let_in: u64,
    /// Requests.
    pub(crate) requests: u64,
    /// Bytes of data.
    pub(crate) bytes: u64,
    /// Requests for what the lease does not cover, or after its end.
    pub(crate) refused_requests: u64,
    /// Requests that failed for another reason: no such key, damage, a disk that says no.
    pub(crate) failed_requests: u64,
    /// Connections cut off because there were too many.
    pub(crate) too_many: u64,
    /// Connections of a wrong or ended lease, or with a wrong token.
    pub(crate) not_let_in: u64,
    /// Connections that sent something else than the protocol, or no TLS.
    pub(crate) garbage: u64,
    /// Connections that read or wrote too slowly.
    pub(crate) slow: u64,
    /// Connections that said nothing for too long.
    pub(crate) idle: u64,
}

impl Metrics {
    pub(super) fn count(&self, event: Event) {
        self.add(event, 1);
    }

    pub(super) fn add(&self, event: Event, more: u64) {
        self.counters[event as usize].fetch_add(more, Ordering::Relaxed);
    }

    pub(super) fn open(&self) -> usize {
        let closed = self.of(Event::Closed);
        usize::try_from(self.of(Event::Opened).saturating_sub(closed)).unwrap_or(usize::MAX)
    }

    /// All of them.
    pub(crate) fn counts(&self) -> Counts {
        Counts {
            open: self.open() as u64,
            let_in: self.of(Event::Let),
            requests: self.of(Event::Request),
            bytes: self.of(Event::Bytes),
            refused_requests: self.of(Event::RefusedRequest),
            failed_requests: self.of(Event::FailedRequest),
            too_many: self.of(Event::TooMany),
            not_let_in: self.of(Event::NotLetIn),
            garbage: self.of(Event::Garbage),
            slow: self.of(Event::Slow),
            idle: self.of(Event::Idle),
        }
    }

    fn of(&self, event: Event) -> u64 {
        self.counters[event as usize].load(Ordering::Relaxed)
    }
}
