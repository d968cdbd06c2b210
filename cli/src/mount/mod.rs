//! The verbs `mount` and `unmount`, the file system's own process, and the mount that a restore works from.
//!
//! The FUSE server is a process apart from every reader of its mount: a reader inside it could wait for itself, and then
//! nothing can kill it. So `mount` starts this program again as `fuse-server`, hands it a [`protocol::Request`] over its
//! stdin, and waits for its answer:
//!
//! ```text
//! mount, restore ──stdin: request──> fuse-server ──mounts, serves──> kernel <── readers
//!                <─stdout: answer───
//! ```
//!
//! The server of a restore keeps reading its stdin: when that ends, its restore is gone, however it went, and the server
//! takes the mount away and ends too. When the server is killed its readers get errors, and whoever mounts there next
//! takes the dead mount away first. When it hangs its readers hang with it: the restore keeps a [`watch`], and wakes them.

mod launch;
mod place;
mod protocol;
mod server;
mod session;
mod unmount;
mod usable;
mod watch;

use std::path::PathBuf;

use engine::repository::Cluster;
use engine::units::BackupLabel;
use fusefs::mounting;

use crate::context::Context;
use crate::exit::{Exit, Failure};
use crate::human;
use crate::options::{ClusterOption, RepositoryOption};

pub(crate) use place::default_directory;
pub(crate) use session::{MountRequest, SessionMount};
pub(crate) use usable::{Reason, fuse_usable};

/// Memory of a mount unless it is told: enough for full read-ahead of a few streams and for a thousand blocks.
pub(crate) const MEMORY_BYTES_DEFAULT: u64 = 64 << 20;

/// Options of `mount`.
#[derive(clap::Args, Debug)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) repository: RepositoryOption,
    #[command(flatten)]
    pub(crate) cluster: ClusterOption,
    /// Which backup
    #[arg(long, value_name = "LABEL", default_value = "latest")]
    pub(crate) backup: String,
    /// Stay in the foreground and log to stderr; SIGINT or SIGTERM unmounts
    #[arg(long)]
    pub(crate) foreground: bool,
    /// Let other users read the mount, as far as the modes of its files do
    #[arg(long)]
    pub(crate) allow_other: bool,
    /// Memory for read-ahead and decoded blocks
    #[arg(long, value_name = "SIZE", value_parser = human::parse_bytes)]
    pub(crate) memory: Option<u64>,
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
    /// For whoever lists processes: the request on stdin counts
    pub(crate) mountpoint: PathBuf,
}

/// `mount`: everything that can be refused is refused here, before a process is started.
pub(crate) fn run(arguments: &Arguments, context: &Context) -> anyhow::Result<Exit> {
    let cluster = context.cluster(&arguments.repository, &arguments.cluster)?;
    let backup = chosen_backup(&cluster, &arguments.backup)?;
    usable::refuse_unless_usable()?;
    if arguments.allow_other {
        usable::refuse_unless_others_allowed()?;
    }
    let mountpoint = fusefs::table::resolve(&arguments.mountpoint)?;
    if unmount::clear_stale(&mountpoint)? {
        context.output.note(&format!("took away a mount at {} whose server was gone", mountpoint.display()));
    }
    mounting::refuse_unless_empty(&mountpoint)?;
    let request = protocol::Request {
        repository: cluster.repository().root().to_owned(),
        cluster: cluster.name().clone(),
        backup,
        owner: usable::own_owner(),
        allow_other: arguments.allow_other,
        memory_bytes: arguments.memory.unwrap_or(MEMORY_BYTES_DEFAULT),
        token: launch::new_token()?,
        with_parent: false,
        mountpoint,
    };
    if arguments.foreground {
        server::serve_in_foreground(&request)?;
        return Ok(Exit::Done);
    }
    let log = context.state_directory()?.join("mounts").join(launch::log_name(&request.mountpoint));
    let server = launch::Server::start(&request, &log)?;
    let shown = format!("{}/{}", request.cluster, request.backup);
    let text = format!("{shown} is mounted at {}; log: {}", request.mountpoint.display(), log.display());
    context.output.result(&text, &serde_json::json!({"mountpoint": request.mountpoint, "backup": request.backup}));
    server.leave();
    Ok(Exit::Done)
}

/// `unmount`.
pub(crate) fn unmount(arguments: &UnmountArguments, context: &Context) -> anyhow::Result<Exit> {
    unmount::run(arguments, context)
}

/// `fuse-server`.
pub(crate) fn serve(_arguments: &ServerArguments, _context: &Context) -> anyhow::Result<Exit> {
    server::run()
}

fn chosen_backup(cluster: &Cluster, chosen: &str) -> anyhow::Result<BackupLabel> {
    if chosen == "latest" {
        let latest = cluster.labels()?.pop();
        return latest.ok_or_else(|| {
            Failure::new(Exit::Failed, format!("cluster \"{}\" has no backup yet", cluster.name()))
                .hint("pghydrant backup makes one")
                .into()
        });
    }
    let label = BackupLabel::try_from(chosen.to_owned()).map_err(|refusal| Failure::new(Exit::Usage, refusal))?;
    // Refused here, in this process, with the names that there are.
    Ok(cluster.backup_info(&label)?.label)
}
