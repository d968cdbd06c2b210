//! The outline of a target: directories, links, and files at their final size with no content.
//!
//! Space is allocated here, before the first byte is copied, so a disk that is too small says so at once; zero
//! blocks are then there already, as unwritten extents. `pg_control` and `backup_label` get no name yet: without
//! them no server starts here, and [`super::finish`] puts them in place last.
//!
//! Doing it again is harmless, and how a crashed restore goes on. A file that is missing or has another size although the map
//! says that blocks of it are present is made anew, after the map has durably forgotten those blocks.
//!
//! In a delta a file that is there keeps its blocks, whatever its size; it only gets the one that it is to have.

use std::io::ErrorKind;
use std::path::Path;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crossbeam::channel::{Receiver, Sender, TrySendError, bounded};

use super::first::FirstFailure;
use super::layout::{Home, WAL_DIRECTORY};
use super::{Hydration, is_left_out, is_placed_last};
use crate::format::file::{FileKind, FileRecord};
use crate::io::{Found, Open, OpenFile, Place};
use crate::progress::Progress;
use crate::{Error, Result};

/// Files handed to a worker at once, and batches that may wait: the manifest is never in memory as a whole.
const BATCH_FILES: usize = 64;
const BATCHES_WAITING: usize = 16;

/// What its owner must be allowed to do with a file, and with a directory, that is being copied.
const FILE_NEEDS: u32 = 0o600;
const DIRECTORY_NEEDS: u32 = 0o700;

/// What an outline has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outlined {
    /// Directories, roots of tablespaces included.
    pub directories: u64,
    /// Symbolic links.
    pub links: u64,
    /// Regular files.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// No space could be promised to some of them.
    pub unallocated: bool,
}

#[derive(Default)]
struct Counts {
    files: AtomicU64,
    bytes: AtomicU64,
    unallocated: AtomicBool,
}

/// Files on their way to the workers, a directory's to one of them: names are made in a directory by one thread at a time,
/// and the others would only wait for it. A directory that is too large for that is everybody's.
struct Batches {
    hands: Vec<Sender<Vec<FileRecord>>>,
    /// Whose the directory is.
    turn: usize,
    batch: Vec<FileRecord>,
}

impl Batches {
    fn push(&mut self, file: FileRecord) -> Result<()> {
        let same_directory = self.batch.last().is_none_or(|last| directory(&last.path) == directory(&file.path));
        if !same_directory || self.batch.len() == BATCH_FILES {
            self.send()?;
        }
        if !same_directory {
            self.turn = (self.turn + 1) % self.hands.len();
        }
        self.batch.push(file);
        Ok(())
    }

    fn send(&mut self) -> Result<()> {
        let mut batch = std::mem::take(&mut self.batch);
        for index in 0..self.hands.len() {
            match self.hands[(self.turn + index) % self.hands.len()].try_send(batch) {
                Ok(()) => return Ok(()),
                Err(TrySendError::Full(unsent) | TrySendError::Disconnected(unsent)) => batch = unsent,
            }
        }
        // Nobody there to take them means that a worker failed and says why.
        self.hands[self.turn].send(batch).map_err(|_| Error::Cancelled)
    }
}

fn directory(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(directory, _)| directory)
}

impl Hydration {
    /// Makes the outline, or completes it. Nothing of it is durable before the first sync of [`Hydration::fill`].
    pub fn outline(&self, workers: usize, progress: &dyn Progress) -> Result<Outlined> {
        self.map.refuse_if_closed()?;
        let failure = FirstFailure::new();
        let counts = Counts::default();
        let mut outlined = Outlined::default();
        std::thread::scope(|scope| {
            let mut hands = Vec::new();
            for _ in 0..workers.max(1) {
                let (send, batches) = bounded::<Vec<FileRecord>>(BATCHES_WAITING);
                let (failure, counts) = (&failure, &counts);
                scope.spawn(move || failure.watch(|| self.outline_files(&batches, failure, counts)));
                hands.push(send);
            }
            let mut batches = Batches { hands, turn: 0, batch: Vec::with_capacity(BATCH_FILES) };
            // Directories and links are made here, in path order, so a directory is there before its files.
            failure.watch(|| {
                for file in self.backup.manifest.files() {
                    let file = file?;
                    if failure.is_set() || progress.cancelled() {
                        return Err(Error::Cancelled);
                    }
                    match &file.kind {
                        FileKind::Regular if is_left_out(&file.path) || is_placed_last(&file.path) => {}
                        FileKind::Regular => batches.push(file)?,
                        _ => self.outline_name(&file, &mut outlined)?,
                    }
                }
                batches.send()
            });
        });
        failure.take()?;
        outlined.files = counts.files.into_inner();
        outlined.bytes = counts.bytes.into_inner();
        outlined.unallocated = counts.unallocated.into_inner();
        Ok(outlined)
    }

    fn outline_files(
        &self,
        batches: &Receiver<Vec<FileRecord>>,
        failure: &FirstFailure,
        counts: &Counts,
    ) -> Result<()> {
        for file in batches.iter().flatten() {
            if failure.is_set() {
                return Ok(());
            }
            self.outline_file(&file, counts)?;
            counts.files.fetch_add(1, Ordering::Relaxed);
            counts.bytes.fetch_add(file.bytes, Ordering::Relaxed);
        }
        Ok(())
    }

    fn outline_file(&self, file: &FileRecord, counts: &Counts) -> Result<()> {
        let place = self.roots.place(&file.path)?;
        let found = if self.finds_names() { self.disk.look(place)? } else { None };
        let usable = |bytes: &u64| *bytes == file.bytes || self.over.is_some();
        if let Some(Found::File(bytes)) = found
            && usable(&bytes)
            && self.adapt_file(file, place, bytes, counts)?
        {
            return Ok(());
        }
        self.forget_blocks_of(file)?;
        if found.is_some() {
            self.disk.remove_file(place)?;
        }
        self.note_fresh(file);
        let made = self.disk.open(place, Open::Create(0o600))?;
        self.disk.set_attributes(&made, self.working_mode(file, FILE_NEEDS), self.owner)?;
        self.allocate(&made, file.bytes, counts)?;
        // Of the others it is set when they are filled.
        if file.bytes == 0 { self.disk.set_modified(&made, file.modified) } else { Ok(()) }
    }

    fn allocate(&self, file: &OpenFile, bytes: u64, counts: &Counts) -> Result<()> {
        if !self.disk.allocate(file, bytes)? {
            counts.unallocated.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Gives a file of `bytes` that is there its size and its attributes, which cost little. False if it has to be made
    /// anew: in a delta, where it has another name elsewhere, whose content is not ours to change, or where it is another
    /// user's.
    fn adapt_file(&self, file: &FileRecord, place: Place<'_>, bytes: u64, counts: &Counts) -> Result<bool> {
        let adapted = self.disk.open(place, Open::ReadBuffered).and_then(|open| {
            let shared = self.over.is_some() && self.disk.names_of(&open)? > 1;
            if !shared {
                self.disk.set_attributes(&open, self.working_mode(file, FILE_NEEDS), self.owner)?;
            }
            Ok((open, shared))
        });
        let open = match adapted {
            Ok((_, true)) => return Ok(false),
            Ok((open, false)) => open,
            Err(Error::Io { source, .. }) if self.over.is_some() && source.kind() == ErrorKind::PermissionDenied => {
                return Ok(false);
            }
            Err(cause) => return Err(cause),
        };
        if bytes != file.bytes {
            self.forget_blocks_of(file)?;
            let open = self.disk.open(place, Open::WriteBuffered)?;
            if bytes > file.bytes {
                self.disk.set_size(&open, file.bytes)?;
            } else {
                self.allocate(&open, file.bytes, counts)?;
            }
        }
        self.disk.set_modified(&open, file.modified)?;
        Ok(true)
    }

    /// The mode until all is copied: an ordinary user could not fill a `server.key` of mode 0400, or a directory
    /// without the right to write. [`Hydration::place_last`] sets the recorded one.
    fn working_mode(&self, file: &FileRecord, needs: u32) -> u32 {
        if file.mode & needs != needs {
            let mut restricted = self.restricted.lock().unwrap_or_else(PoisonError::into_inner);
            restricted.insert(file.path.clone(), file.mode);
        }
        file.mode | needs
    }

    /// Before a file is made anew, the map must not say any more that something of it is there.
    fn forget_blocks_of(&self, file: &FileRecord) -> Result<()> {
        let first = file.first_block.0;
        let blocks = first..first + self.backup.info.block_bytes.blocks_of(file.bytes);
        if !self.finds_names() || !blocks.clone().any(|block| self.map.is_present(crate::units::BlockNumber(block))) {
            return Ok(());
        }
        self.map.forget(blocks)
    }

    /// Makes what is not a regular file.
    fn outline_name(&self, file: &FileRecord, outlined: &mut Outlined) -> Result<()> {
        let (home, below) = self.roots.layout().home(&file.path);
        let in_data = self.roots.data()?.at(file.path.as_str());
        match (&file.kind, home) {
            (FileKind::Regular, _) => {}
            // A link in the original must not lead the copy into the original's WAL: it is a directory here, or a
            // link to the directory that was asked for.
            _ if file.path == WAL_DIRECTORY => {
                if home == Home::Wal {
                    let target = absolute(&self.roots.layout().target_path(&file.path))?;
                    self.make_link(in_data, &target)?;
                    outlined.links += 1;
                }
                self.make_directory(self.roots.place(&file.path)?, private_mode(file))?;
                outlined.directories += 1;
            }
            (FileKind::Directory, _) => {
                let mode = self.working_mode(file, DIRECTORY_NEEDS);
                self.make_directory(self.roots.place(&file.path)?, mode)?;
                outlined.directories += 1;
            }
            (FileKind::Symlink { target }, _) => {
                self.make_link(self.roots.place(&file.path)?, Path::new(target))?;
                outlined.links += 1;
            }
            (FileKind::Tablespace { .. }, Home::Tablespace(_)) if below.is_empty() => {
                let target = absolute(&self.roots.layout().target_path(&file.path))?;
                self.make_link(in_data, &target)?;
                self.set_attributes(self.roots.place(&file.path)?, private_mode(file))?;
                outlined.links += 1;
                outlined.directories += 1;
            }
            (FileKind::Tablespace { location }, _) => {
                let detail = format!("tablespace {} (originally {location}) has no directory in the target", file.path);
                return Err(Error::Refused(detail));
            }
        }
        Ok(())
    }

    fn make_directory(&self, place: Place<'_>, mode: u32) -> Result<()> {
        if !place.path.as_os_str().is_empty() {
            self.disk.make_directory(place, 0o700)?;
        }
        self.set_attributes(place, mode)
    }

    fn set_attributes(&self, place: Place<'_>, mode: u32) -> Result<()> {
        let directory: &OpenFile = &*self.disk.open(place, Open::Directory)?;
        self.disk.set_attributes(directory, mode, self.owner)
    }

    fn make_link(&self, place: Place<'_>, target: &Path) -> Result<()> {
        if self.finds_names() && self.disk.look(place)? == Some(Found::Other) {
            self.disk.remove_file(place)?;
        }
        self.disk.make_link(place, target)?;
        match self.owner {
            Some(owner) => self.disk.set_link_owner(place, owner),
            None => Ok(()),
        }
    }
}

/// A link's record says 0777, which no directory of PostgreSQL's may have.
fn private_mode(file: &FileRecord) -> u32 {
    if file.kind == FileKind::Directory { file.mode } else { 0o700 }
}

fn absolute(path: &Path) -> Result<std::path::PathBuf> {
    std::path::absolute(path).map_err(|cause| Error::io("resolve", path, cause))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::units::BlockNumber;

    fn file_record(path: &str) -> FileRecord {
        let (kind, first_block) = (FileKind::Regular, BlockNumber(0));
        FileRecord {
            path: path.into(),
            kind,
            mode: 0o600,
            uid: 1,
            gid: 1,
            modified: 0,
            bytes: 0,
            crc32c: 0,
            first_block,
        }
    }

    fn batches_of(workers: usize) -> (Batches, Vec<Receiver<Vec<FileRecord>>>) {
        let (hands, batches) = (0..workers).map(|_| bounded(BATCHES_WAITING)).unzip();
        (Batches { hands, turn: 0, batch: Vec::new() }, batches)
    }

    fn directories(batches: &Receiver<Vec<FileRecord>>) -> Vec<String> {
        let mut directories: Vec<_> =
            batches.try_iter().flatten().map(|file| directory(&file.path).to_owned()).collect();
        directories.dedup();
        directories
    }

    #[test]
    fn a_directory_is_one_workers_unless_it_is_too_large_for_it() {
        let (mut batches, taken) = batches_of(2);
        for directory in ["base/1", "base/2", "base/3"] {
            (0..3 * BATCH_FILES).for_each(|n| batches.push(file_record(&format!("{directory}/{n}"))).unwrap());
        }
        batches.send().unwrap();
        assert_eq!(directories(&taken[0]), ["base/1", "base/3"]);
        assert_eq!(directories(&taken[1]), ["base/2"]);

        let files = BATCH_FILES * (BATCHES_WAITING + 2);
        (0..files).for_each(|n| batches.push(file_record(&format!("base/4/{n}"))).unwrap());
        batches.send().unwrap();
        let each = taken.iter().map(|batches| batches.try_iter().flatten().count()).collect::<Vec<_>>();
        assert_eq!(each.iter().sum::<usize>(), files);
        assert_eq!(each.iter().min(), Some(&(2 * BATCH_FILES)), "the second took what the first had no room for");
    }

    #[test]
    fn without_workers_it_ends() {
        let (mut batches, taken) = batches_of(2);
        drop(taken);
        batches.push(file_record("base/1/1")).unwrap();
        assert!(matches!(batches.send(), Err(Error::Cancelled)));
    }
}
