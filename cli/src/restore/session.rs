//! The journal of a restore: what was planned, how far it is, and how it ended.
//!
//! A journal is one JSON file in the state directory, replaced atomically and durably *before* each step that it
//! announces, so after a crash it names the step that may be half done, never one too early. Every step can be done
//! again; what must not be done twice is guarded by [`Phase`]: from [`Phase::Recovering`] on a postmaster may have
//! run in the directory, and no block and no `pg_control` is written there again.
//!
//! `<id>.lock` beside the journal is held by whoever drives the session; the kernel lets go of it when that process
//! dies. Whose a data directory is, the map in it says, to restores that know another state directory as well.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use engine::io::durable;
use engine::units::SessionId;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::configure::Originals;
use super::delta::wal::SavedWal;
use super::isolation::Isolation;
use super::plan::Plan;
use crate::exit::{Exit, Failure};
use crate::random;
use crate::trust;

/// How far a restore is: the step that has begun, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Phase {
    /// A delta alone: the cluster is as it was, and its WAL is being saved.
    Saving,
    /// Directories, files and blocks are being written.
    Copying,
    /// Every block is there; the configuration is being written.
    Configuring,
    /// `pg_control` is being put in place.
    Publishing,
    /// The server has been started: the copy is closed for good.
    Recovering,
    /// Recovery has ended; the server is being checked before it opens for others.
    Checking,
    /// Recovery has ended; the configuration is being reverted.
    Reverting,
    /// Nothing is left to do.
    Finished,
}

impl Phase {
    /// For people.
    pub(crate) const fn text(self) -> &'static str {
        match self {
            Self::Saving => "saving WAL",
            Self::Copying => "copying",
            Self::Configuring => "writing the configuration",
            Self::Publishing => "making the copy startable",
            Self::Recovering => "recovering",
            Self::Checking => "checking the restored server",
            Self::Reverting => "reverting the configuration",
            Self::Finished => "finished",
        }
    }
}

/// Why a session stopped before its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Broken {
    pub(crate) at: Timestamp,
    pub(crate) message: String,
    pub(crate) exit: u8,
}

/// One step that was done, for the report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct StepDone {
    pub(crate) step: String,
    pub(crate) seconds: f64,
    pub(crate) detail: String,
}

/// The journal's content. Fields are only ever added.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Journal {
    pub(crate) id: SessionId,
    pub(crate) version: String,
    pub(crate) created_at: Timestamp,
    pub(crate) updated_at: Timestamp,
    pub(crate) phase: Phase,
    pub(crate) plan: Plan,
    /// The server paused or shut down at its target and waits for `promote`: where it says that it stopped.
    pub(crate) at_target: Option<String>,
    /// The target was moved on, and the server may still run with the one before.
    #[serde(default)]
    pub(crate) moves_on: bool,
    /// Settings that were raised for the recovery: the original raised them after the backup.
    #[serde(default)]
    pub(crate) raised: std::collections::BTreeMap<String, String>,
    /// What `--check` came to.
    #[serde(default)]
    pub(crate) checked: Option<super::check::Checked>,
    /// Databases that the extension of the check is put into, and taken out of again.
    #[serde(default)]
    pub(crate) amcheck_in: Vec<String>,
    /// WAL of the cluster that a delta overwrites.
    #[serde(default)]
    pub(crate) saved_wal: Option<SavedWal>,
    /// The configuration as the backup has it, once it has been edited.
    pub(crate) originals: Option<Originals>,
    /// How the copy is kept from what its original does, once that is decided.
    #[serde(default)]
    pub(crate) isolation: Option<Isolation>,
    /// Where the session's mount is, while it should be there.
    pub(crate) mount: Option<PathBuf>,
    pub(crate) broken: Option<Broken>,
    pub(crate) steps: Vec<StepDone>,
    /// How many times the session was driven.
    pub(crate) attempts: u32,
}

/// A session that this process drives.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) journal: Journal,
    store: Store,
    /// Held while the session is driven; the kernel lets go of it with the process.
    _lock: File,
}

impl Session {
    /// The next step begins: it is in the journal before anything of it is done.
    pub(crate) fn enter(&mut self, phase: Phase) -> anyhow::Result<()> {
        // Never back: what a later step has promised holds, whatever is done again.
        self.journal.phase = self.journal.phase.max(phase);
        self.save()
    }

    /// Writes the journal.
    pub(crate) fn save(&mut self) -> anyhow::Result<()> {
        self.journal.updated_at = Timestamp::now();
        self.store.write(&self.journal)
    }

    /// Notes why it stopped. Whatever goes wrong with that must not hide the reason itself.
    pub(crate) fn note_failure(&mut self, error: &anyhow::Error) {
        let exit = Failure::exit_of(error) as u8;
        self.journal.broken = Some(Broken { at: Timestamp::now(), message: format!("{error:#}"), exit });
        if let Err(second) = self.save() {
            tracing::warn!("the journal of session {} does not say why it stopped: {second:#}", self.journal.id);
        }
    }

    /// A step of the report.
    pub(crate) fn note_step(&mut self, step: &str, seconds: f64, detail: impl Into<String>) {
        self.journal.steps.push(StepDone { step: step.to_owned(), seconds, detail: detail.into() });
    }

    /// Where the server of the session's mount logs.
    pub(crate) fn mount_log(&self) -> PathBuf {
        self.store.directory.join(format!("{}.mount.log", self.journal.id))
    }

    /// The mount is gone, and had nothing to say.
    pub(crate) fn remove_mount_log(&self) -> anyhow::Result<()> {
        Ok(durable::remove_durably(&self.mount_log())?)
    }

    /// Removes the journal: nothing is left to tell.
    pub(crate) fn forget(self) -> anyhow::Result<()> {
        self.remove_mount_log()?;
        self.store.remove(&self.journal.id)
    }
}

/// A journal and the process that drives it, or why it cannot be read.
pub(crate) type Listed = anyhow::Result<(Journal, Option<u32>)>;

/// `<state>/sessions`.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    directory: PathBuf,
}

/// Longer than a list of sessions looks at one of them.
const LISTING: Duration = Duration::from_millis(200);
/// How many journals of finished restores are kept.
const FINISHED_KEPT: usize = 50;

impl Store {
    /// The sessions of a state directory, which need not exist yet.
    pub(crate) fn of(state_directory: &Path) -> Self {
        Self { directory: state_directory.join("sessions") }
    }

    /// The journal's path.
    pub(crate) fn journal_path(&self, id: &SessionId) -> PathBuf {
        self.directory.join(format!("{id}.json"))
    }

    /// Begins a session: the journal is on disk when this returns.
    pub(crate) fn begin(&self, plan: Plan, id: Option<SessionId>) -> anyhow::Result<Session> {
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(&self.directory).map_err(|cause| engine::Error::io("create", &self.directory, cause))?;
        let now = Timestamp::now();
        let id = id.map_or_else(|| self.free_id(now), Ok)?;
        let lock = self.lock(&id)?;
        let journal = Journal {
            id,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            created_at: now,
            updated_at: now,
            phase: if plan.delta.is_some() { Phase::Saving } else { Phase::Copying },
            plan,
            at_target: None,
            moves_on: false,
            raised: std::collections::BTreeMap::new(),
            checked: None,
            amcheck_in: Vec::new(),
            saved_wal: None,
            originals: None,
            isolation: None,
            mount: None,
            broken: None,
            steps: Vec::new(),
            attempts: 1,
        };
        self.write(&journal)?;
        self.sweep();
        Ok(Session { journal, store: self.clone(), _lock: lock })
    }

    /// Takes a session up again: refused while another process drives it.
    pub(crate) fn open(&self, id: &SessionId) -> anyhow::Result<Session> {
        self.read(id)?;
        let lock = self.lock(id)?;
        // Again under the lock: the process that held it may have gone on.
        let journal = self.read(id)?;
        Ok(Session { journal, store: self.clone(), _lock: lock })
    }

    /// One journal.
    pub(crate) fn read(&self, id: &SessionId) -> anyhow::Result<Journal> {
        let known = read_json(&self.journal_path(id))?;
        known.ok_or_else(|| {
            let message = format!("there is no session {id} in {}", self.directory.display());
            Failure::new(Exit::Failed, message)
                .hint("`pghydrant sessions` lists them; --state DIR looks elsewhere")
                .into()
        })
    }

    /// Every journal, the oldest first, with the process that drives it; a journal that cannot be read is an error of
    /// its own in the list.
    pub(crate) fn list(&self) -> anyhow::Result<Vec<Listed>> {
        let entries = match std::fs::read_dir(&self.directory) {
            Ok(entries) => entries,
            Err(cause) if cause.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(cause) => return Err(engine::Error::io("list", &self.directory, cause).into()),
        };
        let mut ids: Vec<SessionId> =
            entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.strip_suffix(".json")?.parse().ok()).collect();
        ids.sort();
        Ok(ids.iter().map(|id| Ok((self.read(id)?, self.driver(id)))).collect())
    }

    /// The process that drives a session now.
    pub(crate) fn driver(&self, id: &SessionId) -> Option<u32> {
        let path = self.lock_path(id);
        let file = File::open(&path).ok()?;
        match file.try_lock_shared() {
            Ok(()) => None,
            Err(_) => Some(std::fs::read_to_string(&path).ok()?.trim().parse().unwrap_or(0)),
        }
    }

    fn lock_path(&self, id: &SessionId) -> PathBuf {
        self.directory.join(format!("{id}.lock"))
    }

    fn lock(&self, id: &SessionId) -> anyhow::Result<File> {
        let path = self.lock_path(id);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        let opened = options.open(&path);
        let mut file = opened.map_err(|cause| engine::Error::io("open", &path, cause))?;
        // Whoever lists the sessions holds it for a moment, to see whether it is free.
        let deadline = Instant::now() + LISTING;
        while file.try_lock().is_err() {
            if Instant::now() < deadline {
                std::thread::sleep(LISTING / 20);
                continue;
            }
            let holder = self.driver(id).map(|pid| format!(" by process {pid}")).unwrap_or_default();
            return Err(Failure::new(Exit::Failed, format!("session {id} is being driven{holder}"))
                .hint("wait for it, or end that process first")
                .into());
        }
        let written = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
        written.map_err(|cause| engine::Error::io("write", &path, cause))?;
        Ok(file)
    }

    fn write(&self, journal: &Journal) -> anyhow::Result<()> {
        let bytes = serde_json::to_vec_pretty(journal)?;
        Ok(durable::write_atomically(&self.journal_path(&journal.id), &bytes, 0o600)?)
    }

    fn remove(&self, id: &SessionId) -> anyhow::Result<()> {
        durable::remove_durably(&self.journal_path(id))?;
        Ok(durable::remove_durably(&self.lock_path(id))?)
    }

    /// `20261122T081500Z-3f9a1c`: two sessions never share an id, nor then a mountpoint, whatever state directories
    /// they are in.
    fn free_id(&self, now: Timestamp) -> anyhow::Result<SessionId> {
        loop {
            let text = format!("{}-{}", now.strftime("%Y%m%dT%H%M%SZ"), random::digits()?);
            let id = SessionId::try_from(text).map_err(anyhow::Error::msg)?;
            let path = self.lock_path(&id);
            match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
                Ok(_) => return Ok(id),
                Err(cause) if cause.kind() == ErrorKind::AlreadyExists => {}
                Err(cause) => return Err(engine::Error::io("create", &path, cause).into()),
            }
        }
    }

    /// Forgets the oldest finished sessions.
    fn sweep(&self) {
        let Ok(all) = self.list() else { return };
        let finished: Vec<SessionId> = all
            .into_iter()
            .filter_map(|entry| {
                entry.ok().filter(|(journal, driver)| journal.phase == Phase::Finished && driver.is_none())
            })
            .map(|(journal, _)| journal.id)
            .collect();
        for id in finished.iter().rev().skip(FINISHED_KEPT) {
            if let Err(error) = self.remove(id) {
                tracing::warn!("cannot forget session {id}: {error:#}");
            }
        }
    }
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> anyhow::Result<Option<T>> {
    let failed = |cause| engine::Error::io("read", path, cause);
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(cause) if cause.kind() == ErrorKind::NotFound => return Ok(None),
        Err(cause) => return Err(failed(cause).into()),
    };
    trust::refuse_foreign(path, &file.metadata().map_err(failed)?)?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(failed)?;
    serde_json::from_slice(&bytes).map(Some).with_context(|| format!("{} is not a session's", path.display()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_list_of_sessions_does_not_keep_a_session_from_being_driven() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store { directory: directory.path().to_owned() };
        let id: SessionId = "20261122T081500Z-3f9a1c".to_owned().try_into().unwrap();
        let looking = File::create(store.lock_path(&id)).unwrap();
        looking.lock_shared().unwrap();
        let looked = std::thread::spawn(move || {
            std::thread::sleep(LISTING / 20);
            drop(looking);
        });
        let driven = store.lock(&id);
        looked.join().unwrap();
        let driven = driven.unwrap();
        assert!(store.lock(&id).unwrap_err().to_string().contains("is being driven by process"));
        drop(driven);
        assert!(store.lock(&id).is_ok());
    }
}
