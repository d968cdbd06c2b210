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

/// Threads of a worker that read, where there is no ring.
const THREADS_MAX: usize = 16;

/// What the connections of a worker share.
pub(super) struct Worker {
    pub(super) shared: Arc<Shared>,
    pub(super) buffers: Buffers,
    pub(super) files: Files,
}

/// Starts `count` workers; the first hands out what comes in, one to each in turn.
pub(super) fn start(
    (count, buffers, with_ring): (usize, usize, bool),
    listener: TcpListener,
    shared: &Arc<Shared>,
    stopped: &watch::Receiver<bool>,
) -> io::Result<Vec<JoinHandle<()>>> {
    listener.set_nonblocking(true)?;
    let (senders, receivers): (Vec<_>, Vec<_>) = (0..count).map(|_| mpsc::unbounded_channel()).unzip();
    let (ready, started) = std::sync::mpsc::channel();
    let mut listener = Some((listener, senders));
    let mut workers = Vec::with_capacity(count);
    for (number, sockets) in receivers.into_iter().enumerate() {
        let (shared, stopped, ready) = (Arc::clone(shared), stopped.clone(), ready.clone());
        let accepting = listener.take();
        let name = format!("data-{number}");
        workers.push(std::thread::Builder::new().name(name).spawn(move || {
            run(shared, (buffers, with_ring), (accepting, sockets), stopped, &ready);
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
    (buffers, with_ring): (usize, bool),
    (accepting, sockets): (Accepting, mpsc::UnboundedReceiver<TcpStream>),
    stopped: watch::Receiver<bool>,
    ready: &std::sync::mpsc::Sender<io::Result<()>>,
) {
    let work = async {
        let (buffers, files) = (Buffers::new(buffers, with_ring), Files::new(with_ring));
        let worker = Rc::new(Worker { shared, buffers, files });
        // Nobody to hear it: another worker failed before.
        let _ = ready.send(Ok(()));
        serve(worker, accepting, sockets, stopped).await;
    };
    let failed = if with_ring {
        tokio_uring::Runtime::new(&tokio_uring::builder()).map(|runtime| runtime.block_on(work)).err()
    } else {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        let runtime = builder.enable_all().max_blocking_threads(THREADS_MAX).build();
        runtime.map(|runtime| tokio::task::LocalSet::new().block_on(&runtime, work)).err()
    };
    if let Some(cause) = failed {
        let _ = ready.send(Err(cause));
    }
}

async fn serve(
    worker: Rc<Worker>,
    accepting: Accepting,
    mut sockets: mpsc::UnboundedReceiver<TcpStream>,
    mut stopped: watch::Receiver<bool>,
) {
    if let Some((listener, senders)) = accepting {
        tokio::task::spawn_local(accept(listener, senders, Arc::clone(&worker.shared)));
    }
    loop {
        tokio::select! {
            _ = stopped.wait_for(|stop| *stop) => return,
            socket = sockets.recv() => match socket {
                None => return,
                Some(socket) => {
                    tokio::task::spawn_local(connection::serve(socket, Rc::clone(&worker)));
                }
            },
        }
    }
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
