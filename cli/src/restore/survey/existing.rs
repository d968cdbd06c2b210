//! Looking at the cluster that a delta would overwrite: whose it is, who works in it, what it holds, what WAL it alone
//! has.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use engine::format::file::FileKind;
use engine::hydration::existing::{self, Held};
use engine::hydration::{Layout, layout::Home};
use engine::io::LocalDisk;
use engine::repository::Backup;
use engine::units::SystemIdentifier;
use engine::wal::SegmentHeader;

use super::super::delta::wal;
use super::super::preflight::{Problem, Request};
use super::created::{Created, Location, VERSION_DIRECTORY};
use crate::postgres::control;
use crate::postgres::postmaster::PostmasterFile;
use crate::postgres::processes;

/// The cluster that is there.
#[derive(Clone, Debug, Default)]
pub(crate) struct Existing {
    /// Whose it is; or why nothing proves it.
    pub(crate) identifier: Option<Result<SystemIdentifier, String>>,
    /// What `PG_VERSION` says, if it is there.
    pub(crate) version: Option<String>,
    /// Where the links of its tablespaces lead, as far as it has files there.
    pub(crate) tablespaces: BTreeMap<u32, PathBuf>,
    /// PostgreSQL's directories in those that the backup has not.
    pub(crate) abandoned: Vec<PathBuf>,
    /// Where `pg_wal` leads, if it is a link.
    pub(crate) wal: Option<PathBuf>,
    /// What stands against it: who is at work there, or may be; what we may not change.
    pub(crate) problems: Vec<Problem>,
    /// What its directories hold: the data directory (`None`) and each tablespace that is overwritten.
    pub(crate) held: BTreeMap<Option<u32>, Held>,
    /// WAL files that the archive has not.
    pub(crate) unarchived: Vec<wal::LocalFile>,
    /// What cannot be looked at.
    pub(crate) unreadable: Option<String>,
}

impl Existing {
    /// Names that the backup has not.
    pub(crate) fn removed(&self) -> u64 {
        self.held.values().map(|held| held.removed).sum()
    }
}

/// Looks at the data directory of a delta; nothing where there is none, or nothing in it: that is any other restore.
pub(super) fn look(request: &Request, backup: Option<&Backup>) -> Option<Existing> {
    let holds_files = || std::fs::read_dir(&request.data).is_ok_and(|mut entries| entries.next().is_some());
    let backup = backup.filter(|_| request.delta && holds_files())?;
    let mut existing = Existing::default();
    if let Err(error) = existing.fill(request, backup) {
        existing.unreadable = Some(format!("{error:#}"));
    }
    Some(existing)
}

impl Existing {
    /// A tablespace that the WAL creates where this cluster has it, and nobody else, is no other's: a delta empties it,
    /// or restores it in its place.
    pub(super) fn give_way_to(&self, created: &mut [Created]) {
        for tablespace in created.iter_mut().filter(|tablespace| tablespace.place == Location::Taken) {
            let Ok(location) = tablespace.location.canonicalize() else { continue };
            let removed = self.abandoned.iter().any(|path| path.parent() == Some(&location));
            let overwritten = self.tablespaces.get(&tablespace.oid) == Some(&location);
            let versions = std::fs::read_dir(&location).into_iter().flatten().flatten();
            let versions = versions.filter(|entry| entry.file_name().to_string_lossy().starts_with(VERSION_DIRECTORY));
            if (removed || overwritten) && versions.count() == 1 {
                tablespace.place = Location::Free;
            }
        }
    }

    fn fill(&mut self, request: &Request, backup: &Backup) -> anyhow::Result<()> {
        let data = request.data.canonicalize().with_context(|| format!("cannot follow {}", request.data.display()))?;
        self.version = std::fs::read_to_string(data.join("PG_VERSION")).ok().map(|text| text.trim().to_owned());
        self.wal = link(&data.join("pg_wal"))?;
        if let (None, Ok(target)) = (&self.wal, std::fs::read_link(data.join("pg_wal"))) {
            // Its WAL, the only copy of the last transactions, is somewhere else.
            let what = format!("pg_wal leads to {}, which is not there", target.display());
            self.problems
                .push(Problem::new(what, "mount its disk; where that is lost, restore into another directory"));
            return Ok(());
        }
        let wal_directory = self.wal.clone().unwrap_or_else(|| data.join("pg_wal"));
        self.identifier = Some(identifier(&data, &wal_directory));
        self.look_at_tablespaces(&data, request, backup)?;
        self.problems.extend(servers(&data)?);
        let server = &backup.info.server;
        if !matches!(self.identifier, Some(Ok(found)) if found == server.system_identifier) {
            return Ok(());
        }
        let control = control::read(&data).ok();
        let files = wal::local(&wal_directory, server.system_identifier, server.wal_segment_bytes, control.as_ref())?;
        self.unarchived = wal::not_archived(files, &backup.cluster.wal())?;
        let overwritten = request.tablespace_directories(&backup.info, &self.tablespaces).into_iter();
        let overwritten = overwritten.filter(|(oid, path)| self.tablespaces.get(oid) == Some(path));
        let layout = Layout { data, tablespaces: overwritten.collect(), wal: self.wal.clone() };
        self.problems.extend(neighbours(&layout.data, self.wal.iter().chain(layout.tablespaces.values())));
        self.problems.extend(mounted_within(&layout, &self.abandoned, backup)?);
        for (home, held) in existing::look(backup, &layout, &LocalDisk::new())? {
            let place = match home {
                Home::Tablespace(oid) => Some(oid),
                Home::Data | Home::Wal => None,
            };
            self.problems.extend(held.foreign.map(|path| {
                let what = format!("{} belongs to another user, so nothing in it can be changed", path.display());
                Problem::new(what, "run it as root, or give the directory to the instance's user")
            }));
            let all = self.held.entry(place).or_default();
            all.bytes += held.bytes;
            all.names += held.names;
            all.removed += held.removed;
        }
        Ok(())
    }

    /// Follows the links of the tablespaces as far as the cluster has files there.
    fn look_at_tablespaces(&mut self, data: &Path, request: &Request, backup: &Backup) -> anyhow::Result<()> {
        let version = version_directory(data, backup)?;
        let directory = data.join("pg_tblspc");
        let entries = match std::fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(cause) => return Err(engine::Error::io("list", directory, cause).into()),
        };
        for entry in entries {
            let entry = entry.map_err(|cause| engine::Error::io("list", &directory, cause))?;
            let Some(oid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
            let Some(path) = link(&entry.path())? else { continue };
            let Some(version) = version.as_ref().filter(|version| path.join(version).is_dir()) else { continue };
            if backup.info.tablespaces.iter().any(|known| known.oid == oid) {
                self.tablespaces.insert(oid, path);
            } else {
                self.problems.extend(neighbours(data, [&path].into_iter()));
                self.abandoned.push(path.join(version));
            }
        }
        let kept = request.tablespace_directories(&backup.info, &self.tablespaces);
        self.abandoned.retain(|path| !kept.iter().any(|(_, kept)| path.starts_with(kept)));
        Ok(())
    }
}

/// `PG_15_202209061`: what a cluster calls its directory in a tablespace, by its `pg_control`, or as the backup has it.
fn version_directory(data: &Path, backup: &Backup) -> anyhow::Result<Option<String>> {
    let major = backup.info.server.version_num / 10_000;
    if let Ok(control) = control::read(data) {
        return Ok(Some(format!("PG_{major}_{}", control.catalog_version)));
    }
    for tablespace in &backup.info.tablespaces {
        let children = backup.manifest.children(&format!("pg_tblspc/{}", tablespace.oid))?;
        let found = children.iter().find_map(|child| child.path.rsplit('/').next());
        if let Some(name) = found.filter(|name| name.starts_with(&format!("PG_{major}_"))) {
            return Ok(Some(name.to_owned()));
        }
    }
    Ok(None)
}

/// File systems that are mounted where a delta would remove: what is in them is no part of the cluster. One at a
/// directory that the backup has, such as `pg_wal`, stays.
fn mounted_within(layout: &Layout, abandoned: &[PathBuf], backup: &Backup) -> anyhow::Result<Vec<Problem>> {
    let mut problems = Vec::new();
    for place in fusefs::table::mounts()?.into_iter().map(|mount| mount.mountpoint) {
        let mut goes = abandoned.iter().any(|directory| place.starts_with(directory));
        for (home, root) in layout.homes() {
            let Ok(below) = place.strip_prefix(root) else { continue };
            let (Some(name), Some(below)) = (below.components().next(), below.to_str()) else { continue };
            let of_the_backup = |below: &str| match home {
                Home::Data => backup.manifest.file(below),
                Home::Tablespace(oid) => backup.manifest.file(&format!("pg_tblspc/{oid}/{below}")),
                Home::Wal => Ok(None),
            };
            // Beside PostgreSQL's directory in a tablespace, and in a WAL directory elsewhere, others' names are left alone.
            let is_ours = home == Home::Data || of_the_backup(&name.as_os_str().to_string_lossy())?.is_some();
            let stays = of_the_backup(below)?.is_some_and(|record| record.kind == FileKind::Directory);
            goes |= is_ours && !stays;
        }
        if goes {
            let what = format!("{} is a mount point: what is in it would be removed", place.display());
            problems.push(Problem::new(what, "unmount it, or restore into another directory"));
        }
    }
    Ok(problems)
}

/// Where a link leads in the end; nothing if it is none, or leads nowhere.
fn link(path: &Path) -> anyhow::Result<Option<PathBuf>> {
    match path.symlink_metadata() {
        Ok(metadata) if metadata.is_symlink() => Ok(path.canonicalize().ok().filter(|path| path.is_dir())),
        Ok(_) => Ok(None),
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(cause) => Err(engine::Error::io("examine", path, cause).into()),
    }
}

/// Whose a data directory is: by its `pg_control`, by the mark of a delta that was given up, or by its WAL where
/// `pg_control` is damaged or gone.
pub(crate) fn identifier(data: &Path, wal: &Path) -> Result<SystemIdentifier, String> {
    let because = match control::read(data) {
        Ok(control) => return Ok(control.system_identifier),
        Err(error) => format!("{error:#}"),
    };
    match engine::hydration::unfinished_in(data, &LocalDisk::new()) {
        Ok(Some(identifier)) => return Ok(identifier),
        Ok(None) => {}
        Err(error) => return Err(error.to_string()),
    }
    let versioned = data.join("PG_VERSION").is_file();
    let found = versioned.then(|| identifier_of_wal(wal)).flatten();
    found.ok_or_else(|| format!("nothing proves which cluster {} is: {because}", data.display()))
}

/// What all segments of a directory agree on.
fn identifier_of_wal(directory: &Path) -> Option<SystemIdentifier> {
    let mut found = None;
    for entry in std::fs::read_dir(directory).ok()? {
        let entry = entry.ok()?;
        let is_segment = entry.file_name().to_str().is_some_and(|name| name.len() == 24);
        let mut bytes = Vec::new();
        let read =
            is_segment && File::open(entry.path()).is_ok_and(|file| file.take(64).read_to_end(&mut bytes).is_ok());
        let Some(header) = SegmentHeader::parse(&bytes).ok().filter(|_| read) else { continue };
        if found.is_some_and(|found| found != header.system_identifier) {
            return None;
        }
        found = Some(header.system_identifier);
    }
    found
}

/// Who works in the directory, or may: the postmaster, its children, or a server on another machine.
pub(crate) fn servers(data: &Path) -> anyhow::Result<Option<Problem>> {
    let shown = data.display();
    if let Some(server) = processes::running().iter().find(|server| server.works_in(data)) {
        return Ok(Some(Problem::new(
            format!("a PostgreSQL server (process {}) runs in {shown}", server.pid),
            format!("stop it first: pg_ctl stop -D {shown}"),
        )));
    }
    let file = PostmasterFile::read(data)?;
    if let Some(file) = file.as_ref().filter(|file| file.is_alive(data)) {
        return Ok(Some(Problem::new(
            format!("a PostgreSQL server (process {}) runs in {shown}", file.pid),
            format!("stop it first: pg_ctl stop -D {shown}"),
        )));
    }
    let users = processes::users_of_shared_memory(data);
    if users > 0 {
        return Ok(Some(Problem::new(
            format!("the shared memory of the server in {shown} is still used ({users} attached)"),
            format!("end its processes; if they are another server's, remove {shown}/postmaster.pid"),
        )));
    }
    if !data.join("postmaster.pid").exists() {
        return Ok(None);
    }
    let magic =
        rustix::fs::statfs(data).map_err(|cause| engine::Error::io("look at the file system of", data, cause))?;
    #[allow(clippy::cast_sign_loss, clippy::unnecessary_cast)] // another type on other platforms
    let shared = processes::shared_file_system(magic.f_type as u64);
    Ok(shared.map(|name| on_another_machine(data, name, file.map(|file| file.pid))))
}

/// `postmaster.pid` names no process of this machine, which has not got the directory for itself.
pub(super) fn on_another_machine(data: &Path, file_system: &str, pid: Option<u32>) -> Problem {
    let process = pid.map(|pid| format!(" (process {pid})")).unwrap_or_default();
    Problem::new(
        format!(
            "{} lies on {file_system}, and by its postmaster.pid a server{process} runs there, not on this machine: maybe on another one that has mounted it",
            data.display()
        ),
        "stop the server where it runs; if there is none, remove postmaster.pid".to_owned(),
    )
}

/// Other servers whose WAL or tablespaces lie where this cluster's links lead: it is a copy of theirs, links and all.
fn neighbours<'a>(data: &Path, directories: impl Iterator<Item = &'a PathBuf>) -> Vec<Problem> {
    let servers = processes::running();
    let others = || servers.iter().filter(|server| !server.works_in(data));
    let taken = directories.filter_map(|path| Some((path, others().find(|server| server.has_files_in(path))?)));
    taken
        .map(|(path, server)| {
            Problem::new(
                format!(
                    "{} is used by another server (process {}), which runs in {}",
                    path.display(),
                    server.pid,
                    server.shown()
                ),
                "the links of this directory lead to files of that server: name other places, or restore elsewhere",
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_directory_that_another_machine_may_use_is_told_with_the_way_out() {
        let problem = on_another_machine(Path::new("/srv/pg"), "NFS", Some(4711));
        assert_eq!(
            problem.what,
            "/srv/pg lies on NFS, and by its postmaster.pid a server (process 4711) runs there, not on this machine: \
             maybe on another one that has mounted it"
        );
        assert!(problem.hint.contains("remove postmaster.pid"));
    }

    #[test]
    fn a_postmaster_pid_that_a_crash_left_on_a_disk_of_this_machine_is_no_server() {
        let directory = tempfile::tempdir().unwrap();
        assert!(servers(directory.path()).unwrap().is_none());
        std::fs::write(directory.path().join("postmaster.pid"), "999999999\n/srv/pg\n1\n").unwrap();
        let found = servers(directory.path()).unwrap();
        let magic = rustix::fs::statfs(directory.path()).unwrap().f_type;
        #[allow(clippy::cast_sign_loss, clippy::unnecessary_cast)]
        let shared = processes::shared_file_system(magic as u64).is_some();
        assert_eq!(found.is_some(), shared);
    }

    #[test]
    fn without_pg_control_the_wal_tells_whose_a_directory_is() {
        let directory = tempfile::tempdir().unwrap();
        let wal = directory.path().join("pg_wal");
        std::fs::create_dir(&wal).unwrap();
        assert!(identifier(directory.path(), &wal).is_err());
        let mut page = vec![0; 64];
        page[0..2].copy_from_slice(&0xD110_u16.to_le_bytes());
        page[2..4].copy_from_slice(&2_u16.to_le_bytes());
        page[24..32].copy_from_slice(&77_u64.to_le_bytes());
        page[32..36].copy_from_slice(&(1_u32 << 20).to_le_bytes());
        std::fs::write(wal.join("000000010000000000000005"), &page).unwrap();
        assert!(identifier(directory.path(), &wal).is_err(), "without PG_VERSION it is no data directory");
        std::fs::write(directory.path().join("PG_VERSION"), "15\n").unwrap();
        assert_eq!(identifier(directory.path(), &wal).unwrap(), SystemIdentifier(77));
        page[24] = 78;
        std::fs::write(wal.join("000000010000000000000006"), &page).unwrap();
        assert!(identifier(directory.path(), &wal).is_err(), "two clusters");
    }
}
