//! Headers of packs, manifest files and WAL objects: as they come, and with the hash made right, which no fuzzer finds.

#![no_main]

use engine::checksum::Hash;
use engine::format::manifest::ManifestHeader;
use engine::format::pack::PackHeader;
use engine::format::wal::WalHeader;
use libfuzzer_sys::fuzz_target;

const PAGE: usize = 4096;
const PAGE_HASH: std::ops::Range<usize> = 4064..4096;
const WAL_HASH: std::ops::Range<usize> = 128..160;
/// Long enough for the header of a few hundred blocks.
const OBJECT: usize = 8 * PAGE;

fuzz_target!(|data: &[u8]| {
    let _ = PackHeader::from_bytes(data);
    let _ = ManifestHeader::from_bytes(data);
    let _ = WalHeader::bytes_needed(data);

    let Some((kind, body)) = data.split_first() else { return };
    let magic = [b"pghypack", b"pghymani", b"pghy-wal"][usize::from(kind % 3)];
    let mut bytes = [magic.as_slice(), body].concat();
    bytes.resize(OBJECT, 0);
    if kind % 3 < 2 {
        let hash = Hash::of(&bytes[..PAGE_HASH.start]);
        bytes[PAGE_HASH].copy_from_slice(&hash.0);
        if let Ok(header) = PackHeader::from_bytes(&bytes) {
            assert_eq!(PackHeader::from_bytes(&header.to_bytes()), Ok(header));
        }
        if let Ok(header) = ManifestHeader::from_bytes(&bytes) {
            assert_eq!(ManifestHeader::from_bytes(&header.to_bytes()), Ok(header));
        }
    } else if let Ok(needed @ ..=OBJECT) = WalHeader::bytes_needed(&bytes) {
        bytes[WAL_HASH].fill(0);
        let hash = Hash::of(&bytes[..needed]);
        bytes[WAL_HASH].copy_from_slice(&hash.0);
        if let Ok(header) = WalHeader::from_bytes(&bytes) {
            let written = header.to_bytes();
            assert_eq!(written.as_deref().map(WalHeader::from_bytes), Ok(Ok(header)));
        }
    }
});
