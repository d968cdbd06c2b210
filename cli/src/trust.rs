//! What root may act upon. A journal says which programs to run and which directories to remove, so whoever can write it
//! would act as root.

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
}
