//! Where a restore mounts its backup.
//!
//! | who | where |
//! |---|---|
//! | anybody, with `--mount-dir DIR` | `DIR/<session>` |
//! | root | `/run/media/pghydrant/<session>` |
//! | others | `$XDG_RUNTIME_DIR/pghydrant/<session>`, or else `/tmp/pghydrant-<uid>/<session>` |
//!
//! What lies in */tmp* could have been put there by anybody: the directory above the mountpoint is used only if it is a
//! directory, no link, belongs to this user, and others cannot write to it.

use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use engine::units::SessionId;
use engine::{Error, Result};

const OF_ROOT: &str = "/run/media/pghydrant";

/// The directory of the sessions' mountpoints, unless `--mount-dir` says otherwise.
pub(crate) fn default_directory() -> PathBuf {
    let user = rustix::process::geteuid();
    if user.is_root() {
        return OF_ROOT.into();
    }
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|directory| is_private(directory));
    match runtime {
        Some(runtime) => runtime.join("pghydrant"),
        None => std::env::temp_dir().join(format!("pghydrant-{}", user.as_raw())),
    }
}

/// Makes the mountpoint of `session` in `chosen` or the default directory; absolute and resolved.
pub(super) fn make(session: &SessionId, chosen: Option<&Path>) -> Result<PathBuf> {
    let directory = chosen.map_or_else(default_directory, Path::to_owned);
    let is_root = rustix::process::geteuid().is_root();
    // Everybody may pass; what can be read below is the mount's affair.
    let mode = if is_root { 0o755 } else { 0o700 };
    let create = |directory: &Path| {
        let made = std::fs::DirBuilder::new().recursive(true).mode(mode).create(directory);
        made.map_err(|cause| Error::io("create", directory, cause))
    };
    create(&directory)?;
    if chosen.is_none() && !is_root && !is_private(&directory) {
        return Err(Error::Refused(format!("{} does not belong to this user alone", directory.display())));
    }
    let mountpoint = fusefs::table::resolve(&directory.join(session.as_str()))?;
    match super::unmount::clear_leftover(&mountpoint)? {
        true => tracing::info!("took away the mount that was left at {}", mountpoint.display()),
        false => create(&mountpoint)?,
    }
    fusefs::mounting::refuse_unless_empty(&mountpoint)?;
    Ok(mountpoint)
}

/// Takes the empty mountpoint away.
pub(super) fn remove(mountpoint: &Path) {
    // A mountpoint that stays is empty and in nobody's way.
    let _ = std::fs::remove_dir(mountpoint);
}

/// A directory, not a link, of this user, where nobody else can write.
fn is_private(directory: &Path) -> bool {
    let own = rustix::process::geteuid().as_raw();
    std::fs::symlink_metadata(directory)
        .is_ok_and(|found| found.is_dir() && found.uid() == own && found.mode() & 0o022 == 0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_directory_that_others_can_write_to_or_a_link_is_not_private() {
        let place = tempfile::tempdir().unwrap();
        assert!(is_private(place.path()));
        let link = place.path().join("link");
        std::os::unix::fs::symlink(place.path(), &link).unwrap();
        assert!(!is_private(&link));
        std::fs::set_permissions(place.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        assert!(!is_private(place.path()));
    }

    #[test]
    fn a_mountpoint_is_made_once_and_made_again() {
        let place = tempfile::tempdir().unwrap();
        let session: SessionId = "abc".parse().unwrap();
        let mountpoint = make(&session, Some(place.path())).unwrap();
        assert_eq!(make(&session, Some(place.path())).unwrap(), mountpoint);
        std::fs::write(mountpoint.join("file"), "x").unwrap();
        assert!(matches!(make(&session, Some(place.path())), Err(Error::Refused(_))));
    }
}
