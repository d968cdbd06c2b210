//! One cluster of a repository: its backups and its WAL.

use super::leftovers::Names;
use super::{BackupWriter, ClusterInfo, Manifest, Parent, Repository, get, keys};
use crate::blocks::Blocks;
use crate::format::backup::BackupInfo;
use crate::store::Store;
use crate::units::{BackupLabel, ClusterName, SystemIdentifier};
use crate::wal::WalArchive;
use crate::{Error, Result};

/// An open cluster; cheap to clone.
#[derive(Clone, Debug)]
pub struct Cluster {
    repository: Repository,
    info: ClusterInfo,
}

/// A committed backup, ready to be read; cheap to clone.
#[derive(Clone, Debug)]
pub struct Backup {
    /// Its description.
    pub info: BackupInfo,
    /// Its files and blocks.
    pub manifest: Manifest,
    /// Its cluster.
    pub cluster: Cluster,
}

impl Cluster {
    pub(super) fn new(repository: Repository, info: ClusterInfo, name: &ClusterName) -> Result<Self> {
        if info.name != *name {
            let path = repository.store().describe(&keys::cluster_info(name));
            return Err(Error::corrupt(path, format!("it describes cluster \"{}\"", info.name)));
        }
        Ok(Self { repository, info })
    }

    /// What it is.
    pub fn info(&self) -> &ClusterInfo {
        &self.info
    }

    /// Its name.
    pub fn name(&self) -> &ClusterName {
        &self.info.name
    }

    /// The repository it lies in.
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    pub(crate) fn store(&self) -> &dyn Store {
        &**self.repository.store()
    }

    /// The labels of its backups, oldest first; of those too that have lost their description, so that none vanishes
    /// without a word.
    pub fn labels(&self) -> Result<Vec<BackupLabel>> {
        // A label begins with the time of its backup's start.
        Ok(Names::of(self)?.committed())
    }

    /// The labels of backups that run, or that were interrupted and not yet swept.
    pub fn unfinished(&self) -> Result<Vec<BackupLabel>> {
        Ok(Names::of(self)?.unfinished().cloned().collect())
    }

    /// The description of a backup.
    pub fn backup_info(&self, label: &BackupLabel) -> Result<BackupInfo> {
        let key = keys::backup(self.name(), label);
        let Some(info) = get(self.store(), &key, BackupInfo::from_json)? else {
            return Err(self.no_such_backup(label)?);
        };
        if info.label != *label || info.cluster != *self.name() {
            let detail = format!("it describes backup {} of cluster \"{}\"", info.label, info.cluster);
            return Err(Error::corrupt(self.store().describe(&key), detail));
        }
        let of =
            |identifier, segment_bytes| format!("system identifier {identifier}, segments of {segment_bytes} bytes");
        let found = of(info.server.system_identifier, info.server.wal_segment_bytes);
        let expected = of(self.info.system_identifier, self.info.wal_segment_bytes);
        if found != expected {
            let detail = format!("it describes a backup of another cluster: {found}, not {expected}");
            return Err(Error::corrupt(self.store().describe(&key), detail));
        }
        Ok(info)
    }

    /// The descriptions of its backups, oldest first.
    pub fn backups(&self) -> Result<Vec<BackupInfo>> {
        self.labels()?.iter().map(|label| self.backup_info(label)).collect()
    }

    /// Opens a backup.
    pub fn backup(&self, label: &BackupLabel) -> Result<Backup> {
        let info = self.backup_info(label)?;
        let manifest = Manifest::open(self, &info)?;
        Ok(Backup { info, manifest, cluster: self.clone() })
    }

    /// Opens the newest backup, if there is any.
    pub fn latest_backup(&self) -> Result<Option<Backup>> {
        self.labels()?.last().map(|label| self.backup(label)).transpose()
    }

    /// Its WAL.
    pub fn wal(&self) -> WalArchive {
        WalArchive::new(self.clone())
    }

    /// Begins a backup: takes the backup lock and sweeps what crashed ones left.
    pub fn begin_backup(&self, parent: Parent) -> Result<BackupWriter> {
        BackupWriter::begin(self, parent)
    }

    /// Refuses what comes from another cluster than this one.
    pub fn refuse_stranger(&self, system_identifier: SystemIdentifier, wal_segment_bytes: u64) -> Result<()> {
        let Self { info, .. } = self;
        if info.system_identifier != system_identifier {
            return Err(Error::Refused(format!(
                "cluster \"{}\" of the repository has system identifier {}, not {system_identifier}: it is another cluster",
                info.name, info.system_identifier
            )));
        }
        if info.wal_segment_bytes != wal_segment_bytes {
            return Err(Error::Refused(format!(
                "cluster \"{}\" of the repository has WAL segments of {} bytes, not {wal_segment_bytes}",
                info.name, info.wal_segment_bytes
            )));
        }
        Ok(())
    }

    pub(super) fn no_such_backup(&self, label: &BackupLabel) -> Result<Error> {
        let known = self.labels()?;
        if known.contains(label) {
            let path = self.store().describe(&keys::backup(self.name(), label));
            let detail = "the description of the backup is missing, but its manifest is there, and it was finished";
            return Ok(Error::corrupt(path, detail));
        }
        let known = known.iter().rev().take(5).map(BackupLabel::as_str).collect::<Vec<_>>().join(", ");
        let known = if known.is_empty() { "none yet".to_owned() } else { known };
        Ok(Error::NotFound(format!("cluster \"{}\" has no backup {label} (newest: {known})", self.name())))
    }
}

impl Backup {
    /// Its blocks, verified.
    pub fn blocks(&self) -> Blocks {
        Blocks::of_backup(self)
    }
}
