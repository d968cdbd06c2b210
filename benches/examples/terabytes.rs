//! The manifest of a backup of many terabytes, to try by hand what the suite's section `scale` measures:
//!
//! ```text
//! terabytes REPOSITORY TERABYTES    in segments of 1 GiB, and 10,000 small tables a terabyte
//! terabytes REPOSITORY lease        how long a mount server takes to lease it: to the first block, to all
//! ```

#![allow(clippy::print_stdout)]

use std::path::Path;
use std::time::Instant;

use engine::format::block::Content;
use engine::remote::{Coverage, Reach};
use engine::repository::Repository;
use engine::units::BlockNumber;
use engine::{Error, Result};
use pghydrant_benches::synthetic::{large_tables, write};

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [place, terabytes] = &words[..] else { return Err(Error::Refused("REPOSITORY TERABYTES".to_owned())) };
    if terabytes == "lease" {
        return lease(Path::new(place));
    }
    let terabytes: u64 = terabytes.parse().map_err(|_| Error::Refused(format!("{terabytes} is no number")))?;
    let began = Instant::now();
    let backup = write(Path::new(place), large_tables(terabytes << 10))?;
    println!("{} blocks in {:.1} s", backup.info.totals.blocks, began.elapsed().as_secs_f64());
    Ok(())
}

/// What a mount server does when a session has chosen the backup.
fn lease(place: &Path) -> Result<()> {
    let repository = Repository::open(place)?;
    let name = repository.clusters()?.remove(0);
    let backup = repository.cluster(&name)?.latest_backup()?.ok_or_else(|| Error::NotFound("no backup".to_owned()))?;
    let began = Instant::now();
    let coverage = Coverage::begin(&backup);
    let first = backup.manifest.block(BlockNumber(0))?;
    let Content::Stored { at, .. } = first.content else {
        return Err(Error::Refused("its first block is not stored whole".to_owned()));
    };
    let key = format!("clusters/{name}/packs/{}.pack", at.pack);
    let known = || match coverage.reach(&key) {
        Reach::Only(runs) => runs.answer(&(at.offset.into()..at.end())).is_some(),
        Reach::Whole | Reach::Nothing => true,
    };
    let mut first_after = None;
    coverage.walk(&backup, &mut || {
        if first_after.is_none() && known() {
            first_after = Some(began.elapsed());
        }
        true
    })?;
    let after = first_after.unwrap_or_else(|| began.elapsed());
    println!("first block after {:.3} s, all after {:.3} s", after.as_secs_f64(), began.elapsed().as_secs_f64());
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status.lines().filter(|line| line.starts_with("VmHWM")).for_each(|line| println!("{line}"));
    Ok(())
}
