//! What the recovery service knows of a session: one JSON file each, so that a service that is started again goes on.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use engine::Error;
use engine::io::durable;
use engine::units::{ClusterName, SessionId};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::super::address::Target;
use crate::agent::Order;

/// Where a session stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum State {
    /// The target is being reached.
    Connecting,
    /// A verb runs there.
    Running,
    /// It failed or cannot be reached, and is tried again by itself.
    Retrying,
    /// Paused or shut down at its recovery target, until `promote` or `retarget`.
    AtTarget,
    /// Until `retry`.
    Waiting,
    /// The instance is handed over.
    Finished,
    /// Refused before anything was touched.
    Failed,
    /// Given up, and what it made is taken away.
    Cancelled,
}

impl State {
    /// Every state, for the metrics.
    pub(crate) const ALL: [Self; 8] = [
        Self::Connecting,
        Self::Running,
        Self::Retrying,
        Self::AtTarget,
        Self::Waiting,
        Self::Finished,
        Self::Failed,
        Self::Cancelled,
    ];

    /// As programs read it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Running => "running",
            Self::Retrying => "retrying",
            Self::AtTarget => "at_target",
            Self::Waiting => "waiting",
            Self::Finished => "finished",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// As people read it.
    pub(crate) const fn text(self) -> &'static str {
        match self {
            Self::AtTarget => "at its target",
            Self::Waiting => "waiting for retry",
            other => other.name(),
        }
    }

    /// The service works on it.
    pub(crate) const fn is_active(self) -> bool {
        matches!(self, Self::Connecting | Self::Running | Self::Retrying)
    }

    /// Nothing is left to do.
    pub(crate) const fn is_over(self) -> bool {
        matches!(self, Self::Finished | Self::Failed | Self::Cancelled)
    }
}

/// See the module. Fields are only ever added.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) id: SessionId,
    pub(crate) cluster: ClusterName,
    pub(crate) target: Target,
    /// Options of `restore`, as the target gets them.
    pub(crate) restore: Vec<String>,
    /// The data directory there.
    pub(crate) data: PathBuf,
    /// Bytes a second that it may read.
    #[serde(default)]
    pub(crate) rate_limit: Option<u64>,
    /// Whose token ordered it.
    pub(crate) ordered_by: String,
    pub(crate) created_at: Timestamp,
    pub(crate) updated_at: Timestamp,
    pub(crate) state: State,
    /// What is being done, until it has ended.
    pub(crate) order: Option<Order>,
    /// Where the session stood when that was ordered.
    #[serde(default)]
    pub(crate) before: Option<State>,
    /// A verb was started on the target for it, whose end was not heard.
    pub(crate) begun: bool,
    /// Where in the target's events those of that verb begin.
    #[serde(default)]
    pub(crate) since: u64,
    /// Orders that were sent to the target, each written here before: a service that is killed meanwhile knows that one
    /// may be carried out there.
    #[serde(default)]
    pub(crate) sent: u32,
    /// The present one is among them.
    #[serde(default)]
    pub(crate) asked: bool,
    /// `cancel` was ordered while another order is carried out.
    #[serde(default)]
    pub(crate) cancelled: bool,
    /// The port there by which a tunnel leads to the data plane, where there is one.
    #[serde(default)]
    pub(crate) tunnel: Option<u16>,
    /// Retries of this order so far.
    pub(crate) retries: u32,
    /// Why it is retried, waits or failed.
    pub(crate) message: Option<String>,
    /// The step that the target last told of.
    pub(crate) step: Option<String>,
    /// The last figures of a long step.
    pub(crate) progress: Option<Value>,
    /// What the verb came to.
    pub(crate) result: Option<Value>,
}

impl Record {
    /// Nothing was begun on its target, nor ordered there.
    pub(super) fn is_untouched(&self) -> bool {
        !self.begun && self.sent == 0 && self.step.is_none() && self.retries == 0
    }

    /// As programs and the web page read it: nothing that opens anything.
    pub(crate) fn object(&self) -> Value {
        serde_json::json!({
            "session": self.id, "cluster": self.cluster, "target": self.target.host, "port": self.target.port,
            "data": self.data, "ordered_by": self.ordered_by, "created_at": self.created_at,
            "updated_at": self.updated_at, "state": self.state.name(), "retries": self.retries,
            "message": self.message, "step": self.step, "progress": self.progress, "result": self.result,
        })
    }
}

/// `<state>/service/sessions`.
#[derive(Clone, Debug)]
pub(super) struct Records {
    directory: PathBuf,
}

impl Records {
    pub(super) fn of(directory: &Path) -> anyhow::Result<Self> {
        let directory = directory.join("sessions");
        std::fs::create_dir_all(&directory).map_err(|cause| Error::io("create", &directory, cause))?;
        Ok(Self { directory })
    }

    pub(super) fn write(&self, record: &Record) -> anyhow::Result<()> {
        let bytes = serde_json::to_vec_pretty(record)?;
        Ok(durable::write_atomically(&self.directory.join(format!("{}.json", record.id)), &bytes, 0o600)?)
    }

    /// Where the session's events are.
    pub(super) fn events(&self, id: &SessionId) -> PathBuf {
        self.directory.join(format!("{id}.events"))
    }

    pub(super) fn remove(&self, id: &SessionId) -> anyhow::Result<()> {
        durable::remove_durably(&self.directory.join(format!("{id}.json")))?;
        Ok(durable::remove_durably(&self.events(id))?)
    }

    /// Takes away events that no record speaks of: of a session that was never promised to anybody.
    pub(super) fn tidy(&self) -> anyhow::Result<()> {
        let failed = |cause| Error::io("list", &self.directory, cause);
        for entry in std::fs::read_dir(&self.directory).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if path.extension() == Some("events".as_ref()) && !path.with_extension("json").exists() {
                durable::remove_durably(&path)?;
            }
        }
        Ok(())
    }

    /// All of them, the oldest first. One that cannot be read is told of in the log and left where it is.
    pub(super) fn read(&self) -> anyhow::Result<Vec<Record>> {
        let failed = |cause| Error::io("list", &self.directory, cause);
        let mut records = Vec::new();
        for entry in std::fs::read_dir(&self.directory).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if path.extension() != Some("json".as_ref()) {
                continue;
            }
            let read = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()));
            match read.and_then(|bytes| Ok(serde_json::from_slice::<Record>(&bytes)?)) {
                Ok(record) => records.push(record),
                Err(error) if error.downcast_ref().map(std::io::Error::kind) == Some(ErrorKind::NotFound) => {}
                Err(error) => tracing::warn!("{} is left alone: {error:#}", path.display()),
            }
        }
        records.sort_by(|one, other| one.id.cmp(&other.id));
        Ok(records)
    }
}
