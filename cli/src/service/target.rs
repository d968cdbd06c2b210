//! The target over SSH: our binary there, and the agent that it is.
//!
//! ```text
//! look      one shell script: architecture, user, place of the cache, whether our binary is there already
//! install   the binary of this very process, through the same channel, compared by its SHA-256 before it is run
//! begin, follow, stop, end     the verbs of the agent
//! ```
//!
//! Nothing is believed of the target but that it is the host whose key the SSH client knows.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, Command};

use super::address::Target;
use crate::agent::{REACHED, Request, UNREACHED};
use crate::exit::{Exit, Failure};

/// What an answer of a script may come to.
const ANSWER_BYTES_MAX: u64 = 64 << 10;
/// The exit status of the SSH client itself, where it could not connect, log in or stay connected.
const SSH_FAILED: i32 = 255;

/// Longer than any command of ours takes, an interrupted restore's end and the binary's way over a slow line included.
const COMMAND_MAX: Duration = Duration::from_secs(300);
/// How long what ssh has still to say is waited for.
const LAST_WORDS_MAX: Duration = Duration::from_secs(2);

/// Our own binary: what targets get; and how ssh is told to reach them.
#[derive(Clone, Debug)]
pub(super) struct Program {
    path: PathBuf,
    sha256: String,
    /// The operator's, in place of the user's own.
    ssh_config: Option<PathBuf>,
}

/// A target, and the configuration by which ssh reaches it.
#[derive(Clone, Debug)]
pub(super) struct Ssh {
    pub(super) target: Target,
    config: Option<PathBuf>,
}

impl Program {
    /// The binary that this process runs.
    pub(super) fn own(ssh_config: Option<PathBuf>) -> anyhow::Result<Self> {
        // The file as it was started, also where it has been replaced since.
        let path = PathBuf::from("/proc/self/exe");
        let binary = std::fs::read(&path).context("cannot read our own binary")?;
        let sha256 = Sha256::digest(&binary).iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { path, sha256, ssh_config })
    }

    /// How `target` is reached.
    pub(super) fn ssh(&self, target: &Target) -> Ssh {
        Ssh { target: target.clone(), config: self.ssh_config.clone() }
    }
}

/// Why something on the target did not happen.
#[derive(Debug)]
pub(super) enum Trouble {
    /// Nothing is known of the other side: it cannot be reached, or the connection broke.
    Unreachable(String),
    /// It was refused, or cannot work as it is: the next attempt would end the same way.
    Refused(Failure),
}

/// What `look` found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// Where our things go: binary and sessions.
    cache: String,
    /// How the target sees us: the address that its side of the connection came from.
    pub(super) seen_as: Option<String>,
    installed: bool,
}

/// A target whose binary is in place.
#[derive(Clone, Debug)]
pub(super) struct Agent {
    ssh: Ssh,
    program: String,
    directory: String,
    pub(super) seen_as: Option<String>,
}

impl Agent {
    /// Connects, and puts the binary there where it is missing.
    pub(super) async fn reach(target: &Target, program: &Program, session: &str) -> Result<Self, Trouble> {
        let ssh = program.ssh(target);
        let found = look(&ssh, program, session).await?;
        let directory = format!("{}/bin/{}", found.cache, &program.sha256);
        let binary = format!("{directory}/pghydrant");
        if !found.installed {
            install(&ssh, program, &directory).await?;
        }
        let runs = run(&ssh, &format!("{} --version", quoted(&binary)), None).await?;
        if !String::from_utf8_lossy(&runs).contains(env!("CARGO_PKG_VERSION")) {
            let message = format!("{} cannot run our binary: {}", target.host, last_line(&runs));
            return Err(Trouble::Refused(Failure::new(Exit::Failed, message)));
        }
        let directory = format!("{}/sessions/{session}", found.cache);
        Ok(Self { ssh, program: binary, directory, seen_as: found.seen_as })
    }

    /// Whether the mount service that an access file tells of is reached from there.
    pub(super) async fn reaches(&self, access: &serde_json::Value) -> Result<bool, Trouble> {
        let answer = run(&self.ssh, &self.verb("probe"), Some(format!("{access}\n").as_bytes())).await?;
        let said = last_line(&answer);
        match said.as_str() {
            REACHED => Ok(true),
            UNREACHED => Ok(false),
            _ => {
                let message = format!("{} does not say whether it reaches us: {said}", self.ssh.target.host);
                Err(Trouble::Refused(Failure::new(Exit::Failed, message)))
            }
        }
    }

    /// Starts a verb there; it goes on without us. Where in the events what it says begins.
    pub(super) async fn begin(&self, request: &Request) -> Result<u64, Trouble> {
        let mut line = serde_json::to_vec(request)
            .map_err(|cause| Trouble::Refused(Failure::new(Exit::Failed, cause.to_string())))?;
        line.push(b'\n');
        let answer = run(&self.ssh, &self.command("begin"), Some(&line)).await?;
        begun(&answer).ok_or_else(|| {
            let message = format!("{} does not say that it has begun: {}", self.ssh.target.host, last_line(&answer));
            Trouble::Refused(Failure::new(Exit::Failed, message))
        })
    }

    /// The process that tells what is said there, from byte `from` on.
    pub(super) fn follow(&self, from: u64) -> anyhow::Result<Child> {
        let mut command = self.ssh.command(&format!("{} --from {from}", self.command("follow")));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().context("cannot start ssh")
    }

    /// Interrupts what runs there, and waits for its end.
    pub(super) async fn stop(&self) -> Result<(), Trouble> {
        run(&self.ssh, &self.command("stop"), None).await.map(drop)
    }

    /// Takes everything of ours away.
    pub(super) async fn end(&self) -> Result<(), Trouble> {
        run(&self.ssh, &self.command("end"), None).await.map(drop)
    }

    fn command(&self, verb: &str) -> String {
        format!("{} {}", self.verb(verb), quoted(&self.directory))
    }

    fn verb(&self, verb: &str) -> String {
        let sudo = if self.ssh.target.sudo { "sudo -n " } else { "" };
        format!("{sudo}{} agent {verb}", quoted(&self.program))
    }
}

/// The first thing that is run there.
const LOOK: &str = r#"
if [ "$(id -u)" = 0 ]; then cache=/var/cache/pghydrant; else cache="${XDG_CACHE_HOME:-$HOME/.cache}/pghydrant"; fi
# There before the binary is: whoever ends the last session takes the binary away.
umask 022; mkdir -p "$cache/sessions/$session" && chmod 711 "$cache/sessions/$session"
echo "system=$(uname -s) $(uname -m)"
echo "cache=$cache"
echo "seen=${SSH_CONNECTION%% *}"
if [ -f "$cache/bin/$program/pghydrant" ]; then echo "sha256=$(sha256sum < "$cache/bin/$program/pghydrant")"; fi
"#;

async fn look(ssh: &Ssh, program: &Program, session: &str) -> Result<Found, Trouble> {
    // Through `env`, since sudo drops what it does not know.
    let shell = match ssh.target.sudo {
        true => "sudo -n env SSH_CONNECTION=\"$SSH_CONNECTION\" sh -s",
        false => "sh -s",
    };
    let script = format!("program={}\nsession={}\n{LOOK}", program.sha256, quoted(session));
    let answer = run(ssh, shell, Some(script.as_bytes())).await?;
    let refuse = |message: String| Trouble::Refused(Failure::new(Exit::Failed, message));
    let found = Found::parse(&String::from_utf8_lossy(&answer), &program.sha256);
    let (system, found) = found.ok_or_else(|| {
        refuse(format!(
            "{} answers something else than a shell script of ours: {}",
            ssh.target.host,
            last_line(&answer)
        ))
    })?;
    let own = format!("Linux {}", std::env::consts::ARCH);
    if system != own {
        return Err(refuse(format!("{} is {system}, and our binary is for {own}", ssh.target.host)));
    }
    Ok(found)
}

impl Found {
    fn parse(answer: &str, sha256: &str) -> Option<(String, Self)> {
        let value = |name: &str| answer.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        let cache = value("cache")?.to_owned();
        let installed = value("sha256").is_some_and(|found| found.split(' ').next() == Some(sha256));
        let seen_as = value("seen").filter(|address| address.parse::<std::net::IpAddr>().is_ok()).map(str::to_owned);
        let whole = cache.starts_with('/') && !cache.contains(char::is_control);
        whole.then(|| (value("system").unwrap_or_default().to_owned(), Self { cache, seen_as, installed }))
    }
}

async fn install(ssh: &Ssh, program: &Program, directory: &str) -> Result<(), Trouble> {
    let binary = tokio::fs::read(&program.path).await;
    let binary = binary.map_err(|cause| Trouble::Unreachable(format!("cannot read our own binary: {cause}")))?;
    // Everybody may run it: the instance's own user calls it as restore_command.
    let script = format!(
        "umask 022 && mkdir -p {directory} && cd {directory} && cat > pghydrant.$$ && \
         [ \"$(sha256sum < pghydrant.$$ | cut -d' ' -f1)\" = {sha256} ] && chmod 755 pghydrant.$$ && \
         mv -f pghydrant.$$ pghydrant && echo installed",
        directory = quoted(directory),
        sha256 = program.sha256,
    );
    let sudo = if ssh.target.sudo { "sudo -n " } else { "" };
    let answer = run(ssh, &format!("{sudo}sh -c {}", quoted(&script)), Some(&binary)).await?;
    match answer.ends_with(b"installed\n") {
        true => Ok(()),
        false => Err(Trouble::Refused(Failure::new(
            Exit::Failed,
            format!("cannot put our binary into {directory} on {}: {}", ssh.target.host, last_line(&answer)),
        ))),
    }
}

/// Runs a command there; its stdout if it ended well.
async fn run(ssh: &Ssh, command: &str, input: Option<&[u8]>) -> Result<Vec<u8>, Trouble> {
    let target = &ssh.target;
    let answered = tokio::time::timeout(COMMAND_MAX, answer_of(ssh.command(command), input)).await;
    let answered = answered.map_err(|_| Trouble::Unreachable(format!("{} does not answer", target.host)))?;
    let broken = |cause: std::io::Error| Trouble::Unreachable(format!("cannot run ssh: {cause}"));
    let (status, answer, said) = answered.map_err(broken)?;
    match status.code() {
        Some(0) => Ok(answer),
        Some(SSH_FAILED) | None => Err(unreachable(target, &String::from_utf8_lossy(&said))),
        Some(_) => {
            // Ours say it as an event, others on stderr.
            let said = told(&answer).unwrap_or_else(|| last_line(&said));
            Err(Trouble::Refused(Failure::new(Exit::Failed, format!("{}: {said}", target.host))))
        }
    }
}

/// What a command says on stdout and on stderr, as far as an answer of ours goes. Who says more is hung up on.
async fn answer_of(mut ssh: Command, input: Option<&[u8]>) -> std::io::Result<(ExitStatus, Vec<u8>, Vec<u8>)> {
    ssh.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
    let mut child = ssh.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let feed = async {
        if let (Some(mut stdin), Some(input)) = (stdin, input) {
            // Who does not read it to its end says why on stderr.
            let _ = stdin.write_all(input).await;
        }
    };
    let ((), answer, said, status) = tokio::join!(feed, limited(stdout), limited(stderr), child.wait());
    Ok((status?, answer, said))
}

/// Its first bytes. Closed behind them: whoever goes on writing dies of it.
pub(super) async fn limited(pipe: Option<impl AsyncRead + Unpin>) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(pipe) = pipe {
        // What came before an error counts as well.
        let _ = pipe.take(ANSWER_BYTES_MAX).read_to_end(&mut bytes).await;
    }
    bytes
}

/// Why ssh, whose output has ended, has ended itself.
pub(super) async fn last_words(mut child: Child) -> String {
    let _ = child.start_kill();
    let said = tokio::time::timeout(LAST_WORDS_MAX, limited(child.stderr.take())).await.unwrap_or_default();
    last_line(&said)
}

/// What the SSH client could not do: some of it no attempt will change.
pub(super) fn unreachable(target: &Target, said: &str) -> Trouble {
    let last = last_line(said.as_bytes());
    let message = format!("cannot reach {}: {last}", target.host);
    let hint = match () {
        () if said.contains("Host key verification failed") || said.contains("IDENTIFICATION HAS CHANGED") => {
            "compare the host's key, and put it into known_hosts of the mount server's user"
        }
        () if said.contains("Permission denied") => {
            "give the mount server's user a key that the target accepts, or name one with --identity"
        }
        () if said.contains("Could not resolve hostname") || said.contains("Bad configuration option") => {
            "give the target as the mount server knows it"
        }
        () => return Trouble::Unreachable(message),
    };
    Trouble::Refused(Failure::new(Exit::Failed, message).hint(hint))
}

fn told(answer: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(answer);
    let event: serde_json::Value = serde_json::from_str(text.lines().last()?).ok()?;
    Some(event.get("message")?.as_str()?.to_owned())
}

/// What `agent begin` answers.
fn begun(answer: &[u8]) -> Option<u64> {
    let text = String::from_utf8_lossy(answer);
    text.lines().rev().find_map(|line| line.strip_prefix(crate::agent::BEGUN)?.trim().parse().ok())
}

impl Ssh {
    fn command(&self, command: &str) -> Command {
        self.with(self.target.arguments(command))
    }

    /// Runs `command`, and leads what connects to `from` there to `to` here.
    pub(super) fn tunnel(&self, from: SocketAddr, to: SocketAddr, command: &str) -> Command {
        self.with(self.target.tunnel_arguments(from, to, command))
    }

    fn with(&self, arguments: Vec<String>) -> Command {
        let mut ssh = Command::new("ssh");
        if let Some(config) = &self.config {
            ssh.arg("-F").arg(config);
        }
        ssh.args(arguments).kill_on_drop(true).env("LC_ALL", "C");
        ssh
    }
}

/// One word for a POSIX shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// The last line that says something.
pub(super) fn last_line(said: &[u8]) -> String {
    let text = String::from_utf8_lossy(said);
    let line = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing");
    line.trim().chars().take(500).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_a_target_answers_is_read_line_by_line() {
        let answer = "Welcome!\nsystem=Linux x86_64\ncache=/home/a b/.cache/pghydrant\nseen=10.0.0.1\nsha256=abc  -\n";
        let (system, found) = Found::parse(answer, "abc").unwrap();
        assert_eq!(system, "Linux x86_64");
        let expected =
            Found { cache: "/home/a b/.cache/pghydrant".into(), seen_as: Some("10.0.0.1".into()), installed: true };
        assert_eq!(found, expected);
        assert!(!Found::parse(answer, "abd").unwrap().1.installed);
        assert_eq!(Found::parse("cache=/c\nseen=nobody", "x").unwrap().1.seen_as, None);
        assert!(
            Found::parse("cache=relative", "x").is_none() && Found::parse("This account is closed.", "x").is_none()
        );
    }

    #[test]
    fn what_another_attempt_cannot_change_is_told_apart() {
        let target = Target::parse("db2", None, &[], false).unwrap();
        let is_final = |said: &str| matches!(unreachable(&target, said), Trouble::Refused(_));
        assert!(is_final("@@@\nHost key verification failed.\r\n"));
        assert!(is_final("pg@db2: Permission denied (publickey).\n"));
        assert!(!is_final("ssh: connect to host db2 port 22: Connection refused\n"));
        assert!(!is_final("Timeout, server db2 not responding.\n"));
    }

    #[test]
    fn where_a_run_begins_is_told_behind_whatever_a_login_prints() {
        assert_eq!(begun(b"Welcome to db2\nbegun 0\n"), Some(0));
        assert_eq!(begun(b"begun 1234\n"), Some(1234));
        assert!(begun(b"").is_none() && begun(b"begun\n").is_none() && begun(b"begun -1\n").is_none());
    }

    #[test]
    fn a_quoted_word_is_one_word() {
        for word in ["plain", "with space", "it's", "$(id)", "a\"b\\c"] {
            let printed =
                std::process::Command::new("sh").arg("-c").arg(format!("printf %s {}", quoted(word))).output();
            assert_eq!(String::from_utf8(printed.unwrap().stdout).unwrap(), word);
        }
    }
}
