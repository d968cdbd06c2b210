//! Putting a FUSE mount in place and taking it away: mount(2) as root, *fusermount3* as anybody else.
//!
//! `fuser` can mount too, but as root it cannot name the file system type, which is how a mount of ours is recognised
//! after a crash; and as an ordinary user it insists on opening */dev/fuse* itself, which only *fusermount3* may do on
//! some machines.

use std::ffi::CString;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use engine::{Error, Result};
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};

use crate::table::Mount;

/// The helper that mounts for ordinary users.
pub const HELPER: &str = "fusermount3";
/// Where the kernel's FUSE driver is reached.
pub const DEVICE: &str = "/dev/fuse";

/// A mount to be made.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// An empty directory, absolute and resolved.
    pub mountpoint: PathBuf,
    /// What the mount table shows as its source. No comma and no backslash.
    pub source: String,
    /// Other users may read it too, as far as the modes of the files let them.
    pub allow_other: bool,
}

/// Mounts; what comes back is the connection to the kernel.
pub fn mount(options: &MountOptions) -> Result<OwnedFd> {
    if rustix::process::geteuid().is_root() { mount_as_root(options) } else { mount_by_helper(options) }
}

/// Unmounts. `lazily`: out of the tree at once, even where files are open; they end with the server.
pub fn unmount(mountpoint: &Path, lazily: bool) -> Result<()> {
    let refused = |cause: io::Error| Error::io("unmount", mountpoint, cause);
    if rustix::process::geteuid().is_root() {
        let detach = if lazily { UnmountFlags::DETACH } else { UnmountFlags::empty() };
        return rustix::mount::unmount(mountpoint, detach | UnmountFlags::NOFOLLOW)
            .map_err(|cause| refused(cause.into()));
    }
    let flags = if lazily { "-uz" } else { "-u" };
    let helper = Command::new(HELPER).args([flags, "--"]).arg(mountpoint).stdin(Stdio::null()).output();
    let output = helper.map_err(|cause| Error::io("run", HELPER, cause))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(refused(helper_error(&output.stderr))),
    }
}

fn mount_as_root(options: &MountOptions) -> Result<OwnedFd> {
    let device = std::fs::File::options().read(true).write(true).open(DEVICE);
    let device = OwnedFd::from(device.map_err(|cause| Error::io("open", DEVICE, cause))?);
    let mut data = format!("fd={},rootmode=40000,user_id=0,group_id=0,default_permissions", device.as_raw_fd());
    if options.allow_other {
        data.push_str(",allow_other");
    }
    let refused = |cause: io::Error| Error::io("mount", &options.mountpoint, cause);
    let data = CString::new(data).map_err(|cause| refused(cause.into()))?;
    let flags = MountFlags::RDONLY | MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOATIME;
    rustix::mount::mount(
        options.source.as_str(),
        &options.mountpoint,
        crate::table::FILE_SYSTEM_TYPE,
        flags,
        data.as_c_str(),
    )
    .map_err(|cause| refused(cause.into()))?;
    Ok(device)
}

/// The helper mounts and sends the connection over a socket, which it is given as its stdin.
fn mount_by_helper(options: &MountOptions) -> Result<OwnedFd> {
    let refused = |cause: io::Error| Error::io("mount", &options.mountpoint, cause);
    let subtype = crate::table::FILE_SYSTEM_TYPE.trim_start_matches("fuse.");
    let mut list = format!("ro,nodev,nosuid,noatime,default_permissions,subtype={subtype},fsname={}", options.source);
    if options.allow_other {
        list.push_str(",allow_other");
    }
    let (ours, theirs) = UnixStream::pair().map_err(refused)?;
    let helper = Command::new(HELPER)
        .args(["-o", &list, "--"])
        .arg(&options.mountpoint)
        .env("_FUSE_COMMFD", "0")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|cause| Error::io("run", HELPER, cause))?;
    // Its end of the socket closes with it, so this cannot wait for ever.
    let received = receive_descriptor(&ours);
    let output = helper.wait_with_output().map_err(|cause| Error::io("run", HELPER, cause))?;
    match received.map_err(refused)? {
        Some(device) => Ok(device),
        None => Err(refused(helper_error(&output.stderr))),
    }
}

fn receive_descriptor(socket: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    if message.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::other("fusermount3 sent more than one descriptor"));
    }
    let descriptor = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    Ok(descriptor)
}

/// The helper's own words, without its name in front.
fn helper_error(stderr: &[u8]) -> io::Error {
    let text = String::from_utf8_lossy(stderr);
    let line = text.lines().find(|line| !line.trim().is_empty()).unwrap_or("fusermount3 failed and said nothing");
    let line = line.trim().trim_start_matches("fusermount3: ");
    let kind =
        if line.ends_with("Device or resource busy") { io::ErrorKind::ResourceBusy } else { io::ErrorKind::Other };
    io::Error::new(kind, line.to_owned())
}

/// Lets the kernel read ahead `bytes` at a time on this mount; only root may, and nothing depends on it.
pub(crate) fn set_kernel_read_ahead(device: &str, bytes: u32) {
    let path = format!("/sys/class/bdi/{device}/read_ahead_kb");
    if let Err(cause) = std::fs::write(&path, (bytes >> 10).to_string()) {
        tracing::debug!("cannot write {path}: {cause}");
    }
}

/// Ends the connection of a server that hangs: every reader gets an error. For root, and for the user that mounted where
/// the kernel shows its connections.
pub fn abort(mount: &Mount) -> Result<()> {
    let minor = mount.device.rsplit(':').next().unwrap_or_default();
    let path = format!("/sys/fs/fuse/connections/{minor}/abort");
    match std::fs::write(&path, "1") {
        Ok(()) => Ok(()),
        // They are shown nowhere: an unmount by force begins with the same, and may then find the mount in use.
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
            match rustix::mount::unmount(&mount.mountpoint, UnmountFlags::FORCE | UnmountFlags::NOFOLLOW) {
                Ok(()) | Err(rustix::io::Errno::BUSY) => Ok(()),
                Err(cause) => Err(Error::io("abort", &mount.mountpoint, cause)),
            }
        }
        Err(cause) => Err(Error::io("write", &path, cause)),
    }
}

/// Makes sure that `mountpoint` can be mounted on: an existing empty directory.
pub fn refuse_unless_empty(mountpoint: &Path) -> Result<()> {
    let mut names = std::fs::read_dir(mountpoint).map_err(|cause| Error::io("read directory", mountpoint, cause))?;
    match names.next() {
        None => Ok(()),
        Some(Err(cause)) => Err(Error::io("read directory", mountpoint, cause)),
        Some(Ok(name)) => Err(Error::Refused(format!(
            "{} is not empty: it has {}",
            mountpoint.display(),
            String::from_utf8_lossy(name.file_name().as_bytes()).escape_debug()
        ))),
    }
}
