//! A service that is far away: what is asked for ahead hides the way.

use super::*;
use engine::codec::Compression;
use engine::remote::Access;

const FILES: u64 = 6;
const FILE_BYTES: u64 = 8 << 20;
const REQUEST_BYTES: usize = 1 << 20;
const ONE_WAY: Duration = Duration::from_millis(100);

/// Blocks that no codec makes smaller, no two the same.
fn noise(seed: u64, out: &mut Vec<u8>) {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    out.extend((0..FILE_BYTES / 8).flat_map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    }));
}

fn made(root: &Path) -> Backup {
    let mut files = vec![backup::directory("base"), backup::directory("base/5")];
    files.extend((0..FILES).map(|number| backup::file(format!("base/5/{}", 20_000 + number), FILE_BYTES)));
    let mut seed = 0;
    backup::write(root, Compression::Lz4, files, |_, out| {
        seed += 1;
        noise(seed, out);
    })
    .unwrap()
}

/// Reads all files front to back, one request after the other; tells how long it took.
fn read_in_order(backup: &Backup, expected: &Backup) -> Duration {
    let (blocks, mut scratch) = (backup.blocks(), Scratch::default());
    let local = expected.blocks();
    let files = backup.manifest.files().collect::<Result<Vec<_>>>().unwrap();
    let (mut out, mut here) = (vec![0; REQUEST_BYTES], vec![0; REQUEST_BYTES]);
    let mut spent = Duration::ZERO;
    for file in files {
        for offset in (0..file.bytes).step_by(REQUEST_BYTES) {
            let began = Instant::now();
            let read = blocks.read_range_once(&file, offset, &mut out, &mut scratch).unwrap();
            spent += began.elapsed();
            assert_eq!(local.read_range(&file, offset, &mut here, &mut scratch).unwrap(), read);
            assert!(out[..read] == here[..read], "{} at {offset}", file.path);
        }
    }
    spent
}

#[test]
fn one_reader_in_order_is_not_held_up_by_a_long_way_and_nothing_comes_twice() {
    let directory = tempfile::tempdir().unwrap();
    let local = made(directory.path());
    let plane = start(directory.path());
    let relay = relay::Relay::start(plane.address(), ONE_WAY);
    let access = Access { address: relay.address, ..lease(&plane, Security::Plain, &local) };
    let store = connect(access);
    let remote = remote(&local, &store).unwrap();
    let before = plane.counts();
    let spent = read_in_order(&remote, &local);
    let requests = (FILES * FILE_BYTES).div_ceil(REQUEST_BYTES as u64);
    let one_at_a_time = 2 * ONE_WAY * u32::try_from(requests).unwrap();
    assert!(spent < one_at_a_time / 3, "{spent:?} of {one_at_a_time:?}");
    assert!(plane.counts().let_in > 2, "{:?}", plane.counts());
    // The leaves of the manifest are the rest.
    let bytes = plane.counts().bytes - before.bytes;
    assert!(bytes < FILES * FILE_BYTES + (2 << 20), "{bytes} bytes");
    assert_eq!((plane.counts().refused_requests, plane.counts().failed_requests), (0, 0));
}

#[test]
fn no_more_memory_is_taken_than_is_given_and_jumps_are_not_followed() {
    let directory = tempfile::tempdir().unwrap();
    let local = made(directory.path());
    let plane = start(directory.path());
    let relay = relay::Relay::start(plane.address(), Duration::from_millis(5));
    let access = Access { address: relay.address, ..lease(&plane, Security::Plain, &local) };
    let store = connect(access);
    let remote = remote(&local, &store).unwrap();
    // None at all: every byte is asked for as it is read.
    assert_eq!(store.allow_ahead(0), 0);
    assert_eq!(store.ahead_room(), 0);
    assert!(!store.fetch_ahead("clusters/bench/packs/00000001.pack", 4096..8192));
    read_in_order(&remote, &local);
    store.allow_ahead(3 << 20);
    assert!(store.ahead_room() <= 3 << 20);
    read_in_order(&remote, &local);
    // Here and there: what is sent is what is wanted.
    let store = connect(Access { address: relay.address, ..lease(&plane, Security::Plain, &local) });
    let remote = super::remote(&local, &store).unwrap();
    let (blocks, mut scratch, mut page) = (remote.blocks(), Scratch::default(), vec![0; 8192]);
    let files: Vec<_> = remote.manifest.files().map(Result::unwrap).filter(|file| file.bytes > 0).collect();
    let before = plane.counts().bytes;
    for number in 0..20_u64 {
        let file = &files[(number * 5 % FILES) as usize];
        let offset = (number * 7_919 * 8192) % FILE_BYTES;
        blocks.read_range(file, offset, &mut page, &mut scratch).unwrap();
    }
    let block_bytes = blocks.block_size().bytes() as u64;
    // Some jumps land where they look like order.
    let bytes = plane.counts().bytes - before;
    assert!(bytes < 60 * block_bytes, "{bytes} bytes");
}
