//! Proving a repository without restoring: every block of the backups, and their WAL, read and compared.
//!
//! Backups share most of their blocks. A leaf of the manifest that was proven for one backup is not read again for the
//! next, so verifying all backups reads little more than the newest. Leaves are proven by all cores; whatever is
//! wrong is told at once, by the file that is damaged, and the rest is read on.
//!
//! Always true: [`Proof::findings`] is empty only if everything was read and was what it should be.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use self::blocks::Proven;
use self::found::Found;
use super::leftovers::Leftovers;
use super::{Backup, Cluster, keys};
use crate::format::header::HEADER_BYTES;
use crate::format::manifest::ManifestHeader;
use crate::format::pack::PackHeader;
use crate::progress::Progress;
use crate::units::{BackupLabel, PackId};
use crate::{Error, Result};

mod blocks;
mod found;
mod wal;

pub use found::{Finding, Kind};

/// What a verification came to.
#[derive(Clone, Debug, Default)]
pub struct Proof {
    /// Backups looked at.
    pub backups: u64,
    /// Content bytes proven, zeros included; what backups share is counted once.
    pub bytes: u64,
    /// Files of the WAL archive proven.
    pub wal_files: u64,
    /// What is wrong, by file.
    pub findings: Vec<Finding>,
    /// WAL that is not there between backups that each have their own: they restore, but not beyond.
    pub islands: Vec<String>,
    /// Backups that run, or were interrupted.
    pub unfinished: Vec<BackupLabel>,
    /// Bytes that those have written so far, or left to be swept by the next backup.
    pub garbage_bytes: u64,
}

/// A verification that is planned: its size is known, nothing is read yet but the backups' descriptions.
#[derive(Debug)]
pub struct Verification {
    cluster: Cluster,
    all: bool,
    backups: Vec<Backup>,
    found: Found,
    wal_bytes: u64,
}

impl Verification {
    /// Of one backup with its WAL, or of everything the cluster has.
    pub fn plan(cluster: &Cluster, only: Option<&BackupLabel>) -> Result<Self> {
        let found = Found::default();
        let mut backups = Vec::new();
        let labels = match only {
            // An unknown label is a mistake of the caller's, not a finding.
            Some(label) if !cluster.labels()?.contains(label) => return Err(cluster.no_such_backup(label)?),
            Some(label) => vec![label.clone()],
            None => cluster.labels()?,
        };
        for label in labels {
            match cluster.backup(&label) {
                Ok(backup) => backups.push(backup),
                Err(error) => {
                    found.add(&error, &label, &cluster.store().describe(&keys::backup(cluster.name(), &label)));
                }
            }
        }
        let mut verification = Self { cluster: cluster.clone(), all: only.is_none(), backups, found, wal_bytes: 0 };
        let segments = verification.wal_files()?.len() as u64;
        verification.wal_bytes = segments.saturating_mul(cluster.info().wal_segment_bytes);
        Ok(verification)
    }

    /// Content bytes that [`run`](Self::run) will report as progress, about.
    pub fn bytes(&self) -> u64 {
        self.backups.iter().fold(self.wal_bytes, |bytes, backup| bytes.saturating_add(backup.info.totals.bytes))
    }

    /// Reads everything. An error is a reason to stop; what is wrong with the repository is in the proof.
    pub fn run(self, progress: &dyn Progress) -> Result<Proof> {
        let proven = Proven::default();
        let mut packs = BTreeMap::<PackId, BTreeSet<BackupLabel>>::new();
        for backup in &self.backups {
            self.prove_headers(backup);
            for used in backup.manifest.packs() {
                packs.entry(used.pack).or_default().insert(backup.info.label.clone());
            }
            blocks::prove(backup, &proven, &self.found, progress)?;
        }
        for (pack, labels) in &packs {
            if let Err(error) = self.prove_pack_header(*pack) {
                let path = self.cluster.store().describe(&keys::pack(self.cluster.name(), *pack));
                self.found.add_for(&error, labels, &path);
            }
        }
        let wal = self.prove_wal(progress)?;
        let (unfinished, garbage_bytes) = if self.all { self.judge_leftovers()? } else { Default::default() };
        Ok(Proof {
            backups: self.backups.len() as u64,
            bytes: proven.bytes.into_inner() + wal.bytes,
            wal_files: wal.files,
            findings: self.found.into_findings(),
            islands: wal.islands,
            unfinished,
            garbage_bytes,
        })
    }

    fn prove_headers(&self, backup: &Backup) {
        for used in backup.manifest.manifests().iter().filter(|used| used.bytes > 0) {
            let key = keys::manifest(self.cluster.name(), &used.label);
            let path = self.cluster.store().describe(&key);
            let proven = self.header(&key).and_then(|page| {
                let header = ManifestHeader::from_bytes(&page).map_err(|malformed| malformed.in_file(&path, 0))?;
                let expected =
                    ManifestHeader { repository: self.cluster.repository().info().id, label: used.label.clone() };
                if header == expected {
                    return Ok(());
                }
                Err(Error::corrupt(&path, format!("its header is that of {} in {}", header.label, header.repository)))
            });
            if let Err(error) = proven {
                self.found.add(&error, &backup.info.label, &path);
            }
        }
    }

    fn prove_pack_header(&self, pack: PackId) -> Result<()> {
        let key = keys::pack(self.cluster.name(), pack);
        let path = self.cluster.store().describe(&key);
        let page = self.header(&key)?;
        let header = PackHeader::from_bytes(&page).map_err(|malformed| malformed.in_file(&path, 0))?;
        let info = self.cluster.repository().info();
        let expected = PackHeader { repository: info.id, pack, block_size: header.block_size };
        if header == expected {
            return Ok(());
        }
        Err(Error::corrupt(path, format!("its header is that of pack {} in {}", header.pack, header.repository)))
    }

    fn header(&self, key: &str) -> Result<Vec<u8>> {
        let mut page = vec![0; HEADER_BYTES];
        self.cluster.store().read_at(key, 0, &mut page).map(|()| page)
    }

    /// What belongs to no backup: a finding, but for what unfinished ones claim. Tells who those are and how much it is.
    fn judge_leftovers(&self) -> Result<(Vec<BackupLabel>, u64)> {
        let leftovers = Leftovers::of(&self.cluster)?;
        if let Some(error) = &leftovers.unknown
            && self.backups.len() == leftovers.names.committed().len()
        {
            // Not of a backup's own files, which have been told.
            self.found.add_for(error, [], &self.cluster.store().describe(&keys::backups(self.cluster.name())));
        }
        if let Some(first) = leftovers.strays.first() {
            let (count, bytes) =
                (leftovers.strays.len(), leftovers.strays.iter().map(|entry| entry.bytes).sum::<u64>());
            let path = self.cluster.store().describe(&first.key);
            let detail = format!(
                "{}: {count} packs of {bytes} bytes belong to no backup, and no unfinished one claims them: the backup that wrote them has lost its description and its manifest",
                path.display()
            );
            self.found.insert(Kind::Missing, &path, detail, []);
        }
        let garbage_bytes = leftovers.garbage.iter().map(|entry| entry.bytes).sum();
        Ok((leftovers.names.unfinished().cloned().collect(), garbage_bytes))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A worker that panicked leaves no half-made change: each is one insertion.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
