//! `--check`: the heap and the indexes of every database, checked with `pg_amcheck` before the server opens for others.
//!
//! Every byte of the copy was verified, so what is found here was wrong at the source already, or the machine sorts text
//! in another way than the original's, which makes an index useless that is not damaged at all. `fast` reads what is
//! cheap to read: the structure of every B-tree, and the heap without what is frozen and without values that lie
//! elsewhere. `full` reads everything, and looks up every row in every index and every index entry from the root.
//!
//! The server has left recovery and still has the private socket of the restore: no password is needed there, no client
//! waits for a lock of ours, and nobody sees the extension `amcheck`, which is put into the databases that lack it and
//! taken out again. Which ones these are stands in the journal before the first is touched.
//!
//! What is found is no reason to stop: the restore goes on to its end, says it, and ends with the code for damage. A check
//! that could not be done is one, since nobody could tell it from one that found nothing: `retry` checks again, or goes on
//! without with `--skip-check`.

mod findings;

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, Read};
use std::process::{Child, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use engine::progress::Progress as _;
use serde::{Deserialize, Serialize};

use super::session::Phase;
use super::{Restore, finish, recover};
use crate::context::Context;
use crate::exit::{Exit, Failure};
use crate::human;
use crate::output;
use crate::postgres::binaries::Binaries;
use crate::postgres::client::{Client, value};
use crate::postgres::conninfo::Conninfo;
use crate::postgres::instance::Condition;
use findings::{Counts, Findings};

/// The program; some packages have it apart from the server's.
pub(super) const PG_AMCHECK: &str = "pg_amcheck";
/// What `pg_amcheck` ends with when it has found something.
const FOUND: i32 = 2;
/// Between two looks at `pg_amcheck`.
const POLL: Duration = Duration::from_millis(50);
/// More sessions than this check no faster.
const JOBS_MAX: usize = 32;
/// Of the lines that `pg_amcheck` ends with, the last ones.
const WORDS_LINES_MAX: usize = 5;

/// How much is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Thoroughness {
    /// Every B-tree's structure and order; the heap, but for frozen pages and values stored elsewhere
    Fast,
    /// Everything: every row is looked up in every index as well
    Full,
}

impl Thoroughness {
    /// As it is written on the command line.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Fast => "fast",
            Self::Full => "full",
        }
    }

    const fn options(self) -> &'static [&'static str] {
        match self {
            Self::Fast => &["--skip=all-frozen", "--exclude-toast-pointers"],
            Self::Full => &["--heapallindexed", "--parent-check", "--rootdescend"],
        }
    }
}

/// What a check came to; in the journal, for the report at the end.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Checked {
    pub(crate) relations: u64,
    pub(crate) bytes: u64,
    /// Tables and indexes with something wrong in them.
    pub(crate) failed: u64,
    /// The first of them, each with what is wrong.
    pub(crate) findings: Vec<String>,
}

impl Checked {
    /// The exit code of a restore that ends with this.
    pub(crate) fn exit(&self) -> Exit {
        if self.failed > 0 { Exit::DamagedPages } else { Exit::Done }
    }

    fn text(&self, thoroughness: Thoroughness) -> String {
        let of = format!("{}, {}", human::count(self.relations, "relation"), human::bytes(self.bytes));
        match self.failed {
            0 => format!("{}: {of}, nothing wrong", thoroughness.name()),
            failed => format!("{}: {of}; {failed} with something wrong in them", thoroughness.name()),
        }
    }
}

/// Who can look into every database of the server.
struct Login {
    user: String,
    database: &'static str,
}

impl Restore<'_> {
    /// The check, if one is asked for and not done yet; the server runs afterwards as it did before.
    pub(super) fn check(&mut self) -> anyhow::Result<()> {
        if self.session.journal.phase != Phase::Checking {
            return Ok(());
        }
        if self.plan().check.is_none() && self.session.journal.amcheck_in.is_empty() {
            return self.session.enter(Phase::Reverting);
        }
        let step = self.context.output.step("check");
        self.open_for_us_alone()?;
        let login = self.log_in()?;
        if let Some(thoroughness) = self.plan().check {
            self.bring_amcheck(&login)?;
            let checked = self.amcheck(thoroughness, &login)?;
            let detail = checked.text(thoroughness);
            self.session.journal.checked = Some(checked);
            let time = step.done(&detail);
            self.session.note_step("check", time.as_secs_f64(), detail);
        } else {
            step.done("left out");
        }
        self.take_amcheck_away(&login)?;
        self.session.enter(Phase::Reverting)
    }

    /// The phase behind the recovery.
    pub(super) fn phase_after_recovery(&self) -> Phase {
        if self.plan().check.is_some() { Phase::Checking } else { Phase::Reverting }
    }

    /// After a crash the server may be down. Its configuration is still the recovery's, and no signal file is there: it
    /// opens as the database that it is, behind the private socket.
    fn open_for_us_alone(&self) -> anyhow::Result<()> {
        let mut instance = recover::instance(self.plan())?;
        if instance.condition()? == Condition::Down {
            self.configuration()?.make_socket_directory()?;
            instance.start(&[]).map_err(|error| self.cannot_check(&format!("{error:#}")))?;
        }
        finish::wait_until_ready(&instance, &|reason| self.cannot_check(&reason).into())
    }

    fn log_in(&self) -> anyhow::Result<Login> {
        let mut refusal = None;
        for (user, database) in self.logins() {
            match self.connect(&user, database) {
                Ok(_) => return Ok(Login { user, database }),
                Err(error) => refusal = Some(error),
            }
        }
        let refusal = refusal.map_or_else(|| "nobody is known to log in as".to_owned(), |error| format!("{error:#}"));
        Err(self.cannot_check(&refusal).into())
    }

    fn connect(&self, user: &str, database: &str) -> anyhow::Result<Client> {
        let configuration = self.configuration()?;
        Client::connect(&Conninfo::local(
            &configuration.socket_directory(),
            configuration.recovery_port(),
            user,
            database,
        ))
    }

    /// Puts the extension into every database that lacks it. Triggers of the user's on such commands stay asleep.
    fn bring_amcheck(&mut self, login: &Login) -> anyhow::Result<()> {
        const DATABASES: &str = "SELECT datname::text FROM pg_database WHERE datallowconn AND datconnlimit <> -2";
        let rows = self.connect(&login.user, login.database)?.query(DATABASES, &[])?;
        for row in rows {
            let database: String = value(&row, 0)?;
            let client = self.connect(&login.user, &database)?;
            let has_it: bool = client.one("SELECT EXISTS (SELECT FROM pg_extension WHERE extname = 'amcheck')", &[])?;
            if has_it {
                continue;
            }
            if !self.session.journal.amcheck_in.contains(&database) {
                self.session.journal.amcheck_in.push(database.clone());
                self.session.save()?;
            }
            let brought =
                client.batch(QUIETLY).and_then(|()| client.batch("CREATE EXTENSION amcheck SCHEMA pg_catalog"));
            brought.map_err(|error| self.cannot_check(&format!("in database \"{database}\": {error:#}")))?;
        }
        Ok(())
    }

    fn take_amcheck_away(&mut self, login: &Login) -> anyhow::Result<()> {
        for database in self.session.journal.amcheck_in.clone() {
            let client = self.connect(&login.user, &database)?;
            client.batch(QUIETLY)?;
            client.batch("DROP EXTENSION IF EXISTS amcheck")?;
        }
        self.session.journal.amcheck_in.clear();
        self.session.save()
    }

    fn amcheck(&self, thoroughness: Thoroughness, login: &Login) -> anyhow::Result<Checked> {
        let plan = self.plan();
        let (owner, configuration) = (recover::owner(plan)?, self.configuration()?);
        let program = Binaries::in_directory(&plan.programs)?.require(PG_AMCHECK);
        let mut command = owner.command(program.map_err(|error| self.cannot_check(&format!("{error:#}")))?)?;
        command
            .args(["--all", "--progress", "--no-password"])
            .arg(format!("--maintenance-db={}", login.database))
            .arg(format!("--jobs={}", self.jobs(login)?))
            .args(thoroughness.options())
            .env("PGHOST", configuration.socket_directory())
            .env("PGPORT", configuration.recovery_port().to_string())
            .env("PGUSER", &login.user)
            .env("PGOPTIONS", SESSIONS)
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot run {PG_AMCHECK}"))?;
        let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) else {
            anyhow::bail!("{PG_AMCHECK} has no output");
        };
        let told = std::thread::spawn(move || Findings::read(BufReader::new(stdout)));
        let context = self.context.output.clone();
        let counted = std::thread::spawn(move || follow(BufReader::new(stderr), &context));
        let status = wait(&mut child, self.context)?;
        let broke = || anyhow::anyhow!("what {PG_AMCHECK} says could not be read");
        let (findings, (counts, words)) = (told.join().map_err(|_| broke())?, counted.join().map_err(|_| broke())?);
        let Counts { relations, bytes, .. } = counts;
        match (status.code(), findings.failed()) {
            (Some(0), 0) => Ok(Checked { relations, bytes, ..Checked::default() }),
            // Of some things it warns only, and ends with the code all the same.
            (Some(FOUND), 0) => Ok(Checked { relations, bytes, failed: 1, findings: words }),
            (Some(0 | FOUND), failed) => Ok(Checked { relations, bytes, failed, findings: findings.into_examples() }),
            _ => Err(self.cannot_check(&format!("{PG_AMCHECK} ended with {status}: {}", words.join("; "))).into()),
        }
    }

    /// As many as there are workers, and no more than half of what the server takes.
    fn jobs(&self, login: &Login) -> anyhow::Result<usize> {
        const HALF: &str = "SELECT current_setting('max_connections')::int4 / 2";
        let half: i32 = self.connect(&login.user, login.database)?.one(HALF, &[])?;
        let half = usize::try_from(half).unwrap_or(1);
        Ok(self.context.workers()?.min(JOBS_MAX).min(half).max(1))
    }

    fn cannot_check(&self, reason: &str) -> Failure {
        let id = &self.session.journal.id;
        Failure::new(Exit::Waiting, format!("the server recovered, and could not be checked: {reason}"))
            .hint(format!("`pghydrant retry {id}` checks again, `pghydrant retry {id} --skip-check` goes on without"))
    }
}

/// Of the check: no limit ends it, and it ends soon when `pg_amcheck` does, also where it waits for a lock.
const SESSIONS: &str = "-c statement_timeout=0 -c lock_timeout=0 -c idle_session_timeout=0 \
    -c client_connection_check_interval=1000";
/// Neither a read-only default nor the user's event triggers are in the way.
const QUIETLY: &str = "SET default_transaction_read_only = off; SET session_replication_role = replica";

/// Waits for its end; when the user wants us to stop, it is ended.
fn wait(child: &mut Child, context: &Context) -> anyhow::Result<ExitStatus> {
    loop {
        if let Some(status) = child.try_wait().with_context(|| format!("cannot wait for {PG_AMCHECK}"))? {
            return Ok(status);
        }
        if context.interrupted() {
            let _ = child.kill();
            let _ = child.wait();
            return Err(engine::Error::Cancelled.into());
        }
        std::thread::sleep(POLL);
    }
}

/// Shows how far it is, and keeps its last words.
fn follow(stderr: BufReader<impl Read>, output: &output::Output) -> (Counts, Vec<String>) {
    let (mut counts, mut words) = (Counts::default(), VecDeque::new());
    let mut phase: Option<output::Phase> = None;
    for line in stderr.split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line);
        let Some(found) = Counts::parse(&line) else {
            words.push_back(line.trim().to_owned());
            if words.len() > WORDS_LINES_MAX {
                words.pop_front();
            }
            continue;
        };
        let phase = phase.get_or_insert_with(|| output.phase("check", found.bytes_all));
        phase.advance(found.bytes.saturating_sub(counts.bytes));
        counts = found;
    }
    if let Some(phase) = phase {
        phase.finish();
    }
    (counts, words.into())
}
