//! How far ahead one open file is read: a decision, without any I/O.
//!
//! A handle that reads in order earns a window that doubles with each read; a handle that jumps loses it. Requests of
//! one reader arrive on several threads and so slightly out of order: a read that lies just around the expected place
//! still counts as in order. A reader that keeps several requests in flight through O_DIRECT reads ahead by itself (the
//! restore's copier does); it is given no window, and so pays for no copy.
//!
//! Always true: what [`Window::observe`] asks for is whole runs, lies within the file and behind the read that it was
//! asked for, and is never further away than the window allows.

use std::ops::Range;

/// Read-ahead is asked for in pieces of this size, aligned in the file: one coalesced read of a pack, one job of a
/// worker, one buffer.
pub const RUN_BYTES: u64 = crate::budget::BUFFER_BYTES_MAX as u64;
/// The first window, earned by the second read in order.
const WINDOW_BYTES_MIN: u64 = RUN_BYTES;
/// A window grows to this and no further: at 5 GB/s it covers several milliseconds, more than a disk's round trip.
const WINDOW_BYTES_MAX: u64 = 16 * RUN_BYTES;
/// How far from the expected place a read still counts as in order: the kernel's own read-ahead is served by several
/// threads at once.
const DISORDER_BYTES: u64 = 2 * RUN_BYTES;

/// The largest window that the budget affords now: half of it, shared by the handles that have a window. The other
/// half is for what is being read and for random readers.
pub fn window_bytes_max(budget_bytes: usize, windows: usize) -> u64 {
    let share = budget_bytes as u64 / 2 / windows.max(1) as u64;
    (share / RUN_BYTES * RUN_BYTES).min(WINDOW_BYTES_MAX)
}

/// What a read says about its handle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Nothing yet.
    Unknown,
    /// In order: this range, which may be empty, should be fetched now.
    InOrder(Range<u64>),
    /// A jump: what was fetched ahead is of no use any more.
    Jump,
}

/// The read-ahead of one handle.
#[derive(Debug, Default)]
pub struct Window {
    /// Where the next read is expected.
    expected: u64,
    /// How far ahead to fetch; 0 until two reads were in order.
    bytes: u64,
    /// Fetched, or asked for, up to here.
    fetched: u64,
    /// There was a read before.
    used: bool,
}

impl Window {
    /// True once the handle has earned a window.
    pub fn is_open(&self) -> bool {
        self.bytes > 0
    }

    /// Notes a read of `length` bytes at `offset` of a file of `file_bytes`, and says what to do about it.
    pub fn observe(&mut self, offset: u64, length: u64, file_bytes: u64, window_bytes_max: u64) -> Pattern {
        let end = offset.saturating_add(length);
        let first = !std::mem::replace(&mut self.used, true);
        if first || offset.abs_diff(self.expected) > DISORDER_BYTES.min(self.bytes) {
            let pattern = self.close();
            self.expected = end;
            return pattern;
        }
        self.expected = self.expected.max(end);
        self.bytes = (self.bytes * 2).clamp(WINDOW_BYTES_MIN, WINDOW_BYTES_MAX).min(window_bytes_max);
        Pattern::InOrder(self.wanted(file_bytes))
    }

    /// Gives the window up.
    pub fn close(&mut self) -> Pattern {
        // Also one that was taken back to nothing, as more handles came, has fetched.
        let was_used = self.is_open() || self.fetched > 0;
        (self.bytes, self.fetched) = (0, 0);
        if was_used { Pattern::Jump } else { Pattern::Unknown }
    }

    /// The runs of the window that were not asked for yet. The run that the reader is in is left to the reader.
    fn wanted(&mut self, file_bytes: u64) -> Range<u64> {
        let start = self.expected.next_multiple_of(RUN_BYTES).max(self.fetched);
        let end = (self.expected + self.bytes).next_multiple_of(RUN_BYTES).min(file_bytes);
        if self.bytes == 0 || start >= end {
            return start..start;
        }
        self.fetched = end;
        start..end
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FILE_BYTES: u64 = 1 << 30;

    fn read_in_order(window: &mut Window, reads: u64, request: u64) -> u64 {
        let mut fetched = 0;
        for read in 0..reads {
            if let Pattern::InOrder(range) = window.observe(read * request, request, FILE_BYTES, WINDOW_BYTES_MAX) {
                fetched = fetched.max(range.end);
            }
        }
        fetched
    }

    #[test]
    fn a_handle_that_reads_in_order_earns_a_larger_window() {
        let mut window = Window::default();
        assert_eq!(window.observe(0, 131_072, FILE_BYTES, WINDOW_BYTES_MAX), Pattern::Unknown);
        assert_eq!(
            window.observe(131_072, 131_072, FILE_BYTES, WINDOW_BYTES_MAX),
            Pattern::InOrder(RUN_BYTES..2 * RUN_BYTES)
        );
        let fetched = read_in_order(&mut window, 64, 131_072);
        assert!(fetched >= WINDOW_BYTES_MAX, "{fetched}");
    }

    #[test]
    fn a_handle_that_jumps_loses_its_window() {
        let mut window = Window::default();
        read_in_order(&mut window, 8, 131_072);
        assert_eq!(window.observe(FILE_BYTES / 2, 8192, FILE_BYTES, WINDOW_BYTES_MAX), Pattern::Jump);
        assert!(!window.is_open());
        assert_eq!(window.observe(0, 8192, FILE_BYTES, WINDOW_BYTES_MAX), Pattern::Unknown);
    }

    #[test]
    fn requests_that_overtake_each_other_are_still_in_order() {
        let mut window = Window::default();
        read_in_order(&mut window, 8, 131_072);
        for offset in [9, 8, 11, 10_u64] {
            let pattern = window.observe(offset * 131_072, 131_072, FILE_BYTES, WINDOW_BYTES_MAX);
            assert!(matches!(pattern, Pattern::InOrder(_)), "{pattern:?}");
        }
    }

    #[test]
    fn many_windows_share_half_of_the_budget() {
        assert_eq!(window_bytes_max(64 << 20, 1), WINDOW_BYTES_MAX);
        assert_eq!(window_bytes_max(64 << 20, 8), 4 << 20);
        assert_eq!(window_bytes_max(64 << 20, 1000), 0);
    }

    proptest! {
        #[test]
        fn what_is_asked_for_is_whole_runs_of_the_file_within_the_window(
            reads in prop::collection::vec((0_u64..64, 1_u64..32), 1..64),
            file_bytes in 1_u64..(64 << 20),
            max in 0_u64..(20 << 20),
        ) {
            let mut window = Window::default();
            for (place, length) in reads {
                let (offset, length) = (place << 19, length << 13);
                if let Pattern::InOrder(range) = window.observe(offset, length, file_bytes, max)
                    && !range.is_empty()
                {
                    prop_assert!(range.start % RUN_BYTES == 0);
                    prop_assert!(range.end <= file_bytes);
                    prop_assert!(range.end % RUN_BYTES == 0 || range.end == file_bytes);
                    prop_assert!(range.end <= window.expected + max + RUN_BYTES);
                }
            }
        }
    }
}
