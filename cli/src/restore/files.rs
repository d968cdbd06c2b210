//! Files that belong to the instance's owner, written by whoever runs us: the owner, or root on the owner's behalf.
//!
//! The owner may put anything in the place of anything there, also while we look. So root opens first and asks what it
//! has opened: it gives away nothing that has another name elsewhere, and reads through a link only what is the owner's.

use std::fs::File;
use std::io::{ErrorKind, Read as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::Path;

use engine::Error;
use engine::io::durable;
use rustix::fs::{AtFlags, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;

use super::plan::User;

/// Makes `path` the owner's, if we are root; otherwise it already is. A link is given itself, not what it leads to.
pub(crate) fn give(path: &Path, owner: &User) -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let file = open(path, OFlags::PATH | OFlags::NOFOLLOW).map_err(|cause| Error::io("open", path, cause))?;
    let metadata = file.metadata().map_err(|cause| Error::io("examine", path, cause))?;
    if !metadata.is_dir() && metadata.nlink() > 1 {
        anyhow::bail!("{} has another name elsewhere: its owner is not changed", path.display());
    }
    let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
    rustix::fs::chownat(&file, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)
        .map_err(|cause| Error::io("change the owner of", path, cause))?;
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

/// The content of a file; nothing if there is none. A link is followed; run by root only to a file that belongs to the
/// owner of the link's directory, who could put a link to any file there and be handed what it says.
pub(crate) fn read(path: &Path) -> anyhow::Result<Option<Vec<u8>>> {
    let failed = |cause: Errno| Error::io("read", path, cause);
    let file = match open(path, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK) {
        Ok(file) => file,
        Err(Errno::NOENT) => return Ok(None),
        Err(Errno::LOOP) => match open(path, OFlags::PATH) {
            Ok(led_to) => {
                refuse_foreign(&led_to, path)?;
                // The very file that was looked at, whatever the link leads to by now.
                let opened = std::path::PathBuf::from(format!("/proc/self/fd/{}", led_to.as_raw_fd()));
                open(&opened, OFlags::RDONLY | OFlags::NONBLOCK).map_err(failed)?
            }
            Err(Errno::NOENT) => return Ok(None),
            Err(cause) => return Err(failed(cause).into()),
        },
        Err(cause) => return Err(failed(cause).into()),
    };
    let metadata = file.metadata().map_err(|cause| Error::io("examine", path, cause))?;
    if !metadata.is_file() {
        anyhow::bail!("{} is no regular file", path.display());
    }
    let mut bytes = Vec::new();
    (&file).read_to_end(&mut bytes).map_err(|cause| Error::io("read", path, cause))?;
    Ok(Some(bytes))
}

fn refuse_foreign(file: &File, path: &Path) -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let owner = std::fs::metadata(directory).map_err(|cause| Error::io("examine", directory, cause))?.uid();
    if file.metadata().map_err(|cause| Error::io("examine", path, cause))?.uid() == owner {
        return Ok(());
    }
    anyhow::bail!("{} is a link to a file of another user than its directory's: it is not read", path.display())
}

fn open(path: &Path, flags: OFlags) -> rustix::io::Result<File> {
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).map(File::from)
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
    use std::os::unix::fs::{chown, symlink};

    use super::*;

    fn owner(uid: u32) -> User {
        User { name: uid.to_string(), uid, gid: uid }
    }

    #[test]
    fn a_link_is_followed_to_the_owners_files_and_to_no_others() {
        let (data, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::write(data.path().join("mine"), "mine").unwrap();
        symlink("mine", data.path().join("postgresql.conf")).unwrap();
        assert_eq!(read(&data.path().join("postgresql.conf")).unwrap().unwrap(), b"mine");
        assert_eq!(read(&data.path().join("none")).unwrap(), None);
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let secret = elsewhere.path().join("secret");
        std::fs::write(&secret, "secret").unwrap();
        chown(data.path(), Some(12345), None).unwrap();
        symlink(&secret, data.path().join("postgresql.auto.conf")).unwrap();
        let refused = read(&data.path().join("postgresql.auto.conf")).unwrap_err().to_string();
        assert!(refused.contains("is not read"), "{refused}");
        chown(&secret, Some(12345), None).unwrap();
        assert_eq!(read(&data.path().join("postgresql.auto.conf")).unwrap().unwrap(), b"secret");
    }

    #[test]
    fn a_pipe_in_the_place_of_a_file_is_not_waited_for() {
        let data = tempfile::tempdir().unwrap();
        let pipe = data.path().join("postgresql.conf");
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, 0o600.into()).unwrap();
        assert!(read(&pipe).unwrap_err().to_string().contains("no regular file"));
    }

    #[test]
    fn what_has_another_name_is_not_given_away() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let data = tempfile::tempdir().unwrap();
        let at = |name: &str| data.path().join(name);
        std::fs::write(at("file"), "").unwrap();
        give(&at("file"), &owner(12345)).unwrap();
        assert_eq!(std::fs::metadata(at("file")).unwrap().uid(), 12345);
        std::fs::write(at("secret"), "").unwrap();
        std::fs::hard_link(at("secret"), at("part")).unwrap();
        assert!(give(&at("part"), &owner(12345)).is_err());
        symlink("secret", at("link")).unwrap();
        give(&at("link"), &owner(12345)).unwrap();
        assert_eq!(std::fs::metadata(at("secret")).unwrap().uid(), 0);
    }

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
