//! `archive_command`: a file of `pg_wal` into the archive.
//!
//! PostgreSQL recycles the segment once the push has answered, and calls again with the same segment after a crash of
//! either side. So the object is synced, renamed to a name that must be new, and the directory synced before the answer;
//! the same content again is no error, other content under the same name is refused and nothing replaced. Pushes may
//! run beside each other, of one segment even: the rename decides.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::encode::{Encoded, Encoder};
use super::name::{SegmentName, WalFile, is_segment_size};
use super::page::{HEADER_BYTES, SegmentHeader};
use super::{WalArchive, WalObject};
use crate::codec::Codec;
use crate::format::block::{BlockRecord, Content, Extent};
use crate::format::wal::{CONTENT_BYTES_MAX, WalHeader};
use crate::repository::{ClusterInfo, Lock, LockKind, Repository, now};
use crate::store::{Existing, Upload};
use crate::units::{ClusterName, DIRECT_BYTES, PackId, SystemIdentifier};
use crate::{Error, Result};

/// What became of a push.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pushed {
    /// It is in the archive now, durable.
    Stored,
    /// The same content was there, and is durable.
    AlreadyThere,
}

impl WalArchive {
    /// The archive for the file `path`: that of the cluster, which is made if it is new. Whose a new cluster is, the
    /// segment says, or for another kind of file the segments beside it.
    pub fn for_push(repository: &Repository, cluster: &ClusterName, path: &Path) -> Result<Self> {
        if let Some(cluster) = repository.find_cluster(cluster)? {
            return Ok(cluster.wal());
        }
        let header = match read_header(path)? {
            Ok(header) => header,
            Err(refusal) => header_beside(path)?.ok_or_else(|| {
                let path = path.display();
                Error::Refused(format!("cluster \"{cluster}\" is new, and {path} does not tell whose it is: {refusal}"))
            })?,
        };
        let (identifier, segment_bytes) = (header.system_identifier, header.segment_bytes);
        let cluster = repository.create_cluster(ClusterInfo::new(cluster.clone(), identifier, segment_bytes, now()))?;
        Ok(cluster.wal())
    }

    /// Stores the file `path` under its name: durable when it returns. The same content again is no error, another
    /// content under the same name is [`Error::Refused`].
    pub fn push(&self, path: &Path) -> Result<Pushed> {
        let name = file_name(path)?;
        let file = self.parse(name)?;
        let source = open(path)?;
        let bytes = source.metadata().map_err(|cause| Error::io("look at", path, cause))?.len();
        let system_identifier = self.refuse_unless_ours(file, path, bytes)?;

        // Held together with other pushes, against the sweep of what crashed ones left.
        let _shared = Lock::shared(&**self.store(), self.cluster().name(), LockKind::Push)?;
        let key = self.key(file);
        if let Some(object) = self.open(name)? {
            return self.compare(&object, &source, path, &key);
        }
        match self.store_file(&source, path, name, bytes, system_identifier, &key) {
            Ok(()) => Ok(Pushed::Stored),
            // Somebody else pushed it meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => match self.open(name)? {
                Some(object) => self.compare(&object, &source, path, &key),
                None => Err(error),
            },
            Err(error) => Err(error),
        }
    }

    /// Whether the archive has this very file, readable, under its name.
    pub fn has_same(&self, path: &Path) -> Result<bool> {
        let name = file_name(path)?;
        let key = self.key(self.parse(name)?);
        let source = open(path)?;
        let compared = match self.open(name) {
            Ok(None) => return Ok(false),
            Ok(Some(object)) => self.compare(&object, &source, path, &key),
            Err(error) => Err(error),
        };
        match compared {
            Ok(_) => Ok(true),
            Err(Error::Refused(_) | Error::Corrupt { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Refuses the file `path` where the archive has another under its name, as far as its first `bytes` tell: what lies
    /// behind them may never have been written. One that the archive has not is no error.
    pub fn refuse_another(&self, path: &Path, bytes: u64) -> Result<()> {
        let name = file_name(path)?;
        let key = self.key(self.parse(name)?);
        match self.open(name)? {
            Some(object) => self.refuse_difference(&object, &open(path)?, path, &key, bytes),
            None => Ok(()),
        }
    }

    /// The system identifier in the file, 0 where it has none. Refuses what does not belong under its name here.
    fn refuse_unless_ours(&self, file: WalFile, path: &Path, bytes: u64) -> Result<SystemIdentifier> {
        let refuse = |detail: String| Error::Refused(format!("{} is not archived: {detail}", path.display()));
        let (segment, whole) = match file {
            WalFile::Segment(segment) => (segment, true),
            WalFile::Partial(segment) => (segment, false),
            WalFile::BackupLabel(..) | WalFile::History(_) if bytes > CONTENT_BYTES_MAX => {
                return Err(refuse(format!("{bytes} bytes are too many for it")));
            }
            WalFile::BackupLabel(..) | WalFile::History(_) => return Ok(SystemIdentifier(0)),
        };
        let header = read_header(path)?.map_err(refuse)?;
        self.cluster().refuse_stranger(header.system_identifier, header.segment_bytes)?;
        header.agrees_with(segment).map_err(refuse)?;
        let expected = self.segment_bytes();
        if bytes > expected || (whole && bytes < expected) {
            return Err(refuse(format!("it has {bytes} bytes, a segment has {expected}")));
        }
        Ok(header.system_identifier)
    }

    fn store_file(
        &self,
        source: &File,
        path: &Path,
        name: &str,
        bytes: u64,
        system_identifier: SystemIdentifier,
        key: &str,
    ) -> Result<()> {
        let info = self.cluster().repository().info();
        let header_bytes = WalHeader::bytes_for(bytes, info.block_bytes);
        let (block_size, compression) = (info.block_bytes, info.compression);
        let mut upload = self.store().create(key, Existing::Refuse)?;
        // Its place; what it tells is known at the end.
        upload.append(&vec![0; usize::try_from(header_bytes).unwrap_or(usize::MAX)])?;
        let mut blocks = Vec::new();
        Encoder { file: source, path, bytes, block_size, compression }.encode(|piece| {
            let mut rest = &piece.runs[..];
            for Encoded { hash, run } in &piece.blocks {
                let content = match *run {
                    None => Content::Zero,
                    Some((codec, stored)) => {
                        let (run, behind) = rest.split_at(stored);
                        rest = behind;
                        Content::Stored { at: append_run(&mut *upload, run, codec)?, codec }
                    }
                };
                blocks.push(BlockRecord { hash: *hash, content });
            }
            Ok(())
        })?;
        let header =
            WalHeader { repository: info.id, system_identifier, name: name.to_owned(), bytes, block_size, blocks };
        let refuse = |detail: String| Error::Refused(format!("{} is not archived: {detail}", path.display()));
        upload.replace_head(&header.to_bytes().map_err(refuse)?)?;
        upload.commit()
    }

    /// Whether the archive's file is what is pushed; then it is made sure that it stays.
    fn compare(&self, object: &WalObject, source: &File, path: &Path, key: &str) -> Result<Pushed> {
        let bytes = source.metadata().map_err(|cause| Error::io("look at", path, cause))?.len();
        if object.bytes() != bytes {
            return Err(self.another(path, key, &format!("has {} bytes, not {bytes}", object.bytes())));
        }
        self.refuse_difference(object, source, path, key, bytes)?;
        self.store().settle(key)?;
        Ok(Pushed::AlreadyThere)
    }

    fn refuse_difference(&self, object: &WalObject, source: &File, path: &Path, key: &str, bytes: u64) -> Result<()> {
        let (mut offset, mut mine) = (0, Vec::new());
        object.read_all(|theirs| {
            let left = usize::try_from(bytes.saturating_sub(offset)).unwrap_or(usize::MAX);
            let theirs = &theirs[..theirs.len().min(left)];
            mine.resize(theirs.len(), 0);
            source.read_exact_at(&mut mine, offset).map_err(|cause| Error::io_at("read", path, offset, cause))?;
            if let Some(at) = theirs.iter().zip(&mine).position(|(theirs, mine)| theirs != mine) {
                return Err(self.another(path, key, &format!("differs at byte {}", offset + at as u64)));
            }
            offset += theirs.len() as u64;
            Ok(())
        })
    }

    fn another(&self, path: &Path, key: &str, how: &str) -> Error {
        let there = self.store().describe(key);
        Error::Refused(format!("{} is not archived: {} is there already and {how}", path.display(), there.display()))
    }
}

/// Adds a stored run. The header is whole pages, so what is aligned in the object is aligned on a disk.
fn append_run(upload: &mut dyn Upload, run: &[u8], codec: Codec) -> Result<Extent> {
    if codec == Codec::Raw {
        align(upload)?;
    }
    let offset = upload.written();
    upload.append(run)?;
    if codec == Codec::Raw {
        align(upload)?;
    }
    // No file of the archive is longer than 1 GiB, and no run longer than a block.
    Ok(Extent { pack: PackId(0), offset: offset as u32, stored: run.len() as u32 })
}

fn align(upload: &mut dyn Upload) -> Result<()> {
    let written = upload.written();
    let missing = written.next_multiple_of(DIRECT_BYTES as u64) - written;
    if missing == 0 { Ok(()) } else { upload.append(&[0; DIRECT_BYTES][..missing as usize]) }
}

fn file_name(path: &Path) -> Result<&str> {
    let name = path.file_name().and_then(|name| name.to_str());
    name.ok_or_else(|| Error::NotFound(format!("{} is not the path of a WAL file", path.display())))
}

fn open(path: &Path) -> Result<File> {
    File::open(path).map_err(|cause| Error::io("open", path, cause))
}

/// The header of a segment, or why it has none.
fn read_header(path: &Path) -> Result<std::result::Result<SegmentHeader, String>> {
    let mut bytes = Vec::new();
    let read = open(path)?.take(HEADER_BYTES as u64).read_to_end(&mut bytes);
    read.map_err(|cause| Error::io("read", path, cause))?;
    Ok(SegmentHeader::parse(&bytes))
}

/// The header of any segment in the directory of `path`: on a promotion, a history is archived before any segment.
fn header_beside(path: &Path) -> Result<Option<SegmentHeader>> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let list_error = |cause| Error::io("list", directory, cause);
    for child in std::fs::read_dir(directory).map_err(list_error)? {
        let child = child.map_err(list_error)?;
        if child.file_name().to_str().is_none_or(|name| name.len() != 24) {
            continue;
        }
        let Ok(Ok(header)) = read_header(&child.path()) else { continue };
        // One that is recycled keeps an old page under a new name: whose it is stays true, if it ever was a segment.
        let name = child.file_name();
        let plain = name.to_str().and_then(|name| WalFile::parse(name, header.segment_bytes));
        if is_segment_size(header.segment_bytes) && matches!(plain, Some(WalFile::Segment(SegmentName { .. }))) {
            return Ok(Some(header));
        }
    }
    Ok(None)
}
