//! How a run of bytes is stored: raw, lz4 or zstd.
//!
//! A run is a block, or a patch of one. It is encoded where that pays and stored raw where it does not: a raw run
//! is read straight into its target, so what encoding saves must be worth more than that. Raw runs are padded to
//! [`DIRECT_BYTES`], so the saving is counted against the padded length.
//!
//! lz4 is the C library's block API without frame, sizes or checksum: the block record knows the lengths and the
//! BLAKE3 of the decoded bytes proves them. Both decoders are bounded by the caller's buffer whatever the stored
//! bytes say. Contexts are kept per thread; nothing is allocated per block once a thread is warm.
//!
//! Unsafe here is what two calls into the C library need.

use std::cell::RefCell;
use std::ffi::c_int;

use serde::{Deserialize, Serialize};

use crate::units::DIRECT_BYTES;

/// Encoding must save at least this part of a run (one sixteenth), or the run stays raw.
const SAVING_SHARE: usize = 16;
/// Encoding must save at least this much, or the run stays raw: less than one page of a disk is no saving.
const SAVING_BYTES_MIN: usize = DIRECT_BYTES;

/// How one stored run of bytes is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Codec {
    /// As it is.
    Raw = 0,
    /// An lz4 block.
    Lz4 = 1,
    /// A zstd frame.
    Zstd = 2,
}

/// What a repository compresses with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Compression {
    /// Every block raw.
    None,
    /// The C library's default level.
    Lz4,
    /// zstd at a level.
    Zstd {
        /// -7 to 19.
        level: i32,
    },
}

impl std::fmt::Display for Compression {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Lz4 => f.write_str("lz4"),
            Self::Zstd { level } => write!(f, "zstd:{level}"),
        }
    }
}

impl From<Compression> for String {
    fn from(compression: Compression) -> Self {
        compression.to_string()
    }
}

impl std::str::FromStr for Compression {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse = || format!("\"{text}\" is not a compression: none, lz4, zstd or zstd:LEVEL (-7 to 19)");
        match text.split_once(':') {
            None if text == "none" => Ok(Self::None),
            None if text == "lz4" => Ok(Self::Lz4),
            None if text == "zstd" => Ok(Self::Zstd { level: 1 }),
            Some(("zstd", level)) => match level.parse() {
                Ok(level @ -7..=19) => Ok(Self::Zstd { level }),
                _ => Err(refuse()),
            },
            _ => Err(refuse()),
        }
    }
}

impl TryFrom<String> for Compression {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl Codec {
    /// The codec of a record's byte, or nothing.
    pub const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Raw),
            1 => Some(Self::Lz4),
            2 => Some(Self::Zstd),
            _ => None,
        }
    }

    /// The name that users see.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }
}

/// Stored bytes that do not decode to what the record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The decoder refused them, or they decode to more than fits.
    #[error("{stored} {} bytes do not decode into {room}", codec.name())]
    Damaged {
        /// How they were to be decoded.
        codec: Codec,
        /// How many stored bytes there were.
        stored: usize,
        /// How many decoded bytes would have fitted.
        room: usize,
    },
    /// They decode to fewer bytes than the block has.
    #[error("{stored} {} bytes decode to {decoded} bytes instead of {expected}", codec.name())]
    WrongLength {
        /// How they were decoded.
        codec: Codec,
        /// How many stored bytes there were.
        stored: usize,
        /// How many came out.
        decoded: usize,
        /// How many the block has.
        expected: usize,
    },
}

impl Compression {
    /// Encodes `raw` into `out`, whose content is replaced. [`Codec::Raw`] leaves `out` empty: store `raw` as it is,
    /// because encoding would not pay.
    pub fn compress(&self, raw: &[u8], out: &mut Vec<u8>) -> Codec {
        out.clear();
        let padded = raw.len().next_multiple_of(DIRECT_BYTES);
        let limit = padded.saturating_sub(SAVING_BYTES_MIN.max(padded / SAVING_SHARE));
        if limit == 0 {
            return Codec::Raw;
        }
        out.reserve(limit);
        let (codec, encoded) = match self {
            Self::None => return Codec::Raw,
            Self::Lz4 => (Codec::Lz4, lz4_compress(raw, out, limit)),
            Self::Zstd { level } => (Codec::Zstd, zstd_compress(*level, raw, out)),
        };
        if encoded && (1..=limit).contains(&out.len()) {
            codec
        } else {
            out.clear();
            Codec::Raw
        }
    }
}

/// Decodes `stored` into `out`, which it must fill exactly.
pub fn decode(codec: Codec, stored: &[u8], out: &mut [u8]) -> Result<(), DecodeError> {
    let decoded = decode_within(codec, stored, out)?;
    if decoded == out.len() {
        Ok(())
    } else {
        Err(DecodeError::WrongLength { codec, stored: stored.len(), decoded, expected: out.len() })
    }
}

/// Decodes `stored` into the front of `out` and returns how many bytes came out. For patches, whose length only
/// their own bitmap tells; blocks take [`decode`].
pub fn decode_within(codec: Codec, stored: &[u8], out: &mut [u8]) -> Result<usize, DecodeError> {
    let room = out.len();
    let decoded = match codec {
        Codec::Raw => out.get_mut(..stored.len()).map(|front| {
            front.copy_from_slice(stored);
            stored.len()
        }),
        Codec::Lz4 => lz4_decompress(stored, out),
        Codec::Zstd => zstd_decompress(stored, out),
    };
    decoded.ok_or(DecodeError::Damaged { codec, stored: stored.len(), room })
}

/// Whether at most `limit` bytes were enough; they are then the content of `out`, which has room for them.
fn lz4_compress(raw: &[u8], out: &mut Vec<u8>, limit: usize) -> bool {
    let room = out.spare_capacity_mut();
    let (Ok(raw_bytes), Ok(room_bytes)) = (c_int::try_from(raw.len()), c_int::try_from(room.len().min(limit))) else {
        return false;
    };
    // SAFETY: `raw` is readable for `raw_bytes` and `room` writable for `room_bytes`, both borrowed over the call, and
    // they cannot overlap (`out` is borrowed mutably). The C library keeps within the two lengths: its promise for
    // any content. It keeps no pointer after it returns.
    let encoded =
        unsafe { lz4_sys::LZ4_compress_default(raw.as_ptr().cast(), room.as_mut_ptr().cast(), raw_bytes, room_bytes) };
    match usize::try_from(encoded) {
        Ok(encoded) if encoded > 0 && encoded <= room.len() => {
            // SAFETY: the library has written the first `encoded` bytes of the spare room (its result, checked against
            // the room's length the line before), and `out` was empty.
            unsafe { out.set_len(encoded) };
            true
        }
        _ => false,
    }
}

fn lz4_decompress(stored: &[u8], out: &mut [u8]) -> Option<usize> {
    let (stored_bytes, out_bytes) = (c_int::try_from(stored.len()).ok()?, c_int::try_from(out.len()).ok()?);
    // SAFETY: `stored` is readable for `stored_bytes` and `out` writable for `out_bytes`, both borrowed over the call
    // and apart. `LZ4_decompress_safe` is the library's decoder for hostile input: it promises never to read past the
    // one nor write past the other, whatever the bytes are.
    let decoded = unsafe {
        lz4_sys::LZ4_decompress_safe(stored.as_ptr().cast(), out.as_mut_ptr().cast(), stored_bytes, out_bytes)
    };
    usize::try_from(decoded).ok().filter(|decoded| *decoded <= out.len())
}

thread_local! {
    /// The level a thread compresses with, and its context. A process writes one repository, so the level hardly
    /// changes.
    static ZSTD_COMPRESSOR: RefCell<Option<(i32, zstd::bulk::Compressor<'static>)>> = const { RefCell::new(None) };
    static ZSTD_DECOMPRESSOR: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Whether the room of `out` was enough and the library willing. Any failure means "store it raw", which is always
/// right.
fn zstd_compress(level: i32, raw: &[u8], out: &mut Vec<u8>) -> bool {
    ZSTD_COMPRESSOR.with_borrow_mut(|kept| {
        if kept.as_ref().is_none_or(|(kept_level, _)| *kept_level != level) {
            *kept = zstd::bulk::Compressor::new(level).ok().map(|compressor| (level, compressor));
        }
        kept.as_mut().is_some_and(|(_, compressor)| compressor.compress_to_buffer(raw, out).is_ok())
    })
}

fn zstd_decompress(stored: &[u8], out: &mut [u8]) -> Option<usize> {
    ZSTD_DECOMPRESSOR.with_borrow_mut(|kept| {
        if kept.is_none() {
            *kept = zstd::bulk::Decompressor::new().ok();
        }
        kept.as_mut()?.decompress_to_buffer(stored, out).ok()
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]
    use super::*;
    use proptest::prelude::*;

    const ALL: [Compression; 4] =
        [Compression::None, Compression::Lz4, Compression::Zstd { level: 1 }, Compression::Zstd { level: 9 }];

    fn compressible(bytes: usize) -> Vec<u8> {
        (0..bytes).map(|i| (i / 64 % 251) as u8).collect()
    }

    fn incompressible(bytes: usize) -> Vec<u8> {
        let mut out = vec![0; bytes];
        blake3::Hasher::new().update(b"noise").finalize_xof().fill(&mut out);
        out
    }

    #[test]
    fn what_was_compressed_decodes_to_the_same() {
        let mut encoded = vec![1, 2, 3];
        for compression in ALL {
            for bytes in [8192, 131_072, 131_071, 1 << 20, 5000] {
                let raw = compressible(bytes);
                let codec = compression.compress(&raw, &mut encoded);
                if compression == Compression::None {
                    assert_eq!((codec, encoded.len()), (Codec::Raw, 0));
                    continue;
                }
                assert_ne!(codec, Codec::Raw, "{compression} {bytes}");
                let mut decoded = vec![0; bytes];
                decode(codec, &encoded, &mut decoded).unwrap();
                assert_eq!(decoded, raw);
            }
        }
    }

    #[test]
    fn what_does_not_pay_stays_raw() {
        let mut encoded = Vec::new();
        for compression in ALL {
            for raw in [&[] as &[u8], b"15\n", &compressible(4096), &incompressible(131_072)] {
                assert_eq!(compression.compress(raw, &mut encoded), Codec::Raw, "{compression} {}", raw.len());
                assert!(encoded.is_empty());
            }
            // A twentieth saved: not worth the decoding.
            let mut nearly = incompressible(131_072);
            nearly[..131_072 / 20].fill(0);
            assert_eq!(compression.compress(&nearly, &mut encoded), Codec::Raw);
        }
    }

    #[test]
    fn a_wrong_length_is_refused_both_ways() {
        let raw = compressible(16_384);
        let mut encoded = Vec::new();
        for compression in [Compression::Lz4, Compression::Zstd { level: 1 }] {
            let codec = compression.compress(&raw, &mut encoded);
            let damaged = DecodeError::Damaged { codec, stored: encoded.len(), room: 16_383 };
            assert_eq!(decode(codec, &encoded, &mut [0; 16_383]), Err(damaged));
            let short = DecodeError::WrongLength { codec, stored: encoded.len(), decoded: 16_384, expected: 16_385 };
            assert_eq!(decode(codec, &encoded, &mut [0; 16_385]), Err(short));
            assert_eq!(decode_within(codec, &encoded, &mut vec![0; 1 << 20]), Ok(16_384));
        }
        assert!(decode(Codec::Raw, &raw, &mut [0; 100]).is_err());
        assert!(decode(Codec::Raw, &raw[..99], &mut [0; 100]).is_err());
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(stored: Vec<u8>, room in 0_usize..20_000) {
            let mut out = vec![0; room];
            for codec in [Codec::Raw, Codec::Lz4, Codec::Zstd] {
                if let Ok(decoded) = decode_within(codec, &stored, &mut out) {
                    prop_assert!(decoded <= room);
                }
            }
        }

        #[test]
        fn a_flipped_bit_never_panics(position in 0_usize..1 << 20, bit in 0_u8..8) {
            let raw = compressible(32 << 10);
            for compression in [Compression::Lz4, Compression::Zstd { level: 1 }] {
                let mut encoded = Vec::new();
                let codec = compression.compress(&raw, &mut encoded);
                let position = position % encoded.len();
                encoded[position] ^= 1 << bit;
                let mut out = vec![0; raw.len()];
                let _ = decode(codec, &encoded, &mut out);
            }
        }
    }
}
