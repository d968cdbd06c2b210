//! Little-endian numbers at fixed places of fixed-size records.
//!
//! The places are constants that chain (`VERSION = MAGIC.end..MAGIC.end + 2`), the records are arrays whose length the
//! caller has checked, so none of these can be out of bounds for any content; the round-trip tests run through each.

use std::ops::Range;

pub(crate) fn bytes_at<const N: usize>(record: &[u8], field: Range<usize>) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&record[field]);
    bytes
}

pub(crate) fn u16_at(record: &[u8], field: Range<usize>) -> u16 {
    u16::from_le_bytes(bytes_at(record, field))
}

pub(crate) fn u32_at(record: &[u8], field: Range<usize>) -> u32 {
    u32::from_le_bytes(bytes_at(record, field))
}

pub(crate) fn u64_at(record: &[u8], field: Range<usize>) -> u64 {
    u64::from_le_bytes(bytes_at(record, field))
}

pub(crate) fn i64_at(record: &[u8], field: Range<usize>) -> i64 {
    i64::from_le_bytes(bytes_at(record, field))
}

/// Bytes as an error shows them: text where it is text, hex where it is not.
pub(crate) fn shown(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) if text.bytes().all(|byte| byte.is_ascii_graphic()) => format!("\"{text}\""),
        _ => bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" "),
    }
}

/// A count for a 16-bit field. The writers have bounded it; one that they had not would be written as the largest
/// number, which every reader refuses.
pub(crate) fn count_u16(count: usize) -> [u8; 2] {
    u16::try_from(count).unwrap_or(u16::MAX).to_le_bytes()
}

/// A count for a 32-bit field; see [`count_u16`].
pub(crate) fn count_u32(count: usize) -> [u8; 4] {
    u32::try_from(count).unwrap_or(u32::MAX).to_le_bytes()
}
