//! The verbs on sessions: `sessions`, `retry`, `cancel`, `promote`; `retarget` stands in [`crate::restore::retarget`].

use engine::units::SessionId;

use crate::context::Context;
use crate::exit::Exit;
use crate::options::JsonOption;
use crate::restore::verbs;

/// Options of `sessions`.
#[derive(clap::Args, Debug)]
pub(crate) struct ListArguments {
    /// Finished ones too
    #[arg(long)]
    pub(crate) all: bool,
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

/// Options of `retry`.
#[derive(clap::Args, Debug)]
pub(crate) struct RetryArguments {
    #[command(flatten)]
    pub(crate) session: SessionArguments,
    /// Go on without what `restore --check` asked for
    #[arg(long)]
    pub(crate) skip_check: bool,
}

pub(crate) fn list(arguments: &ListArguments, context: &Context) -> anyhow::Result<Exit> {
    verbs::list(arguments.all, context)
}

pub(crate) fn retry(arguments: &RetryArguments, context: &Context) -> anyhow::Result<Exit> {
    verbs::retry(&arguments.session.id, arguments.skip_check, context)
}

pub(crate) fn cancel(arguments: &SessionArguments, context: &Context) -> anyhow::Result<Exit> {
    verbs::cancel(&arguments.id, context)
}

pub(crate) fn promote(arguments: &SessionArguments, context: &Context) -> anyhow::Result<Exit> {
    verbs::promote(&arguments.id, context)
}
