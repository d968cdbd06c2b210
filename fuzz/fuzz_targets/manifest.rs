//! Chunks of a manifest and the readable files: what a parser takes, it writes back as it was.

#![no_main]

use engine::checksum::Hash;
use engine::format::backup::BackupInfo;
use engine::format::manifest::{Group, IndexChunk, LEAF_RECORDS, Root, leaf_from_bytes, leaf_to_bytes, path};
use engine::format::repository::{ClusterInfo, RepositoryInfo};
use engine::format::unfinished::UnfinishedInfo;
use engine::units::BlockSize;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    // One input for all chunks: each has its own magic, which stays within reach of the fuzzer as the first byte.
    let Some((kind, body)) = data.split_first() else { return };
    let chunk = [b"pgh".as_slice(), &[b"LGIR_"[usize::from(kind % 5)], 1, 0], body].concat();
    match kind % 5 {
        0 => {
            if let Ok(records) = leaf_from_bytes(&chunk) {
                assert_eq!(leaf_to_bytes(&records), chunk);
            }
        }
        1 => {
            if let Ok(group) = Group::from_bytes(&chunk) {
                assert_eq!(group.to_bytes(), chunk);
                let last = group.leaves().len();
                assert_eq!((0..last).map(|leaf| group.leaf_records(leaf)).sum::<u64>(), group.blocks());
                assert!((0..last).all(|leaf| (1..=LEAF_RECORDS).contains(&group.leaf_records(leaf))));
                assert!(group.files().iter().all(|file| path::check(&file.path).is_ok()));
                assert!(group.block_size() >= BlockSize::MIN);
            }
        }
        2 => {
            if let Ok(index) = IndexChunk::from_bytes(&chunk) {
                assert_eq!(index.to_bytes(), chunk);
                assert_eq!(index.find_leaf(index.leaves()), None);
                for (place, entry) in index.entries().iter().enumerate() {
                    assert_eq!(index.find_path(&entry.first_path), Some(place));
                }
            }
        }
        3 => {
            if let Ok(root) = Root::from_bytes(&chunk) {
                assert_eq!(root.to_bytes().as_ref(), Ok(&chunk));
            }
        }
        _ => {
            // With the checksum that the fuzzer could not guess, and without.
            for json in [body, &sealed(body)] {
                if let Ok(info) = RepositoryInfo::from_json(json) {
                    assert_eq!(info.to_json().and_then(|json| RepositoryInfo::from_json(&json)), Ok(info));
                }
                if let Ok(info) = BackupInfo::from_json(json) {
                    assert_eq!(info.to_json().and_then(|json| BackupInfo::from_json(&json)), Ok(info));
                }
                let _ = (ClusterInfo::from_json(json), UnfinishedInfo::from_json(json));
            }
        }
    }
});

/// A readable file with the line of its checksum.
fn sealed(before: &[u8]) -> Vec<u8> {
    let line = format!("  \"checksum\": \"{}\"\n}}\n", Hash::of(before));
    [before, line.as_bytes()].concat()
}
