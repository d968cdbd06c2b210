//! What becomes of each member of the tars: stored, kept as a text, kept as WAL, or left out.
//!
//! The rules are those of an ordinary backup ([`exclude`]), asked member by member; what they ask of a whole directory, which
//! of its relations are unlogged, is asked at the end. Then the files are brought into the manifest's order.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io::{self, Read as _};

use anyhow::Result;
use engine::format::file::{FileKind, FileRecord};
use engine::format::manifest::path as manifest_path;
use engine::units::BlockNumber;

use super::super::adopt::{self, CONFIGURATION, SMALL_BYTES_MAX, no};
use super::super::copy::{Copied, Read};
use super::super::exclude::{self, Rule};
use super::super::listed;
use super::super::plan::LATE;
use super::super::relation::{self, Fork, RelationFile};
use super::input::{Input, OpenTar};
use super::intake::{Feed, Found};
use super::members::{Kind, Member, each, strange};
use super::spool::Spool;

const NOBODY: [&str; 0] = [];

/// A file, a directory or a link on its way into the manifest.
struct Taken {
    record: FileRecord,
    /// Its number among the files of the stream.
    file: usize,
}

/// What came out of the tars.
#[derive(Default)]
pub(super) struct Gathered {
    taken: Vec<Taken>,
    /// What was there and is not in the backup.
    left_out: BTreeSet<String>,
    /// Files whose text says something of the base backup.
    texts: BTreeMap<String, Vec<u8>>,
    /// Where tablespaces lay, by OID.
    pub(super) tablespaces: BTreeMap<u32, String>,
    /// The owner of the data directory, by the name in the headers.
    pub(super) owner: Option<String>,
    /// The newest time of a member, seconds since 1970.
    pub(super) newest: i64,
}

/// The files of the backup in path order.
pub(super) struct InOrder {
    /// [`FileRecord::first_block`] is still the number of the first record in the stream.
    pub(super) files: Vec<FileRecord>,
    pub(super) copied: Copied,
    left_out: BTreeSet<String>,
}

/// Reads all tars of `input`.
pub(super) fn gather(input: &Input, spool: &Spool, stop: &dyn Fn() -> bool, feed: &mut Feed<'_>) -> Result<Gathered> {
    let mut gathered = Gathered::default();
    let base = input.base()?;
    each(&base, stop, |member, content| {
        let is_map = member.path == "tablespace_map";
        gathered.take(&base, member, content, spool, feed)?;
        // It comes early: what is missing is told before terabytes were read.
        let tablespaces = if is_map { gathered.mapped(&base)? } else { Vec::new() };
        tablespaces.iter().try_for_each(|(oid, _)| tar_of(*oid, input).map(drop))
    })?;
    gathered.link_tablespaces(&base)?;
    let linked: Vec<u32> = gathered.tablespaces.keys().copied().collect();
    for oid in linked {
        let tar = tar_of(oid, input)?;
        each(&tar, stop, |member, content| {
            let path = format!("pg_tblspc/{oid}/{}", member.path);
            manifest_path::check(&path).map_err(|detail| strange(&tar, &detail))?;
            gathered.take(&tar, Member { path, ..member }, content, spool, feed)
        })?;
    }
    Ok(gathered)
}

fn tar_of(oid: u32, input: &Input) -> Result<OpenTar> {
    let missing = || {
        no(format!("{} has a tablespace {oid}, and there is no {oid}.tar beside it", input.shown))
            .hint("with tablespaces pg_basebackup makes a directory: -D DIR -Ft, and backup --from DIR")
    };
    Ok(input.beside(&oid.to_string())?.ok_or_else(missing)?)
}

impl Gathered {
    fn take(
        &mut self,
        tar: &OpenTar,
        member: Member,
        content: &mut dyn io::Read,
        spool: &Spool,
        feed: &mut Feed<'_>,
    ) -> Result<()> {
        let path = member.path.as_str();
        self.newest = self.newest.max(member.modified);
        if path.rsplit('/').next().is_some_and(|name| name.starts_with("INCREMENTAL.")) {
            return Err(adopt::incremental(&tar.shown, path));
        }
        if path == "base" {
            self.owner.clone_from(&member.owner);
        }
        match &member.kind {
            Kind::File if LATE.contains(&path) => {
                self.keep_text(tar, &member, content)?;
                self.leave_out(tar, member)
            }
            Kind::File => match rule(path) {
                Rule::Keep if path == "PG_VERSION" || CONFIGURATION.contains(&path) => {
                    let text = self.keep_text(tar, &member, content)?.to_vec();
                    self.store(member, &mut text.as_slice(), feed)
                }
                Rule::Keep => self.store(member, content, feed),
                Rule::Empty | Rule::LeaveOut => {
                    if let Some(name) = path.strip_prefix("pg_wal/") {
                        spool.take(name, &member, content)?;
                    }
                    self.leave_out(tar, member)
                }
            },
            Kind::Directory => match rule(path) {
                Rule::LeaveOut => self.leave_out(tar, member),
                Rule::Keep | Rule::Empty => {
                    self.push(member, FileKind::Directory, 0, 0);
                    Ok(())
                }
            },
            Kind::Link { target } => {
                let Some(oid) = manifest_path::tablespace_oid(path) else {
                    return Err(strange(tar, &format!("\"{path}\" is a link")));
                };
                manifest_path::check_target(target).map_err(|detail| strange(tar, &detail))?;
                let location = target.clone();
                if self.tablespaces.insert(oid, location.clone()).is_some() {
                    return Err(twice(tar, path));
                }
                self.push(member, FileKind::Tablespace { location }, 0, 0);
                Ok(())
            }
        }
    }

    /// What `tablespace_map` says, which takes the place of the links in a tar.
    fn mapped(&self, tar: &OpenTar) -> Result<Vec<(u32, String)>> {
        let Some(map) = self.texts.get("tablespace_map") else { return Ok(Vec::new()) };
        parse_map(map).map_err(|detail| strange(tar, &format!("tablespace_map {detail}")))
    }

    /// Makes the links that the server left to the map.
    fn link_tablespaces(&mut self, tar: &OpenTar) -> Result<()> {
        let map = self.mapped(tar)?;
        let like = self.directory("pg_tblspc").cloned();
        for (oid, location) in map {
            let path = format!("pg_tblspc/{oid}");
            if self.tablespaces.contains_key(&oid) {
                continue;
            }
            let Some(like) = &like else { return Err(strange(tar, "it has tablespaces and no pg_tblspc")) };
            manifest_path::check_target(&location).map_err(|detail| strange(tar, &detail))?;
            let kind = FileKind::Tablespace { location: location.clone() };
            // A link's mode.
            self.taken.push(Taken { record: FileRecord { path, kind, mode: 0o777, ..like.clone() }, file: 0 });
            self.tablespaces.insert(oid, location);
        }
        Ok(())
    }

    fn store(&mut self, member: Member, content: &mut dyn io::Read, feed: &mut Feed<'_>) -> Result<()> {
        let (file, first_record) = feed.file(&member.path, member.bytes, content)?;
        self.push(member, FileKind::Regular, file, first_record);
        Ok(())
    }

    fn push(&mut self, member: Member, kind: FileKind, file: usize, first_record: u64) {
        let Member { path, mode, uid, gid, modified, bytes, .. } = member;
        let first_block = BlockNumber(first_record);
        let record = FileRecord { path, kind, mode, uid, gid, modified, bytes, crc32c: 0, first_block };
        self.taken.push(Taken { record, file });
    }

    fn leave_out(&mut self, tar: &OpenTar, member: Member) -> Result<()> {
        match self.left_out.replace(member.path) {
            Some(path) => Err(twice(tar, &path)),
            None => Ok(()),
        }
    }

    fn keep_text(&mut self, tar: &OpenTar, member: &Member, content: &mut dyn io::Read) -> Result<&[u8]> {
        let path = member.path.as_str();
        let most = if path == "backup_manifest" { listed::BYTES_MAX } else { SMALL_BYTES_MAX };
        if member.bytes > most {
            return Err(strange(tar, &format!("{path} has {} bytes", member.bytes)));
        }
        let mut text = Vec::new();
        content.take(member.bytes).read_to_end(&mut text)?;
        if (text.len() as u64) < member.bytes {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        if path == "backup_label" {
            adopt::refuse_incremental_label(&tar.shown, &String::from_utf8_lossy(&text))?;
        }
        match self.texts.entry(path.to_owned()) {
            std::collections::btree_map::Entry::Occupied(_) => Err(twice(tar, path)),
            std::collections::btree_map::Entry::Vacant(place) => Ok(place.insert(text)),
        }
    }

    /// A file of which the text was kept.
    pub(super) fn text(&mut self, path: &str) -> Option<Vec<u8>> {
        self.texts.remove(path)
    }

    /// What the tars have of the directory `path`.
    pub(super) fn directory(&self, path: &str) -> Option<&FileRecord> {
        let records = self.taken.iter().map(|taken| &taken.record);
        records.into_iter().find(|record| record.path == path && record.kind == FileKind::Directory)
    }

    /// The files as the manifest wants them. `statistics` is where the server keeps temporary ones, and `summaries` says
    /// that `pg_wal` has a directory of these.
    pub(super) fn in_order(
        self,
        shown: &str,
        statistics: Option<&str>,
        summaries: bool,
        mut found: Found,
    ) -> Result<InOrder> {
        let Self { mut taken, mut left_out, .. } = self;
        make_directories_of_wal(&mut taken, &mut left_out, summaries);
        let unlogged = unlogged(&taken);
        let none = HashSet::new();
        taken.retain(|Taken { record, .. }| {
            let (directory, name) = record.path.rsplit_once('/').unwrap_or(("", &record.path));
            let rule = exclude::rule(directory, name, unlogged.get(directory).unwrap_or(&none), statistics);
            let below = statistics.is_some_and(|statistics| manifest_path::is_below(&record.path, statistics));
            let kept = rule != Rule::LeaveOut && !below && (rule == Rule::Keep || record.kind == FileKind::Directory);
            if !kept {
                left_out.insert(record.path.clone());
            }
            kept
        });
        taken.sort_by(|one, other| manifest_path::order(&one.record.path, &other.record.path));
        refuse_disorder(shown, &taken)?;

        let mut place_of: HashMap<usize, usize> = HashMap::with_capacity(taken.len());
        let mut files = Vec::with_capacity(taken.len());
        let mut read = Vec::with_capacity(taken.len());
        for (place, Taken { mut record, file }) in taken.into_iter().enumerate() {
            let is_file = record.kind == FileKind::Regular;
            if is_file {
                record.crc32c = found.crc32c(file);
                place_of.insert(file, place);
            }
            let FileRecord { bytes, crc32c, modified, .. } = record;
            read.push(is_file.then_some(Read { bytes, crc32c, modified }));
            files.push(record);
        }
        let suspects = std::mem::take(&mut found.suspects);
        let suspects = suspects.into_iter().filter_map(|(file, suspect)| Some((*place_of.get(&file)?, suspect)));
        Ok(InOrder { files, copied: Copied { read, suspects: suspects.collect() }, left_out })
    }
}

impl InOrder {
    /// Whether the tars had a file of this path.
    pub(super) fn has(&self, path: &str) -> bool {
        let found = self.files.binary_search_by(|file| manifest_path::order(&file.path, path));
        found.is_ok() || self.left_out.contains(path)
    }
}

/// The rule for a path, which those for the directories above it come before.
fn rule(path: &str) -> Rule {
    let unlogged = exclude::unlogged("", NOBODY.into_iter());
    let ends = path.match_indices('/').map(|(end, _)| end).chain([path.len()]);
    for end in ends {
        let prefix = &path[..end];
        let (directory, name) = prefix.rsplit_once('/').unwrap_or(("", prefix));
        match exclude::rule(directory, name, &unlogged, None) {
            Rule::Keep => {}
            Rule::Empty if end == path.len() => return Rule::Empty,
            Rule::Empty | Rule::LeaveOut => return Rule::LeaveOut,
        }
    }
    Rule::Keep
}

/// The directories that a server expects in `pg_wal`, as an ordinary backup has them.
fn make_directories_of_wal(taken: &mut Vec<Taken>, left_out: &mut BTreeSet<String>, summaries: bool) {
    let Some(pg_wal) = taken.iter().find(|taken| taken.record.path == "pg_wal").map(|taken| taken.record.clone())
    else {
        return;
    };
    let wanted = [("pg_wal/archive_status", true), ("pg_wal/summaries", summaries)];
    for (path, _) in wanted.into_iter().filter(|(_, wanted)| *wanted) {
        left_out.remove(path);
        taken.push(Taken { record: FileRecord { path: path.to_owned(), ..pg_wal.clone() }, file: 0 });
    }
}

/// The relations that have an init fork, by directory.
fn unlogged(taken: &[Taken]) -> HashMap<String, HashSet<u32>> {
    let mut unlogged: HashMap<String, HashSet<u32>> = HashMap::new();
    for Taken { record, .. } in taken {
        if let Some((directory, name)) = record.path.rsplit_once('/')
            && let Some(RelationFile { number, fork: Fork::Init, .. }) = RelationFile::parse(name)
            && relation::is_relation_directory(directory)
        {
            unlogged.entry(directory.to_owned()).or_default().insert(number);
        }
    }
    unlogged
}

/// Names that are there twice, and names in what is no directory.
fn refuse_disorder(shown: &str, taken: &[Taken]) -> Result<()> {
    let mut directories = HashSet::from([""]);
    let mut before = None;
    for Taken { record, .. } in taken {
        let path = record.path.as_str();
        if before.replace(path) == Some(path) {
            return Err(no(format!("{shown} has {path} twice")).into());
        }
        let directory = path.rsplit_once('/').map_or("", |(directory, _)| directory);
        if !directories.contains(directory) {
            return Err(no(format!("{shown} has {path}, but not the directory that it lies in")).into());
        }
        if record.kind != FileKind::Regular {
            directories.insert(path);
        }
    }
    Ok(())
}

fn twice(tar: &OpenTar, path: &str) -> anyhow::Error {
    strange(tar, &format!("it has {path} twice"))
}

/// `tablespace_map`: a line for each, its OID and its place, in which a backslash stands before a line break.
fn parse_map(text: &[u8]) -> Result<Vec<(u32, String)>, String> {
    let text = std::str::from_utf8(text).map_err(|_| "is not UTF-8".to_owned())?;
    let (mut lines, mut line, mut escaped) = (Vec::new(), String::new(), false);
    for letter in text.chars() {
        match letter {
            '\\' if !escaped => escaped = true,
            '\n' if !escaped => lines.push(std::mem::take(&mut line)),
            other => {
                line.push(other);
                escaped = false;
            }
        }
    }
    lines.push(line);
    let tablespace = |line: String| {
        let (oid, location) =
            line.split_once(' ').ok_or_else(|| format!("has the line \"{}\"", line.escape_debug()))?;
        let oid = manifest_path::tablespace_oid(&format!("pg_tblspc/{oid}"));
        Ok((oid.ok_or_else(|| format!("has the line \"{}\"", line.escape_debug()))?, location.to_owned()))
    };
    lines.into_iter().filter(|line| !line.is_empty()).map(tablespace).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_rules_hold_for_all_that_lies_below() {
        for path in
            ["base/pgsql_tmp/1.0", "pg_wal/archive_status", "pg_replslot/a/state", "postmaster.pid", "base/5/t3_1"]
        {
            assert_eq!(rule(path), Rule::LeaveOut, "{path}");
        }
        assert_eq!(rule("pg_wal"), Rule::Empty);
        for path in ["base/5/1", "pg_xact/0000", "mine/pg_wal/x", "log/postgresql.log"] {
            assert_eq!(rule(path), Rule::Keep, "{path}");
        }
    }

    #[test]
    fn a_tablespace_map_is_read() {
        let map = b"16400 /srv/one\n16401 /srv/with a\\\nline\\\\\n";
        let found = parse_map(map).unwrap();
        assert_eq!(found, [(16400, "/srv/one".to_owned()), (16401, "/srv/with a\nline\\".to_owned())]);
        for bad in [&b"x /srv\n"[..], b"16400\n", b"0 /srv\n", b"16400 /\xFF\n"] {
            assert!(parse_map(bad).is_err());
        }
    }
}
