//! `restore_command`: a file of the archive to where PostgreSQL wants it.
//!
//! PostgreSQL takes "no such segment" for the end of the WAL and opens the database there. So absence is an answer
//! that has to be proven: the repository is the one it was, its WAL directory can be read, nothing of that timeline lies
//! behind the segment, no later timeline left it behind the segment, and no backup ends behind it. Everything else is an
//! error. A network file system that hiccups is asked again first, for a bounded time.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::thread;
use std::time::Duration;

use super::name::{SegmentName, WalFile};
use super::{WalArchive, WalObject};
use crate::io::durable;
use crate::units::{BackupLabel, Timeline};
use crate::{Error, Result};

/// Pauses between tries when the disk or the network says that it may be better soon: 6 seconds in all. After that
/// PostgreSQL stops with the error, and an operator decides.
const RETRY_PAUSES: [Duration; 7] = [
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(200),
    Duration::from_millis(400),
    Duration::from_millis(800),
    Duration::from_millis(1600),
    Duration::from_millis(3200),
];
/// What PostgreSQL's own files have.
const FILE_MODE: u32 = 0o600;

/// What became of a fetch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fetched {
    /// It is in place.
    Delivered,
    /// Proven: the archive is readable, has no such file, and nothing later that came out of it.
    Absent,
}

impl WalArchive {
    /// Writes the file `name` to `to`, verified, whole or not at all. It is not synced: PostgreSQL does that before it
    /// gives the file its final name.
    pub fn fetch(&self, name: &str, to: &Path) -> Result<Fetched> {
        let mut pauses = RETRY_PAUSES.iter();
        loop {
            match self.try_fetch(name, to) {
                Err(error) if is_transient(&error) => match pauses.next() {
                    Some(pause) => {
                        tracing::warn!("trying again in {} ms: {error}", pause.as_millis());
                        thread::sleep(*pause);
                    }
                    None => return Err(error),
                },
                done => return done,
            }
        }
    }

    fn try_fetch(&self, name: &str, to: &Path) -> Result<Fetched> {
        let file = self.parse(name)?;
        if let Some(object) = self.open(name)? {
            return deliver(&object, file, self.segment_bytes(), to);
        }
        match self.prove_absent(file)? {
            Absence::Proven => Ok(Fetched::Absent),
            // It arrived while we looked.
            Absence::Refuted => match self.open(name)? {
                Some(object) => deliver(&object, file, self.segment_bytes(), to),
                None => Err(Error::NotFound(format!("{name} is listed in the archive but cannot be opened"))),
            },
        }
    }

    fn prove_absent(&self, file: WalFile) -> Result<Absence> {
        let files = self.files(file.timeline())?;
        self.prove_readable()?;
        if files.contains(&file) {
            return Ok(Absence::Refuted);
        }
        let WalFile::Segment(wanted) = file else { return Ok(Absence::Proven) };
        let later = files.into_iter().filter_map(number_of).filter(|segment| segment.number > wanted.number).min();
        let goes_on = match later {
            Some(later) => Some(later.file_name(self.segment_bytes())),
            None => match self.left_behind(wanted)? {
                Some(timeline) => Some(format!("timeline {timeline}")),
                None => self.backed_up(wanted)?.map(|label| format!("backup {label}")),
            },
        };
        match goes_on {
            None => Ok(Absence::Proven),
            Some(later) => Err(Error::NotFound(format!(
                "WAL segment {} is missing from the archive, which goes on with {later}",
                wanted.file_name(self.segment_bytes()),
            ))),
        }
    }

    /// A timeline whose history says that it came out of `wanted`'s behind that segment: whoever made it had replayed the
    /// segment, so it was there. Where the timeline left within the segment, its own first segment has all of it that
    /// counts, and `wanted` may never have been archived.
    fn left_behind(&self, wanted: SegmentName) -> Result<Option<Timeline>> {
        let end = wanted.end(self.segment_bytes());
        for timeline in self.timelines()?.into_iter().filter(|timeline| *timeline > wanted.timeline) {
            let Some(history) = self.history(timeline)? else { continue };
            if history.ancestors.iter().any(|left| left.timeline == wanted.timeline && left.left_at >= end) {
                return Ok(Some(timeline));
            }
        }
        Ok(None)
    }

    /// A backup of the timeline that ends behind the segment's first byte was not committed without it: what is missing
    /// now was there. One that has lost its description says nothing, and must not stop the recovery from another.
    fn backed_up(&self, wanted: SegmentName) -> Result<Option<BackupLabel>> {
        let start = wanted.start(self.segment_bytes());
        for label in self.cluster().labels()?.into_iter().rev() {
            match self.cluster().backup_info(&label) {
                Ok(info) if info.wal.timeline == wanted.timeline && info.wal.stop > start => return Ok(Some(label)),
                Ok(_) => {}
                Err(Error::Corrupt { .. } | Error::Unsupported { .. }) => {
                    tracing::warn!("the description of backup {label} cannot be read");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }
}

enum Absence {
    Proven,
    Refuted,
}

const fn number_of(file: WalFile) -> Option<SegmentName> {
    match file {
        WalFile::Segment(segment) | WalFile::Partial(segment) => Some(segment),
        WalFile::BackupLabel(..) | WalFile::History(_) => None,
    }
}

fn deliver(object: &WalObject, file: WalFile, segment_bytes: u64, to: &Path) -> Result<Fetched> {
    if matches!(file, WalFile::Segment(_)) && object.bytes() != segment_bytes {
        let name = file.file_name(segment_bytes);
        return Err(Error::corrupt(
            name,
            format!("the archive's copy has {} bytes, not {segment_bytes}", object.bytes()),
        ));
    }
    let (temporary, mut out) = durable::create_beside(to, FILE_MODE)?;
    let delivered = write(object, &mut out, to).and_then(|()| durable::rename_in_place(&temporary, to));
    if delivered.is_err() {
        // The first error is what counts; a leftover is hidden, and PostgreSQL ignores it.
        let _ = std::fs::remove_file(&temporary);
    }
    delivered.map(|()| Fetched::Delivered)
}

fn write(object: &WalObject, out: &mut File, to: &Path) -> Result<()> {
    let mut offset = 0;
    object.read_all(|piece| {
        out.write_all(piece).map_err(|cause| Error::io_at("write", to, offset, cause))?;
        offset += piece.len() as u64;
        Ok(())
    })
}

/// Whether trying again may help: a disk, a network file system or its server that is not well just now.
fn is_transient(error: &Error) -> bool {
    let Some(errno) = error.raw_os_error() else { return false };
    matches!(
        errno,
        libc::EIO
            | libc::ESTALE
            | libc::ETIMEDOUT
            | libc::EAGAIN
            | libc::EINTR
            | libc::EBUSY
            | libc::ENETDOWN
            | libc::ENETUNREACH
            | libc::EHOSTDOWN
            | libc::EHOSTUNREACH
            | libc::ECONNABORTED
            | libc::ECONNRESET
            | libc::ENOTCONN
            | libc::EREMOTEIO
    )
}
