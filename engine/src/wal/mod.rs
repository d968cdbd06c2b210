//! The WAL archive: segments, timelines, gaps.

mod archive;
pub mod history;
pub mod name;

pub use archive::{Fetched, Pushed, WalArchive, WalObject};
