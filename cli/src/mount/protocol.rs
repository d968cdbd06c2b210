//! What a FUSE server is told, and what it answers: a line of JSON each.

use std::io::{BufRead, Write};
use std::path::PathBuf;

use engine::units::{BackupLabel, ClusterName};
use serde::{Deserialize, Serialize};

use crate::exit::{Exit, Failure};

/// Longer than any request or answer of ours.
const LINE_BYTES_MAX: u64 = 64 << 10;

/// What to mount, where, and for whom.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Request {
    pub(super) repository: PathBuf,
    pub(super) cluster: ClusterName,
    pub(super) backup: BackupLabel,
    /// Absolute and resolved; an empty directory.
    pub(super) mountpoint: PathBuf,
    /// Shown as the owner of everything: user and group number.
    pub(super) owner: Option<(u32, u32)>,
    pub(super) allow_other: bool,
    pub(super) memory_bytes: u64,
    /// Proves to the copier that the mount is that of its own server.
    pub(super) token: String,
    /// The mount ends when stdin does.
    pub(super) with_parent: bool,
}

/// The server's one answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Answer {
    /// The mount is in place and served.
    Mounted,
    /// It is not, and why.
    Failed { message: String, hint: Option<String>, corrupt: bool },
}

impl Answer {
    pub(super) fn failed(error: &anyhow::Error) -> Self {
        Self::Failed {
            message: format!("{error:#}"),
            hint: Failure::hint_of(error),
            corrupt: Failure::exit_of(error) == Exit::Corrupt,
        }
    }

    pub(super) fn into_result(self) -> Result<(), Failure> {
        match self {
            Self::Mounted => Ok(()),
            Self::Failed { message, hint, corrupt } => {
                Err(Failure { exit: if corrupt { Exit::Corrupt } else { Exit::Failed }, message, hint })
            }
        }
    }
}

/// Writes a line.
pub(super) fn send(mut to: impl Write, message: &impl Serialize) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    to.write_all(&line)?;
    to.flush()
}

/// Reads a line; nothing if the other side is gone before its end.
pub(super) fn receive<M: for<'de> Deserialize<'de>>(from: impl BufRead) -> std::io::Result<Option<M>> {
    let mut line = Vec::new();
    from.take(LINE_BYTES_MAX).read_until(b'\n', &mut line)?;
    match line.strip_suffix(b"\n") {
        Some(line) => Ok(Some(serde_json::from_slice(line)?)),
        None => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_message_arrives_whole_or_not_at_all() {
        let mut line = Vec::new();
        send(&mut line, &Answer::Mounted).unwrap();
        assert!(matches!(receive(&line[..]).unwrap(), Some(Answer::Mounted)));
        assert!(receive::<Answer>(&line[..line.len() - 1]).unwrap().is_none());
        assert!(receive::<Answer>(&b"{}\n"[..]).is_err());
    }

    #[test]
    fn a_failure_keeps_its_exit_code_and_its_hint() {
        let corrupt = anyhow::Error::from(engine::Error::corrupt("p", "x")).context("while opening");
        let failure = Answer::failed(&corrupt).into_result().unwrap_err();
        assert_eq!((failure.exit, failure.message.as_str()), (Exit::Corrupt, "while opening: p is corrupt: x"));
        let hinted = anyhow::Error::from(Failure::new(Exit::Failed, "no").hint("do"));
        assert_eq!(Answer::failed(&hinted).into_result().unwrap_err().hint.as_deref(), Some("do"));
    }
}
