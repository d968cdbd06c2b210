//! The repository's files, as the workers read them.
//!
//! Packs and WAL objects never change, so those that were read stay open, a bounded number a worker. Whatever may wait
//! for a disk by blocking (opening, looking, listing) is done on a thread for such things.

use std::cell::RefCell;
use std::collections::HashMap;
use std::os::unix::fs::OpenOptionsExt;
use std::rc::Rc;
use std::sync::Arc;

use engine::store::{Entry, Store};
use engine::{Error, Result};

use super::Shared;
use super::pieces::Handle;

/// Files that a worker keeps open.
const FILES_MAX: usize = 128;

/// An open file and its length when it was opened.
pub(super) struct Open {
    pub(super) file: Handle,
    pub(super) bytes: u64,
}

/// The files of one worker.
pub(super) struct Files {
    with_ring: bool,
    open: RefCell<HashMap<String, Rc<Open>>>,
}

impl Files {
    pub(super) fn new(with_ring: bool) -> Self {
        Self { with_ring, open: RefCell::default() }
    }

    /// The file of a key, as it is now.
    pub(super) async fn now(&self, shared: &Arc<Shared>, key: &str) -> Result<Open> {
        open((shared, self.with_ring), key).await
    }

    /// The file of a key that never changes.
    pub(super) async fn kept(&self, shared: &Arc<Shared>, key: &str) -> Result<Rc<Open>> {
        if let Some(open) = self.open.borrow().get(key) {
            return Ok(Rc::clone(open));
        }
        let opened = Rc::new(self.now(shared, key).await?);
        let mut open = self.open.borrow_mut();
        if open.len() >= FILES_MAX {
            open.clear();
        }
        open.insert(key.to_owned(), Rc::clone(&opened));
        Ok(opened)
    }

    /// After an error: the next read opens it anew.
    pub(super) fn forget(&self, key: &str) {
        self.open.borrow_mut().remove(key);
    }
}

async fn open((shared, with_ring): (&Arc<Shared>, bool), key: &str) -> Result<Open> {
    let (file, bytes) = blocking(shared, key, |store, key| {
        let path = store.local_path(key).ok_or_else(|| Error::Refused(format!("\"{key}\" is not a key of a store")))?;
        // Without waiting, should somebody have put a pipe there.
        let opened = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path);
        let file = opened.map_err(|cause| Error::io("read", &path, cause))?;
        let metadata = file.metadata().map_err(|cause| Error::io("look at", &path, cause))?;
        if !metadata.is_file() {
            return Err(Error::corrupt(&path, "it is not a regular file"));
        }
        Ok((file, metadata.len()))
    })
    .await?;
    let file = match with_ring {
        true => Handle::Ring(tokio_uring::fs::File::from_std(file)),
        false => Handle::Plain(Arc::new(file)),
    };
    Ok(Open { file, bytes })
}

/// How long a key is.
pub(super) async fn size(shared: &Arc<Shared>, key: &str) -> Result<Option<u64>> {
    blocking(shared, key, |store, key| store.size(key)).await
}

/// What lies under a directory.
pub(super) async fn list(shared: &Arc<Shared>, directory: &str) -> Result<Vec<Entry>> {
    blocking(shared, directory, |store, directory| store.list(directory)).await
}

async fn blocking<T: Send + 'static>(
    shared: &Arc<Shared>,
    key: &str,
    work: impl FnOnce(&dyn Store, &str) -> Result<T> + Send + 'static,
) -> Result<T> {
    let (shared, key) = (Arc::clone(shared), key.to_owned());
    let failed = key.clone();
    let done = tokio::task::spawn_blocking(move || work(&shared.store, &key)).await;
    done.unwrap_or_else(|_| Err(Error::io("read", failed, std::io::Error::other("a thread died"))))
}
