//! Files that share blocks with the packs: the same files, proven before they count.

use super::crashes::assert_map_is_true;
use super::delta::delta;
use super::*;
use crate::Error;
use crate::io::simulated::Simulated;

const PROVEN: Source = Source::Reflink { trusted: false };
const TRUSTED: Source = Source::Reflink { trusted: true };

/// Shares whatever the file system.
fn disk() -> Arc<dyn Disk> {
    Arc::new(Simulated::new(Arc::new(LocalDisk::new()), None).with_sharing())
}

/// Bytes of files, the copier's, that are whole 4 KiB.
fn whole_bytes(content: &[u8]) -> u64 {
    let blocks = content.chunks(SIZE.bytes()).filter(|block| block.iter().any(|byte| *byte != 0));
    blocks.map(|block| block.len() as u64).filter(|bytes| bytes.is_multiple_of(4096)).sum()
}

#[test]
fn shared_files_are_the_same_and_only_what_cannot_be_shared_is_copied() {
    let full = Sample::new(Compression::None, sample_tree());
    let whole = full.tree.iter().map(|(path, entry)| match entry {
        Entry::File(content) if !is_left_out(path) && !is_placed_last(path) => whole_bytes(content),
        _ => 0,
    });
    let whole: u64 = whole.sum();
    let samples = [
        (full, Some(whole)),
        (Sample::incremental(Compression::None, &sample_tree()), None),
        (Sample::new(Compression::Lz4, sample_tree()), None),
    ];
    for (sample, expected) in samples {
        for (name, source) in [("proven", PROVEN), ("trusted", TRUSTED)] {
            let layout = sample.target(name);
            let progress = Counting::default();
            let filled = hydrate_with(&sample, &layout, source, disk(), &progress).unwrap();
            assert_same(&sample.tree, &layout);
            assert!(filled.shared_bytes <= filled.bytes && filled.unshared.is_none(), "{filled:?}");
            if let Some(expected) = expected {
                assert_eq!(filled.shared_bytes, expected);
            }
            assert!(filled.zero_blocks > 0);
            assert_map_is_true(&sample, &layout);
        }
    }
}

/// Whoever mends a pack while its blocks are hashed changes the pack, not what files have of it already.
#[test]
fn what_is_proven_is_what_the_files_have() {
    let sample = Sample::new(Compression::None, sample_tree());
    let layout = sample.target("target");
    let disk = Arc::new(Simulated::new(Arc::new(LocalDisk::new()), None).with_sharing_of_what_was());
    let filled = hydrate(&sample, &layout, PROVEN, disk).unwrap();
    assert_same(&sample.tree, &layout);
    assert!(filled.shared_bytes > 0 && filled.shared_bytes < filled.bytes, "{filled:?}");
    assert_map_is_true(&sample, &layout);
}

#[test]
fn where_the_file_system_refuses_blocks_are_copied() {
    let sample = Sample::new(Compression::None, sample_tree());
    let layout = sample.target("target");
    let filled = hydrate(&sample, &layout, PROVEN, Arc::new(LocalDisk::new())).unwrap();
    assert_same(&sample.tree, &layout);
    // The build may lie on a file system that can.
    assert_eq!(filled.unshared.is_some(), filled.shared_bytes == 0, "{filled:?}");
}

#[test]
fn where_files_refuse_in_part_what_is_refused_is_copied_and_nothing_else() {
    let sample = Sample::new(Compression::None, sample_tree());
    for (name, source) in [("proven", PROVEN), ("trusted", TRUSTED)] {
        let layout = sample.target(name);
        let disk = Arc::new(Simulated::new(Arc::new(LocalDisk::new()), None).with_sharing_with_half());
        let filled = hydrate(&sample, &layout, source, disk).unwrap();
        assert_same(&sample.tree, &layout);
        let is_shared = |path: &str| !path.ends_with(['1', '3', '5', '7', '9']);
        let shared = sample.tree.iter().map(|(path, entry)| match entry {
            Entry::File(content) if is_shared(path) && !is_left_out(path) && !is_placed_last(path) => {
                whole_bytes(content)
            }
            _ => 0,
        });
        assert_eq!(filled.shared_bytes, shared.sum::<u64>(), "{name}");
        assert_eq!(filled.unshared, Some("it is refused on purpose"));
        assert_map_is_true(&sample, &layout);
    }
}

#[test]
fn damage_in_a_pack_is_found_before_a_server_can_start_unless_the_repository_is_trusted() {
    let sample = Sample::new(Compression::None, sample_tree());
    let packs = sample.directory.path().join("repository/clusters/main/packs");
    let pack = fs::read_dir(&packs).unwrap().next().unwrap().unwrap().path();
    let good = fs::read(&pack).unwrap();
    let mut bad = good.clone();
    bad[good.len() / 2] ^= 1;
    fs::write(&pack, &bad).unwrap();
    let layout = sample.target("target");
    let failure = hydrate(&sample, &layout, PROVEN, disk()).unwrap_err();
    let Error::Corrupt { path, .. } = &failure else { panic!("{failure}") };
    assert_eq!(*path, pack);
    assert!(!is_startable(&layout));
    assert_map_is_true(&sample, &layout);
    let believed = sample.target("believed");
    hydrate(&sample, &believed, TRUSTED, disk()).unwrap();
    assert!(is_startable(&believed));

    fs::write(&pack, &good).unwrap();
    let resumed = hydrate(&sample, &layout, PROVEN, disk()).unwrap();
    assert_same(&sample.tree, &layout);
    assert!(resumed.shared_bytes > 0);
}

#[test]
fn a_delta_writes_pages_into_files_that_share_blocks() {
    let sample = Sample::new(Compression::None, sample_tree());
    let layout = sample.target("target");
    hydrate(&sample, &layout, TRUSTED, disk()).unwrap();
    let path = layout.target_path("base/5/2600");
    let mut content = fs::read(&path).unwrap();
    content[5 * SIZE.bytes() + 17] ^= 1;
    fs::write(&path, &content).unwrap();
    end(&layout, &session(), &LocalDisk::new()).unwrap();
    let (compared, filled) = delta(&sample, &layout, PROVEN, disk()).unwrap();
    assert_eq!((compared.changed_blocks, compared.written_bytes), (1, PAGE_BYTES as u64));
    assert_eq!((filled.blocks, filled.shared_bytes), (0, 0));
    assert_same(&sample.tree, &layout);
}
