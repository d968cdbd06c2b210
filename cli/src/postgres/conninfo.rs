//! Where a server is and who we are there, from what libpq's users write: `host=/run/postgresql user=postgres`.
//!
//! Keyword strings and URIs, the `PG*` variables as defaults, and the password from the string, `PGPASSWORD` or a
//! password file. TLS is not built in: what demands it is refused, so nobody takes a plain connection for a safe one.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use tokio_postgres::config::{Host, SslMode};

use super::owner::Owner;

const PORT_DEFAULT: u16 = 5432;
/// Where packages and the sources put the server's socket.
const SOCKET_DIRECTORIES: [&str; 3] = ["/run/postgresql", "/var/run/postgresql", "/tmp"];
const CONNECT_TIMEOUT_DEFAULT: Duration = Duration::from_secs(30);
/// What libpq knows and a connection without TLS, Kerberos and services can do without.
const IGNORED: [&str; 16] = [
    "fallback_application_name",
    "client_encoding",
    "sslcert",
    "sslkey",
    "sslpassword",
    "sslrootcert",
    "sslcrl",
    "sslcrldir",
    "sslsni",
    "sslcompression",
    "ssl_min_protocol_version",
    "ssl_max_protocol_version",
    "gssencmode",
    "krbsrvname",
    "gsslib",
    "requirepeer",
];

/// A server's address with the user, the database and the password.
#[derive(Clone, Debug)]
pub(crate) struct Conninfo {
    config: tokio_postgres::Config,
}

/// Everything outside the string that a connection may depend on.
pub(crate) trait Surroundings {
    /// An environment variable.
    fn variable(&self, name: &str) -> Option<String>;
    /// Our user's name.
    fn user(&self) -> Result<String>;
    /// A password file's text, if there is one that only its owner can read.
    fn password_file(&self, path: &Path) -> Option<String>;
    /// Whether a server's socket exists.
    fn socket_exists(&self, directory: &str, port: u16) -> bool;
}

/// The machine itself.
#[derive(Debug)]
pub(crate) struct Machine;

impl Surroundings for Machine {
    fn variable(&self, name: &str) -> Option<String> {
        std::env::var(name).ok().filter(|value| !value.is_empty())
    }

    fn user(&self) -> Result<String> {
        Ok(Owner::current()?.name)
    }

    fn password_file(&self, path: &Path) -> Option<String> {
        let metadata = std::fs::metadata(path).ok().filter(|metadata| metadata.is_file())?;
        if metadata.mode() & 0o077 != 0 {
            tracing::warn!(
                "password file {} is readable by others and is not used; mode 0600 is right",
                path.display()
            );
            return None;
        }
        std::fs::read_to_string(path).ok()
    }

    fn socket_exists(&self, directory: &str, port: u16) -> bool {
        Path::new(directory).join(format!(".s.PGSQL.{port}")).exists()
    }
}

impl Conninfo {
    /// A connection string (or a database's name, or nothing) with defaults from this machine.
    pub(crate) fn resolve(text: Option<&str>) -> Result<Self> {
        Self::resolve_in(text.unwrap_or_default(), &Machine)
    }

    /// A server on this machine, by its socket.
    pub(crate) fn local(socket_directory: &Path, port: u16, user: &str, database: &str) -> Self {
        let mut config = tokio_postgres::Config::new();
        config.host_path(socket_directory).port(port).user(user).dbname(database);
        config.ssl_mode(SslMode::Disable).connect_timeout(CONNECT_TIMEOUT_DEFAULT).application_name("pghydrant");
        // From the first statement on: one that lifts a short limit would be ended by it itself.
        config.options("-c statement_timeout=0");
        Self { config }
    }

    /// The same server and user, in another database.
    pub(crate) fn in_database(&self, database: &str) -> Self {
        let mut config = self.config.clone();
        config.dbname(database);
        Self { config }
    }

    /// See [`Conninfo::resolve`].
    pub(crate) fn resolve_in(text: &str, surroundings: &dyn Surroundings) -> Result<Self> {
        let Text { mut config, password_file, says_sslmode } = parse(text.trim())?;
        let variable = |name: &str| surroundings.variable(name);
        // libpq would take the server's address from there.
        if variable("PGSERVICE").is_some() {
            bail!("PGSERVICE is set, and connection services are not supported: unset it and write the parameters out");
        }
        if variable("PGHOSTADDR").is_some() && config.get_hostaddrs().is_empty() {
            bail!("PGHOSTADDR is set, which is not supported: unset it and write hostaddr=ADDRESS");
        }
        if config.get_ports().is_empty() {
            let port = match variable("PGPORT") {
                Some(port) => port.parse().with_context(|| format!("PGPORT is \"{port}\", which is no port"))?,
                None => PORT_DEFAULT,
            };
            config.port(port);
        }
        if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
            let port = config.get_ports().first().copied().unwrap_or(PORT_DEFAULT);
            let socket = || SOCKET_DIRECTORIES.into_iter().find(|place| surroundings.socket_exists(place, port));
            let host = variable("PGHOST").unwrap_or_else(|| socket().unwrap_or(SOCKET_DIRECTORIES[0]).to_owned());
            config.host(host);
        }
        let demands = |mode: String| mode == "require" || mode.starts_with("verify");
        let demanded = if says_sslmode {
            matches!(config.get_ssl_mode(), SslMode::Require)
        } else {
            variable("PGSSLMODE").is_some_and(demands) && !is_socket(&config)
        };
        if demanded {
            bail!(
                "the connection demands TLS, which is not supported yet: connect through a socket or sslmode=disable"
            );
        }
        config.ssl_mode(SslMode::Disable);
        if config.get_user().is_none() {
            let user = variable("PGUSER").map_or_else(|| surroundings.user(), Ok)?;
            config.user(user);
        }
        if config.get_dbname().is_none() {
            config.dbname(variable("PGDATABASE").unwrap_or_else(|| "postgres".to_owned()));
        }
        if config.get_application_name().is_none() {
            config.application_name("pghydrant");
        }
        if config.get_connect_timeout().is_none() {
            config.connect_timeout(CONNECT_TIMEOUT_DEFAULT);
        }
        let mut resolved = Self { config };
        resolved.find_password(password_file, surroundings);
        Ok(resolved)
    }

    fn find_password(&mut self, password_file: Option<PathBuf>, surroundings: &dyn Surroundings) {
        if self.config.get_password().is_some() {
            return;
        }
        if let Some(password) = surroundings.variable("PGPASSWORD") {
            self.config.password(password);
            return;
        }
        let home = || surroundings.variable("HOME").map(|home| PathBuf::from(home).join(".pgpass"));
        let path = password_file.or_else(|| surroundings.variable("PGPASSFILE").map(PathBuf::from)).or_else(home);
        let Some(text) = path.and_then(|path| surroundings.password_file(&path)) else { return };
        let wanted = [
            self.password_file_host(),
            self.port().to_string(),
            self.config.get_dbname().unwrap_or_default().to_owned(),
            self.user().to_owned(),
        ];
        if let Some(password) = password_in(&text, &wanted) {
            self.config.password(password);
        }
    }

    /// The host as a password file names it: a default socket directory is `localhost`.
    fn password_file_host(&self) -> String {
        let host = self.host();
        if SOCKET_DIRECTORIES.contains(&host.as_str()) { "localhost".to_owned() } else { host }
    }

    /// The first host, or the directory of its socket.
    pub(crate) fn host(&self) -> String {
        match (self.config.get_hosts().first(), self.config.get_hostaddrs().first()) {
            (Some(Host::Tcp(host)), _) => host.clone(),
            (Some(Host::Unix(path)), _) => path.display().to_string(),
            (None, Some(address)) => address.to_string(),
            (None, None) => String::new(),
        }
    }

    /// The first port.
    pub(crate) fn port(&self) -> u16 {
        self.config.get_ports().first().copied().unwrap_or(PORT_DEFAULT)
    }

    /// The user's name.
    pub(crate) fn user(&self) -> &str {
        self.config.get_user().unwrap_or_default()
    }

    /// For the connection itself.
    pub(super) fn config(&self) -> &tokio_postgres::Config {
        &self.config
    }
}

impl std::fmt::Display for Conninfo {
    /// Without the password.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let database = self.config.get_dbname().unwrap_or_default();
        write!(f, "host={} port={} user={} dbname={database}", self.host(), self.port(), self.user())
    }
}

/// Whether no part of the connection goes over a network; libpq has no TLS there, whatever is demanded by default.
fn is_socket(config: &tokio_postgres::Config) -> bool {
    config.get_hostaddrs().is_empty() && config.get_hosts().iter().all(|host| matches!(host, Host::Unix(_)))
}

struct Text {
    config: tokio_postgres::Config,
    password_file: Option<PathBuf>,
    /// Else `PGSSLMODE` does.
    says_sslmode: bool,
}

fn parse(text: &str) -> Result<Text> {
    if text.starts_with("postgresql://") || text.starts_with("postgres://") {
        // The text may hold a password: it is not repeated.
        let config = text.parse().context("the connection URI is not understood")?;
        let says_sslmode = text.split_once('?').is_some_and(|(_, parameters)| parameters.contains("sslmode="));
        return Ok(Text { config, password_file: None, says_sslmode });
    }
    let mut kept = String::new();
    let (mut password_file, mut says_sslmode) = (None, false);
    if !text.is_empty() && !text.contains('=') {
        kept = format!("dbname={}", quote(text));
    } else {
        for (keyword, value) in keywords(text)? {
            match keyword.as_str() {
                "passfile" => password_file = Some(PathBuf::from(value)),
                "service" => bail!("connection services (\"service\") are not supported: write the parameters out"),
                "sslmode" => {
                    let mode = match value.as_str() {
                        "disable" | "allow" => "disable",
                        "prefer" => "prefer",
                        "require" | "verify-ca" | "verify-full" => "require",
                        other => bail!("sslmode is \"{}\", which libpq does not know", other.escape_debug()),
                    };
                    says_sslmode = true;
                    kept.push_str(&format!("sslmode={mode} "));
                }
                ignored if IGNORED.contains(&ignored) => {}
                _ if value.is_empty() => {} // libpq: as if it were not given
                _ => kept.push_str(&format!("{keyword}={} ", quote(&value))),
            }
        }
    }
    let config = kept.parse().map_err(|error: tokio_postgres::Error| {
        let cause = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
        anyhow::anyhow!("the connection string is not understood: {cause}")
    })?;
    Ok(Text { config, password_file, says_sslmode })
}

/// `keyword = value` pairs by libpq's rules: spaces around `=`, single quotes, backslash before any character.
fn keywords(text: &str) -> Result<Vec<(String, String)>> {
    let mut pairs = Vec::new();
    let mut letters = text.chars().peekable();
    loop {
        while letters.next_if(|letter| letter.is_whitespace()).is_some() {}
        let mut keyword = String::new();
        while let Some(letter) = letters.next_if(|letter| *letter != '=' && !letter.is_whitespace()) {
            keyword.push(letter);
        }
        if keyword.is_empty() && letters.peek().is_none() {
            return Ok(pairs);
        }
        while letters.next_if(|letter| letter.is_whitespace()).is_some() {}
        if letters.next() != Some('=') || keyword.is_empty() {
            bail!("the connection string is not understood: \"{}\" is no keyword=value", keyword.escape_debug());
        }
        while letters.next_if(|letter| letter.is_whitespace()).is_some() {}
        let quoted = letters.next_if_eq(&'\'').is_some();
        let mut value = String::new();
        loop {
            match letters.next() {
                Some('\'') if quoted => break,
                Some('\\') => value.extend(letters.next()),
                Some(letter) if !quoted && letter.is_whitespace() => break,
                Some(letter) => value.push(letter),
                None if quoted => bail!("the connection string is not understood: a quote is not closed"),
                None => break,
            }
        }
        pairs.push((keyword, value));
    }
}

fn quote(value: &str) -> String {
    format!("'{}'", value.replace('\\', r"\\").replace('\'', r"\'"))
}

/// The password of the first line that matches: `host:port:database:user:password`, `*` for any, backslash before
/// `:` and `\`.
fn password_in(text: &str, wanted: &[String; 4]) -> Option<String> {
    text.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
        let mut fields = vec![String::new()];
        let mut letters = line.chars();
        while let Some(letter) = letters.next() {
            // A colon after the fourth belongs to the password.
            let in_password = fields.len() == 5;
            match (letter, fields.last_mut()?) {
                ('\\', field) => field.extend(letters.next()),
                (':', _) if !in_password => fields.push(String::new()),
                (letter, field) => field.push(letter),
            }
        }
        let [host, port, database, user, password] = <[String; 5]>::try_from(fields).ok()?;
        let matches =
            [host, port, database, user].iter().zip(wanted).all(|(field, wanted)| field == "*" || field == wanted);
        matches.then_some(password)
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    struct Fake {
        variables: Vec<(&'static str, &'static str)>,
        passwords: &'static str,
    }

    impl Surroundings for Fake {
        fn variable(&self, name: &str) -> Option<String> {
            self.variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        }

        fn user(&self) -> Result<String> {
            Ok("me".to_owned())
        }

        fn password_file(&self, _: &Path) -> Option<String> {
            Some(self.passwords.to_owned())
        }

        fn socket_exists(&self, directory: &str, port: u16) -> bool {
            directory == "/tmp" && port == 5433
        }
    }

    const BARE: Fake = Fake { variables: Vec::new(), passwords: "" };

    #[test]
    fn what_is_given_wins_over_variables_and_defaults() {
        let fake = Fake { variables: vec![("PGPORT", "5433"), ("PGUSER", "admin")], passwords: "" };
        let found = Conninfo::resolve_in("", &fake).unwrap();
        assert_eq!(found.to_string(), "host=/tmp port=5433 user=admin dbname=postgres");
        let found = Conninfo::resolve_in("host=db port=6000 user='o\\'neil' dbname = x", &fake).unwrap();
        assert_eq!(found.to_string(), "host=db port=6000 user=o'neil dbname=x");
        assert_eq!(Conninfo::resolve_in("sales", &BARE).unwrap().config.get_dbname(), Some("sales"));
        let uri = Conninfo::resolve_in("postgresql://bob:secret@db:6000/x", &BARE).unwrap();
        assert_eq!(uri.to_string(), "host=db port=6000 user=bob dbname=x");
    }

    #[test]
    fn tls_is_refused_and_never_silently_left_out() {
        for text in
            ["sslmode=require", "host=db sslmode=verify-full sslrootcert=x", "postgresql://db/x?sslmode=require"]
        {
            assert!(Conninfo::resolve_in(text, &BARE).unwrap_err().to_string().contains("TLS"), "{text}");
        }
        assert!(Conninfo::resolve_in("sslmode=prefer", &BARE).is_ok());
        let demanding = Fake { variables: vec![("PGSSLMODE", "verify-full")], passwords: "" };
        for text in ["host=db", "hostaddr=10.0.0.1", "postgresql://db/x"] {
            assert!(Conninfo::resolve_in(text, &demanding).unwrap_err().to_string().contains("TLS"), "{text}");
        }
        for text in ["", "host=/run/postgresql", "host=db sslmode=disable", "postgresql://db/x?sslmode=prefer"] {
            assert!(Conninfo::resolve_in(text, &demanding).is_ok(), "{text}");
        }
    }

    #[test]
    fn variables_that_would_lead_psql_elsewhere_are_refused() {
        for name in ["PGSERVICE", "PGHOSTADDR"] {
            let fake = Fake { variables: vec![(name, "10.0.0.1")], passwords: "" };
            assert!(Conninfo::resolve_in("host=db", &fake).unwrap_err().to_string().contains(name), "{name}");
        }
        let fake = Fake { variables: vec![("PGHOSTADDR", "10.0.0.1")], passwords: "" };
        assert!(Conninfo::resolve_in("hostaddr=10.0.0.2", &fake).is_ok());
    }

    #[test]
    fn nonsense_is_refused_without_repeating_a_password() {
        for text in ["host=a password='x", "user", "foo=bar", "=x", "a b=c", "port=x password=secret"] {
            match Conninfo::resolve_in(text, &BARE) {
                Ok(found) => assert_eq!((text, found.config.get_dbname()), ("user", Some("user"))),
                Err(error) => assert!(!format!("{error:#}").contains("secret")),
            }
        }
    }

    #[test]
    fn the_password_comes_from_the_first_line_that_matches() {
        let fake =
            Fake { variables: vec![("HOME", "/h")], passwords: "# c\nother:*:*:*:no\n*:*:*:m\\:e:a:b\\:c\n*:*:*:*:z" };
        let found = Conninfo::resolve_in("host=db user=m:e", &fake).unwrap();
        assert_eq!(found.config.get_password(), Some(&b"a:b:c"[..]));
        let local = Fake { variables: vec![("HOME", "/h")], passwords: "localhost:5432:*:*:here" };
        let found = Conninfo::resolve_in("", &local).unwrap();
        assert_eq!(found.config.get_password(), Some(&b"here"[..]));
    }
}
