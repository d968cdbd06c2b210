//! The data plane, seen from the target: blocks of a backup from the mount service, over TCP.
//!
//! ```text
//! Blocks ──read_at──> RemoteStore ──requests──> connections (TLS 1.3 or plain) ──> the mount service
//!        <──stored bytes, straight into the caller's buffer──
//! ```
//!
//! [`RemoteStore`] is one more [`Store`](crate::store::Store), of which only the reading part is there. Bytes cross the
//! network as they are stored; decoding and proving them is the affair of [`Blocks`](crate::blocks::Blocks) here as
//! everywhere, so nobody on the way has to be trusted with their content. *PROTOCOL.md* has every byte of the protocol.
//!
//! Over a long way a read is answered late. Whoever reads in order therefore has the store ask for what comes next
//! ([`Store::fetch_ahead`](crate::store::Store::fetch_ahead)), as much as the way takes and the memory allows.
//!
//! Always true: a read brings all of its bytes or an error. A connection that is lost costs time and nothing else: what
//! was asked on it is asked again on another, for as long as the [`Patience`] of the session lasts.

mod access;
mod ahead;
mod client;
mod connection;
mod coverage;
pub mod frame;
pub mod message;
mod pace;
mod patience;
mod pin;
mod sink;
mod stream;

pub use access::{Access, AccessFile, Fingerprint, LeaseId, Security, Token};
pub use client::{Counters, RemoteStore};
pub use coverage::{Coverage, Reach, Runs};
pub use patience::{Forever, Interruptible, Patience, Until};
