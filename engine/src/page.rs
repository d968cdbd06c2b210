//! What the engine knows of a PostgreSQL page: its checksum, its LSN, and whether it is new.
//!
//! The checksum is PostgreSQL's own (`pg_checksum_page`): FNV-1a widened to 32 lanes of 32 bits, so that a compiler
//! turns a row of lanes into a few vector instructions. It is written here with arrays of that width, which the
//! compiler vectorises without help.

use crate::units::{Lsn, PAGE_BYTES};

/// Lanes hashed side by side.
const LANES: usize = 32;
/// Bytes that all lanes take at once.
const ROW_BYTES: usize = LANES * 4;
const FNV_PRIME: u32 = 16_777_619;
/// `pd_checksum` in the page header; it counts as zero in its own checksum.
const CHECKSUM: std::ops::Range<usize> = 8..10;
/// `pd_upper` in the page header; zero in a page that was never initialised.
const UPPER: std::ops::Range<usize> = 14..16;

const _: () = assert!(PAGE_BYTES.is_multiple_of(ROW_BYTES));
const _: () = assert!(CHECKSUM.end <= ROW_BYTES);

/// Where each lane starts: PostgreSQL's constants.
const LANE_STARTS: [u32; LANES] = [
    0x5B1F_36E9,
    0xB852_5960,
    0x02AB_50AA,
    0x1DE6_6D2A,
    0x79FF_467A,
    0x9BB9_F8A3,
    0x217E_7CD2,
    0x83E1_3D2C,
    0xF8D4_474F,
    0xE39E_B970,
    0x42C6_AE16,
    0x9932_16FA,
    0x7B09_3B5D,
    0x98DA_FF3C,
    0xF718_902A,
    0x0B1C_9CDB,
    0xE58F_764B,
    0x1876_36BC,
    0x5D7B_3BB1,
    0xE73D_E7DE,
    0x92BE_C979,
    0xCCA6_C0B2,
    0x304A_0979,
    0x85AA_43D4,
    0x7831_25BB,
    0x6CA8_EAA2,
    0xE407_EAC6,
    0x4B5C_FC3E,
    0x9FBF_8C76,
    0x15CA_20BE,
    0xF2CA_9FD3,
    0x959B_D756,
];

/// The checksum that `page`, of [`PAGE_BYTES`], should carry as page `block_in_relation` of its relation (counted over
/// all of the relation's segment files). Never 0.
pub fn page_checksum(page: &[u8], block_in_relation: u32) -> u16 {
    debug_assert_eq!(page.len(), PAGE_BYTES);
    let (rows, _) = page.as_chunks::<ROW_BYTES>();
    let mut lanes = LANE_STARTS;
    if let Some((header, rest)) = rows.split_first() {
        let mut header = *header;
        header[CHECKSUM].fill(0);
        mix_row(&mut lanes, &header);
        for row in rest {
            mix_row(&mut lanes, row);
        }
    }
    for _ in 0..2 {
        mix_row(&mut lanes, &[0; ROW_BYTES]);
    }
    let folded = lanes.iter().fold(0, |folded, lane| folded ^ lane) ^ block_in_relation;
    u16::try_from(folded % 65_535 + 1).unwrap_or(u16::MAX)
}

#[inline(always)]
fn mix_row(lanes: &mut [u32; LANES], row: &[u8; ROW_BYTES]) {
    let (words, _) = row.as_chunks::<4>();
    for (lane, word) in lanes.iter_mut().zip(words) {
        let mixed = *lane ^ u32::from_le_bytes(*word);
        *lane = mixed.wrapping_mul(FNV_PRIME) ^ (mixed >> 17);
    }
}

/// The checksum that the page carries; 0 in a page shorter than its header.
pub fn stored_checksum(page: &[u8]) -> u16 {
    u16_at(page, CHECKSUM).unwrap_or(0)
}

/// Whether PostgreSQL has never initialised this page (`PageIsNew`): it then carries no checksum.
pub fn is_new(page: &[u8]) -> bool {
    u16_at(page, UPPER) == Some(0)
}

/// The end of the WAL record that changed the page last; 0 in a page shorter than its header.
pub fn page_lsn(page: &[u8]) -> Lsn {
    let half = |at: usize| page.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes);
    Lsn(u64::from(half(0)) << 32 | u64::from(half(4)))
}

fn u16_at(page: &[u8], at: std::ops::Range<usize>) -> Option<u16> {
    page.get(at)?.try_into().ok().map(u16::from_le_bytes)
}

/// Whether all `bytes` are zero, at the speed of memory.
pub fn is_zero(bytes: &[u8]) -> bool {
    let (strides, rest) = bytes.as_chunks::<256>();
    let zero = |part: &[u8]| part.iter().fold(0, |all, byte| all | byte) == 0;
    strides.iter().all(|stride| zero(stride)) && zero(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Page 5 of `pg_class` in `template1` of a PostgreSQL 15 cluster made by `initdb --data-checksums`.
    const REAL_PAGE: &[u8; PAGE_BYTES] = include_bytes!("../samples/pg_class-page-5.bin");

    #[test]
    fn a_page_of_a_real_cluster_has_the_checksum_that_postgresql_gave_it() {
        assert_eq!(page_checksum(REAL_PAGE, 5), stored_checksum(REAL_PAGE));
        assert_eq!(stored_checksum(REAL_PAGE), 0x2826);
        assert_ne!(page_checksum(REAL_PAGE, 6), stored_checksum(REAL_PAGE), "the same bytes at another place");
        assert!(!is_new(REAL_PAGE));
        assert_eq!(page_lsn(REAL_PAGE).to_string(), "0/158B5E0");
    }

    #[test]
    fn every_byte_but_the_checksum_counts() {
        for at in 0..PAGE_BYTES {
            let mut page = *REAL_PAGE;
            page[at] ^= 0x10;
            let same = page_checksum(&page, 5) == stored_checksum(REAL_PAGE);
            assert_eq!(same, CHECKSUM.contains(&at), "byte {at}");
        }
    }

    #[test]
    fn a_new_page_is_known_and_a_short_one_is_harmless() {
        assert!(is_new(&[0; PAGE_BYTES]));
        assert!(!is_new(&[0; 15]));
        assert_eq!((stored_checksum(&[1; 9]), page_lsn(&[1; 7])), (0, Lsn(0x0101_0101 << 32)));
    }

    #[test]
    fn one_set_bit_anywhere_is_not_zero() {
        assert!(is_zero(&[]));
        assert!(is_zero(&[0; 1000]));
        for at in 0..1000 {
            let mut bytes = [0; 1000];
            bytes[at] = 0x40;
            assert!(!is_zero(&bytes), "byte {at}");
        }
    }
}
