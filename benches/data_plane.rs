//! The data plane over loopback, client and server in one process: from the page cache to verified buffers.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result};
use data::{DataPlane, Leases, Settings};
use engine::blocks::Scratch;
use engine::codec::Compression;
use engine::format::file::FileRecord;
use engine::remote::{Access, Fingerprint, Forever, RemoteStore, Security};
use engine::repository::{Backup, Repository};
use engine::store::{LocalStore, Store};

use crate::backup::{directory, file, write};
use crate::pages::pages;

#[allow(dead_code, unused_imports, unreachable_pub)]
#[path = "../cli/src/service/data/mod.rs"]
mod data;

/// Of each of the backup's files.
pub const FILE_BYTES: u64 = 32 << 20;
const REQUEST_BYTES: usize = 1 << 20;

/// A service on a port of its own. Dropped, it stops.
#[allow(missing_debug_implementations)]
pub struct Service {
    plane: DataPlane,
    security: Security,
}

impl Service {
    /// Serves the repository in `root`, under TLS or plain.
    pub fn start(root: &Path, encrypted: bool) -> Result<Self> {
        let (tls, security) = if encrypted {
            let (tls, fingerprint) = certificate()?;
            (Some(tls), Security::Tls(fingerprint))
        } else {
            (None, Security::Plain)
        };
        let listen = (std::net::Ipv4Addr::LOCALHOST, 0).into();
        let settings =
            Settings { listen, tls, store: LocalStore::new(root), bytes_a_second_max: None, with_ring: true };
        let plane = DataPlane::start(settings, Arc::default()).context("cannot start the data plane")?;
        Ok(Self { plane, security })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.plane.address()
    }

    /// Leases the backup.
    pub fn offer(&self, backup: &Backup) -> Result<Access> {
        let (lease, token) = Leases::number().context("no random number")?;
        let (cluster, only) = (backup.cluster.clone(), Some(backup.info.label.clone()));
        self.plane.leases().offer((lease, Leases::hash(&token)), cluster, only, None, Box::new(|_| ()));
        Ok(Access { address: self.address(), security: self.security, lease, token })
    }
}

/// A certificate for one run.
fn certificate() -> Result<(Arc<rustls::ServerConfig>, Fingerprint)> {
    let made = rcgen::generate_simple_self_signed(["bench".to_owned()]).context("cannot make a certificate")?;
    let key =
        rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).map_err(anyhow::Error::msg)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ServerConfig::builder_with_provider(provider);
    let builder = builder.with_protocol_versions(&[&rustls::version::TLS13])?.with_no_client_auth();
    let config = builder.with_single_cert(vec![made.cert.der().clone()], key)?;
    Ok((Arc::new(config), Fingerprint::of(made.cert.der())))
}

/// The backup, by way of the service.
pub fn through(access: Access, backup: &Backup) -> Result<Backup> {
    let store: Arc<dyn Store> = Arc::new(RemoteStore::connect(access, Arc::new(Forever))?);
    let repository = Repository::with_store(Path::new("service"), store)?;
    Ok(repository.cluster(backup.cluster.name())?.backup(&backup.info.label)?)
}

/// The backup in `root`, generated of so many files if there is none.
pub fn made(root: &Path, compression: Compression, count: usize) -> Result<Backup> {
    if let Ok(repository) = Repository::open(root) {
        let name = repository.clusters()?.into_iter().next().context("no cluster")?;
        return repository.cluster(&name)?.latest_backup()?.context("no backup");
    }
    let mut files = vec![directory("base"), directory("base/5")];
    files.extend((0..count).map(|number| file(format!("base/5/{}", 20_000 + number), FILE_BYTES)));
    let (content, _) = pages(FILE_BYTES as usize);
    let mut number = 0_u64;
    let backup = write(root, compression, files, |_, out| {
        out.extend_from_slice(&content);
        number += 1;
        // No two blocks are the same.
        out.chunks_mut(8192).for_each(|page| page[..8].copy_from_slice(&number.to_le_bytes()));
    })?;
    Ok(backup)
}

/// The files that have content.
pub fn files_of(backup: &Backup) -> Result<Vec<FileRecord>> {
    let mut files = backup.manifest.files().collect::<Result<Vec<_>, _>>()?;
    files.retain(|file| file.bytes > 0);
    Ok(files)
}

/// Reads these files once, in requests of 1 MiB by so many threads, each block verified. The first failure is kept.
pub fn read(backup: &Backup, files: &[FileRecord], threads: usize) -> Result<()> {
    let requests: Vec<_> = files
        .iter()
        .flat_map(|file| (0..file.bytes).step_by(REQUEST_BYTES).map(move |offset| (file, offset)))
        .collect();
    let (next, blocks) = (AtomicUsize::new(0), backup.blocks());
    let failed = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut scratch = Scratch::default();
                let mut out = vec![0; REQUEST_BYTES];
                while let Some((file, offset)) = requests.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(error) = blocks.read_range(file, *offset, &mut out, &mut scratch) {
                        next.store(requests.len(), Ordering::Relaxed);
                        failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                    }
                }
            });
        }
    });
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error.into()),
        None => Ok(()),
    }
}
