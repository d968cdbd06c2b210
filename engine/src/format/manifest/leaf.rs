//! A leaf: up to [`LEAF_RECORDS`] block records of one group, in the order of its files.

use std::ops::Range;

use crate::format::Malformed;
use crate::format::block::BlockRecord;
use crate::format::fields::{count_u32, u32_at};
use crate::format::manifest::{LEAF_RECORDS, VERSION, begin_chunk, expect_length, open_chunk};

const MAGIC: [u8; 4] = *b"pghL";
const RECORDS: Range<usize> = VERSION.end + 2..VERSION.end + 6;
const HEADER_BYTES: usize = RECORDS.end + 4;

const _: () = assert!(HEADER_BYTES == 16);

/// The leaf chunk of `records`, 1 to [`LEAF_RECORDS`] of them.
pub fn leaf_to_bytes(records: &[BlockRecord]) -> Vec<u8> {
    debug_assert!((1..=LEAF_RECORDS).contains(&(records.len() as u64)));
    let mut chunk = begin_chunk(MAGIC, HEADER_BYTES);
    chunk[RECORDS].copy_from_slice(&count_u32(records.len()));
    chunk.reserve_exact(records.len() * BlockRecord::BYTES);
    for record in records {
        chunk.extend_from_slice(&record.to_bytes());
    }
    chunk
}

/// The records of a leaf chunk. How many there must be, the group says: [`Group::leaf_records`].
///
/// [`Group::leaf_records`]: crate::format::manifest::Group::leaf_records
pub fn leaf_from_bytes(chunk: &[u8]) -> Result<Vec<BlockRecord>, Malformed> {
    open_chunk(chunk, MAGIC, HEADER_BYTES, "leaf")?;
    let records = u32_at(chunk, RECORDS);
    if records == 0 || u64::from(records) > LEAF_RECORDS {
        let detail = format!("a leaf of {records} records, expected 1 to {LEAF_RECORDS}");
        return Err(Malformed::damaged(RECORDS.start, detail));
    }
    expect_length(chunk, Some(HEADER_BYTES + records as usize * BlockRecord::BYTES), "leaf")?;
    if chunk[VERSION.end..RECORDS.start] != [0; 2] || chunk[RECORDS.end..HEADER_BYTES] != [0; 4] {
        return Err(Malformed::damaged(VERSION.end, "an unused field of a leaf is not zero"));
    }
    let (records, _) = chunk[HEADER_BYTES..].as_chunks::<{ BlockRecord::BYTES }>();
    let parsed = records.iter().enumerate().map(|(slot, record)| {
        BlockRecord::from_bytes(record).map_err(|error| error.shifted(HEADER_BYTES + slot * BlockRecord::BYTES))
    });
    parsed.collect()
}
