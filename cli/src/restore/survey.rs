//! Looking at everything that a restore depends on, touching nothing.
//!
//! What is found becomes [`Facts`]; [`super::preflight`] judges them. Whatever cannot be looked at is a fact too.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::TcpListener;
use std::ops::ControlFlow;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use engine::blocks::Scratch;
use engine::format::backup::BackupInfo;
use engine::format::file::FileKind;
use engine::hydration;
use engine::io::LocalDisk;
use engine::repository::{Backup, Cluster};
use engine::units::{BackupLabel, Lsn, SessionId, Timeline};
use engine::wal::history::History;
use engine::wal::name::SegmentName;
use engine::wal::{Fetched, WalArchive};
use jiff::Timestamp;
use rustix::fs::Access;

use super::choose::{self, Choice, Histories};
use super::conf;
use super::preflight::{Problem, Request};
use super::target::Goal;
use crate::exit::{Exit, Failure};
use crate::postgres::binaries::Binaries;
use crate::postgres::owner::Owner;
use crate::postgres::postmaster;
use crate::postgres::waldump::{self, Event, Kind};

/// Everything that was seen.
#[derive(Debug)]
pub(crate) struct Facts {
    pub(crate) now: Timestamp,
    pub(crate) we_are_root: bool,
    pub(crate) our_name: String,
    pub(crate) owner: Result<Owner, String>,
    pub(crate) binaries: Result<Binaries, String>,
    pub(crate) choice: Result<(BackupInfo, History), Problem>,
    pub(crate) contents: Contents,
    pub(crate) wal: Result<WalFacts, String>,
    /// By the directory as it was asked for: the data directory, then each tablespace that is known.
    pub(crate) places: Vec<(PathBuf, Found)>,
    pub(crate) port: PortFacts,
    pub(crate) fuse: Result<(), crate::mount::Reason>,
    /// Whether the owner, who runs `wal fetch`, can use our program and read the repository.
    pub(crate) owner_reads: Result<(), String>,
}

/// What is at a directory's place.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    /// Absolute; links in what exists of it are followed.
    pub(crate) path: PathBuf,
    pub(crate) what: What,
    /// Above it, missing, the outermost first.
    pub(crate) missing_parents: Vec<PathBuf>,
    /// The nearest directory that exists: the place itself, or above it.
    pub(crate) nearest: PathBuf,
    /// Whether we may write in `nearest`.
    pub(crate) writable: Result<(), String>,
    /// Whether the owner can get there.
    pub(crate) reachable: bool,
    /// Who owns `nearest`.
    pub(crate) owner_uid: u32,
    pub(crate) file_system: Result<FileSystem, String>,
}

/// See [`Found::what`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum What {
    Absent,
    Empty,
    /// A session's directory.
    Ours(SessionId),
    /// A data directory; with the process that runs in it.
    Cluster(Option<u32>),
    /// Something else, for example this.
    Occupied(String),
    NoDirectory,
    Unknown(String),
}

/// A file system's room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileSystem {
    pub(crate) device: u64,
    pub(crate) free_bytes: u64,
    pub(crate) free_inodes: u64,
    /// Some file systems make inodes as they need them and count none.
    pub(crate) counts_inodes: bool,
}

/// What the chosen backup holds.
#[derive(Clone, Debug, Default)]
pub(crate) struct Contents {
    /// Bytes on disk and files of the data directory (`None`) and of each tablespace, by OID.
    pub(crate) sizes: BTreeMap<Option<u32>, Size>,
    /// `postgresql.conf` and `postgresql.auto.conf`, where the backup has them.
    pub(crate) conf: Option<Vec<u8>>,
    pub(crate) auto: Option<Vec<u8>>,
}

/// Room that files need.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) bytes: u64,
    pub(crate) inodes: u64,
}

/// What the archive has for the chosen path.
#[derive(Clone, Debug, Default)]
pub(crate) struct WalFacts {
    /// Segments that are missing up to where recovery must come at least.
    pub(crate) missing: Vec<SegmentName>,
    /// Segments that are missing between there and the end of the archive.
    pub(crate) gaps: Vec<SegmentName>,
    /// The end of the archive on the path.
    pub(crate) end: Option<Lsn>,
    /// The last transaction before the first gap, or before the end.
    pub(crate) last_transaction: Option<Timestamp>,
    /// Where the goal is, for a transaction or a restore point.
    pub(crate) place: Option<Lsn>,
    /// The WAL was searched for the goal.
    pub(crate) searched: bool,
}

/// The port, and who uses it.
#[derive(Clone, Debug, Default)]
pub(crate) struct PortFacts {
    pub(crate) number: u16,
    /// What says so: `127.0.0.1:5432`, or a socket's path.
    pub(crate) in_use: Option<String>,
    /// One that is free.
    pub(crate) suggestion: Option<u16>,
}

/// Looks at everything.
pub(crate) fn look(request: &Request, cluster: &Cluster) -> anyhow::Result<Facts> {
    let backups = descriptions(cluster, request.backup.as_ref())?;
    let archive = cluster.wal();
    let histories = histories(&archive)?;
    let binaries = find_binaries(request.programs.as_deref(), request, &backups);
    // For a look into the WAL other programs of the version will do as well.
    let searcher = binaries.clone().or_else(|_| find_binaries(None, request, &backups)).ok();
    let place = locate(request, &backups, &histories, &archive, searcher.as_ref());
    let found_place = place.as_ref().ok().copied().flatten();
    let choice =
        choose::choose(&backups, request.backup.as_ref(), request.timeline, &request.goal, found_place, &histories)
            .map(|Choice { backup, path }| (backup.clone(), path));
    let backup = choice.as_ref().ok().map(|(info, _)| cluster.backup(&info.label)).transpose()?;
    let contents = backup.as_ref().map(contents).transpose()?.unwrap_or_default();
    let wal = match (&choice, place) {
        (Ok((info, path)), Ok(place)) => {
            wal_facts(request, info, path, place, &archive, searcher.as_ref()).map_err(|error| format!("{error:#}"))
        }
        (_, Err(error)) => Err(format!("{error:#}")),
        (Err(_), Ok(_)) => Ok(WalFacts::default()),
    };
    let owner = owner(request, choice.as_ref().ok().map(|(info, _)| info));
    let tablespaces = choice.as_ref().ok().map(|(info, _)| request.tablespace_directories(info)).unwrap_or_default();
    let directories =
        std::iter::once(request.data.clone()).chain(tablespaces.into_iter().map(|(_, directory)| directory));
    let places = directories.map(|path| (path.clone(), look_at_place(&path, owner.as_ref().ok()))).collect();
    let port = look_at_port(request, choice.as_ref().ok().map(|(info, _)| info), &contents);
    Ok(Facts {
        now: Timestamp::now(),
        we_are_root: rustix::process::geteuid().is_root(),
        our_name: Owner::current().map_or_else(|_| "this user".to_owned(), |owner| owner.name),
        owner_reads: owner.as_ref().map_or(Ok(()), |owner| owner_reads(owner, request)),
        owner,
        binaries,
        choice,
        contents,
        wal,
        places,
        port,
        fuse: crate::mount::fuse_usable(),
    })
}

/// The backups there are. A damaged one is a reason to refuse, but not where the user has named another.
fn descriptions(cluster: &Cluster, named: Option<&BackupLabel>) -> anyhow::Result<Vec<BackupInfo>> {
    let mut infos = Vec::new();
    for label in cluster.labels()? {
        match cluster.backup_info(&label) {
            Ok(info) => infos.push(info),
            Err(engine::Error::Corrupt { .. }) if named.is_some_and(|named| *named != label) => {}
            Err(error @ engine::Error::Corrupt { .. }) if named.is_none() => {
                let failure = Failure::new(Exit::Corrupt, error.to_string());
                return Err(failure.hint("mend the file, or name a backup with --backup: pghydrant list").into());
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(infos)
}

fn histories(archive: &WalArchive) -> anyhow::Result<Histories> {
    let mut histories = Histories::new();
    for timeline in archive.timelines()? {
        if let Some(history) = archive.history(timeline)? {
            histories.insert(timeline, history);
        }
    }
    Ok(histories)
}

fn find_binaries(chosen: Option<&Path>, request: &Request, backups: &[BackupInfo]) -> Result<Binaries, String> {
    let wanted = match &request.backup {
        Some(label) => backups.iter().find(|info| info.label == *label),
        None => backups.last(),
    };
    let major = wanted.map(|info| info.server.version_num / 10_000);
    Binaries::find(chosen, major).map_err(|error| format!("{error:#}"))
}

/// The user who will run the instance: named, ourselves, or who owns the place.
fn owner(request: &Request, info: Option<&BackupInfo>) -> Result<Owner, String> {
    let found = match &request.owner {
        Some(name) => Owner::named(name),
        None if !rustix::process::geteuid().is_root() => Owner::current(),
        None => owner_by_place(request, info),
    };
    found.map_err(|error| format!("{error:#}"))
}

fn owner_by_place(request: &Request, info: Option<&BackupInfo>) -> anyhow::Result<Owner> {
    let nearest = request.data.ancestors().find(|path| path.is_dir()).context("the path has no directory")?;
    let owner = Owner::of(nearest)?;
    if owner.uid != 0 {
        return Ok(owner);
    }
    let recorded = info.and_then(|info| Owner::named(&info.server.owner).ok()).filter(|owner| owner.uid != 0);
    recorded.map_or_else(|| Owner::named("postgres"), Ok)
}

/// Where the goal lies, if it is a restore point: the newest backup's WAL first, since the newest backup that can
/// reach the target is wanted.
fn locate(
    request: &Request,
    backups: &[BackupInfo],
    histories: &Histories,
    archive: &WalArchive,
    binaries: Option<&Binaries>,
) -> anyhow::Result<Option<Lsn>> {
    let (Goal::Name(wanted), Some(binaries)) = (&request.goal, binaries) else { return Ok(None) };
    let candidates: Vec<&BackupInfo> =
        backups.iter().filter(|info| request.backup.as_ref().is_none_or(|label| info.label == *label)).collect();
    let mut until = None;
    for info in candidates.into_iter().rev() {
        let chosen = choose::choose(std::slice::from_ref(info), None, request.timeline, &Goal::Latest, None, histories);
        let Ok(Choice { path, .. }) = chosen else { continue };
        let mut place = None;
        scan(archive, binaries, &path, info.wal.stop, until, Kind::RestorePoints, &mut |record| match record.event {
            Event::RestorePoint { name } if name == *wanted => {
                place = Some(record.lsn);
                ControlFlow::Break(())
            }
            _ => ControlFlow::Continue(()),
        })?;
        if place.is_some() {
            return Ok(place);
        }
        until = Some(info.wal.stop);
    }
    Ok(None)
}

/// Looks at the records of a path from `from` to `to` (none: the end of the archive), timeline by timeline.
fn scan(
    archive: &WalArchive,
    binaries: &Binaries,
    path: &History,
    from: Lsn,
    to: Option<Lsn>,
    kind: Kind,
    visit: &mut dyn FnMut(waldump::Record) -> ControlFlow<()>,
) -> anyhow::Result<()> {
    let program = binaries.require("pg_waldump")?;
    let directory = tempfile::tempdir().context("cannot make a temporary directory for WAL")?;
    let segment_bytes = archive.cluster().info().wal_segment_bytes;
    let mut from = from;
    for (timeline, left_at) in pieces(path) {
        let to = match (left_at, to) {
            (Some(left_at), Some(to)) => Some(left_at.min(to)),
            (left_at, to) => left_at.or(to),
        };
        if to.is_some_and(|to| to <= from) {
            continue;
        }
        let mut stopped = false;
        let range = waldump::Range { timeline, from, to, segment_bytes };
        let mut fetch = |name: &str, to: &Path| match archive.contains(name)? {
            true => Ok(matches!(archive.fetch(name, to)?, Fetched::Delivered)),
            false => Ok(false),
        };
        let mut watched = |record| {
            let flow = visit(record);
            stopped |= flow.is_break();
            flow
        };
        waldump::scan(&program, directory.path(), range, kind, &mut fetch, &mut watched)?;
        let (false, Some(left_at)) = (stopped, left_at) else { return Ok(()) };
        from = left_at;
    }
    Ok(())
}

/// The timelines of a path and where each is left.
fn pieces(path: &History) -> impl Iterator<Item = (Timeline, Option<Lsn>)> {
    let ancestors = path.ancestors.iter().map(|ancestor| (ancestor.timeline, Some(ancestor.left_at)));
    ancestors.chain(std::iter::once((path.timeline, None)))
}

fn contents(backup: &Backup) -> anyhow::Result<Contents> {
    /// What a file system allocates at least.
    const ALLOCATION_BYTES: u64 = 4096;
    let known: Vec<u32> = backup.info.tablespaces.iter().map(|tablespace| tablespace.oid).collect();
    let mut contents = Contents::default();
    for file in backup.manifest.files() {
        let file = file?;
        let oid = file.path.strip_prefix("pg_tblspc/").and_then(|rest| rest.split('/').next()?.parse().ok());
        let size = contents.sizes.entry(oid.filter(|oid| known.contains(oid))).or_default();
        size.inodes += 1;
        size.bytes += match file.kind {
            FileKind::Directory => ALLOCATION_BYTES,
            FileKind::Regular => file.bytes.next_multiple_of(ALLOCATION_BYTES),
            FileKind::Symlink { .. } | FileKind::Tablespace { .. } => 0,
        };
    }
    contents.conf = small_file(backup, "postgresql.conf")?;
    contents.auto = small_file(backup, "postgresql.auto.conf")?;
    Ok(contents)
}

/// A file of the backup, if it is there and no larger than a configuration may be.
pub(super) fn small_file(backup: &Backup, path: &str) -> anyhow::Result<Option<Vec<u8>>> {
    const BYTES_MAX: u64 = 16 << 20;
    let Some(file) =
        backup.manifest.file(path)?.filter(|file| file.kind == FileKind::Regular && file.bytes <= BYTES_MAX)
    else {
        return Ok(None);
    };
    let mut bytes = vec![0; usize::try_from(file.bytes)?];
    let read = backup.blocks().read_range(&file, 0, &mut bytes, &mut Scratch::default())?;
    bytes.truncate(read);
    Ok(Some(bytes))
}

fn wal_facts(
    request: &Request,
    info: &BackupInfo,
    path: &History,
    place: Option<Lsn>,
    archive: &WalArchive,
    binaries: Option<&Binaries>,
) -> anyhow::Result<WalFacts> {
    let segment_bytes = info.server.wal_segment_bytes;
    let mut end = None;
    for (timeline, _) in pieces(path) {
        end = archive.segments(timeline)?.last().map(|segment| segment.end(segment_bytes)).max(end);
    }
    let mut facts = WalFacts { end, place, ..WalFacts::default() };
    let needed = match &request.goal {
        Goal::Lsn(lsn) => (*lsn).max(info.wal.stop),
        Goal::Name(_) => place.unwrap_or(info.wal.stop).max(info.wal.stop),
        Goal::Latest | Goal::Time(_) | Goal::Xid(_) | Goal::Immediate => info.wal.stop,
    };
    facts.missing = archive.missing_between(info.wal.start, path, Some(needed))?;
    if let Some(end) = end.filter(|end| *end > needed) {
        let all = archive.missing_between(info.wal.start, path, Some(end))?;
        facts.gaps = all.into_iter().filter(|segment| !facts.missing.contains(segment)).collect();
    }
    let Some(binaries) = binaries.filter(|_| facts.missing.is_empty()) else { return Ok(facts) };
    match &request.goal {
        Goal::Time(_) => {
            let until = facts.gaps.first().map(|gap| gap.start(segment_bytes)).or(end);
            facts.last_transaction = last_transaction(archive, binaries, path, info.wal.start, until, segment_bytes)?;
            facts.searched = true;
        }
        Goal::Xid(xid) => {
            let short = u32::try_from(xid & 0xFFFF_FFFF).unwrap_or_default();
            scan(archive, binaries, path, info.wal.stop, None, Kind::Transactions, &mut |record| match record.event {
                Event::Commit { xid, .. } | Event::Abort { xid, .. } if xid == short => {
                    facts.place = Some(record.lsn);
                    ControlFlow::Break(())
                }
                _ => ControlFlow::Continue(()),
            })?;
            facts.searched = true;
        }
        Goal::Name(_) => facts.searched = true,
        Goal::Latest | Goal::Lsn(_) | Goal::Immediate => {}
    }
    Ok(facts)
}

/// The commit time of the last transaction before `until`, looked for backwards, a few segments at a time.
fn last_transaction(
    archive: &WalArchive,
    binaries: &Binaries,
    path: &History,
    start: Lsn,
    until: Option<Lsn>,
    segment_bytes: u64,
) -> anyhow::Result<Option<Timestamp>> {
    /// Segments of one look.
    const SEGMENTS: u64 = 4;
    let Some(mut to) = until else { return Ok(None) };
    while to > start {
        let from = Lsn(to.0.saturating_sub(SEGMENTS * segment_bytes)).max(start);
        let mut last = None;
        scan(archive, binaries, path, from, Some(to), Kind::Transactions, &mut |record| {
            if let Event::Commit { time_micros, .. } | Event::Abort { time_micros, .. } = record.event {
                last = last.max(Some(time_micros));
            }
            ControlFlow::Continue(())
        })?;
        if let Some(micros) = last {
            return Ok(Timestamp::from_microsecond(micros).ok());
        }
        to = from;
    }
    Ok(None)
}

fn look_at_place(path: &Path, owner: Option<&Owner>) -> Found {
    let nearest = path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let real_nearest = std::fs::canonicalize(nearest).unwrap_or_else(|_| nearest.to_owned());
    let below = path.strip_prefix(nearest).unwrap_or(Path::new(""));
    let real = if below.as_os_str().is_empty() { real_nearest.clone() } else { real_nearest.join(below) };
    let missing: Vec<PathBuf> = real
        .ancestors()
        .skip(1)
        .take_while(|above| above.starts_with(&real_nearest) && **above != real_nearest)
        .map(Path::to_owned)
        .collect();
    let what = if nearest == path { look_into(&real) } else { What::Absent };
    let nearest_is_place = nearest == path;
    let test = |flag: &str, path: &Path| {
        let Some(owner) = owner else { return true };
        let ran = owner.command("test").and_then(|mut command| Ok(command.arg(flag).arg(path).status()?));
        ran.map_or(true, |status| status.success())
    };
    // The owner must get through every directory above; of the place itself the owner will be changed.
    let above = if nearest_is_place { real_nearest.parent().unwrap_or(&real_nearest) } else { &real_nearest };
    let writable = rustix::fs::access(&real_nearest, Access::WRITE_OK | Access::EXEC_OK);
    Found {
        what,
        missing_parents: missing.into_iter().rev().collect(),
        writable: writable.map_err(|cause| std::io::Error::from(cause).to_string()),
        reachable: test("-x", above),
        owner_uid: std::fs::metadata(&real_nearest).map_or(0, |metadata| metadata.uid()),
        file_system: file_system(&real_nearest),
        nearest: real_nearest,
        path: real,
    }
}

fn look_into(path: &Path) -> What {
    let unknown = |error: anyhow::Error| What::Unknown(format!("{error:#}"));
    if !path.is_dir() {
        return What::NoDirectory;
    }
    match hydration::session_in(path, &LocalDisk::new()) {
        Ok(Some((session, _))) => return What::Ours(session),
        Ok(None) => {}
        Err(error) => return unknown(error.into()),
    }
    let entries = match std::fs::read_dir(path) {
        Ok(entries) => entries,
        Err(cause) => return unknown(engine::Error::io("list", path, cause).into()),
    };
    let mut names = entries.filter_map(|entry| Some(entry.ok()?.file_name()));
    let Some(first) = names.next() else { return What::Empty };
    if path.join("PG_VERSION").exists() || path.join("postmaster.pid").exists() {
        return match postmaster::running_in(path) {
            Ok(running) => What::Cluster(running.map(|file| file.pid)),
            Err(error) => unknown(error),
        };
    }
    What::Occupied(first.to_string_lossy().into_owned())
}

fn file_system(path: &Path) -> Result<FileSystem, String> {
    let text = |cause: std::io::Error| engine::Error::io("look at the file system of", path, cause).to_string();
    let metadata = std::fs::metadata(path).map_err(text)?;
    let room = rustix::fs::statvfs(path).map_err(|cause| text(cause.into()))?;
    Ok(FileSystem {
        device: metadata.dev(),
        // Without what is reserved for root: the server that goes on writing is not root.
        free_bytes: room.f_bavail.saturating_mul(room.f_frsize),
        free_inodes: room.f_favail,
        counts_inodes: room.f_files > 0,
    })
}

fn look_at_port(request: &Request, info: Option<&BackupInfo>, contents: &Contents) -> PortFacts {
    let setting = |name: &str| {
        let from_files =
            [&contents.auto, &contents.conf].into_iter().flatten().find_map(|text| conf::value_of(text, name));
        from_files.or_else(|| info?.server.settings.get(name).cloned())
    };
    let number = request.port.or_else(|| setting("port")?.parse().ok()).unwrap_or(5432);
    let addresses = setting("listen_addresses").unwrap_or_else(|| "localhost".to_owned());
    let sockets = setting("unix_socket_directories").unwrap_or_else(|| "/var/run/postgresql".to_owned());
    let in_use = |number: u16| port_in_use(number, &addresses, &sockets);
    let suggestion = || (number.checked_add(1)?..=number.saturating_add(100)).find(|number| in_use(*number).is_none());
    let used = in_use(number);
    PortFacts { number, suggestion: used.as_ref().and_then(|_| suggestion()), in_use: used }
}

/// What uses a port, on the addresses and in the socket directories of the configuration.
fn port_in_use(number: u16, addresses: &str, sockets: &str) -> Option<String> {
    let names =
        |list: &str| list.split(',').map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()).collect();
    let addresses: Vec<String> = names(addresses);
    let address = addresses.iter().find_map(|address| {
        let host = if address == "*" { "0.0.0.0" } else { address.as_str() };
        let refused = TcpListener::bind((host, number)).err()?;
        (refused.kind() == ErrorKind::AddrInUse).then(|| format!("{host}:{number}"))
    });
    let sockets: Vec<String> = names(sockets);
    address.or_else(|| {
        sockets
            .iter()
            .map(|directory| format!("{directory}/.s.PGSQL.{number}"))
            .find(|path| UnixStream::connect(path).is_ok())
    })
}

fn owner_reads(owner: &Owner, request: &Request) -> Result<(), String> {
    let test = |flag: &str, path: &Path| {
        let ran = owner.command("test").and_then(|mut command| Ok(command.arg(flag).arg(path).status()?));
        ran.is_ok_and(|status| status.success())
    };
    let cluster = request.repository.join("clusters").join(request.cluster.as_str());
    if !test("-x", &request.program) {
        return Err(format!(
            "{} cannot run {}, which PostgreSQL needs as its restore_command",
            owner.name,
            request.program.display()
        ));
    }
    for (flag, path) in [
        ("-r", request.repository.join("pghydrant.json")),
        ("-r", cluster.join("cluster.json")),
        ("-x", cluster.join("wal")),
    ] {
        if path.exists() && !test(flag, &path) {
            return Err(format!(
                "{} cannot read {}, which holds the WAL that PostgreSQL fetches",
                owner.name,
                path.display()
            ));
        }
    }
    Ok(())
}
