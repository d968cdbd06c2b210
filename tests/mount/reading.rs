//! Reads of a mount: with the page cache and past it, mapped, and what the server keeps of them.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::num::NonZero;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use engine::codec::Compression;

use super::guard::{direct, root};
use super::sample::{BLOCK_BYTES, LARGE, LARGE_BYTES, Sample, relation};
use crate::support::compare::{Entry, tree};
use crate::support::process::wait_until;
use crate::support::*;

/// A read gives as many bytes as were asked for, but for the end of the file; behind that it gives none.
#[test]
fn the_end_of_a_file() -> Result<()> {
    requires!(Fuse);
    let sample = Sample::new()?;
    let mounted = sample.mount(&root(), &[])?;
    let (path, content, bytes) = (mounted.join("data").join(LARGE), relation(LARGE_BYTES, 1), LARGE_BYTES as u64);
    for file in [File::open(&path)?, direct(&path)?] {
        let mut out = vec![0; 1 << 20];
        assert_eq!(file.read_at(&mut out, BLOCK_BYTES - 5)?, out.len());
        let start = usize::try_from(BLOCK_BYTES)? - 5;
        assert!(out[..] == content[start..start + out.len()]);
        assert_eq!(file.read_at(&mut out, bytes - 1000)?, 1000);
        assert!(out[..1000] == content[LARGE_BYTES - 1000..]);
        for behind in [bytes, bytes + 1, bytes + (1 << 30)] {
            assert_eq!(file.read_at(&mut out, behind)?, 0);
        }
    }
    assert_eq!(File::open(mounted.join("data/base/5/empty"))?.read_at(&mut [0; 10], 0)?, 0);
    let mut file = File::open(&path)?;
    assert_eq!(file.seek(SeekFrom::End(-7))?, bytes - 7);
    assert_eq!(file.read_to_end(&mut Vec::new())?, 7);
    Ok(())
}

/// Bytes of a file that are in the page cache.
fn cached_bytes(path: &Path) -> Result<u64> {
    let shown = Run::new("fincore").args(["--bytes", "--noheadings", "--output", "RES"]).arg(path).succeed()?;
    Ok(shown.stdout.trim().parse()?)
}

/// With O_DIRECT any offset, length and address will do, and nothing is left in the page cache.
#[test]
fn direct_reads() -> Result<()> {
    requires!(Fuse, Tool("fincore", "util-linux-extra"));
    let sample = Sample::new()?;
    let mounted = sample.mount(&root(), &[])?;
    let (path, content) = (mounted.join("data").join(LARGE), relation(LARGE_BYTES, 1));
    let file = direct(&path)?;
    let mut out = vec![0; 1_500_001];
    for (offset, length, address) in
        [(0, 1 << 20, 0), (1, 1, 1), (4095, 8193, 7), (131_071, 1_400_000, 3), (LARGE_BYTES - 9, 9, 4095)]
    {
        let out = &mut out[address..address + length];
        file.read_exact_at(out, offset as u64)?;
        assert!(*out == content[offset..offset + length], "{length} bytes at {offset}");
    }
    assert_eq!(cached_bytes(&path)?, 0);
    Ok(())
}

/// Whole blocks that are read with O_DIRECT leave nothing in the page cache of the repository's packs either.
#[test]
fn direct_reads_of_whole_blocks() -> Result<()> {
    requires!(Fuse, Tool("fincore", "util-linux-extra"));
    for compression in [Compression::None, Compression::Lz4] {
        let sample = Sample::compressed(compression)?;
        let mounted = sample.mount(&root(), &[])?;
        let pack = sample.pack()?;
        rustix::fs::fadvise(File::open(&pack)?, 0, None, rustix::fs::Advice::DontNeed)?;
        let cached = cached_bytes(&pack)?;
        let (file, mut out) = (direct(&mounted.join("data").join(LARGE))?, vec![0; LARGE_BYTES]);
        let size = usize::try_from(BLOCK_BYTES)?;
        for (place, block) in out.chunks_exact_mut(size).enumerate() {
            file.read_exact_at(block, place as u64 * BLOCK_BYTES)?;
        }
        let whole = LARGE_BYTES / size * size;
        assert!(out[..whole] == relation(LARGE_BYTES, 1)[..whole], "{compression}");
        // Less, where another test emptied the machine's cache meanwhile.
        assert!(cached_bytes(&pack)? <= cached, "{compression}");
    }
    Ok(())
}

/// Without O_DIRECT what was read stays in the page cache, also for whoever opens the file next.
#[test]
fn buffered_reads() -> Result<()> {
    requires!(Fuse, Tool("fincore", "util-linux-extra"));
    let sample = Sample::new()?;
    let mounted = sample.mount(&root(), &[])?;
    let path = mounted.join("data/base/5/one block");
    let mut cached = [0; 2];
    // Another test may empty the machine's cache in between, now and then.
    for _ in 0..3 {
        fs::read(&path)?;
        cached[0] = cached_bytes(&path)?;
        drop(File::open(&path)?);
        cached[1] = cached_bytes(&path)?;
        if cached == [BLOCK_BYTES; 2] {
            break;
        }
    }
    assert_eq!(cached, [BLOCK_BYTES; 2]);
    Ok(())
}

/// What a program announces by `posix_fadvise`, as PostgreSQL's prefetch does, is in the page cache before it is read,
/// and nothing else is.
#[test]
fn reads_that_are_announced() -> Result<()> {
    requires!(Fuse, Tool("fincore", "util-linux-extra"));
    let sample = Sample::new()?;
    let mounted = sample.mount(&root(), &[])?;
    let path = mounted.join("data").join(LARGE);
    let file = File::open(&path)?;
    let page = 8192;
    // Another test may empty the machine's cache in between, now and then.
    let arrived = (0..3).any(|_| {
        let named = rustix::fs::fadvise(&file, 5 * BLOCK_BYTES, NonZero::new(page), rustix::fs::Advice::WillNeed);
        named.is_ok() && wait_until("the page", Duration::from_secs(10), || Ok(cached_bytes(&path)? == page)).is_ok()
    });
    assert!(arrived, "{} bytes of the file are in the page cache", cached_bytes(&path)?);
    let mut out = vec![0; usize::try_from(page)?];
    file.read_exact_at(&mut out, 5 * BLOCK_BYTES)?;
    let start = usize::try_from(5 * BLOCK_BYTES)?;
    assert!(out[..] == relation(LARGE_BYTES, 1)[start..start + out.len()]);
    Ok(())
}

/// A file can be mapped into memory.
#[test]
fn mapped_reads() -> Result<()> {
    requires!(Fuse);
    let sample = Sample::new()?;
    let mounted = sample.mount(&root(), &[])?;
    let content = relation(LARGE_BYTES, 1);
    for file in [File::open(mounted.join("data").join(LARGE))?, direct(&mounted.join("data").join(LARGE))?] {
        use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
        // SAFETY: a new mapping of a file that nobody can change; the slice does not outlive it.
        unsafe {
            let place = mmap(std::ptr::null_mut(), LARGE_BYTES, ProtFlags::READ, MapFlags::PRIVATE, &file, 0)?;
            let same = std::slice::from_raw_parts(place.cast::<u8>(), LARGE_BYTES) == content;
            munmap(place, LARGE_BYTES)?;
            assert!(same);
        }
    }
    Ok(())
}

/// The server keeps no more decoded bytes than `--memory` says, however many files are read at once. Beside them each of its
/// threads has up to 9 MiB for the read that it is at; they are four for each core, but 8 at least and 16 at most, and one
/// more for each core that reads ahead.
#[test]
fn memory() -> Result<()> {
    requires!(Fuse);
    const BUDGET: u64 = 8 << 20;
    let sample = Sample::new()?;
    let mounted = sample.mount(&root(), &["--memory", "8MiB"])?;
    let path = mounted.join("data").join(LARGE);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..64)
            .map(|reader: u64| {
                let path = &path;
                scope.spawn(move || -> Result<()> {
                    // Half of them as the copier reads: a whole reply each.
                    let past_the_cache = reader.is_multiple_of(2);
                    let file = if past_the_cache { direct(path)? } else { File::open(path)? };
                    let mut out = vec![0; if past_the_cache { 1 << 20 } else { 8192 }];
                    let places = LARGE_BYTES as u64 - out.len() as u64;
                    for step in 0..40_u64 {
                        file.read_exact_at(&mut out, (reader * 131_072 + step * 8192) % places)?;
                    }
                    Ok(())
                })
            })
            .collect();
        readers.into_iter().try_for_each(|reader| reader.join().expect("a reader panicked"))
    })?;
    let (peak, fixed) = mounted.peak_and_limit()?;
    assert!(peak < BUDGET + fixed, "{peak} bytes");
    let (cores, threads) = (std::thread::available_parallelism()?.get(), fusefs::session::threads());
    assert_eq!(threads, (4 * cores).clamp(8, 16));
    Ok(())
}

/// Files that have no blocks, or only zeros, need no pack.
#[test]
fn zeros_and_nothing() -> Result<()> {
    requires!(Fuse);
    let sample = Sample::new()?;
    let mounted = sample.mount(&root(), &[])?;
    assert!(fs::read(mounted.join("data/base/5/zeros"))?.iter().all(|byte| *byte == 0));
    let found = tree(&mounted.join("data/base/5"))?;
    assert!(matches!(found.get(Path::new("empty")), Some(Entry::File { bytes: 0, .. })));
    Ok(())
}
