//! A target that holds the cluster already: what a delta makes of it before blocks are compared.
//!
//! First the session's directory with its mark and its map, which change nothing of the cluster. Then `pg_control` goes,
//! durably, so that nothing can start from then on; then whatever the backup has not. The mark says that this directory
//! was there before the session: [`super::remove_all`] refuses it. A delta that is given up after its first change
//! leaves the mark in the data directory, by which the next delta knows whose directory it is without a `pg_control`.
//!
//! No link is followed: one that is not in the backup is removed itself. Of a tablespace's directory only what PostgreSQL
//! of this version has there may go, of a WAL directory outside only what is WAL: whatever else lies beside it is
//! somebody else's.
//!
//! Always true: as long as `pg_control` is there, the cluster is as it was.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::claim;
use super::layout::{Home, Layout, Roots, SESSION_DIRECTORY, WAL_DIRECTORY};
use super::remove::{is_there, refuse_if_running, remove_if_there, remove_tree};
use super::{Hydration, is_left_out, is_placed_last, session_path};
use crate::format::file::{FileKind, FileRecord};
use crate::io::{Disk, Found, Open, Owner, Place, Root};
use crate::progress::Progress;
use crate::repository::Backup;
use crate::units::{SessionId, SystemIdentifier};
use crate::{Error, Result};

/// Directories whose names begin so, in the data directory, are kept: WAL that was never archived.
pub const SAVED_WAL: &str = "pghydrant.wal-";
/// What a delta that was given up leaves in the data directory in place of `pg_control`.
pub const UNFINISHED: &str = "pghydrant.unfinished";
/// The same while the session lasts, in its directory.
const MARK: &str = "delta.json";
/// The mark's few lines.
const MARK_BYTES_MAX: u64 = 64 << 10;

/// Of the file system, not of PostgreSQL, and of no interest to anybody.
const LOST_AND_FOUND: &str = "lost+found";
const GLOBAL: &str = "global";
const CONTROL: &str = "global/pg_control";

/// What a delta may find in its target.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Existing {
    /// Directories that may hold files already.
    pub homes: BTreeSet<Home>,
    /// PostgreSQL's directories in tablespaces that the cluster has and the backup has not: they go.
    pub abandoned: Vec<PathBuf>,
}

/// Whose directory it is, while it has no `pg_control`.
#[derive(Debug, Serialize, Deserialize)]
struct Mark {
    session: SessionId,
    system_identifier: SystemIdentifier,
    meaning: String,
}

impl Hydration {
    /// Begins a delta, or goes on with the one that `session` began: as [`Hydration::begin`], into directories of which
    /// those in `existing` may hold files. The caller has made sure that they are this cluster's, and that no server
    /// runs there.
    pub fn begin_over(
        backup: Backup,
        layout: &Layout,
        existing: Existing,
        session: &SessionId,
        owner: Option<Owner>,
        disk: std::sync::Arc<dyn Disk>,
    ) -> Result<Self> {
        Self::begin_in(backup, layout, Some(existing), session, owner, disk)
    }

    /// Takes `pg_control` away, durably: from now on no server can start here. Nothing else was changed before.
    pub fn make_unstartable(&self) -> Result<()> {
        self.map.refuse_if_closed()?;
        let data = self.roots.data()?;
        refuse_if_running(&*self.disk, data)?;
        remove_control(&*self.disk, data)
    }

    /// Removes whatever the backup has not, and counts the names. To be done again after a crash: the names of files
    /// that are removed are durable only with the first sync of [`Hydration::fill`].
    pub fn clear(&self, progress: &dyn Progress) -> Result<u64> {
        self.map.refuse_if_closed()?;
        let Some(existing) = &self.over else { return Ok(0) };
        if has_control(&*self.disk, self.roots.data()?)? {
            return Err(Error::Refused("the cluster can still be started: nothing of it is removed".to_owned()));
        }
        let mut removed = 0;
        for directory in &existing.abandoned {
            removed += remove_abandoned(&*self.disk, directory)?;
        }
        for (home, _) in self.layout().homes().into_iter().filter(|(home, _)| existing.homes.contains(home)) {
            walk(&self.backup, &self.roots, &*self.disk, home, &mut |place, found, stays| {
                if progress.cancelled() {
                    return Err(Error::Cancelled);
                }
                if !stays {
                    removed += remove_tree(&*self.disk, place)?;
                } else if found == Found::Directory {
                    self.roots.note_file_system(place, &*self.disk)?;
                }
                Ok(())
            })?;
        }
        Ok(removed)
    }

    /// A fill takes blocks of zeros for granted, which in a delta only the comparison has made sure of.
    pub(super) fn refuse_unless_compared(&self) -> Result<()> {
        if self.over.is_none() || self.compared.load(std::sync::atomic::Ordering::Acquire) {
            return Ok(());
        }
        Err(Error::Refused("the blocks of a delta are compared before others are written".to_owned()))
    }

    /// The file is made anew in a delta: none of its blocks need be compared.
    pub(super) fn note_fresh(&self, file: &FileRecord) {
        if self.over.is_some() && file.bytes > 0 {
            let mut fresh = self.fresh.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            fresh.insert(file.first_block);
        }
    }
}

/// What a delta would find, of one directory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Bytes on disk of files that stay, or make room; of WAL nothing, which may be kept aside.
    pub bytes: u64,
    /// Names that stay, or make room.
    pub names: u64,
    /// Names that the backup has not.
    pub removed: u64,
    /// A directory of another user's, whose rights we cannot set and in which we may not remove anything.
    pub foreign: Option<PathBuf>,
}

/// Looks at what a delta would find in the directories of `layout`, and touches nothing.
pub fn look(backup: &Backup, layout: &Layout, disk: &dyn Disk) -> Result<BTreeMap<Home, Held>> {
    let roots = Roots::open(layout, disk)?;
    let we = rustix::process::geteuid();
    let mut all = BTreeMap::new();
    for (home, _) in layout.homes() {
        let mut held = Held::default();
        walk(backup, &roots, disk, home, &mut |place, found, stays| {
            let mut left = vec![(place.path.to_owned(), found)];
            while let Some((path, found)) = left.pop() {
                let place = Place { root: place.root, path: &path };
                held.names += 1;
                held.removed += u64::from(!stays);
                if home != Home::Wal && !path.starts_with(WAL_DIRECTORY) {
                    held.bytes += bytes_of(place, found);
                }
                if found == Found::Directory && !we.is_root() && held.foreign.is_none() {
                    let owner = place.full().symlink_metadata().map_or(we.as_raw(), |metadata| metadata.uid());
                    held.foreign = (owner != we.as_raw()).then(|| place.full());
                }
                // Of what stays, the walk itself goes on below.
                if found == Found::Directory && !stays {
                    for name in disk.list(place)? {
                        let below = path.join(name);
                        let found = disk.look(Place { root: place.root, path: &below })?;
                        left.extend(found.map(|found| (below, found)));
                    }
                }
            }
            Ok(())
        })?;
        all.insert(home, held);
    }
    Ok(all)
}

/// Bytes on disk that are a file's alone.
fn bytes_of(place: Place<'_>, found: Found) -> u64 {
    let metadata = place.full().symlink_metadata().ok().filter(|metadata| metadata.nlink() == 1);
    let metadata = metadata.filter(|_| matches!(found, Found::File(_)));
    metadata.map_or(0, |metadata| metadata.blocks() * 512)
}

/// Walks one directory of a target by the paths that the manifest has for it, and tells `visit` of each name whether
/// it stays. Below what goes it does not look, nor at what is none of a delta's business.
fn walk(
    backup: &Backup,
    roots: &Roots,
    disk: &dyn Disk,
    home: Home,
    visit: &mut dyn FnMut(Place<'_>, Found, bool) -> Result<()>,
) -> Result<()> {
    let mut directories = vec![root_path(home)];
    while let Some(directory) = directories.pop() {
        let place = roots.place(&directory)?;
        for name in disk.list(place)? {
            if is_left_alone(roots.layout(), home, &directory, &name) {
                continue;
            }
            // No path of a backup is anything but UTF-8.
            let path = name.to_str().map(|name| join(&directory, name));
            let record = path.as_deref().map_or(Ok(None), |path| backup.manifest.file(path))?;
            if directory == root_path(home) && !is_ours_there(home, &name, record.as_ref()) {
                continue;
            }
            let below = place.path.join(&name);
            let place = Place { root: place.root, path: &below };
            let Some(found) = disk.look(place)? else { continue };
            let path = path.filter(|path| stays(found, path, record.as_ref()));
            visit(place, found, path.is_some())?;
            directories.extend(path.filter(|_| found == Found::Directory));
        }
    }
    Ok(())
}

/// Whether a name is none of a delta's business.
fn is_left_alone(layout: &Layout, home: Home, directory: &str, name: &OsStr) -> bool {
    if directory != root_path(home) {
        // A file system may be mounted at `pg_wal` itself.
        return directory == WAL_DIRECTORY && name == LOST_AND_FOUND;
    }
    let saved_wal = || home == Home::Data && name.to_string_lossy().starts_with(SAVED_WAL);
    let linked_wal = || home == Home::Data && layout.wal.is_some() && name == WAL_DIRECTORY;
    name == SESSION_DIRECTORY || name == LOST_AND_FOUND || saved_wal() || linked_wal()
}

/// Where the walk of a directory begins, as the manifest has it.
fn root_path(home: Home) -> String {
    match home {
        Home::Data => String::new(),
        Home::Tablespace(oid) => format!("pg_tblspc/{oid}"),
        Home::Wal => WAL_DIRECTORY.to_owned(),
    }
}

fn join(directory: &str, name: &str) -> String {
    if directory.is_empty() { name.to_owned() } else { format!("{directory}/{name}") }
}

/// Whether what was found may become what the backup has.
fn stays(found: Found, path: &str, record: Option<&FileRecord>) -> bool {
    // In the backup it may be a link; in a target it is a directory.
    if path == WAL_DIRECTORY {
        return found == Found::Directory;
    }
    let Some(record) = record else { return false };
    match (found, &record.kind) {
        (Found::Directory, FileKind::Directory) => true,
        (Found::File(_), FileKind::Regular) => !is_left_out(path) && !is_placed_last(path),
        (Found::Other, FileKind::Symlink { .. } | FileKind::Tablespace { .. }) => true,
        _ => false,
    }
}

/// Whether a name in the root of a directory outside the data directory is the cluster's.
fn is_ours_there(home: Home, name: &OsStr, record: Option<&FileRecord>) -> bool {
    match home {
        Home::Data => true,
        Home::Tablespace(_) => record.is_some(),
        Home::Wal => is_of_the_wal(&name.to_string_lossy()),
    }
}

/// What PostgreSQL has in `pg_wal`, and we.
fn is_of_the_wal(name: &str) -> bool {
    const KNOWN: [&str; 7] =
        ["archive_status", "summaries", "RECOVERY", "xlogtemp.", "pghydrant.", ".pghydrant.", "backup_"];
    let numbered = name.len() >= 8 && name.bytes().take(8).all(|byte| byte.is_ascii_hexdigit());
    numbered || KNOWN.iter().any(|known| name.starts_with(known))
}

/// Removes PostgreSQL's directory in a tablespace, durably; one that is gone is gone.
fn remove_abandoned(disk: &dyn Disk, directory: &Path) -> Result<u64> {
    let (Some(tablespace), Some(name)) = (directory.parent(), directory.file_name()) else { return Ok(0) };
    if !is_there(directory)? {
        return Ok(0);
    }
    let root = Root::open(tablespace)?;
    let removed = remove_tree(disk, root.at(name))?;
    disk.sync(&*disk.open(root.at(""), Open::Directory)?)?;
    Ok(removed)
}

fn has_control(disk: &dyn Disk, data: &Root) -> Result<bool> {
    Ok(match disk.look(data.at(GLOBAL))? {
        Some(Found::Directory) => disk.look(data.at(CONTROL))?.is_some(),
        Some(Found::Other) => true,
        Some(Found::File(_)) | None => false,
    })
}

fn remove_control(disk: &dyn Disk, data: &Root) -> Result<()> {
    match disk.look(data.at(GLOBAL))? {
        Some(Found::Directory) => {
            // Whatever it is.
            remove_tree(disk, data.at(CONTROL))?;
            disk.sync(&*disk.open(data.at(GLOBAL), Open::Directory)?)
        }
        // A link, through which a server would find the file.
        Some(Found::Other) => {
            disk.remove_file(data.at(GLOBAL))?;
            disk.sync(&*disk.open(data.at(""), Open::Directory)?)
        }
        Some(Found::File(_)) | None => Ok(()),
    }
}

/// Writes down that the directory was there before the session, and whose it is.
pub(super) fn mark(disk: &dyn Disk, data: &Root, backup: &Backup, session: &SessionId) -> Result<()> {
    let mark = Mark {
        session: session.clone(),
        system_identifier: backup.info.server.system_identifier,
        meaning: "a delta restore has begun to overwrite this cluster; another one can finish it".to_owned(),
    };
    let text = serde_json::to_vec_pretty(&mark).map_err(|cause| Error::Refused(cause.to_string()))?;
    let (part, path) = (session_path("delta.part"), session_path(MARK));
    remove_if_there(disk, data.at(&part))?;
    let file = disk.open(data.at(&part), Open::Create(0o600))?;
    disk.write_small(&file, 0, &text)?;
    disk.sync(&file)?;
    disk.rename(data.at(&part), data.at(&path))?;
    disk.sync(&*disk.open(data.at(SESSION_DIRECTORY), Open::Directory)?)
}

/// A session goes on as what it began as.
pub(super) fn refuse_unless_marked_as(disk: &dyn Disk, data: &Root, delta: bool) -> Result<()> {
    if disk.look(data.at(&session_path(MARK)))?.is_some() == delta {
        return Ok(());
    }
    let was = if delta { "not begun as a delta" } else { "begun as a delta" };
    Err(Error::Refused(format!("the restore in {} was {was}", data.path().display())))
}

/// A directory that was there before is never removed.
pub(super) fn refuse_to_remove(disk: &dyn Disk, data: &Root) -> Result<()> {
    let marks = [session_path(MARK), PathBuf::from(UNFINISHED)];
    for mark in &marks {
        if disk.look(data.at(mark))?.is_some() {
            let detail = "was there before the delta restore: it is not removed";
            return Err(Error::Refused(format!("{} {detail}", data.path().display())));
        }
    }
    Ok(())
}

/// The cluster that a delta was given up in, by the mark that is there in place of `pg_control`.
pub fn unfinished_in(data: &Path, disk: &dyn Disk) -> Result<Option<SystemIdentifier>> {
    Ok(read_mark(&Root::open(data)?, Path::new(UNFINISHED), disk)?.map(|mark| mark.system_identifier))
}

/// The session of the delta that has begun in a directory, with or without a map.
pub fn delta_in(data: &Path, disk: &dyn Disk) -> Result<Option<SessionId>> {
    if !is_there(data)? {
        return Ok(None);
    }
    Ok(read_mark(&Root::open(data)?, &session_path(MARK), disk)?.map(|mark| mark.session))
}

fn read_mark(data: &Root, path: &Path, disk: &dyn Disk) -> Result<Option<Mark>> {
    let place = data.at(path);
    if !matches!(disk.look(place), Ok(Some(Found::File(_)))) {
        return Ok(None);
    }
    let file = disk.open(place, Open::ReadBuffered)?;
    let bytes = disk.read_small(&file, MARK_BYTES_MAX)?;
    serde_json::from_slice(&bytes).map(Some).map_err(|cause| Error::corrupt(&file.path, cause.to_string()))
}

/// Takes a delta back that has changed nothing yet: only what is the session's goes.
pub fn withdraw(layout: &Layout, session: &SessionId, disk: &dyn Disk) -> Result<()> {
    // A directory that was to be made may not have been.
    let is_directory = |path: &Path| path.is_dir();
    let layout = Layout {
        data: layout.data.clone(),
        tablespaces: layout.tablespaces.iter().filter(|(_, path)| is_directory(path)).map(clone_pair).collect(),
        wal: layout.wal.clone().filter(|path| is_directory(path)),
    };
    let roots = Roots::open(&layout, disk)?;
    claim::release(disk, &roots, session)?;
    let data = roots.data()?;
    remove_tree(disk, data.at(SESSION_DIRECTORY))?;
    disk.sync(&*disk.open(data.at(""), Open::Directory)?)
}

fn clone_pair((oid, path): (&u32, &PathBuf)) -> (u32, PathBuf) {
    (*oid, path.clone())
}

/// Gives a delta up that has changed the cluster: `pg_control` goes, should it be there, and the mark takes its place.
/// Can be done again.
pub fn leave_unstartable(layout: &Layout, session: &SessionId, disk: &dyn Disk) -> Result<()> {
    let data = Root::open(&layout.data)?;
    refuse_if_running(disk, &data)?;
    remove_control(disk, &data)?;
    let mark = session_path(MARK);
    if disk.look(data.at(&mark))?.is_some() {
        disk.rename(data.at(&mark), data.at(UNFINISHED))?;
        disk.sync(&*disk.open(data.at(""), Open::Directory)?)?;
    }
    withdraw(layout, session, disk)
}
