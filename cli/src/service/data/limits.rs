//! How fast bytes may go, of a lease and of the service.
//!
//! A connection that has a piece to send waits its turn among those of its lease, then until the lease's limit lets the
//! piece through, then the service's. So a lease waits for one piece at a time, however many connections it has, and the
//! service's limit, first come, first served, is shared by leases and not by connections.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Time that a wait may be too long, which is made good: timers and busy machines are late, and the limit should be
/// reached all the same. Other time in which nobody asked is not saved up.
const SLACK: Duration = Duration::from_millis(50);

/// So many bytes a second.
#[derive(Debug)]
pub(super) struct Limit {
    bytes_a_second: u64,
    /// When the next bytes may go.
    next: Mutex<Option<Instant>>,
}

impl Limit {
    pub(super) fn new(bytes_a_second: u64) -> Self {
        Self { bytes_a_second: bytes_a_second.max(1), next: Mutex::new(None) }
    }

    /// Waits until `bytes` may go.
    pub(super) async fn pass(&self, bytes: u64) {
        let now = Instant::now();
        let due = self.due(bytes, now);
        if due > now {
            tokio::time::sleep_until(due.into()).await;
        }
    }

    fn due(&self, bytes: u64, now: Instant) -> Instant {
        // A panic elsewhere cannot leave a time half written.
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let due = next.map_or(now, |next| next.max(now.checked_sub(SLACK).unwrap_or(now)));
        let nanoseconds = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_a_second);
        *next = Some(due + Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX)));
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lateness_is_made_good_and_idle_time_is_not_saved_up() {
        let limit = Limit::new(1 << 20);
        let start = Instant::now();
        let after = |milliseconds| start + Duration::from_millis(milliseconds);
        assert_eq!(limit.due(1 << 20, start), start);
        assert_eq!(limit.due(1 << 19, start), after(1000));
        // Whoever waited was woken 30 ms late.
        assert_eq!(limit.due(1 << 20, after(1530)), after(1500));
        assert_eq!(limit.due(1 << 20, after(9000)), after(8950));
    }
}
