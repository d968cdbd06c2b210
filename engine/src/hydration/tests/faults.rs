//! Every operation fails once: nothing that a server could start from is left, and the next run completes.

use super::*;
use crate::io::simulated::{Fault, Simulated};

fn small_tree() -> Tree {
    let mut tree = skeleton();
    tree.insert("base/5/1259".to_owned(), Entry::File(pages(23, 1)));
    tree.insert("base/5/tail".to_owned(), Entry::File(pages(2, 1)[..10_000].to_vec()));
    tree.insert("base/5/zeros".to_owned(), Entry::File(vec![0; 100_000]));
    tree.insert("log".to_owned(), Entry::Link("/somewhere/else".to_owned()));
    tree.insert(format!("pg_tblspc/{OID}"), Entry::Tablespace);
    tree.insert(format!("pg_tblspc/{OID}/16500"), Entry::File(pages(3, 4)));
    tree
}

fn disk() -> Arc<dyn Disk> {
    Arc::new(LocalDisk::with(Engine::Plain, true))
}

fn faulty(fault: Fault) -> Arc<Simulated> {
    Arc::new(Simulated::new(disk(), Some(fault)).with_sharing())
}

/// Fails each operation of a run in turn, then lets a second run complete.
fn fail_each(sample: &Sample, source: &Source, forever: bool, errno: i32) {
    let counting = Arc::new(Simulated::new(disk(), None).with_sharing());
    let layout = sample.target("clean");
    hydrate(sample, &layout, source.clone(), Arc::<Simulated>::clone(&counting)).unwrap();
    let operations = counting.operations();
    assert!(operations > 50, "{operations} operations");
    for at in 0..operations {
        let layout = sample.target(&format!("{at}"));
        let failed = hydrate(sample, &layout, source.clone(), faulty(Fault { at, forever, errno }));
        let Err(failure) = failed else {
            // The last ones make durable what is there already, and two workers do not count the same each time.
            assert_same(&sample.tree, &layout);
            continue;
        };
        if is_startable(&layout) {
            assert_same(&sample.tree, &layout);
        }
        let text = failure.to_string();
        assert!(text.contains("cannot ") || text.contains("no space"), "{text}");
        hydrate(sample, &layout, source.clone(), disk())
            .unwrap_or_else(|again| panic!("after operation {at} ({failure}): {again}"));
        assert_same(&sample.tree, &layout);
        fs::remove_dir_all(layout.data.parent().unwrap()).unwrap();
    }
}

#[test]
fn each_operation_from_blocks() {
    fail_each(&Sample::incremental(Compression::Lz4, &small_tree()), &Source::Blocks, false, libc::EIO);
}

#[test]
fn each_operation_from_a_mount_and_all_after_it() {
    let sample = Sample::new(Compression::None, small_tree());
    fail_each(&sample, &Source::Mount(sample.mount()), true, libc::ENOSPC);
}

#[test]
fn each_operation_of_sharing_with_the_packs() {
    let sample = Sample::new(Compression::None, small_tree());
    fail_each(&sample, &Source::Reflink { trusted: false }, false, libc::EIO);
}

#[test]
fn each_operation_of_taking_back() {
    let sample = Sample::new(Compression::Lz4, small_tree());
    let layout = sample.target("target");
    for at in 0.. {
        hydrate(&sample, &layout, Source::Blocks, disk()).unwrap();
        let removed = remove_all(&layout, &session(), &*faulty(Fault { at, forever: true, errno: libc::EIO }));
        remove_all(&layout, &session(), &*disk()).unwrap();
        let base = layout.data.parent().unwrap();
        if removed.is_ok() {
            assert!(!base.exists(), "nothing is left");
            return;
        }
        // A failure among the last steps may leave directories that are empty, and no more.
        let left = count_names(base);
        assert!(left <= 3, "operation {at}: {left} names are left");
        let _ = fs::remove_dir_all(base);
    }
}

#[test]
fn a_cancelled_copy_goes_on_later() {
    struct Cancel(Counting, u64);
    impl Progress for Cancel {
        fn advance(&self, bytes: u64) {
            self.0.advance(bytes);
        }
        fn waited(&self, stage: crate::progress::Stage, nanoseconds: u64) {
            self.0.waited(stage, nanoseconds);
        }
        fn cancelled(&self) -> bool {
            self.0.bytes() >= self.1
        }
    }
    let sample = Sample::new(Compression::Lz4, sample_tree());
    for limit in [0, 1, 200_000] {
        let layout = sample.target(&format!("{limit}"));
        let cancelled = hydrate_with(&sample, &layout, Source::Blocks, disk(), &Cancel(Counting::default(), limit));
        assert!(matches!(cancelled, Err(Error::Cancelled)), "{limit}");
        assert!(!is_startable(&layout));
        hydrate(&sample, &layout, Source::Blocks, disk()).unwrap();
        assert_same(&sample.tree, &layout);
    }
}

/// Linux before 5.8.
#[test]
fn where_a_sync_of_the_file_system_tells_no_losses_each_file_is_synced() {
    let sample = Sample::new(Compression::Lz4, small_tree());
    let syncs = |name: &str, disk: LocalDisk| {
        let (disk, recording) = Simulated::recording(Arc::new(disk), sample.directory.path());
        hydrate(&sample, &sample.target(name), Source::Blocks, Arc::new(disk)).unwrap();
        recording.file_syncs()
    };
    let through_the_cache = LocalDisk::with(Engine::Plain, false);
    let before = syncs("telling", through_the_cache);
    assert!(syncs("silent", through_the_cache.with_silent_syncs()) >= before + 3);
    // Only the end of one file goes through the cache here.
    assert!(syncs("direct", LocalDisk::with(Engine::Plain, true).with_silent_syncs()) < before + 3);
}
