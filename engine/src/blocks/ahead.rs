//! What readers in order will want next: a decision, without any I/O.
//!
//! Blocks of a backup are counted through all of its files, in the order in which they lie in packs; so reading in order is
//! known across files, and by whoever reads. A stream is a stretch of blocks that were read or asked for, with little
//! between them. Reads near its head push it on, and earn it as many blocks ahead as they were themselves, and as many
//! again; reads elsewhere begin another stream, and earn nothing.
//!
//! Streams that meet are one: the copier's workers each read a stretch of their own, one behind the other.
//!
//! Always true: a block is asked for ahead once, as long as its stream is known.

use std::collections::BTreeMap;
use std::ops::Range;

use super::window::WINDOW_GAP_BYTES_MAX;
use crate::units::PackId;

/// Streams at once; that which was read longest ago makes room.
const STREAMS_MAX: usize = 64;
/// How far from where the next read is expected one still counts as in order: several threads read for one reader.
const DISORDER_BLOCKS: u64 = 128;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Streams {
    /// By their first blocks; apart.
    known: BTreeMap<u64, Stream>,
    clock: u64,
    /// Where in each pack the last request ends.
    asked: BTreeMap<PackId, u64>,
}

#[derive(Clone, Copy, Debug)]
struct Stream {
    /// Behind the last block that was read.
    head: u64,
    /// Behind the last that was asked for.
    end: u64,
    /// Blocks that were read in order.
    earned: u64,
    used: u64,
}

impl Streams {
    /// Notes a read of these blocks. Where its stream may be pushed on from, and how far at most.
    pub(super) fn observe(&mut self, read: &Range<u64>) -> Range<u64> {
        self.clock += 1;
        let near = self.known.range(..=read.start).next_back();
        let near = near.filter(|(_, stream)| read.start <= stream.end + DISORDER_BLOCKS).map(|(start, _)| *start);
        let Some(start) = near else {
            self.begin(read);
            return read.end..read.end;
        };
        let Some(stream) = self.known.get_mut(&start) else { return read.end..read.end };
        stream.used = self.clock;
        if read.start + DISORDER_BLOCKS < stream.head {
            // Somewhere in what was read long ago.
            return stream.end..stream.end;
        }
        let blocks = read.end - read.start;
        stream.earned = stream.earned.saturating_add(blocks);
        (stream.head, stream.end) = (stream.head.max(read.end), stream.end.max(read.end));
        let from = self.join(start);
        let stream = self.known[&start];
        from..from.max(stream.head.saturating_add(2 * stream.earned))
    }

    /// The stream whose end is `from` now ends at `to`: so far it was asked for. Where it goes on, behind a stream that it
    /// has met.
    pub(super) fn push_on(&mut self, from: u64, to: u64) -> u64 {
        let start = self.known.range(..=from).rev().find(|(_, stream)| stream.end == from).map(|(start, _)| *start);
        let Some(start) = start else { return to };
        if let Some(stream) = self.known.get_mut(&start) {
            stream.end = stream.end.max(to);
        }
        self.join(start)
    }

    /// Begins each request where the last one of its pack ends, if that is near: a reader's request spans the gap, and
    /// would have to ask for it by itself.
    pub(super) fn close_gaps(&mut self, mut requests: Vec<(PackId, Range<u64>)>) -> Vec<(PackId, Range<u64>)> {
        for (pack, span) in &mut requests {
            if self.asked.len() >= STREAMS_MAX && !self.asked.contains_key(pack) {
                self.asked.clear();
            }
            let last = self.asked.insert(*pack, span.end);
            if let Some(end) = last.filter(|end| (1..=WINDOW_GAP_BYTES_MAX).contains(&span.start.saturating_sub(*end)))
            {
                span.start = end;
            }
        }
        requests
    }

    fn begin(&mut self, read: &Range<u64>) {
        if self.known.len() >= STREAMS_MAX
            && let Some(oldest) = self.known.iter().min_by_key(|(_, stream)| stream.used).map(|(start, _)| *start)
        {
            self.known.remove(&oldest);
        }
        self.known.insert(read.start, Stream { head: read.end, end: read.end, earned: 0, used: self.clock });
        self.join(read.start);
    }

    /// Makes one of the stream that begins at `start` and those that it has reached. Its end.
    fn join(&mut self, start: u64) -> u64 {
        loop {
            let Some(end) = self.known.get(&start).map(|stream| stream.end) else { return start };
            let Some(next) = self.known.range(start + 1..=end).next().map(|(start, _)| *start) else { return end };
            if let (Some(met), Some(stream)) = (self.known.remove(&next), self.known.get_mut(&start)) {
                *stream = Stream {
                    head: stream.head.max(met.head),
                    end: stream.end.max(met.end),
                    earned: stream.earned.max(met.earned),
                    used: stream.used.max(met.used),
                };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_in_order_earns_twice_what_it_has_read() {
        let mut streams = Streams::default();
        assert_eq!(streams.observe(&(100..108)), 108..108);
        assert_eq!(streams.observe(&(108..116)), 116..132);
        assert_eq!(streams.push_on(116, 124), 124);
        assert_eq!(streams.observe(&(116..124)), 124..156);
        // Another thread of the same reader is late.
        assert_eq!(streams.observe(&(124..126)).start, 126);
        assert_eq!(streams.observe(&(132..140)).start, 140);
        assert_eq!(streams.observe(&(126..132)).start, 140);
    }

    #[test]
    fn a_small_gap_is_asked_for_with_what_lies_behind_it() {
        let mut streams = Streams::default();
        let near = WINDOW_GAP_BYTES_MAX;
        let asked =
            [(PackId(1), 0..10), (PackId(2), 50..60), (PackId(1), 10 + near..500_000), (PackId(1), 600_000..600_001)];
        let closed = streams.close_gaps(asked.into());
        let expected =
            [(PackId(1), 0..10), (PackId(2), 50..60), (PackId(1), 10..500_000), (PackId(1), 600_000..600_001)];
        assert_eq!(closed, expected);
        assert_eq!(streams.close_gaps(vec![(PackId(2), 62..70)]), [(PackId(2), 60..70)]);
    }

    #[test]
    fn who_jumps_earns_nothing() {
        let mut streams = Streams::default();
        for read in 0..1000_u64 {
            let at = read * 7919 % 1000 * 1000;
            assert!(streams.observe(&(at..at + 1)).is_empty());
        }
        assert!(streams.known.len() <= STREAMS_MAX);
        let mut streams = Streams::default();
        for read in 0..1000 {
            streams.observe(&(read..read + 1));
        }
        assert!(streams.observe(&(5..6)).is_empty());
    }

    #[test]
    fn streams_that_meet_are_one_and_ask_for_nothing_twice() {
        let mut streams = Streams::default();
        for read in 0..8 {
            streams.observe(&(read * 8..read * 8 + 8));
            streams.observe(&(512 + read * 8..512 + read * 8 + 8));
        }
        assert_eq!(streams.push_on(64, 512), 576);
        assert_eq!(streams.known.len(), 1);
        assert_eq!(streams.observe(&(576..584)).start, 584);
    }
}
