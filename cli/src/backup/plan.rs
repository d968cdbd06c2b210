//! Who reads what: the work of a backup, cut so that many workers can do it in any order.
//!
//! The unit is a group of the manifest, or, of a file so large that it is a group by itself, the blocks of one leaf. The
//! files that come into being at the end (`backup_label` and its like, and `pg_control`, which is read last) are groups of
//! their own: so they can wait, and their constant change leaves the groups around them as the parent backup has them.

use std::cmp::Ordering;
use std::ops::Range;

use engine::format::file::{FileKind, FileRecord};
use engine::format::manifest::cut::{GroupCutter, LARGE_FILE_BLOCKS};
use engine::format::manifest::{LEAF_RECORDS, path as manifest_path};
use engine::units::BlockSize;

use crate::postgres::control;

/// The files that are written last, in path order.
pub(super) const LATE: [&str; 4] = ["backup_label", "backup_manifest", control::PATH, "tablespace_map"];

/// What a worker takes at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Unit {
    /// Files that follow each other: their places in the list.
    Group { position: u64, files: Range<usize> },
    /// The blocks of one leaf of large file number `large`.
    Piece { large: usize, leaf: usize },
}

/// A file that is a group by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LargeFile {
    /// The group's place among all groups.
    pub(super) position: u64,
    /// The file's place in the list.
    pub(super) file: usize,
    /// Its leaves at the size it had when it was found.
    pub(super) leaves: usize,
}

/// The work.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// The largest first, so that no worker begins a large one when the others are done.
    pub(super) units: Vec<Unit>,
    pub(super) large: Vec<LargeFile>,
    /// The positions of [`LATE`].
    pub(super) late: [u64; LATE.len()],
    /// Content of all files as they were found.
    pub(super) bytes: u64,
}

impl Plan {
    /// Cuts `files`, which are in path order.
    pub(super) fn new(files: &[FileRecord], block: BlockSize) -> Self {
        let mut plan = Self::default();
        let mut weighed: Vec<(u64, Unit)> = Vec::new();
        let mut cutter = GroupCutter::new();
        let mut late = LATE.iter().enumerate().peekable();
        let mut position = 0;
        let mut open: Option<(Range<usize>, u64)> = None;
        let mut close = |open: &mut Option<(Range<usize>, u64)>, position: &mut u64| {
            if let Some((files, bytes)) = open.take() {
                weighed.push((bytes, Unit::Group { position: *position, files }));
                *position += 1;
            }
        };
        for (place, file) in files.iter().enumerate() {
            while let Some((which, _)) =
                late.next_if(|(_, path)| manifest_path::order(path, &file.path) == Ordering::Less)
            {
                close(&mut open, &mut position);
                cutter = GroupCutter::new();
                plan.late[which] = position;
                position += 1;
            }
            let blocks = block.blocks_of(file.bytes);
            if cutter.begins(&file.path, blocks) {
                close(&mut open, &mut position);
            }
            plan.bytes += file.bytes;
            if file.kind == FileKind::Regular && blocks >= LARGE_FILE_BLOCKS {
                // More leaves than memory could list are more bytes than any disk has.
                let leaves = usize::try_from(blocks.div_ceil(LEAF_RECORDS)).unwrap_or(usize::MAX);
                plan.large.push(LargeFile { position, file: place, leaves });
                position += 1;
            } else {
                let (range, bytes) = open.get_or_insert((place..place, 0));
                range.end = place + 1;
                *bytes += file.bytes;
            }
        }
        close(&mut open, &mut position);
        for (which, _) in late {
            plan.late[which] = position;
            position += 1;
        }
        let piece_bytes = LEAF_RECORDS * block.bytes() as u64;
        for (number, large) in plan.large.iter().enumerate() {
            let bytes = files[large.file].bytes;
            let piece = |leaf| {
                let left = bytes.saturating_sub(leaf as u64 * piece_bytes);
                (left.min(piece_bytes), Unit::Piece { large: number, leaf })
            };
            weighed.extend((0..large.leaves).map(piece));
        }
        // Stable: pieces of one file, and groups of equal weight, keep their order.
        weighed.sort_by_key(|(bytes, _)| std::cmp::Reverse(*bytes));
        plan.units = weighed.into_iter().map(|(_, unit)| unit).collect();
        plan
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use engine::units::BlockNumber;
    use proptest::prelude::*;

    use super::*;

    fn file(path: &str, bytes: u64) -> FileRecord {
        FileRecord {
            path: path.to_owned(),
            kind: FileKind::Regular,
            mode: 0o600,
            uid: 0,
            gid: 0,
            modified: 0,
            bytes,
            crc32c: 0,
            first_block: BlockNumber(0),
        }
    }

    #[test]
    fn late_files_are_groups_of_their_own_in_their_place() {
        let files = ["PG_VERSION", "base/1", "global/1", "global/zz", "zzz"].map(|path| file(path, 10));
        let plan = Plan::new(&files, BlockSize::DEFAULT);
        let position_of = |place: usize| {
            plan.units.iter().find_map(|unit| match unit {
                Unit::Group { position, files } if files.contains(&place) => Some(*position),
                _ => None,
            })
        };
        let [label, manifest, control, map] = plan.late;
        assert!(position_of(0) < Some(label) && label < manifest);
        assert!(Some(manifest) < position_of(1) && position_of(2) < Some(control));
        assert!(Some(control) < position_of(3) && Some(map) < position_of(4));
    }

    #[test]
    fn a_large_file_is_cut_into_leaves_and_the_largest_work_comes_first() {
        let files = [file("a", 5), file("b", (128 << 20) + 1), file("c", 32 << 20)];
        let plan = Plan::new(&files, BlockSize::DEFAULT);
        assert_eq!(plan.large.iter().map(|large| (large.file, large.leaves)).collect::<Vec<_>>(), [(1, 2), (2, 1)]);
        assert_eq!(plan.units[0], Unit::Piece { large: 0, leaf: 0 });
        assert_eq!(plan.units[1], Unit::Piece { large: 1, leaf: 0 });
        assert_eq!(plan.units.len(), 4);
        assert_eq!(plan.bytes, (160 << 20) + 6);
    }

    proptest! {
        #[test]
        fn every_file_is_read_once_and_positions_follow_path_order(
            sizes in prop::collection::vec(prop_oneof![0_u64..1000, 30_000_000_u64..400_000_000], 0..300)
        ) {
            let files: Vec<_> = sizes.iter().enumerate().map(|(n, size)| file(&format!("d/{n:06}"), *size)).collect();
            let plan = Plan::new(&files, BlockSize::DEFAULT);
            let mut seen = vec![None; files.len()];
            let mut positions = BTreeSet::from(plan.late);
            for unit in &plan.units {
                match unit {
                    Unit::Group { position, files } => {
                        prop_assert!(positions.insert(*position));
                        for place in files.clone() {
                            prop_assert_eq!(seen[place].replace(*position), None);
                        }
                    }
                    Unit::Piece { large, leaf: 0 } => {
                        let large = &plan.large[*large];
                        prop_assert!(positions.insert(large.position));
                        prop_assert_eq!(seen[large.file].replace(large.position), None);
                    }
                    Unit::Piece { .. } => {}
                }
            }
            prop_assert!(seen.iter().all(Option::is_some) && seen.is_sorted());
        }
    }
}
