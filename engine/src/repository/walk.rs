//! Walking a manifest in path order, from any place on.

use std::cmp::Ordering;
use std::sync::Arc;

use super::manifest::{Manifest, PlacedGroup};
use crate::format::file::FileRecord;
use crate::format::manifest::{IndexChunk, LEAF_RECORDS, path};
use crate::{Error, Result};

/// Where in the order of files a walk begins.
#[derive(Clone, Debug)]
pub(super) enum Begin {
    Start,
    /// At the file of this place.
    Index(u64),
    /// At this path, or where it would stand.
    Path(String),
    /// Behind this path.
    After(String),
    /// Behind this directory and all that is below it.
    AfterSubtree(String),
}

impl Begin {
    /// Whether a file stands before the beginning: true up to some place in the order, false from there on.
    fn is_after(&self, index: u64, path: &str) -> bool {
        match self {
            Self::Start => false,
            Self::Index(first) => index < *first,
            Self::Path(first) => path::order(path, first) == Ordering::Less,
            Self::After(last) => path::order(path, last) != Ordering::Greater,
            Self::AfterSubtree(directory) => path::order_to_subtree(path, directory) != Ordering::Greater,
        }
    }
}

/// The groups from some file on. Holds one index chunk a level. Goes on behind a chunk that cannot be read.
pub(super) struct Groups<'a> {
    manifest: &'a Manifest,
    /// From the top down.
    stack: Vec<Step>,
    /// Why the walk could not begin.
    failed: Option<Error>,
}

/// An index chunk, the entry to go on with, and what is before that entry in the manifest.
struct Step {
    chunk: Arc<IndexChunk>,
    entry: usize,
    leaves_before: u64,
    files_before: u64,
}

impl Step {
    fn advance(&mut self) {
        if let Some(done) = self.chunk.entries().get(self.entry) {
            self.leaves_before += done.leaves;
            self.files_before += done.files;
        }
        self.entry += 1;
    }
}

impl<'a> Groups<'a> {
    /// From the group on that may hold the first file that is wanted.
    pub(super) fn from(manifest: &'a Manifest, begin: &Begin) -> Self {
        match Self::descend(manifest, begin) {
            Ok(stack) => Self { manifest, stack, failed: None },
            Err(error) => Self { manifest, stack: Vec::new(), failed: Some(error) },
        }
    }

    /// The way from the top to the group that may hold the first file that is wanted.
    fn descend(manifest: &Manifest, begin: &Begin) -> Result<Vec<Step>> {
        let mut step = Step { chunk: manifest.top()?, entry: 0, leaves_before: 0, files_before: 0 };
        if matches!(begin, Begin::Start) {
            return Ok(vec![step]);
        }
        let mut stack = Vec::new();
        loop {
            // An entry is left behind if the one after it begins too early as well.
            while let Some([this, next]) = step.chunk.entries().get(step.entry..step.entry + 2)
                && begin.is_after(step.files_before + this.files, &next.first_path)
            {
                step.advance();
            }
            if step.chunk.level() == 0 {
                stack.push(step);
                return Ok(stack);
            }
            let below = manifest.index_below(&step.chunk, step.entry)?;
            let (leaves_before, files_before) = (step.leaves_before, step.files_before);
            stack.push(std::mem::replace(&mut step, Step { chunk: below, entry: 0, leaves_before, files_before }));
        }
    }

    fn advance(&mut self) -> Result<Option<PlacedGroup>> {
        loop {
            let Some(step) = self.stack.last_mut() else { return Ok(None) };
            let Some(current) = step.chunk.entries().get(step.entry) else {
                self.stack.pop();
                // The chunk above goes on with its next entry.
                self.stack.last_mut().map(Step::advance);
                continue;
            };
            if step.chunk.level() == 0 {
                let group = self.manifest.group_below(&step.chunk, step.entry);
                let (first_leaf, first_file, chunk) = (step.leaves_before, step.files_before, current.chunk);
                step.advance();
                return Ok(Some(PlacedGroup { group: group?, first_leaf, first_file, chunk }));
            }
            match self.manifest.index_below(&step.chunk, step.entry) {
                Ok(below) => {
                    let (leaves_before, files_before) = (step.leaves_before, step.files_before);
                    self.stack.push(Step { chunk: below, entry: 0, leaves_before, files_before });
                }
                Err(error) => {
                    step.advance();
                    return Err(error);
                }
            }
        }
    }
}

impl Iterator for Groups<'_> {
    type Item = Result<PlacedGroup>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(error) = self.failed.take() {
            return Some(Err(error));
        }
        self.advance().transpose()
    }
}

/// The files from some place on, each with its place, and their blocks numbered over the whole manifest.
pub(super) struct Files<'a> {
    groups: Groups<'a>,
    begin: Begin,
    current: Option<PlacedGroup>,
    next: usize,
}

impl<'a> Files<'a> {
    pub(super) fn from(manifest: &'a Manifest, begin: Begin) -> Self {
        Self { groups: Groups::from(manifest, &begin), begin, current: None, next: 0 }
    }
}

impl Iterator for Files<'_> {
    type Item = Result<(u64, FileRecord)>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(placed) = &self.current
                && let Some(file) = placed.group.files().get(self.next)
            {
                let mut file = file.clone();
                file.first_block.0 += placed.first_leaf * LEAF_RECORDS;
                let index = placed.first_file + self.next as u64;
                self.next += 1;
                return Some(Ok((index, file)));
            }
            match self.groups.next()? {
                Ok(placed) => {
                    // Only the first group can have files before the one that is wanted.
                    let mut index = placed.first_file;
                    self.next = 0;
                    while placed.group.files().get(self.next).is_some_and(|file| self.begin.is_after(index, &file.path))
                    {
                        self.next += 1;
                        index += 1;
                    }
                    self.current = Some(placed);
                }
                Err(error) => {
                    self.current = None;
                    return Some(Err(error));
                }
            }
        }
    }
}
