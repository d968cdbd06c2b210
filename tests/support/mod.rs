//! What the tests stand on: throw-away clusters, repositories, file systems, and processes that cannot outlive them.

pub mod browser;
pub mod cluster;
pub mod compare;
pub mod filesystem;
pub mod json;
mod left_out;
pub mod pghydrant;
pub mod process;
#[macro_use]
pub mod requirements;
pub mod repository;
pub mod scratch;
pub mod sessions;
pub mod target;
pub mod tools;
pub mod world;

pub use anyhow::{Context, Result, bail, ensure};

pub use cluster::{Cluster, Instance};
pub use pghydrant::Pghydrant;
pub use process::{Finished, Run, Running};
pub use repository::Repository;
pub use requirements::Requirement::*;
pub use scratch::Scratch;
pub use sessions::{open_session, open_sessions, session_of};
pub use tools::OsUser;
pub use world::{World, marks};
