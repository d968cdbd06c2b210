//! Options that several verbs share.

use std::path::PathBuf;

use clap::Args;
use engine::units::ClusterName;

/// Options of every verb.
#[derive(Args, Debug, Default)]
pub(crate) struct Global {
    /// Settings file [default: ./pghydrant.toml, then the user's, then /etc/pghydrant/pghydrant.toml]
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Where sessions are kept [default: /var/lib/pghydrant, or the user's state directory]
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) state: Option<PathBuf>,
    /// Say more (-v) or much more (-vv) on stderr
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
    #[command(flatten)]
    pub(crate) server: ServerOptions,
    /// Output for another process of ours
    #[arg(long, global = true, hide = true)]
    pub(crate) relay: bool,
}

/// Which mount server does it, and how that is asked.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct ServerOptions {
    /// Have the mount server at this address do it: https://HOST:PORT [PGHYDRANT_SERVER]
    #[arg(long, global = true, value_name = "URL", help_heading = SERVER)]
    pub(crate) server: Option<String>,
    /// File that holds the token for it [PGHYDRANT_TOKEN_FILE]
    #[arg(long, global = true, value_name = "FILE", help_heading = SERVER)]
    pub(crate) token_file: Option<PathBuf>,
    /// The fingerprint of its certificate, SHA256:… [default: the one seen the first time]
    #[arg(long, global = true, value_name = "SHA256:…", help_heading = SERVER)]
    pub(crate) fingerprint: Option<String>,
}

const SERVER: &str = "Mount server";

/// Which repository.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct RepositoryOption {
    /// The backup repository [PGHYDRANT_REPO]
    #[arg(long, value_name = "DIR")]
    pub(crate) repo: Option<PathBuf>,
}

/// Which cluster of the repository.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct ClusterOption {
    /// The cluster's name in the repository [PGHYDRANT_CLUSTER]
    #[arg(long, value_name = "NAME")]
    pub(crate) cluster: Option<ClusterName>,
}

/// Who reads the output.
#[derive(Args, Clone, Copy, Debug, Default)]
pub(crate) struct JsonOption {
    /// One JSON object a line on stdout
    #[arg(long)]
    pub(crate) json: bool,
}
