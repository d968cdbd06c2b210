//! A standby as the source of a backup.
//!
//! The server does most of it: `pg_backup_start` waits for a restartpoint, the label says `BACKUP FROM: standby`, and
//! `pg_backup_stop` refuses a backup during which it was promoted, or full page writes were off. Consistent is such a
//! backup at the minimum recovery point of its `pg_control`, which is why that is read after all other files.
//!
//! What a standby cannot do is end a WAL segment: the last one that the backup needs is complete once the primary has
//! gone on to the next. It is waited for; a busy primary, or one with `archive_timeout`, does it by itself, and with
//! `--primary` we ask for it.

use std::time::{Duration, Instant};

use anyhow::Result;
use engine::units::{Lsn, Timeline};
use engine::wal::name::SegmentName;

use super::server::Server;
use crate::exit::{Exit, Failure};
use crate::output::Output;
use crate::postgres::client::{Client, value};
use crate::postgres::conninfo::Conninfo;

/// A primary without any work, and without `archive_timeout`, would be waited for for ever.
const COMPLETION_LIMIT: Duration = Duration::from_secs(30 * 60);
/// After so long the user is told what the backup waits for.
const PATIENCE: Duration = Duration::from_secs(5);

/// The server whose WAL a standby replays.
#[derive(Debug)]
pub(super) struct Upstream {
    /// How to reach it, where the user said.
    primary: Option<(Conninfo, Client)>,
    /// Since when a segment is waited for.
    waiting: Option<Instant>,
    told: bool,
}

impl Upstream {
    /// Of a standby; `None` for a primary, for which none may be named.
    pub(super) fn of(server: &Server, primary: Option<&Conninfo>) -> Result<Option<Self>> {
        if !server.is_standby {
            return match primary {
                None => Ok(None),
                Some(_) => {
                    Err(Failure::new(Exit::Usage, "--primary is for backups of standbys: this server is a primary")
                        .into())
                }
            };
        }
        let primary = primary.map(|conninfo| Ok::<_, anyhow::Error>((conninfo.clone(), Client::connect(conninfo)?)));
        let primary = primary.transpose()?;
        if let Some((_, primary)) = &primary {
            refuse_stranger(primary, server)?;
        }
        Ok(Some(Self { primary, waiting: None, told: false }))
    }

    /// Whether the standby `client` has `segment` to its end. Where not, the primary is asked to end it, or the user
    /// is told how; after [`COMPLETION_LIMIT`] the backup is given up.
    pub(super) fn has_sent(
        &mut self,
        segment: SegmentName,
        segment_bytes: u64,
        client: &Client,
        output: &Output,
    ) -> Result<bool> {
        let name = segment.file_name(segment_bytes);
        let received = received(client)?;
        // Behind what was received: a position of another timeline says nothing of this segment.
        // What it receives, or else what it has replayed.
        let sql = "SELECT pg_is_in_recovery(), coalesce( \
            (SELECT received_tli FROM pg_stat_wal_receiver WHERE received_tli > 0), min_recovery_end_timeline) \
            FROM pg_control_recovery()";
        let row = client.row(sql, &[])?;
        let (in_recovery, timeline): (bool, i32) = (value(&row, 0)?, value(&row, 1)?);
        if !in_recovery || timeline.cast_unsigned() != segment.timeline.0 {
            let became = if in_recovery { format!("went to timeline {timeline}") } else { "was promoted".to_owned() };
            let message = format!("the standby {became} before it had all of WAL segment {name}");
            return Err(Failure::new(Exit::Failed, message).hint("back it up again").into());
        }
        if received >= segment.end(segment_bytes) {
            return Ok(true);
        }
        let Some(began) = self.waiting else {
            self.waiting = Some(Instant::now());
            if let Err(error) = self.end_segment() {
                output.warning(&format!("the primary cannot be asked to end its WAL segment: {error:#}"));
            }
            return Ok(false);
        };
        if began.elapsed() >= COMPLETION_LIMIT {
            let minutes = COMPLETION_LIMIT.as_secs() / 60;
            let message =
                format!("the primary has not ended WAL segment {name}, which the backup needs, in {minutes} minutes");
            return Err(Failure::new(Exit::Failed, message)
                .hint("name it with --primary, or set archive_timeout there")
                .into());
        }
        if began.elapsed() >= PATIENCE && !self.told {
            self.told = true;
            output.note(&format!(
                "waiting until the primary ends WAL segment {name}; SELECT pg_switch_wal() there does it at once (and --primary the next time)"
            ));
        }
        Ok(false)
    }
}

impl Upstream {
    /// Has the primary, where the user said how to reach it, begin another segment. The session of before the copy may
    /// not have outlived it: then another is opened.
    fn end_segment(&mut self) -> Result<()> {
        const SWITCH: &str = "SELECT pg_switch_wal()";
        let Some((conninfo, primary)) = &mut self.primary else { return Ok(()) };
        if primary.query(SWITCH, &[]).is_err() {
            *primary = Client::connect(conninfo)?;
            primary.query(SWITCH, &[])?;
        }
        Ok(())
    }
}

/// How far the WAL of a standby goes: what was streamed is on its disk, and so is what it replayed out of an archive.
pub(super) fn received(client: &Client) -> Result<Lsn> {
    let sql = "SELECT greatest(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn())::text";
    client.one::<String>(sql, &[])?.parse().map_err(anyhow::Error::msg)
}

impl Server {
    /// A standby whose upstream was promoted meanwhile has its files of one timeline and its end of another.
    pub(super) fn refuse_another_timeline(&self, client: &Client, began: Timeline) -> Result<()> {
        if !self.is_standby {
            return Ok(());
        }
        let now: i32 = client.one("SELECT min_recovery_end_timeline FROM pg_control_recovery()", &[])?;
        if now.cast_unsigned() == began.0 {
            return Ok(());
        }
        let message = format!("the standby went from timeline {began} to {now} while it was backed up");
        Err(Failure::new(Exit::Failed, message).hint("back it up again").into())
    }
}

fn refuse_stranger(primary: &Client, server: &Server) -> Result<()> {
    let sql = "SELECT system_identifier, pg_is_in_recovery() FROM pg_control_system()";
    let row = primary.row(sql, &[])?;
    let (identifier, in_recovery): (i64, bool) = (value(&row, 0)?, value(&row, 1)?);
    let ours = server.control.system_identifier;
    let message = match (identifier.cast_unsigned() == ours.0, in_recovery) {
        (true, false) => return Ok(()),
        (false, _) => "--primary is another cluster than the standby (their system identifiers differ)",
        (true, true) => "--primary is a standby itself",
    };
    Err(Failure::new(Exit::Refused, message).hint("name the server that the standby follows").into())
}
