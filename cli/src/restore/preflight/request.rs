//! What the user asked for, resolved: every path absolute, every value of its type.

use std::collections::BTreeMap;
use std::path::PathBuf;

use engine::format::backup::BackupInfo;
use engine::units::{BackupLabel, ClusterName};

use super::super::check::Thoroughness;
use super::super::handover::Wanted;
use super::super::plan::Source;
use super::super::target::{Action, Goal, TimelineChoice};
use super::super::way::Wanted as WantedIo;

/// What the user asked for.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) repository: PathBuf,
    pub(crate) cluster: ClusterName,
    pub(crate) backup: Option<BackupLabel>,
    pub(crate) data: PathBuf,
    /// Over the cluster that is there.
    pub(crate) delta: bool,
    pub(crate) goal: Goal,
    pub(crate) timeline: TimelineChoice,
    pub(crate) exclusive: bool,
    pub(crate) action: Action,
    pub(crate) port: Option<u16>,
    /// By name or OID, in the order given.
    pub(crate) tablespaces: Vec<(String, PathBuf)>,
    pub(crate) source: Option<Source>,
    pub(crate) io: WantedIo,
    pub(crate) trust_repository: bool,
    pub(crate) adopt: bool,
    pub(crate) no_start: bool,
    pub(crate) check: Option<Thoroughness>,
    pub(crate) handover: Wanted,
    pub(crate) owner: Option<String>,
    pub(crate) programs: Option<PathBuf>,
    pub(crate) mount_directory: Option<PathBuf>,
    /// Our own binary.
    pub(crate) program: PathBuf,
}

impl Request {
    /// Where each tablespace of a backup goes, by OID: where the user says, else where a delta has found it, else where it
    /// was.
    pub(crate) fn tablespace_directories(
        &self,
        info: &BackupInfo,
        found: &BTreeMap<u32, PathBuf>,
    ) -> Vec<(u32, PathBuf)> {
        let chosen = |tablespace: &engine::format::backup::Tablespace| {
            let of = |name: &str| *name == tablespace.name || name == tablespace.oid.to_string();
            let chosen = self.tablespaces.iter().find(|(name, _)| of(name)).map(|(_, directory)| directory.clone());
            let there = chosen.or_else(|| found.get(&tablespace.oid).cloned());
            (tablespace.oid, there.unwrap_or_else(|| PathBuf::from(&tablespace.location)))
        };
        info.tablespaces.iter().map(chosen).collect()
    }
}
