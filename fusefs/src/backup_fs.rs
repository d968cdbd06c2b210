//! A backup as a read-only FUSE file system: each call of the kernel, answered from [`Tree`] and [`Reader`].
//!
//! *SEMANTICS.md* says what each call does. Whatever would change something is refused with EROFS here too, although the
//! kernel refuses it first on a read-only mount. A handler that panics answers with EIO, says so in the log, and the
//! mount goes on.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use engine::repository::Backup;
use engine::wal::name::WalFile;
use engine::{Error, Result};
use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs,
    ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use crate::budget::{BUFFER_BYTES_MAX, Budget};
use crate::errno;
use crate::node::Node;
use crate::reader::{OpenFile, Reader};
use crate::table::Served;
use crate::tree::{Attributes, Entry, Kind, Owner, Tree};

/// A backup never changes: the kernel may keep what it was told.
const LONG: Duration = Duration::from_secs(24 * 3600);
/// The archive grows, and old segments expire.
const SHORT: Duration = Duration::from_secs(1);
/// Requests that the kernel may have under way for read-ahead and asynchronous direct reads.
const BACKGROUND_MAX: u16 = 128;
/// What `stat` and `statfs` count in.
const UNIT_BYTES: u32 = 4096;
const NAME_BYTES_MAX: u32 = 255;

/// How a backup is shown.
#[derive(Clone, Debug)]
pub struct View {
    /// Shown as the owner of everything, in place of the recorded ones.
    pub owner: Option<Owner>,
    /// What the mount tells of itself, see [`Served`].
    pub token: String,
    /// Memory for read-ahead and decoded blocks, bytes.
    pub memory_bytes: usize,
}

/// A backup, mounted read-only.
#[derive(Debug)]
pub struct BackupFs {
    tree: Tree,
    reader: Reader,
    handles: Handles<OpenFile>,
    /// The archive as it was when its directory was opened: positions in it are the cookies.
    listings: Handles<Vec<WalFile>>,
}

/// What the kernel has open, by handle.
#[derive(Debug)]
struct Handles<T> {
    next: AtomicU64,
    open: RwLock<HashMap<u64, Arc<T>>>,
}

impl<T> Handles<T> {
    fn new() -> Self {
        Self { next: AtomicU64::new(1), open: RwLock::default() }
    }

    fn add(&self, opened: Arc<T>) -> FileHandle {
        let handle = self.next.fetch_add(1, Ordering::Relaxed);
        self.open.write().unwrap_or_else(PoisonError::into_inner).insert(handle, opened);
        FileHandle(handle)
    }

    fn get(&self, handle: FileHandle) -> Option<Arc<T>> {
        self.open.read().unwrap_or_else(PoisonError::into_inner).get(&handle.0).cloned()
    }

    fn remove(&self, handle: FileHandle) -> Option<Arc<T>> {
        self.open.write().unwrap_or_else(PoisonError::into_inner).remove(&handle.0)
    }
}

impl BackupFs {
    /// The file system of `backup`.
    pub fn new(backup: &Backup, view: View) -> Result<Self> {
        let workers = std::thread::available_parallelism().map_or(1, usize::from);
        // Half of it for stored bytes on their way here, where they come from afar; the copier has no use for the rest.
        let ahead = backup.cluster.repository().store().allow_ahead(view.memory_bytes / 2);
        let reader = Reader::new(Budget::new(view.memory_bytes - ahead), workers);
        Ok(Self {
            tree: Tree::new(backup, view.owner, &Served { token: view.token, process: own_process() })?,
            reader: reader.map_err(|cause| Error::io("start", "read-ahead threads", cause))?,
            handles: Handles::new(),
            listings: Handles::new(),
        })
    }

    fn find(&self, parent: INodeNo, name: &OsStr) -> Result<Option<Attributes>> {
        match (Node::of(parent.0), name.to_str()) {
            (Some(parent), Some(name)) => self.tree.lookup(parent, name),
            _ => Ok(None),
        }
    }

    fn node(inode: INodeNo) -> Result<Node> {
        Node::of(inode.0).ok_or_else(|| Error::NotFound(format!("there is no inode {}", inode.0)))
    }

    fn open_file(&self, inode: INodeNo, direct: bool) -> Result<Option<FileHandle>> {
        let content = self.tree.content(Self::node(inode)?)?;
        Ok(content.map(|content| self.handles.add(OpenFile::new(inode.0, content, direct))))
    }

    /// Tells `each` the entries behind cookie `from`; `.` and `..` have the cookies 1 and 2.
    fn entries(
        &self,
        inode: INodeNo,
        listing: FileHandle,
        from: u64,
        each: &mut dyn FnMut(&Entry) -> bool,
    ) -> Result<()> {
        const DOTS: u64 = 2;
        let node = Self::node(inode)?;
        let itself = self.tree.attributes(node)?;
        for (name, next) in [(".", 1), ("..", DOTS)] {
            if from < next && !each(&Entry { next, name: name.to_owned(), attributes: itself }) {
                return Ok(());
            }
        }
        let from = from.saturating_sub(DOTS);
        let mut each = |mut entry: Entry| {
            entry.next += DOTS;
            each(&entry)
        };
        if node != Node::Wal {
            return self.tree.list(node, from, each);
        }
        let files = self.listings.get(listing).unwrap_or_default();
        let files = files.iter().zip(1..).skip(usize::try_from(from).unwrap_or(usize::MAX));
        for (file, next) in files {
            let entry = match self.tree.wal_entry(*file, next) {
                Ok(entry) => entry,
                // Expired since the directory was opened.
                Err(Error::NotFound(_)) => continue,
                Err(error) => return Err(error),
            };
            if !each(entry) {
                break;
            }
        }
        Ok(())
    }
}

fn own_process() -> i32 {
    rustix::process::getpid().as_raw_nonzero().get()
}

/// Runs a handler. If it panics its reply is dropped, which answers EIO; the log says where.
fn guarded(call: &str, inode: INodeNo, handler: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(handler)).is_err() {
        tracing::error!("{call} of inode {} panicked; it was answered with EIO", inode.0);
    }
}

/// The errno of an error of a call on names or attributes. Here it ends, so here it is logged.
fn refusal(call: &str, inode: INodeNo, error: &Error) -> Errno {
    match error {
        Error::NotFound(_) => tracing::debug!("{call} of inode {}: {error}", inode.0),
        _ => tracing::error!("{call} of inode {}: {error}", inode.0),
    }
    Errno::from_i32(errno::of(error))
}

fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::Directory => FileType::Directory,
        Kind::File => FileType::RegularFile,
        Kind::Link => FileType::Symlink,
    }
}

fn stat(attributes: &Attributes) -> FileAttr {
    let seconds = Duration::from_secs(attributes.modified.unsigned_abs());
    let time = if attributes.modified < 0 { UNIX_EPOCH.checked_sub(seconds) } else { UNIX_EPOCH.checked_add(seconds) };
    let time = time.unwrap_or(UNIX_EPOCH);
    FileAttr {
        ino: INodeNo(attributes.inode),
        size: attributes.bytes,
        blocks: attributes.bytes.div_ceil(512),
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind: file_type(attributes.kind),
        perm: u16::try_from(attributes.mode & 0o7777).unwrap_or_default(),
        // Of a directory it would count its subdirectories; 1 says that nobody did.
        nlink: 1,
        uid: attributes.owner.uid,
        gid: attributes.owner.gid,
        rdev: 0,
        blksize: UNIT_BYTES,
        flags: 0,
    }
}

fn lifetime(inode: u64) -> Duration {
    match Node::of(inode) {
        Some(Node::Wal | Node::WalFile(_) | Node::WalLabel(_)) => SHORT,
        _ => LONG,
    }
}

const GENERATION: Generation = Generation(0);

impl Filesystem for BackupFs {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let wanted = InitFlags::FUSE_ASYNC_DIO
            | InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_DO_READDIRPLUS
            | InitFlags::FUSE_READDIRPLUS_AUTO
            | InitFlags::FUSE_CACHE_SYMLINKS
            | InitFlags::FUSE_EXPLICIT_INVAL_DATA
            | InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP;
        // Each makes something faster; an older kernel without one of them serves the same bytes.
        let _ = config.add_capabilities(wanted & config.capabilities());
        // Both refuse only values that are out of range, and name what they would take.
        let _ = config.set_max_background(BACKGROUND_MAX);
        // The size of a request: the kernel asks for as many pages at once as the larger of write and read-ahead.
        let request_bytes = u32::try_from(BUFFER_BYTES_MAX).unwrap_or(u32::MAX);
        let _ = config.set_max_write(request_bytes);
        if let Err(most) = config.set_max_readahead(request_bytes) {
            let _ = config.set_max_readahead(most);
        }
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name.len() > NAME_BYTES_MAX as usize {
            return reply.error(Errno::ENAMETOOLONG);
        }
        guarded("lookup", parent, || match self.find(parent, name) {
            Ok(Some(found)) => reply.entry(&lifetime(found.inode), &stat(&found), GENERATION),
            Ok(None) => reply.error(Errno::ENOENT),
            Err(error) => reply.error(refusal("lookup", parent, &error)),
        });
    }

    fn getattr(&self, _request: &Request, inode: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        guarded("getattr", inode, || match Self::node(inode).and_then(|node| self.tree.attributes(node)) {
            Ok(attributes) => reply.attr(&lifetime(inode.0), &stat(&attributes)),
            Err(error) => reply.error(refusal("getattr", inode, &error)),
        });
    }

    fn readlink(&self, _request: &Request, inode: INodeNo, reply: ReplyData) {
        guarded("readlink", inode, || match Self::node(inode).and_then(|node| self.tree.link_text(node)) {
            Ok(Some(text)) => reply.data(text.as_bytes()),
            Ok(None) => reply.error(Errno::EINVAL),
            Err(error) => reply.error(refusal("readlink", inode, &error)),
        });
    }

    fn open(&self, _request: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if flags.acc_mode() != OpenAccMode::O_RDONLY {
            return reply.error(Errno::EROFS);
        }
        let direct = flags.0 & libc::O_DIRECT != 0;
        guarded("open", inode, || match self.open_file(inode, direct) {
            Ok(Some(handle)) => {
                // What the kernel has in its page cache stays good: content never changes.
                let caching = if direct { FopenFlags::FOPEN_DIRECT_IO } else { FopenFlags::FOPEN_KEEP_CACHE };
                reply.opened(handle, caching | FopenFlags::FOPEN_NOFLUSH);
            }
            Ok(None) => reply.error(Errno::EISDIR),
            Err(error) => reply.error(refusal("open", inode, &error)),
        });
    }

    fn read(
        &self,
        _request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        guarded("read", inode, || match self.handles.get(handle) {
            Some(file) => self.reader.read(&file, offset, size as usize, |outcome| match outcome {
                Ok(bytes) => reply.data(bytes),
                Err(errno) => reply.error(Errno::from_i32(errno)),
            }),
            None => reply.error(Errno::EBADF),
        });
    }

    fn release(
        &self,
        _request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        guarded("release", inode, || {
            if let Some(file) = self.handles.remove(handle) {
                self.reader.close(&file);
            }
            reply.ok();
        });
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn opendir(&self, _request: &Request, inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        guarded("opendir", inode, || {
            if Node::of(inode.0) != Some(Node::Wal) {
                return reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_CACHE_DIR);
            }
            match self.tree.wal_files() {
                Ok(files) => reply.opened(self.listings.add(Arc::new(files)), FopenFlags::empty()),
                Err(error) => reply.error(refusal("opendir", inode, &error)),
            }
        });
    }

    fn readdir(&self, _: &Request, inode: INodeNo, handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        guarded("readdir", inode, || {
            let mut add = |entry: &Entry| {
                let Entry { next, name, attributes } = entry;
                !reply.add(INodeNo(attributes.inode), *next, file_type(attributes.kind), name)
            };
            match self.entries(inode, handle, offset, &mut add) {
                Ok(()) => reply.ok(),
                Err(error) => reply.error(refusal("readdir", inode, &error)),
            }
        });
    }

    fn readdirplus(&self, _: &Request, inode: INodeNo, handle: FileHandle, offset: u64, mut reply: ReplyDirectoryPlus) {
        guarded("readdirplus", inode, || {
            let mut add = |entry: &Entry| {
                let Entry { next, name, attributes } = entry;
                let lifetime = lifetime(attributes.inode);
                !reply.add(INodeNo(attributes.inode), *next, name, &lifetime, &stat(attributes), GENERATION)
            };
            match self.entries(inode, handle, offset, &mut add) {
                Ok(()) => reply.ok(),
                Err(error) => reply.error(refusal("readdirplus", inode, &error)),
            }
        });
    }

    fn releasedir(&self, _: &Request, inode: INodeNo, handle: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        guarded("releasedir", inode, || {
            self.listings.remove(handle);
            reply.ok();
        });
    }

    fn statfs(&self, _request: &Request, _inode: INodeNo, reply: ReplyStatfs) {
        let (files, bytes) = self.tree.totals();
        let units = bytes.div_ceil(u64::from(UNIT_BYTES));
        reply.statfs(units, 0, 0, files, 0, UNIT_BYTES, NAME_BYTES_MAX, UNIT_BYTES);
    }

    // There are none. ENOSYS is never passed on: the kernel answers EOPNOTSUPP, and does so by itself from then on.

    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _: &Request, _: INodeNo, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn access(&self, _: &Request, _: INodeNo, mask: AccessFlags, reply: ReplyEmpty) {
        // The kernel checks the modes (default_permissions) and does not ask.
        if mask.contains(AccessFlags::W_OK) { reply.error(Errno::EROFS) } else { reply.ok() }
    }

    // Whatever would change something.

    fn setattr(
        &self,
        _: &Request,
        _: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        reply.error(Errno::EROFS);
    }

    fn mknod(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn mkdir(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn unlink(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn rmdir(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn symlink(&self, _: &Request, _: INodeNo, _: &OsStr, _: &Path, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn rename(&self, _: &Request, _: INodeNo, _: &OsStr, _: INodeNo, _: &OsStr, _: RenameFlags, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn link(&self, _: &Request, _: INodeNo, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn create(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: i32, reply: ReplyCreate) {
        reply.error(Errno::EROFS);
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::EROFS);
    }

    fn setxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: &[u8], _: i32, _: u32, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn removexattr(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn fallocate(&self, _: &Request, _: INodeNo, _: FileHandle, _: u64, _: u64, _: i32, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn copy_file_range(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: u64,
        _: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        // The target would lie on this mount; for a copy from here to elsewhere the kernel reads.
        reply.error(Errno::EROFS);
    }
}
