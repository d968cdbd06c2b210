//! Stored runs: whatever their bytes are, decoding stays within its room; what was encoded decodes to the same; a
//! patch that applies is the patch between the two blocks.

#![no_main]

use engine::codec::{Codec, Compression, decode, decode_within};
use engine::format::block::BlockRecord;
use engine::format::patch;
use engine::units::PAGE_BYTES;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some(([kind, pages], body)) = data.split_first_chunk::<2>() else { return };
    let room = usize::from(*pages) % 17 * PAGE_BYTES + usize::from(kind % 3);
    match kind % 5 {
        0 | 1 => {
            let codec = if kind % 5 == 0 { Codec::Lz4 } else { Codec::Zstd };
            let mut out = vec![0; room];
            if let Ok(decoded) = decode_within(codec, body, &mut out) {
                assert!(decoded <= room);
                assert_eq!(decode(codec, body, &mut out).is_ok(), decoded == room);
            }
        }
        2 => {
            // Repeated, so that it is worth encoding.
            let raw: Vec<u8> = body.iter().copied().cycle().take(if body.is_empty() { 0 } else { room }).collect();
            for compression in [Compression::Lz4, Compression::Zstd { level: i32::from(*pages % 4) - 1 }] {
                let mut encoded = Vec::new();
                let codec = compression.compress(&raw, &mut encoded);
                let stored = if codec == Codec::Raw { &raw } else { &encoded };
                assert!(stored.len() <= raw.len());
                let mut out = vec![0; raw.len()];
                assert_eq!(decode(codec, stored, &mut out), Ok(()));
                assert!(out == raw);
            }
        }
        3 => {
            // A patch of the fuzzer's bitmap and as many pages as it asks for.
            let mut bytes = body.get(..patch::BITMAP_BYTES).unwrap_or(body).to_vec();
            let replaced: u32 = bytes.iter().map(|byte| byte.count_ones()).sum();
            bytes.resize(bytes.len() + replaced as usize * PAGE_BYTES, 7);
            let base = vec![1; room];
            let mut block = base.clone();
            if patch::apply(&bytes, &mut block).is_ok() {
                if let Some(again) = patch::make(&base, &block) {
                    assert!(again == bytes);
                }
            } else {
                assert!(block == base);
            }
            let _ = patch::apply(body, &mut block);
        }
        _ => {
            if let Some(bytes) = body.first_chunk::<{ BlockRecord::BYTES }>()
                && let Ok(record) = BlockRecord::from_bytes(bytes)
            {
                assert_eq!(&record.to_bytes(), bytes);
            }
        }
    }
});
