//! The target agent: a restore on the machine that it restores to, ordered from elsewhere.
//!
//! ```text
//! agent begin DIR     a request on stdin: prepares DIR and starts `agent run` there, which outlives this connection
//! agent run DIR       the verb itself, in this very process; what it says goes into DIR/events, which only grows
//! agent follow DIR    what was said from an offset on, then what is being said, until its end
//! agent stop DIR      interrupts the verb that runs
//! agent end DIR       takes everything of the session away
//! agent probe         an access file on stdin: whether that service is reached from here
//! ```
//!
//! DIR is one session's: `lock` is held, and names the process, while a verb runs; `state` is the state directory of that
//! verb; `repository.json` says how the repository is reached. Whoever lost the connection follows again from where it
//! was; nobody has to remember a process.
//!
//! Always true: of one session one verb runs at a time; and each run's last event is how it ended, unless it was killed.

mod follow;
mod probe;
mod request;
mod run;

use std::path::PathBuf;

pub(crate) use probe::{REACHED, UNREACHED};
pub(crate) use request::{BEGUN, Order, RUNNING, Request};

use crate::context::Context;
use crate::exit::Exit;

/// What the agent does.
#[derive(clap::Subcommand, Debug)]
pub(crate) enum Verb {
    /// Start the verb that stdin says
    Begin(Place),
    /// Run it
    Run(Place),
    /// Tell what it says
    Follow(FollowArguments),
    /// Interrupt it
    Stop(Place),
    /// Take everything of the session away
    End(Place),
    /// Tell whether the mount service is reached
    Probe,
}

/// The session's directory.
#[derive(clap::Args, Debug)]
pub(crate) struct Place {
    pub(crate) directory: PathBuf,
}

/// Options of `follow`.
#[derive(clap::Args, Debug)]
pub(crate) struct FollowArguments {
    pub(crate) directory: PathBuf,
    /// Bytes of the events that were heard already
    #[arg(long, default_value_t = 0)]
    pub(crate) from: u64,
}

pub(crate) fn dispatch(verb: &Verb, _context: &Context) -> anyhow::Result<Exit> {
    match verb {
        Verb::Begin(place) => request::begin(&place.directory),
        Verb::Run(place) => run::run(&place.directory),
        Verb::Follow(arguments) => follow::follow(&arguments.directory, arguments.from),
        Verb::Stop(place) => run::stop(&place.directory),
        Verb::End(place) => request::end(&place.directory),
        Verb::Probe => probe::probe(),
    }
}
