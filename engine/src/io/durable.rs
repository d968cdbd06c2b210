//! Durability: its one home and its one order. No other file calls fsync, syncfs or rename.
//!
//! The order is always the same: sync the file, rename it, sync the directory that names it. A name that a
//! reader can see therefore has all of its bytes behind it, after any crash.
//!
//! A failed fsync is final. The kernel reports a lost write once and then forgets it (the pages are marked
//! clean), so a second fsync that succeeds proves nothing. Whoever gets an error from here gives up what it
//! was about to promise and never syncs the same file again.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, Mode, OFlags, RenameFlags};
use rustix::io::{Errno, retry_on_intr};

use crate::{Error, Result};

/// Makes the content and the metadata of `file` durable.
pub fn sync_file(file: &File, path: &Path) -> Result<()> {
    file.sync_all().map_err(|cause| Error::io("sync", path, cause))
}

/// Makes the content of `file`, and the size needed to read it, durable.
pub fn sync_content(file: &File, path: &Path) -> Result<()> {
    file.sync_data().map_err(|cause| Error::io("sync", path, cause))
}

/// Makes the names in directory `path` durable.
pub fn sync_directory(path: &Path) -> Result<()> {
    let path = or_here(path);
    let directory = File::open(path).map_err(|cause| Error::io("open", path, cause))?;
    sync_file(&directory, path)
}

/// Makes everything durable that was written to the file system that `path` lies in, by whomever: one call for
/// any number of small files. Since Linux 5.8 it reports a write that was lost since `path` was opened; to be
/// told of all of them, open it before the first write and call [`sync_file_system_of`].
pub fn sync_file_system(path: &Path) -> Result<()> {
    let file = File::open(path).map_err(|cause| Error::io("open", path, cause))?;
    sync_file_system_of(&file, path)
}

/// [`sync_file_system`] by a file or directory that was opened before the writes whose loss it must report.
pub fn sync_file_system_of(file: &File, path: &Path) -> Result<()> {
    rustix::fs::syncfs(file).map_err(|cause| Error::io("sync the file system of", path, cause))
}

/// Whether [`sync_file_system`] tells of lost writes on this kernel. Where it does not, whatever was written through the
/// page cache has to be synced file by file; what went past it has told of its own losses.
pub fn sync_file_system_tells() -> bool {
    tells_since(&rustix::system::uname().release().to_string_lossy())
}

/// By the kernel's release, such as `5.15.0-91-generic`; one that cannot be read tells nothing.
fn tells_since(release: &str) -> bool {
    let mut numbers = release.split(|character: char| !character.is_ascii_digit()).map(str::parse::<u32>);
    matches!((numbers.next(), numbers.next()), (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= (5, 8))
}

/// Renames durably, replacing what is at `to`. The caller has synced the file.
pub fn rename_durably(from: &Path, to: &Path) -> Result<()> {
    std::fs::rename(from, to).map_err(|cause| Error::io("rename to", to, cause))?;
    sync_both_parents(from, to)
}

/// Renames without making it durable, replacing what is at `to`: for a file that PostgreSQL syncs itself before it
/// counts on it.
pub fn rename_in_place(from: &Path, to: &Path) -> Result<()> {
    std::fs::rename(from, to).map_err(|cause| Error::io("rename to", to, cause))
}

/// The bare rename, within directories that are open already; whoever calls it syncs them.
pub(super) fn rename_at(
    from: BorrowedFd<'_>,
    name: &Path,
    to: BorrowedFd<'_>,
    new_name: &Path,
) -> rustix::io::Result<()> {
    rustix::fs::renameat(from, name, to, new_name)
}

/// Writes the file `path` so that a reader sees either what was there before or all of `bytes`, after any crash.
/// `mode` is that of the new file.
pub fn write_atomically(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let (temporary, file) = create_beside(path, mode)?;
    let written = write_and_sync(file, &temporary, bytes).and_then(|()| rename_durably(&temporary, path));
    if written.is_err() {
        // The first error is what counts; a leftover is harmless and has a name that says what it is.
        let _ = std::fs::remove_file(&temporary);
    }
    written
}

/// Removes the file `path` durably; one that is not there is no error.
pub fn remove_durably(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Ok(()) => sync_directory(parent_of(path)),
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(cause) => Err(Error::io("remove", path, cause)),
    }
}

/// [`Directory::create_beside`] in the directory of `path`: the new file's path, and the file.
pub fn create_beside(path: &Path, mode: u32) -> Result<(PathBuf, File)> {
    let name =
        path.file_name().ok_or_else(|| Error::io("create", path, io::Error::from(io::ErrorKind::InvalidFilename)))?;
    let parent = parent_of(path);
    let directory = File::open(parent).map_err(|cause| Error::io("open", parent, cause))?;
    let (hidden, file) = Directory::new(directory, parent).create_beside(name, mode)?;
    Ok((path.with_file_name(hidden), file))
}

/// An open directory: names are changed in this very one, whatever becomes of the way that led to it.
#[derive(Debug)]
pub struct Directory {
    file: File,
    path: PathBuf,
}

impl Directory {
    /// A directory that was opened for reading; `path` is what messages call it.
    pub fn new(file: impl Into<File>, path: impl Into<PathBuf>) -> Self {
        Self { file: file.into(), path: path.into() }
    }

    /// Its path, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the names in it durable.
    pub fn sync(&self) -> Result<()> {
        sync_file(&self.file, &self.path)
    }

    /// A new file, under a name that nobody else uses: `.<name>.<pid>.<n>.part`. For whoever writes more than
    /// [`write_atomically`] can take at once.
    pub fn create_beside(&self, name: &OsStr, mode: u32) -> Result<(OsString, File)> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        loop {
            let mut hidden = OsString::from(".");
            hidden.push(name);
            hidden.push(format!(".{}.{}.part", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
            match retry_on_intr(|| rustix::fs::openat(&self.file, &hidden, flags, Mode::from_raw_mode(mode))) {
                Ok(file) => return Ok((hidden, file.into())),
                // Left by a process that had our number before a crash.
                Err(Errno::EXIST) => {}
                Err(cause) => return Err(Error::io("create", self.path.join(hidden), cause)),
            }
        }
    }

    /// Renames durably, replacing what is at `to`. The caller has synced the file.
    pub fn rename(&self, from: &OsStr, to: &OsStr) -> Result<()> {
        let renamed = rustix::fs::renameat(&self.file, from, &self.file, to);
        renamed.map_err(|cause| Error::io("rename to", self.path.join(to), cause))?;
        self.sync()
    }

    /// Renames durably; an existing `to` is an [`Error::Io`] of `EEXIST` and stays as it is.
    pub fn rename_new(&self, from: &OsStr, to: &OsStr) -> Result<()> {
        let failed = |cause| Error::io("rename to", self.path.join(to), cause);
        match rustix::fs::renameat_with(&self.file, from, &self.file, to, RenameFlags::NOREPLACE) {
            Ok(()) => {}
            // The file system has no such rename: a hard link refuses an existing name just the same.
            Err(Errno::INVAL | Errno::NOSYS) => {
                rustix::fs::linkat(&self.file, from, &self.file, to, AtFlags::empty()).map_err(failed)?;
                let removed = rustix::fs::unlinkat(&self.file, from, AtFlags::empty());
                removed.map_err(|cause| Error::io("remove", self.path.join(from), cause))?;
            }
            Err(cause) => return Err(failed(cause)),
        }
        self.sync()
    }

    /// Removes a file durably; one that is not there is no error.
    pub fn remove(&self, name: &OsStr) -> Result<()> {
        match rustix::fs::unlinkat(&self.file, name, AtFlags::empty()) {
            Ok(()) => self.sync(),
            Err(Errno::NOENT) => Ok(()),
            Err(cause) => Err(Error::io("remove", self.path.join(name), cause)),
        }
    }
}

impl AsFd for Directory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn write_and_sync(mut file: File, path: &Path, bytes: &[u8]) -> Result<()> {
    file.write_all(bytes).map_err(|cause| Error::io("write", path, cause))?;
    sync_file(&file, path)
}

fn sync_both_parents(from: &Path, to: &Path) -> Result<()> {
    let (source, target) = (parent_of(from), parent_of(to));
    sync_directory(target)?;
    if source == target { Ok(()) } else { sync_directory(source) }
}

fn parent_of(path: &Path) -> &Path {
    or_here(path.parent().unwrap_or(path))
}

/// The parent of a relative name of one component is the empty path: the current directory.
fn or_here(path: &Path) -> &Path {
    if path.as_os_str().is_empty() { Path::new(".") } else { path }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_file_is_replaced_as_a_whole_and_leaves_nothing_beside_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        write_atomically(&path, b"one", 0o600).unwrap();
        write_atomically(&path, b"two", 0o600).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_new_name_never_replaces_an_old_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        std::fs::write(path("old"), b"old").unwrap();
        std::fs::write(path("new"), b"new").unwrap();
        let open = Directory::new(File::open(directory.path()).unwrap(), directory.path());
        let refused = open.rename_new("new".as_ref(), "old".as_ref()).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EEXIST));
        assert_eq!(std::fs::read(path("old")).unwrap(), b"old");
        open.rename_new("new".as_ref(), "free".as_ref()).unwrap();
        assert!(!path("new").exists() && path("free").exists());
    }

    #[test]
    fn a_write_that_fails_leaves_no_temporary_file() {
        let directory = tempfile::tempdir().unwrap();
        let occupied = directory.path().join("occupied");
        std::fs::create_dir_all(occupied.join("child")).unwrap();
        assert!(write_atomically(&occupied, b"x", 0o600).is_err());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn old_kernels_are_known_by_their_release() {
        for release in ["5.8.0", "5.15.0-91-generic", "6.1-rc2", "10.0.0"] {
            assert!(tells_since(release), "{release}");
        }
        for release in ["5.7.19", "4.18.0-553.el8.x86_64", "3.10.0", "", "next"] {
            assert!(!tells_since(release), "{release}");
        }
    }

    #[test]
    fn removing_twice_is_the_same_as_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("gone");
        std::fs::write(&path, b"x").unwrap();
        remove_durably(&path).unwrap();
        remove_durably(&path).unwrap();
        std::fs::write(&path, b"x").unwrap();
        let open = Directory::new(File::open(directory.path()).unwrap(), directory.path());
        open.remove("gone".as_ref()).unwrap();
        open.remove("gone".as_ref()).unwrap();
        assert!(!path.exists());
    }
}
