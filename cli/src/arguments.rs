//! What the command line takes. Each verb's own options stand in the verb's module.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use engine::units::ClusterName;

use crate::{backup, demo, doctor, exit, init, list, mount, restore, sessions, show, verify, wal};

/// The fastest and most trustworthy way to get a PostgreSQL database back.
#[derive(Debug, Parser)]
#[command(name = "pghydrant", version, max_term_width = 110, after_help = exit::TABLE, after_long_help = exit::TABLE)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

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
}

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

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Create a repository
    Init(init::Arguments),
    /// Back up a running cluster
    Backup(backup::Arguments),
    /// The WAL archive: archive_command and restore_command
    #[command(subcommand)]
    Wal(WalVerb),
    /// Backups of a repository
    List(list::Arguments),
    /// One cluster or backup in detail: recovery window, WAL gaps, damaged pages, sizes
    Show(show::Arguments),
    /// Mount a backup as a read-only directory
    Mount(mount::Arguments),
    /// Take a mount away
    Unmount(mount::UnmountArguments),
    /// The file system's own process
    #[command(hide = true)]
    FuseServer(mount::ServerArguments),
    /// Copy, configure, start, recover, finish
    Restore(restore::Arguments),
    /// What runs, what waits, what broke and why
    Sessions(sessions::ListArguments),
    /// Go on with a session where it stopped
    Retry(sessions::SessionArguments),
    /// Give a session up and take away what it made
    Cancel(sessions::SessionArguments),
    /// End the recovery of a session that was paused or shut down at its target
    Promote(sessions::SessionArguments),
    /// Read every block of backups and their WAL and check it
    Verify(verify::Arguments),
    /// What this machine lacks, with the command that cures it
    Doctor(doctor::Arguments),
    /// All of it on a throw-away cluster
    Demo(demo::Arguments),
}

#[derive(Debug, Subcommand)]
pub(crate) enum WalVerb {
    /// archive_command: 'pghydrant wal push --repo DIR --cluster NAME %p'
    Push(wal::PushArguments),
    /// restore_command: 'pghydrant wal fetch --repo DIR --cluster NAME %f %p'
    Fetch(wal::FetchArguments),
}

impl Verb {
    /// Whether stdout is read by a program.
    pub(crate) fn wants_json(&self) -> bool {
        match self {
            Self::Init(_) | Self::Wal(_) | Self::Mount(_) | Self::Unmount(_) | Self::FuseServer(_) | Self::Demo(_) => {
                false
            }
            Self::Backup(arguments) => arguments.output.json,
            Self::List(arguments) => arguments.output.json,
            Self::Show(arguments) => arguments.output.json,
            Self::Restore(arguments) => arguments.output.json,
            Self::Sessions(arguments) => arguments.output.json,
            Self::Retry(arguments) | Self::Cancel(arguments) | Self::Promote(arguments) => arguments.output.json,
            Self::Verify(arguments) => arguments.output.json,
            Self::Doctor(arguments) => arguments.output.json,
        }
    }
}
