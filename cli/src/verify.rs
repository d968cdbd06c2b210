//! The verb `verify`: proves a repository without restoring.
//!
//! Every damaged file is named, with the backups that need it, and the rest is read on. The exit code is 4 when
//! anything is damaged or missing; a file that only could not be read is a failure like any other.

use engine::repository::{Cluster, Finding, Kind, Proof, Repository, Verification};
use engine::units::{BackupLabel, ClusterName};
use serde_json::{Value, json};

use crate::context::Context;
use crate::exit::{Exit, Failure};
use crate::human;
use crate::options::{ClusterOption, JsonOption, RepositoryOption};
use crate::show::label_of;

/// Options of the verb.
#[derive(clap::Args, Debug)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) repository: RepositoryOption,
    #[command(flatten)]
    pub(crate) cluster: ClusterOption,
    #[command(flatten)]
    pub(crate) output: JsonOption,
    /// Only this backup, or "latest", and the WAL that it needs [default: everything]
    #[arg(long, value_name = "LABEL")]
    pub(crate) backup: Option<String>,
}

pub(crate) fn run(arguments: &Arguments, context: &Context) -> anyhow::Result<Exit> {
    context.catch_interrupts()?;
    let repository = context.repository(&arguments.repository)?;
    let clusters = clusters(arguments, &repository, context)?;
    let mut exit = Exit::Done;
    for name in &clusters {
        let cluster = match repository.cluster(name) {
            Ok(cluster) => cluster,
            // The other clusters are still worth a look.
            Err(error) if clusters.len() > 1 => {
                let error = error.into();
                context.output.warning(&format!("cluster {name}: {error:#}"));
                exit = worse(exit, Failure::exit_of(&error));
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let only = arguments.backup.as_ref().map(|backup| label_of(&cluster, backup)).transpose()?;
        exit = worse(exit, verify(&cluster, only.as_ref(), context)?);
    }
    if clusters.is_empty() {
        context.output.result("the repository holds no cluster yet", &json!({"clusters": 0, "findings": 0}));
    }
    Ok(exit)
}

/// A label alone does not say of which cluster.
fn clusters(arguments: &Arguments, repository: &Repository, context: &Context) -> anyhow::Result<Vec<ClusterName>> {
    if let Some(name) = context.optional_cluster_name(&arguments.cluster)? {
        return Ok(vec![name]);
    }
    let all = repository.clusters()?;
    if arguments.backup.is_some() && all.len() != 1 {
        return Ok(vec![context.cluster_name(&arguments.cluster)?]);
    }
    Ok(all)
}

fn verify(cluster: &Cluster, only: Option<&BackupLabel>, context: &Context) -> anyhow::Result<Exit> {
    let verification = Verification::plan(cluster, only)?;
    let phase = context.output.phase("verify", verification.bytes());
    let proof = verification.run(&phase)?;
    let read = phase.finish();
    for finding in &proof.findings {
        tell(finding, context);
    }
    let verdict = match proof.findings.len() {
        0 => "everything is what it should be".to_owned(),
        1 => "1 file is not what it should be".to_owned(),
        more => format!("{more} files are not what they should be"),
    };
    let mut text = format!(
        "cluster {}: {}, {}, {}: {verdict}\n",
        cluster.name(),
        human::count(proof.backups, "backup"),
        human::count(proof.wal_files, "WAL file"),
        read.text()
    );
    for island in &proof.islands {
        text.push_str(&format!("  not archived here, each backup has its own WAL: {island}\n"));
    }
    for label in &proof.unfinished {
        text.push_str(&format!("  unfinished, it runs or was interrupted: {label}\n"));
    }
    if proof.garbage_bytes > 0 {
        let bytes = human::bytes(proof.garbage_bytes);
        text.push_str(&format!(
            "  {bytes} belong to unfinished backups; once they do not run, the next backup removes that\n"
        ));
    }
    context.output.result(&text, &result(cluster, &proof, &read));
    Ok(exit_of(&proof.findings))
}

fn tell(finding: &Finding, context: &Context) {
    let backups: Vec<_> = finding.backups.iter().map(BackupLabel::as_str).collect();
    if context.output.is_json() {
        context.output.event("finding", &finding_object(finding));
        return;
    }
    let more = match finding.count {
        0 | 1 => String::new(),
        count => format!(" (and {} more places in it)", count - 1),
    };
    let needed = match backups.len() {
        0 => String::new(),
        _ => format!("; needed by {}", backups.join(", ")),
    };
    context.output.note(&format!("finding: {}{more}{needed}", finding.detail));
}

fn finding_object(finding: &Finding) -> Value {
    let kind = match finding.kind {
        Kind::Corrupt => "corrupt",
        Kind::Missing => "missing",
        Kind::Unreadable => "unreadable",
    };
    json!({
        "kind": kind,
        "path": finding.path.display().to_string(),
        "message": finding.detail,
        "count": finding.count,
        "backups": finding.backups,
    })
}

fn result(cluster: &Cluster, proof: &Proof, read: &crate::output::PhaseResult) -> Value {
    json!({
        "cluster": cluster.name(),
        "backups": proof.backups,
        "wal_files": proof.wal_files,
        "bytes": proof.bytes,
        "seconds": read.seconds,
        "bottleneck": read.bottleneck,
        "findings": proof.findings.len(),
        "islands": proof.islands,
        "unfinished": proof.unfinished,
        "garbage_bytes": proof.garbage_bytes,
    })
}

fn exit_of(findings: &[Finding]) -> Exit {
    if findings.is_empty() {
        Exit::Done
    } else if findings.iter().all(|finding| finding.kind == Kind::Unreadable) {
        Exit::Failed
    } else {
        Exit::Corrupt
    }
}

/// Corruption says more than a failure.
fn worse(one: Exit, other: Exit) -> Exit {
    match (one, other) {
        (Exit::Corrupt, _) | (_, Exit::Corrupt) => Exit::Corrupt,
        (Exit::Done, other) => other,
        (one, _) => one,
    }
}
