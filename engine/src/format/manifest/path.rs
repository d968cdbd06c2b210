//! Paths of files in a backup: which are allowed, and how they are ordered.

use std::cmp::Ordering;

/// Linux takes no longer path (`PATH_MAX`), links' targets included.
pub const PATH_BYTES_MAX: usize = 4096;
/// Linux takes no longer component (`NAME_MAX`).
pub const COMPONENT_BYTES_MAX: usize = 255;

/// Whether `path` may stand in a manifest: relative, of plain components. Anything else could lead out of the
/// directory that it is restored to.
pub fn check(path: &str) -> Result<(), String> {
    let refuse = |why: &str| Err(format!("the path \"{}\" {why}", path.escape_debug()));
    if path.is_empty() {
        return Err("an empty path".to_owned());
    }
    if path.len() > PATH_BYTES_MAX {
        return Err(format!("a path of {} bytes, more than {PATH_BYTES_MAX}", path.len()));
    }
    if path.starts_with('/') {
        return refuse("is absolute");
    }
    if path.contains('\0') {
        return refuse("contains a zero byte");
    }
    for component in path.split('/') {
        match component {
            "" => return refuse("has an empty component"),
            "." | ".." => return refuse("has a component that names a directory relative to another"),
            long if long.len() > COMPONENT_BYTES_MAX => return refuse("has a component of more than 255 bytes"),
            _ => {}
        }
    }
    Ok(())
}

/// Whether `target` may be the text of a link: any, but not empty, not longer than Linux takes, and without a zero
/// byte.
pub fn check_target(target: &str) -> Result<(), String> {
    if target.is_empty() || target.len() > PATH_BYTES_MAX || target.contains('\0') {
        return Err(format!("\"{}\" cannot be the target of a link", target.escape_debug()));
    }
    Ok(())
}

/// The OID of the tablespace whose place in the data directory `path` is: `pg_tblspc/<oid>`, as PostgreSQL writes it.
pub fn tablespace_oid(path: &str) -> Option<u32> {
    let digits = path.strip_prefix("pg_tblspc/")?;
    let oid = digits.parse::<u32>().ok().filter(|oid| *oid != 0)?;
    (oid.to_string() == digits).then_some(oid)
}

/// The order of files in a manifest: by bytes, with `/` before every other, which is component by component. So a
/// directory stands directly before what is in it, and all of that stands together.
pub fn order(left: &str, right: &str) -> Ordering {
    // No path contains a zero byte, so `/` may take its place.
    let rank = |byte: u8| if byte == b'/' { 0 } else { byte };
    let differ = left.bytes().zip(right.bytes()).find(|(left, right)| left != right);
    match differ {
        Some((left, right)) => rank(left).cmp(&rank(right)),
        None => left.len().cmp(&right.len()),
    }
}

/// Whether `path` lies in `directory`, at any depth. Everything lies in the data directory, whose path is empty.
pub fn is_below(path: &str, directory: &str) -> bool {
    directory.is_empty() || path.strip_prefix(directory).is_some_and(|rest| rest.starts_with('/'))
}

/// How `path` stands to the subtree of `directory` (the directory and all that is below it): before, in it (equal),
/// or after. To step over a subtree, seek the first path that is after it.
pub fn order_to_subtree(path: &str, directory: &str) -> Ordering {
    if path == directory || is_below(path, directory) { Ordering::Equal } else { order(path, directory) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_plain_relative_paths_are_allowed() {
        for good in ["PG_VERSION", "base/5/16384.1", "pg_tblspc/16400/PG_15_202209061/5/1", "...", "a b", "ä"] {
            assert_eq!(check(good), Ok(()), "{good}");
        }
        let long = "x".repeat(256);
        let deep = "x/".repeat(2048) + "x";
        for bad in ["", "/etc/passwd", "a//b", "a/", "./a", "a/.", "..", "a/../b", "a\0b", &long, &deep] {
            assert!(check(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_tablespace_has_one_place() {
        assert_eq!(tablespace_oid("pg_tblspc/16400"), Some(16400));
        for bad in
            ["base", "pg_tblspc", "pg_tblspc/", "pg_tblspc/0", "pg_tblspc/016400", "pg_tblspc/+1", "pg_tblspc/1/2"]
        {
            assert_eq!(tablespace_oid(bad), None, "{bad}");
        }
        assert_eq!(tablespace_oid("pg_tblspc/4294967296"), None);
    }

    #[test]
    fn a_directory_stands_directly_before_what_is_in_it() {
        let mut paths = ["base.old", "base/5/16384", "base", "base/5-x", "base/5", "base/4"];
        paths.sort_by(|left, right| order(left, right));
        assert_eq!(paths, ["base", "base/4", "base/5", "base/5/16384", "base/5-x", "base.old"]);
        assert_eq!(order_to_subtree("base/5/1", "base/5"), Ordering::Equal);
        assert_eq!(order_to_subtree("base/5-x", "base/5"), Ordering::Greater);
        assert_eq!(order_to_subtree("base", "base/5"), Ordering::Less);
        assert!(is_below("base", "") && !is_below("base", "base"));
    }

    proptest! {
        #[test]
        fn the_order_is_that_of_lists_of_components(left in "[a./!0]{1,8}", right in "[a./!0]{1,8}") {
            let components = |path: &str| path.split('/').map(str::to_owned).collect::<Vec<_>>();
            prop_assert_eq!(order(&left, &right), components(&left).cmp(&components(&right)));
        }
    }
}
