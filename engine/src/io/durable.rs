//! Durability: its one home and its one order. No other file calls fsync, syncfs or rename.
//!
//! The order is always the same: sync the file, rename it, sync the directory that names it. A name that a
//! reader can see therefore has all of its bytes behind it, after any crash.
//!
//! A failed fsync is final. The kernel reports a lost write once and then forgets it (the pages are marked
//! clean), so a second fsync that succeeds proves nothing. Whoever gets an error from here gives up what it
//! was about to promise and never syncs the same file again.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, CWD, RenameFlags};
use rustix::io::Errno;

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

/// Renames durably; an existing `to` is an [`Error::Io`] of `EEXIST` and stays as it is.
pub fn rename_new_durably(from: &Path, to: &Path) -> Result<()> {
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => sync_both_parents(from, to),
        // The file system has no such rename: a hard link refuses an existing name just the same.
        Err(Errno::INVAL | Errno::NOSYS) => {
            rustix::fs::linkat(CWD, from, CWD, to, AtFlags::empty())
                .map_err(|cause| Error::io("rename to", to, cause))?;
            std::fs::remove_file(from).map_err(|cause| Error::io("remove", from, cause))?;
            sync_both_parents(from, to)
        }
        Err(cause) => Err(Error::io("rename to", to, cause)),
    }
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

/// A new file in the directory of `path`, under a name that nobody else uses: `.<name>.<pid>.<n>.part`.
/// For whoever writes more than [`write_atomically`] can take at once.
pub fn create_beside(path: &Path, mode: u32) -> Result<(PathBuf, File)> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let name =
        path.file_name().ok_or_else(|| Error::io("create", path, io::Error::from(io::ErrorKind::InvalidFilename)))?;
    loop {
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}.{}.part", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
        let temporary = path.with_file_name(hidden);
        match OpenOptions::new().write(true).read(true).create_new(true).mode(mode).open(&temporary) {
            Ok(file) => return Ok((temporary, file)),
            // Left by a process that had our number before a crash.
            Err(cause) if cause.kind() == io::ErrorKind::AlreadyExists => {}
            Err(cause) => return Err(Error::io("create", &temporary, cause)),
        }
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
        let (old, new) = (directory.path().join("old"), directory.path().join("new"));
        std::fs::write(&old, b"old").unwrap();
        std::fs::write(&new, b"new").unwrap();
        let refused = rename_new_durably(&new, &old).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EEXIST));
        assert_eq!(std::fs::read(&old).unwrap(), b"old");
        rename_new_durably(&new, &directory.path().join("free")).unwrap();
        assert!(!new.exists());
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
    }
}
