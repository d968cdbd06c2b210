//! How long a read waits for a service that is not there.

use std::fmt::Debug;
use std::time::Duration;

/// Says whether to go on, for as long as a session lives and wants to.
pub trait Patience: Send + Sync + Debug {
    /// Whether whoever has waited for `waited` without a byte should wait on. Asked about every second, by every reader.
    fn goes_on(&self, waited: Duration) -> bool;
}

/// Waits until the process ends.
#[derive(Clone, Copy, Debug)]
pub struct Forever;

impl Patience for Forever {
    fn goes_on(&self, _: Duration) -> bool {
        true
    }
}

/// Waits for so long at a time.
#[derive(Clone, Copy, Debug)]
pub struct Until(pub Duration);

impl Patience for Until {
    fn goes_on(&self, waited: Duration) -> bool {
        waited < self.0
    }
}
