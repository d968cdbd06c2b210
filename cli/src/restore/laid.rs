//! Segments that lie in `pg_wal` under their own names before the server asks for them.
//!
//! A segment that `restore_command` delivers costs the replay three syncs (of the file under the name that PostgreSQL asked
//! for, of its final one, of `pg_wal`), and each of the commits that they wait for carries what the replay itself has
//! written: a rename alone is no faster than a copy. For one that lies in `pg_wal` there are none. PostgreSQL looks there
//! when `restore_command` has said that there is no such segment, for each timeline in turn, before it takes that for the
//! end of the WAL. So `wal fetch` says just that of a segment that was laid, and of no other.
//!
//! What was laid is known by its mark in the staging directory: a symbolic link, which is made at once or not at all, to
//! the text of the file's identity. It is made when the content is durable, and `wal fetch` takes it away with its answer:
//! PostgreSQL asks for a segment a second time only where it begins again, and is brought it from the repository then.
//! The name may be lost in a crash: a mark without its very file says nothing. Before PostgreSQL does without its signal
//! file, it syncs the directory for the history of the timeline that it begins.
//!
//! PostgreSQL overwrites none that it has not read: until it has left archive recovery it recycles nothing (since
//! version 15), or only to names that are free (before). One that it has not asked for is taken away again.

use std::fs::{File, Metadata};
use std::io::ErrorKind;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use engine::Error;
use engine::io::durable;

use super::plan::User;
use super::{files, staging};

/// Behind a segment's name, in the staging directory.
const MARK: &str = ".laid";
/// PostgreSQL's own, for what it need not archive.
const DONE: &str = ".done";

/// Where segments are laid.
#[derive(Debug)]
pub(super) struct Place {
    pg_wal: Held,
    staging: Held,
    /// Where PostgreSQL keeps what it has archived, if the server is to archive.
    status: Option<Held>,
    owner: User,
}

/// A directory by way of a descriptor: whatever the server's user puts in its place, nothing is written elsewhere.
#[derive(Debug)]
pub(super) struct Held {
    path: PathBuf,
    _file: File,
}

impl Held {
    pub(super) fn new(file: File) -> Self {
        Self { path: PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd())), _file: file }
    }

    pub(super) fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

impl Place {
    /// In `pg_wal`, with marks in its staging directory. A server that `archives` does not archive again what was laid.
    pub(super) fn open(pg_wal: &Path, archives: bool, owner: &User) -> anyhow::Result<Self> {
        let opened = File::open(pg_wal).map_err(|cause| Error::io("open", pg_wal, cause))?;
        let pg_wal = Held::new(opened);
        let staging = Held::new(staging::hold(&pg_wal.join(staging::NAME))?);
        let status = if archives { Some(Held::new(staging::hold(&pg_wal.join("archive_status"))?)) } else { None };
        Ok(Self { pg_wal, staging, status, owner: owner.clone() })
    }

    /// Gives `part`, whose content is durable, the name `name` in `pg_wal`, and marks it.
    pub(super) fn lay(&self, part: &Path, name: &str) -> anyhow::Result<()> {
        let metadata = std::fs::symlink_metadata(part).map_err(|cause| Error::io("examine", part, cause))?;
        if let Some(status) = &self.status {
            self.note_archived(&status.join(&format!("{name}{DONE}")))?;
        }
        durable::rename_in_place(part, &self.pg_wal.join(name))?;
        let mark = self.mark(name);
        // Of an earlier file, which has just been replaced.
        files::remove(&mark)?;
        let made = std::os::unix::fs::symlink(identity(&metadata), &mark);
        Ok(made.map_err(|cause| Error::io("create", &mark, cause))?)
    }

    /// Whether the server has not asked for it yet.
    pub(super) fn waits(&self, name: &str) -> bool {
        self.mark(name).symlink_metadata().is_ok()
    }

    /// The server is past it, and brought it itself: the file is its own business now.
    pub(super) fn forget(&self, name: &str) -> anyhow::Result<()> {
        files::remove(&self.mark(name))
    }

    /// Takes away everything that was laid and not asked for.
    pub(super) fn clear(&self) -> anyhow::Result<()> {
        let staging = &self.staging.path;
        let failed = |cause| Error::io("list", staging, cause);
        for entry in std::fs::read_dir(staging).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            if let Some(name) = name.to_str().and_then(|name| name.strip_suffix(MARK)) {
                self.take_away(name)?;
            }
        }
        Ok(())
    }

    /// Whoever removes the mark has the segment: the server, or we.
    fn take_away(&self, name: &str) -> anyhow::Result<()> {
        if !claim(&self.pg_wal.join(name), &self.mark(name))? {
            return Ok(());
        }
        if let Some(status) = &self.status {
            files::remove(&status.join(&format!("{name}{DONE}")))?;
        }
        files::remove(&self.pg_wal.join(name))
    }

    /// As PostgreSQL does it for what it has restored from an archive.
    fn note_archived(&self, done: &Path) -> anyhow::Result<()> {
        match File::options().write(true).create_new(true).mode(0o600).open(done) {
            Ok(_) => files::give(done, &self.owner),
            Err(cause) if cause.kind() == ErrorKind::AlreadyExists => Ok(()),
            Err(cause) => Err(Error::io("create", done, cause).into()),
        }
    }

    fn mark(&self, name: &str) -> PathBuf {
        self.staging.join(&format!("{name}{MARK}"))
    }
}

/// Takes away what lies in a server's staging directory, the directory, and the segments that it did not ask for.
pub(super) fn clear(data: &Path, archives: bool, owner: &User) -> anyhow::Result<()> {
    let directory = data.join(staging::DIRECTORY);
    if directory.is_dir() && !directory.is_symlink() {
        Place::open(&data.join("pg_wal"), archives, owner)?.clear()?;
    }
    files::remove(&directory)
}

/// Whether the segment at `path` was laid for the server that asks for it, and it is told so for the first time.
pub(crate) fn take(path: &Path) -> engine::Result<bool> {
    let (Some(name), Some(pg_wal)) = (path.file_name().and_then(|name| name.to_str()), path.parent()) else {
        return Ok(false);
    };
    claim(path, &pg_wal.join(staging::NAME).join(format!("{name}{MARK}")))
}

/// Takes the mark away; true if it was there, and is that of the very file at `path`.
fn claim(path: &Path, mark: &Path) -> engine::Result<bool> {
    let marked = match std::fs::read_link(mark) {
        Ok(marked) => marked,
        Err(cause) if matches!(cause.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(false),
        Err(cause) => return Err(Error::io("read", mark, cause)),
    };
    let is_it = match path.symlink_metadata() {
        Ok(metadata) => metadata.is_file() && Path::new(&identity(&metadata)) == marked,
        Err(cause) if cause.kind() == ErrorKind::NotFound => false,
        Err(cause) => return Err(Error::io("examine", path, cause)),
    };
    match std::fs::remove_file(mark) {
        Ok(()) => Ok(is_it),
        Err(cause) if cause.kind() == ErrorKind::NotFound => Ok(false),
        Err(cause) => Err(Error::io("remove", mark, cause)),
    }
}

/// Another file under the name has another number, and this one with other content another time.
fn identity(metadata: &Metadata) -> String {
    let (seconds, nanoseconds) = (metadata.mtime(), metadata.mtime_nsec());
    format!("{}:{}:{}:{seconds}.{nanoseconds:09}", metadata.dev(), metadata.ino(), metadata.len())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const SEGMENT: &str = "000000010000000000000005";
    const NEXT: &str = "000000010000000000000006";

    struct Server {
        data: tempfile::TempDir,
        owner: User,
    }

    impl Server {
        fn new() -> Self {
            let data = tempfile::tempdir().unwrap();
            std::fs::create_dir_all(data.path().join(staging::DIRECTORY)).unwrap();
            std::fs::create_dir(data.path().join("pg_wal/archive_status")).unwrap();
            let metadata = data.path().metadata().unwrap();
            let owner = User { name: "owner".to_owned(), uid: metadata.uid(), gid: metadata.gid() };
            Self { data, owner }
        }

        fn at(&self, name: &str) -> PathBuf {
            self.data.path().join("pg_wal").join(name)
        }

        fn place(&self) -> Place {
            Place::open(&self.at(""), true, &self.owner).unwrap()
        }

        fn lay(&self, name: &str) -> Place {
            let place = self.place();
            let part = self.at("pghydrant.staging").join(".part");
            std::fs::write(&part, name).unwrap();
            place.lay(&part, name).unwrap();
            place
        }
    }

    #[test]
    fn a_segment_that_was_laid_is_told_of_once() {
        let server = Server::new();
        let place = server.lay(SEGMENT);
        assert!(place.waits(SEGMENT) && server.at("archive_status").join(format!("{SEGMENT}.done")).exists());
        assert!(take(&server.at(SEGMENT)).unwrap());
        assert!(!place.waits(SEGMENT));
        assert!(!take(&server.at(SEGMENT)).unwrap(), "it is brought from the repository");
        assert!(!take(&server.at(NEXT)).unwrap(), "it was never laid");
        assert!(!take(Path::new("/nonexistent/pg_wal").join(NEXT).as_path()).unwrap());
    }

    #[test]
    fn another_file_under_the_name_is_not_what_was_laid() {
        let server = Server::new();
        for replace in [
            |path: &Path| std::fs::remove_file(path).unwrap(),
            // The same content, and a shorter one: whoever wrote it, nobody has verified it.
            |path: &Path| {
                std::fs::rename(path, path.with_extension("kept")).unwrap();
                std::fs::copy(path.with_extension("kept"), path).unwrap();
            },
            |path: &Path| std::fs::write(path, "torn").unwrap(),
        ] {
            let place = server.lay(SEGMENT);
            replace(&server.at(SEGMENT));
            assert!(!take(&server.at(SEGMENT)).unwrap());
            assert!(!place.waits(SEGMENT));
        }
    }

    /// Killed between the rename and the mark.
    #[test]
    fn a_segment_without_its_mark_was_not_laid() {
        let server = Server::new();
        std::fs::write(server.at(SEGMENT), SEGMENT).unwrap();
        assert!(!take(&server.at(SEGMENT)).unwrap());
        server.place().clear().unwrap();
        assert!(server.at(SEGMENT).exists(), "nobody says whose it is");
    }

    #[test]
    fn what_the_server_did_not_ask_for_goes_and_what_it_did_stays() {
        let server = Server::new();
        server.lay(SEGMENT);
        server.lay(NEXT);
        assert!(take(&server.at(SEGMENT)).unwrap());
        clear(server.data.path(), true, &server.owner).unwrap();
        assert!(server.at(SEGMENT).exists() && !server.at(NEXT).exists());
        let done = |name: &str| server.at("archive_status").join(format!("{name}.done"));
        assert!(done(SEGMENT).exists() && !done(NEXT).exists());
        assert!(!server.at("pghydrant.staging").exists());
        clear(server.data.path(), true, &server.owner).unwrap();
    }
}
