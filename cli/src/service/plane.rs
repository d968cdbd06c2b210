//! What the recovery service asks of the mount service, and nothing more: that a session may read one backup of a cluster,
//! and that it may no longer.
//!
//! A lease is on disk with the hash of its token, so a mount service that is started again knows its sessions, and their
//! targets go on as if nothing had been.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use engine::Error;
use engine::io::durable;
use engine::remote::{Access, AccessFile, LeaseId, Security};
use engine::repository::Repository;
use engine::units::{BackupLabel, ClusterName, SessionId};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::data::{Counts, DataPlane, Leases};
use crate::exit::{Exit, Failure};

/// The mount service, as the recovery service sees it.
pub(super) trait Plane: Send + Sync {
    /// Lets `session` read, and tells how: the content of the file that its target opens as its repository. `seen_as` is
    /// this machine's address as the target sees it. Asked again, the earlier answer no longer counts.
    fn lease(&self, session: &SessionId, wanted: Wanted<'_>, seen_as: Option<&str>) -> anyhow::Result<Value>;

    /// Where the data plane is found from this machine: the end of a tunnel.
    fn address_here(&self) -> SocketAddr;

    /// Ends what `session` was let read.
    fn end(&self, session: &SessionId);

    /// Ends what any session was let read that is not among these.
    fn keep_only(&self, sessions: &BTreeSet<SessionId>);
}

/// What a session wants to read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted<'a> {
    pub(super) cluster: &'a ClusterName,
    /// The most a second; the operator's limit counts as well.
    pub(super) rate_limit: Option<u64>,
}

/// A lease, as it is kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Kept {
    session: SessionId,
    cluster: ClusterName,
    lease: String,
    /// BLAKE3 of the token, in hexadecimal digits.
    token: String,
    /// What the session has chosen.
    backup: Option<BackupLabel>,
    /// Bytes a second, as it was ordered.
    #[serde(default)]
    rate_limit: Option<u64>,
}

/// Figures of the data plane.
#[derive(Debug, Default)]
pub(super) struct Measured {
    pub(super) counts: Counts,
    /// Bytes of data by session.
    pub(super) sent: Vec<(SessionId, u64)>,
}

/// The mount service of this process.
pub(super) struct MountService {
    plane: DataPlane,
    repository: Repository,
    security: Security,
    /// How long a target waits for this service.
    patience: Duration,
    /// Of each session.
    rate_limit: Option<u64>,
    directory: PathBuf,
    kept: Arc<Mutex<BTreeMap<SessionId, Kept>>>,
}

impl MountService {
    /// Serves leases through `plane`; those of an earlier run at once.
    pub(super) fn new(
        plane: DataPlane,
        repository: Repository,
        security: Security,
        patience: Duration,
        rate_limit: Option<u64>,
        directory: &Path,
    ) -> anyhow::Result<Self> {
        let directory = directory.join("leases");
        std::fs::create_dir_all(&directory).map_err(|cause| Error::io("create", &directory, cause))?;
        let kept = Arc::new(Mutex::new(read(&directory)?));
        let service = Self { plane, repository, security, patience, rate_limit, directory, kept };
        let again: Vec<Kept> = service.locked().values().cloned().collect();
        for kept in again {
            if let Err(error) = service.offer(&kept) {
                tracing::warn!("session {} can read nothing any more: {error:#}", kept.session);
            }
        }
        Ok(service)
    }

    /// What was sent, to whom, and whom it has cut off.
    pub(super) fn measured(&self) -> Measured {
        let leases = self.plane.leases();
        let sent = |kept: &Kept| Some((kept.session.clone(), leases.bytes_sent(&kept.lease.parse().ok()?)?));
        Measured { counts: self.plane.counts(), sent: self.locked().values().filter_map(sent).collect() }
    }

    fn offer(&self, kept: &Kept) -> anyhow::Result<()> {
        let lease: LeaseId = kept.lease.parse().map_err(anyhow::Error::msg)?;
        let token = blake3::Hash::from_hex(&kept.token).context("the hash of its token")?;
        let cluster = self.repository.cluster(&kept.cluster)?;
        let (session, all, directory) = (kept.session.clone(), Arc::clone(&self.kept), self.directory.clone());
        let tell = move |label: &BackupLabel| {
            let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(kept) = all.get_mut(&session) else { return };
            kept.backup = Some(label.clone());
            if let Err(error) = write(&directory, kept) {
                tracing::warn!("session {session}: {error:#}");
            }
        };
        let only = kept.backup.clone();
        let limit = [kept.rate_limit, self.rate_limit].into_iter().flatten().min();
        self.plane.leases().offer((lease, token), cluster, only, limit, Box::new(tell));
        Ok(())
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, BTreeMap<SessionId, Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the target finds the data plane: where it is told to listen, or, if that is anywhere, where it sees us.
    fn address(&self, seen_as: Option<&str>) -> anyhow::Result<SocketAddr> {
        let address = self.plane.address();
        if !address.ip().is_unspecified() {
            return Ok(address);
        }
        let seen: Option<IpAddr> = seen_as.and_then(|seen| seen.parse().ok());
        let seen = seen.ok_or_else(|| {
            Failure::new(Exit::Failed, "the target does not tell under which address it sees this machine")
                .hint("start the mount server with --data-listen on an address that targets reach")
        })?;
        Ok(SocketAddr::new(seen, address.port()))
    }
}

impl Plane for MountService {
    fn lease(&self, session: &SessionId, wanted: Wanted<'_>, seen_as: Option<&str>) -> anyhow::Result<Value> {
        let address = self.address(seen_as)?;
        let before = self.locked().get(session).cloned();
        if let Some(before) = &before {
            before.lease.parse().map(|lease| self.plane.leases().end(&lease)).map_err(anyhow::Error::msg)?;
        }
        let (lease, token) = Leases::number().context("cannot make a token")?;
        let kept = Kept {
            session: session.clone(),
            cluster: wanted.cluster.clone(),
            lease: lease.to_string(),
            token: Leases::hash(&token).to_hex().to_string(),
            backup: before.and_then(|before| before.backup),
            rate_limit: wanted.rate_limit,
        };
        write(&self.directory, &kept)?;
        self.locked().insert(session.clone(), kept.clone());
        self.offer(&kept)?;
        let access = Access { address, security: self.security, lease, token };
        Ok(AccessFile { access, patience: self.patience }.to_json())
    }

    fn address_here(&self) -> SocketAddr {
        match self.plane.address() {
            any if any.ip() == IpAddr::from(Ipv4Addr::UNSPECIFIED) => (Ipv4Addr::LOCALHOST, any.port()).into(),
            any if any.ip() == IpAddr::from(Ipv6Addr::UNSPECIFIED) => (Ipv6Addr::LOCALHOST, any.port()).into(),
            own => own,
        }
    }

    fn end(&self, session: &SessionId) {
        let Some(kept) = self.locked().remove(session) else { return };
        if let Ok(lease) = kept.lease.parse() {
            self.plane.leases().end(&lease);
        }
        if let Err(error) = durable::remove_durably(&path(&self.directory, session)) {
            tracing::warn!("{error}");
        }
    }

    fn keep_only(&self, sessions: &BTreeSet<SessionId>) {
        let others: Vec<SessionId> = self.locked().keys().filter(|id| !sessions.contains(*id)).cloned().collect();
        for other in others {
            self.end(&other);
        }
    }
}

fn path(directory: &Path, session: &SessionId) -> PathBuf {
    directory.join(format!("{session}.json"))
}

fn write(directory: &Path, kept: &Kept) -> anyhow::Result<()> {
    Ok(durable::write_atomically(&path(directory, &kept.session), &serde_json::to_vec(kept)?, 0o600)?)
}

fn read(directory: &Path) -> anyhow::Result<BTreeMap<SessionId, Kept>> {
    let failed = |cause| Error::io("read", directory, cause);
    let mut kept = BTreeMap::new();
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.extension() == Some("json".as_ref()) {
            let text = std::fs::read(&path).map_err(|cause| Error::io("read", &path, cause))?;
            let lease: Kept =
                serde_json::from_slice(&text).with_context(|| format!("{} is no lease", path.display()))?;
            kept.insert(lease.session.clone(), lease);
        }
    }
    Ok(kept)
}
