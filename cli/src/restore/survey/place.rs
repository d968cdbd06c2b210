//! Looking at the directories that a restore would fill, and at their file systems.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use engine::hydration;
use engine::io::LocalDisk;
use engine::units::SessionId;
use rustix::fs::Access;

use crate::postgres::owner::Owner;
use crate::postgres::postmaster;

/// What is at a directory's place.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    /// Absolute; links in what exists of it are followed.
    pub(crate) path: PathBuf,
    pub(crate) what: What,
    /// Above it, missing, the outermost first.
    pub(crate) missing_parents: Vec<PathBuf>,
    /// The nearest directory that exists: the place itself, or above it.
    pub(crate) nearest: PathBuf,
    /// Whether we may write in `nearest`; if not: "cannot write in", where, and why.
    pub(crate) writable: Result<(), String>,
    /// Whether the owner can get there.
    pub(crate) reachable: bool,
    /// Who owns `nearest`.
    pub(crate) owner_uid: u32,
    pub(crate) file_system: Result<FileSystem, String>,
}

/// See [`Found::what`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum What {
    Absent,
    Empty,
    /// A session's directory.
    Ours(SessionId),
    /// A data directory; with the process that runs in it.
    Cluster(Option<u32>),
    /// Something else, for example this.
    Occupied(String),
    NoDirectory,
    Unknown(String),
}

/// A file system's room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileSystem {
    pub(crate) device: u64,
    pub(crate) free_bytes: u64,
    pub(crate) free_inodes: u64,
    /// Some file systems make inodes as they need them and count none.
    pub(crate) counts_inodes: bool,
}

pub(super) fn look_at_place(path: &Path, owner: Option<&Owner>) -> Found {
    let nearest = path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let real_nearest = std::fs::canonicalize(nearest).unwrap_or_else(|_| nearest.to_owned());
    let below = path.strip_prefix(nearest).unwrap_or(Path::new(""));
    let real = if below.as_os_str().is_empty() { real_nearest.clone() } else { real_nearest.join(below) };
    let missing: Vec<PathBuf> = real
        .ancestors()
        .skip(1)
        .take_while(|above| above.starts_with(&real_nearest) && **above != real_nearest)
        .map(Path::to_owned)
        .collect();
    let what = if nearest == path { look_into(&real) } else { What::Absent };
    let nearest_is_place = nearest == path;
    let test = |flag: &str, path: &Path| {
        let Some(owner) = owner else { return true };
        owner.test(flag, path).unwrap_or(true)
    };
    // The owner must get through every directory above; of the place itself the owner will be changed.
    let above = if nearest_is_place { real_nearest.parent().unwrap_or(&real_nearest) } else { &real_nearest };
    let writable = rustix::fs::access(&real_nearest, Access::WRITE_OK | Access::EXEC_OK);
    Found {
        what,
        missing_parents: missing.into_iter().rev().collect(),
        writable: writable.map_err(|cause| engine::Error::io("write in", &real_nearest, cause).to_string()),
        reachable: test("-x", above),
        owner_uid: std::fs::metadata(&real_nearest).map_or(0, |metadata| metadata.uid()),
        file_system: file_system(&real_nearest),
        nearest: real_nearest,
        path: real,
    }
}

fn look_into(path: &Path) -> What {
    let unknown = |error: anyhow::Error| What::Unknown(format!("{error:#}"));
    if !path.is_dir() {
        return What::NoDirectory;
    }
    match hydration::session_in(path, &LocalDisk::new()) {
        Ok(Some((session, _))) => return What::Ours(session),
        Ok(None) => {}
        Err(error) => return unknown(error.into()),
    }
    let entries = match std::fs::read_dir(path) {
        Ok(entries) => entries,
        Err(cause) => return unknown(engine::Error::io("list", path, cause).into()),
    };
    let mut names = entries.filter_map(|entry| Some(entry.ok()?.file_name()));
    let Some(first) = names.next() else { return What::Empty };
    if path.join("PG_VERSION").exists() || path.join("postmaster.pid").exists() {
        return match postmaster::running_in(path) {
            Ok(running) => What::Cluster(running.map(|file| file.pid)),
            Err(error) => unknown(error),
        };
    }
    What::Occupied(first.to_string_lossy().into_owned())
}

fn file_system(path: &Path) -> Result<FileSystem, String> {
    let text = |cause: std::io::Error| engine::Error::io("look at the file system of", path, cause).to_string();
    let metadata = std::fs::metadata(path).map_err(text)?;
    let room = rustix::fs::statvfs(path).map_err(|cause| text(cause.into()))?;
    Ok(FileSystem {
        device: metadata.dev(),
        // Without what is reserved for root: the server that goes on writing is not root.
        free_bytes: room.f_bavail.saturating_mul(room.f_frsize),
        free_inodes: room.f_favail,
        counts_inodes: room.f_files > 0,
    })
}
