//! The manifest of a backup of many terabytes, for the figures of *benches/README.md*: what opens, lists, mounts and plans it.
//!
//! ```text
//! terabytes REPOSITORY TERABYTES    in segments of 1 GiB, and 10,000 small tables a terabyte
//! ```
//!
//! Every block is the same one, so packs and leaves take no room; groups and index are those of any backup of this size.

#![allow(clippy::print_stdout)]

use std::path::Path;
use std::time::Instant;

use engine::codec::Compression;
use engine::format::manifest::{LEAF_RECORDS, cut::cut_groups, path};
use engine::units::BlockSize;
use engine::{Error, Result};
use pghydrant_benches::backup::{begin, directory, file, finish};

const SEGMENT_BYTES: u64 = 1 << 30;
const SEGMENTS_A_TERABYTE: u64 = (1 << 40) / SEGMENT_BYTES;
const TABLES_A_TERABYTE: u64 = 10_000;

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [place, terabytes] = &words[..] else { return Err(Error::Refused("REPOSITORY TERABYTES".to_owned())) };
    let terabytes: u64 = terabytes.parse().map_err(|_| Error::Refused(format!("{terabytes} is no number")))?;
    let began = Instant::now();
    let block = BlockSize::DEFAULT;
    let mut files = vec![directory("base"), directory("base/5")];
    files.extend((0..terabytes * SEGMENTS_A_TERABYTE).map(|n| file(format!("base/5/16384.{n}"), SEGMENT_BYTES)));
    let small = block.bytes() as u64;
    files.extend((0..terabytes * TABLES_A_TERABYTE).map(|n| file(format!("base/5/{}", 20_000 + n), small)));
    files.sort_by(|one, other| path::order(&one.path, &other.path));

    let (cluster, writer) = begin(Path::new(place), Compression::Lz4)?;
    let mut worker = writer.worker()?;
    let (record, _) = worker.put(&b"a row of some table ".repeat(block.bytes())[..block.bytes()], None, None)?;
    worker.finish()?;
    let full = writer.commit_leaf(&[record; LEAF_RECORDS as usize])?;
    let sizes = files.iter().map(|file| (file.path.as_str(), block.blocks_of(file.bytes)));
    for (position, range) in cut_groups(sizes).enumerate() {
        let blocks: u64 = files[range.clone()].iter().map(|file| block.blocks_of(file.bytes)).sum();
        let mut leaves = vec![full.clone(); usize::try_from(blocks / LEAF_RECORDS).unwrap_or(usize::MAX)];
        let rest = vec![record; usize::try_from(blocks % LEAF_RECORDS).unwrap_or(usize::MAX)];
        if !rest.is_empty() {
            leaves.push(writer.commit_leaf(&rest)?);
        }
        writer.commit_group(position as u64, &files[range], leaves)?;
    }
    let backup = finish(&cluster, writer)?;
    println!("{} blocks in {:.1} s", backup.info.totals.blocks, began.elapsed().as_secs_f64());
    Ok(())
}
