//! A mount of a repository that is damaged, or goes away.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

use super::guard::{direct, errno, names, root};
use super::sample::{BLOCK_BYTES, LARGE, LARGE_BYTES, Sample, relation};
use crate::support::repository::flip_bit;
use crate::support::*;

/// Damages the stored run of one block of [`LARGE`]; tells the pack's file and the offset in it.
fn damage_block(sample: &Sample, block: u64) -> Result<(PathBuf, u64)> {
    use engine::format::block::Content;
    let repository = engine::repository::Repository::open(&sample.repository)?;
    let cluster = repository.cluster(&"main".parse().map_err(anyhow::Error::msg)?)?;
    let backup = cluster.backup(&sample.info.label)?;
    let file = backup.manifest.file(LARGE)?.context("no large file")?;
    let record = backup.manifest.block(engine::units::BlockNumber(file.first_block.0 + block))?;
    let Content::Stored { at, .. } = record.content else { bail!("block {block} is not stored whole") };
    let pack = sample.pack()?;
    flip_bit(&pack, u64::from(at.offset) + u64::from(at.stored) / 2)?;
    Ok((pack, at.offset.into()))
}

/// A block that cannot be read or is not what was backed up fails the reads that touch it with EIO, and no others; the
/// server's log names file, block, pack and offset, once.
#[test]
fn a_damaged_block() -> Result<()> {
    requires!(Fuse);
    const BLOCK: u64 = 40;
    let sample = Sample::new()?;
    let (pack, offset) = damage_block(&sample, BLOCK)?;
    let mounted = sample.mount(&root(), &[])?;
    let (path, content) = (mounted.join("data").join(LARGE), relation(LARGE_BYTES, 1));
    let mut page = vec![0; 8192];
    for file in [File::open(&path)?, direct(&path)?] {
        for start in (0..content.len() - page.len()).step_by(page.len()) {
            let outcome = file.read_exact_at(&mut page, start as u64);
            if start as u64 / BLOCK_BYTES == BLOCK {
                assert_eq!(errno(outcome), Some(libc::EIO), "at {start}");
            } else {
                outcome.with_context(|| format!("at {start}"))?;
                assert!(page[..] == content[start..start + page.len()], "at {start}");
            }
        }
    }
    let log = mounted.log()?;
    let lines: Vec<_> = log.lines().filter(|line| line.contains("ERROR")).collect();
    assert_eq!(lines.len(), 1, "{log}");
    let pack = pack.file_name().context("no name")?.to_string_lossy().into_owned();
    for part in [LARGE, &format!("block={BLOCK}"), &pack, &format!("at byte {offset}")] {
        assert!(lines[0].contains(part), "no \"{part}\" in {log}");
    }
    fs::read(mounted.join("data/base/5/16384.1"))?;
    Ok(())
}

/// With O_DIRECT a read that begins before such a block ends before it.
#[test]
fn a_read_that_meets_a_damaged_block() -> Result<()> {
    requires!(Fuse);
    const BLOCK: u64 = 11;
    let sample = Sample::new()?;
    damage_block(&sample, BLOCK)?;
    let mounted = sample.mount(&root(), &[])?;
    let file = direct(&mounted.join("data").join(LARGE))?;
    let (mut out, content) = (vec![0; 1 << 20], relation(LARGE_BYTES, 1));
    let (start, until) = (8 * BLOCK_BYTES, BLOCK * BLOCK_BYTES);
    let read = file.read_at(&mut out, start)?;
    assert_eq!(read as u64, until - start);
    assert!(out[..read] == content[usize::try_from(start)?..usize::try_from(until)?]);
    assert_eq!(errno(file.read_at(&mut out, until)), Some(libc::EIO));
    assert_eq!(file.read_at(&mut out, until + BLOCK_BYTES)?, out.len());
    Ok(())
}

/// A repository that goes away under the mount makes reads fail with EIO and not the server; once it is back they
/// succeed.
#[test]
fn a_repository_that_goes_away() -> Result<()> {
    requires!(Fuse);
    let sample = Sample::new()?;
    let mounted = sample.mount(&root(), &[])?;
    let file = direct(&mounted.join("data/base/5/16384.1"))?;
    let (pack, away) = (sample.pack()?, sample.scratch.join("away"));
    // The server may have the pack open: what is cut off is gone for whoever has it open too.
    fs::copy(&pack, &away)?;
    fs::write(&pack, "")?;
    let mut out = vec![0; 1 << 20];
    assert_eq!(errno(file.read_at(&mut out, 0)), Some(libc::EIO));
    assert_eq!(errno(fs::read(mounted.join("data").join(LARGE))), Some(libc::EIO));
    fs::write(&pack, fs::read(&away)?)?;
    file.read_exact_at(&mut out, 0)?;
    assert!(out[..] == relation(3 << 20, 2)[..1 << 20]);
    Ok(())
}

/// A damaged file of the archive is listed beside the others; if its size cannot be known, with the one that it is stored
/// with. Opening it is EIO, and the server's log says why, once.
#[test]
fn a_damaged_file_of_the_archive() -> Result<()> {
    requires!(Fuse);
    let sample = Sample::new()?;
    sample.archive_file("00000002.history", b"1\t0/300000\tno recovery target specified\n")?;
    let stored = sample.repository.join("clusters/main/wal/00000002/00000002.history");
    flip_bit(&stored, 9)?;
    let mounted = sample.mount(&root(), &[])?;
    let wal = mounted.join("wal");
    for _ in 0..2 {
        let found = names(&wal)?;
        assert!(found.contains("00000002.history") && found.contains("000000010000000000000002"), "{found:?}");
    }
    assert_eq!(fs::metadata(wal.join("00000002.history"))?.len(), fs::metadata(&stored)?.len());
    assert_eq!(errno(File::open(wal.join("00000002.history"))), Some(libc::EIO));
    fs::read(wal.join("000000010000000000000002"))?;
    let log = mounted.log()?;
    assert_eq!(log.lines().filter(|line| line.contains("listed as it is stored")).count(), 1, "{log}");
    Ok(())
}

/// While the archive cannot be read, or another repository is in its place, the names in `wal` that are not known and its
/// listing are EIO: never "no such file", and never empty.
#[test]
fn an_archive_that_goes_away() -> Result<()> {
    requires!(Fuse);
    let sample = Sample::new()?;
    let mounted = sample.mount(&root(), &[])?;
    let (wal, away) = (mounted.join("wal"), sample.scratch.join("away"));
    let (there, absent) = (wal.join("000000010000000000000003"), wal.join("000000010000000000000009"));
    let answers = || {
        // What the kernel was told of the archive it believes for a second.
        std::thread::sleep(Duration::from_millis(1100));
        let listed = fs::read_dir(&wal).and_then(|entries| entries.collect::<std::io::Result<Vec<_>>>());
        let names = listed.as_ref().map_or(0, Vec::len);
        (names, errno(listed), errno(File::open(&there)), errno(File::open(&absent)))
    };
    let healthy = (4, None, None, Some(libc::ENOENT));
    let failing = (0, Some(libc::EIO), Some(libc::EIO), Some(libc::EIO));
    assert_eq!(answers(), healthy);
    fs::rename(&sample.repository, &away)?;
    assert_eq!(answers(), failing);
    fs::create_dir(&sample.repository)?;
    assert_eq!(answers(), failing);
    fs::remove_dir(&sample.repository)?;
    let other = Sample::new()?;
    fs::remove_dir_all(other.repository.join("clusters/main/wal"))?;
    fs::create_dir(other.repository.join("clusters/main/wal"))?;
    fs::rename(&other.repository, &sample.repository)?;
    assert_eq!(answers(), failing);
    fs::rename(&sample.repository, &other.repository)?;
    fs::rename(&away, &sample.repository)?;
    assert_eq!(answers(), healthy);
    // A directory of the archive alone.
    fs::rename(sample.repository.join("clusters/main/wal"), &away)?;
    assert_eq!(answers(), failing);
    Ok(())
}
