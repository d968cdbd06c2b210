//! Mount servers and their certificates: the first one that a server shows is kept, as SSH keeps host keys; another one
//! later is refused.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use engine::io::durable;

use crate::exit::{Exit, Failure};
use engine::remote::Fingerprint;

/// `https://HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) host: String,
    pub(super) port: u16,
}

/// The control port unless the address names one.
const PORT: u16 = 7432;

impl Address {
    pub(super) fn parse(url: &str) -> Result<Self, String> {
        let refuse = || format!("\"{}\" is not a mount server such as https://backup1:{PORT}", url.escape_debug());
        let place = url.strip_prefix("https://").ok_or_else(refuse)?.trim_end_matches('/');
        let (host, port) = match place.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((host, rest)) => (host, rest.strip_prefix(':')),
            None => place.split_once(':').map_or((place, None), |(host, port)| (host, Some(port))),
        };
        let harmless = |letter: char| letter.is_ascii_alphanumeric() || ".-:_%".contains(letter);
        if host.is_empty() || !host.chars().all(harmless) {
            return Err(refuse());
        }
        let port = port.map_or(Ok(PORT), |port| port.parse().map_err(|_| refuse()))?;
        Ok(Self { host: host.to_owned(), port })
    }

    /// `host:port`, as it stands in the file and in messages.
    pub(super) fn name(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

/// What is known of one server.
#[derive(Debug)]
pub(super) struct Known {
    path: PathBuf,
    name: String,
    given: Option<Fingerprint>,
    kept: Option<Fingerprint>,
}

impl Known {
    /// Looks the server up in `<state>/known_servers`, unless the user gives the fingerprint.
    pub(super) fn of(state: &Path, address: &Address, given: Option<Fingerprint>) -> anyhow::Result<Self> {
        let path = state.join("known_servers");
        let name = address.name();
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(cause) if cause.kind() == ErrorKind::NotFound => String::new(),
            Err(cause) => return Err(engine::Error::io("read", &path, cause).into()),
        };
        let line = text.lines().find_map(|line| line.split_once(' ').filter(|(known, _)| *known == name));
        let kept = line.map(|(_, fingerprint)| fingerprint.trim().parse()).transpose();
        let kept = kept.map_err(|refusal| Failure::new(Exit::Usage, format!("{}: {refusal}", path.display())))?;
        Ok(Self { path, name, given, kept })
    }

    /// What the server must show; nothing where it is seen for the first time.
    pub(super) fn fingerprint(&self) -> Option<Fingerprint> {
        self.given.or(self.kept)
    }

    /// Keeps what a server has shown, if it was seen for the first time; what is to be told of that.
    pub(super) fn keep(&self, shown: Fingerprint) -> anyhow::Result<Option<String>> {
        if self.fingerprint().is_some() {
            return Ok(None);
        }
        let directory = self.path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(directory).map_err(|cause| engine::Error::io("create", directory, cause))?;
        let before = std::fs::read_to_string(&self.path).unwrap_or_default();
        if !before.lines().any(|line| line.split_once(' ').is_some_and(|(known, _)| known == self.name)) {
            let text = format!("{before}{} {shown}\n", self.name);
            durable::write_atomically(&self.path, text.as_bytes(), 0o600)?;
        }
        Ok(Some(format!(
            "{} shows {shown}, which is taken for its certificate from now on ({})",
            self.name,
            self.path.display()
        )))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_address_is_https_a_host_and_a_port() {
        let name = |url: &str| Address::parse(url).map(|address| address.name());
        assert_eq!(name("https://backup1"), Ok("backup1:7432".into()));
        assert_eq!(name("https://10.0.0.1:8443/"), Ok("10.0.0.1:8443".into()));
        assert_eq!(name("https://[fe80::1]:1"), Ok("[fe80::1]:1".into()));
        for wrong in ["", "http://backup1", "backup1:7432", "https://", "https://a b", "https://h:x", "https://h/p"] {
            assert!(name(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_first_certificate_of_a_server_is_kept() {
        let state = tempfile::tempdir().unwrap();
        let (one, other) = (Fingerprint::of(b"one"), Fingerprint::of(b"other"));
        let address = Address::parse("https://backup1").unwrap();
        let first = Known::of(state.path(), &address, None).unwrap();
        assert_eq!(first.fingerprint(), None);
        assert!(first.keep(one).unwrap().unwrap().contains(&one.to_string()));
        let known = Known::of(state.path(), &address, None).unwrap();
        assert_eq!((known.fingerprint(), known.keep(one).unwrap()), (Some(one), None));
        assert_eq!(Known::of(state.path(), &address, Some(other)).unwrap().fingerprint(), Some(other));
        let elsewhere = Address::parse("https://backup1:1").unwrap();
        assert_eq!(Known::of(state.path(), &elsewhere, None).unwrap().fingerprint(), None);
    }
}
