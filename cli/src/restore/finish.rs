//! The end of a restore: the configuration goes back, the server runs with it, and the session's traces go.

use std::time::{Duration, Instant};

use engine::hydration;
use engine::io::LocalDisk;
use serde_json::json;

use super::Restore;
use super::check::Checked;
use super::configure::Reverted;
use super::recover::{self, LOG};
use super::session::Phase;
use super::{copy, files, marker, report, staging};
use crate::exit::{Exit, Failure};
use crate::postgres::control::State;
use crate::postgres::instance::{Condition, Instance, StopMode};
use crate::postgres::postmaster::Status;

/// A shutdown writes a checkpoint: every page that the replay has changed and not yet written.
const STOP_PATIENCE: Duration = Duration::from_secs(15 * 60);
/// Between two looks at the server that starts.
const POLL: Duration = Duration::from_millis(2);

impl Restore<'_> {
    /// The configuration goes back, then the server is started once more: neither its socket nor its `pg_hba.conf`
    /// can be changed while it runs, and now it is known to start with the configuration that it will have from now on.
    pub(super) fn revert(&mut self) -> anyhow::Result<()> {
        let mut instance = recover::instance(self.plan())?;
        if self.runs_for_good(&instance)? {
            return Ok(());
        }
        let step = self.context.output.step("revert");
        let Some(originals) = self.session.journal.originals.clone() else {
            anyhow::bail!("the journal of session {} does not say how the configuration was", self.session.journal.id);
        };
        if let Some(placed) = &self.plan().handover.configuration {
            // From the revert on our configuration includes what stands there: by then nobody else's does.
            self.configuration()?.claim_elsewhere(placed)?;
        }
        instance.stop(StopMode::Fast, STOP_PATIENCE)?;
        let Reverted { kept, changed_meanwhile, altered } = self.configuration()?.revert(&originals)?;
        if self.plan().adopt {
            marker::remove(self.plan().data())?;
        }
        files::remove(&self.plan().data().join(staging::DIRECTORY))?;
        self.hand_over()?;
        for name in changed_meanwhile {
            self.context.output.warning(&format!("{name} was changed meanwhile: the change stays in it"));
        }
        if !altered.is_empty() {
            self.context.output.warning(&format!("as ALTER SYSTEM left them: {}", altered.join(", ")));
        }
        instance = recover::instance_with_log(self.plan(), &self.plan().handover.log(self.plan().data()))?;
        self.start_for_good(&mut instance)?;
        let detail = match kept.as_slice() {
            [] => "postgresql.conf as in the backup".to_owned(),
            kept => format!("postgresql.conf as in the backup, and {} at its end", kept.join(", ")),
        };
        let time = step.done(&detail);
        self.session.note_step("revert", time.as_secs_f64(), detail);
        Ok(())
    }

    /// All of it was done before a crash, and people may be at work in the database: it is not stopped again.
    fn runs_for_good(&self, instance: &Instance) -> anyhow::Result<bool> {
        let configuration = self.configuration()?;
        if configuration.is_in_force()? || instance.condition()? != Condition::Up(Some(Status::Ready)) {
            return Ok(false);
        }
        let running = crate::postgres::postmaster::running_in(instance.data_directory())?;
        Ok(running.is_some_and(|file| file.socket_directory != Some(configuration.socket_directory())))
    }

    fn start_for_good(&self, instance: &mut Instance) -> anyhow::Result<()> {
        let id = &self.session.journal.id;
        let refused = |reason: String| {
            Failure::new(
                Exit::Recovery,
                format!("the server recovered, but does not start with its own configuration: {reason}"),
            )
            .hint(format!("mend {}, then `pghydrant retry {id}`", self.plan().configuration_file().display()))
        };
        instance.start(&[]).map_err(|error| refused(format!("{error:#}")))?;
        wait_until_ready(instance, &|reason| refused(reason).into())?;
        let control = instance.control()?;
        anyhow::ensure!(
            control.state == State::InProduction,
            refused(format!("pg_control says \"{}\"", control.state))
        );
        let left = control.timeline > self.plan().target.timeline;
        anyhow::ensure!(left, refused(format!("it is still on timeline {}", control.timeline)));
        Ok(())
    }

    /// Takes the session's traces away; what was done goes to the user.
    pub(super) fn finish(&mut self) -> anyhow::Result<Exit> {
        self.configuration()?.remove_socket_directory()?;
        self.end_session()?;
        let running = recover::instance(self.plan())?;
        let port = match crate::postgres::postmaster::running_in(running.data_directory())? {
            Some(file) => file.port,
            None => self.plan().port,
        };
        report::finished(self.session, &self.backup.info, port, self.context);
        Ok(self.session.journal.checked.as_ref().map_or(Exit::Done, Checked::exit))
    }

    /// `--no-start`: the directory is the backup's, and its first start recovers.
    pub(super) fn finish_without_start(&mut self) -> anyhow::Result<Exit> {
        let left = self.configuration()?.first_start_settings();
        let left: Vec<String> = left.into_iter().map(|setting| setting.name).collect();
        self.hand_over()?;
        self.end_session()?;
        report::not_started(self.session, &self.backup.info, &left, self.context);
        Ok(Exit::Done)
    }

    /// Nothing in the directory is the session's any more: it was finished, or replaced. It is left as it is.
    pub(super) fn finish_untouched(&mut self) -> anyhow::Result<Exit> {
        let data = self.plan().data().display().to_string();
        self.session.remove_mount_log()?;
        self.session.journal.mount = None;
        self.session.enter(Phase::Finished)?;
        let id = &self.session.journal.id;
        let text = format!("session {id} is finished: {data} carries its mark no more, and is left as it is");
        self.context.output.result(&text, &json!({"session": id, "state": "finished", "data": data}));
        Ok(Exit::Done)
    }

    /// The session's directory and its mount's log go; the journal stays.
    pub(super) fn end_session(&mut self) -> anyhow::Result<()> {
        let (plan, id) = (self.plan(), &self.session.journal.id);
        hydration::end(&copy::layout(plan), id, &LocalDisk::new())?;
        self.session.remove_mount_log()?;
        self.session.journal.mount = None;
        self.session.enter(Phase::Finished)
    }

    /// The server is at its target; the session waits for `promote` or `cancel`.
    pub(super) fn report_waiting(&mut self) -> anyhow::Result<Exit> {
        let configuration = self.configuration()?;
        let (socket, port) = (configuration.socket_directory(), configuration.recovery_port());
        report::waiting(self.session, &self.backup.info, &socket, port, self.context);
        Ok(Exit::Done)
    }
}

/// Waits until a server that was started takes connections.
pub(super) fn wait_until_ready(instance: &Instance, refused: &dyn Fn(String) -> anyhow::Error) -> anyhow::Result<()> {
    let began = Instant::now();
    loop {
        match instance.condition()? {
            Condition::Up(Some(Status::Ready)) => return Ok(()),
            Condition::Up(_) if began.elapsed() < STOP_PATIENCE => std::thread::sleep(POLL),
            Condition::Up(_) => return Err(refused("it is not ready after 15 minutes".to_owned())),
            Condition::Down => {
                let reason =
                    instance.failure_since_start()?.unwrap_or_else(|| format!("see {}", instance.log().display()));
                return Err(refused(reason));
            }
        }
    }
}

/// What `--json` says of the log, wherever it is told.
pub(super) fn log_path(data: &std::path::Path) -> serde_json::Value {
    json!(data.join(LOG))
}
