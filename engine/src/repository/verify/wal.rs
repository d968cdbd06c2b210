//! Proving the WAL: each file of the archive, that every backup has its own segments, and that there is
//! no gap, within a timeline or on the way from one to the next.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::iter::{ParallelBridge, ParallelIterator};

use super::{Kind, Verification};
use crate::format::backup::BackupInfo;
use crate::format::header::HEADER_BYTES;
use crate::progress::Progress;
use crate::wal::history::History;
use crate::wal::name::{SegmentName, WalFile};
use crate::wal::{Gap, SegmentHeader, WalArchive};
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
        let mut islands = Vec::new();
        if self.all {
            self.judge_histories(&wal)?;
            islands = self.judge_gaps(&wal)?;
        }
        Ok(ProvenWal { files: files.into_inner(), bytes: bytes.into_inner(), islands })
    }

    /// Gaps are findings, but for those before a backup that brought its own WAL, where no other comes along or the one
    /// before it ends there: PostgreSQL archives to another place, or its archiver is behind.
    fn judge_gaps(&self, wal: &WalArchive) -> Result<Vec<String>> {
        let segment_bytes = wal.segment_bytes();
        let mut islands = Vec::new();
        for gap in wal.gaps_within()? {
            let next = SegmentName { timeline: gap.first.timeline, number: gap.first.number + gap.segments };
            let nobody_comes = !self.infos().any(|info| info.wal.stop <= gap.first.start(segment_bytes));
            let may_lack = nobody_comes || self.infos().any(|info| ends_before(info, gap.first));
            if may_lack && self.infos().any(|info| begins_at(info, next)) {
                islands.push(gap.describe(segment_bytes));
            } else {
                // Recovery from any backup before it ends here.
                self.tell_gap(wal, &gap, |info| info.wal.timeline == gap.first.timeline);
            }
        }
        for branch in wal.branches()? {
            let is_island = self.infos().any(|info| ends_before(info, branch.before.next()))
                && self.infos().any(|info| begins_at(info, branch.after));
            for gap in &branch.missing {
                let comes_along = |info: &BackupInfo| {
                    info.wal.timeline != branch.path.timeline && branch.path.includes(info.wal.timeline, info.wal.stop)
                };
                if is_island {
                    islands.push(gap.describe(segment_bytes));
                } else if self.infos().any(|info| comes_along(info) && info.wal.stop <= gap.first.start(segment_bytes))
                {
                    self.tell_gap(wal, gap, comes_along);
                }
            }
        }
        Ok(islands)
    }

    /// A timeline that branched off another is found by its history alone.
    fn judge_histories(&self, wal: &WalArchive) -> Result<()> {
        let mut known: BTreeSet<_> = self.infos().map(|info| info.wal.timeline).collect();
        for timeline in wal.timelines()? {
            if !wal.segments(timeline)?.is_empty() {
                known.insert(timeline);
            }
        }
        // Where nothing older is there, nobody comes from it.
        for timeline in known.into_iter().skip(1) {
            let file = WalFile::History(timeline);
            if !wal.contains(&file.file_name(wal.segment_bytes()))? {
                let path = wal.path_of(file);
                let detail = format!("{} is missing: nobody finds the way onto timeline {timeline}", path.display());
                let older = self.infos().filter(|info| info.wal.timeline < timeline);
                self.found.insert(Kind::Missing, &path, detail, older.map(|info| &info.label));
            }
        }
        Ok(())
    }

    fn tell_gap(&self, wal: &WalArchive, gap: &Gap, comes_along: impl Fn(&BackupInfo) -> bool) {
        let path = wal.path_of(WalFile::Segment(gap.first));
        let more = match gap.segments {
            1 => String::new(),
            segments => format!(" with the {} after it", segments - 1),
        };
        let detail = format!("{} is missing{more}, but the archive goes on behind", path.display());
        let start = gap.first.start(wal.segment_bytes());
        let stopped = self.infos().filter(|info| comes_along(info) && info.wal.stop <= start);
        self.found.insert(Kind::Missing, &path, detail, stopped.map(|info| &info.label));
    }

    fn infos(&self) -> impl Iterator<Item = &BackupInfo> {
        self.backups.iter().map(|backup| &backup.info)
    }
}

fn ends_before(info: &BackupInfo, segment: SegmentName) -> bool {
    own_segments(info).last().is_some_and(|last| last.next() == segment)
}

fn begins_at(info: &BackupInfo, segment: SegmentName) -> bool {
    own_segments(info).next() == Some(segment)
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
