//! `restore --delta`: over the cluster that is there, it ends as a restore into an empty directory does, and loses no WAL.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use engine::format::block::Content;

use crate::crashes::Random;
use crate::support::compare::{same_trees, tree};
use crate::support::filesystem::fuse_mounts_below;
use crate::support::json::{find_all, find_number};
use crate::support::repository::{Damage, Mend, flip_bit};
use crate::support::*;

/// Marks, journals and WAL of ours have names that say so.
fn is_ours(path: &Path) -> bool {
    path.to_string_lossy().contains("pghydrant")
}

fn copy_all(from: &Path, to: &Path) -> Result<()> {
    Run::new("cp").arg("-a").arg(from).arg(to).succeed()?;
    Ok(())
}

/// The names of WAL files in a field of the result.
fn wal_names(result: &serde_json::Value, field: &str) -> Vec<String> {
    let lists = find_all(result, field).into_iter().filter_map(serde_json::Value::as_array).flatten();
    lists.filter_map(|name| name.as_str().map(str::to_owned)).collect()
}

/// `(same, all)` of "N of M blocks are as in the backup".
fn blocks(finished: &Finished) -> Result<(u64, u64)> {
    let text = finished.stderr.split(" blocks are as in the backup").next().context("nothing was compared")?;
    let mut words = text.rsplit(' ');
    let all = words.next().unwrap_or_default().parse()?;
    let same = words.nth(1).unwrap_or_default().parse().with_context(|| format!("{finished}"))?;
    Ok((same, all))
}

#[test]
fn a_delta_equals_a_full_restore_file_by_file_and_writes_only_a_part() -> Result<()> {
    requires!(Postgres, Fuse);
    let world = World::new(3)?;
    let (fast, late) = (world.scratch.directory("fast")?, world.scratch.directory("late")?);
    world.cluster.sql(&format!("CREATE TABLESPACE fast LOCATION '{}'", fast.display()))?;
    world.cluster.sql("CREATE TABLE there TABLESPACE fast AS SELECT generate_series(1, 20000) AS id")?;
    world.cluster.sql("CREATE TABLE dropped AS SELECT generate_series(1, 20000) AS id")?;
    world.cluster.sql("CREATE TABLE shrunk AS SELECT generate_series(1, 20000) AS id")?;
    world.cluster.sql("CREATE UNLOGGED TABLE unlogged AS SELECT generate_series(1, 20000) AS id")?;
    world.backup()?;
    world.cluster.sql("DROP TABLE dropped")?;
    world.cluster.sql("TRUNCATE shrunk")?;
    world.cluster.sql("CREATE TABLE new AS SELECT generate_series(1, 20000) AS id")?;
    world.cluster.sql("INSERT INTO there SELECT generate_series(1, 20000)")?;
    world.cluster.sql("UPDATE pgbench_branches SET bbalance = 1")?;
    let relation = world.cluster.sql("SELECT pg_relation_filepath('pgbench_accounts')")?;
    world.cluster.sql(&format!("CREATE TABLESPACE late LOCATION '{}'", late.display()))?;
    world.cluster.sql("CREATE TABLE far TABLESPACE late AS SELECT generate_series(1, 20000) AS id")?;
    world.cluster.stop("fast")?;

    // Both restores go to the same place, the delta over the cluster that is moved there.
    let (target, aside) = (world.target(), world.scratch.join("fast.aside"));
    fs::rename(&fast, &aside)?;
    let arguments = ["--no-start", "--target-immediate"];
    world.restore_to(&target, &arguments)?.expect_code(0)?;
    let (expected, expected_there) = (tree(&target)?, tree(&fast)?);
    fs::remove_dir_all(&target)?;
    fs::remove_dir_all(&fast)?;
    fs::rename(&aside, &fast)?;
    fs::rename(&world.cluster.data, &target)?;

    let outside = world.scratch.directory("outside")?;
    fs::write(outside.join("precious"), "kept")?;
    fs::create_dir_all(target.join("junk/below"))?;
    fs::write(target.join("junk/below/file"), "junk")?;
    fs::write(target.join("standby.signal"), "")?;
    fs::write(target.join("postmaster.pid"), format!("999999999\n{}\n1\n", target.display()))?;
    symlink(&outside, target.join("base/led"))?;
    fs::write(late.join("notes"), "somebody's")?;
    fs::create_dir(fast.join("PG_99_209901011"))?;
    // Shared with another cluster, as pg_upgrade --link leaves files.
    let version = target.join("PG_VERSION");
    fs::remove_file(&version)?;
    fs::write(outside.join("shared"), "15\nshared")?;
    fs::hard_link(outside.join("shared"), &version)?;
    fs::write(&version, "15\n")?;

    let refused = world.restore_to(&target, &arguments)?.expect_code(3)?;
    ensure!(refused.stderr.contains("--delta writes over what differs"), "{refused}");
    let delta = [&arguments[..], &["--delta"]].concat();
    // Root's files in a directory of the server's user.
    if tools::is_root() {
        let refused = world.restore_to(&target, &delta)?.expect_code(3)?;
        ensure!(refused.stderr.contains("junk belongs to another user"), "{refused}");
        for path in [&target, &fast, &late] {
            Run::new("chown").args(["-hR", &OsUser::server().name]).arg(path).succeed()?;
        }
    }
    let before = tree(&target)?;
    let planned = world.restore_to(&target, &[&delta[..], &["--plan"]].concat())?.expect_code(0)?;
    for part in ["delta ", "names removed", "is overwritten where it differs", &format!("{}/PG_", late.display())] {
        ensure!(planned.stdout.contains(part), "{part}\n{planned}");
    }
    same_trees(&before, &tree(&target)?, |_| false).context("--plan")?;

    let finished = world.restore_to(&target, &delta)?.expect_code(0)?;
    same_trees(&expected, &tree(&target)?, is_ours).with_context(|| format!("{finished}"))?;
    let another = |path: &Path| path.starts_with("PG_99_209901011");
    same_trees(&expected_there, &tree(&fast)?, another).with_context(|| format!("{finished}"))?;
    ensure!(fast.join("PG_99_209901011").is_dir(), "another version's files went\n{finished}");
    let left: Vec<_> = tree(&late)?.into_keys().collect();
    ensure!(left == [PathBuf::from("notes")], "{left:?}\n{finished}");
    assert_eq!(fs::read_to_string(outside.join("precious"))?, "kept");
    assert_eq!(fs::read_to_string(outside.join("shared"))?, "15\n");
    let (same, all) = blocks(&finished)?;
    ensure!(same < all && same > all / 2, "{same} of {all}\n{finished}");
    // Again, with nothing to do: recovery.signal and the configuration alone.
    let again = world.restore_to(&target, &delta)?.expect_code(0)?;
    same_trees(&expected, &tree(&target)?, is_ours).with_context(|| format!("{again}"))?;
    // One bit: its page is written, not its block, beside the few small files that the restore itself has changed.
    flip_bit(&target.join(&relation), 5 * 8192 + 4000)?;
    let again = world.restore_to(&target, &[&delta[..], &["--json"]].concat())?.expect_code(0)?;
    same_trees(&expected, &tree(&target)?, is_ours).with_context(|| format!("{again}"))?;
    let compared = again.json_lines()?.into_iter().find(|line| line["event"] == "compared").context("no figures")?;
    let written = find_number(&compared, "written_bytes").with_context(|| format!("{again}"))?;
    ensure!((8192..65536).contains(&written), "{written} bytes of pages\n{again}");
    ensure!(find_number(&compared, "changed_blocks") > Some(0), "{compared}");
    ensure!(fuse_mounts_below(world.scratch.path()).is_empty(), "a mount is left");
    Ok(())
}

#[test]
fn wal_that_was_never_archived_is_archived_or_kept_and_the_right_rows_are_there() -> Result<()> {
    requires!(Postgres, Fuse);
    let world = World::new(1)?;
    world.backup()?;
    world.mark("a")?;
    // Still ours by its words, and of no use.
    let command = world.cluster.sql("SHOW archive_command")?;
    world.cluster.sql(&format!("ALTER SYSTEM SET archive_command = 'false && {command}'"))?;
    world.cluster.restart()?;
    world.mark("b")?;
    let complete = world.cluster.sql("SELECT pg_walfile_name(pg_current_wal_lsn())")?;
    world.cluster.sql("SELECT pg_switch_wal()")?;
    world.mark("c")?;
    let unfinished = world.cluster.sql("SELECT pg_walfile_name(pg_current_wal_lsn())")?;
    let data = world.cluster.data.clone();
    let running = world.restore_to(&data, &["--delta"])?.expect_code(3)?;
    ensure!(running.stderr.contains("a PostgreSQL server (process "), "{running}");
    world.cluster.stop("immediate")?;
    // The WAL on another disk, as many have it.
    let wal = world.scratch.join("wal");
    fs::rename(data.join("pg_wal"), &wal)?;
    symlink(&wal, data.join("pg_wal"))?;
    fs::write(wal.join("somebody's"), "")?;

    let arguments = ["--delta", "--json"];
    let result = world.restore_to(&data, &arguments)?.expect_code(0)?.json()?;
    ensure!(wal_names(&result, "pushed").contains(&complete), "{result}");
    ensure!(wal_names(&result, "kept") == [unfinished.as_str()], "{result}");
    let restored = Instance::running_in(&data)?;
    assert_eq!(marks(&restored)?, "a,b");
    assert_eq!(fs::read_link(data.join("pg_wal"))?, wal);
    ensure!(wal.join("somebody's").exists(), "what is no WAL went");
    restored.check_relations()?;
    restored.stop("fast")?;
    restored.check_pages()?;

    // The last transactions are in the file that was kept.
    let kept =
        find_all(&result, "directory").into_iter().find_map(serde_json::Value::as_str).context("no directory")?;
    let kept = Path::new(kept).join(&unfinished);
    let shown = kept.display().to_string();
    world.pghydrant.succeed(world.repository.arguments(&["wal", "push"], &[&shown]))?;
    let whole = world.restore(&[])?;
    assert_eq!(marks(&whole)?, "a,b,c");
    drop(whole);

    // A copy does not archive into its original's archive, not even what it alone has.
    let again = world.restore_to(&data, &["--delta", "--no-start"])?.expect_code(0)?;
    let histories = fs::read_dir(&data)?.filter_map(|entry| Some(entry.ok()?.path().join("00000002.history")));
    ensure!(histories.filter(|path| path.exists()).count() == 1, "the copy's own history is not kept\n{again}");
    ensure!(again.stdout.contains("WAL that was never archived is kept in ") && kept.exists(), "{again}");
    ensure!(!world.repository.files()?.iter().any(|path| path.ends_with("00000002.history")), "{again}");
    Ok(())
}

#[test]
fn a_delta_into_another_cluster_or_into_no_cluster_is_refused_and_touches_nothing() -> Result<()> {
    requires!(Postgres);
    let world = World::new(0)?;
    world.backup()?;
    let other = Cluster::build(&world.scratch, "other").start()?;
    other.stop("fast")?;
    let strangers = world.scratch.directory("strangers")?;
    fs::write(strangers.join("thesis.txt"), "precious")?;
    let arguments = ["--delta", "--source", "blocks"];
    for (data, part) in [(&other.data, "is another cluster: "), (&strangers, "nothing proves which cluster")] {
        let before = tree(data)?;
        let refused = world.restore_to(data, &arguments)?.expect_code(3)?.expect_stderr(&[part, "hint: "])?;
        same_trees(&before, &tree(data)?, |_| false).with_context(|| format!("{refused}"))?;
    }
    // Links to the files of a server that runs: a copy of its directory, made without thinking of them.
    let fast = world.scratch.directory("fast")?;
    world.cluster.sql(&format!("CREATE TABLESPACE fast LOCATION '{}'", fast.display()))?;
    world.cluster.sql("CREATE TABLE there TABLESPACE fast AS SELECT generate_series(1, 100) AS id")?;
    world.backup()?;
    let copied = world.scratch.join("copied");
    copy_all(&world.cluster.data, &copied)?;
    fs::remove_file(copied.join("postmaster.pid"))?;
    let refused = world.restore_to(&copied, &arguments)?.expect_code(3)?;
    ensure!(refused.stderr.contains("is used by another server"), "{refused}");
    assert_eq!(world.cluster.sql("SELECT count(*) FROM there")?, "100");
    ensure!(open_sessions(&world.pghydrant)?.is_empty(), "a session is open");
    // A disk that somebody has mounted there since.
    if tools::is_root() {
        world.cluster.stop("fast")?;
        let mounted = world.scratch.directory("mounted")?;
        fs::write(mounted.join("precious"), "kept")?;
        let within = world.cluster.data.join("dumps and more");
        fs::create_dir(&within)?;
        Run::new("mount").arg("--bind").arg(&mounted).arg(&within).succeed()?;
        let refused = world.restore_to(&world.cluster.data, &arguments);
        Run::new("umount").arg(&within).succeed()?;
        refused?.expect_code(3)?.expect_stderr(&["dumps and more is a mount point", "hint: "])?;
        assert_eq!(fs::read_to_string(mounted.join("precious"))?, "kept");
        fs::remove_dir(&within)?;
        world.cluster.start()?;
    }
    // Nothing there to compare with: an ordinary restore.
    let to = [&arguments[..], &["--no-start", "--backup", "latest"]].concat();
    let elsewhere = format!("fast={}", world.scratch.join("elsewhere").display());
    let restored = world.restore_to(&world.target(), &[&to[..], &["--tablespace", &elsewhere]].concat())?;
    ensure!(!restored.expect_code(0)?.stderr.contains("  compare "), "it was taken for a delta");
    Ok(())
}

/// A cluster that changed since its backup, and what a delta makes of it.
struct Changed {
    world: World,
    target: PathBuf,
    pristine: PathBuf,
    /// The file of the table in which every page has changed.
    accounts: String,
    expected: std::collections::BTreeMap<PathBuf, compare::Entry>,
    took: std::time::Duration,
}

const DELTA: [&str; 4] = ["--delta", "--no-start", "--source", "blocks"];

impl Changed {
    fn new() -> Result<Self> {
        let world = World::new(1)?;
        world.backup()?;
        let accounts = world.cluster.sql("SELECT pg_relation_filepath('pgbench_accounts')")?;
        world.cluster.sql("UPDATE pgbench_accounts SET abalance = 7 WHERE aid % 10 = 0")?;
        world.cluster.sql("CREATE TABLE new AS SELECT generate_series(1, 20000) AS id")?;
        // What stays in memory alone differs in no file.
        world.cluster.sql("CHECKPOINT")?;
        world.cluster.stop("immediate")?;
        let (target, pristine) = (world.target(), world.scratch.join("pristine"));
        fs::rename(&world.cluster.data, &pristine)?;
        copy_all(&pristine, &target)?;
        let finished = world.restore_to(&target, &DELTA)?.expect_code(0)?;
        let expected = tree(&target)?;
        Ok(Self { world, target, pristine, accounts, expected, took: finished.took })
    }

    /// In the repository, so that a delta has to read it.
    fn damage_a_block_that_differs(&self) -> Result<Mend> {
        let repository = engine::repository::Repository::open(self.world.repository.path())?;
        let cluster = repository.cluster(&"main".parse().map_err(anyhow::Error::msg)?)?;
        let label = cluster.labels()?.pop().context("no backup")?;
        let manifest = cluster.backup(&label)?.manifest;
        let file = manifest.file(&self.accounts)?.context("the table is not in the backup")?;
        let Content::Stored { at, .. } = manifest.block(file.first_block)?.content else {
            bail!("no block of its own")
        };
        let pack = self.world.repository.path().join(format!("clusters/main/packs/{:08x}.pack", at.pack.0));
        Damage::BitFlipped.inflict_at(&pack, u64::from(at.offset + at.stored / 2))
    }

    /// The cluster as it was before the delta.
    fn reset(&self) -> Result<()> {
        fs::remove_dir_all(&self.target)?;
        copy_all(&self.pristine, &self.target)
    }

    fn start(&self) -> Result<Running> {
        let to = self.target.display().to_string();
        let arguments = [&["--to", &to], &DELTA[..]].concat();
        self.world.pghydrant.start(self.world.repository.arguments(&["restore"], &arguments))
    }

    fn is_as_it_was(&self, ignored: impl Fn(&Path) -> bool) -> Result<()> {
        same_trees(&tree(&self.pristine)?, &tree(&self.target)?, ignored)
    }

    fn is_done(&self) -> Result<()> {
        same_trees(&self.expected, &tree(&self.target)?, is_ours)
    }

    fn can_start(&self) -> bool {
        self.target.join("global/pg_control").exists()
    }
}

#[test]
fn deltas_killed_at_random_moments_are_finished_by_retry_or_given_up_by_cancel() -> Result<()> {
    requires!(Postgres);
    let changed = Changed::new()?;
    let pghydrant = &changed.world.pghydrant;
    let mut random = Random::new();
    for round in 0..4 {
        changed.reset()?;
        let running = changed.start()?;
        let moment = random.up_to(changed.took);
        std::thread::sleep(moment);
        let killed = running.kill()?;
        let what = format!("round {round}, killed after {moment:?} of {:?}\n{killed}", changed.took);
        let open = open_sessions(pghydrant)?;
        if changed.can_start() {
            let old_or_new = changed.is_as_it_was(is_ours).or_else(|_| changed.is_done());
            old_or_new.with_context(|| format!("pg_control is there, {what}"))?;
        }
        match open.as_slice() {
            [] if killed.code == Some(0) => {}
            // Before it had begun, or behind its last word.
            [] => {
                let done = changed.is_as_it_was(|_| false).or_else(|_| changed.is_done());
                done.with_context(|| what.clone())?;
            }
            [id] if round % 2 == 0 => {
                pghydrant.run(["retry", id])?.expect_code(0).with_context(|| what.clone())?;
                changed.is_done().with_context(|| what.clone())?;
            }
            [id] => {
                let could_start = changed.can_start();
                let cancelled = pghydrant.run(["cancel", id])?;
                let untouched = ["is as it was", "nothing was changed in"];
                // Killed behind pg_control, it is a copy like any other that was given up.
                if could_start && untouched.iter().any(|words| cancelled.stdout.contains(words)) {
                    changed.is_as_it_was(|_| false).with_context(|| format!("{what}\n{cancelled}"))?;
                } else {
                    let cancelled = cancelled.expect_code(0).with_context(|| what.clone())?;
                    ensure!(
                        !changed.can_start() && cancelled.stdout.contains("cannot be started"),
                        "{what}\n{cancelled}"
                    );
                    changed.world.restore_to(&changed.target, &DELTA)?.expect_code(0).with_context(|| what.clone())?;
                    changed.is_done().with_context(|| what.clone())?;
                }
            }
            several => bail!("{what}: {several:?} are open"),
        }
        ensure!(open_sessions(pghydrant)?.is_empty(), "{what}: a session is left");
    }
    Ok(())
}

#[test]
fn a_delta_that_is_cancelled_half_way_leaves_what_cannot_be_started_and_the_next_one_takes_it_from_there() -> Result<()>
{
    requires!(Postgres);
    let changed = Changed::new()?;
    let (world, target) = (&changed.world, &changed.target);
    changed.reset()?;
    let mend = changed.damage_a_block_that_differs()?;
    let failed = world.restore_to(target, &DELTA)?.expect_code(4)?.expect_stderr(&["hint: "])?;
    ensure!(!changed.can_start(), "{failed}");
    let id = open_session(&world.pghydrant)?;
    let kept = target.join(format!("pghydrant.wal-{id}"));
    ensure!(kept.is_dir(), "the last WAL is not kept\n{failed}");
    let again = world.restore_to(target, &DELTA)?.expect_code(3)?;
    ensure!(again.stderr.contains(&format!("pghydrant retry {id}")), "{again}");
    let cancelled = world.pghydrant.run(["cancel", &id])?.expect_code(0)?;
    for part in ["cannot be started", "pghydrant restore --delta --to ", "WAL that was never archived is kept in "] {
        ensure!(cancelled.stdout.contains(part), "{part}\n{cancelled}");
    }
    ensure!(kept.is_dir() && target.join("PG_VERSION").exists() && !changed.can_start(), "{cancelled}");
    ensure!(!target.join("pghydrant.session").exists(), "{cancelled}");
    // Whose it is, is known without a pg_control; and nothing else may go there.
    world.restore_to(target, &["--no-start", "--source", "blocks"])?.expect_code(3)?;
    drop(mend);
    world.restore_to(target, &DELTA)?.expect_code(0)?;
    changed.is_done()?;
    ensure!(kept.is_dir() && !target.join("pghydrant.unfinished").exists(), "the mark is left, or the WAL went");
    ensure!(open_sessions(&world.pghydrant)?.is_empty(), "a session is left");
    Ok(())
}
