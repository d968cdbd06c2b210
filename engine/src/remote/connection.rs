//! One connection, shared by many threads that each wait for an answer.
//!
//! There is no thread of its own: whoever waits reads. The reading half of the socket is a baton. Its holder reads the
//! header of the next answer; one to its own request it reads on, straight into its own buffer; any other it hands to
//! the thread that waits for it, baton and all. So no byte is copied between threads, and one that is idle costs nothing.
//!
//! Always true: while somebody waits, somebody holds the baton or it lies ready, or the connection is lost and everybody
//! was told.

use std::collections::BTreeMap;
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::frame::{Failure, FailureCode, Header, Kind};
use super::message::Request;
use super::sink::Sink;
use super::stream::{self, Reader, SILENCE_MAX, Writer};
use super::{Access, Patience};

/// Why a call did not succeed.
#[derive(Clone, Debug)]
pub(super) enum Fault {
    /// The connection is gone, with what was asked on it: to be asked again on another.
    Lost(Arc<str>),
    /// There is no connection, because the server does not want one.
    NotLetIn(FailureCode, String),
    /// The server's answer.
    Failed(Failure),
}

impl Fault {
    pub(super) fn lost(why: impl AsRef<str>) -> Self {
        Self::Lost(why.as_ref().into())
    }
}

pub(super) struct Connection {
    writer: Mutex<Writer>,
    socket: TcpStream,
    state: Mutex<State>,
    /// A request was answered.
    room: Condvar,
    requests_max: usize,
    /// From the greeting to its answer.
    pub(super) greeted_in: Duration,
}

#[derive(Default)]
struct State {
    next_id: u64,
    waiting: BTreeMap<u64, Waiter>,
    /// The baton, while nobody holds it.
    reader: Option<Box<Reader>>,
    lost: Option<Arc<str>>,
}

struct Waiter {
    turn: Option<Turn>,
    wake: Arc<Condvar>,
}

/// The baton, and the header that was read already of an answer to the one who gets it.
type Turn = (Box<Reader>, Option<Header>);

impl Connection {
    pub(super) fn open(access: &Access) -> Result<Self, Fault> {
        let (writer, reader, requests_max, greeted_in) = stream::open(access)?;
        let state = State { reader: Some(Box::new(reader)), ..State::default() };
        let socket = writer.socket().map_err(|cause| Fault::lost(cause.to_string()))?;
        Ok(Self {
            writer: Mutex::new(writer),
            socket,
            state: Mutex::new(state),
            room: Condvar::new(),
            requests_max: usize::from(requests_max),
            greeted_in,
        })
    }

    /// How many requests wait for their answers; none if it is lost.
    pub(super) fn in_flight(&self) -> Option<usize> {
        let state = self.state();
        state.lost.is_none().then(|| state.waiting.len())
    }

    /// Asks, and gives every answer to `sink`.
    pub(super) fn call(&self, request: &Request, sink: &mut Sink, patience: &dyn Patience) -> Result<(), Fault> {
        let (id, wake) = self.enter(patience)?;
        let sent = lock(&self.writer).send(&request.to_frame(id));
        sent.map_err(|cause| self.lose(Fault::lost(cause.to_string())))?;
        let (mut reader, mut header) = self.turn(id, &wake)?;
        loop {
            let next = match header.take() {
                Some(header) => header,
                None => self.read_header(&mut reader, patience)?,
            };
            if next.id != id {
                self.hand_over(next, reader)?;
                (reader, header) = self.turn(id, &wake)?;
                continue;
            }
            let taken = if next.kind == Kind::Failed {
                read_failure(&next, &mut reader, patience).map(Some)
            } else {
                sink.take(&next, &mut reader, patience).map(|()| None)
            };
            match taken.map_err(|fault| self.lose(fault))? {
                None if !next.is_last => {}
                failure => {
                    self.leave(id, reader);
                    return failure.map_or(Ok(()), |failure| Err(Fault::Failed(failure)));
                }
            }
        }
    }

    /// A number for a request, once there is room for one more.
    fn enter(&self, patience: &dyn Patience) -> Result<(u64, Arc<Condvar>), Fault> {
        let began = Instant::now();
        let mut state = self.state();
        loop {
            if let Some(why) = &state.lost {
                return Err(Fault::Lost(Arc::clone(why)));
            }
            if state.waiting.len() < self.requests_max {
                break;
            }
            state = wait(&self.room, state, Duration::from_secs(1));
            if !patience.goes_on(began.elapsed()) {
                return Err(Fault::lost("too much is asked at once"));
            }
        }
        let id = state.next_id;
        state.next_id += 1;
        let wake = Arc::new(Condvar::new());
        state.waiting.insert(id, Waiter { turn: None, wake: Arc::clone(&wake) });
        Ok((id, wake))
    }

    /// Waits for the baton.
    fn turn(&self, id: u64, wake: &Condvar) -> Result<Turn, Fault> {
        let mut began = Instant::now();
        let mut state = self.state();
        loop {
            if let Some(why) = &state.lost {
                return Err(Fault::Lost(Arc::clone(why)));
            }
            if let Some(turn) = state.waiting.get_mut(&id).and_then(|waiter| waiter.turn.take()) {
                return Ok(turn);
            }
            if let Some(reader) = state.reader.take() {
                return Ok((reader, None));
            }
            state = wait(wake, state, SILENCE_MAX);
            // Others are answered before: whoever reads notices a silence, unless it died of a panic.
            if began.elapsed() > 2 * SILENCE_MAX && state.lost.is_none() {
                began = Instant::now();
                if state.waiting.keys().next() == Some(&id) {
                    drop(state);
                    return Err(self.lose(Fault::lost("whoever read the answers is gone")));
                }
            }
        }
    }

    fn read_header(&self, reader: &mut Reader, patience: &dyn Patience) -> Result<Header, Fault> {
        let mut bytes = [0; Header::BYTES];
        let read = reader
            .fill(&mut bytes, patience)
            .and_then(|()| Header::of_answer(&bytes).map_err(|malformed| Fault::lost(format!("it sent {malformed}"))));
        read.map_err(|fault| self.lose(fault))
    }

    /// Gives the baton to whom the answer is for.
    fn hand_over(&self, header: Header, reader: Box<Reader>) -> Result<(), Fault> {
        let mut state = self.state();
        match state.waiting.get_mut(&header.id) {
            Some(waiter) => {
                waiter.turn = Some((reader, Some(header)));
                waiter.wake.notify_one();
                Ok(())
            }
            None => {
                drop(state);
                Err(self.lose(Fault::lost("it answered what was not asked")))
            }
        }
    }

    /// Gives the baton to whoever has waited for longest: most answers come in order.
    fn leave(&self, id: u64, reader: Box<Reader>) {
        let mut state = self.state();
        state.waiting.remove(&id);
        match state.waiting.values_mut().next() {
            Some(waiter) => {
                waiter.turn = Some((reader, None));
                waiter.wake.notify_one();
            }
            None => state.reader = Some(reader),
        }
        self.room.notify_one();
    }

    /// Tells everybody that the connection is gone.
    pub(super) fn lose(&self, fault: Fault) -> Fault {
        let mut state = self.state();
        if let Fault::Lost(why) = &fault
            && state.lost.is_none()
        {
            state.lost = Some(Arc::clone(why));
        }
        state.reader = None;
        for waiter in state.waiting.values_mut() {
            waiter.turn = None;
            waiter.wake.notify_one();
        }
        self.room.notify_all();
        drop(state);
        // Wakes whoever reads or writes; one that is not connected any more has woken them already.
        let _ = self.socket.shutdown(Shutdown::Both);
        fault
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").field("in_flight", &self.in_flight()).finish_non_exhaustive()
    }
}

fn read_failure(header: &Header, reader: &mut Reader, patience: &dyn Patience) -> Result<Failure, Fault> {
    let mut body = vec![0; header.body_bytes];
    reader.fill(&mut body, patience)?;
    Failure::from_body(&body).map_err(|malformed| Fault::lost(format!("it sent {malformed}")))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What a panic elsewhere left is at worst a baton that is gone, which those who wait notice.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wait<'state, T>(wake: &Condvar, state: MutexGuard<'state, T>, patience: Duration) -> MutexGuard<'state, T> {
    wake.wait_timeout(state, patience).unwrap_or_else(PoisonError::into_inner).0
}
