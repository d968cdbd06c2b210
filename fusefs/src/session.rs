//! One mount while it is served: the kernel's connection, and the threads that answer it.
//!
//! This must run in a process of its own, apart from every reader of the mount: a reader in the same process can wait
//! for itself, and cannot be killed then.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use engine::{Error, Result};
use fuser::{Config, Filesystem, SessionACL};

use crate::mounting::{self, MountOptions};
use crate::table;

/// What the kernel may read ahead on this mount by itself, where we may say so: one request.
const KERNEL_READ_AHEAD_BYTES: u32 = 1 << 20;
/// Threads that answer the kernel. Each waits for the repository's disk by itself, so they are as many as requests keep
/// a disk busy; and each has memory for a request and for a reply.
const THREADS_PER_CORE: usize = 4;
const THREADS_MIN: usize = 8;
const THREADS_MAX: usize = 16;

/// A mount that is being served. Dropped, it is unmounted.
#[derive(Debug)]
pub struct Session {
    own: OwnMount,
    server: Option<JoinHandle<io::Result<()>>>,
}

/// Where a session mounted, and which mount is its own: once that is gone, another may be at the same place.
#[derive(Clone, Debug)]
pub struct OwnMount {
    mountpoint: PathBuf,
    /// As the mount table has it. The kernel gives the name to another mount only after this one has ended.
    device: Option<String>,
}

impl OwnMount {
    /// Where it is.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// Takes it away, also from under its readers; what else is mounted there stays, and nothing to do is no error.
    pub fn unmount(&self) -> Result<()> {
        let there = table::mount_at(&self.mountpoint)?.filter(table::Mount::is_ours);
        match there {
            Some(mount) if self.device.as_ref() == Some(&mount.device) => mounting::unmount(&self.mountpoint, true),
            _ => Ok(()),
        }
    }
}

impl Session {
    /// Mounts `file_system` and serves it.
    pub fn start(file_system: impl Filesystem, options: &MountOptions) -> Result<Self> {
        let connection = mounting::mount(options)?;
        let mount = table::mount_at(&options.mountpoint).inspect_err(|_| {
            // Of this moment's mount it is known whose it is; the first error is what counts.
            let _ = mounting::unmount(&options.mountpoint, true);
        })?;
        let device = mount.map(|mount| mount.device);
        let own = OwnMount { mountpoint: options.mountpoint.clone(), device };
        let mut session = Self { own, server: None };
        let server = serve(file_system, connection, options.allow_other)
            .map_err(|cause| Error::io("serve", &options.mountpoint, cause))?;
        if let Some(device) = &session.own.device {
            mounting::set_kernel_read_ahead(device, KERNEL_READ_AHEAD_BYTES);
        }
        session.server = Some(server);
        Ok(session)
    }

    /// The mount.
    pub fn own(&self) -> &OwnMount {
        &self.own
    }

    /// Waits until the mount is gone and the last file on it is closed.
    pub fn wait(mut self) -> Result<()> {
        let Some(server) = self.server.take() else { return Ok(()) };
        let ended = server.join().unwrap_or_else(|_| Err(io::Error::other("the server panicked")));
        // One whose connection was cut or failed is still there and answers nobody. Else it is gone, and the name of its
        // device may be another mount's by now.
        if !matches!(table::health(&self.own.mountpoint), table::Health::Stale) {
            self.own.device = None;
        }
        ended.map_err(|cause| Error::io("serve", &self.own.mountpoint, cause))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Err(error) = self.own.unmount() {
            tracing::warn!("{error}");
        }
        // The threads end by themselves once the last reader has closed its files.
    }
}

/// How many threads answer the kernel.
pub fn threads() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    (cores * THREADS_PER_CORE).clamp(THREADS_MIN, THREADS_MAX)
}

fn serve(file_system: impl Filesystem, device: OwnedFd, allow_other: bool) -> io::Result<JoinHandle<io::Result<()>>> {
    let acl = if allow_other { SessionACL::All } else { SessionACL::Owner };
    let mut config = Config::default();
    config.acl = acl;
    config.n_threads = Some(threads());
    // A queue for every thread, where this user may open the device; one shared queue otherwise.
    config.clone_fd =
        rustix::fs::access(mounting::DEVICE, rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK).is_ok();
    let session = fuser::Session::from_fd(file_system, device, acl, config)?;
    std::thread::Builder::new().name("fuse".to_owned()).spawn(move || session.run())
}
