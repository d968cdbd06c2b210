//! The data plane of the mount service: the stored bytes of a leased backup, over TCP.
//!
//! ```text
//! worker threads, each a runtime of tokio-uring:
//!   a socket of tokio's <──write── a registered buffer <──io_uring── the pack
//! ```
//!
//! A worker owns its connections, its ring and its buffers, so no byte and no lock passes between threads. A connection
//! reads its next pieces from the disk while the last is on its way, as many as [`PIECES_AHEAD`]; it takes no further
//! request while those are not sent. All pieces of a worker lie in its registered buffers and nowhere else: that is the
//! bound of the memory, and the back-pressure.
//!
//! Where there is no io_uring, threads read, and each piece is copied once more.
//!
//! Whoever is not let in, sends garbage, reads too slowly or says nothing is cut off, counted in [`Metrics`], and of no
//! more consequence.
//!
//! Always true: no byte is sent that the lease of the connection does not cover, or after the lease has ended.

mod connection;
mod files;
mod greeting;
mod leases;
mod limits;
mod metrics;
mod pieces;
mod worker;

#[cfg(test)]
mod tests;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use engine::remote::frame::{Header, PIECE_BYTES_MAX};
use engine::store::LocalStore;
use tokio::sync::watch;

pub(crate) use leases::Leases;
use limits::Limit;
pub(crate) use metrics::Counts;
use metrics::Metrics;

/// Worker threads, however many cores there are: each moves over 1 GB/s.
const WORKERS_MAX: usize = 4;
/// Memory for pieces on their way from the disk to a socket, of all workers together.
const PIECES_BYTES_MAX: usize = 64 << 20;
/// Pieces of one connection that are read or wait to be sent, behind the one that is sent.
const PIECES_AHEAD: usize = 4;
/// Connections in all, of whoever: so many that a thousand which say nothing keep nobody out.
const CONNECTIONS_MAX: usize = 1536;
/// Connections of one lease: twice what a client opens, since those that it lost may not be noticed yet.
const LEASE_CONNECTIONS_MAX: usize = 16;
/// Requests of one connection that its client may have sent before any is answered: they wait in the socket.
const REQUESTS_MAX: u16 = 32;
/// How long a client may take for its greeting.
const GREETING_WAIT: Duration = Duration::from_secs(10);
/// How long a request may take to arrive once it has begun.
const REQUEST_WAIT: Duration = Duration::from_secs(10);
/// How long a connection may say nothing. Its client opens another when it needs one.
const IDLE_MAX: Duration = Duration::from_secs(300);
/// How long a piece may take to be sent: 8 KiB/s.
const SEND_WAIT: Duration = Duration::from_secs(32);

/// A piece and the header before it.
const FRAME_BYTES: usize = Header::BYTES + PIECE_BYTES_MAX;
/// What the service may hold in memory with eight sessions, all told.
const MEMORY_BYTES_MAX: usize = 256 << 20;
/// What a connection costs beside its pieces: its task, a request, the records of its TLS session on their way.
const CONNECTION_BYTES: usize = 192 << 10;
/// A lease's runs.
const LEASE_BYTES: usize = 8 << 20;

const _: () =
    assert!(PIECES_BYTES_MAX + 8 * (LEASE_CONNECTIONS_MAX / 2 * CONNECTION_BYTES + LEASE_BYTES) < MEMORY_BYTES_MAX);
// One lease whose client reads nothing leaves buffers to the others.
const _: () = assert!(LEASE_CONNECTIONS_MAX * (PIECES_AHEAD + 1) * FRAME_BYTES < PIECES_BYTES_MAX / 2);
const _: () = assert!(CONNECTIONS_MAX > 8 * LEASE_CONNECTIONS_MAX + 1000);

/// What a data plane is started with.
pub(crate) struct Settings {
    /// Where it listens.
    pub(crate) listen: SocketAddr,
    /// Its TLS; without, it speaks plain.
    pub(crate) tls: Option<Arc<rustls::ServerConfig>>,
    /// The repository.
    pub(crate) store: LocalStore,
    /// What all clients together get a second.
    pub(crate) bytes_a_second_max: Option<u64>,
    /// Whether io_uring is used where there is one; else files are read by threads.
    pub(crate) with_ring: bool,
}

/// A data plane that runs. Dropped, it stops.
pub(crate) struct DataPlane {
    address: SocketAddr,
    leases: Arc<Leases>,
    metrics: Arc<Metrics>,
    stop: watch::Sender<bool>,
    workers: Vec<JoinHandle<()>>,
}

/// What all workers share.
struct Shared {
    store: LocalStore,
    tls: Option<tokio_rustls::TlsAcceptor>,
    leases: Arc<Leases>,
    metrics: Arc<Metrics>,
    limit: Option<Limit>,
}

impl DataPlane {
    /// Listens, and serves whoever has a lease.
    pub(crate) fn start(settings: Settings, leases: Arc<Leases>) -> io::Result<Self> {
        let listener = TcpListener::bind(settings.listen)?;
        let address = listener.local_addr()?;
        let metrics = Arc::<Metrics>::default();
        let shared = Arc::new(Shared {
            store: settings.store,
            tls: settings.tls.map(Into::into),
            leases: Arc::clone(&leases),
            metrics: Arc::clone(&metrics),
            limit: settings.bytes_a_second_max.map(Limit::new),
        });
        let (stop, stopped) = watch::channel(false);
        let count = std::thread::available_parallelism().map_or(1, usize::from).min(WORKERS_MAX);
        let buffers = PIECES_BYTES_MAX / FRAME_BYTES / count;
        let ring = if settings.with_ring { engine::io::try_ring() } else { Err(io::ErrorKind::Unsupported.into()) };
        if let Err(cause) = &ring {
            tracing::warn!("blocks are read by threads, at a higher cost: no io_uring ({cause})");
        }
        let workers = worker::start((count, buffers, ring.is_ok()), listener, &shared, &stopped)?;
        Ok(Self { address, leases, metrics, stop, workers })
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Who may have what.
    pub(crate) fn leases(&self) -> &Arc<Leases> {
        &self.leases
    }

    /// What happened so far.
    pub(crate) fn counts(&self) -> Counts {
        self.metrics.counts()
    }
}

impl Drop for DataPlane {
    fn drop(&mut self) {
        // Workers that are gone already hear nothing.
        let _ = self.stop.send(true);
        for worker in self.workers.drain(..) {
            // Its panic would be on stderr already.
            let _ = worker.join();
        }
    }
}
