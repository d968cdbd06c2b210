//! The repository: backups of clusters, each complete, and their WAL.
//!
//! ```text
//! pghydrant.json                         what this repository is
//! clusters/<cluster>/cluster.json        what the cluster is
//! clusters/<cluster>/locks/              backup, push: flock'ed files
//! clusters/<cluster>/packs/              blocks
//! clusters/<cluster>/manifests/          which blocks make which files
//! clusters/<cluster>/backups/            a description of each backup: its appearance is the commit; marks of unfinished ones
//! clusters/<cluster>/wal/<timeline>/     segments, histories
//! ```
//!
//! Always true: what a committed backup refers to is durable and never changes; everything that a crash leaves is
//! garbage that the mark of an unfinished backup claims, and the next backup sweeps that and nothing else.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use crate::codec::Compression;
use crate::format::Malformed;
use crate::remote::{AccessFile, Interruptible, Patience, RemoteStore, Until};
use crate::store::{Entry, Existing, LocalStore, Store};
use crate::units::{BlockSize, ClusterName, SystemIdentifier};
use crate::{Error, Result};

mod chunks;
mod cluster;
pub(crate) mod keys;
mod leftovers;
mod lock;
mod manifest;
mod packs;
mod sweep;
#[cfg(test)]
pub(crate) mod tests;
mod verify;
mod walk;
mod writer;

pub use crate::format::repository::{ClusterInfo, RepositoryId, RepositoryInfo};
pub use cluster::{Backup, Cluster};
pub use lock::{Lock, LockKind};
pub use manifest::Manifest;
pub use packs::{Outcome, PackWriter};
pub use verify::{Finding, Kind, Proof, Verification};
pub use writer::{BackupWriter, Description, LeafRef, Parent};

/// More than any description of ours needs; a longer one is damaged.
pub(crate) const DESCRIPTION_BYTES_MAX: u64 = 64 << 20;

/// An open repository; clones share it.
#[derive(Clone, Debug)]
pub struct Repository {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    store: Arc<dyn Store>,
    info: RepositoryInfo,
}

impl Repository {
    /// Makes a repository in `root`, which must be empty or not exist.
    pub fn init(root: &Path, compression: Compression, block_bytes: BlockSize) -> Result<Self> {
        refuse_unless_empty(root)?;
        let store = LocalStore::new(root);
        let info = RepositoryInfo::new(random_id()?, compression, block_bytes, now());
        put(&store, keys::REPOSITORY, info.to_json())?;
        Self::with_store(root, Arc::new(store))
    }

    /// Opens the repository in `root`: a directory, or the file that says how a mount service is reached ([`AccessFile`]).
    pub fn open(root: &Path) -> Result<Self> {
        Self::open_with(root, |file| Arc::new(Until(file.patience)))
    }

    /// The same, where nobody waits for a mount service any more once `interrupted` is set: [`Error::Cancelled`].
    pub fn open_interruptibly(root: &Path, interrupted: &Arc<AtomicBool>) -> Result<Self> {
        let interrupted = Arc::clone(interrupted);
        Self::open_with(root, |file| Arc::new(Interruptible { until: file.patience, interrupted }))
    }

    fn open_with(root: &Path, patience: impl FnOnce(&AccessFile) -> Arc<dyn Patience>) -> Result<Self> {
        let store: Arc<dyn Store> = match AccessFile::read(root)? {
            None => Arc::new(LocalStore::new(root)),
            Some(file) => Arc::new(RemoteStore::connect(file.access.clone(), patience(&file))?),
        };
        Self::with_store(root, store)
    }

    /// The same, by somebody who waits for a mount service that is gone: whoever waits for the answer takes none for one.
    pub fn open_patiently(root: &Path) -> Result<Self> {
        let Some(file) = AccessFile::read(root)? else { return Self::open(root) };
        let since = Instant::now();
        loop {
            match connect(&file) {
                Err(Error::Io { .. }) if since.elapsed() < file.patience => std::thread::sleep(CONNECT_PAUSE),
                connected => return Self::with_store(root, Arc::new(connected?)),
            }
        }
    }

    /// Opens the repository in `store`, whatever kind of store that is; `root` is what people call it.
    pub fn with_store(root: &Path, store: Arc<dyn Store>) -> Result<Self> {
        let Some(info) = get(&*store, keys::REPOSITORY, RepositoryInfo::from_json)? else {
            if !list_or_empty(&*store, keys::CLUSTERS)?.is_empty() {
                let detail = "the description of the repository is missing, but its clusters are there";
                return Err(Error::corrupt(store.describe(keys::REPOSITORY), detail));
            }
            let what = if root.exists() { "it holds no pghydrant.json" } else { "no such directory" };
            return Err(Error::NotFound(format!("{} is not a repository: {what}", root.display())));
        };
        Ok(Self { inner: Arc::new(Inner { root: root.to_owned(), store, info }) })
    }

    /// What it is.
    pub fn info(&self) -> &RepositoryInfo {
        &self.inner.info
    }

    /// Its directory.
    pub fn root(&self) -> &Path {
        &self.inner.root
    }

    /// Where its bytes live.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.inner.store
    }

    /// The names of its clusters, sorted.
    pub fn clusters(&self) -> Result<Vec<ClusterName>> {
        let entries = list_or_empty(&**self.store(), keys::CLUSTERS)?;
        let mut names = Vec::new();
        for name in entries.iter().filter_map(|entry| entry.name().parse::<ClusterName>().ok()) {
            if self.store().size(&keys::cluster_info(&name))?.is_some() || self.has_content(&name)? {
                names.push(name);
            }
        }
        Ok(names)
    }

    /// Opens a cluster.
    pub fn cluster(&self, name: &ClusterName) -> Result<Cluster> {
        match self.find_cluster(name)? {
            Some(cluster) => Ok(cluster),
            None => {
                let known = self.clusters()?;
                let known = known.iter().map(ClusterName::as_str).collect::<Vec<_>>().join(", ");
                let known = if known.is_empty() { "none yet".to_owned() } else { known };
                let root = self.root().display();
                Err(Error::NotFound(format!("repository {root} has no cluster \"{name}\" (it has: {known})")))
            }
        }
    }

    /// Opens a cluster, if there is such a one.
    pub fn find_cluster(&self, name: &ClusterName) -> Result<Option<Cluster>> {
        let key = keys::cluster_info(name);
        match get(&**self.store(), &key, ClusterInfo::from_json)? {
            Some(info) => Cluster::new(self.clone(), info, name).map(Some),
            None if self.has_content(name)? => {
                let detail = "the description of the cluster is missing, but its backups or its WAL are there";
                Err(Error::corrupt(self.store().describe(&key), detail))
            }
            None => Ok(None),
        }
    }

    /// Whether there is more of a cluster than what a crash left of its first push, or of a first backup that did not
    /// know yet whose it is ([`Repository::begin_first_backup`]): their marks count for nothing.
    fn has_content(&self, name: &ClusterName) -> Result<bool> {
        let store = &**self.store();
        let marks: Vec<_> = list_or_empty(store, &keys::backups(name))?;
        let (marks, described): (Vec<_>, Vec<_>) =
            marks.iter().map(Entry::name).partition(|name| keys::unfinished_of(name).is_some());
        let manifests = list_or_empty(store, &keys::manifests(name))?;
        let is_marked = |entry: &Entry| {
            let label = keys::manifest_of(entry.name());
            label.is_some_and(|label| marks.iter().any(|mark| keys::unfinished_of(mark).as_ref() == Some(&label)))
        };
        Ok(!described.is_empty()
            || !manifests.iter().all(is_marked)
            || !list_or_empty(store, &keys::wal(name))?.is_empty())
    }

    /// Begins a backup under a name that no cluster has yet, of a source that tells only at its end whose it is. No cluster
    /// is there until [`BackupWriter::of_cluster`] is told; until then nothing of the backup is seen by anybody.
    pub fn begin_first_backup(&self, name: &ClusterName) -> Result<BackupWriter> {
        if self.find_cluster(name)?.is_some() {
            return Err(Error::Refused(format!("the repository has a cluster \"{name}\" already")));
        }
        // Numbers that no cluster has: a backup that is finished without its cluster is refused.
        let nobody = ClusterInfo::new(name.clone(), SystemIdentifier(0), 0, now());
        Cluster::new(self.clone(), nobody, name)?.begin_backup(Parent::Full)
    }

    /// Opens the cluster that `info` describes, making it if it is new. A cluster of that name with another system
    /// identifier or segment size is refused: two clusters never share an archive.
    pub fn create_cluster(&self, info: ClusterInfo) -> Result<Cluster> {
        let cluster = match self.find_cluster(&info.name)? {
            Some(cluster) => cluster,
            None => match put(&**self.store(), &keys::cluster_info(&info.name), info.to_json()) {
                Ok(()) => Cluster::new(self.clone(), info.clone(), &info.name)?,
                // Another process was first: what it wrote counts.
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => self.cluster(&info.name)?,
                Err(error) => return Err(error),
            },
        };
        cluster.refuse_stranger(info.system_identifier, info.wal_segment_bytes)?;
        Ok(cluster)
    }
}

fn connect(file: &AccessFile) -> Result<RemoteStore> {
    RemoteStore::connect(file.access.clone(), Arc::new(Until(file.patience)))
}

/// Between two attempts to reach a mount service.
const CONNECT_PAUSE: Duration = Duration::from_secs(1);

/// UTC, RFC 3339, to the second.
pub(crate) fn now() -> String {
    let second = jiff::Timestamp::now().as_second();
    jiff::Timestamp::from_second(second).map(|time| time.to_string()).unwrap_or_default()
}

/// Reads a description; none if there is no such key.
pub(crate) fn get<T>(store: &dyn Store, key: &str, parse: impl Fn(&[u8]) -> Result<T, Malformed>) -> Result<Option<T>> {
    match store.get(key, DESCRIPTION_BYTES_MAX) {
        Ok(bytes) => parse(&bytes).map(Some).map_err(|malformed| malformed.in_file(store.describe(key), 0)),
        Err(error) if is_absent(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes a description that must be new.
pub(crate) fn put(store: &dyn Store, key: &str, json: Result<Vec<u8>, Malformed>) -> Result<()> {
    let json = json.map_err(|malformed| Error::io("write", store.describe(key), std::io::Error::other(malformed)))?;
    store.put(key, &json, Existing::Refuse)
}

/// The store has no such key or directory.
pub(crate) fn is_absent(error: &Error) -> bool {
    error.raw_os_error() == Some(libc::ENOENT)
}

/// The children of a directory that its first entry makes.
pub(crate) fn list_or_empty(store: &dyn Store, directory: &str) -> Result<Vec<Entry>> {
    match store.list(directory) {
        Err(error) if is_absent(&error) => Ok(Vec::new()),
        other => other,
    }
}

fn random_id() -> Result<RepositoryId> {
    use std::io::Read;
    let path = Path::new("/dev/urandom");
    let mut bytes = [0; 16];
    std::fs::File::open(path)
        .and_then(|mut file| file.read_exact(&mut bytes))
        .map_err(|cause| Error::io("read", path, cause))?;
    Ok(RepositoryId(bytes))
}

fn refuse_unless_empty(root: &Path) -> Result<()> {
    let mut children = match std::fs::read_dir(root) {
        Ok(children) => children,
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(cause) => return Err(Error::io("list", root, cause)),
    };
    if root.join(keys::REPOSITORY).exists() {
        return Err(Error::Refused(format!("{} is a repository already", root.display())));
    }
    // A new file system's own directory is no content.
    let occupied = children.find_map(|child| child.ok().filter(|child| child.file_name() != "lost+found"));
    match occupied {
        None => Ok(()),
        Some(child) => {
            let name = child.file_name();
            Err(Error::Refused(format!("{} is not empty: it holds {}", root.display(), name.display())))
        }
    }
}
