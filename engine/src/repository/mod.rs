//! The repository: backups of clusters, each complete, and their WAL.
//!
//! ```text
//! pghydrant.json                         what this repository is
//! clusters/<cluster>/cluster.json        what the cluster is
//! clusters/<cluster>/locks/              backup, push: flock'ed files
//! clusters/<cluster>/packs/              blocks
//! clusters/<cluster>/manifests/          which blocks make which files
//! clusters/<cluster>/backups/            a description of each backup: its appearance is the commit
//! clusters/<cluster>/wal/<timeline>/     segments, histories
//! ```
//!
//! Always true: what a committed backup refers to is durable and never changes; everything that a crash leaves is
//! garbage that no backup refers to, and the next backup sweeps it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::codec::Compression;
use crate::format::FORMAT;
use crate::store::{Existing, LocalStore, Store};
use crate::units::{BlockSize, ClusterName, SystemIdentifier};
use crate::{Error, Result};

mod cluster;
pub(crate) mod keys;
mod lock;
mod manifest;
mod writer;

pub use cluster::{Backup, Cluster};
pub use lock::{Lock, LockKind};
pub use manifest::Manifest;
pub use writer::{BackupWriter, Description, LeafRef, Outcome, PackWriter, Parent};

/// More than any description of ours needs; a longer one is damaged.
pub(crate) const DESCRIPTION_BYTES_MAX: u64 = 64 << 20;

/// `pghydrant.json`: what a repository is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepositoryInfo {
    /// The format it was made with.
    pub format: u16,
    /// The oldest reader that understands it.
    pub minimum_reader: u16,
    /// 32 hex digits, random; packs carry it.
    pub id: String,
    /// What new blocks are compressed with.
    pub compression: Compression,
    /// The size of all its blocks.
    pub block_bytes: BlockSize,
    /// UTC, RFC 3339.
    pub created_at: String,
    /// Reserved: a repository with encryption is refused by this version.
    pub encryption: Option<serde_json::Value>,
}

/// `cluster.json`: what a cluster is. Made by its first backup or its first WAL segment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterInfo {
    /// The user's name for it.
    pub name: ClusterName,
    /// What makes two clusters the same.
    pub system_identifier: SystemIdentifier,
    /// `wal_segment_size`, bytes.
    pub wal_segment_bytes: u64,
    /// UTC, RFC 3339.
    pub created_at: String,
}

impl ClusterInfo {
    /// The description of a cluster that is new in the repository.
    pub fn new(name: ClusterName, system_identifier: SystemIdentifier, wal_segment_bytes: u64) -> Self {
        Self { name, system_identifier, wal_segment_bytes, created_at: now() }
    }
}

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
        let info = RepositoryInfo {
            format: FORMAT,
            minimum_reader: FORMAT,
            id: random_id()?,
            compression,
            block_bytes,
            created_at: now(),
            encryption: None,
        };
        put_json(&store, keys::REPOSITORY, &info, Existing::Refuse)?;
        Self::with_store(root, Arc::new(store))
    }

    /// Opens the repository in `root`.
    pub fn open(root: &Path) -> Result<Self> {
        Self::with_store(root, Arc::new(LocalStore::new(root)))
    }

    pub(crate) fn with_store(root: &Path, store: Arc<dyn Store>) -> Result<Self> {
        let path = store.describe(keys::REPOSITORY);
        let info: RepositoryInfo = match get_json(&*store, keys::REPOSITORY) {
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                let what = if root.exists() { "it holds no pghydrant.json" } else { "no such directory" };
                return Err(Error::NotFound(format!("{} is not a repository: {what}", root.display())));
            }
            other => other?,
        };
        refuse_newer(&path, info.minimum_reader)?;
        if info.encryption.is_some() {
            return Err(Error::Unsupported { path, detail: "the repository is encrypted".to_owned() });
        }
        if repository_id(&info.id).is_none() {
            return Err(Error::corrupt(path, format!("id \"{}\" is not 32 hex digits", info.id.escape_debug())));
        }
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

    /// The number that packs carry.
    pub(crate) fn id_bytes(&self) -> [u8; 16] {
        // `with_store` has seen that it is a number.
        repository_id(&self.inner.info.id).unwrap_or_default()
    }

    /// The names of its clusters, sorted.
    pub fn clusters(&self) -> Result<Vec<ClusterName>> {
        let entries = list_or_empty(&**self.store(), keys::CLUSTERS)?;
        let mut names = Vec::new();
        for name in entries.iter().filter_map(|entry| entry.name().parse::<ClusterName>().ok()) {
            // A directory without a description is what a crash left of a first push.
            if self.store().size(&keys::cluster_info(&name))?.is_some() {
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
        match get_json::<ClusterInfo>(&**self.store(), &keys::cluster_info(name)) {
            Ok(info) => Cluster::new(self.clone(), info, name).map(Some),
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Opens the cluster that `info` describes, making it if it is new. A cluster of that name with another system
    /// identifier or segment size is refused: two clusters never share an archive.
    pub fn create_cluster(&self, info: ClusterInfo) -> Result<Cluster> {
        let cluster = match self.find_cluster(&info.name)? {
            Some(cluster) => cluster,
            None => match put_json(&**self.store(), &keys::cluster_info(&info.name), &info, Existing::Refuse) {
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

/// UTC, RFC 3339, to the second.
pub(crate) fn now() -> String {
    let second = jiff::Timestamp::now().as_second();
    jiff::Timestamp::from_second(second).map(|time| time.to_string()).unwrap_or_default()
}

pub(crate) fn refuse_newer(path: &Path, minimum_reader: u16) -> Result<()> {
    if minimum_reader <= FORMAT {
        return Ok(());
    }
    let detail = format!("needs a pghydrant that reads format {minimum_reader}; this one reads up to {FORMAT}");
    Err(Error::Unsupported { path: path.to_owned(), detail })
}

/// Reads a description. Its version is looked at before its fields, which a newer version may have changed.
pub(crate) fn get_json<T: serde::de::DeserializeOwned>(store: &dyn Store, key: &str) -> Result<T> {
    #[derive(Deserialize)]
    struct Version {
        #[serde(default)]
        minimum_reader: u16,
    }
    let bytes = store.get(key, DESCRIPTION_BYTES_MAX)?;
    let refuse =
        |cause: serde_json::Error| Error::corrupt(store.describe(key), format!("not what it should be: {cause}"));
    let version: Version = serde_json::from_slice(&bytes).map_err(refuse)?;
    refuse_newer(&store.describe(key), version.minimum_reader)?;
    serde_json::from_slice(&bytes).map_err(refuse)
}

pub(crate) fn put_json<T: Serialize>(store: &dyn Store, key: &str, value: &T, existing: Existing) -> Result<()> {
    let mut bytes = serde_json::to_vec_pretty(value)
        .map_err(|cause| Error::io("write", store.describe(key), std::io::Error::other(cause)))?;
    bytes.push(b'\n');
    store.put(key, &bytes, existing)
}

/// The children of a directory that its first entry makes.
pub(crate) fn list_or_empty(store: &dyn Store, directory: &str) -> Result<Vec<crate::store::Entry>> {
    match store.list(directory) {
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        other => other,
    }
}

fn repository_id(text: &str) -> Option<[u8; 16]> {
    let plain = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    plain.then(|| u128::from_str_radix(text, 16).ok()).flatten().map(u128::to_be_bytes)
}

fn random_id() -> Result<String> {
    use std::io::Read;
    let path = Path::new("/dev/urandom");
    let mut bytes = [0; 16];
    std::fs::File::open(path)
        .and_then(|mut file| file.read_exact(&mut bytes))
        .map_err(|cause| Error::io("read", path, cause))?;
    Ok(format!("{:032x}", u128::from_be_bytes(bytes)))
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn make(root: &Path) -> Repository {
        Repository::init(root, Compression::Lz4, BlockSize::DEFAULT).unwrap()
    }

    fn info(identifier: u64, segment: u64) -> ClusterInfo {
        ClusterInfo::new("main".parse().unwrap(), SystemIdentifier(identifier), segment)
    }

    #[test]
    fn a_repository_is_made_once_and_opened_as_it_was() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("deep/repo");
        let made = make(&root);
        assert_eq!(Repository::open(&root).unwrap().info(), made.info());
        assert!(matches!(Repository::init(&root, Compression::None, BlockSize::MIN), Err(Error::Refused(_))));
        assert_eq!(Repository::open(&root).unwrap().clusters().unwrap(), []);
    }

    #[test]
    fn a_directory_with_something_in_it_is_refused_and_one_without_is_not_a_repository() {
        let directory = tempfile::tempdir().unwrap();
        assert!(matches!(Repository::open(directory.path()), Err(Error::NotFound(_))));
        assert!(matches!(Repository::open(&directory.path().join("no")), Err(Error::NotFound(_))));
        std::fs::write(directory.path().join("precious"), b"x").unwrap();
        let refused = Repository::init(directory.path(), Compression::Lz4, BlockSize::DEFAULT).unwrap_err();
        assert!(refused.to_string().contains("precious"), "{refused}");
    }

    #[test]
    fn a_newer_repository_is_refused_whatever_its_other_fields_are() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join(keys::REPOSITORY), br#"{"minimum_reader": 2, "id": []}"#).unwrap();
        assert!(matches!(Repository::open(directory.path()), Err(Error::Unsupported { .. })));
        std::fs::write(directory.path().join(keys::REPOSITORY), br#"{"minimum_reader": 1, "id": []}"#).unwrap();
        assert!(matches!(Repository::open(directory.path()), Err(Error::Corrupt { .. })));
    }

    #[test]
    fn two_clusters_never_share_a_name() {
        let directory = tempfile::tempdir().unwrap();
        let repository = make(directory.path());
        let name = "main".parse().unwrap();
        assert!(matches!(repository.cluster(&name), Err(Error::NotFound(_))));
        repository.create_cluster(info(7, 16 << 20)).unwrap();
        repository.create_cluster(info(7, 16 << 20)).unwrap();
        assert!(matches!(repository.create_cluster(info(8, 16 << 20)), Err(Error::Refused(_))));
        assert!(matches!(repository.create_cluster(info(7, 1 << 20)), Err(Error::Refused(_))));
        assert_eq!(repository.clusters().unwrap(), [name]);
    }
}
