#![allow(clippy::unwrap_used)]

use super::*;
use crate::store::conformance;

#[test]
fn a_local_directory_conforms() {
    let directory = tempfile::tempdir().unwrap();
    conformance::run(&|name| Box::new(LocalStore::new(directory.path().join(name))));
}

#[test]
fn a_directory_whose_maker_was_killed_is_named_durably_before_anything_in_it_is_promised() {
    thread_local!(static SYNCED: std::cell::RefCell<Vec<PathBuf>> = const { std::cell::RefCell::new(Vec::new()) });
    let listen = |directory: &Directory| {
        SYNCED.with_borrow_mut(|synced| synced.push(directory.path().to_owned()));
        directory.sync()
    };
    let directory = tempfile::tempdir().unwrap();
    let synced = || SYNCED.take().iter().filter(|path| **path == directory.path().join("wal")).count();
    // What was left: made, and its name never synced.
    std::fs::create_dir_all(directory.path().join("wal/00000001")).unwrap();
    let store = || LocalStore { sync_directory: listen, ..LocalStore::new(directory.path()) };
    let pushing = store();
    pushing.put("wal/00000001/1", b"x", Existing::Refuse).unwrap();
    assert_eq!(synced(), 1);
    pushing.put("wal/00000001/2", b"x", Existing::Refuse).unwrap();
    assert_eq!(synced(), 0, "once is enough");
    // Another push of the same finds it there, and promises it as well.
    store().settle("wal/00000001/1").unwrap();
    assert_eq!(synced(), 1);
}

#[test]
fn what_root_writes_belongs_to_the_owner_of_the_store() {
    if !rustix::process::geteuid().is_root() {
        // Only root can give files away; everybody else has nothing to hand over.
        return crate::left_out::leave_out("store::local::what_root_writes_belongs_to_the_owner_of_the_store", "root");
    }
    let directory = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(directory.path(), Some(12345), Some(54321)).unwrap();
    let store = LocalStore::new(directory.path());
    store.put("new/deep/key", b"x", Existing::Refuse).unwrap();
    store.open_lock("locks/lock").unwrap();
    for made in ["new", "new/deep", "new/deep/key", "locks", "locks/lock"] {
        let metadata = std::fs::metadata(directory.path().join(made)).unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), (12345, 54321), "{made}");
        assert_eq!(metadata.mode() & 0o7027, 0, "{made}");
    }
}

#[test]
fn nothing_is_written_through_a_link_in_the_place_of_a_lock() {
    let directory = tempfile::tempdir().unwrap();
    let store = LocalStore::new(directory.path().join("repo"));
    let victim = directory.path().join("victim");
    std::fs::write(&victim, b"precious").unwrap();
    drop(store.open_lock("locks/good").unwrap());
    std::os::unix::fs::symlink(&victim, directory.path().join("repo/locks/link")).unwrap();
    std::os::unix::fs::symlink("nowhere", directory.path().join("repo/locks/dangling")).unwrap();
    std::fs::hard_link(&victim, directory.path().join("repo/locks/second")).unwrap();
    std::fs::create_dir(directory.path().join("repo/locks/directory")).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, directory.path().join("repo/locks/pipe"), 0o600.into()).unwrap();
    for key in ["link", "dangling", "second", "pipe"] {
        let refused = store.open_lock(&format!("locks/{key}")).unwrap_err();
        assert!(matches!(refused, Error::Corrupt { .. }), "{key}: {refused}");
    }
    assert!(store.open_lock("locks/directory").is_err());
    assert_eq!(std::fs::read(&victim).unwrap(), b"precious");
    assert!(!directory.path().join("repo/locks/nowhere").exists());
}

#[test]
fn nothing_is_changed_through_a_link_in_the_place_of_a_directory() {
    let place = tempfile::tempdir().unwrap();
    let store = LocalStore::new(place.path().join("way/repo"));
    store.put("locks/lock", b"", Existing::Refuse).unwrap();
    let repo = place.path().join("way/repo");
    let elsewhere = place.path().join("elsewhere");
    std::fs::create_dir(&elsewhere).unwrap();
    for name in ["lock", "victim", ".left.1.1.part"] {
        std::fs::write(elsewhere.join(name), b"precious").unwrap();
    }
    std::fs::rename(repo.join("locks"), repo.join("old")).unwrap();
    std::os::unix::fs::symlink(&elsewhere, repo.join("locks")).unwrap();

    let message = format!("{} is a symbolic link", repo.join("locks").display());
    let refused = [
        store.open_lock("locks/lock").map(drop),
        store.open_lock("locks/new").map(drop),
        store.put("locks/key", b"x", Existing::Refuse),
        store.put("locks/victim", b"x", Existing::Replace),
        store.put("locks/deeper/key", b"x", Existing::Refuse),
        store.remove("locks/victim"),
        store.settle("locks/victim"),
        store.sweep_uploads("locks").map(drop),
    ];
    for refused in refused {
        let refused = refused.unwrap_err();
        assert!(matches!(&refused, Error::Refused(text) if text.starts_with(&message)), "{refused}");
    }
    assert_eq!(std::fs::read_dir(&elsewhere).unwrap().count(), 3);
    for name in ["lock", "victim", ".left.1.1.part"] {
        assert_eq!(std::fs::read(elsewhere.join(name)).unwrap(), b"precious", "{name}");
    }

    // It can be read; and the way to the store is the operator's.
    assert_eq!(store.get("locks/victim", 10).unwrap(), b"precious");
    std::os::unix::fs::symlink(place.path().join("way"), place.path().join("other")).unwrap();
    let store = LocalStore::new(place.path().join("other/repo"));
    store.put("keys/key", b"x", Existing::Refuse).unwrap();
    assert!(repo.join("keys/key").is_file());
}

#[test]
fn root_gives_nothing_away_that_it_did_not_make() {
    if !rustix::process::geteuid().is_root() {
        return crate::left_out::leave_out("store::local::root_gives_nothing_away_that_it_did_not_make", "root");
    }
    let directory = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(directory.path(), Some(12345), Some(54321)).unwrap();
    std::fs::create_dir(directory.path().join("locks")).unwrap();
    std::fs::write(directory.path().join("locks/old"), b"root's").unwrap();
    let store = LocalStore::new(directory.path());
    store.open_lock("locks/old").unwrap();
    store.put("locks/new", b"x", Existing::Refuse).unwrap();
    // Nor a directory of root's that took the place of the one that was made.
    let root = Root::open(directory.path()).unwrap();
    hand_over_directory(&root, &open_directory(root.at("locks")).unwrap()).unwrap();
    for (name, owner) in [("locks", 0), ("locks/old", 0), ("locks/new", 12345)] {
        assert_eq!(std::fs::metadata(directory.path().join(name)).unwrap().uid(), owner, "{name}");
    }
}

#[test]
fn what_is_no_file_is_damage_and_nobody_waits_for_it() {
    let directory = tempfile::tempdir().unwrap();
    let store = LocalStore::new(directory.path());
    rustix::fs::mkfifoat(rustix::fs::CWD, directory.path().join("pipe"), 0o600.into()).unwrap();
    std::fs::create_dir(directory.path().join("directory")).unwrap();
    for key in ["pipe", "directory"] {
        assert!(matches!(store.get(key, 10), Err(Error::Corrupt { .. })), "{key}");
        assert!(matches!(store.read_at(key, 0, &mut [0]), Err(Error::Corrupt { .. })), "{key}");
    }
}

#[test]
fn more_files_than_may_be_open_are_all_readable() {
    let directory = tempfile::tempdir().unwrap();
    let store = LocalStore::new(directory.path());
    for number in 0..OPEN_FILES_MAX + 10 {
        store.put(&format!("many/{number}"), &number.to_le_bytes(), Existing::Refuse).unwrap();
    }
    for number in 0..OPEN_FILES_MAX + 10 {
        let mut bytes = [0; 8];
        store.read_at(&format!("many/{number}"), 0, &mut bytes).unwrap();
        assert_eq!(bytes, number.to_le_bytes());
    }
    assert_eq!(store.open_files().files.len(), OPEN_FILES_MAX);
}
