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
use std::time::{Duration, Instant};

use engine::codec::Compression;
use engine::remote::{Access, Security, Token};
use engine::repository::Backup;
use pghydrant_benches::data_plane::{FILE_BYTES, Service, files_of, made, read, through};

#[allow(dead_code)]
#[path = "../../cli/src/service/data/tests/relay.rs"]
mod relay;

const FILES: usize = 32;
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
        let backup = made(&root, compression, FILES).unwrap();
        let stored: u64 = backup.manifest.packs().iter().map(|pack| pack.bytes).sum();
        let decoded = FILES as u64 * FILE_BYTES;
        println!("{name}: {} MiB, stored in {} MiB", decoded >> 20, stored >> 20);
        let threads = if round_trip.is_some() { vec![2, 16, 64] } else { vec![2, 4] };
        for threads in threads {
            if round_trip.is_none() {
                measure(&format!("directory, {threads} threads"), &backup, threads);
            }
            for encrypted in [false, true] {
                let service = Service::start(&root, encrypted).unwrap();
                let relay = round_trip.map(|time| relay::Relay::start(service.address(), time / 2));
                let address = relay.as_ref().map_or(service.address(), |relay| relay.address);
                let far = through(Access { address, ..service.offer(&backup).unwrap() }, &backup).unwrap();
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
    let backup = made(&place.join("raw"), Compression::None, FILES).unwrap();
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
            scope.spawn(move || read(&through(access, backup).unwrap(), &files_of(backup).unwrap(), 4).unwrap());
        }
    });
    println!("after {SESSIONS} sessions: {}", memory("VmHWM"));
    drop(child.stdin.take());
    child.wait().unwrap();
}

/// Serves until stdin ends.
fn serve(root: &Path) {
    let backup = made(root, Compression::None, FILES).unwrap();
    let service = Service::start(root, true).unwrap();
    for _ in 0..SESSIONS {
        let Access { address, security, lease, token } = service.offer(&backup).unwrap();
        let Security::Tls(fingerprint) = security else { unreachable!("it was started under TLS") };
        println!("{address} {fingerprint} {lease} {}", token.to_hex());
    }
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
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

fn measure(what: &str, backup: &Backup, threads: usize) {
    let files = files_of(backup).unwrap();
    let bytes: u64 = files.iter().map(|file| file.bytes).sum();
    read(backup, &files, threads).unwrap();
    let (mut wall, mut cpu) = (f64::MAX, f64::MAX);
    for _ in 0..ROUNDS {
        let (began, before) = (Instant::now(), processor_seconds());
        read(backup, &files, threads).unwrap();
        wall = wall.min(began.elapsed().as_secs_f64());
        cpu = cpu.min(processor_seconds() - before);
    }
    let gigabytes = bytes as f64 / 1e9;
    println!("  {what:<32} {:5.2} GB/s  {:5.3} CPU-s/GB", gigabytes / wall, cpu / gigabytes);
}

fn processor_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<_> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    let ticks: f64 = fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap();
    ticks / 100.0
}
