//! What one request's result means. Pure, and the same for io_uring and for `pread`: short results are normal.

use std::io;

use super::disk::{Part, Way};
use crate::units::DIRECT_BYTES;
use crate::{Error, Result};

/// The most that one request asks for: what a FUSE mount takes at once; larger ones only queue behind each other.
pub(super) const REQUEST_BYTES_MAX: usize = 1 << 20;

const _: () = assert!(REQUEST_BYTES_MAX.is_multiple_of(DIRECT_BYTES));
// The kernel counts a request in 32 bits.
const _: () = assert!(REQUEST_BYTES_MAX < 1 << 31);

/// What to do next for a part of which `wanted` bytes are still to be moved.
#[derive(Debug)]
pub(super) enum Next {
    /// All of it is there.
    Done,
    /// So many bytes more are there: ask for the rest.
    Again { advanced: usize },
    /// It cannot be done.
    Failed(io::Error),
}

/// Reads the result of one request. `direct` results may hold more than was wanted, up to the alignment.
pub(super) fn next(way: Way, direct: bool, wanted: usize, result: io::Result<usize>) -> Next {
    match result {
        Err(cause) => match cause.kind() {
            io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock => Next::Again { advanced: 0 },
            _ => Next::Failed(cause),
        },
        Ok(moved) if moved >= wanted => Next::Done,
        Ok(0) if way == Way::Write => Next::Failed(io::ErrorKind::WriteZero.into()),
        Ok(0) => Next::Failed(io::ErrorKind::UnexpectedEof.into()),
        // A direct read stops inside of an aligned unit only at the end of the file.
        Ok(moved) if direct && !moved.is_multiple_of(DIRECT_BYTES) => Next::Failed(io::ErrorKind::UnexpectedEof.into()),
        Ok(moved) => Next::Again { advanced: moved },
    }
}

/// How many bytes to ask for when `wanted` are still to be moved and `room` are left in the buffer.
pub(super) fn request_bytes(way: Way, direct: bool, wanted: usize, room: usize, limit: usize) -> usize {
    let whole = if direct && way == Way::Read { wanted.next_multiple_of(DIRECT_BYTES) } else { wanted };
    whole.min(limit).min(room)
}

/// Cuts a part into requests of at most [`REQUEST_BYTES_MAX`], as `(first byte within the part, bytes)`.
pub(super) fn cut(bytes: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..bytes).step_by(REQUEST_BYTES_MAX).map(move |start| (start, REQUEST_BYTES_MAX.min(bytes - start)))
}

/// Refuses a transfer that does not lie within its buffer, or that O_DIRECT cannot do.
pub(super) fn check(way: Way, parts: &[Part], buffer_bytes: usize) -> Result<()> {
    for part in parts {
        let inside = part.at.checked_add(part.bytes).is_some_and(|end| end <= buffer_bytes);
        let aligned = |number: usize| number.is_multiple_of(DIRECT_BYTES);
        let direct = !part.file.direct
            || (aligned(part.at)
                && part.offset.is_multiple_of(DIRECT_BYTES as u64)
                && (way == Way::Read || aligned(part.bytes)));
        if !inside || !direct {
            return Err(failure(way, part, part.offset, io::ErrorKind::InvalidInput.into()));
        }
    }
    Ok(())
}

/// The error of a part, at a byte of its file.
pub(super) fn failure(way: Way, part: &Part, offset: u64, cause: io::Error) -> Error {
    let operation = match way {
        Way::Read => "read",
        Way::Write => "write",
    };
    Error::io_at(operation, &part.file.path, offset, cause)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_results_go_on_where_they_stopped() {
        assert!(matches!(next(Way::Read, false, 10, Ok(4)), Next::Again { advanced: 4 }));
        assert!(matches!(next(Way::Write, true, 8192, Ok(4096)), Next::Again { advanced: 4096 }));
        assert!(matches!(next(Way::Read, true, 5000, Ok(8192)), Next::Done));
    }

    #[test]
    fn an_interrupted_request_is_asked_again() {
        for kind in [io::ErrorKind::Interrupted, io::ErrorKind::WouldBlock] {
            assert!(matches!(next(Way::Read, false, 1, Err(kind.into())), Next::Again { advanced: 0 }));
        }
        let failed = next(Way::Write, false, 1, Err(io::ErrorKind::StorageFull.into()));
        assert!(matches!(failed, Next::Failed(cause) if cause.kind() == io::ErrorKind::StorageFull));
    }

    #[test]
    fn the_end_of_a_file_is_no_endless_loop() {
        for short in [next(Way::Read, false, 10, Ok(0)), next(Way::Read, true, 8192, Ok(4097))] {
            assert!(matches!(short, Next::Failed(cause) if cause.kind() == io::ErrorKind::UnexpectedEof));
        }
        assert!(
            matches!(next(Way::Write, false, 10, Ok(0)), Next::Failed(cause) if cause.kind() == io::ErrorKind::WriteZero)
        );
    }

    #[test]
    fn a_part_is_cut_without_a_gap() {
        for bytes in [0, 1, REQUEST_BYTES_MAX, REQUEST_BYTES_MAX + 1, 2 * REQUEST_BYTES_MAX] {
            let requests: Vec<_> = cut(bytes).collect();
            assert_eq!(requests.iter().map(|(_, length)| length).sum::<usize>(), bytes);
            assert!(requests.windows(2).all(|pair| pair[0].0 + pair[0].1 == pair[1].0));
        }
    }
}
