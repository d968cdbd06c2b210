//! What a mount server does for the targets of its restores.

// The verb that starts it is not there yet.
#[allow(dead_code)]
pub(crate) mod data;
