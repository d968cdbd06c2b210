//! The command line of pghydrant.
//!
//! `main` resolves the settings once, dispatches to the verb's module, and turns whatever comes back into one line,
//! a hint and an exit code. The verbs live in modules of their own; what they share is [`context::Context`].
//!
//! `wal fetch` is special from the first instruction on: PostgreSQL takes every exit status up to 125 for "no such
//! segment" and opens the database, so there a usage error, a panic and an unreadable setting end above 125 as well.

mod agent;
mod arguments;
mod backup;
mod context;
mod demo;
mod doctor;
mod exit;
mod human;
mod init;
#[cfg(test)]
#[path = "../../tests/support/left_out.rs"]
mod left_out;
mod limits;
mod list;
mod machine;
mod mount;
mod options;
mod output;
mod postgres;
mod random;
mod remote;
mod restore;
mod service;
mod sessions;
mod settings;
mod show;
mod table;
mod trust;
mod verify;
mod wal;
mod words;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use clap::Parser;

use arguments::{Cli, Verb, WalVerb};
use context::Context;
use exit::{Exit, Failure};

fn main() -> ExitCode {
    let faults = exit::Faults::of_command_line(std::env::args_os().skip(1));
    let code = catch_unwind(AssertUnwindSafe(|| run(&faults))).unwrap_or_else(|_| faults.code_of(Exit::Failed));
    ExitCode::from(code)
}

fn run(faults: &exit::Faults) -> u8 {
    limits::raise_open_files();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(refusal) => {
            // Nothing can be done where even the terminal refuses the message.
            let _ = refusal.print();
            let asked_for_help = !refusal.use_stderr();
            return if asked_for_help { Exit::Done as u8 } else { faults.code_of(Exit::Usage) };
        }
    };
    let context = match Context::new(&cli.global, &cli.verb) {
        Ok(context) => context,
        Err(error) => {
            output::Output::plain().error(&error);
            return faults.code_of(Failure::exit_of(&error));
        }
    };
    let done = match remotely(&cli, &context) {
        Ok(Some(exit)) => Ok(exit),
        Ok(None) => dispatch(&cli.verb, &context),
        Err(error) => Err(error),
    };
    match done {
        Ok(exit) => faults.code_of(exit),
        Err(error) => {
            context.output.error(&error);
            faults.code_of(Failure::exit_of(&error))
        }
    }
}

/// What a mount server carries out, if one is named.
fn remotely(cli: &Cli, context: &Context) -> anyhow::Result<Option<Exit>> {
    let words = || std::env::args_os().skip(1).map(|word| word.into_string());
    match words().collect::<Result<Vec<_>, _>>() {
        Ok(words) => remote::carry_out(cli, &words, context),
        Err(_) if cli.global.server.server.is_none() => Ok(None),
        Err(word) => {
            Err(Failure::new(Exit::Usage, format!("{} cannot be sent to a mount server", word.display())).into())
        }
    }
}

pub(crate) fn dispatch(verb: &Verb, context: &Context) -> anyhow::Result<Exit> {
    match verb {
        Verb::Init(arguments) => init::run(arguments, context),
        Verb::Backup(arguments) => backup::run(arguments, context),
        Verb::Wal(WalVerb::Push(arguments)) => wal::push(arguments, context),
        Verb::Wal(WalVerb::Fetch(arguments)) => wal::fetch(arguments, context),
        Verb::List(arguments) => list::run(arguments, context),
        Verb::Show(arguments) => show::run(arguments, context),
        Verb::Mount(arguments) => mount::run(arguments, context),
        Verb::Unmount(arguments) => mount::unmount(arguments, context),
        Verb::FuseServer(arguments) => mount::serve(arguments, context),
        Verb::Restore(arguments) => restore::run(arguments, context),
        Verb::Sessions(arguments) => sessions::list(arguments, context),
        Verb::Retry(arguments) => sessions::retry(arguments, context),
        Verb::Cancel(arguments) => sessions::cancel(arguments, context),
        Verb::Promote(arguments) => sessions::promote(arguments, context),
        Verb::Retarget(arguments) => restore::retarget::run(arguments, context),
        Verb::Verify(arguments) => verify::run(arguments, context),
        Verb::Serve(arguments) => service::run(arguments, context),
        Verb::Agent(verb) => agent::dispatch(verb, context),
        Verb::Doctor(arguments) => doctor::run(arguments, context),
        Verb::Demo(arguments) => demo::run(arguments, context),
    }
}
