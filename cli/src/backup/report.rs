//! What a backup tells at its end.

use std::fmt::Write as _;
use std::time::Duration;

use engine::format::backup::{BackupInfo, BadPage};
use serde::Serialize;

use super::wal::Origin;
use crate::human;
use crate::output::PhaseResult;

/// Bad pages that the text lists; the JSON object and `show` have all.
const PAGES_LISTED: usize = 20;

/// The result as an object: the backup's description, and how it went.
#[derive(Debug, Serialize)]
pub(super) struct Report<'a> {
    #[serde(flatten)]
    pub(super) backup: &'a BackupInfo,
    /// Where the WAL came from.
    pub(super) wal_origin: Origin,
    /// The reading of the data directory.
    pub(super) copy: &'a PhaseResult,
}

impl Report<'_> {
    /// A few lines for people.
    pub(super) fn text(&self) -> String {
        let Self { backup, wal_origin, copy } = self;
        let totals = &backup.totals;
        let mut text = format!("backup {} of cluster {} is complete\n", backup.label, backup.cluster);
        let _ = writeln!(
            text,
            "  {} in {} files, read at {:.0} MB/s; {} added to the repository",
            human::bytes(totals.bytes),
            totals.files,
            copy.megabytes_per_second,
            human::bytes(totals.added_pack_bytes + totals.added_manifest_bytes)
        );
        if let Some(parent) = &backup.parent {
            let _ = writeln!(text, "  {} are the same as in {parent}", human::bytes(totals.shared_bytes));
        }
        let origin = match wal_origin {
            Origin::Archive => "from the archive",
            Origin::Server => "read from the server",
        };
        let wal = &backup.wal;
        let _ = writeln!(text, "  WAL {} to {} on timeline {}, {origin}", wal.start, wal.stop, wal.timeline);
        let _ = writeln!(text, "  took {}", human::duration(Duration::from_millis(totals.milliseconds)));
        text.push_str(&damage(&backup.bad_pages));
        text
    }
}

fn damage(pages: &[BadPage]) -> String {
    if pages.is_empty() {
        return String::new();
    }
    let mut text = format!("damaged at the source: {} pages have a wrong checksum\n", pages.len());
    for BadPage { path, page, stored, computed } in pages.iter().take(PAGES_LISTED) {
        let _ = writeln!(text, "  {path} page {page}: stored {stored:04x}, computed {computed:04x}");
    }
    if pages.len() > PAGES_LISTED {
        let _ = writeln!(text, "  … and {} more: see `pghydrant show`", pages.len() - PAGES_LISTED);
    }
    text
}
