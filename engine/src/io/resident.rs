//! What of a file lies in the page cache: asked of the kernel, without touching the file.

use std::fs::File;
use std::os::fd::AsRawFd;

/// `cachestat(2)`, which has this number on every architecture that Rust is built for, and no name in `libc` on most.
const CACHESTAT: libc::c_long = 451;

/// `struct cachestat_range`.
#[repr(C)]
struct Asked {
    start: u64,
    bytes: u64,
}

/// `struct cachestat`.
#[repr(C)]
#[derive(Default)]
struct Counts {
    cached: u64,
    dirty: u64,
    in_writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// Whether all of these bytes lie in the page cache. Nothing where the kernel does not tell: before Linux 6.5, and for
/// files of others.
pub(crate) fn is_resident(file: &File, start: u64, bytes: u64) -> Option<bool> {
    let end = start.checked_add(bytes)?;
    if bytes == 0 {
        return Some(true);
    }
    let (asked, mut counts) = (Asked { start, bytes }, Counts::default());
    let flags: libc::c_uint = 0;
    // SAFETY: both structures are laid out as the kernel's and live on this stack until the call has returned; it keeps
    // neither.
    let outcome = unsafe { libc::syscall(CACHESTAT, file.as_raw_fd(), &raw const asked, &raw mut counts, flags) };
    let page = rustix::param::page_size() as u64;
    (outcome == 0).then(|| counts.cached > (end - 1) / page - start / page)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn what_was_just_written_is_there_and_what_is_behind_the_end_is_not() {
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, vec![1; 10_000]).unwrap();
        let file = File::open(&path).unwrap();
        // Nothing on an older kernel. What is not written back yet stays, whoever empties the cache.
        assert_ne!(is_resident(&file, 100, 9_000), Some(false));
        assert_ne!(is_resident(&file, 0, 1 << 20), Some(true));
        assert_eq!(is_resident(&file, 5, 0), Some(true));
        assert_eq!(is_resident(&file, u64::MAX, 2), None);
    }
}
