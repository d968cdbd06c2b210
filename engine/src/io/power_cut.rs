//! What a disk may hold after the power went: the harshest that POSIX allows, from a record of what was asked.
//!
//! Certain is only what was complete before a sync that was complete itself: the content and size of a file by its
//! sync, a name by the sync of its directory, everything by the sync of the file system. All the rest is there or
//! not, each name by itself, and a write even sector by sector.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use super::disk::OpenFile;

/// What a disk writes at once.
const SECTOR_BYTES: usize = 512;

/// A file's number in a recording; inode numbers are used again, these are not.
pub(super) type FileNumber = u64;

/// Something that was asked of the disk.
#[derive(Clone, Debug)]
pub(super) enum Event {
    Create(PathBuf, FileNumber),
    MakeDirectory(PathBuf),
    MakeLink(PathBuf, PathBuf),
    Rename(PathBuf, PathBuf),
    Remove(PathBuf),
    Size(FileNumber, u64),
    Write(FileNumber, u64, Vec<u8>),
    SyncFile(FileNumber),
    SyncDirectory(PathBuf),
    SyncAll,
    /// The write or sync at this place in the record is complete.
    Done(usize),
}

/// Everything that was asked, in order.
pub struct Recording {
    base: PathBuf,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    events: Vec<Event>,
    numbers: HashMap<(u64, u64), FileNumber>,
    next: FileNumber,
}

impl Recording {
    pub(super) fn new(base: &Path) -> Self {
        Self { base: base.to_owned(), state: Mutex::default() }
    }

    /// How many events there are: the moments at which the power can go.
    pub fn len(&self) -> usize {
        self.state().events.len()
    }

    /// True before the first event.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many files were asked to be synced, one by one.
    pub fn file_syncs(&self) -> usize {
        self.state().events.iter().filter(|event| matches!(event, Event::SyncFile(_))).count()
    }

    pub(super) fn add(&self, event: Event) -> usize {
        let mut state = self.state();
        state.events.push(event);
        state.events.len() - 1
    }

    /// The number of a file that was just created.
    pub(super) fn new_file(&self, file: &OpenFile) -> FileNumber {
        let mut state = self.state();
        state.next += 1;
        let number = state.next;
        state.numbers.insert(identity(file), number);
        number
    }

    pub(super) fn file(&self, file: &OpenFile) -> FileNumber {
        self.state().numbers.get(&identity(file)).copied().unwrap_or_default()
    }

    pub(super) fn sync_of(&self, file: &OpenFile) -> Event {
        let is_directory = file.file.metadata().is_ok_and(|metadata| metadata.is_dir());
        if is_directory { Event::SyncDirectory(file.path.clone()) } else { Event::SyncFile(self.file(file)) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Lays out below `into` what may be left of `base` if the power goes after `moment` events; `seed` chooses among the
    /// possibilities.
    pub fn image(&self, moment: usize, seed: u64, into: &Path) -> io::Result<()> {
        let state = self.state();
        let events = &state.events[..moment.min(state.events.len())];
        let certain = Certain::of(events);
        let mut chance = Chance(seed | 1);
        let mut names: BTreeMap<PathBuf, Node> = BTreeMap::new();
        let mut contents: HashMap<FileNumber, Vec<u8>> = HashMap::new();
        let mut last_names: HashMap<PathBuf, Node> = HashMap::new();
        for (at, event) in events.iter().enumerate() {
            match event {
                Event::Create(path, number) => {
                    let node = Node::File(*number);
                    last_names.insert(path.clone(), node.clone());
                    if certain.name(path, at) || chance.coin() {
                        names.insert(path.clone(), node);
                    }
                }
                Event::MakeDirectory(path) if certain.name(path, at) || chance.coin() => {
                    // Names whose removal was lost were in another directory of that name.
                    names.retain(|name, _| !name.starts_with(path));
                    names.insert(path.clone(), Node::Directory);
                }
                Event::MakeLink(path, text) if certain.name(path, at) || chance.coin() => {
                    names.insert(path.clone(), Node::Link(text.clone()));
                }
                Event::Rename(from, to) => {
                    let node = last_names.remove(from);
                    let moved = certain.name(to, at) || chance.coin();
                    if let (Some(node), true) = (&node, moved) {
                        names.insert(to.clone(), node.clone());
                        names.remove(from);
                    }
                    last_names.extend(node.map(|node| (to.clone(), node)));
                }
                Event::Remove(path) if certain.name(path, at) || chance.coin() => {
                    names.remove(path);
                }
                Event::Size(file, bytes) if certain.content(*file, at) || chance.coin() => {
                    contents.entry(*file).or_default().resize(in_memory(*bytes), 0);
                }
                Event::Write(file, offset, bytes) => {
                    let whole = certain.write(*file, at);
                    let content = contents.entry(*file).or_default();
                    for (index, sector) in bytes.chunks(SECTOR_BYTES).enumerate() {
                        if whole || chance.coin() {
                            let start = in_memory(*offset) + index * SECTOR_BYTES;
                            content.resize(content.len().max(start + sector.len()), 0);
                            content[start..start + sector.len()].copy_from_slice(sector);
                        }
                    }
                }
                _ => {}
            }
        }
        self.lay_out(&names, &contents, into)
    }

    fn lay_out(
        &self,
        names: &BTreeMap<PathBuf, Node>,
        contents: &HashMap<FileNumber, Vec<u8>>,
        into: &Path,
    ) -> io::Result<()> {
        for (path, node) in names {
            let Ok(below) = path.strip_prefix(&self.base) else { continue };
            let path = into.join(below);
            // What lies in a directory that was lost is lost with it.
            if !path.parent().is_some_and(Path::is_dir) {
                continue;
            }
            match node {
                Node::Directory => fs::create_dir(&path)?,
                Node::Link(text) => std::os::unix::fs::symlink(text, &path)?,
                Node::File(number) => fs::write(&path, contents.get(number).map_or(&[][..], Vec::as_slice))?,
            }
        }
        Ok(())
    }
}

#[derive(Clone)]
enum Node {
    File(FileNumber),
    Directory,
    Link(PathBuf),
}

/// When the last complete sync of each thing was asked for.
struct Certain {
    all: Option<usize>,
    files: HashMap<FileNumber, usize>,
    directories: HashMap<PathBuf, usize>,
    /// When each write was complete.
    written: HashMap<usize, usize>,
}

impl Certain {
    fn of(events: &[Event]) -> Self {
        let mut certain =
            Self { all: None, files: HashMap::new(), directories: HashMap::new(), written: HashMap::new() };
        for (at, event) in events.iter().enumerate() {
            let Event::Done(asked) = event else { continue };
            match &events[*asked] {
                Event::SyncAll => certain.all = certain.all.max(Some(*asked)),
                Event::SyncFile(file) => raise(&mut certain.files, *file, *asked),
                Event::SyncDirectory(path) => raise(&mut certain.directories, path.clone(), *asked),
                _ => {
                    certain.written.insert(*asked, at);
                }
            }
        }
        certain
    }

    fn name(&self, path: &Path, at: usize) -> bool {
        let directory = path.parent().and_then(|parent| self.directories.get(parent));
        self.all.max(directory.copied()).is_some_and(|sync| sync > at)
    }

    fn content(&self, file: FileNumber, at: usize) -> bool {
        self.all.max(self.files.get(&file).copied()).is_some_and(|sync| sync > at)
    }

    fn write(&self, file: FileNumber, at: usize) -> bool {
        self.written.get(&at).is_some_and(|done| self.content(file, *done))
    }
}

fn raise<K: std::hash::Hash + Eq>(known: &mut HashMap<K, usize>, key: K, at: usize) {
    let last = known.entry(key).or_insert(at);
    *last = at.max(*last);
}

fn identity(file: &OpenFile) -> (u64, u64) {
    file.file.metadata().map_or((0, 0), |metadata| (metadata.dev(), metadata.ino()))
}

/// Recorded files are small: they are held in memory as a whole.
fn in_memory(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

/// A small generator, so that a seed says which possibility it was.
struct Chance(u64);

impl Chance {
    fn coin(&mut self) -> bool {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 & (1 << 32) != 0
    }
}
