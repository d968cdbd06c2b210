//! Hydration: a target that starts as an empty outline of a backup, and a map of the blocks that are there.
//!
//! ```text
//! begin       directories, and the map: a new one, or the one that a crash left
//! outline     directories, links, files at their final size: space is allocated, zeros are there
//! fill        missing blocks, many in flight: bytes, then their sync, then the map's bits
//! place_last  backup_label, then pg_control: from now on a server can start here
//! close       a server is about to start: no block is written again
//! end         the restore is over: the session's directory goes
//! ```
//!
//! A delta goes into a directory that holds the cluster already ([`existing`], [`compare`]):
//!
//! ```text
//! begin_over        the map; nothing of the cluster is touched
//! make_unstartable  pg_control goes
//! clear             what the backup has not goes
//! outline           files that are there keep their blocks
//! compare           blocks are compared with the backup's, and the pages written that differ
//! fill              files that were made anew, blocks that could not be read, and so on
//! ```
//!
//! Each step may be repeated, after a failure or a crash at any moment, and the next run begins at `begin`.
//! [`remove_all`] takes everything back; of a delta [`withdraw`] does, as long as the cluster is as it was.
//!
//! Always true: while a server could start here, all of the backup is here, durable; and a bit that is set in the
//! map on disk stands for bytes that are durable in their place.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

mod claim;
mod compare;
mod comparer;
mod crew;
pub mod existing;
mod fill;
mod finish;
mod first;
pub mod layout;
pub mod map;
mod opener;
mod outline;
pub mod plan;
mod remove;
mod sharing;
mod source;
mod source_reads;
mod target;
#[cfg(test)]
mod tests;
mod worker;

pub use compare::Compared;
pub use existing::{Existing, leave_unstartable, unfinished_in, withdraw};
pub use fill::{Fill, Filled};
pub use layout::{Layout, Roots, SESSION_DIRECTORY};
pub use map::Map;
pub use outline::Outlined;
pub use remove::{end, remove_all};
pub use sharing::can_share_with;
pub use source::Source;

use crate::checksum::Hash;
use crate::io::{Disk, Open, Owner};
use crate::repository::Backup;
use crate::units::{BlockNumber, SessionId};
use crate::{Error, Result};
use layout::Home;

/// The files without which no server starts, in the order in which they are put in place.
pub const PLACED_LAST: [&str; 2] = ["backup_label", "global/pg_control"];
/// Not for the target: its links are made by the outline, with the directories that were asked for.
pub const LEFT_OUT: [&str; 1] = ["tablespace_map"];

/// The map, in the session's directory.
const MAP: &str = "map";
/// The directories that the session made, as JSON, in the session's directory.
const MADE: &str = "made.json";
/// A few paths.
const MADE_BYTES_MAX: u64 = 1 << 20;

/// A target on its way from a backup.
pub struct Hydration {
    backup: Backup,
    roots: Roots,
    map: Map,
    owner: Option<Owner>,
    disk: Arc<dyn Disk>,
    /// The target is not as fresh as we made it: names may be there already.
    resumed: bool,
    /// A delta: the target held a cluster.
    over: Option<Existing>,
    /// Files that a delta has made anew in this run, by their first blocks: nothing of them is there.
    fresh: Mutex<BTreeSet<BlockNumber>>,
    /// A delta's blocks are compared: those of zeros are zeros.
    compared: AtomicBool,
    /// Files and directories that still have more rights than they are to have in the end: path and final mode.
    restricted: Mutex<BTreeMap<String, u32>>,
}

impl Hydration {
    /// Begins a restore of `backup` into the directories of `layout`, or goes on with the one that `session` began there.
    /// Directories that are missing are made; ones that hold anything else are refused. `owner` is for root.
    pub fn begin(
        backup: Backup,
        layout: &Layout,
        session: &SessionId,
        owner: Option<Owner>,
        disk: Arc<dyn Disk>,
    ) -> Result<Self> {
        Self::begin_in(backup, layout, None, session, owner, disk)
    }

    fn begin_in(
        backup: Backup,
        layout: &Layout,
        over: Option<Existing>,
        session: &SessionId,
        owner: Option<Owner>,
        disk: Arc<dyn Disk>,
    ) -> Result<Self> {
        let identity = identity(&backup, session)?;
        if let Some(over) = &over {
            refuse_lost_homes(layout, over)?;
        }
        let (roots, made) = Roots::make(layout, &*disk, owner)?;
        let data = roots.data()?;
        let (map, part) = (session_path(MAP), session_path("map.part"));
        let resumed = disk.look(data.at(&map))?.is_some();
        let map = if resumed {
            existing::refuse_unless_marked_as(&*disk, data, over.is_some())?;
            Map::open(Arc::clone(&disk), data.at(&map), &identity)?
        } else {
            let may_hold_files = |home: &Home| over.as_ref().is_some_and(|over| over.homes.contains(home));
            for (home, _) in layout.homes().into_iter().filter(|(home, _)| !may_hold_files(home)) {
                remove::refuse_unless_empty(&*disk, roots.root(home)?)?;
            }
            claim::claim(&*disk, &roots, session)?;
            disk.make_directory(data.at(SESSION_DIRECTORY), 0o700)?;
            note_made(&*disk, &roots, &made)?;
            if over.is_some() {
                existing::mark(&*disk, data, &backup, session)?;
            }
            let map = Map::create(Arc::clone(&disk), data.at(&map), data.at(&part), identity)?;
            // Nothing may outlive a crash here but together with the map, which says whose it is.
            disk.sync(&*disk.open(data.at(""), Open::Directory)?)?;
            roots.sync_parents(&*disk)?;
            map
        };
        let (restricted, fresh, compared) = (Mutex::default(), Mutex::default(), AtomicBool::new(false));
        Ok(Self { backup, roots, map, owner, disk, resumed, over, fresh, compared, restricted })
    }

    /// Names may be there that this run has not made.
    fn finds_names(&self) -> bool {
        self.resumed || self.over.is_some()
    }

    /// The backup.
    pub fn backup(&self) -> &Backup {
        &self.backup
    }

    /// The map of what is present.
    pub fn map(&self) -> &Map {
        &self.map
    }

    /// The target's directories.
    pub fn layout(&self) -> &Layout {
        self.roots.layout()
    }

    /// True if this goes on with what an earlier run began.
    pub fn is_resumed(&self) -> bool {
        self.resumed
    }
}

/// The session whose map lies in the data directory `data`, and whether the map is closed; none if there is no map.
pub fn session_in(data: &Path, disk: &dyn Disk) -> Result<Option<(SessionId, bool)>> {
    if !data.join(SESSION_DIRECTORY).exists() {
        return Ok(None);
    }
    let root = crate::io::Root::open(data)?;
    let path = session_path(MAP);
    if disk.look(root.at(&path))?.is_none() {
        return Ok(None);
    }
    let file = disk.open(root.at(&path), Open::ReadBuffered)?;
    let parsed = Map::parse(&disk.read_small(&file, map::MAP_BYTES_MAX)?)
        .map_err(|detail| Error::corrupt(&file.path, detail))?;
    Ok(Some((parsed.identity.session, parsed.closed)))
}

/// A directory of the cluster that is not there any more, as its disk is not mounted, is not made in its place.
fn refuse_lost_homes(layout: &Layout, over: &Existing) -> Result<()> {
    let lost = layout.homes().into_iter().find(|(home, path)| over.homes.contains(home) && !path.is_dir());
    lost.map_or(Ok(()), |(_, path)| {
        Err(Error::NotFound(format!("{} is not there: is its disk mounted?", path.display())))
    })
}

fn identity(backup: &Backup, session: &SessionId) -> Result<map::Identity> {
    let text = &backup.info.manifest.root_hash;
    let root = Hash::from_hex(text).ok_or_else(|| {
        let detail = format!("the root hash of its manifest is no hash: \"{}\"", text.escape_debug());
        Error::corrupt(format!("backup {}", backup.info.label), detail)
    })?;
    Ok(map::Identity { blocks: backup.manifest.block_limit(), backup_root: root, session: session.clone() })
}

/// Writes down which directories are ours to remove. A crash before this leaves them behind, empty.
fn note_made(disk: &dyn Disk, roots: &Roots, made: &[PathBuf]) -> Result<()> {
    let path = session_path(MADE);
    let place = roots.data()?.at(&path);
    if disk.look(place)?.is_some() {
        return Ok(());
    }
    let text = serde_json::to_vec(made).map_err(|cause| Error::Refused(format!("a path is not UTF-8: {cause}")))?;
    // As a whole or not at all: half a list would stop the removal.
    let part = session_path("made.part");
    let part = roots.data()?.at(&part);
    remove::remove_if_there(disk, part)?;
    let file = disk.open(part, Open::Create(0o600))?;
    disk.write_small(&file, 0, &text)?;
    disk.sync(&file)?;
    disk.rename(part, place)?;
    disk.sync(&*disk.open(roots.data()?.at(SESSION_DIRECTORY), Open::Directory)?)
}

fn session_path(name: impl AsRef<OsStr>) -> PathBuf {
    Path::new(SESSION_DIRECTORY).join(name.as_ref())
}

fn is_left_out(path: &str) -> bool {
    LEFT_OUT.contains(&path)
}

fn is_placed_last(path: &str) -> bool {
    PLACED_LAST.contains(&path)
}
