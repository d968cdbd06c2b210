//! The rules on a cluster that a delta would overwrite: it must be the backup's own, of the same major version, and
//! nobody's at the moment.

use super::super::survey::{Existing, Found, What};
use super::Judge;

impl<'a> Judge<'a> {
    /// The cluster that is there, in a delta.
    pub(super) fn overwritten(&self) -> Option<&'a Existing> {
        self.facts.existing.as_ref()
    }

    /// Whether a delta writes over what was found: the cluster in the data directory, or its files in a tablespace.
    pub(super) fn is_overwritten(&self, index: usize, found: &Found) -> bool {
        let holds_files = matches!(found.what, What::Cluster(_) | What::Occupied(_));
        let Some(existing) = self.overwritten() else {
            // Without a backup nobody knows whose it should be; that there is none is told.
            return holds_files && index == 0 && self.request.delta && self.backup().is_none();
        };
        let tablespace = || self.backup()?.tablespaces.get(index.checked_sub(1)?);
        holds_files
            && (index == 0
                || tablespace().is_some_and(|known| existing.tablespaces.get(&known.oid) == Some(&found.path)))
    }

    pub(super) fn existing(&mut self) {
        let (Some(existing), Some(info)) = (self.overwritten(), self.backup()) else { return };
        let data = self.request.data.display();
        let elsewhere = "name the cluster's own directory with --to, or restore without --delta into an empty one";
        if let Some(reason) = &existing.unreadable {
            self.refuse(
                format!("the cluster in {data} cannot be looked at: {reason}"),
                "run it as root or as its owner",
            );
        }
        match &existing.identifier {
            Some(Err(reason)) => self.refuse(reason.clone(), elsewhere),
            Some(Ok(found)) if *found != info.server.system_identifier => self.refuse(
                format!(
                    "{data} is another cluster: its system identifier is {found}, the backup's is {}",
                    info.server.system_identifier
                ),
                elsewhere,
            ),
            _ => {}
        }
        let major = info.server.version_num / 10_000;
        if let Some(version) = existing.version.as_ref().filter(|version| **version != major.to_string()) {
            self.refuse(
                format!("{data} is of PostgreSQL {}, the backup of PostgreSQL {major}", version.escape_debug()),
                elsewhere,
            );
        }
        for problem in &existing.problems {
            self.refuse(problem.what.clone(), problem.hint.clone());
        }
        self.outside_directories(existing);
        let names = |for_the_archive: bool| -> Vec<&str> {
            let files = existing.unarchived.iter().filter(|file| file.for_the_archive == for_the_archive);
            files.map(|file| file.name.as_str()).collect()
        };
        let (archived, kept) = (names(true), names(false));
        if !archived.is_empty() {
            self.warnings
                .push(format!("WAL that was never archived is archived before it is removed: {}", archived.join(", ")));
        }
        if !kept.is_empty() {
            self.warnings.push(format!(
                "WAL that is not complete, or that its server did not archive, is kept aside and not replayed: {}",
                kept.join(", ")
            ));
        }
    }
    /// What the links of the cluster lead to: its WAL, which is emptied, and tablespaces that move away.
    fn outside_directories(&mut self, existing: &Existing) {
        let facts = self.facts;
        let repository = &self.request.repository;
        let repository = std::fs::canonicalize(repository).unwrap_or_else(|_| repository.clone());
        if let Some(wal) = &existing.wal {
            let others = facts.places.iter().map(|(_, found)| &found.path).chain([&repository]);
            for other in others.filter(|other| wal.starts_with(other) || other.starts_with(wal)) {
                self.refuse(
                    format!("pg_wal leads to {}, and {} is not apart from it", wal.display(), other.display()),
                    "give the WAL a directory of its own, which is emptied",
                );
            }
        }
        let Some(info) = self.backup() else { return };
        for (known, (_, found)) in info.tablespaces.iter().zip(facts.places.iter().skip(1)) {
            if let Some(old) = existing.tablespaces.get(&known.oid).filter(|old| **old != found.path) {
                self.warnings.push(format!(
                    "tablespace {} moves to {}; its files in {} stay",
                    known.name,
                    found.path.display(),
                    old.display()
                ));
            }
        }
    }
}
