//! What the system lets this process have.
//!
//! Most systems let a process open 1024 files and raise that itself, to the hard limit: the low number is for programs
//! that call `select`, and none of ours does. A copier with many cores and a mount of many packs need more.
//!
//! What this process starts inherits the limit. PostgreSQL bounds itself by `max_files_per_process`; for programs that
//! close every descriptor that they could have, the limit is raised no further than anybody here can use.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// 256 workers of the copier with all their buffers, and a few thousand open files of a mount.
const OPEN_FILES_WANTED: u64 = 1 << 16;

/// Raises the number of files that this process may have open, as far as it is allowed to.
pub(crate) fn raise_open_files() {
    let found = getrlimit(Resource::Nofile);
    let wanted = found.maximum.map_or(OPEN_FILES_WANTED, |most| most.min(OPEN_FILES_WANTED));
    if found.current.is_some_and(|current| current < wanted) {
        // Refused in no known case; whoever opens files keeps to the limit that there is.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum: found.maximum });
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn the_soft_limit_rises_to_the_hard_one_and_no_further_than_is_of_use() {
        raise_open_files();
        let found = getrlimit(Resource::Nofile);
        let most = found.maximum.unwrap_or(u64::MAX);
        assert!(found.current.unwrap_or(u64::MAX) >= most.min(OPEN_FILES_WANTED));
        assert_eq!(found.maximum, getrlimit(Resource::Nofile).maximum);
    }
}
