//! The verbs `wal push` and `wal fetch`.

use std::path::PathBuf;

use crate::arguments::{ClusterOption, RepositoryOption};
use crate::context::Context;
use crate::exit::Exit;

/// Options of `wal push`.
#[derive(clap::Args, Debug)]
pub(crate) struct PushArguments {
    #[command(flatten)]
    pub(crate) repository: RepositoryOption,
    #[command(flatten)]
    pub(crate) cluster: ClusterOption,
    /// The file to archive (%p)
    pub(crate) path: PathBuf,
}

/// Options of `wal fetch`.
#[derive(clap::Args, Debug)]
pub(crate) struct FetchArguments {
    #[command(flatten)]
    pub(crate) repository: RepositoryOption,
    #[command(flatten)]
    pub(crate) cluster: ClusterOption,
    /// The name of the file to bring (%f)
    pub(crate) name: String,
    /// Where to put it (%p)
    pub(crate) path: PathBuf,
}

pub(crate) fn push(_arguments: &PushArguments, _context: &Context) -> anyhow::Result<Exit> {
    anyhow::bail!("not built yet")
}

pub(crate) fn fetch(_arguments: &FetchArguments, _context: &Context) -> anyhow::Result<Exit> {
    anyhow::bail!("not built yet")
}
