//! What the figures were measured on.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde::Serialize;

use crate::world::World;

/// Without which a figure says nothing.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Machine {
    processor: String,
    cores: usize,
    memory_bytes: u64,
    kernel: String,
    file_system: String,
    cache: &'static str,
    transparent_huge_pages: String,
    huge_pages: u64,
    load_at_the_start: String,
    pub(crate) load_at_the_end: String,
    /// How the device was fastest.
    pub(crate) ceiling: String,
    versions: BTreeMap<String, String>,
    processor_time: &'static str,
    memory: &'static str,
}

impl Machine {
    pub(crate) fn survey(world: &World) -> Self {
        let cpuinfo = read("/proc/cpuinfo");
        let meminfo = read("/proc/meminfo");
        let kib = |name| field(&meminfo, name).and_then(|value| value.trim_end_matches(" kB").parse::<u64>().ok());
        let bracketed = read("/sys/kernel/mm/transparent_hugepage/enabled");
        let chosen = bracketed.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
        let mut versions = BTreeMap::new();
        let peers = ["pgbackrest", "rsync", "barman", "wal-g", "rustic", "fio", "cp", "tar"];
        let found = peers.into_iter().filter_map(|name| Some((name, version(Command::new(world.find(name)?), name)?)));
        versions.extend(found.map(|(name, version)| (name.to_owned(), version)));
        let ours = [("pghydrant", world.program.clone()), ("postgres", world.server.join("postgres"))];
        for (name, program) in ours {
            versions.extend(version(Command::new(program), name).map(|version| (name.to_owned(), version)));
        }
        Self {
            processor: field(&cpuinfo, "model name").unwrap_or("unknown processor").to_owned(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: kib("MemTotal").unwrap_or(0) * 1024,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            file_system: file_system(&world.place),
            cache: if world.options.warm { "caches as they were" } else { "cold caches" },
            transparent_huge_pages: chosen.map_or("unknown", |(chosen, _)| chosen).to_owned(),
            huge_pages: field(&meminfo, "HugePages_Total").and_then(|pages| pages.parse().ok()).unwrap_or(0),
            load_at_the_start: load(),
            load_at_the_end: String::new(),
            ceiling: String::new(),
            versions,
            processor_time: "of all processes below the harness, daemons and servers included, as the kernel accounts it \
                             to each (/proc/PID/stat); its own threads, such as those that write dirty pages, are in none",
            memory: "largest sum of resident pages of the processes that a run started, looked at every 20 ms",
        }
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            out,
            "{}, {} cores, {:.0} GiB, Linux {}, {}, {}; transparent huge pages {}, {} reserved; load {}",
            self.processor,
            self.cores,
            self.memory_bytes as f64 / f64::from(1 << 30),
            self.kernel,
            self.file_system,
            self.cache,
            self.transparent_huge_pages,
            self.huge_pages,
            self.load_at_the_start,
        )?;
        if !self.load_at_the_end.is_empty() {
            write!(out, " to {}", self.load_at_the_end)?;
        }
        if !self.ceiling.is_empty() {
            write!(out, "; the device alone: {}", self.ceiling)?;
        }
        let versions: Vec<_> = self.versions.iter().map(|(name, version)| format!("{name} {version}")).collect();
        write!(out, "\n{}", versions.join(", "))
    }
}

/// Of the last minute.
pub(crate) fn load() -> String {
    read("/proc/loadavg").split(' ').next().unwrap_or_default().to_owned()
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// The value of the first line `name: value`.
fn field<'t>(text: &'t str, name: &str) -> Option<&'t str> {
    let line = text.lines().find(|line| line.starts_with(name))?;
    line.split_once(':').map(|(_, value)| value.trim())
}

/// The first word with a digit of what `--version` (`wal-g` alone has a sentence) says.
fn version(mut command: Command, name: &str) -> Option<String> {
    let output = command.arg(if name == "pgbackrest" { "version" } else { "--version" }).output().ok()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut words = said
        .lines()
        .next()?
        .split_ascii_whitespace()
        .map(|word| word.trim_start_matches("fio-").trim_start_matches('v'));
    words.find(|word| word.starts_with(|first: char| first.is_ascii_digit())).map(str::to_owned)
}

/// Of the mount that `path` is in: the last of those with the longest way to it.
fn file_system(path: &Path) -> String {
    let mounts = read("/proc/self/mounts");
    let split = |line: &str| {
        let mut fields = line.split(' ').skip(1);
        Some((fields.next()?.to_owned(), fields.next()?.to_owned()))
    };
    let holding = mounts.lines().filter_map(split).filter(|(at, _)| path.starts_with(at));
    holding.max_by_key(|(at, _)| at.len()).map_or_else(|| "unknown file system".to_owned(), |(_, kind)| kind)
}
