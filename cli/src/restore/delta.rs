//! Delta: a restore over the cluster that is there, of which only pages that differ are written.
//!
//! ```text
//! save       WAL that was never archived: into the archive, or aside in the data directory     wal
//! take over  pg_control goes: from now on nothing can start
//! clear      what the backup has not goes
//! compare    blocks that are as in the backup stay, of others the pages that differ are written  engine::hydration
//! ```
//!
//! and the copy of files that are made anew, as in any restore. Until `pg_control` goes the cluster is as it was, so a crash, a `cancel`
//! or a start of the server up to there costs nothing, and `retry` saves the WAL anew: it may have grown. From there on a
//! `cancel` cannot bring the cluster back. It leaves the directory without `pg_control`, says so, and another delta takes
//! it from there.

pub(super) mod wal;

use std::path::{Path, PathBuf};

use engine::hydration::existing::{self, SAVED_WAL};
use engine::hydration::layout::Home;
use engine::hydration::{self, Existing, Fill, Hydration};
use engine::io::LocalDisk;
use engine::progress::Progress;
use engine::units::SessionId;
use engine::wal::name::SegmentName;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::configure::Configuration;
use super::copy::Delivering;
use super::plan::{Before, Plan};
use super::session::{Journal, Phase, Session};
use super::survey::{identifier, servers};
use super::{Restore, copy, files, handover};
use crate::context::Context;
use crate::exit::{Exit, Failure};
use crate::human;
use crate::mount::SessionMount;
use crate::output;
use crate::postgres::control::{self, ControlFile};

/// What a plan knows of the cluster that it overwrites.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Delta {
    /// Where `pg_wal` leads, if it is a link.
    pub(crate) wal: Option<PathBuf>,
    /// PostgreSQL's directories in tablespaces that the backup has not.
    pub(crate) abandoned: Vec<PathBuf>,
    /// Names that the backup has not, as they were counted.
    pub(crate) removed: u64,
    /// WAL files that the archive had not, as they were seen: those that are meant for it.
    pub(crate) unarchived: Vec<String>,
    /// The others.
    pub(crate) unfinished: Vec<String>,
}

/// The directories that the cluster may have files in.
pub(super) fn existing(plan: &Plan) -> Option<Existing> {
    let delta = plan.delta.as_ref()?;
    let tablespaces = plan.tablespaces.iter().filter(|tablespace| tablespace.place.before == Before::Existing);
    let homes = tablespaces.map(|tablespace| Home::Tablespace(tablespace.oid));
    let homes = homes.chain([Home::Data]).chain(delta.wal.iter().map(|_| Home::Wal)).collect();
    Some(Existing { homes, abandoned: delta.abandoned.clone() })
}

/// A delta removes what the backup has not: no place for its own journal.
pub(super) fn refuse_state_within(plan: &Plan, state: &Path) -> anyhow::Result<()> {
    let state = state.canonicalize().unwrap_or_else(|_| state.to_owned());
    if plan.delta.is_none() || !state.starts_with(plan.data()) {
        return Ok(());
    }
    let what = format!("the sessions are kept in {}, within the data directory", state.display());
    Err(Failure::new(Exit::Refused, what).hint("name another directory for them with --state").into())
}

/// Where WAL is kept that the archive does not take.
fn saved_wal_directory(plan: &Plan, id: &SessionId) -> PathBuf {
    plan.data().join(format!("{SAVED_WAL}{id}"))
}

/// The directory's WAL.
pub(super) fn wal_directory(plan: &Plan) -> PathBuf {
    let elsewhere = plan.delta.as_ref().and_then(|delta| delta.wal.clone());
    elsewhere.unwrap_or_else(|| plan.data().join("pg_wal"))
}

/// Nothing of the cluster has been changed: its `pg_control` is still there, or the session has not come so far.
fn is_untouched(journal: &Journal) -> bool {
    let startable = || journal.plan.data().join(control::PATH).symlink_metadata().is_ok();
    journal.phase == Phase::Saving || (journal.phase == Phase::Copying && startable())
}

impl Restore<'_> {
    /// Saves the WAL, then takes the directory over; nothing to do once that is done.
    fn take_over(&mut self, hydration: &Hydration) -> anyhow::Result<()> {
        if !is_untouched(&self.session.journal) {
            return Ok(());
        }
        self.refuse_another_cluster()?;
        let step = self.context.output.step("save");
        let plan = self.plan().clone();
        let archive = self.backup.cluster.wal();
        let server = &self.backup.info.server;
        let control = control::read(plan.data()).ok();
        let directory = wal_directory(&plan);
        if let Some(control) = &control {
            self.refuse_lost_wal(control, &directory)?;
        }
        let found = wal::local(&directory, server.system_identifier, server.wal_segment_bytes, control.as_ref())?;
        let kept = saved_wal_directory(&plan, &self.session.journal.id);
        let saved = wal::save(&plan, found, &archive, kept)?;
        if let Some(refusal) = &saved.refusal {
            self.context.output.warning(&format!("WAL is kept instead of archived: {refusal}"));
        }
        let detail = saved.text();
        self.session.journal.saved_wal = Some(saved);
        let time = step.done(&detail);
        self.session.note_step("save", time.as_secs_f64(), detail);
        // It may have been started while the WAL was saved, and stopped again.
        self.refuse_another_cluster()?;
        if control::read(plan.data()).ok() != control {
            let what = format!("the server in {} has run while its WAL was saved", plan.data().display());
            let hint = format!("`pghydrant retry {}` saves what it has written", self.session.journal.id);
            return Err(Failure::new(Exit::Waiting, what).hint(hint).into());
        }
        self.session.enter(Phase::Copying)?;
        Ok(hydration.make_unstartable()?)
    }

    /// The segment with the last checkpoint is never recycled: without it this is not the WAL of the cluster.
    fn refuse_lost_wal(&self, control: &ControlFile, directory: &Path) -> anyhow::Result<()> {
        let segment_bytes = u64::from(control.wal_segment_bytes);
        let segment = SegmentName::holding(control.timeline, control.redo, segment_bytes).file_name(segment_bytes);
        if directory.join(&segment).exists() {
            return Ok(());
        }
        let what = format!("{} has not the segment of the last checkpoint, {segment}", directory.display());
        let hint = format!(
            "is its disk mounted? then `pghydrant retry {0}`; where the WAL is lost, `pghydrant cancel {0}` and restore into another directory",
            self.session.journal.id
        );
        Err(Failure::new(Exit::Waiting, what).hint(hint).into())
    }

    /// Between two runs, and during one, anything may have happened to a cluster that can still be started.
    fn refuse_another_cluster(&self) -> anyhow::Result<()> {
        let (plan, id) = (self.plan(), &self.session.journal.id);
        let hint =
            || format!("`pghydrant retry {id}` goes on once that is settled, `pghydrant cancel {id}` gives it up");
        if let Some(server) = servers(plan.data())? {
            return Err(Failure::new(Exit::Waiting, server.what).hint(hint()).into());
        }
        let expected = self.backup.info.server.system_identifier;
        match identifier(plan.data(), &wal_directory(plan)) {
            Ok(found) if found == expected => Ok(()),
            Ok(found) => {
                let what = format!("{} has become another cluster: {found}, not {expected}", plan.data().display());
                Err(Failure::new(Exit::Refused, what).hint(hint()).into())
            }
            Err(reason) => Err(Failure::new(Exit::Refused, reason).hint(hint()).into()),
        }
    }

    /// In a delta, all that comes before blocks are written; false in any other restore.
    pub(super) fn write_over(
        &mut self,
        hydration: &Hydration,
        fill: &Fill,
        mount: Option<&SessionMount>,
    ) -> anyhow::Result<bool> {
        if self.plan().delta.is_none() {
            return Ok(false);
        }
        self.take_over(hydration)?;
        let phase = self.context.output.phase("compare", self.plan().bytes);
        self.clear(hydration, &phase)?;
        self.compare(hydration, fill, mount, phase)?;
        Ok(true)
    }

    /// Removes what the backup has not.
    fn clear(&mut self, hydration: &Hydration, progress: &dyn Progress) -> anyhow::Result<()> {
        let step = self.context.output.step("clear");
        let removed = hydration.clear(progress)?;
        // Once and for all: another cluster may have its tablespace there by the next run.
        if let Some(delta) = &mut self.session.journal.plan.delta {
            delta.abandoned.clear();
        }
        self.session.save()?;
        let detail = format!("{} removed that the backup has not", human::count(removed, "name"));
        let time = step.done(&detail);
        self.session.note_step("clear", time.as_secs_f64(), detail);
        Ok(())
    }

    /// Gives every file its size, and writes the pages that are not as in the backup.
    fn compare(
        &mut self,
        hydration: &Hydration,
        fill: &Fill,
        mount: Option<&SessionMount>,
        phase: output::Phase,
    ) -> anyhow::Result<()> {
        let step = self.context.output.step("compare");
        let progress = Delivering { progress: &phase, mount };
        let outlined = hydration.outline(fill.workers, &progress);
        let compared = outlined.and_then(|_| hydration.compare(fill, &progress));
        let figures = phase.finish();
        let compared = compared.map_err(|error| copy::explain(error, mount, &self.session.journal.id))?;
        let mut detail = format!(
            "{}; {} of {} blocks are as in the backup ({}); {} of pages written in {}",
            figures.text(),
            compared.same_blocks,
            compared.blocks,
            human::bytes(compared.same_bytes),
            human::bytes(compared.written_bytes),
            human::count(compared.changed_blocks, "block")
        );
        if compared.unreadable_blocks > 0 {
            detail.push_str(&format!("; {} could not be read", compared.unreadable_blocks));
        }
        self.context.output.event(
            "compared",
            &json!({
                "blocks": compared.blocks, "same_blocks": compared.same_blocks, "same_bytes": compared.same_bytes,
                "changed_blocks": compared.changed_blocks, "written_bytes": compared.written_bytes,
                "zeroed_blocks": compared.zeroed_blocks, "unreadable_blocks": compared.unreadable_blocks,
                "bottleneck": figures.bottleneck,
            }),
        );
        let time = step.done(&detail);
        self.session.note_step("compare", time.as_secs_f64(), detail);
        Ok(())
    }
}

/// `cancel` of a delta, whose server is stopped. The directory was there before: it stays.
pub(super) fn cancel(session: Session, ours: bool, context: &Context) -> anyhow::Result<Exit> {
    let step = context.output.step("cancel");
    let (journal, disk) = (&session.journal, LocalDisk::new());
    let (id, plan) = (&journal.id, &journal.plan);
    let data = plan.data().display().to_string();
    let begun = ours || existing::delta_in(plan.data(), &disk)?.as_ref() == Some(id);
    let layout = copy::layout(plan);
    let (text, state) = if begun && is_untouched(journal) {
        wal::forget_kept(&saved_wal_directory(plan, id), &wal_directory(plan))?;
        hydration::withdraw(&layout, id, &disk)?;
        (format!("the cluster in {data} is as it was"), "as_it_was")
    } else if journal.phase == Phase::Saving {
        (format!("nothing was changed in {data}"), "as_it_was")
    } else if !begun {
        (format!("it has no claim any more on what is in {data}"), "unclaimed")
    } else {
        let socket = Configuration::socket_directory_of(plan, id);
        if socket != plan.session_directory() {
            files::remove(&socket)?;
        }
        // Any other restore hands over when there is no way back.
        if plan.no_start {
            handover::take_away(plan, id)?;
        }
        hydration::leave_unstartable(&layout, id, &disk)?;
        let mut text = format!(
            "{data} cannot be started: it is partly overwritten and has no pg_control\n`pghydrant restore --delta --to {data}` restores it, whichever backup or target you choose"
        );
        text.extend(kept_wal(journal).map(|kept| format!("\n{kept}")));
        (text, "unstartable")
    };
    if begun {
        for place in plan.places().filter(|place| place.before == Before::Absent) {
            let made = std::iter::once(&place.path).chain(place.missing_parents.iter().rev());
            let _ = made.map(std::fs::remove_dir).take_while(Result::is_ok).count();
        }
    }
    copy::take_away_leftover(journal)?;
    step.done(&data);
    let object = json!({
        "session": id, "state": "cancelled", "data": plan.data(), "removed": false, "directory": state,
        "saved_wal": (state == "unstartable").then_some(&journal.saved_wal),
    });
    let text = format!("cancelled {id}: {text}");
    session.forget()?;
    context.output.result(&text, &object);
    Ok(Exit::Done)
}

/// What became of WAL that was never archived, and what can be done with it; nothing where there was none.
pub(super) fn saved_wal(journal: &Journal) -> Option<String> {
    let saved = journal.saved_wal.as_ref()?;
    let pushed = (!saved.pushed.is_empty()).then(|| {
        let (count, names) = (saved.pushed.len() as u64, saved.pushed.join(", "));
        format!("{} of the cluster that was here were archived first: {names}", human::count(count, "WAL file"))
    });
    let lines: Vec<String> = pushed.into_iter().chain(kept_wal(journal)).collect();
    (!lines.is_empty()).then(|| lines.join("\n"))
}

fn kept_wal(journal: &Journal) -> Option<String> {
    let saved = journal.saved_wal.as_ref().filter(|saved| !saved.kept.is_empty())?;
    let (plan, names) = (&journal.plan, saved.kept.join(", "));
    Some(format!(
        "WAL that was never archived is kept in {}: {names}\nits transactions are nowhere else: `pghydrant wal push --repo {} --cluster {} {}/…` archives it for a restore to its end; remove it once nobody needs it",
        saved.directory.display(),
        plan.repository.display(),
        plan.cluster,
        saved.directory.display()
    ))
}

/// The lines of `--plan`.
pub(super) fn planned(plan: &Plan) -> Vec<(&'static str, String)> {
    let Some(delta) = &plan.delta else { return Vec::new() };
    let mut lines = vec![(
        "delta",
        format!(
            "pages that differ are written, {} removed that the backup has not",
            human::count(delta.removed, "name")
        ),
    )];
    lines.extend(delta.wal.iter().map(|wal| ("WAL directory", format!("{} (is emptied)", wal.display()))));
    lines.extend(delta.abandoned.iter().map(|path| ("tablespace", format!("{} (is removed)", path.display()))));
    if !delta.unarchived.is_empty() {
        lines.push(("unarchived WAL", format!("is archived first: {}", delta.unarchived.join(", "))));
    }
    if !delta.unfinished.is_empty() {
        let directory = plan.data().join(format!("{SAVED_WAL}…"));
        lines.push(("other WAL", format!("is kept in {}: {}", directory.display(), delta.unfinished.join(", "))));
    }
    lines
}

/// Where a segment is written before it gets its name: beside it, as `pg_wal` may be on another file system.
pub(super) fn segment_part(plan: &Plan) -> Option<PathBuf> {
    plan.delta.as_ref().map(|_| Path::new(&wal_directory(plan)).join("pghydrant.segment.part"))
}
