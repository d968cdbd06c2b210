//! Very large backups that take no room: what is asked of one must not take longer, or more memory, the larger it is.
//!
//! Two of large tables, a hundredfold apart, and one of very many small ones. The programs are warm: what is timed is
//! what they do, not the disk.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use engine::format::file::FileRecord;
use pghydrant_benches::synthetic;

use crate::contest::{Contestant, Outcome, hold};
use crate::options::{CodecName, Section};
use crate::ours::Repository;
use crate::processes;
use crate::report::{Kind, Report, Work};
use crate::world::{World, remove};

/// The backups, by name and size, smallest first: GiB of large tables.
pub(crate) const LARGE: [(&str, u64); 2] = [("100 GB", 100), ("10 TB", 10 << 10)];
/// The backup of very many files.
pub(crate) const MANY: &str = "1,000,000 files";
const FILES: usize = 1_000_000;
/// Where the suite is only tried.
const FILES_OF_A_TRIAL: usize = 10_000;
/// What is asked of each.
pub(crate) const LIST: &str = "list";
pub(crate) const SHOW: &str = "show";
pub(crate) const MOUNT: &str = "mount and first read";
pub(crate) const WALK: &str = "ls of a directory";
/// The server's highest resident memory after all of it, in the report's sizes.
pub(crate) const SERVER: &str = "memory of the mount's server";

/// One of the backups.
#[derive(Clone)]
struct Subject<'w> {
    name: &'static str,
    repository: Repository<'w>,
    /// Below the mount: a file to read from, and the directory that it is in.
    file: PathBuf,
}

pub(crate) fn run(world: &World, report: &mut Report) -> anyhow::Result<()> {
    let files = if world.options.size < 1.0 { FILES_OF_A_TRIAL } else { FILES };
    let mut subjects = Vec::new();
    for (name, gibibytes) in LARGE {
        let file = format!("data/base/5/16384.{}", gibibytes - 1);
        subjects.push(write(world, name, &file, synthetic::large_tables(gibibytes))?);
    }
    subjects.push(write(world, MANY, "data/base/1/7", synthetic::small_tables(files))?);
    for subject in &subjects {
        report.add_size(server_of(subject.name), server_memory(world, subject)?);
    }
    for (what, verb) in [(LIST, "list"), (SHOW, "show")] {
        let contestants = subjects.iter().map(|subject| {
            let repository = subject.repository.clone();
            Contestant::new(Kind::Ours, format!("{what}, {}", subject.name), move || repository.ask(verb))
                .without_sync()
                .hot()
        });
        hold(world, report, Section::Scale, Work::Nothing, contestants.collect())?;
    }
    for (what, walks) in [(MOUNT, false), (WALK, true)] {
        let contestants = subjects.iter().map(|subject| mounted(world, what, walks, subject));
        hold(world, report, Section::Scale, Work::Nothing, contestants.collect())?;
    }
    subjects.iter().try_for_each(|subject| remove(&subject.repository.path))
}

/// The name of a size in the report.
pub(crate) fn server_of(subject: &str) -> String {
    format!("{SERVER}, {subject}")
}

fn write<'w>(world: &'w World, name: &'static str, file: &str, files: Vec<FileRecord>) -> anyhow::Result<Subject<'w>> {
    let directory = format!("repository-{}", name.replace([' ', ','], ""));
    let repository = Repository::named(world, &directory, CodecName::Lz4);
    remove(&repository.path)?;
    synthetic::write(&repository.path, files).with_context(|| format!("the backup of {name}"))?;
    world.check_interrupt()?;
    Ok(Subject { name, repository, file: file.into() })
}

/// A mount of its own, from the command to the first bytes; with `walks` the directory is listed in it, with all
/// attributes, and only that is timed.
fn mounted<'w>(world: &'w World, what: &str, walks: bool, subject: &Subject<'w>) -> Contestant<'w> {
    let (at, subject) = (world.path("mount"), subject.clone());
    let (mountpoint, repository) = (at.clone(), subject.repository.clone());
    let name = format!("{what}, {}", subject.name);
    let run = move || {
        fs::create_dir_all(&at).with_context(|| format!("cannot make {}", at.display()))?;
        subject.repository.mount(&at)?;
        if !walks {
            first_read(&at.join(&subject.file))?;
            return Ok(Outcome::default());
        }
        let began = std::time::Instant::now();
        list(at.join(&subject.file).parent().context("a file has a directory")?)?;
        Ok(Outcome { seconds: Some(began.elapsed().as_secs_f64()), ..Outcome::default() })
    };
    let contestant = Contestant::with_outcome(Kind::Ours, name, run).without_sync().hot();
    contestant.finish(move || repository.unmount(&mountpoint))
}

fn first_read(path: &Path) -> anyhow::Result<()> {
    let mut page = [0; 8192];
    let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    file.read_exact(&mut page).with_context(|| format!("cannot read {}", path.display()))?;
    ensure!(page.iter().any(|byte| *byte != 0), "{} has only zeros", path.display());
    Ok(())
}

fn list(directory: &Path) -> anyhow::Result<()> {
    let entries = fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))?;
    for entry in entries {
        entry.and_then(|entry| entry.metadata()).with_context(|| format!("an entry of {}", directory.display()))?;
    }
    Ok(())
}

/// The most memory that a mount's server has had, once a file was read and its directory listed. A figure of a section
/// looks now and then; this is the kernel's own.
fn server_memory(world: &World, subject: &Subject<'_>) -> anyhow::Result<u64> {
    let at = world.path("mount");
    fs::create_dir_all(&at).with_context(|| format!("cannot make {}", at.display()))?;
    let before = processes::descendants();
    subject.repository.mount(&at)?;
    let file = at.join(&subject.file);
    let used = first_read(&file).and_then(|()| list(file.parent().context("a file has a directory")?));
    let mut servers = processes::descendants();
    servers.retain(|pid| !before.contains(pid));
    let peak = processes::peak_bytes(&servers);
    subject.repository.unmount(&at)?;
    used?;
    ensure!(peak > 0, "the mount's server is not found");
    Ok(peak)
}
