//! The store in a directory of this machine (or of a network file system that is mounted here).
//!
//! An upload is a hidden file beside its final name, renamed when all of it is durable. Files that were read
//! stay open, a bounded number of them, since a mount reads the same packs again and again.
//!
//! What root writes belongs to the owner of the store's directory: a backup that root makes must not keep the
//! server's `archive_command` from writing beside it.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::{Entry, Existing, Store, Upload};
use crate::io::durable;
use crate::{Error, Result};

/// Files kept open for reading. A process may commonly open 1024, and has other uses for them.
const OPEN_FILES_MAX: usize = 256;
/// The repository holds all of the database: nothing for others.
const FILE_MODE: u32 = 0o640;
const DIRECTORY_MODE: u32 = 0o750;
/// Ends the name of an upload that is under way; see [`durable::create_beside`].
const UPLOAD_SUFFIX: &str = ".part";

/// A directory as a store.
#[derive(Debug)]
pub struct LocalStore {
    root: PathBuf,
    open_files: Mutex<OpenFiles>,
    /// Directories whose own names are known to be durable.
    named: Mutex<HashSet<PathBuf>>,
    /// [`durable::sync_directory`]; a test listens to it.
    sync_directory: fn(&Path) -> Result<()>,
}

impl LocalStore {
    /// The store in `root`, which need not exist yet.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            open_files: Mutex::default(),
            named: Mutex::default(),
            sync_directory: durable::sync_directory,
        }
    }

    fn path(&self, key: &str) -> Result<PathBuf> {
        let path = Path::new(key);
        let plain = !key.is_empty() && path.components().all(|part| matches!(part, Component::Normal(_)));
        if plain { Ok(self.root.join(path)) } else { Err(Error::Refused(format!("\"{key}\" is not a key of a store"))) }
    }

    fn make_parents(&self, path: &Path) -> Result<()> {
        path.parent()
            .filter(|parent| !parent.as_os_str().is_empty())
            .map_or(Ok(()), |parent| self.make_directory(parent))
    }

    /// Makes a directory and its missing parents, each durably named by the one above.
    fn make_directory(&self, path: &Path) -> Result<()> {
        if path.is_dir() {
            return self.settle_directory(path);
        }
        self.make_parents(path)?;
        match std::fs::DirBuilder::new().mode(DIRECTORY_MODE).create(path) {
            Ok(()) => {
                // Not through a link that somebody was quick to put in its place.
                let own = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let directory = rustix::fs::open(path, own, Mode::empty());
                let directory = directory.map_err(|cause| Error::io("open", path, cause))?;
                self.hand_over(&directory.into(), path)?;
            }
            Err(cause) if cause.kind() == io::ErrorKind::AlreadyExists => {}
            Err(cause) => return Err(Error::io("create", path, cause)),
        }
        self.sync_name(path)
    }

    /// Makes the name of a directory durable that somebody else made, once: its maker may have been killed before it came
    /// to that. Those above it were named before anything was made in them; the root is the operator's.
    fn settle_directory(&self, path: &Path) -> Result<()> {
        if path == self.root || !path.starts_with(&self.root) || self.named().contains(path) {
            return Ok(());
        }
        self.sync_name(path)
    }

    fn sync_name(&self, path: &Path) -> Result<()> {
        (self.sync_directory)(path.parent().unwrap_or(path))?;
        self.named().insert(path.to_owned());
        Ok(())
    }

    fn named(&self) -> std::sync::MutexGuard<'_, HashSet<PathBuf>> {
        self.named.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives what root has made in the store to the owner of the store.
    fn hand_over(&self, file: &File, path: &Path) -> Result<()> {
        if !rustix::process::geteuid().is_root() || !path.starts_with(&self.root) || path == self.root {
            return Ok(());
        }
        let owner = std::fs::metadata(&self.root).map_err(|cause| Error::io("look at", &self.root, cause))?;
        let given = std::os::unix::fs::fchown(file, Some(owner.uid()), Some(owner.gid()));
        given.map_err(|cause| Error::io("change the owner of", path, cause))
    }

    fn open_files(&self) -> std::sync::MutexGuard<'_, OpenFiles> {
        // A panic elsewhere cannot leave the table half changed.
        self.open_files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn opened(&self, key: &str, path: &Path) -> Result<Arc<File>> {
        if let Some(file) = self.open_files().get(key) {
            return Ok(file);
        }
        let file = Arc::new(open_to_read(path)?);
        self.open_files().insert(key, &file);
        Ok(file)
    }
}

impl Store for LocalStore {
    fn read_at(&self, key: &str, offset: u64, out: &mut [u8]) -> Result<()> {
        let path = self.path(key)?;
        let read = self.opened(key, &path)?.read_exact_at(out, offset);
        read.map_err(|cause| {
            // Whatever is wrong (a stale handle of a network file system, say), the next read opens it anew.
            self.open_files().forget(key);
            if cause.kind() == io::ErrorKind::UnexpectedEof {
                Error::corrupt_at(&path, offset, format!("the file ends within the {} bytes wanted here", out.len()))
            } else {
                Error::io_at("read", &path, offset, cause)
            }
        })
    }

    fn size(&self, key: &str) -> Result<Option<u64>> {
        let path = self.path(key)?;
        match std::fs::metadata(&path) {
            Ok(metadata) => Ok(Some(metadata.len())),
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(cause) => Err(Error::io("look at", &path, cause)),
        }
    }

    fn list(&self, directory: &str) -> Result<Vec<Entry>> {
        let path = self.path(directory)?;
        let mut entries = Vec::new();
        for_each_child(&path, |name, metadata| {
            if !is_hidden(name) {
                let is_directory = metadata.is_dir();
                let bytes = if is_directory { 0 } else { metadata.len() };
                entries.push(Entry {
                    key: format!("{directory}/{name}"),
                    bytes,
                    modified: metadata.mtime(),
                    is_directory,
                });
            }
            Ok(())
        })?;
        entries.sort_by(|one, other| one.key.cmp(&other.key));
        Ok(entries)
    }

    fn get(&self, key: &str, limit: u64) -> Result<Vec<u8>> {
        let path = self.path(key)?;
        let mut bytes = Vec::new();
        let file = open_to_read(&path)?;
        file.take(limit + 1).read_to_end(&mut bytes).map_err(|cause| Error::io("read", &path, cause))?;
        if bytes.len() as u64 > limit {
            return Err(Error::corrupt(&path, format!("longer than {limit} bytes")));
        }
        Ok(bytes)
    }

    fn create(&self, key: &str, existing: Existing) -> Result<Box<dyn Upload>> {
        let path = self.path(key)?;
        self.make_parents(&path)?;
        let (temporary, file) = durable::create_beside(&path, FILE_MODE)?;
        self.hand_over(&file, &temporary)?;
        Ok(Box::new(LocalUpload { path, temporary, file, existing, written: 0, failed: false, renamed: false }))
    }

    fn settle(&self, key: &str) -> Result<()> {
        let path = self.path(key)?;
        let Some(parent) = path.parent() else { return Ok(()) };
        (self.sync_directory)(parent)?;
        self.settle_directory(parent)
    }

    fn remove(&self, key: &str) -> Result<()> {
        self.open_files().forget(key);
        durable::remove_durably(&self.path(key)?)
    }

    fn sweep_uploads(&self, directory: &str) -> Result<u64> {
        let path = self.path(directory)?;
        let mut leftovers = Vec::new();
        let mut bytes = 0;
        match for_each_child(&path, |name, metadata| {
            if is_hidden(name) && name.ends_with(UPLOAD_SUFFIX) && metadata.is_file() {
                leftovers.push(path.join(name));
                bytes += metadata.len();
            }
            Ok(())
        }) {
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(0),
            other => other?,
        }
        leftovers.iter().try_for_each(|leftover| durable::remove_durably(leftover))?;
        Ok(bytes)
    }

    fn open_lock(&self, key: &str) -> Result<File> {
        let path = self.path(key)?;
        self.make_parents(&path)?;
        // Not truncated: the text belongs to whoever holds the lock. Not through a link: the holder writes into the file,
        // and what the link leads to may be anything that root can write.
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match rustix::fs::open(&path, flags, Mode::from_raw_mode(FILE_MODE)) {
            Ok(file) => File::from(file),
            Err(Errno::LOOP) => return Err(Error::corrupt(&path, "a lock that is a symbolic link")),
            Err(cause) => return Err(Error::io("open", &path, cause)),
        };
        refuse_unless_regular(&file, &path)?;
        self.hand_over(&file, &path)?;
        Ok(file)
    }

    fn describe(&self, key: &str) -> PathBuf {
        self.root.join(key)
    }

    fn local_path(&self, key: &str) -> Option<PathBuf> {
        self.path(key).ok()
    }
}

/// Opens a file of the store. A pipe in its place would else be waited for until somebody writes into it.
fn open_to_read(path: &Path) -> Result<File> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty()).map_err(|cause| Error::io("open", path, cause))?;
    let file = File::from(file);
    refuse_unless_regular(&file, path).map(|()| file)
}

fn refuse_unless_regular(file: &File, path: &Path) -> Result<()> {
    let metadata = file.metadata().map_err(|cause| Error::io("look at", path, cause))?;
    if metadata.is_file() {
        return Ok(());
    }
    Err(Error::corrupt(path, "it is no regular file"))
}

struct LocalUpload {
    path: PathBuf,
    temporary: PathBuf,
    file: File,
    existing: Existing,
    written: u64,
    /// Some of a write may be in the file: nothing after it would be where it should.
    failed: bool,
    renamed: bool,
}

impl Upload for LocalUpload {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.refuse_after_failure()?;
        self.file.write_all(bytes).map_err(|cause| {
            self.failed = true;
            Error::io_at("write", &self.path, self.written, cause)
        })?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    fn written(&self) -> u64 {
        self.written
    }

    fn commit(mut self: Box<Self>) -> Result<()> {
        self.refuse_after_failure()?;
        durable::sync_file(&self.file, &self.path)?;
        match self.existing {
            Existing::Refuse => durable::rename_new_durably(&self.temporary, &self.path)?,
            Existing::Replace => durable::rename_durably(&self.temporary, &self.path)?,
        }
        self.renamed = true;
        Ok(())
    }
}

impl LocalUpload {
    fn refuse_after_failure(&self) -> Result<()> {
        if !self.failed {
            return Ok(());
        }
        Err(Error::io_at("write", &self.path, self.written, io::Error::other("an earlier write failed")))
    }
}

impl Drop for LocalUpload {
    fn drop(&mut self) {
        if !self.renamed {
            // What cannot be removed now is swept later; it is invisible either way.
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}

fn for_each_child(path: &Path, mut each: impl FnMut(&str, &std::fs::Metadata) -> Result<()>) -> Result<()> {
    let list_error = |cause| Error::io("list", path, cause);
    for child in std::fs::read_dir(path).map_err(list_error)? {
        let child = child.map_err(list_error)?;
        let metadata = match child.metadata() {
            Ok(metadata) => metadata,
            // Renamed or removed while we look: not there.
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => continue,
            Err(cause) => return Err(Error::io("look at", child.path(), cause)),
        };
        // No key of ours is anything but ASCII: a file that somebody else put here.
        if let Some(name) = child.file_name().to_str() {
            each(name, &metadata)?;
        }
    }
    Ok(())
}

fn is_hidden(name: &str) -> bool {
    name.starts_with('.')
}

/// Open files by key; the one that was not used for longest makes room.
#[derive(Debug, Default)]
struct OpenFiles {
    files: HashMap<String, (Arc<File>, u64)>,
    clock: u64,
}

impl OpenFiles {
    fn get(&mut self, key: &str) -> Option<Arc<File>> {
        self.clock += 1;
        let (file, used) = self.files.get_mut(key)?;
        *used = self.clock;
        Some(Arc::clone(file))
    }

    fn insert(&mut self, key: &str, file: &Arc<File>) {
        if self.files.len() >= OPEN_FILES_MAX {
            let oldest = self.files.iter().min_by_key(|(_, (_, used))| *used).map(|(key, _)| key.clone());
            oldest.map(|key| self.files.remove(&key));
        }
        self.files.insert(key.to_owned(), (Arc::clone(file), self.clock));
    }

    fn forget(&mut self, key: &str) {
        self.files.remove(key);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::store::conformance;

    #[test]
    fn a_local_directory_conforms() {
        let directory = tempfile::tempdir().unwrap();
        conformance::run(&|name| Box::new(LocalStore::new(directory.path().join(name))));
    }

    #[test]
    fn a_directory_whose_maker_was_killed_is_named_durably_before_anything_in_it_is_promised() {
        thread_local!(static SYNCED: std::cell::RefCell<Vec<PathBuf>> = const { std::cell::RefCell::new(Vec::new()) });
        let listen = |path: &Path| {
            SYNCED.with_borrow_mut(|synced| synced.push(path.to_owned()));
            durable::sync_directory(path)
        };
        let directory = tempfile::tempdir().unwrap();
        let synced = || SYNCED.take().iter().filter(|path| **path == directory.path().join("wal")).count();
        // What was left: made, and its name never synced.
        std::fs::create_dir_all(directory.path().join("wal/00000001")).unwrap();
        let store = || LocalStore { sync_directory: listen, ..LocalStore::new(directory.path()) };
        let pushing = store();
        pushing.put("wal/00000001/1", b"x", Existing::Refuse).unwrap();
        assert_eq!(synced(), 1);
        pushing.put("wal/00000001/2", b"x", Existing::Refuse).unwrap();
        assert_eq!(synced(), 0, "once is enough");
        // Another push of the same finds it there, and promises it as well.
        store().settle("wal/00000001/1").unwrap();
        assert_eq!(synced(), 1);
    }

    #[test]
    fn what_root_writes_belongs_to_the_owner_of_the_store() {
        if !rustix::process::geteuid().is_root() {
            // Only root can give files away; everybody else has nothing to hand over.
            return crate::left_out::leave_out(
                "store::local::what_root_writes_belongs_to_the_owner_of_the_store",
                "root",
            );
        }
        let directory = tempfile::tempdir().unwrap();
        std::os::unix::fs::chown(directory.path(), Some(12345), Some(54321)).unwrap();
        let store = LocalStore::new(directory.path());
        store.put("new/deep/key", b"x", Existing::Refuse).unwrap();
        store.open_lock("locks/lock").unwrap();
        for made in ["new", "new/deep", "new/deep/key", "locks", "locks/lock"] {
            let metadata = std::fs::metadata(directory.path().join(made)).unwrap();
            assert_eq!((metadata.uid(), metadata.gid()), (12345, 54321), "{made}");
        }
    }

    #[test]
    fn nothing_is_written_through_a_link_in_the_place_of_a_lock() {
        let directory = tempfile::tempdir().unwrap();
        let store = LocalStore::new(directory.path().join("repo"));
        let victim = directory.path().join("victim");
        std::fs::write(&victim, b"precious").unwrap();
        drop(store.open_lock("locks/good").unwrap());
        std::os::unix::fs::symlink(&victim, directory.path().join("repo/locks/link")).unwrap();
        std::os::unix::fs::symlink("nowhere", directory.path().join("repo/locks/dangling")).unwrap();
        std::fs::create_dir(directory.path().join("repo/locks/directory")).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, directory.path().join("repo/locks/pipe"), 0o600.into()).unwrap();
        for key in ["link", "dangling", "pipe"] {
            let refused = store.open_lock(&format!("locks/{key}")).unwrap_err();
            assert!(matches!(refused, Error::Corrupt { .. }), "{key}: {refused}");
        }
        assert!(store.open_lock("locks/directory").is_err());
        assert_eq!(std::fs::read(&victim).unwrap(), b"precious");
        assert!(!directory.path().join("repo/locks/nowhere").exists());
    }

    #[test]
    fn what_is_no_file_is_damage_and_nobody_waits_for_it() {
        let directory = tempfile::tempdir().unwrap();
        let store = LocalStore::new(directory.path());
        rustix::fs::mkfifoat(rustix::fs::CWD, directory.path().join("pipe"), 0o600.into()).unwrap();
        std::fs::create_dir(directory.path().join("directory")).unwrap();
        for key in ["pipe", "directory"] {
            assert!(matches!(store.get(key, 10), Err(Error::Corrupt { .. })), "{key}");
            assert!(matches!(store.read_at(key, 0, &mut [0]), Err(Error::Corrupt { .. })), "{key}");
        }
    }

    #[test]
    fn more_files_than_may_be_open_are_all_readable() {
        let directory = tempfile::tempdir().unwrap();
        let store = LocalStore::new(directory.path());
        for number in 0..OPEN_FILES_MAX + 10 {
            store.put(&format!("many/{number}"), &number.to_le_bytes(), Existing::Refuse).unwrap();
        }
        for number in 0..OPEN_FILES_MAX + 10 {
            let mut bytes = [0; 8];
            store.read_at(&format!("many/{number}"), 0, &mut bytes).unwrap();
            assert_eq!(bytes, number.to_le_bytes());
        }
        assert_eq!(store.open_files().files.len(), OPEN_FILES_MAX);
    }
}
