//! A delta over whatever was there is the backup, and costs what differs.

use std::os::unix::fs::symlink;

use proptest::prelude::*;

use super::*;
use crate::Error;
use crate::io::power_cut::Recording;
use crate::io::simulated::{Fault, Simulated};
use crate::page::is_zero;

fn existing(layout: &Layout) -> Existing {
    let homes = layout.homes().into_iter().map(|(home, _)| home).collect();
    Existing { homes, abandoned: Vec::new() }
}

pub(super) fn delta(
    sample: &Sample,
    layout: &Layout,
    source: Source,
    disk: Arc<dyn Disk>,
) -> Result<(Compared, Filled)> {
    delta_of(sample, layout, existing(layout), source, disk)
}

fn delta_of(
    sample: &Sample,
    layout: &Layout,
    existing: Existing,
    source: Source,
    disk: Arc<dyn Disk>,
) -> Result<(Compared, Filled)> {
    let progress = Counting::default();
    let hydration = Hydration::begin_over(sample.backup.clone(), layout, existing, &session(), None, disk)?;
    hydration.make_unstartable()?;
    hydration.clear(&progress)?;
    hydration.outline(2, &progress)?;
    let compared = hydration.compare(&fill_from(source.clone()), &progress)?;
    let filled = hydration.fill(&fill_from(source), &progress)?;
    hydration.place_last(&filled)?;
    Ok((compared, filled))
}

fn disk() -> Arc<dyn Disk> {
    Arc::new(LocalDisk::with(Engine::Plain, true))
}

/// A cluster as plain files, with rights and times of its own.
fn lay_out(tree: &Tree, layout: &Layout) {
    for (_, home) in layout.homes() {
        fs::create_dir_all(home).unwrap();
    }
    for (path, entry) in tree {
        let target = layout.target_path(path);
        match entry {
            Entry::Directory => fs::create_dir_all(target).unwrap(),
            Entry::File(content) => fs::write(target, content).unwrap(),
            Entry::Link(text) => symlink(text, target).unwrap(),
            Entry::Tablespace => symlink(target, layout.data.join(path)).unwrap(),
        }
    }
    if let Some(wal) = &layout.wal {
        symlink(wal, layout.data.join("pg_wal")).unwrap();
    }
}

/// The cluster as it was before the incremental backup: every fifth page differs.
fn earlier(compression: Compression) -> (Sample, Tree) {
    let before = sample_tree();
    (Sample::incremental(compression, &before), before)
}

#[test]
fn only_pages_that_differ_are_written_from_every_source_on_every_disk() {
    let (sample, mut before) = earlier(Compression::Lz4);
    before.remove("tablespace_map");
    let disks: [Arc<dyn Disk>; 4] = [
        Arc::new(LocalDisk::new()),
        disk(),
        Arc::new(LocalDisk::with(Engine::Plain, false).with_silent_syncs()),
        Arc::new(LocalDisk::with_short_requests(3001, false)),
    ];
    // Of the blocks that have anything in them: the others are made zero as a whole.
    let differing = |unit: usize, zeros: bool| -> u64 {
        let of_file = |(path, old): (&String, &Entry)| match (old, &sample.tree[path]) {
            (Entry::File(old), Entry::File(new)) if !is_placed_last(path) => {
                let blocks = old.chunks(SIZE.bytes()).zip(new.chunks(SIZE.bytes()));
                let blocks = blocks.filter(|(_, new)| is_zero(new) == zeros);
                let units = blocks.flat_map(|(old, new)| old.chunks(unit).zip(new.chunks(unit)));
                units
                    .filter(|(old, new)| old != new)
                    .map(|(_, new)| if unit == SIZE.bytes() { 1 } else { new.len() as u64 })
                    .sum()
            }
            _ => 0,
        };
        before.iter().map(of_file).sum()
    };
    let (changed, zeroed) = (differing(SIZE.bytes(), false), differing(SIZE.bytes(), true));
    let written_bytes = differing(PAGE_BYTES, false);
    assert!(changed > 10 && written_bytes < changed * SIZE.bytes() as u64);
    for (number, disk) in disks.into_iter().enumerate() {
        for (name, source) in [("blocks", Source::Blocks), ("mount", Source::Mount(sample.mount()))] {
            let layout = sample.target(&format!("{name}{number}"));
            lay_out(&before, &layout);
            let (compared, filled) = delta(&sample, &layout, source, Arc::clone(&disk)).unwrap();
            assert_same(&sample.tree, &layout);
            assert_eq!((compared.changed_blocks, compared.zeroed_blocks), (changed, zeroed), "{name}{number}");
            assert_eq!(compared.blocks - compared.same_blocks, changed + zeroed);
            assert_eq!((compared.written_bytes, filled.bytes), (written_bytes, 0), "{name}{number}");
            assert_eq!(compared.unreadable_blocks, 0);
        }
    }
}

#[test]
fn zeros_are_made_where_there_were_none_and_kept_where_there_were() {
    let sample = Sample::new(Compression::Lz4, sample_tree());
    let layout = sample.target("target");
    lay_out(&sample.tree, &layout);
    fs::write(layout.target_path("base/5/zeros"), vec![7; 2 * SIZE.bytes()]).unwrap();
    let (compared, filled) = delta(&sample, &layout, Source::Blocks, disk()).unwrap();
    assert_same(&sample.tree, &layout);
    assert_eq!((compared.zeroed_blocks, filled.blocks), (2, 0));
}

#[test]
fn what_the_backup_has_not_goes_and_nothing_is_done_through_a_link() {
    let sample = Sample::new(Compression::Lz4, sample_tree());
    let layout = sample.target("target");
    let outside = directory();
    let kept = |name: &str| outside.path().join(name);
    fs::create_dir(kept("directory")).unwrap();
    for name in ["directory/file", "file", "relation"] {
        fs::write(kept(name), b"kept").unwrap();
    }
    lay_out(&sample.tree, &layout);
    let at = |path: &str| layout.data.join(path);
    fs::create_dir_all(at("junk/deep/er")).unwrap();
    fs::write(at("junk/deep/er/file"), b"x").unwrap();
    symlink(kept("directory"), at("junk/link")).unwrap();
    symlink(kept("directory"), at("base/6")).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, at("pipe"), 0o600.into()).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(at(".s")).ok();
    for name in ["postmaster.pid", "recovery.signal", "standby.signal", "backup_label.old", "base/5/99999"] {
        fs::write(at(name), b"x").unwrap();
    }
    // A directory and a file where the backup has the other, and a link where it has either.
    fs::remove_file(at("base/5/1259")).unwrap();
    fs::create_dir(at("base/5/1259")).unwrap();
    fs::remove_file(at("base/5/2600")).unwrap();
    symlink(kept("file"), at("base/5/2600")).unwrap();
    // Shared with another cluster, as pg_upgrade --link leaves it.
    fs::remove_file(at("base/5/tail")).unwrap();
    fs::hard_link(kept("relation"), at("base/5/tail")).unwrap();
    fs::remove_dir_all(at("global")).unwrap();
    symlink(kept("directory"), at("link")).unwrap();
    fs::write(at("global"), b"x").unwrap();
    fs::write(layout.wal.as_ref().unwrap().join("000000010000000000000001"), b"x").unwrap();

    delta(&sample, &layout, Source::Blocks, disk()).unwrap();
    assert_same(&sample.tree, &layout);
    for name in ["directory/file", "file", "relation"] {
        assert_eq!(fs::read(kept(name)).unwrap(), b"kept", "{name}");
    }
}

#[test]
fn beside_a_tablespace_and_the_wal_others_keep_what_is_theirs() {
    let sample = Sample::new(Compression::Lz4, sample_tree());
    let layout = sample.target("target");
    lay_out(&sample.tree, &layout);
    let (fast, wal) = (layout.tablespaces[&OID].clone(), layout.wal.clone().unwrap());
    let gone = sample.directory.path().join("gone");
    let abandoned = gone.join("PG_15_202209061");
    for (path, stays) in [
        (fast.join("PG_16_202307071/5/1"), true),
        (fast.join("notes"), true),
        (fast.join("PG_15_202209061/5/1"), false),
        (wal.join("lost+found/x"), true),
        (wal.join("somebody's"), true),
        (wal.join("archive_status/000000010000000000000001.done"), false),
        (wal.join("xlogtemp.1"), false),
        (abandoned.join("5/1"), false),
        (gone.join("PG_14_202107181/5/1"), true),
        (layout.data.join("pghydrant.wal-1/000000010000000000000001"), true),
    ] {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, b"x").unwrap();
        let existing = Existing { abandoned: vec![abandoned.clone()], ..existing(&layout) };
        delta_of(&sample, &layout, existing, Source::Blocks, disk()).unwrap();
        assert_eq!(path.exists(), stays, "{}", path.display());
        end(&layout, &session(), &*disk()).unwrap();
    }
    assert!(!abandoned.exists());
}

#[test]
fn what_a_delta_would_find_is_counted_and_not_touched() {
    let sample = Sample::new(Compression::Lz4, sample_tree());
    let layout = sample.target("target");
    lay_out(&sample.tree, &layout);
    fs::create_dir(layout.data.join("junk")).unwrap();
    fs::write(layout.data.join("junk/file"), vec![1; 1 << 20]).unwrap();
    let found = existing::look(&sample.backup, &layout, &*disk()).unwrap();
    // With the label, the map of tablespaces and pg_control, which come in their own way.
    assert_eq!(found[&Home::Data].removed, 5);
    let content: u64 =
        sample.tree.values().map(|entry| if let Entry::File(content) = entry { content.len() as u64 } else { 0 }).sum();
    let bytes: u64 = found.values().map(|held| held.bytes).sum();
    assert!(bytes > content && bytes < content + (2 << 20), "{bytes}");
    assert!(layout.data.join("junk/file").exists());
}

#[test]
fn no_block_is_written_before_the_others_are_compared_and_nothing_goes_while_it_can_start() {
    let sample = Sample::new(Compression::Lz4, sample_tree());
    let layout = sample.target("target");
    lay_out(&sample.tree, &layout);
    let begin = || {
        let backup = sample.backup.clone();
        Hydration::begin_over(backup, &layout, existing(&layout), &session(), None, disk()).unwrap()
    };
    let (hydration, progress) = (begin(), Counting::default());
    assert!(matches!(hydration.clear(&progress), Err(Error::Refused(_))));
    hydration.make_unstartable().unwrap();
    hydration.clear(&progress).unwrap();
    hydration.outline(1, &progress).unwrap();
    assert!(matches!(hydration.fill(&fill_from(Source::Blocks), &progress), Err(Error::Refused(_))));
    // A session goes on as what it is.
    let plain = Hydration::begin(sample.backup.clone(), &layout, &session(), None, disk());
    assert!(matches!(plain, Err(Error::Refused(_))));
    // What the map has is not compared again.
    hydration.compare(&fill_from(Source::Blocks), &progress).unwrap();
    hydration.fill(&fill_from(Source::Blocks), &progress).unwrap();
    let again = begin();
    again.outline(1, &progress).unwrap();
    assert_eq!(again.compare(&fill_from(Source::Blocks), &progress).unwrap(), Compared::default());
}

#[test]
fn a_delta_is_never_taken_back_by_removing_the_directory() {
    let (sample, before) = earlier(Compression::Lz4);
    let layout = sample.target("target");
    lay_out(&before, &layout);
    let names = || -> u64 { layout.homes().iter().map(|(_, home)| count_names(home)).sum() };
    let there = names();
    let begin = || {
        let backup = sample.backup.clone();
        Hydration::begin_over(backup, &layout, existing(&layout), &session(), None, disk()).unwrap()
    };
    begin();
    assert_eq!(existing::delta_in(&layout.data, &*disk()).unwrap(), Some(session()));
    assert!(matches!(remove_all(&layout, &session(), &*disk()), Err(Error::Refused(_))));
    withdraw(&layout, &session(), &*disk()).unwrap();
    assert_eq!(names(), there);
    assert!(is_startable(&layout) && !layout.data.join(SESSION_DIRECTORY).exists());

    let hydration = begin();
    hydration.make_unstartable().unwrap();
    hydration.clear(&Counting::default()).unwrap();
    drop(hydration);
    leave_unstartable(&layout, &session(), &*disk()).unwrap();
    assert!(!is_startable(&layout) && !layout.data.join(SESSION_DIRECTORY).exists());
    let whose = unfinished_in(&layout.data, &*disk()).unwrap();
    assert_eq!(whose, Some(sample.backup.info.server.system_identifier));
    assert!(remove_all(&layout, &session(), &*disk()).is_err());
    delta(&sample, &layout, Source::Blocks, disk()).unwrap();
    assert_same(&sample.tree, &layout);
    assert_eq!(unfinished_in(&layout.data, &*disk()).unwrap(), None);
}

/// What may have become of a file, or what may be there without the backup having it.
#[derive(Clone, Debug)]
enum Change {
    Gone,
    Cut(usize),
    Longer(usize),
    Flipped(usize),
    Zeroed,
    Garbage,
    Directory,
    Shared,
}

fn any_change() -> impl Strategy<Value = Change> {
    prop_oneof![
        Just(Change::Gone),
        (0usize..300_000).prop_map(Change::Cut),
        (1usize..300_000).prop_map(Change::Longer),
        (0usize..3_000_000).prop_map(Change::Flipped),
        Just(Change::Zeroed),
        Just(Change::Garbage),
        Just(Change::Directory),
        Just(Change::Shared),
    ]
}

fn change(path: &Path, change: &Change, elsewhere: &Path) {
    let mut content = fs::read(path).unwrap();
    match change {
        Change::Gone | Change::Directory => fs::remove_file(path).unwrap(),
        Change::Shared => fs::hard_link(path, elsewhere).unwrap(),
        _ => {}
    }
    match change {
        Change::Gone | Change::Shared => return,
        Change::Directory => return fs::create_dir(path).unwrap(),
        Change::Cut(bytes) => content.truncate(*bytes),
        Change::Longer(bytes) => content.extend(vec![3; *bytes]),
        Change::Flipped(at) => {
            let bytes = content.len().max(1);
            if let Some(byte) = content.get_mut(at % bytes) {
                *byte ^= 0x10;
            }
        }
        Change::Zeroed => content.fill(0),
        Change::Garbage => content.fill(0xA5),
    }
    fs::write(path, content).unwrap();
}

#[test]
fn a_directory_in_the_place_of_pg_control_goes_as_well() {
    let sample = Sample::new(Compression::None, sample_tree());
    let layout = sample.target("target");
    lay_out(&sample.tree, &layout);
    let control = layout.data.join("global/pg_control");
    fs::remove_file(&control).unwrap();
    fs::create_dir_all(control.join("below")).unwrap();
    delta(&sample, &layout, Source::Blocks, disk()).unwrap();
    assert_same(&sample.tree, &layout);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_delta_over_any_damage_is_the_backup(
        changes in prop::collection::vec((0usize..48, any_change()), 0..20),
        incremental: bool,
        from_mount: bool,
        ring: bool,
    ) {
        let sample = if incremental {
            Sample::incremental(Compression::Lz4, &sample_tree())
        } else {
            Sample::new(Compression::None, sample_tree())
        };
        let layout = sample.target("target");
        lay_out(&sample.tree, &layout);
        let files: Vec<_> = sample.tree.iter().filter(|(_, entry)| matches!(entry, Entry::File(_))).collect();
        let mut shared = Vec::new();
        for (number, (file, what)) in changes.iter().enumerate() {
            let path = layout.target_path(files[file % files.len()].0);
            if path.is_file() {
                let elsewhere = sample.directory.path().join(format!("shared{number}"));
                change(&path, what, &elsewhere);
                if let Change::Shared = what {
                    fs::write(&path, vec![9; 70_000]).unwrap();
                    shared.push(elsewhere);
                }
            }
        }
        let shared: Vec<_> = shared.iter().map(|path| (path, fs::read(path).unwrap())).collect();
        let source = if from_mount { Source::Mount(sample.mount()) } else { Source::Blocks };
        let disk: Arc<dyn Disk> = if ring { Arc::new(LocalDisk::new()) } else { disk() };
        delta(&sample, &layout, source, disk).unwrap();
        assert_same(&sample.tree, &layout);
        for (path, content) in shared {
            prop_assert_eq!(fs::read(path).unwrap(), content);
        }
    }
}

/// Few files, each with something to do: a block to write, one to zero, one that is right.
fn small() -> (Sample, Tree) {
    let mut tree = skeleton();
    tree.insert("base/5/1259".to_owned(), Entry::File(pages(23, 1)));
    tree.insert("base/5/zeros".to_owned(), Entry::File(vec![0; 100_000]));
    tree.insert("base/5/same".to_owned(), Entry::File(pages(2, 5)[..10_000].to_vec()));
    tree.insert(format!("pg_tblspc/{OID}"), Entry::Tablespace);
    tree.insert(format!("pg_tblspc/{OID}/PG_15_1"), Entry::Directory);
    tree.insert(format!("pg_tblspc/{OID}/PG_15_1/16500"), Entry::File(pages(3, 4)));
    let mut before = tree.clone();
    let Some(Entry::File(content)) = before.get_mut("base/5/1259") else { unreachable!() };
    content[70_000] ^= 1;
    before.insert("base/5/zeros".to_owned(), Entry::File(vec![5; 40_000]));
    before.insert("base/5/99999".to_owned(), Entry::File(pages(1, 1)));
    before.insert("postmaster.opts".to_owned(), Entry::File(b"x".to_vec()));
    (Sample::new(Compression::Lz4, tree), before)
}

/// While it can be started it is the cluster as it was, or the backup.
fn assert_old_or_new(sample: &Sample, before: &Tree, layout: &Layout) {
    if !is_startable(layout) {
        return;
    }
    let is = |tree: &Tree| {
        tree.iter().all(|(path, entry)| match entry {
            Entry::File(content) => fs::read(layout.target_path(path)).is_ok_and(|found| found == *content),
            _ => true,
        })
    };
    // Only the backup has this one, or lacks it.
    let is_new = !layout.target_path("base/5/99999").exists();
    assert!(if is_new { is(&sample.tree) } else { is(before) }, "neither the one nor the other, new: {is_new}");
}

#[test]
fn each_operation_of_a_delta_may_fail_once_or_for_good() {
    let (sample, before) = small();
    let counting = Arc::new(Simulated::new(disk(), None));
    let layout = sample.target("clean");
    lay_out(&before, &layout);
    delta(&sample, &layout, Source::Blocks, Arc::<Simulated>::clone(&counting)).unwrap();
    let operations = counting.operations();
    assert!(operations > 50, "{operations} operations");
    for (at, forever) in (0..operations).map(|at| (at, at % 3 == 0)) {
        let layout = sample.target(&format!("{at}"));
        lay_out(&before, &layout);
        let fault = Fault { at, forever, errno: libc::EIO };
        let faulty = Arc::new(Simulated::new(disk(), Some(fault)));
        match delta(&sample, &layout, Source::Blocks, faulty) {
            // A block that cannot be read is written anew, and two workers do not count the same each time.
            Ok(_) => assert_same(&sample.tree, &layout),
            Err(failure) => {
                assert!(failure.to_string().contains("cannot "), "{failure}");
                assert_old_or_new(&sample, &before, &layout);
                delta(&sample, &layout, Source::Blocks, disk())
                    .unwrap_or_else(|again| panic!("after operation {at} ({failure}): {again}"));
                assert_same(&sample.tree, &layout);
            }
        }
        fs::remove_dir_all(layout.data.parent().unwrap()).unwrap();
    }
}

/// An earlier backup restored, then a delta to the later one, all of it recorded; and how many events the first took.
fn record(sample: &Sample, before: &Tree) -> (Arc<Recording>, usize) {
    let (disk, recording) = Simulated::recording(disk(), sample.directory.path());
    let disk: Arc<dyn Disk> = Arc::new(disk);
    let layout = sample.target("target");
    let old = Sample::new(Compression::Lz4, before.clone());
    hydrate(&old, &layout, Source::Blocks, Arc::clone(&disk)).unwrap();
    end(&layout, &session(), &*disk).unwrap();
    let first = recording.len();
    delta(sample, &layout, Source::Blocks, disk).unwrap();
    (recording, first)
}

#[test]
fn the_power_may_go_at_any_moment_of_a_delta() {
    let (sample, before) = small();
    let (recording, first) = record(&sample, &before);
    assert!(recording.len() > first + 40, "{} events", recording.len() - first);
    for moment in first..=recording.len() {
        let after = directory();
        recording.image(moment, moment as u64 * 7919 + 1, after.path()).unwrap();
        let layout = layout_below(&after.path().join("target"));
        // The links of an image lead to where it was recorded.
        for (link, target) in [
            ("pg_wal".to_owned(), layout.wal.clone().unwrap()),
            (format!("pg_tblspc/{OID}"), layout.tablespaces[&OID].clone()),
        ] {
            let link = layout.data.join(link);
            if fs::remove_file(&link).is_ok() {
                symlink(target, link).unwrap();
            }
        }
        assert_old_or_new(&sample, &before, &layout);
        crashes::assert_map_is_true(&sample, &layout);
        delta(&sample, &layout, Source::Blocks, disk()).unwrap_or_else(|again| panic!("after event {moment}: {again}"));
        assert_same(&sample.tree, &layout);
    }
}
