//! Restore: one command that ends with a running, checked server.
//!
//! ```text
//! validate   look at everything, decide, report all problems at once        preflight, survey, choose, plan
//! mount      the backup as a file system, served by a process of its own    crate::mount
//! take over  a delta alone: save the WAL of the cluster that is there, clear, compare           delta
//! copy       every block verified before it is written                      copy, engine::hydration
//! configure  restore settings into the configuration, isolation of a copy   configure, conf, isolation, marker
//! start      backup_label and pg_control in place, then pg_ctl -W           recover
//! recover    WAL staged ahead of the replay; watched, not believed          recovery, staging
//! act        promote, pause or shut down: what the server really did        recover
//! check      pg_amcheck, if it is asked for, before others can connect      check
//! revert     the configuration, once the server has left recovery           finish
//! hand over  a configuration elsewhere, Debian's list of clusters, a unit   handover
//! unmount
//! report     what was done, how long each step took, the bottleneck         report
//! ```
//!
//! [`drive`] is this list. It is also what `retry`, `promote` and `retarget` call: each step asks the journal ([`session`])
//! whether it is done, and every step can be done again. So there is one way through a restore, whether it was
//! interrupted or not.
//!
//! Always true:
//! - Nothing is touched before everything was looked at.
//! - Nothing half done can start: `pg_control` comes last, after the configuration.
//! - Once the server may have run in the directory, no block and no `pg_control` is written there again.
//! - The recovery's settings are in force until the server has left recovery, and gone afterwards.
//! - A copy that is not adopted archives nowhere, subscribes to nothing, runs no jobs of the original's, and writes into
//!   no directory of the original's.

mod check;
mod choose;
mod claim;
pub(crate) mod conf;
mod configure;
mod copy;
mod delta;
mod effective;
mod files;
mod finish;
mod handover;
pub(crate) mod hba;
pub(crate) mod isolation;
mod kept;
pub(crate) mod marker;
mod moment;
mod plan;
mod preflight;
mod recover;
mod recovery;
mod report;
pub(crate) mod retarget;
pub(crate) mod session;
pub(crate) mod staging;
pub(crate) mod standby;
pub(crate) mod survey;
mod target;
pub(crate) mod verbs;
mod way;

pub(crate) use configure::has_kept_settings;

use std::path::PathBuf;

use engine::repository::{Backup, Cluster, Repository};
use engine::units::{BackupLabel, SessionId};
use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::context::Context;
use crate::exit::{Exit, Failure};
use crate::human;
use crate::options::{ClusterOption, JsonOption, RepositoryOption};
use check::Thoroughness;
use claim::Claim;
use plan::{Plan, Source};
use preflight::Request;
use session::{Phase, Session, Store};
use target::{Action, Goal, Goals, TimelineChoice};

/// Options of the verb.
#[derive(clap::Args, Debug)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) repository: RepositoryOption,
    #[command(flatten)]
    pub(crate) cluster: ClusterOption,
    /// The data directory to restore into: absent or empty, unless --delta is given
    #[arg(long, value_name = "DATADIR")]
    pub(crate) to: PathBuf,
    /// Restore over the stopped cluster in DATADIR, writing only the pages that differ
    ///
    /// The directory must hold the cluster that the backup is of, by its system identifier. What the backup has not is
    /// removed, the server's logs included. WAL that the server had still to archive is archived first; the last,
    /// unfinished segment is kept in DATADIR/pghydrant.wal-<session>. An absent or empty DATADIR gets an ordinary restore.
    #[arg(long)]
    pub(crate) delta: bool,
    /// Which backup [default: the newest that can reach the target]
    #[arg(long, value_name = "LABEL")]
    pub(crate) backup: Option<String>,
    /// The port of the restored server [default: as in its configuration]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) port: Option<u16>,
    /// Where a tablespace goes, by its name or OID [default: where it was, if nothing is there]
    #[arg(long = "tablespace", value_name = "NAME=DIR", value_parser = tablespace)]
    pub(crate) tablespaces: Vec<(String, PathBuf)>,
    #[command(flatten)]
    pub(crate) goals: Goals,
    /// The history to follow: latest, current, or a number
    #[arg(long, value_name = "TIMELINE", default_value = "latest", help_heading = target::HEADING)]
    pub(crate) target_timeline: TimelineChoice,
    /// Stop just before the target instead of just after it
    #[arg(long, help_heading = target::HEADING)]
    pub(crate) target_exclusive: bool,
    /// What the server does at its target
    #[arg(long, value_enum, default_value_t, help_heading = target::HEADING)]
    pub(crate) action: Action,
    /// Where the copy reads from [default: mount, or blocks where files can share them]
    #[arg(long, value_enum)]
    pub(crate) source: Option<Source>,
    /// How bytes get into the target
    ///
    /// --plan shows which way is taken. What is named here and cannot be done is refused before anything is touched. With
    /// reflink, raw blocks (init --compression none) are not copied: the restored files share them with the repository, and
    /// what the server changes later gets space of its own. They are hashed, and only then can a server start.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) io: way::Wanted,
    /// Do not hash the blocks that files share with the repository: damage there would be damage in the copy
    #[arg(long)]
    pub(crate) trust_repository: bool,
    /// The copy takes the original's place: it archives and replicates as the original did
    #[arg(long)]
    pub(crate) adopt: bool,
    /// Copy only; the first start with pg_ctl recovers
    #[arg(long)]
    pub(crate) no_start: bool,
    #[command(flatten)]
    pub(crate) handover: handover::Options,
    /// Check heap and indexes with pg_amcheck once recovery has ended, before the server opens for others
    #[arg(long, value_enum, value_name = "HOW")]
    pub(crate) check: Option<Thoroughness>,
    /// The operating system user of the instance [default: the owner of the target's directory, or postgres]
    #[arg(long, value_name = "USER")]
    pub(crate) os_user: Option<String>,
    /// Directory of the PostgreSQL server's programs
    #[arg(long, value_name = "DIR")]
    pub(crate) pg_bin: Option<PathBuf>,
    /// Where the backup is mounted meanwhile
    #[arg(long, value_name = "DIR")]
    pub(crate) mount_dir: Option<PathBuf>,
    /// Say what would be done, and stop
    #[arg(long)]
    pub(crate) plan: bool,
    #[command(flatten)]
    pub(crate) remote: Remote,
    /// The session's id, where somebody else has given it one
    #[arg(long, hide = true)]
    pub(crate) session: Option<SessionId>,
    #[command(flatten)]
    pub(crate) output: JsonOption,
}

/// The target, for a restore that a mount server carries out.
#[derive(clap::Args, Debug)]
#[command(next_help_heading = "Target over SSH, with --server")]
pub(crate) struct Remote {
    /// Where the mount server restores to: it logs in there with SSH, as its own user's configuration says
    #[arg(long, value_name = "[USER@]HOST[:PORT]")]
    pub(crate) target: Option<String>,
    /// Key file on the mount server to log in with
    #[arg(long, value_name = "FILE")]
    pub(crate) identity: Option<PathBuf>,
    /// Option of ssh_config(5), such as ProxyJump=gate
    #[arg(long = "ssh-option", value_name = "K=V")]
    pub(crate) ssh_options: Vec<String>,
    /// Become root there with sudo: the instance's owner is another user than the one that logs in
    #[arg(long)]
    pub(crate) sudo: bool,
    /// The most that it fetches a second, such as 50M [default: the mount server's own limit]
    #[arg(long, value_name = "RATE", requires = "target", value_parser = human::parse_rate)]
    pub(crate) rate_limit: Option<u64>,
}

impl Remote {
    /// Whether anything is said of a target.
    pub(crate) fn is_given(&self) -> bool {
        self.target.is_some()
            || self.identity.is_some()
            || !self.ssh_options.is_empty()
            || self.sudo
            || self.rate_limit.is_some()
    }
}

/// A time as the user typed it, as another machine understands it.
pub(crate) fn goal_option(text: &str, now: Timestamp, local: &TimeZone) -> Result<String, String> {
    moment::parse(text, now, local).map(moment::for_postgresql)
}

pub(crate) fn run(arguments: &Arguments, context: &Context) -> anyhow::Result<Exit> {
    context.catch_interrupts()?;
    let request = arguments.request(context)?;
    let cluster = open(&request, context)?;
    let plan = validate(&request, &cluster, context)?;
    if arguments.plan {
        report::plan(&plan, &request, context);
        return Ok(Exit::Done);
    }
    let state = context.state_directory()?;
    delta::refuse_state_within(&plan, &state)?;
    let session = Store::of(&state).begin(plan, arguments.session.clone())?;
    drive(session, context)
}

/// The cluster to restore from.
fn open(request: &Request, context: &Context) -> anyhow::Result<Cluster> {
    let not_found = |error, hint: &str| match error {
        engine::Error::NotFound(message) => Failure::new(Exit::Failed, message).hint(hint).into(),
        engine::Error::Io { ref source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied => {
            let hint = "run it as a user who may read the repository: its owner, or root";
            Failure::new(Exit::Failed, error.to_string()).hint(hint).into()
        }
        other => anyhow::Error::from(other),
    };
    let repository = Repository::open_interruptibly(&request.repository, context.interrupt())
        .map_err(|error| not_found(error, "name the repository with --repo, or in PGHYDRANT_REPO"))?;
    let cluster = repository.cluster(&request.cluster);
    cluster.map_err(|error| not_found(error, "name the cluster with --cluster, or in PGHYDRANT_CLUSTER"))
}

/// Looks at everything, then decides. All problems are told before the first of them ends the command.
fn validate(request: &Request, cluster: &Cluster, context: &Context) -> anyhow::Result<Plan> {
    let step = context.output.step("validate");
    let facts = survey::look(request, cluster)?;
    let judgement = preflight::judge(request, &facts);
    for warning in &judgement.warnings {
        context.output.warning(warning);
    }
    let Some(plan) = judgement.plan else {
        drop(step);
        return Err(report::problems(&judgement.problems, context).into());
    };
    step.done(&format!("backup {}, to {}", plan.backup, plan.target));
    Ok(plan)
}

/// Drives a session from where it stands to its end, and notes in its journal why, if it does not get there.
pub(crate) fn drive(mut session: Session, context: &Context) -> anyhow::Result<Exit> {
    session.journal.broken = None;
    session.save()?;
    lend_access(&session.journal.plan)?;
    let id = session.journal.id.clone();
    context.output.event("session", &serde_json::json!({"session": id, "data": session.journal.plan.data()}));
    let driven = Restore::open(&mut session, context).and_then(|mut restore| restore.go_on());
    let driven = driven.map_err(|error| match error.downcast_ref::<engine::Error>() {
        Some(engine::Error::Cancelled) => {
            let message = format!("interrupted while {}", session.journal.phase.text());
            Failure::new(Exit::Interrupted, message).into()
        }
        _ => unless_gone(error, &session.journal.plan),
    });
    driven.inspect_err(|error| session.note_failure(error)).map_err(|error| report::with_next_step(error, &session))
}

/// The way to a mount service is a secret: of the instance's own user, whose restore_command goes that way, and of nobody
/// else's.
fn lend_access(plan: &Plan) -> anyhow::Result<()> {
    if plan.repository.is_file() && rustix::process::geteuid().is_root() {
        let lent = std::os::unix::fs::chown(&plan.repository, Some(plan.owner.uid), Some(plan.owner.gid));
        lent.map_err(|cause| engine::Error::io("give away", &plan.repository, cause))?;
    }
    Ok(())
}

/// A pack or a WAL segment that is missing is damage, unless the whole repository is: its disk went away, and comes
/// back.
fn unless_gone(error: anyhow::Error, plan: &Plan) -> anyhow::Error {
    if !matches!(Failure::exit_of(&error), Exit::Corrupt | Exit::Failed) {
        return error;
    }
    match Repository::open(&plan.repository) {
        Err(gone @ (engine::Error::NotFound(_) | engine::Error::Io { .. })) => {
            anyhow::Error::from(gone).context("the repository went away")
        }
        _ => error,
    }
}

/// A restore on its way.
struct Restore<'a> {
    context: &'a Context,
    session: &'a mut Session,
    backup: Backup,
}

impl<'a> Restore<'a> {
    fn open(session: &'a mut Session, context: &'a Context) -> anyhow::Result<Self> {
        let plan = &session.journal.plan;
        let repository = Repository::open_interruptibly(&plan.repository, context.interrupt())?;
        let backup = repository.cluster(&plan.cluster)?.backup(&plan.backup)?;
        Ok(Self { context, session, backup })
    }

    /// The story. Each step looks into the journal whether it is done already.
    fn go_on(&mut self) -> anyhow::Result<Exit> {
        if claim::look(&self.session.journal)? == Claim::Done {
            return self.finish_untouched();
        }
        let mount = self.mount()?;
        if self.session.journal.phase < Phase::Recovering {
            if self.is_published() {
                self.close_published()?;
            } else {
                let copied = self.copy(mount.as_ref())?;
                self.configure()?;
                self.publish(&copied, mount.as_ref())?;
            }
        }
        if self.session.journal.plan.no_start {
            self.unmount(mount)?;
            return self.finish_without_start();
        }
        if self.session.journal.phase == Phase::Recovering {
            let recovered = self.recover(mount.as_ref())?;
            if self.waits_at_its_target(&recovered)? {
                self.unmount(mount)?;
                return self.report_waiting();
            }
        }
        self.check()?;
        self.revert()?;
        self.unmount(mount)?;
        self.finish()
    }

    fn plan(&self) -> &Plan {
        &self.session.journal.plan
    }
}

impl Arguments {
    /// The options, resolved.
    fn request(&self, context: &Context) -> anyhow::Result<Request> {
        let usage = |message: String| Failure::new(Exit::Usage, message);
        let goal = Goal::of(&self.goals, Timestamp::now(), &TimeZone::system()).map_err(usage)?;
        goal.refuse_empty_before(self.target_exclusive)?;
        let absolute = |path: &PathBuf| std::path::absolute(path);
        let backup = self.backup.as_deref().filter(|label| *label != "latest");
        let backup: Option<BackupLabel> = backup.map(str::parse).transpose().map_err(usage)?;
        let directory = |key: &str, flag: &Option<PathBuf>| {
            let value = context.settings.get(key, flag.clone().map(Into::into));
            value.map(|(path, _)| std::path::absolute(PathBuf::from(path))).transpose()
        };
        let tablespaces = self.tablespaces.iter().map(|(name, path)| Ok((name.clone(), absolute(path)?)));
        Ok(Request {
            repository: context.repository_path(&self.repository)?,
            cluster: context.cluster_name(&self.cluster)?,
            backup,
            data: absolute(&self.to)?,
            delta: self.delta,
            goal,
            timeline: self.target_timeline,
            exclusive: self.target_exclusive,
            action: self.action,
            port: self.port,
            tablespaces: tablespaces.collect::<std::io::Result<_>>()?,
            source: self.source,
            io: self.io,
            trust_repository: self.trust_repository,
            adopt: self.adopt,
            no_start: self.no_start,
            check: self.check,
            handover: self.handover.wanted(&self.to)?,
            owner: self.os_user.clone(),
            programs: directory("pg_bin", &self.pg_bin)?,
            mount_directory: directory("mount_dir", &self.mount_dir)?,
            program: std::env::current_exe()?,
        })
    }
}

/// `NAME=DIR`.
fn tablespace(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, directory)) if !name.is_empty() && !directory.is_empty() => {
            Ok((name.to_owned(), PathBuf::from(directory)))
        }
        _ => Err("give the tablespace and its new directory: NAME=DIR".to_owned()),
    }
}
