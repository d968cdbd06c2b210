//! WAL: the whole way from the command to the promoted instance, of which the servers' logs tell the replay; the first
//! query after a restore to the end of the backup; archiving.
//!
//! The cluster is backed up anew, with its archive switched on, and then writes as many segments as asked for. All
//! contestants get the same segments: from pghydrant's repository, from pgBackRest's, by `cp` from a directory, or
//! laid into `pg_wal` before the start. They end when the server answers, on its own socket.

use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use crate::cluster::{self, PORT};
use crate::contest::{Contestant, Outcome, hold};
use crate::options::Section;
use crate::ours::Repository;
use crate::peers::PgBackRest;
use crate::query::wait_for;
use crate::report::{Kind, Report, Work};
use crate::world::{World, remove};

/// How long the archiver may take for all segments.
const ARCHIVER_PATIENCE: Duration = Duration::from_secs(1800);
/// Segments that are pushed one after the other.
const PUSHED: usize = 64;
/// A server that answers is not yet a promoted one.
const PROMOTED: (&str, &str) = ("SELECT pg_is_in_recovery()", "f");
const ANSWERS: (&str, &str) = ("SELECT 1", "1");

/// What all contestants restore from.
struct Sources<'w> {
    ours: Repository<'w>,
    pgbackrest: Result<PgBackRest<'w>, String>,
    /// What `pg_basebackup` made.
    base: PathBuf,
    /// The segments as they are.
    archive: PathBuf,
}

pub(crate) fn run(world: &World, report: &mut Report) -> anyhow::Result<()> {
    let codec = world.options.codec();
    for codec in &world.options.codecs {
        // Their part is done, and a base backup and the archives take as much.
        remove(&Repository::new(world, *codec).path)?;
        remove(&world.path(&format!("pgbackrest-{codec}")))?;
    }
    let sources = Sources {
        ours: Repository::named(world, "repository-wal", codec),
        pgbackrest: PgBackRest::find(world, codec).map(PgBackRest::asynchronous),
        base: world.path("base"),
        archive: world.server_directory("archive")?,
    };
    let data = cluster::data(world);
    cluster::start(world, &data)?;
    let made = sources.make(world);
    cluster::stop_by(world, &data, "immediate")?;
    made?;
    whole(world, report, &sources)?;
    first_query(world, report, &sources)?;
    push(world, report, &sources)?;
    for path in [&sources.base, &sources.archive, &sources.ours.path, &world.path("pusher")] {
        remove(path)?;
    }
    if let Ok(pgbackrest) = &sources.pgbackrest {
        remove(&pgbackrest.repository())?;
    }
    // Crash recovery, and a checkpoint, before pages are changed below the server's feet.
    cluster::start(world, &data)?;
    for setting in ["archive_command", "max_wal_size"] {
        cluster::sql(world, &format!("ALTER SYSTEM RESET {setting}"))?;
    }
    cluster::stop(world, &data)
}

impl Sources<'_> {
    /// Backups first, then the WAL that they do not have.
    fn make(&self, world: &World) -> anyhow::Result<()> {
        self.ours.init()?;
        let mut script =
            format!("set -e\ncp $1 {}/$2\n{} $1\n", self.archive.display(), self.ours.wal_command("push"),);
        if let Ok(pgbackrest) = &self.pgbackrest {
            pgbackrest.init()?;
            script += &format!("{} $1\n", pgbackrest.wal_command("archive-push", &cluster::data(world)));
        }
        let path = world.path("archive.sh");
        fs::write(&path, script).with_context(|| format!("cannot write {}", path.display()))?;
        cluster::sql(world, &format!("ALTER SYSTEM SET archive_command = 'sh {} %p %f'", path.display()))?;
        // Few checkpoints, as where there is much to write.
        cluster::sql(world, "ALTER SYSTEM SET max_wal_size = '2GB'")?;
        cluster::sql(world, "SELECT pg_reload_conf()")?;
        self.ours.backup()?;
        if let Ok(pgbackrest) = &self.pgbackrest {
            pgbackrest.backup("full")?;
        }
        let mut base = world.server_program("pg_basebackup");
        base.args(["-c", "fast", "-X", "none", "--no-sync", "-d"])
            .arg(cluster::connection(world))
            .arg("-D")
            .arg(&self.base);
        world.run(&mut base)?;
        write_wal(world)
    }
}

/// Updates all over one table, until there is as much WAL as asked for and all of it is archived.
fn write_wal(world: &World) -> anyhow::Result<()> {
    let segments = world.options.segments;
    eprintln!("  writing {segments} segments of WAL");
    let load = format!(
        "DO $$ DECLARE began pg_lsn := pg_current_wal_lsn(); turn int := 0; BEGIN \
         WHILE pg_current_wal_lsn() - began < {segments} * 16777216::numeric LOOP \
         UPDATE customers SET balance = balance + 1 WHERE id % 20 = turn % 20; COMMIT; turn := turn + 1; \
         END LOOP; END $$"
    );
    cluster::sql(world, &load)?;
    let last = cluster::sql(world, "SELECT pg_walfile_name(pg_switch_wal())")?;
    let began = Instant::now();
    loop {
        let archived = cluster::sql(world, "SELECT coalesce(max(last_archived_wal), '') FROM pg_stat_archiver")?;
        // Names of one timeline sort as their segments; a backup's own file has the segment's name and more.
        if archived.as_str() >= last.as_str() {
            return Ok(());
        }
        ensure!(began.elapsed() < ARCHIVER_PATIENCE, "{last} is not archived; {archived} was the last");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Where a contestant's segments come from, and where its recovery ends.
#[derive(Clone, Copy)]
enum End {
    Wal,
    Backup,
}

fn whole(world: &World, report: &mut Report, sources: &Sources<'_>) -> anyhow::Result<()> {
    let mut contestants = contestants(world, report, sources, End::Wal);
    let laid = move || {
        lay_base(world, sources)?;
        let target = world.target();
        for entry in fs::read_dir(&sources.archive).context("the archive")? {
            let entry = entry.context("a segment")?;
            let to = target.join("pg_wal").join(entry.file_name());
            fs::copy(entry.path(), &to).with_context(|| format!("cannot write {}", to.display()))?;
            world.give_to_server(&to)?;
        }
        start(world, Some("/bin/false"), End::Wal)?;
        recovered(world, End::Wal)
    };
    contestants.push(finish(world, Contestant::with_outcome(Kind::Peer, "whole: cp, segments in pg_wal", laid)));
    hold(world, report, Section::Wal, Work::Nothing, contestants)
}

fn first_query(world: &World, report: &mut Report, sources: &Sources<'_>) -> anyhow::Result<()> {
    let contestants = contestants(world, report, sources, End::Backup);
    hold(world, report, Section::Wal, Work::Nothing, contestants)
}

fn contestants<'w>(world: &'w World, report: &mut Report, sources: &'w Sources<'w>, end: End) -> Vec<Contestant<'w>> {
    let what = match end {
        End::Wal => "whole",
        End::Backup => "first query",
    };
    let codec = world.options.codec();
    let mut contestants = Vec::new();
    for source in ["mount", "blocks"] {
        let run = move || {
            let more: &[&str] = match end {
                End::Wal => &[],
                End::Backup => &["--target-immediate"],
            };
            sources.ours.restore_to(&world.target(), source, more)?;
            recovered(world, end)
        };
        let name = format!("{what}: pghydrant {source} {codec}");
        contestants.push(finish(world, Contestant::with_outcome(Kind::Ours, name, run)));
    }
    let name = format!("{what}: pgBackRest {codec}");
    match &sources.pgbackrest {
        Ok(pgbackrest) => {
            let run = move || {
                let options: &[&str] = match end {
                    End::Wal => &[],
                    End::Backup => &["--type=immediate", "--target-action=promote"],
                };
                pgbackrest.restore(options)?;
                start(world, None, end)?;
                recovered(world, end)
            };
            contestants.push(finish(world, Contestant::with_outcome(Kind::Peer, name, run)));
        }
        Err(why) => report.leave_out(Section::Wal, &name, Kind::Peer, why.clone()),
    }
    let run = move || {
        lay_base(world, sources)?;
        start(world, Some(&format!("cp {}/%f %p", sources.archive.display())), end)?;
        recovered(world, end)
    };
    contestants.push(finish(world, Contestant::with_outcome(Kind::Peer, format!("{what}: cp"), run)));
    contestants
}

/// The server syncs what it needs to; it is stopped, which is not counted.
fn finish<'w>(world: &'w World, contestant: Contestant<'w>) -> Contestant<'w> {
    contestant.without_sync().finish(move || cluster::stop_by(world, &world.target(), "immediate"))
}

fn lay_base(world: &World, sources: &Sources<'_>) -> anyhow::Result<()> {
    world.run(world.command("cp").arg("-a").arg(&sources.base).arg(world.target())).map(drop)
}

/// Starts a restored server that has to recover; pgBackRest has configured how, others have not.
fn start(world: &World, restore_command: Option<&str>, end: End) -> anyhow::Result<()> {
    let target = world.target();
    let path = target.join("postgresql.auto.conf");
    let mut text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    // What it archives is nobody's business.
    text.push_str("archive_mode = off\n");
    if let Some(command) = restore_command {
        text.push_str(&format!("restore_command = '{command}'\n"));
        if matches!(end, End::Backup) {
            text.push_str("recovery_target = 'immediate'\nrecovery_target_action = 'promote'\n");
        }
        let signal = target.join("recovery.signal");
        fs::write(&signal, "").with_context(|| format!("cannot write {}", signal.display()))?;
        world.give_to_server(&signal)?;
    }
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    cluster::start_only(world, &target)
}

/// Waits for the end, and reads from the server's log how long its replay took.
fn recovered(world: &World, end: End) -> anyhow::Result<Outcome> {
    let (question, answer) = match end {
        End::Wal => PROMOTED,
        End::Backup => ANSWERS,
    };
    wait_for(&world.place, PORT, question, answer)?;
    let mut outcome = Outcome::default();
    if matches!(end, End::Wal) {
        outcome.also.push(("replay", replay_seconds(&world.target())?));
    }
    Ok(outcome)
}

/// "redo done at 0/5FFFFB8 system usage: CPU: user: 1.00 s, system: 0.10 s, elapsed: 2.31 s"
fn replay_seconds(target: &Path) -> anyhow::Result<f64> {
    for log in ["pghydrant.log", "server.log"] {
        let text = fs::read_to_string(target.join(log)).unwrap_or_default();
        if let Some(seconds) = parse_replay(&text) {
            return Ok(seconds);
        }
    }
    anyhow::bail!("the log in {} tells of no replay", target.display())
}

fn parse_replay(log: &str) -> Option<f64> {
    let line = log.lines().rfind(|line| line.contains("redo done at"))?;
    line.split_once("elapsed: ")?.1.split(' ').next()?.parse().ok()
}

/// As the server's archiver does: one command for each segment that still waits, in their order.
fn push(world: &World, report: &mut Report, sources: &Sources<'_>) -> anyhow::Result<()> {
    let mut segments: Vec<_> = fs::read_dir(&sources.archive)
        .context("the archive")?
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.len() == 24)
        .collect();
    segments.sort();
    segments.truncate(PUSHED);
    let codec = world.options.codec();
    let pusher = world.path("pusher");
    let repository = Repository::named(world, "repository-push", codec);
    let archived: RefCell<Vec<PathBuf>> = RefCell::new(vec![repository.path.clone()]);
    let ours = repository.wal_command("push");
    let work = Work::Count(segments.len() as u64, "segments");
    let lay = || lay_pusher(world, sources, &segments);
    let archive = |command: &str| archive_all(world, &pusher, &segments, command);
    let mut contestants =
        vec![Contestant::new(Kind::Ours, format!("archive: pghydrant {codec}"), || archive(&ours)).prepare(|| {
            repository.init()?;
            lay()
        })];
    let name = format!("archive: pgBackRest {codec}, asynchronous");
    match PgBackRest::find(world, codec).map(PgBackRest::asynchronous) {
        Ok(pgbackrest) => {
            let command = pgbackrest.wal_command("archive-push", &pusher);
            archived.borrow_mut().push(pgbackrest.repository());
            let archive = &archive;
            contestants.push(Contestant::new(Kind::Peer, name, move || archive(&command)).prepare(move || {
                pgbackrest.init()?;
                lay()
            }));
        }
        Err(why) => report.leave_out(Section::Wal, &name, Kind::Peer, why),
    }
    hold(world, report, Section::Wal, work, contestants)?;
    archived.into_inner().iter().try_for_each(|path| remove(path))
}

/// As much of a data directory as an `archive_command` looks at, with segments that wait.
fn lay_pusher(world: &World, sources: &Sources<'_>, segments: &[String]) -> anyhow::Result<()> {
    let pusher = world.server_directory("pusher")?;
    for below in ["global", "pg_wal", "pg_wal/archive_status"] {
        world.server_directory(&format!("pusher/{below}"))?;
    }
    let segments = segments.iter().map(|name| (sources.archive.join(name), pusher.join("pg_wal").join(name)));
    let known = ["PG_VERSION", "global/pg_control"].map(|name| (sources.base.join(name), pusher.join(name)));
    for (from, to) in segments.chain(known) {
        fs::copy(&from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
        world.give_to_server(&to)?;
        if let Some(segment) = to.strip_prefix(pusher.join("pg_wal")).ok().and_then(Path::to_str) {
            let ready = pusher.join(format!("pg_wal/archive_status/{segment}.ready"));
            fs::write(&ready, "").with_context(|| format!("cannot write {}", ready.display()))?;
            world.give_to_server(&ready)?;
        }
    }
    Ok(())
}

fn archive_all(world: &World, pusher: &Path, segments: &[String], command: &str) -> anyhow::Result<()> {
    for segment in segments {
        let status = pusher.join("pg_wal/archive_status");
        let ready = status.join(format!("{segment}.ready"));
        // Another segment's command may have taken this one along.
        if ready.exists() {
            let mut shell = world.as_server("sh");
            world.run(shell.current_dir(pusher).arg("-c").arg(format!("{command} pg_wal/{segment}")))?;
        }
        if ready.exists() {
            fs::rename(&ready, status.join(format!("{segment}.done"))).context("cannot mark a segment as done")?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_replay_of_a_log_counts() {
        let log = "LOG:  redo done at 0/1 system usage: CPU: user: 1.00 s, system: 0.10 s, elapsed: 9.00 s\n\
                   LOG:  redo done at 0/5FFFFB8 system usage: CPU: user: 1.00 s, system: 0.10 s, elapsed: 2.31 s\n";
        assert!(parse_replay(log).is_some_and(|seconds| (seconds - 2.31).abs() < 1e-9));
        assert_eq!(parse_replay("LOG:  redo is not required"), None);
    }
}
