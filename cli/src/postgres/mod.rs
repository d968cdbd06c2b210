//! PostgreSQL from the outside: its programs, its control file, its running instances, its SQL, its WAL tools.
//!
//! Nothing here knows a backup or a restore. Parsers take bytes or text; what starts processes or opens
//! connections is kept apart from them, so that the parsers are tested without a server.

pub(crate) mod binaries;
pub(crate) mod client;
pub(crate) mod conninfo;
pub(crate) mod control;
pub(crate) mod instance;
pub(crate) mod log;
pub(crate) mod owner;
pub(crate) mod postmaster;
pub(crate) mod processes;
pub(crate) mod waldump;
