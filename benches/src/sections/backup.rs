//! Full backups of the running cluster, each into an empty repository. The last one stays for the other sections.

use crate::cluster;
use crate::contest::{Contestant, hold};
use crate::options::Section;
use crate::ours::{Repository, with_server};
use crate::peers::{PgBackRest, WalG};
use crate::report::{Kind, Report, Work};
use crate::world::World;

pub(crate) fn run(world: &World, report: &mut Report) -> anyhow::Result<()> {
    let work = Work::Bytes(report.cluster_bytes);
    let mut contestants = vec![copy(world)];
    let mut sizes = Vec::new();
    for codec in world.options.codecs.iter().copied() {
        let repository = Repository::new(world, codec);
        sizes.push((format!("full backup, pghydrant {codec}"), repository.path.clone()));
        contestants.push(ours(repository, format!("pghydrant {codec}")));
        let name = format!("pgBackRest {codec}");
        match PgBackRest::find(world, codec) {
            Ok(pgbackrest) => {
                sizes.push((format!("full backup, {name}"), pgbackrest.repository()));
                let empty = pgbackrest.clone();
                let contestant = Contestant::new(Kind::Peer, name, move || pgbackrest.backup("full"));
                contestants.push(contestant.prepare(move || empty.init()));
            }
            Err(why) => report.leave_out(Section::Backup, &name, Kind::Peer, why),
        }
    }
    match WalG::find(world) {
        Ok(wal_g) => contestants.push(Contestant::new(Kind::Peer, "WAL-G lz4", move || wal_g.backup())),
        Err(why) => report.leave_out(Section::Backup, "WAL-G lz4", Kind::Peer, why),
    }
    with_server(world, || hold(world, report, Section::Backup, work, contestants))?;
    for (of, path) in sizes.iter().filter(|(_, path)| path.exists()) {
        report.add_size(of.clone(), cluster::tree_bytes(path)?);
    }
    Ok(())
}

fn ours<'w>(repository: Repository<'w>, name: String) -> Contestant<'w> {
    let empty = repository.clone();
    Contestant::new(Kind::Ours, name, move || repository.backup()).prepare(move || empty.init())
}

/// No backup at all, since the cluster runs; only what reading and writing its files costs.
fn copy(world: &World) -> Contestant<'_> {
    let run = move || world.run(world.command("cp").arg("-a").arg(cluster::data(world)).arg(world.target())).map(drop);
    Contestant::new(Kind::Peer, "cp -a", run)
}
