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

/// Removes what a crash left of writes of these files into `directory`: `.NAME.<process>.<number>.part`.
pub(crate) fn remove_parts(directory: &Path, names: &[&str]) -> anyhow::Result<()> {
    let entries = std::fs::read_dir(directory).map_err(|cause| Error::io("list", directory, cause))?;
    for entry in entries {
        let name = entry.map_err(|cause| Error::io("list", directory, cause))?.file_name();
        let Some(text) = name.to_str() else { continue };
        let written = text.strip_prefix('.').and_then(|text| text.strip_suffix(".part"));
        let ours = |name: &&str| written.and_then(|text| text.strip_prefix(*name)).is_some_and(is_number_pair);
        if names.iter().any(ours) {
            remove(&directory.join(text))?;
        }
    }
    Ok(())
}

/// `.4711.3`.
fn is_number_pair(text: &str) -> bool {
    let mut numbers = text.split('.').skip(1);
    let mut number =
        || numbers.next().is_some_and(|text| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()));
    text.starts_with('.') && number() && number() && numbers.next().is_none()
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_a_crash_left_of_our_writes_goes_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let names = [".a.conf.4711.3.part", ".a.conf.4711.part", ".b.conf.4711.3.part", "a.conf", ".a.conf.x.3.part"];
        for name in names {
            std::fs::write(directory.path().join(name), "").unwrap();
        }
        remove_parts(directory.path(), &["a.conf"]).unwrap();
        let left: Vec<&str> = names.into_iter().filter(|name| directory.path().join(name).exists()).collect();
        assert_eq!(left, names[1..]);
    }
}
