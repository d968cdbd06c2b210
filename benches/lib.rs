//! Benchmarks of the parts; the suite of whole backups and restores is `src/main.rs`.

// Figures, not arithmetic: what a benchmark casts is bounded by its own constants.
#[allow(clippy::cast_possible_truncation)]
pub mod backup;
// It has the data plane of the command line in it, whose own tests run there.
#[cfg(not(test))]
#[allow(clippy::cast_possible_truncation)]
pub mod data_plane;
#[allow(clippy::cast_possible_truncation)]
pub mod pages;
#[allow(clippy::cast_possible_truncation)]
pub mod synthetic;
