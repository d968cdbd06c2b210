//! The disk of this machine.
//!
//! Names are resolved by the kernel with `openat2`, which refuses links and ways out of the root in one call;
//! where it is missing (Linux before 5.6, some containers) the path is walked a component at a time with the
//! same refusals.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Component, Path};
use std::sync::Arc;

use rustix::fs::{AtFlags, Dir, FallocateFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid};
use rustix::io::{Errno, retry_on_intr};

use super::buffer::{Buffer, Pages, buffers};
use super::disk::{Disk, Found, Open, OpenFile, Owner, Place, Queue};
use super::durable;
use super::plain::PlainQueue;
use super::ring::RingQueue;
use super::share::{self, Sharing};
use super::transfer::REQUEST_BYTES_MAX;
use crate::{Error, Result};

/// Written where a file system has no zeros to give.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// How bytes move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// io_uring.
    Ring,
    /// `pread` and `pwrite` on threads.
    Plain,
}

/// Why io_uring cannot be used, if that is so.
pub fn try_ring() -> io::Result<()> {
    RingQueue::new(&mut []).map(drop)
}

/// What a copy gets of this machine, which makes it cheap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Means {
    /// io_uring.
    pub ring: bool,
    /// Its buffers are registered, so no request has to look their pages up.
    pub registered: bool,
    /// What the buffers lie in.
    pub pages: Pages,
}

/// Tries it out, with `count` buffers.
pub fn means(count: u16) -> Result<Means> {
    let (mut all, pages) = buffers(count)?;
    let queue = RingQueue::new(&mut all).ok();
    Ok(Means { ring: queue.is_some(), registered: queue.is_some_and(|queue| queue.is_registered()), pages })
}

/// The real disk.
#[derive(Clone, Copy, Debug)]
pub struct LocalDisk {
    engine: Engine,
    /// False to go through the page cache everywhere.
    direct: bool,
    /// The most that one `pread` moves.
    request_bytes: usize,
    sync_tells: bool,
}

impl LocalDisk {
    /// With io_uring where the kernel lets us have it.
    pub fn new() -> Self {
        let engine = if try_ring().is_ok() { Engine::Ring } else { Engine::Plain };
        Self::with(engine, true)
    }

    /// What it moves bytes with.
    pub fn engine(&self) -> Engine {
        self.engine
    }

    /// With this engine and no other; `direct` false goes through the page cache.
    pub fn with(engine: Engine, direct: bool) -> Self {
        let sync_tells = durable::sync_file_system_tells();
        Self { engine, direct, request_bytes: REQUEST_BYTES_MAX, sync_tells }
    }

    /// With threads that move at most `request_bytes` a call, so that every transfer is a short one: for tests.
    pub fn with_short_requests(request_bytes: usize, direct: bool) -> Self {
        Self { request_bytes, ..Self::with(Engine::Plain, direct) }
    }

    /// The same on a kernel whose syncs of file systems tell of no lost write: for tests.
    pub fn with_silent_syncs(self) -> Self {
        Self { sync_tells: false, ..self }
    }
}

impl Default for LocalDisk {
    fn default() -> Self {
        Self::new()
    }
}

impl Disk for LocalDisk {
    fn describe(&self) -> &'static str {
        match self.engine {
            Engine::Ring => "io_uring",
            Engine::Plain => "pread and pwrite",
        }
    }

    fn look(&self, place: Place<'_>) -> Result<Option<Found>> {
        let look = || {
            if place.path.as_os_str().is_empty() {
                return rustix::fs::fstat(place.root);
            }
            let (parent, name) = parent(place)?;
            rustix::fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW)
        };
        match look() {
            Ok(found) => Ok(Some(match FileType::from_raw_mode(found.st_mode) {
                FileType::Directory => Found::Directory,
                FileType::RegularFile => Found::File(u64::try_from(found.st_size).unwrap_or_default()),
                _ => Found::Other,
            })),
            Err(Errno::NOENT) => Ok(None),
            Err(cause) => Err(failed("examine", place, cause)),
        }
    }

    fn list(&self, place: Place<'_>) -> Result<Vec<OsString>> {
        let list = || {
            let directory = open_below(place, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())?;
            let mut names = Vec::new();
            for entry in Dir::read_from(&directory)? {
                let name = entry?.file_name().to_bytes().to_vec();
                if name != b"." && name != b".." {
                    names.push(OsString::from_vec(name));
                }
            }
            names.sort();
            Ok(names)
        };
        list().map_err(|cause| failed("list", place, cause))
    }

    fn open(&self, place: Place<'_>, how: Open) -> Result<Arc<OpenFile>> {
        let (operation, flags, mode, direct) = match how {
            Open::Read => ("open", OFlags::RDONLY, 0, self.direct),
            Open::ReadBuffered => ("open", OFlags::RDONLY, 0, false),
            Open::Write => ("open", OFlags::WRONLY, 0, self.direct),
            Open::WriteBuffered => ("open", OFlags::RDWR, 0, false),
            Open::Create(mode) => ("create", OFlags::RDWR | OFlags::CREATE | OFlags::EXCL, mode, false),
            Open::Directory => ("open", OFlags::RDONLY | OFlags::DIRECTORY, 0, false),
        };
        let mode = Mode::from_raw_mode(mode);
        let buffered = || open_below(place, flags, mode).map(|file| (file, false));
        let opened = if direct {
            match open_below(place, flags | OFlags::DIRECT, mode) {
                Ok(file) => Ok((file, true)),
                // The file system has no direct I/O.
                Err(Errno::INVAL) => buffered(),
                Err(cause) => Err(cause),
            }
        } else {
            buffered()
        };
        let (file, direct) = opened.map_err(|cause| failed(operation, place, cause))?;
        Ok(Arc::new(OpenFile { file: File::from(file), path: place.full(), direct }))
    }

    fn make_directory(&self, place: Place<'_>, mode: u32) -> Result<bool> {
        let make = || {
            let (parent, name) = parent(place)?;
            match rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(mode)) {
                Ok(()) => Ok(true),
                Err(Errno::EXIST) => {
                    let found = rustix::fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
                    let is_directory = FileType::from_raw_mode(found.st_mode) == FileType::Directory;
                    if is_directory { Ok(false) } else { Err(Errno::EXIST) }
                }
                Err(cause) => Err(cause),
            }
        };
        make().map_err(|cause| failed("create directory", place, cause))
    }

    fn make_link(&self, place: Place<'_>, text: &Path) -> Result<()> {
        parent(place)
            .and_then(|(parent, name)| rustix::fs::symlinkat(text, &parent, name))
            .map_err(|cause| failed("create link", place, cause))
    }

    fn allocate(&self, file: &OpenFile, bytes: u64) -> Result<bool> {
        if bytes == 0 {
            return Ok(true);
        }
        match retry_on_intr(|| rustix::fs::fallocate(&file.file, FallocateFlags::empty(), 0, bytes)) {
            Ok(()) => Ok(true),
            Err(Errno::OPNOTSUPP) => self.set_size(file, bytes).map(|()| false),
            Err(cause) => Err(Error::io("allocate space for", &file.path, cause)),
        }
    }

    fn make_zero(&self, file: &OpenFile, offset: u64, bytes: u64) -> Result<()> {
        let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        match retry_on_intr(|| rustix::fs::fallocate(&file.file, flags, offset, bytes)) {
            Ok(()) => Ok(()),
            // The file system cannot: they are written.
            Err(Errno::OPNOTSUPP) => {
                let end = offset + bytes;
                (offset..end).step_by(ZEROS.len()).try_for_each(|at| {
                    let count = usize::try_from(end - at).unwrap_or(usize::MAX).min(ZEROS.len());
                    self.write_small(file, at, &ZEROS[..count])
                })
            }
            Err(cause) => Err(Error::io_at("write zeros to", &file.path, offset, cause)),
        }
    }

    fn share(&self, from: &OpenFile, offset: u64, to: &OpenFile, to_offset: u64, bytes: u64) -> Result<Sharing> {
        share::share(&from.file, offset, &to.file, to_offset, bytes)
            .map_err(|cause| Error::io_at("share blocks with", &to.path, to_offset, cause))
    }

    fn names_of(&self, file: &OpenFile) -> Result<u64> {
        let metadata = file.file.metadata().map_err(|cause| Error::io("examine", &file.path, cause))?;
        Ok(metadata.nlink())
    }

    fn set_size(&self, file: &OpenFile, bytes: u64) -> Result<()> {
        retry_on_intr(|| rustix::fs::ftruncate(&file.file, bytes))
            .map_err(|cause| Error::io("set the size of", &file.path, cause))
    }

    fn set_attributes(&self, file: &OpenFile, mode: u32, owner: Option<Owner>) -> Result<()> {
        // The owner first: changing it may clear mode bits.
        if let Some(Owner { uid, gid }) = owner {
            rustix::fs::fchown(&file.file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
                .map_err(|cause| Error::io("set the owner of", &file.path, cause))?;
        }
        rustix::fs::fchmod(&file.file, Mode::from_raw_mode(mode))
            .map_err(|cause| Error::io("set the mode of", &file.path, cause))
    }

    fn set_link_owner(&self, place: Place<'_>, Owner { uid, gid }: Owner) -> Result<()> {
        parent(place)
            .and_then(|(parent, name)| {
                let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
                rustix::fs::chownat(&parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
            })
            .map_err(|cause| failed("set the owner of", place, cause))
    }

    fn set_modified(&self, file: &OpenFile, seconds: i64) -> Result<()> {
        let time = Timespec { tv_sec: seconds, tv_nsec: 0 };
        let times = Timestamps { last_access: time, last_modification: time };
        rustix::fs::futimens(&file.file, &times).map_err(|cause| Error::io("set the time of", &file.path, cause))
    }

    fn read_small(&self, file: &OpenFile, limit: u64) -> Result<Vec<u8>> {
        let read = || -> io::Result<Vec<u8>> {
            let bytes = file.file.metadata()?.len();
            if bytes > limit {
                return Err(io::ErrorKind::FileTooLarge.into());
            }
            let mut content = vec![0; usize::try_from(bytes).map_err(io::Error::other)?];
            file.file.read_exact_at(&mut content, 0)?;
            Ok(content)
        };
        read().map_err(|cause| Error::io("read", &file.path, cause))
    }

    fn write_small(&self, file: &OpenFile, offset: u64, bytes: &[u8]) -> Result<()> {
        file.file.write_all_at(bytes, offset).map_err(|cause| Error::io_at("write", &file.path, offset, cause))
    }

    fn sync(&self, file: &OpenFile) -> Result<()> {
        durable::sync_file(&file.file, &file.path)
    }

    fn sync_file_system(&self, file: &OpenFile) -> Result<()> {
        durable::sync_file_system_of(&file.file, &file.path)
    }

    fn sync_file_system_tells(&self) -> bool {
        self.sync_tells
    }

    fn rename(&self, from: Place<'_>, to: Place<'_>) -> Result<()> {
        parent(from)
            .and_then(|(source, name)| {
                let (target, new_name) = parent(to)?;
                durable::rename_at(source.as_fd(), name, target.as_fd(), new_name)
            })
            .map_err(|cause| failed("rename to", to, cause))
    }

    fn remove_file(&self, place: Place<'_>) -> Result<()> {
        parent(place)
            .and_then(|(parent, name)| rustix::fs::unlinkat(&parent, name, AtFlags::empty()))
            .map_err(|cause| failed("remove", place, cause))
    }

    fn remove_directory(&self, place: Place<'_>) -> Result<()> {
        parent(place)
            .and_then(|(parent, name)| rustix::fs::unlinkat(&parent, name, AtFlags::REMOVEDIR))
            .map_err(|cause| failed("remove directory", place, cause))
    }

    fn queue(&self, buffers: &mut [Buffer]) -> Result<Box<dyn Queue>> {
        match self.engine {
            Engine::Ring => match RingQueue::new(buffers) {
                Ok(queue) => Ok(Box::new(queue)),
                Err(cause) => Err(Error::io("set up", "an io_uring queue", cause)),
            },
            Engine::Plain => Ok(Box::new(PlainQueue::new(self.request_bytes)?)),
        }
    }
}

fn failed(operation: &'static str, place: Place<'_>, cause: Errno) -> Error {
    Error::io(operation, place.full(), cause)
}

/// The directory that a name lies in, opened, and the name itself.
fn parent(place: Place<'_>) -> rustix::io::Result<(OwnedFd, &Path)> {
    let name = place.path.file_name().ok_or(Errno::INVAL)?;
    let directory = place.path.parent().unwrap_or(Path::new(""));
    let flags = OFlags::PATH | OFlags::DIRECTORY;
    let parent = open_below(Place { root: place.root, path: directory }, flags, Mode::empty())?;
    Ok((parent, Path::new(name)))
}

/// Opens what is at `place`; a link in any of its components, the last included, is refused with `ELOOP` (or `ENOTDIR`,
/// where the kernel has no `openat2`).
pub fn open_below(place: Place<'_>, flags: OFlags, mode: Mode) -> rustix::io::Result<OwnedFd> {
    let path = if place.path.as_os_str().is_empty() { Path::new(".") } else { place.path };
    let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    match retry_on_intr(|| rustix::fs::openat2(place.root, path, flags, mode, resolve)) {
        // Not in this kernel, or hidden by a container's filter, which answers with either.
        Err(Errno::NOSYS | Errno::PERM) => walk(place.root.as_fd(), path, flags, mode),
        result => result,
    }
}

fn walk(root: BorrowedFd<'_>, path: &Path, flags: OFlags, mode: Mode) -> rustix::io::Result<OwnedFd> {
    let step = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut components = path.components().peekable();
    let mut directory: Option<OwnedFd> = None;
    while let Some(component) = components.next() {
        let name = match component {
            Component::Normal(name) => Path::new(name),
            Component::CurDir => Path::new("."),
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => return Err(Errno::XDEV),
        };
        let here = directory.as_ref().map_or(root, |directory| directory.as_fd());
        let (flags, mode) = if components.peek().is_some() { (step, Mode::empty()) } else { (flags, mode) };
        directory = Some(retry_on_intr(|| rustix::fs::openat(here, name, flags, mode))?);
    }
    directory.ok_or(Errno::INVAL)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::io::Root;

    #[test]
    fn walking_refuses_what_openat2_refuses() {
        let directory = tempfile::tempdir().unwrap();
        let base = directory.path();
        std::fs::create_dir_all(base.join("a/b")).unwrap();
        std::fs::write(base.join("a/b/file"), b"x").unwrap();
        std::os::unix::fs::symlink(base.join("a"), base.join("way")).unwrap();
        std::os::unix::fs::symlink("file", base.join("a/b/link")).unwrap();
        let root = Root::open(base).unwrap();
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let open = |path: &str| walk(root.as_fd(), Path::new(path), flags, Mode::empty()).map(drop);
        for path in ["a/b/file", "a/b", "."] {
            open(path).unwrap();
        }
        assert_eq!(open("a/b/link"), Err(Errno::LOOP));
        assert!(matches!(open("way/b/file"), Err(Errno::LOOP | Errno::NOTDIR)));
        for path in ["..", "a/../a", "/etc"] {
            assert_eq!(open(path), Err(Errno::XDEV), "{path}");
        }
        assert_eq!(open("a/c"), Err(Errno::NOENT));
    }
}
