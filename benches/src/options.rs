//! What to measure, and where.

use std::fmt;
use std::path::PathBuf;

use clap::{Parser, ValueEnum};

/// Whole backups and restores against the device's ceiling and other tools.
#[derive(Clone, Debug, Parser)]
#[command(name = "bench", max_term_width = 110)]
pub(crate) struct Options {
    /// GiB of the generated cluster; a part is fine: 0.0625
    #[arg(long, value_name = "GIB", default_value_t = 3.0)]
    pub(crate) size: f64,
    /// Rounds of each contest
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rounds: u32,
    /// Only these sections
    #[arg(long, value_name = "SECTION,...", value_delimiter = ',')]
    pub(crate) only: Vec<Section>,
    /// Compressions of the repositories
    #[arg(long, value_name = "CODEC,...", value_delimiter = ',', default_value = "none,lz4,zstd")]
    pub(crate) codecs: Vec<CodecName>,
    /// Which of the other tools: "all" that are found, "none", or names
    #[arg(long, value_name = "PEER,...", value_delimiter = ',', default_value = "all")]
    pub(crate) peers: Vec<String>,
    /// WAL segments of 16 MiB to replay
    #[arg(long, value_name = "N", default_value_t = 89)]
    pub(crate) segments: u32,
    /// Where everything is made, on the file system to measure; it is removed at the end
    #[arg(long, value_name = "DIR", default_value = "/var/tmp/pghydrant-bench")]
    pub(crate) place: PathBuf,
    /// The program to measure [default: pghydrant beside this one]
    #[arg(long, value_name = "FILE")]
    pub(crate) program: Option<PathBuf>,
    /// The operating system user of the servers, where this runs as root
    #[arg(long, value_name = "USER", default_value = "postgres")]
    pub(crate) user: String,
    /// Leave the caches as they are: to try something, not to measure it
    #[arg(long)]
    pub(crate) warm: bool,
    /// Write all figures to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Write a bar chart of each section into this directory
    #[arg(long, value_name = "DIR")]
    pub(crate) svg: Option<PathBuf>,
}

impl Options {
    pub(crate) fn wants(&self, section: Section) -> bool {
        self.only.is_empty() || self.only.contains(&section)
    }

    pub(crate) fn wants_peer(&self, name: &str) -> bool {
        self.peers.iter().any(|peer| peer == "all" || peer == name)
    }

    pub(crate) fn bytes(&self) -> u64 {
        (self.size * f64::from(1 << 30)) as u64
    }

    /// The compression of the sections that need only one.
    pub(crate) fn codec(&self) -> CodecName {
        let preferred = self.codecs.contains(&CodecName::Lz4).then_some(CodecName::Lz4);
        preferred.or(self.codecs.first().copied()).unwrap_or(CodecName::Lz4)
    }
}

/// A part of the suite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Section {
    /// Full backups
    Backup,
    /// Restores of every variant, and the device's ceiling
    Restore,
    /// Reads through the mount, and restores from a repository in page cache
    Mount,
    /// 20,000 files of 8 KiB
    Small,
    /// Restores by reflink on XFS and btrfs
    Reflink,
    /// Restores on another machine, by the mount server, and its data plane
    Network,
    /// Backups of 10 TB, and of 1,000,000 files, that take no room
    Scale,
    /// Replay, the whole way to the promoted instance, the first query, archiving
    Wal,
    /// Second backups and restores over what is there, after 5 % of the pages changed
    Delta,
}

impl Section {
    /// In the order of a run.
    pub(crate) const ALL: [Self; 9] = [
        Self::Backup,
        Self::Restore,
        Self::Mount,
        Self::Small,
        Self::Reflink,
        Self::Network,
        Self::Scale,
        Self::Wal,
        Self::Delta,
    ];
}

impl fmt::Display for Section {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.to_possible_value();
        out.write_str(value.as_ref().map_or("", |value| value.get_name()))
    }
}

/// How blocks are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum CodecName {
    /// As they are
    None,
    /// lz4
    Lz4,
    /// zstd, level 1
    Zstd,
}

impl CodecName {
    /// As `init --compression` has it.
    pub(crate) fn ours(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }

    /// As pgBackRest's `compress-type` has it.
    pub(crate) fn pgbackrest(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Lz4 => "lz4",
            Self::Zstd => "zst",
        }
    }

    /// What of a cluster's bytes a repository takes, at most.
    pub(crate) fn share(self) -> f64 {
        match self {
            Self::None => 1.05,
            Self::Lz4 => 0.45,
            Self::Zstd => 0.35,
        }
    }
}

impl fmt::Display for CodecName {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.ours())
    }
}
