//! The last steps of a copy: the files without which no server starts, placed when everything else is durable.
//!
//! `backup_label` comes before `pg_control`: a server that finds `pg_control` without it would take the copy for a
//! cluster that crashed, recover from the wrong place, and be corrupt in silence.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::PoisonError;

use super::remove::remove_if_there;
use super::{Filled, Hydration, PLACED_LAST, session_path};
use crate::blocks::Scratch;
use crate::format::file::FileRecord;
use crate::io::{Found, Open, Place};
use crate::{Error, Result};

/// `pg_control` has 8 KiB and a label a few hundred bytes; a manifest that says more is refused.
const PLACED_BYTES_MAX: usize = 1 << 20;

impl Hydration {
    /// Puts `backup_label`, then `pg_control`, durably in place. `filled` proves that all the rest is durable.
    pub fn place_last(&self, _filled: &Filled) -> Result<()> {
        self.map.refuse_if_closed()?;
        self.restrict()?;
        self.roots.sync_parents(&*self.disk)?;
        for path in PLACED_LAST {
            if let Some(file) = self.backup.manifest.file(path)? {
                self.place_file(&file)?;
            }
        }
        Ok(())
    }

    /// Gives files and directories that were copied with more rights than they had their own mode, durably; what lies in
    /// a directory before the directory.
    fn restrict(&self) -> Result<()> {
        let restricted = self.restricted.lock().unwrap_or_else(PoisonError::into_inner);
        for (path, mode) in restricted.iter().rev() {
            let place = self.roots.place(path)?;
            let how = match self.disk.look(place)? {
                Some(Found::Directory) => Open::Directory,
                _ => Open::ReadBuffered,
            };
            let file = self.disk.open(place, how)?;
            self.disk.set_attributes(&file, *mode, self.owner)?;
            self.disk.sync(&file)?;
        }
        Ok(())
    }

    /// Writes a small file in the session's directory, then renames it to its place.
    fn place_file(&self, file: &FileRecord) -> Result<()> {
        let content = self.read_whole(file)?;
        let name = Path::new(&file.path).file_name().unwrap_or(OsStr::new("file"));
        let temporary = session_path(format!("{}.part", name.to_string_lossy()));
        let temporary = self.roots.data()?.at(&temporary);
        remove_if_there(&*self.disk, temporary)?;
        let made = self.disk.open(temporary, Open::Create(0o600))?;
        self.disk.set_attributes(&made, file.mode, self.owner)?;
        self.disk.write_small(&made, 0, &content)?;
        self.disk.set_modified(&made, file.modified)?;
        self.disk.sync(&made)?;
        let place = self.roots.place(&file.path)?;
        self.disk.rename(temporary, place)?;
        self.sync_directory_of(place)?;
        self.sync_directory_of(temporary)
    }

    fn read_whole(&self, file: &FileRecord) -> Result<Vec<u8>> {
        let bytes = usize::try_from(file.bytes).ok().filter(|bytes| *bytes <= PLACED_BYTES_MAX);
        let too_large = || Error::Refused(format!("{} has {} bytes, which it never has", file.path, file.bytes));
        let mut content = vec![0; bytes.ok_or_else(too_large)?];
        let read = self.backup.blocks().read_range(file, 0, &mut content, &mut Scratch::default())?;
        content.truncate(read);
        Ok(content)
    }

    fn sync_directory_of(&self, place: Place<'_>) -> Result<()> {
        let directory = Place { root: place.root, path: place.path.parent().unwrap_or(Path::new("")) };
        self.disk.sync(&*self.disk.open(directory, Open::Directory)?)
    }

    /// Closes the map: to be called before the server is started here for the first time.
    pub fn close(&self) -> Result<()> {
        self.map.close()
    }
}
