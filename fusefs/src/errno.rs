//! What a reader of the mount is told: an errno for each of the engine's errors.
//!
//! Exhaustive on purpose, without a `_` arm: a new kind of error has to be placed here, so that "busy" or "corrupt"
//! never becomes "not found" by default.

use engine::Error;

/// The errno for an error met while looking at names and attributes.
///
/// What the kernel said about the repository's own files is not passed on: a pack that is gone is an I/O error of the
/// mount, and not "no such file" for the file that was asked for.
pub fn of(error: &Error) -> i32 {
    match error {
        Error::Io { .. } | Error::Corrupt { .. } | Error::Unsupported { .. } => libc::EIO,
        Error::NotFound(_) => libc::ENOENT,
        Error::Locked { .. } => libc::EBUSY,
        Error::Refused(_) => libc::EPERM,
        Error::Cancelled => libc::EINTR,
    }
}

/// The errno for an error met while reading content: the file exists, so nothing may be "not found".
pub fn of_read(error: &Error) -> i32 {
    match of(error) {
        libc::ENOENT => libc::EIO,
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[test]
    fn a_missing_or_damaged_pack_is_an_io_error_and_never_no_such_file() {
        let missing = Error::io("open", "packs/00000001.pack", io::Error::from_raw_os_error(libc::ENOENT));
        let damaged = Error::corrupt("packs/00000001.pack", "expected BLAKE3 00, found 11");
        for error in [missing, damaged] {
            assert_eq!(of(&error), libc::EIO);
            assert_eq!(of_read(&error), libc::EIO);
        }
        assert_eq!(of_read(&Error::NotFound("pack 1".into())), libc::EIO);
        assert_eq!(of(&Error::NotFound("backup x".into())), libc::ENOENT);
    }
}
