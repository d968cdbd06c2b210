//! pghydrant's views of a backup as FUSE file systems.
//!
//! *SEMANTICS.md* says what each call does and refuses; every sentence there is tested. The types of `fuser` stay
//! inside two files, `backup_fs` and `session`: its API moves between releases.

pub mod backup_fs;
pub mod budget;
pub mod content;
pub mod errno;
pub mod mounting;
pub mod node;
pub mod read_ahead;
pub mod reader;
pub mod runs;
pub mod session;
pub mod table;
pub mod tree;
