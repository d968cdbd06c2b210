//! How much is worth asking for ahead: twice what arrives in a round trip, from what was seen of both. No I/O.
//!
//! With one round trip's worth on its way the next answer follows the last without a pause. Asking for twice as much as
//! arrives now finds out whether more would arrive: what is on its way doubles each round trip until the network, the
//! service's disk, or whoever reads here, gives no more.

use std::time::{Duration, Instant};

/// Below this nothing is asked for ahead: the threads that read hide so little by being several, and a copy is saved.
const ROUND_TRIP_MIN: Duration = Duration::from_millis(2);
/// What is asked for ahead before any rate is known.
const WINDOW_BYTES_MIN: u64 = 4 << 20;
/// A rate is taken over so long at least.
const SAMPLE_MIN: Duration = Duration::from_millis(20);

/// Round trip and rate of one service.
#[derive(Debug)]
pub(super) struct Pace {
    /// The shortest greeting.
    round_trip: Option<Duration>,
    bytes_a_second: f64,
    since: Instant,
    bytes: u64,
}

impl Pace {
    pub(super) fn new(now: Instant) -> Self {
        Self { round_trip: None, bytes_a_second: 0.0, since: now, bytes: 0 }
    }

    /// A greeting was answered after so long.
    pub(super) fn greeted(&mut self, round_trip: Duration) {
        self.round_trip = Some(self.round_trip.map_or(round_trip, |known| known.min(round_trip)));
    }

    /// So much arrived.
    pub(super) fn arrived(&mut self, bytes: u64, now: Instant) {
        let sample = SAMPLE_MIN.max(self.round_trip.unwrap_or_default());
        self.bytes += bytes;
        let elapsed = now.saturating_duration_since(self.since);
        if elapsed < sample {
            return;
        }
        let seen = self.bytes as f64 / elapsed.as_secs_f64();
        // A pause says little of the network: what was once reached is forgotten slowly.
        self.bytes_a_second = seen.max(self.bytes_a_second * 0.875);
        (self.since, self.bytes) = (now, 0);
    }

    /// Bytes that are worth having on their way or here, before anybody reads them.
    pub(super) fn window_bytes(&self) -> u64 {
        let Some(round_trip) = self.round_trip.filter(|time| *time >= ROUND_TRIP_MIN) else { return 0 };
        let product = 2.0 * self.bytes_a_second * round_trip.as_secs_f64();
        (product as u64).max(WINDOW_BYTES_MIN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_is_twice_the_product_of_rate_and_round_trip() {
        let start = Instant::now();
        let mut pace = Pace::new(start);
        assert_eq!(pace.window_bytes(), 0);
        pace.greeted(Duration::from_micros(300));
        pace.arrived(1 << 30, start + Duration::from_secs(1));
        assert_eq!(pace.window_bytes(), 0);
        let mut pace = Pace::new(start);
        pace.greeted(Duration::from_millis(50));
        pace.greeted(Duration::from_millis(20));
        pace.greeted(Duration::from_millis(70));
        assert_eq!(pace.window_bytes(), WINDOW_BYTES_MIN);
        pace.arrived(1 << 29, start + Duration::from_millis(1));
        assert_eq!(pace.window_bytes(), WINDOW_BYTES_MIN);
        pace.arrived(1 << 29, start + Duration::from_secs(1));
        assert_eq!(pace.window_bytes(), (1 << 31) / 50);
        // Somebody took his time.
        pace.arrived(1, start + Duration::from_secs(9));
        assert_eq!(pace.window_bytes(), (1 << 31) / 50 / 8 * 7);
    }
}
