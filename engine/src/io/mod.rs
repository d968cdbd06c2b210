//! The disk: durability, buffers, and the one waist that all data-path I/O passes through.

pub mod buffer;
pub mod disk;
pub mod durable;
pub mod local;
#[cfg(test)]
mod local_tests;
mod plain;
pub mod power_cut;
mod ring;
pub mod share;
pub mod simulated;
mod transfer;

pub use buffer::{BUFFER_BYTES, Buffer, Pages, buffers};
pub use disk::{Disk, Found, Open, OpenFile, Owner, Place, Queue, Root};
pub use local::{Engine, LocalDisk, Means, means, open_below, try_ring};
pub use share::{Sharing, can_share};
