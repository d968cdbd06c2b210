//! Files that belong to the instance's owner, written by whoever runs us: the owner, or root on the owner's behalf.

use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;

use engine::Error;
use engine::io::durable;

use super::plan::User;

/// Makes `path` the owner's, if we are root; otherwise it already is.
pub(crate) fn give(path: &Path, owner: &User) -> anyhow::Result<()> {
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::lchown(path, Some(owner.uid), Some(owner.gid))
            .map_err(|cause| Error::io("change the owner of", path, cause))?;
    }
    Ok(())
}

/// Writes a file of the owner's, atomically and durably.
pub(crate) fn write(path: &Path, bytes: &[u8], mode: u32, owner: &User) -> anyhow::Result<()> {
    durable::write_atomically(path, bytes, mode)?;
    give(path, owner)
}

/// Makes a directory of the owner's that must not exist; false if it does.
pub(crate) fn make_directory(path: &Path, owner: &User) -> anyhow::Result<bool> {
    match std::fs::DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => {
            give(path, owner)?;
            Ok(true)
        }
        Err(cause) if cause.kind() == ErrorKind::AlreadyExists => Ok(false),
        Err(cause) => Err(Error::io("create", path, cause).into()),
    }
}

/// The content of a file; nothing if there is none.
pub(crate) fn read(path: &Path) -> anyhow::Result<Option<Vec<u8>>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(cause) if cause.kind() == ErrorKind::NotFound => Ok(None),
        Err(cause) => Err(Error::io("read", path, cause).into()),
    }
}

/// Removes a file, a link or a whole directory; what is not there is removed already. Links are not followed.
pub(crate) fn remove(path: &Path) -> anyhow::Result<()> {
    let removed = match std::fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
        Err(cause) => Err(cause),
    };
    match removed {
        Err(cause) if cause.kind() != ErrorKind::NotFound => Err(Error::io("remove", path, cause).into()),
        _ => Ok(()),
    }
}
