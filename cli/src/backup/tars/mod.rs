//! `backup --from -`, `--from FILE`, `--from DIR`: a base backup that `pg_basebackup -Ft` made, as it streams by.
//!
//! So a cluster is backed up of whose machine nobody has more than a replication connection. The stream is read once and
//! never laid down: its files are cut into blocks, checked, hashed and stored as they come ([`intake`]), in the order in which
//! the server found them. What belongs at the front of a backup stands at the stream's end, which cluster it is in
//! `global/pg_control` and what every file must be in `backup_manifest`; so all that decides is kept ([`gather`]) and judged
//! when the stream has ended, as [`adopt`](super::adopt) judges a directory. The block records wait in a file meanwhile
//! ([`records`]), WAL that comes along in a directory ([`spool`]). A checksum that only SHA-2 is listed with is computed from
//! what was stored, read back.
//!
//! Always true: nothing is committed unless the tars ended where they should and every file is as the list says. Until
//! then a cluster that is new to the repository is not even there.

mod decode;
mod gather;
mod input;
mod intake;
mod members;
mod records;
mod spool;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use engine::blocks::Scratch;
use engine::format::backup::BackupInfo;
use engine::format::manifest::LEAF_RECORDS;
use engine::repository::{BackupWriter, Parent, Repository};
use engine::units::{BlockNumber, BlockSize, ClusterName};
use engine::wal::name::WalFile;

use self::gather::{Gathered, InOrder, gather};
pub(in crate::backup) use self::input::Input;
use self::intake::{Found, Intake};
use self::records::Records;
use self::spool::Spool;
use super::adopt::{self, BaseBackup, CONFIGURATION, Place, Texts, no, refuse};
use super::adopt_wal::{self, needed};
use super::cluster_of;
use super::copy::GroupInProgress;
use super::late::{Attributes, LateFiles};
use super::listed::Listed;
use super::plan::{Plan, Unit};
use crate::context::Context;
use crate::exit::Exit;
use crate::human;
use crate::postgres::control::{self, ControlFile};
use crate::postgres::owner::Owner;

/// The story of the verb, once more.
pub(super) fn adopt(
    repository: &Repository,
    name: &ClusterName,
    parent: Parent,
    input: &Input,
    context: &Context,
) -> Result<BackupInfo> {
    let output = &context.output;
    let stop = || context.interrupted();
    let began = Instant::now();

    let step = output.step("base backup");
    let beside = list_beside(input)?;
    let known = repository.find_cluster(name)?;
    let writer = match &known {
        Some(cluster) => cluster.begin_backup(parent)?,
        None => repository.begin_first_backup(name)?,
    };
    let block = repository.info().block_bytes;
    step.done(&format!("tar from {}", input.shown));

    let step = output.step("copy");
    let known_bytes = beside.as_ref().filter(|_| input.is_named).map_or(0, |(listed, _)| listed.bytes());
    let phase = output.phase("copy", known_bytes);
    let records = Records::create()?;
    let spool = Spool::create()?;
    let intake = Intake::new(&writer, &records, block, &phase);
    let (gathered, found) = intake.run(context.workers()?, |feed| gather(input, &spool, &stop, feed))?;
    let copy_result = phase.finish();
    let Judged { base, in_order, control, newest } = judge(input, beside, gathered, found)?;
    if known.is_some() {
        cluster_of(repository, name, &base.server)?;
    }
    let InOrder { files, copied, .. } = &in_order;
    refuse(Exit::Refused, &base.shown, &base.listed.compare_names(files, |path| in_order.has(path)))?;
    let plan = Plan::new(files, block);
    commit_groups(&writer, &records, &in_order, &plan, block)?;
    let mut late = LateFiles::begin(&writer, &plan, block)?;
    let attributes = Attributes { modified: base.server.control.modified_unix, ..base.server.attributes(0) };
    let read_control = late.write(control::PATH, attributes, |sink| sink(&control))?;
    let content = |path: &str, place: Option<usize>, take: &mut dyn FnMut(&[u8])| match place {
        Some(place) => read_back(&writer, &records, &in_order, place, block, take),
        None if path == control::PATH => {
            take(&control);
            Ok(())
        }
        None => {
            take(base.label().as_bytes());
            Ok(())
        }
    };
    base.compare(files, copied, read_control, content, context)?;
    step.done(&format!("{}, all as in backup_manifest", copy_result.text()));

    let step = output.step("WAL");
    // The archive of a new cluster may have begun meanwhile.
    let archive = repository.find_cluster(name)?.map(|cluster| cluster.wal());
    let segment_bytes = base.server.info.wal_segment_bytes;
    take_wal(input, &spool, &base, &stop)?;
    adopt_wal::refuse_gap(archive.as_ref(), spool.path(), &base.range, segment_bytes)?;
    let pg_waldump = adopt_wal::pg_waldump(&base.server, context);
    let program = pg_waldump.as_deref();
    adopt_wal::refuse_unfinished(archive.as_ref(), &base.server, spool.path(), &base.range, program)?;
    let cluster = cluster_of(repository, name, &base.server)?;
    let supply = adopt_wal::Supply::new(cluster.wal(), &base.server, spool.path(), pg_waldump);
    let wal_origin = supply.bring(&base.range, output)?;
    let end = supply.end_of(&base.range, || Ok(newest.saturating_add(1).saturating_mul(1_000_000)))?;
    step.done(&format!("{} to {}", base.range.start, base.range.stop));

    let step = output.step("commit");
    let description = base.describe(end, files, copied, read_control, late)?;
    let backup = writer.of_cluster(&cluster)?.finish(description)?;
    step.done(&format!("after {}", human::duration(began.elapsed())));
    adopt::tell(&backup, wal_origin, &copy_result, output);
    Ok(backup)
}

/// The list beside the tars, and when it was written. Where it is surely theirs, what is wrong with it is known now.
fn list_beside(input: &Input) -> Result<Option<(Listed, i64)>> {
    let Some((list, written)) = input.list()? else { return Ok(None) };
    match adopt::list_of(&input.shown, &list) {
        Ok(listed) => Ok(Some((listed, written))),
        Err(error) if input.is_named => Err(error),
        Err(_) => Ok(None),
    }
}

/// What the stream turned out to be.
struct Judged {
    base: BaseBackup,
    in_order: InOrder,
    /// The bytes of `pg_control`.
    control: Vec<u8>,
    /// The newest time of a file, seconds since 1970.
    newest: i64,
}

/// `beside` is the list that lay beside the tars, if one did, and when it was written.
fn judge(input: &Input, beside: Option<(Listed, i64)>, mut gathered: Gathered, found: Found) -> Result<Judged> {
    let shown = &input.shown;
    let (listed, written) = match (gathered.text("backup_manifest"), beside) {
        (Some(list), _) => (adopt::list_of(shown, &list)?, 0),
        (None, Some(beside)) => beside,
        (None, None) => return Err(adopt::unlisted(shown)),
    };
    let newest = gathered.newest.max(written);
    let Some(version) = text(&mut gathered, shown, "PG_VERSION")? else {
        return Err(no(format!("{shown} is no tar of a data directory: it has no PG_VERSION")).into());
    };
    let Some(label) = text(&mut gathered, shown, "backup_label")? else {
        return Err(adopt::ran(shown, "it has no backup_label"));
    };
    let Some(control) = gathered.text(control::PATH) else {
        return Err(no(format!("{shown} has no {}", control::PATH)).into());
    };
    if control.len() != control::FILE_BYTES {
        return Err(no(format!("{shown}: {} has {} bytes", control::PATH, control.len())).into());
    }
    let parsed = ControlFile::parse(&control)
        .map_err(|invalid| no(format!("{shown}: {} is not a control file: {invalid}", control::PATH)))?;
    let Some(directory) = gathered.directory("base") else {
        return Err(no(format!("{shown} has no directory base")).into());
    };
    // The names in PostgreSQL's headers are always this one; the number may be anybody's here.
    let name = gathered.owner.clone().unwrap_or_else(|| "postgres".to_owned());
    let place = Place {
        data: PathBuf::from(shown),
        data_directory: "unknown".to_owned(),
        owner: Owner { name, uid: directory.uid, gid: directory.gid, home: PathBuf::from("/") },
        gid: directory.gid,
        group_access: directory.mode & 0o050 != 0,
    };
    let texts = Texts {
        version,
        label,
        control: parsed,
        tablespace_map: text(&mut gathered, shown, "tablespace_map")?.unwrap_or_default(),
        configuration: CONFIGURATION.iter().filter_map(|path| gathered.text(path)).collect(),
    };
    let tablespaces: BTreeMap<u32, (String, String)> =
        gathered.tablespaces.iter().map(|(oid, location)| (*oid, (oid.to_string(), location.clone()))).collect();
    let base = BaseBackup::of(shown.clone(), texts, listed, tablespaces, place)?;
    let server = &base.server;
    let summaries = server.version().major() >= 17;
    let mut in_order = gathered.in_order(shown, server.statistics_directory().as_deref(), summaries, found)?;
    if !server.info.data_checksums {
        in_order.copied.suspects.clear();
    }
    Ok(Judged { base, in_order, control, newest })
}

fn text(gathered: &mut Gathered, shown: &str, path: &str) -> Result<Option<String>> {
    let text = gathered.text(path).map(String::from_utf8).transpose();
    text.map_err(|_| no(format!("{shown}: {path} is not UTF-8")).into())
}

/// Writes the manifest's groups from the records, as the copy of an ordinary backup does from what it reads.
fn commit_groups(
    writer: &BackupWriter,
    records: &Records,
    in_order: &InOrder,
    plan: &Plan,
    block: BlockSize,
) -> Result<()> {
    for unit in &plan.units {
        let Unit::Group { position, files } = unit else { continue };
        let mut group = GroupInProgress::default();
        for file in &in_order.files[files.clone()] {
            for record in records.read(file.first_block.0, block.blocks_of(file.bytes))? {
                group.push_block(record, writer)?;
            }
            group.files.push(file.clone());
        }
        group.commit(*position, writer)?;
    }
    for large in &plan.large {
        let file = &in_order.files[large.file];
        let blocks = block.blocks_of(file.bytes);
        let mut leaves = Vec::with_capacity(large.leaves);
        for first in (0..blocks).step_by(LEAF_RECORDS as usize) {
            let leaf = records.read(file.first_block.0 + first, (blocks - first).min(LEAF_RECORDS))?;
            leaves.push(writer.commit_leaf(&leaf)?);
        }
        let file = engine::format::file::FileRecord { first_block: BlockNumber(0), ..file.clone() };
        writer.commit_group(large.position, &[file], leaves)?;
    }
    Ok(())
}

/// Hands over the bytes of a file out of the repository, each block proven.
fn read_back(
    writer: &BackupWriter,
    records: &Records,
    in_order: &InOrder,
    place: usize,
    block: BlockSize,
    take: &mut dyn FnMut(&[u8]),
) -> engine::Result<()> {
    let file = &in_order.files[place];
    let (stored, mut scratch, mut memory) = (writer.stored(), Scratch::default(), Vec::new());
    let blocks = block.blocks_of(file.bytes);
    for first in (0..blocks).step_by(LEAF_RECORDS as usize) {
        let leaf = records.read(file.first_block.0 + first, (blocks - first).min(LEAF_RECORDS))?;
        for (index, record) in (first..).zip(&leaf) {
            memory.resize(block.block_bytes_at(file.bytes, index), 0);
            stored.read_block(record, &mut memory, &mut scratch)?;
            take(&memory);
        }
    }
    Ok(())
}

/// Takes out of a `pg_wal.tar` what the backup needs and the base's tar has not.
fn take_wal(input: &Input, spool: &Spool, base: &BaseBackup, stop: &dyn Fn() -> bool) -> Result<()> {
    let segment_bytes = base.server.info.wal_segment_bytes;
    let segments = needed(&base.range, segment_bytes).map(|segment| segment.file_name(segment_bytes));
    let history = WalFile::History(base.range.timeline).file_name(segment_bytes);
    let missing = spool.missing(segments.chain([history]));
    if missing.is_empty() {
        return Ok(());
    }
    match input.beside("pg_wal")? {
        Some(tar) => spool.take_all(&tar, &missing, stop),
        None => Ok(()),
    }
}
