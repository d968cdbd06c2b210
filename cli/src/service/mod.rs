//! The verb `serve`: the mount server's two services in one process.
//!
//! ```text
//! control port   HTTPS with JSON: command lines, sessions, metrics, a page       control, https, commands, metrics, page
//! recovery       restores on targets over SSH, each driven to its end             sessions, target, address
//! mount          blocks of what a session may read, to its target                 plane, data
//! ```
//!
//! Recovery asks the mount service two things ([`plane::Plane`]) and knows no block; the mount service knows no target.
//! What a restore *is* neither of them knows: the target runs the same binary and the same steps as a restore without any
//! service (`crate::restore`), through its agent (`crate::agent`).

mod address;
mod certificate;
mod commands;
pub(crate) mod control;
mod data;
mod https;
mod metrics;
mod notify;
mod page;
mod plane;
mod sessions;
mod target;
mod tokens;
mod tunnel;

use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use engine::remote::Security;
use engine::repository::Repository;
use engine::store::LocalStore;
use serde_json::json;
use tokio::net::TcpListener;

use crate::context::Context;
use crate::exit::{Exit, Failure};
use crate::human;
use crate::options::RepositoryOption;
use certificate::Certificate;
use control::Control;
use plane::{MountService, Plane};
use sessions::{Policy, Program, Sessions};
use tokens::Tokens;

/// Options of the verb.
#[derive(clap::Args, Debug)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) repository: RepositoryOption,
    /// Where clients give their orders
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:7432")]
    pub(crate) listen: SocketAddr,
    /// Where targets fetch blocks
    #[arg(long, value_name = "ADDR:PORT", default_value = "0.0.0.0:7433")]
    pub(crate) data_listen: SocketAddr,
    /// How blocks are protected on their way: plain is for networks that are private already
    #[arg(long, value_enum, default_value_t, value_name = "HOW")]
    pub(crate) data_plane: Protection,
    /// The most that targets together read a second, such as 200M [default: no limit]
    #[arg(long, value_name = "RATE", value_parser = human::parse_rate)]
    pub(crate) rate_limit: Option<u64>,
    /// The most that one session reads a second [default: no limit]
    #[arg(long, value_name = "RATE", value_parser = human::parse_rate)]
    pub(crate) session_rate_limit: Option<u64>,
    /// How the repository is read: plain is by threads, without io_uring
    #[arg(long, value_enum, default_value_t, hide = true)]
    pub(crate) io: Io,
    /// How often a restore that fails is tried again by itself
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub(crate) retries: u32,
    /// The time between, such as 30s or 5m
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = duration)]
    pub(crate) retry_every: Duration,
    /// Sessions that are worked on at once
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub(crate) max_sessions: u32,
    /// Certificate to show, PEM, with what is above it [default: one that is made on the first start]
    #[arg(long, value_name = "FILE", requires = "key")]
    pub(crate) certificate: Option<PathBuf>,
    /// The key to it, PEM
    #[arg(long, value_name = "FILE", requires = "certificate")]
    pub(crate) key: Option<PathBuf>,
    /// How targets are reached: an ssh_config(5) in place of this user's own
    #[arg(long, value_name = "FILE")]
    pub(crate) ssh_config: Option<PathBuf>,
    /// Print a new token, once, and stop
    #[arg(long, value_name = "NAME", conflicts_with = "revoke_token")]
    pub(crate) issue_token: Option<String>,
    /// Take a token away, and stop
    #[arg(long, value_name = "NAME")]
    pub(crate) revoke_token: Option<String>,
}

/// How blocks cross the network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Protection {
    /// TLS 1.3
    #[default]
    Tls,
    /// Nothing
    Plain,
}

/// How the repository is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Io {
    #[default]
    Auto,
    Plain,
}

/// A target waits so long for the mount server at least.
const PATIENCE_MIN: Duration = Duration::from_secs(10);

pub(crate) fn run(arguments: &Arguments, context: &Context) -> anyhow::Result<Exit> {
    let state = context.state_directory()?;
    let directory = state.join("service");
    make(&directory)?;
    let tokens = Tokens::of(&directory);
    if let Some(name) = &arguments.issue_token {
        let token = tokens.issue(name)?;
        context.output.result(&token, &json!({"token": token, "name": name}));
        return Ok(Exit::Done);
    }
    if let Some(name) = &arguments.revoke_token {
        tokens.revoke(name)?;
        context.output.result(&format!("token {name} opens nothing any more"), &json!({"revoked": name}));
        return Ok(Exit::Done);
    }
    // Opened now, so that a service without a repository does not start.
    let repository = context.repository(&arguments.repository)?.root().to_owned();
    let certificate = match (&arguments.certificate, &arguments.key) {
        (Some(chain), Some(key)) => Certificate::read(chain, key)?,
        _ => Certificate::own(&directory)?,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start threads")?;
    runtime.block_on(serve(arguments, context, repository, state, certificate, tokens))
}

async fn serve(
    arguments: &Arguments,
    context: &Context,
    repository: PathBuf,
    state: PathBuf,
    certificate: Certificate,
    tokens: Tokens,
) -> anyhow::Result<Exit> {
    let fingerprint = certificate.fingerprint();
    let tls = certificate.server_config()?;
    let (security, data_tls) = match arguments.data_plane {
        Protection::Tls => (Security::Tls(fingerprint), Some(Arc::clone(&tls))),
        Protection::Plain => (Security::Plain, None),
    };
    let listener = listen(arguments.listen).await?;
    let policy = Policy {
        retries: arguments.retries,
        retry_every: arguments.retry_every,
        sessions_max: arguments.max_sessions as usize,
    };
    let directory = state.join("service");
    let from_settings = || context.rate_limit(None);
    let rate_limit = arguments.rate_limit.map_or_else(from_settings, |limit| Ok(Some(limit)))?;
    let settings = data::Settings {
        listen: arguments.data_listen,
        tls: data_tls,
        store: LocalStore::new(&repository),
        bytes_a_second_max: rate_limit,
        with_ring: arguments.io == Io::Auto,
    };
    let data = data::DataPlane::start(settings, Arc::default())
        .map_err(|cause| Failure::new(Exit::Failed, format!("cannot listen on {}: {cause}", arguments.data_listen)))?;
    let data_address = data.address();
    let patience = arguments.retry_every.saturating_mul(arguments.retries).max(PATIENCE_MIN);
    let repository_of_plane = Repository::open(&repository)?;
    let limit = arguments.session_rate_limit;
    let plane = MountService::new(data, repository_of_plane, security, patience, limit, &directory)?;
    let plane = Arc::new(plane);
    let ssh_config = arguments.ssh_config.as_ref().map(std::path::absolute).transpose()?;
    let sessions = Sessions::open(&directory, policy, Program::own(ssh_config)?, Arc::clone(&plane) as Arc<dyn Plane>)?;
    let refused = Arc::default();
    let issued = tokens.count()?;
    let commands = control::commands_at_once();
    let control = Control { repository, state, tokens, sessions, plane, refused: Arc::clone(&refused), commands };
    let address = listener.local_addr().context("cannot tell where it listens")?;
    let text = format!("serving on https://{address}, blocks on {data_address}, certificate {fingerprint}");
    let object = json!({
        "listen": address.to_string(), "data_listen": data_address.to_string(), "fingerprint": fingerprint.to_string(),
    });
    context.output.result(&text, &object);
    if issued == 0 {
        context.output.note("nobody has a token yet: `pghydrant serve --issue-token NAME` makes one");
    }
    notify::tell("READY=1");
    let mut term = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        () = https::serve(listener, tls, control::router(control), refused) => {}
        _ = tokio::signal::ctrl_c() => {}
        _ = term.recv() => {}
        () = notify::live() => {}
    }
    notify::tell("STOPPING=1");
    // What runs on targets goes on there, and is followed again by the next service.
    Ok(Exit::Done)
}

async fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .map_err(|cause| Failure::new(Exit::Failed, format!("cannot listen on {address}: {cause}")).into())
}

fn make(directory: &Path) -> anyhow::Result<()> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory);
    made.map_err(|cause| engine::Error::io("create", directory, cause))?;
    crate::trust::refuse_foreign_place(directory)
}

/// `30s`, `5m`, `1h`, or seconds.
fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let seconds = match unit {
        "" | "s" => 1,
        "m" | "min" => 60,
        "h" => 3600,
        _ => return Err(format!("\"{text}\" is no time such as 30s or 5m")),
    };
    let number: u64 = number.parse().map_err(|_| format!("\"{text}\" is no time such as 30s or 5m"))?;
    number.checked_mul(seconds).map(Duration::from_secs).ok_or_else(|| format!("\"{text}\" is too long"))
}
