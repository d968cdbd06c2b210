//! A target of a mount server: a network namespace with an sshd of its own, on this machine's file system.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::process::{Pid, Signal};

use super::process::wait_until;
use super::tools::find_program;
use super::{Context, Pghydrant, Repository, Result, Run, Running, Scratch};

/// A host. Gone with everything that runs in it when dropped.
pub struct TargetHost {
    namespace: String,
    /// This machine's end of the cable between the two.
    pub cable: String,
    pub address: String,
    /// This machine, as the host sees it.
    pub seen_as: String,
    identity: PathBuf,
    known: PathBuf,
    configuration: PathBuf,
    /// What is run in its mount namespace before sshd.
    first: String,
    sshd: Option<Running>,
}

/// Nobody serves this mount any more.
fn is_dead(place: &str) -> bool {
    fs::metadata(place).is_err_and(|cause| cause.raw_os_error() == Some(libc::ENOTCONN))
}

/// Hosts of this process so far.
static HOSTS: AtomicU32 = AtomicU32::new(0);

impl TargetHost {
    /// Needs `requires!(Root, Tool("ip", "iproute2"), Tool("sshd", "openssh-server"))`.
    pub fn new(scratch: &Scratch) -> Result<Self> {
        Self::prepared(scratch, "")
    }

    /// One whose /dev/fuse cannot be opened.
    pub fn without_fuse(scratch: &Scratch) -> Result<Self> {
        let socket = scratch.join("no-fuse");
        // A socket is what even root cannot open.
        drop(std::os::unix::net::UnixListener::bind(&socket)?);
        Self::prepared(scratch, &format!("mount --bind '{}' /dev/fuse", socket.display()))
    }

    /// `first` is run in the host's own mount namespace.
    fn prepared(scratch: &Scratch, first: &str) -> Result<Self> {
        let number = HOSTS.fetch_add(1, Ordering::Relaxed);
        // Names of 15 characters and networks that no other run of the tests has.
        let (run, number) = (std::process::id() % 60_000, number % 60);
        let name = format!("pgh{run}n{number}");
        let network = format!("10.{}.{}.{}", 128 + run / 500, run % 250, 4 * number);
        let at = |offset: u32| {
            format!("{}.{}", network.rsplit_once('.').map_or("", |(network, _)| network), 4 * number + offset)
        };
        let host = Self {
            namespace: name.clone(),
            cable: format!("{name}a"),
            address: at(2),
            seen_as: at(1),
            identity: scratch.join("target.key"),
            known: scratch.join("target.known"),
            configuration: PathBuf::new(),
            first: first.to_owned(),
            sshd: None,
        };
        let (cable, far) = (&host.cable, format!("{name}b"));
        ip(&["netns", "add", &name])?;
        ip(&["link", "add", cable, "type", "veth", "peer", "name", &far])?;
        ip(&["link", "set", &far, "netns", &name])?;
        ip(&["addr", "add", &format!("{}/30", host.seen_as), "dev", cable])?;
        ip(&["link", "set", cable, "up"])?;
        ip(&["-n", &name, "addr", "add", &format!("{}/30", host.address), "dev", &far])?;
        ip(&["-n", &name, "link", "set", &far, "up"])?;
        ip(&["-n", &name, "link", "set", "lo", "up"])?;
        host.with_sshd(scratch)
    }

    fn with_sshd(mut self, scratch: &Scratch) -> Result<Self> {
        let key = |path: &PathBuf| {
            Run::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(path).succeed().map(drop)
        };
        let host_key = scratch.join("host.key");
        key(&host_key)?;
        key(&self.identity)?;
        let public = fs::read_to_string(host_key.with_extension("key.pub"))?;
        fs::write(&self.known, format!("{} {public}", self.address))?;
        let configuration = format!(
            "ListenAddress {}\nHostKey {}\nAuthorizedKeysFile {}\nPasswordAuthentication no\nStrictModes no\nUsePAM no\n\
             PermitRootLogin yes\nPidFile none\n",
            self.address,
            host_key.display(),
            self.identity.with_extension("key.pub").display(),
        );
        self.configuration = scratch.join("sshd.conf");
        fs::write(&self.configuration, configuration)?;
        fs::create_dir_all("/run/sshd")?;
        self.start_sshd()?;
        Ok(self)
    }

    fn start_sshd(&mut self) -> Result<()> {
        let (file, first) = (&self.configuration, &self.first);
        let sshd = find_program("sshd").context("no sshd")?;
        let script = format!("set -e\n{first}\nexec \"$0\" \"$@\"");
        let run = Run::new("ip").args(["netns", "exec", &self.namespace, "sh", "-c", &script]).arg(sshd);
        let run = run.args(["-D", "-e", "-f"]).arg(file);
        let mut sshd = run.time_limit(Duration::from_secs(900)).start()?;
        sshd.wait_for_output("a server that listens", |said| said.contains("Server listening"))?;
        self.sshd = Some(sshd);
        Ok(())
    }

    /// Its processes.
    pub fn pids(&self) -> Result<Vec<Pid>> {
        let listed = Run::new("ip").args(["netns", "pids", &self.namespace]).succeed()?.stdout;
        Ok(listed.lines().filter_map(|line| Pid::from_raw(line.trim().parse().ok()?)).collect())
    }

    /// Those of them that run our binary.
    pub fn our_pids(&self) -> Result<Vec<Pid>> {
        let is_ours = |pid: &Pid| {
            let program = fs::read_link(format!("/proc/{}/exe", pid.as_raw_nonzero()));
            program.is_ok_and(|program| program.to_string_lossy().contains("/pghydrant/bin/"))
        };
        Ok(self.pids()?.into_iter().filter(is_ours).collect())
    }

    /// As a power cut and a start: every process and every mount is gone. What was written stays.
    pub fn reboot(&mut self) -> Result<()> {
        wait_until("a host without processes", Duration::from_secs(60), || {
            let pids = self.pids()?;
            for pid in &pids {
                // It may have ended by now.
                let _ = rustix::process::kill_process(*pid, Signal::KILL);
            }
            Ok(pids.is_empty())
        })?;
        self.sshd = None;
        for line in fs::read_to_string("/proc/self/mountinfo")?.lines() {
            let place = line.split(' ').nth(4).unwrap_or_default();
            if place.starts_with("/run/media/pghydrant/") && is_dead(place) {
                Run::new("umount").args(["-l", place]).succeed()?;
            }
        }
        self.start_sshd()
    }

    /// Options of `restore` that lead there.
    pub fn options(&self) -> Vec<String> {
        let identity = self.identity.display().to_string();
        let target = format!("root@{}", self.address);
        ["--target", &target, "--identity", &identity, "--ssh-option", "ConnectTimeout=10"].map(str::to_owned).to_vec()
    }

    /// Pulls the cable out.
    pub fn cut(&self) -> Result<()> {
        ip(&["link", "set", &self.cable, "down"])
    }

    /// Puts it back.
    pub fn mend(&self) -> Result<()> {
        ip(&["link", "set", &self.cable, "up"])
    }

    /// Lets so many megabits a second through, to the host.
    pub fn slow(&self, megabits: u32) -> Result<()> {
        let rate = format!("{megabits}mbit");
        let run = Run::new("tc").args(["qdisc", "replace", "dev", &self.cable, "root", "tbf", "rate", &rate]);
        run.args(["burst", "64kb", "latency", "200ms"]).succeed().map(drop)
    }

    /// As fast as it was.
    pub fn speed_up(&self) -> Result<()> {
        Run::new("tc").args(["qdisc", "del", "dev", &self.cable, "root"]).succeed().map(drop)
    }
}

impl Drop for TargetHost {
    fn drop(&mut self) {
        self.sshd = None;
        let _ = Run::new("ip").args(["link", "del", &self.cable]).finish();
        let _ = Run::new("ip").args(["netns", "del", &self.namespace]).finish();
    }
}

fn ip(words: &[&str]) -> Result<()> {
    Run::new("ip").args(words).succeed().map(drop)
}

/// A mount server of this machine, as root, and a client of it.
pub struct MountServer {
    program: Pghydrant,
    options: Vec<String>,
    listen: String,
    pub token: PathBuf,
    pub fingerprint: String,
    running: Option<Running>,
}

impl MountServer {
    /// Serves `repository` to `host`; `options` are further ones of `serve`.
    pub fn start(scratch: &Scratch, repository: &Repository, host: &TargetHost, options: &[&str]) -> Result<Self> {
        let program = repository.pghydrant.as_user(&super::OsUser::current());
        let state = scratch.join("server-state");
        let listen = format!("127.0.0.1:{}", super::cluster::free_port()?);
        let data = format!("{}:{}", host.seen_as, super::cluster::free_port()?);
        let text = |path: &std::path::Path| path.display().to_string();
        let repository = repository.shown();
        let ssh = scratch.join("ssh.conf");
        fs::write(&ssh, format!("UserKnownHostsFile {}\n", host.known.display()))?;
        let ssh = text(&ssh);
        let own = ["serve", "--ssh-config", &ssh, "--repo", &repository, "--state", &text(&state), "--listen", &listen];
        let where_data = if options.contains(&"--data-listen") { vec![] } else { vec!["--data-listen", data.as_str()] };
        let options = own.iter().chain(&where_data).chain(options).map(|&word| word.to_owned()).collect();
        let issued = program.succeed(["serve", "--state", &text(&state), "--issue-token", "tests"])?;
        let token = scratch.join("server-token");
        fs::write(&token, issued.stdout)?;
        let mut server = Self { program, options, listen, token, fingerprint: String::new(), running: None };
        server.start_again()?;
        Ok(server)
    }

    /// Starts it again, after [`Self::kill`].
    pub fn start_again(&mut self) -> Result<()> {
        let run = self.program.command(&self.options).time_limit(Duration::from_secs(900));
        let mut running = run.start()?;
        running.wait_for_output("the services", |said| said.contains("serving on"))?;
        let said = running.stdout_so_far()?;
        self.fingerprint = said.trim().rsplit_once(' ').context("no fingerprint")?.1.to_owned();
        self.running = Some(running);
        Ok(())
    }

    /// `kill -9`.
    pub fn kill(&mut self) -> Result<()> {
        self.running.take().context("it does not run")?.kill().map(drop)
    }

    /// What the kernel says of its process: a field of `status` or `io`, in its own unit.
    pub fn figure(&self, file: &str, field: &str) -> Result<u64> {
        let pid = self.running.as_ref().context("it does not run")?.pid();
        let text = fs::read_to_string(format!("/proc/{pid}/{file}"))?;
        let line = text.lines().find_map(|line| line.strip_prefix(field)).context("no such field")?;
        let digits: String = line.chars().filter(char::is_ascii_digit).collect();
        Ok(digits.parse()?)
    }

    /// One figure of its metrics.
    pub fn metric(&self, name: &str) -> Result<f64> {
        let token = format!("Authorization: Bearer {}", fs::read_to_string(&self.token)?.trim());
        let run = Run::new("curl").args(["--silent", "--insecure", "--header", &token]);
        let said = run.arg(format!("{}/metrics", self.url())).succeed()?.stdout;
        let line = said.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Ok(line.with_context(|| format!("no {name} in {said}"))?.parse()?)
    }

    /// The processes that hold its tunnels, those that nobody waits for any more too.
    pub fn tunnels(&self, data_address: &str) -> Result<Vec<Pid>> {
        let forward = format!(":{data_address}\0");
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc")? {
            let Some(pid) = entry?.file_name().to_str().and_then(|name| Pid::from_raw(name.parse().ok()?)) else {
                continue;
            };
            // It may have ended by now.
            let words = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
            let words = String::from_utf8_lossy(&words);
            if words.starts_with("ssh\0") && words.contains("\0-R\0") && words.contains(&forward) {
                found.push(pid);
            }
        }
        Ok(found)
    }

    /// Where targets fetch blocks.
    pub fn data_address(&self) -> Result<String> {
        let said = self.running.as_ref().context("it does not run")?.stdout_so_far()?;
        let address = said.split("blocks on ").nth(1).and_then(|rest| rest.split(',').next());
        Ok(address.context("no address")?.to_owned())
    }

    /// What it said on stderr.
    pub fn said(&self) -> Result<String> {
        self.running.as_ref().context("it does not run")?.stderr_so_far()
    }

    /// What it serves on.
    pub fn url(&self) -> String {
        format!("https://{}", self.listen)
    }

    /// A command that it carries out.
    pub fn command<A: AsRef<str>>(&self, words: impl IntoIterator<Item = A>) -> Run {
        let words: Vec<String> = words.into_iter().map(|word| word.as_ref().to_owned()).collect();
        let token = self.token.display().to_string();
        let ours = ["--server", &self.url(), "--token-file", &token].map(str::to_owned);
        self.program.command([words, ours.to_vec()].concat()).time_limit(Duration::from_secs(300))
    }

    /// `restore --cluster main --to DIRECTORY` on `host`.
    pub fn restore(&self, host: &TargetHost, to: &std::path::Path, options: &[&str]) -> Run {
        let to = to.display().to_string();
        let port = super::cluster::free_port().map_or_else(|_| "5499".to_owned(), |port| port.to_string());
        let own = ["restore", "--cluster", "main", "--to", &to, "--port", &port];
        let words = own.iter().chain(options).map(|&word| word.to_owned());
        self.command(words.chain(host.options()))
    }

    /// Its sessions, finished ones too.
    pub fn sessions(&self) -> Result<Vec<serde_json::Value>> {
        let listed = self.command(["sessions", "--all", "--json"]).succeed()?.json()?;
        Ok(listed.get("sessions").and_then(serde_json::Value::as_array).context("no sessions")?.clone())
    }

    /// Bytes of blocks that it has sent since it was started.
    pub fn bytes_sent(&self) -> Result<u64> {
        let token = fs::read_to_string(&self.token)?;
        let header = format!("Authorization: Bearer {}", token.trim());
        let run = Run::new("curl").args(["-sSk", "-m", "60", "-H", &header, &format!("{}/metrics", self.url())]);
        let said = run.succeed()?.stdout;
        let line = said.lines().find_map(|line| line.strip_prefix("pghydrant_data_bytes_total "));
        Ok(line.context("no such figure")?.parse::<f64>()? as u64)
    }

    /// Waits until its one session stands as `state` says.
    pub fn wait_for(&self, state: &str) -> Result<serde_json::Value> {
        let mut found = serde_json::Value::Null;
        wait_until(&format!("a session that is {state}"), Duration::from_secs(180), || {
            found = self.sessions()?.pop().context("no session")?;
            Ok(found.get("state").and_then(serde_json::Value::as_str) == Some(state))
        })?;
        Ok(found)
    }
}
