//! A backup of very many small files, and a restore of it by the engine alone, for the figures of *benches/README.md*:
//!
//! ```text
//! many_files write REPOSITORY FILES                files of 8 KiB, that compress to hardly anything
//! many_files write-raw REPOSITORY FILES MEBIBYTES  files of so many MiB each, stored raw
//! many_files fill REPOSITORY TARGET [MOUNT]        from the blocks, or from where the backup is mounted
//! many_files reflink|trust REPOSITORY TARGET       sharing blocks with the repository: hashed, or not
//! ```

#![allow(clippy::print_stdout)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use engine::codec::Compression;
use engine::hydration::{Fill, Hydration, Layout, Source};
use engine::io::LocalDisk;
use engine::progress::Counting;
use engine::repository::Repository;
use engine::{Error, Result};
use pghydrant_benches::backup::{small_files, write};

const FILE_BYTES: usize = 8192;
/// As a restore has it.
const MEMORY_BYTES: usize = 128 << 20;

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let began = Instant::now();
    match words[..] {
        ["write", repository, files] => {
            let files = files.parse().map_err(|_| Error::Refused(format!("{files} is no number")))?;
            write(Path::new(repository), Compression::Lz4, small_files(files, FILE_BYTES as u64), |file, out| {
                out.extend(file.path.bytes().cycle().take(FILE_BYTES));
            })?;
        }
        ["write-raw", repository, files, mebibytes] => {
            let number = |text: &str| text.parse::<u32>().map_err(|_| Error::Refused(format!("{text} is no number")));
            let (files, bytes) = (number(files)? as usize, u64::from(number(mebibytes)?) << 20);
            write(Path::new(repository), Compression::None, small_files(files, bytes), |file, out| {
                let line = format!("{:<64}", file.path);
                (0..bytes / 64).for_each(|_| out.extend_from_slice(line.as_bytes()));
            })?;
        }
        ["reflink", repository, target] => {
            fill(Path::new(repository), Path::new(target), Source::Reflink { trusted: false })?;
        }
        ["trust", repository, target] => {
            fill(Path::new(repository), Path::new(target), Source::Reflink { trusted: true })?;
        }
        ["fill", repository, target] => fill(Path::new(repository), Path::new(target), Source::Blocks)?,
        ["fill", repository, target, mount] => {
            fill(Path::new(repository), Path::new(target), Source::Mount(mount.into()))?;
        }
        _ => {
            return Err(Error::Refused(
                "write REPOSITORY FILES, or fill REPOSITORY TARGET [MOUNT]: see the source".to_owned(),
            ));
        }
    }
    println!("{:.2} s, {}", began.elapsed().as_secs_f64(), peak());
    Ok(())
}

fn fill(repository: &Path, target: &Path, source: Source) -> Result<()> {
    let cluster = Repository::open(repository)?.cluster(&"bench".parse().map_err(Error::Refused)?)?;
    let label = cluster.labels()?.pop().ok_or_else(|| Error::NotFound("a backup".to_owned()))?;
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let layout = Layout { data: PathBuf::from(target), tablespaces: BTreeMap::new(), wal: None };
    let session = "many-files".parse().map_err(Error::Refused)?;
    let disk = Arc::new(LocalDisk::new());
    let hydration = Hydration::begin(cluster.backup(&label)?, &layout, &session, None, disk)?;
    let progress = Counting::default();
    let began = Instant::now();
    let outlined = hydration.outline(workers, &progress)?;
    println!("outline of {} files: {:.2} s", outlined.files, began.elapsed().as_secs_f64());
    let filled = hydration.fill(&Fill { source, workers, memory_bytes: MEMORY_BYTES }, &progress)?;
    let seconds = filled.elapsed.as_secs_f64();
    println!("fill: {seconds:.2} s, {} blocks, waited for {:?}; {}", filled.blocks, filled.waited, filled.io);
    if filled.shared_bytes > 0 {
        println!("shared: {} bytes", filled.shared_bytes);
    }
    Ok(())
}

/// The most memory that this process had.
fn peak() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    format!("peak {}", peak.unwrap_or(" unknown").trim())
}
