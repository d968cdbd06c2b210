//! Tablespaces that the WAL creates on the way to the target.
//!
//! The replay of `CREATE TABLESPACE` uses the path of the original, literally, and does not ask whether somebody else
//! has files there: beside its original a copy would replay into the original's live files. A tablespace that was
//! created while the backup was taken is created again by the replay, and leaves the directory that it was remapped to.
//! So the records are looked for before anything is touched.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use engine::units::Lsn;
use engine::wal::WalArchive;
use engine::wal::history::History;

use super::wal::scan;
use crate::postgres::binaries::Binaries;
use crate::postgres::waldump::{Event, Kind};

/// What PostgreSQL calls its directory in a tablespace begins so.
pub(super) const VERSION_DIRECTORY: &str = "PG_";

/// A tablespace that the replay would create.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Created {
    pub(crate) oid: u32,
    /// The literal path in the record.
    pub(crate) location: PathBuf,
    /// Where the record lies.
    pub(crate) lsn: Lsn,
    pub(crate) place: Location,
}

/// What there is at a location.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Location {
    /// Nothing: PostgreSQL stops at the record.
    Absent,
    /// A directory in which no cluster has files.
    Free,
    /// A directory with files of a cluster, or one that cannot be looked into.
    Taken,
}

/// The tablespaces created between `from` and `to` (none: the end of the archive) on a path.
pub(super) fn created(
    archive: &WalArchive,
    binaries: &Binaries,
    path: &History,
    from: Lsn,
    to: Option<Lsn>,
) -> anyhow::Result<Vec<Created>> {
    let mut found = Vec::new();
    scan(archive, binaries, path, from, to, Kind::Tablespaces, &mut |record| {
        if let Event::CreateTablespace { oid, location } = record.event {
            let location = PathBuf::from(location);
            found.push(Created { oid, place: look(&location), location, lsn: record.lsn });
        }
        ControlFlow::Continue(())
    })?;
    Ok(found)
}

fn look(location: &Path) -> Location {
    let entries = match std::fs::read_dir(location) {
        Ok(entries) => entries,
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => return Location::Absent,
        Err(_) => return Location::Taken,
    };
    for entry in entries {
        match entry {
            Ok(entry) if !entry.file_name().to_string_lossy().starts_with(VERSION_DIRECTORY) => {}
            _ => return Location::Taken,
        }
    }
    Location::Free
}
