//! A limit on how fast bytes may be read, all workers together.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::{Error, Result};

/// Whoever waits looks this often whether it should go on at all.
const PATIENCE: Duration = Duration::from_millis(100);

/// So many bytes a second and no more: each worker waits until what was let through before has had its time.
///
/// Time in which nobody asked is not saved up: a limit is for whoever shares the disk, now.
#[derive(Debug)]
pub struct Throttle {
    bytes_a_second: u64,
    /// When the next bytes may go.
    next: Mutex<Option<Instant>>,
}

impl Throttle {
    /// At least one byte a second.
    pub fn new(bytes_a_second: u64) -> Self {
        Self { bytes_a_second: bytes_a_second.max(1), next: Mutex::new(None) }
    }

    /// Waits until `bytes` may be read, unless `cancelled`.
    pub fn wait(&self, bytes: u64, cancelled: &dyn Fn() -> bool) -> Result<()> {
        let due = self.due(bytes, Instant::now());
        loop {
            if cancelled() {
                return Err(Error::Cancelled);
            }
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(PATIENCE));
        }
    }

    /// How long whoever has `bytes` to move has to wait, and surely does: for those who wait in their own way.
    pub fn reserve(&self, bytes: u64) -> Duration {
        let now = Instant::now();
        self.due(bytes, now).saturating_duration_since(now)
    }

    /// When these bytes may go; the next ones have to leave them their time.
    fn due(&self, bytes: u64, now: Instant) -> Instant {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let due = next.map_or(now, |next| next.max(now));
        let nanoseconds = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_a_second);
        *next = Some(due + Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX)));
        due
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn bytes_go_at_their_rate_and_idle_time_is_not_saved_up() {
        let throttle = Throttle::new(1 << 20);
        let start = Instant::now();
        let after = |seconds: f64| start + Duration::from_secs_f64(seconds);
        assert_eq!(throttle.due(1 << 20, start), start);
        assert_eq!(throttle.due(1 << 19, start), after(1.0));
        assert_eq!(throttle.due(1 << 20, after(0.5)), after(1.5));
        assert_eq!(throttle.due(1, after(10.0)), after(10.0));
    }

    #[test]
    fn whoever_waits_can_be_stopped() {
        let throttle = Throttle::new(1);
        throttle.wait(1 << 40, &|| false).unwrap();
        assert!(matches!(throttle.wait(1, &|| true), Err(Error::Cancelled)));
    }
}
