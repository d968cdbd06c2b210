//! The copy: from the mount (or the blocks) to files that a server can start from.
//!
//! The engine moves the bytes ([`engine::hydration`]); this file gives it its place in the restore. The order is what
//! keeps a half-done copy from starting: blocks, then the configuration, then `backup_label`, then `pg_control`.

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::Error;
use engine::hydration::{Fill, Filled, Hydration, Layout, Outlined, Source as FillSource};
use engine::io::durable;
use engine::progress::{Progress, Stage};
use engine::units::SessionId;
use engine::wal::name::SegmentName;

use super::Restore;
use super::delta;
use super::plan::{Plan, Source};
use super::session::{Journal, Phase};
use super::staging::Feed;
use super::way::{self, Io};
use super::{files, marker};
use crate::exit::{Exit, Failure};
use crate::human;
use crate::mount::{MountRequest, SessionMount};
use crate::postgres::binaries::Binaries;
use crate::postgres::control;
use crate::postgres::owner::Owner;

/// Another restore holds the gate while it makes its directories, which takes moments.
const GATE_PATIENCE: Duration = Duration::from_secs(60);
/// Between two attempts.
const GATE_POLL: Duration = Duration::from_millis(20);

/// A copy whose blocks are all durable.
pub(super) struct Copied {
    hydration: Hydration,
    filled: Filled,
    /// The data directory, locked: another restore into it waits for nothing, it is refused.
    _lock: File,
}

impl Restore<'_> {
    /// Mounts the backup, if the copy reads it from there and is not done yet.
    pub(super) fn mount(&mut self) -> anyhow::Result<Option<SessionMount>> {
        if self.plan().source == Source::Blocks {
            return Ok(None);
        }
        if self.session.journal.phase >= Phase::Recovering {
            take_away_leftover(&self.session.journal)?;
            if !self.session.journal.moves_on {
                return Ok(None);
            }
        }
        let step = self.context.output.step("mount");
        let plan = self.plan();
        let request = MountRequest {
            repository: plan.repository.clone(),
            cluster: plan.cluster.clone(),
            backup: plan.backup.clone(),
            session: self.session.journal.id.clone(),
            mount_directory: plan.mount_directory.clone(),
            owner: (plan.owner.uid, plan.owner.gid),
            memory_bytes: None,
            log: self.session.mount_log(),
        };
        let mount = SessionMount::start(&request)?;
        mount.prove()?;
        self.session.journal.mount = Some(mount.mountpoint().to_owned());
        self.session.save()?;
        let place = mount.mountpoint().display().to_string();
        let time = step.done(&place);
        self.session.note_step("mount", time.as_secs_f64(), place);
        Ok(Some(mount))
    }

    /// Takes the mount away.
    pub(super) fn unmount(&mut self, mount: Option<SessionMount>) -> anyhow::Result<()> {
        let Some(mount) = mount else { return Ok(()) };
        let step = self.context.output.step("unmount");
        mount.stop()?;
        self.session.journal.mount = None;
        let time = step.done("");
        self.session.note_step("unmount", time.as_secs_f64(), "");
        Ok(())
    }

    /// The target, with its map, and its directory's lock.
    fn begin(&self) -> anyhow::Result<(Hydration, File)> {
        let plan = self.plan();
        let owner = rustix::process::geteuid().is_root();
        let owner = owner.then_some(engine::io::Owner { uid: plan.owner.uid, gid: plan.owner.gid });
        let gate = lock_above(plan.data(), GATE_PATIENCE, &|| self.context.interrupted())?;
        let (id, disk) = (&self.session.journal.id, Arc::new(plan.disk()));
        let (backup, layout) = (self.backup.clone(), layout(plan));
        let hydration = match delta::existing(plan) {
            Some(existing) => Hydration::begin_over(backup, &layout, existing, id, owner, disk)?,
            None => Hydration::begin(backup, &layout, id, owner, disk)?,
        };
        let lock = lock_directory(plan.data())?;
        drop(gate);
        Ok((hydration, lock))
    }

    /// Writes every block that is missing. All of it is durable afterwards.
    pub(super) fn copy(&mut self, mount: Option<&SessionMount>) -> anyhow::Result<Copied> {
        let (hydration, lock) = self.begin()?;
        let fill = Fill {
            source: match mount {
                Some(mount) => FillSource::Mount(mount.mountpoint().to_owned()),
                None if self.plan().io == Some(Io::Reflink) => {
                    FillSource::Reflink { trusted: self.plan().trust_repository }
                }
                None => FillSource::Blocks,
            },
            workers: self.context.workers()?,
            memory_bytes: usize::try_from(self.context.memory_bytes()?).unwrap_or(usize::MAX),
        };
        let compared = self.write_over(&hydration, &fill, mount)?;
        let phase = self.context.output.phase("copy", self.plan().bytes);
        let step = self.context.output.step("copy");
        let progress = Delivering { progress: &phase, mount };
        let outlined = if compared { Ok(Outlined::default()) } else { hydration.outline(fill.workers, &progress) };
        let filled = outlined.and_then(|outlined| Ok((outlined, hydration.fill(&fill, &progress)?)));
        let figures = phase.finish();
        let (outlined, filled) = filled.map_err(|error| explain(error, mount, &self.session.journal.id))?;
        let resumed = if filled.present_blocks > 0 {
            format!(", {} blocks were there already", filled.present_blocks)
        } else {
            String::new()
        };
        let way = way::taken(&filled, &outlined, self.plan().trust_repository);
        let detail = if compared {
            format!(
                "{} written of files made anew, in {}; {way}",
                human::bytes(filled.bytes),
                human::count(filled.blocks, "block")
            )
        } else {
            format!("{}{resumed}; {way}", figures.text())
        };
        let time = step.done(&detail);
        self.session.note_step("copy", time.as_secs_f64(), detail);
        Ok(Copied { hydration, filled, _lock: lock })
    }

    /// The configuration, before anything can start. A copy that goes on after a crash makes files anew that are not as
    /// the backup has them, so it is always written after it.
    pub(super) fn configure(&mut self) -> anyhow::Result<()> {
        let step = self.context.output.step("configure");
        self.session.enter(Phase::Configuring)?;
        let owner = Owner::named(&self.plan().owner.name)
            .or_else(|_| Owner::numbered(self.plan().owner.uid, self.plan().owner.gid))?;
        let binaries = Binaries::in_directory(&self.plan().programs)?;
        if self.session.journal.isolation.is_none() {
            self.session.journal.isolation = self.configuration()?.isolate(&binaries, &owner)?;
            self.session.save()?;
        }
        let configuration = self.configuration()?;
        let detail = if self.plan().no_start {
            if let Some(setting) = configuration.leave_for_first_start(&binaries, &owner)? {
                self.context.output.warning(&format!(
                    "postgresql.conf names another data directory: start it with pg_ctl -o \"-c {}='{}'\"",
                    setting.name, setting.value
                ));
            }
            format!("recovery.signal and postgresql.auto.conf, to {}", self.plan().target)
        } else {
            let originals = configuration.begin(&binaries, &owner)?;
            if originals.kept.iter().any(|(name, value)| name == "ssl" && value == "off") {
                self.context.output.warning("TLS is off: its certificate, key or lists are not on this machine");
            }
            self.session.journal.originals = Some(originals);
            self.session.save()?;
            format!("to {}", self.plan().target)
        };
        if !self.plan().adopt {
            marker::set(self.plan(), &self.session.journal.id)?;
        }
        let time = step.done(&detail);
        self.session.note_step("configure", time.as_secs_f64(), detail);
        Ok(())
    }

    /// `backup_label`, then `pg_control`: from here on a server can start. It does so right away, so the map is closed.
    pub(super) fn publish(&mut self, copied: &Copied, mount: Option<&SessionMount>) -> anyhow::Result<()> {
        if self.plan().no_start {
            self.bring_backup_wal(mount)?;
        }
        self.session.enter(Phase::Publishing)?;
        copied.hydration.place_last(&copied.filled)?;
        self.close(&copied.hydration)
    }

    /// `pg_control` is there, and with it all that it comes after: a server may have run here since, whoever started it.
    pub(super) fn is_published(&self) -> bool {
        self.session.journal.phase == Phase::Publishing && self.plan().data().join(control::PATH).exists()
    }

    /// A crash fell between `pg_control` and the journal's next word: no block and no configuration is written again.
    pub(super) fn close_published(&mut self) -> anyhow::Result<()> {
        let (hydration, _lock) = self.begin()?;
        durable::sync_directory(&self.plan().data().join("global"))?;
        self.close(&hydration)
    }

    fn close(&mut self, hydration: &Hydration) -> anyhow::Result<()> {
        if !self.plan().no_start {
            // The journal first: a crash in between leaves a map that is open, and that nobody opens again.
            self.session.enter(Phase::Recovering)?;
            hydration.close()?;
        }
        Ok(())
    }

    /// The WAL that makes the backup consistent, in `pg_wal` itself: for who checks or starts the copy without us.
    fn bring_backup_wal(&mut self, mount: Option<&SessionMount>) -> anyhow::Result<()> {
        let step = self.context.output.step("wal");
        let plan = self.plan();
        let (range, segment_bytes) = (&self.backup.info.wal, self.backup.info.server.wal_segment_bytes);
        let feed = match mount {
            Some(mount) => Feed::Mount(mount.mountpoint().join("wal"), self.backup.cluster.wal()),
            None => Feed::Archive(self.backup.cluster.wal()),
        };
        let first = SegmentName::holding(range.timeline, range.start, segment_bytes);
        let last = SegmentName::ending_at(range.timeline, range.stop, segment_bytes);
        for number in first.number..=last.number {
            let name = SegmentName { timeline: range.timeline, number }.file_name(segment_bytes);
            let path = plan.data().join("pg_wal").join(&name);
            let part = delta::segment_part(plan).unwrap_or_else(|| plan.session_directory().join("segment.part"));
            files::remove(&part)?;
            anyhow::ensure!(
                feed.bring(&name, &part)?,
                Failure::new(
                    Exit::Failed,
                    format!("WAL segment {name}, which the backup needs, is not in the archive")
                )
            );
            files::give(&part, &plan.owner)?;
            durable::rename_durably(&part, &path)?;
        }
        let count = last.number + 1 - first.number;
        let detail = format!("{count} segment{}", if count == 1 { "" } else { "s" });
        let time = step.done(&detail);
        self.session.note_step("wal", time.as_secs_f64(), detail);
        Ok(())
    }
}

/// Takes away the mount of a run that was killed together with its mount's server.
pub(super) fn take_away_leftover(journal: &Journal) -> anyhow::Result<()> {
    // Where it was mounted is noted once it is; until then it is where the plan and this user's environment say.
    let noted = journal.mount.as_deref().and_then(Path::parent);
    SessionMount::take_away_leftover(&journal.id, noted.or(journal.plan.mount_directory.as_deref()))
}

/// The directories of a plan, as the engine has them.
pub(super) fn layout(plan: &Plan) -> Layout {
    let tablespaces: BTreeMap<u32, PathBuf> =
        plan.tablespaces.iter().map(|tablespace| (tablespace.oid, tablespace.place.path.clone())).collect();
    let wal = plan.delta.as_ref().and_then(|delta| delta.wal.clone());
    Layout { data: plan.data().to_owned(), tablespaces, wal }
}

/// Two restores that begin at the same moment: the nearest directory that exists lets one through at a time.
/// Whoever may read that directory can lock it, for as long as they like: so it is waited for, but not for ever.
fn lock_above(data: &Path, patience: Duration, interrupted: &dyn Fn() -> bool) -> anyhow::Result<File> {
    let above = data.ancestors().skip(1).find(|path| path.is_dir()).unwrap_or(Path::new("/"));
    let directory = File::open(above).map_err(|cause| Error::io("open", above, cause))?;
    let began = Instant::now();
    loop {
        match directory.try_lock() {
            Ok(()) => return Ok(directory),
            Err(TryLockError::Error(cause)) => return Err(Error::io("lock", above, cause).into()),
            Err(TryLockError::WouldBlock) if interrupted() => return Err(Error::Cancelled.into()),
            Err(TryLockError::WouldBlock) if began.elapsed() < patience => std::thread::sleep(GATE_POLL),
            Err(TryLockError::WouldBlock) => {
                let message = format!("another process has kept {} locked for {patience:?}", above.display());
                return Err(Failure::new(Exit::Refused, message)
                    .hint(format!("`fuser -v {}` says which; restore elsewhere, or end it", above.display()))
                    .into());
            }
        }
    }
}

fn lock_directory(data: &Path) -> anyhow::Result<File> {
    let directory = File::open(data).map_err(|cause| Error::io("open", data, cause))?;
    directory
        .try_lock()
        .map_err(|_| Failure::new(Exit::Refused, format!("another restore works in {}", data.display())))?;
    Ok(directory)
}

/// Tells the watch over the mount, too, of what has arrived.
pub(super) struct Delivering<'a> {
    pub(super) progress: &'a dyn Progress,
    pub(super) mount: Option<&'a SessionMount>,
}

impl Progress for Delivering<'_> {
    fn advance(&self, bytes: u64) {
        self.progress.advance(bytes);
        if let Some(mount) = self.mount {
            mount.delivered(bytes);
        }
    }

    fn waited(&self, stage: Stage, nanoseconds: u64) {
        self.progress.waited(stage, nanoseconds);
    }

    fn cancelled(&self) -> bool {
        self.progress.cancelled()
    }
}

/// What became of the mount's server, where the copier only saw an error of the mount.
pub(super) fn explain(error: Error, mount: Option<&SessionMount>, session: &SessionId) -> anyhow::Error {
    let Some(mount) = mount else { return error.into() };
    if let Some(patience) = mount.gave_up_after() {
        let seconds = patience.as_secs();
        let message =
            format!("the mount's server hung: no data and no answer for {seconds} s; the mount was taken away");
        return Failure::new(Exit::Waiting, message)
            .hint(format!(
                "is the repository's disk reachable? `pghydrant retry {session}` goes on from here, `pghydrant cancel {session}` gives it up"
            ))
            .into();
    }
    match Some(mount).filter(|mount| mount.prove().is_err()).and_then(SessionMount::last_words) {
        Some(words) => anyhow::Error::from(error).context(format!("the mount's server ended: {words}")),
        None => error.into(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_lock_of_somebody_else_is_waited_for_but_not_for_ever() {
        let place = tempfile::tempdir().unwrap();
        let data = place.path().join("data");
        let foreign = File::open(place.path()).unwrap();
        foreign.lock().unwrap();
        let refused = lock_above(&data, Duration::from_millis(1), &|| false).unwrap_err();
        assert_eq!(Failure::exit_of(&refused), Exit::Refused);
        assert!(refused.to_string().contains(&place.path().display().to_string()), "{refused}");
        let interrupted = lock_above(&data, GATE_PATIENCE, &|| true).unwrap_err();
        assert_eq!(Failure::exit_of(&interrupted), Exit::Interrupted);
        drop(foreign);
        // A process that another test starts right now may have it for a moment more.
        lock_above(&data, GATE_PATIENCE, &|| false).unwrap();
    }
}
