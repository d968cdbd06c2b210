//! Connections, services and leases that go away under readers.

use std::sync::atomic::{AtomicBool, Ordering};

use super::relay::Relay;
use super::*;

/// A backup of a few dozen megabytes, of which about half compresses.
fn generated(root: &Path) -> Backup {
    let files = (0..24).map(|number| backup::file(format!("base/5/{number}"), 1 << 20)).collect::<Vec<_>>();
    let directories = ["base", "base/5"].map(backup::directory);
    let all = directories.into_iter().chain(files).collect();
    let mut state = 1_u64;
    backup::write(root, engine::codec::Compression::Lz4, all, |file, out| {
        for page in 0..file.bytes / 8192 {
            for _ in 0..512 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                out.extend_from_slice(&state.to_le_bytes());
            }
            out.extend_from_slice(&[page as u8; 4096]);
        }
    })
    .unwrap()
}

#[test]
fn a_relay_that_is_cut_at_random_moments_costs_no_byte() {
    let directory = tempfile::tempdir().unwrap();
    let local = generated(&directory.path().join("repository"));
    let expected = contents(&local).unwrap();
    for encrypted in [true, false] {
        let root = directory.path().join("repository");
        let (plane, security) = if encrypted { start_tls(&root) } else { (start(&root), Security::Plain) };
        let relay = Relay::start(plane.address(), Duration::ZERO);
        let store = connect(Access { address: relay.address, ..lease(&plane, security, &local) });
        let far = remote(&local, &store).unwrap();
        let done = AtomicBool::new(false);
        let cut = std::thread::scope(|scope| {
            let cutter = scope.spawn(|| {
                let (mut cut, mut state) = (0, 12_345_u64);
                while !done.load(Ordering::SeqCst) {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    // By bytes, not by time: so that a slow machine comes to its end too.
                    let next = relay.passed() + (state >> 33) % (4 << 20);
                    while relay.passed() < next && !done.load(Ordering::SeqCst) {
                        std::thread::sleep(Duration::from_micros(200));
                    }
                    cut += relay.cut();
                }
                cut
            });
            let readers: Vec<_> = (0..4).map(|_| scope.spawn(|| contents(&far).unwrap() == expected)).collect();
            let same = readers.into_iter().map(|reader| reader.join().unwrap()).collect::<Vec<_>>();
            done.store(true, Ordering::SeqCst);
            assert_eq!(same, [true; 4]);
            cutter.join().unwrap()
        });
        assert!(cut > 3 && store.counters().lost > 0, "{cut} connections were cut");
    }
}

#[test]
fn a_service_that_is_started_again_is_gone_on_with() {
    let backup = backups(&sample()).remove(1);
    let first = start(&sample());
    let access = lease(&first, Security::Plain, &backup);
    let store = connect(access.clone());
    let far = remote(&backup, &store).unwrap();
    let address = first.address();
    drop(first);
    let reader = std::thread::spawn(move || contents(&far).unwrap());
    std::thread::sleep(Duration::from_millis(200));
    assert!(!reader.is_finished());
    let leases = Arc::new(Leases::default());
    let settings = Settings { listen: address, ..settings(&sample()) };
    // It does not know its leases yet: that is waited for as well.
    let second = DataPlane::start(settings, Arc::clone(&leases)).unwrap();
    wait_for(&second, |counts| counts.not_let_in > 0);
    leases.issue_again(access.lease, Leases::hash(&access.token), Coverage::of_backup(&backup).unwrap(), None);
    assert!(reader.join().unwrap() == contents(&backup).unwrap());
}

/// Eight rounds of 64 threads with a round trip of 40 ms: one after the other they would take 20 seconds.
#[test]
fn round_trips_of_many_readers_pass_at_the_same_time() {
    const DELAY: Duration = Duration::from_millis(20);
    let directory = tempfile::tempdir().unwrap();
    LocalStore::new(directory.path()).put("key", &[7; 4096], Existing::Refuse).unwrap();
    let plane = start(directory.path());
    let relay = Relay::start(plane.address(), DELAY);
    let store = connect(Access { address: relay.address, ..lease_all(&plane, Security::Plain) });
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..64 {
            scope.spawn(|| (0..8).for_each(|_| store.read_at("key", 0, &mut [0; 4096]).unwrap()));
        }
    });
    assert!(began.elapsed() < 2 * DELAY * 64 * 8 / 4, "{:?}", began.elapsed());
    assert!(began.elapsed() > 2 * DELAY * 8, "the relay does not delay");
    assert!(plane.counts().let_in <= 8);
}

#[test]
fn connections_that_the_service_has_closed_are_opened_again_at_once() {
    let backup = backups(&sample()).remove(0);
    let plane = start(&sample());
    let relay = Relay::start(plane.address(), Duration::ZERO);
    let store = connect(Access { address: relay.address, ..lease(&plane, Security::Plain, &backup) });
    let far = remote(&backup, &store).unwrap();
    std::thread::scope(|scope| {
        (0..8).for_each(|_| drop(scope.spawn(|| contents(&far).unwrap())));
    });
    relay.cut();
    contents(&far).unwrap();
    assert!(store.counters().lost <= 2, "{:?}", store.counters());
}

#[test]
fn a_client_goes_on_with_another_access() {
    let backup = backups(&sample()).remove(1);
    let first = start(&sample());
    let store = connect(lease(&first, Security::Plain, &backup));
    let far = remote(&backup, &store).unwrap();
    drop(first);
    let (second, security) = start_tls(&sample());
    let reader = std::thread::spawn(move || contents(&far).unwrap());
    store.renew(lease(&second, security, &backup));
    assert!(reader.join().unwrap() == contents(&backup).unwrap());
}

#[test]
fn whoever_gives_up_gets_an_error_and_no_byte() {
    #[derive(Debug, Default)]
    struct Session(AtomicBool);
    impl Patience for Session {
        fn goes_on(&self, _: Duration) -> bool {
            !self.0.load(Ordering::SeqCst)
        }
    }
    let backup = backups(&sample()).remove(0);
    let plane = start(&sample());
    let session = Arc::new(Session::default());
    let access = lease(&plane, Security::Plain, &backup);
    let store = Arc::new(RemoteStore::connect(access, Arc::clone(&session) as Arc<dyn Patience>).unwrap());
    let far = remote(&backup, &store).unwrap();
    drop(plane);
    let reader = std::thread::spawn(move || contents(&far).unwrap_err());
    std::thread::sleep(Duration::from_millis(300));
    assert!(!reader.is_finished(), "it waits for as long as the session does");
    session.0.store(true, Ordering::SeqCst);
    let error = reader.join().unwrap();
    assert!(matches!(error, Error::Io { .. }) && error.to_string().contains("given up"), "{error}");
    let brief = RemoteStore::connect(store_access(), Arc::new(Until(Duration::ZERO)));
    assert!(brief.is_err(), "nobody listens there");
}

/// Where nobody listens.
fn store_access() -> Access {
    let plane = start(&sample());
    lease_all(&plane, Security::Plain)
}

#[test]
fn a_lease_that_ends_cuts_its_clients_off() {
    let backup = backups(&sample()).remove(0);
    let plane = start(&sample());
    let access = lease(&plane, Security::Plain, &backup);
    let store = connect(access.clone());
    let far = remote(&backup, &store).unwrap();
    contents(&far).unwrap();
    plane.leases().end(&access.lease);
    wait_for(&plane, |counts| counts.open == 0);
    let error = contents(&far).unwrap_err();
    assert!(matches!(error, Error::Io { .. }) && error.to_string().contains("has ended"), "{error}");
    let refused = RemoteStore::connect(access, Arc::new(Forever)).unwrap_err();
    assert!(refused.to_string().ends_with("the lease has ended"), "{refused}");
}
