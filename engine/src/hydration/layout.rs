//! Where a backup's files go.
//!
//! A manifest knows one tree; a target may be several: each tablespace has a directory of its own, and so may the
//! WAL. [`Layout`] maps a manifest path to the root and the path below it. [`Roots`] are those roots opened once, so
//! that everything below is reached without following a link (see [`crate::io::disk`]).

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::io::{Disk, Open, OpenFile, Owner, Place, Root};
use crate::{Error, Result};

/// The directory below the data directory where the session keeps its map.
pub const SESSION_DIRECTORY: &str = "pghydrant.session";
/// The server's WAL, below the data directory.
pub const WAL_DIRECTORY: &str = "pg_wal";
const TABLESPACES: &str = "pg_tblspc/";
/// What PostgreSQL accepts for a data directory.
const ROOT_MODE: u32 = 0o700;

/// The directories of a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The data directory.
    pub data: PathBuf,
    /// The directory of each tablespace that lies outside, by OID.
    pub tablespaces: BTreeMap<u32, PathBuf>,
    /// The directory of the WAL, where `pg_wal` is to be a link.
    pub wal: Option<PathBuf>,
}

/// One of a layout's directories.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Home {
    /// The data directory.
    Data,
    /// A tablespace's directory.
    Tablespace(u32),
    /// The WAL's directory.
    Wal,
}

impl Layout {
    /// A data directory with everything in it.
    pub fn of_data(data: impl Into<PathBuf>) -> Self {
        Self { data: data.into(), tablespaces: BTreeMap::new(), wal: None }
    }

    /// The directory that the manifest path `path` lies in, and its path there (empty: the directory itself).
    pub fn home<'a>(&self, path: &'a str) -> (Home, &'a str) {
        if let Some(rest) = path.strip_prefix(TABLESPACES) {
            let (oid, below) = rest.split_once('/').unwrap_or((rest, ""));
            if let Some(oid) = oid.parse().ok().filter(|oid| self.tablespaces.contains_key(oid)) {
                return (Home::Tablespace(oid), below);
            }
        }
        if self.wal.is_some()
            && let Some(rest) = path.strip_prefix(WAL_DIRECTORY)
        {
            match rest.strip_prefix('/') {
                Some(below) => return (Home::Wal, below),
                None if rest.is_empty() => return (Home::Wal, ""),
                None => {}
            }
        }
        (Home::Data, path)
    }

    /// Where the manifest path `path` ends up.
    pub fn target_path(&self, path: &str) -> PathBuf {
        let (home, below) = self.home(path);
        let root = self.root_path(home);
        if below.is_empty() { root.to_owned() } else { root.join(below) }
    }

    /// Every directory, the data directory first.
    pub fn homes(&self) -> Vec<(Home, &Path)> {
        let tablespaces = self.tablespaces.iter().map(|(oid, path)| (Home::Tablespace(*oid), path.as_path()));
        let wal = self.wal.iter().map(|path| (Home::Wal, path.as_path()));
        std::iter::once((Home::Data, self.data.as_path())).chain(tablespaces).chain(wal).collect()
    }

    fn root_path(&self, home: Home) -> &Path {
        match home {
            Home::Data => &self.data,
            Home::Tablespace(oid) => self.tablespaces.get(&oid).unwrap_or(&self.data),
            Home::Wal => self.wal.as_ref().unwrap_or(&self.data),
        }
    }
}

/// A layout's directories, open.
#[derive(Debug)]
pub struct Roots {
    layout: Layout,
    open: BTreeMap<Home, Root>,
    /// Opened before the first write, as the kernel then tells of each write that is lost on their file systems.
    file_systems: Mutex<Vec<(u64, Arc<OpenFile>)>>,
}

impl Roots {
    /// Makes the directories that are missing, and tells which ones it made.
    pub fn make(layout: &Layout, disk: &dyn Disk, owner: Option<Owner>) -> Result<(Self, Vec<PathBuf>)> {
        let mut made = Vec::new();
        for (_, path) in layout.homes() {
            make_with_parents(path, disk, owner, &mut made)?;
        }
        Ok((Self::open(layout, disk)?, made))
    }

    /// Opens directories that are there.
    pub fn open(layout: &Layout, disk: &dyn Disk) -> Result<Self> {
        let mut roots = Self { layout: layout.clone(), open: BTreeMap::new(), file_systems: Mutex::default() };
        for (home, path) in layout.homes() {
            let root = Root::open(path)?;
            roots.note_file_system(root.at(""), disk)?;
            roots.open.insert(home, root);
        }
        Ok(roots)
    }

    /// Remembers the file system of a directory, before anything is written there.
    pub(super) fn note_file_system(&self, directory: Place<'_>, disk: &dyn Disk) -> Result<()> {
        let open = disk.open(directory, Open::Directory)?;
        let metadata = open.file.metadata().map_err(|cause| Error::io("examine", &open.path, cause))?;
        let mut known = self.file_systems.lock().unwrap_or_else(PoisonError::into_inner);
        if !known.iter().any(|(device, _)| *device == metadata.dev()) {
            known.push((metadata.dev(), open));
        }
        Ok(())
    }

    /// The layout.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The root of one of the directories.
    pub fn root(&self, home: Home) -> Result<&Root> {
        let missing = || Error::NotFound(format!("the target has no directory for {home:?}"));
        self.open.get(&home).ok_or_else(missing)
    }

    /// The data directory.
    pub fn data(&self) -> Result<&Root> {
        self.root(Home::Data)
    }

    /// The place of a manifest path.
    pub fn place<'a>(&'a self, path: &'a str) -> Result<Place<'a>> {
        let (home, below) = self.layout.home(path);
        Ok(self.root(home)?.at(below))
    }

    /// Makes everything durable that was written on the file systems of the target.
    pub fn sync_file_systems(&self, disk: &dyn Disk) -> Result<()> {
        let known = self.file_systems.lock().unwrap_or_else(PoisonError::into_inner).clone();
        known.iter().try_for_each(|(_, directory)| disk.sync_file_system(directory))
    }

    /// Makes the names of the roots themselves durable.
    pub fn sync_parents(&self, disk: &dyn Disk) -> Result<()> {
        for (_, path) in self.layout.homes() {
            let parent = Root::open(parent_of(path))?;
            disk.sync(&*disk.open(parent.at(""), Open::Directory)?)?;
        }
        Ok(())
    }
}

/// Makes `path` and whatever is missing above it, from the top down; the directory itself belongs to `owner`.
fn make_with_parents(path: &Path, disk: &dyn Disk, owner: Option<Owner>, made: &mut Vec<PathBuf>) -> Result<()> {
    let missing: Vec<_> = path.ancestors().take_while(|path| !is_there(path)).collect();
    for path in missing.into_iter().rev() {
        let name = path.file_name().ok_or_else(|| {
            Error::io("create directory", path, std::io::Error::from(std::io::ErrorKind::InvalidFilename))
        })?;
        let parent = Root::open(parent_of(path))?;
        let place = parent.at(name);
        if disk.make_directory(place, ROOT_MODE)? {
            made.push(path.to_owned());
            disk.set_attributes(&*disk.open(place, Open::Directory)?, ROOT_MODE, owner)?;
        }
    }
    Ok(())
}

fn is_there(path: &Path) -> bool {
    path.as_os_str().is_empty() || path.exists()
}

fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) => Path::new("."),
        None => path,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> Layout {
        Layout {
            data: "/new/data".into(),
            tablespaces: [(16400, "/new/fast".into())].into(),
            wal: Some("/new/wal".into()),
        }
    }

    #[test]
    fn each_path_goes_to_its_directory() {
        let layout = layout();
        for (path, target) in [
            ("base/5/1259", "/new/data/base/5/1259"),
            ("", "/new/data"),
            ("pg_tblspc", "/new/data/pg_tblspc"),
            ("pg_tblspc/16400", "/new/fast"),
            ("pg_tblspc/16400/PG_15_202209061/5/1", "/new/fast/PG_15_202209061/5/1"),
            ("pg_tblspc/16401/PG_15_202209061/5/1", "/new/data/pg_tblspc/16401/PG_15_202209061/5/1"),
            ("pg_wal", "/new/wal"),
            ("pg_wal/archive_status", "/new/wal/archive_status"),
            ("pg_wally", "/new/data/pg_wally"),
        ] {
            assert_eq!(layout.target_path(path), Path::new(target), "{path}");
        }
    }

    #[test]
    fn without_a_directory_of_its_own_the_wal_stays_in_the_data_directory() {
        let layout = Layout::of_data("/new/data");
        assert_eq!(layout.target_path("pg_wal/archive_status"), Path::new("/new/data/pg_wal/archive_status"));
    }
}
