//! Connections of the control port: TLS, then HTTP, each within its time, never more than a limit at once.
//!
//! Whoever connects and says nothing, speaks no TLS, sends its request a byte at a time, or does not read its answer, is
//! cut off, counted, and costs a task until then. There are as many places as [`CONNECTIONS_MAX`], and of one address as
//! [`ADDRESS_MAX`]; when they are taken, the oldest connection that never showed a good token makes room. So neither a
//! thousand idle connections keep anybody out, nor does one who is let in lose its place to them.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use std::{future::Future, io};

use axum::{Extension, Router};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::time::Sleep;
use tokio_rustls::TlsAcceptor;

/// At once; a watcher of a session holds one.
const CONNECTIONS_MAX: usize = 512;
/// Of these, from one address: many may share one behind a gateway.
const ADDRESS_MAX: usize = 256;
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// From the first byte of a request's head to its last, and between two requests.
const HEAD_MAX: Duration = Duration::from_secs(10);
/// How long a client may take no byte of what it was sent.
const WRITE_MAX: Duration = Duration::from_secs(30);
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
    /// Too many at once.
    pub(super) too_many: AtomicU64,
}

/// One connection's place among all.
#[derive(Debug)]
pub(super) struct Place {
    address: IpAddr,
    /// It has shown a good token.
    let_in: AtomicBool,
    cut: Notify,
}

impl Place {
    /// From now on it does not make room for others.
    pub(super) fn keep(&self) {
        self.let_in.store(true, Ordering::Relaxed);
    }
}

/// Those that are taken, the oldest first.
#[derive(Debug, Default)]
struct Places(Mutex<VecDeque<Arc<Place>>>);

impl Places {
    /// A place for somebody from `address`, if there is one or another makes room. Whether somebody had to.
    fn take(&self, address: IpAddr) -> (Option<Arc<Place>>, bool) {
        let mut taken = self.locked();
        let of_address = taken.iter().filter(|place| place.address == address).count();
        let mut made_room = false;
        if taken.len() >= CONNECTIONS_MAX || of_address >= ADDRESS_MAX {
            let gives = |place: &Arc<Place>| {
                let counts = of_address < ADDRESS_MAX || place.address == address;
                counts && !place.let_in.load(Ordering::Relaxed)
            };
            let Some(oldest) = taken.iter().position(gives).and_then(|oldest| taken.remove(oldest)) else {
                return (None, false);
            };
            oldest.cut.notify_one();
            made_room = true;
        }
        let place = Arc::new(Place { address, let_in: AtomicBool::new(false), cut: Notify::new() });
        taken.push_back(Arc::clone(&place));
        (Some(place), made_room)
    }

    fn leave(&self, place: &Arc<Place>) {
        self.locked().retain(|other| !Arc::ptr_eq(other, place));
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, VecDeque<Arc<Place>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Serves `router` to whoever connects, for ever. Each request carries its connection's [`Place`].
pub(super) async fn serve(
    listener: TcpListener,
    tls: Arc<rustls::ServerConfig>,
    router: Router,
    refused: Arc<Refused>,
) {
    let acceptor = TlsAcceptor::from(tls);
    let places = Arc::<Places>::default();
    loop {
        let (stream, address) = match listener.accept().await {
            Ok((stream, address)) => (stream, address.ip()),
            Err(cause) => {
                tracing::warn!("cannot accept a connection: {cause}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (place, made_room) = places.take(address);
        if place.is_none() || made_room {
            refused.too_many.fetch_add(1, Ordering::Relaxed);
        }
        let Some(place) = place else { continue };
        let router = router.clone().layer(Extension(Arc::clone(&place)));
        let (acceptor, refused, places) = (acceptor.clone(), Arc::clone(&refused), Arc::clone(&places));
        tokio::spawn(async move {
            tokio::select! {
                () = converse(stream, &acceptor, router, &refused) => {}
                () = place.cut.notified() => {}
            }
            places.leave(&place);
        });
    }
}

async fn converse(stream: TcpStream, acceptor: &TlsAcceptor, router: Router, refused: &Refused) {
    // Events are small and somebody waits for them.
    let _ = stream.set_nodelay(true);
    let stream = Patient { stream, waiting: None };
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

/// A socket to which no write waits for longer than [`WRITE_MAX`].
struct Patient {
    stream: TcpStream,
    waiting: Option<Pin<Box<Sleep>>>,
}

impl Patient {
    fn within<T>(&mut self, context: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.waiting = None;
            return written;
        }
        let waiting = self.waiting.get_or_insert_with(|| Box::pin(tokio::time::sleep(WRITE_MAX)));
        match waiting.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncRead for Patient {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, out)
    }
}

impl AsyncWrite for Patient {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.within(context, written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(context);
        self.within(context, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = Pin::new(&mut self.stream).poll_shutdown(context);
        self.within(context, shut)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::net::Ipv4Addr;

    use axum::routing::get;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::super::certificate::Certificate;
    use super::*;

    const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
    const THERE: IpAddr = IpAddr::V4(Ipv4Addr::BROADCAST);

    #[test]
    fn the_oldest_stranger_makes_room_and_who_was_let_in_does_not() {
        let places = Places::default();
        let kept = places.take(HERE).0.unwrap();
        kept.keep();
        let oldest = places.take(HERE).0.unwrap();
        for _ in 2..ADDRESS_MAX {
            assert!(!places.take(HERE).1);
        }
        let (place, made_room) = places.take(HERE);
        assert!(place.is_some() && made_room);
        let is_there = |place| places.locked().iter().any(|other| Arc::ptr_eq(other, place));
        assert!(is_there(&kept) && !is_there(&oldest));
        // Another address has places of its own, and none more than there are.
        for _ in 0..2 * CONNECTIONS_MAX {
            assert!(places.take(THERE).0.is_some());
        }
        assert!(is_there(&kept));
        assert_eq!(places.locked().len(), CONNECTIONS_MAX);
        // Where all were let in, nobody makes room.
        places.locked().iter().for_each(|place| place.keep());
        assert!(places.take(THERE).0.is_none());
        places.leave(&kept);
        assert_eq!(places.locked().len(), CONNECTIONS_MAX - 1);
        assert!(places.take(HERE).0.is_some());
    }

    #[tokio::test]
    async fn idle_connections_garbage_and_half_of_a_request_keep_nobody_out() {
        let certificate = Certificate::make().unwrap();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let refused = Arc::<Refused>::default();
        let router = Router::new().route("/", get(async || "here"));
        tokio::spawn(serve(listener, certificate.server_config().unwrap(), router, Arc::clone(&refused)));
        let mut idle = Vec::new();
        for number in 0..1000 {
            let mut stream = TcpStream::connect(address).await.unwrap();
            match number % 3 {
                0 => {}
                // It may have made room already.
                1 => drop(stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await),
                _ => drop(stream.write_all(&[0x16, 3, 1, 0xff, 0xff, 1]).await),
            }
            idle.push(stream);
        }
        let connector = tokio_rustls::TlsConnector::from(certificate.client_config().unwrap());
        let stream = TcpStream::connect(address).await.unwrap();
        let name = rustls::pki_types::ServerName::try_from("pghydrant").unwrap();
        let mut stream = connector.connect(name, stream).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        // The end of the stream may be that of the socket alone.
        let _ = stream.read_to_string(&mut answer).await;
        assert!(answer.ends_with("here"), "{answer}");
        // A third of them say nothing, and have more places than one address gets.
        assert!(refused.too_many.load(Ordering::Relaxed) > 0);
        assert!(refused.handshakes.load(Ordering::Relaxed) > 0);
    }
}
