//! The blocks of one file, encoded beside each other and handed on in order.
//!
//! The server waits for the push of a segment before it asks for the next, so the one segment has to keep more than one
//! core busy: workers take pieces in turn, read each with one call, compress and hash its blocks; whoever called writes
//! the first pieces while the later ones are encoded.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};

use crate::checksum::Hash;
use crate::codec::{Codec, Compression};
use crate::page::is_zero;
use crate::units::BlockSize;
use crate::{Error, Result};

/// A worker takes so many bytes at once: few enough that all workers end together, many enough for one call.
const PIECE_BYTES: usize = 512 << 10;
/// A segment of 16 MiB takes a few milliseconds then, and the server's own processes want the other cores.
const WORKERS_MAX: usize = 4;

/// What is encoded: a file that nobody changes, and how.
#[derive(Clone, Copy, Debug)]
pub(super) struct Encoder<'a> {
    pub(super) file: &'a File,
    /// For messages.
    pub(super) path: &'a Path,
    pub(super) bytes: u64,
    pub(super) block_size: BlockSize,
    pub(super) compression: Compression,
}

/// A block on its way into the archive.
#[derive(Clone, Copy, Debug)]
pub(super) struct Encoded {
    pub(super) hash: Hash,
    /// The codec and the length of the run that is stored; none where all of the block is zero.
    pub(super) run: Option<(Codec, usize)>,
}

/// Blocks that lie beside each other, their runs one after the other.
#[derive(Debug, Default)]
pub(super) struct Piece {
    pub(super) blocks: Vec<Encoded>,
    pub(super) runs: Vec<u8>,
}

/// Kept from piece to piece.
#[derive(Default)]
struct Scratch {
    raw: Vec<u8>,
    encoded: Vec<u8>,
}

impl Encoder<'_> {
    /// Hands all pieces to `take`, the first one first. The first failure ends it.
    pub(super) fn encode(&self, mut take: impl FnMut(Piece) -> Result<()>) -> Result<()> {
        let pieces = self.block_size.blocks_of(self.bytes).div_ceil(self.piece_blocks());
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let workers = cores.min(WORKERS_MAX).min(usize::try_from(pieces).unwrap_or(usize::MAX));
        if workers <= 1 {
            let mut scratch = Scratch::default();
            return (0..pieces).try_for_each(|index| take(self.piece(index, &mut scratch)?));
        }
        let next = AtomicU64::new(0);
        std::thread::scope(|scope| {
            let (sender, receiver) = channel();
            for _ in 0..workers {
                let (next, sender) = (&next, sender.clone());
                scope.spawn(move || self.work(pieces, next, &sender));
            }
            drop(sender);
            let (mut early, mut wanted) = (BTreeMap::new(), 0);
            // Workers whose pieces nobody takes any more end with the piece that they are at.
            for (index, piece) in receiver {
                early.insert(index, piece);
                while let Some(piece) = early.remove(&wanted) {
                    take(piece?)?;
                    wanted += 1;
                }
            }
            Ok(())
        })
    }

    fn work(&self, pieces: u64, next: &AtomicU64, sender: &Sender<(u64, Result<Piece>)>) {
        let mut scratch = Scratch::default();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= pieces {
                return;
            }
            let piece = self.piece(index, &mut scratch);
            let failed = piece.is_err();
            if sender.send((index, piece)).is_err() || failed {
                return;
            }
        }
    }

    fn piece_blocks(&self) -> u64 {
        (PIECE_BYTES / self.block_size.bytes()).max(1) as u64
    }

    fn piece(&self, index: u64, Scratch { raw, encoded }: &mut Scratch) -> Result<Piece> {
        let first = index * self.piece_blocks();
        let offset = first * self.block_size.bytes() as u64;
        let bytes = (self.bytes - offset).min(self.piece_blocks() * self.block_size.bytes() as u64);
        raw.resize(usize::try_from(bytes).unwrap_or(usize::MAX), 0);
        let read = self.file.read_exact_at(raw, offset);
        read.map_err(|cause| Error::io_at("read", self.path, offset, cause))?;
        let mut piece = Piece::default();
        for raw in raw.chunks(self.block_size.bytes()) {
            let run = (!is_zero(raw)).then(|| {
                let codec = self.compression.compress(raw, encoded);
                let run = if codec == Codec::Raw { raw } else { encoded.as_slice() };
                piece.runs.extend_from_slice(run);
                (codec, run.len())
            });
            piece.blocks.push(Encoded { hash: Hash::of(raw), run });
        }
        Ok(piece)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io::Write as _;

    use super::*;

    /// Blocks that are zero, that compress and that do not, in pieces of all workers and one that is shorter.
    fn content() -> Vec<u8> {
        let mut content = vec![0; 9 * PIECE_BYTES + 70_000];
        blake3::Hasher::new().update(b"noise").finalize_xof().fill(&mut content[3 * PIECE_BYTES..5 * PIECE_BYTES]);
        content[7 * PIECE_BYTES..].fill(7);
        content
    }

    fn encoder(file: &File, bytes: u64) -> Encoder<'_> {
        let (path, block_size) = (Path::new("segment"), BlockSize::DEFAULT);
        Encoder { file, path, bytes, block_size, compression: Compression::Lz4 }
    }

    #[test]
    fn pieces_come_in_order_and_hold_what_the_file_holds() {
        let content = content();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&content).unwrap();
        let encoder = encoder(&file, content.len() as u64);
        let mut raw = content.chunks(encoder.block_size.bytes());
        encoder
            .encode(|piece| {
                let mut rest = &piece.runs[..];
                for Encoded { hash, run } in piece.blocks {
                    let raw = raw.next().unwrap();
                    assert_eq!(hash, Hash::of(raw));
                    let Some((codec, stored)) = run else {
                        assert!(is_zero(raw));
                        continue;
                    };
                    let (run, behind) = rest.split_at(stored);
                    rest = behind;
                    let mut decoded = vec![0; raw.len()];
                    crate::codec::decode(codec, run, &mut decoded).unwrap();
                    assert!(decoded == raw);
                }
                assert!(rest.is_empty());
                Ok(())
            })
            .unwrap();
        assert!(raw.next().is_none());
    }

    #[test]
    fn a_file_that_is_shorter_than_it_was_and_a_taker_that_fails_end_it() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(5 * PIECE_BYTES as u64).unwrap();
        let shrunk = encoder(&file, 9 * PIECE_BYTES as u64).encode(|_| Ok(()));
        assert!(matches!(shrunk, Err(Error::Io { .. })));
        let mut taken = 0;
        let refused = encoder(&file, 5 * PIECE_BYTES as u64).encode(|_| {
            taken += 1;
            Err(Error::Cancelled)
        });
        assert!(matches!(refused, Err(Error::Cancelled)));
        assert_eq!(taken, 1);
    }
}
