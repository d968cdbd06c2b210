//! What a verification finds, by the file it is in.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::lock;
use crate::Error;
use crate::repository::is_absent;
use crate::units::BackupLabel;

/// What kind of trouble.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Stored bytes are not what was written.
    Corrupt,
    /// Something that should be there is not.
    Missing,
    /// It could not be read, so nothing is known.
    Unreadable,
}

/// Something wrong with one file of the repository.
#[derive(Clone, Debug)]
pub struct Finding {
    /// What kind.
    pub kind: Kind,
    /// The file.
    pub path: PathBuf,
    /// The first thing found in it, as a sentence.
    pub detail: String,
    /// How many blocks or chunks of it are concerned.
    pub count: u64,
    /// The backups that need it.
    pub backups: BTreeSet<BackupLabel>,
}

/// Findings by the file they are in.
#[derive(Debug, Default)]
pub(super) struct Found {
    by_path: Mutex<BTreeMap<PathBuf, Finding>>,
}

impl Found {
    /// Adds what `error` tells, of the file it names or else of `fallback`; that file.
    pub(super) fn add(&self, error: &Error, label: &BackupLabel, fallback: &Path) -> PathBuf {
        self.add_for(error, [label], fallback)
    }

    pub(super) fn add_for<'a>(
        &self,
        error: &Error,
        labels: impl IntoIterator<Item = &'a BackupLabel>,
        fallback: &Path,
    ) -> PathBuf {
        let (kind, path) = told_by(error);
        let path = path.unwrap_or(fallback).to_owned();
        self.insert(kind, &path, error.to_string(), labels);
        path
    }

    pub(super) fn insert<'a>(
        &self,
        kind: Kind,
        path: &Path,
        detail: String,
        labels: impl IntoIterator<Item = &'a BackupLabel>,
    ) {
        let mut by_path = lock(&self.by_path);
        let new = || Finding { kind, path: path.to_owned(), detail, count: 0, backups: BTreeSet::new() };
        let finding = by_path.entry(path.to_owned()).or_insert_with(new);
        finding.count += 1;
        finding.backups.extend(labels.into_iter().cloned());
    }

    /// `label` needs the file too.
    pub(super) fn name(&self, path: &Path, label: &BackupLabel) {
        if let Some(finding) = lock(&self.by_path).get_mut(path) {
            finding.backups.insert(label.clone());
        }
    }

    pub(super) fn into_findings(self) -> Vec<Finding> {
        self.by_path.into_inner().unwrap_or_else(PoisonError::into_inner).into_values().collect()
    }
}

fn told_by(error: &Error) -> (Kind, Option<&Path>) {
    match error {
        Error::Corrupt { path, .. } | Error::Unsupported { path, .. } => (Kind::Corrupt, Some(path)),
        Error::Io { path, .. } if is_absent(error) => (Kind::Missing, Some(path)),
        Error::Io { path, .. } => (Kind::Unreadable, Some(path)),
        Error::NotFound(_) => (Kind::Missing, None),
        Error::Locked { .. } | Error::Refused(_) | Error::Cancelled => (Kind::Unreadable, None),
    }
}
