//! Reads of packs past the page cache, for bytes that are read once.
//!
//! A restore reads every pack front to back and never again: through the page cache that costs a copy of every byte and
//! a page for it, which something else on the machine would have had better use for. Where the store has no files of
//! its own here, or their file system no O_DIRECT, or a read fails, the store is asked in its usual way, and says what
//! is wrong.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::{Arc, Mutex, PoisonError};

use crate::store::Store;
use crate::units::DIRECT_BYTES;

/// Packs that stay open. Reads are in pack order, a few packs at a time.
const FILES_OPEN_MAX: usize = 64;

/// Packs that are open with O_DIRECT; none for those that cannot be.
#[derive(Debug, Default)]
pub(super) struct DirectFiles {
    open: Mutex<HashMap<String, Option<Arc<File>>>>,
}

impl DirectFiles {
    /// Fills the first `wanted` bytes of `out` from byte `offset` of `key`, and perhaps more of it. False if this is not
    /// the way to have them. Everything but `wanted` must be aligned.
    pub(super) fn read(&self, store: &dyn Store, key: &str, offset: u64, wanted: usize, out: &mut [u8]) -> bool {
        let units = offset.is_multiple_of(DIRECT_BYTES as u64) && out.len().is_multiple_of(DIRECT_BYTES);
        let aligned = units && begins_aligned(out);
        let Some(file) = Some(()).filter(|()| aligned).and_then(|()| self.file(store, key)) else { return false };
        let mut filled = 0;
        while filled < wanted {
            match file.read_at(&mut out[filled..], offset + filled as u64) {
                Ok(bytes) if filled + bytes >= wanted => return true,
                // Not at the end yet: only there a read stops within a unit.
                Ok(bytes) if bytes > 0 && bytes.is_multiple_of(DIRECT_BYTES) => filled += bytes,
                Err(cause) if cause.kind() == std::io::ErrorKind::Interrupted => {}
                Ok(_) | Err(_) => {
                    // Whatever it is, the next read opens it anew.
                    self.open().remove(key);
                    return false;
                }
            }
        }
        true
    }

    fn file(&self, store: &dyn Store, key: &str) -> Option<Arc<File>> {
        if let Some(known) = self.open().get(key) {
            return known.clone();
        }
        let path = store.local_path(key)?;
        let opened = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path);
        let file = match opened {
            Ok(file) => Some(Arc::new(file)),
            // The file system has no direct I/O: not to be asked again.
            Err(cause) if cause.raw_os_error() == Some(libc::EINVAL) => None,
            Err(_) => return None,
        };
        let mut open = self.open();
        if open.len() >= FILES_OPEN_MAX {
            open.clear();
        }
        open.insert(key.to_owned(), file.clone());
        file
    }

    fn open(&self) -> std::sync::MutexGuard<'_, HashMap<String, Option<Arc<File>>>> {
        // A panic elsewhere cannot leave the table half changed.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The address is what O_DIRECT asks for.
pub(super) fn begins_aligned(memory: &[u8]) -> bool {
    memory.as_ptr().addr().is_multiple_of(DIRECT_BYTES)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::io::Buffer;
    use crate::store::{Existing, LocalStore};

    #[test]
    fn whole_units_are_read_and_what_cannot_be_is_left_to_the_store() {
        // Not in the usual place for temporary files, which may have no O_DIRECT.
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let store = LocalStore::new(directory.path());
        let content: Vec<u8> = (0..3 * DIRECT_BYTES + 100).map(|at| (at / 7) as u8).collect();
        store.put("pack", &content, Existing::Refuse).unwrap();
        let (files, mut buffer) = (DirectFiles::default(), Buffer::alone().unwrap());
        let unit = DIRECT_BYTES as u64;
        assert!(files.read(&store, "pack", unit, DIRECT_BYTES, &mut buffer[..DIRECT_BYTES]));
        assert!(buffer[..DIRECT_BYTES] == content[DIRECT_BYTES..2 * DIRECT_BYTES]);
        let tail = DIRECT_BYTES + 100;
        assert!(files.read(&store, "pack", 2 * unit, tail, &mut buffer[..2 * DIRECT_BYTES]));
        assert!(buffer[..tail] == content[2 * DIRECT_BYTES..]);
        assert!(!files.read(&store, "pack", 2 * unit, tail + 1, &mut buffer[..2 * DIRECT_BYTES]));
        assert!(!files.read(&store, "pack", 1, 1, &mut buffer[..DIRECT_BYTES]));
        assert!(!files.read(&store, "pack", 0, 1, &mut buffer[1..=DIRECT_BYTES]));
        assert!(!files.read(&store, "absent", 0, 1, &mut buffer[..DIRECT_BYTES]));
    }
}
