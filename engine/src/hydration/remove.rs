//! Taking a restore back: a target that was empty is empty again, and the directories that the restore made are gone.
//!
//! Follows no link, ever: a link is removed itself. The session's directory, which says that all this is ours, goes
//! last, so that a removal that was interrupted can be done again.

use std::io;
use std::path::{Path, PathBuf};

use super::claim;
use super::existing;
use super::layout::{Home, Roots, SESSION_DIRECTORY};
use super::map::{MAP_BYTES_MAX, Map};
use super::{Layout, MADE, MADE_BYTES_MAX, MAP, session_path};
use crate::io::{Disk, Found, Open, Place, Root};
use crate::units::SessionId;
use crate::{Error, Result, process};

const POSTMASTER_PID: &str = "postmaster.pid";
/// A few short lines.
const POSTMASTER_PID_BYTES_MAX: u64 = 64 << 10;

/// Takes back a restore into empty directories. Refuses directories that are not this session's, or in which a
/// server runs.
pub fn remove_all(layout: &Layout, session: &SessionId, disk: &dyn Disk) -> Result<()> {
    if !is_there(&layout.data)? {
        return Ok(());
    }
    let data = Root::open(&layout.data)?;
    existing::refuse_to_remove(disk, &data)?;
    refuse_if_running(disk, &data)?;
    refuse_unless_ours(layout, disk, &data, session)?;
    let made = made_directories(layout, disk, &data)?;
    let (data_made, others_made): (Vec<_>, Vec<_>) = made.into_iter().partition(|path| layout.data.starts_with(path));

    for (home, path) in layout.homes() {
        if !is_there(path)? {
            continue;
        }
        let root = Root::open(path)?;
        if home == Home::Data {
            empty(disk, &root)?;
        } else if claim::is_claimed(&root, session)? {
            empty(disk, &root)?;
            disk.remove_file(root.at(SESSION_DIRECTORY))?;
        }
    }
    others_made.iter().rev().try_for_each(|path| remove_made(disk, path))?;
    remove_tree(disk, data.at(SESSION_DIRECTORY))?;
    data_made.iter().rev().try_for_each(|path| remove_made(disk, path))
}

/// The restore of `session` is over: what says so goes, and the files stay.
pub fn end(layout: &Layout, session: &SessionId, disk: &dyn Disk) -> Result<()> {
    let roots = Roots::open(layout, disk)?;
    claim::release(disk, &roots, session)?;
    let data = roots.data()?;
    remove_tree(disk, data.at(SESSION_DIRECTORY))?;
    disk.sync(&*disk.open(data.at(""), Open::Directory)?)
}

/// Removes everything in a root but the session's directory.
fn empty(disk: &dyn Disk, root: &Root) -> Result<()> {
    for name in disk.list(root.at(""))? {
        if name != SESSION_DIRECTORY {
            remove_tree(disk, root.at(&name))?;
        }
    }
    Ok(())
}

/// Removes what is at `place`, with everything below it, and counts the names; nothing there is no error. Depth costs
/// memory, not stack.
pub(super) fn remove_tree(disk: &dyn Disk, place: Place<'_>) -> Result<u64> {
    let mut left = vec![(place.path.to_owned(), false)];
    let mut removed = 0;
    while let Some((path, emptied)) = left.pop() {
        let here = Place { root: place.root, path: &path };
        match disk.look(here)? {
            None => continue,
            Some(Found::File(_) | Found::Other) => disk.remove_file(here)?,
            Some(Found::Directory) if emptied => disk.remove_directory(here)?,
            Some(Found::Directory) => {
                let names = disk.list(here)?;
                left.push((path.clone(), true));
                left.extend(names.into_iter().map(|name| (path.join(name), false)));
                continue;
            }
        }
        removed += 1;
    }
    Ok(removed)
}

/// Removes a file, if there is one.
pub(super) fn remove_if_there(disk: &dyn Disk, place: Place<'_>) -> Result<()> {
    match disk.look(place)? {
        None => Ok(()),
        Some(_) => disk.remove_file(place),
    }
}

/// Removes a directory that the restore made, unless somebody has put something into it meanwhile.
fn remove_made(disk: &dyn Disk, path: &Path) -> Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(()) };
    let parent = Root::open(if parent.as_os_str().is_empty() { Path::new(".") } else { parent })?;
    if disk.look(parent.at(name))? != Some(Found::Directory) || !disk.list(parent.at(name))?.is_empty() {
        return Ok(());
    }
    disk.remove_directory(parent.at(name))?;
    disk.sync(&*disk.open(parent.at(""), Open::Directory)?)
}

/// The directories that the session says it made; only such as hold, or are, a directory of the layout.
fn made_directories(layout: &Layout, disk: &dyn Disk, data: &Root) -> Result<Vec<PathBuf>> {
    let path = session_path(MADE);
    if disk.look(data.at(&path))?.is_none() {
        return Ok(Vec::new());
    }
    let file = disk.open(data.at(&path), Open::ReadBuffered)?;
    let bytes = disk.read_small(&file, MADE_BYTES_MAX)?;
    let made: Vec<PathBuf> =
        serde_json::from_slice(&bytes).map_err(|cause| Error::corrupt(&file.path, cause.to_string()))?;
    let belongs = |path: &PathBuf| layout.homes().iter().any(|(_, home)| home.starts_with(path));
    Ok(made.into_iter().filter(belongs).collect())
}

/// The session's map says whose the directory is. Without one, nothing has been put here yet.
fn refuse_unless_ours(layout: &Layout, disk: &dyn Disk, data: &Root, session: &SessionId) -> Result<()> {
    let path = session_path(MAP);
    if disk.look(data.at(&path))?.is_some() {
        let file = disk.open(data.at(&path), Open::ReadBuffered)?;
        let map = Map::parse(&disk.read_small(&file, MAP_BYTES_MAX)?);
        let found = map.map_err(|detail| Error::corrupt(&file.path, detail))?.identity.session;
        if found == *session {
            return Ok(());
        }
        let directory = layout.data.display();
        return Err(Error::Refused(format!("{directory} belongs to session {found}, not to {session}")));
    }
    for (_, home) in layout.homes() {
        if is_there(home)? {
            refuse_unless_empty(disk, &Root::open(home)?)?;
        }
    }
    Ok(())
}

/// An error if a root holds anything but the session's directory.
pub(super) fn refuse_unless_empty(disk: &dyn Disk, root: &Root) -> Result<()> {
    match disk.list(root.at(""))?.iter().find(|name| *name != SESSION_DIRECTORY) {
        None => Ok(()),
        Some(name) => Err(Error::Refused(format!(
            "{} is not empty (it has \"{}\") and carries no map of this session",
            root.path().display(),
            name.to_string_lossy()
        ))),
    }
}

pub(super) fn refuse_if_running(disk: &dyn Disk, data: &Root) -> Result<()> {
    if disk.look(data.at(POSTMASTER_PID))?.is_none() {
        return Ok(());
    }
    let file = disk.open(data.at(POSTMASTER_PID), Open::ReadBuffered)?;
    let text = String::from_utf8_lossy(&disk.read_small(&file, POSTMASTER_PID_BYTES_MAX)?).into_owned();
    // Negative for a standalone backend.
    let number = text.lines().next().and_then(|line| line.trim().parse::<i64>().ok()).map(i64::unsigned_abs);
    let started_unix = text.lines().nth(2).and_then(|line| line.trim().parse().ok());
    match number.and_then(|number| u32::try_from(number).ok()) {
        Some(number) if process::works_in(number, started_unix, data.path()) => {
            Err(Error::Refused(format!("a server runs in {} (process {number}): stop it first", data.path().display())))
        }
        _ => Ok(()),
    }
}

pub(super) fn is_there(path: &Path) -> Result<bool> {
    match path.symlink_metadata() {
        Ok(_) => Ok(true),
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(cause) => Err(Error::io("examine", path, cause)),
    }
}
