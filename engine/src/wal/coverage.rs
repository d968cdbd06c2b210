//! What the archive covers: its gaps, and how far recovery can come from a backup.
//!
//! A recovery follows a *path*: the ancestors of its timeline, each up to where the next one left it. Of every segment
//! number the path needs exactly one file, that of the newest timeline that has begun by then: where a timeline left
//! another within a segment, its first segment repeats what the other's had up to there.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::WalArchive;
use super::history::History;
use super::name::{SegmentName, WalFile};
use crate::format::backup::BackupInfo;
use crate::units::{Lsn, Timeline};
use crate::{Error, Result};

/// How many missing segments are told one by one.
const MISSING_MAX: usize = 1000;

/// Segments that are missing between two that are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// The first missing segment.
    pub first: SegmentName,
    /// How many are missing, at least 1.
    pub segments: u64,
}

/// Where a timeline begins, and what is missing on the way onto it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Branch {
    /// The way onto the timeline.
    pub path: History,
    /// The last segment there is of the parent before it was left.
    pub before: SegmentName,
    /// The first segment there is of the timeline.
    pub after: SegmentName,
    /// What is missing between the two: of the parent, then of the timeline itself.
    pub missing: Vec<Gap>,
}

/// How far recovery can come from a backup along one timeline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reach {
    /// The timeline that recovery would end on.
    pub timeline: Timeline,
    /// The end of the WAL that is there without a gap; none if the backup cannot even become consistent.
    pub end: Option<Lsn>,
    /// When the last segment before that end was archived, seconds since 1970: no transaction in it is younger.
    pub archived: Option<i64>,
    /// The segment that ends it, where the archive goes on behind a gap.
    pub gap: Option<Gap>,
}

impl Gap {
    /// The name of the first missing segment, and how many follow.
    pub fn describe(&self, segment_bytes: u64) -> String {
        let name = self.first.file_name(segment_bytes);
        match self.segments {
            1 => name,
            more => format!("{name} and the {} after it", more - 1),
        }
    }
}

impl fmt::Display for Gap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} and {} more", self.first, self.segments - 1)
    }
}

/// Segment numbers by timeline, and when each was archived.
type Present = BTreeMap<Timeline, BTreeMap<u64, i64>>;

impl WalArchive {
    /// The gaps of all timelines: segments that are missing between two of one timeline, or where one left another.
    pub fn gaps(&self) -> Result<Vec<Gap>> {
        let mut gaps = self.gaps_within()?;
        gaps.extend(self.branches()?.into_iter().flat_map(|branch| branch.missing));
        gaps.sort_unstable_by_key(|gap| gap.first);
        Ok(gaps)
    }

    /// Segments that are missing between two of one timeline.
    pub fn gaps_within(&self) -> Result<Vec<Gap>> {
        let mut gaps = Vec::new();
        for timeline in self.timelines()? {
            let segments = self.segments(timeline)?;
            gaps.extend(segments.windows(2).filter_map(|pair| gap_between(pair[0], pair[1].number)));
        }
        Ok(gaps)
    }

    /// The beginning of every timeline that has segments, as its parent has from before, and a history which can be read.
    pub fn branches(&self) -> Result<Vec<Branch>> {
        let mut branches = Vec::new();
        for timeline in self.timelines()? {
            let Some(after) = self.segments(timeline)?.first().copied() else { continue };
            let path = match self.history(timeline) {
                Ok(Some(path)) => path,
                Ok(None) | Err(Error::Corrupt { .. }) => continue,
                Err(error) => return Err(error),
            };
            let Some(left) = path.ancestors.last() else { continue };
            let begins = left.left_at.0 / self.segment_bytes();
            let before = self.segments(left.timeline)?.into_iter().rfind(|segment| segment.number < begins);
            let Some(before) = before else { continue };
            let own =
                Gap { first: SegmentName { timeline, number: begins }, segments: after.number.saturating_sub(begins) };
            let own = Some(own).filter(|own| own.segments > 0);
            let missing = gap_between(before, begins).into_iter().chain(own).collect();
            branches.push(Branch { path, before, after, missing });
        }
        Ok(branches)
    }

    /// The segments that are missing to replay from `start` to `stop` (none: to the newest there is) along `path`; at
    /// most the first thousand.
    pub fn missing_between(&self, start: Lsn, path: &History, stop: Option<Lsn>) -> Result<Vec<SegmentName>> {
        let segment_bytes = self.segment_bytes();
        let present = self.present(path)?;
        let newest = present.get(&path.timeline).and_then(|numbers| numbers.keys().last()).copied();
        let last = match stop {
            Some(stop) => SegmentName::ending_at(path.timeline, stop, segment_bytes).number,
            None => newest.unwrap_or(start.0 / segment_bytes),
        };
        let numbers = start.0 / segment_bytes..=last;
        let needed = numbers.map(|number| needed(path, number, segment_bytes));
        Ok(needed.filter(|segment| !has(&present, *segment)).take(MISSING_MAX).collect())
    }

    /// How far recovery can come from a backup: along its own timeline, and along every one that branched off later.
    pub fn reaches(&self, info: &BackupInfo) -> Result<Vec<Reach>> {
        let mut reaches = Vec::new();
        for timeline in self.timelines()?.into_iter().chain([info.wal.timeline]).collect::<BTreeSet<_>>() {
            let path = match self.history(timeline)? {
                Some(path) => path,
                None if timeline == info.wal.timeline => History::root(timeline),
                // Without its history nobody knows where it came from.
                None => continue,
            };
            if path.includes(info.wal.timeline, info.wal.stop) {
                reaches.push(reach(&path, &self.present(&path)?, info, self.segment_bytes()));
            }
        }
        Ok(reaches)
    }

    fn present(&self, path: &History) -> Result<Present> {
        let timelines = path.ancestors.iter().map(|ancestor| ancestor.timeline).chain([path.timeline]);
        timelines
            .map(|timeline| {
                let segments = self.entries(timeline)?.into_iter().filter_map(|(file, entry)| match file {
                    WalFile::Segment(segment) => Some((segment.number, entry.modified)),
                    WalFile::Partial(_) | WalFile::BackupLabel(..) | WalFile::History(_) => None,
                });
                Ok((timeline, segments.collect()))
            })
            .collect()
    }
}

/// The one file that recovery along `path` needs of a segment number.
fn needed(path: &History, number: u64, segment_bytes: u64) -> SegmentName {
    let left = |ancestor: &&super::history::Ancestor| number < ancestor.left_at.0 / segment_bytes;
    let timeline = path.ancestors.iter().find(left).map_or(path.timeline, |ancestor| ancestor.timeline);
    SegmentName { timeline, number }
}

fn has(present: &Present, segment: SegmentName) -> bool {
    present.get(&segment.timeline).is_some_and(|numbers| numbers.contains_key(&segment.number))
}

fn gap_between(before: SegmentName, next_number: u64) -> Option<Gap> {
    let segments = next_number.checked_sub(before.number + 1).filter(|segments| *segments > 0)?;
    Some(Gap { first: before.next(), segments })
}

fn reach(path: &History, present: &Present, info: &BackupInfo, segment_bytes: u64) -> Reach {
    let first = info.wal.start.0 / segment_bytes;
    let missing = (first..).map(|number| needed(path, number, segment_bytes)).find(|segment| !has(present, *segment));
    // Numbers are finite, so one is missing.
    let missing = missing.unwrap_or(SegmentName { timeline: path.timeline, number: first });
    let end = missing.start(segment_bytes);
    // What lies behind the first missing one, on the timelines that are needed there.
    let later = present.iter().flat_map(|(timeline, numbers)| {
        let behind =
            numbers.range(missing.number + 1..).map(|(number, _)| SegmentName { timeline: *timeline, number: *number });
        behind.filter(|segment| needed(path, segment.number, segment_bytes) == *segment)
    });
    let gap = later.map(|segment| segment.number).min();
    let last = missing.number.checked_sub(1).map(|number| needed(path, number, segment_bytes));
    let archived = last.and_then(|last| present.get(&last.timeline)?.get(&last.number).copied());
    let is_consistent = end >= info.wal.stop;
    Reach {
        timeline: path.timeline,
        end: is_consistent.then_some(end),
        archived: archived.filter(|_| is_consistent),
        gap: gap.map(|next| Gap { first: missing, segments: next - missing.number }),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const MIB: u64 = 1 << 20;

    fn names(path: &History, numbers: std::ops::RangeInclusive<u64>) -> Vec<(u32, u64)> {
        let needed = numbers.map(|number| needed(path, number, MIB));
        needed.map(|segment| (segment.timeline.0, segment.number)).collect()
    }

    #[test]
    fn the_first_segment_of_a_timeline_stands_for_the_last_of_its_ancestor() {
        let within = History::parse(Timeline(2), "1\t0/500100\tx\n").unwrap();
        assert_eq!(names(&within, 4..=6), [(1, 4), (2, 5), (2, 6)]);
        let at_the_border = History::parse(Timeline(2), "1\t0/500000\tx\n").unwrap();
        assert_eq!(names(&at_the_border, 4..=6), [(1, 4), (2, 5), (2, 6)]);
        // Two timelines that begin in one segment: the newest has all of it.
        let twice = History::parse(Timeline(3), "1\t0/500100\tx\n2\t0/500200\tx\n").unwrap();
        assert_eq!(names(&twice, 4..=6), [(1, 4), (3, 5), (3, 6)]);
    }

    #[test]
    fn a_gap_says_how_many_are_missing() {
        let before = SegmentName { timeline: Timeline(1), number: 3 };
        assert_eq!(gap_between(before, 4), None);
        let gap = gap_between(before, 6).unwrap();
        assert_eq!((gap.first.number, gap.segments), (4, 2));
        assert_eq!(gap.describe(MIB), "000000010000000000000004 and the 1 after it");
    }
}
