//! Commands that a mount server carries out: the words are sent there, and what it says is said here.
//!
//! The server is named by `--server`, or by the settings; a repository that is named on the command line keeps a command
//! here. A command that was cut off from the server goes on listening where it was: the session runs on meanwhile.

mod https;
mod known;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde_json::{Value, json};

use crate::arguments::{Cli, Verb};
use crate::context::Context;
use crate::exit::{Exit, Failure};
use crate::restore::goal_option;
use crate::service::control;
use crate::settings::Source;
use crate::words::without;
use https::{Connection, Lines};
use known::Address;

/// For as long a server that was there before is looked for again.
const LOST_MAX: Duration = Duration::from_secs(600);
const LOST_PAUSE: Duration = Duration::from_secs(2);

/// Options that are the client's own.
const OURS_WITH_VALUE: &[&str] = &["--server", "--token-file", "--fingerprint", "--config", "--state"];
const OURS_FLAGS: &[&str] = &["--json", "-v", "-vv", "--verbose"];

/// Carries the command out on the mount server, if one is to do it.
pub(crate) fn carry_out(cli: &Cli, words: &[String], context: &Context) -> anyhow::Result<Option<Exit>> {
    let options = &cli.global.server;
    let named = context.settings.get("server", options.server.clone().map(Into::into));
    let Some((url, source)) = named else {
        return match &cli.verb {
            Verb::Restore(arguments) if arguments.remote.is_given() => {
                let message = "--target, --identity, --ssh-option and --sudo are for a restore by a mount server";
                let hint = "name it with --server; without one, give the command on the target itself";
                Err(Failure::new(Exit::Usage, message).hint(hint).into())
            }
            _ => Ok(None),
        };
    };
    let (repository, is_for_afar) = match &cli.verb {
        Verb::List(arguments) => (Some(&arguments.repository), true),
        Verb::Show(arguments) => (Some(&arguments.repository), true),
        Verb::Verify(arguments) => (Some(&arguments.repository), true),
        Verb::Restore(arguments) => (Some(&arguments.repository), true),
        Verb::Sessions(_) | Verb::Retry(_) | Verb::Cancel(_) | Verb::Promote(_) | Verb::Retarget(_) => (None, true),
        _ => (None, false),
    };
    let by_flag = source == Source::Flag;
    let here = repository.is_some_and(|option| option.repo.is_some());
    match (is_for_afar, by_flag, here) {
        (false, true, _) => {
            let message = "this command works on the machine where it is given: leave --server out";
            return Err(Failure::new(Exit::Usage, message).into());
        }
        (true, true, true) => {
            let message = "--server and --repo name two repositories: give one of them";
            return Err(Failure::new(Exit::Usage, message).into());
        }
        (false, false, _) | (true, false, true) => return Ok(None),
        _ => {}
    }
    let address = Address::parse(&url.to_string_lossy()).map_err(|refusal| Failure::new(Exit::Usage, refusal))?;
    let server = Server::new(address, cli, context)?;
    let words = handed_on(cli, words, context)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(server.command(&words, context)).map(Some)
}

/// The words as the server gets them: what only this side knows is said.
fn handed_on(cli: &Cli, words: &[String], context: &Context) -> anyhow::Result<Vec<String>> {
    let mut words = without(words, OURS_WITH_VALUE, OURS_FLAGS);
    let cluster = match &cli.verb {
        Verb::List(arguments) => Some(&arguments.cluster),
        Verb::Show(arguments) => Some(&arguments.cluster),
        Verb::Verify(arguments) => Some(&arguments.cluster),
        Verb::Restore(arguments) => Some(&arguments.cluster),
        _ => None,
    };
    if let Some(option) = cluster.filter(|option| option.cluster.is_none()) {
        let set = context.optional_cluster_name(option)?;
        words.extend(set.into_iter().flat_map(|name| ["--cluster".to_owned(), name.to_string()]));
    }
    let goals = match &cli.verb {
        Verb::Restore(arguments) => Some(&arguments.goals),
        Verb::Retarget(arguments) => Some(&arguments.goals),
        _ => None,
    };
    // A time is meant by the clock, and in the time zone, of who typed it.
    if let Some(text) = goals.and_then(|goals| goals.target_time.as_ref()) {
        let time = goal_option(text, Timestamp::now(), &TimeZone::system());
        let time = time.map_err(|refusal| Failure::new(Exit::Usage, refusal))?;
        words = without(&words, &["--target-time"], &[]);
        words.extend(["--target-time".to_owned(), time]);
    }
    Ok(words)
}

/// The mount server, and what opens it.
struct Server {
    address: Address,
    token: String,
    known: known::Known,
}

impl Server {
    fn new(address: Address, cli: &Cli, context: &Context) -> anyhow::Result<Self> {
        let options = &cli.global.server;
        let file = context.settings.get("token_file", options.token_file.clone().map(Into::into));
        let Some((file, _)) = file else {
            return Err(Failure::new(Exit::Usage, "no token is named for the mount server")
                .hint("`pghydrant serve --issue-token NAME` there prints one; keep it in a file, and give --token-file FILE")
                .into());
        };
        let file = PathBuf::from(file);
        let token = std::fs::read_to_string(&file).map_err(|cause| engine::Error::io("read", &file, cause))?;
        let token = token.trim().to_owned();
        if token.is_empty() || token.contains(|letter: char| !letter.is_ascii_graphic()) {
            return Err(Failure::new(Exit::Usage, format!("{} holds no token", file.display())).into());
        }
        let given = options.fingerprint.as_deref().map(str::parse).transpose();
        let given = given.map_err(|refusal| Failure::new(Exit::Usage, refusal))?;
        let known = known::Known::of(&context.state_path()?, &address, given)?;
        Ok(Self { address, token, known })
    }

    async fn connect(&self, context: &Context) -> anyhow::Result<Connection> {
        let (connection, fingerprint) = Connection::open(&self.address, self.known.fingerprint()).await?;
        if let Some(note) = self.known.keep(fingerprint)? {
            context.output.note(&note);
        }
        Ok(connection)
    }

    /// Has it carried out, and says what the server says.
    async fn command(&self, words: &[String], context: &Context) -> anyhow::Result<Exit> {
        let connection = self.connect(context).await?;
        let body = json!({"arguments": words});
        let answer = connection.send("POST", "/v1/commands", &self.token, Some(&body)).await?;
        let session = answer.header(control::SESSION_HEADER).map(str::to_owned);
        let mut position = answer.header(control::FROM_HEADER).and_then(|from| from.parse().ok()).unwrap_or(0_u64);
        let mut lines = answer.lines();
        loop {
            let lost = match self.hear(&mut lines, &mut position, context).await {
                Ok(Some(exit)) => return Ok(exit),
                Ok(None) => "it ended the connection".to_owned(),
                Err(error) => format!("{error:#}"),
            };
            let Some(session) = &session else {
                return Err(Failure::new(Exit::Failed, format!("the mount server is lost: {lost}")).into());
            };
            context.output.warning(&format!(
                "the mount server is lost ({lost}); session {session} does not need this connection"
            ));
            lines = self.find_again(session, position, context).await?;
        }
    }

    /// Says what comes, until the end of the command. None where the connection ends before.
    async fn hear(&self, lines: &mut Lines, position: &mut u64, context: &Context) -> anyhow::Result<Option<Exit>> {
        while let Some(line) = lines.next().await? {
            // Server-sent events, where the connection was made again.
            let text = match lines.are_events {
                true => match line.strip_prefix("data: ") {
                    Some(text) => text,
                    None => continue,
                },
                false => &line,
            };
            *position += text.len() as u64 + 1;
            let said: Value = serde_json::from_str(text)?;
            if let Some(code) = context.output.replay(said) {
                return Ok(Some(Exit::of_code(code)));
            }
        }
        Ok(None)
    }

    async fn find_again(&self, session: &str, position: u64, context: &Context) -> anyhow::Result<Lines> {
        let since = Instant::now();
        let path = format!("/v1/sessions/{session}/events?from={position}");
        loop {
            tokio::time::sleep(LOST_PAUSE).await;
            let answer = match self.connect(context).await {
                Ok(connection) => connection.send("GET", &path, &self.token, None).await,
                Err(error) => Err(error),
            };
            match answer {
                Ok(answer) => return Ok(answer.events()),
                Err(error) if since.elapsed() > LOST_MAX || Failure::exit_of(&error) == Exit::Usage => {
                    let hint = format!("`pghydrant sessions` there tells how session {session} goes on");
                    return Err(Failure::new(Exit::Failed, format!("{error:#}")).hint(hint).into());
                }
                Err(_) => {}
            }
        }
    }
}
