//! Stored bytes of one pack, read with one request and kept while blocks are decoded from them.
//!
//! A window's memory is made when it is first filled and used again for every request after that: nothing is zeroed, as
//! nobody sees a byte that the last read did not bring.

use std::ops::Range;

use crate::Result;
use crate::format::block::Extent;
use crate::io::{BUFFER_BYTES, Buffer};
use crate::units::{DIRECT_BYTES, PackId};

/// One request to the store: long enough to hide its latency, short enough to stay in the cache of a core.
pub(super) const WINDOW_BYTES_MAX: u64 = 1 << 20;
/// Bytes between two runs that are read and thrown away rather than asked for around: a short seek costs as much.
pub(super) const WINDOW_GAP_BYTES_MAX: u64 = 64 << 10;

// A read past the page cache begins and ends at whole units.
const _: () = assert!(WINDOW_BYTES_MAX as usize + 2 * DIRECT_BYTES <= BUFFER_BYTES);

/// Stored bytes of one pack, from some byte on.
#[derive(Debug, Default)]
pub(super) struct Window {
    memory: Option<Buffer>,
    held: Option<(PackId, Range<u64>)>,
}

impl Window {
    pub(super) fn clear(&mut self) {
        self.held = None;
    }

    /// Holds the bytes `span` of `pack`, once `read` has put them into the memory that it is given.
    pub(super) fn fill<E: From<crate::Error>>(
        &mut self,
        pack: PackId,
        span: Range<u64>,
        read: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.held = None;
        let memory = match &mut self.memory {
            Some(memory) => memory,
            empty => empty.insert(Buffer::alone()?),
        };
        read(&mut memory[..(span.end - span.start) as usize])?;
        self.held = Some((pack, span));
        Ok(())
    }

    /// The bytes of `run`, if the window has them.
    pub(super) fn run(&self, run: &Extent) -> Option<&[u8]> {
        let (pack, span) = self.held.as_ref()?;
        if *pack != run.pack || u64::from(run.offset) < span.start || run.end() > span.end {
            return None;
        }
        let from = (u64::from(run.offset) - span.start) as usize;
        self.memory.as_deref()?.get(from..from + run.stored as usize)
    }
}

/// Where one request should end that begins with `first` and has `next` to come.
pub(super) fn span_end(first: &Extent, next: impl Iterator<Item = Extent>) -> u64 {
    let start = u64::from(first.offset);
    let mut end = first.end();
    for run in next {
        let offset = u64::from(run.offset);
        let beside = run.pack == first.pack && offset >= start && offset <= end + WINDOW_GAP_BYTES_MAX;
        if !beside || run.end() - start > WINDOW_BYTES_MAX {
            break;
        }
        end = end.max(run.end());
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_spans_neighbours_and_small_gaps_only() {
        let run = |pack, offset, stored| Extent { pack: PackId(pack), offset, stored };
        let first = run(1, 4096, 1000);
        assert_eq!(span_end(&first, [].into_iter()), 5096);
        assert_eq!(span_end(&first, [run(1, 5096, 10), run(1, 60_000, 10)].into_iter()), 60_010);
        assert_eq!(span_end(&first, [run(1, 5096 + 65_537, 10)].into_iter()), 5096);
        assert_eq!(span_end(&first, [run(2, 5096, 10)].into_iter()), 5096);
        assert_eq!(span_end(&first, [run(1, 0, 10)].into_iter()), 5096);
        let chain = (0..20).map(|index| run(1, 5096 + index * 60_000, 60_000));
        assert_eq!(span_end(&first, chain), 5096 + 17 * 60_000);
    }
}
