//! One connection's bytes: TCP, under TLS or not, in two halves that different threads may use at once.
//!
//! The sockets block, but wake up each [`TICK`], so that whoever waits can see that nobody wants it any more.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustls::ClientConnection;
use rustls::pki_types::ServerName;

use super::connection::Fault;
use super::frame::{FailureCode, Hello, VERSION, Welcome};
use super::{Access, Patience, Security, pin};

/// How long the other machine may take to accept a connection, or to say the next thing of a greeting.
const GREETING_WAIT: Duration = Duration::from_secs(10);
/// How often whoever waits for bytes looks around.
const TICK: Duration = Duration::from_secs(1);
/// A server that owes an answer and sends nothing for so long is taken for lost: longer than any disk that will still
/// answer, or than a rate limit makes its clients wait.
pub(super) const SILENCE_MAX: Duration = Duration::from_secs(30);
/// A request that nobody has acknowledged for so long was sent into nothing.
const UNACKNOWLEDGED_MS_MAX: u32 = 15_000;
/// What a socket is read by under TLS: several records.
const CIPHERTEXT_BYTES: usize = 64 << 10;

/// Where requests go.
pub(super) struct Writer {
    socket: TcpStream,
    session: Option<Arc<Mutex<ClientConnection>>>,
}

/// Where answers come from.
pub(super) struct Reader {
    socket: TcpStream,
    session: Option<Encrypted>,
}

struct Encrypted {
    session: Arc<Mutex<ClientConnection>>,
    ciphertext: Box<[u8]>,
    /// What of it is still to be decrypted.
    left: std::ops::Range<usize>,
}

/// Connects, and is let in or not. With the most requests that the server takes at once, and the time that its answer to
/// the greeting took: a round trip.
pub(super) fn open(access: &Access) -> Result<(Writer, Reader, u16, Duration), Fault> {
    let lost = |cause: io::Error| Fault::lost(format!("cannot connect: {cause}"));
    let mut socket = connect(&access.address).map_err(lost)?;
    let session = match access.security {
        Security::Plain => None,
        Security::Tls(fingerprint) => Some(handshake(&mut socket, fingerprint)?),
    };
    let reading = socket.try_clone().map_err(lost)?;
    let encrypted = session.as_ref().map(|session| Encrypted {
        session: Arc::clone(session),
        ciphertext: vec![0; CIPHERTEXT_BYTES].into(),
        left: 0..0,
    });
    let mut writer = Writer { socket, session };
    let mut reader = Reader { socket: reading, session: encrypted };
    let hello = Hello { version: VERSION, lease: access.lease, token: access.token.clone() };
    let greeted = Instant::now();
    writer.send(&hello.to_bytes()).map_err(lost)?;
    let mut welcome = [0; Welcome::BYTES];
    reader.fill(&mut welcome, &GreetingOnly)?;
    let greeted_in = greeted.elapsed();
    let welcome = Welcome::from_bytes(&welcome).map_err(|malformed| Fault::lost(malformed.to_string()))?;
    if welcome.version != VERSION {
        let detail = format!("it speaks version {} of the protocol, this program version {VERSION}", welcome.version);
        return Err(Fault::NotLetIn(FailureCode::Refused, detail));
    }
    if let Some(code) = welcome.refusal {
        let why = match code {
            FailureCode::Ended => "the lease has ended",
            FailureCode::Busy => "it has as many connections as it takes",
            _ => "it knows no such lease, or the token is not its",
        };
        return Err(Fault::NotLetIn(code, why.to_owned()));
    }
    writer.socket.set_read_timeout(Some(TICK)).map_err(lost)?;
    Ok((writer, reader, welcome.requests_max, greeted_in))
}

fn connect(address: &SocketAddr) -> io::Result<TcpStream> {
    let socket = TcpStream::connect_timeout(address, GREETING_WAIT)?;
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(GREETING_WAIT))?;
    socket.set_write_timeout(Some(GREETING_WAIT))?;
    rustix::net::sockopt::set_tcp_user_timeout(&socket, UNACKNOWLEDGED_MS_MAX)?;
    Ok(socket)
}

fn handshake(socket: &mut TcpStream, expected: super::Fingerprint) -> Result<Arc<Mutex<ClientConnection>>, Fault> {
    let failed = |error: rustls::Error| {
        if pin::is_stranger(&error) {
            let detail = format!("it has another certificate than that with the fingerprint {expected}");
            return Fault::NotLetIn(FailureCode::Refused, detail);
        }
        Fault::lost(format!("no TLS connection: {error}"))
    };
    let config = pin::client_config(expected).map_err(failed)?;
    let name = ServerName::try_from(pin::SERVER_NAME).map_err(|error| Fault::lost(error.to_string()))?;
    let mut session = ClientConnection::new(config, name).map_err(failed)?;
    while session.is_handshaking() {
        session.complete_io(socket).map_err(|cause| match cause.get_ref().and_then(|error| error.downcast_ref()) {
            Some(error) => failed(rustls::Error::clone(error)),
            None => Fault::lost(format!("no TLS connection: {cause}")),
        })?;
    }
    Ok(Arc::new(Mutex::new(session)))
}

/// Of a greeting: its own timeouts end it.
#[derive(Debug)]
struct GreetingOnly;

impl Patience for GreetingOnly {
    fn goes_on(&self, _: Duration) -> bool {
        false
    }
}

impl Writer {
    /// Sends all of `frame`.
    pub(super) fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        let Some(session) = &self.session else { return self.socket.write_all(frame) };
        let mut ciphertext = Vec::with_capacity(frame.len() + 64);
        {
            let mut session = lock(session);
            session.writer().write_all(frame)?;
            while session.wants_write() {
                session.write_tls(&mut ciphertext)?;
            }
        }
        self.socket.write_all(&ciphertext)
    }

    /// The same socket, for whoever hangs up while somebody else sends.
    pub(super) fn socket(&self) -> io::Result<TcpStream> {
        self.socket.try_clone()
    }
}

impl Reader {
    /// Reads until `out` is full.
    pub(super) fn fill(&mut self, out: &mut [u8], patience: &dyn Patience) -> Result<(), Fault> {
        let (mut filled, mut heard) = (0, Instant::now());
        while filled < out.len() {
            match self.read(&mut out[filled..]) {
                Ok(0) => return Err(Fault::lost("the connection was closed")),
                Ok(bytes) => (filled, heard) = (filled + bytes, Instant::now()),
                Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
                Err(cause) if matches!(cause.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    let silence = heard.elapsed();
                    if silence > SILENCE_MAX || !patience.goes_on(silence) {
                        return Err(Fault::lost(format!("no answer for {} s", silence.as_secs())));
                    }
                }
                Err(cause) => return Err(Fault::lost(cause.to_string())),
            }
        }
        Ok(())
    }

    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let Some(encrypted) = &mut self.session else { return self.socket.read(out) };
        loop {
            if let Some(bytes) = encrypted.decrypt(out)? {
                return Ok(bytes);
            }
            let bytes = self.socket.read(&mut encrypted.ciphertext)?;
            if bytes == 0 {
                return Ok(0);
            }
            encrypted.left = 0..bytes;
        }
    }
}

impl Encrypted {
    /// Plain bytes out of what was read; none if that is not a whole record.
    fn decrypt(&mut self, out: &mut [u8]) -> io::Result<Option<usize>> {
        let mut session = lock(&self.session);
        loop {
            match session.reader().read(out) {
                Err(cause) if cause.kind() == io::ErrorKind::WouldBlock => {}
                read => return read.map(Some),
            }
            if self.left.is_empty() {
                return Ok(None);
            }
            let mut rest = &self.ciphertext[self.left.clone()];
            self.left.start += session.read_tls(&mut rest)?;
            session.process_new_packets().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A session that a panic left half changed fails at the next record.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
