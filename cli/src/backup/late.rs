//! The files that come into being at the end of a backup: `pg_control`, `backup_label`, `tablespace_map`,
//! `backup_manifest`. Each is a group by itself, in the place that the plan kept for it.

use engine::Result;
use engine::format::file::{FileKind, FileRecord};
use engine::repository::{BackupWriter, Manifest, PackWriter};
use engine::units::{BlockNumber, BlockSize};

use super::copy::{GroupInProgress, ParentFile, Read, comparable_parent};
use super::plan::{LATE, Plan};

/// Writes them, one after another.
pub(super) struct LateFiles<'a> {
    writer: &'a BackupWriter,
    pack: PackWriter,
    plan: &'a Plan,
    block: BlockSize,
    parent: Option<Manifest>,
}

/// What a file that we make looks like in a directory listing.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attributes {
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Seconds since 1970.
    pub(super) modified: i64,
}

impl<'a> LateFiles<'a> {
    pub(super) fn begin(writer: &'a BackupWriter, plan: &'a Plan, block: BlockSize) -> Result<Self> {
        Ok(Self { writer, pack: writer.worker()?, plan, block, parent: comparable_parent(writer, block) })
    }

    /// Writes the file of that name in [`LATE`] whose text `produce` hands over in pieces.
    pub(super) fn write(
        &mut self,
        path: &'static str,
        attributes: Attributes,
        produce: impl FnOnce(&mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()>,
    ) -> Result<Read> {
        let parent = match &self.parent {
            Some(manifest) => ParentFile::find(manifest, path, self.block)?,
            None => None,
        };
        let mut file =
            Blockwise { late: self, parent, group: GroupInProgress::default(), held: Vec::new(), bytes: 0, crc32c: 0 };
        produce(&mut |piece| file.push(piece))?;
        file.put_held()?;
        let Blockwise { mut group, bytes, crc32c, .. } = file;
        let Attributes { mode, uid, gid, modified } = attributes;
        group.files.push(FileRecord {
            path: path.to_owned(),
            kind: FileKind::Regular,
            mode,
            uid,
            gid,
            modified,
            bytes,
            crc32c,
            first_block: BlockNumber(0),
        });
        // A path that the plan has no place for would be a bug of ours; behind all others it is at least in order.
        let place = LATE.iter().position(|late| *late == path);
        let position = place.map_or(u64::MAX, |place| self.plan.late[place]);
        group.commit(position, self.writer)?;
        Ok(Read { bytes, crc32c, modified })
    }

    /// Makes what was written durable.
    pub(super) fn finish(self) -> Result<()> {
        self.pack.finish()
    }
}

/// A file that arrives in pieces and is put in blocks.
struct Blockwise<'a, 'b> {
    late: &'a mut LateFiles<'b>,
    parent: Option<ParentFile>,
    group: GroupInProgress,
    /// Less than a block.
    held: Vec<u8>,
    bytes: u64,
    crc32c: u32,
}

impl Blockwise<'_, '_> {
    fn push(&mut self, mut piece: &[u8]) -> Result<()> {
        while !piece.is_empty() {
            let room = self.late.block.bytes() - self.held.len();
            let (now, later) = piece.split_at(room.min(piece.len()));
            self.held.extend_from_slice(now);
            piece = later;
            if self.held.len() == self.late.block.bytes() {
                self.put_held()?;
            }
        }
        Ok(())
    }

    fn put_held(&mut self) -> Result<()> {
        if self.held.is_empty() {
            return Ok(());
        }
        let index = self.bytes / self.late.block.bytes() as u64;
        let parent = match &mut self.parent {
            Some(parent) => parent.record(index, self.held.len())?,
            None => None,
        };
        let (record, _) = self.late.pack.put(&self.held, None, parent.as_ref())?;
        self.group.push_block(record, self.late.writer)?;
        self.bytes += self.held.len() as u64;
        self.crc32c = crc32c::crc32c_append(self.crc32c, &self.held);
        self.held.clear();
        Ok(())
    }
}
