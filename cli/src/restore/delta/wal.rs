//! WAL that was never archived: the only copy of the last transactions, and a delta empties `pg_wal`.
//!
//! A file counts if it is what its name says: the first page of a segment must have the cluster's identifier and the
//! name's position, which a segment that was recycled for later has not. What waits for the archiver of a server whose
//! `archive_command` names this repository goes into the archive, as that command would have sent it, and by the
//! instance's user, to whom the archive belongs. The last segment, which is not complete, and whatever the archive does
//! not take, is kept in the data directory; so is all WAL of a server that did not archive, a clone with a timeline of its
//! own, say, which the next restore of the original would follow. A segment with nothing but the checkpoint of a clean
//! shutdown holds no transaction, and goes.

use std::fs::File;
use std::io::{ErrorKind, Read as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use engine::Error;
use engine::io::durable;
use engine::units::SystemIdentifier;
use engine::wal::name::{SegmentName, WalFile};
use engine::wal::{SegmentHeader, WalArchive};
use serde::{Deserialize, Serialize};

use super::super::plan::Plan;
use super::super::{conf, files, marker, staging};
use crate::postgres::control::{ControlFile, State};
use crate::postgres::owner::Owner;

/// Bytes of the long header of a segment's first page: what a checkpoint that opens a segment lies behind.
const FIRST_PAGE_HEADER_BYTES: usize = 40;

/// A WAL file of the directory that holds what its name says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LocalFile {
    pub(crate) name: String,
    path: PathBuf,
    /// The server has ended it, and told its archiver.
    pub(crate) for_the_archive: bool,
}

/// What became of WAL that was never archived.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedWal {
    /// Files that are in the archive now.
    pub(crate) pushed: Vec<String>,
    /// Files that are kept in `directory`.
    pub(crate) kept: Vec<String>,
    pub(crate) directory: PathBuf,
    /// Why the archive did not take a file that was meant for it.
    pub(crate) refusal: Option<String>,
}

impl SavedWal {
    /// `3 WAL files archived; 1 kept in DIR`.
    pub(crate) fn text(&self) -> String {
        let mut parts = Vec::new();
        if !self.pushed.is_empty() {
            parts.push(format!("{} archived", crate::human::count(self.pushed.len() as u64, "WAL file")));
        }
        if !self.kept.is_empty() {
            let kept = self.kept.len() as u64;
            parts.push(format!("{} kept in {}", crate::human::count(kept, "WAL file"), self.directory.display()));
        }
        if parts.is_empty() { "all of it is archived".to_owned() } else { parts.join("; ") }
    }
}

/// The WAL files of `directory` that can hold transactions, in order of their names.
pub(crate) fn local(
    directory: &Path,
    identifier: SystemIdentifier,
    segment_bytes: u64,
    control: Option<&ControlFile>,
) -> anyhow::Result<Vec<LocalFile>> {
    let entries = match std::fs::read_dir(directory) {
        Err(cause) if cause.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(|cause| Error::io("list", directory, cause))?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|cause| Error::io("list", directory, cause))?;
        let (name, path) = (entry.file_name().to_string_lossy().into_owned(), entry.path());
        let Some(file) = WalFile::parse(&name, segment_bytes) else { continue };
        let metadata = path.symlink_metadata().map_err(|cause| Error::io("examine", &path, cause))?;
        if !metadata.is_file() {
            continue;
        }
        match file {
            WalFile::Segment(segment) | WalFile::Partial(segment) => {
                if !is_what_it_says(&path, segment, identifier, segment_bytes)? || holds_nothing(segment, control) {
                    continue;
                }
            }
            // A few lines, of use with the segments only.
            WalFile::BackupLabel(..) => continue,
            WalFile::History(_) => {}
        }
        // One that is told of as done and is not in our archive went to another.
        let waits = directory.join("archive_status").join(format!("{name}.ready")).exists();
        let whole = !matches!(file, WalFile::Segment(_)) || metadata.len() == segment_bytes;
        let for_the_archive = whole && waits;
        files.push(LocalFile { name, path, for_the_archive });
    }
    files.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(files)
}

fn is_what_it_says(
    path: &Path,
    segment: SegmentName,
    identifier: SystemIdentifier,
    segment_bytes: u64,
) -> anyhow::Result<bool> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|cause| Error::io("open", path, cause))?;
    file.take(FIRST_PAGE_HEADER_BYTES as u64)
        .read_to_end(&mut bytes)
        .map_err(|cause| Error::io("read", path, cause))?;
    let header = SegmentHeader::parse(&bytes);
    Ok(header.is_ok_and(|header| {
        header.system_identifier == identifier
            && header.segment_bytes == segment_bytes
            && header.agrees_with(segment).is_ok()
    }))
}

/// A clean shutdown of a server that archives ends a segment; the next has its checkpoint alone.
fn holds_nothing(segment: SegmentName, control: Option<&ControlFile>) -> bool {
    control.is_some_and(|control| {
        let first = segment.start(u64::from(control.wal_segment_bytes)).0 + FIRST_PAGE_HEADER_BYTES as u64;
        control.state == State::ShutDown && control.timeline == segment.timeline && control.checkpoint.0 == first
    })
}

/// Those that the archive has not, by their names; their contents are compared once they are saved.
pub(crate) fn not_archived(files: Vec<LocalFile>, archive: &WalArchive) -> anyhow::Result<Vec<LocalFile>> {
    let mut missing = Vec::new();
    for file in files {
        if !archive.contains(&file.name)? {
            missing.push(file);
        }
    }
    Ok(missing)
}

/// Archives what is meant for the archive, and keeps the rest in `directory`, durably. Can be done again: what was kept
/// before and is in `pg_wal` no more stays, unless the server has made another segment of it since.
pub(super) fn save(
    plan: &Plan,
    files: Vec<LocalFile>,
    archive: &WalArchive,
    directory: PathBuf,
) -> anyhow::Result<SavedWal> {
    if let Some(kept) = Kept::open(&directory)? {
        kept.drop_recycled(archive)?;
    }
    let mut keeps_all = does_not_archive_here(plan)?;
    let mut saved = SavedWal { directory, ..SavedWal::default() };
    for file in files {
        if archive.has_same(&file.path)? {
            continue;
        }
        if keeps_all.is_none() && file.for_the_archive && archive.contains(&file.name)? {
            // What comes behind it would not follow what is there.
            keeps_all = Some(format!("the archive has another {}", file.name));
        }
        let pushed = match (file.for_the_archive, &keeps_all) {
            (false, _) => Err(None),
            (true, Some(reason)) => Err(Some(reason.clone())),
            // Whatever failed may be mended, and the cluster is as it was.
            (true, None) => push(plan, archive, &file.path).map(Ok)?,
        };
        match pushed {
            Ok(()) => saved.pushed.push(file.name),
            Err(refusal) => {
                saved.refusal = saved.refusal.or(refusal);
                files::make_directory(&saved.directory, &plan.owner)?;
                let kept = Kept::open(&saved.directory)?.context("the directory for it is gone")?;
                keep(plan, &file.path, &kept.path(&file.name)).with_context(|| format!("cannot keep {}", file.name))?;
            }
        }
    }
    if let Some(kept) = Kept::open(&saved.directory)? {
        saved.kept = kept.names()?;
        durable::sync_directory(&kept.path(""))?;
        durable::sync_directory(plan.data())?;
    }
    Ok(saved)
}

/// Why nothing of this server goes into the archive: it is a copy, or archived to another place, or nobody can tell.
fn does_not_archive_here(plan: &Plan) -> anyhow::Result<Option<String>> {
    if plan.data().join(marker::PATH).symlink_metadata().is_ok() {
        return Ok(Some("the directory is an isolated copy, which does not archive".to_owned()));
    }
    let mut command = String::new();
    for name in ["postgresql.conf", "postgresql.auto.conf"] {
        let text = files::read(&plan.data().join(name))?.unwrap_or_default();
        command = conf::value_of(&text, "archive_command").unwrap_or(command);
    }
    let here = plan.repository.to_str().is_some_and(|repository| command.contains(repository));
    if here && command.contains("wal push") {
        return Ok(None);
    }
    let cure = "`pghydrant wal push` brings it into the archive";
    Ok(Some(format!("archive_command in the directory does not name {}; {cure}", plan.repository.display())))
}

/// The directory of what is kept, held open: it lies in a directory of the server's user, who may put a link to any other
/// in its place, and we may be root.
struct Kept(File);

impl Kept {
    /// Nothing, if there is no such directory.
    fn open(directory: &Path) -> anyhow::Result<Option<Self>> {
        match directory.symlink_metadata() {
            Err(cause) if cause.kind() == ErrorKind::NotFound => Ok(None),
            _ => Ok(Some(Self(staging::hold(directory)?))),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        Path::new("/proc/self/fd").join(self.0.as_raw_fd().to_string()).join(name)
    }

    /// Sorted.
    fn names(&self) -> anyhow::Result<Vec<String>> {
        let directory = self.path("");
        let entries = std::fs::read_dir(&directory).map_err(|cause| Error::io("list", &directory, cause))?;
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|cause| Error::io("list", &directory, cause))?;
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }

    /// A kept file is a second name of the one in `pg_wal`: a server that was started since may have written into it.
    fn drop_recycled(&self, archive: &WalArchive) -> anyhow::Result<()> {
        let (identifier, segment_bytes) = (archive.cluster().info().system_identifier, archive.segment_bytes());
        for name in self.names()? {
            let path = self.path(&name);
            let stays = match WalFile::parse(&name, segment_bytes) {
                Some(WalFile::Segment(segment) | WalFile::Partial(segment)) => {
                    is_what_it_says(&path, segment, identifier, segment_bytes)?
                }
                Some(WalFile::History(_)) => true,
                Some(WalFile::BackupLabel(..)) | None => false,
            };
            if !stays {
                files::remove(&path)?;
            }
        }
        Ok(())
    }
}

/// Gives up what was kept of a cluster that is as it was: only what its `pg_wal` still has.
pub(super) fn forget_kept(directory: &Path, wal: &Path) -> anyhow::Result<()> {
    let Some(kept) = Kept::open(directory)? else { return Ok(()) };
    for name in kept.names()?.iter().filter(|name| wal.join(name).exists()) {
        files::remove(&kept.path(name))?;
    }
    match std::fs::remove_dir(directory) {
        Err(cause) if !matches!(cause.kind(), ErrorKind::NotFound | ErrorKind::DirectoryNotEmpty) => {
            Err(Error::io("remove", directory, cause).into())
        }
        _ => Ok(()),
    }
}

/// As `archive_command` does: what root would make in the archive the server could not read.
fn push(plan: &Plan, archive: &WalArchive, path: &Path) -> anyhow::Result<()> {
    let owner = Owner::named(&plan.owner.name).or_else(|_| Owner::numbered(plan.owner.uid, plan.owner.gid))?;
    if owner.is_current() {
        archive.push(path)?;
        return Ok(());
    }
    let program = if plan.program.is_file() { plan.program.clone() } else { std::env::current_exe()? };
    let mut command = owner.command(&program)?;
    command.args(["wal", "push", "--repo"]).arg(&plan.repository).arg("--cluster").arg(plan.cluster.as_str());
    let output = command.arg(path).output().with_context(|| format!("cannot run {}", program.display()))?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    let line = words.lines().find_map(|line| line.strip_prefix("error: ")).unwrap_or("`pghydrant wal push` failed");
    anyhow::bail!("{line}")
}

/// A second name costs no room; on another file system it is a copy.
fn keep(plan: &Plan, from: &Path, to: &Path) -> anyhow::Result<()> {
    files::remove(to)?;
    if std::fs::hard_link(from, to).is_err() {
        // Not through a link that was put there since: whatever it led to would be given away.
        let opened = File::options().read(true).custom_flags(libc::O_NOFOLLOW).open(from);
        let mut source = opened.map_err(|cause| Error::io("open", from, cause))?;
        let made = File::options().write(true).create_new(true).mode(0o600).open(to);
        let mut copy = made.map_err(|cause| Error::io("create", to, cause))?;
        std::io::copy(&mut source, &mut copy).map_err(|cause| Error::io("write", to, cause))?;
        files::give(to, &plan.owner)?;
    }
    let file = File::open(to).map_err(|cause| Error::io("open", to, cause))?;
    Ok(durable::sync_file(&file, to)?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use engine::units::Timeline;

    use super::*;

    const MIB: u64 = 1 << 20;
    const IDENTIFIER: SystemIdentifier = SystemIdentifier(77);

    fn name(number: u64) -> String {
        SegmentName { timeline: Timeline(1), number }.file_name(MIB)
    }

    /// A segment whose first page says that it is number `says`.
    fn write(directory: &Path, file: &str, says: u64, identifier: u64) {
        let mut bytes = vec![0; 1 << 20];
        bytes[0..2].copy_from_slice(&0xD110_u16.to_le_bytes());
        bytes[2..4].copy_from_slice(&2_u16.to_le_bytes());
        bytes[4..8].copy_from_slice(&1_u32.to_le_bytes());
        bytes[8..16].copy_from_slice(&(says * MIB).to_le_bytes());
        bytes[24..32].copy_from_slice(&identifier.to_le_bytes());
        bytes[32..36].copy_from_slice(&(1_u32 << 20).to_le_bytes());
        std::fs::write(directory.join(file), bytes).unwrap();
    }

    fn found(directory: &Path) -> Vec<(String, bool)> {
        let files = local(directory, IDENTIFIER, MIB, None).unwrap();
        files.into_iter().map(|file| (file.name, file.for_the_archive)).collect()
    }

    #[test]
    fn segments_that_were_recycled_or_are_another_clusters_hold_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let wal = directory.path();
        assert_eq!(found(&wal.join("none")), []);
        write(wal, &name(5), 5, 77);
        write(wal, &name(6), 6, 77);
        write(wal, &name(7), 3, 77);
        write(wal, &name(8), 8, 78);
        std::fs::write(wal.join(name(9)), vec![0; 1 << 20]).unwrap();
        std::os::unix::fs::symlink(wal.join(name(5)), wal.join(name(10))).unwrap();
        std::fs::write(wal.join("00000002.history"), "1\t0/500000\tx\n").unwrap();
        let history = "00000002.history".to_owned();
        assert_eq!(found(wal), [(name(5), false), (name(6), false), (history.clone(), false)]);
        // Only the server says what is for the archive, and what went to another is not for ours.
        std::fs::create_dir(wal.join("archive_status")).unwrap();
        let marked = [(name(5), "ready"), (name(6), "done"), (history.clone(), "ready"), (name(7), "ready")];
        for (name, mark) in marked {
            std::fs::write(wal.join("archive_status").join(format!("{name}.{mark}")), "").unwrap();
        }
        assert_eq!(found(wal), [(name(5), true), (name(6), false), (history, true)]);
    }

    #[test]
    fn what_was_kept_is_given_up_only_where_the_wal_still_has_it() {
        let directory = tempfile::tempdir().unwrap();
        let (kept, wal) = (directory.path().join("kept"), directory.path().join("wal"));
        for path in [&kept, &wal] {
            std::fs::create_dir(path).unwrap();
            std::fs::write(path.join(name(5)), "x").unwrap();
        }
        std::fs::write(kept.join(name(4)), "x").unwrap();
        forget_kept(&kept, &wal).unwrap();
        assert_eq!(Kept::open(&kept).unwrap().unwrap().names().unwrap(), [name(4)]);
        std::fs::write(wal.join(name(4)), "x").unwrap();
        forget_kept(&kept, &wal).unwrap();
        assert!(!kept.exists());
        forget_kept(&kept, &wal).unwrap();
        // A link in its place leads nowhere.
        let others = directory.path().join("others");
        std::fs::create_dir(&others).unwrap();
        std::fs::write(others.join(name(5)), "precious").unwrap();
        std::os::unix::fs::symlink(&others, &kept).unwrap();
        assert!(forget_kept(&kept, &wal).is_err());
        assert!(others.join(name(5)).exists());
    }
}
