//! Very many small files: a cluster of its own with 20,000 files of 8 KiB beside PostgreSQL's.

use std::cell::Cell;
use std::fs;
use std::path::PathBuf;

use anyhow::Context as _;
use pghydrant_benches::pages::Random;

use crate::cluster;
use crate::compare;
use crate::contest::{Contestant, hold};
use crate::options::Section;
use crate::ours::Repository;
use crate::report::{Kind, Report, Work};
use crate::world::{World, remove};

const FILES: u64 = 20_000;
/// Where the suite is only tried.
const FILES_OF_A_TRIAL: u64 = 1000;
const FILE_BYTES: usize = 8192;
const PER_DIRECTORY: u64 = 1000;

pub(crate) fn run(world: &World, report: &mut Report) -> anyhow::Result<()> {
    let data = world.path("small");
    let files = if world.options.size < 1.0 { FILES_OF_A_TRIAL } else { FILES };
    cluster::initialize(world, &data)?;
    write_files(world, &data, files)?;
    let codec = world.options.codec();
    let repository = Repository::named(world, "repository-small", codec);
    repository.init()?;
    cluster::start(world, &data)?;
    let backed_up = repository.backup();
    cluster::stop(world, &data)?;
    backed_up?;

    let copied = data.clone();
    let copy = move || world.run(world.command("cp").arg("-a").arg(&copied).arg(world.target())).map(drop);
    let aside = Aside { world, place: world.path("small-targets"), count: Cell::new(0) };
    remove(&world.target())?;
    remove(&aside.place)?;
    let mut contestants =
        vec![Contestant::new(Kind::Peer, "cp -a", copy).keeping_target().finish(|| aside.put_target())];
    for source in ["mount", "blocks"] {
        let repository = repository.clone();
        let run = move || repository.restore(source, &[]);
        let verify = move || compare::verify_backup(world, &world.target());
        let ours = Contestant::new(Kind::Ours, format!("pghydrant {source} {codec}"), run).check(verify);
        contestants.push(ours.keeping_target().finish(|| aside.put_target()));
    }
    hold(world, report, Section::Small, Work::Count(files, "files"), contestants)?;
    remove(&aside.place)?;
    remove(&repository.path)?;
    remove(&data)
}

/// Targets of runs that are over. They are removed when all are, since ext4 looks, for a minute and more, for each file
/// that is made, through all that were removed before it: that would be 1 to 2 s of anybody's run.
struct Aside<'w> {
    world: &'w World,
    place: PathBuf,
    count: Cell<u32>,
}

impl Aside<'_> {
    fn put_target(&self) -> anyhow::Result<()> {
        let target = self.world.target();
        if !target.exists() {
            return Ok(());
        }
        self.count.set(self.count.get() + 1);
        fs::create_dir_all(&self.place).with_context(|| format!("cannot make {}", self.place.display()))?;
        let place = self.place.join(self.count.get().to_string());
        fs::rename(&target, &place).with_context(|| format!("cannot put the target into {}", place.display()))
    }
}

fn write_files(world: &World, data: &std::path::Path, files: u64) -> anyhow::Result<()> {
    let mut random = Random(11);
    for number in 0..files {
        let directory = data.join("small").join((number / PER_DIRECTORY).to_string());
        if number % PER_DIRECTORY == 0 {
            fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
            world.give_to_server(&data.join("small"))?;
            world.give_to_server(&directory)?;
        }
        let path = directory.join(number.to_string());
        let content: Vec<u8> = (0..FILE_BYTES / 8).flat_map(|_| (random.number() >> 40).to_le_bytes()).collect();
        fs::write(&path, content).with_context(|| format!("cannot write {}", path.display()))?;
        world.give_to_server(&path)?;
    }
    Ok(())
}
