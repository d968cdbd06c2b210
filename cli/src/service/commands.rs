//! Command lines that come from elsewhere: what of them is carried out here, what on a target, and what is refused.
//!
//! They are read by the parser that reads our own, so an option means the same on both sides; options that name files or
//! other machines of the service's own are refused, and so is every verb that is not for afar.

use clap::Parser as _;
use engine::units::{ClusterName, SessionId};

use super::address::Target;
use super::sessions::Ordered;
use crate::agent::Order;
use crate::arguments::{Cli, Verb};
use crate::exit::{Exit, Failure};
use crate::words::without;

/// What a command line asks for.
#[derive(Debug)]
pub(super) enum Asked {
    /// Of the repository: a process of ours answers, with these words.
    Repository(Vec<String>),
    /// What sessions there are; finished ones too.
    Sessions(bool),
    Restore(Box<Ordered>),
    Order(SessionId, Order),
}

/// Options of `restore` that say where the target is.
const WHERE_WITH_VALUE: &[&str] = &["--target", "--identity", "--ssh-option", "--rate-limit"];
const WHERE_FLAGS: &[&str] = &["--sudo"];

/// Reads the words behind `pghydrant`; `by` is whose token came with them.
pub(super) fn read(words: &[String], by: &str) -> anyhow::Result<Asked> {
    let usage = |message: String| anyhow::Error::from(Failure::new(Exit::Usage, message));
    let line = std::iter::once("pghydrant".to_owned()).chain(words.iter().cloned());
    let cli = Cli::try_parse_from(line).map_err(|refusal| usage(refusal.render().to_string().trim_end().to_owned()))?;
    let global = &cli.global;
    let named = global.config.is_some() || global.state.is_some() || global.server.server.is_some() || global.relay;
    if named {
        return Err(usage("--config, --state and --server are not for the mount server".to_owned()));
    }
    let repository = match &cli.verb {
        Verb::List(arguments) => Some(&arguments.repository),
        Verb::Show(arguments) => Some(&arguments.repository),
        Verb::Verify(arguments) => Some(&arguments.repository),
        Verb::Restore(arguments) => Some(&arguments.repository),
        _ => None,
    };
    if repository.is_some_and(|option| option.repo.is_some()) {
        return Err(usage("the mount server has one repository: leave --repo out".to_owned()));
    }
    Ok(match &cli.verb {
        Verb::List(_) | Verb::Show(_) | Verb::Verify(_) => Asked::Repository(words.to_vec()),
        Verb::Sessions(arguments) => Asked::Sessions(arguments.all),
        Verb::Retry(arguments) => {
            let order = if arguments.skip_check { Order::SkipCheck } else { Order::Restore };
            Asked::Order(arguments.session.id.clone(), order)
        }
        Verb::Cancel(arguments) => Asked::Order(arguments.id.clone(), Order::Cancel),
        Verb::Promote(arguments) => Asked::Order(arguments.id.clone(), Order::Promote),
        Verb::Retarget(arguments) => {
            let options =
                behind_verb(words, "retarget").into_iter().filter(|word| word.as_str() != arguments.id.as_str());
            Asked::Order(arguments.id.clone(), Order::Retarget(options.collect()))
        }
        Verb::Restore(arguments) => {
            let Some(target) = &arguments.remote.target else {
                return Err(usage("say where the restore goes: --target [USER@]HOST[:PORT]".to_owned()));
            };
            // A plan looks, and ends: what it is allowed to read ends with it.
            if arguments.no_start && !arguments.plan {
                let why = "--no-start leaves a recovery that needs the mount server for as long as nobody starts it: \
                           run the restore on the target itself, or let it start";
                return Err(usage(why.to_owned()));
            }
            let Some(cluster) = arguments.cluster.cluster.clone() else {
                return Err(usage("no cluster is named: give --cluster NAME".to_owned()));
            };
            if !arguments.to.is_absolute() {
                return Err(usage("--to names a directory of the target: give its whole path".to_owned()));
            }
            let remote = &arguments.remote;
            let target = Target::parse(target, remote.identity.as_deref(), &remote.ssh_options, remote.sudo);
            let restore = without(&behind_verb(words, "restore"), WHERE_WITH_VALUE, WHERE_FLAGS);
            Asked::Restore(Box::new(Ordered {
                cluster: ClusterName::clone(&cluster),
                target: target.map_err(usage)?,
                restore,
                data: arguments.to.clone(),
                rate_limit: remote.rate_limit,
                by: by.to_owned(),
            }))
        }
        _ => return Err(usage("this command works on the machine where it is given".to_owned())),
    })
}

/// Everything but the verb itself: global options may stand before it.
fn behind_verb(words: &[String], verb: &str) -> Vec<String> {
    let at = words.iter().position(|word| word == verb);
    words.iter().enumerate().filter(|(index, _)| Some(*index) != at).map(|(_, word)| word.clone()).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn asked(line: &str) -> anyhow::Result<Asked> {
        read(&line.split(' ').map(str::to_owned).collect::<Vec<_>>(), "dba")
    }

    #[test]
    fn a_restore_is_taken_apart_into_where_and_what() {
        let line = "restore --cluster main --target pg@db2:2222 --sudo --ssh-option Port=22 --identity /k --to /srv/pg \
                    --rate-limit 20M --port 5433 --target-immediate";
        let Asked::Restore(ordered) = asked(line).unwrap() else { panic!("{line}") };
        assert_eq!(ordered.restore.join(" "), "--cluster main --to /srv/pg --port 5433 --target-immediate");
        assert_eq!(
            (ordered.target.host.as_str(), ordered.target.port, ordered.target.sudo),
            ("pg@db2", Some(2222), true)
        );
        assert_eq!(ordered.rate_limit, Some(20 << 20));
        assert_eq!((ordered.by.as_str(), ordered.cluster.as_str()), ("dba", "main"));
    }

    #[test]
    fn what_is_not_for_afar_is_refused() {
        for line in [
            "restore --cluster main --to /srv/pg",
            "restore --cluster main --target db2 --to srv/pg",
            "restore --cluster main --target db2 --to /srv/pg --no-start",
            "restore --cluster main --target db2 --to /srv/pg --repo /other",
            "restore --cluster main --target -oProxyCommand=id --to /srv/pg",
            "restore --cluster main --target db2 --ssh-option ProxyCommand=id --to /srv/pg",
            "restore --cluster main --target db2 --to /srv/pg --rate-limit 10k",
            "list --repo /other",
            "list --config /etc/shadow",
            "sessions --state /var/lib/other",
            "init --repo /x",
            "agent end /etc",
            "serve --issue-token x",
            "wal fetch --repo /x --cluster y 000000010000000000000001 /etc/x",
            "doctor",
            "list --no-such-option",
        ] {
            let refused = asked(line).err().unwrap_or_else(|| panic!("{line}"));
            assert_eq!(Failure::exit_of(&refused), Exit::Usage, "{line}: {refused:#}");
        }
    }

    #[test]
    fn verbs_on_sessions_become_orders() {
        let id = "20261122T081500Z-3f9a1c";
        let order = |line: &str| match asked(&line.replace("ID", id)).unwrap() {
            Asked::Order(session, order) if session.as_str() == id => order,
            other => panic!("{line}: {other:?}"),
        };
        assert_eq!(order("retry ID"), Order::Restore);
        assert_eq!(order("retry ID --skip-check --json"), Order::SkipCheck);
        assert_eq!(order("cancel ID"), Order::Cancel);
        assert_eq!(order("promote ID"), Order::Promote);
        let retarget = Order::Retarget(["--target-lsn", "0/5000000"].map(str::to_owned).to_vec());
        assert_eq!(order("retarget ID --target-lsn 0/5000000"), retarget);
        assert!(matches!(asked("sessions --all").unwrap(), Asked::Sessions(true)));
        assert!(matches!(asked("show --cluster main").unwrap(), Asked::Repository(_)));
    }
}
