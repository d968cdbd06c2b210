//! Whether the process that a file names is still that process.
//!
//! A `postmaster.pid` outlives a crash, and its number may by then belong to a stranger: soon after a reboot, and in
//! containers, whose numbers repeat. A server works in its data directory, so where the kernel lets us look, that
//! decides. It shows the working directory of another user's process to nobody but root, and not to every root: in
//! containers this privilege (`CAP_SYS_PTRACE`) is often missing. There a process is a stranger that began after the
//! server had written when it began. What is assumed: nobody sets the clock forward while a server runs.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};

/// A server's start as it writes it itself, and as the kernel counts it: rounded, and with a clock that is slewed.
const TOLERANCE_SECONDS: i64 = 10;

/// Whether process `number`, which says that it began at `started_unix`, is there and works in `directory`. What cannot
/// be told counts as such.
pub fn works_in(number: u32, started_unix: Option<i64>, directory: &Path) -> bool {
    let Some(pid) = i32::try_from(number).ok().and_then(Pid::from_raw) else { return false };
    // EPERM means that it exists and is another user's.
    if test_kill_process(pid) == Err(Errno::SRCH) {
        return false;
    }
    let place = PathBuf::from(format!("/proc/{number}"));
    if let Ok(working_directory) = fs::read_link(place.join("cwd")) {
        return fs::canonicalize(directory).map_or(true, |directory| directory == working_directory);
    }
    let Some(status) = fs::read_to_string(place.join("stat")).ok().as_deref().and_then(Status::parse) else {
        return true;
    };
    if status.has_ended {
        return false;
    }
    let (Some(written), Some(began)) = (started_unix, status.began_unix()) else { return true };
    began <= written.saturating_add(TOLERANCE_SECONDS)
}

/// What `/proc/N/stat` says, which everybody may read.
#[derive(Debug, PartialEq, Eq)]
struct Status {
    /// A zombie: nothing of it is left but its number.
    has_ended: bool,
    /// Clock ticks since the machine was started.
    start_ticks: u64,
}

impl Status {
    /// The state is field 3, the start field 22. Field 2, the program's name, may have anything in it, `)` too.
    fn parse(text: &str) -> Option<Self> {
        let mut fields = text.rsplit_once(") ")?.1.split(' ');
        let has_ended = matches!(fields.next()?, "Z" | "X");
        Some(Self { has_ended, start_ticks: fields.nth(18)?.trim().parse().ok()? })
    }

    /// Seconds since 1970.
    fn began_unix(&self) -> Option<i64> {
        let text = fs::read_to_string("/proc/stat").ok()?;
        let booted: i64 = text.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
        let up = self.start_ticks.checked_div(rustix::param::clock_ticks_per_second())?;
        booted.checked_add(i64::try_from(up).ok()?)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::time::{SystemTime, UNIX_EPOCH};

    use super::*;

    #[test]
    fn a_programs_name_may_look_like_the_fields_behind_it() {
        let rest = "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18";
        let status = Status { has_ended: false, start_ticks: 4711 };
        assert_eq!(Status::parse(&format!("7 (a) Z 1 (b)) S {rest} 4711 99\n")), Some(status));
        assert!(Status::parse(&format!("7 (a) Z {rest} 4711 99\n")).unwrap().has_ended);
        for bad in ["", "7 (a)", "7 (a) S 1 2 3", "7 (a) S"] {
            assert_eq!(Status::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn this_process_began_before_now_and_works_where_it_works() {
        let own = std::process::id();
        let status = Status::parse(&fs::read_to_string("/proc/self/stat").unwrap()).unwrap();
        let now = i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()).unwrap();
        let began = status.began_unix().unwrap();
        assert!(!status.has_ended && began <= now + TOLERANCE_SECONDS && began > now - 24 * 3600, "{began} {now}");
        assert!(works_in(own, None, &std::env::current_dir().unwrap()));
        assert!(!works_in(own, None, Path::new("/proc")));
        assert!(!works_in(0, None, Path::new("/")));
    }

    /// Another user's process: its working directory is hidden from this test unless root runs it.
    #[test]
    fn a_process_that_began_after_the_file_was_written_is_a_stranger() {
        if fs::read_link("/proc/1/cwd").is_ok() {
            return;
        }
        assert!(works_in(1, None, Path::new("/")));
        assert!(works_in(1, Some(i64::MAX), Path::new("/")));
        assert!(!works_in(1, Some(0), Path::new("/")));
    }
}
