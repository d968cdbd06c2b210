//! What lies between two machines: a relay that delays, and that can be cut.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Passes on what comes to its address, later by `delay` in each direction.
pub(super) struct Relay {
    pub(super) address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    delay: Duration,
    stopped: AtomicBool,
    sockets: Mutex<VecDeque<TcpStream>>,
    passed: AtomicU64,
}

impl Relay {
    pub(super) fn start(to: SocketAddr, delay: Duration) -> Self {
        let listener = TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            delay,
            stopped: AtomicBool::new(false),
            sockets: Mutex::default(),
            passed: AtomicU64::new(0),
        });
        let accepting = Arc::clone(&shared);
        std::thread::spawn(move || {
            for from in listener.incoming().flatten() {
                if accepting.stopped.load(Ordering::SeqCst) {
                    return;
                }
                let Ok(to) = TcpStream::connect(to) else { continue };
                let mut sockets = accepting.sockets.lock().unwrap();
                for (one, other) in [(&from, &to), (&to, &from)] {
                    sockets.push_back(one.try_clone().unwrap());
                    one.set_nodelay(true).unwrap();
                    pass(one.try_clone().unwrap(), other.try_clone().unwrap(), &accepting);
                }
            }
        });
        Self { address, shared }
    }

    /// Cuts all connections, in the middle of whatever they carry.
    pub(super) fn cut(&self) -> usize {
        let sockets = std::mem::take(&mut *self.shared.sockets.lock().unwrap());
        for socket in &sockets {
            let _ = socket.shutdown(Shutdown::Both);
        }
        sockets.len() / 2
    }

    /// Bytes that were passed on so far.
    pub(super) fn passed(&self) -> u64 {
        self.shared.passed.load(Ordering::SeqCst)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        self.cut();
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, shared: &Arc<Shared>) {
    let (sender, pieces) = channel::<(Instant, Vec<u8>)>();
    let delay = shared.delay;
    let passing = Arc::clone(shared);
    std::thread::spawn(move || {
        let mut memory = vec![0; 256 << 10];
        while let Ok(bytes @ 1..) = from.read(&mut memory) {
            passing.passed.fetch_add(bytes as u64, Ordering::SeqCst);
            if sender.send((Instant::now() + delay, memory[..bytes].to_vec())).is_err() {
                break;
            }
        }
    });
    std::thread::spawn(move || forward(&pieces, &mut to));
}

fn forward(pieces: &Receiver<(Instant, Vec<u8>)>, to: &mut TcpStream) {
    for (due, bytes) in pieces {
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        if to.write_all(&bytes).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
}
