//! How the WAL that a backup needs comes into the repository with it.
//!
//! Whether the server archives to *this* repository is not read out of `archive_command`, which may be a script; it is
//! seen. A temporary replication slot holds the WAL from before the backup's start. The start makes the server switch to a
//! new segment; if the segment that was current before then appears in our archive, archiving works and comes here: the
//! slot is dropped, so that a long backup does not fill the server's disk, and at the end the archive is waited for. If it
//! never appears, the slot stays, and the segments are read from `pg_wal` at the end. Either way they are all in the
//! archive before the backup is committed. A standby's WAL goes the same two ways; what it must wait for is told in
//! [`super::standby`].

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use engine::format::backup::WalRange;
use engine::progress::Progress as _;
use engine::units::{Lsn, Timeline};
use engine::wal::WalArchive;
use engine::wal::name::{SegmentName, WalFile};

use super::server::Server;
use super::standby::{self, Upstream};
use crate::exit::{Exit, Failure};
use crate::output::Output;
use crate::postgres::client::{Client, value};

/// Between two looks for the segment that proves the archive.
const EVIDENCE_POLL: Duration = Duration::from_secs(5);
/// Between two looks for the last segments.
const ARRIVAL_POLL: Duration = Duration::from_millis(200);
/// How long the archive may bring nothing new before the rest is read from the server.
const ARRIVAL_PATIENCE: Duration = Duration::from_secs(60);
/// The archiver tries three times in a row, a second apart, and then rests for a minute: so many failures are enough.
const FAILURES_ENOUGH: i64 = 3;

/// Where the WAL came from, for the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Origin {
    /// The server archives to this repository.
    Archive,
    /// It was read from the server's `pg_wal`, all or in part.
    Server,
    /// It lay in the base backup that was adopted, all or in part.
    Directory,
}

/// Keeps the WAL of a backup from being lost.
pub(super) struct WalSupply<'a> {
    client: &'a Client,
    archive: WalArchive,
    data: &'a Path,
    segment_bytes: u64,
    /// Whose WAL it is, where the server is a standby.
    upstream: Option<Upstream>,
    slot: Option<String>,
    /// Current before the backup began: in our archive, it proves that the server archives here.
    evidence: Option<SegmentName>,
    proven: bool,
    looked: Instant,
}

impl<'a> WalSupply<'a> {
    /// Begins to hold the WAL. To be called before the backup is started.
    pub(super) fn hold(
        client: &'a Client,
        archive: WalArchive,
        server: &'a Server,
        upstream: Option<Upstream>,
        output: &Output,
    ) -> Result<Self> {
        let (data, segment_bytes) = (server.data.as_path(), server.info.wal_segment_bytes);
        // A standby's WAL is its primary's to archive: whether that is done is seen, not asked.
        let archiving =
            upstream.is_some() || client.one::<String>("SELECT current_setting('archive_mode')", &[])? != "off";
        // Backups from two containers may have the same process id.
        let name = format!("pghydrant_{}_{}", std::process::id(), crate::random::digits()?);
        let slot = match client.query("SELECT pg_create_physical_replication_slot($1, true, true)", &[&name]) {
            Ok(_) => Some(name),
            Err(error) if archiving => {
                output.warning(&format!("no replication slot holds the WAL, so the archive must bring it: {error:#}"));
                None
            }
            Err(error) => {
                let message = format!("archiving is off, and no replication slot can hold the WAL: {error:#}");
                return Err(Failure::new(Exit::Refused, message)
                    .hint("turn archiving on, or raise max_replication_slots and connect as a superuser or with REPLICATION")
                    .into());
            }
        };
        let looked = Instant::now();
        let mut supply =
            Self { client, archive, data, segment_bytes, upstream, slot, evidence: None, proven: false, looked };
        if archiving {
            let current = supply.current_segment()?;
            supply.evidence = Some(current).filter(|_| !supply.is_archived(current).unwrap_or(true));
        }
        Ok(supply)
    }

    /// To be called often while the backup runs: lets the server have its WAL back once the archive is proven.
    pub(super) fn watch(&mut self) -> Result<()> {
        if !self.proven && self.looked.elapsed() >= EVIDENCE_POLL {
            self.looked = Instant::now();
            self.look_for_evidence()?;
        }
        Ok(())
    }

    fn look_for_evidence(&mut self) -> Result<()> {
        let Some(evidence) = self.evidence else { return Ok(()) };
        if !self.is_archived(evidence)? {
            return Ok(());
        }
        // A name proves nothing: a server that was set back, or copied, writes other WAL under the same names.
        self.compare(evidence)?;
        self.proven = true;
        if let Some(slot) = self.slot.take() {
            self.client.query("SELECT pg_drop_replication_slot($1)", &[&slot])?;
        }
        Ok(())
    }

    /// Brings every segment of `range` into the archive, and the history of its timeline.
    pub(super) fn bring(&mut self, range: &WalRange, output: &Output) -> Result<Origin> {
        self.look_for_evidence()?;
        let mut missing = self.needed(range);
        let phase = output.phase("WAL", missing.len() as u64 * self.segment_bytes);
        let mut origin = Origin::Archive;
        let failed_before = self.archiver_failures()?;
        let mut last_arrival = Instant::now();
        while !missing.is_empty() {
            if phase.cancelled() {
                return Err(engine::Error::Cancelled.into());
            }
            let before = missing.len();
            let mut left = Vec::new();
            for segment in missing {
                if !self.is_archived(segment)? {
                    left.push(segment);
                }
            }
            missing = left;
            if missing.len() < before {
                last_arrival = Instant::now();
                phase.advance((before - missing.len()) as u64 * self.segment_bytes);
            }
            let given_up = last_arrival.elapsed() >= ARRIVAL_PATIENCE
                || self.archiver_failures()?.saturating_sub(failed_before) >= FAILURES_ENOUGH;
            if !self.proven || given_up {
                if self.proven && !missing.is_empty() {
                    output.warning(
                        "the archive does not bring the last WAL of the backup: it is read from the server instead",
                    );
                }
                for segment in std::mem::take(&mut missing) {
                    if !self.is_complete(segment, output)? {
                        missing.push(segment);
                        continue;
                    }
                    self.push(&segment.file_name(self.segment_bytes))?;
                    phase.advance(self.segment_bytes);
                    origin = Origin::Server;
                }
            }
            if !missing.is_empty() {
                std::thread::sleep(ARRIVAL_POLL);
            }
        }
        drop(phase);
        for segment in self.needed(range) {
            self.compare(segment)?;
        }
        self.bring_history(range.timeline, output)?;
        Ok(origin)
    }

    /// Refuses a segment of the archive that is not the server's own, as far as the server still has its own.
    fn compare(&self, segment: SegmentName) -> Result<()> {
        // Of a segment that it is still receiving, a standby has a file with something older behind it.
        let whole = self.upstream.is_none() || standby::received(self.client)? >= segment.end(self.segment_bytes);
        if whole { self.compare_file(&segment.file_name(self.segment_bytes)) } else { Ok(()) }
    }

    fn compare_file(&self, name: &str) -> Result<()> {
        let path = self.data.join("pg_wal").join(name);
        let archived = if path.exists() { self.archive.push(&path) } else { return Ok(()) };
        match archived {
            Ok(_) => Ok(()),
            // Recycled and written over while it was read, so the server had it archived.
            Err(_) if !path.exists() => Ok(()),
            Err(error) => Err(unless_another_history(error)),
        }
    }

    /// The history of the backup's timeline: without it no recovery finds the way from one timeline to the next.
    fn bring_history(&self, timeline: Timeline, output: &Output) -> Result<()> {
        let name = WalFile::History(timeline).file_name(self.segment_bytes);
        if timeline.0 <= 1 {
            return Ok(());
        }
        if self.archive.contains(&name)? {
            return self.compare_file(&name);
        }
        if self.data.join("pg_wal").join(&name).exists() {
            return self.push(&name);
        }
        output.warning(&format!(
            "{name} is neither in the archive nor in pg_wal: recovery cannot come from an older timeline"
        ));
        Ok(())
    }

    /// A primary ends the last segment when it ends the backup; a standby has to wait for its primary.
    fn is_complete(&mut self, segment: SegmentName, output: &Output) -> Result<bool> {
        let (client, segment_bytes) = (self.client, self.segment_bytes);
        self.upstream.as_mut().map_or(Ok(true), |upstream| upstream.has_sent(segment, segment_bytes, client, output))
    }

    fn needed(&self, range: &WalRange) -> Vec<SegmentName> {
        let first = SegmentName::holding(range.timeline, range.start, self.segment_bytes);
        let last = SegmentName::ending_at(range.timeline, range.stop, self.segment_bytes);
        std::iter::successors(Some(first), |segment| Some(segment.next()))
            .take_while(|segment| *segment <= last)
            .collect()
    }

    fn push(&self, name: &str) -> Result<()> {
        let path = self.data.join("pg_wal").join(name);
        if !path.exists() {
            return Err(Failure::new(
                Exit::Failed,
                format!("{} is gone, and the archive does not have it", path.display()),
            )
            .hint("raise wal_keep_size or max_slot_wal_keep_size, or archive to this repository, and back up again")
            .into());
        }
        let pushed = self.archive.push(&path).map_err(unless_another_history);
        pushed.with_context(|| format!("cannot bring {name} into the archive"))?;
        Ok(())
    }

    fn is_archived(&self, segment: SegmentName) -> Result<bool> {
        Ok(self.archive.contains(&segment.file_name(self.segment_bytes))?)
    }

    fn current_segment(&self) -> Result<SegmentName> {
        let sql = if self.upstream.is_some() {
            "SELECT pg_last_wal_replay_lsn()::text, min_recovery_end_timeline FROM pg_control_recovery()"
        } else {
            // pg_control may still have the timeline from before a promotion.
            "SELECT lsn::text, ('x' || substr(pg_walfile_name(lsn), 1, 8))::bit(32)::int \
                FROM pg_current_wal_insert_lsn() AS lsn"
        };
        let row = self.client.row(sql, &[])?;
        let (lsn, timeline): (String, i32) = (value(&row, 0)?, value(&row, 1)?);
        let lsn: Lsn = lsn.parse().map_err(anyhow::Error::msg)?;
        Ok(SegmentName::holding(Timeline(timeline.cast_unsigned()), lsn, self.segment_bytes))
    }

    fn archiver_failures(&self) -> Result<i64> {
        self.client.one("SELECT failed_count FROM pg_stat_archiver", &[])
    }
}

/// What is to be done where the archive has other WAL under the names of the server's own.
pub(super) fn unless_another_history(error: engine::Error) -> anyhow::Error {
    let engine::Error::Refused(refusal) = error else { return error.into() };
    let hint = "the archive has the WAL of another history of this cluster: was the server set back to a snapshot, or is \
                it a copy? Back it up, and archive, under another name: --cluster";
    Failure::new(Exit::Refused, refusal).hint(hint).into()
}
