//! Which files hold a relation's pages, told by their names and directories.

use engine::units::{PAGE_BYTES, RELATION_SEGMENT_BYTES};

/// Pages in each of a relation's segment files but the last.
pub(super) const SEGMENT_PAGES: u32 = 131_072;

const _: () = assert!(SEGMENT_PAGES as u64 * PAGE_BYTES as u64 == RELATION_SEGMENT_BYTES);

/// What a relation's file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fork {
    /// The rows, or the index.
    Main,
    /// `_fsm`
    FreeSpaceMap,
    /// `_vm`
    VisibilityMap,
    /// `_init`: what an unlogged relation is emptied to after a crash.
    Init,
}

/// `16384_vm.2` is the visibility map of relation 16384, segment 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RelationFile {
    pub(super) number: u32,
    pub(super) fork: Fork,
    pub(super) segment: u32,
}

impl RelationFile {
    /// The relation's file with that name. Temporary relations are none: see [`is_temporary`].
    pub(super) fn parse(name: &str) -> Option<Self> {
        let (rest, segment) = match name.split_once('.') {
            Some((rest, segment)) => (rest, number(segment).filter(|segment| *segment > 0)?),
            None => (name, 0),
        };
        let (relation, fork) = match rest.split_once('_') {
            None => (rest, Fork::Main),
            Some((relation, "fsm")) => (relation, Fork::FreeSpaceMap),
            Some((relation, "vm")) => (relation, Fork::VisibilityMap),
            Some((relation, "init")) => (relation, Fork::Init),
            Some(_) => return None,
        };
        Some(Self { number: number(relation).filter(|number| *number > 0)?, fork, segment })
    }

    /// The number, within the whole relation, of the first page in this file. Page checksums count by it.
    pub(super) fn first_page(self) -> u32 {
        self.segment.wrapping_mul(SEGMENT_PAGES)
    }
}

/// `t3_16384`, `t3_16384_fsm.1`: a relation of backend 3's own, worthless to everyone else.
pub(super) fn is_temporary(name: &str) -> bool {
    let Some((backend, relation)) = name.strip_prefix('t').and_then(|rest| rest.split_once('_')) else { return false };
    is_digits(backend) && RelationFile::parse(relation).is_some()
}

/// Whether relations lie in this directory of a data directory: `global`, `base/5`, `pg_tblspc/16400/PG_15_202209061/5`.
pub(super) fn is_relation_directory(path: &str) -> bool {
    let components: Vec<&str> = path.split('/').collect();
    match components[..] {
        ["global"] => true,
        ["base", database] => is_digits(database),
        ["pg_tblspc", tablespace, version, database] => {
            is_digits(tablespace) && version.starts_with("PG_") && is_digits(database)
        }
        _ => false,
    }
}

/// A whole number without a leading zero, as PostgreSQL prints one.
fn number(text: &str) -> Option<u32> {
    if !is_digits(text) || (text.len() > 1 && text.starts_with('0')) {
        return None;
    }
    text.parse().ok()
}

pub(super) fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names_of_relations() {
        let parsed = |name| RelationFile::parse(name).map(|file| (file.number, file.fork, file.segment));
        assert_eq!(parsed("16384"), Some((16384, Fork::Main, 0)));
        assert_eq!(parsed("16384.12"), Some((16384, Fork::Main, 12)));
        assert_eq!(parsed("16384_fsm"), Some((16384, Fork::FreeSpaceMap, 0)));
        assert_eq!(parsed("16384_vm.1"), Some((16384, Fork::VisibilityMap, 1)));
        assert_eq!(parsed("16384_init"), Some((16384, Fork::Init, 0)));
        for other in [
            "",
            "PG_VERSION",
            "pg_filenode.map",
            "016384",
            "16384.",
            "16384.0",
            "16384_",
            "16384_x",
            "t3_5",
            "4294967296",
        ] {
            assert_eq!(parsed(other), None, "{other}");
        }
        assert_eq!(RelationFile::parse("5.2").unwrap().first_page(), 262_144);
    }

    #[test]
    fn temporary_relations() {
        assert!(is_temporary("t3_16384") && is_temporary("t10_16384_fsm.1"));
        for other in ["t", "t_", "t3", "t3_", "tx_1", "t3_x", "toast", "16384"] {
            assert!(!is_temporary(other), "{other}");
        }
    }

    #[test]
    fn directories_of_relations() {
        for path in ["global", "base/5", "pg_tblspc/16400/PG_15_202209061/5"] {
            assert!(is_relation_directory(path), "{path}");
        }
        for path in
            ["", "base", "base/5/x", "base/pgsql_tmp", "pg_tblspc/16400", "pg_tblspc/16400/PG_15_202209061", "pg_xact"]
        {
            assert!(!is_relation_directory(path), "{path}");
        }
    }
}
