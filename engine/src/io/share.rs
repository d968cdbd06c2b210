//! Bytes that two files share, instead of a copy of them: `FICLONERANGE`, on file systems that copy on write.
//!
//! The kernel says itself whether it can: each request is asked, none is guessed. Of what it refuses a part may be shared
//! all the same: whoever is refused writes all of it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::{Error, Result};

/// The answer to a request to share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// The bytes are shared; durable after the next sync.
    Done,
    /// Not all of them are, and why.
    Refused(&'static str),
}

/// Lets `bytes` of `to` from `to_offset` on be those of `from` at `offset`.
pub(super) fn share(from: &File, offset: u64, to: &File, to_offset: u64, bytes: u64) -> io::Result<Sharing> {
    let request = libc::file_clone_range {
        src_fd: i64::from(from.as_raw_fd()),
        src_offset: offset,
        src_length: bytes,
        dest_offset: to_offset,
    };
    loop {
        // SAFETY: both descriptors are open for as long as the borrowed files live, and the kernel only reads the
        // structure, which outlives the call.
        let result = unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONERANGE, &raw const request) };
        if result == 0 {
            return Ok(Sharing::Done);
        }
        let cause = io::Error::last_os_error();
        if cause.kind() != io::ErrorKind::Interrupted {
            return refusal(&cause).map_or(Err(cause), |why| Ok(Sharing::Refused(why)));
        }
    }
}

/// Why the kernel does not share, where that is not a failure: the bytes can be copied.
fn refusal(cause: &io::Error) -> Option<&'static str> {
    match Errno::from_io_error(cause)? {
        Errno::XDEV => Some("it is on another file system than the repository"),
        Errno::OPNOTSUPP | Errno::NOTTY | Errno::NOSYS => Some("its file system cannot share blocks between files"),
        Errno::INVAL => Some("its file system refuses to share these blocks (chattr +C on one of the two, perhaps)"),
        Errno::PERM | Errno::ACCESS | Errno::TXTBSY => Some("sharing blocks between files is not permitted"),
        // One allocation group may be full of owners of blocks; where the disk is, the copy says so.
        Errno::NOSPC | Errno::DQUOT | Errno::AGAIN => {
            Some("the file system has no room to note who shares these blocks")
        }
        _ => None,
    }
}

/// Whether files in `directory` can share the first `bytes` of the file `from`: tried with a file that never has a name.
pub fn can_share(from: &Path, bytes: u64, directory: &Path) -> Result<Sharing> {
    let source = File::open(from).map_err(|cause| Error::io("open", from, cause))?;
    let unnamed = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::open(directory, unnamed, Mode::from_raw_mode(0o600)) {
        Ok(target) => share(&source, 0, &File::from(target), 0, bytes)
            .map_err(|cause| Error::io("share blocks with a file in", directory, cause)),
        // Whatever can share can make such files.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {
            Ok(Sharing::Refused("its file system cannot share blocks between files"))
        }
        Err(cause) => Err(Error::io("make a file in", directory, cause)),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_refusal_is_no_failure_and_a_failure_no_refusal() {
        for errno in [libc::EXDEV, libc::EOPNOTSUPP, libc::ENOTTY, libc::EINVAL, libc::EPERM, libc::ENOSPC] {
            assert!(refusal(&io::Error::from_raw_os_error(errno)).is_some(), "{errno}");
        }
        for errno in [libc::EIO, libc::EROFS] {
            assert!(refusal(&io::Error::from_raw_os_error(errno)).is_none(), "{errno}");
        }
    }

    #[test]
    fn another_file_system_is_refused_and_nothing_is_left() {
        let directory = tempfile::tempdir().unwrap();
        // procfs shares nothing with anybody.
        let answer = can_share(Path::new("/proc/self/status"), 4096, directory.path()).unwrap();
        assert!(matches!(answer, Sharing::Refused(_)), "{answer:?}");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
