//! Handing a restored instance over: a configuration of its own elsewhere, Debian's list of clusters, a systemd unit.
//!
//! The data directory always has a complete configuration, and `pg_ctl` starts it with nothing else. Where the user wants
//! the configuration elsewhere ([`configuration`]), that directory gets a complete one as well, with `data_directory`,
//! `hba_file` and `ident_file` in it, and the data directory's ends with a line that includes it, if it is there. So the
//! server runs with the files elsewhere however it is started: `pg_ctl -D DATADIR`, `pg_ctl -D DIR`, or Debian's
//! `pg_ctlcluster`; and a data directory that goes to another machine without them still starts.
//!
//! All of it is written when the server has left recovery, or, where it is not started, at the very end.
//!
//! Always true: nothing that exists is written over, and what root writes for root (a unit) is never given away.

mod configuration;
mod debian;
mod unit;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::plan::{Place, Plan};
use super::{Restore, recover};
use crate::exit::{Exit, Failure};
pub(super) use debian::{CONFIGURATIONS, LOGS, PROGRAMS, log_of};
pub(super) use unit::suits as suits_a_unit;

/// Of the options in `--help`.
const HEADING: &str = "Handing the instance over";

/// The options.
#[derive(clap::Args, Debug, Default)]
pub(crate) struct Options {
    /// A configuration outside the data directory, in DIR: absent or empty
    #[arg(long, value_name = "DIR", help_heading = HEADING, conflicts_with = "register")]
    config_to: Option<PathBuf>,
    /// Make it a cluster of Debian's pg_lsclusters and systemd, configured in /etc/postgresql [default NAME: the data directory's]
    #[arg(long, value_name = "NAME", num_args = 0..=1, require_equals = true, help_heading = HEADING)]
    #[allow(clippy::option_option, reason = "without the option, without its value, and with it")]
    register: Option<Option<String>>,
    /// Write a systemd unit: a file that does not exist
    #[arg(long, value_name = "FILE", help_heading = HEADING, conflicts_with = "register")]
    systemd_unit: Option<PathBuf>,
}

impl Options {
    /// The options, resolved for the data directory `to`.
    pub(super) fn wanted(&self, to: &Path) -> anyhow::Result<Wanted> {
        let absolute = |path: &Option<PathBuf>| path.as_ref().map(std::path::absolute).transpose();
        let register = match &self.register {
            None => None,
            Some(Some(name)) => Some(name.clone()),
            Some(None) => {
                let to = std::path::absolute(to)?;
                let name = to.file_name().map(|name| name.to_string_lossy().into_owned());
                let message = "the data directory has no name that the cluster could have";
                Some(name.ok_or_else(|| Failure::new(Exit::Usage, message).hint("--register=NAME"))?)
            }
        };
        Ok(Wanted { directory: absolute(&self.config_to)?, register, unit: absolute(&self.systemd_unit)? })
    }
}

/// What the user asked for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wanted {
    /// `--config-to`
    pub(crate) directory: Option<PathBuf>,
    /// The cluster's name in Debian's list.
    pub(crate) register: Option<String>,
    pub(crate) unit: Option<PathBuf>,
}

/// What will be done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Handover {
    pub(crate) configuration: Option<Placed>,
    pub(crate) unit: Option<PathBuf>,
}

/// A configuration outside the data directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Placed {
    pub(crate) place: Place,
    pub(crate) cluster: Option<DebianCluster>,
}

/// A cluster as Debian's programs name it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DebianCluster {
    pub(crate) major: u32,
    pub(crate) name: String,
}

impl DebianCluster {
    /// Its `external_pid_file`: systemd waits for this one, and `pg_ctlcluster` writes it only where no other is named.
    pub(super) fn pid_file(&self) -> String {
        format!("/var/run/postgresql/{}-{}.pid", self.major, self.name)
    }
}

impl std::fmt::Display for DebianCluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.major, self.name)
    }
}

impl Handover {
    /// The cluster in Debian's list.
    pub(crate) fn cluster(&self) -> Option<&DebianCluster> {
        self.configuration.as_ref()?.cluster.as_ref()
    }

    /// Where the server's first words go from now on.
    pub(super) fn log(&self, data: &Path) -> PathBuf {
        self.cluster().map_or_else(|| data.join(recover::LOG), |cluster| log_of(cluster.major, &cluster.name))
    }

    /// What the user is told at the end.
    pub(super) fn words(&self, data: &Path, started: bool) -> Vec<String> {
        let mut words = Vec::new();
        if let Some(placed) = &self.configuration {
            words.push(match &placed.cluster {
                None => format!("its configuration is in {}", placed.place.path.display()),
                Some(cluster) if started => format!(
                    "cluster {cluster} of pg_lsclusters, configured in {}; `pg_ctlcluster {cluster} stop`, then `pg_ctlcluster {cluster} start` puts it under systemd",
                    placed.place.path.display()
                ),
                Some(cluster) => format!(
                    "cluster {cluster} of pg_lsclusters, configured in {}; `pg_ctlcluster {cluster} start` starts it",
                    placed.place.path.display()
                ),
            });
        }
        if let Some(unit) = &self.unit {
            let stop = if started { format!("`pg_ctl -D {} stop`, ", data.display()) } else { String::new() };
            let name = unit.file_name().unwrap_or_default().display();
            words.push(format!(
                "a unit for systemd is in {}: {stop}`systemctl daemon-reload` and `systemctl enable --now {name}` hand the server over",
                unit.display()
            ));
        }
        words
    }

    /// Where the configuration stands that the server is started with, if not in the data directory: for `-D`.
    pub(super) fn start_directory<'a>(&'a self, data: &'a Path) -> &'a Path {
        self.configuration.as_ref().map_or(data, |placed| &placed.place.path)
    }
}

impl Restore<'_> {
    /// Writes what is wanted. Can be done again: what is complete is left as it is.
    pub(super) fn hand_over(&mut self) -> anyhow::Result<()> {
        let handover = self.plan().handover.clone();
        if handover == Handover::default() {
            return Ok(());
        }
        let step = self.context.output.step("hand over");
        let mut done = Vec::new();
        if let Some(placed) = &handover.configuration {
            let owner = recover::owner(self.plan())?;
            self.configuration()?.place_elsewhere(placed, &owner)?;
            if placed.cluster.is_some() {
                debian::tell_systemd(&self.context.output);
            }
            done.push(placed.place.path.display().to_string());
        }
        if let Some(path) = &handover.unit {
            unit::write(self.plan(), &self.session.journal.id, path)?;
            done.push(path.display().to_string());
        }
        let detail = done.join(", ");
        let time = step.done(&detail);
        self.session.note_step("hand over", time.as_secs_f64(), detail);
        Ok(())
    }
}

/// Takes away what a session wrote that is being cancelled.
pub(super) fn take_away(plan: &Plan, id: &engine::units::SessionId) -> anyhow::Result<()> {
    if let Some(placed) = &plan.handover.configuration {
        configuration::take_away(placed, plan.data(), id)?;
    }
    if let Some(path) = &plan.handover.unit {
        unit::take_away(path, id)?;
    }
    Ok(())
}
