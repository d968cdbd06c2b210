//! Whose a directory is that holds no map: a tablespace's, or the WAL's.
//!
//! The data directory has the session's map. Every other directory of the target gets a symbolic link that leads nowhere
//! and has the session's id for its text, before anything else is put there: making one is exclusive, and it is there as a whole or not
//! at all. Two restores that were given the same directory would otherwise both find it empty, and taking one of them
//! back would remove the files of the other.

use std::path::Path;

use rustix::io::Errno;

use super::layout::{Home, Roots, SESSION_DIRECTORY};
use crate::io::{Disk, Open, Root};
use crate::units::SessionId;
use crate::{Error, Result};

/// Claims every directory but the data directory; refuses one that another session has claimed.
pub(super) fn claim(disk: &dyn Disk, roots: &Roots, session: &SessionId) -> Result<()> {
    for root in others(roots)? {
        let made = match holder(root)? {
            Some(_) => Ok(()),
            None => disk.make_link(root.at(SESSION_DIRECTORY), Path::new(session.as_str())),
        };
        match holder(root)? {
            Some(holder) if holder == session.as_str() => made?,
            Some(holder) => {
                let directory = root.path().display();
                return Err(Error::Refused(format!("{directory} is being restored into by session {holder}")));
            }
            None => made?,
        }
        disk.sync(&*disk.open(root.at(""), Open::Directory)?)?;
    }
    Ok(())
}

/// Gives the directories back that `session` has claimed.
pub(super) fn release(disk: &dyn Disk, roots: &Roots, session: &SessionId) -> Result<()> {
    for root in others(roots)? {
        if is_claimed(root, session)? {
            disk.remove_file(root.at(SESSION_DIRECTORY))?;
            disk.sync(&*disk.open(root.at(""), Open::Directory)?)?;
        }
    }
    Ok(())
}

/// Whether `session` has claimed the directory.
pub(super) fn is_claimed(root: &Root, session: &SessionId) -> Result<bool> {
    Ok(holder(root)?.is_some_and(|holder| holder == session.as_str()))
}

fn holder(root: &Root) -> Result<Option<String>> {
    match rustix::fs::readlinkat(root, SESSION_DIRECTORY, Vec::new()) {
        Ok(text) => Ok(Some(text.to_string_lossy().into_owned())),
        Err(Errno::NOENT) => Ok(None),
        Err(cause) => Err(Error::io("read the link", root.path().join(SESSION_DIRECTORY), cause)),
    }
}

fn others(roots: &Roots) -> Result<Vec<&Root>> {
    let homes = roots.layout().homes();
    homes.iter().filter(|(home, _)| *home != Home::Data).map(|(home, _)| roots.root(*home)).collect()
}
