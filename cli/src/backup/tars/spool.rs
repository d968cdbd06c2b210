//! WAL that lies in the tars: kept as files until the backup's range is known.
//!
//! `pg_basebackup -X fetch` puts the segments into the base's tar behind everything else, `-X stream` into `pg_wal.tar`.
//! Neither is on the list of files, so nothing of them is believed before the range is: the archive proves each, and what
//! it has already under the same name must be the same.
//!
//! The directory is locked for as long as somebody works in it. One that is not was left by a run that was killed, and the
//! next run removes it.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Write as _};
use std::path::{Path, PathBuf};

use anyhow::Result;
use engine::Error;
use engine::format::repository::{WAL_SEGMENT_BYTES_MAX, WAL_SEGMENT_BYTES_MIN};
use engine::wal::name::WalFile;
use rustix::fs::{FlockOperation, Mode, OFlags, flock};

use super::input::OpenTar;
use super::members::{Kind, Member, each};
use super::records::scratch_directory;

const PIECE_BYTES: usize = 1 << 20;

const PREFIX: &str = "pghydrant-wal-";
/// In the directory, made once that is locked.
const SEGMENTS: &str = "pg_wal";

/// A directory of segments, gone when dropped.
pub(super) struct Spool {
    _directory: tempfile::TempDir,
    segments: PathBuf,
    _lock: File,
}

impl Spool {
    /// An empty one, in `TMPDIR` or `/var/tmp`.
    pub(super) fn create() -> Result<Self> {
        let place = scratch_directory();
        sweep(&place);
        let directory = tempfile::Builder::new().prefix(PREFIX).tempdir_in(&place);
        let directory = directory.map_err(|cause| Error::io("make a directory in", &place, cause))?;
        let lock = File::open(directory.path()).map_err(|cause| Error::io("open", directory.path(), cause))?;
        // Where directories cannot be locked nobody else's sweep can lock it either.
        let _ = flock(&lock, FlockOperation::NonBlockingLockExclusive);
        let segments = directory.path().join(SEGMENTS);
        std::fs::create_dir(&segments).map_err(|cause| Error::io("make", &segments, cause))?;
        Ok(Self { _directory: directory, segments, _lock: lock })
    }

    pub(super) fn path(&self) -> &Path {
        &self.segments
    }

    /// Keeps a member of `pg_wal` that is called `name`, if it is WAL and needed.
    pub(super) fn take(&self, name: &str, member: &Member, content: &mut dyn Read) -> Result<()> {
        // What is a segment's name with small segments is one with larger ones.
        let parsed = WalFile::parse(name, WAL_SEGMENT_BYTES_MIN);
        let is_wal = matches!(parsed, Some(WalFile::Segment(_) | WalFile::History(_)));
        if !is_wal || !matches!(member.kind, Kind::File) || member.bytes > WAL_SEGMENT_BYTES_MAX {
            return Ok(());
        }
        let path = self.path().join(name);
        let mut file = File::create_new(&path).map_err(|cause| Error::io("create", &path, cause))?;
        let mut left = member.bytes;
        let mut piece = vec![0; PIECE_BYTES];
        while left > 0 {
            let now = usize::try_from(left).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
            content.read_exact(&mut piece[..now])?;
            file.write_all(&piece[..now]).map_err(|cause| Error::io("write", &path, cause))?;
            left -= now as u64;
        }
        Ok(())
    }

    /// Which of `names` are not here.
    pub(super) fn missing(&self, names: impl Iterator<Item = String>) -> BTreeSet<String> {
        names.filter(|name| !self.path().join(name).exists()).collect()
    }

    /// Keeps the segments called `names` of the tar of a whole `pg_wal`.
    pub(super) fn take_all(&self, tar: &OpenTar, names: &BTreeSet<String>, stop: &dyn Fn() -> bool) -> Result<()> {
        each(tar, stop, |member, content| {
            if names.contains(&member.path) { self.take(&member.path.clone(), &member, content) } else { Ok(()) }
        })
    }
}

/// Removes our own directories in `place` that nobody has locked. One that cannot be removed is no reason to stop.
fn sweep(place: &Path) {
    let Ok(entries) = std::fs::read_dir(place) else { return };
    for path in entries.filter_map(Result::ok).map(|entry| entry.path()) {
        let is_named = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(PREFIX.as_bytes()));
        if !is_named || !path.join(SEGMENTS).is_dir() {
            continue;
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let Ok(directory) = rustix::fs::open(&path, flags, Mode::empty()) else { continue };
        let owner = rustix::fs::fstat(&directory).map(|stat| stat.st_uid);
        let ours = owner.is_ok_and(|uid| uid == rustix::process::geteuid().as_raw());
        if ours && flock(&directory, FlockOperation::NonBlockingLockExclusive).is_ok() {
            let _ = std::fs::remove_dir_all(&path);
        }
    }
}
