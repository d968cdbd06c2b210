//! Errors, grouped by what the caller would do about them.
//!
//! Each carries the operation, the path, the offset where there is one, and the cause. The library adds no
//! hint: the binary knows the user's situation and adds the cure.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, by what the caller would do.
#[derive(Debug)]
pub enum Error {
    /// The machine refused: mend the disk, the permission or the space, then try again.
    Io {
        /// What was tried, as a verb: "read", "write", "sync", "create".
        operation: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The byte where it happened, where there is one.
        offset: Option<u64>,
        /// What the kernel said.
        source: io::Error,
    },
    /// Stored bytes are not what was written: the repository (or a map) is damaged. Exit code 4.
    Corrupt {
        /// The damaged file.
        path: PathBuf,
        /// The byte where the damage was found, where it is known.
        offset: Option<u64>,
        /// What was expected and what was found.
        detail: String,
    },
    /// The thing asked for does not exist: a wrong name or path.
    NotFound(String),
    /// Written by a newer version, or with a feature that this one has not.
    Unsupported {
        /// The file that says so.
        path: PathBuf,
        /// What it needs and what this version has.
        detail: String,
    },
    /// Another process holds the lock: wait, or end it.
    Locked {
        /// What is locked.
        what: String,
        /// Who holds it, as far as the lock file tells.
        holder: String,
    },
    /// Not done because it would destroy or contradict something: another segment of the same name, a file in the way.
    Refused(String),
    /// The user or the first failing worker stopped it; the map stays good.
    Cancelled,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io { operation, path, offset, source } => {
                write!(f, "cannot {operation} {}{}: {}", path.display(), at_byte(*offset), cause_text(source))
            }
            Self::Corrupt { path, offset, detail } => {
                write!(f, "{} is corrupt{}: {detail}", path.display(), at_byte(*offset))
            }
            Self::NotFound(what) | Self::Refused(what) => f.write_str(what),
            Self::Unsupported { path, detail } => write!(f, "{}: {detail}", path.display()),
            Self::Locked { what, holder } => write!(f, "{what} is locked by {holder}"),
            Self::Cancelled => f.write_str("cancelled"),
        }
    }
}

/// The sentence has its cause in it, so there is none behind it: whoever prints the chain would print it twice.
impl std::error::Error for Error {}

fn at_byte(offset: Option<u64>) -> String {
    offset.map(|byte| format!(" at byte {byte}")).unwrap_or_default()
}

/// The kernel's words without Rust's "(os error N)": lower case, as in the rest of the sentence.
fn cause_text(cause: &io::Error) -> String {
    let text = cause.to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    let mut letters = text.chars();
    match letters.next() {
        Some(first) if !text.chars().nth(1).is_some_and(char::is_uppercase) => {
            first.to_lowercase().chain(letters).collect()
        }
        _ => text.to_owned(),
    }
}

impl Error {
    /// An [`Error::Io`] without an offset.
    pub fn io(operation: &'static str, path: impl AsRef<Path>, source: impl Into<io::Error>) -> Self {
        Self::Io { operation, path: path.as_ref().to_owned(), offset: None, source: source.into() }
    }

    /// An [`Error::Io`] at a byte of a file.
    pub fn io_at(operation: &'static str, path: impl AsRef<Path>, offset: u64, source: impl Into<io::Error>) -> Self {
        Self::Io { operation, path: path.as_ref().to_owned(), offset: Some(offset), source: source.into() }
    }

    /// An [`Error::Corrupt`] without an offset.
    pub fn corrupt(path: impl AsRef<Path>, detail: impl Into<String>) -> Self {
        Self::Corrupt { path: path.as_ref().to_owned(), offset: None, detail: detail.into() }
    }

    /// An [`Error::Corrupt`] at a byte of a file.
    pub fn corrupt_at(path: impl AsRef<Path>, offset: u64, detail: impl Into<String>) -> Self {
        Self::Corrupt { path: path.as_ref().to_owned(), offset: Some(offset), detail: detail.into() }
    }

    /// The kernel's error number, where the kernel said no.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            Self::Io { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}
