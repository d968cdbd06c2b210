//! A mount with an end.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use fusefs::{mounting, table};

use crate::support::*;

/// No test needs its mount longer.
const TIME_LIMIT: Duration = Duration::from_secs(300);

/// A mount of a test; unmounted with its guard, and aborted when it takes too long.
pub struct Mounted {
    pub mountpoint: PathBuf,
    pub log: PathBuf,
    pub pghydrant: Pghydrant,
    watchdog: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Mounted {
    /// Watches over a mount that is there.
    pub fn watch(mountpoint: &Path, log: PathBuf, pghydrant: &Pghydrant) -> Result<Self> {
        let (stop, stopped) = channel();
        let place = mountpoint.to_owned();
        let watchdog = std::thread::Builder::new().name("watchdog".into()).spawn(move || {
            if stopped.recv_timeout(TIME_LIMIT) == Err(RecvTimeoutError::Timeout) {
                eprintln!("{} took longer than {TIME_LIMIT:?}: aborted", place.display());
                end(&place);
            }
        })?;
        Ok(Self {
            mountpoint: mountpoint.to_owned(),
            log,
            pghydrant: pghydrant.clone(),
            watchdog: Some((stop, watchdog)),
        })
    }

    pub fn join(&self, path: impl AsRef<Path>) -> PathBuf {
        self.mountpoint.join(path)
    }

    /// The process that serves it.
    pub fn server(&self) -> Result<u32> {
        let served = table::served(&self.mountpoint).context("the mount has no server")?;
        Ok(u32::try_from(served.process)?)
    }

    /// The most memory that its server had, and what a server may have whatever it serves: the program, the chunks of the
    /// manifest that it keeps, and each thread's memory for stored bytes and for a reply.
    pub fn peak_and_limit(&self) -> Result<(u64, u64)> {
        const PROGRAM_BYTES: u64 = 44 << 20;
        let threads = fusefs::session::threads() + std::thread::available_parallelism()?.get();
        let limit = PROGRAM_BYTES + (threads * 2 * engine::io::BUFFER_BYTES) as u64;
        let status = fs::read_to_string(format!("/proc/{}/status", self.server()?))?;
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
        Ok((peak.trim().trim_end_matches(" kB").parse::<u64>()? << 10, limit))
    }

    pub fn log(&self) -> Result<String> {
        fs::read_to_string(&self.log).with_context(|| format!("cannot read {}", self.log.display()))
    }

    pub fn is_mounted(&self) -> bool {
        table::mount_at(&self.mountpoint).is_ok_and(|mount| mount.is_some())
    }

    /// `pghydrant unmount`, whatever it answers.
    pub fn unmount(&self) -> Result<Finished> {
        self.pghydrant.run(["unmount".as_ref(), self.mountpoint.as_os_str()])
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Some((stop, watchdog)) = self.watchdog.take() {
            drop(stop);
            let _ = watchdog.join();
        }
        end(&self.mountpoint);
    }
}

/// Takes whatever is mounted there away, and wakes its readers if it must.
fn end(mountpoint: &Path) {
    let Ok(Some(mount)) = table::mount_at(mountpoint) else { return };
    if mount.is_ours() {
        let _ = mounting::abort(&mount);
        let _ = mounting::unmount(mountpoint, true);
    }
}

/// Whether a process is there, and no zombie.
pub fn runs(process: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    status.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with(['Z', 'X']))
}

/// The errno of a failed call.
pub fn errno<T>(outcome: std::io::Result<T>) -> Option<i32> {
    outcome.err().and_then(|error| error.raw_os_error())
}

/// The names in a directory.
pub fn names(directory: &Path) -> Result<BTreeSet<String>> {
    let names = fs::read_dir(directory)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    names.collect()
}

/// Opens a file for reads past the page cache.
pub fn direct(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path)
}

/// The user that the tests run as: root.
pub fn root() -> OsUser {
    OsUser::current()
}
