//! A backup of very many small files: what its mount costs does not grow with them.

use std::fs;
use std::os::unix::fs::MetadataExt;

use engine::format::file::{FileKind, FileRecord};
use engine::units::BlockNumber;

use super::guard::{names, root};
use super::sample::Sample;
use crate::support::*;

/// PGHYDRANT_FILES asks for more.
const FILES: usize = 100_000;
/// Files of the largest directory, of each hundred.
const IN_ONE_DIRECTORY_PERCENT: usize = 30;
/// Files of each of the other directories.
const IN_OTHER_DIRECTORIES: usize = 1000;
const FILE_BYTES: usize = 8192;

fn record(path: String, kind: FileKind) -> FileRecord {
    let directory = kind == FileKind::Directory;
    let (mode, bytes) = if directory { (0o700, 0) } else { (0o600, FILE_BYTES as u64) };
    let first_block = BlockNumber(0);
    FileRecord { path, kind, mode, uid: 0, gid: 0, modified: 1_700_000_000, bytes, crc32c: 0, first_block }
}

/// The content of a file: not zeros, and hardly any bytes once compressed.
fn content(path: &str) -> Vec<u8> {
    path.bytes().cycle().take(FILE_BYTES).collect()
}

fn many_files(files: usize) -> Vec<FileRecord> {
    let mut records: Vec<_> =
        ["base", "base/1"].map(|path| record(path.to_owned(), FileKind::Directory)).into_iter().collect();
    for number in 0..files {
        if number < files * IN_ONE_DIRECTORY_PERCENT / 100 {
            records.push(record(format!("base/1/{number}"), FileKind::Regular));
            continue;
        }
        let (directory, within) = (2 + number / IN_OTHER_DIRECTORIES, number % IN_OTHER_DIRECTORIES);
        if within == 0 || number == files * IN_ONE_DIRECTORY_PERCENT / 100 {
            records.push(record(format!("base/{directory}"), FileKind::Directory));
        }
        records.push(record(format!("base/{directory}/{number}"), FileKind::Regular));
    }
    records
}

/// The server's memory does not grow with the files of the backup, nor with those that were looked at.
#[test]
fn memory_with_many_files() -> Result<()> {
    requires!(Fuse);
    let files = std::env::var("PGHYDRANT_FILES").ok().and_then(|text| text.parse().ok()).unwrap_or(FILES);
    let sample = Sample::of_files(many_files(files), |file| Ok(content(&file.path)))?;
    let began = std::time::Instant::now();
    let mounted = sample.mount(&root(), &[])?;
    let (to_mount, began) = (began.elapsed(), std::time::Instant::now());
    let largest = names(&mounted.join("data/base/1"))?.len();
    let (to_list, began) = (began.elapsed(), std::time::Instant::now());
    assert_eq!(largest, files * IN_ONE_DIRECTORY_PERCENT / 100);
    let mut found = 0;
    for directory in fs::read_dir(mounted.join("data/base"))? {
        for file in fs::read_dir(directory?.path())? {
            let file = file?;
            assert_eq!(file.metadata()?.size(), FILE_BYTES as u64);
            found += 1;
            if found % 1000 == 0 {
                let path = file.path();
                let path = path.strip_prefix(mounted.join("data"))?.to_string_lossy().into_owned();
                assert!(fs::read(file.path())? == content(&path), "{path}");
            }
        }
    }
    assert_eq!(found, files);
    let (peak, limit) = mounted.peak_and_limit()?;
    eprintln!(
        "{files} files: mounted in {to_mount:?}, {largest} listed in {to_list:?}, all looked at in {:?}, peak {} MiB",
        began.elapsed(),
        peak >> 20
    );
    assert!(peak < limit, "{peak} bytes");
    Ok(())
}
