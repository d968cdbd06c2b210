//! The data plane over loopback, client and server in one process, for the figures of *benches/README.md*.
//!
//! ```text
//! data_plane REPOSITORY [ROUND_TRIP_MS]    makes the repository (1 GiB, lz4 and then again raw) where there is none
//! data_plane REPOSITORY sessions           the memory of a service with eight sessions, under TLS
//! ```
//!
//! From the page cache to verified buffers, read in requests of 1 MiB by so many threads; beside it the same blocks read
//! from the directory. Speed is by wall time; processor time is of client, server and kernel, and is what to compare
//! where the machine is busy. With a round trip all passes a relay, whose own time is in the figures.

#![allow(clippy::print_stdout, clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use data::{DataPlane, Leases, Settings};
use engine::blocks::Scratch;
use engine::codec::Compression;
use engine::format::file::FileRecord;
use engine::remote::{Access, Fingerprint, Forever, LeaseId, RemoteStore, Security, Token};
use engine::repository::{Backup, Repository};
use engine::store::{LocalStore, Store};
use pghydrant_benches::backup::{directory, file, write};
use pghydrant_benches::pages::pages;

#[allow(dead_code, unused_imports, unreachable_pub)]
#[path = "../../cli/src/service/data/mod.rs"]
mod data;
#[allow(dead_code)]
#[path = "../../cli/src/service/data/tests/relay.rs"]
mod relay;

const FILES: usize = 32;
const FILE_BYTES: u64 = 32 << 20;
const REQUEST_BYTES: usize = 1 << 20;
const AHEAD_BYTES: usize = 32 << 20;
const ROUNDS: usize = 3;
const SESSIONS: usize = 8;

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let place = Path::new(words.first().map_or("/var/tmp/data-plane", String::as_str));
    match words.get(1).map(String::as_str) {
        Some("sessions") => return sessions(place),
        Some("serve") => return serve(&place.join("raw")),
        _ => {}
    }
    let round_trip = words.get(1).map(|ms| Duration::from_millis(ms.parse().unwrap()));
    for (name, compression) in [("lz4", Compression::Lz4), ("raw", Compression::None)] {
        let root = place.join(name);
        let backup = made(&root, compression);
        let stored: u64 = backup.manifest.packs().iter().map(|pack| pack.bytes).sum();
        let decoded = FILES as u64 * FILE_BYTES;
        println!("{name}: {} MiB, stored in {} MiB", decoded >> 20, stored >> 20);
        let threads = if round_trip.is_some() { vec![2, 16, 64] } else { vec![2, 4] };
        for threads in threads {
            if round_trip.is_none() {
                measure(&format!("directory, {threads} threads"), &backup, threads);
            }
            for encrypted in [false, true] {
                let (tls, fingerprint) = encrypted.then(certificate).unzip();
                let security = fingerprint.map_or(Security::Plain, Security::Tls);
                let store = LocalStore::new(&root);
                let listen = (std::net::Ipv4Addr::LOCALHOST, 0).into();
                let settings = Settings { listen, tls, store, bytes_a_second_max: None, with_ring: true };
                let plane = DataPlane::start(settings, Arc::<Leases>::default()).unwrap();
                let (lease, token) = offer(&plane, &backup);
                let relay = round_trip.map(|time| relay::Relay::start(plane.address(), time / 2));
                let address = relay.as_ref().map_or(plane.address(), |relay| relay.address);
                let access = Access { address, security, lease, token };
                let far = through(access, &backup);
                let how = if encrypted { "TLS" } else { "plain" };
                if round_trip.is_some() {
                    let store = far.cluster.repository().store();
                    store.allow_ahead(0);
                    measure(&format!("{how}, {threads} threads, not ahead"), &far, threads);
                    store.allow_ahead(AHEAD_BYTES);
                }
                measure(&format!("{how}, {threads} threads"), &far, threads);
            }
        }
    }
}

/// Reads everything by eight sessions of four threads at once from a service in a process of its own.
fn sessions(place: &Path) {
    let backup = made(&place.join("raw"), Compression::None);
    let program = std::env::current_exe().unwrap();
    let mut child = std::process::Command::new(program)
        .args([place.as_os_str(), "serve".as_ref()])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let accesses: Vec<_> = lines.by_ref().take(SESSIONS).map(|line| access_of(&line)).collect();
    let memory = |field: &str| {
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        status.lines().find(|line| line.starts_with(field)).unwrap().to_owned()
    };
    println!("before: {}", memory("VmRSS"));
    std::thread::scope(|scope| {
        for access in accesses {
            let backup = &backup;
            scope.spawn(move || read(&through(access, backup), &files_of(backup), 4));
        }
    });
    println!("after {SESSIONS} sessions: {}", memory("VmHWM"));
    drop(child.stdin.take());
    child.wait().unwrap();
}

/// Serves until stdin ends.
fn serve(root: &Path) {
    let backup = made(root, Compression::None);
    let (tls, fingerprint) = certificate();
    let listen = (std::net::Ipv4Addr::LOCALHOST, 0).into();
    let store = LocalStore::new(root);
    let settings = Settings { listen, tls: Some(tls), store, bytes_a_second_max: None, with_ring: true };
    let plane = DataPlane::start(settings, Arc::default()).unwrap();
    for _ in 0..SESSIONS {
        let (lease, token) = offer(&plane, &backup);
        println!("{} {fingerprint} {lease} {}", plane.address(), token.to_hex());
    }
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
}

/// A certificate for one run.
fn certificate() -> (Arc<rustls::ServerConfig>, Fingerprint) {
    let made = rcgen::generate_simple_self_signed(["bench".to_owned()]).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ServerConfig::builder_with_provider(provider);
    let builder = builder.with_protocol_versions(&[&rustls::version::TLS13]).unwrap().with_no_client_auth();
    let config = builder.with_single_cert(vec![made.cert.der().clone()], key).unwrap();
    (Arc::new(config), Fingerprint::of(made.cert.der()))
}

/// A lease of the backup.
fn offer(plane: &DataPlane, backup: &Backup) -> (LeaseId, Token) {
    let (lease, token) = Leases::number().unwrap();
    let (cluster, only) = (backup.cluster.clone(), Some(backup.info.label.clone()));
    plane.leases().offer((lease, Leases::hash(&token)), cluster, only, None, Box::new(|_| ()));
    (lease, token)
}

fn access_of(line: &str) -> Access {
    let words: Vec<_> = line.split(' ').collect();
    Access {
        address: words[0].parse().unwrap(),
        security: Security::Tls(words[1].parse().unwrap()),
        lease: words[2].parse().unwrap(),
        token: Token::from_hex(words[3]).unwrap(),
    }
}

/// The backup, by way of the service.
fn through(access: Access, backup: &Backup) -> Backup {
    let store: Arc<dyn Store> = Arc::new(RemoteStore::connect(access, Arc::new(Forever)).unwrap());
    let repository = Repository::with_store(Path::new("service"), store).unwrap();
    repository.cluster(backup.cluster.name()).unwrap().backup(&backup.info.label).unwrap()
}

/// The backup in `root`, generated if there is none.
fn made(root: &Path, compression: Compression) -> Backup {
    if let Ok(repository) = Repository::open(root) {
        let cluster = repository.cluster(&repository.clusters().unwrap().remove(0)).unwrap();
        return cluster.latest_backup().unwrap().unwrap();
    }
    let mut files = vec![directory("base"), directory("base/5")];
    files.extend((0..FILES).map(|number| file(format!("base/5/{}", 20_000 + number), FILE_BYTES)));
    let (content, _) = pages(FILE_BYTES as usize);
    let mut number = 0_u64;
    write(root, compression, files, |_, out| {
        out.extend_from_slice(&content);
        number += 1;
        // No two blocks are the same.
        out.chunks_mut(8192).for_each(|page| page[..8].copy_from_slice(&number.to_le_bytes()));
    })
    .unwrap()
}

fn measure(what: &str, backup: &Backup, threads: usize) {
    let files: Vec<FileRecord> = backup.manifest.files().map(Result::unwrap).filter(|file| file.bytes > 0).collect();
    let bytes: u64 = files.iter().map(|file| file.bytes).sum();
    read(backup, &files, threads);
    let (mut wall, mut cpu) = (f64::MAX, f64::MAX);
    for _ in 0..ROUNDS {
        let (began, before) = (Instant::now(), processor_seconds());
        read(backup, &files, threads);
        wall = wall.min(began.elapsed().as_secs_f64());
        cpu = cpu.min(processor_seconds() - before);
    }
    let gigabytes = bytes as f64 / 1e9;
    println!("  {what:<32} {:5.2} GB/s  {:5.3} CPU-s/GB", gigabytes / wall, cpu / gigabytes);
}

fn files_of(backup: &Backup) -> Vec<FileRecord> {
    backup.manifest.files().map(Result::unwrap).filter(|file| file.bytes > 0).collect()
}

fn read(backup: &Backup, files: &[FileRecord], threads: usize) {
    let requests: Vec<_> = files
        .iter()
        .flat_map(|file| (0..file.bytes).step_by(REQUEST_BYTES).map(move |offset| (file, offset)))
        .collect();
    let (next, blocks) = (AtomicUsize::new(0), backup.blocks());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut scratch = Scratch::default();
                let mut out = vec![0; REQUEST_BYTES];
                while let Some((file, offset)) = requests.get(next.fetch_add(1, Ordering::Relaxed)) {
                    blocks.read_range(file, *offset, &mut out, &mut scratch).unwrap();
                }
            });
        }
    });
}

fn processor_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<_> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    let ticks: f64 = fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap();
    ticks / 100.0
}
