//! The files that a backup consists of: the data directory and its tablespaces, walked in path order.
//!
//! The server goes on creating and dropping files meanwhile. What vanishes is skipped; what appears after its directory
//! was listed belongs to the WAL. Only PostgreSQL's own major version and catalog is taken from a tablespace, as several
//! clusters may share the directory.
//!
//! Links: a tablespace's is recorded as what it is; `pg_wal` and what else the server empties become directories; other
//! links are followed where they lead to a file or stand for one of the server's own directories, so that the backup is
//! whole; a link to any other directory is left out, by name, as `pg_basebackup` leaves it out.

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use engine::format::file::{FileKind, FileRecord};
use engine::format::manifest::path as manifest_path;
use engine::units::BlockNumber;

use super::exclude::{self, Rule};
use super::places::Places;
use super::relation::is_digits;
use crate::exit::{Exit, Failure};
use crate::postgres::owner::Owner;

/// Directories of the server: a link in their place is followed.
const SERVER_DIRECTORIES: [&str; 9] =
    ["base", "global", "pg_commit_ts", "pg_logical", "pg_multixact", "pg_stat", "pg_tblspc", "pg_twophase", "pg_xact"];
/// Links that lead in a circle end here; the server's own directories are five deep at most.
const DEPTH_MAX: u32 = 32;
/// How many unusable names an error lists.
const NAMES_LISTED: usize = 5;

/// What to walk.
#[derive(Debug)]
pub(super) struct Source<'a> {
    /// The data directory.
    pub(super) data: &'a Path,
    /// Whose it is.
    pub(super) owner: &'a Owner,
    /// Tablespaces that existed when the backup began, by OID.
    pub(super) tablespaces: &'a BTreeMap<u32, String>,
    /// `PG_15_202209061`.
    pub(super) version_directory: &'a str,
    /// Where temporary statistics lie, if within the data directory.
    pub(super) statistics: Option<&'a str>,
    /// `pg_wal/summaries` belongs to every data directory from PostgreSQL 17 on.
    pub(super) wal_summaries: bool,
}

/// What was found.
#[derive(Debug)]
pub(super) struct Found {
    /// In path order; `bytes` as of now, checksum and blocks still to come. Without what is made at the end of a backup.
    pub(super) records: Vec<FileRecord>,
    /// What was left out although it may matter.
    pub(super) warnings: Vec<String>,
    /// Where the files are opened.
    pub(super) places: Places,
}

impl Source<'_> {
    /// Walks it.
    pub(super) fn scan(&self) -> Result<Found> {
        let places = Places::open(self.data, self.owner)?;
        let found = Found { records: Vec::new(), warnings: Vec::new(), places };
        let mut walk = Walk { source: self, inside: self.tablespaces_inside(), found, unusable: Vec::new() };
        walk.directory("", self.data, 0)?;
        if !walk.unusable.is_empty() {
            let listed = walk.unusable[..walk.unusable.len().min(NAMES_LISTED)].join(", ");
            let more = walk.unusable.len().saturating_sub(NAMES_LISTED);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            let message = format!("the data directory has names that are not UTF-8 or too long: {listed}{more}");
            return Err(Failure::new(Exit::Refused, message)
                .hint("PostgreSQL makes no such names: move these files out of the data directory")
                .into());
        }
        Ok(walk.found)
    }

    /// Tablespaces whose directory lies in the data directory itself: not to be walked twice.
    fn tablespaces_inside(&self) -> HashSet<String> {
        let relative = |location: &String| {
            let location = fs::canonicalize(location).ok()?;
            Some(location.strip_prefix(self.data).ok()?.to_str()?.to_owned())
        };
        self.tablespaces.values().filter(|location| location.starts_with('/')).filter_map(relative).collect()
    }
}

struct Walk<'a> {
    source: &'a Source<'a>,
    inside: HashSet<String>,
    found: Found,
    unusable: Vec<String>,
}

impl Walk<'_> {
    fn directory(&mut self, relative: &str, directory: &Path, depth: u32) -> Result<()> {
        if depth > DEPTH_MAX {
            anyhow::bail!("{} lies too deep: do links lead in a circle?", directory.display());
        }
        let Some(names) = self.names_in(directory)? else { return Ok(()) };
        let unlogged = exclude::unlogged(relative, names.iter().map(String::as_str));
        for name in names {
            let rule = exclude::rule(relative, &name, &unlogged, self.source.statistics);
            if rule == Rule::LeaveOut {
                continue;
            }
            let path = if relative.is_empty() { name.clone() } else { format!("{relative}/{name}") };
            let at = directory.join(&name);
            if path == crate::postgres::control::PATH {
                continue; // read last
            }
            if manifest_path::check(&path).is_err() {
                self.unusable.push(format!("{:?}", at));
                continue;
            }
            let Some(metadata) = vanished_is_none(fs::symlink_metadata(&at), &at)? else { continue };
            self.entry(path, &at, &metadata, rule, depth)?;
        }
        Ok(())
    }

    fn entry(&mut self, path: String, at: &Path, metadata: &Metadata, rule: Rule, depth: u32) -> Result<()> {
        let kind = metadata.file_type();
        if rule == Rule::Empty {
            return self.emptied(path, at);
        }
        if kind.is_dir() {
            let walk = !self.inside.contains(&path);
            self.push(path.clone(), FileKind::Directory, metadata);
            return if walk { self.directory(&path, at, depth + 1) } else { Ok(()) };
        }
        if kind.is_file() {
            self.push(path, FileKind::Regular, metadata);
            return Ok(());
        }
        if kind.is_symlink() {
            return match tablespace_of(&path) {
                Some(oid) => self.tablespace(path, oid, at, metadata, depth),
                None => self.link(path, at, depth),
            };
        }
        let what = if kind.is_socket() {
            "a socket"
        } else if kind.is_fifo() {
            "a named pipe"
        } else {
            "a device"
        };
        self.found.warnings.push(format!("{} is left out: it is {what}", at.display()));
        Ok(())
    }

    /// A directory of which only the name is kept, whatever stands in its place.
    fn emptied(&mut self, path: String, at: &Path) -> Result<()> {
        let Some(metadata) = vanished_is_none(fs::metadata(at), at)? else { return Ok(()) };
        if !metadata.is_dir() {
            return Ok(());
        }
        let is_wal = path == "pg_wal";
        self.push(path, FileKind::Directory, &metadata);
        if is_wal {
            // The server expects them; in path order.
            self.push("pg_wal/archive_status".to_owned(), FileKind::Directory, &metadata);
            if self.source.wal_summaries {
                self.push("pg_wal/summaries".to_owned(), FileKind::Directory, &metadata);
            }
        }
        Ok(())
    }

    fn tablespace(&mut self, path: String, oid: u32, at: &Path, metadata: &Metadata, depth: u32) -> Result<()> {
        // One that was created since the backup began comes out of the WAL.
        if !self.source.tablespaces.contains_key(&oid) {
            return Ok(());
        }
        let Some(location) = vanished_is_none(fs::read_link(at), at)? else { return Ok(()) };
        let Some(location) = location.to_str().map(str::to_owned) else {
            self.unusable.push(format!("{location:?}"));
            return Ok(());
        };
        let content = format!("{path}/{}", self.source.version_directory);
        self.push(path, FileKind::Tablespace { location }, metadata);
        let content_at = at.join(self.source.version_directory);
        let Some(metadata) = vanished_is_none(fs::symlink_metadata(&content_at), &content_at)? else { return Ok(()) };
        if !metadata.is_dir() {
            self.found.warnings.push(format!("{} is left out: it is no directory", content_at.display()));
            return Ok(());
        }
        if let Err(why) = self.found.places.add_directory(&content, &content_at, self.source.owner) {
            if vanished_is_none(fs::symlink_metadata(&content_at), &content_at)?.is_none() {
                return Ok(());
            }
            // Without a tablespace there is no backup.
            return Err(Failure::new(Exit::Refused, format!("cannot read tablespace {}: {why}", at.display())).into());
        }
        self.push(content.clone(), FileKind::Directory, &metadata);
        self.directory(&content, &content_at, depth + 2)
    }

    fn link(&mut self, path: String, at: &Path, depth: u32) -> Result<()> {
        let metadata = match fs::metadata(at) {
            Ok(metadata) => metadata,
            Err(error) => {
                self.found.warnings.push(format!("link {} is left out: {error}", at.display()));
                return Ok(());
            }
        };
        let top = path.split('/').next().unwrap_or_default();
        let (places, owner) = (&mut self.found.places, self.source.owner);
        let added = if metadata.is_file() {
            places.add_file(&path, at, owner)
        } else if !metadata.is_dir() {
            Err("it leads to no file".to_owned())
        } else if SERVER_DIRECTORIES.contains(&top) {
            places.add_directory(&path, at, owner)
        } else {
            Err("it leads to a directory that is not the server's".to_owned())
        };
        match added {
            Err(why) => self.found.warnings.push(format!("link {} is left out: {why}", at.display())),
            Ok(()) if metadata.is_file() => self.push(path, FileKind::Regular, &metadata),
            Ok(()) => {
                self.push(path.clone(), FileKind::Directory, &metadata);
                self.directory(&path, at, depth + 1)?;
            }
        }
        Ok(())
    }

    fn push(&mut self, path: String, kind: FileKind, metadata: &Metadata) {
        let bytes = if kind == FileKind::Regular { metadata.len() } else { 0 };
        self.found.records.push(FileRecord {
            path,
            kind,
            mode: metadata.mode() & 0o7777,
            uid: metadata.uid(),
            gid: metadata.gid(),
            modified: metadata.mtime(),
            bytes,
            crc32c: 0,
            first_block: BlockNumber(0),
        });
    }

    /// The names in a directory, by their bytes: siblings in this order, each before what is in it, are in path order.
    fn names_in(&mut self, directory: &Path) -> Result<Option<Vec<String>>> {
        let Some(entries) = vanished_is_none(fs::read_dir(directory), directory)? else { return Ok(None) };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.with_context(|| format!("cannot list {}", directory.display()))?;
            match entry.file_name().into_string() {
                Ok(name) => names.push(name),
                Err(name) => self.unusable.push(shown(directory, name)),
            }
        }
        names.sort_unstable();
        Ok(Some(names))
    }
}

fn shown(directory: &Path, name: OsString) -> String {
    format!("{:?}", PathBuf::from(directory).join(name))
}

/// The OID in `pg_tblspc/16400`.
fn tablespace_of(path: &str) -> Option<u32> {
    path.strip_prefix("pg_tblspc/").filter(|name| is_digits(name))?.parse().ok()
}

fn vanished_is_none<T>(result: std::io::Result<T>, at: &Path) -> Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
        Err(error) => {
            let denied = error.kind() == ErrorKind::PermissionDenied;
            let failure = Failure::new(Exit::Failed, format!("cannot read {}: {error}", at.display()));
            Err(if denied {
                failure.hint("run the backup as the owner of the data directory, or as root")
            } else {
                failure
            }
            .into())
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use super::*;

    fn scan(data: &Path, tablespaces: &BTreeMap<u32, String>) -> Result<Found> {
        let version_directory = "PG_15_202209061";
        let owner = Owner::current().unwrap();
        Source { data, owner: &owner, tablespaces, version_directory, statistics: None, wal_summaries: false }.scan()
    }

    fn paths(found: &Found) -> Vec<&str> {
        found.records.iter().map(|record| record.path.as_str()).collect()
    }

    fn write(root: &Path, files: &[&str]) {
        for file in files {
            let path = root.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, file).unwrap();
        }
    }

    #[test]
    fn paths_come_in_the_manifests_order() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), &["a/b", "a.c", "a/b.d/e", "a-", "base/5/1", "base/5/1.1", "base/5-x"]);
        let found = scan(root.path(), &BTreeMap::new()).unwrap();
        let found = paths(&found);
        let mut sorted = found.clone();
        sorted.sort_by(|left, right| manifest_path::order(left, right));
        assert_eq!(found, sorted);
        assert_eq!(found.len(), 11);
    }

    #[test]
    fn what_the_server_makes_anew_is_left_out_and_pg_wal_may_be_a_link() {
        let root = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        write(elsewhere.path(), &["000000010000000000000001"]);
        symlink(elsewhere.path(), root.path().join("pg_wal")).unwrap();
        write(
            root.path(),
            &["base/5/7", "base/5/7_init", "base/5/8", "base/5/t1_9", "pg_stat_tmp/x", "postmaster.pid"],
        );
        write(root.path(), &["global/pg_control", "global/1", "global/pg_internal.init"]);
        let found = scan(root.path(), &BTreeMap::new()).unwrap();
        let expected = [
            "base",
            "base/5",
            "base/5/7_init",
            "base/5/8",
            "global",
            "global/1",
            "pg_stat_tmp",
            "pg_wal",
            "pg_wal/archive_status",
        ];
        assert_eq!(paths(&found), expected);
        assert_eq!(found.warnings, Vec::<String>::new());
    }

    #[test]
    fn tablespaces_are_walked_through_their_links_and_only_our_version_of_them() {
        let (root, place) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        write(place.path(), &["PG_15_202209061/5/1", "PG_14_1/5/2", "other"]);
        fs::create_dir(root.path().join("pg_tblspc")).unwrap();
        for oid in ["16400", "16401"] {
            symlink(place.path(), root.path().join("pg_tblspc").join(oid)).unwrap();
        }
        let known = BTreeMap::from([(16400, place.path().to_str().unwrap().to_owned())]);
        let found = scan(root.path(), &known).unwrap();
        let version = "pg_tblspc/16400/PG_15_202209061";
        let expected = ["pg_tblspc", "pg_tblspc/16400", version, &format!("{version}/5"), &format!("{version}/5/1")];
        assert_eq!(paths(&found), expected);
        let location = place.path().to_str().unwrap().to_owned();
        assert_eq!(found.records[1].kind, FileKind::Tablespace { location });
    }

    #[test]
    fn a_tablespace_inside_the_data_directory_is_walked_once() {
        let root = tempfile::tempdir().unwrap();
        let data = fs::canonicalize(root.path()).unwrap();
        write(&data, &["mine/PG_15_202209061/5/1"]);
        fs::create_dir(data.join("pg_tblspc")).unwrap();
        symlink(data.join("mine"), data.join("pg_tblspc/16400")).unwrap();
        let known = BTreeMap::from([(16400, data.join("mine").to_str().unwrap().to_owned())]);
        let found = scan(&data, &known).unwrap();
        assert_eq!(paths(&found).iter().filter(|path| path.ends_with("/5/1")).count(), 1);
        assert_eq!(paths(&found)[0], "mine");
    }

    #[test]
    fn links_and_special_files_are_followed_or_named() {
        let (root, place) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        write(place.path(), &["conf", "dir/1"]);
        let at = |name: &str| root.path().join(name);
        symlink(place.path().join("conf"), at("postgresql.conf")).unwrap();
        symlink(place.path().join("dir"), at("pg_xact")).unwrap();
        symlink(place.path().join("dir"), at("log")).unwrap();
        symlink("nowhere", at("broken")).unwrap();
        let _socket = UnixListener::bind(at("socket")).unwrap();
        let found = scan(root.path(), &BTreeMap::new()).unwrap();
        assert_eq!(paths(&found), ["pg_xact", "pg_xact/1", "postgresql.conf"]);
        assert_eq!(found.records[2].kind, FileKind::Regular);
        for named in ["broken", "log", "socket"] {
            assert!(found.warnings.iter().any(|warning| warning.contains(&format!("/{named} is left out"))), "{named}");
        }
    }

    #[test]
    fn a_name_that_is_not_utf8_is_refused_by_name() {
        use std::os::unix::ffi::OsStringExt as _;
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join(OsString::from_vec(b"bad\xFF".to_vec())), "").unwrap();
        let error = scan(root.path(), &BTreeMap::new()).unwrap_err().to_string();
        assert!(error.contains(r"bad\xFF"), "{error}");
    }
}
