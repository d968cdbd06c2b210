//! The archive of one cluster: what is in it.

use std::path::PathBuf;
use std::sync::Arc;

use super::history::History;
use super::name::{SegmentName, WalFile};
use super::object::WalObject;
use crate::repository::{Cluster, Repository, is_absent, keys, list_or_empty};
use crate::store::{Entry, Store};
use crate::units::Timeline;
use crate::{Error, Result};

/// A history has a line for every promotion: a few hundred bytes.
const HISTORY_BYTES_MAX: u64 = 1 << 20;

/// The WAL of a cluster.
#[derive(Clone, Debug)]
pub struct WalArchive {
    cluster: Cluster,
}

impl WalArchive {
    pub(crate) fn new(cluster: Cluster) -> Self {
        Self { cluster }
    }

    /// Its cluster.
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    pub(super) fn store(&self) -> &Arc<dyn Store> {
        self.cluster.repository().store()
    }

    /// Bytes of a segment of this cluster.
    pub fn segment_bytes(&self) -> u64 {
        self.cluster.info().wal_segment_bytes
    }

    /// What a file name stands for.
    pub(super) fn parse(&self, name: &str) -> Result<WalFile> {
        WalFile::parse(name, self.segment_bytes())
            .ok_or_else(|| Error::NotFound(format!("\"{}\" is not the name of a WAL file", name.escape_debug())))
    }

    pub(super) fn key(&self, file: WalFile) -> String {
        let directory = keys::wal_timeline(self.cluster.name(), file.timeline());
        format!("{directory}/{}", file.file_name(self.segment_bytes()))
    }

    /// Where a file of the archive lies, for error messages.
    pub fn path_of(&self, file: WalFile) -> PathBuf {
        self.store().describe(&self.key(file))
    }

    /// Whether the archive has a file of that name.
    pub fn contains(&self, name: &str) -> Result<bool> {
        Ok(self.store().size(&self.key(self.parse(name)?))?.is_some())
    }

    /// Bytes that a file of the archive is stored with; none if there is no such file.
    pub fn stored_bytes(&self, file: WalFile) -> Result<Option<u64>> {
        self.store().size(&self.key(file))
    }

    /// Proves that the archive can be read and is still the one that was opened: a disk that is not mounted is an empty
    /// directory, so that a file is missing, or a listing empty, says nothing by itself.
    pub fn prove_readable(&self) -> Result<()> {
        self.store().list(&keys::wal(self.cluster.name()))?;
        let repository = self.cluster.repository();
        let again = Repository::with_store(repository.root(), Arc::clone(self.store()))?;
        if again.info().id != repository.info().id {
            return Err(Error::Refused(format!("{} has become another repository", repository.root().display())));
        }
        Ok(())
    }

    /// Opens a file of the archive; none if there is no such file.
    pub fn open(&self, name: &str) -> Result<Option<WalObject>> {
        let file = self.parse(name)?;
        let key = self.key(file);
        let Some(object) = WalObject::open(self.store(), &key, name)? else { return Ok(None) };
        let (found, expected) = (object.repository(), self.cluster.repository().info().id);
        if found != expected {
            let detail = format!("it is of the repository with id {found}, not {expected}");
            return Err(Error::corrupt(self.store().describe(&key), detail));
        }
        let (found, expected) = (object.system_identifier(), self.cluster.info().system_identifier);
        if found != expected && found.0 != 0 {
            let detail = format!("it is of the cluster with system identifier {found}, not {expected}");
            return Err(Error::corrupt(self.store().describe(&key), detail));
        }
        Ok(Some(object))
    }

    /// Timelines with anything in the archive, ascending.
    pub fn timelines(&self) -> Result<Vec<Timeline>> {
        let entries = list_or_empty(&**self.store(), &keys::wal(self.cluster.name()))?;
        let mut timelines: Vec<_> = entries.iter().filter_map(|entry| keys::timeline_of(entry.name())).collect();
        timelines.sort_unstable();
        Ok(timelines)
    }

    /// Every file of a timeline: segments, partial ones, labels of backups, its history.
    pub fn files(&self, timeline: Timeline) -> Result<Vec<WalFile>> {
        Ok(self.entries(timeline)?.into_iter().map(|(file, _)| file).collect())
    }

    /// The same with what the store says of each.
    pub fn entries(&self, timeline: Timeline) -> Result<Vec<(WalFile, Entry)>> {
        let entries = match self.store().list(&keys::wal_timeline(self.cluster.name(), timeline)) {
            Err(error) if is_absent(&error) => Vec::new(),
            other => other?,
        };
        let parsed = entries.into_iter().filter_map(|entry| {
            let file = WalFile::parse(entry.name(), self.segment_bytes())?;
            (file.timeline() == timeline).then_some((file, entry))
        });
        Ok(parsed.collect())
    }

    /// Whole segments of a timeline, ascending.
    pub fn segments(&self, timeline: Timeline) -> Result<Vec<SegmentName>> {
        let files = self.files(timeline)?.into_iter();
        let mut segments: Vec<_> = files
            .filter_map(|file| match file {
                WalFile::Segment(segment) => Some(segment),
                WalFile::Partial(_) | WalFile::BackupLabel(..) | WalFile::History(_) => None,
            })
            .collect();
        segments.sort_unstable();
        Ok(segments)
    }

    /// The history of a timeline; timeline 1 has none, nor has one whose history was not archived.
    pub fn history(&self, timeline: Timeline) -> Result<Option<History>> {
        let file = WalFile::History(timeline);
        let Some(object) = self.open(&file.file_name(self.segment_bytes()))? else { return Ok(None) };
        let path = self.store().describe(&self.key(file));
        if object.bytes() > HISTORY_BYTES_MAX {
            return Err(Error::corrupt(path, format!("a history of {} bytes", object.bytes())));
        }
        let mut text = Vec::new();
        object.read_all(|piece| {
            text.extend_from_slice(piece);
            Ok(())
        })?;
        let text = String::from_utf8(text).map_err(|_| Error::corrupt(&path, "a history that is not UTF-8"))?;
        History::parse(timeline, &text).map(Some).map_err(|detail| Error::corrupt(path, detail))
    }
}
