//! The data plane and its client, over real sockets.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::blocks::Scratch;
use engine::remote::{Access, Coverage, Forever, Patience, RemoteStore, Security, Until};
use engine::repository::{Backup, Repository};
use engine::store::{Existing, LocalStore, Store};
use engine::{Error, Result};

use super::super::certificate::Certificate;
use super::leases::Covered;
use super::{Counts, DataPlane, Leases, Settings};

#[allow(dead_code, unreachable_pub)]
#[path = "../../../../../benches/backup.rs"]
mod backup;
mod distance;
mod hostile;
mod limits;
mod lost;
#[path = "../../../../../engine/src/store/conformance/reading.rs"]
mod reading;
mod relay;

/// A repository in a file of the source: one of everything, a full backup and an incremental one.
fn sample() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/samples/v1")
}

fn settings(root: &Path) -> Settings {
    Settings {
        listen: (std::net::Ipv4Addr::LOCALHOST, 0).into(),
        tls: None,
        store: LocalStore::new(root),
        bytes_a_second_max: None,
        with_ring: true,
    }
}

fn start(root: &Path) -> DataPlane {
    DataPlane::start(settings(root), Arc::default()).unwrap()
}

/// Under TLS.
fn start_tls(root: &Path) -> (DataPlane, Security) {
    let certificate = Certificate::make().unwrap();
    let security = Security::Tls(certificate.fingerprint());
    let settings = Settings { tls: Some(certificate.server_config().unwrap()), ..settings(root) };
    (DataPlane::start(settings, Arc::default()).unwrap(), security)
}

/// As on a machine without io_uring.
fn start_plain(root: &Path) -> DataPlane {
    DataPlane::start(Settings { with_ring: false, ..settings(root) }, Arc::default()).unwrap()
}

/// A lease of everything.
fn lease_all(plane: &DataPlane, security: Security) -> Access {
    let (lease, token) = plane.leases().issue_covered(Covered::Everything, None).unwrap();
    Access { address: plane.address(), security, lease, token }
}

/// A lease of a backup.
fn lease(plane: &DataPlane, security: Security, backup: &Backup) -> Access {
    let (lease, token) = plane.leases().issue(Coverage::of_backup(backup).unwrap(), None).unwrap();
    Access { address: plane.address(), security, lease, token }
}

fn backups(root: &Path) -> Vec<Backup> {
    let repository = Repository::open(root).unwrap();
    let name = repository.clusters().unwrap().remove(0);
    let cluster = repository.cluster(&name).unwrap();
    cluster.labels().unwrap().iter().map(|label| cluster.backup(label).unwrap()).collect()
}

/// The same backup, read through the service.
fn remote(backup: &Backup, store: &Arc<RemoteStore>) -> Result<Backup> {
    let repository = Repository::with_store(Path::new("service"), Arc::clone(store) as Arc<dyn Store>)?;
    repository.cluster(backup.cluster.name())?.backup(&backup.info.label)
}

fn connect(access: Access) -> Arc<RemoteStore> {
    Arc::new(RemoteStore::connect(access, Arc::new(Forever)).unwrap())
}

/// All files of a backup, verified.
fn contents(backup: &Backup) -> Result<Vec<Vec<u8>>> {
    let (blocks, mut scratch) = (backup.blocks(), Scratch::default());
    let files = backup.manifest.files().collect::<Result<Vec<_>>>()?;
    let read = |file: &engine::format::file::FileRecord| {
        let mut bytes = vec![0; file.bytes as usize];
        let read = blocks.read_range(file, 0, &mut bytes, &mut scratch)?;
        assert_eq!(read, bytes.len());
        Ok(bytes)
    };
    files.iter().map(read).collect()
}

/// Waits until the counters say so; a minute is more than any machine takes.
fn wait_for(plane: &DataPlane, wanted: impl Fn(&Counts) -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !wanted(&plane.counts()) {
        assert!(Instant::now() < end, "{:?}", plane.counts());
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_remote_store_conforms_as_far_as_it_reads() {
    let directory = tempfile::tempdir().unwrap();
    let planes = std::cell::RefCell::new(Vec::new());
    reading::run(&|name| {
        let root = directory.path().join(name);
        let (plane, security) = match planes.borrow().len() % 3 {
            0 => start_tls(&root),
            1 => (start(&root), Security::Plain),
            _ => (start_plain(&root), Security::Plain),
        };
        let store = RemoteStore::connect(lease_all(&plane, security), Arc::new(Forever)).unwrap();
        planes.borrow_mut().push(plane);
        (Box::new(LocalStore::new(root)), Box::new(store))
    });
}

#[test]
fn what_writes_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let plane = start(directory.path());
    let store = connect(lease_all(&plane, Security::Plain));
    let refused = |error: Error| assert!(matches!(error, Error::Refused(_)), "{error}");
    refused(store.put("key", b"x", Existing::Refuse).unwrap_err());
    refused(store.remove("key").unwrap_err());
    refused(store.settle("key").unwrap_err());
    refused(store.sweep_uploads("d").unwrap_err());
    refused(store.open_lock("lock").unwrap_err());
    assert_eq!(store.local_path("key"), None);
}

#[test]
fn every_file_of_a_backup_is_read_through_the_service_as_it_is() {
    let (plane, security) = start_tls(&sample());
    for backup in backups(&sample()) {
        let store = connect(lease(&plane, security, &backup));
        let remote = remote(&backup, &store).unwrap();
        assert!(contents(&remote).unwrap() == contents(&backup).unwrap());
        remote.manifest.verify_all().unwrap();
        assert_eq!(remote.cluster.labels().unwrap(), backup.cluster.labels().unwrap());
        assert_eq!(remote.cluster.repository().clusters().unwrap(), [backup.cluster.name().clone()]);
        // Blocks are shared with files of this machine only, and the service need not be asked for that.
        let shared = engine::hydration::can_share_with(&remote, Path::new("/"));
        assert!(matches!(shared, Err(Error::NotFound(_))), "{shared:?}");
    }
    assert_eq!(plane.counts().refused_requests, 0);
}

#[test]
fn wal_comes_through_the_service_and_what_is_absent_is_proven_absent() {
    let plane = start(&sample());
    let backup = backups(&sample()).remove(0);
    let store = connect(lease(&plane, Security::Plain, &backup));
    let (here, there) = (backup.cluster.wal(), remote(&backup, &store).unwrap().cluster.wal());
    let place = tempfile::tempdir().unwrap();
    for name in ["000000020000000000000003", "00000002.history", "000000020000000000000005"] {
        let (local, far) = (place.path().join("local"), place.path().join("far"));
        assert_eq!(there.fetch(name, &far).unwrap(), here.fetch(name, &local).unwrap(), "{name}");
        assert_eq!(std::fs::read(&far).ok(), std::fs::read(&local).ok(), "{name}");
        let _ = (std::fs::remove_file(&far), std::fs::remove_file(&local));
    }
}

#[test]
fn several_ranges_are_one_request() {
    let directory = tempfile::tempdir().unwrap();
    let content: Vec<u8> = (0..1_000_000_u32).map(|at| (at / 7) as u8).collect();
    LocalStore::new(directory.path()).put("key", &content, Existing::Refuse).unwrap();
    let plane = start(directory.path());
    let store = connect(lease_all(&plane, Security::Plain));
    let mut parts: Vec<_> = (0..60_u64).map(|number| (number * 16_000, vec![0; 1 + number as usize * 100])).collect();
    let mut wanted: Vec<_> = parts.iter_mut().map(|(offset, part)| (*offset, part.as_mut_slice())).collect();
    store.read_ranges("key", &mut wanted).unwrap();
    for (offset, part) in parts {
        assert!(part == content[offset as usize..offset as usize + part.len()]);
    }
    assert_eq!(plane.counts().requests, 1);
}

#[test]
fn many_threads_share_few_connections() {
    let directory = tempfile::tempdir().unwrap();
    let content: Vec<u8> = (0..20_000_000_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    LocalStore::new(directory.path()).put("key", &content, Existing::Refuse).unwrap();
    let (plane, security) = start_tls(directory.path());
    let store = connect(lease_all(&plane, security));
    std::thread::scope(|scope| {
        for thread in 0..64_usize {
            let (store, content) = (&store, &content);
            scope.spawn(move || {
                for round in 0..20_usize {
                    let bytes = 1 + (thread * 7919 + round * 104_729) % 700_000;
                    let offset = (thread * 15_485_863 + round * 32_452_843) % (content.len() - bytes);
                    let mut out = vec![0; bytes];
                    store.read_at("key", offset as u64, &mut out).unwrap();
                    assert!(out == content[offset..offset + bytes]);
                }
            });
        }
    });
    assert!(plane.counts().let_in <= 8, "{:?}", plane.counts());
    assert_eq!(store.counters().lost, 0);
}

#[test]
fn without_io_uring_threads_read_the_same() {
    let plane = start_plain(&sample());
    for backup in backups(&sample()) {
        let store = connect(lease(&plane, Security::Plain, &backup));
        assert!(contents(&remote(&backup, &store).unwrap()).unwrap() == contents(&backup).unwrap());
    }
    assert_eq!((plane.counts().refused_requests, plane.counts().failed_requests), (0, 0));
    let absent = connect(lease_all(&plane, Security::Plain)).read_at("no/such", 0, &mut [0; 10]).unwrap_err();
    assert_eq!(absent.raw_os_error(), Some(libc::ENOENT));
}
