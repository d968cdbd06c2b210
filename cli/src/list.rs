//! The verb `list`: the backups of a repository.
//!
//! A backup whose description is damaged or lost is told of and does not hide the others.

use engine::format::backup::BackupInfo;
use engine::repository::Cluster;
use engine::units::BackupLabel;
use serde_json::json;

use crate::context::Context;
use crate::exit::{Exit, Failure};
use crate::human;
use crate::options::{ClusterOption, JsonOption, RepositoryOption};
use crate::table::Table;

/// Options of the verb.
#[derive(clap::Args, Debug)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) repository: RepositoryOption,
    #[command(flatten)]
    pub(crate) cluster: ClusterOption,
    #[command(flatten)]
    pub(crate) output: JsonOption,
}

pub(crate) fn run(arguments: &Arguments, context: &Context) -> anyhow::Result<Exit> {
    let only = context.optional_cluster_name(&arguments.cluster)?;
    let repository = context.repository(&arguments.repository)?;
    let names = only.map_or_else(|| repository.clusters(), |name| Ok(vec![name]))?;
    let mut exit = Exit::Done;
    let mut text = String::new();
    let mut count = 0;
    for name in &names {
        let cluster = repository.cluster(name)?;
        let (infos, damaged) = descriptions(&cluster)?;
        for (label, error) in &damaged {
            context.output.warning(&format!("backup {label} of cluster {name}: {error}"));
            exit = Failure::exit_of(error);
        }
        infos.iter().for_each(|info| context.output.event("backup", &object(info)));
        count += infos.len();
        text.push_str(&describe(&cluster, &infos));
        for label in cluster.unfinished()? {
            context.output.event("unfinished", &json!({"label": label, "cluster": name}));
            text.push_str(&format!("  unfinished, it runs or was interrupted: {label}\n"));
        }
    }
    if names.is_empty() {
        text = format!("{} holds no cluster yet\n", repository.root().display());
    }
    context.output.result(&text, &json!({"clusters": names.len(), "backups": count}));
    Ok(exit)
}

/// A backup whose description cannot be read, and why.
pub(crate) type Unreadable = (BackupLabel, anyhow::Error);

/// The backups of a cluster, oldest first, and those that cannot be read.
pub(crate) fn descriptions(cluster: &Cluster) -> anyhow::Result<(Vec<BackupInfo>, Vec<Unreadable>)> {
    let (mut infos, mut damaged) = (Vec::new(), Vec::new());
    for label in cluster.labels()? {
        match cluster.backup_info(&label) {
            Ok(info) => infos.push(info),
            Err(error) => damaged.push((label, error.into())),
        }
    }
    Ok((infos, damaged))
}

fn describe(cluster: &Cluster, infos: &[BackupInfo]) -> String {
    let mut table = Table::new(&["BACKUP", "FINISHED (UTC)", ">SIZE", ">ADDED", ">TOOK", "WAL", "POSTGRESQL", "NOTES"]);
    for info in infos {
        table.row([
            info.label.to_string(),
            moment(&info.stopped_at),
            human::bytes(info.totals.bytes),
            human::bytes(info.totals.added_bytes()),
            human::duration(std::time::Duration::from_millis(info.totals.milliseconds)),
            format!("{} to {}", info.wal.start, info.wal.stop),
            version(info.server.version_num),
            notes(info),
        ]);
    }
    let name = cluster.name();
    match infos {
        [] => format!("cluster {name}: no backups\n"),
        _ => format!("cluster {name}\n{}", table.text("  ")),
    }
}

fn object(info: &BackupInfo) -> serde_json::Value {
    json!({
        "label": info.label,
        "cluster": info.cluster,
        "parent": info.parent,
        "started_at": info.started_at,
        "stopped_at": info.stopped_at,
        "bytes": info.totals.bytes,
        "added_bytes": info.totals.added_bytes(),
        "seconds": info.totals.milliseconds as f64 / 1000.0,
        "wal": info.wal,
        "version_num": info.server.version_num,
        "bad_pages": info.bad_pages.len(),
    })
}

/// `2026-11-22 08:15:00` of an RFC 3339 time in UTC.
pub(crate) fn moment(text: &str) -> String {
    match text.parse::<jiff::Timestamp>() {
        Ok(time) => time.strftime("%Y-%m-%d %H:%M:%S").to_string(),
        Err(_) => text.to_owned(),
    }
}

/// `15.18` of 150018, and `15` where the minor version is not known or none.
pub(crate) fn version(number: u32) -> String {
    match (number / 10_000, number % 10_000) {
        (major, 0) => major.to_string(),
        (major, minor) => format!("{major}.{minor}"),
    }
}

fn notes(info: &BackupInfo) -> String {
    match info.bad_pages.len() {
        0 => String::new(),
        1 => "1 damaged page".to_owned(),
        more => format!("{more} damaged pages"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_versions_are_short() {
        assert_eq!(moment("2026-11-22T08:15:00Z"), "2026-11-22 08:15:00");
        assert_eq!(moment("2026-11-22T09:15:00.25+01:00"), "2026-11-22 08:15:00");
        assert_eq!(version(150_018), "15.18");
    }
}
