//! Restores of every variant, beside copies by other means and the device's own.

use std::path::{Path, PathBuf};

use crate::cluster;
use crate::compare;
use crate::contest::{Contestant, Outcome, hold};
use crate::fio::Ceiling;
use crate::options::Section;
use crate::ours::{Repository, with_server};
use crate::peers::{Barman, PgBackRest, Rustic, WalG, peer};
use crate::report::{Kind, Report, Work};
use crate::world::{World, remove};

/// The series that others are compared with.
pub(crate) const CEILING: &str = "device: copy";
pub(crate) const READ: &str = "device: read";

pub(crate) fn run(world: &World, report: &mut Report) -> anyhow::Result<()> {
    let work = Work::Bytes(report.cluster_bytes);
    let mut contestants = Vec::new();
    let tar_file = world.path("cluster.tar");
    tar(world, &["-cf"], &tar_file)?;
    device(world, report, &tar_file, &mut contestants);
    copies(world, report, &tar_file, &mut contestants);
    for codec in world.options.codecs.iter().copied() {
        let name = format!("pgBackRest {codec}");
        let found = PgBackRest::find(world, codec).and_then(|found| match found.ensure_backup() {
            Ok(()) => Ok(found),
            Err(error) => Err(format!("failed: {error:#}")),
        });
        match found {
            Ok(found) => contestants.push(
                Contestant::new(Kind::Peer, name, move || found.restore(&["--type=immediate"]))
                    .check(move || compare::same_tables(&cluster::data(world), &world.target())),
            ),
            Err(why) => report.leave_out(Section::Restore, &name, Kind::Peer, why),
        }
        let repository = Repository::new(world, codec);
        repository.ensure_backup()?;
        for source in ["mount", "blocks"] {
            let repository = repository.clone();
            let run = move || repository.restore(source, &[]);
            let verify = move || compare::verify_backup(world, &world.target());
            contestants.push(Contestant::new(Kind::Ours, format!("pghydrant {source} {codec}"), run).check(verify));
        }
    }
    optional(world, report, &mut contestants);
    hold(world, report, Section::Restore, work, contestants)?;
    for path in ["cluster.tar", "cluster.tar.lz4", "barman", "wal-g", "rustic"] {
        remove(&world.path(path))?;
    }
    Ok(())
}

fn tar(world: &World, how: &[&str], file: &Path) -> anyhow::Result<()> {
    world.run(world.command("tar").args(how).arg(file).arg("-C").arg(&world.place).arg("cluster")).map(drop)
}

fn device<'w>(world: &'w World, report: &mut Report, file: &Path, contestants: &mut Vec<Contestant<'w>>) {
    let ceiling = match Ceiling::find(world, file) {
        Ok(ceiling) => ceiling,
        Err(error) => return report.leave_out(Section::Restore, CEILING, Kind::Device, format!("{error:#}")),
    };
    eprintln!("  the device is fastest with {}", ceiling.shape());
    report.machine.ceiling = ceiling.shape();
    let timed = |seconds| Outcome { seconds: Some(seconds), ..Outcome::default() };
    let (reading, from, file) = (ceiling.clone(), file.to_owned(), file.to_owned());
    let copy = move || ceiling.copy(world, &file).map(timed);
    contestants.push(Contestant::with_outcome(Kind::Device, CEILING, copy).without_sync());
    let read = move || reading.read(world, &from).map(timed);
    contestants.push(Contestant::with_outcome(Kind::Device, READ, read).without_sync());
}

/// Tools that copy files, of the cluster at rest.
fn copies<'w>(world: &'w World, report: &mut Report, tar_file: &Path, contestants: &mut Vec<Contestant<'w>>) {
    let data = || cluster::data(world);
    let same = move || compare::same_tables(&data(), &world.target());
    let empty = move || world.server_directory("target").map(drop);
    let copy = move || world.run(world.command("cp").arg("-a").arg(data()).arg(world.target())).map(drop);
    contestants.push(Contestant::new(Kind::Peer, "cp -a", copy).check(same));
    let extract = move |options: &[&str], file: &PathBuf| {
        let mut tar = world.command("tar");
        tar.args(options).arg("-xf").arg(file).arg("--strip-components=1").arg("-C").arg(world.target());
        world.run(&mut tar).map(drop)
    };
    let plain = tar_file.to_owned();
    let contestant = Contestant::new(Kind::Peer, "tar", move || extract(&[], &plain));
    contestants.push(contestant.prepare(empty).check(same));
    match peer(world, "lz4").and_then(|_| {
        let file = world.path("cluster.tar.lz4");
        tar(world, &["-I", "lz4", "-cf"], &file).map(|()| file).map_err(|error| format!("failed: {error:#}"))
    }) {
        Ok(file) => {
            let contestant = Contestant::new(Kind::Peer, "tar lz4", move || extract(&["-I", "lz4"], &file));
            contestants.push(contestant.prepare(empty).check(same));
        }
        Err(why) => report.leave_out(Section::Restore, "tar lz4", Kind::Peer, why),
    }
    match peer(world, "rsync") {
        Ok(rsync) => {
            let run = move || {
                let from = format!("{}/", data().display());
                world.run(world.command(&rsync).args(["-a", "--whole-file", &from]).arg(world.target())).map(drop)
            };
            contestants.push(Contestant::new(Kind::Peer, "rsync", run).check(same));
        }
        Err(why) => report.leave_out(Section::Restore, "rsync", Kind::Peer, why),
    }
    let base_backup = move || {
        let mut program = world.server_program("pg_basebackup");
        program.args(["-c", "fast", "-X", "none", "-d"]).arg(cluster::connection(world)).arg("-D").arg(world.target());
        world.run(&mut program).map(drop)
    };
    contestants.push(
        Contestant::new(Kind::Peer, "pg_basebackup", base_backup)
            .prepare(move || cluster::start(world, &data()))
            .check(move || compare::verify_backup(world, &world.target()))
            .finish(move || cluster::stop(world, &data())),
    );
}

/// Tools that few machines have.
fn optional<'w>(world: &'w World, report: &mut Report, contestants: &mut Vec<Contestant<'w>>) {
    let failed = |error: anyhow::Error| format!("failed: {error:#}");
    let same = move || compare::same_tables(&cluster::data(world), &world.target());
    type Restore<'w> = Box<dyn FnMut() -> anyhow::Result<()> + 'w>;
    let barman = Barman::find(world).and_then(|barman| {
        with_server(world, || barman.backup()).map_err(failed)?;
        Ok(Box::new(move || barman.restore()) as Restore<'w>)
    });
    let wal_g = WalG::find(world).and_then(|wal_g| {
        if !world.path("wal-g").exists() {
            with_server(world, || wal_g.backup()).map_err(failed)?;
        }
        Ok(Box::new(move || wal_g.restore()) as Restore<'w>)
    });
    let rustic = Rustic::find(world).and_then(|rustic| {
        rustic.backup().map_err(failed)?;
        Ok(Box::new(move || rustic.restore()) as Restore<'w>)
    });
    for (name, found) in [("Barman", barman), ("WAL-G lz4", wal_g), ("rustic", rustic)] {
        match found {
            Ok(run) => contestants.push(Contestant::new(Kind::Peer, name, run).check(same)),
            Err(why) => report.leave_out(Section::Restore, name, Kind::Peer, why),
        }
    }
}
