//! Where the files of a backup are opened, so that root carries off nothing that the server's user could not read.
//!
//! The data directory is its owner's, who can put a link in any place of it, at any moment. Root therefore opens files
//! beneath directories that it has opened once, and follows no link there. What is reached through a link on purpose, a
//! tablespace or a key in another directory, is opened first; then a process that runs as the owner tells whether they
//! could have opened the very same. Such a directory must be theirs as well: everyone can list `/etc`, which does not make
//! `/etc/shadow` theirs.
//!
//! Whoever is not root cannot read more than they may, and nobody is asked.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use engine::io::{Place, Root};
use engine::{Error, Result};
use rustix::fs::{FileType, Mode, OFlags};

use super::source::SourceFile;
use crate::postgres::owner::Owner;

/// Directories and files that are open, by their paths in the backup.
#[derive(Debug)]
pub(super) struct Places {
    data: Root,
    /// Directories that a link leads to: what is beneath them is opened beneath them.
    directories: BTreeMap<String, Root>,
    /// Files that stand elsewhere, or nowhere else.
    pub(super) files: BTreeMap<String, File>,
}

impl Places {
    /// The data directory of `owner`.
    pub(super) fn open(data: &Path, owner: &Owner) -> anyhow::Result<Self> {
        let data = Root::open(data)?;
        let opened = rustix::fs::fstat(&data).map_err(|cause| Error::io("examine", data.path(), cause))?;
        anyhow::ensure!(
            !is_asked(owner) || opened.st_uid == owner.uid,
            "{} is no longer the directory of {}",
            data.path().display(),
            owner.name
        );
        Ok(Self { data, directories: BTreeMap::new(), files: BTreeMap::new() })
    }

    /// Opens the file that a link at `at` leads to, to be read under `path`. The refusal is a reason to leave it out.
    pub(super) fn add_file(&mut self, path: &str, at: &Path, owner: &Owner) -> Result<(), String> {
        let file = open_for(owner, at)?;
        self.files.insert(path.to_owned(), file);
        Ok(())
    }

    /// Opens a directory behind a link, beneath which everything below `path` is read.
    pub(super) fn add_directory(&mut self, path: &str, at: &Path, owner: &Owner) -> Result<(), String> {
        let directory = open_for(owner, at)?;
        let uid = directory.metadata().map_err(|cause| cause.to_string())?.uid();
        if is_asked(owner) && uid != owner.uid {
            return Err(format!("it leads to a directory that is not {}'s", owner.name));
        }
        self.directories.insert(path.to_owned(), Root::of(directory, at));
        Ok(())
    }

    /// Opens the file with that path in the backup; nothing if it has vanished.
    pub(super) fn source(&self, path: &str) -> Result<Option<SourceFile>> {
        if let Some(file) = self.files.get(path) {
            let file = file.try_clone().map_err(|cause| Error::io("open", path, cause))?;
            return SourceFile::of(file, Path::new(path));
        }
        SourceFile::open(self.place(path))
    }

    fn place<'a>(&'a self, path: &'a str) -> Place<'a> {
        let above = || path.rmatch_indices('/').map(|(end, _)| (&path[..end], &path[end + 1..]));
        let linked = above().find_map(|(above, below)| Some(self.directories.get(above)?.at(below)));
        linked.unwrap_or_else(|| self.data.at(path))
    }
}

/// Only root reads more than the owner.
fn is_asked(owner: &Owner) -> bool {
    rustix::process::geteuid().is_root() && owner.uid != 0
}

/// Opens the file or directory that `path` leads to, through whatever links, if `owner` may read it.
pub(super) fn open_for(owner: &Owner, path: &Path) -> Result<File, String> {
    let open = || {
        // Looked at before it is opened: the opening of a device may do something, that of a pipe waits.
        let found = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        let kind = FileType::from_raw_mode(rustix::fs::fstat(&found)?.st_mode);
        if !matches!(kind, FileType::RegularFile | FileType::Directory) {
            return Ok(None);
        }
        let flags = OFlags::RDONLY | OFlags::NOCTTY | OFlags::CLOEXEC;
        let same = format!("/proc/self/fd/{}", found.as_raw_fd());
        rustix::fs::open(same, flags, Mode::empty()).map(|file| Some(File::from(file)))
    };
    let Some(file) = open().map_err(|cause| std::io::Error::from(cause).to_string())? else {
        return Err("it leads to no file".to_owned());
    };
    let may = !is_asked(owner) || owner.may_read(path, file.as_fd()).map_err(|error| format!("{error:#}"))?;
    if may { Ok(file) } else { Err(format!("{} may not read it", owner.name)) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, chown, symlink};

    use super::*;

    #[test]
    fn plain_files_are_read_beneath_open_directories_and_through_no_link() {
        let (data, place) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::create_dir_all(data.path().join("base/5")).unwrap();
        fs::write(data.path().join("base/5/1"), "plain").unwrap();
        fs::create_dir(place.path().join("5")).unwrap();
        fs::write(place.path().join("5/2"), "linked").unwrap();
        fs::write(place.path().join("key"), "key").unwrap();
        symlink(place.path(), data.path().join("pg_xact")).unwrap();
        symlink(place.path().join("key"), data.path().join("server.key")).unwrap();
        let owner = Owner::current().unwrap();
        let mut places = Places::open(data.path(), &owner).unwrap();
        assert_eq!(places.source("base/5/1").unwrap().unwrap().bytes, 5);
        assert!(places.source("base/5/gone").unwrap().is_none());
        assert!(places.source("server.key").is_err());
        assert!(places.source("pg_xact/5/2").is_err());
        places.add_directory("pg_xact", &data.path().join("pg_xact"), &owner).unwrap();
        places.add_file("server.key", &data.path().join("server.key"), &owner).unwrap();
        assert_eq!(places.source("pg_xact/5/2").unwrap().unwrap().bytes, 6);
        assert_eq!(places.source("server.key").unwrap().unwrap().bytes, 3);
        // Whatever stands there by now.
        fs::rename(data.path().join("base/5"), data.path().join("base/6")).unwrap();
        symlink(place.path().join("5"), data.path().join("base/5")).unwrap();
        assert!(places.source("base/5/2").is_err());
    }

    #[test]
    fn root_takes_only_what_the_owner_could_read_and_only_their_directories() {
        if !rustix::process::geteuid().is_root() {
            let test = "places::root_takes_only_what_the_owner_could_read_and_only_their_directories";
            return crate::left_out::leave_out(test, "root");
        }
        let owner = Owner { name: "12345".to_owned(), uid: 12345, gid: 12345, home: "/".into() };
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name);
        let mode = |name: &str, mode| fs::set_permissions(at(name), fs::Permissions::from_mode(mode)).unwrap();
        mode("", 0o755);
        for directory in ["data", "theirs", "everyones", "closed"] {
            fs::create_dir(at(directory)).unwrap();
            mode(directory, 0o755);
        }
        for file in ["readable", "secret", "closed/readable"] {
            fs::write(at(file), file).unwrap();
            mode(file, 0o644);
        }
        mode("secret", 0o600);
        mode("closed", 0o700);
        for directory in ["data", "theirs"] {
            chown(at(directory), Some(12345), Some(12345)).unwrap();
        }
        rustix::fs::mkfifoat(rustix::fs::CWD, at("pipe"), 0o644.into()).unwrap();

        let mut places = Places::open(&at("data"), &owner).unwrap();
        assert!(Places::open(&at("everyones"), &owner).is_err());
        places.add_file("good", &at("readable"), &owner).unwrap();
        for refused in ["secret", "closed/readable"] {
            let why = places.add_file("bad", &at(refused), &owner).unwrap_err();
            assert_eq!(why, "12345 may not read it", "{refused}");
        }
        assert_eq!(places.add_file("bad", &at("pipe"), &owner).unwrap_err(), "it leads to no file");
        places.add_directory("good", &at("theirs"), &owner).unwrap();
        assert!(places.add_directory("bad", &at("everyones"), &owner).is_err());
        assert!(places.source("bad").unwrap().is_none());

        // The answer is of what was opened, not of what stands there when the owner is asked.
        let opened = File::open(at("secret")).unwrap();
        assert!(!owner.may_read(&at("readable"), opened.as_fd()).unwrap());
    }
}
