//! Which blocks of a backup are present in the target, kept across crashes.
//!
//! One bit per block record of the manifest, in memory as atomics, on disk in `pghydrant.session/map`:
//!
//! ```text
//! page 0    header: magic, version, block count, root hash of the backup's manifest, session, CRC-32C
//! page 1    the closed page: all zero until PostgreSQL has run here; anything else means closed
//! page 2..  4088 bytes of bits, least significant first, CRC-32C of page number and bits, 4 zero bytes
//! ```
//!
//! The order of durability is in the types: [`Map::take_batch`] notes what is written so far, the caller syncs the
//! files, and only then [`Map::commit`] puts the batch on disk. A page of bits that is damaged or torn counts as
//! unset, which costs reading its blocks again. A damaged header is an error and not an empty map, because whether
//! the map is closed must never be guessed; for the same reason closing is a page that fails towards closed.
//!
//! Always true: a bit on disk is set only if the block's bytes are durable, in their place, in this target.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::checksum::Hash;
use crate::io::{Disk, Open, OpenFile, Place};
use crate::units::{BlockNumber, SessionId};
use crate::{Error, Result};

const PAGE: usize = 4096;
const MAGIC: [u8; 8] = *b"PGHYDMAP";
const VERSION: u16 = 1;

// The header's fields chain, so that one more leaves no stale number.
const VERSION_AT: Range<usize> = MAGIC.len()..MAGIC.len() + 2;
const BLOCKS_AT: Range<usize> = VERSION_AT.end + 6..VERSION_AT.end + 14;
const ROOT_AT: Range<usize> = BLOCKS_AT.end..BLOCKS_AT.end + 32;
const SESSION_AT: Range<usize> = ROOT_AT.end..ROOT_AT.end + 64;
const HEADER_CRC_AT: Range<usize> = PAGE - 4..PAGE;

const CLOSED_PAGE: usize = 1;
const FIRST_BITS_PAGE: usize = 2;
const WORDS_PER_PAGE: usize = 511;
const BLOCKS_PER_PAGE: u64 = WORDS_PER_PAGE as u64 * 64;
const BITS_CRC_AT: Range<usize> = WORDS_PER_PAGE * 8..WORDS_PER_PAGE * 8 + 4;

const _: () = assert!(SESSION_AT.end <= HEADER_CRC_AT.start);
const _: () = assert!(BITS_CRC_AT.end + 4 == PAGE);

/// 1 PiB in blocks of 128 KiB, and a map of 1 GiB: past any cluster.
const BLOCKS_MAX: u64 = 1 << 33;
/// No map is larger.
pub const MAP_BYTES_MAX: u64 = (FIRST_BITS_PAGE as u64 + BLOCKS_MAX.div_ceil(BLOCKS_PER_PAGE)) * PAGE as u64;

/// What a map belongs to. A map of anything else is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// `Manifest::block_limit()`.
    pub blocks: u64,
    /// The root hash of the backup's manifest.
    pub backup_root: Hash,
    /// The session.
    pub session: SessionId,
}

/// What the bytes of a map say.
#[derive(Clone, Debug)]
pub struct Parsed {
    /// What it belongs to.
    pub identity: Identity,
    /// PostgreSQL has run in the target.
    pub closed: bool,
    /// The bits, 64 a word.
    pub words: Vec<u64>,
    /// Pages of bits that were damaged, and so count as unset.
    pub damaged_pages: u64,
}

/// Which blocks are present.
pub struct Map {
    identity: Identity,
    words: Vec<AtomicU64>,
    changed: Vec<AtomicBool>,
    closed: AtomicBool,
    damaged_pages: u64,
    /// Held while pages are written and synced.
    writing: Mutex<()>,
    file: Arc<OpenFile>,
    disk: Arc<dyn Disk>,
}

/// Pages of bits as they were when the batch was taken, for [`Map::commit`].
#[must_use = "a batch that is not committed is work that a crash repeats"]
pub struct Batch {
    pages: Vec<(usize, Box<[u8; PAGE]>)>,
}

impl Map {
    /// A map with no block present, durable when this returns. `temporary` lies in the same directory.
    pub fn create(disk: Arc<dyn Disk>, place: Place<'_>, temporary: Place<'_>, identity: Identity) -> Result<Self> {
        let bytes = file_bytes(identity.blocks).ok_or_else(|| too_many(identity.blocks))?;
        if disk.look(temporary)?.is_some() {
            disk.remove_file(temporary)?;
        }
        let file = disk.open(temporary, Open::Create(0o600))?;
        disk.set_size(&file, bytes)?;
        disk.write_small(&file, 0, &header_page(&identity))?;
        disk.sync(&file)?;
        disk.rename(temporary, place)?;
        let directory = Place { root: place.root, path: place.path.parent().unwrap_or(place.path) };
        disk.sync(&*disk.open(directory, Open::Directory)?)?;
        let file = disk.open(place, Open::WriteBuffered)?;
        let words = vec![0; page_count(identity.blocks) * WORDS_PER_PAGE];
        let parsed = Parsed { identity, closed: false, words, damaged_pages: 0 };
        Ok(Self::new(disk, file, parsed))
    }

    /// The map that a session left behind.
    pub fn open(disk: Arc<dyn Disk>, place: Place<'_>, identity: &Identity) -> Result<Self> {
        let limit = file_bytes(identity.blocks).ok_or_else(|| too_many(identity.blocks))?;
        let file = disk.open(place, Open::WriteBuffered)?;
        let bytes = disk.read_small(&file, limit)?;
        let parsed = Self::parse(&bytes).map_err(|detail| Error::corrupt(&file.path, detail))?;
        if parsed.identity != *identity {
            let detail = format!("it is the map of session {}, or of another backup", parsed.identity.session);
            return Err(Error::Refused(format!("{}: {detail}", file.path.display())));
        }
        Ok(Self::new(disk, file, parsed))
    }

    /// Reads the bytes of a map; refuses what is no map, forgives damaged bits.
    pub fn parse(bytes: &[u8]) -> Result<Parsed, String> {
        let (pages, rest) = bytes.as_chunks::<PAGE>();
        let ([header, closed], true) = (pages.get(..FIRST_BITS_PAGE).unwrap_or_default(), rest.is_empty()) else {
            return Err(format!("a map has at least two whole pages, this has {} bytes", bytes.len()));
        };
        let identity = parse_header(header)?;
        let bits = &pages[FIRST_BITS_PAGE..];
        if file_bytes(identity.blocks) != Some(bytes.len() as u64) {
            return Err(format!("a map of {} blocks cannot have {} bytes", identity.blocks, bytes.len()));
        }
        let mut words = Vec::with_capacity(bits.len() * WORDS_PER_PAGE);
        let mut damaged_pages = 0;
        for (number, page) in bits.iter().enumerate() {
            let stored = le_u32(&page[BITS_CRC_AT]);
            let never_written = page.iter().all(|byte| *byte == 0);
            if never_written || stored != bits_crc(number, page) {
                damaged_pages += u64::from(!never_written);
                words.resize(words.len() + WORDS_PER_PAGE, 0);
            } else {
                words.extend(page[..BITS_CRC_AT.start].chunks_exact(8).map(le_u64));
            }
        }
        let closed = closed.iter().any(|byte| *byte != 0);
        Ok(Parsed { identity, closed, words, damaged_pages })
    }

    fn new(disk: Arc<dyn Disk>, file: Arc<OpenFile>, parsed: Parsed) -> Self {
        let Parsed { identity, closed, words, damaged_pages } = parsed;
        let changed = (0..page_count(identity.blocks)).map(|_| AtomicBool::new(false)).collect();
        let words = words.into_iter().map(AtomicU64::new).collect();
        let (closed, writing) = (AtomicBool::new(closed), Mutex::new(()));
        Self { identity, words, changed, closed, damaged_pages, writing, file, disk }
    }

    /// What it belongs to.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Pages that were damaged when the map was opened; their blocks are read again.
    pub fn damaged_pages(&self) -> u64 {
        self.damaged_pages
    }

    /// PostgreSQL has run in the target: nothing may be written there again.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Closes the map for good, durably. To be called before the first start of the server.
    pub fn close(&self) -> Result<()> {
        self.closed.store(true, Ordering::Release);
        self.disk.write_small(&self.file, (CLOSED_PAGE * PAGE) as u64, b"closed")?;
        self.disk.sync(&self.file)
    }

    /// An error, once the map is closed.
    pub fn refuse_if_closed(&self) -> Result<()> {
        if !self.is_closed() {
            return Ok(());
        }
        let path = self.file.path.display();
        Err(Error::Refused(format!("{path}: PostgreSQL has run in this directory, so no block is written again")))
    }

    /// Whether a block is there: durable, or written in this run.
    pub fn is_present(&self, block: BlockNumber) -> bool {
        block.0 < self.identity.blocks && self.words[word_of(block)].load(Ordering::Acquire) & bit_of(block) != 0
    }

    /// Notes a block as written: all of its bytes have arrived, though not yet durably.
    pub fn mark(&self, block: BlockNumber) {
        if block.0 < self.identity.blocks {
            self.words[word_of(block)].fetch_or(bit_of(block), Ordering::AcqRel);
            self.changed[page_of(block)].store(true, Ordering::Release);
        }
    }

    /// Forgets blocks whose file was found missing, durably: the file may be made anew when this returns. Not to be
    /// called while blocks are marked, whose bits would get on disk with these.
    pub fn forget(&self, blocks: Range<u64>) -> Result<()> {
        self.refuse_if_closed()?;
        let blocks = blocks.start..blocks.end.min(self.identity.blocks);
        if blocks.is_empty() {
            return Ok(());
        }
        // One at a time: another's older picture of the same page must not be written after ours.
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        for block in blocks.clone().map(BlockNumber) {
            self.words[word_of(block)].fetch_and(!bit_of(block), Ordering::AcqRel);
        }
        for number in page_of(BlockNumber(blocks.start))..=page_of(BlockNumber(blocks.end - 1)) {
            self.write_page(number, &self.bits_page(number))?;
        }
        self.disk.sync(&self.file)
    }

    /// How many blocks are present.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.load(Ordering::Acquire).count_ones())).sum()
    }

    /// What was marked since the last batch. Take it, sync the files, then [`Map::commit`] it.
    pub fn take_batch(&self) -> Batch {
        let mut pages = Vec::new();
        for (number, changed) in self.changed.iter().enumerate() {
            if changed.swap(false, Ordering::AcqRel) {
                pages.push((number, self.bits_page(number)));
            }
        }
        Batch { pages }
    }

    /// Puts a batch on disk. All files that its blocks lie in were synced after it was taken.
    pub fn commit(&self, batch: Batch) -> Result<()> {
        self.refuse_if_closed()?;
        if batch.pages.is_empty() {
            return Ok(());
        }
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        for (number, page) in batch.pages {
            self.write_page(number, &page)?;
        }
        self.disk.sync(&self.file)
    }

    fn write_page(&self, number: usize, page: &[u8; PAGE]) -> Result<()> {
        self.disk.write_small(&self.file, ((FIRST_BITS_PAGE + number) * PAGE) as u64, page)
    }

    fn bits_page(&self, number: usize) -> Box<[u8; PAGE]> {
        let mut page = Box::new([0; PAGE]);
        let words = &self.words[number * WORDS_PER_PAGE..(number + 1) * WORDS_PER_PAGE];
        for (bytes, word) in page[..BITS_CRC_AT.start].chunks_exact_mut(8).zip(words) {
            bytes.copy_from_slice(&word.load(Ordering::Acquire).to_le_bytes());
        }
        let crc = bits_crc(number, &page);
        page[BITS_CRC_AT].copy_from_slice(&crc.to_le_bytes());
        page
    }
}

fn word_of(block: BlockNumber) -> usize {
    (block.0 / 64) as usize
}

fn page_of(block: BlockNumber) -> usize {
    (block.0 / BLOCKS_PER_PAGE) as usize
}

fn bit_of(block: BlockNumber) -> u64 {
    1 << (block.0 % 64)
}

fn page_count(blocks: u64) -> usize {
    usize::try_from(blocks.div_ceil(BLOCKS_PER_PAGE)).unwrap_or(usize::MAX)
}

/// The size of the file, for a number of blocks that makes sense.
fn file_bytes(blocks: u64) -> Option<u64> {
    (blocks <= BLOCKS_MAX).then(|| (FIRST_BITS_PAGE + page_count(blocks)) as u64 * PAGE as u64)
}

fn too_many(blocks: u64) -> Error {
    Error::Refused(format!("a backup of {blocks} blocks is past the limit of {BLOCKS_MAX}"))
}

fn header_page(identity: &Identity) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    page[..MAGIC.len()].copy_from_slice(&MAGIC);
    page[VERSION_AT].copy_from_slice(&VERSION.to_le_bytes());
    page[BLOCKS_AT].copy_from_slice(&identity.blocks.to_le_bytes());
    page[ROOT_AT].copy_from_slice(&identity.backup_root.0);
    // At most 64 bytes, by the type.
    let session = identity.session.as_str().as_bytes();
    page[SESSION_AT.start..SESSION_AT.start + session.len()].copy_from_slice(session);
    let crc = crc32c::crc32c(&page[..HEADER_CRC_AT.start]);
    page[HEADER_CRC_AT].copy_from_slice(&crc.to_le_bytes());
    page
}

fn parse_header(page: &[u8; PAGE]) -> Result<Identity, String> {
    if page[..MAGIC.len()] != MAGIC {
        return Err("it does not begin as a map does".to_owned());
    }
    let version = u16::from_le_bytes([page[VERSION_AT.start], page[VERSION_AT.start + 1]]);
    if version != VERSION {
        return Err(format!("it has version {version}, this program reads version {VERSION}"));
    }
    let (stored, computed) = (le_u32(&page[HEADER_CRC_AT]), crc32c::crc32c(&page[..HEADER_CRC_AT.start]));
    if stored != computed {
        return Err(format!("its header has checksum {computed:08x} and says {stored:08x}"));
    }
    let mut root = [0; 32];
    root.copy_from_slice(&page[ROOT_AT]);
    let session = &page[SESSION_AT];
    let length = session.iter().position(|byte| *byte == 0).unwrap_or(session.len());
    let session = String::from_utf8_lossy(&session[..length]).into_owned();
    Ok(Identity { blocks: le_u64(&page[BLOCKS_AT]), backup_root: Hash(root), session: SessionId::try_from(session)? })
}

fn bits_crc(number: usize, page: &[u8; PAGE]) -> u32 {
    let seed = crc32c::crc32c(&(number as u64).to_le_bytes());
    crc32c::crc32c_append(seed, &page[..BITS_CRC_AT.start])
}

fn le_u32(bytes: &[u8]) -> u32 {
    bytes.iter().rev().fold(0, |number, byte| number << 8 | u32::from(*byte))
}

fn le_u64(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::io::{LocalDisk, Root};

    fn identity(blocks: u64) -> Identity {
        let session = "s-1".parse().unwrap();
        Identity { blocks, backup_root: Hash::of(b"root"), session }
    }

    fn disk() -> Arc<dyn Disk> {
        Arc::new(LocalDisk::new())
    }

    fn with_map(blocks: u64, test: impl FnOnce(&Root, Map)) {
        let directory = tempfile::tempdir().unwrap();
        let root = Root::open(directory.path()).unwrap();
        let map = Map::create(disk(), root.at("map"), root.at("map.part"), identity(blocks)).unwrap();
        test(&root, map);
    }

    #[test]
    fn what_is_committed_is_there_after_opening_again_and_nothing_else() {
        with_map(100_000, |root, map| {
            for block in [0, 63, 64, 32_703, 32_704, 99_999] {
                map.mark(BlockNumber(block));
            }
            let batch = map.take_batch();
            map.mark(BlockNumber(5));
            map.commit(batch).unwrap();
            let again = Map::open(disk(), root.at("map"), &identity(100_000)).unwrap();
            assert_eq!(again.count(), 6);
            assert!(again.is_present(BlockNumber(32_704)) && !again.is_present(BlockNumber(5)));
            assert!(!again.is_present(BlockNumber(100_000)));
            map.commit(map.take_batch()).unwrap();
            map.forget(0..64).unwrap();
            assert_eq!(Map::open(disk(), root.at("map"), &identity(100_000)).unwrap().count(), 4);
        });
    }

    #[test]
    fn a_damaged_page_of_bits_costs_its_own_blocks_only() {
        with_map(40_000, |root, map| {
            map.mark(BlockNumber(1));
            map.mark(BlockNumber(39_999));
            map.commit(map.take_batch()).unwrap();
            let path = root.path().join("map");
            let good = std::fs::read(&path).unwrap();
            for (byte, left) in [(2 * PAGE, 1), (2 * PAGE + 4090, 1), (4 * PAGE - 1000, 1)] {
                let mut bad = good.clone();
                bad[byte] ^= 4;
                let parsed = Map::parse(&bad).unwrap();
                assert_eq!(parsed.damaged_pages, 1, "byte {byte}");
                assert_eq!(parsed.words.iter().map(|word| word.count_ones()).sum::<u32>(), left);
            }
            let mut exchanged = good.clone();
            exchanged[2 * PAGE..3 * PAGE].copy_from_slice(&good[3 * PAGE..]);
            assert_eq!(Map::parse(&exchanged).unwrap().damaged_pages, 1, "a page in another's place");
        });
    }

    #[test]
    fn a_damaged_header_is_refused_and_any_byte_of_the_closed_page_closes() {
        with_map(10, |root, map| {
            let path = root.path().join("map");
            let good = std::fs::read(&path).unwrap();
            for bit in (0..PAGE * 8).step_by(61) {
                let mut bad = good.clone();
                bad[bit / 8] ^= 1 << (bit % 8);
                assert!(Map::parse(&bad).is_err(), "bit {bit}");
            }
            for byte in (PAGE..2 * PAGE).step_by(61) {
                let mut closed = good.clone();
                closed[byte] = 1;
                assert!(Map::parse(&closed).unwrap().closed);
            }
            for length in [0, 1, PAGE, 2 * PAGE, good.len() - 1] {
                assert!(Map::parse(&good[..length]).is_err(), "{length} bytes");
            }
            map.close().unwrap();
            let again = Map::open(disk(), root.at("map"), &identity(10)).unwrap();
            assert!(again.is_closed() && again.refuse_if_closed().is_err());
        });
    }

    #[test]
    fn the_map_of_another_session_or_backup_is_refused() {
        with_map(10, |root, _| {
            let other = Identity { backup_root: Hash::of(b"other"), ..identity(10) };
            assert!(matches!(Map::open(disk(), root.at("map"), &other), Err(Error::Refused(_))));
            let other = Identity { session: "s-2".parse().unwrap(), ..identity(10) };
            assert!(matches!(Map::open(disk(), root.at("map"), &other), Err(Error::Refused(_))));
        });
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..3 * PAGE)) {
            let _ = Map::parse(&bytes);
        }
    }
}
