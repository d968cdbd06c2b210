//! Reading one file of a running server's data directory.
//!
//! Large reads go past the page cache (O_DIRECT), which belongs to the database: a backup that fills it with what is read
//! once slows down everyone else. Where the file system has no O_DIRECT the file is read through the cache, and what was
//! read is given back.

use std::fs::File;
use std::io::ErrorKind;
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use engine::io::{OpenFile, Place, open_below};
use engine::units::DIRECT_BYTES;
use engine::{Error, Result};
use rustix::fs::{Advice, Mode, OFlags};
use rustix::io::Errno;

/// Smaller files are read through the cache: they are many, and mostly in it.
pub(super) const DIRECT_FROM_BYTES: u64 = 1 << 20;

/// An open file of the data directory.
#[derive(Debug)]
pub(super) struct SourceFile {
    file: Arc<OpenFile>,
    /// O_DIRECT is on; turned off if the file system turns out not to mean it.
    direct: AtomicBool,
    /// What the file was when it was opened.
    pub(super) bytes: u64,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) modified: i64,
}

impl SourceFile {
    /// Opens what is at `place`; nothing if it has vanished. A link that has taken the file's place, or that of a directory
    /// above it, is an error: it may lead anywhere.
    pub(super) fn open(place: Place<'_>) -> Result<Option<Self>> {
        // A pipe in its place would else be waited for.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
        match open_below(place, flags, Mode::empty()) {
            Ok(file) => Self::of(file.into(), &place.full()),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            Err(errno) => Err(Error::io("open", place.full(), errno)),
        }
    }

    /// A file that is open. Reads past the page cache if it is large.
    pub(super) fn of(file: File, path: &Path) -> Result<Option<Self>> {
        let metadata = file.metadata().map_err(|error| Error::io("stat", path, error))?;
        if !metadata.is_file() {
            // A directory or a pipe took the file's place since it was listed.
            return Ok(None);
        }
        let direct = metadata.len() >= DIRECT_FROM_BYTES && set_direct(&file, true);
        Ok(Some(Self {
            direct: AtomicBool::new(direct),
            bytes: metadata.len(),
            mode: metadata.mode() & 0o7777,
            uid: metadata.uid(),
            gid: metadata.gid(),
            modified: metadata.mtime(),
            file: Arc::new(OpenFile { file, path: path.to_owned(), direct }),
        }))
    }

    /// Fills `out` from `offset` on; less only at the end of the file. For O_DIRECT `out` begins and ends, and `offset`
    /// lies, at multiples of 4096; it may reach beyond the end.
    pub(super) fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<usize> {
        let mut filled = 0;
        while filled < out.len() {
            let at = offset + filled as u64;
            match self.file.file.read_at(&mut out[filled..], at) {
                Ok(0) => break,
                Ok(read) => {
                    filled += read;
                    // With O_DIRECT a read ends between two sectors only where the file ends.
                    if self.is_direct() && !filled.is_multiple_of(DIRECT_BYTES) {
                        break;
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::InvalidInput && self.is_direct() => {
                    set_direct(&self.file.file, false);
                    self.direct.store(false, Ordering::Relaxed);
                }
                Err(error) => return Err(Error::io_at("read", &self.file.path, at, error)),
            }
        }
        Ok(filled)
    }

    /// Gives the cache back what was read through it; nothing to do after O_DIRECT.
    pub(super) fn forget(&self, offset: u64, bytes: u64) {
        if !self.is_direct() && self.bytes >= DIRECT_FROM_BYTES {
            // Advice: a file system that has no use for it loses us nothing.
            let _ = rustix::fs::fadvise(&self.file.file, offset, NonZeroU64::new(bytes), Advice::DontNeed);
        }
    }

    /// For reads by a queue.
    pub(super) fn file(&self) -> &Arc<OpenFile> {
        &self.file
    }

    fn is_direct(&self) -> bool {
        self.direct.load(Ordering::Relaxed)
    }
}

/// Sets the flag on the open file; false where the file system refuses.
fn set_direct(file: &File, on: bool) -> bool {
    let Ok(flags) = rustix::fs::fcntl_getfl(file) else { return false };
    let flags = if on { flags | OFlags::DIRECT } else { flags - OFlags::DIRECT };
    rustix::fs::fcntl_setfl(file, flags).is_ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use engine::io::Root;

    use super::*;

    #[test]
    fn a_file_is_read_to_its_end_wherever_that_lies() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let root = Root::open(directory.path()).unwrap();
        for bytes in [0, 1, 4096, (1 << 20) + 1, (1 << 20) + 8192] {
            let content: Vec<u8> = (0..bytes).map(|n| u8::try_from(n % 251).unwrap()).collect();
            std::fs::write(&path, &content).unwrap();
            let file = SourceFile::open(root.at("file")).unwrap().unwrap();
            assert_eq!(file.bytes, bytes as u64);
            let (mut buffers, _) = engine::io::buffers(1).unwrap();
            let buffer = buffers.first_mut().unwrap();
            let read = file.read_at(0, buffer).unwrap();
            assert_eq!(&buffer[..read], content);
            file.forget(0, bytes as u64);
        }
    }

    #[test]
    fn what_has_vanished_is_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let root = Root::open(directory.path()).unwrap();
        assert!(SourceFile::open(root.at("gone")).unwrap().is_none());
        assert!(SourceFile::open(root.at("")).unwrap().is_none());
    }
}
