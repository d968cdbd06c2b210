//! Inode numbers that *are* the places of files, so that nothing has to be remembered of a file that was looked up.
//!
//! | highest bits | the rest |
//! |---|---|
//! | `00` | the mount's own directories, `backup.json`, and who serves it |
//! | `01` | an index in the manifest's path order |
//! | `10` | the same, of a tablespace's record, as a directory |
//! | `11` | a file of the archive: 2 bits of kind, 18 of timeline, 42 of segment number |
//!
//! Always true: `Node::of(node.inode()) == Some(node)`; any number at all is a node or nothing.

use engine::units::Timeline;
use engine::wal::name::{SegmentName, WalFile};

/// What an inode stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Node {
    /// The mount's root.
    Root,
    /// `data`.
    Data,
    /// `tablespaces`.
    Tablespaces,
    /// `wal`.
    Wal,
    /// `backup.json`.
    Description,
    /// The link that tells who serves the mount.
    Served,
    /// The file at this index of the manifest, as it lies in `data`, or in a tablespace.
    File(u64),
    /// `tablespaces/<oid>`: the record at this index, which in `data` is a link.
    Tablespace(u64),
    /// A segment, a partial segment or a history, packed into the number.
    WalFile(WalFile),
    /// A file of the archive that does not fit into a number: its place in the tree's labels.
    WalLabel(u64),
}

const ROOT: u64 = 1;
const CLASS_SHIFT: u32 = 62;
const CLASS_FILE: u64 = 1;
const CLASS_TABLESPACE: u64 = 2;
const CLASS_WAL: u64 = 3;
const INDEX_MASK: u64 = (1 << CLASS_SHIFT) - 1;
const WAL_KIND_SHIFT: u32 = 60;
const WAL_NUMBER_BITS: u32 = 42;
const WAL_TIMELINE_BITS: u32 = 18;
const WAL_SEGMENT: u64 = 0;
const WAL_PARTIAL: u64 = 1;
const WAL_HISTORY: u64 = 2;
const WAL_LABEL: u64 = 3;

const _: () = assert!(WAL_NUMBER_BITS + WAL_TIMELINE_BITS == WAL_KIND_SHIFT);

impl Node {
    /// The inode number. A [`WalFile`] that has none is interned first, see `Tree`.
    pub fn inode(self) -> u64 {
        let wal = |kind: u64, timeline: Timeline, number: u64| {
            CLASS_WAL << CLASS_SHIFT | kind << WAL_KIND_SHIFT | u64::from(timeline.0) << WAL_NUMBER_BITS | number
        };
        match self {
            Self::Root => ROOT,
            Self::Data => ROOT + 1,
            Self::Tablespaces => ROOT + 2,
            Self::Wal => ROOT + 3,
            Self::Description => ROOT + 4,
            Self::Served => ROOT + 5,
            Self::File(index) => CLASS_FILE << CLASS_SHIFT | index & INDEX_MASK,
            Self::Tablespace(index) => CLASS_TABLESPACE << CLASS_SHIFT | index & INDEX_MASK,
            Self::WalFile(WalFile::Segment(segment)) => wal(WAL_SEGMENT, segment.timeline, segment.number),
            Self::WalFile(WalFile::Partial(segment)) => wal(WAL_PARTIAL, segment.timeline, segment.number),
            Self::WalFile(WalFile::History(timeline)) => wal(WAL_HISTORY, timeline, 0),
            Self::WalFile(WalFile::BackupLabel(segment, offset)) => {
                debug_assert!(false, "a label of segment {segment:?} at {offset} has no number of its own");
                0
            }
            Self::WalLabel(place) => wal(WAL_LABEL, Timeline(0), place),
        }
    }

    /// What `inode` stands for; numbers come from the kernel, which has them from us.
    pub fn of(inode: u64) -> Option<Self> {
        let index = inode & INDEX_MASK;
        match inode >> CLASS_SHIFT {
            CLASS_FILE => return Some(Self::File(index)),
            CLASS_TABLESPACE => return Some(Self::Tablespace(index)),
            CLASS_WAL => return Self::of_wal(inode),
            _ => {}
        }
        [Self::Root, Self::Data, Self::Tablespaces, Self::Wal, Self::Description, Self::Served]
            .into_iter()
            .find(|node| node.inode() == inode)
    }

    fn of_wal(inode: u64) -> Option<Self> {
        let number = inode & ((1 << WAL_NUMBER_BITS) - 1);
        let timeline = Timeline(u32::try_from(inode >> WAL_NUMBER_BITS & ((1 << WAL_TIMELINE_BITS) - 1)).ok()?);
        let segment = SegmentName { timeline, number };
        match inode >> WAL_KIND_SHIFT & 3 {
            WAL_SEGMENT => Some(Self::WalFile(WalFile::Segment(segment))),
            WAL_PARTIAL => Some(Self::WalFile(WalFile::Partial(segment))),
            WAL_HISTORY => Some(Self::WalFile(WalFile::History(timeline))),
            _ => Some(Self::WalLabel(number)),
        }
    }
}

/// Whether a file of the archive can be packed into a number.
pub(crate) fn has_number(file: WalFile) -> bool {
    let fits = |timeline: Timeline, number: u64| timeline.0 >> WAL_TIMELINE_BITS == 0 && number >> WAL_NUMBER_BITS == 0;
    match file {
        WalFile::Segment(segment) | WalFile::Partial(segment) => fits(segment.timeline, segment.number),
        WalFile::History(timeline) => fits(timeline, 0),
        WalFile::BackupLabel(..) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn node() -> impl Strategy<Value = Node> {
        let segment = (0_u32..1 << WAL_TIMELINE_BITS, 0_u64..1 << WAL_NUMBER_BITS)
            .prop_map(|(timeline, number)| SegmentName { timeline: Timeline(timeline), number });
        prop_oneof![
            prop::sample::select(vec![
                Node::Root,
                Node::Data,
                Node::Tablespaces,
                Node::Wal,
                Node::Description,
                Node::Served
            ]),
            (0_u64..=INDEX_MASK).prop_map(Node::File),
            (0_u64..=INDEX_MASK).prop_map(Node::Tablespace),
            segment.clone().prop_map(|segment| Node::WalFile(WalFile::Segment(segment))),
            segment.clone().prop_map(|segment| Node::WalFile(WalFile::Partial(segment))),
            segment.prop_map(|segment| Node::WalFile(WalFile::History(segment.timeline))),
            (0_u64..1 << WAL_NUMBER_BITS).prop_map(Node::WalLabel),
        ]
    }

    proptest! {
        #[test]
        fn an_inode_number_is_the_place_of_its_file(node in node()) {
            prop_assert_eq!(Node::of(node.inode()), Some(node));
        }

        #[test]
        fn no_number_from_the_kernel_is_a_panic(inode in any::<u64>()) {
            if let Some(node) = Node::of(inode) {
                let again = Node::of(node.inode());
                prop_assert_eq!(again, Some(node));
            }
        }
    }
}
