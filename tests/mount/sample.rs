//! A backup of a small tree that has everything a data directory can have, and the tree itself beside it.
//!
//! It is written through the engine, without a server: the mount does not care where a backup comes from.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use engine::codec::Compression;
use engine::format::backup::{BackupInfo, ServerInfo, Snapshot, Tablespace, WalRange};
use engine::format::block::BlockRecord;
use engine::format::file::{FileKind, FileRecord};
use engine::format::manifest::{LEAF_RECORDS, cut::cut_groups, path};
use engine::repository::{self, ClusterInfo, Description, Parent};
use engine::units::{BlockNumber, BlockSize, Lsn, SystemIdentifier, Timeline};

use super::guard::Mounted;
use crate::support::compare::Entry;
use crate::support::*;

pub const SEGMENT_BYTES: u32 = 1 << 20;
pub const BLOCK_BYTES: u64 = 128 << 10;
const SYSTEM: u64 = 7_412_345_678_901_234_567;
/// The tablespace outside of the data directory.
pub const SPACE: u32 = 16400;
/// A relation of many blocks: 12 MiB and a part of a page.
pub const LARGE: &str = "base/5/16384";
pub const LARGE_BYTES: usize = (12 << 20) + 777;
/// How many files the largest directory has.
pub const MANY: usize = 3000;

/// The repository, and the tree that the backup in it is of.
pub struct Sample {
    pub scratch: Scratch,
    /// The data directory.
    pub original: PathBuf,
    pub repository: PathBuf,
    pub info: BackupInfo,
    pghydrant: Pghydrant,
}

impl Sample {
    pub fn new() -> Result<Self> {
        Self::compressed(Compression::Lz4)
    }

    pub fn compressed(compression: Compression) -> Result<Self> {
        let scratch = Scratch::new()?;
        let pghydrant = Pghydrant::new(&scratch)?;
        let (original, space) = (scratch.directory("original")?, scratch.directory("space")?);
        plant(&original, &space)?;
        let root = scratch.join("repo");
        let info = back_up(&new_cluster(&root, compression)?, &original, &space)?;
        let sample = Self { scratch, original, repository: root, info, pghydrant };
        for number in 0..6 {
            sample.archive(1, number)?;
        }
        sample.give_to_server_user()?;
        Ok(sample)
    }

    /// A backup of `files` in place of the small tree; there is no original beside it, and no archive.
    pub fn of_files(files: Vec<FileRecord>, content: impl FnMut(&FileRecord) -> Result<Vec<u8>>) -> Result<Self> {
        let scratch = Scratch::new()?;
        let pghydrant = Pghydrant::new(&scratch)?;
        let root = scratch.join("repo");
        let info = write_backup(&new_cluster(&root, Compression::Lz4)?, files, content, Vec::new())?;
        let sample = Self { original: scratch.join("original"), scratch, repository: root, info, pghydrant };
        sample.give_to_server_user()?;
        Ok(sample)
    }

    /// As the server's user or as the tests' own; each has a state of its own.
    pub fn pghydrant(&self, user: &OsUser) -> Pghydrant {
        self.pghydrant.as_user(user)
    }

    /// Mounts the backup at `mnt`, as `user`, and watches over it.
    pub fn mount(&self, user: &OsUser, options: &[&str]) -> Result<Mounted> {
        let mountpoint = self.mountpoint(user)?;
        self.pghydrant(user).succeed(self.mount_arguments(&mountpoint, options))?;
        self.watch(user, &mountpoint)
    }

    pub fn watch(&self, user: &OsUser, mountpoint: &Path) -> Result<Mounted> {
        let name: String = mountpoint.to_string_lossy().trim_matches('/').replace('/', "-");
        let log = self.pghydrant(user).state.join("mounts").join(format!("{name}.log"));
        Mounted::watch(mountpoint, log, &self.pghydrant(user))
    }

    /// An empty directory of `user`.
    pub fn mountpoint(&self, user: &OsUser) -> Result<PathBuf> {
        let mountpoint = self.scratch.join("mnt");
        if !mountpoint.exists() {
            fs::create_dir(&mountpoint)?;
        }
        // The helper mounts only where its user can write.
        std::os::unix::fs::chown(&mountpoint, Some(user.uid), Some(user.gid))?;
        Ok(mountpoint)
    }

    pub fn mount_arguments(&self, mountpoint: &Path, options: &[&str]) -> Vec<String> {
        let shown = |path: &Path| path.display().to_string();
        let own = ["mount", "--repo", &shown(&self.repository), "--cluster", "main", &shown(mountpoint)];
        own.iter().chain(options).map(|&word| word.to_owned()).collect()
    }

    /// A segment of timeline `timeline` arrives in the archive.
    pub fn archive(&self, timeline: u32, number: u64) -> Result<Vec<u8>> {
        let name = format!("{timeline:08X}{:08X}{:08X}", number >> 12, number & 0xFFF);
        self.archive_file(&name, &segment(timeline, number))
    }

    /// A file of the archive arrives.
    pub fn archive_file(&self, name: &str, content: &[u8]) -> Result<Vec<u8>> {
        let file = self.scratch.join(name);
        fs::write(&file, content)?;
        let repository = repository::Repository::open(&self.repository)?;
        let cluster = repository.cluster(&"main".parse().map_err(anyhow::Error::msg)?)?;
        cluster.wal().push(&file)?;
        fs::remove_file(&file)?;
        Ok(content.to_vec())
    }

    /// The backup's pack: with lz4 or without, there is one.
    pub fn pack(&self) -> Result<PathBuf> {
        let packs = fs::read_dir(self.repository.join("clusters/main/packs"))?;
        let packs: Vec<_> = packs.collect::<std::io::Result<_>>()?;
        ensure!(packs.len() == 1, "{packs:?}");
        Ok(packs[0].path())
    }

    /// All of the repository to the server's user.
    pub fn give_to_server_user(&self) -> Result<()> {
        let user = OsUser::server();
        Run::new("chown").arg("-R").arg(format!("{}:{}", user.uid, user.gid)).arg(&self.repository).succeed()?;
        Ok(())
    }

    /// The tree as the mount should show it: `data` and `tablespaces`.
    pub fn expected(&self) -> Result<BTreeMap<PathBuf, Entry>> {
        let mut expected = BTreeMap::new();
        for (path, entry) in compare::tree(&self.original)? {
            let is_space = path == Path::new("pg_tblspc").join(SPACE.to_string());
            let link = || Entry::Link { target: format!("../../tablespaces/{SPACE}").into() };
            expected.insert(Path::new("data").join(path), if is_space { link() } else { entry });
        }
        let space = Path::new("tablespaces").join(SPACE.to_string());
        for (path, entry) in compare::tree(&self.scratch.join("space"))? {
            expected.insert(space.join(path), entry);
        }
        Ok(expected)
    }
}

/// A repository, with a cluster that has no backup yet.
fn new_cluster(root: &Path, compression: Compression) -> Result<repository::Cluster> {
    let repository = repository::Repository::init(root, compression, BlockSize::DEFAULT)?;
    let name = "main".parse().map_err(anyhow::Error::msg)?;
    let created = "2026-11-22T08:00:00Z".to_owned();
    Ok(repository.create_cluster(ClusterInfo::new(name, SystemIdentifier(SYSTEM), SEGMENT_BYTES.into(), created))?)
}

/// Bytes that compress as relations do: pages that are half free, each with its own content.
pub fn relation(bytes: usize, seed: usize) -> Vec<u8> {
    let byte = |at: usize| {
        let (page, within) = (at / 8192, at % 8192);
        let used = within < 4096 && page % 11 != 5;
        if used { ((within * 31) ^ (page * 17) ^ seed ^ (within >> 5)).to_le_bytes()[0] } else { 0 }
    };
    (0..bytes).map(byte).collect()
}

fn plant(data: &Path, space: &Path) -> Result<()> {
    for directory in ["base", "base/1", "base/5", "base/5/many", "global", "pg_tblspc", "pg_wal", "with space"] {
        fs::create_dir(data.join(directory))?;
        fs::set_permissions(data.join(directory), fs::Permissions::from_mode(0o700))?;
    }
    let file = |root: &Path, path: &str, mode: u32, content: &[u8]| -> Result<()> {
        fs::write(root.join(path), content)?;
        fs::set_permissions(root.join(path), fs::Permissions::from_mode(mode))?;
        let modified = 1_700_000_000 + path.len() as i64;
        let times = rustix::fs::Timestamps {
            last_access: rustix::fs::Timespec { tv_sec: modified, tv_nsec: 0 },
            last_modification: rustix::fs::Timespec { tv_sec: modified, tv_nsec: 0 },
        };
        Ok(rustix::fs::utimensat(rustix::fs::CWD, root.join(path), &times, rustix::fs::AtFlags::empty())?)
    };
    file(data, "PG_VERSION", 0o600, b"15\n")?;
    file(data, "postgresql.conf", 0o644, b"port = 5432\n")?;
    file(data, "read only", 0o400, b"nobody writes this")?;
    file(data, "global/pg_control", 0o600, &relation(8192, 3))?;
    file(data, LARGE, 0o600, &relation(LARGE_BYTES, 1))?;
    file(data, "base/5/16384.1", 0o600, &relation(3 << 20, 2))?;
    file(data, "base/5/zeros", 0o600, &vec![0; 5 << 20])?;
    file(data, "base/5/empty", 0o600, b"")?;
    file(data, "base/5/one block", 0o600, &relation(128 << 10, 4))?;
    file(data, "with space/\u{fc}ml\u{e4}ut", 0o640, b"text")?;
    for number in 0..MANY {
        file(data, &format!("base/5/many/{number}"), 0o600, number.to_string().as_bytes())?;
    }
    symlink("../PG_VERSION", data.join("base/link"))?;
    symlink("/nonexistent/place", data.join("dangling"))?;
    symlink(space, data.join(format!("pg_tblspc/{SPACE}")))?;
    fs::create_dir(space.join("PG_15_202209061"))?;
    fs::create_dir(space.join("PG_15_202209061/5"))?;
    file(space, "PG_15_202209061/5/16401", 0o600, &relation(300_000, 5))?;
    let user = OsUser::server();
    for root in [data, space] {
        Run::new("chown").args(["-hR", &format!("{}:{}", user.uid, user.gid)]).arg(root).succeed()?;
    }
    // One that is somebody else's.
    std::os::unix::fs::chown(data.join("postgresql.conf"), Some(0), Some(0))?;
    Ok(())
}

/// Every file below `directory` as a record whose path begins with `prefix`, with where its content is.
fn walk(directory: &Path, prefix: &str, found: &mut Vec<(FileRecord, PathBuf)>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = String::from_utf8(entry.file_name().as_bytes().to_vec())?;
        let (path, place, metadata) = (format!("{prefix}{name}"), entry.path(), entry.metadata()?);
        let is_space = metadata.is_symlink() && prefix == "pg_tblspc/";
        let kind = match metadata {
            _ if is_space => FileKind::Tablespace { location: fs::read_link(&place)?.display().to_string() },
            _ if metadata.is_dir() => FileKind::Directory,
            _ if metadata.is_symlink() => FileKind::Symlink { target: fs::read_link(&place)?.display().to_string() },
            _ => FileKind::Regular,
        };
        let below = metadata.is_dir() || is_space;
        let shown = if is_space { fs::metadata(&place)? } else { metadata };
        let record = FileRecord {
            path: path.clone(),
            mode: shown.mode() & 0o7777,
            uid: shown.uid(),
            gid: shown.gid(),
            modified: shown.mtime(),
            bytes: if kind == FileKind::Regular { shown.len() } else { 0 },
            crc32c: if kind == FileKind::Regular { crc32c::crc32c(&fs::read(&place)?) } else { 0 },
            first_block: BlockNumber(0),
            kind,
        };
        found.push((record, place.clone()));
        if below {
            walk(&place, &format!("{path}/"), found)?;
        }
    }
    Ok(())
}

fn back_up(cluster: &repository::Cluster, data: &Path, space: &Path) -> Result<BackupInfo> {
    let mut files = Vec::new();
    walk(data, "", &mut files)?;
    let places: BTreeMap<String, PathBuf> =
        files.iter().map(|(record, place)| (record.path.clone(), place.clone())).collect();
    let tablespaces = vec![Tablespace {
        oid: SPACE,
        name: "space".to_owned(),
        location: space.display().to_string(),
        bytes: 300_000,
    }];
    let files = files.into_iter().map(|(record, _)| record).collect();
    write_backup(cluster, files, |file| Ok(fs::read(&places[&file.path])?), tablespaces)
}

/// Writes a backup of `files`, in any order, through the engine.
pub fn write_backup(
    cluster: &repository::Cluster,
    mut files: Vec<FileRecord>,
    mut content: impl FnMut(&FileRecord) -> Result<Vec<u8>>,
    tablespaces: Vec<Tablespace>,
) -> Result<BackupInfo> {
    files.sort_by(|one, other| path::order(&one.path, &other.path));
    let writer = cluster.begin_backup(Parent::Full)?;
    let mut worker = writer.worker()?;
    let sizes = files.iter().map(|file| (file.path.as_str(), BlockSize::DEFAULT.blocks_of(file.bytes)));
    for (position, range) in cut_groups(sizes).enumerate() {
        let mut blocks: Vec<BlockRecord> = Vec::new();
        let members = &files[range];
        for file in members.iter().filter(|file| file.kind == FileKind::Regular) {
            for block in content(file)?.chunks(BlockSize::DEFAULT.bytes()) {
                blocks.push(worker.put(block, None, None)?.0);
            }
        }
        let leaves = blocks.chunks(usize::try_from(LEAF_RECORDS)?).map(|leaf| writer.commit_leaf(leaf));
        let leaves = leaves.collect::<engine::Result<Vec<_>>>()?;
        writer.commit_group(position as u64, members, leaves)?;
    }
    worker.finish()?;
    let description = Description {
        stopped_at: "2026-11-22T08:15:00Z".to_owned(),
        stopped_unix: 1_795_335_300,
        server: ServerInfo {
            system_identifier: SystemIdentifier(SYSTEM),
            version_num: 150_018,
            data_checksums: true,
            wal_segment_bytes: SEGMENT_BYTES.into(),
            data_directory: "/var/lib/postgresql/15/main".to_owned(),
            outside_files: Vec::new(),
            owner: "postgres".to_owned(),
            settings: BTreeMap::new(),
            environment: None,
        },
        wal: WalRange { timeline: Timeline(1), start: Lsn(0x20_0028), stop: Lsn(0x20_0100) },
        snapshot: Snapshot::default(),
        tablespaces,
        bad_pages: Vec::new(),
    };
    Ok(writer.finish(description)?)
}

/// A segment with the header that PostgreSQL gives it, and something behind.
pub fn segment(timeline: u32, number: u64) -> Vec<u8> {
    /// `XLOG_PAGE_MAGIC` of version 15, and `XLP_LONG_HEADER`.
    const MAGIC: u16 = 0xD110;
    const LONG_HEADER: u16 = 2;
    let mut bytes = relation(1 << 20, usize::try_from(number).unwrap_or_default());
    let mut header = Vec::new();
    header.extend(MAGIC.to_le_bytes());
    header.extend(LONG_HEADER.to_le_bytes());
    header.extend(timeline.to_le_bytes());
    header.extend((number * u64::from(SEGMENT_BYTES)).to_le_bytes());
    header.extend([0; 8]);
    header.extend(SYSTEM.to_le_bytes());
    header.extend(SEGMENT_BYTES.to_le_bytes());
    header.extend(8192_u32.to_le_bytes());
    bytes[..header.len()].copy_from_slice(&header);
    bytes
}
