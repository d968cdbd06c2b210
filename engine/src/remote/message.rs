//! Requests, and the answers that are more than bytes: their bodies, pure.

use super::frame::{
    KEY_BYTES_MAX, Kind, PIECE_BYTES_MAX, RANGE_BYTES, RANGES_MAX, READ_BYTES_MAX, frame, require_zero,
};
use crate::format::Malformed;
use crate::format::fields::{count_u16, i64_at, u16_at, u32_at, u64_at};
use crate::store::Entry;

/// Bytes of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteRange {
    /// The first.
    pub offset: u64,
    /// How many: never 0.
    pub bytes: u32,
}

impl ByteRange {
    /// The first byte behind it.
    pub fn end(&self) -> u64 {
        self.offset + u64::from(self.bytes)
    }
}

/// What a client asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// These bytes of a key, one range behind the other.
    Read {
        /// The key.
        key: String,
        /// From 1 to [`RANGES_MAX`], together no more than [`READ_BYTES_MAX`].
        ranges: Vec<ByteRange>,
    },
    /// How long a key is.
    Size {
        /// The key.
        key: String,
    },
    /// What lies directly under a directory.
    List {
        /// The directory.
        directory: String,
    },
    /// All of a key.
    Get {
        /// The key.
        key: String,
        /// More than this is a failure.
        limit: u64,
    },
}

const COUNT: std::ops::Range<usize> = 0..2;
const KEY_LENGTH: std::ops::Range<usize> = COUNT.end..COUNT.end + 2;
const READ_ZERO: std::ops::Range<usize> = KEY_LENGTH.end..KEY_LENGTH.end + 4;

impl Request {
    /// The key or the directory that it is about.
    pub fn key(&self) -> &str {
        match self {
            Self::Read { key, .. } | Self::Size { key } | Self::Get { key, .. } => key,
            Self::List { directory } => directory,
        }
    }

    /// The whole frame.
    pub fn to_frame(&self, id: u64) -> Vec<u8> {
        match self {
            Self::Read { key, ranges } => {
                let mut body = [count_u16(ranges.len()), count_u16(key.len())].concat();
                body.extend_from_slice(&[0; 4]);
                for range in ranges {
                    body.extend_from_slice(&range.offset.to_le_bytes());
                    body.extend_from_slice(&range.bytes.to_le_bytes());
                }
                body.extend_from_slice(key.as_bytes());
                frame(Kind::Read, true, id, &body)
            }
            Self::Size { key } => frame(Kind::Size, true, id, key.as_bytes()),
            Self::List { directory } => frame(Kind::List, true, id, directory.as_bytes()),
            Self::Get { key, limit } => {
                frame(Kind::Get, true, id, &[limit.to_le_bytes().as_slice(), key.as_bytes()].concat())
            }
        }
    }

    /// The request in the body of a frame of `kind`, which is that of a request.
    pub fn from_body(kind: Kind, body: &[u8]) -> Result<Self, Malformed> {
        match kind {
            Kind::Read => read_from_body(body),
            Kind::Size => Ok(Self::Size { key: key_from(body, 0)? }),
            Kind::List => Ok(Self::List { directory: key_from(body, 0)? }),
            Kind::Get if body.len() > 8 => Ok(Self::Get { limit: u64_at(body, 0..8), key: key_from(body, 8)? }),
            Kind::Get => Err(Malformed::damaged(body.len(), "a request that is too short")),
            Kind::Data | Kind::Sized | Kind::Listed | Kind::Failed => {
                Err(Malformed::damaged(0, "an answer where a request is expected"))
            }
        }
    }
}

fn read_from_body(body: &[u8]) -> Result<Request, Malformed> {
    if body.len() < READ_ZERO.end {
        return Err(Malformed::damaged(body.len(), "a request to read that is too short"));
    }
    let (count, key_length) = (usize::from(u16_at(body, COUNT)), usize::from(u16_at(body, KEY_LENGTH)));
    require_zero(body, READ_ZERO)?;
    if count == 0 || count > RANGES_MAX {
        return Err(Malformed::damaged(COUNT.start, format!("{count} ranges, expected 1 to {RANGES_MAX}")));
    }
    let keys_start = READ_ZERO.end + count * RANGE_BYTES;
    if body.len() != keys_start + key_length {
        let detail = format!("{count} ranges and a key of {key_length} bytes in a body of {}", body.len());
        return Err(Malformed::damaged(KEY_LENGTH.start, detail));
    }
    let (mut ranges, mut total) = (Vec::with_capacity(count), 0);
    for start in (READ_ZERO.end..keys_start).step_by(RANGE_BYTES) {
        let range = ByteRange { offset: u64_at(body, start..start + 8), bytes: u32_at(body, start + 8..start + 12) };
        if range.bytes == 0 || range.offset.checked_add(u64::from(range.bytes)).is_none() {
            let detail = format!("a range of {} bytes at {}", range.bytes, range.offset);
            return Err(Malformed::damaged(start, detail));
        }
        total += u64::from(range.bytes);
        ranges.push(range);
    }
    if total > READ_BYTES_MAX {
        let detail = format!("{total} bytes wanted at once, {READ_BYTES_MAX} is the most");
        return Err(Malformed::damaged(READ_ZERO.end, detail));
    }
    Ok(Request::Read { key: key_from(body, keys_start)?, ranges })
}

fn key_from(body: &[u8], start: usize) -> Result<String, Malformed> {
    let key = &body[start..];
    if key.is_empty() || key.len() > KEY_BYTES_MAX || key.contains(&0) {
        return Err(Malformed::damaged(start, format!("a key of {} bytes, or with a zero in it", key.len())));
    }
    let text = std::str::from_utf8(key).map_err(|_| Malformed::damaged(start, "a key that is no text"))?;
    Ok(text.to_owned())
}

/// The answer to [`Request::Size`], as a frame.
pub fn sized_frame(id: u64, size: Option<u64>) -> Vec<u8> {
    let bytes = size.map(u64::to_le_bytes);
    frame(Kind::Sized, true, id, bytes.as_ref().map_or(&[], |bytes| bytes.as_slice()))
}

/// The answer to [`Request::Size`], from its body.
pub fn sized_from_body(body: &[u8]) -> Result<Option<u64>, Malformed> {
    match body.len() {
        0 => Ok(None),
        8 => Ok(Some(u64_at(body, 0..8))),
        other => Err(Malformed::damaged(0, format!("a size of {other} bytes"))),
    }
}

const ENTRY_BYTES: std::ops::Range<usize> = 0..8;
const ENTRY_MODIFIED: std::ops::Range<usize> = ENTRY_BYTES.end..ENTRY_BYTES.end + 8;
const ENTRY_DIRECTORY: usize = ENTRY_MODIFIED.end;
const ENTRY_NAME_LENGTH: usize = ENTRY_DIRECTORY + 1;
const ENTRY_NAME: usize = ENTRY_NAME_LENGTH + 1;

const _: () = assert!(ENTRY_NAME + KEY_BYTES_MAX <= PIECE_BYTES_MAX);

/// The answer to [`Request::List`], as frames. An entry whose name is too long for a key is left out: nobody could ask
/// for it.
pub fn listed_frames(id: u64, entries: &[Entry]) -> Vec<Vec<u8>> {
    let (mut frames, mut body) = (Vec::new(), Vec::new());
    for entry in entries {
        let Ok(length) = u8::try_from(entry.name().len()) else { continue };
        if body.len() + ENTRY_NAME + usize::from(length) > PIECE_BYTES_MAX {
            frames.push(frame(Kind::Listed, false, id, &body));
            body.clear();
        }
        body.extend_from_slice(&entry.bytes.to_le_bytes());
        body.extend_from_slice(&entry.modified.to_le_bytes());
        body.extend_from_slice(&[u8::from(entry.is_directory), length]);
        body.extend_from_slice(entry.name().as_bytes());
    }
    frames.push(frame(Kind::Listed, true, id, &body));
    frames
}

/// Adds the entries of a body to those of `directory`.
pub fn listed_from_body(directory: &str, body: &[u8], entries: &mut Vec<Entry>) -> Result<(), Malformed> {
    let mut start = 0;
    while start < body.len() {
        let rest = &body[start..];
        let refuse = |detail: &str| Malformed::damaged(start, detail);
        let end = match rest.get(ENTRY_NAME_LENGTH) {
            Some(length) => ENTRY_NAME + usize::from(*length),
            None => return Err(refuse("an entry that is cut off")),
        };
        let name = rest.get(ENTRY_NAME..end).ok_or_else(|| refuse("an entry whose name is cut off"))?;
        let name = std::str::from_utf8(name).map_err(|_| refuse("a name that is no text"))?;
        if name.is_empty() || name.contains(['/', '\0']) || rest[ENTRY_DIRECTORY] > 1 {
            return Err(refuse("an entry that none can be"));
        }
        entries.push(Entry {
            key: format!("{directory}/{name}"),
            bytes: u64_at(rest, ENTRY_BYTES),
            modified: i64_at(rest, ENTRY_MODIFIED),
            is_directory: rest[ENTRY_DIRECTORY] == 1,
        });
        start += end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::frame::{Failure, FailureCode, Header, Hello, VERSION, Welcome};
    use super::super::{LeaseId, Token};
    use super::*;
    use proptest::prelude::*;

    fn header_of(frame: &[u8]) -> [u8; Header::BYTES] {
        frame[..Header::BYTES].try_into().unwrap()
    }

    fn any_request() -> impl Strategy<Value = Request> {
        let key = "[a-z/.]{1,255}";
        let range = (0..u64::MAX - READ_BYTES_MAX, 1..=(READ_BYTES_MAX / RANGES_MAX as u64) as u32)
            .prop_map(|(offset, bytes)| ByteRange { offset, bytes });
        prop_oneof![
            (key, prop::collection::vec(range, 1..=RANGES_MAX)).prop_map(|(key, ranges)| Request::Read { key, ranges }),
            key.prop_map(|key| Request::Size { key }),
            key.prop_map(|directory| Request::List { directory }),
            (key, any::<u64>()).prop_map(|(key, limit)| Request::Get { key, limit }),
        ]
    }

    proptest! {
        #[test]
        fn a_request_comes_back_as_it_was(request in any_request(), id: u64) {
            let frame = request.to_frame(id);
            let header = Header::of_request(&header_of(&frame)).unwrap();
            prop_assert_eq!((header.id, header.body_bytes), (id, frame.len() - Header::BYTES));
            prop_assert_eq!(Request::from_body(header.kind, &frame[Header::BYTES..]), Ok(request));
        }

        #[test]
        fn any_bytes_are_parsed_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..400), kind in 1_u8..5) {
            if let Some(header) = bytes.first_chunk() {
                let _ = (Header::of_request(header), Header::of_answer(header), Welcome::from_bytes(header));
            }
            let _ = bytes.first_chunk().map(Hello::from_bytes);
            let kind = [Kind::Read, Kind::Size, Kind::List, Kind::Get][usize::from(kind - 1)];
            let _ = Request::from_body(kind, &bytes);
            let _ = (Failure::from_body(&bytes), sized_from_body(&bytes));
            let _ = listed_from_body("d", &bytes, &mut Vec::new());
        }

        #[test]
        fn a_failure_comes_back_as_it_was(offset: Option<u32>, errno: u16, detail in "[ -~é]{0,1200}") {
            let failure = Failure { code: FailureCode::Io, errno, offset: offset.map(u64::from), detail };
            let frame = failure.to_frame(7);
            let found = Failure::from_body(&frame[Header::BYTES..]).unwrap();
            prop_assert!(failure.detail.starts_with(&found.detail));
            prop_assert_eq!(Failure { detail: failure.detail.clone(), ..found }, failure);
            prop_assert!(Header::of_answer(&header_of(&frame)).is_ok());
        }
    }

    #[test]
    fn greetings_come_back_as_they_were() {
        let hello = Hello { version: VERSION, lease: LeaseId([1; 16]), token: Token::new([2; 32]) };
        assert_eq!(Hello::from_bytes(&hello.to_bytes()), Ok(hello));
        for refusal in [None, Some(FailureCode::Ended)] {
            let welcome = Welcome { version: VERSION, refusal, requests_max: 32 };
            assert_eq!(Welcome::from_bytes(&welcome.to_bytes()), Ok(welcome));
        }
    }

    #[test]
    fn a_long_list_comes_in_frames_that_each_fit() {
        let entry = |number: u64| Entry {
            key: format!("d/{number:0200}"),
            bytes: number,
            modified: -1,
            is_directory: number.is_multiple_of(2),
        };
        let entries: Vec<_> = (0..5000).map(entry).collect();
        let frames = listed_frames(3, &entries);
        assert!(frames.len() > 2);
        let mut found = Vec::new();
        for (number, frame) in frames.iter().enumerate() {
            let header = Header::of_answer(&header_of(frame)).unwrap();
            assert_eq!(header.is_last, number + 1 == frames.len());
            listed_from_body("d", &frame[Header::BYTES..], &mut found).unwrap();
        }
        assert_eq!(found, entries);
    }

    #[test]
    fn refusals_say_what_was_found() {
        let good = Request::Read { key: "k".to_owned(), ranges: vec![ByteRange { offset: 0, bytes: 1 }] }.to_frame(1);
        let refused = |at: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[at] = byte;
            let header = Header::of_request(&header_of(&bytes));
            let read = header.and_then(|header| Request::from_body(header.kind, &bytes[Header::BYTES..]));
            read.unwrap_err().to_string()
        };
        assert_eq!(refused(2, 1), "a frame of 65557 bytes, where 1031 is the most for kind 1 (byte 0)");
        assert_eq!(refused(4, 129), "a frame of kind 129 where a request is expected (byte 4)");
        assert_eq!(refused(4, 9), "a frame of kind 9 (byte 4)");
        assert_eq!(refused(16, 65), "65 ranges, expected 1 to 64 (byte 0)");
        assert_eq!(refused(32, 0), "a range of 0 bytes at 0 (byte 8)");
        assert_eq!(refused(35, 1), "16777217 bytes wanted at once, 4194304 is the most (byte 8)");
    }
}
