//! Starting the server, seeing it through its recovery, and what it did at the end.

use std::path::{Path, PathBuf};
use std::time::Instant;

use engine::units::Lsn;
use engine::wal::name::WalFile;

use super::claim;
use super::conf::Setting;
use super::configure::Configuration;
use super::plan::Plan;
use super::recovery::{self, Outcome, Recovered, Watch};
use super::session::Phase;
use super::staging::{self, Feed, Stager};
use super::target::Action;
use super::{Restore, files, standby};
use crate::exit::{Exit, Failure};
use crate::human;
use crate::mount::SessionMount;
use crate::postgres::binaries::Binaries;
use crate::postgres::control::State;
use crate::postgres::instance::{Condition, Instance, StopMode};
use crate::postgres::owner::Owner;

/// The server's words, in its data directory.
pub(super) const LOG: &str = "pghydrant.log";

/// How long a server that recovers may take to stop before it is stopped at once.
const STOP_PATIENCE: std::time::Duration = std::time::Duration::from_secs(60);

/// The user of a plan.
pub(super) fn owner(plan: &Plan) -> anyhow::Result<Owner> {
    Owner::named(&plan.owner.name).or_else(|_| Owner::numbered(plan.owner.uid, plan.owner.gid))
}

/// The instance that a plan describes.
pub(super) fn instance(plan: &Plan) -> anyhow::Result<Instance> {
    instance_with_log(plan, &plan.data().join(LOG))
}

/// The same with another log.
pub(super) fn instance_with_log(plan: &Plan, log: &Path) -> anyhow::Result<Instance> {
    Ok(Instance::new(Binaries::in_directory(&plan.programs)?, plan.data(), owner(plan)?, log))
}

impl Restore<'_> {
    /// Sees the server through its recovery. Where the original raised a setting after the backup, replay stops until a
    /// hot standby has as much; it gets it for as long as it recovers, and is started again.
    pub(super) fn recover(&mut self, mount: Option<&SessionMount>) -> anyhow::Result<Recovered> {
        loop {
            let recovered = self.recover_once(mount)?;
            let Outcome::TooSmall(setting) = &recovered.outcome else { return Ok(recovered) };
            let known = self.session.journal.raised.get(&setting.name);
            if known == Some(&setting.value) {
                let message = format!("the server needs {} = {}, and does not take it", setting.name, setting.value);
                return Err(recovery::failure(&message, &self.session.journal.id, &self.log()));
            }
            self.raise(vec![setting.clone()])?;
            instance(self.plan())?.stop(StopMode::Fast, STOP_PATIENCE)?;
        }
    }

    /// Of several settings that the original raised at once replay stops for the first, but `pg_control` has them all.
    fn raise_what_is_known(&mut self, instance: &Instance) -> anyhow::Result<()> {
        let owner = owner(self.plan())?;
        let binaries = Binaries::in_directory(&self.plan().programs)?;
        let lacking = self.configuration()?.too_small(&binaries, &owner, &instance.control()?)?;
        self.raise(lacking)
    }

    /// For as long as it recovers.
    fn raise(&mut self, settings: Vec<Setting>) -> anyhow::Result<()> {
        for Setting { name, value } in settings {
            self.context
                .output
                .note(&format!("  {name} = {value} for the recovery: the original raised it after the backup"));
            self.session.journal.raised.insert(name, value);
        }
        self.session.save()
    }

    /// Starts the server, or finds the one that runs, and watches it until it has done something.
    fn recover_once(&mut self, mount: Option<&SessionMount>) -> anyhow::Result<Recovered> {
        let mut instance = instance(self.plan())?;
        if self.session.journal.moves_on && !claim::has_left_recovery(self.plan(), &instance)? {
            // The target is read at the start.
            instance.stop(StopMode::Fast, STOP_PATIENCE)?;
            files::remove(&standby::end_mark(self.plan()))?;
        }
        let running = instance.condition()? != Condition::Down;
        let promoting = self.session.journal.at_target.is_some();
        // Of a server that runs already, the whole log tells; one that starts now has nothing in it yet.
        let mut log_start = 0;
        if !running && !claim::has_left_recovery(self.plan(), &instance)? {
            self.raise_what_is_known(&instance)?;
            let step = self.context.output.step("start");
            self.configuration()?.prepare_start()?;
            log_start = std::fs::metadata(self.log()).map_or(0, |metadata| metadata.len());
            let started = instance.start(&[]);
            let file = started
                .map_err(|error| recovery::failure(&format!("{error:#}"), &self.session.journal.id, &self.log()))?;
            let process =
                file.map_or_else(|| "it has ended by itself".to_owned(), |file| format!("process {}", file.pid));
            let time = step.done(&process);
            self.session.note_step("start", time.as_secs_f64(), process);
        }
        if self.session.journal.moves_on {
            self.session.journal.moves_on = false;
            self.session.save()?;
        }
        let start = self.replay_start(&instance)?;
        let stager = self.stage(mount, start)?;
        if running && promoting {
            self.promote(&instance)?;
        }
        let step = self.context.output.step("recover");
        let watch = self.watch(&instance, stager.as_ref(), log_start)?;
        let began = Instant::now();
        let recovered = watch.until_it_stops();
        // What the stager says is not what the restore ends with: `wal fetch` goes to the repository by itself.
        let staged = stager.map(Stager::finish).transpose().unwrap_or_else(|error| {
            tracing::warn!("WAL was not staged: {error:#}");
            None
        });
        let recovered = recovered?;
        if let Outcome::Failed(reason) = &recovered.outcome {
            return Err(recovery::failure(reason, &self.session.journal.id, &self.log()));
        }
        if let Outcome::TooSmall(setting) = &recovered.outcome {
            step.done(&format!("stopped at {}: {} is too small", recovered.position, setting.name));
            return Ok(recovered);
        }
        // A promotion replays nothing that it would be fair to call a rate.
        let replayed = || recovery::replay_rate(start, recovered.position.lsn, began.elapsed());
        let replayed = if promoting { None } else { replayed() };
        let mut detail = recovered.stopped_at.clone().unwrap_or_else(|| "to the end of the WAL".to_owned());
        detail = format!("{detail}; at {}", recovered.position);
        if let Some(replayed) = replayed {
            detail = format!("{detail}; {replayed}");
        }
        if let Some(staged) = staged.filter(|staged| *staged > 0 && !promoting) {
            detail = format!("{detail}; {} staged", human::count(staged, "segment"));
        }
        let time = step.done(&detail);
        self.session.note_step("recover", time.as_secs_f64(), detail);
        Ok(recovered)
    }

    /// Asks the server to leave recovery, unless somebody has done so already.
    fn promote(&self, instance: &Instance) -> anyhow::Result<()> {
        if claim::has_left_recovery(self.plan(), instance)? {
            return Ok(());
        }
        match instance.promote() {
            Err(_) if claim::has_left_recovery(self.plan(), instance)? => Ok(()),
            asked => asked,
        }
    }

    /// The action, as it was carried out: true if the server waits at its target as it was told to. What the server
    /// did instead of that is a failure of the action, and said so.
    pub(super) fn waits_at_its_target(&mut self, recovered: &Recovered) -> anyhow::Result<bool> {
        if recovered.outcome == Outcome::Promoted {
            self.refuse_another_recovery()?;
        }
        let step = self.context.output.step("act");
        let wanted = self.plan().target.action;
        let where_ = recovered.stopped_at.clone().unwrap_or_else(|| recovered.position.to_string());
        match (&recovered.outcome, wanted) {
            (Outcome::Promoted, Action::Promote) => {
                let timeline =
                    recovered.new_timeline.map(|timeline| format!(", timeline {timeline}")).unwrap_or_default();
                step.done(&format!("promoted{timeline}"));
                self.session.journal.at_target = None;
                self.session.enter(self.phase_after_recovery())?;
                Ok(false)
            }
            (Outcome::Paused, Action::Pause) | (Outcome::ShutDown, Action::Shutdown) => {
                self.mark_the_end(recovered)?;
                step.done(&format!("{}, {where_}", state(&recovered.outcome)));
                self.session.journal.at_target = Some(where_);
                self.session.save()?;
                Ok(true)
            }
            (Outcome::Promoted, Action::Pause | Action::Shutdown) => {
                drop(step);
                self.session.enter(Phase::Reverting)?;
                self.revert()?;
                self.configuration()?.remove_socket_directory()?;
                self.end_session()?;
                let message =
                    format!("the server was promoted instead of {}: it did not carry out --action", doing(wanted));
                Err(Failure::new(Exit::Recovery, message)
                    .hint("PostgreSQL pauses only where a hot standby is active; the server runs, recovered to its target")
                    .into())
            }
            (Outcome::Unreadable, _) => {
                drop(step);
                self.mark_the_end(recovered)?;
                // Where it should be, and not as it should be: `promote` and `cancel` can end that.
                self.session.journal.at_target = Some(where_);
                self.session.save()?;
                let id = &self.session.journal.id;
                let message = "the server has replayed all WAL, but it is no hot standby: nobody can read it, so it is not paused as --action says";
                Err(Failure::new(Exit::Recovery, message)
                    .hint(format!(
                        "a transaction with more than 64 subtransactions was open all the time; `pghydrant promote {id}` opens the server, `pghydrant cancel {id}` removes the copy"
                    ))
                    .into())
            }
            (outcome, wanted) => {
                let message = format!("the server should have been {}, and it is {}", done(wanted), state(outcome));
                Err(recovery::failure(&message, &self.session.journal.id, &self.log()))
            }
        }
    }

    /// Where the server waits at the end of the WAL, that end stays: what is archived from now on is not for its next
    /// start, whoever promotes it.
    fn mark_the_end(&self, recovered: &Recovered) -> anyhow::Result<()> {
        if !self.plan().target.waits_at_the_end() {
            return Ok(());
        }
        let control = instance(self.plan())?.control()?;
        let reached = recovered.position.lsn.unwrap_or_default().max(control.min_recovery_point);
        standby::mark_end(self.plan(), reached, self.backup.info.server.wal_segment_bytes)
    }

    /// The server opened: was that this recovery? One that was killed in the checkpoint at the end of its recovery has no
    /// signal file any more: started by somebody else, it takes its WAL for that of a crash, and replays all of it. One
    /// that was started with another configuration, or promoted on its way, did not look for the target either; the
    /// history of the timeline that it began tells.
    fn refuse_another_recovery(&self) -> anyhow::Result<()> {
        let (plan, id) = (self.plan(), &self.session.journal.id);
        let control = instance(plan)?.control()?;
        let why = if claim::began_a_timeline(&control, plan.target.timeline) {
            let began = control.timeline.max(control.min_recovery_timeline);
            let name = WalFile::History(began).file_name(self.backup.info.server.wal_segment_bytes);
            let history = files::read(&plan.data().join("pg_wal").join(&name))?;
            let reason = history.as_deref().and_then(reason_of);
            let Some(reason) = reason.filter(|reason| plan.target.goal.is_missed_by(reason)) else { return Ok(()) };
            format!(
                "and did not stop at its target ({name}: {reason}): somebody started it with another configuration, or promoted it on its way"
            )
        } else {
            let timeline = plan.target.timeline;
            format!("on timeline {timeline}, not on one of its own: somebody started it after a crash")
        };
        let message = format!(
            "the server in {} left recovery {why}, and it may be past {}",
            plan.data().display(),
            plan.target.goal
        );
        let hint = format!(
            "stop that server and remove its directory, `pghydrant cancel {id}` forgets the session; then restore again"
        );
        Err(Failure::new(Exit::Recovery, message).hint(hint).into())
    }

    /// The server's log.
    pub(super) fn log(&self) -> PathBuf {
        self.plan().data().join(LOG)
    }

    /// Where the replay begins: a server that recovered before goes on at its last restart point.
    pub(super) fn replay_start(&self, instance: &Instance) -> anyhow::Result<Lsn> {
        let control = instance.control()?;
        let again = matches!(control.state, State::ShutDownInRecovery | State::InArchiveRecovery);
        let start = self.backup.info.wal.start;
        Ok(if again { start.max(control.redo) } else { start })
    }

    fn stage(&self, mount: Option<&SessionMount>, start: Lsn) -> anyhow::Result<Option<Stager>> {
        let plan = self.plan();
        let archive = self.backup.cluster.wal();
        let path = archive
            .history(plan.target.timeline)?
            .unwrap_or_else(|| engine::wal::history::History::root(plan.target.timeline));
        let segments = staging::segments(&archive, &path, start)?;
        let feed = match mount {
            Some(mount) => Feed::Mount(mount.mountpoint().join("wal"), archive),
            None => Feed::Archive(archive),
        };
        let segment_bytes = self.backup.info.server.wal_segment_bytes;
        Stager::begin(feed, plan.data(), segments, segment_bytes, &plan.owner).map(Some)
    }

    fn watch<'b>(
        &'b self,
        instance: &'b Instance,
        stager: Option<&'b Stager>,
        log_start: u64,
    ) -> anyhow::Result<Watch<'b>> {
        let configuration = self.configuration()?;
        Ok(Watch {
            context: self.context,
            instance,
            stager,
            segment_bytes: self.backup.info.server.wal_segment_bytes,
            log: self.log(),
            log_start,
            socket_directory: configuration.socket_directory(),
            port: configuration.recovery_port(),
            logins: self.logins(),
            promoting: self.session.journal.at_target.is_some(),
            timeline: self.plan().target.timeline,
            waits_at_the_end: self.plan().target.waits_at_the_end().then_some(self.plan().target.action),
            target: self.plan().target.to_string(),
        })
    }

    /// Who may be the bootstrap superuser, to log in as, and where.
    pub(super) fn logins(&self) -> Vec<(String, &'static str)> {
        let recorded = self.backup.info.server.settings.get("bootstrap_superuser").cloned();
        let mut users: Vec<String> = recorded.into_iter().collect();
        users.extend([self.plan().owner.name.clone(), self.backup.info.server.owner.clone(), "postgres".to_owned()]);
        users.dedup();
        users.iter().flat_map(|user| ["postgres", "template1"].map(|database| (user.clone(), database))).collect()
    }

    /// The configuration of this restore.
    pub(super) fn configuration(&self) -> anyhow::Result<Configuration<'_>> {
        // Where an update has replaced the binary meanwhile, the running one has no name any more.
        let planned = &self.plan().program;
        let program = if planned.is_file() { planned.clone() } else { std::env::current_exe()? };
        Ok(Configuration::new(&self.session.journal, &self.backup.info, &program))
    }
}

/// Why a timeline was begun: the last line of its history.
fn reason_of(history: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(history);
    let last = text.lines().rfind(|line| !line.trim().is_empty() && !line.starts_with('#'))?;
    last.splitn(3, '\t').nth(2).map(|reason| reason.trim().to_owned())
}

const fn doing(action: Action) -> &'static str {
    match action {
        Action::Promote => "promoting",
        Action::Pause => "pausing",
        Action::Shutdown => "shutting down",
    }
}

const fn done(action: Action) -> &'static str {
    match action {
        Action::Promote => "promoted",
        Action::Pause => "paused",
        Action::Shutdown => "shut down",
    }
}

fn state(outcome: &Outcome) -> &'static str {
    match outcome {
        Outcome::Promoted => "promoted",
        Outcome::Paused => "paused",
        Outcome::ShutDown => "shut down",
        Outcome::TooSmall(_) => "paused before its target",
        Outcome::Unreadable => "not readable",
        Outcome::Failed(_) => "down",
    }
}
