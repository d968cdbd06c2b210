//! What every store promises: one suite, run against each implementation. Those that only read pass [`reading`].

#![allow(clippy::unwrap_used)]

use super::{Existing, Store, Upload};
use crate::Error;

mod reading;

/// Runs all of it; `make` gives an empty store for each name, and for the same name the same again.
pub(crate) fn run(make: &dyn Fn(&str) -> Box<dyn Store>) {
    reading::run(&|name| (make(name), make(name)));
    a_key_appears_as_a_whole(&*make("whole"));
    a_large_upload_has_every_byte_and_no_more(&*make("large"));
    a_head_is_written_over_what_stood_there(&*make("head"));
    an_upload_that_is_dropped_leaves_nothing(&*make("dropped"));
    an_existing_key_is_refused_or_replaced(&*make("existing"));
    removal_is_idempotent(&*make("removal"));
    keys_stay_inside_the_store(&*make("inside"));
    a_lock_is_one_file_for_all(&*make("lock"));
}

fn a_key_appears_as_a_whole(store: &dyn Store) {
    let mut upload = store.create("a/b/key", Existing::Refuse).unwrap();
    upload.append(b"first ").unwrap();
    assert_eq!(store.size("a/b/key").unwrap(), None);
    upload.append(b"second").unwrap();
    assert_eq!(upload.written(), 12);
    upload.commit().unwrap();
    store.settle("a/b/key").unwrap();
    assert_eq!(store.size("a/b/key").unwrap(), Some(12));
    let mut middle = [0; 6];
    store.read_at("a/b/key", 6, &mut middle).unwrap();
    assert_eq!(&middle, b"second");
    assert_eq!(store.get("a/b/key", 100).unwrap(), b"first second");
}

fn a_large_upload_has_every_byte_and_no_more(store: &dyn Store) {
    let content: Vec<u8> = (0..9_000_001_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for (name, bytes, step) in
        [("empty", 0, 1), ("tiny", 5, 3), ("odd", content.len(), 700_001), ("whole", 8 << 20, 4 << 20)]
    {
        let mut upload = store.create_large(name, Existing::Refuse).unwrap();
        content[..bytes].chunks(step).for_each(|part| upload.append(part).unwrap());
        assert_eq!(upload.written(), bytes as u64);
        assert_eq!(store.size(name).unwrap(), None);
        upload.commit().unwrap();
        assert_eq!(store.size(name).unwrap(), Some(bytes as u64));
        assert!(store.get(name, u64::MAX - 1).unwrap() == content[..bytes], "{name}");
    }
    let mut dropped = store.create_large("dropped", Existing::Refuse).unwrap();
    dropped.append(&content).unwrap();
    drop(dropped);
    assert_eq!(store.size("dropped").unwrap(), None);
}

fn a_head_is_written_over_what_stood_there(store: &dyn Store) {
    let content = vec![7; 5 << 20];
    for (key, bytes) in [("head/few", 10_000), ("head/many", content.len())] {
        let mut uploads: Vec<(String, Box<dyn Upload>)> = vec![
            (format!("{key}-plain"), store.create(&format!("{key}-plain"), Existing::Refuse).unwrap()),
            (format!("{key}-large"), store.create_large(&format!("{key}-large"), Existing::Refuse).unwrap()),
        ];
        for (_, upload) in &mut uploads {
            upload.append(&content[..bytes]).unwrap();
            upload.replace_head(b"head").unwrap();
            upload.append(b"tail").unwrap();
            assert_eq!(upload.written(), bytes as u64 + 4);
        }
        for (key, upload) in uploads {
            upload.commit().unwrap();
            let written = store.get(&key, 6 << 20).unwrap();
            let whole = [b"head", &content[4..bytes], b"tail"].concat();
            assert!(written == whole, "{key}");
        }
    }
}

fn an_upload_that_is_dropped_leaves_nothing(store: &dyn Store) {
    let mut upload = store.create("dir/key", Existing::Refuse).unwrap();
    upload.append(b"half").unwrap();
    assert_eq!(store.list("dir").unwrap(), []);
    drop(upload);
    assert_eq!(store.size("dir/key").unwrap(), None);
    assert_eq!(store.sweep_uploads("dir").unwrap(), 0);
    // One whose process was killed is found by the sweep.
    let mut upload = store.create("dir/key", Existing::Refuse).unwrap();
    upload.append(b"half").unwrap();
    std::mem::forget(upload);
    assert_eq!(store.sweep_uploads("dir").unwrap(), 4);
    assert_eq!(store.sweep_uploads("dir").unwrap(), 0);
    assert_eq!(store.sweep_uploads("no/such/directory").unwrap(), 0);
}

fn an_existing_key_is_refused_or_replaced(store: &dyn Store) {
    store.put("key", b"old", Existing::Refuse).unwrap();
    let refused = store.put("key", b"new", Existing::Refuse).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EEXIST));
    assert_eq!(store.get("key", 3).unwrap(), b"old");
    store.put("key", b"newer", Existing::Replace).unwrap();
    assert_eq!(store.get("key", 5).unwrap(), b"newer");
}

fn removal_is_idempotent(store: &dyn Store) {
    store.put("d/key", b"x", Existing::Refuse).unwrap();
    store.read_at("d/key", 0, &mut [0]).unwrap();
    store.remove("d/key").unwrap();
    store.remove("d/key").unwrap();
    assert!(store.read_at("d/key", 0, &mut [0]).is_err());
}

fn keys_stay_inside_the_store(store: &dyn Store) {
    for key in ["", "/etc/passwd", "../key", "a/../../key"] {
        assert!(store.put(key, b"x", Existing::Refuse).is_err(), "{key}");
        assert!(store.get(key, 1).is_err(), "{key}");
    }
}

fn a_lock_is_one_file_for_all(store: &dyn Store) {
    use rustix::fs::{FlockOperation, flock};
    let (one, other) = (store.open_lock("locks/one").unwrap(), store.open_lock("locks/one").unwrap());
    flock(&one, FlockOperation::NonBlockingLockExclusive).unwrap();
    assert!(flock(&other, FlockOperation::NonBlockingLockExclusive).is_err());
    // Not by closing it: a process that is forked meanwhile has it open as well.
    flock(&one, FlockOperation::Unlock).unwrap();
    flock(&other, FlockOperation::NonBlockingLockExclusive).unwrap();
}
