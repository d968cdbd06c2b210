//! The hydration map: as it comes, and with its checksums made right, which no fuzzer finds.

#![no_main]

use engine::hydration::map::Map;
use libfuzzer_sys::fuzz_target;

const PAGE: usize = 4096;
/// What stands behind magic and version: block count, root hash, session.
const HEADER_FIELDS: usize = 6 + 8 + 32 + 64;
const HEADER_CRC: usize = PAGE - 4;
const BITS_CRC: usize = PAGE - 8;

fuzz_target!(|data: &[u8]| {
    check(data);

    // A header of the fuzzer's, the closed page, and up to three pages of bits that begin as the input goes on.
    let Some((pages, body)) = data.split_first() else { return };
    let (header, bits) = body.split_at(body.len().min(HEADER_FIELDS));
    let mut bytes = [b"PGHYDMAP\x01\x00".as_slice(), header].concat();
    bytes.resize(PAGE, 0);
    bytes.resize(2 * PAGE, pages / 128);
    for page in bits.chunks(64).chain([[].as_slice(); 3]).take(usize::from(pages % 4)) {
        bytes.extend_from_slice(page);
        bytes.resize(bytes.len().next_multiple_of(PAGE).max(3 * PAGE), 0);
    }
    let crc = crc32c::crc32c(&bytes[..HEADER_CRC]);
    bytes[HEADER_CRC..PAGE].copy_from_slice(&crc.to_le_bytes());
    check(&bytes);
    // Every second page of bits right, the others damaged as they are.
    for (number, page) in bytes[2 * PAGE..].chunks_exact_mut(PAGE).enumerate().step_by(2) {
        let seed = crc32c::crc32c(&(number as u64).to_le_bytes());
        let crc = crc32c::crc32c_append(seed, &page[..BITS_CRC]);
        page[BITS_CRC..BITS_CRC + 4].copy_from_slice(&crc.to_le_bytes());
    }
    check(&bytes);
});

fn check(bytes: &[u8]) {
    if let Ok(map) = Map::parse(bytes) {
        assert!(map.words.len() as u64 * 64 >= map.identity.blocks);
        assert!(map.damaged_pages as usize <= bytes.len() / PAGE);
    }
}
