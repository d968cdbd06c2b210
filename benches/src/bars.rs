//! What is promised, and whether this run keeps it. Each bar compares figures of one run; without them it says so.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::options::{CodecName, Section};
use crate::report::{Kind, Report, Series};
use crate::sections::delta::{CLUSTER, SPREADS, changed};
use crate::sections::network::{NEAR, PGBACKREST, PROTECTIONS, RSYNC, far, plane_of};
use crate::sections::restore::{CEILING, READ};
use crate::sections::scale::{LARGE, LIST, MANY, MOUNT, SHOW, server_of};

const CODECS: [CodecName; 3] = [CodecName::None, CodecName::Lz4, CodecName::Zstd];
const MEMORY_BYTES_MAX: f64 = 256.0 * 1_048_576.0;
/// What a reflink restore costs hardly grows with the bytes: less than this proves nothing.
const REFLINK_BYTES: f64 = 2.9e9;

/// One promise.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Bar {
    name: String,
    wanted: Wanted,
    /// `None` where a figure is missing.
    got: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Wanted {
    AtMost(f64),
    AtLeast(f64),
}

impl Bar {
    fn holds(&self) -> Option<bool> {
        self.got.map(|got| match self.wanted {
            Wanted::AtMost(limit) => got <= limit,
            Wanted::AtLeast(limit) => got >= limit,
        })
    }

    fn wanted_in_words(&self) -> String {
        match self.wanted {
            Wanted::AtMost(limit) => format!("at most {limit:.2}"),
            Wanted::AtLeast(limit) => format!("at least {limit:.2}"),
        }
    }

    pub(crate) fn to_json(&self) -> Value {
        json!({ "name": self.name, "wanted": self.wanted_in_words(), "got": self.got, "holds": self.holds() })
    }
}

/// As a table.
pub(crate) fn table(report: &Report) -> String {
    let mut out = String::from("| bar | wanted | got | holds |\n|---|---:|---:|---|\n");
    for bar in judge(report) {
        let got = bar.got.map_or_else(|| "not measured".to_owned(), |got| format!("{got:.2}"));
        let holds = match bar.holds() {
            Some(true) => "yes",
            Some(false) => "no",
            None => "",
        };
        // Writing to a String does not fail.
        let _ = writeln!(out, "| {} | {} | {got} | {holds} |", bar.name, bar.wanted_in_words());
    }
    out
}

/// All bars of the suite.
pub(crate) fn judge(report: &Report) -> Vec<Bar> {
    let mut judge = Judge { report, bars: Vec::new() };
    judge.restores();
    judge.mounts();
    judge.backups();
    judge.deltas();
    judge.small_files();
    judge.reflinks();
    judge.network();
    judge.scale();
    judge.wal();
    judge.memory();
    judge.bars
}

struct Judge<'r> {
    report: &'r Report,
    bars: Vec<Bar>,
}

impl<'r> Judge<'r> {
    fn at_most(&mut self, name: impl Into<String>, limit: f64, got: Option<f64>) {
        self.bars.push(Bar { name: name.into(), wanted: Wanted::AtMost(limit), got });
    }

    fn at_least(&mut self, name: impl Into<String>, limit: f64, got: Option<f64>) {
        self.bars.push(Bar { name: name.into(), wanted: Wanted::AtLeast(limit), got });
    }

    fn seconds(&self, section: Section, name: &str) -> Option<f64> {
        self.report.find(section, name).map(Series::seconds)
    }

    /// The time of the first to that of the second.
    fn ratio(&self, section: Section, one: &str, other: &str) -> Option<f64> {
        Some(self.seconds(section, one)? / self.seconds(section, other)?)
    }

    /// Both ways of a restore, each by its own name.
    fn restores(&mut self) {
        for source in ["mount", "blocks"] {
            for codec in CODECS {
                let ours = format!("pghydrant {source} {codec}");
                let pgbackrest = format!("pgBackRest {codec}");
                let ratio = |judge: &Self, other: &str| judge.ratio(Section::Restore, &ours, other);
                let faster = ratio(self, &pgbackrest).map(f64::recip);
                if codec == CodecName::None {
                    let ceiling = ratio(self, CEILING);
                    self.at_most(format!("restore, {source} none: time to the device's own copy"), 1.10, ceiling);
                    let copy = ratio(self, "cp -a");
                    self.at_most(format!("restore, {source} none: time to cp -a"), 0.45, copy);
                    self.at_least(format!("restore, {source} none: faster than pgBackRest"), 3.5, faster);
                    continue;
                }
                self.at_least(format!("restore, {source} {codec}: faster than pgBackRest"), 3.0, faster);
                let peers = self.report.of(Section::Restore).filter(|series| series.kind == Kind::Peer);
                let fastest = peers.map(Series::seconds).min_by(f64::total_cmp);
                let faster = fastest.zip(self.seconds(Section::Restore, &ours)).map(|(peer, ours)| peer / ours);
                self.at_least(format!("restore, {source} {codec}: faster than the fastest peer"), 2.0, faster);
                let cpu = |name: &str| self.report.find(Section::Restore, name).map(Series::cpu_seconds);
                let cpu = cpu(&ours).zip(cpu(&pgbackrest)).map(|(ours, theirs)| ours / theirs);
                self.at_most(format!("restore, {source} {codec}: processor time to pgBackRest's"), 0.40, cpu);
            }
        }
    }

    fn mounts(&mut self) {
        for codec in CODECS {
            let (blocks, mount) = (format!("hot restore, blocks {codec}"), format!("hot restore, mount {codec}"));
            let speed = self.ratio(Section::Mount, &blocks, &mount);
            self.at_least(format!("hot restore, {codec}: speed through the mount to that of blocks"), 0.90, speed);
        }
        let random = self.ratio(Section::Mount, "raw file, random 8 KiB", "mount none, random 8 KiB");
        self.at_least("mount none: rate of random reads to the raw file's", 0.5, random);
        let what = "sequential through the page cache";
        for codec in CODECS {
            let speed = self.ratio(Section::Mount, &format!("raw file, {what}"), &format!("mount {codec}, {what}"));
            self.at_least(format!("mount {codec}: speed of sequential reads to the raw file's"), 1.0, speed);
        }
    }

    fn backups(&mut self) {
        for codec in CODECS {
            let faster = self.ratio(Section::Backup, &format!("pgBackRest {codec}"), &format!("pghydrant {codec}"));
            self.at_least(format!("backup, {codec}: faster than pgBackRest"), 1.5, faster);
        }
    }

    fn deltas(&mut self) {
        for (_, what) in SPREADS {
            let changed = self.report.size(&changed(what)).map(|bytes| bytes as f64);
            // What must be read is the cluster; what changed is written at the speed of a copy.
            let whole = self.report.size(CLUSTER).unwrap_or(self.report.cluster_bytes) as f64;
            let for_byte = |name| Some(self.seconds(Section::Restore, name)? / self.report.cluster_bytes as f64);
            let written = for_byte(CEILING).zip(changed).map(|(copy, part)| copy * part);
            let device = for_byte(READ).zip(written).map(|(read, write)| read * whole + write);
            let name = format!("second backup, {what}: pghydrant ");
            if let Some(series) = self.starting(Section::Delta, &name) {
                let (seconds, of) = (series.seconds(), format!("size of {}", series.name));
                self.at_most(format!("second backup, {what}: time to the device's"), 1.25, device.map(|d| seconds / d));
                let stored = self.report.size(&format!("first backup, {}", &series.name[name.len() - 10..]));
                let ratio = stored.map(|stored| stored as f64 / whole).zip(changed).map(|(ratio, part)| ratio * part);
                let size = self.report.size(&of).zip(ratio).map(|(size, part)| size as f64 / part);
                self.at_most(format!("second backup, {what}: size to the changed pages compressed"), 1.3, size);
            }
            for source in ["mount", "blocks"] {
                let ours = self.starting(Section::Delta, &format!("delta restore, {what}: pghydrant {source} "));
                let Some(seconds) = ours.map(Series::seconds) else { continue };
                let theirs = self.starting(Section::Delta, &format!("delta restore, {what}: pgBackRest "));
                let name = format!("delta restore, {what}, {source}");
                self.at_most(format!("{name}: time to the device's"), 1.25, device.map(|device| seconds / device));
                let faster = theirs.map(|theirs| theirs.seconds() / seconds);
                self.at_least(format!("{name}: faster than pgBackRest"), 3.0, faster);
            }
        }
    }

    fn starting(&self, section: Section, name: &str) -> Option<&'r Series> {
        self.report.of(section).find(|series| series.name.starts_with(name))
    }

    fn small_files(&mut self) {
        for source in ["mount", "blocks"] {
            let ours = self.starting(Section::Small, &format!("pghydrant {source} "));
            let faster = ours.and_then(|ours| Some(self.seconds(Section::Small, "cp -a")? / ours.seconds()));
            self.at_least(format!("small files, {source}: faster than cp -a"), 3.0, faster);
        }
    }

    fn reflinks(&mut self) {
        for file_system in ["xfs", "btrfs"] {
            let seconds = self.seconds(Section::Reflink, &format!("reflink {file_system}, repository trusted"));
            let large_enough = self.report.cluster_bytes as f64 >= REFLINK_BYTES;
            let seconds = seconds.filter(|_| large_enough);
            self.at_most(format!("reflink {file_system}, trusted: seconds for 3 GB or more"), 0.5, seconds);
        }
    }

    fn network(&mut self) {
        for (protection, wanted) in PROTECTIONS.into_iter().zip([2.0, 1.0]) {
            for codec in ["lz4", "none"] {
                let series = self.report.find(Section::Network, &plane_of(protection, codec));
                let speed = series.and_then(Series::gigabytes_a_second);
                self.at_least(format!("data plane, {protection} {codec}: GB/s"), wanted, speed);
            }
        }
        for protection in PROTECTIONS {
            let ours = far(protection);
            let local = self.ratio(Section::Network, NEAR, &ours);
            self.at_least(format!("{ours}: speed to that on one machine"), 0.8, local);
            for (peer, wanted) in [(RSYNC, 4.0), (PGBACKREST, 3.0)] {
                let faster = self.ratio(Section::Network, peer, &ours);
                self.at_least(format!("{ours}: faster than {peer}"), wanted, faster);
            }
        }
    }

    /// A hundred times the data may take no more than the noise of starting a program.
    fn scale(&mut self) {
        let [(small, _), (large, _)] = LARGE;
        for what in [LIST, SHOW, MOUNT] {
            let ratio = self.ratio(Section::Scale, &format!("{what}, {large}"), &format!("{what}, {small}"));
            self.at_most(format!("{what}: time of {large} to that of {small}"), 2.0, ratio);
        }
        for what in [LIST, SHOW] {
            let seconds = self.seconds(Section::Scale, &format!("{what}, {large}"));
            self.at_most(format!("{what} of {large}: seconds"), 0.1, seconds);
        }
        for subject in [large, MANY] {
            let peak = self.report.size(&server_of(subject)).map(|bytes| bytes as f64 / MEMORY_BYTES_MAX);
            self.at_most(format!("mount of {subject}: peak memory to 256 MiB"), 1.0, peak);
        }
    }

    fn wal(&mut self) {
        let laid = self.seconds(Section::Wal, "whole: cp, segments in pg_wal: replay");
        for source in ["mount", "blocks"] {
            let whole = self.report.of(Section::Wal).find(|series| {
                series.name.starts_with(&format!("whole: pghydrant {source} ")) && !series.name.ends_with("replay")
            });
            let replay = whole.and_then(|series| self.seconds(Section::Wal, &format!("{}: replay", series.name)));
            let ratio = replay.zip(laid).map(|(ours, laid)| ours / laid);
            self.at_most(format!("replay, {source}: time to that of segments in pg_wal"), 1.25, ratio);
            let whole = whole.map(Series::seconds).zip(self.fastest_peer("whole: ")).map(|(ours, peer)| ours / peer);
            self.at_most(format!("command to promoted, {source}: time to the fastest peer's"), 0.45, whole);
            let query = self.starting(Section::Wal, &format!("first query: pghydrant {source} ")).map(Series::seconds);
            let query = query.zip(self.fastest_peer("first query: ")).map(|(ours, peer)| ours / peer);
            self.at_most(format!("first query, {source}: time to the fastest peer's"), 0.45, query);
        }
        let ours = self.starting(Section::Wal, "archive: pghydrant ");
        let theirs = self.starting(Section::Wal, "archive: pgBackRest ");
        let faster = theirs.zip(ours).map(|(theirs, ours)| theirs.seconds() / ours.seconds());
        self.at_least("archiving segments: faster than pgBackRest", 3.0, faster);
    }

    fn fastest_peer(&self, name: &str) -> Option<f64> {
        let of = |series: &&Series| {
            series.kind == Kind::Peer && series.name.starts_with(name) && !series.name.ends_with("replay")
        };
        self.report.of(Section::Wal).filter(of).map(Series::seconds).min_by(f64::total_cmp)
    }

    fn memory(&mut self) {
        for section in [Section::Restore, Section::Backup, Section::Mount] {
            let ours = self.report.of(section).filter(|series| series.kind == Kind::Ours);
            let peak = ours.map(Series::peak_bytes).max().map(|bytes| bytes as f64 / MEMORY_BYTES_MAX);
            self.at_most(format!("{section}: peak memory to 256 MiB"), 1.0, peak);
        }
    }
}
