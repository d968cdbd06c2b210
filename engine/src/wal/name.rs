//! The names that PostgreSQL gives its WAL files, and what they say.
//!
//! | name | what |
//! |---|---|
//! | `000000010000000A000000FE` | a segment: timeline, then the high and low half of its number |
//! | `….partial` | the unfinished last segment of a timeline that was left by a promotion |
//! | `….00000028.backup` | the label of a backup that began in that segment |
//! | `00000002.history` | the timelines that led to timeline 2 |

use std::fmt;

use crate::units::{Lsn, Timeline};

/// The smallest and the largest `wal_segment_size`.
const SEGMENT_BYTES_MIN: u64 = 1 << 20;
const SEGMENT_BYTES_MAX: u64 = 1 << 30;

/// Whether PostgreSQL could have segments of this size: a power of two from 1 MiB to 1 GiB.
pub const fn is_segment_size(bytes: u64) -> bool {
    bytes.is_power_of_two() && bytes >= SEGMENT_BYTES_MIN && bytes <= SEGMENT_BYTES_MAX
}

/// A segment: its timeline and its number, which is its first LSN divided by the segment size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentName {
    /// The timeline.
    pub timeline: Timeline,
    /// The number; 0 is never written by PostgreSQL, whose WAL begins in segment 1.
    pub number: u64,
}

/// What a file of the archive is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WalFile {
    /// A whole segment.
    Segment(SegmentName),
    /// The last segment of a timeline, as far as it came.
    Partial(SegmentName),
    /// A backup's label, kept with the WAL: the segment and the offset in it where the backup began.
    BackupLabel(SegmentName, u32),
    /// The ancestors of a timeline.
    History(Timeline),
}

impl SegmentName {
    /// The segment that holds the byte at `lsn`.
    pub const fn holding(timeline: Timeline, lsn: Lsn, segment_bytes: u64) -> Self {
        Self { timeline, number: lsn.0 / segment_bytes }
    }

    /// The segment that holds the byte before `lsn`: the last one needed to have WAL up to `lsn`.
    pub const fn ending_at(timeline: Timeline, lsn: Lsn, segment_bytes: u64) -> Self {
        Self { timeline, number: lsn.0.saturating_sub(1) / segment_bytes }
    }

    /// Its first byte.
    pub const fn start(self, segment_bytes: u64) -> Lsn {
        Lsn(self.number.saturating_mul(segment_bytes))
    }

    /// The first byte after it.
    pub const fn end(self, segment_bytes: u64) -> Lsn {
        Lsn((self.number.saturating_add(1)).saturating_mul(segment_bytes))
    }

    /// The one after it on the same timeline.
    pub const fn next(self) -> Self {
        Self { timeline: self.timeline, number: self.number + 1 }
    }

    /// Its file name.
    pub fn file_name(self, segment_bytes: u64) -> String {
        let per_high = per_high(segment_bytes);
        format!("{:08X}{:08X}{:08X}", self.timeline.0, self.number / per_high, self.number % per_high)
    }
}

impl WalFile {
    /// What the file `name` is, in a cluster with segments of `segment_bytes`, or nothing if it is no WAL file.
    pub fn parse(name: &str, segment_bytes: u64) -> Option<Self> {
        if !name.is_ascii() {
            return None;
        }
        if let Some(digits) = name.strip_suffix(".history") {
            return hex8(digits).filter(|timeline| *timeline != 0).map(|timeline| Self::History(Timeline(timeline)));
        }
        let (segment, rest) = name.split_at_checked(24)?;
        let timeline = hex8(&segment[..8]).filter(|timeline| *timeline != 0)?;
        let (high, low) = (hex8(&segment[8..16])?, hex8(&segment[16..])?);
        let per_high = per_high(segment_bytes);
        if u64::from(low) >= per_high {
            return None;
        }
        let segment = SegmentName { timeline: Timeline(timeline), number: u64::from(high) * per_high + u64::from(low) };
        match rest {
            "" => Some(Self::Segment(segment)),
            ".partial" => Some(Self::Partial(segment)),
            _ => {
                hex8(rest.strip_prefix('.')?.strip_suffix(".backup")?).map(|offset| Self::BackupLabel(segment, offset))
            }
        }
    }

    /// Its file name.
    pub fn file_name(self, segment_bytes: u64) -> String {
        match self {
            Self::Segment(segment) => segment.file_name(segment_bytes),
            Self::Partial(segment) => format!("{}.partial", segment.file_name(segment_bytes)),
            Self::BackupLabel(segment, offset) => format!("{}.{offset:08X}.backup", segment.file_name(segment_bytes)),
            Self::History(timeline) => format!("{:08X}.history", timeline.0),
        }
    }

    /// The timeline it belongs to.
    pub const fn timeline(self) -> Timeline {
        match self {
            Self::Segment(segment) | Self::Partial(segment) | Self::BackupLabel(segment, _) => segment.timeline,
            Self::History(timeline) => timeline,
        }
    }
}

impl fmt::Display for SegmentName {
    /// For people, who know the segment by its usual size's name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "segment {} of timeline {}", self.number, self.timeline)
    }
}

/// How many segments the low half of a name counts before the high half moves on: 4 GiB of WAL.
const fn per_high(segment_bytes: u64) -> u64 {
    (1 << 32) / segment_bytes
}

/// Exactly eight upper-case hex digits, as PostgreSQL writes them.
fn hex8(digits: &str) -> Option<u32> {
    let plain = digits.len() == 8 && digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'A'..=b'F'));
    plain.then(|| u32::from_str_radix(digits, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB_16: u64 = 16 << 20;

    #[test]
    fn every_kind_of_name_is_read_and_written() {
        let segment = SegmentName { timeline: Timeline(1), number: 0xA * 256 + 0xFE };
        for (name, file) in [
            ("000000010000000A000000FE", WalFile::Segment(segment)),
            ("000000010000000A000000FE.partial", WalFile::Partial(segment)),
            ("000000010000000A000000FE.00000028.backup", WalFile::BackupLabel(segment, 0x28)),
            ("00000002.history", WalFile::History(Timeline(2))),
        ] {
            assert_eq!(WalFile::parse(name, MIB_16), Some(file));
            assert_eq!(file.file_name(MIB_16), name);
        }
    }

    #[test]
    fn what_postgresql_never_writes_is_no_wal_file() {
        for name in [
            "",
            "RECOVERYXLOG",
            "000000010000000a000000fe",
            "000000000000000A000000FE",
            "000000010000000A00000100",
            "000000010000000A000000FE.old",
            "000000010000000A000000FE.28.backup",
            "2.history",
            "00000000.history",
            "../0000001.history",
            "000000010000000A000000F\u{e9}",
        ] {
            assert_eq!(WalFile::parse(name, MIB_16), None, "{name}");
        }
    }

    #[test]
    fn a_segment_knows_its_bytes() {
        let segment = SegmentName::holding(Timeline(1), Lsn(0x0300_0028), MIB_16);
        assert_eq!((segment.start(MIB_16), segment.end(MIB_16)), (Lsn(0x0300_0000), Lsn(0x0400_0000)));
        assert_eq!(SegmentName::ending_at(Timeline(1), Lsn(0x0400_0000), MIB_16), segment);
        assert_eq!(SegmentName::ending_at(Timeline(1), Lsn(0x0400_0001), MIB_16), segment.next());
        // With segments of 1 GiB the low half counts to four.
        let large = SegmentName { timeline: Timeline(1), number: 4 };
        assert_eq!(large.file_name(1 << 30), "000000010000000100000000");
        assert_eq!(WalFile::parse("000000010000000100000004", 1 << 30), None);
    }
}
