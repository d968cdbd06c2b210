//! The text of `backup_label`, as far as it is needed.

use engine::units::{Lsn, Timeline};

/// Where recovery starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Label {
    /// `START WAL LOCATION`.
    pub(super) start: Lsn,
    /// `START TIMELINE`.
    pub(super) timeline: Timeline,
}

impl Label {
    /// The two lines that matter here, or nothing.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        Some(Self {
            start: field("START WAL LOCATION: ")?.split(' ').next()?.parse().ok()?,
            timeline: Timeline(field("START TIMELINE: ")?.parse().ok()?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_is_read() {
        let text = "START WAL LOCATION: 0/2000028 (file 000000010000000000000002)\nCHECKPOINT LOCATION: 0/2000060\n\
            BACKUP METHOD: streamed\nBACKUP FROM: primary\nSTART TIME: 2026-11-22 08:15:00 UTC\nLABEL: pghydrant\n\
            START TIMELINE: 3\n";
        assert_eq!(Label::parse(text), Some(Label { start: Lsn(0x200_0028), timeline: Timeline(3) }));
        assert_eq!(Label::parse("LABEL: x\n"), None);
    }
}
