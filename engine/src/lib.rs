//! The bytes of pghydrant: the repository, the data path and hydration.
//!
//! This crate knows no FUSE, no PostgreSQL process and no terminal. What it knows of PostgreSQL is what the
//! bytes need: the page checksum, the names of WAL segments, timelines; and whether a server may be at work on them.

pub mod blocks;
pub mod checksum;
pub mod codec;
pub mod error;
pub mod format;
pub mod hydration;
pub mod io;
#[cfg(test)]
#[path = "../../tests/support/left_out.rs"]
mod left_out;
pub mod page;
pub mod process;
pub mod progress;
pub mod remote;
pub mod repository;
pub mod store;
pub mod throttle;
pub mod units;
pub mod wal;

pub use error::{Error, Result};

// Offsets within buffers are computed in u64 and used as usize: PostgreSQL's servers of today have 64 bits.
const _: () = assert!(usize::BITS == 64);
