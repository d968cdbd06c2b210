//! The verbs `mount` and `unmount`, and the file system's own process.

use std::path::PathBuf;

use crate::arguments::{ClusterOption, RepositoryOption};
use crate::context::Context;
use crate::exit::Exit;

/// Options of `mount`.
#[derive(clap::Args, Debug)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) repository: RepositoryOption,
    #[command(flatten)]
    pub(crate) cluster: ClusterOption,
    /// An empty directory
    pub(crate) mountpoint: PathBuf,
}

/// Options of `unmount`.
#[derive(clap::Args, Debug)]
pub(crate) struct UnmountArguments {
    /// The directory that `mount` was given
    pub(crate) mountpoint: PathBuf,
}

/// Options of the file system's own process.
#[derive(clap::Args, Debug)]
pub(crate) struct ServerArguments {
    /// An empty directory
    pub(crate) mountpoint: PathBuf,
}

pub(crate) fn run(_arguments: &Arguments, _context: &Context) -> anyhow::Result<Exit> {
    anyhow::bail!("not built yet")
}

pub(crate) fn unmount(_arguments: &UnmountArguments, _context: &Context) -> anyhow::Result<Exit> {
    anyhow::bail!("not built yet")
}

pub(crate) fn serve(_arguments: &ServerArguments, _context: &Context) -> anyhow::Result<Exit> {
    anyhow::bail!("not built yet")
}
