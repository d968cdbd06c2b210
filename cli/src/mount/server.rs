//! The process that serves a mount.
//!
//! It ends in one of three ways, and leaves no mount behind in any: somebody unmounts it; a signal asks it to; or its
//! restore is gone, which it learns from the end of its stdin, and if it was stopped goes on for. In the last two cases a mount that is still in use is
//! detached, and its readers get errors once this process has ended.

use std::io::{BufReader, Read};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use anyhow::Context as _;
use engine::repository::Repository;
use fusefs::backup_fs::{BackupFs, View};
use fusefs::mounting::MountOptions;
use fusefs::session::{OwnMount, Session};
use fusefs::tree::Owner;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::protocol::{Answer, Request, receive, send};
use crate::exit::{Exit, Failure};

/// How long readers have to close their files after the mount was detached.
const LAST_READERS_WAIT: Duration = Duration::from_secs(2);

/// Why the server ends.
#[derive(Debug)]
enum End {
    /// The mount is gone, and the last reader with it.
    Unmounted(engine::Result<()>),
    /// It was asked to end.
    Asked(&'static str),
}

/// `fuse-server`: the request comes on stdin, the answer goes to stdout, and the log to stderr.
pub(super) fn run() -> anyhow::Result<Exit> {
    leave_the_terminal();
    let mut requests = BufReader::new(std::io::stdin());
    let request: Request = match receive(&mut requests).context("cannot read the request")? {
        Some(request) => request,
        None => return Err(Failure::new(Exit::Usage, "fuse-server is started by mount and restore").into()),
    };
    let (ends, ended) = channel();
    let started = start(&request, &ends);
    let answer = match &started {
        Ok(_) => Answer::Mounted,
        Err(error) => Answer::failed(error),
    };
    if request.with_parent {
        go_on_when_the_parent_dies();
    }
    // Nobody there to hear it: then stdin has ended too, and a server that belongs to its parent ends with it.
    let heard = send(std::io::stdout(), &answer);
    let own = started?;
    if request.with_parent {
        watch_parent(requests, ends)?;
    } else if heard.is_err() {
        own.unmount()?;
    }
    wait(&own, &ended)?;
    Ok(Exit::Done)
}

/// `mount --foreground`.
pub(super) fn serve_in_foreground(request: &Request) -> anyhow::Result<()> {
    let (ends, ended) = channel();
    let own = start(request, &ends)?;
    wait(&own, &ended)
}

/// A terminal that closes, or a Ctrl-C for the restore, must not take the mount away under its readers.
fn leave_the_terminal() {
    // Refused only to a leader of a group, who has no need for it.
    let _ = rustix::process::setsid();
    // Not to keep anybody from unmounting where we were started; it fails only where there is no root directory.
    let _ = std::env::set_current_dir("/");
}

/// Mounts, and watches for signals and for the end of the mount.
fn start(request: &Request, ends: &Sender<End>) -> anyhow::Result<OwnMount> {
    watch_signals(ends.clone())?;
    let backup = Repository::open(&request.repository)?.cluster(&request.cluster)?.backup(&request.backup)?;
    let view = View {
        owner: request.owner.map(|(uid, gid)| Owner { uid, gid }),
        token: request.token.clone(),
        memory_bytes: usize::try_from(request.memory_bytes).unwrap_or(usize::MAX),
    };
    let options = MountOptions {
        mountpoint: request.mountpoint.clone(),
        source: format!("pghydrant:{}/{}", request.cluster, request.backup),
        allow_other: request.allow_other,
    };
    let session = Session::start(BackupFs::new(&backup, view)?, &options)?;
    let own = session.own().clone();
    let ends = ends.clone();
    // Whoever waited may be gone: then this process ends anyway.
    thread("wait", move || drop(ends.send(End::Unmounted(session.wait()))))?;
    Ok(own)
}

fn wait(own: &OwnMount, ended: &Receiver<End>) -> anyhow::Result<()> {
    match ended.recv().context("the server lost its threads")? {
        End::Unmounted(outcome) => Ok(outcome?),
        End::Asked(why) => {
            tracing::info!("unmounting {}: {why}", own.mountpoint().display());
            own.unmount()?;
            // Readers that still have files open get errors when this process ends.
            let _ = ended.recv_timeout(LAST_READERS_WAIT);
            Ok(())
        }
    }
}

fn watch_signals(ends: Sender<End>) -> anyhow::Result<()> {
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP]).context("cannot watch signals")?;
    thread("signals", move || {
        if signals.forever().next().is_some() {
            let _ = ends.send(End::Asked("a signal asked for it"));
        }
    })
}

/// The parent keeps the other end of our stdin as long as it lives and says nothing more.
fn watch_parent(mut stdin: impl Read + Send + 'static, ends: Sender<End>) -> anyhow::Result<()> {
    thread("parent", move || {
        let mut byte = [0];
        while stdin.read(&mut byte).is_ok_and(|bytes| bytes > 0) {}
        let _ = ends.send(End::Asked("the restore that it served has ended"));
    })
}

/// A restore that is killed while its server is stopped could not end: a thread of it that waits for the server cannot be
/// killed, and keeps the session locked. So its death wakes the server, which then sees the end of its stdin.
fn go_on_when_the_parent_dies() {
    if let Err(cause) = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::CONT)) {
        tracing::debug!("the end of the restore will not wake a server that is stopped: {cause}");
    }
}

fn thread(name: &str, body: impl FnOnce() + Send + 'static) -> anyhow::Result<()> {
    std::thread::Builder::new().name(name.to_owned()).spawn(body).context("cannot start a thread")?;
    Ok(())
}
