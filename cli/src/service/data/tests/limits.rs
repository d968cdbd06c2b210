//! Limits hold, and are shared fairly. Low enough that the machine cannot matter.

use super::*;

const RATE: u64 = 4 << 20;
const BYTES: u64 = 10 << 20;

fn repository() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let content: Vec<u8> = (0..BYTES as u32).map(|at| (at / 7) as u8).collect();
    LocalStore::new(directory.path()).put("key", &content, Existing::Refuse).unwrap();
    directory
}

fn limited(root: &Path, limit: Option<u64>) -> DataPlane {
    DataPlane::start(Settings { bytes_a_second_max: limit, ..settings(root) }, Arc::default()).unwrap()
}

fn lease_limited(plane: &DataPlane, limit: Option<u64>) -> Access {
    let (lease, token) = plane.leases().issue_covered(Covered::Everything, limit).unwrap();
    Access { address: plane.address(), security: Security::Plain, lease, token }
}

#[test]
fn the_limit_of_a_lease_and_of_the_service_hold_within_a_tenth() {
    let directory = repository();
    for of_lease in [true, false] {
        let plane = limited(directory.path(), (!of_lease).then_some(RATE));
        let access = lease_limited(&plane, of_lease.then_some(RATE));
        let (one, other) = (connect(access.clone()), connect(access));
        let began = Instant::now();
        std::thread::scope(|scope| {
            for store in [one, other] {
                scope.spawn(move || store.get("key", BYTES).unwrap());
            }
        });
        let rate = (2 * BYTES) as f64 / began.elapsed().as_secs_f64() / RATE as f64;
        assert!((0.9..1.1).contains(&rate), "{rate} of the limit");
    }
}

#[test]
fn two_sessions_share_the_limit_of_the_service_however_many_connections_they_have() {
    let directory = repository();
    let plane = limited(directory.path(), Some(RATE));
    let (greedy, modest) = (lease_limited(&plane, None), lease_limited(&plane, None));
    let sent = |access: &Access| plane.leases().bytes_sent(&access.lease).unwrap();
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let wants = std::sync::atomic::Ordering::Relaxed;
    std::thread::scope(|scope| {
        for (access, threads) in [(&greedy, 8), (&modest, 1)] {
            let store = connect(access.clone());
            for thread in 0..threads {
                let (store, stop) = (Arc::clone(&store), Arc::clone(&stop));
                scope.spawn(move || {
                    let mut out = vec![0; 1 << 20];
                    while !stop.load(wants) {
                        store.read_at("key", thread << 20, &mut out).unwrap();
                    }
                });
            }
        }
        while sent(&greedy) + sent(&modest) < 4 * RATE {
            std::thread::sleep(Duration::from_millis(10));
        }
        stop.store(true, wants);
    });
    let share = sent(&modest) as f64 / (sent(&greedy) + sent(&modest)) as f64;
    // What the other has on its way at the end is sent too.
    assert!((0.3..0.6).contains(&share), "{share}: {} and {}", sent(&modest), sent(&greedy));
}

#[test]
fn a_session_has_its_own_limit_beside_others_that_have_none() {
    let directory = repository();
    let plane = limited(directory.path(), None);
    let (slow, fast) = (lease_limited(&plane, Some(RATE)), lease_limited(&plane, None));
    let began = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| connect(slow.clone()).get("key", BYTES).unwrap());
        connect(fast.clone()).get("key", BYTES).unwrap();
        // Before the other is done.
        assert!(plane.leases().bytes_sent(&slow.lease).unwrap() < BYTES);
    });
    let rate = BYTES as f64 / began.elapsed().as_secs_f64() / RATE as f64;
    assert!(rate < 1.1, "{rate} of the limit");
}
