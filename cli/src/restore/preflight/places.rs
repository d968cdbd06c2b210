//! The rules on the directories: empty or absent, within reach, each with a role of its own, and with room.

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use super::super::staging;
use super::super::survey::{Found, What};
use super::{Judge, Problem};
use crate::human;

/// What WAL that PostgreSQL keeps and recycles needs beside the staging.
const WAL_KEPT_SEGMENTS: u64 = 8;
/// Directories, journals and extents that no file's size tells.
const OVERHEAD_BYTES: u64 = 16 << 20;

impl Judge<'_> {
    pub(super) fn places(&mut self) {
        let facts = self.facts;
        for (index, (asked, found)) in facts.places.iter().enumerate() {
            let tablespace = index.checked_sub(1).and_then(|index| Some(&self.backup()?.tablespaces.get(index)?.name));
            let (role, cure) = match tablespace {
                None => ("data directory", "name another with --to, or empty it".to_owned()),
                Some(name) => ("tablespace directory", format!("name another with --tablespace {name}=DIR")),
            };
            let path = asked.display();
            if self.is_overwritten(index, found) {
                self.access(role, found);
                continue;
            }
            match &found.what {
                What::Absent | What::Empty => self.access(role, found),
                What::Ours(id) => self.refuse(
                    format!("{role} {path} belongs to restore {id}, which is not finished"),
                    format!("`pghydrant retry {id}` goes on with it, `pghydrant cancel {id}` gives it up"),
                ),
                What::Cluster(Some(pid)) => {
                    self.refuse(format!("a PostgreSQL server (process {pid}) runs in {role} {path}"), cure);
                }
                What::Cluster(None) => {
                    let delta = if index == 0 { "; --delta writes over what differs" } else { "" };
                    self.refuse(format!("{role} {path} holds a PostgreSQL cluster"), format!("{cure}{delta}"));
                }
                What::Occupied(example) => {
                    self.refuse(format!("{role} {path} is not empty: it holds {example:?}"), cure);
                }
                What::NoDirectory => self.refuse(format!("{path} is not a directory"), cure),
                What::Unknown(reason) => self.refuse(format!("{role}: {reason}"), cure),
            }
        }
        self.names();
        self.overlaps();
    }

    /// `pg_ctl` puts the data directory's name into double quotes for a shell, which then looks into it.
    fn names(&mut self) {
        let Some((_, found)) = self.facts.places.first() else { return };
        let path = found.path.as_os_str().as_bytes();
        let meant_otherwise = |byte: &&u8| b"$`\"\\".contains(byte) || byte.is_ascii_control();
        if let Some(byte) = path.iter().find(meant_otherwise) {
            let shown = char::from(*byte).escape_default();
            self.refuse(
                format!(
                    "data directory {}: PostgreSQL's pg_ctl cannot have '{shown}' in its name",
                    found.path.display()
                ),
                "name another with --to",
            );
        }
    }

    pub(super) fn access(&mut self, role: &str, found: &Found) {
        let (facts, nearest) = (self.facts, found.nearest.display());
        let Ok(owner) = &facts.owner else { return };
        if let Err(refusal) = &found.writable {
            let hint =
                if facts.we_are_root { "mount it for writing" } else { "run it as root, or give yourself access" };
            self.refuse(format!("{role} {}: {} {refusal}", found.path.display(), facts.our_name), hint);
        } else if !found.reachable {
            self.refuse(
                format!("{role} {}: {} cannot get through the directories above it", found.path.display(), owner.name),
                format!("give {} the right to search {nearest}", owner.name),
            );
        } else if found.what != What::Absent && !facts.we_are_root && found.owner_uid != owner.uid {
            self.refuse(
                format!("{role} {} belongs to another user", found.path.display()),
                format!(
                    "PostgreSQL starts only in a directory of its own user: chown {} {}",
                    owner.name,
                    found.path.display()
                ),
            );
        }
    }

    /// One directory for two roles, or one within the other.
    fn overlaps(&mut self) {
        let facts = self.facts;
        let repository =
            std::fs::canonicalize(&self.request.repository).unwrap_or_else(|_| self.request.repository.clone());
        let mut all: Vec<(&Path, &str)> = vec![(&repository, "the repository")];
        for (index, (_, found)) in facts.places.iter().enumerate() {
            let role = if index == 0 { "the data directory" } else { "a tablespace" };
            for (other, other_role) in &all {
                let hint = "give each a directory of its own";
                if found.path == *other {
                    self.problems.push(Problem::new(
                        format!("{} would hold {other_role} and {role}", found.path.display()),
                        hint,
                    ));
                } else if found.path.starts_with(other) {
                    self.problems.push(Problem::new(
                        format!("{} ({role}) lies within {other_role}, {}", found.path.display(), other.display()),
                        hint,
                    ));
                } else if other.starts_with(&found.path) {
                    self.problems.push(Problem::new(
                        format!("{other_role}, {}, lies within {} ({role})", other.display(), found.path.display()),
                        hint,
                    ));
                }
            }
            all.push((&found.path, role));
        }
    }

    pub(super) fn tablespaces(&mut self) {
        let Some(info) = self.backup() else { return };
        let known: Vec<String> = info.tablespaces.iter().map(|tablespace| tablespace.name.clone()).collect();
        let oids: Vec<String> = info.tablespaces.iter().map(|tablespace| tablespace.oid.to_string()).collect();
        let mut seen: Vec<&String> = Vec::new();
        for (name, _) in &self.request.tablespaces {
            if !known.contains(name) && !oids.contains(name) {
                let hint = if known.is_empty() {
                    "the backup has none".to_owned()
                } else {
                    format!("the backup has {}", known.join(", "))
                };
                self.refuse(format!("the backup has no tablespace \"{name}\""), hint);
            } else if seen.contains(&name) {
                self.refuse(format!("tablespace \"{name}\" is named twice"), "name each once");
            }
            seen.push(name);
        }
    }

    pub(super) fn room(&mut self) {
        let Some(info) = self.backup() else { return };
        let facts = self.facts;
        let segment_bytes = info.server.wal_segment_bytes;
        let window = staging::WINDOW_SEGMENTS + WAL_KEPT_SEGMENTS;
        let backup_wal = info.wal.stop.0.saturating_sub(info.wal.start.0);
        let wal_bytes = if self.request.no_start { backup_wal + 2 * segment_bytes } else { window * segment_bytes };
        let oids = std::iter::once(None).chain(info.tablespaces.iter().map(|tablespace| Some(tablespace.oid)));
        let mut needs: BTreeMap<u64, (u64, u64, u64, u64, bool, &Path)> = BTreeMap::new();
        for ((_, found), oid) in facts.places.iter().zip(oids) {
            let file_system = match &found.file_system {
                Ok(file_system) => file_system,
                Err(refusal) => {
                    self.refuse(refusal.clone(), "the free space cannot be told");
                    continue;
                }
            };
            let size = facts.contents.sizes.get(&oid).copied().unwrap_or_default();
            let held = self.overwritten().and_then(|existing| existing.held.get(&oid)).cloned().unwrap_or_default();
            let extra = if oid.is_none() { wal_bytes + OVERHEAD_BYTES } else { 0 };
            let need = needs.entry(file_system.device).or_insert((
                0,
                0,
                file_system.free_bytes,
                file_system.free_inodes,
                file_system.counts_inodes,
                &found.nearest,
            ));
            need.0 += size.bytes.saturating_sub(held.bytes) + extra;
            need.1 += size.inodes.saturating_sub(held.names);
        }
        for (bytes, inodes, free_bytes, free_inodes, counts_inodes, path) in needs.into_values() {
            let path = path.display();
            if bytes > free_bytes {
                self.refuse(
                    format!(
                        "the restore needs {} on the file system of {path}, {} are free",
                        human::bytes(bytes),
                        human::bytes(free_bytes)
                    ),
                    format!("free {} more, or choose another place", human::bytes(bytes - free_bytes)),
                );
            }
            if counts_inodes && inodes > free_inodes {
                self.refuse(
                    format!(
                        "the restore needs {inodes} files on the file system of {path}, {free_inodes} inodes are free"
                    ),
                    "remove files there, or choose another place",
                );
            }
        }
    }
}
