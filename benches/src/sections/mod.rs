//! The contests, each a file.

pub(crate) mod backup;
pub(crate) mod delta;
pub(crate) mod mount;
pub(crate) mod network;
pub(crate) mod reflink;
pub(crate) mod restore;
pub(crate) mod scale;
pub(crate) mod small;
pub(crate) mod wal;
