//! `postmaster.pid`: who runs in a data directory, where it listens and how far it is.
//!
//! The file outlives a crash, and its process number may by then belong to someone else; so a process is only taken
//! for the postmaster if it works in that directory, as far as the kernel lets us look (see [`engine::process`]).

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

/// The status in the last line of `postmaster.pid`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    /// Starting up: no connections yet.
    Starting,
    /// Shutting down.
    Stopping,
    /// Accepting connections.
    Ready,
    /// Up, in recovery, and not (yet) accepting connections.
    Standby,
}

/// `postmaster.pid`, line by line; later lines appear while the server starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PostmasterFile {
    /// Process number.
    pub(crate) pid: u32,
    /// Data directory as the server named it.
    pub(crate) data_directory: PathBuf,
    /// Start, seconds since 1970.
    pub(crate) started_unix: i64,
    /// Port, once it is known.
    pub(crate) port: Option<u16>,
    /// First socket directory; none if the server has no Unix sockets.
    pub(crate) socket_directory: Option<PathBuf>,
    /// First address of `listen_addresses`: `*` for all.
    pub(crate) listen_address: Option<String>,
    /// How far the server is.
    pub(crate) status: Option<Status>,
}

impl PostmasterFile {
    /// The file's lines. Nothing if the first three are not there yet.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        // A stand-alone backend writes its number negated.
        let pid = lines.next()?.trim().trim_start_matches('-').parse().ok().filter(|pid| *pid > 0)?;
        let data_directory = PathBuf::from(lines.next()?);
        let started_unix = lines.next()?.trim().parse().ok()?;
        let port = lines.next().and_then(|line| line.trim().parse().ok());
        let mut named = || lines.next().map(str::trim_end).filter(|line| !line.is_empty()).map(str::to_owned);
        let socket_directory = named().map(PathBuf::from);
        let listen_address = named();
        let status = lines.nth(1).and_then(|line| match line.trim() {
            "starting" => Some(Status::Starting),
            "stopping" => Some(Status::Stopping),
            "ready" => Some(Status::Ready),
            "standby" => Some(Status::Standby),
            _ => None,
        });
        Some(Self { pid, data_directory, started_unix, port, socket_directory, listen_address, status })
    }

    /// The file of a data directory; nothing where there is none or where it is still being written.
    pub(crate) fn read(data_directory: &Path) -> Result<Option<Self>> {
        let path = data_directory.join("postmaster.pid");
        match std::fs::read_to_string(&path) {
            Ok(text) => Ok(Self::parse(&text)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    /// Whether the process is there and works in `data_directory`.
    pub(crate) fn is_alive(&self, data_directory: &Path) -> bool {
        engine::process::works_in(self.pid, Some(self.started_unix), data_directory)
    }
}

/// The postmaster that runs in `data_directory`, if one does.
pub(crate) fn running_in(data_directory: &Path) -> Result<Option<PostmasterFile>> {
    Ok(PostmasterFile::read(data_directory)?.filter(|file| file.is_alive(data_directory)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_file_is_read_as_the_server_writes_it() {
        let text = "4711\n/srv/pg\n1763798400\n5433\n/run/postgresql\nlocalhost\n  5433001    131072\nready   \n";
        let file = PostmasterFile::parse(text).unwrap();
        assert_eq!((file.pid, file.port, file.status), (4711, Some(5433), Some(Status::Ready)));
        assert_eq!(file.socket_directory, Some(PathBuf::from("/run/postgresql")));
        assert_eq!(file.listen_address.as_deref(), Some("localhost"));
    }

    #[test]
    fn a_server_without_sockets_or_still_starting_has_empty_or_missing_lines() {
        let file = PostmasterFile::parse("4711\n/srv/pg\n1763798400\n5433\n\n*\n").unwrap();
        assert_eq!((file.socket_directory, file.status), (None, None));
        assert_eq!(file.listen_address.as_deref(), Some("*"));
        assert_eq!(PostmasterFile::parse("4711\n/srv/pg\n"), None);
        assert_eq!(PostmasterFile::parse(""), None);
        assert_eq!(PostmasterFile::parse("0\n/srv/pg\n1\n"), None);
    }

    #[test]
    fn a_number_that_now_belongs_to_another_process_is_not_the_postmaster() {
        let directory = tempfile::tempdir().unwrap();
        let text = format!("{}\n{}\n1\n", std::process::id(), directory.path().display());
        std::fs::write(directory.path().join("postmaster.pid"), text).unwrap();
        assert_eq!(running_in(directory.path()).unwrap(), None);
    }
}
