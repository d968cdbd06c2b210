//! A throw-away repository: the verbs on it, and the damage done to it.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::{Cluster, Context, Finished, Pghydrant, Result, Scratch, ensure};

/// A repository of the server's user, and the program that works on it.
pub struct Repository {
    path: PathBuf,
    pub pghydrant: Pghydrant,
}

impl Repository {
    /// `pghydrant init` in directory `repo` of `scratch`.
    pub fn init(scratch: &Scratch, pghydrant: &Pghydrant) -> Result<Self> {
        Self::init_with(scratch, pghydrant, &[])
    }

    pub fn init_with(scratch: &Scratch, pghydrant: &Pghydrant, options: &[&str]) -> Result<Self> {
        Self::init_at(&scratch.join("repo"), pghydrant, options)
    }

    /// `pghydrant init` anywhere.
    pub fn init_at(path: &Path, pghydrant: &Pghydrant, options: &[&str]) -> Result<Self> {
        let repository = Self { path: path.to_owned(), pghydrant: pghydrant.clone() };
        pghydrant.succeed(["init", "--repo", &repository.shown()].iter().chain(options))?;
        Ok(repository)
    }

    /// The same repository, worked on by another user or with other settings.
    pub fn with(&self, pghydrant: &Pghydrant) -> Self {
        Self { path: self.path.clone(), pghydrant: pghydrant.clone() }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The path as an argument.
    pub fn shown(&self) -> String {
        self.path.display().to_string()
    }

    /// `VERB --repo … --cluster main ARGUMENTS`.
    pub fn arguments<'a>(&'a self, verb: &'a [&'a str], arguments: &'a [&'a str]) -> Vec<String> {
        let own = ["--repo".to_owned(), self.shown(), "--cluster".to_owned(), "main".to_owned()];
        let texts = |list: &[&str]| list.iter().map(|&text| text.to_owned()).collect::<Vec<_>>();
        [texts(verb), own.to_vec(), texts(arguments)].concat()
    }

    /// Backs up `cluster` under the name `main`; the result of `--json`.
    pub fn backup(&self, cluster: &Cluster) -> Result<serde_json::Value> {
        let connection = cluster.connection_string();
        self.pghydrant.succeed(self.arguments(&["backup"], &["--dbname", &connection, "--json"]))?.json()
    }

    /// `restore … --to DIRECTORY ARGUMENTS`, whatever its exit code.
    pub fn restore(&self, to: &Path, arguments: &[&str]) -> Result<Finished> {
        let to = to.display().to_string();
        let arguments = [&["--to", &to], arguments].concat();
        self.pghydrant.run(self.arguments(&["restore"], &arguments))
    }

    /// Where the WAL of the cluster's first timeline lies.
    pub fn wal(&self) -> PathBuf {
        self.path.join("clusters/main/wal/00000001")
    }

    /// The names of that timeline's segments, in order.
    pub fn segments(&self) -> Result<Vec<String>> {
        let names = fs::read_dir(self.wal())?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
        let mut segments: Vec<String> = names.collect::<Result<_>>()?;
        segments.retain(|name| name.len() == 24);
        segments.sort();
        Ok(segments)
    }

    /// All files below the repository, relative, sorted.
    pub fn files(&self) -> Result<Vec<PathBuf>> {
        super::compare::files_below(&self.path)
    }

    /// The one file whose relative path matches; an error when there are none or more.
    pub fn file(&self, matches: impl Fn(&str) -> bool) -> Result<PathBuf> {
        let mut found: Vec<PathBuf> =
            self.files()?.into_iter().filter(|path| matches(&path.to_string_lossy())).collect();
        ensure!(found.len() == 1, "expected one file, found {found:?}");
        found.pop().map(|path| self.path.join(path)).context("no file")
    }
}

/// A readable file of a repository that was edited, with the checksum that it then has: as a forger would write it.
pub fn resealed(json: &str) -> Result<String> {
    let line = json.rfind("  \"checksum\": ").context("no checksum in it")?;
    let checksum = engine::checksum::Hash::of(&json.as_bytes()[..line]);
    Ok(format!("{}  \"checksum\": \"{checksum}\"\n}}\n", &json[..line]))
}

/// Harm that a disk, or a hand, does to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    Deleted,
    /// To half its length.
    Truncated,
    /// One bit, in the middle.
    BitFlipped,
}

impl Damage {
    pub const ALL: [Self; 3] = [Self::Deleted, Self::Truncated, Self::BitFlipped];

    /// Damages `path`; what is returned puts it back.
    pub fn inflict(self, path: &Path) -> Result<Mend> {
        let bytes = fs::metadata(path)?.len();
        self.inflict_at(path, bytes / 2)
    }

    /// As [`Self::inflict`], at a byte of choice.
    pub fn inflict_at(self, path: &Path, byte: u64) -> Result<Mend> {
        let saved = path.with_extension("saved-by-test");
        // Renamed away and copied back, so that owner and mode of the original come home with it.
        fs::rename(path, &saved)?;
        let mend = Mend { path: path.to_owned(), saved };
        if self == Self::Deleted {
            return Ok(mend);
        }
        fs::copy(&mend.saved, path)?;
        let owner = fs::metadata(&mend.saved)?;
        std::os::unix::fs::chown(path, Some(std::os::unix::fs::MetadataExt::uid(&owner)), None)?;
        match self {
            Self::Deleted => {}
            Self::Truncated => OpenOptions::new().write(true).open(path)?.set_len(byte)?,
            Self::BitFlipped => flip_bit(path, byte)?,
        }
        Ok(mend)
    }
}

/// Puts a damaged file back when dropped.
pub struct Mend {
    path: PathBuf,
    saved: PathBuf,
}

impl Drop for Mend {
    fn drop(&mut self) {
        let _ = fs::rename(&self.saved, &self.path);
    }
}

/// Flips the lowest bit of a byte.
pub fn flip_bit(path: &Path, byte: u64) -> Result<()> {
    let file: File = OpenOptions::new().read(true).write(true).open(path)?;
    let mut one = [0];
    file.read_exact_at(&mut one, byte).with_context(|| format!("cannot read byte {byte} of {}", path.display()))?;
    file.write_all_at(&[one[0] ^ 1], byte)?;
    Ok(())
}
