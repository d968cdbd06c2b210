//! The verbs of the command line. Each verb's own options stand in the verb's module, shared ones in [`crate::options`].

use clap::{Parser, Subcommand};

use crate::options::Global;
use crate::{agent, backup, demo, doctor, exit, init, list, mount, restore, service, sessions, show, verify, wal};

/// The fastest and most trustworthy way to get a PostgreSQL database back.
#[derive(Debug, Parser)]
#[command(name = "pghydrant", version, max_term_width = 110, after_help = exit::TABLE, after_long_help = exit::TABLE)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) verb: Verb,
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
    Restore(Box<restore::Arguments>),
    /// What runs, what waits, what broke and why
    Sessions(sessions::ListArguments),
    /// Go on with a session where it stopped
    Retry(sessions::RetryArguments),
    /// Give a session up and take away what it made
    Cancel(sessions::SessionArguments),
    /// End the recovery of a session that was paused or shut down at its target
    Promote(sessions::SessionArguments),
    /// Move a session that was paused or shut down at its target on to a later one
    Retarget(restore::retarget::Arguments),
    /// Read every block of backups and their WAL and check it
    Verify(verify::Arguments),
    /// The mount server: restores on other machines, ordered from anywhere
    Serve(service::Arguments),
    /// A restore that a mount server has ordered
    #[command(subcommand, hide = true)]
    Agent(agent::Verb),
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
    /// Whether nothing that a settings file or the environment could say matters. A server runs such a command as its
    /// owner, who may be unable to read a file that was made for others.
    pub(crate) fn needs_no_settings(&self) -> bool {
        match self {
            Self::Wal(WalVerb::Push(wal::PushArguments { repository, cluster, .. }))
            | Self::Wal(WalVerb::Fetch(wal::FetchArguments { repository, cluster, .. })) => {
                repository.repo.is_some() && cluster.cluster.is_some()
            }
            _ => false,
        }
    }

    /// Whether stdout is read by a program.
    pub(crate) fn wants_json(&self) -> bool {
        match self {
            Self::Init(_)
            | Self::Wal(_)
            | Self::Mount(_)
            | Self::Unmount(_)
            | Self::FuseServer(_)
            | Self::Serve(_)
            | Self::Agent(_)
            | Self::Demo(_) => false,
            Self::Backup(arguments) => arguments.output.json,
            Self::List(arguments) => arguments.output.json,
            Self::Show(arguments) => arguments.output.json,
            Self::Restore(arguments) => arguments.output.json,
            Self::Sessions(arguments) => arguments.output.json,
            Self::Retry(arguments) => arguments.session.output.json,
            Self::Cancel(arguments) | Self::Promote(arguments) => arguments.output.json,
            Self::Retarget(arguments) => arguments.output.json,
            Self::Verify(arguments) => arguments.output.json,
            Self::Doctor(arguments) => arguments.output.json,
        }
    }
}
