//! Pieces of stored bytes, from the disk into buffers: registered ones by a ring, or by threads.

use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use engine::remote::frame::{Header, Kind, PIECE_BYTES_MAX};
use engine::remote::message::ByteRange;
use tokio_uring::buf::BoundedBuf;
use tokio_uring::buf::fixed::{FixedBuf, FixedBufPool};
use tokio_uring::fs::File;

use super::FRAME_BYTES;

/// The buffers of one worker. Each holds a frame.
pub(super) struct Buffers {
    pool: FixedBufPool<Vec<u8>>,
    /// The kernel has them pinned. Where it will not (a limit on locked memory), they are read into as any other.
    registered: bool,
}

/// A file, and how it is read.
pub(super) enum Handle {
    Ring(File),
    /// On a thread for such things.
    Plain(Arc<std::fs::File>),
}

impl Buffers {
    pub(super) fn new(count: usize, with_ring: bool) -> Self {
        // What a thread reads into beside them counts as much.
        let count = if with_ring { count } else { count.div_ceil(2) };
        let pool = FixedBufPool::new((0..count).map(|_| vec![0; FRAME_BYTES]));
        let registered = with_ring && pool.register().is_ok();
        if with_ring && !registered {
            tracing::info!("the kernel takes no registered buffers: a limit on locked memory, perhaps");
        }
        Self { pool, registered }
    }

    /// A buffer, once there is one.
    pub(super) async fn next(&self) -> FixedBuf {
        self.pool.next(FRAME_BYTES).await
    }

    /// Fills `buffer` with a frame of these bytes of `file`. A file that ends before is `UnexpectedEof`.
    pub(super) async fn read(
        &self,
        file: &Handle,
        range: ByteRange,
        id: u64,
        is_last: bool,
        mut buffer: FixedBuf,
    ) -> io::Result<FixedBuf> {
        let wanted = range.bytes as usize;
        match file {
            Handle::Ring(file) => buffer = self.read_by_ring(file, range, buffer).await?,
            Handle::Plain(file) => {
                let file = Arc::clone(file);
                let read = tokio::task::spawn_blocking(move || {
                    let mut piece = vec![0; wanted];
                    file.read_exact_at(&mut piece, range.offset).map(|()| piece)
                });
                let piece = read.await.map_err(io::Error::other)??;
                buffer[Header::BYTES..Header::BYTES + wanted].copy_from_slice(&piece);
            }
        }
        let header = Header { kind: Kind::Data, is_last, body_bytes: wanted, id };
        buffer[..Header::BYTES].copy_from_slice(&header.to_bytes());
        Ok(buffer)
    }

    async fn read_by_ring(&self, file: &File, range: ByteRange, mut buffer: FixedBuf) -> io::Result<FixedBuf> {
        let wanted = range.bytes as usize;
        let mut filled = 0;
        while filled < wanted {
            let room = buffer.slice(Header::BYTES + filled..Header::BYTES + wanted);
            let at = range.offset + filled as u64;
            let (read, room) =
                if self.registered { file.read_fixed_at(room, at).await } else { file.read_at(room, at).await };
            buffer = room.into_inner();
            match read {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(bytes) => filled += bytes,
                Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
                Err(cause) => return Err(cause),
            }
        }
        Ok(buffer)
    }
}

/// Cuts ranges into pieces, in order: which bytes, and whether they are the last.
pub(super) fn cut(ranges: &[ByteRange]) -> impl Iterator<Item = (ByteRange, bool)> + '_ {
    let last = ranges.len().saturating_sub(1);
    ranges.iter().enumerate().flat_map(move |(number, range)| {
        let end = range.end();
        (range.offset..end).step_by(PIECE_BYTES_MAX).map(move |offset| {
            let bytes = (end - offset).min(PIECE_BYTES_MAX as u64) as u32;
            let piece = ByteRange { offset, bytes };
            (piece, number == last && piece.end() == end)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_all_of_the_ranges_and_the_last_is_known() {
        let piece = PIECE_BYTES_MAX as u32;
        let ranges = [ByteRange { offset: 10, bytes: 2 * piece + 1 }, ByteRange { offset: 0, bytes: piece }];
        let found: Vec<_> = cut(&ranges).map(|(range, last)| (range.offset, range.bytes, last)).collect();
        let behind = 10 + u64::from(piece);
        let expected =
            [(10, piece, false), (behind, piece, false), (behind + u64::from(piece), 1, false), (0, piece, true)];
        assert_eq!(found, expected);
    }
}
