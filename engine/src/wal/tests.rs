//! Pushes and fetches against a repository on disk.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::name::{SegmentName, WalFile};
use super::page::tests::segment;
use super::*;
use crate::codec::Compression;
use crate::format::backup::WalRange;
use crate::repository::{ClusterInfo, Lock, LockKind, Parent, Repository, keys, now, tests as backups};
use crate::store::failing::FailingStore;
use crate::store::{Existing, LocalStore, Store};
use crate::units::{BlockSize, ClusterName, Lsn, SystemIdentifier, Timeline};
use crate::{Error, Result};

const MIB: u64 = 1 << 20;
const IDENTIFIER: u64 = 7;

struct Place {
    directory: tempfile::TempDir,
    repository: Repository,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let repository =
            Repository::init(&directory.path().join("repo"), Compression::Lz4, BlockSize::DEFAULT).unwrap();
        std::fs::create_dir(directory.path().join("pg_wal")).unwrap();
        Self { directory, repository }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join("pg_wal").join(name)
    }

    fn write(&self, file: WalFile, bytes: &[u8]) -> PathBuf {
        let path = self.path(&file.file_name(MIB));
        std::fs::write(&path, bytes).unwrap();
        path
    }

    fn write_segment(&self, timeline: u32, number: u64) -> PathBuf {
        let name = SegmentName { timeline: Timeline(timeline), number };
        self.write(WalFile::Segment(name), &segment(name, IDENTIFIER, MIB, number as u8))
    }

    fn archive(&self) -> WalArchive {
        let info = ClusterInfo::new(cluster(), SystemIdentifier(IDENTIFIER), MIB, now());
        self.repository.create_cluster(info).unwrap().wal()
    }

    /// An archive with these segments.
    fn filled(&self, segments: &[(u32, u64)]) -> WalArchive {
        let archive = self.archive();
        for (timeline, number) in segments {
            assert_eq!(archive.push(&self.write_segment(*timeline, *number)).unwrap(), Pushed::Stored);
        }
        archive
    }

    fn push_history(&self, timeline: u32, text: &str) {
        let path = self.write(WalFile::History(Timeline(timeline)), text.as_bytes());
        self.archive().push(&path).unwrap();
    }

    fn object(&self, timeline: u32, name: &str) -> PathBuf {
        self.repository.store().describe(&format!("{}/{name}", keys::wal_timeline(&cluster(), Timeline(timeline))))
    }
}

fn cluster() -> ClusterName {
    "main".parse().unwrap()
}

fn name(timeline: u32, number: u64) -> String {
    SegmentName { timeline: Timeline(timeline), number }.file_name(MIB)
}

fn fetch(archive: &WalArchive, name: &str, to: &Path) -> Result<Fetched> {
    let done = archive.fetch(name, to);
    let beside = std::fs::read_dir(to.parent().unwrap()).unwrap();
    for leftover in beside.map(|entry| entry.unwrap().file_name()) {
        assert!(!leftover.to_string_lossy().ends_with(".part"), "{}", leftover.display());
    }
    done
}

#[test]
fn the_first_segment_makes_the_cluster_and_every_kind_of_file_comes_back() {
    let place = Place::new();
    let first = place.write_segment(1, 3);
    let archive = WalArchive::for_push(&place.repository, &cluster(), &first).unwrap();
    assert_eq!(archive.cluster().info().system_identifier, SystemIdentifier(IDENTIFIER));
    assert_eq!(archive.segment_bytes(), MIB);
    let last = SegmentName { timeline: Timeline(1), number: 4 };
    let files = [
        first,
        place.write(WalFile::Partial(last), &segment(last, IDENTIFIER, MIB, 9)),
        place.write(WalFile::BackupLabel(last, 0x28), b"START WAL LOCATION: 0/400028\n"),
        place.write(WalFile::History(Timeline(2)), b"1\t0/400100\tno recovery target\n"),
    ];
    for path in &files {
        assert_eq!(archive.push(path).unwrap(), Pushed::Stored);
        let to = place.directory.path().join("RECOVERYXLOG");
        let file_name = path.file_name().unwrap().to_str().unwrap();
        assert!(archive.contains(file_name).unwrap());
        assert_eq!(fetch(&archive, file_name, &to).unwrap(), Fetched::Delivered);
        assert!(std::fs::read(&to).unwrap() == std::fs::read(path).unwrap(), "{file_name}");
    }
    assert_eq!(archive.timelines().unwrap(), [Timeline(1), Timeline(2)]);
    assert_eq!(archive.files(Timeline(1)).unwrap().len(), 3);
    assert_eq!(archive.segments(Timeline(1)).unwrap(), [SegmentName { timeline: Timeline(1), number: 3 }]);
    assert_eq!(archive.history(Timeline(2)).unwrap().unwrap().ancestors[0].left_at, Lsn(0x40_0100));
    assert_eq!(archive.history(Timeline(3)).unwrap(), None);
}

#[test]
fn a_history_that_comes_first_finds_whose_it_is_beside_it() {
    let place = Place::new();
    let history = place.write(WalFile::History(Timeline(2)), b"1\t0/400100\tx\n");
    assert!(matches!(WalArchive::for_push(&place.repository, &cluster(), &history), Err(Error::Refused(_))));
    assert_eq!(place.repository.clusters().unwrap(), []);
    place.write_segment(2, 4);
    WalArchive::for_push(&place.repository, &cluster(), &history).unwrap().push(&history).unwrap();
}

#[test]
fn the_same_again_is_well_and_another_under_the_name_is_refused() {
    let place = Place::new();
    let archive = place.filled(&[(1, 3)]);
    let path = place.path(&name(1, 3));
    assert_eq!(archive.push(&path).unwrap(), Pushed::AlreadyThere);
    let stored = std::fs::read(place.object(1, &name(1, 3))).unwrap();
    let mut other = std::fs::read(&path).unwrap();
    *other.last_mut().unwrap() ^= 1;
    std::fs::write(&path, &other).unwrap();
    let refused = archive.push(&path).unwrap_err();
    assert!(matches!(&refused, Error::Refused(text) if text.contains("differs at byte 1048575")), "{refused}");
    assert!(std::fs::read(place.object(1, &name(1, 3))).unwrap() == stored);
    // A damaged copy is not taken for the same.
    let mut damaged = stored;
    damaged[5000] ^= 1;
    std::fs::write(place.object(1, &name(1, 3)), damaged).unwrap();
    place.write_segment(1, 3);
    assert!(matches!(place.archive().push(&path), Err(Error::Corrupt { .. })));
}

#[test]
fn what_does_not_belong_under_its_name_is_refused() {
    let place = Place::new();
    let archive = place.archive();
    let right = SegmentName { timeline: Timeline(1), number: 3 };
    for (what, bytes) in [
        ("another cluster", segment(right, 8, MIB, 0)),
        ("another segment", segment(right.next(), IDENTIFIER, MIB, 0)),
        ("a later timeline", segment(SegmentName { timeline: Timeline(2), number: 3 }, IDENTIFIER, MIB, 0)),
        ("short", segment(right, IDENTIFIER, MIB, 0)[..8192].to_vec()),
        ("zeros", vec![0; 1 << 20]),
        ("empty", Vec::new()),
    ] {
        let path = place.write(WalFile::Segment(right), &bytes);
        assert!(matches!(archive.push(&path), Err(Error::Refused(_))), "{what}");
    }
    assert!(!archive.contains(&right.file_name(MIB)).unwrap());
    std::fs::write(place.path("notes.txt"), b"x").unwrap();
    assert!(matches!(archive.push(&place.path("notes.txt")), Err(Error::NotFound(_))));
    assert!(matches!(archive.push(&place.path(&name(1, 9))), Err(Error::Io { .. })));
}

#[test]
fn absence_is_proven_and_a_gap_is_a_fault() {
    let place = Place::new();
    let archive = place.filled(&[(1, 3), (1, 4), (1, 6), (2, 6)]);
    let to = place.directory.path().join("RECOVERYXLOG");
    assert_eq!(fetch(&archive, &name(1, 7), &to).unwrap(), Fetched::Absent);
    assert_eq!(fetch(&archive, &name(2, 7), &to).unwrap(), Fetched::Absent);
    assert_eq!(fetch(&archive, &name(3, 1), &to).unwrap(), Fetched::Absent);
    assert_eq!(fetch(&archive, "00000003.history", &to).unwrap(), Fetched::Absent);
    let fault = fetch(&archive, &name(1, 5), &to).unwrap_err();
    let text = format!("WAL segment {} is missing from the archive, which goes on with {}", name(1, 5), name(1, 6));
    assert_eq!(fault.to_string(), text);
    assert!(matches!(fetch(&archive, "nonsense", &to), Err(Error::NotFound(_))));
    assert!(!to.exists());
}

#[test]
fn a_hole_before_a_later_timeline_left_is_a_fault() {
    let place = Place::new();
    // Segments are 1 MiB. Timeline 2 left within segment 6; timeline 1's segments 5 and 6 were never archived.
    let archive = place.filled(&[(1, 3), (1, 4), (2, 6), (2, 7)]);
    place.push_history(2, "1\t0/680000\tno recovery target specified\n");
    let to = place.directory.path().join("RECOVERYXLOG");
    let fault = fetch(&archive, &name(1, 5), &to).unwrap_err();
    let text = format!("WAL segment {} is missing from the archive, which goes on with timeline 2", name(1, 5));
    assert_eq!(fault.to_string(), text);
    // Of segment 6 timeline 2 has a copy up to where it left.
    assert_eq!(fetch(&archive, &name(1, 6), &to).unwrap(), Fetched::Absent);
    assert_eq!(fetch(&archive, &name(2, 8), &to).unwrap(), Fetched::Absent);
    // Exactly between two segments: there is no such copy.
    place.push_history(3, "1\t0/700000\tno recovery target specified\n");
    assert!(fetch(&archive, &name(1, 6), &to).is_err());
    assert_eq!(fetch(&archive, &name(1, 7), &to).unwrap(), Fetched::Absent);
}

/// The archive has lost its end, or all of the timeline: nothing that is left in it says so.
#[test]
fn a_segment_that_a_backup_needed_is_not_proven_absent() {
    let place = Place::new();
    let archive = place.filled(&[(1, 1)]);
    let backup = backups::back_up_small(archive.cluster()).unwrap();
    let to = place.directory.path().join("RECOVERYXLOG");
    let text = |wanted| {
        let label = &backup.label;
        format!("WAL segment {} is missing from the archive, which goes on with backup {label}", name(1, wanted))
    };
    // It ends within segment 2.
    assert_eq!(fetch(&archive, &name(1, 2), &to).unwrap_err().to_string(), text(2));
    assert_eq!(fetch(&archive, &name(1, 3), &to).unwrap(), Fetched::Absent);
    assert_eq!(fetch(&archive, &name(2, 2), &to).unwrap(), Fetched::Absent);
    std::fs::remove_dir_all(place.repository.root().join("clusters/main/wal/00000001")).unwrap();
    assert_eq!(fetch(&archive, &name(1, 1), &to).unwrap_err().to_string(), text(1));
    // Without its description nobody knows where it ended, and the recovery from another is not stopped for that.
    let description = keys::backup(archive.cluster().name(), &backup.label);
    std::fs::remove_file(archive.store().describe(&description)).unwrap();
    assert_eq!(fetch(&archive, &name(1, 2), &to).unwrap(), Fetched::Absent);
}

#[test]
fn a_partial_segment_never_answers_for_a_whole_one() {
    let place = Place::new();
    let archive = place.filled(&[(1, 3)]);
    let last = SegmentName { timeline: Timeline(1), number: 5 };
    archive.push(&place.write(WalFile::Partial(last), &segment(last, IDENTIFIER, MIB, 9))).unwrap();
    let to = place.directory.path().join("RECOVERYXLOG");
    assert_eq!(fetch(&archive, &name(1, 5), &to).unwrap(), Fetched::Absent);
    assert!(fetch(&archive, &name(1, 4), &to).is_err());
}

#[test]
fn an_archive_that_cannot_be_looked_at_proves_nothing() {
    let place = Place::new();
    let archive = place.filled(&[(1, 3)]);
    let to = place.directory.path().join("RECOVERYXLOG");
    let root = place.repository.root();
    for hide in ["pghydrant.json", "clusters", "clusters/main/wal"] {
        let (path, hidden) = (root.join(hide), place.directory.path().join("hidden"));
        std::fs::rename(&path, &hidden).unwrap();
        assert!(fetch(&archive, &name(1, 4), &to).is_err(), "without {hide}");
        std::fs::rename(&hidden, &path).unwrap();
    }
    assert_eq!(fetch(&archive, &name(1, 4), &to).unwrap(), Fetched::Absent);
}

#[test]
fn no_fault_of_the_store_looks_like_the_end_of_the_wal() {
    let place = Place::new();
    drop(place.filled(&[(1, 3), (1, 4)]));
    let to = place.directory.path().join("RECOVERYXLOG");
    let attempt = |wanted: &str, fail_at, errno| {
        let _ = std::fs::remove_file(&to);
        let inner = LocalStore::new(place.repository.root());
        let store = Arc::new(FailingStore::new(inner, fail_at, true, errno));
        let fetched = Repository::with_store(place.repository.root(), Arc::clone(&store) as Arc<dyn Store>)
            .and_then(|repository| repository.cluster(&cluster()))
            .and_then(|cluster| fetch(&cluster.wal(), wanted, &to));
        (fetched, store.count())
    };
    for (wanted, expected) in [(name(1, 5), Fetched::Absent), (name(1, 4), Fetched::Delivered)] {
        let (clean, operations) = attempt(&wanted, 0, 0);
        assert_eq!(clean.unwrap(), expected);
        for fail_at in 1..=operations {
            for errno in [libc::EACCES, libc::ENOTDIR, libc::ELOOP] {
                let (failed, _) = attempt(&wanted, fail_at, errno);
                assert!(failed.is_err(), "operation {fail_at} of {wanted}, errno {errno}");
                assert!(!to.exists());
            }
        }
    }
}

#[test]
fn a_disk_that_recovers_is_asked_again() {
    let place = Place::new();
    drop(place.filled(&[(1, 3)]));
    let to = place.directory.path().join("RECOVERYXLOG");
    for fail_at in 3..6 {
        let inner = LocalStore::new(place.repository.root());
        let store: Arc<dyn Store> = Arc::new(FailingStore::new(inner, fail_at, false, libc::ESTALE));
        let repository = Repository::with_store(place.repository.root(), store).unwrap();
        let archive = repository.cluster(&cluster()).unwrap().wal();
        assert_eq!(fetch(&archive, &name(1, 3), &to).unwrap(), Fetched::Delivered);
    }
}

#[test]
fn every_operation_of_a_push_may_fail_and_the_next_push_is_well() {
    let place = Place::new();
    drop(place.filled(&[(1, 3)]));
    let mut number = 4;
    loop {
        let path = place.write_segment(1, number);
        let inner = LocalStore::new(place.repository.root());
        let store = Arc::new(FailingStore::new(inner, number - 3, false, libc::EIO));
        let failed = Repository::with_store(place.repository.root(), Arc::clone(&store) as Arc<dyn Store>)
            .and_then(|repository| WalArchive::for_push(&repository, &cluster(), &path)?.push(&path));
        if store.count() < number - 3 {
            assert_eq!(failed.unwrap(), Pushed::Stored);
            break;
        }
        assert!(failed.is_err(), "operation {}", number - 3);
        place.archive().push(&path).unwrap();
        let to = place.directory.path().join("RECOVERYXLOG");
        assert_eq!(fetch(&place.archive(), &name(1, number), &to).unwrap(), Fetched::Delivered);
        number += 1;
    }
    assert!(number > 7);
}

#[test]
fn pushes_of_one_segment_at_once_store_it_once() {
    let place = Place::new();
    let path = place.write_segment(1, 3);
    let pushed: Vec<_> = std::thread::scope(|scope| {
        let push = || WalArchive::for_push(&place.repository, &cluster(), &path)?.push(&path);
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(push)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap().unwrap()).collect()
    });
    assert_eq!(pushed.iter().filter(|pushed| **pushed == Pushed::Stored).count(), 1);
    let directory = place.object(1, "").parent().unwrap().to_owned();
    assert_eq!(std::fs::read_dir(directory).unwrap().count(), 1);
}

#[test]
fn what_a_crashed_push_left_is_swept_unless_a_push_is_under_way() {
    let place = Place::new();
    let archive = place.filled(&[(1, 3)]);
    let store = place.repository.store();
    let key = format!("{}/{}", keys::wal_timeline(&cluster(), Timeline(1)), name(1, 4));
    std::mem::forget(store.create(&key, Existing::Refuse).unwrap());
    let directory = place.object(1, "");
    let count = || std::fs::read_dir(&directory).unwrap().count();
    let pushing = Lock::shared(&**store, &cluster(), LockKind::Push).unwrap();
    drop(archive.cluster().begin_backup(Parent::Full).unwrap());
    assert_eq!(count(), 2);
    drop(pushing);
    drop(archive.cluster().begin_backup(Parent::Full).unwrap());
    assert_eq!(count(), 1);
}

#[test]
fn damage_of_an_object_is_found_by_the_fetch() {
    let place = Place::new();
    drop(place.filled(&[(1, 3), (1, 4)]));
    let to = place.directory.path().join("RECOVERYXLOG");
    let object = place.object(1, &name(1, 4));
    let whole = std::fs::read(&object).unwrap();
    let attempt = |bytes: &[u8]| {
        std::fs::write(&object, bytes).unwrap();
        // The file is open from the last time otherwise.
        let repository = Repository::open(place.repository.root()).unwrap();
        fetch(&repository.cluster(&cluster()).unwrap().wal(), &name(1, 4), &to)
    };
    for at in [0, 9, 50, 200, 1000, 4096, whole.len() - 1] {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x10;
        let error = attempt(&damaged).unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. } | Error::Unsupported { .. }), "byte {at}: {error}");
    }
    for length in [0, 100, 4096, whole.len() - 1] {
        assert!(matches!(attempt(&whole[..length]), Err(Error::Corrupt { .. })), "{length} bytes");
    }
    assert!(!to.exists());
    assert_eq!(attempt(&whole).unwrap(), Fetched::Delivered);
    // Another segment's object under this name.
    std::fs::copy(place.object(1, &name(1, 3)), &object).unwrap();
    assert!(matches!(fetch(&place.archive(), &name(1, 4), &to), Err(Error::Corrupt { .. })));
}

#[test]
fn the_reach_of_a_backup_ends_at_the_first_gap_and_follows_timelines() {
    let place = Place::new();
    let archive = place.filled(&[(1, 2), (1, 3), (1, 5), (2, 3), (2, 4), (2, 5), (3, 9)]);
    place.push_history(2, "1\t0/300800\tx\n");
    place.push_history(3, "1\t0/100000\tx\n");
    let mut info = backup_info(&archive);
    info.wal = WalRange { timeline: Timeline(1), start: Lsn(2 * MIB + 40), stop: Lsn(2 * MIB + 900) };
    let reaches = archive.reaches(&info).unwrap();
    // Timeline 3 left timeline 1 before the backup: it cannot be reached.
    let told: Vec<_> = reaches.iter().map(|reach| (reach.timeline.0, reach.end.map(|end| end.0 / MIB))).collect();
    assert_eq!(told, [(1, Some(4)), (2, Some(6))]);
    let gap = reaches[0].gap.unwrap();
    assert_eq!((gap.first.number, gap.segments), (4, 1));
    assert_eq!(reaches[1].gap, None);
    assert_eq!(archive.gaps().unwrap(), [gap]);
    info.wal.stop = Lsn(5 * MIB);
    assert_eq!(archive.reaches(&info).unwrap()[0].end, None);

    let path = archive.history(Timeline(2)).unwrap().unwrap();
    let missing = |path: &history::History, stop| {
        let missing = archive.missing_between(Lsn(2 * MIB + 40), path, stop).unwrap();
        missing.into_iter().map(|segment| (segment.timeline.0, segment.number)).collect::<Vec<_>>()
    };
    assert_eq!(missing(&path, None), []);
    assert_eq!(missing(&path, Some(Lsn(6 * MIB))), []);
    assert_eq!(missing(&path, Some(Lsn(6 * MIB + 1))), [(2, 6)]);
    assert_eq!(missing(&history::History::root(Timeline(1)), None), [(1, 4)]);
}

fn backup_info(archive: &WalArchive) -> crate::format::backup::BackupInfo {
    backups::back_up_small(archive.cluster()).unwrap()
}
