//! Taking mounts away: the user's, with reasons where it cannot be done, and what crashed servers left.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use engine::{Error, Result};
use fusefs::mounting;
use fusefs::table::{self, Health};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::UnmountArguments;
use crate::context::Context;
use crate::exit::{Exit, Failure};

/// How long the server may take to end after its mount is gone.
const SERVER_END_WAIT: Duration = Duration::from_secs(30);
/// How long one whose restore is gone may take: it gives readers two seconds.
const FORMER_SERVER_WAIT: Duration = Duration::from_secs(5);
/// More users of a mount than this are not named.
const HOLDERS_NAMED_MAX: usize = 5;

/// `unmount`: waits until the server has ended, so that what follows finds nothing of it.
pub(super) fn run(arguments: &UnmountArguments, context: &Context) -> anyhow::Result<Exit> {
    let mountpoint = table::resolve(&arguments.mountpoint)?;
    refuse_unless_ours(&mountpoint)?;
    let server = match table::health(&mountpoint) {
        Health::Alive => server_of(&mountpoint),
        Health::Stale => {
            mounting::unmount(&mountpoint, true)?;
            context.output.note(&format!("the server of {} was gone", mountpoint.display()));
            return Ok(Exit::Done);
        }
        Health::Hung => return Err(hung(&mountpoint).into()),
        Health::Failing(cause) => return Err(Error::io("ask", &mountpoint, cause).into()),
    };
    mounting::unmount(&mountpoint, false).map_err(|error| explain(error, &mountpoint))?;
    if let Some(server) = server {
        wait_for(server, &mountpoint, SERVER_END_WAIT)?;
    }
    Ok(Exit::Done)
}

/// Takes a mount of ours away whose server is gone; one that is alive is refused. True if there was one.
pub(super) fn clear_stale(mountpoint: &Path) -> Result<bool> {
    let Some(mount) = table::mount_at(mountpoint)? else { return Ok(false) };
    if mount.is_ours() && matches!(table::health(mountpoint), Health::Stale) {
        mounting::unmount(mountpoint, true)?;
        return Ok(true);
    }
    let what = if mount.is_ours() { mount.source } else { format!("a mount of type {}", mount.file_system_type) };
    Err(Error::Refused(format!("{} is in use: {what} is mounted there", mountpoint.display())))
}

/// Takes whatever of ours is mounted at a session's own mountpoint away: its server belonged to a run of the same session
/// that is over. True if there was anything.
pub(super) fn clear_leftover(mountpoint: &Path) -> Result<bool> {
    // It ends by itself, and takes away what is mounted there: that must not be the next mount.
    for server in servers_of(mountpoint) {
        wait_for(server, mountpoint, FORMER_SERVER_WAIT)
            .unwrap_or_else(|error| tracing::warn!("a former server of {}: {error:#}", mountpoint.display()));
    }
    let Some(mount) = table::mount_at(mountpoint)?.filter(table::Mount::is_ours) else { return Ok(false) };
    if matches!(table::health(mountpoint), Health::Hung) {
        // Wakes its readers; where that is not possible, the end of the server does.
        let _ = mounting::abort(&mount);
        for server in servers_of(mountpoint) {
            // Nobody else serves a session's own mountpoint; one that waits for a disk ends when that answers.
            let _ = rustix::process::kill_process(server, rustix::process::Signal::KILL);
        }
    }
    match mounting::unmount(mountpoint, true) {
        // Its server was ending and did the same just now.
        Err(_) if table::mount_at(mountpoint)?.is_none_or(|mount| !mount.is_ours()) => Ok(true),
        outcome => outcome.map(|()| true),
    }
}

fn refuse_unless_ours(mountpoint: &Path) -> anyhow::Result<()> {
    let refuse = |what: &str| Failure::new(Exit::Failed, format!("{} is {what}", mountpoint.display()));
    match table::mount_at(mountpoint)? {
        Some(mount) if mount.is_ours() => Ok(()),
        Some(mount) => Err(refuse(&format!("a mount of type {}, not one of pghydrant", mount.file_system_type)).into()),
        None => Err(refuse("not a mount of pghydrant").into()),
    }
}

fn server_of(mountpoint: &Path) -> Option<Pid> {
    table::served(mountpoint).and_then(|served| Pid::from_raw(served.process))
}

/// The servers that were started for a mountpoint, by their command lines: also one that has already unmounted it.
fn servers_of(mountpoint: &Path) -> Vec<Pid> {
    let Ok(processes) = std::fs::read_dir("/proc") else { return Vec::new() };
    let server = |process: std::fs::DirEntry| {
        let pid = Pid::from_raw(process.file_name().to_str()?.parse().ok()?)?;
        let line = std::fs::read(process.path().join("cmdline")).ok()?;
        let mut words = line.split(|byte| *byte == 0).skip_while(|word| *word != b"fuse-server");
        (words.next().is_some() && words.any(|word| word == mountpoint.as_os_str().as_bytes())).then_some(pid)
    };
    processes.flatten().filter_map(server).collect()
}

/// A mount whose server does not answer is left in place: whoever stopped the server may let it go on.
fn hung(mountpoint: &Path) -> Failure {
    let failure = Failure::new(Exit::Failed, format!("{}: its server does not answer", mountpoint.display()));
    match servers_of(mountpoint).first() {
        Some(server) => failure.hint(format!(
            "process {server} serves it: `kill -CONT {server}` lets it go on if it was stopped, `kill -KILL {server}` ends it; then unmount again"
        )),
        None => failure.hint("no process serves it any more that this user can see"),
    }
}

/// Says who uses the mount, where that is why it cannot be taken away.
fn explain(error: Error, mountpoint: &Path) -> anyhow::Error {
    let busy = match &error {
        Error::Io { source, .. } => source.kind() == std::io::ErrorKind::ResourceBusy,
        _ => false,
    };
    if !busy {
        return error.into();
    }
    let holders = holders(mountpoint);
    let hint = match holders.len() {
        0 => "a process of another user, or another mount below it, uses it".to_owned(),
        count => {
            let named = holders.into_iter().take(HOLDERS_NAMED_MAX).collect::<Vec<_>>().join(", ");
            let more = count.saturating_sub(HOLDERS_NAMED_MAX);
            if more == 0 { format!("in use by {named}") } else { format!("in use by {named} and {more} more") }
        }
    };
    Failure::new(Exit::Failed, error.to_string()).hint(hint).into()
}

/// The processes that have something of the mount open, as far as this user may see them: `postgres (4711)`.
fn holders(mountpoint: &Path) -> Vec<String> {
    let Ok(processes) = std::fs::read_dir("/proc") else { return Vec::new() };
    let is_number = |name: &std::ffi::OsStr| name.as_bytes().iter().all(u8::is_ascii_digit);
    let mut holders = Vec::new();
    for process in processes.flatten().filter(|process| is_number(&process.file_name())) {
        let directory = process.path();
        if holds(&directory, mountpoint) {
            let name = std::fs::read_to_string(directory.join("comm")).unwrap_or_default();
            holders.push(format!("{} ({})", name.trim(), process.file_name().to_string_lossy()));
        }
    }
    holders
}

/// Looks at links and names alone: nothing of the mount is touched.
fn holds(process: &Path, mountpoint: &Path) -> bool {
    let points_below = |link: &Path| std::fs::read_link(link).is_ok_and(|target| target.starts_with(mountpoint));
    if ["cwd", "root", "exe"].into_iter().any(|link| points_below(&process.join(link))) {
        return true;
    }
    let files = std::fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
    if files.into_iter().any(|file| points_below(&file.path())) {
        return true;
    }
    let maps = std::fs::read_to_string(process.join("maps")).unwrap_or_default();
    let mut mapped = maps.lines().filter_map(|line| line.find('/').map(|start| Path::new(&line[start..])));
    mapped.any(|file| file.starts_with(mountpoint))
}

fn wait_for(server: Pid, mountpoint: &Path, patience: Duration) -> anyhow::Result<()> {
    // One that cannot be opened has ended already.
    let Ok(process) = pidfd_open(server, PidfdFlags::empty()) else { return Ok(()) };
    let patience = Timespec { tv_sec: i64::try_from(patience.as_secs())?, tv_nsec: 0 };
    let ended = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&patience))
        .map_err(|cause| Error::io("wait for the server of", mountpoint, cause))?;
    if ended == 0 {
        let message = format!("{} is unmounted, but its server (process {server}) has not ended", mountpoint.display());
        return Err(Failure::new(Exit::Failed, message).into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_is_no_mount_of_ours_is_refused_by_name() {
        let place = tempfile::tempdir().unwrap();
        let refused = refuse_unless_ours(place.path()).unwrap_err();
        assert_eq!(refused.to_string(), format!("{} is not a mount of pghydrant", place.path().display()));
        assert!(refuse_unless_ours(Path::new("/proc")).unwrap_err().to_string().contains("type proc"));
        assert!(!clear_stale(place.path()).unwrap());
        assert!(matches!(clear_stale(Path::new("/proc")), Err(Error::Refused(_))));
        assert!(!clear_leftover(Path::new("/proc")).unwrap());
    }

    #[test]
    fn a_process_with_an_open_file_is_named() {
        let place = tempfile::tempdir().unwrap();
        let place = place.path().canonicalize().unwrap();
        assert!(holders(&place).is_empty());
        let _open = std::fs::File::create(place.join("file")).unwrap();
        assert!(holders(&place).iter().any(|holder| holder.ends_with(&format!("({})", std::process::id()))));
    }
}
