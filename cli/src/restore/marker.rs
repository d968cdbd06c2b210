//! The mark of a copy: `pg_wal/pghydrant.copy`.
//!
//! A copy beside its original has the original's `archive_command` in its configuration. Should somebody turn
//! archiving on again, its WAL would go into the original's archive under the same names. So `wal push` looks for
//! this file beside the segment, and refuses. It lies in `pg_wal`, which `pg_verifybackup` and base backups leave out:
//! a backup of the copy is not marked.

use std::path::Path;

use engine::io::durable;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::plan::Plan;
use engine::units::{BackupLabel, ClusterName, SessionId};

/// Where it lies in a data directory.
pub(crate) const PATH: &str = "pg_wal/pghydrant.copy";

/// What the mark says, to people.
#[derive(Debug, Serialize, Deserialize)]
struct Mark {
    session: SessionId,
    cluster: ClusterName,
    backup: BackupLabel,
    restored_at: Timestamp,
    meaning: String,
}

/// Marks the data directory as a copy.
pub(crate) fn set(plan: &Plan, session: &SessionId) -> anyhow::Result<()> {
    let mark = Mark {
        session: session.clone(),
        cluster: plan.cluster.clone(),
        backup: plan.backup.clone(),
        restored_at: Timestamp::now(),
        meaning: "an isolated copy: `pghydrant wal push` refuses to archive from here; \
                  remove this file once the original is gone for good"
            .to_owned(),
    };
    let path = plan.data().join(PATH);
    durable::write_atomically(&path, &serde_json::to_vec_pretty(&mark)?, 0o600)?;
    super::files::give(&path, &plan.owner)
}

/// Takes the mark away, if it is there.
pub(crate) fn remove(data: &Path) -> anyhow::Result<()> {
    Ok(durable::remove_durably(&data.join(PATH))?)
}
