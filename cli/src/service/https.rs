//! Connections of the control port: TLS, then HTTP, each within its time, never more than a limit at once.
//!
//! Whoever connects and says nothing, speaks no TLS, or sends its request a byte at a time, is cut off, counted, and
//! costs a task until then. The limit is on all of them: who comes beyond it waits in the listener's queue.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;

/// At once; a watcher of a session holds one.
const CONNECTIONS_MAX: usize = 512;
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// From the first byte of a request's head to its last.
const HEAD_MAX: Duration = Duration::from_secs(10);
/// What the kernel lacks (open files) comes back.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What came to nothing, for the metrics.
#[derive(Debug, Default)]
pub(super) struct Refused {
    /// No TLS, or not in time.
    pub(super) handshakes: AtomicU64,
    /// No HTTP, or not in time.
    pub(super) requests: AtomicU64,
    /// A token that is nobody's, or none.
    pub(super) unauthorized: AtomicU64,
}

/// Serves `router` to whoever connects, for ever.
pub(super) async fn serve(
    listener: TcpListener,
    tls: Arc<rustls::ServerConfig>,
    router: Router,
    refused: Arc<Refused>,
) {
    let acceptor = TlsAcceptor::from(tls);
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = Arc::clone(&room).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(cause) => {
                tracing::warn!("cannot accept a connection: {cause}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (acceptor, router, refused) = (acceptor.clone(), router.clone(), Arc::clone(&refused));
        tokio::spawn(async move {
            converse(stream, &acceptor, router, &refused).await;
            drop(place);
        });
    }
}

async fn converse(stream: TcpStream, acceptor: &TlsAcceptor, router: Router, refused: &Refused) {
    // Events are small and somebody waits for them.
    let _ = stream.set_nodelay(true);
    let Ok(Ok(stream)) = tokio::time::timeout(HANDSHAKE_MAX, acceptor.accept(stream)).await else {
        refused.handshakes.fetch_add(1, Ordering::Relaxed);
        return;
    };
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD_MAX);
    if builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router)).await.is_err() {
        refused.requests.fetch_add(1, Ordering::Relaxed);
    }
}
