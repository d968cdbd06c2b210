//! Benchmarks of the parts; the suite of whole backups and restores is `src/main.rs`.

// Figures, not arithmetic: what a benchmark casts is bounded by its own constants.
#[allow(clippy::cast_possible_truncation)]
pub mod backup;
#[allow(clippy::cast_possible_truncation)]
pub mod pages;
#[allow(clippy::cast_possible_truncation)]
pub mod synthetic;
