//! Configuration that lies outside the data directory, as Debian has it in `/etc/postgresql/15/main`.
//!
//! A restored data directory needs one to start with, and on the morning when it is needed the original's may be gone as
//! well. So the backup has `postgresql.conf`, `pg_hba.conf` and `pg_ident.conf` where PostgreSQL looks for them in a data
//! directory that stands alone, and beside them what `postgresql.conf` includes from its own directory: a relative
//! `include_dir` then leads to the copy's. They are on the list of `pg_verifybackup` like every other file.
//!
//! Lines that would lead a copy back to the original become comments: `data_directory`, `hba_file` and `ident_file`, and
//! includes by absolute path, which are followed by the same one by relative path. `data_directory` can be overruled
//! nowhere else: with it, `pg_ctl -D COPY start` would open the original's cluster. Lists of users and databases that
//! `pg_hba.conf` and `pg_ident.conf` name (`@file`) come along in the same way, and what they include.
//!
//! A restored instance whose configuration is elsewhere (`restore --config-to`) has a line for that at the end of
//! `postgresql.conf`; its backup has the configuration that the line leads to.
//!
//! Always true: nothing outside the data directory is written, and nothing is read that the server's user may not read.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context as _, Result};
use engine::Error;
use engine::format::file::{FileKind, FileRecord};
use engine::format::manifest::path as manifest_path;
use engine::units::BlockNumber;

use super::late::Attributes;
use super::places;
use super::server::Server;
use crate::postgres::owner::Owner;
use crate::restore::{conf, hba};

/// What commented lines are marked with.
const STAMP: &str = "outside";
/// What only the original's own file may say.
const PLACES: [&str; 3] = ["data_directory", "hba_file", "ident_file"];
/// The setting that names a file, and the file's place in a data directory.
const ROLES: [(&str, &str); 3] =
    [("config_file", "postgresql.conf"), ("hba_file", "pg_hba.conf"), ("ident_file", "pg_ident.conf")];
/// A configuration is no larger; of one file.
const BYTES_MAX: u64 = 16 << 20;
/// Nor has it more files: what leads here is a circle.
const FILES_MAX: usize = 1000;

/// What lies outside, as it will stand in the backup.
#[derive(Debug, Default)]
pub(super) struct Outside {
    /// The files as they will be read, without a name anywhere, by their paths in the backup.
    pub(super) sources: BTreeMap<String, File>,
    /// What is not in the backup although the server reads it.
    pub(super) warnings: Vec<String>,
    records: Vec<FileRecord>,
}

impl Outside {
    /// Reads the files that the server names.
    pub(super) fn gather(server: &Server) -> Result<Self> {
        let mut gathered = Gathered::new(server);
        for (setting, path) in ROLES {
            let Some(original) = server.info.settings.get(setting).map(PathBuf::from) else { continue };
            if original.as_os_str().is_empty() {
                continue;
            }
            let (original, grammar) = match setting {
                "config_file" => (placed_elsewhere(&original).unwrap_or(original), Grammar::Settings),
                _ => (original, Grammar::Authentication),
            };
            let inside = lies_in(&original, &server.data);
            gathered.configuration(path, &original, inside, grammar);
        }
        gathered.spool(server)
    }

    /// Puts the files among those of the data directory, in path order; the file in force takes the place of one that is
    /// not.
    pub(super) fn join(&self, records: &mut Vec<FileRecord>) {
        if self.records.is_empty() {
            return;
        }
        let ours = |record: &FileRecord| {
            self.records.binary_search_by(|other| manifest_path::order(&other.path, &record.path)).is_ok()
        };
        records.retain(|record| !ours(record));
        records.extend_from_slice(&self.records);
        records.sort_by(|left, right| manifest_path::order(&left.path, &right.path));
    }
}

/// Files on their way.
struct Gathered<'a> {
    owner: &'a Owner,
    data: &'a Path,
    files: BTreeMap<String, Vec<u8>>,
    directories: Vec<String>,
    warnings: Vec<String>,
}

impl<'a> Gathered<'a> {
    fn new(server: &'a Server) -> Self {
        Self {
            owner: &server.owner,
            data: &server.data,
            files: BTreeMap::new(),
            directories: Vec::new(),
            warnings: Vec::new(),
        }
    }

    /// A file and all that it includes. Of one that lies in the data directory only what it includes from
    /// elsewhere is of interest, and that is only named.
    fn configuration(&mut self, path: &str, original: &Path, inside: bool, grammar: Grammar) {
        let known = self.directories.len();
        let root = original.parent().unwrap_or(Path::new("/")).to_owned();
        let mut waiting = vec![(path.to_owned(), original.to_owned())];
        let mut seen = 0;
        while let Some((path, original)) = waiting.pop() {
            seen += 1;
            if seen > FILES_MAX || self.files.contains_key(&path) {
                continue;
            }
            let Some(text) = self.read(&original) else { continue };
            let directory = original.parent().unwrap_or(Path::new("/")).to_owned();
            for Include { place, is_directory, .. } in grammar.includes(&text, &directory) {
                let stored = place.strip_prefix(&root).ok().and_then(Path::to_str).filter(|path| !path.is_empty());
                let stored = stored.filter(|path| manifest_path::check(path).is_ok());
                match stored {
                    Some(stored) if is_directory => {
                        self.directories.push(stored.to_owned());
                        waiting.extend(conf_files(&place).into_iter().map(|name| {
                            let path = format!("{stored}/{name}");
                            (path, place.join(name))
                        }));
                    }
                    Some(stored) if place.exists() => waiting.push((stored.to_owned(), place)),
                    Some(_) => {}
                    None if place.exists() && !lies_in(&place, self.data) => self.warnings.push(format!(
                        "{} includes {}, which lies elsewhere and is not in the backup",
                        original.display(),
                        place.display()
                    )),
                    None => {}
                }
            }
            if !inside {
                self.files.insert(path, grammar.standing_alone(&text, &directory));
            }
        }
        if inside {
            self.directories.truncate(known);
        }
    }

    /// A file's content, where the server's user may read it.
    fn read(&mut self, path: &Path) -> Option<Vec<u8>> {
        let read = || {
            let file = places::open_for(self.owner, path)?;
            let metadata = file.metadata().map_err(|cause| cause.to_string())?;
            if !metadata.is_file() || metadata.len() > BYTES_MAX {
                return Err("it is not a file of a configuration's size".to_owned());
            }
            let mut text = Vec::new();
            file.take(BYTES_MAX).read_to_end(&mut text).map_err(|cause| cause.to_string())?;
            Ok(text)
        };
        read().map_err(|cause| self.warnings.push(format!("{} is not in the backup: {cause}", path.display()))).ok()
    }

    /// Puts what was read where the copy's workers can read it again: into files without names.
    fn spool(mut self, server: &Server) -> Result<Outside> {
        if self.files.is_empty() {
            return Ok(Outside { warnings: self.warnings, ..Outside::default() });
        }
        let attributes = server.attributes(jiff::Timestamp::now().as_second());
        let mut sources = BTreeMap::new();
        let mut records = Vec::new();
        for (path, text) in &self.files {
            let mut spooled = tempfile::tempfile().context("cannot make a temporary file for the configuration")?;
            let written = spooled
                .write_all(text)
                .and_then(|()| spooled.set_permissions(fs::Permissions::from_mode(attributes.mode)));
            written.map_err(|cause| Error::io("write a temporary file for", path, cause))?;
            if rustix::process::geteuid().is_root() {
                let given = std::os::unix::fs::fchown(&spooled, Some(attributes.uid), Some(attributes.gid));
                given.map_err(|cause| Error::io("change the owner of a temporary file for", path, cause))?;
            }
            records.push(record(path, FileKind::Regular, text.len() as u64, attributes));
            sources.insert(path.clone(), spooled);
            self.directories.extend(directories_above(path));
        }
        let metadata = fs::metadata(&server.data).map_err(|cause| Error::io("stat", &server.data, cause))?;
        let attributes = Attributes { mode: metadata.mode() & 0o777, ..attributes };
        let above: Vec<String> = self.directories.iter().flat_map(|path| directories_above(path)).collect();
        self.directories.extend(above);
        records.extend(self.directories.iter().map(|path| record(path, FileKind::Directory, 0, attributes)));
        records.sort_by(|left, right| manifest_path::order(&left.path, &right.path));
        records.dedup_by(|left, right| manifest_path::order(&left.path, &right.path) == Ordering::Equal);
        Ok(Outside { sources, warnings: self.warnings, records })
    }
}

fn record(path: &str, kind: FileKind, bytes: u64, attributes: Attributes) -> FileRecord {
    let Attributes { mode, uid, gid, modified } = attributes;
    FileRecord { path: path.to_owned(), kind, mode, uid, gid, modified, bytes, crc32c: 0, first_block: BlockNumber(0) }
}

/// `a/b/c`: `a`, `a/b`.
fn directories_above(path: &str) -> Vec<String> {
    path.match_indices('/').map(|(at, _)| path[..at].to_owned()).collect()
}

/// Whether a file's name stands in the data directory; a link there that leads out of it does.
fn lies_in(path: &Path, data: &Path) -> bool {
    let directory = path.parent().map(|parent| fs::canonicalize(parent).unwrap_or_else(|_| parent.to_owned()));
    directory.is_some_and(|directory| directory.starts_with(data))
}

/// Where `restore --config-to` has put the configuration, if it has: the end of `postgresql.conf` leads there.
fn placed_elsewhere(conf: &Path) -> Option<PathBuf> {
    let text = fs::read(conf).ok()?;
    let last = conf::entries(&text).pop().filter(|last| last.name == "include_if_exists")?;
    let place = PathBuf::from(last.value);
    (crate::restore::has_kept_settings(&text) && place.is_absolute() && place.is_file()).then_some(place)
}

/// How a file includes others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Grammar {
    /// `postgresql.conf`
    Settings,
    /// `pg_hba.conf`, `pg_ident.conf`
    Authentication,
}

impl Grammar {
    fn includes(self, text: &[u8], directory: &Path) -> Vec<Include> {
        match self {
            Self::Settings => includes(text, directory),
            Self::Authentication => hba::inclusions(text)
                .into_iter()
                .map(|inclusion| Include {
                    line: 0,
                    place: normal(&directory.join(&inclusion.path)),
                    is_directory: inclusion.kind == hba::Kind::Directory,
                    is_absolute: Path::new(&inclusion.path).is_absolute(),
                    name: inclusion.directive().to_owned(),
                })
                .collect(),
        }
    }

    /// The text as a data directory that stands alone can have it; `directory` is where the original lies.
    fn standing_alone(self, text: &[u8], directory: &Path) -> Vec<u8> {
        match self {
            Self::Settings => standing_alone(text, directory),
            Self::Authentication => hba::replaced(text, &format!("#[pghydrant {STAMP}] "), &|inclusion| {
                let path = Path::new(&inclusion.path);
                let below = path.is_absolute().then(|| normal(path))?;
                Some(below.strip_prefix(directory).ok()?.to_str()?.to_owned())
            }),
        }
    }
}

/// A line that includes something.
struct Include {
    line: usize,
    name: String,
    /// Absolute, without `.` and `..`.
    place: PathBuf,
    is_directory: bool,
    is_absolute: bool,
}

fn includes(text: &[u8], directory: &Path) -> Vec<Include> {
    let included = |entry: conf::Entry| Include {
        line: entry.line,
        place: normal(&directory.join(&entry.value)),
        is_directory: entry.name == "include_dir",
        is_absolute: Path::new(&entry.value).is_absolute(),
        name: entry.name,
    };
    let names = ["include", "include_if_exists", "include_dir"];
    conf::entries(text).into_iter().filter(|entry| names.contains(&entry.name.as_str())).map(included).collect()
}

/// The path, resolved as text.
fn normal(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => drop(plain.pop()),
            Component::CurDir => {}
            other => plain.push(other),
        }
    }
    plain
}

/// What PostgreSQL reads of an included directory.
fn conf_files(directory: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.filter(|name| name.ends_with(".conf") && !name.starts_with('.')).collect()
}

/// The text as a data directory that stands alone can have it; `directory` is where the original lies.
fn standing_alone(text: &[u8], directory: &Path) -> Vec<u8> {
    let text = conf::silenced(text, STAMP, &PLACES);
    let relative: BTreeMap<usize, String> = includes(&text, directory)
        .into_iter()
        .filter(|include| include.is_absolute)
        .filter_map(|include| {
            let below = include.place.strip_prefix(directory).ok()?.to_str()?;
            Some((include.line, format!("{} {}\n", include.name, conf::quoted(below))))
        })
        .collect();
    let mut out = Vec::with_capacity(text.len());
    for (number, line) in text.split_inclusive(|byte| *byte == b'\n').enumerate() {
        let Some(replacement) = relative.get(&number) else {
            out.extend_from_slice(line);
            continue;
        };
        out.extend_from_slice(format!("#[pghydrant {STAMP}] ").as_bytes());
        out.extend_from_slice(line.strip_suffix(b"\n").unwrap_or(line));
        out.push(b'\n');
        out.extend_from_slice(replacement.as_bytes());
    }
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_would_lead_back_to_the_original_becomes_a_comment() {
        let text = b"data_directory = '/srv/main'\nport = 5433 # data_directory\nHBA_FILE '/etc/pg/pg_hba.conf'\n\
                     include_dir = 'conf.d'\ninclude '/etc/pg/more/a.conf'\ninclude_if_exists '/srv/b.conf'";
        assert_eq!(
            String::from_utf8(standing_alone(text, Path::new("/etc/pg"))).unwrap(),
            "#[pghydrant outside] data_directory = '/srv/main'\nport = 5433 # data_directory\n\
             #[pghydrant outside] HBA_FILE '/etc/pg/pg_hba.conf'\ninclude_dir = 'conf.d'\n\
             #[pghydrant outside] include '/etc/pg/more/a.conf'\ninclude 'more/a.conf'\ninclude_if_exists '/srv/b.conf'"
        );
    }

    #[test]
    fn they_take_their_place_among_the_files_in_path_order() {
        let attributes = Attributes { mode: 0o600, uid: 1, gid: 1, modified: 0 };
        let file = |path: &str, bytes| record(path, FileKind::Regular, bytes, attributes);
        let directory = record("conf.d", FileKind::Directory, 0, attributes);
        let outside = Outside {
            records: vec![directory.clone(), file("conf.d/a.conf", 1), file("postgresql.conf", 2)],
            ..Outside::default()
        };
        let mut records = vec![file("PG_VERSION", 3), directory, file("conf.e", 4), file("postgresql.conf", 99)];
        outside.join(&mut records);
        let found: Vec<_> = records.iter().map(|record| (record.path.as_str(), record.bytes)).collect();
        assert_eq!(
            found,
            [("PG_VERSION", 3), ("conf.d", 0), ("conf.d/a.conf", 1), ("conf.e", 4), ("postgresql.conf", 2)]
        );
    }

    #[test]
    fn paths_are_resolved_as_text() {
        assert_eq!(normal(Path::new("/etc/pg/./x/../conf.d")), Path::new("/etc/pg/conf.d"));
        assert_eq!(directories_above("a/b/c"), ["a", "a/b"]);
    }
}
