//! A way for the blocks through SSH, for a target that cannot reach the data plane.
//!
//! `ssh -R` has the target listen on a port of its loopback, and leads what connects there to the data plane. TLS and
//! lease are inside as they are elsewhere, so it opens nothing to the target's other users. The tunnel is reopened, on the
//! same port, as often as it is lost: the target's readers know that port.
//!
//! Always true: no tunnel outlives this process. What ssh runs there ends with its stdin, which is ours.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::process::{Child, ChildStderr, ChildStdin};
use tokio::task::JoinHandle;

use super::target::{Ssh, Trouble, last_line, limited, unreachable};
use crate::exit::{Exit, Failure};

/// Says that the forwarding stands: it is asked for before the command is.
const COMMAND: &str = "echo pghydrant tunnel; exec cat > /dev/null";
const OPEN: &str = "pghydrant tunnel";
/// How long ssh may take for it.
const OPEN_MAX: Duration = Duration::from_secs(60);
/// What may be said before: greetings of login shells, and of ssh.
const SAID_BYTES_MAX: u64 = 64 << 10;
/// Between two attempts to open it again: at first, and at most.
const PAUSES: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(15)];

/// One, kept up until it is dropped.
#[derive(Debug)]
pub(super) struct Tunnel {
    port: u16,
    is_open: Arc<AtomicBool>,
    keeper: JoinHandle<()>,
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

impl Tunnel {
    /// Opens one to `to`, on a port that the target chooses.
    pub(super) async fn open(ssh: Ssh, to: SocketAddr) -> Result<Self, Trouble> {
        let opened = Opened::open(&ssh, to, 0).await?;
        Ok(Self::kept(ssh, to, opened.port, Some(opened)))
    }

    /// Opens one again that an earlier service had on this port, as soon as it can.
    pub(super) fn again(ssh: Ssh, to: SocketAddr, port: u16) -> Self {
        Self::kept(ssh, to, port, None)
    }

    fn kept(ssh: Ssh, to: SocketAddr, port: u16, opened: Option<Opened>) -> Self {
        let is_open = Arc::new(AtomicBool::new(opened.is_some()));
        let keeper = tokio::spawn(keep(ssh, to, port, opened, Arc::clone(&is_open)));
        Self { port, is_open, keeper }
    }

    /// Where the target finds the data plane, while the tunnel stands.
    pub(super) fn address(&self) -> Option<SocketAddr> {
        self.is_open.load(Ordering::Acquire).then(|| (Ipv4Addr::LOCALHOST, self.port).into())
    }
}

async fn keep(ssh: Ssh, to: SocketAddr, port: u16, mut opened: Option<Opened>, is_open: Arc<AtomicBool>) {
    let mut pause = PAUSES[0];
    loop {
        if let Some(opened) = opened.take() {
            is_open.store(true, Ordering::Release);
            opened.until_lost().await;
            is_open.store(false, Ordering::Release);
            pause = PAUSES[0];
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSES[1]);
        match Opened::open(&ssh, to, port).await {
            Ok(again) => opened = Some(again),
            // The target's side of the lost one may hold the port still.
            Err(trouble) => tracing::debug!("no tunnel to {}: {trouble:?}", ssh.target.host),
        }
    }
}

/// An ssh that forwards.
struct Opened {
    port: u16,
    child: Child,
    stderr: BufReader<ChildStderr>,
    _stdin: ChildStdin,
}

impl Opened {
    async fn open(ssh: &Ssh, to: SocketAddr, port: u16) -> Result<Self, Trouble> {
        let opened = tokio::time::timeout(OPEN_MAX, Self::start(ssh, to, port)).await;
        opened.unwrap_or_else(|_| Err(Trouble::Unreachable(format!("{} opens no tunnel in time", ssh.target.host))))
    }

    async fn start(ssh: &Ssh, to: SocketAddr, port: u16) -> Result<Self, Trouble> {
        let broken = |cause: std::io::Error| Trouble::Unreachable(format!("cannot run ssh: {cause}"));
        let mut command = ssh.tunnel((Ipv4Addr::LOCALHOST, port).into(), to, COMMAND);
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = child.map_err(broken)?;
        let (Some(stdin), Some(stdout), Some(stderr)) = (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            return Err(Trouble::Unreachable("ssh has no pipes".to_owned()));
        };
        if !says_open(BufReader::new(stdout.take(SAID_BYTES_MAX))).await {
            let _ = child.start_kill();
            return Err(refused(ssh, to, &String::from_utf8_lossy(&limited(Some(stderr)).await)));
        }
        let mut stderr = BufReader::new(stderr);
        let port = match port {
            0 => allocated(&mut stderr).await.ok_or_else(|| {
                let message = format!("{} does not tell the port of its tunnel", ssh.target.host);
                Trouble::Refused(Failure::new(Exit::Failed, message))
            })?,
            port => port,
        };
        Ok(Self { port, child, stderr, _stdin: stdin })
    }

    /// Whatever ssh says meanwhile is of connections that fail, which their readers find out themselves.
    async fn until_lost(mut self) {
        let _ = tokio::io::copy(&mut self.stderr, &mut tokio::io::sink()).await;
        let _ = self.child.wait().await;
    }
}

async fn says_open(stdout: impl tokio::io::AsyncBufRead + Unpin) -> bool {
    let mut lines = stdout.lines();
    while let Ok(Some(line)) = lines.next_line().await {
        if line == OPEN {
            return true;
        }
    }
    false
}

/// The port that ssh has told of by now.
async fn allocated(stderr: &mut (impl tokio::io::AsyncBufRead + Unpin)) -> Option<u16> {
    let mut lines = stderr.take(SAID_BYTES_MAX).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        if let Some((_, rest)) = line.split_once("Allocated port ") {
            return rest.split(' ').next()?.parse().ok();
        }
    }
    None
}

fn refused(ssh: &Ssh, to: SocketAddr, said: &str) -> Trouble {
    if !said.contains("forwarding failed") {
        return unreachable(&ssh.target, said);
    }
    let host = &ssh.target.host;
    let message =
        format!("{host} does not reach the mount server, and forwards no port: {}", last_line(said.as_bytes()));
    let hint = format!(
        "let it reach {to}, name an address that it reaches with serve --data-listen, or allow TCP forwarding in its sshd"
    );
    Trouble::Refused(Failure::new(Exit::Failed, message).hint(hint))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test]
    async fn the_port_is_read_from_what_ssh_says() {
        let said = "Warning: known\r\nAllocated port 40123 for remote forward to 127.0.0.1:7433\r\n";
        assert_eq!(allocated(&mut said.as_bytes()).await, Some(40123));
        assert_eq!(allocated(&mut "Connection closed\n".as_bytes()).await, None);
        assert!(
            says_open("Welcome!\npghydrant tunnel\n".as_bytes()).await && !says_open("Welcome!\n".as_bytes()).await
        );
    }
}
