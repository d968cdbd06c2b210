//! How a target is reached: `[user@]host[:port]` and the options of OpenSSH that a client may choose.
//!
//! The connection is made by the service, as its user. So a client may say which host, which user, and how long to wait;
//! options that run programs here, or that lower what the operator's configuration demands, are refused.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Where a restore goes, and how to get there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Target {
    /// `user@host`, or the host alone, without a port.
    pub(crate) host: String,
    pub(crate) port: Option<u16>,
    /// A key file on the mount server.
    pub(crate) identity: Option<PathBuf>,
    /// `K=V` of ssh_config(5).
    pub(crate) options: Vec<String>,
    /// The instance's owner is another user than the one that logs in.
    pub(crate) sudo: bool,
}

/// What a client may set. Not here: everything that names a command (ProxyCommand, LocalCommand, KnownHostsCommand,
/// Match, Include), a library (PKCS11Provider, SecurityKeyProvider), that turns host keys off, or that says where they are
/// looked up: they are all that proves who gets a lease.
const OPTIONS: &[&str] = &[
    "addressfamily",
    "bindaddress",
    "bindinterface",
    "casignaturealgorithms",
    "certificatefile",
    "ciphers",
    "compression",
    "connectionattempts",
    "connecttimeout",
    "hostkeyalgorithms",
    "hostname",
    "identitiesonly",
    "identityfile",
    "ipqos",
    "kexalgorithms",
    "loglevel",
    "macs",
    "port",
    "preferredauthentications",
    "proxyjump",
    "pubkeyacceptedalgorithms",
    "rekeylimit",
    "serveralivecountmax",
    "serveraliveinterval",
    "tcpkeepalive",
    "user",
];

impl Target {
    /// Reads what the user typed.
    pub(crate) fn parse(text: &str, identity: Option<&Path>, options: &[String], sudo: bool) -> Result<Self, String> {
        let refuse =
            |why: &str| Err(format!("\"{}\" is not a target such as postgres@db2:22: {why}", text.escape_debug()));
        let (user, place) = match text.rsplit_once('@') {
            Some((user, place)) => (Some(user), place),
            None => (None, text),
        };
        let (host, port) = match place.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((host, "")) => (host, None),
            Some((host, rest)) => match rest.strip_prefix(':') {
                Some(port) => (host, Some(port)),
                None => return refuse("what is behind ] is no port"),
            },
            None => match place.split_once(':') {
                Some((_, port)) if port.contains(':') => return refuse("an IPv6 address stands in [ ]"),
                Some((host, port)) => (host, Some(port)),
                None => (place, None),
            },
        };
        let port = match port.map(str::parse::<u16>) {
            Some(Ok(port)) if port > 0 => Some(port),
            Some(_) => return refuse("the port is no number from 1 to 65535"),
            None => None,
        };
        // What begins with a hyphen would be an option of ssh; what a shell could read has no place in a name.
        let is_name = |name: &str| {
            let harmless = |letter: char| letter.is_ascii_alphanumeric() || "._-%:".contains(letter);
            !name.is_empty() && !name.starts_with('-') && name.chars().all(harmless)
        };
        if !is_name(host) || !user.is_none_or(is_name) {
            return refuse("letters, digits, dots and hyphens make a name");
        }
        options.iter().try_for_each(|option| refuse_option(option))?;
        if identity.is_some_and(|file| !file.is_absolute()) {
            return Err("--identity names a file on the mount server: give its whole path".to_owned());
        }
        let host = user.map_or_else(|| host.to_owned(), |user| format!("{user}@{host}"));
        Ok(Self { host, port, identity: identity.map(Path::to_owned), options: options.to_vec(), sudo })
    }

    /// Arguments of `ssh` that run `command` there. Of an option that is given twice, ssh takes the first.
    pub(super) fn arguments(&self, command: &str) -> Vec<String> {
        self.with_options(&["ClearAllForwardings=yes"], &[], command)
    }

    /// Arguments of `ssh` that run `command` there, and lead what connects to `from` there to `to` here.
    pub(super) fn tunnel_arguments(&self, from: SocketAddr, to: SocketAddr, command: &str) -> Vec<String> {
        self.with_options(OF_A_TUNNEL, &["-R".to_owned(), format!("{from}:{to}")], command)
    }

    fn with_options(&self, first: &[&str], further: &[String], command: &str) -> Vec<String> {
        let mut words: Vec<String> = vec!["-T".to_owned()];
        let mut option = |text: &str| words.extend(["-o".to_owned(), text.to_owned()]);
        first.iter().for_each(|first| option(first));
        self.options.iter().for_each(|given| option(given));
        OURS.iter().for_each(|ours| option(ours));
        words.extend_from_slice(further);
        if let Some(identity) = &self.identity {
            words.extend(["-i".to_owned(), identity.to_string_lossy().into_owned()]);
        }
        if let Some(port) = self.port {
            words.extend(["-p".to_owned(), port.to_string()]);
        }
        words.extend(["--".to_owned(), self.host.clone(), command.to_owned()]);
        words
    }
}

/// Nobody is there to type a password, and a dead connection is found out within fifteen seconds.
const OURS: &[&str] = &[
    "BatchMode=yes",
    "ConnectTimeout=15",
    "ServerAliveInterval=5",
    "ServerAliveCountMax=3",
    "ForwardAgent=no",
    "ForwardX11=no",
    "PermitLocalCommand=no",
];

/// A connection of its own, which ends if it cannot forward, and says which port it got.
const OF_A_TUNNEL: &[&str] = &["ExitOnForwardFailure=yes", "LogLevel=INFO", "ControlMaster=no", "ControlPath=none"];

/// Name and value. A value has nothing that a shell, or ssh's own quoting, would read: ssh makes commands of some
/// (ProxyJump with HostName).
fn refuse_option(text: &str) -> Result<(), String> {
    let (name, value) = text.split_once(['=', ' ', '\t']).unwrap_or((text, ""));
    let harmless = |letter: char| letter.is_ascii_alphanumeric() || "._-+:,@/".contains(letter);
    let is_plain = !value.is_empty() && !value.starts_with('-') && value.chars().all(harmless);
    match is_plain && OPTIONS.contains(&name.to_ascii_lowercase().as_str()) {
        true => Ok(()),
        false => Err(format!(
            "--ssh-option {}: a client may not set this; write it into the SSH configuration of the mount server's user",
            text.escape_debug()
        )),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn parse(text: &str) -> Result<(String, Option<u16>), String> {
        Target::parse(text, None, &[], false).map(|target| (target.host, target.port))
    }

    #[test]
    fn a_target_is_a_user_a_host_and_a_port() {
        assert_eq!(parse("db2"), Ok(("db2".into(), None)));
        assert_eq!(parse("postgres@db2.example.org:2222"), Ok(("postgres@db2.example.org".into(), Some(2222))));
        assert_eq!(parse("root@[fe80::1%eth0]:22"), Ok(("root@fe80::1%eth0".into(), Some(22))));
        assert_eq!(parse("[::1]"), Ok(("::1".into(), None)));
        let wrong =
            ["", "@db2", "-oProxyCommand=x", "a@-x", "db2:0", "db2:70000", "::1", "[::1]x", "db2;id", "a b", "$(id)"];
        for wrong in wrong {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_client_sets_no_option_that_runs_something_on_the_mount_server() {
        let with = |option: &str| Target::parse("db2", None, &[option.to_owned()], false);
        for allowed in ["Port=22", "ProxyJump=pg@gate:22,other", "IdentityFile=/srv/key", "connecttimeout 5"] {
            with(allowed).unwrap();
        }
        for refused in [
            "ProxyCommand=id",
            "proxycommand id",
            "LocalCommand=id",
            "KnownHostsCommand=/x",
            "Include=/x",
            "Match exec=x",
        ] {
            assert!(with(refused).is_err(), "{refused}");
        }
        for refused in [
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/srv/known",
            "HostKeyAlias=other",
            "HostName=\"x'$(id)'\"",
            "HostName=x'y",
            "HostName=$(id)",
            "HostName=`id`",
            "ProxyJump=a;id",
            "ProxyJump=-oProxyCommand=id",
            "Port=",
            "Port",
        ] {
            assert!(with(refused).is_err(), "{refused}");
        }
        assert!(with("Port=22\nProxyCommand=id").is_err());
        assert!(Target::parse("db2", Some(Path::new("key")), &[], false).is_err());
    }

    #[test]
    fn the_clients_options_come_first_and_the_host_after_all_options() {
        let target = Target::parse("pg@db2:2222", Some(Path::new("/k")), &["ConnectTimeout=3".into()], true).unwrap();
        let words = target.arguments("true");
        let at = |word: &str| words.iter().position(|each| each == word).unwrap();
        assert!(at("ConnectTimeout=3") < at("ConnectTimeout=15") && at("BatchMode=yes") < at("--"));
        assert_eq!(words[at("--") + 1..], ["pg@db2", "true"]);
        assert!(at("ClearAllForwardings=yes") < at("--"));
        let tunnel = target.tunnel_arguments("127.0.0.1:0".parse().unwrap(), "[::1]:7433".parse().unwrap(), "cat");
        assert!(tunnel.windows(2).any(|pair| pair == ["-R", "127.0.0.1:0:[::1]:7433"]), "{tunnel:?}");
        assert!(!tunnel.contains(&"ClearAllForwardings=yes".to_owned()));
        assert_eq!((&words[at("-p") + 1], &words[at("-i") + 1]), (&"2222".to_owned(), &"/k".to_owned()));
    }
}
