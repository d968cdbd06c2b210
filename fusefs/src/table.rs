//! The kernel's table of mounts, and what it says about ours.
//!
//! It is read from */proc/self/mountinfo*, never by touching the mount: a mount whose server died answers every call
//! with "transport endpoint is not connected", and one whose server hangs does not answer at all.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::mpsc;
use std::time::Duration;

use engine::{Error, Result};

/// The file system type of our mounts.
pub const FILE_SYSTEM_TYPE: &str = "fuse.pghydrant";
/// The link in a mount's root, in no listing, whose text is a [`Served`].
///
/// An extended attribute would say it as well; but for a file system that has one the kernel asks its server for those of
/// every file that anybody lists.
pub const SERVED_LINK: &str = ".pghydrant";

/// How long a mount may take to answer before it counts as hung.
const ANSWER_TIME: Duration = Duration::from_secs(10);
/// As many as the kernel follows.
const LINKS_MAX: usize = 40;

/// A mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Where.
    pub mountpoint: PathBuf,
    /// `fuse.pghydrant`, `ext4`, …
    pub file_system_type: String,
    /// What it shows, as `df` prints it: `pghydrant:main/20261122T081500Z-F`.
    pub source: String,
    /// `0:52`: the name of its device in */sys*.
    pub device: String,
}

impl Mount {
    /// Whether one of our servers made it.
    pub fn is_ours(&self) -> bool {
        self.file_system_type == FILE_SYSTEM_TYPE
    }
}

/// Who serves a mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Served {
    /// What the server was started with.
    pub token: String,
    /// Its process id.
    pub process: i32,
}

impl fmt::Display for Served {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.token, self.process)
    }
}

impl FromStr for Served {
    type Err = ();

    fn from_str(text: &str) -> std::result::Result<Self, ()> {
        let (token, process) = text.split_once(' ').ok_or(())?;
        Ok(Self { token: token.to_owned(), process: process.parse().map_err(|_| ())? })
    }
}

/// How a mount answers.
#[derive(Debug)]
pub enum Health {
    /// It answers.
    Alive,
    /// Its server is gone.
    Stale,
    /// It does not answer.
    Hung,
    /// It answers with an error that is not the server's end.
    Failing(io::Error),
}

/// All mounts that this process sees, in the order in which they were made.
pub fn mounts() -> Result<Vec<Mount>> {
    let path = "/proc/self/mountinfo";
    let table = std::fs::read(path).map_err(|cause| Error::io("read", path, cause))?;
    Ok(table.split(|byte| *byte == b'\n').filter_map(parse).collect())
}

/// The topmost mount at `mountpoint`, which must be absolute and resolved (see [`resolve`]).
pub fn mount_at(mountpoint: &Path) -> Result<Option<Mount>> {
    Ok(mounts()?.into_iter().rfind(|mount| mount.mountpoint == mountpoint))
}

/// `mountpoint` as the table has it: absolute, every link followed.
///
/// Of the last component only the link's text is read: it may be a mount that does not answer.
pub fn resolve(mountpoint: &Path) -> Result<PathBuf> {
    let refused = |cause: io::Error| Error::io("resolve", mountpoint, cause);
    let mut place = std::path::absolute(mountpoint).map_err(refused)?;
    for _ in 0..LINKS_MAX {
        let (Some(parent), Some(name)) = (place.parent(), place.file_name()) else { return Ok(place) };
        let parent = parent.canonicalize().map_err(refused)?;
        place = parent.join(name);
        match std::fs::read_link(&place) {
            Ok(target) => place = parent.join(target),
            Err(_) => return Ok(place),
        }
    }
    Err(refused(rustix::io::Errno::LOOP.into()))
}

/// Asks the mount something harmless.
pub fn health(mountpoint: &Path) -> Health {
    match with_patience(mountpoint, |path| rustix::fs::statfs(path).map(drop)) {
        None => Health::Hung,
        Some(Ok(())) => Health::Alive,
        Some(Err(rustix::io::Errno::NOTCONN | rustix::io::Errno::CONNABORTED)) => Health::Stale,
        Some(Err(cause)) => Health::Failing(cause.into()),
    }
}

/// Asks the mount something harmless and does not wait: the answer, whatever it is, is a message or the channel's end.
pub fn ask(mountpoint: &Path) -> mpsc::Receiver<()> {
    asked(mountpoint, |path| {
        let _ = rustix::fs::statfs(path);
    })
}

/// Who serves the mount; nothing if it does not answer, or is none of ours.
pub fn served(mountpoint: &Path) -> Option<Served> {
    let text = with_patience(mountpoint, |path| std::fs::read_link(path.join(SERVED_LINK)))?;
    text.ok()?.to_str()?.parse().ok()
}

/// Proves that what lies at `mountpoint` is the mount of the server that was given `token`, and no directory and no
/// other's mount.
pub fn prove(mountpoint: &Path, token: &str) -> Result<()> {
    let refuse = |what: String| Error::Refused(format!("{}: {what}", mountpoint.display()));
    match mount_at(mountpoint)? {
        Some(mount) if mount.is_ours() => {}
        Some(mount) => return Err(refuse(format!("is a mount of type {}", mount.file_system_type))),
        None => return Err(refuse("is not a mount".to_owned())),
    }
    match served(mountpoint) {
        Some(found) if found.token == token => Ok(()),
        Some(_) => Err(refuse("is the mount of another session".to_owned())),
        None => Err(refuse("does not answer".to_owned())),
    }
}

/// Runs `ask` and waits for [`ANSWER_TIME`].
fn with_patience<T: Send + 'static>(mountpoint: &Path, ask: impl FnOnce(&Path) -> T + Send + 'static) -> Option<T> {
    asked(mountpoint, ask).recv_timeout(ANSWER_TIME).ok()
}

/// Runs `ask` on a thread that is left behind if the mount does not answer: a thread that waits for a FUSE server
/// cannot be woken. Without a thread the channel ends at once.
fn asked<T: Send + 'static>(mountpoint: &Path, ask: impl FnOnce(&Path) -> T + Send + 'static) -> mpsc::Receiver<T> {
    let (answer, answered) = mpsc::sync_channel(1);
    let mountpoint = mountpoint.to_owned();
    let thread = std::thread::Builder::new().name("ask-mount".to_owned());
    let asked = thread.spawn(move || {
        // Nobody listens any more once the time is over.
        let _ = answer.send(ask(&mountpoint));
    });
    if let Err(cause) = asked {
        tracing::debug!("cannot ask a mount: {cause}");
    }
    answered
}

/// A line such as `36 35 0:52 / /mnt/x ro,nosuid - fuse.pghydrant pghydrant:main ro,user_id=0`.
fn parse(line: &[u8]) -> Option<Mount> {
    let mut words = line.split(|byte| *byte == b' ');
    let device = words.nth(2)?;
    let mountpoint = words.nth(1)?;
    let mut words = words.skip_while(|word| *word != b"-").skip(1);
    let text = |word: &[u8]| unescape(word).to_string_lossy().into_owned();
    Some(Mount {
        device: text(device),
        mountpoint: unescape(mountpoint).into(),
        file_system_type: text(words.next()?),
        source: text(words.next()?),
    })
}

/// The kernel writes space, tab, newline and backslash as three octal digits.
fn unescape(word: &[u8]) -> OsString {
    let mut plain = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((first, tail)) = rest.split_first() {
        let escaped = (*first == b'\\').then(|| tail.get(..3)).flatten();
        let octal = escaped.and_then(|digits| u8::from_str_radix(OsStr::from_bytes(digits).to_str()?, 8).ok());
        plain.push(octal.unwrap_or(*first));
        rest = if octal.is_some() { &tail[3..] } else { tail };
    }
    OsString::from_vec(plain)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_line_of_the_mount_table_is_read_with_its_escapes() {
        let line = br"36 35 0:52 / /run/my\040mount ro,nosuid shared:1 master:2 - fuse.pghydrant pghydrant:main/x ro,user_id=0";
        let mount = parse(line).unwrap();
        assert_eq!(mount.mountpoint, Path::new("/run/my mount"));
        assert_eq!((mount.device.as_str(), mount.source.as_str()), ("0:52", "pghydrant:main/x"));
        assert!(mount.is_ours());
    }

    #[test]
    fn who_serves_a_mount_is_read_as_it_is_written() {
        let served = Served { token: "0a".to_owned(), process: 7 };
        assert_eq!(served.to_string().parse(), Ok(served));
        for text in ["", "0a", "0a ", "0a x", "0a 7 8"] {
            assert_eq!(text.parse::<Served>(), Err(()), "{text}");
        }
    }

    #[test]
    fn a_half_line_is_nothing() {
        for line in [&b""[..], b"36 35 0:52", b"36 35 0:52 / /x ro", b"36 35 0:52 / /x ro - fuse"] {
            assert_eq!(parse(line), None);
        }
    }

    #[test]
    fn another_file_system_is_a_mount_and_not_ours() {
        // The root is none in a chroot.
        let other = Path::new("/proc");
        assert!(!mount_at(other).unwrap().unwrap().is_ours());
        assert!(matches!(health(other), Health::Alive));
        assert!(prove(other, "x").is_err());
    }

    #[test]
    fn a_mountpoint_is_resolved_without_being_touched() {
        let place = tempfile::tempdir().unwrap();
        let root = place.path().canonicalize().unwrap();
        let link = |target: &str, name: &str| std::os::unix::fs::symlink(target, root.join(name)).unwrap();
        link("there", "link");
        link(".", "itself");
        link("loop", "loop");
        assert_eq!(resolve(&root.join("itself/link")).unwrap(), root.join("there"));
        assert_eq!(resolve(&root.join("there/")).unwrap(), root.join("there"));
        assert!(resolve(&root.join("loop")).is_err());
        assert!(resolve(&root.join("missing/there")).is_err());
    }
}
