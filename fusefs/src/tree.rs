//! A backup as a tree of directories, files and links: names, numbers, attributes. It knows no FUSE.
//!
//! ```text
//! data/                  the data directory; data/pg_tblspc/<oid> is a link to ../../tablespaces/<oid>
//! tablespaces/<oid>/     the tablespaces outside of it
//! wal/                   the archive's files, from the backup's first segment on; new ones appear as they arrive
//! backup.json            the description of the backup
//! .pghydrant             a link that no listing shows: who serves the mount
//! ```
//!
//! An inode number *is* the place of its file: the index in the manifest's path order, or the timeline and number of a
//! segment. So a tree of a million files costs no memory: what is asked for is looked up in the manifest, whose chunks
//! are cached, and nothing has to be remembered or forgotten.
//!
//! Always true: a number stands for the same file as long as the mount lives, and content never changes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use engine::blocks::Blocks;
use engine::format::file::{FileKind, FileRecord};
use engine::repository::{Backup, Manifest};
use engine::wal::name::{SegmentName, WalFile};
use engine::wal::{WalArchive, WalObject};
use engine::{Error, Result};

use crate::content::{ArchivedFile, BackupFile, Content, Text};
use crate::node::{Node, has_number};
use crate::table::{SERVED_LINK, Served};

/// Who owns the files of a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// User number.
    pub uid: u32,
    /// Group number.
    pub gid: u32,
}

/// What kind of thing a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file.
    File,
    /// A symbolic link.
    Link,
}

/// What `stat` shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// The number.
    pub inode: u64,
    /// Directory, file or link.
    pub kind: Kind,
    /// Permission bits.
    pub mode: u32,
    /// Who owns it.
    pub owner: Owner,
    /// Content bytes; of a link the length of its text.
    pub bytes: u64,
    /// Seconds since 1970.
    pub modified: i64,
}

/// An entry of a directory, and the cookie of the one behind it.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Where to go on after it.
    pub next: u64,
    /// Its name.
    pub name: String,
    /// What it is.
    pub attributes: Attributes,
}

/// A backup as a tree.
#[derive(Debug)]
pub struct Tree {
    manifest: Manifest,
    blocks: Blocks,
    wal: WalArchive,
    description: Arc<[u8]>,
    served: String,
    first_segment: SegmentName,
    segment_bytes: u64,
    block_bytes: u64,
    wal_block_bytes: u64,
    data_owner: Owner,
    owner: Option<Owner>,
    modified: i64,
    labels: Mutex<Labels>,
    /// Files of the archive that the log has named as damaged.
    damaged: Mutex<BTreeSet<WalFile>>,
}

/// The few names of the archive that do not fit into an inode number: those of old backups' labels.
#[derive(Debug, Default)]
struct Labels {
    by_place: Vec<WalFile>,
    places: BTreeMap<WalFile, u64>,
}

impl Tree {
    /// The tree of `backup`. `owner` is shown as the owner of everything, in place of the recorded ones.
    pub fn new(backup: &Backup, owner: Option<Owner>, served: &Served) -> Result<Self> {
        let Backup { info, manifest, cluster } = backup;
        let description = info.to_json().map_err(|malformed| {
            Error::io("describe", format!("backup {}", info.label), std::io::Error::other(malformed))
        })?;
        let first = manifest.file_at(0)?;
        let segment_bytes = cluster.info().wal_segment_bytes;
        Ok(Self {
            manifest: manifest.clone(),
            blocks: backup.blocks(),
            wal: cluster.wal(),
            description: description.into(),
            served: served.to_string(),
            first_segment: SegmentName::holding(info.wal.timeline, info.wal.start, segment_bytes),
            segment_bytes,
            block_bytes: info.block_bytes.bytes() as u64,
            wal_block_bytes: cluster.repository().info().block_bytes.bytes() as u64,
            data_owner: first.map_or(Owner { uid: 0, gid: 0 }, |file| Owner { uid: file.uid, gid: file.gid }),
            owner,
            modified: info.stopped_unix,
            labels: Mutex::default(),
            damaged: Mutex::default(),
        })
    }

    /// Files and bytes of the backup, for `statfs`.
    pub fn totals(&self) -> (u64, u64) {
        let totals = &self.manifest.info().totals;
        (totals.files.saturating_add(totals.directories), totals.bytes)
    }

    /// What `stat` shows of `node`.
    pub fn attributes(&self, node: Node) -> Result<Attributes> {
        match node {
            Node::Root | Node::Tablespaces => Ok(self.directory(node, 0o755)),
            Node::Data | Node::Wal => Ok(self.directory(node, 0o700)),
            Node::Description => {
                let bytes = self.description.len() as u64;
                Ok(Attributes { kind: Kind::File, bytes, ..self.directory(node, 0o600) })
            }
            Node::Served => {
                let bytes = self.served.len() as u64;
                Ok(Attributes { kind: Kind::Link, bytes, ..self.directory(node, 0o777) })
            }
            Node::File(index) => Ok(self.of_file(index, &self.record(index)?)),
            Node::Tablespace(index) => Ok(self.of_tablespace(index, &self.record(index)?)),
            Node::WalFile(_) | Node::WalLabel(_) => self.of_wal(self.wal_file(node)?),
        }
    }

    /// The child `name` of the directory `parent`.
    pub fn lookup(&self, parent: Node, name: &str) -> Result<Option<Attributes>> {
        match parent {
            Node::Root if name == SERVED_LINK => self.attributes(Node::Served).map(Some),
            Node::Root => {
                let node = ROOT_ENTRIES.into_iter().find(|(entry, _)| *entry == name);
                node.map(|(_, node)| self.attributes(node)).transpose()
            }
            Node::Data => self.lookup_path(name),
            Node::File(index) | Node::Tablespace(index) => {
                self.lookup_path(&format!("{}/{name}", self.record(index)?.path))
            }
            Node::Tablespaces => {
                let Some(index) = self.manifest.index_of(&format!("pg_tblspc/{name}"))? else { return Ok(None) };
                let record = self.record(index)?;
                let is_root = matches!(record.kind, FileKind::Tablespace { .. });
                Ok(is_root.then(|| self.of_tablespace(index, &record)))
            }
            Node::Wal => match WalFile::parse(name, self.segment_bytes) {
                Some(file) if self.shows(file) => match self.stored_bytes(file).and_then(|_| self.of_wal(file)) {
                    Err(Error::NotFound(_)) => Ok(None),
                    found => found.map(Some),
                },
                _ => Ok(None),
            },
            Node::Description | Node::Served | Node::WalFile(_) | Node::WalLabel(_) => Ok(None),
        }
    }

    /// Tells `each` the entries of `directory` from the cookie `from` on, until it returns false. 0 is the beginning.
    /// Not for [`Node::Wal`], whose entries come and go: see [`Tree::wal_files`].
    pub fn list(&self, directory: Node, from: u64, mut each: impl FnMut(Entry) -> bool) -> Result<()> {
        match directory {
            Node::Root => {
                let entries = ROOT_ENTRIES.into_iter().zip(1..).skip(usize::try_from(from).unwrap_or(usize::MAX));
                for ((name, node), next) in entries {
                    let entry = Entry { next, name: name.to_owned(), attributes: self.attributes(node)? };
                    if !each(entry) {
                        break;
                    }
                }
                Ok(())
            }
            Node::Data => self.list_files("", from, |index, record| self.of_file(index, record), each),
            Node::File(index) | Node::Tablespace(index) => {
                let directory = self.record(index)?.path;
                self.list_files(&directory, from, |index, record| self.of_file(index, record), each)
            }
            Node::Tablespaces => {
                let as_root = |index, record: &FileRecord| self.of_tablespace(index, record);
                // An in-place tablespace is an ordinary directory of the data directory.
                self.list_files("pg_tblspc", from, as_root, |entry| {
                    let is_root = matches!(Node::of(entry.attributes.inode), Some(Node::Tablespace(_)));
                    !is_root || each(entry)
                })
            }
            Node::Wal | Node::Description | Node::Served | Node::WalFile(_) | Node::WalLabel(_) => Ok(()),
        }
    }

    /// The files of the archive that the mount shows now, in order.
    pub fn wal_files(&self) -> Result<Vec<WalFile>> {
        let mut files = Vec::new();
        for timeline in self.wal.timelines()? {
            files.extend(self.wal.files(timeline)?.into_iter().filter(|file| self.shows(*file)));
        }
        // After the listing: one of a repository that was away meanwhile is not believed.
        self.prove_archive()?;
        files.sort_unstable();
        Ok(files)
    }

    /// The entry of a file of the archive.
    pub fn wal_entry(&self, file: WalFile, next: u64) -> Result<Entry> {
        Ok(Entry { next, name: file.file_name(self.segment_bytes), attributes: self.of_wal(file)? })
    }

    /// The text of a link.
    pub fn link_text(&self, node: Node) -> Result<Option<String>> {
        match node {
            Node::File(index) => Ok(link_text(&self.record(index)?)),
            Node::Served => Ok(Some(self.served.clone())),
            _ => Ok(None),
        }
    }

    /// The bytes of a file, or nothing for what has none.
    pub fn content(&self, node: Node) -> Result<Option<Box<dyn Content>>> {
        match node {
            Node::Description => Ok(Some(Box::new(Text(self.description.clone())))),
            Node::File(index) => {
                let file = self.record(index)?;
                let blocks = self.blocks.clone();
                Ok(match file.kind {
                    FileKind::Regular => Some(Box::new(BackupFile { file, blocks, block_bytes: self.block_bytes })),
                    FileKind::Directory | FileKind::Symlink { .. } | FileKind::Tablespace { .. } => None,
                })
            }
            Node::WalFile(_) | Node::WalLabel(_) => {
                let (name, object) = self.wal_object(self.wal_file(node)?)?;
                Ok(Some(Box::new(ArchivedFile { name, object, block_bytes: self.wal_block_bytes })))
            }
            Node::Root | Node::Data | Node::Tablespaces | Node::Wal | Node::Served | Node::Tablespace(_) => Ok(None),
        }
    }

    fn record(&self, index: u64) -> Result<FileRecord> {
        let record = self.manifest.file_at(index)?;
        record.ok_or_else(|| Error::NotFound(format!("the backup has no file number {index}")))
    }

    fn lookup_path(&self, path: &str) -> Result<Option<Attributes>> {
        let Some(index) = self.manifest.index_of(path)? else { return Ok(None) };
        Ok(Some(self.of_file(index, &self.record(index)?)))
    }

    /// Cookies are the index of the next record and one, so that 0 stays the beginning.
    fn list_files(
        &self,
        directory: &str,
        from: u64,
        attributes: impl Fn(u64, &FileRecord) -> Attributes,
        mut each: impl FnMut(Entry) -> bool,
    ) -> Result<()> {
        let mut index = match (from, directory) {
            (0, "") => 0,
            (0, _) => match self.manifest.index_of(directory)? {
                Some(index) => index + 1,
                None => return Ok(()),
            },
            (cookie, _) => cookie - 1,
        };
        while let Some(record) = self.manifest.file_at(index)? {
            let Some(name) = child_name(directory, &record.path) else { break };
            let next = match record.kind {
                FileKind::Directory | FileKind::Tablespace { .. } => self.manifest.index_after(&record.path)?,
                FileKind::Regular | FileKind::Symlink { .. } => index + 1,
            };
            let entry = Entry { next: next + 1, name: name.to_owned(), attributes: attributes(index, &record) };
            if !each(entry) {
                break;
            }
            index = next;
        }
        Ok(())
    }

    fn directory(&self, node: Node, mode: u32) -> Attributes {
        let owner = self.owner.unwrap_or(self.data_owner);
        Attributes { inode: node.inode(), kind: Kind::Directory, mode, owner, bytes: 0, modified: self.modified }
    }

    fn of_file(&self, index: u64, record: &FileRecord) -> Attributes {
        let (kind, mode, bytes) = match &record.kind {
            FileKind::Directory => (Kind::Directory, record.mode, 0),
            FileKind::Regular => (Kind::File, record.mode, record.bytes),
            FileKind::Symlink { .. } | FileKind::Tablespace { .. } => {
                (Kind::Link, 0o777, link_text(record).map_or(0, |text| text.len() as u64))
            }
        };
        let recorded = Owner { uid: record.uid, gid: record.gid };
        let owner = self.owner.unwrap_or(recorded);
        Attributes { inode: Node::File(index).inode(), kind, mode, owner, bytes, modified: record.modified }
    }

    fn of_tablespace(&self, index: u64, record: &FileRecord) -> Attributes {
        let attributes = self.of_file(index, record);
        match record.kind {
            FileKind::Tablespace { .. } => Attributes {
                inode: Node::Tablespace(index).inode(),
                kind: Kind::Directory,
                mode: record.mode,
                bytes: 0,
                ..attributes
            },
            _ => attributes,
        }
    }

    /// The files that a recovery of this backup can ask for: from its first segment on, and all histories.
    fn shows(&self, file: WalFile) -> bool {
        match file {
            WalFile::Segment(segment) | WalFile::Partial(segment) | WalFile::BackupLabel(segment, _) => {
                segment.timeline >= self.first_segment.timeline && segment.number >= self.first_segment.number
            }
            WalFile::History(_) => true,
        }
    }

    fn of_wal(&self, file: WalFile) -> Result<Attributes> {
        let bytes = match file {
            // Not opened, so that a listing of a year's segments reads none of them.
            WalFile::Segment(_) => self.segment_bytes,
            WalFile::Partial(_) | WalFile::BackupLabel(..) | WalFile::History(_) => match self.wal_object(file) {
                Ok((_, object)) => object.bytes(),
                Err(error @ Error::NotFound(_)) => return Err(error),
                // Whoever opens it is told; the others of the directory are there all the same.
                Err(error) => {
                    let stored = self.stored_bytes(file)?;
                    self.report_damaged(file, &error);
                    stored
                }
            },
        };
        Ok(Attributes { kind: Kind::File, bytes, ..self.directory(self.wal_node(file), 0o600) })
    }

    /// Logs a file of the archive that cannot be opened, once.
    fn report_damaged(&self, file: WalFile, error: &Error) {
        if self.damaged.lock().unwrap_or_else(PoisonError::into_inner).insert(file) {
            tracing::error!(file = %file.file_name(self.segment_bytes), "listed as it is stored: {error}");
        }
    }

    /// Fails with [`Error::NotFound`] where the archive is there and has no such file.
    fn stored_bytes(&self, file: WalFile) -> Result<u64> {
        match self.wal.stored_bytes(file)? {
            Some(bytes) => Ok(bytes),
            None => Err(self.absent(file)),
        }
    }

    fn wal_object(&self, file: WalFile) -> Result<(String, WalObject)> {
        let name = file.file_name(self.segment_bytes);
        match self.wal.open(&name)? {
            Some(object) => Ok((name, object)),
            None => Err(self.absent(file)),
        }
    }

    /// The error for a file that was not found. "No such file" is what PostgreSQL takes for the end of the WAL: that is
    /// said only where the archive is there.
    fn absent(&self, file: WalFile) -> Error {
        let name = file.file_name(self.segment_bytes);
        self.prove_archive().err().unwrap_or_else(|| Error::NotFound(format!("the archive has no {name}")))
    }

    /// Whatever is wrong with the repository is an I/O error of the mount, and never "no such file".
    fn prove_archive(&self) -> Result<()> {
        let root = self.wal.cluster().repository().root();
        self.wal.prove_readable().map_err(|error| Error::io("look into", root, std::io::Error::other(error)))
    }

    fn wal_node(&self, file: WalFile) -> Node {
        if has_number(file) {
            return Node::WalFile(file);
        }
        let mut labels = self.labels.lock().unwrap_or_else(PoisonError::into_inner);
        let next = labels.by_place.len() as u64;
        let place = *labels.places.entry(file).or_insert(next);
        if place == next {
            labels.by_place.push(file);
        }
        Node::WalLabel(place)
    }

    fn wal_file(&self, node: Node) -> Result<WalFile> {
        let labelled = |place: u64| {
            let labels = self.labels.lock().unwrap_or_else(PoisonError::into_inner);
            usize::try_from(place).ok().and_then(|place| labels.by_place.get(place).copied())
        };
        let file = match node {
            Node::WalFile(file) => Some(file),
            Node::WalLabel(place) => labelled(place),
            _ => None,
        };
        file.ok_or_else(|| Error::NotFound(format!("{node:?} is no file of the archive")))
    }
}

const ROOT_ENTRIES: [(&str, Node); 4] =
    [("backup.json", Node::Description), ("data", Node::Data), ("tablespaces", Node::Tablespaces), ("wal", Node::Wal)];

fn link_text(record: &FileRecord) -> Option<String> {
    match &record.kind {
        FileKind::Symlink { target } => Some(target.clone()),
        FileKind::Tablespace { .. } => {
            record.path.strip_prefix("pg_tblspc/").map(|oid| format!("../../tablespaces/{oid}"))
        }
        FileKind::Directory | FileKind::Regular => None,
    }
}

/// The name of `path` in `directory`, if it lies directly or deeper below it.
fn child_name<'a>(directory: &str, path: &'a str) -> Option<&'a str> {
    match directory {
        "" => Some(path),
        _ => path.strip_prefix(directory)?.strip_prefix('/'),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sibling_with_the_same_beginning_is_no_child() {
        assert_eq!(child_name("base/1", "base/1/2"), Some("2"));
        assert_eq!(child_name("base/1", "base/16/2"), None);
        assert_eq!(child_name("", "base"), Some("base"));
    }
}
