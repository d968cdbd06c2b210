//! The store in a directory of this machine (or of a network file system that is mounted here).
//!
//! An upload is a hidden file beside its final name, renamed when all of it is durable. Files that were read
//! stay open, a bounded number of them, since a mount reads the same packs again and again.
//!
//! What root writes belongs to the owner of the store's directory: a backup that root makes must not keep the
//! server's `archive_command` from writing beside it.
//!
//! That owner could put a link in the place of any directory and have root write elsewhere. So the way to the store's
//! directory may have links, it is the operator's; below it names are made, replaced and removed only within directories
//! that were opened without following one. Reading follows links: it gives nothing away, and a repository that somebody
//! has spread over disks can at least be restored from.
//!
//! Always true: what is given to the store's owner was made by us, a moment ago, within the store.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{AtFlags, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;

use super::{Entry, Existing, Store, Upload};
use crate::io::durable::{self, Directory};
use crate::io::{Place, Root, open_below};
use crate::{Error, Result};

/// Files kept open for reading. A process may commonly open 1024, and has other uses for them.
const OPEN_FILES_MAX: usize = 256;
/// The repository holds all of the database: nothing for others.
const FILE_MODE: u32 = 0o640;
const DIRECTORY_MODE: u32 = 0o750;
/// Marks a directory that root makes until it is given away: sticky, and nothing for others. Nobody makes such.
const MARK_MODE: u32 = 0o1000;
/// Ends the name of an upload that is under way; see [`durable::create_beside`].
const UPLOAD_SUFFIX: &str = ".part";

/// A directory as a store.
#[derive(Debug)]
pub struct LocalStore {
    root: PathBuf,
    open_files: Mutex<OpenFiles>,
    /// Directories, by their keys, whose own names are known to be durable.
    named: Mutex<HashSet<PathBuf>>,
    /// [`Directory::sync`]; a test listens to it.
    sync_directory: fn(&Directory) -> Result<()>,
}

impl LocalStore {
    /// The store in `root`, which need not exist yet.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            open_files: Mutex::default(),
            named: Mutex::default(),
            sync_directory: Directory::sync,
        }
    }

    fn path(&self, key: &str) -> Result<PathBuf> {
        check(key).map(|key| self.root.join(key))
    }

    /// The root, made where it is missing.
    fn made_root(&self) -> Result<Root> {
        if !self.root.is_dir() {
            make_way(&self.root)?;
        }
        Root::open(&self.root)
    }

    /// A directory of the store, made where it is missing: it and those above it, each durably named by the one above.
    fn made(&self, root: &Root, path: &Path) -> Result<Directory> {
        match open_directory(root.at(path)) {
            Err(missing) if is_missing(&missing) => {}
            opened => {
                let directory = opened?;
                self.settle_directory(root, path)?;
                return Ok(directory);
            }
        }
        let (parent, name) = split(path)?;
        let above = self.made(root, parent)?;
        let is_root = rustix::process::geteuid().is_root();
        let mode = if is_root { DIRECTORY_MODE | MARK_MODE } else { DIRECTORY_MODE };
        let made = match rustix::fs::mkdirat(&above, name, Mode::from_raw_mode(mode)) {
            Ok(()) => true,
            Err(Errno::EXIST) => false,
            Err(cause) => return Err(Error::io("create", root.at(path).full(), cause)),
        };
        let directory = open_directory(root.at(path))?;
        if made && is_root {
            hand_over_directory(root, &directory)?;
        }
        self.sync_name(path, &above)?;
        Ok(directory)
    }

    /// Makes the name of a directory durable that somebody else made, once: its maker may have been killed before it came
    /// to that. Those above it were named before anything was made in them; the root is the operator's.
    fn settle_directory(&self, root: &Root, path: &Path) -> Result<()> {
        if path.as_os_str().is_empty() || self.named().contains(path) {
            return Ok(());
        }
        self.sync_name(path, &open_directory(root.at(split(path)?.0))?)
    }

    fn sync_name(&self, path: &Path, above: &Directory) -> Result<()> {
        (self.sync_directory)(above)?;
        self.named().insert(path.to_owned());
        Ok(())
    }

    fn named(&self) -> std::sync::MutexGuard<'_, HashSet<PathBuf>> {
        self.named.lock().unwrap_or_else(PoisonError::into_inner)
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
        let (parent, name) = split(check(key)?)?;
        let root = self.made_root()?;
        let directory = self.made(&root, parent)?;
        let (temporary, file) = directory.create_beside(name, FILE_MODE)?;
        let upload = LocalUpload {
            path: directory.path().join(name),
            name: name.to_owned(),
            directory,
            temporary,
            file,
            existing,
            written: 0,
            failed: false,
            renamed: false,
        };
        hand_over(&root, &upload.file, &upload.path)?;
        Ok(Box::new(upload))
    }

    fn settle(&self, key: &str) -> Result<()> {
        let (parent, _) = split(check(key)?)?;
        let root = Root::open(&self.root)?;
        (self.sync_directory)(&open_directory(root.at(parent))?)?;
        self.settle_directory(&root, parent)
    }

    fn remove(&self, key: &str) -> Result<()> {
        self.open_files().forget(key);
        let (parent, name) = split(check(key)?)?;
        let directory = Root::open(&self.root).and_then(|root| open_directory(root.at(parent)));
        match directory {
            Err(missing) if is_missing(&missing) => Ok(()),
            directory => directory?.remove(name),
        }
    }

    fn sweep_uploads(&self, directory: &str) -> Result<u64> {
        let opened = Root::open(&self.root).and_then(|root| open_directory(root.at(check(directory)?)));
        let opened = match opened {
            Err(missing) if is_missing(&missing) => return Ok(0),
            opened => opened?,
        };
        let mut leftovers = Vec::new();
        let mut bytes = 0;
        for_each_child(opened.path(), |name, metadata| {
            if is_hidden(name) && name.ends_with(UPLOAD_SUFFIX) && metadata.is_file() {
                leftovers.push(name.to_owned());
                bytes += metadata.len();
            }
            Ok(())
        })?;
        leftovers.iter().try_for_each(|leftover| opened.remove(leftover.as_ref()))?;
        Ok(bytes)
    }

    fn open_lock(&self, key: &str) -> Result<File> {
        match open_lock_file(&self.made_root()?, check(key)?) {
            Err(missing) if is_missing(&missing) => {}
            opened => return opened,
        }
        // Made as every key is: whoever finds it finds it with its owner.
        match self.put(key, b"", Existing::Refuse) {
            Err(error) if error.raw_os_error() != Some(libc::EEXIST) => return Err(error),
            _ => {}
        }
        open_lock_file(&self.made_root()?, check(key)?)
    }

    fn describe(&self, key: &str) -> PathBuf {
        self.root.join(key)
    }

    fn local_path(&self, key: &str) -> Option<PathBuf> {
        self.path(key).ok()
    }
}

/// The key as a relative path, without a way out of the store.
fn check(key: &str) -> Result<&Path> {
    let path = Path::new(key);
    let plain = !key.is_empty() && path.components().all(|part| matches!(part, Component::Normal(_)));
    if plain { Ok(path) } else { Err(Error::Refused(format!("\"{key}\" is not a key of a store"))) }
}

/// The directory of a key, and the name in it.
fn split(path: &Path) -> Result<(&Path, &OsStr)> {
    let split = path.parent().zip(path.file_name());
    split.ok_or_else(|| Error::Refused(format!("\"{}\" is not a key of a store", path.display())))
}

fn is_missing(error: &Error) -> bool {
    error.raw_os_error() == Some(libc::ENOENT)
}

/// Makes the directory `path`, and those above it, durably. It is where the operator says, through whatever links.
fn make_way(path: &Path) -> Result<()> {
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
fn open_directory(place: Place<'_>) -> Result<Directory> {
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
fn link_in(place: Place<'_>) -> Option<PathBuf> {
    let mut path = place.root.path().to_owned();
    place.path.components().find_map(|component| {
        path.push(component);
        path.is_symlink().then(|| path.clone())
    })
}

/// Gives a directory to the owner of the store, if it is the one that root has just made and not another that somebody was
/// quick to put in its place.
fn hand_over_directory(root: &Root, directory: &Directory) -> Result<()> {
    let failed = |cause| Error::io("change the mode of", directory.path(), cause);
    let found = rustix::fs::fstat(directory).map_err(failed)?;
    if found.st_uid != 0 || found.st_mode & (MARK_MODE | 0o007) != MARK_MODE {
        return Ok(());
    }
    rustix::fs::fchmod(directory, Mode::from_raw_mode(found.st_mode & 0o777)).map_err(failed)?;
    hand_over(root, directory, directory.path())
}

/// Gives what root has just made in the store to the owner of the store.
fn hand_over(root: &Root, made: impl AsFd, path: &Path) -> Result<()> {
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
fn open_lock_file(root: &Root, key: &Path) -> Result<File> {
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
    /// For messages.
    path: PathBuf,
    directory: Directory,
    name: OsString,
    temporary: OsString,
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
            Existing::Refuse => self.directory.rename_new(&self.temporary, &self.name)?,
            Existing::Replace => self.directory.rename(&self.temporary, &self.name)?,
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
            let _ = rustix::fs::unlinkat(&self.directory, &self.temporary, AtFlags::empty());
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
        let listen = |directory: &Directory| {
            SYNCED.with_borrow_mut(|synced| synced.push(directory.path().to_owned()));
            directory.sync()
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
            assert_eq!(metadata.mode() & 0o7027, 0, "{made}");
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
        std::fs::hard_link(&victim, directory.path().join("repo/locks/second")).unwrap();
        std::fs::create_dir(directory.path().join("repo/locks/directory")).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, directory.path().join("repo/locks/pipe"), 0o600.into()).unwrap();
        for key in ["link", "dangling", "second", "pipe"] {
            let refused = store.open_lock(&format!("locks/{key}")).unwrap_err();
            assert!(matches!(refused, Error::Corrupt { .. }), "{key}: {refused}");
        }
        assert!(store.open_lock("locks/directory").is_err());
        assert_eq!(std::fs::read(&victim).unwrap(), b"precious");
        assert!(!directory.path().join("repo/locks/nowhere").exists());
    }

    #[test]
    fn nothing_is_changed_through_a_link_in_the_place_of_a_directory() {
        let place = tempfile::tempdir().unwrap();
        let store = LocalStore::new(place.path().join("way/repo"));
        store.put("locks/lock", b"", Existing::Refuse).unwrap();
        let repo = place.path().join("way/repo");
        let elsewhere = place.path().join("elsewhere");
        std::fs::create_dir(&elsewhere).unwrap();
        for name in ["lock", "victim", ".left.1.1.part"] {
            std::fs::write(elsewhere.join(name), b"precious").unwrap();
        }
        std::fs::rename(repo.join("locks"), repo.join("old")).unwrap();
        std::os::unix::fs::symlink(&elsewhere, repo.join("locks")).unwrap();

        let message = format!("{} is a symbolic link", repo.join("locks").display());
        let refused = [
            store.open_lock("locks/lock").map(drop),
            store.open_lock("locks/new").map(drop),
            store.put("locks/key", b"x", Existing::Refuse),
            store.put("locks/victim", b"x", Existing::Replace),
            store.put("locks/deeper/key", b"x", Existing::Refuse),
            store.remove("locks/victim"),
            store.settle("locks/victim"),
            store.sweep_uploads("locks").map(drop),
        ];
        for refused in refused {
            let refused = refused.unwrap_err();
            assert!(matches!(&refused, Error::Refused(text) if text.starts_with(&message)), "{refused}");
        }
        assert_eq!(std::fs::read_dir(&elsewhere).unwrap().count(), 3);
        for name in ["lock", "victim", ".left.1.1.part"] {
            assert_eq!(std::fs::read(elsewhere.join(name)).unwrap(), b"precious", "{name}");
        }

        // It can be read; and the way to the store is the operator's.
        assert_eq!(store.get("locks/victim", 10).unwrap(), b"precious");
        std::os::unix::fs::symlink(place.path().join("way"), place.path().join("other")).unwrap();
        let store = LocalStore::new(place.path().join("other/repo"));
        store.put("keys/key", b"x", Existing::Refuse).unwrap();
        assert!(repo.join("keys/key").is_file());
    }

    #[test]
    fn root_gives_nothing_away_that_it_did_not_make() {
        if !rustix::process::geteuid().is_root() {
            return crate::left_out::leave_out("store::local::root_gives_nothing_away_that_it_did_not_make", "root");
        }
        let directory = tempfile::tempdir().unwrap();
        std::os::unix::fs::chown(directory.path(), Some(12345), Some(54321)).unwrap();
        std::fs::create_dir(directory.path().join("locks")).unwrap();
        std::fs::write(directory.path().join("locks/old"), b"root's").unwrap();
        let store = LocalStore::new(directory.path());
        store.open_lock("locks/old").unwrap();
        store.put("locks/new", b"x", Existing::Refuse).unwrap();
        // Nor a directory of root's that took the place of the one that was made.
        let root = Root::open(directory.path()).unwrap();
        hand_over_directory(&root, &open_directory(root.at("locks")).unwrap()).unwrap();
        for (name, owner) in [("locks", 0), ("locks/old", 0), ("locks/new", 12345)] {
            assert_eq!(std::fs::metadata(directory.path().join(name)).unwrap().uid(), owner, "{name}");
        }
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
