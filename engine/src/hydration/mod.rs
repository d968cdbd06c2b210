//! Hydration: a target that starts as an empty outline of a backup, and a map of the blocks that are there.

pub mod layout;
pub mod map;

pub use layout::{Layout, Roots};
pub use map::Map;
