//! Timeline histories: which timeline branched off which, and where.
//!
//! A history file has a line per ancestor, oldest first: its number, the LSN where the next one branched off, and a
//! reason, between white space. `#` begins a comment.

use crate::units::{Lsn, Timeline};

/// The ancestors of a timeline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct History {
    /// The timeline that this is the history of.
    pub timeline: Timeline,
    /// Oldest first: an ancestor and where it was left. Empty for timeline 1.
    pub ancestors: Vec<Ancestor>,
}

/// One ancestor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ancestor {
    /// Which timeline.
    pub timeline: Timeline,
    /// The first LSN that belongs to the next timeline and not to this one.
    pub left_at: Lsn,
}

impl History {
    /// The history of a timeline without ancestors.
    pub const fn root(timeline: Timeline) -> Self {
        Self { timeline, ancestors: Vec::new() }
    }

    /// Reads the history file of `timeline`, by PostgreSQL's rules.
    pub fn parse(timeline: Timeline, text: &str) -> Result<Self, String> {
        let mut ancestors: Vec<Ancestor> = Vec::new();
        for line in text.lines().map(str::trim_start).filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let mut words = line.split_whitespace();
            let number = words.next().and_then(|word| word.parse().ok());
            let left_at = words.next().and_then(|word| word.parse().ok());
            let (Some(number), Some(left_at)) = (number, left_at) else {
                return Err(format!("\"{}\" is not a timeline and an LSN", line.escape_debug()));
            };
            if ancestors.last().is_some_and(|last| last.timeline.0 >= number || last.left_at > left_at) {
                return Err(format!("timeline {number} is out of order"));
            }
            ancestors.push(Ancestor { timeline: Timeline(number), left_at });
        }
        match ancestors.last() {
            Some(last) if last.timeline >= timeline => {
                Err(format!("timeline {} cannot be an ancestor of timeline {timeline}", last.timeline))
            }
            _ => Ok(Self { timeline, ancestors }),
        }
    }

    /// The timeline whose WAL holds the byte at `lsn`, on the way to this one.
    pub fn timeline_at(&self, lsn: Lsn) -> Timeline {
        let ancestor = self.ancestors.iter().find(|ancestor| lsn < ancestor.left_at);
        ancestor.map_or(self.timeline, |ancestor| ancestor.timeline)
    }

    /// Whether WAL of `timeline` up to `lsn` lies on the way to this one.
    pub fn includes(&self, timeline: Timeline, lsn: Lsn) -> bool {
        timeline == self.timeline
            || self.ancestors.iter().any(|ancestor| ancestor.timeline == timeline && lsn <= ancestor.left_at)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const TEXT: &str =
        "1\t0/A000198\tbefore 2026-11-22 08:15:00+00\n# a comment\n\n  3\t0/B000000\tno recovery target\n";

    #[test]
    fn ancestors_are_read_in_order() {
        let history = History::parse(Timeline(4), TEXT).unwrap();
        let at = |lsn| history.timeline_at(Lsn(lsn)).0;
        assert_eq!((at(0), at(0xA00_0197), at(0xA00_0198), at(0xAFF_FFFF), at(0xB00_0000)), (1, 1, 3, 3, 4));
        assert!(history.includes(Timeline(1), Lsn(0xA00_0198)) && !history.includes(Timeline(1), Lsn(0xA00_0199)));
        assert!(history.includes(Timeline(4), Lsn(u64::MAX)) && !history.includes(Timeline(2), Lsn(0)));
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in ["x 0/1", "1", "1 0-1", "2 0/5\n1 0/6", "1 0/6\n2 0/5", "4 0/1", "-1 0/1"] {
            assert!(History::parse(Timeline(4), bad).is_err(), "{bad}");
        }
        assert_eq!(History::parse(Timeline(1), "").unwrap(), History::root(Timeline(1)));
    }
}
