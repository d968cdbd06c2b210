//! `backup --from DIR`: a base backup that `pg_basebackup` made becomes a backup of the repository.
//!
//! No server is asked; everything is in the directory. `pg_control` says which cluster it is, `backup_label` where recovery
//! begins, `backup_manifest` where it is consistent and what every file must be. The files are read by the copy of an
//! ordinary backup and compared with the list on their way; nothing is committed unless all of them are as listed. What
//! only SQL could have told stays unknown: a tablespace goes by its OID, a minor version by 0, and the end's time and
//! snapshot are bounded from the WAL (see [`wal::end_of`](super::adopt_wal::end_of)).
//!
//! Always true: a directory in which a server has run since is refused. Its `pg_control` is on the list like any file.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result};
use engine::Error;
use engine::format::backup::{BackupInfo, ServerInfo, WalRange};
use engine::format::file::{FileKind, FileRecord};
use engine::repository::{Description, Parent, Repository};
use engine::units::ClusterName;
use rustix::fs::{Mode, OFlags};

use super::adopt_wal::{self, End};
use super::copy::{self, Copied, Copy, Read};
use super::label::Label;
use super::late::LateFiles;
use super::listed::{self, Listed};
use super::outside::Outside;
use super::plan::Plan;
use super::report::Report;
use super::server::{self, Server, Stopped};
use super::tars::{self, Input};
use super::wal::Origin;
use super::{bad_pages, cluster_of, list_files, tablespaces_of, write_control, write_late_files};
use crate::context::Context;
use crate::exit::{Exit, Failure};
use crate::human;
use crate::output::{Output, PhaseResult};
use crate::postgres::control::{self, ControlFile};
use crate::postgres::owner::Owner;
use crate::restore::conf;

/// A label has eight lines, `PG_VERSION` one, a configuration a few hundred.
pub(super) const SMALL_BYTES_MAX: u64 = 16 << 20;
/// How many files a refusal names.
const NAMES_LISTED: usize = 3;
/// What the directory's configuration may tell; the rest comes out of `pg_control` or with the files themselves.
const SETTINGS: [&str; 6] = [
    "archive_mode",
    "listen_addresses",
    "port",
    "shared_preload_libraries",
    "stats_temp_directory",
    "unix_socket_directories",
];

/// The server's configuration; what the later file sets counts.
pub(super) const CONFIGURATION: [&str; 2] = ["postgresql.conf", "postgresql.auto.conf"];

/// A base backup that may be adopted.
pub(super) struct BaseBackup {
    /// How messages call it.
    pub(super) shown: String,
    pub(super) server: Server,
    pub(super) listed: Listed,
    label: String,
    tablespace_map: String,
    pub(super) range: WalRange,
    tablespaces: BTreeMap<u32, (String, String)>,
}

/// What a base backup says of itself, but for its list.
pub(super) struct Texts {
    /// `PG_VERSION`.
    pub(super) version: String,
    /// `backup_label`.
    pub(super) label: String,
    pub(super) control: ControlFile,
    /// Those of [`CONFIGURATION`] that there are.
    pub(super) configuration: Vec<Vec<u8>>,
    pub(super) tablespace_map: String,
}

/// Where a base backup lies, and whose its data directory is.
pub(super) struct Place {
    pub(super) data: PathBuf,
    /// As the backup's description has it.
    pub(super) data_directory: String,
    pub(super) owner: Owner,
    pub(super) gid: u32,
    pub(super) group_access: bool,
}

/// The verb's story, without a server.
pub(super) fn adopt(
    repository: &Repository,
    name: &ClusterName,
    parent: Parent,
    from: &Path,
    context: &Context,
) -> Result<BackupInfo> {
    match Input::named(from)? {
        Some(tars) => tars::adopt(repository, name, parent, &tars, context),
        None => adopt_directory(repository, name, parent, from, context),
    }
}

fn adopt_directory(
    repository: &Repository,
    name: &ClusterName,
    parent: Parent,
    directory: &Path,
    context: &Context,
) -> Result<BackupInfo> {
    let output = &context.output;
    let began = Instant::now();

    let step = output.step("base backup");
    let base = BaseBackup::survey(directory)?;
    let server = &base.server;
    let known = repository.find_cluster(name)?;
    let pg_wal = server.data.join("pg_wal");
    adopt_wal::refuse_gap(
        known.as_ref().map(|cluster| cluster.wal()).as_ref(),
        &pg_wal,
        &base.range,
        server.info.wal_segment_bytes,
    )?;
    let cluster = cluster_of(repository, name, server)?;
    step.done(&format!("PostgreSQL {} in {}", server.version().major(), server.data.display()));

    let step = output.step("scan");
    let (files, places) = list_files(server, &base.tablespaces, Outside::default(), context)?;
    let is_there = |path: &str| server.data.join(path).exists();
    refuse(Exit::Refused, &base.shown, &base.listed.compare_names(&files, is_there))?;
    let writer = cluster.begin_backup(parent)?;
    let block = repository.info().block_bytes;
    let plan = Plan::new(&files, block);
    step.done(&format!("{} in {} files and directories", human::bytes(plan.bytes), files.len()));

    let step = output.step("copy");
    let phase = output.phase("copy", plan.bytes);
    let copy = Copy::new(&places, &files, &plan, &writer, block, server.info.data_checksums, &phase);
    let copied = copy.run(context.backup_workers(copy::WORKER_BYTES)?, &mut || Ok(()))?;
    let copy_result = phase.finish();
    let mut late = LateFiles::begin(&writer, &plan, block)?;
    let control = write_control(server, &mut late)?;
    let content = |path: &str, _, take: &mut dyn FnMut(&[u8])| listed::read_file(&server.data.join(path), take);
    base.compare(&files, &copied, control, content, context)?;
    step.done(&format!("{}, all as in backup_manifest", copy_result.text()));

    let step = output.step("WAL");
    let pg_waldump = adopt_wal::pg_waldump(server, context);
    adopt_wal::refuse_unfinished(Some(&cluster.wal()), server, &pg_wal, &base.range, pg_waldump.as_deref())?;
    let supply = adopt_wal::Supply::new(cluster.wal(), server, &pg_wal, pg_waldump);
    let wal_origin = supply.bring(&base.range, output)?;
    let end = supply.end_of(&base.range, || base.newest_time(&files, &copied))?;
    step.done(&format!("{} to {}", base.range.start, base.range.stop));

    let step = output.step("commit");
    let description = base.describe(end, &files, &copied, control, late)?;
    let backup = writer.finish(description)?;
    step.done(&format!("after {}", human::duration(began.elapsed())));
    tell(&backup, wal_origin, &copy_result, output);
    Ok(backup)
}

/// The report of a base backup that was taken over.
pub(super) fn tell(backup: &BackupInfo, wal_origin: Origin, copy: &PhaseResult, output: &Output) {
    let report = Report { backup, wal_origin, copy };
    if let Some(damage) = report.damage() {
        output.error(&damage.into());
    }
    output.result(&report.text(), &report);
}

impl BaseBackup {
    /// Looks at everything that can be told before a file is copied.
    fn survey(directory: &Path) -> Result<Self> {
        let data = std::fs::canonicalize(directory)
            .map_err(|error| no(format!("cannot read {}: {error}", directory.display())))?;
        let shown = data.display();
        let Some(version) = small(&data, "PG_VERSION")? else {
            return Err(no(format!("{shown} is no data directory: it has no PG_VERSION"))
                .hint("--from takes the directory of `pg_basebackup`, plain or with its base.tar")
                .into());
        };
        if data.join("postmaster.pid").exists() {
            return Err(ran(&shown, "it has a postmaster.pid"));
        }
        let Some(label) = small(&data, "backup_label")? else {
            return Err(ran(&shown, "it has no backup_label"));
        };
        let Some(list) = read(&data, "backup_manifest", listed::BYTES_MAX)? else { return Err(unlisted(&shown)) };
        let listed = list_of(&shown, &list)?;
        let control = control::read(&data).map_err(|error| no(format!("{error:#}")))?;
        let mut configuration = Vec::new();
        for file in CONFIGURATION {
            configuration.extend(read(&data, file, SMALL_BYTES_MAX)?);
        }
        let tablespace_map = small(&data, "tablespace_map")?.unwrap_or_default();
        let tablespaces = tablespaces_in(&data)?;
        let metadata = std::fs::metadata(&data).map_err(|cause| Error::io("examine", &data, cause))?;
        let place = Place {
            owner: Owner::of(&data)?,
            gid: metadata.gid(),
            group_access: metadata.mode() & 0o050 != 0,
            data_directory: data.display().to_string(),
            data: data.clone(),
        };
        let texts = Texts { version, label, control, configuration, tablespace_map };
        Self::of(shown.to_string(), texts, listed, tablespaces, place)
    }

    /// The base backup of these texts, if they are of one and the same.
    pub(super) fn of(
        shown: String,
        texts: Texts,
        listed: Listed,
        tablespaces: BTreeMap<u32, (String, String)>,
        place: Place,
    ) -> Result<Self> {
        let Texts { version, label, control, configuration, tablespace_map } = texts;
        server::refuse_other_builds(&control)?;
        let range = range(&shown, &label, &listed)?;
        if listed.system_identifier.is_some_and(|identifier| identifier != control.system_identifier.0) {
            return Err(no(format!("{shown}: backup_manifest and pg_control are of different clusters")).into());
        }
        let server = server_of(place, control, server::known_major(&version)?, &configuration);
        Ok(Self { shown, server, listed, label, tablespace_map, range, tablespaces })
    }

    /// Its `backup_label`.
    pub(super) fn label(&self) -> &str {
        &self.label
    }

    /// All that was read, against the list. `content` gives the bytes of a file again: its path, and its place in
    /// `files` if it is one of them.
    pub(super) fn compare(
        &self,
        files: &[FileRecord],
        copied: &Copied,
        control: Read,
        content: impl Fn(&str, Option<usize>, &mut dyn FnMut(&[u8])) -> engine::Result<()> + Sync,
        context: &Context,
    ) -> Result<()> {
        let places = files.iter().zip(&copied.read).enumerate();
        let regular = places.filter(|(_, (file, _))| file.kind == FileKind::Regular);
        let regular = regular.map(|(place, (file, read))| (file.path.as_str(), Some(place), read.as_ref()));
        let label = self.label.as_bytes();
        let label = Read { bytes: label.len() as u64, crc32c: crc32c::crc32c(label), modified: 0 };
        let late = [("backup_label", None, Some(&label)), (control::PATH, None, Some(&control))];
        let all: Vec<_> = late.into_iter().chain(regular).collect();
        let mut wrong: Vec<String> =
            all.iter().filter_map(|(path, _, read)| self.listed.compare(path, *read)).collect();
        let read: Vec<_> = all.iter().filter_map(|(path, place, read)| Some((*path, *place, *(*read)?))).collect();
        let stop = || context.interrupted();
        wrong.extend(self.listed.compare_digests(&read, content, context.workers()?, &stop)?);
        refuse(Exit::Failed, &self.shown, &wrong)
    }

    /// The backup's last files, and its description.
    pub(super) fn describe(
        &self,
        end: End,
        files: &[FileRecord],
        copied: &Copied,
        control: Read,
        mut late: LateFiles<'_>,
    ) -> Result<Description> {
        let End { at_micros, snapshot } = end;
        let (label, tablespace_map) = (self.label.clone(), self.tablespace_map.clone());
        let stopped = Stopped { lsn: self.range.stop, label, tablespace_map, snapshot, at_micros };
        write_late_files(&self.server, &stopped, &self.range, files, copied, control, &mut late)?;
        late.finish()?;
        Ok(Description {
            stopped_at: super::stopped_at(&stopped)?,
            stopped_unix: server::whole_seconds(at_micros),
            tablespaces: tablespaces_of(files, copied, &self.tablespaces),
            bad_pages: bad_pages(files, copied, self.range.start, self.range.stop),
            server: self.server.info.clone(),
            snapshot: stopped.snapshot,
            wal: self.range.clone(),
        })
    }

    /// The newest time of a file, microseconds since 1970.
    ///
    /// `pg_basebackup` receives `backup_manifest` behind everything else, after the backup's end, and every file gets its
    /// time as it is written. A copy of the directory has these times or later ones.
    fn newest_time(&self, files: &[FileRecord], copied: &Copied) -> Result<i64> {
        let path = self.server.data.join("backup_manifest");
        let list = std::fs::symlink_metadata(&path).map_err(|cause| Error::io("examine", &path, cause))?.mtime();
        let read = files.iter().zip(&copied.read).filter_map(|(_, read)| Some(read.as_ref()?.modified));
        // The second is not over.
        Ok((read.chain([list]).max().unwrap_or(list) + 1).saturating_mul(1_000_000))
    }
}

/// `backup_manifest`, if it is one that can be gone by.
pub(super) fn list_of(shown: &dyn Display, list: &[u8]) -> Result<Listed> {
    let listed =
        Listed::parse(list).map_err(|detail| no(format!("{shown}/backup_manifest cannot be used: {detail}")))?;
    if let Some(path) = listed.incremental() {
        return Err(incremental(shown, path));
    }
    if let Some(encoded) = listed.encoded.first() {
        return Err(no(format!("{shown} has a file whose name is not UTF-8 (in hexadecimal {encoded})")).into());
    }
    Ok(listed)
}

/// The refusal of a base backup without `backup_manifest`.
pub(super) fn unlisted(shown: &dyn Display) -> anyhow::Error {
    no(format!("{shown} has no backup_manifest")).hint("make the base backup without --no-manifest").into()
}

/// The refusal of one that is none without others.
pub(super) fn incremental(shown: &dyn Display, why: &str) -> anyhow::Error {
    no(format!("{shown} is an incremental base backup ({why})"))
        .hint("combine it with those before it: pg_combinebackup")
        .into()
}

/// Refuses a label that only PostgreSQL 17's incremental base backups have.
pub(super) fn refuse_incremental_label(shown: &dyn Display, label: &str) -> Result<()> {
    if label.contains("INCREMENTAL FROM LSN") { Err(incremental(shown, "its backup_label says so")) } else { Ok(()) }
}

/// Where recovery begins and the files are consistent: label and list must tell of the same backup.
fn range(shown: &str, label: &str, listed: &Listed) -> Result<WalRange> {
    refuse_incremental_label(&shown, label)?;
    let Some(label) = Label::parse(label) else {
        return Err(no(format!("{shown}/backup_label has no start and no timeline")).into());
    };
    let [range] = listed.ranges.as_slice() else {
        let message = format!("the WAL of {shown} goes over {} timelines", listed.ranges.len());
        return Err(no(message).hint("its server was promoted meanwhile: make the base backup again").into());
    };
    if range.start != label.start || range.timeline != label.timeline || range.stop < range.start {
        return Err(no(format!("{shown}: backup_label and backup_manifest are of different backups")).into());
    }
    Ok(range.clone())
}

/// The base backup as a server that could be asked no further.
fn server_of(place: Place, control: ControlFile, major: u32, configuration: &[Vec<u8>]) -> Server {
    let mut settings: BTreeMap<String, String> = BTreeMap::new();
    // As it ran: a hot standby needs at least as much.
    for (name, value) in [
        ("max_connections", control.max_connections),
        ("max_locks_per_transaction", control.max_locks_per_transaction),
        ("max_prepared_transactions", control.max_prepared_transactions),
        ("max_wal_senders", control.max_wal_senders),
        ("max_worker_processes", control.max_worker_processes),
    ] {
        settings.insert(name.to_owned(), value.to_string());
    }
    for text in configuration {
        let told = SETTINGS.iter().filter_map(|name| Some(((*name).to_owned(), conf::value_of(text, name)?)));
        settings.extend(told);
    }
    let Place { data, data_directory, owner, gid, group_access } = place;
    let info = ServerInfo {
        system_identifier: control.system_identifier,
        version_num: major * 10_000,
        data_checksums: control.data_checksum_version != 0,
        wal_segment_bytes: u64::from(control.wal_segment_bytes),
        data_directory,
        outside_files: Vec::new(),
        owner: owner.name.clone(),
        settings,
        environment: None,
    };
    Server { data, control, info, owner, gid, group_access, is_standby: false }
}

/// The links in `pg_tblspc`: their names are the OIDs, and the OIDs must do for the tablespaces' names.
fn tablespaces_in(data: &Path) -> Result<BTreeMap<u32, (String, String)>> {
    let directory = data.join("pg_tblspc");
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(&directory).map_err(|cause| Error::io("list", &directory, cause))? {
        let entry = entry.map_err(|cause| Error::io("list", &directory, cause))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if let (Ok(oid), Ok(location)) = (name.parse::<u32>(), std::fs::read_link(entry.path())) {
            found.insert(oid, (name, location.to_string_lossy().into_owned()));
        }
    }
    Ok(found)
}

fn small(data: &Path, name: &str) -> Result<Option<String>> {
    let bytes = read(data, name, SMALL_BYTES_MAX)?;
    let text = bytes.map(String::from_utf8).transpose();
    text.map_err(|_| no(format!("{} is not UTF-8", data.join(name).display())).into())
}

/// A file of the directory; nothing if there is none. Not through a link: we may be root, and the directory anybody's.
fn read(data: &Path, name: &str, bytes_max: u64) -> Result<Option<Vec<u8>>> {
    let path = data.join(name);
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match rustix::fs::open(&path, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(rustix::io::Errno::NOENT) => return Ok(None),
        Err(cause) => return Err(no(format!("cannot read {}: {}", path.display(), std::io::Error::from(cause))).into()),
    };
    let is_file = file.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.len() <= bytes_max);
    if !is_file {
        return Err(no(format!("{} is no file of the size that it may have", path.display())).into());
    }
    let mut bytes = Vec::new();
    file.take(bytes_max).read_to_end(&mut bytes).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(Some(bytes))
}

pub(super) fn no(message: impl Into<String>) -> Failure {
    Failure::new(Exit::Refused, message)
}

pub(super) fn ran(shown: &dyn Display, why: &str) -> anyhow::Error {
    no(format!("{shown} is no base backup as pg_basebackup left it: {why}"))
        .hint("a server that runs, or has run there since, is backed up with --dbname")
        .into()
}

/// One line for all that is wrong.
pub(super) fn refuse(exit: Exit, shown: &str, wrong: &[String]) -> Result<()> {
    if wrong.is_empty() {
        return Ok(());
    }
    let listed = wrong[..wrong.len().min(NAMES_LISTED)].join("; ");
    let more = wrong.len().saturating_sub(NAMES_LISTED);
    let more = if more > 0 { format!("; and {more} more") } else { String::new() };
    Err(Failure::new(exit, format!("{shown} is not as pg_basebackup left it: {listed}{more}"))
        .hint("nothing was taken over; make the base backup again")
        .into())
}
