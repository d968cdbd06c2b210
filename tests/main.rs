//! The integration tests: real PostgreSQL, real mounts, faults, crashes, damage.
//!
//! One binary, so that it links once. A file here is a promise of the product; `support` is what tests stand on.
//! A test that needs something of the machine starts with [`requires!`]: where it is missing the test says so by
//! name and is counted as skipped; in CI it fails.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr, missing_docs, dead_code, unreachable_pub)]

#[macro_use]
mod support;

mod adopt;
mod archive;
mod backups;
mod checks;
mod configuration;
mod contents;
mod crashes;
mod damage;
mod data_path;
mod delta;
mod disk_full;
mod documents;
mod handover;
mod harness;
mod hostile;
mod impossible_targets;
mod isolation;
mod live;
mod machine;
mod mount;
mod open_files;
mod reboots;
mod refusals;
mod retarget;
#[macro_use]
mod service;
mod service_failures;
mod service_load;
mod service_page;
mod service_tunnel;
mod standby;
mod tablespaces;
mod targets;
mod tarstream;
mod timelines;
mod versions;
