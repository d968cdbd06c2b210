//! After 5 % of the pages changed, here and there or side by side: a second backup, and a restore over what is there.

use std::cell::{Cell, RefCell};
use std::fs;

use anyhow::Context as _;

use crate::cluster::{self, Spread, change_pages};
use crate::compare;
use crate::contest::{Contestant, Outcome, hold};
use crate::options::Section;
use crate::ours::{Repository, with_server};
use crate::peers::PgBackRest;
use crate::report::{Kind, Report, Work};
use crate::world::{World, remove};

pub(crate) const SPREADS: [(Spread, &str); 2] =
    [(Spread::Random, "random pages"), (Spread::Together, "pages together")];

/// The cluster's size by then, in a report.
pub(crate) const CLUSTER: &str = "cluster before the second backups";

/// The size of what changed, in a report.
pub(crate) fn changed(what: &str) -> String {
    format!("5 % changed, {what}")
}

pub(crate) fn run(world: &World, report: &mut Report) -> anyhow::Result<()> {
    let codec = world.options.codec();
    let ours = Repository::new(world, codec);
    ours.ensure_backup()?;
    let pgbackrest = PgBackRest::find(world, codec).and_then(|pgbackrest| {
        pgbackrest.ensure_backup().map_err(|error| format!("failed: {error:#}")).map(|()| pgbackrest)
    });
    report.add_size(format!("first backup, pghydrant {codec}"), ours.bytes()?);
    report.add_size(CLUSTER, cluster::bytes(world)?);
    let repositories = Repositories { world, ours, pgbackrest };
    for (spread, what) in SPREADS {
        repositories.second_backups(report, spread, what)?;
    }
    for (spread, what) in SPREADS {
        repositories.restores(report, spread, what)?;
    }
    Ok(())
}

/// Whose backups are compared.
struct Repositories<'w> {
    world: &'w World,
    ours: Repository<'w>,
    /// Or why it has no part in it.
    pgbackrest: Result<PgBackRest<'w>, String>,
}

impl Repositories<'_> {
    /// What earlier sections and changes have left is in a backup of each before the first round.
    fn bring_up_to_date(&self) -> anyhow::Result<()> {
        with_server(self.world, || {
            self.ours.backup()?;
            self.pgbackrest.as_ref().map_or(Ok(()), |pgbackrest| pgbackrest.backup("incr"))
        })
    }

    fn second_backups(&self, report: &mut Report, spread: Spread, what: &str) -> anyhow::Result<()> {
        let Self { world, ours, pgbackrest } = self;
        let world: &World = world;
        self.bring_up_to_date()?;
        let change = Change { world, spread, rounds: Cell::new(0), pages: Cell::new(0) };
        let stop = move || cluster::stop(world, &cluster::data(world));
        let sizes: RefCell<Vec<(String, u64)>> = RefCell::default();
        let codec = world.options.codec();
        let path = world.path(&format!("pgbackrest-{codec}"));
        let mut contestants = Vec::new();
        let name = format!("second backup, {what}: pghydrant {codec}");
        contestants.push(second_backup(Kind::Ours, name, &change, &ours.path, &sizes, || ours.backup()).finish(stop));
        let blocks = pgbackrest.as_ref().is_ok_and(PgBackRest::has_blocks);
        let name = format!("second backup, {what}: pgBackRest {codec}{}", if blocks { ", blocks" } else { "" });
        match pgbackrest {
            Ok(pgbackrest) => {
                let run = || pgbackrest.backup("incr");
                contestants.push(second_backup(Kind::Peer, name, &change, &path, &sizes, run).finish(stop));
            }
            Err(why) => report.leave_out(Section::Delta, &name, Kind::Peer, why.clone()),
        }
        let work = Work::Bytes(report.size(CLUSTER).unwrap_or(report.cluster_bytes));
        hold(world, report, Section::Delta, work, contestants)?;
        report.add_size(changed(what), change.pages.get() * pghydrant_benches::pages::PAGE_BYTES as u64);
        for (of, bytes) in sizes.into_inner() {
            report.add_size(of, bytes);
        }
        Ok(())
    }

    /// One target for all, which is what the cluster is when they have restored it, and of which pages change in between.
    fn restores(&self, report: &mut Report, spread: Spread, what: &str) -> anyhow::Result<()> {
        let Self { world, ours, pgbackrest } = self;
        let world: &World = world;
        self.bring_up_to_date()?;
        remove(&world.target())?;
        let seed = Cell::new(1000);
        let prepare = || {
            lay_target(world)?;
            seed.set(seed.get() + 1);
            change_pages(world, &world.target(), spread, seed.get()).map(drop)
        };
        let same = move || compare::same_tables(&cluster::data(world), &world.target());
        let codec = world.options.codec();
        let mut contestants = Vec::new();
        for source in ["mount", "blocks"] {
            let run = move || {
                // Their own cluster's directory again, so that nothing of its configuration changes.
                let options = ["--delta", "--adopt", "--target-immediate", "--no-start"];
                ours.restore_to(&world.target(), source, &options).map(|()| Outcome::default())
            };
            let name = format!("delta restore, {what}: pghydrant {source} {codec}");
            contestants
                .push(Contestant::with_outcome(Kind::Ours, name, run).prepare(prepare).check(same).keeping_target());
        }
        let name = format!("delta restore, {what}: pgBackRest {codec}");
        match pgbackrest {
            Ok(pgbackrest) => {
                let run = || pgbackrest.restore(&["--delta", "--type=immediate"]);
                contestants.push(Contestant::new(Kind::Peer, name, run).prepare(prepare).check(same).keeping_target());
            }
            Err(why) => report.leave_out(Section::Delta, &name, Kind::Peer, why.clone()),
        }
        let work = Work::Bytes(report.size(CLUSTER).unwrap_or(report.cluster_bytes));
        hold(world, report, Section::Delta, work, contestants)
    }
}

/// All contestants of a round back up the same change: it is made by the first of them.
struct Change<'w> {
    world: &'w World,
    spread: Spread,
    rounds: Cell<u64>,
    pages: Cell<u64>,
}

impl Change<'_> {
    fn make_for_round(&self, round: u64) -> anyhow::Result<()> {
        if round > self.rounds.get() {
            self.rounds.set(round);
            let seed = round * 2 + u64::from(self.spread == Spread::Random);
            self.pages.set(change_pages(self.world, &cluster::data(self.world), self.spread, seed)?);
        }
        cluster::start(self.world, &cluster::data(self.world))
    }
}

/// What the first round's backup adds to the repository is its size.
fn second_backup<'w>(
    kind: Kind,
    name: String,
    change: &'w Change<'w>,
    repository: &'w std::path::Path,
    sizes: &'w RefCell<Vec<(String, u64)>>,
    run: impl FnMut() -> anyhow::Result<()> + 'w,
) -> Contestant<'w> {
    let (mut round, of) = (0, format!("size of {name}"));
    let before = std::rc::Rc::new(Cell::new(0));
    let known = std::rc::Rc::clone(&before);
    let prepare = move || {
        round += 1;
        change.make_for_round(round)?;
        known.set(cluster::tree_bytes(repository)?);
        Ok(())
    };
    let check = move || {
        sizes.borrow_mut().push((of.clone(), cluster::tree_bytes(repository)?.saturating_sub(before.get())));
        Ok(())
    };
    Contestant::new(kind, name, run).prepare(prepare).check(check)
}

/// The target as a stopped server of its own leaves it: the last contestant's tables, the cluster's control file and WAL.
fn lay_target(world: &World) -> anyhow::Result<()> {
    let (data, target) = (cluster::data(world), world.target());
    // Of a contestant that failed.
    if target.join("pghydrant.session").exists() || !target.join("PG_VERSION").exists() {
        remove(&target)?;
        return world.run(world.command("cp").arg("-a").arg(&data).arg(&target)).map(drop);
    }
    let entries = fs::read_dir(&target).with_context(|| format!("cannot read {}", target.display()))?;
    let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    // What says that a restore is to be recovered, and the WAL that one has kept.
    let left = ["backup_label", "recovery.signal", "backup_manifest", "backup.manifest", "pg_wal"];
    for name in names.filter(|name| left.contains(&name.as_str()) || name.starts_with("pghydrant.wal-")) {
        remove(&target.join(name))?;
    }
    remove(&target.join("global/pg_control"))?;
    world.run(world.command("cp").arg("-a").arg(data.join("global/pg_control")).arg(target.join("global/")))?;
    world.run(world.command("cp").arg("-a").arg(data.join("pg_wal")).arg(target.join("pg_wal"))).map(drop)
}
