//! The mount that a restore works from: it begins and ends with the restore, however that ends.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use engine::remote::AccessFile;
use engine::units::{BackupLabel, ClusterName, SessionId};
use fusefs::table;

use super::launch::{self, Server};
use super::watch::{PATIENCE, Watch};
use super::{MEMORY_BYTES_DEFAULT, place, protocol, unmount, usable};

/// How long a server may take to end by itself: it detaches the mount at once and gives readers two seconds.
const SERVER_END_WAIT: Duration = Duration::from_secs(10);

/// What a restore wants to have mounted.
#[derive(Clone, Debug)]
pub(crate) struct MountRequest {
    /// The repository's directory, absolute.
    pub(crate) repository: PathBuf,
    pub(crate) cluster: ClusterName,
    pub(crate) backup: BackupLabel,
    /// Names the mountpoint.
    pub(crate) session: SessionId,
    /// `--mount-dir`; [`super::default_directory`] otherwise.
    pub(crate) mount_directory: Option<PathBuf>,
    /// User and group number of the instance's owner: shown as the owner of everything, and able to read it.
    pub(crate) owner: (u32, u32),
    /// Memory for read-ahead and decoded blocks; 64 MiB unless given.
    pub(crate) memory_bytes: Option<u64>,
    /// Where the server logs.
    pub(crate) log: PathBuf,
}

/// A mounted backup, with the server that this process started for it. Dropped, it is taken away.
#[derive(Debug)]
pub(crate) struct SessionMount {
    mountpoint: PathBuf,
    token: String,
    server: Option<Server>,
    watch: Option<Watch>,
    /// How long the mount may neither answer nor deliver.
    patience: Duration,
}

impl SessionMount {
    /// Starts a server, mounts, and waits until the mount answers.
    pub(crate) fn start(request: &MountRequest) -> anyhow::Result<Self> {
        usable::refuse_unless_usable()?;
        let own = rustix::process::geteuid();
        // Only root can serve others without asking /etc/fuse.conf; an ordinary user restores for itself.
        let allow_other = own.is_root() && request.owner.0 != own.as_raw();
        let token = launch::new_token()?;
        let mountpoint = place::make(&request.session, request.mount_directory.as_deref())?;
        let asked = protocol::Request {
            repository: request.repository.clone(),
            cluster: request.cluster.clone(),
            backup: request.backup.clone(),
            mountpoint: mountpoint.clone(),
            owner: Some(request.owner),
            allow_other,
            memory_bytes: request.memory_bytes.unwrap_or(MEMORY_BYTES_DEFAULT),
            token: token.clone(),
            with_parent: true,
        };
        // A server that waits for a mount service ends that wait by itself.
        let remote = AccessFile::read(&request.repository)?;
        let patience = remote.map_or(PATIENCE, |file| file.patience + PATIENCE);
        let mut mount = Self { mountpoint, token, server: None, watch: None, patience };
        // A failure drops `mount`, which takes away what there is.
        let server = mount.server.insert(Server::start(&asked, &request.log)?);
        let watch = Watch::begin(&mount.mountpoint, server.pid(), patience).context("cannot watch the mount")?;
        mount.watch = Some(watch);
        Ok(mount)
    }

    /// Takes away what a session's earlier run left mounted, if its server was killed with it. Nothing to do is no error.
    pub(crate) fn take_away_leftover(session: &SessionId, mount_directory: Option<&Path>) -> anyhow::Result<()> {
        let directory = mount_directory.map_or_else(place::default_directory, Path::to_owned);
        if directory.is_dir() {
            let mountpoint = table::resolve(&directory.join(session.as_str()))?;
            unmount::clear_leftover(&mountpoint)?;
            place::remove(&mountpoint);
        }
        Ok(())
    }

    /// Where the backup is mounted.
    pub(crate) fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// Proves that what lies at the mountpoint is still the mount of the server that this session started.
    pub(crate) fn prove(&self) -> engine::Result<()> {
        table::prove(&self.mountpoint, &self.token)
    }

    /// Bytes of it have arrived: whoever reads much tells, so that a mount that is slow is not taken for one that hangs.
    pub(crate) fn delivered(&self, bytes: u64) {
        if let Some(watch) = &self.watch {
            watch.delivered(bytes);
        }
    }

    /// How long the mount neither answered nor delivered, if it was given up for that: every read fails since.
    pub(crate) fn gave_up_after(&self) -> Option<Duration> {
        self.watch.as_ref().is_some_and(Watch::gave_up).then_some(self.patience)
    }

    /// Where the server logs: the place of the reason for an EIO.
    pub(crate) fn server_log(&self) -> &Path {
        self.server.as_ref().map_or(Path::new("/dev/null"), Server::log)
    }

    /// The end of the server's log.
    pub(crate) fn last_words(&self) -> Option<String> {
        launch::last_words(self.server_log())
    }

    /// Takes the mount away and waits until the server has ended.
    pub(crate) fn stop(mut self) -> anyhow::Result<()> {
        self.take_away()
    }

    fn take_away(&mut self) -> anyhow::Result<()> {
        let patience = if self.gave_up_after().is_some() { Duration::ZERO } else { SERVER_END_WAIT };
        // While the server is watched its process is not waited for.
        self.watch = None;
        if let Some(mut server) = self.server.take() {
            server.end(patience);
        }
        // A server that was killed leaves its mount.
        unmount::clear_leftover(&self.mountpoint)?;
        place::remove(&self.mountpoint);
        Ok(())
    }
}

impl Drop for SessionMount {
    fn drop(&mut self) {
        if let Err(error) = self.take_away() {
            tracing::warn!("{error:#}");
        }
    }
}
