//! Exit codes, and the failure that knows which one it is.

use std::ffi::OsString;
use std::fmt;

/// How a command ended. Done is the only 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Exit {
    /// Everything that was asked for is done.
    Done = 0,
    /// It failed.
    Failed = 1,
    /// The command line or a setting is wrong.
    Usage = 2,
    /// Preflight found reasons not to begin; nothing was touched.
    Refused = 3,
    /// Stored bytes are not what was written.
    Corrupt = 4,
    /// The copy is good, PostgreSQL's recovery failed.
    Recovery = 5,
    /// The session waits for `pghydrant retry`.
    Waiting = 6,
    /// It is complete, and was damaged at the source: pages of a backup with a wrong checksum, or what the check of a
    /// restored server found.
    DamagedPages = 7,
    /// Ended by the user.
    Interrupted = 130,
    /// `wal fetch` alone: proven that there is no such segment. Ends with 1, see [`Faults::code_of`].
    NoSuchSegment = 255,
}

impl Exit {
    /// What a process of ours that ended with this status meant; a signal, and what we do not know, is a failure.
    pub(crate) fn of_code(code: u8) -> Self {
        use Exit::{Corrupt, DamagedPages, Done, Failed, Interrupted, Recovery, Refused, Usage, Waiting};
        let known = [Done, Failed, Usage, Refused, Corrupt, Recovery, Waiting, DamagedPages, Interrupted];
        known.into_iter().find(|exit| *exit as u8 == code).unwrap_or(Failed)
    }
}

/// The table in `--help`.
pub(crate) const TABLE: &str = "\
Exit codes:
  0    done
  1    failed (wal fetch: there is no such segment)
  2    usage
  3    refused by preflight; nothing was touched
  4    the repository is corrupt
  5    recovery failed
  6    waiting for `pghydrant retry`
  7    complete, but something was damaged at the source: pages of a backup, or what restore --check found
  130  interrupted
  254  wal fetch: a fault (PostgreSQL stops instead of taking it for the end of the WAL)";

/// A failure with its exit code and the cure.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) exit: Exit,
    pub(crate) message: String,
    pub(crate) hint: Option<String>,
}

impl Failure {
    pub(crate) fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into(), hint: None }
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The exit code of an error, wherever in its chain the reason stands.
    pub(crate) fn exit_of(error: &anyhow::Error) -> Exit {
        let from_cause = |cause: &(dyn std::error::Error + 'static)| {
            cause.downcast_ref::<Self>().map(|failure| failure.exit).or_else(|| {
                cause.downcast_ref::<engine::Error>().map(|error| match error {
                    engine::Error::Corrupt { .. } => Exit::Corrupt,
                    engine::Error::Cancelled => Exit::Interrupted,
                    engine::Error::Io { .. }
                    | engine::Error::NotFound(_)
                    | engine::Error::Unsupported { .. }
                    | engine::Error::Locked { .. }
                    | engine::Error::Refused(_) => Exit::Failed,
                })
            })
        };
        error.chain().find_map(from_cause).unwrap_or(Exit::Failed)
    }

    /// The cure, if the error or its cause knows one.
    pub(crate) fn hint_of(error: &anyhow::Error) -> Option<String> {
        error.chain().find_map(|cause| cause.downcast_ref::<Self>().and_then(|failure| failure.hint.clone()))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// Which status a fault ends with: for a `restore_command` everything but "no such segment" lies above 125.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Faults {
    fetching: bool,
}

/// What a failed `wal fetch` ends with.
const FETCH_FAULT: u8 = 254;
const _: () = assert!(FETCH_FAULT > 125);

impl Faults {
    /// Looks at the words themselves, before the parser can refuse them: `wal` and, anywhere behind it, `fetch`.
    pub(crate) fn of_command_line(words: impl Iterator<Item = OsString>) -> Self {
        let fetching = words.skip_while(|word| word != "wal").any(|word| word == "fetch");
        Self { fetching }
    }

    /// The status to end with.
    pub(crate) fn code_of(self, exit: Exit) -> u8 {
        match exit {
            Exit::Done => 0,
            Exit::NoSuchSegment => 1,
            _ if self.fetching => FETCH_FAULT,
            failed => failed as u8,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(words: &[&str]) -> Faults {
        Faults::of_command_line(words.iter().map(OsString::from))
    }

    #[test]
    fn no_failure_of_a_restore_command_looks_like_the_end_of_the_wal() {
        for words in
            [&["wal", "fetch"][..], &["--config", "x", "wal", "--bad", "fetch", "a"], &["wal", "fetch", "--help=1"]]
        {
            for exit in [Exit::Failed, Exit::Usage, Exit::Refused, Exit::Corrupt, Exit::Interrupted] {
                assert!(faults(words).code_of(exit) > 125, "{words:?} {exit:?}");
            }
            assert_eq!(faults(words).code_of(Exit::Done), 0);
            assert_eq!(faults(words).code_of(Exit::NoSuchSegment), 1);
        }
        assert_eq!(faults(&["wal", "push"]).code_of(Exit::Failed), 1);
    }

    #[test]
    fn an_engine_error_keeps_its_exit_code_under_context() {
        let error = anyhow::Error::from(engine::Error::corrupt("p", "x")).context("while restoring");
        assert_eq!(Failure::exit_of(&error), Exit::Corrupt);
    }
}
