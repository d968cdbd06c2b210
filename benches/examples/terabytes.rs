//! The manifest of a backup of many terabytes, to try by hand what the suite's section `scale` measures:
//!
//! ```text
//! terabytes REPOSITORY TERABYTES    in segments of 1 GiB, and 10,000 small tables a terabyte
//! ```

#![allow(clippy::print_stdout)]

use std::path::Path;
use std::time::Instant;

use engine::{Error, Result};
use pghydrant_benches::synthetic::{large_tables, write};

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [place, terabytes] = &words[..] else { return Err(Error::Refused("REPOSITORY TERABYTES".to_owned())) };
    let terabytes: u64 = terabytes.parse().map_err(|_| Error::Refused(format!("{terabytes} is no number")))?;
    let began = Instant::now();
    let backup = write(Path::new(place), large_tables(terabytes << 10))?;
    println!("{} blocks in {:.1} s", backup.info.totals.blocks, began.elapsed().as_secs_f64());
    Ok(())
}
