//! Where groups begin.
//!
//! A group begins where a file's *path* says so: its hash decides, one path in [`GROUP_FILES_MEAN`] on average. A
//! file that appears or vanishes thus moves no boundary but its own, and all other groups stay what they were in
//! the parent. The limits below only keep a group from growing without bound; after one of them the next path-made
//! boundary is the same again.

use std::ops::Range;

use crate::checksum::Hash;

/// One path in so many begins a group. A power of two: the hash's low bits decide.
pub const GROUP_FILES_MEAN: usize = 64;
/// A group has no more files.
pub const GROUP_FILES_MAX: usize = 512;
/// A group has no more blocks, unless one file alone has: four leaves. What a worker of a backup takes at once.
pub const GROUP_BLOCKS_MAX: u64 = 4096;
/// A file of so many blocks is a group by itself: 32 MiB at 128 KiB a block.
pub const LARGE_FILE_BLOCKS: u64 = 256;

const _: () = assert!(GROUP_FILES_MEAN.is_power_of_two() && GROUP_FILES_MEAN <= 256);
const _: () = assert!(LARGE_FILE_BLOCKS <= GROUP_BLOCKS_MAX);

/// Decides, file by file in path order, where a group begins.
#[derive(Clone, Debug, Default)]
pub struct GroupCutter {
    files: usize,
    blocks: u64,
    large: bool,
}

impl GroupCutter {
    /// A cutter before the first file.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether the next file, of `blocks` blocks, begins a group.
    pub fn begins(&mut self, path: &str, blocks: u64) -> bool {
        let large = blocks >= LARGE_FILE_BLOCKS;
        let begins = self.files == 0
            || large
            || self.large
            || self.files >= GROUP_FILES_MAX
            || self.blocks.saturating_add(blocks) > GROUP_BLOCKS_MAX
            || path_begins_group(path);
        if begins {
            *self = Self::new();
        }
        self.files += 1;
        self.blocks = self.blocks.saturating_add(blocks);
        self.large = large;
        begins
    }
}

/// Whether a path begins a group wherever it stands.
pub fn path_begins_group(path: &str) -> bool {
    usize::from(Hash::of(path.as_bytes()).0[0]) % GROUP_FILES_MEAN == 0
}

/// The groups of `files`, given as path and number of blocks in path order: ranges of their places, without a gap.
pub fn cut_groups<P: AsRef<str>>(files: impl IntoIterator<Item = (P, u64)>) -> impl Iterator<Item = Range<usize>> {
    let mut files = files.into_iter();
    let mut cutter = GroupCutter::new();
    let mut start = 0;
    let mut place = 0;
    std::iter::from_fn(move || {
        for (path, blocks) in files.by_ref() {
            let begins = cutter.begins(path.as_ref(), blocks);
            place += 1;
            if begins && place > 1 {
                let group = start..place - 1;
                start = place - 1;
                return Some(group);
            }
        }
        let last = start..place;
        start = place;
        (!last.is_empty()).then_some(last)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn paths(count: usize) -> Vec<(String, u64)> {
        (0..count).map(|i| (format!("base/5/{i:06}"), 1)).collect()
    }

    fn groups(files: &[(String, u64)]) -> Vec<Vec<String>> {
        let ranges = cut_groups(files.iter().map(|(path, blocks)| (path, *blocks)));
        ranges.map(|range| files[range].iter().map(|(path, _)| path.clone()).collect()).collect()
    }

    #[test]
    fn a_new_file_changes_one_group() {
        let files = paths(10_000);
        let before: BTreeSet<_> = groups(&files).into_iter().collect();
        assert!((100..250).contains(&before.len()), "{}", before.len());
        for at in [0, 5000, 10_000] {
            let mut more = files.clone();
            more.insert(at, (format!("base/5/{at:06}x"), 1));
            let after: BTreeSet<_> = groups(&more).into_iter().collect();
            assert!(after.difference(&before).count() <= 2, "at {at}");
        }
    }

    #[test]
    fn a_large_file_stands_alone() {
        let mut files: Vec<_> = paths(20).into_iter().filter(|(path, _)| !path_begins_group(path)).collect();
        files[7].1 = LARGE_FILE_BLOCKS;
        files[8].1 = 8192;
        let sizes: Vec<_> = groups(&files).iter().map(Vec::len).collect();
        assert_eq!(sizes, [7, 1, 1, files.len() - 9]);
    }

    proptest! {
        #[test]
        fn groups_cover_all_files_within_the_limits(blocks in prop::collection::vec(0_u64..300, 0..2000)) {
            let files: Vec<_> = blocks.iter().enumerate().map(|(i, blocks)| (format!("f{i}"), *blocks)).collect();
            let mut next = 0;
            for group in cut_groups(files.iter().map(|(path, blocks)| (path, *blocks))) {
                prop_assert_eq!(group.start, next);
                prop_assert!(!group.is_empty() && group.len() <= GROUP_FILES_MAX);
                let total: u64 = blocks[group.clone()].iter().sum();
                prop_assert!(total <= GROUP_BLOCKS_MAX);
                prop_assert!(group.len() == 1 || blocks[group.clone()].iter().all(|blocks| *blocks < LARGE_FILE_BLOCKS));
                next = group.end;
            }
            prop_assert_eq!(next, files.len());
        }
    }
}
