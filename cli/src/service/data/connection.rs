//! One connection: requests in, answers out.
//!
//! Two halves that wait for each other: one takes requests and begins the reads of their pieces, the other sends the
//! pieces in order as they are there. Between them are [`PIECES_AHEAD`] pieces and no more, so a client that does not
//! read stops its own reads, and then its requests stay in its socket.

use std::future::Future;
use std::io;
use std::net;
use std::rc::Rc;
use std::time::Duration;

use engine::Error;
use engine::remote::frame::{Failure, FailureCode, Header};
use engine::remote::message::{ByteRange, Request, listed_frames, sized_frame};
use engine::remote::{Reach, Runs};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_uring::buf::fixed::FixedBuf;

use super::files::{self, Open};
use super::greeting::{Stream, Turned, greet};
use super::leases::Admitted;
use super::metrics::Event;
use super::pieces::cut;
use super::worker::Worker;
use super::{GREETING_WAIT, IDLE_MAX, PIECES_AHEAD, REQUEST_WAIT, SEND_WAIT};

/// What is to be sent next.
enum Outgoing {
    /// A frame in a registered buffer, once it is read.
    Piece(JoinHandle<Result<FixedBuf, Failure>>, u64),
    /// Another frame.
    Frame(Vec<u8>),
}

/// Why a connection is over.
#[derive(Debug, PartialEq, Eq)]
enum Over {
    /// The client hung up, or the lease has ended.
    Gone,
    Garbage,
    Slow,
    Idle,
}

/// Serves a connection to its end.
pub(super) async fn serve(socket: net::TcpStream, worker: Rc<Worker>) {
    let metrics = &worker.shared.metrics;
    let greeted = match TcpStream::from_std(socket) {
        Ok(socket) => tokio::time::timeout(GREETING_WAIT, greet(socket, &worker.shared)).await,
        Err(_) => Ok(Err(Turned::Garbage)),
    };
    let over = match greeted {
        Err(_) => Some(Over::Idle),
        Ok(Err(Turned::Garbage)) => Some(Over::Garbage),
        Ok(Err(Turned::Away)) => {
            metrics.count(Event::NotLetIn);
            None
        }
        Ok(Ok((stream, lease))) => {
            metrics.count(Event::Let);
            Some(match stream {
                Stream::Plain(mut socket) => {
                    let (input, output) = socket.split();
                    converse(input, output, &lease, &worker).await
                }
                Stream::Tls(session) => {
                    let (input, output) = tokio::io::split(session);
                    converse(input, output, &lease, &worker).await
                }
            })
        }
    };
    match over {
        Some(Over::Garbage) => metrics.count(Event::Garbage),
        Some(Over::Slow) => metrics.count(Event::Slow),
        Some(Over::Idle) => metrics.count(Event::Idle),
        Some(Over::Gone) | None => {}
    }
    metrics.count(Event::Closed);
}

async fn converse(
    input: impl AsyncRead + Unpin,
    output: impl AsyncWrite + Unpin,
    lease: &Admitted,
    worker: &Rc<Worker>,
) -> Over {
    let (outgoing, pieces) = mpsc::channel(PIECES_AHEAD);
    let answers = Answers { outgoing, lease, worker };
    let sending = send(output, pieces, lease, worker);
    tokio::pin!(sending);
    // From here on an end is noticed; one before is seen now.
    let ended = lease.end.notified();
    if lease.has_ended() {
        return Over::Gone;
    }
    let taking = take(input, answers);
    tokio::select! {
        // Whatever the client has asked before it hung up is not sent any more.
        over = taking => over,
        over = &mut sending => over,
        () = ended => Over::Gone,
    }
}

/// Takes requests, and has their answers made.
async fn take(mut input: impl AsyncRead + Unpin, answers: Answers<'_>) -> Over {
    loop {
        let (mut first, mut start) = ([0; 1], [0; Header::BYTES]);
        match tokio::time::timeout(IDLE_MAX, input.read(&mut first)).await {
            Err(_) => return Over::Idle,
            Ok(Ok(0) | Err(_)) => return Over::Gone,
            Ok(Ok(_)) => start[0] = first[0],
        }
        let rest = async {
            input.read_exact(&mut start[1..]).await?;
            let header = Header::of_request(&start).map_err(io::Error::other)?;
            let mut body = vec![0; header.body_bytes];
            input.read_exact(&mut body).await?;
            Request::from_body(header.kind, &body).map(|request| (header.id, request)).map_err(io::Error::other)
        };
        let (id, request) = match tokio::time::timeout(REQUEST_WAIT, rest).await {
            Err(_) => return Over::Slow,
            Ok(Err(cause)) if cause.kind() == io::ErrorKind::Other => return Over::Garbage,
            Ok(Err(_)) => return Over::Gone,
            Ok(Ok(request)) => request,
        };
        if answers.lease.has_ended() || answers.answer(id, &request).await.is_err() {
            return Over::Gone;
        }
    }
}

/// Sends what is ready, in order.
async fn send(
    mut output: impl AsyncWrite + Unpin,
    mut pieces: mpsc::Receiver<Outgoing>,
    lease: &Admitted,
    worker: &Worker,
) -> Over {
    while let Some(next) = pieces.recv().await {
        let sent = match next {
            Outgoing::Frame(frame) => within(SEND_WAIT, write(&mut output, &frame)).await,
            Outgoing::Piece(read, id) => match read.await {
                Ok(Ok(buffer)) => {
                    let frame = buffer_frame(&buffer);
                    let sent = within(SEND_WAIT, write(&mut output, frame)).await;
                    let bytes = (frame.len() - Header::BYTES) as u64;
                    lease.sent(bytes);
                    worker.shared.metrics.add(Event::Bytes, bytes);
                    sent
                }
                Ok(Err(failure)) => {
                    worker.shared.metrics.count(Event::FailedRequest);
                    within(SEND_WAIT, write(&mut output, &failure.to_frame(id))).await
                }
                Err(_) => return Over::Gone,
            },
        };
        if let Err(over) = sent {
            return over;
        }
    }
    Over::Gone
}

/// The frame at the beginning of a buffer: the header, which we have written there, says how long it is.
fn buffer_frame(buffer: &FixedBuf) -> &[u8] {
    let body = buffer.first_chunk().and_then(|header| Header::of_answer(header).ok());
    &buffer[..Header::BYTES + body.map_or(0, |header| header.body_bytes)]
}

async fn write(output: &mut (impl AsyncWrite + Unpin), frame: &[u8]) -> io::Result<()> {
    output.write_all(frame).await?;
    output.flush().await
}

async fn within(patience: Duration, write: impl Future<Output = io::Result<()>>) -> Result<(), Over> {
    match tokio::time::timeout(patience, write).await {
        Err(_) => Err(Over::Slow),
        Ok(written) => written.map_err(|_| Over::Gone),
    }
}

/// Makes the answers of a connection.
struct Answers<'a> {
    outgoing: mpsc::Sender<Outgoing>,
    lease: &'a Admitted,
    worker: &'a Rc<Worker>,
}

/// Nobody sends any more.
struct HungUp;

impl Answers<'_> {
    async fn answer(&self, id: u64, request: &Request) -> Result<(), HungUp> {
        let metrics = &self.worker.shared.metrics;
        metrics.count(Event::Request);
        if let Request::Read { key, .. } | Request::Get { key, .. } | Request::Size { key } = request {
            self.lease.coverage.choose(key).await;
        }
        let answered = match request {
            Request::Read { key, ranges } => self.read(id, key, ranges).await?,
            Request::Get { key, limit } => self.get(id, key, *limit).await?,
            Request::Size { key } => match self.size(key).await {
                Ok(size) => return self.frame(sized_frame(id, size)).await,
                Err(failure) => Err(failure),
            },
            Request::List { directory } => match self.list(id, directory).await {
                Ok(frames) => {
                    for frame in frames {
                        self.frame(frame).await?;
                    }
                    Ok(())
                }
                Err(failure) => Err(failure),
            },
        };
        let Err(failure) = answered else { return Ok(()) };
        let is_refusal = failure.code == FailureCode::Refused;
        metrics.count(if is_refusal { Event::RefusedRequest } else { Event::FailedRequest });
        self.frame(failure.to_frame(id)).await
    }

    async fn read(&self, id: u64, key: &str, ranges: &[ByteRange]) -> Result<Result<(), Failure>, HungUp> {
        let runs = match self.lease.coverage.reach(key, ranges).await {
            Reach::Nothing => return Ok(Err(not_covered())),
            Reach::Whole => None,
            Reach::Only(runs) => Some(runs),
        };
        let covers = |runs: &Runs| ranges.iter().all(|range| runs.answer(&(range.offset..range.end())) == Some(true));
        if !runs.as_ref().is_none_or(covers) {
            return Ok(Err(not_covered()));
        }
        match self.worker.files.kept(&self.worker.shared, key).await {
            Ok(file) => self.pieces(id, key, &file, (ranges, runs)).await.map(Ok),
            Err(error) => Ok(Err(failure_of(&error))),
        }
    }

    async fn get(&self, id: u64, key: &str, limit: u64) -> Result<Result<(), Failure>, HungUp> {
        if self.reach(key) != Reach::Whole {
            return Ok(Err(not_covered()));
        }
        // As it is now: descriptions may have been replaced.
        let file = match self.worker.files.now(&self.worker.shared, key).await {
            Ok(file) => Rc::new(file),
            Err(error) => return Ok(Err(failure_of(&error))),
        };
        if file.bytes > limit {
            return Ok(Err(Failure::new(FailureCode::Corrupt, format!("longer than {limit} bytes"))));
        }
        if file.bytes == 0 {
            let header = Header { kind: engine::remote::frame::Kind::Data, is_last: true, body_bytes: 0, id };
            self.frame(header.to_bytes().to_vec()).await?;
            return Ok(Ok(()));
        }
        let most = u64::from(u32::MAX);
        let range = |offset: u64| ByteRange { offset, bytes: (file.bytes - offset).min(most) as u32 };
        let ranges: Vec<_> = (0..file.bytes).step_by(u32::MAX as usize).map(range).collect();
        self.pieces(id, key, &file, (&ranges, None)).await.map(Ok)
    }

    async fn size(&self, key: &str) -> Result<Option<u64>, Failure> {
        if self.reach(key) == Reach::Nothing {
            return Err(not_covered());
        }
        files::size(&self.worker.shared, key).await.map_err(|error| failure_of(&error))
    }

    async fn list(&self, id: u64, directory: &str) -> Result<Vec<Vec<u8>>, Failure> {
        let listed = files::list(&self.worker.shared, directory);
        let mut entries = match self.lease.coverage.coverage() {
            Some(coverage) => {
                let shown = coverage.lists(directory).ok_or_else(not_covered)?;
                let mut entries = listed.await.map_err(|error| failure_of(&error))?;
                entries.retain(|entry| shown(entry.name()));
                entries
            }
            None => listed.await.map_err(|error| failure_of(&error))?,
        };
        entries.shrink_to_fit();
        Ok(listed_frames(id, &entries))
    }

    /// Has the pieces read, as fast as they can be sent, without what lies between `runs`.
    async fn pieces(
        &self,
        id: u64,
        key: &str,
        file: &Rc<Open>,
        (ranges, runs): (&[ByteRange], Option<Runs>),
    ) -> Result<(), HungUp> {
        for (range, is_last) in cut(ranges) {
            self.hold_back(u64::from(range.bytes)).await;
            // A place in the queue first: whoever waits for it holds no buffer.
            let place = self.outgoing.reserve().await.map_err(|_| HungUp)?;
            let mut buffer = self.worker.buffers.next().await;
            if self.lease.has_ended() {
                return Err(HungUp);
            }
            let (worker, file, key) = (Rc::clone(self.worker), Rc::clone(file), key.to_owned());
            let runs = runs.clone();
            let read = tokio::task::spawn_local(async move {
                let read = worker.buffers.read(&file.file, range, id, is_last, buffer).await;
                buffer = read.map_err(|cause| {
                    worker.files.forget(&key);
                    failure_of_read(&cause, range)
                })?;
                if let Some(runs) = runs {
                    runs.blank(range.offset, &mut buffer[Header::BYTES..Header::BYTES + range.bytes as usize]);
                }
                Ok(buffer)
            });
            place.send(Outgoing::Piece(read, id));
        }
        Ok(())
    }

    /// Waits until bytes may go, by the limits of the lease and of the service.
    async fn hold_back(&self, bytes: u64) {
        let limits = [&self.lease.limit, &self.worker.shared.limit];
        if limits.iter().all(|limit| limit.is_none()) {
            return;
        }
        let _turn = self.lease.turn.lock().await;
        for limit in limits.into_iter().flatten() {
            limit.pass(bytes).await;
        }
    }

    async fn frame(&self, frame: Vec<u8>) -> Result<(), HungUp> {
        self.outgoing.send(Outgoing::Frame(frame)).await.map_err(|_| HungUp)
    }

    fn reach(&self, key: &str) -> Reach {
        self.lease.coverage.coverage().map_or(Reach::Whole, |coverage| coverage.reach(key))
    }
}

fn not_covered() -> Failure {
    Failure::new(FailureCode::Refused, "not covered by the lease")
}

/// What a client makes the same error of.
fn failure_of(error: &Error) -> Failure {
    let code = match error {
        Error::Io { .. } if error.raw_os_error() == Some(libc::ENOENT) => FailureCode::Absent,
        Error::Io { .. } | Error::Locked { .. } | Error::Cancelled => FailureCode::Io,
        Error::Corrupt { .. } | Error::Unsupported { .. } => FailureCode::Corrupt,
        Error::NotFound(_) => FailureCode::Absent,
        Error::Refused(_) => FailureCode::Refused,
    };
    let errno = error.raw_os_error().and_then(|errno| u16::try_from(errno).ok()).unwrap_or_default();
    Failure { errno, ..Failure::new(code, error.to_string()) }
}

fn failure_of_read(cause: &io::Error, range: ByteRange) -> Failure {
    let offset = Some(range.offset);
    if cause.kind() == io::ErrorKind::UnexpectedEof {
        let detail = format!("the file ends within the {} bytes wanted here", range.bytes);
        return Failure { offset, ..Failure::new(FailureCode::Corrupt, detail) };
    }
    let errno = cause.raw_os_error().and_then(|errno| u16::try_from(errno).ok()).unwrap_or_default();
    Failure { offset, errno, ..Failure::new(FailureCode::Io, cause.to_string()) }
}
