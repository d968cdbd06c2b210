//! The memory that data moves through: buffers of exactly one huge page, owned one at a time.
//!
//! A buffer is 2 MiB at a 2 MiB boundary, so the kernel can back it by one huge page: an O_DIRECT request then
//! costs it one page reference instead of 512, which doubled the speed of reading and cut its CPU time to a
//! tenth. The huge pages are transparent ones: the explicit ones of a database server (`vm.nr_hugepages`) are
//! counted for PostgreSQL's shared memory, and a restore that took them could keep the instance from starting.
//!
//! Each buffer is a mapping of its own and moves by value: into the disk's queue when it is submitted, back to
//! the worker when the kernel is done with it. Nobody can touch it in between, and no `unsafe` is needed.

use std::io;
use std::ops::{Deref, DerefMut};

use memmap2::{Advice, MmapMut};

use crate::units::DIRECT_BYTES;
use crate::{Error, Result};

/// Bytes of every buffer: one huge page of x86-64 and of arm64 with 4 KiB pages.
pub const BUFFER_BYTES: usize = 2 << 20;

const _: () = assert!(BUFFER_BYTES.is_multiple_of(DIRECT_BYTES));

/// One aligned buffer. `index` is its place among the buffers registered with a ring.
pub struct Buffer {
    mapping: MmapMut,
    start: usize,
    index: u16,
}

impl Buffer {
    fn new(index: u16) -> io::Result<(Self, bool)> {
        let (mut mapping, start) = map_aligned()?;
        let advised = mapping.advise_range(Advice::HugePage, start, BUFFER_BYTES).is_ok();
        // The first touch is where the kernel decides for a huge page.
        mapping[start] = 0;
        Ok((Self { mapping, start, index }, advised))
    }

    /// A buffer by itself, for `pread`.
    pub fn alone() -> Result<Self> {
        Self::new(0).map(|(buffer, _)| buffer).map_err(unmapped)
    }

    /// Its place among the buffers that were made with it.
    pub fn index(&self) -> u16 {
        self.index
    }
}

/// A mapping with an aligned huge page in it, and where that begins.
///
/// Where `vm.overcommit_memory` is 2, as PostgreSQL's manual recommends, all of a mapping is charged, touched or not: so
/// one that is no larger than the page is tried first.
fn map_aligned() -> io::Result<(MmapMut, usize)> {
    let misplaced = match map_page()? {
        (page, 0) => return Ok((page, 0)),
        (_, misplaced) => misplaced,
    };
    // Linux before 6.7 aligns nothing, but puts each mapping right below the last: below one of as many bytes as the
    // first was too high, and below every page after that, the next is aligned.
    let above = MmapMut::map_anon(misplaced)?;
    if let (page, 0) = map_page()? {
        return Ok((page, 0));
    }
    drop(above);
    // Long enough to contain an aligned page wherever it begins.
    let mapping = MmapMut::map_anon(2 * BUFFER_BYTES - DIRECT_BYTES)?;
    let start = mapping.as_ptr().align_offset(BUFFER_BYTES);
    Ok((mapping, start))
}

/// A mapping as large as a huge page, and by how much it begins too high.
fn map_page() -> io::Result<(MmapMut, usize)> {
    let mapping = MmapMut::map_anon(BUFFER_BYTES)?;
    let misplaced = mapping.as_ptr().addr() % BUFFER_BYTES;
    Ok((mapping, misplaced))
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.mapping[self.start..self.start + BUFFER_BYTES]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.mapping[self.start..self.start + BUFFER_BYTES]
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buffer").field("index", &self.index).finish_non_exhaustive()
    }
}

/// What kind of pages the buffers lie in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pages {
    /// 2 MiB pages, all of them as far as the first tells.
    Huge,
    /// Ordinary pages: the system gives no transparent huge pages, or had none left.
    Small,
}

impl std::fmt::Display for Pages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Huge => "huge pages",
            Self::Small => "4 KiB pages (no transparent huge pages)",
        })
    }
}

/// `count` buffers, and the pages that they got.
pub fn buffers(count: u16) -> Result<(Vec<Buffer>, Pages)> {
    let mut all = Vec::with_capacity(usize::from(count));
    let mut pages = Pages::Small;
    for index in 0..count {
        let (buffer, advised) = Buffer::new(index).map_err(unmapped)?;
        if index == 0 && advised && lies_in_a_huge_page(&buffer) {
            pages = Pages::Huge;
        }
        all.push(buffer);
    }
    Ok((all, pages))
}

fn unmapped(cause: io::Error) -> Error {
    Error::io("map", "memory for buffers", cause)
}

/// Asks the kernel's own account, since advice may be refused in silence. No account, no huge page.
fn lies_in_a_huge_page(buffer: &Buffer) -> bool {
    let address = buffer.as_ptr() as usize;
    std::fs::read_to_string("/proc/self/smaps").is_ok_and(|account| has_huge_page(&account, address))
}

/// Whether the mapping around `address` has a huge page, by the text of `/proc/self/smaps`.
fn has_huge_page(account: &str, address: usize) -> bool {
    let mut inside = false;
    for line in account.lines() {
        let first = line.split_ascii_whitespace().next().unwrap_or_default();
        if let Some((low, high)) = first.split_once('-') {
            let bounds = (usize::from_str_radix(low, 16), usize::from_str_radix(high, 16));
            if let (Ok(low), Ok(high)) = bounds {
                inside = (low..high).contains(&address);
            }
        } else if inside && first == "AnonHugePages:" {
            return line.split_ascii_whitespace().nth(1).is_some_and(|kilobytes| kilobytes != "0");
        }
    }
    false
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn buffers_are_aligned_and_apart() {
        let (mut all, _) = buffers(3).unwrap();
        for (index, buffer) in all.iter_mut().enumerate() {
            assert_eq!(buffer.as_ptr() as usize % BUFFER_BYTES, 0);
            assert_eq!(usize::from(buffer.index()), index);
            buffer.fill(u8::try_from(index).unwrap() + 1);
        }
        for (index, buffer) in all.iter().enumerate() {
            assert!(buffer.iter().all(|byte| usize::from(*byte) == index + 1));
        }
    }

    #[test]
    fn buffers_are_charged_once() {
        const COUNT: u16 = 8;
        let (all, _) = buffers(COUNT).unwrap();
        let mapped: usize = all.iter().map(|buffer| buffer.mapping.len()).sum();
        assert!(mapped <= (usize::from(COUNT) + 1) * BUFFER_BYTES, "{mapped} bytes");
    }

    #[test]
    fn the_kernels_account_is_read_by_mapping() {
        let account = "7f0000000000-7f0000400000 rw-p 00000000 00:00 0 \nSize: 4096 kB\nAnonHugePages:      2048 kB\n\
                       7f0000400000-7f0000800000 rw-p 00000000 00:00 0 \nAnonHugePages:         0 kB\n";
        assert!(has_huge_page(account, 0x7f00_0020_0000));
        assert!(!has_huge_page(account, 0x7f00_0040_0000));
        assert!(!has_huge_page(account, 0x1000));
        assert!(!has_huge_page("", 0x1000));
    }
}
