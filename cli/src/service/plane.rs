//! What the recovery service asks of the mount service, and nothing more: that a session may read one cluster's backups,
//! and that it may no longer.

use engine::units::{ClusterName, SessionId};
use serde_json::Value;

/// The mount service, as the recovery service sees it.
pub(super) trait Plane: Send + Sync {
    /// Lets `session` read, and tells how: the content of the file that its target opens as its repository. `seen_as` is
    /// this machine's address as the target sees it. Asked again, the earlier answer no longer counts.
    fn lease(&self, session: &SessionId, cluster: &ClusterName, seen_as: Option<&str>) -> anyhow::Result<Value>;

    /// Ends what `session` was let read.
    fn end(&self, session: &SessionId);
}

/// Not there yet.
pub(super) struct None;

impl Plane for None {
    fn lease(&self, _: &SessionId, _: &ClusterName, _: Option<&str>) -> anyhow::Result<Value> {
        anyhow::bail!("no data plane")
    }

    fn end(&self, _: &SessionId) {}
}
