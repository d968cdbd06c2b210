//! A disk that fails on purpose: for tests, around the real one.
//!
//! It counts every operation that passes the waist, each part of a transfer being one, and fails the one that was
//! asked for, or that one and all after it. It can also record what passes, so that [`super::power_cut`] can say what a
//! disk may hold after the power went at any moment.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::buffer::Buffer;
use super::disk::{Disk, Finished, Found, Open, OpenFile, Owner, Part, Place, Queue, Transfer, Way};
use super::power_cut::{Event, Recording};
use super::share::Sharing;
use crate::units::DIRECT_BYTES;
use crate::{Error, Result};

/// What is to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The operation, counted from 0.
    pub at: u64,
    /// Every operation after it fails as well.
    pub forever: bool,
    /// The error number.
    pub errno: i32,
}

/// A disk around another.
pub struct Simulated {
    inner: Arc<dyn Disk>,
    turn: Arc<Turn>,
    recording: Option<Arc<Recording>>,
    shares: bool,
    shares_what_was: bool,
    shares_with_half: bool,
}

struct Turn {
    next: AtomicU64,
    fault: Option<Fault>,
}

impl Turn {
    /// Counts one operation, and fails it if it is its turn.
    fn take(&self) -> io::Result<()> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        match self.fault {
            Some(fault) if number == fault.at || (fault.forever && number > fault.at) => {
                Err(io::Error::from_raw_os_error(fault.errno))
            }
            _ => Ok(()),
        }
    }
}

impl Simulated {
    /// Counts, and fails what `fault` says.
    pub fn new(inner: Arc<dyn Disk>, fault: Option<Fault>) -> Self {
        Self {
            inner,
            turn: Arc::new(Turn { next: AtomicU64::new(0), fault }),
            recording: None,
            shares: false,
            shares_what_was: false,
            shares_with_half: false,
        }
    }

    /// Records everything that changes something below `base`.
    pub fn recording(inner: Arc<dyn Disk>, base: &Path) -> (Self, Arc<Recording>) {
        let recording = Arc::new(Recording::new(base));
        let disk = Self::new(inner, None);
        (Self { recording: Some(Arc::clone(&recording)), ..disk }, recording)
    }

    /// The same, with files that share blocks whatever the file system: they get a copy.
    pub fn with_sharing(self) -> Self {
        Self { shares: true, ..self }
    }

    /// The same, from packs that are other than they were when they are read: the first byte of all that is shared at once
    /// is wrong.
    pub fn with_sharing_of_what_was(self) -> Self {
        Self { shares: true, shares_what_was: true, ..self }
    }

    /// The same, but of files whose names end in an odd digit only the first 4 KiB are shared, and the rest is refused.
    pub fn with_sharing_with_half(self) -> Self {
        Self { shares: true, shares_with_half: true, ..self }
    }

    /// Operations so far.
    pub fn operations(&self) -> u64 {
        self.turn.next.load(Ordering::Relaxed)
    }

    fn turn(&self, operation: &'static str, path: impl AsRef<Path>) -> Result<()> {
        self.turn.take().map_err(|cause| Error::io(operation, path, cause))
    }

    fn note(&self, event: impl FnOnce(&Recording) -> Event) -> Option<usize> {
        self.recording.as_ref().map(|recording| recording.add(event(recording)))
    }
}

impl Disk for Simulated {
    fn describe(&self) -> &'static str {
        self.inner.describe()
    }

    fn look(&self, place: Place<'_>) -> Result<Option<Found>> {
        self.turn("examine", place.full())?;
        self.inner.look(place)
    }

    fn list(&self, place: Place<'_>) -> Result<Vec<OsString>> {
        self.turn("list", place.full())?;
        self.inner.list(place)
    }

    fn open(&self, place: Place<'_>, how: Open) -> Result<Arc<OpenFile>> {
        self.turn("open", place.full())?;
        let file = self.inner.open(place, how)?;
        if let Open::Create(_) = how {
            self.note(|recording| Event::Create(place.full(), recording.new_file(&file)));
        }
        Ok(file)
    }

    fn make_directory(&self, place: Place<'_>, mode: u32) -> Result<bool> {
        self.turn("create directory", place.full())?;
        let made = self.inner.make_directory(place, mode)?;
        if made {
            self.note(|_| Event::MakeDirectory(place.full()));
        }
        Ok(made)
    }

    fn make_link(&self, place: Place<'_>, text: &Path) -> Result<()> {
        self.turn("create link", place.full())?;
        self.inner.make_link(place, text)?;
        self.note(|_| Event::MakeLink(place.full(), text.to_owned()));
        Ok(())
    }

    fn allocate(&self, file: &OpenFile, bytes: u64) -> Result<bool> {
        self.turn("allocate space for", &file.path)?;
        let allocated = self.inner.allocate(file, bytes)?;
        self.note(|recording| Event::Size(recording.file(file), bytes));
        Ok(allocated)
    }

    fn make_zero(&self, file: &OpenFile, offset: u64, bytes: u64) -> Result<()> {
        self.turn("write zeros to", &file.path)?;
        let zeros = || vec![0; usize::try_from(bytes).unwrap_or_default()];
        let written = self.note(|recording| Event::Write(recording.file(file), offset, zeros()));
        self.inner.make_zero(file, offset, bytes)?;
        self.note(|_| Event::Done(written.unwrap_or_default()));
        Ok(())
    }

    fn share(&self, from: &OpenFile, offset: u64, to: &OpenFile, to_offset: u64, bytes: u64) -> Result<Sharing> {
        self.turn("share blocks with", &to.path)?;
        if !self.shares {
            return self.inner.share(from, offset, to, to_offset, bytes);
        }
        // By handles of their own: those that are given may be for whole 4 KiB in aligned memory only.
        let copy = || -> io::Result<Sharing> {
            let last = to.path.as_os_str().as_encoded_bytes().last();
            let refused = self.shares_with_half && last.is_some_and(|last| last.is_ascii_digit() && last % 2 == 1);
            let bytes = if refused { DIRECT_BYTES as u64 } else { bytes };
            let mut content = vec![0; usize::try_from(bytes).map_err(io::Error::other)?];
            File::open(&from.path)?.read_exact_at(&mut content, offset)?;
            content[0] ^= u8::from(self.shares_what_was);
            let written = self.note(|recording| Event::Write(recording.file(to), to_offset, content.clone()));
            File::options().write(true).open(&to.path)?.write_all_at(&content, to_offset)?;
            self.note(|_| Event::Done(written.unwrap_or_default()));
            Ok(if refused { Sharing::Refused("it is refused on purpose") } else { Sharing::Done })
        };
        copy().map_err(|cause| Error::io_at("share blocks with", &to.path, to_offset, cause))
    }

    fn names_of(&self, file: &OpenFile) -> Result<u64> {
        self.turn("examine", &file.path)?;
        self.inner.names_of(file)
    }

    fn set_size(&self, file: &OpenFile, bytes: u64) -> Result<()> {
        self.turn("set the size of", &file.path)?;
        self.inner.set_size(file, bytes)?;
        self.note(|recording| Event::Size(recording.file(file), bytes));
        Ok(())
    }

    fn set_attributes(&self, file: &OpenFile, mode: u32, owner: Option<Owner>) -> Result<()> {
        self.turn("set the mode of", &file.path)?;
        self.inner.set_attributes(file, mode, owner)
    }

    fn set_link_owner(&self, place: Place<'_>, owner: Owner) -> Result<()> {
        self.turn("set the owner of", place.full())?;
        self.inner.set_link_owner(place, owner)
    }

    fn set_modified(&self, file: &OpenFile, seconds: i64) -> Result<()> {
        self.turn("set the time of", &file.path)?;
        self.inner.set_modified(file, seconds)
    }

    fn read_small(&self, file: &OpenFile, limit: u64) -> Result<Vec<u8>> {
        self.turn("read", &file.path)?;
        self.inner.read_small(file, limit)
    }

    fn write_small(&self, file: &OpenFile, offset: u64, bytes: &[u8]) -> Result<()> {
        self.turn("write", &file.path)?;
        let written = self.note(|recording| Event::Write(recording.file(file), offset, bytes.to_owned()));
        self.inner.write_small(file, offset, bytes)?;
        self.note(|_| Event::Done(written.unwrap_or_default()));
        Ok(())
    }

    fn sync(&self, file: &OpenFile) -> Result<()> {
        self.turn("sync", &file.path)?;
        let asked = self.note(|recording| recording.sync_of(file));
        self.inner.sync(file)?;
        self.note(|_| Event::Done(asked.unwrap_or_default()));
        Ok(())
    }

    fn sync_file_system(&self, file: &OpenFile) -> Result<()> {
        self.turn("sync the file system of", &file.path)?;
        let asked = self.note(|_| Event::SyncAll);
        self.inner.sync_file_system(file)?;
        self.note(|_| Event::Done(asked.unwrap_or_default()));
        Ok(())
    }

    fn sync_file_system_tells(&self) -> bool {
        self.inner.sync_file_system_tells()
    }

    fn rename(&self, from: Place<'_>, to: Place<'_>) -> Result<()> {
        self.turn("rename to", to.full())?;
        self.inner.rename(from, to)?;
        self.note(|_| Event::Rename(from.full(), to.full()));
        Ok(())
    }

    fn remove_file(&self, place: Place<'_>) -> Result<()> {
        self.turn("remove", place.full())?;
        self.inner.remove_file(place)?;
        self.note(|_| Event::Remove(place.full()));
        Ok(())
    }

    fn remove_directory(&self, place: Place<'_>) -> Result<()> {
        self.turn("remove directory", place.full())?;
        self.inner.remove_directory(place)?;
        self.note(|_| Event::Remove(place.full()));
        Ok(())
    }

    fn queue(&self, buffers: &mut [Buffer]) -> Result<Box<dyn Queue>> {
        self.turn("set up", "a queue")?;
        let inner = self.inner.queue(buffers)?;
        let written = buffers.iter().map(|_| Vec::new()).collect();
        let (turn, recording) = (Arc::clone(&self.turn), self.recording.clone());
        Ok(Box::new(SimulatedQueue { inner, turn, recording, refused: VecDeque::new(), written }))
    }
}

struct SimulatedQueue {
    inner: Box<dyn Queue>,
    turn: Arc<Turn>,
    recording: Option<Arc<Recording>>,
    /// Transfers that failed without reaching the disk.
    refused: VecDeque<Finished>,
    /// By buffer: the writes that are on their way from it.
    written: Vec<Vec<usize>>,
}

impl SimulatedQueue {
    fn turn(&self, way: Way, part: &Part) -> Result<()> {
        let operation = match way {
            Way::Read => "read",
            Way::Write => "write",
        };
        self.turn.take().map_err(|cause| Error::io_at(operation, &part.file.path, part.offset, cause))
    }
}

impl Queue for SimulatedQueue {
    fn submit(&mut self, transfer: Transfer) {
        let refused = transfer.parts.iter().find_map(|part| self.turn(transfer.way, part).err());
        if let Some(failure) = refused {
            let Transfer { token, buffer, parts, .. } = transfer;
            return self.refused.push_back(Finished { token, buffer, parts, outcome: Err(failure) });
        }
        if let (Some(recording), Way::Write) = (&self.recording, transfer.way) {
            let on_its_way = &mut self.written[usize::from(transfer.buffer.index())];
            for part in &transfer.parts {
                let bytes = transfer.buffer[part.at..part.at + part.bytes].to_owned();
                on_its_way.push(recording.add(Event::Write(recording.file(&part.file), part.offset, bytes)));
            }
        }
        self.inner.submit(transfer);
    }

    fn reap(&mut self, wait: bool) -> Result<Option<Finished>> {
        if let Some(refused) = self.refused.pop_front() {
            return Ok(Some(refused));
        }
        let finished = self.inner.reap(wait)?;
        if let (Some(recording), Some(finished)) = (&self.recording, &finished) {
            for written in self.written[usize::from(finished.buffer.index())].drain(..) {
                recording.add(Event::Done(written));
            }
        }
        Ok(finished)
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}
