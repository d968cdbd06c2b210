//! Benchmarks of the parts; whole restores are timed by `restore.sh` beside this file.

// Figures, not arithmetic: what a benchmark casts is bounded by its own constants.
#[allow(clippy::cast_possible_truncation)]
pub mod backup;
#[allow(clippy::cast_possible_truncation)]
pub mod pages;
