//! The header of a segment's first page: whose segment it is, and which.

use crate::units::{Lsn, SystemIdentifier, Timeline};
use crate::wal::name::{SegmentName, is_segment_size};

/// Bytes of the long page header that begins every segment (`XLogLongPageHeaderData`).
pub(super) const HEADER_BYTES: usize = 40;
/// `XLP_LONG_HEADER` in `xlp_info`.
const LONG_HEADER: u16 = 0x0002;
/// `XLOG_PAGE_MAGIC` changes with every major version; all of them lie in this range.
const MAGICS: std::ops::RangeInclusive<u16> = 0xD05E..=0xD1FF;

/// What a segment says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    /// The timeline of its first page: the segment's own, or an ancestor's where the timeline began within the segment.
    pub timeline: Timeline,
    /// Its first byte.
    pub start: Lsn,
    /// The cluster that wrote it.
    pub system_identifier: SystemIdentifier,
    /// `wal_segment_size`, bytes.
    pub segment_bytes: u64,
}

impl SegmentHeader {
    /// Reads the beginning of a segment.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let Some(page) = bytes.first_chunk::<HEADER_BYTES>() else {
            return Err(format!("{} bytes are shorter than the header of a WAL page", bytes.len()));
        };
        let u16_at = |at: usize| u16::from_le_bytes([page[at], page[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        let (magic, info) = (u16_at(0), u16_at(2));
        if !MAGICS.contains(&magic) || info & LONG_HEADER == 0 {
            return Err(format!(
                "it does not begin with the page of a WAL segment (magic {magic:04X}, info {info:04X})"
            ));
        }
        let segment_bytes = u64::from(u32_at(32));
        if !is_segment_size(segment_bytes) {
            return Err(format!("its first page says that segments have {segment_bytes} bytes"));
        }
        Ok(Self {
            timeline: Timeline(u32_at(4)),
            start: Lsn(u64_at(8)),
            system_identifier: SystemIdentifier(u64_at(24)),
            segment_bytes,
        })
    }

    /// Whether the segment is the one that its name says.
    pub fn agrees_with(&self, name: SegmentName) -> Result<(), String> {
        let expected = name.start(self.segment_bytes);
        if self.start != expected {
            return Err(format!("its first page is that of {}, its name that of {expected}", self.start));
        }
        if self.timeline.0 == 0 || self.timeline > name.timeline {
            return Err(format!("its first page is of timeline {}, its name of {}", self.timeline, name.timeline));
        }
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// A segment as PostgreSQL writes it, with some content.
    pub(in crate::wal) fn segment(name: SegmentName, identifier: u64, segment_bytes: u64, seed: u8) -> Vec<u8> {
        let mut bytes = vec![0; segment_bytes as usize];
        bytes[0..2].copy_from_slice(&0xD110_u16.to_le_bytes());
        bytes[2..4].copy_from_slice(&LONG_HEADER.to_le_bytes());
        bytes[4..8].copy_from_slice(&name.timeline.0.to_le_bytes());
        bytes[8..16].copy_from_slice(&name.start(segment_bytes).0.to_le_bytes());
        bytes[24..32].copy_from_slice(&identifier.to_le_bytes());
        bytes[32..36].copy_from_slice(&(segment_bytes as u32).to_le_bytes());
        bytes[36..40].copy_from_slice(&8192_u32.to_le_bytes());
        for (at, byte) in bytes.iter_mut().enumerate().skip(40).take(segment_bytes as usize / 2) {
            *byte = (at / 3) as u8 ^ seed;
        }
        bytes
    }

    #[test]
    fn a_segment_says_whose_it_is() {
        let name = SegmentName { timeline: Timeline(3), number: 5 };
        let bytes = segment(name, 77, 1 << 20, 0);
        let header = SegmentHeader::parse(&bytes).unwrap();
        assert_eq!((header.system_identifier, header.start), (SystemIdentifier(77), Lsn(5 << 20)));
        header.agrees_with(name).unwrap();
        header.agrees_with(SegmentName { timeline: Timeline(4), number: 5 }).unwrap();
        assert!(header.agrees_with(SegmentName { timeline: Timeline(2), number: 5 }).is_err());
        assert!(header.agrees_with(name.next()).is_err());
        assert!(SegmentHeader::parse(&bytes[..39]).is_err());
        assert!(SegmentHeader::parse(&[0; 8192]).is_err());
    }
}
