//! What every verb is given: the settings, the output, and whether the user wants it to stop.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use engine::repository::{Cluster, Repository};
use engine::units::ClusterName;

use crate::arguments::Verb;
use crate::exit::{Exit, Failure};
use crate::human;
use crate::options::{ClusterOption, Global, RepositoryOption};
use crate::output::Output;
use crate::settings::Settings;
use crate::trust;

/// Bytes of buffers and caches unless `memory` says otherwise.
const MEMORY_BYTES_DEFAULT: u64 = 128 << 20;

/// What every verb is given.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) settings: Settings,
    pub(crate) output: Output,
    state_flag: Option<PathBuf>,
    interrupted: Arc<AtomicBool>,
}

impl Context {
    pub(crate) fn new(global: &Global, verb: &Verb) -> anyhow::Result<Self> {
        start_log(global.verbose);
        let settings =
            if verb.needs_no_settings() { Settings::default() } else { Settings::load(global.config.as_deref())? };
        let interrupted = Arc::new(AtomicBool::new(false));
        let output = Output::new(global.relay, verb.wants_json(), &interrupted);
        if let Some(skipped) = &settings.skipped {
            output.warning(skipped);
        }
        Ok(Self { settings, output, state_flag: global.state.clone(), interrupted })
    }

    /// Turns SIGINT and SIGTERM into [`Context::interrupted`]; a second one ends the process at once.
    /// For verbs that clean up behind themselves; others die of the signal, as usual.
    pub(crate) fn catch_interrupts(&self) -> anyhow::Result<()> {
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            let status = Exit::Interrupted as i32;
            signal_hook::flag::register_conditional_shutdown(signal, status, Arc::clone(&self.interrupted))?;
            signal_hook::flag::register(signal, Arc::clone(&self.interrupted))?;
        }
        Ok(())
    }

    /// Set once the user wants it to stop.
    pub(crate) fn interrupt(&self) -> &Arc<AtomicBool> {
        &self.interrupted
    }

    /// The user wants it to stop.
    pub(crate) fn interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }

    /// The repository's directory, absolute.
    pub(crate) fn repository_path(&self, option: &RepositoryOption) -> anyhow::Result<PathBuf> {
        let Some((path, _)) = self.settings.get("repo", option.repo.clone().map(Into::into)) else {
            return Err(Failure::new(Exit::Usage, "no repository is named")
                .hint("give --repo DIR, set PGHYDRANT_REPO, or write repo = \"DIR\" into pghydrant.toml")
                .into());
        };
        Ok(std::path::absolute(PathBuf::from(path))?)
    }

    /// The repository, open.
    pub(crate) fn repository(&self, option: &RepositoryOption) -> anyhow::Result<Repository> {
        let path = self.repository_path(option)?;
        Repository::open(&path).map_err(|refusal| match refusal {
            engine::Error::NotFound(message) => Failure::new(Exit::Failed, message)
                .hint(format!("`pghydrant init --repo {}` makes one", path.display()))
                .into(),
            other => other.into(),
        })
    }

    /// The cluster's name.
    pub(crate) fn cluster_name(&self, option: &ClusterOption) -> anyhow::Result<ClusterName> {
        match self.optional_cluster_name(option)? {
            Some(name) => Ok(name),
            None => Err(Failure::new(Exit::Usage, "no cluster is named")
                .hint("give --cluster NAME, set PGHYDRANT_CLUSTER, or write cluster = \"NAME\" into pghydrant.toml")
                .into()),
        }
    }

    /// The cluster's name, for verbs that also work on all clusters.
    pub(crate) fn optional_cluster_name(&self, option: &ClusterOption) -> anyhow::Result<Option<ClusterName>> {
        let flag = option.cluster.as_ref().map(|name| OsString::from(name.as_str()));
        let Some((name, source)) = self.settings.get("cluster", flag) else { return Ok(None) };
        let name = name.to_string_lossy().into_owned();
        let parsed = ClusterName::try_from(name);
        parsed.map(Some).map_err(|refusal| Failure::new(Exit::Usage, format!("{refusal} (from {source})")).into())
    }

    /// The cluster, open.
    pub(crate) fn cluster(&self, repository: &RepositoryOption, cluster: &ClusterOption) -> anyhow::Result<Cluster> {
        let name = self.cluster_name(cluster)?;
        Ok(self.repository(repository)?.cluster(&name)?)
    }

    /// Where sessions are kept: made by whoever writes the first. Root refuses a place of another user's.
    pub(crate) fn state_directory(&self) -> anyhow::Result<PathBuf> {
        let directory = self.state_path()?;
        for place in [directory.clone(), directory.join("sessions"), directory.join("mounts")] {
            trust::refuse_foreign_place(&place)?;
        }
        Ok(directory)
    }

    /// The same, whoever's it is: to look at, and to say.
    pub(crate) fn state_path(&self) -> anyhow::Result<PathBuf> {
        if let Some((path, _)) = self.settings.get("state", self.state_flag.clone().map(Into::into)) {
            return Ok(std::path::absolute(PathBuf::from(path))?);
        }
        if rustix::process::geteuid().is_root() {
            return Ok("/var/lib/pghydrant".into());
        }
        let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/state"));
        match std::env::var_os("XDG_STATE_HOME").map(PathBuf::from).or_else(home) {
            Some(directory) => Ok(directory.join("pghydrant")),
            None => Err(Failure::new(Exit::Usage, "HOME is not set, so there is no place for sessions")
                .hint("give --state DIR")
                .into()),
        }
    }

    /// Bytes for buffers and caches.
    pub(crate) fn memory_bytes(&self) -> anyhow::Result<u64> {
        let Some((text, source)) = self.settings.get("memory", None) else { return Ok(MEMORY_BYTES_DEFAULT) };
        let parsed = human::parse_bytes(&text.to_string_lossy());
        parsed.map_err(|refusal| Failure::new(Exit::Usage, format!("memory: {refusal} (from {source})")).into())
    }

    /// Workers of a backup: as many as the memory has buffers for.
    pub(crate) fn backup_workers(&self, worker_bytes: u64) -> anyhow::Result<usize> {
        let served = usize::try_from(self.memory_bytes()? / worker_bytes).unwrap_or(usize::MAX);
        Ok(self.workers()?.min(served).max(1))
    }

    /// Bytes a second that a backup may read; none without a limit.
    pub(crate) fn rate_limit(&self, flag: Option<&str>) -> anyhow::Result<Option<u64>> {
        let Some((text, source)) = self.settings.get("rate_limit", flag.map(Into::into)) else { return Ok(None) };
        let refuse = |refusal: String| Failure::new(Exit::Usage, format!("rate limit: {refusal} (from {source})"));
        match human::parse_bytes(&text.to_string_lossy()) {
            Ok(0) => Err(refuse("0 bytes a second would never end".to_owned()).into()),
            Ok(limit) => Ok(Some(limit)),
            Err(refusal) => Err(refuse(refusal).into()),
        }
    }

    /// Workers of copies and backups: every core unless set.
    pub(crate) fn workers(&self) -> anyhow::Result<usize> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let Some((text, source)) = self.settings.get("workers", None) else { return Ok(cores) };
        let text = text.to_string_lossy();
        match text.parse() {
            Ok(workers @ 1..=256) => Ok(workers),
            _ => Err(Failure::new(Exit::Usage, format!("workers: \"{text}\" is not 1 to 256 (from {source})")).into()),
        }
    }
}

fn start_log(verbose: u8) {
    let level = match verbose {
        0 => "warn",
        1 => "info",
        _ => "debug",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("PGHYDRANT_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
    // A second start in one process (tests) keeps the first.
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let _ = log.with_ansi(std::io::stderr().is_terminal()).try_init();
}
