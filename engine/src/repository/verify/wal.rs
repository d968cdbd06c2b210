//! Proving the WAL: each file of the archive, that every backup has its own segments, and that there is no gap.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::iter::{ParallelBridge, ParallelIterator};

use super::{Kind, Verification};
use crate::format::backup::BackupInfo;
use crate::format::header::HEADER_BYTES;
use crate::progress::Progress;
use crate::wal::history::History;
use crate::wal::name::{SegmentName, WalFile};
use crate::wal::{SegmentHeader, WalArchive};
use crate::{Error, Result};

/// What was proven of the WAL.
#[derive(Debug, Default)]
pub(super) struct ProvenWal {
    pub(super) files: u64,
    pub(super) bytes: u64,
    pub(super) islands: Vec<String>,
}

impl Verification {
    /// The files of the archive that are to be proven.
    pub(super) fn wal_files(&self) -> Result<Vec<WalFile>> {
        let wal = self.cluster.wal();
        let mut files = BTreeSet::new();
        if self.all {
            for timeline in wal.timelines()? {
                files.extend(wal.files(timeline)?);
            }
        }
        for backup in &self.backups {
            files.extend(own_segments(&backup.info).map(WalFile::Segment));
        }
        Ok(files.into_iter().collect())
    }

    pub(super) fn prove_wal(&self, progress: &dyn Progress) -> Result<ProvenWal> {
        let wal = self.cluster.wal();
        let needed = |file: WalFile| {
            let backups = self.backups.iter().filter(move |backup| is_needed(&backup.info, file));
            backups.map(|backup| &backup.info.label)
        };
        let (files, bytes) = (AtomicU64::new(0), AtomicU64::new(0));
        self.wal_files()?.into_iter().par_bridge().try_for_each(|file| {
            if progress.cancelled() {
                return Err(Error::Cancelled);
            }
            match prove_wal_file(&wal, file, progress) {
                Ok(Some(content_bytes)) => {
                    files.fetch_add(1, Ordering::Relaxed);
                    bytes.fetch_add(content_bytes, Ordering::Relaxed);
                }
                Ok(None) => {
                    let path = wal.path_of(file);
                    let detail = format!("{} is missing, and a backup needs it to become consistent", path.display());
                    self.found.insert(Kind::Missing, &path, detail, needed(file));
                }
                Err(error) => {
                    self.found.add_for(&error, needed(file), &wal.path_of(file));
                }
            }
            Ok(())
        })?;
        let islands = if self.all { self.judge_gaps(&wal)? } else { Vec::new() };
        Ok(ProvenWal { files: files.into_inner(), bytes: bytes.into_inner(), islands })
    }

    /// Gaps are findings, but for those between backups that each brought their own WAL, as they do where PostgreSQL
    /// archives to another place.
    fn judge_gaps(&self, wal: &WalArchive) -> Result<Vec<String>> {
        let segment_bytes = wal.segment_bytes();
        let mut islands = Vec::new();
        for gap in wal.gaps()? {
            let next = SegmentName { timeline: gap.first.timeline, number: gap.first.number + gap.segments };
            let ends = |info: &BackupInfo| own_segments(info).last().is_some_and(|last| last.next() == gap.first);
            let begins = |info: &BackupInfo| own_segments(info).next() == Some(next);
            let infos = || self.backups.iter().map(|backup| &backup.info);
            if infos().any(ends) && infos().any(begins) {
                islands.push(gap.describe(segment_bytes));
            } else {
                let path = wal.path_of(WalFile::Segment(gap.first));
                let more = match gap.segments {
                    1 => String::new(),
                    segments => format!(" with the {} after it", segments - 1),
                };
                let detail = format!("{} is missing{more}, but the archive goes on behind", path.display());
                // Recovery from any backup before it ends here.
                let stopped = infos().filter(|info| {
                    info.wal.timeline == gap.first.timeline && info.wal.stop <= gap.first.start(segment_bytes)
                });
                self.found.insert(Kind::Missing, &path, detail, stopped.map(|info| &info.label));
            }
        }
        Ok(islands)
    }
}

/// The segments that a backup needs to become consistent.
fn own_segments(info: &BackupInfo) -> impl Iterator<Item = SegmentName> + use<> {
    let (timeline, segment_bytes) = (info.wal.timeline, info.server.wal_segment_bytes.max(1));
    let first = SegmentName::holding(timeline, info.wal.start, segment_bytes).number;
    let last = SegmentName::ending_at(timeline, info.wal.stop, segment_bytes).number;
    (first..=last).map(move |number| SegmentName { timeline, number })
}

fn is_needed(info: &BackupInfo, file: WalFile) -> bool {
    matches!(file, WalFile::Segment(segment) if own_segments(info).any(|own| own == segment))
}

/// Reads a file of the archive; its content bytes, or none if it is not there.
fn prove_wal_file(wal: &WalArchive, file: WalFile, progress: &dyn Progress) -> Result<Option<u64>> {
    let segment_bytes = wal.segment_bytes();
    let path = wal.path_of(file);
    let Some(object) = wal.open(&file.file_name(segment_bytes))? else { return Ok(None) };
    let mut head = Vec::new();
    object.read_all(|piece| {
        if head.len() < HEADER_BYTES {
            head.extend_from_slice(&piece[..piece.len().min(HEADER_BYTES)]);
        }
        progress.advance(piece.len() as u64);
        Ok(())
    })?;
    let corrupt = |detail: String| Error::corrupt(&path, detail);
    match file {
        WalFile::Segment(segment) | WalFile::Partial(segment) => {
            let header = SegmentHeader::parse(&head).map_err(corrupt)?;
            header.agrees_with(segment).map_err(corrupt)?;
            let whole = matches!(file, WalFile::Segment(_));
            if whole && object.bytes() != segment_bytes {
                return Err(corrupt(format!("a segment of {} bytes, not {segment_bytes}", object.bytes())));
            }
        }
        WalFile::History(timeline) => {
            let text = String::from_utf8_lossy(&head);
            History::parse(timeline, &text).map_err(corrupt)?;
        }
        WalFile::BackupLabel(..) => {}
    }
    Ok(Some(object.bytes()))
}
