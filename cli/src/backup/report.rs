//! What a backup tells at its end.

use std::fmt::Write as _;
use std::time::Duration;

use engine::format::backup::{BackupInfo, BadPage};
use serde::Serialize;

use super::wal::Origin;
use crate::exit::{Exit, Failure};
use crate::human;
use crate::output::PhaseResult;

/// Damaged pages that the message lists; the JSON object and `show` have all.
const PAGES_LISTED: usize = 10;

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
            human::bytes(totals.added_bytes())
        );
        if let Some(parent) = &backup.parent {
            let _ = writeln!(text, "  {} are the same as in {parent}", human::bytes(totals.shared_bytes));
        }
        let origin = match wal_origin {
            Origin::Archive => "from the archive",
            Origin::Server => "read from the server",
            Origin::Directory => "from the base backup's own pg_wal",
        };
        let wal = &backup.wal;
        let _ = writeln!(text, "  WAL {} to {} on timeline {}, {origin}", wal.start, wal.stop, wal.timeline);
        let unnamed: Vec<String> =
            backup.tablespaces.iter().filter(|one| crate::show::is_unnamed(one)).map(|one| one.name.clone()).collect();
        if !unnamed.is_empty() {
            let _ = writeln!(text, "  tablespaces go by their OIDs, their names are not known: {}", unnamed.join(", "));
        }
        let _ = writeln!(text, "  took {}", human::duration(Duration::from_millis(totals.milliseconds)));
        text
    }

    /// What to say of pages that were damaged before we read them.
    pub(super) fn damage(&self) -> Option<Failure> {
        let BackupInfo { label, bad_pages, .. } = self.backup;
        let pages: Vec<String> = bad_pages.iter().take(PAGES_LISTED).map(name).collect();
        if pages.is_empty() {
            return None;
        }
        let more = bad_pages.len().saturating_sub(pages.len());
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let message = format!(
            "backup {label} is complete, but the cluster itself has {} with a wrong checksum: {}{more}",
            human::count(bad_pages.len() as u64, "page"),
            pages.join(", ")
        );
        let hint = "find out which relation it is with pg_filenode_relation(), and restore it from an older backup; \
            `pghydrant show` lists all pages";
        Some(Failure::new(Exit::DamagedPages, message).hint(hint))
    }
}

fn name(page: &BadPage) -> String {
    let BadPage { path, page, stored, computed } = page;
    format!("{path} page {page} (stored {stored:04x}, computed {computed:04x})")
}
