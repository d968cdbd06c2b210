//! What root may act upon. A journal says which programs to run and which directories to remove, so whoever can write it
//! would act as root; so would whoever can put another program in the place of one that root runs.

use std::fs::Metadata;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use crate::exit::{Exit, Failure};
use crate::postgres::owner::Owner;

/// As root, refuses a place of another user's, or one that others may write to. A place that is not there is nobody's.
pub(crate) fn refuse_foreign_place(path: &Path) -> anyhow::Result<()> {
    match std::fs::metadata(path) {
        Ok(metadata) => refuse_foreign(path, &metadata),
        Err(cause) if cause.kind() == ErrorKind::NotFound => Ok(()),
        Err(cause) => Err(engine::Error::io("examine", path, cause).into()),
    }
}

/// The same for what was opened already: nobody can have put it there in between.
pub(crate) fn refuse_foreign(path: &Path, metadata: &Metadata) -> anyhow::Result<()> {
    let Some(why) = foreign(path, metadata, 0o022)? else { return Ok(()) };
    Err(Failure::new(Exit::Refused, format!("{why}: root does not act upon what it says"))
        .hint("run it as the user whose sessions these are, or name a state directory of root's with --state")
        .into())
}

/// As root, why somebody else could put something into `path`, or another directory in its place. It may not be there yet.
pub(crate) fn who_rules_over(path: &Path) -> anyhow::Result<Option<String>> {
    let nearest = path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let failed = |cause| engine::Error::io("examine", nearest, cause);
    let mut is_above = nearest != path;
    for place in nearest.canonicalize().map_err(failed)?.ancestors() {
        let metadata = std::fs::metadata(place).map_err(failed)?;
        // In a directory like /tmp each can move what is theirs, and nothing else.
        let writing = if is_above && metadata.mode() & 0o1000 != 0 { 0 } else { 0o022 };
        is_above = true;
        if let Some(why) = foreign(place, &metadata, writing)? {
            return Ok(Some(why));
        }
    }
    Ok(None)
}

fn foreign(path: &Path, metadata: &Metadata, writing: u32) -> anyhow::Result<Option<String>> {
    let path = path.display();
    Ok(match metadata.uid() {
        _ if !rustix::process::geteuid().is_root() => None,
        0 if metadata.mode() & writing == 0 => None,
        0 => Some(format!("others than root may write to {path}")),
        uid => Some(format!("{path} belongs to {}", Owner::numbered(uid, metadata.gid())?.name)),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs::{Permissions, set_permissions};
    use std::os::unix::fs::{PermissionsExt as _, chown};

    use super::*;

    #[test]
    fn root_acts_upon_nothing_that_others_can_write() {
        let place = tempfile::tempdir().unwrap();
        let is_refused = || refuse_foreign_place(place.path()).is_err();
        assert!(!is_refused());
        refuse_foreign_place(&place.path().join("none")).unwrap();
        let is_root = rustix::process::geteuid().is_root();
        for mode in [0o770, 0o707, 0o1777] {
            set_permissions(place.path(), Permissions::from_mode(mode)).unwrap();
            assert_eq!(is_refused(), is_root, "{mode:o}");
        }
        set_permissions(place.path(), Permissions::from_mode(0o755)).unwrap();
        assert!(!is_refused());
        if is_root {
            chown(place.path(), Some(12345), None).unwrap();
            assert!(is_refused());
        }
    }

    #[test]
    fn nobody_moves_a_directory_of_roots_in_a_directory_of_roots() {
        let place = tempfile::tempdir_in("/var/tmp").unwrap();
        let below = place.path().join("none/of/these");
        assert_eq!(who_rules_over(&below).unwrap(), None);
        let is_root = rustix::process::geteuid().is_root();
        for (mode, is_ruled) in [(0o777, is_root), (0o1777, false), (0o755, false)] {
            set_permissions(place.path(), Permissions::from_mode(mode)).unwrap();
            assert_eq!(who_rules_over(&below).unwrap().is_some(), is_ruled, "{mode:o}");
            let others_write = is_root && mode != 0o755;
            assert_eq!(who_rules_over(place.path()).unwrap().is_some(), others_write, "{mode:o}");
        }
        if is_root {
            chown(place.path(), Some(12345), None).unwrap();
            let why = format!("{} belongs to 12345", place.path().display());
            assert_eq!(who_rules_over(&below).unwrap(), Some(why));
        }
    }
}
