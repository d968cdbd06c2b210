//! The WAL archive: segments, timelines, gaps.
//!
//! PostgreSQL hands every finished segment to `archive_command` ([`WalArchive::push`]) and asks for what it needs
//! through `restore_command` ([`WalArchive::fetch`]). It recycles a segment as soon as the push has answered, and it
//! takes "there is no such segment" for the end of the WAL and opens the database. So the two promises that count:
//!
//! Always true: a push that answers well is durable; a fetch says [`Fetched::Absent`] only where that is proven.

mod archive;
mod coverage;
mod encode;
mod fetch;
pub mod history;
pub mod name;
mod object;
mod page;
mod push;
#[cfg(test)]
mod tests;

pub use archive::WalArchive;
pub use coverage::{Branch, Gap, Reach};
pub use fetch::Fetched;
pub use object::WalObject;
pub use page::SegmentHeader;
pub use push::Pushed;

#[cfg(test)]
pub(crate) fn tests_segment(name: name::SegmentName, identifier: u64, segment_bytes: u64) -> Vec<u8> {
    page::tests::segment(name, identifier, segment_bytes, 1)
}
