//! The workers: a thread each, with its runtime, its ring, its buffers and its connections.

use std::io;
use std::net::{TcpListener, TcpStream};
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::{mpsc, watch};

use super::files::Files;
use super::metrics::Event;
use super::pieces::Buffers;
use super::{CONNECTIONS_MAX, Shared, connection};

/// After an accept that failed: for want of file numbers, say, which are there again when somebody hangs up.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What the connections of a worker share.
pub(super) struct Worker {
    pub(super) shared: Arc<Shared>,
    pub(super) buffers: Buffers,
    pub(super) files: Files,
}

/// Starts `count` workers; the first hands out what comes in, one to each in turn.
pub(super) fn start(
    count: usize,
    buffers: usize,
    listener: TcpListener,
    shared: &Arc<Shared>,
    stopped: &watch::Receiver<bool>,
) -> io::Result<Vec<JoinHandle<()>>> {
    listener.set_nonblocking(true)?;
    // Tried here, where it can still be said: a kernel or a container without io_uring.
    engine::io::try_ring()?;
    let (senders, receivers): (Vec<_>, Vec<_>) = (0..count).map(|_| mpsc::unbounded_channel()).unzip();
    let (ready, started) = std::sync::mpsc::channel();
    let mut listener = Some((listener, senders));
    let mut workers = Vec::with_capacity(count);
    for (number, sockets) in receivers.into_iter().enumerate() {
        let (shared, stopped, ready) = (Arc::clone(shared), stopped.clone(), ready.clone());
        let accepting = listener.take();
        let name = format!("data-{number}");
        workers.push(std::thread::Builder::new().name(name).spawn(move || {
            run(shared, buffers, accepting, sockets, stopped, &ready);
        })?);
    }
    drop(ready);
    // A worker that could not begin says why; then all channels are dropped, and the others end too.
    started.iter().take(count).collect::<io::Result<Vec<()>>>()?;
    Ok(workers)
}

type Accepting = Option<(TcpListener, Vec<mpsc::UnboundedSender<TcpStream>>)>;

fn run(
    shared: Arc<Shared>,
    buffers: usize,
    accepting: Accepting,
    mut sockets: mpsc::UnboundedReceiver<TcpStream>,
    mut stopped: watch::Receiver<bool>,
    ready: &std::sync::mpsc::Sender<io::Result<()>>,
) {
    let runtime = match tokio_uring::Runtime::new(&tokio_uring::builder()) {
        Ok(runtime) => runtime,
        Err(cause) => {
            // Nobody to hear it: another worker failed before.
            let _ = ready.send(Err(cause));
            return;
        }
    };
    runtime.block_on(async {
        let worker = Rc::new(Worker { shared, buffers: Buffers::new(buffers), files: Files::default() });
        if !worker.buffers.are_registered() {
            tracing::info!("the kernel takes no registered buffers: a limit on locked memory, perhaps");
        }
        let _ = ready.send(Ok(()));
        if let Some((listener, senders)) = accepting {
            tokio_uring::spawn(accept(listener, senders, Arc::clone(&worker.shared)));
        }
        loop {
            tokio::select! {
                _ = stopped.wait_for(|stop| *stop) => return,
                socket = sockets.recv() => match socket {
                    None => return,
                    Some(socket) => {
                        tokio_uring::spawn(connection::serve(socket, Rc::clone(&worker)));
                    }
                },
            }
        }
    });
}

async fn accept(listener: TcpListener, senders: Vec<mpsc::UnboundedSender<TcpStream>>, shared: Arc<Shared>) {
    let listener = match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(cause) => return tracing::error!("cannot listen: {cause}"),
    };
    for sender in senders.iter().cycle() {
        let socket = match listener.accept().await.and_then(|(socket, _)| socket.into_std()) {
            Ok(socket) => socket,
            Err(cause) => {
                tracing::warn!("a connection was not accepted: {cause}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if shared.metrics.open() >= CONNECTIONS_MAX {
            shared.metrics.count(Event::TooMany);
            continue;
        }
        shared.metrics.count(Event::Opened);
        if sender.send(socket).is_err() {
            shared.metrics.count(Event::Closed);
        }
    }
}
