//! The verbs on sessions: `sessions`, `retry`, `cancel`, `promote`.

use engine::units::SessionId;

use crate::arguments::JsonOption;
use crate::context::Context;
use crate::exit::Exit;

/// Options of `sessions`.
#[derive(clap::Args, Debug)]
pub(crate) struct ListArguments {
    #[command(flatten)]
    pub(crate) output: JsonOption,
}

/// Options of the verbs on one session.
#[derive(clap::Args, Debug)]
pub(crate) struct SessionArguments {
    /// The session, as `pghydrant sessions` names it
    pub(crate) id: SessionId,
    #[command(flatten)]
    pub(crate) output: JsonOption,
}

pub(crate) fn list(_arguments: &ListArguments, _context: &Context) -> anyhow::Result<Exit> {
    anyhow::bail!("not built yet")
}

pub(crate) fn retry(_arguments: &SessionArguments, _context: &Context) -> anyhow::Result<Exit> {
    anyhow::bail!("not built yet")
}

pub(crate) fn cancel(_arguments: &SessionArguments, _context: &Context) -> anyhow::Result<Exit> {
    anyhow::bail!("not built yet")
}

pub(crate) fn promote(_arguments: &SessionArguments, _context: &Context) -> anyhow::Result<Exit> {
    anyhow::bail!("not built yet")
}
