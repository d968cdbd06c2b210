//! The verb `backup`: a running cluster into the repository.
//!
//! The server is told that a backup begins, its files are read underneath it on every core, and it is told that the
//! backup ends; what changed meanwhile is in the WAL, which comes along. Every backup can be restored by itself, and
//! only blocks that the parent backup does not have are stored.
//!
//! The story is [`back_up`]. Beside it: the server and its backup API ([`server`]), what belongs into a backup ([`scan`],
//! [`exclude`], [`relation`]), who reads what ([`plan`]), the reading ([`copy`], [`source`], [`pages`]), the WAL ([`wal`]),
//! the files that are made at the end ([`late`], [`checklist`]), a configuration that lies elsewhere ([`outside`]), and
//! what a restore's machine will need besides files ([`environment`]).
//!
//! What is different on a standby stands in [`standby`]. With `--from` no server is asked: [`adopt`] takes over what
//! `pg_basebackup` made, [`tars`] where that is a stream or files of tar.
//!
//! The session stays open to the end: when it goes, for whatever reason, the server itself ends the backup and drops the
//! replication slot, and what was written to the repository is swept by the next backup.

mod adopt;
mod adopt_wal;
mod checklist;
mod copy;
mod environment;
mod exclude;
mod label;
mod late;
mod listed;
mod outside;
mod pages;
mod places;
mod plan;
mod read_ahead;
mod relation;
mod report;
mod scan;
mod server;
mod source;
mod standby;
mod tars;
mod wal;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use engine::format::backup::{BackupInfo, BadPage, Tablespace, WalRange};
use engine::format::file::{FileKind, FileRecord};
use engine::repository::{Cluster, ClusterInfo, Description, Parent, Repository};
use engine::units::{ClusterName, Lsn};

use self::checklist::{Checklist, Item};
use self::copy::{Copied, Copy, Read};
use self::label::Label;
use self::late::{Attributes, LateFiles};
use self::outside::Outside;
use self::places::Places;
use self::plan::Plan;
use self::report::Report;
use self::scan::Source;
use self::server::{Server, Stopped};
use self::standby::Upstream;
use self::wal::WalSupply;
use crate::context::Context;
use crate::exit::{Exit, Failure};
use crate::human;
use crate::options::{ClusterOption, JsonOption, RepositoryOption};
use crate::postgres::client::Client;
use crate::postgres::conninfo::Conninfo;
use crate::postgres::control;

/// While files are read the server is asked for a sign of life this often: without its session the backup is void.
const ALIVE_POLL: Duration = Duration::from_secs(15);
/// A cluster with more damaged pages than this has lost a disk; the description lists no more of them.
const BAD_PAGES_MAX: usize = 100_000;

/// Options of the verb.
#[derive(clap::Args, Debug)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) repository: RepositoryOption,
    #[command(flatten)]
    pub(crate) cluster: ClusterOption,
    /// The server, as libpq takes it: 'host=/run/postgresql port=5432 user=postgres' [default: the PG* variables]
    #[arg(long, value_name = "CONNINFO")]
    pub(crate) dbname: Option<String>,
    /// The primary, when a standby is backed up: told to end the last WAL segment [default: wait until it does]
    #[arg(long, value_name = "CONNINFO")]
    pub(crate) primary: Option<String>,
    /// Take over what pg_basebackup made instead of asking a server: its directory, plain or of tar files, its base.tar,
    /// or - for the stream of `pg_basebackup -D - -Ft -X none`; gzip, lz4 and zstd are told by themselves
    #[arg(long, value_name = "DIR|FILE|-", conflicts_with_all = ["dbname", "primary"])]
    pub(crate) from: Option<PathBuf>,
    /// Read at most so many bytes a second from the data directory, such as 50M [PGHYDRANT_RATE_LIMIT]
    #[arg(long, value_name = "BYTES", conflicts_with = "from")]
    pub(crate) rate_limit: Option<String>,
    /// Store every block, whatever earlier backups have
    #[arg(long)]
    pub(crate) full: bool,
    #[command(flatten)]
    pub(crate) output: JsonOption,
}

pub(crate) fn run(arguments: &Arguments, context: &Context) -> Result<Exit> {
    context.catch_interrupts()?;
    let repository = context.repository(&arguments.repository)?;
    let name = context.cluster_name(&arguments.cluster)?;
    let parent = if arguments.full { Parent::Full } else { Parent::Latest };
    let exit = |backup: &BackupInfo| if backup.bad_pages.is_empty() { Exit::Done } else { Exit::DamagedPages };
    if let Some(directory) = &arguments.from {
        return Ok(exit(&adopt::adopt(&repository, &name, parent, directory, context)?));
    }
    let resolve =
        |text: Option<&str>| Conninfo::resolve(text).map_err(|error| Failure::new(Exit::Usage, format!("{error:#}")));
    let conninfo = resolve(arguments.dbname.as_deref())?;
    let primary = arguments.primary.as_deref().map(|text| resolve(Some(text))).transpose()?;
    let limit = context.rate_limit(arguments.rate_limit.as_deref())?;
    let backup = back_up(&repository, &name, parent, &conninfo, primary.as_ref(), limit, context)?;
    Ok(exit(&backup))
}

fn back_up(
    repository: &Repository,
    name: &ClusterName,
    parent: Parent,
    conninfo: &Conninfo,
    primary: Option<&Conninfo>,
    rate_limit: Option<u64>,
    context: &Context,
) -> Result<BackupInfo> {
    let output = &context.output;
    let interrupted = || context.interrupted();
    let began = Instant::now();

    let step = output.step("connect");
    let client = Client::connect(conninfo)?;
    let mut server = Server::survey(&client)?;
    server.look_around(&client, conninfo, &interrupted);
    let cluster = cluster_of(repository, name, &server)?;
    let writer = cluster.begin_backup(parent)?;
    let upstream = Upstream::of(&server, primary)?;
    let role = if server.is_standby { ", a standby" } else { "" };
    step.done(&format!("PostgreSQL {} in {}{role}", server.version(), server.data.display()));

    let step = output.step("start");
    let mut wal = WalSupply::hold(&client, cluster.wal(), &server, upstream, output)?;
    let start = server::start(&client, &format!("pghydrant {}", writer.label()), &interrupted)?;
    step.done(&format!("backup {} from {start}", writer.label()));

    let step = output.step("scan");
    let tablespaces = Server::tablespaces(&client)?;
    let outside = Outside::gather(&server)?;
    let (files, places) = list_files(&server, &tablespaces, outside, context)?;
    let block = repository.info().block_bytes;
    let plan = Plan::new(&files, block);
    step.done(&format!("{} in {} files and directories", human::bytes(plan.bytes), files.len()));

    let step = output.step("copy");
    let phase = output.phase("copy", plan.bytes);
    let copy = Copy::new(&places, &files, &plan, &writer, block, server.info.data_checksums, &phase);
    let copy = copy.limited_to(rate_limit);
    let mut alive = Instant::now();
    let copied = copy.run(context.backup_workers(copy::WORKER_BYTES)?, &mut || {
        wal.watch()?;
        if alive.elapsed() >= ALIVE_POLL {
            alive = Instant::now();
            client.batch("SELECT 1").context("the server ended the backup's session")?;
        }
        Ok(())
    })?;
    let copy_result = phase.finish();
    let limit = rate_limit.map(|limit| format!(", limited to {}/s", human::bytes(limit))).unwrap_or_default();
    step.done(&format!("{}{limit}", copy_result.text()));

    let step = output.step("stop");
    let mut late = LateFiles::begin(&writer, &plan, block)?;
    let control = write_control(&server, &mut late)?;
    let stopped = server::stop(&client, &interrupted)?;
    let label = Label::parse(&stopped.label).context("the server's backup_label has no start and no timeline")?;
    server.refuse_another_timeline(&client, label.timeline)?;
    let range = WalRange { timeline: label.timeline, start: label.start, stop: stopped.lsn };
    step.done(&format!("consistent at {}", stopped.lsn));

    let step = output.step("WAL");
    let wal_origin = wal.bring(&range, output)?;
    step.done(&format!("{} to {}", range.start, range.stop));

    let step = output.step("commit");
    write_late_files(&server, &stopped, &range, &files, &copied, control, &mut late)?;
    late.finish()?;
    let description = Description {
        stopped_at: stopped_at(&stopped)?,
        stopped_unix: server::whole_seconds(stopped.at_micros),
        tablespaces: tablespaces_of(&files, &copied, &tablespaces),
        bad_pages: bad_pages(&files, &copied, start, stopped.lsn),
        server: server.info.clone(),
        snapshot: stopped.snapshot,
        wal: range,
    };
    let backup = writer.finish(description)?;
    step.done(&format!("after {}", human::duration(began.elapsed())));

    let report = Report { backup: &backup, wal_origin, copy: &copy_result };
    if let Some(damage) = report.damage() {
        output.error(&damage.into());
    }
    output.result(&report.text(), &report);
    Ok(backup)
}

/// The cluster in the repository: made by its first backup, and never another one's.
fn cluster_of(repository: &Repository, name: &ClusterName, server: &Server) -> Result<Cluster> {
    let info = &server.info;
    let cluster = match repository.find_cluster(name)? {
        Some(cluster) => cluster,
        None => {
            let now = jiff::Timestamp::now().to_string();
            let made = ClusterInfo::new(name.clone(), info.system_identifier, info.wal_segment_bytes, now);
            repository.create_cluster(made)?
        }
    };
    cluster.refuse_stranger(info.system_identifier, info.wal_segment_bytes).map_err(|error| {
        Failure::new(Exit::Refused, error.to_string()).hint("give this cluster another name with --cluster")
    })?;
    Ok(cluster)
}

fn list_files(
    server: &Server,
    tablespaces: &BTreeMap<u32, (String, String)>,
    outside: Outside,
    context: &Context,
) -> Result<(Vec<FileRecord>, Places)> {
    let locations = tablespaces.iter().map(|(oid, (_, location))| (*oid, location.clone())).collect();
    let (version_directory, statistics) = (server.version_directory(), server.statistics_directory());
    let source = Source {
        data: &server.data,
        owner: &server.owner,
        tablespaces: &locations,
        version_directory: &version_directory,
        statistics: statistics.as_deref(),
        wal_summaries: server.version().major() >= 17,
    };
    let mut found = source.scan()?;
    outside.join(&mut found.records);
    for warning in found.warnings.iter().chain(&outside.warnings) {
        context.output.warning(warning);
    }
    found.places.files.extend(outside.sources);
    Ok((found.records, found.places))
}

/// `pg_control`, read last and until its CRC is right: no torn one gets into a backup.
fn write_control(server: &Server, late: &mut LateFiles<'_>) -> Result<Read> {
    let (control, bytes) = control::read_stable(&server.data)?;
    let attributes = Attributes { modified: control.modified_unix, ..server.attributes(0) };
    Ok(late.write(control::PATH, attributes, |sink| sink(&bytes))?)
}

/// `backup_label` and `tablespace_map` as the server returned them, and the list for `pg_verifybackup`.
fn write_late_files(
    server: &Server,
    stopped: &Stopped,
    range: &WalRange,
    files: &[FileRecord],
    copied: &Copied,
    control: Read,
    late: &mut LateFiles<'_>,
) -> Result<()> {
    let attributes = server.attributes(stopped.at_micros / 1_000_000);
    let label = late.write("backup_label", attributes, |sink| sink(stopped.label.as_bytes()))?;
    if !stopped.tablespace_map.is_empty() {
        // Not on the list: a restore makes the links itself, elsewhere than this map says, and leaves it out.
        late.write("tablespace_map", attributes, |sink| sink(stopped.tablespace_map.as_bytes()))?;
    }
    let info = &server.info;
    late.write("backup_manifest", attributes, |sink| {
        let mut list = Checklist::begin(info.version_num, info.system_identifier, sink)?;
        let ours = [("backup_label", label), (control::PATH, control)];
        let copied = files.iter().zip(&copied.read).filter_map(|(file, read)| Some((file.path.as_str(), (*read)?)));
        for (path, Read { bytes, crc32c, modified }) in ours.into_iter().chain(copied) {
            list.add(Item { path, bytes, modified, crc32c })?;
        }
        list.end(range)
    })?;
    Ok(())
}

fn stopped_at(stopped: &Stopped) -> Result<String> {
    let time = jiff::Timestamp::from_microsecond(stopped.at_micros).context("the server's clock is no time")?;
    Ok(time.to_string())
}

fn tablespaces_of(files: &[FileRecord], copied: &Copied, names: &BTreeMap<u32, (String, String)>) -> Vec<Tablespace> {
    let mut tablespaces: Vec<Tablespace> = Vec::new();
    for (file, read) in files.iter().zip(&copied.read) {
        if let FileKind::Tablespace { location } = &file.kind
            && let Some(oid) = file.path.rsplit('/').next().and_then(|oid| oid.parse().ok())
            && let Some((name, _)) = names.get(&oid)
        {
            tablespaces.push(Tablespace { oid, name: name.clone(), location: location.clone(), bytes: 0 });
        } else if let Some(last) = tablespaces.last_mut()
            && let Some(read) = read
            && engine::format::manifest::path::is_below(&file.path, &format!("pg_tblspc/{}", last.oid))
        {
            // In path order a tablespace's files follow its own record.
            last.bytes += read.bytes;
        }
    }
    tablespaces
}

fn bad_pages(files: &[FileRecord], copied: &Copied, start: Lsn, stop: Lsn) -> Vec<BadPage> {
    let mut bad: Vec<_> = copied.suspects.iter().filter(|(_, suspect)| suspect.is_bad(start, stop)).collect();
    bad.sort_by_key(|(file, suspect)| (*file, suspect.page));
    bad.into_iter()
        .take(BAD_PAGES_MAX)
        .map(|(file, suspect)| BadPage {
            path: files[*file].path.clone(),
            page: suspect.page,
            stored: suspect.stored,
            computed: suspect.computed,
        })
        .collect()
}
