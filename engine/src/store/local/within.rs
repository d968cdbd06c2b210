//! Names within the store: opened, made and given away without following a link.
//!
//! The owner of the store's directory could put a link in the place of any directory and have root write elsewhere. So the
//! way to the store's directory may have links, it is the operator's; below it names are made, replaced and removed only
//! within directories that were opened without following one. Reading follows links: it gives nothing away, and a
//! repository that somebody has spread over disks can at least be restored from.
//!
//! Always true: what is given to the store's owner was made by us, a moment ago, within the store.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Gid, Mode, OFlags, Uid};
use rustix::io::Errno;

use crate::io::durable::{self, Directory};
use crate::io::{Place, Root, open_below};
use crate::{Error, Result};

/// The repository holds all of the database: nothing for others.
pub(super) const DIRECTORY_MODE: u32 = 0o750;
/// Marks a directory that root makes until it is given away: sticky, and nothing for others. Nobody makes such.
pub(super) const MARK_MODE: u32 = 0o1000;

/// The key as a relative path, without a way out of the store.
pub(super) fn check(key: &str) -> Result<&Path> {
    let path = Path::new(key);
    let plain = !key.is_empty() && path.components().all(|part| matches!(part, Component::Normal(_)));
    if plain { Ok(path) } else { Err(Error::Refused(format!("\"{key}\" is not a key of a store"))) }
}

/// The directory of a key, and the name in it.
pub(super) fn split(path: &Path) -> Result<(&Path, &OsStr)> {
    let split = path.parent().zip(path.file_name());
    split.ok_or_else(|| Error::Refused(format!("\"{}\" is not a key of a store", path.display())))
}

pub(super) fn is_missing(error: &Error) -> bool {
    error.raw_os_error() == Some(libc::ENOENT)
}

/// Makes the directory `path`, and those above it, durably. It is where the operator says, through whatever links.
pub(super) fn make_way(path: &Path) -> Result<()> {
    let parent = path.parent().unwrap_or(path);
    if path.as_os_str().is_empty() || path.is_dir() {
        return Ok(());
    }
    make_way(parent)?;
    match std::fs::DirBuilder::new().mode(DIRECTORY_MODE).create(path) {
        Err(cause) if cause.kind() != io::ErrorKind::AlreadyExists => Err(Error::io("create", path, cause)),
        _ => durable::sync_directory(parent),
    }
}

/// Opens a directory of the store, for changing what is in it.
pub(super) fn open_directory(place: Place<'_>) -> Result<Directory> {
    match open_below(place, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()) {
        Ok(directory) => Ok(Directory::new(directory, place.full())),
        Err(cause @ (Errno::LOOP | Errno::NOTDIR)) => Err(link_in(place).map_or_else(
            || Error::io("open", place.full(), cause),
            |link| {
                let why = "within a repository nothing is written through links";
                Error::Refused(format!("{} is a symbolic link, and {why}", link.display()))
            },
        )),
        Err(cause) => Err(Error::io("open", place.full(), cause)),
    }
}

/// The link on the way to `place`: for people.
pub(super) fn link_in(place: Place<'_>) -> Option<PathBuf> {
    let mut path = place.root.path().to_owned();
    place.path.components().find_map(|component| {
        path.push(component);
        path.is_symlink().then(|| path.clone())
    })
}

/// Gives a directory to the owner of the store, if it is the one that root has just made and not another that somebody was
/// quick to put in its place.
pub(super) fn hand_over_directory(root: &Root, directory: &Directory) -> Result<()> {
    let failed = |cause| Error::io("change the mode of", directory.path(), cause);
    let found = rustix::fs::fstat(directory).map_err(failed)?;
    if found.st_uid != 0 || found.st_mode & (MARK_MODE | 0o007) != MARK_MODE {
        return Ok(());
    }
    rustix::fs::fchmod(directory, Mode::from_raw_mode(found.st_mode & 0o777)).map_err(failed)?;
    hand_over(root, directory, directory.path())
}

/// Gives what root has just made in the store to the owner of the store.
pub(super) fn hand_over(root: &Root, made: impl AsFd, path: &Path) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let owner = rustix::fs::fstat(root).map_err(|cause| Error::io("look at", root.path(), cause))?;
    let (uid, gid) = (Uid::from_raw(owner.st_uid), Gid::from_raw(owner.st_gid));
    let given = rustix::fs::fchown(made, Some(uid), Some(gid));
    given.map_err(|cause| Error::io("change the owner of", path, cause))
}

/// Opens a lock that is there. Not truncated: the text belongs to whoever holds it. The holder writes into it, so it must
/// be this file's only name: what another leads to may be anything that root can write.
pub(super) fn open_lock_file(root: &Root, key: &Path) -> Result<File> {
    let (parent, name) = split(key)?;
    let directory = open_directory(root.at(parent))?;
    let path = directory.path().join(name);
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match rustix::fs::openat(&directory, name, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(Errno::LOOP) => return Err(Error::corrupt(&path, "a lock that is a symbolic link")),
        Err(cause) => return Err(Error::io("open", &path, cause)),
    };
    refuse_unless_regular(&file, &path)?;
    let names = file.metadata().map_err(|cause| Error::io("look at", &path, cause))?.nlink();
    if names > 1 { Err(Error::corrupt(&path, "a lock that has other names")) } else { Ok(file) }
}

/// Opens a file of the store. A pipe in its place would else be waited for until somebody writes into it.
pub(super) fn open_to_read(path: &Path) -> Result<File> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty()).map_err(|cause| Error::io("open", path, cause))?;
    let file = File::from(file);
    refuse_unless_regular(&file, path).map(|()| file)
}

pub(super) fn refuse_unless_regular(file: &File, path: &Path) -> Result<()> {
    let metadata = file.metadata().map_err(|cause| Error::io("look at", path, cause))?;
    if metadata.is_file() {
        return Ok(());
    }
    Err(Error::corrupt(path, "it is no regular file"))
}
