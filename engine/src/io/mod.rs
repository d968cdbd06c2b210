//! The disk: durability, buffers, and the one waist that all data-path I/O passes through.

pub mod durable;
