//! The verb `show`: a cluster or one backup in detail, how far each backup can be recovered, and what the WAL lacks.

use engine::format::backup::{BackupInfo, Tablespace};
use engine::repository::Cluster;
use engine::units::BackupLabel;
use engine::wal::name::SegmentName;
use engine::wal::{Gap, Reach, WalArchive};
use serde_json::{Value, json};

use crate::context::Context;
use crate::exit::{Exit, Failure};
use crate::human;
use crate::list::{descriptions, moment, version};
use crate::options::{ClusterOption, JsonOption, RepositoryOption};
use crate::table::Table;

/// Damaged pages that are listed for people; `--json` has all of them.
const BAD_PAGES_SHOWN: usize = 20;

/// Options of the verb.
#[derive(clap::Args, Debug)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) repository: RepositoryOption,
    #[command(flatten)]
    pub(crate) cluster: ClusterOption,
    #[command(flatten)]
    pub(crate) output: JsonOption,
    /// The backup, or "latest" [default: the cluster and all its backups]
    pub(crate) backup: Option<String>,
}

pub(crate) fn run(arguments: &Arguments, context: &Context) -> anyhow::Result<Exit> {
    let cluster = context.cluster(&arguments.repository, &arguments.cluster)?;
    match &arguments.backup {
        None => show_cluster(&cluster, context),
        Some(name) => show_backup(&cluster, name, context),
    }
}

fn show_cluster(cluster: &Cluster, context: &Context) -> anyhow::Result<Exit> {
    let wal = cluster.wal();
    let (infos, damaged) = descriptions(cluster)?;
    let mut exit = Exit::Done;
    for (label, error) in &damaged {
        context.output.warning(&format!("backup {label}: {error}"));
        exit = Failure::exit_of(error);
    }
    let mut backups = Vec::new();
    let mut table = Table::new(&["BACKUP", "FINISHED (UTC)", ">SIZE", ">ADDED", "RECOVERY WINDOW"]);
    for info in &infos {
        let reaches = wal.reaches(info)?;
        table.row([
            info.label.to_string(),
            moment(&info.stopped_at),
            human::bytes(info.totals.bytes),
            human::bytes(info.totals.added_bytes()),
            widest(&reaches).map_or_else(|| "none".to_owned(), |reach| window(info, reach)),
        ]);
        backups.push(backup_object(info, &reaches, wal.segment_bytes())?);
    }
    let gaps = wal.gaps()?;
    let timelines = timelines(&wal)?;

    let info = cluster.info();
    let mut text = format!(
        "cluster {}\n  system identifier {}, WAL segments of {}\n\n",
        info.name,
        info.system_identifier,
        human::bytes(info.wal_segment_bytes)
    );
    text.push_str(&if infos.is_empty() { "  no backups\n".to_owned() } else { table.text("  ") });
    text.push('\n');
    text.push_str(&wal_text(&timelines, &gaps, info.wal_segment_bytes));
    let object = json!({
        "cluster": info,
        "backups": backups,
        "wal": timelines.iter().map(Span::object).collect::<Vec<_>>(),
        "gaps": gaps.iter().map(|gap| gap_object(gap, info.wal_segment_bytes)).collect::<Vec<_>>(),
    });
    context.output.result(&text, &object);
    Ok(exit)
}

fn show_backup(cluster: &Cluster, name: &str, context: &Context) -> anyhow::Result<Exit> {
    let info = cluster.backup_info(&label_of(cluster, name)?)?;
    let wal = cluster.wal();
    let reaches = wal.reaches(&info)?;
    let object = backup_object(&info, &reaches, wal.segment_bytes())?;
    context.output.result(&backup_text(&info, &reaches, wal.segment_bytes()), &object);
    Ok(Exit::Done)
}

/// The backup that the user names: its label, or "latest".
pub(crate) fn label_of(cluster: &Cluster, name: &str) -> anyhow::Result<BackupLabel> {
    if name == "latest" {
        let newest = cluster.labels()?.pop();
        return newest.ok_or_else(|| {
            Failure::new(Exit::Failed, format!("cluster \"{}\" has no backup yet", cluster.name())).into()
        });
    }
    name.parse().map_err(|refusal: String| Failure::new(Exit::Usage, refusal).into())
}

fn backup_text(info: &BackupInfo, reaches: &[Reach], segment_bytes: u64) -> String {
    let totals = &info.totals;
    let server = &info.server;
    let checksums = if server.data_checksums { "with page checksums" } else { "without page checksums" };
    let mut lines = vec![
        ("cluster", format!("{}, system identifier {}", info.cluster, server.system_identifier)),
        ("parent", info.parent.as_ref().map_or_else(|| "none: a full backup".to_owned(), ToString::to_string)),
        ("started", format!("{} UTC", moment(&info.started_at))),
        ("finished", format!("{} UTC, after {}", moment(&info.stopped_at), took(info))),
        (
            "PostgreSQL",
            format!("{} {checksums}, data directory {}", version(server.version_num), server.data_directory),
        ),
        ("WAL", format!("{} to {} of timeline {}", info.wal.start, info.wal.stop, info.wal.timeline)),
        ("files", format!("{}, and {} directories and links", totals.files, totals.directories)),
        ("size", format!("{} in {} blocks of {}", human::bytes(totals.bytes), totals.blocks, block_size(info))),
        (
            "added",
            format!(
                "{} of blocks, {} of manifest, compression {}",
                human::bytes(totals.added_pack_bytes),
                human::bytes(totals.added_manifest_bytes),
                info.compression
            ),
        ),
        ("shared", format!("{} with its parent", human::bytes(totals.shared_bytes))),
    ];
    for tablespace in &info.tablespaces {
        let place = format!("{} (oid {}), {}", tablespace.location, tablespace.oid, human::bytes(tablespace.bytes));
        let name = if is_unnamed(tablespace) { "name unknown," } else { &tablespace.name };
        lines.push(("tablespace", format!("{name} in {place}")));
    }
    for path in &server.outside_files {
        lines.push(("outside", path.clone()));
    }
    for reach in reaches {
        lines.push(("window", window(info, reach)));
        if let Some(gap) = &reach.gap {
            lines.push(("gap", format!("{} is missing, the archive goes on behind", gap.describe(segment_bytes))));
        }
    }
    for page in info.bad_pages.iter().take(BAD_PAGES_SHOWN) {
        let sums = format!("checksum {:04x}, its bytes give {:04x}", page.stored, page.computed);
        lines.push(("bad page", format!("{}, page {}: {sums}", page.path, page.page)));
    }
    if let Some(more) = info.bad_pages.len().checked_sub(BAD_PAGES_SHOWN).filter(|more| *more > 0) {
        lines.push(("bad page", format!("and {more} more")));
    }
    let lines = lines.iter().map(|(name, value)| format!("  {name:<12}{value}\n"));
    format!("backup {}\n{}", info.label, lines.collect::<String>())
}

/// Of an adopted base backup only OIDs are known, which stand for the names.
pub(crate) fn is_unnamed(tablespace: &Tablespace) -> bool {
    tablespace.name == tablespace.oid.to_string()
}

fn took(info: &BackupInfo) -> String {
    human::duration(std::time::Duration::from_millis(info.totals.milliseconds))
}

fn block_size(info: &BackupInfo) -> String {
    human::bytes(info.block_bytes.bytes() as u64)
}

/// `from 0/3000100 (2026-11-22 08:15:12) to 0/9000000 (2026-11-22 09:00:41), timeline 2`.
fn window(info: &BackupInfo, reach: &Reach) -> String {
    let Some(end) = reach.end else {
        return format!("none on timeline {}: WAL is missing before {}", reach.timeline, info.wal.stop);
    };
    let from = format!("from {} ({})", info.wal.stop, moment(&info.stopped_at));
    let archived = reach.archived.and_then(|second| jiff::Timestamp::from_second(second).ok());
    let until = archived.map(|time| format!(" (archived {})", moment(&time.to_string()))).unwrap_or_default();
    format!("{from} to {end}{until}, timeline {}", reach.timeline)
}

/// The reach that goes farthest; of the same, the newest timeline.
fn widest(reaches: &[Reach]) -> Option<&Reach> {
    reaches.iter().max_by_key(|reach| (reach.end, reach.timeline))
}

fn backup_object(info: &BackupInfo, reaches: &[Reach], segment_bytes: u64) -> anyhow::Result<Value> {
    let windows = reaches.iter().map(|reach| {
        json!({
            "timeline": reach.timeline,
            "from": info.wal.stop,
            "from_time": info.stopped_at,
            "to": reach.end,
            "to_archived_unix": reach.archived,
            "gap": reach.gap.as_ref().map(|gap| gap_object(gap, segment_bytes)),
        })
    });
    let mut object = serde_json::to_value(info)?;
    object["windows"] = windows.collect();
    Ok(object)
}

fn gap_object(gap: &Gap, segment_bytes: u64) -> Value {
    json!({
        "timeline": gap.first.timeline,
        "first": gap.first.file_name(segment_bytes),
        "segments": gap.segments,
    })
}

/// What of a timeline is in the archive.
struct Span {
    first: SegmentName,
    last: SegmentName,
    count: usize,
    segment_bytes: u64,
}

impl Span {
    fn object(&self) -> Value {
        json!({
            "timeline": self.first.timeline,
            "first": self.first.file_name(self.segment_bytes),
            "last": self.last.file_name(self.segment_bytes),
            "segments": self.count,
        })
    }
}

fn timelines(wal: &WalArchive) -> anyhow::Result<Vec<Span>> {
    let mut spans = Vec::new();
    for timeline in wal.timelines()? {
        let segments = wal.segments(timeline)?;
        if let (Some(first), Some(last)) = (segments.first(), segments.last()) {
            spans.push(Span { first: *first, last: *last, count: segments.len(), segment_bytes: wal.segment_bytes() });
        }
    }
    Ok(spans)
}

fn wal_text(timelines: &[Span], gaps: &[Gap], segment_bytes: u64) -> String {
    let mut text = String::new();
    for span in timelines {
        let [first, last] = [span.first, span.last].map(|segment| segment.file_name(segment_bytes));
        let segments = human::count(span.count as u64, "segment");
        text.push_str(&format!("  WAL of timeline {}: {segments}, {first} to {last}\n", span.first.timeline));
    }
    if timelines.is_empty() {
        text.push_str("  no WAL\n");
    }
    for gap in gaps {
        text.push_str(&format!("  gap: {}\n", gap.describe(segment_bytes)));
    }
    text
}
