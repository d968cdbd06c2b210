//! The verb `restore`.

use crate::arguments::{ClusterOption, JsonOption, RepositoryOption};
use crate::context::Context;
use crate::exit::Exit;

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

pub(crate) fn run(_arguments: &Arguments, _context: &Context) -> anyhow::Result<Exit> {
    anyhow::bail!("not built yet")
}
mod conf;
mod moment;
mod target;
