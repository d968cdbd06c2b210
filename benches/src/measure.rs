//! One run: how long, how much processor time, how much memory.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde::Serialize;

use crate::processes;
use crate::world::World;

/// How often memory is looked at. A process that lives shorter may be missed.
const SAMPLE: Duration = Duration::from_millis(20);

/// What one run took.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Figure {
    pub(crate) seconds: f64,
    /// Of all processes below the harness.
    pub(crate) cpu_seconds: f64,
    /// The largest sum of resident bytes of the processes that the run started.
    pub(crate) peak_bytes: u64,
}

/// Times `run`. Servers that ran before count with the processor time they use for it, not with their memory.
pub(crate) fn measure<T>(world: &World, run: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<(Figure, T)> {
    world.check_interrupt()?;
    processes::reap_orphans();
    let before = processes::descendants();
    let (peak, over) = (AtomicU64::new(0), AtomicBool::new(false));
    let (outcome, seconds, cpu_seconds) = std::thread::scope(|scope| {
        scope.spawn(|| sample(world, &before, &peak, &over));
        let cpu_before = processes::cpu_seconds();
        let began = Instant::now();
        let outcome = run();
        let seconds = began.elapsed().as_secs_f64();
        let cpu_seconds = processes::cpu_seconds() - cpu_before;
        over.store(true, Ordering::Relaxed);
        (outcome, seconds, cpu_seconds)
    });
    world.check_interrupt()?;
    let figure = Figure { seconds, cpu_seconds, peak_bytes: peak.into_inner() };
    Ok((figure, outcome?))
}

/// Watches memory until the run is over. After Ctrl-C what runs is asked to end, since a signal to the harness alone
/// reaches nobody else.
fn sample(world: &World, before: &[i32], peak: &AtomicU64, over: &AtomicBool) {
    let mut asked = false;
    while !over.load(Ordering::Relaxed) {
        let mut started = processes::descendants();
        started.retain(|pid| !before.contains(pid));
        peak.fetch_max(processes::resident_bytes(&started), Ordering::Relaxed);
        if world.is_interrupted() && !std::mem::replace(&mut asked, true) {
            processes::signal(&started, Signal::TERM);
        }
        std::thread::sleep(SAMPLE);
    }
}
