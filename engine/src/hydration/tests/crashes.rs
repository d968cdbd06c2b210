//! The power goes at any moment, and the disk keeps only what it must.

use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use super::*;
use crate::format::block::Content;
use crate::io::simulated::Simulated;

fn tree() -> Tree {
    let mut tree = skeleton();
    tree.insert("base/5/1259".to_owned(), Entry::File(pages(37, 1)));
    tree.insert("base/5/2600".to_owned(), Entry::File(pages(9, 8)[..70_001].to_vec()));
    tree.insert("base/5/zeros".to_owned(), Entry::File(vec![0; 70_000]));
    tree.insert(format!("pg_tblspc/{OID}"), Entry::Tablespace);
    tree.insert(format!("pg_tblspc/{OID}/16500"), Entry::File(pages(3, 4)));
    tree
}

/// A bit that is set stands for bytes that are there.
pub(super) fn assert_map_is_true(sample: &Sample, layout: &Layout) {
    let path = layout.data.join(SESSION_DIRECTORY).join(MAP);
    let Ok(bytes) = fs::read(path) else { return };
    let parsed = Map::parse(&bytes).expect("a map that has its name is whole");
    let is_set = |block: u64| parsed.words[(block / 64) as usize] & 1 << (block % 64) != 0;
    for file in sample.backup.manifest.files() {
        let file = file.unwrap();
        let Some(Entry::File(content)) = sample.tree.get(&file.path) else { continue };
        for index in 0..SIZE.blocks_of(file.bytes) {
            let block = file.first_block.0 + index;
            if !is_set(block) {
                continue;
            }
            let start = index as usize * SIZE.bytes();
            let end = content.len().min(start + SIZE.bytes());
            let found = fs::read(layout.target_path(&file.path)).expect("a file with a block that is present");
            assert_eq!(found.len(), content.len(), "{}", file.path);
            assert!(found[start..end] == content[start..end], "block {index} of {}", file.path);
        }
    }
}

fn survives(sample: &Sample, recording: &crate::io::power_cut::Recording, moment: usize, seed: u64) {
    let after = directory();
    recording.image(moment, seed, after.path()).unwrap();
    let layout = layout_below(&after.path().join("target"));
    assert_map_is_true(sample, &layout);
    if is_startable(&layout) {
        assert_whole(sample, &layout);
    }
    let disk: Arc<dyn Disk> = Arc::new(LocalDisk::with(Engine::Plain, true));
    hydrate(sample, &layout, Source::Blocks, disk).unwrap();
    assert_same(&sample.tree, &layout);
}

/// All contents are there; attributes are not recorded.
fn assert_whole(sample: &Sample, layout: &Layout) {
    for (path, entry) in &sample.tree {
        if let Entry::File(content) = entry
            && !is_left_out(path)
        {
            assert!(fs::read(layout.target_path(path)).unwrap() == *content, "{path}");
        }
    }
}

/// A copy of which everything is recorded, the restart in its middle included.
fn record(sample: &Sample, source: Source) -> Arc<crate::io::power_cut::Recording> {
    let inner: Arc<dyn Disk> = Arc::new(LocalDisk::with(Engine::Plain, true));
    let (disk, recording) = Simulated::recording(inner, sample.directory.path());
    let disk: Arc<dyn Disk> = Arc::new(disk.with_sharing());
    let layout = sample.target("target");
    hydrate(sample, &layout, source, Arc::clone(&disk)).unwrap();
    recording
}

#[test]
fn at_every_moment_of_a_copy() {
    let sample = Sample::new(Compression::Lz4, tree());
    let stored = |record: crate::format::block::BlockRecord| record.content != Content::Zero;
    assert!((0..5).any(|block| sample.backup.manifest.block(BlockNumber(block)).is_ok_and(stored)));
    survives_each(&sample, &record(&sample, Source::Blocks));
}

#[test]
fn at_every_moment_of_sharing_with_the_packs() {
    let sample = Sample::new(Compression::None, tree());
    survives_each(&sample, &record(&sample, Source::Reflink { trusted: false }));
}

fn survives_each(sample: &Sample, recording: &crate::io::power_cut::Recording) {
    let moments = recording.len();
    assert!(moments > 40, "{moments} events");
    for moment in 0..=moments {
        survives(sample, recording, moment, moment as u64 * 7919 + 1);
    }
}

#[test]
fn at_any_moment_with_any_luck() {
    let sample = Sample::new(Compression::None, tree());
    let recording = record(&sample, Source::Blocks);
    // Not the macro: the sample is one for all cases, and its directory goes with it.
    TestRunner::new(ProptestConfig::with_cases(40))
        .run(&(0..=recording.len(), any::<u64>()), |(moment, seed)| {
            survives(&sample, &recording, moment, seed);
            Ok(())
        })
        .unwrap();
}
