//! The frames of the data plane: bytes to structs and back, pure. *PROTOCOL.md* describes them; a test holds it true.
//!
//! A client says [`Hello`], the server [`Welcome`]; from then on the client sends requests and the server answers, each in
//! frames of a [`Header`] and a body. Requests have ids, and answers may come in any order.
//!
//! Bytes are hostile, those of a server as well: a header is refused before anything is allocated for its body, and every
//! refusal says what was found.

use std::ops::Range;

use super::Token;
use super::access::LeaseId;
use crate::format::Malformed;
use crate::format::fields::{bytes_at, shown, u16_at, u32_at, u64_at};

/// Begins each greeting.
pub const MAGIC: [u8; 8] = *b"pghy-net";
/// The protocol that this version speaks, and the only one.
pub const VERSION: u16 = 1;
/// The longest key: that of a backup of the longest names has 160.
pub const KEY_BYTES_MAX: usize = 255;
/// Ranges of one request to read.
pub const RANGES_MAX: usize = 64;
/// Bytes of all ranges of one request to read: twice what any reader of blocks asks for at once.
pub const READ_BYTES_MAX: u64 = 4 << 20;
/// The most data in one frame: long enough that its header costs nothing, short enough that many fit into the memory of
/// the server.
pub const PIECE_BYTES_MAX: usize = 256 << 10;
/// The text of a failure.
pub const DETAIL_BYTES_MAX: usize = 1024;

/// The body of a request to read, without its ranges and its key.
const READ_HEAD_BYTES: usize = 8;
pub(super) const RANGE_BYTES: usize = 12;
const REQUEST_BYTES_MAX: usize = READ_HEAD_BYTES + RANGES_MAX * RANGE_BYTES + KEY_BYTES_MAX;
const FAILURE_HEAD_BYTES: usize = 12;

const _: () = assert!(crate::io::BUFFER_BYTES as u64 <= READ_BYTES_MAX);
const _: () = assert!(READ_BYTES_MAX <= u32::MAX as u64);
const _: () = assert!(REQUEST_BYTES_MAX < PIECE_BYTES_MAX && FAILURE_HEAD_BYTES + DETAIL_BYTES_MAX < PIECE_BYTES_MAX);
const _: () = assert!(KEY_BYTES_MAX <= u8::MAX as usize && RANGES_MAX <= u16::MAX as usize);

/// What a client says first: which lease it is of, and the proof.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The version that it speaks.
    pub version: u16,
    /// Whose blocks it wants.
    pub lease: LeaseId,
    /// That it may have them.
    pub token: Token,
}

/// What the server says to that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// The version that it speaks.
    pub version: u16,
    /// Why it goes no further, if it does not.
    pub refusal: Option<FailureCode>,
    /// How many requests it takes on one connection before it has answered any.
    pub requests_max: u16,
}

const GREETING_MAGIC: Range<usize> = 0..8;
const GREETING_VERSION: Range<usize> = GREETING_MAGIC.end..GREETING_MAGIC.end + 2;
const HELLO_ZERO: Range<usize> = GREETING_VERSION.end..GREETING_VERSION.end + 6;
const HELLO_LEASE: Range<usize> = HELLO_ZERO.end..HELLO_ZERO.end + 16;
const HELLO_TOKEN: Range<usize> = HELLO_LEASE.end..HELLO_LEASE.end + 32;
const WELCOME_REFUSAL: usize = GREETING_VERSION.end;
const WELCOME_ZERO: usize = WELCOME_REFUSAL + 1;
const WELCOME_REQUESTS: Range<usize> = WELCOME_ZERO + 1..WELCOME_ZERO + 3;
const WELCOME_REST: Range<usize> = WELCOME_REQUESTS.end..WELCOME_REQUESTS.end + 2;

impl Hello {
    /// Bytes of a hello.
    pub const BYTES: usize = HELLO_TOKEN.end;

    /// As it is sent.
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[GREETING_MAGIC].copy_from_slice(&MAGIC);
        bytes[GREETING_VERSION].copy_from_slice(&self.version.to_le_bytes());
        bytes[HELLO_LEASE].copy_from_slice(&self.lease.0);
        bytes[HELLO_TOKEN].copy_from_slice(self.token.bytes());
        bytes
    }

    /// The hello that [`to_bytes`](Self::to_bytes) made, of any version: whose lease is in the same place in all to come.
    pub fn from_bytes(bytes: &[u8; Self::BYTES]) -> Result<Self, Malformed> {
        let version = greeting_version(bytes)?;
        require_zero(bytes, HELLO_ZERO)?;
        Ok(Self {
            version,
            lease: LeaseId(bytes_at(bytes, HELLO_LEASE)),
            token: Token::new(bytes_at(bytes, HELLO_TOKEN)),
        })
    }
}

impl Welcome {
    /// Bytes of a welcome.
    pub const BYTES: usize = WELCOME_REST.end;

    /// As it is sent.
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[GREETING_MAGIC].copy_from_slice(&MAGIC);
        bytes[GREETING_VERSION].copy_from_slice(&self.version.to_le_bytes());
        bytes[WELCOME_REFUSAL] = self.refusal.map_or(0, |code| code as u8);
        bytes[WELCOME_REQUESTS].copy_from_slice(&self.requests_max.to_le_bytes());
        bytes
    }

    /// The welcome that [`to_bytes`](Self::to_bytes) made.
    pub fn from_bytes(bytes: &[u8; Self::BYTES]) -> Result<Self, Malformed> {
        let version = greeting_version(bytes)?;
        require_zero(bytes, WELCOME_ZERO..WELCOME_ZERO + 1)?;
        require_zero(bytes, WELCOME_REST)?;
        let refusal = match bytes[WELCOME_REFUSAL] {
            0 => None,
            code => Some(FailureCode::from_byte(code, WELCOME_REFUSAL)?),
        };
        let requests_max = u16_at(bytes, WELCOME_REQUESTS);
        if refusal.is_none() && requests_max == 0 {
            return Err(Malformed::damaged(WELCOME_REQUESTS.start, "a server that takes no request"));
        }
        Ok(Self { version, refusal, requests_max })
    }
}

fn greeting_version(bytes: &[u8]) -> Result<u16, Malformed> {
    if bytes[GREETING_MAGIC] != MAGIC {
        let detail = format!("a greeting that begins with {}", shown(&bytes[GREETING_MAGIC]));
        return Err(Malformed::damaged(0, detail));
    }
    Ok(u16_at(bytes, GREETING_VERSION))
}

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A request for bytes of a key.
    Read = 1,
    /// A request for the size of a key.
    Size = 2,
    /// A request for what lies under a directory.
    List = 3,
    /// A request for all bytes of a key.
    Get = 4,
    /// An answer: bytes, as they are stored.
    Data = 129,
    /// An answer: a size, or that there is no such key.
    Sized = 130,
    /// An answer: entries of a directory.
    Listed = 131,
    /// An answer: why not.
    Failed = 132,
}

impl Kind {
    /// From the client to the server.
    pub fn is_request(self) -> bool {
        (self as u8) < Self::Data as u8
    }

    fn body_bytes_max(self) -> usize {
        match self {
            Self::Read => REQUEST_BYTES_MAX,
            Self::Size | Self::List => KEY_BYTES_MAX,
            Self::Get => 8 + KEY_BYTES_MAX,
            Self::Data | Self::Listed => PIECE_BYTES_MAX,
            Self::Sized => 8,
            Self::Failed => FAILURE_HEAD_BYTES + DETAIL_BYTES_MAX,
        }
    }

    fn from_byte(byte: u8) -> Result<Self, Malformed> {
        Ok(match byte {
            1 => Self::Read,
            2 => Self::Size,
            3 => Self::List,
            4 => Self::Get,
            129 => Self::Data,
            130 => Self::Sized,
            131 => Self::Listed,
            132 => Self::Failed,
            other => return Err(Malformed::damaged(KIND, format!("a frame of kind {other}"))),
        })
    }
}

const LENGTH: Range<usize> = 0..4;
const KIND: usize = LENGTH.end;
const FLAGS: usize = KIND + 1;
const HEADER_ZERO: Range<usize> = FLAGS + 1..FLAGS + 3;
const ID: Range<usize> = HEADER_ZERO.end..HEADER_ZERO.end + 8;
const LAST: u8 = 1;

/// The beginning of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What it is.
    pub kind: Kind,
    /// Nothing more comes of this request or answer.
    pub is_last: bool,
    /// Bytes of the body that follows.
    pub body_bytes: usize,
    /// Which request it is, or answers.
    pub id: u64,
}

impl Header {
    /// Bytes of a header.
    pub const BYTES: usize = ID.end;

    /// As it is sent. Whoever makes a frame keeps its body below what its kind may have.
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        debug_assert!(self.body_bytes <= self.kind.body_bytes_max());
        let mut bytes = [0; Self::BYTES];
        bytes[LENGTH].copy_from_slice(&(self.body_bytes as u32).to_le_bytes());
        bytes[KIND] = self.kind as u8;
        bytes[FLAGS] = if self.is_last { LAST } else { 0 };
        bytes[ID].copy_from_slice(&self.id.to_le_bytes());
        bytes
    }

    /// The header of a request, as a server reads it.
    pub fn of_request(bytes: &[u8; Self::BYTES]) -> Result<Self, Malformed> {
        let header = Self::from_bytes(bytes)?;
        if header.kind.is_request() && header.is_last {
            return Ok(header);
        }
        Err(Malformed::damaged(KIND, format!("a frame of kind {} where a request is expected", header.kind as u8)))
    }

    /// The header of an answer, as a client reads it.
    pub fn of_answer(bytes: &[u8; Self::BYTES]) -> Result<Self, Malformed> {
        let header = Self::from_bytes(bytes)?;
        let whole = header.is_last || matches!(header.kind, Kind::Data | Kind::Listed);
        if !header.kind.is_request() && whole {
            return Ok(header);
        }
        Err(Malformed::damaged(KIND, format!("a frame of kind {} where an answer is expected", header.kind as u8)))
    }

    fn from_bytes(bytes: &[u8; Self::BYTES]) -> Result<Self, Malformed> {
        let kind = Kind::from_byte(bytes[KIND])?;
        let is_last = match bytes[FLAGS] {
            0 => false,
            LAST => true,
            other => return Err(Malformed::damaged(FLAGS, format!("flags {other} of a frame"))),
        };
        require_zero(bytes, HEADER_ZERO)?;
        let (body_bytes, most) = (u32_at(bytes, LENGTH) as usize, kind.body_bytes_max());
        if body_bytes > most {
            let detail = format!("a frame of {body_bytes} bytes, where {most} is the most for kind {}", kind as u8);
            return Err(Malformed::damaged(LENGTH.start, detail));
        }
        Ok(Self { kind, is_last, body_bytes, id: u64_at(bytes, ID) })
    }
}

/// Why a request, or a client, is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FailureCode {
    /// There is no such key.
    Absent = 1,
    /// Stored bytes are not what was written.
    Corrupt = 2,
    /// The lease does not cover it; of a hello: no such lease, or another token.
    Refused = 3,
    /// The lease has ended.
    Ended = 4,
    /// Too much at once: to be tried again.
    Busy = 5,
    /// The server's disk or kernel says no.
    Io = 6,
}

impl FailureCode {
    fn from_byte(byte: u8, at: usize) -> Result<Self, Malformed> {
        Ok(match byte {
            1 => Self::Absent,
            2 => Self::Corrupt,
            3 => Self::Refused,
            4 => Self::Ended,
            5 => Self::Busy,
            6 => Self::Io,
            other => return Err(Malformed::damaged(at, format!("failure {other}"))),
        })
    }
}

/// The body of [`Kind::Failed`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What the client would do about it.
    pub code: FailureCode,
    /// What the kernel said, where it said something.
    pub errno: u16,
    /// The byte of the key, where it is known.
    pub offset: Option<u64>,
    /// For people; cut where it is too long.
    pub detail: String,
}

const NO_OFFSET: u64 = u64::MAX;

impl Failure {
    /// Without a place and an errno.
    pub fn new(code: FailureCode, detail: impl Into<String>) -> Self {
        Self { code, errno: 0, offset: None, detail: detail.into() }
    }

    /// The whole frame.
    pub fn to_frame(&self, id: u64) -> Vec<u8> {
        let end = (0..=DETAIL_BYTES_MAX).rev().find(|end| self.detail.is_char_boundary(*end)).unwrap_or_default();
        let detail = if self.detail.len() > DETAIL_BYTES_MAX { &self.detail[..end] } else { &self.detail };
        let mut body = vec![self.code as u8, 0];
        body.extend_from_slice(&self.errno.to_le_bytes());
        body.extend_from_slice(&self.offset.unwrap_or(NO_OFFSET).to_le_bytes());
        body.extend_from_slice(detail.as_bytes());
        frame(Kind::Failed, true, id, &body)
    }

    /// The failure in a body.
    pub fn from_body(body: &[u8]) -> Result<Self, Malformed> {
        if body.len() < FAILURE_HEAD_BYTES {
            return Err(Malformed::damaged(body.len(), "a failure that is too short"));
        }
        require_zero(body, 1..2)?;
        let offset = u64_at(body, 4..12);
        let detail = std::str::from_utf8(&body[FAILURE_HEAD_BYTES..]);
        Ok(Self {
            code: FailureCode::from_byte(body[0], 0)?,
            errno: u16_at(body, 2..4),
            offset: (offset != NO_OFFSET).then_some(offset),
            detail: detail.map_err(|_| Malformed::damaged(FAILURE_HEAD_BYTES, "a detail that is no text"))?.to_owned(),
        })
    }
}

/// Header and body.
pub(super) fn frame(kind: Kind, is_last: bool, id: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = Header { kind, is_last, body_bytes: body.len(), id }.to_bytes().to_vec();
    bytes.extend_from_slice(body);
    bytes
}

pub(super) fn require_zero(bytes: &[u8], unused: Range<usize>) -> Result<(), Malformed> {
    match bytes[unused.clone()].iter().position(|byte| *byte != 0) {
        None => Ok(()),
        Some(at) => Err(Malformed::damaged(unused.start + at, "an unused field of a frame is not zero")),
    }
}
