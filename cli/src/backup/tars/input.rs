//! Where the tar files of a base backup come from: standard input, a file with others beside it, or a directory.
//!
//! The stream of `pg_basebackup -D -` is one tar with everything in it. `pg_basebackup -Ft -D DIR` makes `base.tar`, a
//! `<oid>.tar` for every tablespace, `pg_wal.tar`, and `backup_manifest` beside them, the tars with the endings of their
//! compression. What beside the base is needed is looked for by these names; nothing else of a directory is looked at.

use std::fs::File;
use std::io::{self, IsTerminal as _, Read as _};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::super::adopt::no;
use super::super::listed;
use crate::exit::{Exit, Failure};

/// What `pg_basebackup` and people put behind `.tar`. The bytes tell what it is; this is only how it is found.
const ENDINGS: [&str; 4] = ["", ".gz", ".lz4", ".zst"];
/// How long a reader of a silent pipe takes to notice that it shall stop.
const STOP_POLL: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
/// Fewer, larger reads; the most that an ordinary user may ask for.
const PIPE_BYTES: usize = 1 << 20;

/// The tar files of a base backup.
pub(in crate::backup) struct Input {
    /// How messages call it.
    pub(super) shown: String,
    base: Base,
    /// Where the other files lie.
    directory: Option<PathBuf>,
    /// The base has the name that `pg_basebackup` gives it, so what lies beside it is of the same base backup. A stream
    /// that was saved may lie beside anything.
    pub(super) is_named: bool,
}

enum Base {
    Stdin,
    File(PathBuf),
}

/// One tar, open.
pub(super) struct OpenTar {
    /// How messages call it.
    pub(super) shown: String,
    pub(super) file: File,
}

impl Input {
    /// What `--from` names, if that is no plain data directory.
    pub(in crate::backup) fn named(from: &Path) -> Result<Option<Self>> {
        if from == "-" {
            if io::stdin().is_terminal() {
                let failure = Failure::new(Exit::Usage, "standard input is a terminal, and no base backup");
                return Err(failure.hint("pg_basebackup -D - -Ft -X none | pghydrant backup --from -").into());
            }
            let shown = "standard input".to_owned();
            return Ok(Some(Self { shown, base: Base::Stdin, directory: None, is_named: false }));
        }
        let metadata =
            std::fs::metadata(from).map_err(|error| no(format!("cannot read {}: {error}", from.display())))?;
        if !metadata.is_dir() {
            // A pipe has nothing beside it.
            let directory = metadata.is_file().then(|| directory_of(from));
            let is_named = from.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"base.tar"));
            let base = Base::File(from.to_owned());
            return Ok(Some(Self { shown: from.display().to_string(), base, directory, is_named }));
        }
        if from.join("PG_VERSION").exists() {
            return Ok(None);
        }
        let Some(base) = find(from, "base")? else { return Ok(None) };
        let shown = from.display().to_string();
        Ok(Some(Self { shown, base: Base::File(base), directory: Some(from.to_owned()), is_named: true }))
    }

    /// The tar of the data directory.
    pub(super) fn base(&self) -> Result<OpenTar> {
        match &self.base {
            Base::File(path) => open(path),
            Base::Stdin => {
                let file = rustix::io::dup(io::stdin()).map_err(io::Error::from);
                let file = File::from(file.context("cannot read standard input")?);
                Ok(OpenTar { shown: self.shown.clone(), file: widened(file) })
            }
        }
    }

    /// `16400.tar` or `pg_wal.tar`, if it lies there.
    pub(super) fn beside(&self, name: &str) -> Result<Option<OpenTar>> {
        let Some(directory) = &self.directory else { return Ok(None) };
        find(directory, name)?.map(|path| open(&path)).transpose()
    }

    /// `backup_manifest`, if it lies there, and when it was written.
    pub(super) fn list(&self) -> Result<Option<(Vec<u8>, i64)>> {
        let Some(path) = self.directory.as_ref().map(|directory| directory.join("backup_manifest")) else {
            return Ok(None);
        };
        let Ok(metadata) = std::fs::metadata(&path) else { return Ok(None) };
        if !metadata.is_file() || metadata.len() > listed::BYTES_MAX {
            return Err(no(format!("{} is no file of the size that it may have", path.display())).into());
        }
        let mut list = Vec::new();
        let read = File::open(&path).and_then(|file| file.take(listed::BYTES_MAX).read_to_end(&mut list));
        read.with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Some((list, metadata.mtime())))
    }
}

impl OpenTar {
    /// Reads it; once `stop` says so, no longer.
    pub(super) fn reader<'a>(&'a self, stop: &'a dyn Fn() -> bool) -> Stoppable<'a> {
        Stoppable { file: &self.file, stop }
    }
}

/// Reads what may never come.
pub(super) struct Stoppable<'a> {
    file: &'a File,
    stop: &'a dyn Fn() -> bool,
}

impl io::Read for Stoppable<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            if (self.stop)() {
                return Err(io::Error::other("stopped"));
            }
            match poll(&mut [PollFd::new(self.file, PollFlags::IN)], Some(&STOP_POLL)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => return self.file.read(into),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn open(path: &Path) -> Result<OpenTar> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    if file.metadata().is_ok_and(|metadata| metadata.is_dir()) {
        return Err(no(format!("{} is a directory", path.display())).into());
    }
    // Advice: a file system that has no use for it loses us nothing.
    let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Sequential);
    Ok(OpenTar { shown: path.display().to_string(), file: widened(file) })
}

/// The one file `<name>.tar` in `directory`, however compressed.
fn find(directory: &Path, name: &str) -> Result<Option<PathBuf>> {
    let paths = ENDINGS.map(|ending| directory.join(format!("{name}.tar{ending}")));
    let mut found = paths.into_iter().filter(|path| path.is_file());
    match (found.next(), found.next()) {
        (Some(one), Some(other)) => Err(no(format!("{} and {} are both there", one.display(), other.display()))
            .hint("remove the one that is not of this base backup")
            .into()),
        (found, _) => Ok(found),
    }
}

fn directory_of(file: &Path) -> PathBuf {
    file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned()
}

/// A pipe that holds more; what is no pipe stays as it is.
fn widened(file: File) -> File {
    let _ = rustix::pipe::fcntl_setpipe_size(file.as_fd(), PIPE_BYTES);
    file
}
