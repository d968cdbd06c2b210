//! What all processes below this one have used, and have in memory, from `/proc`.
//!
//! This process is the subreaper of all that it starts (`PR_SET_CHILD_SUBREAPER`), so a daemon, such as the server of a
//! mount or a postmaster, stays below it. A process's own processor time and that of the children it has waited for,
//! summed over all that live, only grows, and misses nobody: nothing is sampled. It comes in ticks of 10 ms.

use std::fs;
use std::path::Path;

use rustix::process::{Pid, Signal, WaitOptions};

/// Orphans become children of this process, from now on.
pub(crate) fn adopt_orphans() -> rustix::io::Result<()> {
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
}

/// The processes below `pid`, in no order; those that end meanwhile may be missing.
fn below(pid: i32, found: &mut Vec<i32>) {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return };
    for task in tasks.flatten() {
        let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        for child in children.split_ascii_whitespace().filter_map(|child| child.parse().ok()) {
            found.push(child);
            below(child, found);
        }
    }
}

/// All processes below this one.
pub(crate) fn descendants() -> Vec<i32> {
    let mut found = Vec::new();
    below(rustix::process::getpid().as_raw_nonzero().get(), &mut found);
    found
}

/// Seconds of processor time that everything below this process has used up to now.
pub(crate) fn cpu_seconds() -> f64 {
    let own: u64 = times("/proc/self").map_or(0, |times| times[2] + times[3]);
    let below: u64 = descendants().iter().filter_map(|pid| times(format!("/proc/{pid}"))).flatten().sum();
    (own + below) as f64 / rustix::param::clock_ticks_per_second() as f64
}

/// Seconds of processor time of this process alone, its threads and the kernel's part.
pub(crate) fn own_cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Ticks in user mode and in the kernel, of the process and of the children it has waited for.
fn times(process: impl AsRef<Path>) -> Option<[u64; 4]> {
    let stat = fs::read_to_string(process.as_ref().join("stat")).ok()?;
    parse_times(&stat)
}

/// The name, in parentheses, may have anything in it: fields are counted behind the last of them.
fn parse_times(stat: &str) -> Option<[u64; 4]> {
    let fields: Vec<_> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    let tick = |index: usize| fields.get(index)?.parse().ok();
    Some([tick(11)?, tick(12)?, tick(13)?, tick(14)?])
}

/// Resident bytes of these processes, huge pages included. What they share is counted for each of them.
pub(crate) fn resident_bytes(processes: &[i32]) -> u64 {
    processes
        .iter()
        .filter_map(|pid| fs::read_to_string(format!("/proc/{pid}/status")).ok())
        .map(|s| parse_resident(&s))
        .sum()
}

/// The largest of the most bytes that each of these processes has had in memory, by the kernel's count.
pub(crate) fn peak_bytes(processes: &[i32]) -> u64 {
    let peak = |pid: &i32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
        line.split_ascii_whitespace().nth(1)?.parse::<u64>().ok()
    };
    processes.iter().filter_map(peak).max().unwrap_or(0) * 1024
}

fn parse_resident(status: &str) -> u64 {
    let kib = |line: &str| line.split_ascii_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok());
    let counted = |line: &&str| line.starts_with("VmRSS:") || line.starts_with("HugetlbPages:");
    status.lines().filter(counted).filter_map(kib).sum::<u64>() * 1024
}

/// Waits for those orphans that have ended. Only while no child of our own is waited for.
pub(crate) fn reap_orphans() {
    while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {}
}

/// Asks these processes to end, or ends them.
pub(crate) fn signal(processes: &[i32], signal: Signal) {
    for pid in processes.iter().filter_map(|pid| Pid::from_raw(*pid)) {
        // One that has ended meanwhile needs no signal.
        let _ = rustix::process::kill_process(pid, signal);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_and_blanks_moves_no_field() {
        let stat = "12 (a) b (c) S 1 12 12 0 -1 4194560 100 200 0 0 7 8 9 10 20 0 1 0";
        assert_eq!(parse_times(stat), Some([7, 8, 9, 10]));
        assert_eq!(parse_times("12 (a) S 1"), None);
    }

    #[test]
    fn huge_pages_are_resident_too() {
        let status = "Name:\tx\nVmHWM:\t  900 kB\nVmRSS:\t  100 kB\nHugetlbPages:\t  2048 kB\n";
        assert_eq!(parse_resident(status), 2148 * 1024);
    }
}
