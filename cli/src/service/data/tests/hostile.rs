//! Whoever is not a client, or not of this lease.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;

use engine::remote::frame::{Failure, FailureCode, Header, Hello, Kind, VERSION, Welcome};
use engine::remote::message::{ByteRange, Request};
use engine::remote::{Fingerprint, Token};

use super::*;

fn greeted(access: &Access) -> TcpStream {
    let mut socket = TcpStream::connect(access.address).unwrap();
    let hello = Hello { version: VERSION, lease: access.lease, token: access.token.clone() };
    socket.write_all(&hello.to_bytes()).unwrap();
    let mut welcome = [0; Welcome::BYTES];
    socket.read_exact(&mut welcome).unwrap();
    assert_eq!(Welcome::from_bytes(&welcome).unwrap().refusal, None);
    socket
}

fn is_cut_off(mut socket: TcpStream) -> bool {
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    loop {
        match socket.read(&mut [0; 64]) {
            Ok(bytes) => return bytes == 0,
            // A timeout of its own makes a socket's reads interruptible.
            Err(cause) if cause.kind() == ErrorKind::Interrupted => {}
            Err(cause) => return cause.kind() == ErrorKind::ConnectionReset,
        }
    }
}

#[test]
fn a_wrong_token_and_an_unknown_lease_are_refused() {
    let (plane, security) = start_tls(&sample());
    let access = lease_all(&plane, security);
    let other = lease_all(&plane, security);
    for wrong in [
        Access { token: Token::new([7; 32]), ..access.clone() },
        Access { token: other.token, ..access.clone() },
        Access { lease: engine::remote::LeaseId([0; 16]), ..access.clone() },
    ] {
        let refused = RemoteStore::connect(wrong, Arc::new(Forever)).unwrap_err();
        assert!(matches!(refused, Error::Refused(_)), "{refused}");
        assert!(refused.to_string().contains("no such lease, or the token is not its"), "{refused}");
    }
    wait_for(&plane, |counts| counts.not_let_in == 3);
    connect(access);
}

#[test]
fn a_server_with_another_certificate_is_refused() {
    let (plane, _) = start_tls(&sample());
    let access = lease_all(&plane, Security::Tls(Fingerprint::of(b"another")));
    let refused = RemoteStore::connect(access, Arc::new(Forever)).unwrap_err();
    assert!(matches!(refused, Error::Refused(_)) && refused.to_string().contains("another certificate"), "{refused}");
}

/// Each waits for the other's greeting, or takes it for garbage; none hangs.
#[test]
fn plain_and_tls_do_not_mix() {
    let (plane, _) = start_tls(&sample());
    let refused = RemoteStore::connect(lease_all(&plane, Security::Plain), Arc::new(Forever)).unwrap_err();
    assert!(matches!(refused, Error::Io { .. }), "{refused}");
    wait_for(&plane, |counts| counts.garbage == 1 && counts.open == 0);
    let plain = start(&sample());
    let access = lease_all(&plain, Security::Tls(Fingerprint::of(b"any")));
    assert!(RemoteStore::connect(access, Arc::new(Forever)).is_err());
    wait_for(&plain, |counts| counts.garbage == 1 && counts.open == 0);
}

#[test]
fn what_a_lease_does_not_cover_is_refused_and_tells_nothing() {
    let plane = start(&sample());
    let all = backups(&sample());
    let (full, later) = (&all[0], &all[1]);
    let store = connect(lease(&plane, Security::Plain, full));
    let packs: Vec<_> = later.manifest.packs().iter().map(|used| used.pack).collect();
    let strange = packs.iter().find(|pack| full.manifest.packs().iter().all(|used| used.pack != **pack)).unwrap();
    let pack = format!("clusters/main/packs/{strange}.pack");
    let keys = [
        pack.clone(),
        "clusters/main/packs/000000ff.pack".to_owned(),
        format!("clusters/main/manifests/{}.manifest", later.info.label),
        "clusters/other/cluster.json".to_owned(),
        "clusters/main/locks/backup".to_owned(),
        "clusters/main/wal/00000002/../../packs/00000002.pack".to_owned(),
        "clusters/main/wal/00000002/.hidden".to_owned(),
        "/etc/passwd".to_owned(),
        "../engine.rs".to_owned(),
    ];
    for key in &keys {
        let refused = |error: Error| assert!(matches!(error, Error::Refused(_)), "{key}: {error}");
        refused(store.read_at(key, 4096, &mut [0; 16]).unwrap_err());
        refused(store.size(key).unwrap_err());
        refused(store.get(key, 1 << 20).unwrap_err());
        refused(store.list(key).unwrap_err());
    }
    // Not all of a pack of its own either: its header is no block of the backup.
    let own = format!("clusters/main/packs/{}.pack", full.manifest.packs()[0].pack);
    assert!(matches!(store.read_at(&own, 0, &mut [0; 16]), Err(Error::Refused(_))));
    assert!(matches!(store.get(&own, 1 << 30), Err(Error::Refused(_))));
    assert_eq!(plane.counts().refused_requests, 4 * keys.len() as u64 + 2);
    // Of the later backup the full one's blocks are a part, and its lease has them.
    let later_store = connect(lease(&plane, Security::Plain, later));
    later_store.size(&pack).unwrap().unwrap();
    contents(&remote(later, &later_store).unwrap()).unwrap();
}

#[test]
fn bytes_between_the_runs_of_a_backup_are_not_sent() {
    let plane = start(&sample());
    let all = backups(&sample());
    let mut blanked = 0;
    for backup in &all {
        let coverage = Coverage::of_backup(backup).unwrap();
        let store = connect(lease(&plane, Security::Plain, backup));
        for used in backup.manifest.packs() {
            let key = format!("clusters/main/packs/{}.pack", used.pack);
            let stored = std::fs::read(sample().join(&key)).unwrap();
            let engine::remote::Reach::Only(runs) = coverage.reach(&key) else { panic!("{key}") };
            let wanted = 4096..stored.len() as u64;
            assert!(runs.covers(&wanted), "{key}");
            let mut sent = vec![0; stored.len() - 4096];
            store.read_at(&key, 4096, &mut sent).unwrap();
            let mut expected = stored[4096..].to_vec();
            runs.blank(4096, &mut expected);
            assert!(sent == expected, "{key}");
            blanked += usize::from(expected != stored[4096..]);
        }
    }
    assert!(blanked > 0, "every byte of the sample is covered by every backup, so this shows nothing");
}

#[test]
fn garbage_ends_the_connection_and_nothing_else() {
    let plane = start(&sample());
    let access = lease_all(&plane, Security::Plain);
    let mut nonsense = TcpStream::connect(access.address).unwrap();
    nonsense.write_all(&[b'x'; 64]).unwrap();
    assert!(is_cut_off(nonsense));
    let oversized = Header { kind: Kind::Data, is_last: true, body_bytes: 1, id: 1 }.to_bytes();
    let mut longer = Request::Size { key: "k".to_owned() }.to_frame(1);
    longer[3] = 0x40;
    let mut empty = Request::Read { key: "k".to_owned(), ranges: vec![ByteRange { offset: 0, bytes: 1 }] }.to_frame(1);
    empty[16] = 0;
    for frame in [oversized.to_vec(), longer, empty] {
        let mut socket = greeted(&access);
        socket.write_all(&frame).unwrap();
        assert!(is_cut_off(socket));
    }
    wait_for(&plane, |counts| counts.garbage == 4 && counts.open == 0);
    // Half of a frame, and gone.
    let mut socket = greeted(&access);
    socket.write_all(&Request::Size { key: "key".to_owned() }.to_frame(1)[..10]).unwrap();
    drop(socket);
    wait_for(&plane, |counts| counts.open == 0);
    connect(access).size("pghydrant.json").unwrap().unwrap();
}

/// What a machine leaves behind that lost its power in the middle of a request.
#[test]
fn half_of_a_request_is_not_waited_for_for_long() {
    let plane = start(&sample());
    let mut socket = greeted(&lease_all(&plane, Security::Plain));
    socket.write_all(&Request::Size { key: "key".to_owned() }.to_frame(1)[..10]).unwrap();
    assert!(is_cut_off(socket));
    wait_for(&plane, |counts| counts.slow == 1 && counts.open == 0);
}

#[test]
fn a_client_that_does_not_read_holds_up_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let local = LocalStore::new(directory.path());
    local.put("key", &vec![7; 32 << 20], Existing::Refuse).unwrap();
    let plane = start(directory.path());
    let access = lease_all(&plane, Security::Plain);
    // As many as one lease may have, each with all that it may ask.
    let ranges = vec![ByteRange { offset: 0, bytes: 4 << 20 }];
    let request = Request::Read { key: "key".to_owned(), ranges };
    let lazy: Vec<_> = (0..super::super::LEASE_CONNECTIONS_MAX)
        .map(|_| {
            let mut socket = greeted(&access);
            (0..32).for_each(|id| socket.write_all(&request.to_frame(id)).unwrap());
            socket
        })
        .collect();
    let busy = RemoteStore::connect(access, Arc::new(Forever)).unwrap_err();
    assert!(busy.to_string().contains("as many connections as it takes"), "{busy}");
    let other = connect(lease_all(&plane, Security::Plain));
    assert_eq!(other.get("key", 32 << 20).unwrap().len(), 32 << 20);
    // Back-pressure: far less was read for them than they have asked for.
    assert!(plane.counts().bytes < (lazy.len() as u64 * 128) << 19, "{:?}", plane.counts());
    // Nor does it hold what it has for ever.
    wait_for(&plane, |counts| counts.slow == lazy.len() as u64);
    assert_eq!(other.get("pghydrant", 0).unwrap_err().raw_os_error(), Some(libc::ENOENT));
}

#[test]
fn a_thousand_connections_that_say_nothing_keep_nobody_out() {
    let plane = start(&sample());
    crate::limits::raise_open_files();
    let idle: Vec<_> = (0..1000).filter_map(|_| TcpStream::connect(plane.address()).ok()).collect();
    assert!(idle.len() > 900, "{} connections", idle.len());
    let backup = backups(&sample()).remove(0);
    let store = connect(lease(&plane, Security::Plain, &backup));
    contents(&remote(&backup, &store).unwrap()).unwrap();
    // Each is cut off when its time for a greeting is over.
    wait_for(&plane, |counts| counts.idle == idle.len() as u64);
}

#[test]
fn failures_carry_what_the_kernel_said() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::create_dir(directory.path().join("d")).unwrap();
    let plane = start(directory.path());
    let access = lease_all(&plane, Security::Plain);
    let mut socket = greeted(&access);
    socket.write_all(&Request::Get { key: "none".to_owned(), limit: 1 }.to_frame(9)).unwrap();
    let mut header = [0; Header::BYTES];
    socket.read_exact(&mut header).unwrap();
    let header = Header::of_answer(&header).unwrap();
    let mut body = vec![0; header.body_bytes];
    socket.read_exact(&mut body).unwrap();
    let failure = Failure::from_body(&body).unwrap();
    assert_eq!((header.kind, header.id, failure.code), (Kind::Failed, 9, FailureCode::Absent));
    assert_eq!(i32::from(failure.errno), libc::ENOENT);
    assert!(matches!(connect(access).get("d", 10), Err(Error::Corrupt { .. })));
}
