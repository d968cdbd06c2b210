//! The mount service as a store: the reading part of one.
//!
//! A few connections are shared by all threads; another is opened when all have something to do. A call that fails
//! because its connection is lost is made again on another one, whatever it was: all that can be asked is a question.
//!
//! What is held in memory is what callers asked for, in their own buffers, a little for each connection, and what was
//! asked for ahead ([`super::ahead`]).

use std::fs::File;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use super::ahead::{Ahead, Taken};
use super::connection::{Connection, Fault};
use super::frame::{Failure, FailureCode, KEY_BYTES_MAX, RANGES_MAX, READ_BYTES_MAX};
use super::message::{ByteRange, Request};
use super::pace::Pace;
use super::sink::Sink;
use super::{Access, Patience};
use crate::store::{Entry, Existing, Store, Upload};
use crate::{Error, Result};

/// Connections of one client. One alone carries no more than the kernel's receive window (6 MiB unless set otherwise) a
/// round trip, and its encryption takes no more than one core a side: eight are enough for 1 GB/s at 20 ms.
const CONNECTIONS_MAX: usize = 8;
/// The second try is made at once: the service may only have closed what was idle. Pauses before those that follow grow
/// from the first to the last.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// How often whoever waits between two tries looks around.
const TICK: Duration = Duration::from_millis(100);

/// Memory for what is asked for ahead, unless somebody says how much.
const AHEAD_BYTES_DEFAULT: usize = 32 << 20;

/// A repository that the mount service reads for us, as far as a lease goes.
#[derive(Debug)]
pub struct RemoteStore {
    client: Arc<Client>,
    ahead: Ahead,
}

/// Calls, and the connections that they are made on.
#[derive(Debug)]
pub(super) struct Client {
    pace: Mutex<Pace>,
    access: RwLock<Access>,
    patience: Arc<dyn Patience>,
    pool: Mutex<Pool>,
    /// A connection was opened, or could not be.
    opened: Condvar,
    bytes: AtomicU64,
    lost: AtomicU64,
}

#[derive(Debug, Default)]
struct Pool {
    open: Vec<Arc<Connection>>,
    /// How many are being opened.
    opening: usize,
    /// Counts changes of the access: a connection of an older one is not kept.
    generation: u64,
}

/// What a store has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes of keys that came, those of reads alone.
    pub bytes: u64,
    /// Calls that had to be made again, because there was no connection or it was lost.
    pub lost: u64,
}

impl RemoteStore {
    /// Connects. Whatever keeps the first connection from being made is told at once: a wrong address, certificate or
    /// token. From then on `patience` says how long a call waits for a service that is gone.
    pub fn connect(access: Access, patience: Arc<dyn Patience>) -> Result<Self> {
        let client = Arc::new(Client::connect(access, patience)?);
        let ahead = Ahead::new(Arc::clone(&client), AHEAD_BYTES_DEFAULT);
        Ok(Self { client, ahead })
    }

    /// Whether the service answers at this very address and lets this lease in; who else answers there is not it.
    pub fn answers(access: &Access) -> bool {
        let busy = |fault: &Fault| matches!(fault, Fault::NotLetIn(FailureCode::Busy, _));
        super::stream::open(access).map_or_else(|fault| busy(&fault), |_| true)
    }

    /// Goes on with another access, on which every call from now on is made: the service came back with a new lease, or
    /// at another place. Calls that wait are made on it too.
    pub fn renew(&self, access: Access) {
        self.client.renew(access);
    }

    /// What it has done so far.
    pub fn counters(&self) -> Counters {
        let Client { bytes, lost, .. } = &*self.client;
        Counters { bytes: bytes.load(Ordering::Relaxed), lost: lost.load(Ordering::Relaxed) }
    }

    /// Fills each buffer from its byte of `key`: as few requests as it takes, each of several ranges.
    pub fn read_ranges(&self, key: &str, wanted: &mut [(u64, &mut [u8])]) -> Result<()> {
        self.client.read_ranges(key, wanted)
    }

    fn read_only<T>(&self, what: &str) -> Result<T> {
        Err(Error::Refused(format!("the mount service only reads: it will not {what}")))
    }
}

impl Client {
    fn connect(access: Access, patience: Arc<dyn Patience>) -> Result<Self> {
        let first = Connection::open(&access).map_err(|fault| Self::not_connected(&access, fault))?;
        let mut pace = Pace::new(Instant::now());
        pace.greeted(first.greeted_in);
        let pool = Pool { open: vec![Arc::new(first)], ..Pool::default() };
        Ok(Self {
            pace: Mutex::new(pace),
            access: RwLock::new(access),
            patience,
            pool: Mutex::new(pool),
            opened: Condvar::new(),
            bytes: AtomicU64::new(0),
            lost: AtomicU64::new(0),
        })
    }

    fn renew(&self, access: Access) {
        *self.access.write().unwrap_or_else(PoisonError::into_inner) = access;
        let old = {
            let mut pool = self.pool();
            pool.generation += 1;
            std::mem::take(&mut pool.open)
        };
        // Another way, perhaps: its first greeting tells how long it is.
        *self.pace() = Pace::new(Instant::now());
        for connection in old {
            connection.lose(Fault::lost("the access was renewed"));
        }
    }

    /// What is worth being asked for ahead.
    pub(super) fn window_bytes(&self) -> u64 {
        self.pace().window_bytes()
    }

    /// Fills each buffer from its byte of `key`: as few requests as it takes, each of several ranges.
    pub(super) fn read_ranges(&self, key: &str, wanted: &mut [(u64, &mut [u8])]) -> Result<()> {
        let (mut ranges, mut parts, mut bytes) = (Vec::new(), Vec::new(), 0);
        for (offset, out) in wanted {
            let mut at = *offset;
            for part in out.chunks_mut(READ_BYTES_MAX as usize) {
                let more = part.len() as u64;
                if ranges.len() == RANGES_MAX || bytes + more > READ_BYTES_MAX {
                    self.read(key, std::mem::take(&mut ranges), &mut std::mem::take(&mut parts))?;
                    bytes = 0;
                }
                if at.checked_add(more).is_none() {
                    return Err(Error::corrupt_at(self.describe(key), at, "no file is that long"));
                }
                ranges.push(ByteRange { offset: at, bytes: part.len() as u32 });
                parts.push(part);
                (at, bytes) = (at + more, bytes + more);
            }
        }
        if ranges.is_empty() { Ok(()) } else { self.read(key, ranges, &mut parts) }
    }

    fn read(&self, key: &str, ranges: Vec<ByteRange>, parts: &mut [&mut [u8]]) -> Result<()> {
        let bytes: u64 = ranges.iter().map(|range| u64::from(range.bytes)).sum();
        self.call(&Request::Read { key: key.to_owned(), ranges }, &mut Sink::parts(parts))?;
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.pace().arrived(bytes, Instant::now());
        Ok(())
    }

    /// Asks until there is an answer, or the session gives up.
    fn call(&self, request: &Request, sink: &mut Sink) -> Result<()> {
        let key = request.key();
        if key.is_empty() || key.len() > KEY_BYTES_MAX || key.contains('\0') {
            return Err(Error::Refused(format!("\"{}\" is not a key of a store", key.escape_debug())));
        }
        let began = Instant::now();
        let mut pause = Duration::ZERO;
        loop {
            let called = self.connection().and_then(|connection| {
                sink.begin_again();
                connection.call(request, sink, &*self.patience)
            });
            let why = match called {
                Ok(()) => return Ok(()),
                Err(Fault::Lost(why)) => {
                    // Those that nobody reads from have most likely gone the same way.
                    self.pool().open.retain(|connection| connection.in_flight().is_some_and(|calls| calls > 0));
                    why.to_string()
                }
                Err(Fault::Failed(Failure { code: FailureCode::Busy, detail, .. })) => detail,
                Err(Fault::Failed(failure)) => return Err(self.error(key, failure)),
                Err(Fault::NotLetIn(FailureCode::Ended, why)) => {
                    return Err(self.error(key, Failure::new(FailureCode::Ended, why)));
                }
                // Of a service that was started again, and has not its leases again yet.
                Err(Fault::NotLetIn(_, why)) => why,
            };
            self.lost.fetch_add(1, Ordering::Relaxed);
            if !self.pause(pause, began) {
                let waited = began.elapsed().as_secs();
                if self.patience.is_cancelled() {
                    return Err(Error::Cancelled);
                }
                let detail = format!("given up after {waited} s without the mount service: {why}");
                return Err(Error::io("read", self.describe(key), std::io::Error::other(detail)));
            }
            pause = (pause * 2).clamp(PAUSE_MIN, PAUSE_MAX);
        }
    }

    /// Waits a moment; false once the session has given up.
    fn pause(&self, pause: Duration, began: Instant) -> bool {
        let end = Instant::now() + pause;
        loop {
            if !self.patience.goes_on(began.elapsed()) {
                return false;
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            std::thread::sleep(left.min(TICK));
        }
    }

    /// The connection with the least to do, or a new one.
    fn connection(&self) -> Result<Arc<Connection>, Fault> {
        let mut pool = self.pool();
        loop {
            pool.open.retain(|connection| connection.in_flight().is_some());
            let least = pool.open.iter().min_by_key(|connection| connection.in_flight()).map(Arc::clone);
            let is_full = pool.open.len() + pool.opening >= CONNECTIONS_MAX;
            match least {
                Some(connection) if is_full || connection.in_flight() == Some(0) => return Ok(connection),
                None if is_full => {
                    let waited = self.opened.wait_timeout(pool, Duration::from_secs(1));
                    pool = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
                other => {
                    pool.opening += 1;
                    let generation = pool.generation;
                    drop(pool);
                    return self.open(generation, other);
                }
            }
        }
    }

    /// Opens one more; `other` is what there is if that fails.
    fn open(&self, generation: u64, other: Option<Arc<Connection>>) -> Result<Arc<Connection>, Fault> {
        let access = self.access().clone();
        let opened = Connection::open(&access).map(Arc::new);
        let mut pool = self.pool();
        pool.opening -= 1;
        self.opened.notify_all();
        match (opened, other) {
            (Ok(connection), _) => {
                if pool.generation == generation {
                    self.pace().greeted(connection.greeted_in);
                    pool.open.push(Arc::clone(&connection));
                }
                Ok(connection)
            }
            (Err(_), Some(other)) => Ok(other),
            (Err(fault), None) => Err(fault),
        }
    }

    fn pool(&self) -> MutexGuard<'_, Pool> {
        // A panic elsewhere cannot leave it half changed.
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pace(&self) -> MutexGuard<'_, Pace> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn describe(&self, key: &str) -> PathBuf {
        format!("{}/{key}", self.access().address).into()
    }

    fn access(&self) -> std::sync::RwLockReadGuard<'_, Access> {
        self.access.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn not_connected(access: &Access, fault: Fault) -> Error {
        let place = format!("the mount service at {}", access.address);
        match fault {
            Fault::NotLetIn(_, why) => Error::Refused(format!("{place} refuses: {why}")),
            Fault::Lost(why) => Error::io("reach", place, std::io::Error::other(why.to_string())),
            Fault::Failed(failure) => Error::Refused(failure.detail),
        }
    }

    /// The error that the same thing would be where the repository is.
    fn error(&self, key: &str, failure: Failure) -> Error {
        let path = self.describe(key);
        let source = match (failure.code, failure.errno) {
            (FailureCode::Corrupt, _) => {
                return Error::Corrupt { path, offset: failure.offset, detail: failure.detail };
            }
            (FailureCode::Refused, _) => {
                return Error::Refused(format!("{}: {}", path.display(), failure.detail));
            }
            (FailureCode::Absent, _) => std::io::Error::from_raw_os_error(libc::ENOENT),
            (FailureCode::Io, errno) if errno > 0 => std::io::Error::from_raw_os_error(errno.into()),
            (FailureCode::Io | FailureCode::Ended | FailureCode::Busy, _) => std::io::Error::other(failure.detail),
        };
        Error::Io { operation: "read", path, offset: failure.offset, source }
    }
}

impl Store for RemoteStore {
    fn read_at(&self, key: &str, offset: u64, out: &mut [u8]) -> Result<()> {
        let mut filled = 0;
        while filled < out.len() {
            let (at, rest) = (offset.saturating_add(filled as u64), &mut out[filled..]);
            match self.ahead.take(key, at, rest) {
                Taken::Here(bytes) => filled += bytes,
                Taken::Nothing(bytes) => {
                    self.client.read_ranges(key, &mut [(at, &mut rest[..bytes])])?;
                    filled += bytes;
                }
            }
        }
        Ok(())
    }

    fn allow_ahead(&self, bytes: usize) -> usize {
        self.ahead.allow(bytes);
        bytes
    }

    fn ahead_room(&self) -> u64 {
        self.ahead.room()
    }

    fn fetch_ahead(&self, key: &str, range: Range<u64>) -> bool {
        self.ahead.fetch(key, range)
    }

    fn read_ranges(&self, key: &str, wanted: &mut [(u64, &mut [u8])]) -> Result<()> {
        self.client.read_ranges(key, wanted)
    }

    fn size(&self, key: &str) -> Result<Option<u64>> {
        let mut sink = Sink::Size(None);
        self.client.call(&Request::Size { key: key.to_owned() }, &mut sink)?;
        Ok(if let Sink::Size(size) = sink { size } else { None })
    }

    fn list(&self, directory: &str) -> Result<Vec<Entry>> {
        let mut sink = Sink::Entries { directory, entries: Vec::new() };
        self.client.call(&Request::List { directory: directory.to_owned() }, &mut sink)?;
        Ok(if let Sink::Entries { entries, .. } = sink { entries } else { Vec::new() })
    }

    fn get(&self, key: &str, limit: u64) -> Result<Vec<u8>> {
        let mut sink = Sink::All { bytes: Vec::new(), limit };
        self.client.call(&Request::Get { key: key.to_owned(), limit }, &mut sink)?;
        Ok(if let Sink::All { bytes, .. } = sink { bytes } else { Vec::new() })
    }

    fn create(&self, key: &str, _: Existing) -> Result<Box<dyn Upload + Send>> {
        self.read_only(&format!("write {key}"))
    }

    fn settle(&self, key: &str) -> Result<()> {
        self.read_only(&format!("sync {key}"))
    }

    fn remove(&self, key: &str) -> Result<()> {
        self.read_only(&format!("remove {key}"))
    }

    fn sweep_uploads(&self, directory: &str) -> Result<u64> {
        self.read_only(&format!("sweep {directory}"))
    }

    fn open_lock(&self, key: &str) -> Result<File> {
        self.read_only(&format!("lock {key}"))
    }

    fn describe(&self, key: &str) -> PathBuf {
        self.client.describe(key)
    }

    fn local_path(&self, _: &str) -> Option<PathBuf> {
        None
    }
}
