//! Where the answers to a request go: straight into the buffers of whoever asked.

use super::Patience;
use super::connection::Fault;
use super::frame::{Header, Kind};
use super::message::{listed_from_body, sized_from_body};
use super::stream::Reader;
use crate::store::Entry;

/// Takes the answers to one request, piece by piece.
pub(super) enum Sink<'out, 'parts> {
    /// Exactly as many bytes as these parts hold, one behind the other.
    Parts {
        parts: &'out mut [&'parts mut [u8]],
        part: usize,
        filled: usize,
    },
    /// As many bytes as come, up to a limit.
    All {
        bytes: Vec<u8>,
        limit: u64,
    },
    Size(Option<u64>),
    Entries {
        directory: &'out str,
        entries: Vec<Entry>,
    },
}

/// Entries of one directory, of a server that may be lying: as many WAL segments as 16 TiB have.
const ENTRIES_MAX: usize = 1 << 20;

impl<'out, 'parts> Sink<'out, 'parts> {
    pub(super) fn parts(parts: &'out mut [&'parts mut [u8]]) -> Self {
        Self::Parts { parts, part: 0, filled: 0 }
    }

    /// Forgets what came: the request is asked again.
    pub(super) fn begin_again(&mut self) {
        match self {
            Self::Parts { part, filled, .. } => (*part, *filled) = (0, 0),
            Self::All { bytes, .. } => bytes.clear(),
            Self::Size(size) => *size = None,
            Self::Entries { entries, .. } => entries.clear(),
        }
    }

    /// Reads the body of an answer that is no failure. What does not fit is a server that cannot be trusted with the rest
    /// of the connection.
    pub(super) fn take(&mut self, header: &Header, reader: &mut Reader, patience: &dyn Patience) -> Result<(), Fault> {
        match (self, header.kind) {
            (Self::Parts { parts, part, filled }, Kind::Data) => {
                let mut left = header.body_bytes;
                while left > 0 {
                    let Some(out) = parts.get_mut(*part) else { return Err(unexpected("more bytes than were wanted")) };
                    let end = out.len().min(*filled + left);
                    reader.fill(&mut out[*filled..end], patience)?;
                    left -= end - *filled;
                    *filled = end;
                    if end == out.len() {
                        (*part, *filled) = (*part + 1, 0);
                    }
                }
                if header.is_last && *part < parts.len() {
                    return Err(unexpected("fewer bytes than were wanted"));
                }
            }
            (Self::All { bytes, limit }, Kind::Data) => {
                let (before, more) = (bytes.len(), header.body_bytes);
                if (before + more) as u64 > *limit {
                    return Err(unexpected("more bytes than the limit"));
                }
                bytes.resize(before + more, 0);
                reader.fill(&mut bytes[before..], patience)?;
            }
            (Self::Size(size), Kind::Sized) => {
                let mut body = [0; 8];
                let body = &mut body[..header.body_bytes];
                reader.fill(body, patience)?;
                *size = sized_from_body(body).map_err(|malformed| unexpected(&malformed.to_string()))?;
            }
            (Self::Entries { directory, entries }, Kind::Listed) => {
                let mut body = vec![0; header.body_bytes];
                reader.fill(&mut body, patience)?;
                let listed = listed_from_body(directory, &body, entries);
                listed.map_err(|malformed| unexpected(&malformed.to_string()))?;
                if entries.len() > ENTRIES_MAX {
                    return Err(unexpected("more entries than a directory of ours has"));
                }
            }
            _ => return Err(unexpected("an answer to another request")),
        }
        Ok(())
    }
}

fn unexpected(what: &str) -> Fault {
    Fault::lost(format!("it sent {what}"))
}
