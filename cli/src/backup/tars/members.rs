//! The members of a tar, as far as PostgreSQL writes such.
//!
//! PostgreSQL's are plain ustar: files, directories, the links of tablespaces, and two blocks of zeros at the end. The names
//! of directories and links end in a slash; numbers that are too large for octal digits are in base 256. Extensions for
//! long names and the like are refused by name, as everything that can lead out of a directory is: the bytes may come
//! from anybody. Nothing of a member is kept in memory but its header.

use std::cell::Cell;
use std::io::{self, ErrorKind, Read};

use anyhow::Result;
use engine::format::manifest::path as manifest_path;
use tar::{Archive, Header};

use super::super::adopt::no;
use super::decode::decoded;
use super::input::OpenTar;
use crate::exit::{Exit, Failure};

/// Twice the largest clusters that one hears of. Each costs some hundred bytes of memory.
const MEMBERS_MAX: u64 = 20_000_000;
/// No file is larger: offsets are signed.
const FILE_BYTES_MAX: u64 = i64::MAX as u64;

/// One member.
pub(super) struct Member {
    /// Relative, of plain components.
    pub(super) path: String,
    pub(super) kind: Kind,
    /// Permission bits.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// The owner's name.
    pub(super) owner: Option<String>,
    /// Seconds since 1970.
    pub(super) modified: i64,
    /// Content bytes.
    pub(super) bytes: u64,
}

pub(super) enum Kind {
    File,
    Directory,
    Link { target: String },
}

/// Hands over the members of `tar` one after another, each with its content, to the end of all bytes. An [`io::Error`] of
/// `take` is one of reading the content.
pub(super) fn each(
    tar: &OpenTar,
    stop: &dyn Fn() -> bool,
    mut take: impl FnMut(Member, &mut dyn Read) -> Result<()>,
) -> Result<()> {
    let ended = Cell::new(false);
    let fault = |cause: io::Error| fault(tar, ended.get(), stop, cause);
    let source = decoded(tar.reader(stop)).map_err(fault)?;
    let mut archive = Archive::new(Noting { inner: source, ended: &ended });
    let mut count = 0_u64;
    for entry in archive.entries().map_err(fault)?.raw(true) {
        let mut entry = match entry {
            Ok(entry) => entry,
            // Whatever its bytes are: a file that was named by mistake.
            Err(cause) if count == 0 && cause.kind() == ErrorKind::Other && !ended.get() && !stop() => {
                return Err(strange(tar, "it does not begin like one"));
            }
            Err(cause) => return Err(fault(cause)),
        };
        count += 1;
        if count > MEMBERS_MAX {
            return Err(strange(tar, &format!("it has more than {MEMBERS_MAX} members")));
        }
        let member = member(entry.header()).map_err(|detail| strange(tar, &detail))?;
        let path = member.path.clone();
        let result = take(member, &mut entry);
        result.map_err(|error| match error.downcast::<io::Error>() {
            Ok(cause) => fault(cause).context(format!("cannot take over {path}")),
            Err(other) => other,
        })?;
    }
    if ended.get() {
        return Err(early(tar));
    }
    nothing_behind(&mut archive.into_inner()).map_err(|cause| match cause.kind() {
        ErrorKind::InvalidData => strange(tar, &cause.to_string()),
        _ => fault(cause),
    })
}

/// What a header says, if PostgreSQL could have written it.
fn member(header: &Header) -> Result<Member, String> {
    let shown = String::from_utf8_lossy(&header.path_bytes()).escape_debug().to_string();
    let bad = |cause: io::Error| format!("the header of \"{shown}\" is damaged: {cause}");
    let small = |number: u64| u32::try_from(number).map_err(|_| format!("\"{shown}\" has an owner of number {number}"));
    let path = header.path_bytes().into_owned();
    let path = String::from_utf8(path).map_err(|_| format!("a name that is not UTF-8: \"{shown}\""))?;
    let bytes = header.entry_size().map_err(bad)?;
    let kind = match header.as_bytes()[LINK_FLAG] {
        b'0' | 0 => Kind::File,
        b'5' => Kind::Directory,
        b'2' => {
            let target = header.link_name_bytes().unwrap_or_default().into_owned();
            let target =
                String::from_utf8(target).map_err(|_| format!("\"{shown}\" leads to a name that is not UTF-8"))?;
            Kind::Link { target }
        }
        b'1' => return Err(format!("\"{shown}\" is a hard link")),
        b'3' | b'4' | b'6' => return Err(format!("\"{shown}\" is a device or a pipe")),
        other => return Err(format!("\"{shown}\" is of kind '{}'", other.escape_ascii())),
    };
    let path = match kind {
        Kind::File => path,
        Kind::Directory | Kind::Link { .. } => path.strip_suffix('/').map(str::to_owned).unwrap_or(path),
    };
    // What the server writes for one directory: "./pg_wal/archive_status".
    let path = path.strip_prefix("./").map(str::to_owned).unwrap_or(path);
    manifest_path::check(&path)?;
    if bytes > FILE_BYTES_MAX || (bytes > 0 && !matches!(kind, Kind::File)) {
        return Err(format!("\"{shown}\" has a size of {bytes} bytes"));
    }
    let owner = header.username().ok().flatten().filter(|name| !name.is_empty());
    Ok(Member {
        path,
        kind,
        mode: header.mode().map_err(bad)? & 0o7777,
        uid: small(header.uid().map_err(bad)?)?,
        gid: small(header.gid().map_err(bad)?)?,
        owner: owner.map(str::to_owned),
        modified: i64::try_from(header.mtime().map_err(bad)?).map_err(|_| format!("\"{shown}\" has no time"))?,
        bytes,
    })
}

/// Where a header has the member's kind.
const LINK_FLAG: usize = 156;

/// Behind the first block of zeros there are only more of them; all are read, or whoever writes them fails.
fn nothing_behind(source: &mut impl Read) -> io::Result<()> {
    let mut piece = vec![0; 64 << 10];
    loop {
        match source.read(&mut piece) {
            Ok(0) => return Ok(()),
            Ok(read) if piece[..read].iter().all(|byte| *byte == 0) => {}
            Ok(_) => return Err(io::Error::new(ErrorKind::InvalidData, "something follows behind its end")),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Notes that the bytes came to their end: a tar that is whole ends before they do.
struct Noting<'a, R> {
    inner: R,
    ended: &'a Cell<bool>,
}

impl<R: Read> Read for Noting<'_, R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(into)?;
        if read == 0 && !into.is_empty() {
            self.ended.set(true);
        }
        Ok(read)
    }
}

fn fault(tar: &OpenTar, ended: bool, stop: &dyn Fn() -> bool, cause: io::Error) -> anyhow::Error {
    if stop() {
        return engine::Error::Cancelled.into();
    }
    if ended || cause.kind() == ErrorKind::UnexpectedEof {
        return early(tar);
    }
    if cause.raw_os_error().is_some() {
        return engine::Error::io("read", &tar.shown, cause).into();
    }
    if cause.kind() == ErrorKind::Unsupported {
        return strange(tar, &cause.to_string());
    }
    Failure::new(Exit::Failed, format!("{} is damaged: {cause}", tar.shown)).hint(NOTHING_TAKEN).into()
}

fn early(tar: &OpenTar) -> anyhow::Error {
    Failure::new(Exit::Failed, format!("{} ends early", tar.shown)).hint(NOTHING_TAKEN).into()
}

/// The refusal of what `pg_basebackup` does not make.
pub(super) fn strange(tar: &OpenTar, detail: &str) -> anyhow::Error {
    no(format!("{} is no tar of a base backup: {detail}", tar.shown)).hint(NOTHING_TAKEN).into()
}

const NOTHING_TAKEN: &str = "nothing was taken over; make the base backup again, with pg_basebackup -Ft";
