//! The repository's bytes: structs to bytes and back, pure. *FORMAT.md* describes them; a test holds it true.

pub mod backup;
pub mod block;
pub mod file;
