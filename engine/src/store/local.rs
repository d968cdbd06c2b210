//! The store in a directory of this machine (or of a network file system that is mounted here).
//!
//! An upload is a hidden file beside its final name, renamed when all of it is durable. Files that were read
//! stay open, a bounded number of them, since a mount reads the same packs again and again.
//!
//! What root writes belongs to the owner of the store's directory: a backup that root makes must not keep the
//! server's `archive_command` from writing beside it.
//!
//! How names below the store's directory are opened and made, whatever lies in their place: [`within`].

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::{AtFlags, Mode};
use rustix::io::Errno;

use super::large::LargeFile;
use super::{Entry, Existing, Store, Upload};
use crate::io::Root;
use crate::io::durable::{self, Directory};
use crate::{Error, Result};
use within::{
    DIRECTORY_MODE, MARK_MODE, check, hand_over, hand_over_directory, is_missing, make_way, open_directory,
    open_lock_file, open_to_read, split,
};

#[cfg(test)]
mod tests;
mod within;

/// Files kept open for reading. A process may commonly open 1024, and has other uses for them.
const OPEN_FILES_MAX: usize = 256;
/// The repository holds all of the database: nothing for others.
const FILE_MODE: u32 = 0o640;
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

    /// An upload, whose file `sink` makes ready.
    fn begin<S: Sink>(
        &self,
        key: &str,
        existing: Existing,
        sink: impl FnOnce(File, &Path) -> Result<S>,
    ) -> Result<LocalUpload<S>> {
        let (parent, name) = split(check(key)?)?;
        let root = self.made_root()?;
        let directory = self.made(&root, parent)?;
        let (temporary, file) = directory.create_beside(name, FILE_MODE)?;
        let path = directory.path().join(name);
        let handed_over = hand_over(&root, &file, &path).and_then(|()| sink(file, &path));
        let sink = handed_over.inspect_err(|_| {
            let _ = rustix::fs::unlinkat(&directory, &temporary, AtFlags::empty());
        })?;
        let name = name.to_owned();
        Ok(LocalUpload { path, name, directory, temporary, sink, existing, written: 0, failed: false, renamed: false })
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

    fn create(&self, key: &str, existing: Existing) -> Result<Box<dyn Upload + Send>> {
        Ok(Box::new(self.begin(key, existing, |file, _| Ok(file))?))
    }

    fn create_large(&self, key: &str, existing: Existing) -> Result<Box<dyn Upload>> {
        Ok(Box::new(self.begin(key, existing, LargeFile::new)?))
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

/// What takes the bytes of an upload.
trait Sink {
    /// Adds `bytes` at `offset`, which is the end.
    fn append(&mut self, bytes: &[u8], path: &Path, offset: u64) -> Result<()>;
    /// Writes `bytes` over the first ones.
    fn replace_head(&mut self, bytes: &[u8], path: &Path) -> Result<()>;
    /// How long the disk was waited for.
    fn waited(&self) -> Duration;
    /// The file, with all bytes in it.
    fn finish(&mut self) -> Result<&File>;
}

impl Sink for File {
    fn append(&mut self, bytes: &[u8], path: &Path, offset: u64) -> Result<()> {
        self.write_all(bytes).map_err(|cause| Error::io_at("write", path, offset, cause))
    }

    fn replace_head(&mut self, bytes: &[u8], path: &Path) -> Result<()> {
        self.write_all_at(bytes, 0).map_err(|cause| Error::io_at("write", path, 0, cause))
    }

    fn waited(&self) -> Duration {
        Duration::ZERO
    }

    fn finish(&mut self) -> Result<&File> {
        Ok(self)
    }
}

impl Sink for LargeFile {
    fn append(&mut self, bytes: &[u8], _: &Path, _: u64) -> Result<()> {
        Self::append(self, bytes)
    }

    fn replace_head(&mut self, bytes: &[u8], _: &Path) -> Result<()> {
        Self::replace_head(self, bytes)
    }

    fn waited(&self) -> Duration {
        Self::waited(self)
    }

    fn finish(&mut self) -> Result<&File> {
        Self::finish(self)?;
        Ok(self.file())
    }
}

struct LocalUpload<S> {
    /// For messages.
    path: PathBuf,
    directory: Directory,
    name: OsString,
    temporary: OsString,
    sink: S,
    existing: Existing,
    written: u64,
    /// Some of a write may be in the file: nothing after it would be where it should.
    failed: bool,
    renamed: bool,
}

impl<S: Sink> Upload for LocalUpload<S> {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.refuse_after_failure()?;
        self.failed = true;
        self.sink.append(bytes, &self.path, self.written)?;
        self.failed = false;
        self.written += bytes.len() as u64;
        Ok(())
    }

    fn replace_head(&mut self, bytes: &[u8]) -> Result<()> {
        self.refuse_after_failure()?;
        self.failed = true;
        self.sink.replace_head(bytes, &self.path)?;
        self.failed = false;
        Ok(())
    }

    fn written(&self) -> u64 {
        self.written
    }

    fn waited(&self) -> Duration {
        self.sink.waited()
    }

    fn commit(mut self: Box<Self>) -> Result<()> {
        self.refuse_after_failure()?;
        durable::sync_file(self.sink.finish()?, &self.path)?;
        match self.existing {
            Existing::Refuse => self.directory.rename_new(&self.temporary, &self.name)?,
            Existing::Replace => self.directory.rename(&self.temporary, &self.name)?,
        }
        self.renamed = true;
        Ok(())
    }
}

impl<S> LocalUpload<S> {
    fn refuse_after_failure(&self) -> Result<()> {
        if !self.failed {
            return Ok(());
        }
        Err(Error::io_at("write", &self.path, self.written, io::Error::other("an earlier write failed")))
    }
}

impl<S> Drop for LocalUpload<S> {
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
