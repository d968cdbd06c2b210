//! Reads of the largest file through a mount of the backup, cold; and restores while the repository is in page cache,
//! so that the device hides nothing of what the mount costs.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

use crate::cluster;
use crate::compare::{relations, verify_backup};
use crate::contest::{Contestant, Outcome, hold};
use crate::fio;
use crate::options::Section;
use crate::ours::Repository;
use crate::report::{Kind, Report, Work};
use crate::world::World;

/// One reader's random reads: enough for a second of a slow disk.
const RANDOM_READS: u64 = 4096;
const RANDOM: [&str; 6] =
    ["--ioengine=psync", "--direct=1", "--rw=randread", "--bs=8k", "--io_size=32m", "--norandommap"];
const CACHED: [&str; 4] = ["--ioengine=psync", "--direct=0", "--rw=read", "--bs=1m"];
const DIRECT: [&str; 5] = ["--ioengine=io_uring", "--direct=1", "--rw=read", "--bs=1m", "--iodepth=8"];

pub(crate) fn run(world: &World, report: &mut Report) -> anyhow::Result<()> {
    let data = cluster::data(world);
    let size = |name: &PathBuf| fs::metadata(data.join(name)).map_or(0, |metadata| metadata.len());
    let name = relations(&data)?.into_iter().max_by_key(size).context("the cluster has no relations")?;
    // fio reads whole requests only.
    let bytes = size(&name) >> 20 << 20;
    let length = format!("--size={bytes}");
    let work = Work::Bytes(bytes);
    let reads: [(&str, &[&str], Work); 3] = [
        ("sequential through the page cache", &CACHED, work),
        ("sequential past the page cache", &DIRECT, work),
        ("random 8 KiB", &RANDOM, Work::Count(RANDOM_READS, "reads")),
    ];
    for (what, options, work) in reads {
        let options: Vec<&str> = options.iter().copied().chain([length.as_str()]).collect();
        let mut contestants = vec![of_the_file(world, format!("raw file, {what}"), data.join(&name), &options)];
        for codec in world.options.codecs.iter().copied() {
            let repository = Repository::new(world, codec);
            repository.ensure_backup()?;
            contestants.push(through_the_mount(world, repository, format!("mount {codec}, {what}"), &name, &options));
        }
        hold(world, report, Section::Mount, work, contestants)?;
    }
    let work = Work::Bytes(report.cluster_bytes);
    hold(world, report, Section::Mount, work, restores(world))
}

fn of_the_file<'w>(world: &'w World, name: String, file: PathBuf, options: &'w [&'w str]) -> Contestant<'w> {
    let run = move || fio::read(world, &file, options).map(by_its_clock);
    Contestant::with_outcome(Kind::Device, name, run).without_sync()
}

/// The mount is made within the run, so that its server's memory counts; the time is fio's.
fn through_the_mount<'w>(
    world: &'w World,
    repository: Repository<'w>,
    name: String,
    file: &'w Path,
    options: &'w [&'w str],
) -> Contestant<'w> {
    let at = world.path("mount");
    let (mounted, unmounted) = (at.clone(), repository.clone());
    let run = move || {
        fs::create_dir_all(&at).with_context(|| format!("cannot make {}", at.display()))?;
        repository.mount(&at)?;
        fio::read(world, &at.join("data").join(file), options).map(by_its_clock)
    };
    Contestant::with_outcome(Kind::Ours, name, run).without_sync().finish(move || unmounted.unmount(&mounted))
}

fn by_its_clock(seconds: f64) -> Outcome {
    Outcome { seconds: Some(seconds), ..Outcome::default() }
}

fn restores(world: &World) -> Vec<Contestant<'_>> {
    let variants = world.options.codecs.iter().flat_map(|codec| ["mount", "blocks"].map(|source| (*codec, source)));
    let contestant = |(codec, source)| {
        let repository = Repository::new(world, codec);
        let path = repository.path.clone();
        Contestant::new(Kind::Ours, format!("hot restore, {source} {codec}"), move || repository.restore(source, &[]))
            .prepare(move || read_all(&path))
            .check(move || verify_backup(world, &world.target()))
            .hot()
    };
    variants.map(contestant).collect()
}

/// Into the page cache.
fn read_all(directory: &Path) -> anyhow::Result<()> {
    for entry in fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))? {
        let path = entry.context("an entry")?.path();
        if path.is_dir() {
            read_all(&path)?;
        } else {
            let mut file = fs::File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
            let mut chunk = vec![0; 1 << 20];
            while std::io::Read::read(&mut file, &mut chunk).with_context(|| format!("{}", path.display()))? > 0 {}
        }
    }
    Ok(())
}
