//! pgBackRest with its repository on another machine, over its own TLS server.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use anyhow::Context as _;

use crate::hosts::{Host, Server};
use crate::options::CodecName;
use crate::peers::{PGBACKREST_PROCESSES, PgBackRest};
use crate::world::World;

const CURVE: [&str; 4] = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"];
/// The certificate of who restores, by its name.
const CLIENT: &str = "bench-target";

/// A server of this machine, and the host that restores from it.
#[derive(Debug)]
pub(crate) struct Remote<'w> {
    world: &'w World,
    host: &'w Host<'w>,
    program: PathBuf,
    _server: Server,
}

impl<'w> Remote<'w> {
    /// The reason where it does not run here.
    pub(crate) fn start(world: &'w World, codec: CodecName, host: &'w Host<'w>) -> Result<Self, String> {
        let found = PgBackRest::find(world, codec)?;
        if world.find("openssl").is_none() {
            return Err("openssl is not installed".to_owned());
        }
        Self::serve(world, &found, host).map_err(|error| format!("failed: {error:#}"))
    }

    fn serve(world: &'w World, found: &PgBackRest<'w>, host: &'w Host<'w>) -> anyhow::Result<Self> {
        found.ensure_backup()?;
        certificates(world, &host.seen_as)?;
        let place = world.place.display();
        for kind in ["log", "lock", "spool"] {
            world.server_directory(&format!("pgbackrest-remote-{kind}"))?;
        }
        let own = found.configuration();
        let common = fs::read_to_string(&own).with_context(|| format!("cannot read {}", own.display()))?;
        let served = format!(
            "[global]\ntls-server-address={address}\ntls-server-ca-file={place}/tls/ca.crt\n\
             tls-server-cert-file={place}/tls/{address}.crt\ntls-server-key-file={place}/tls/{address}.key\n\
             tls-server-auth={CLIENT}=bench\n",
            address = host.seen_as,
        );
        let text = common.replacen("[global]\n", &served, 1);
        let configuration = world.path("pgbackrest-server.conf");
        fs::write(&configuration, text).with_context(|| format!("cannot write {}", configuration.display()))?;
        let text = format!(
            "[global]\nrepo1-host={}\nrepo1-host-type=tls\nrepo1-host-config={}\nrepo1-host-ca-file={place}/tls/ca.crt\n\
             repo1-host-cert-file={place}/tls/{CLIENT}.crt\nrepo1-host-key-file={place}/tls/{CLIENT}.key\n\
             process-max={PGBACKREST_PROCESSES}\nlog-path={place}/pgbackrest-remote-log\n\
             lock-path={place}/pgbackrest-remote-lock\nspool-path={place}/pgbackrest-remote-spool\n\
             log-level-console=warn\nlog-level-file=off\n\n[bench]\npg1-path={}\n",
            host.seen_as,
            configuration.display(),
            world.target().display(),
        );
        let remote = world.path("pgbackrest-remote.conf");
        fs::write(&remote, text).with_context(|| format!("cannot write {}", remote.display()))?;
        let mut command = world.as_server(&found.program);
        command.arg("--config").arg(&configuration).args(["--log-level-console=info", "server"]);
        let server = Server::start(world, "pgbackrest-server", &mut command, "server command begin")?;
        let remote = Self { world, host, program: found.program.clone(), _server: server };
        // Whether both understand each other, and by then it listens.
        remote.info()?;
        Ok(remote)
    }

    fn command(&self, words: &[&str]) -> std::process::Command {
        let mut command = self.host.as_server(&self.program);
        command.arg("--config").arg(self.world.path("pgbackrest-remote.conf")).arg("--stanza=bench").args(words);
        command
    }

    fn info(&self) -> anyhow::Result<()> {
        let said = self.world.run(&mut self.command(&["info"]))?;
        anyhow::ensure!(said.contains("full backup"), "pgBackRest sees no backup over TLS\n{said}");
        Ok(())
    }

    pub(crate) fn restore(&self) -> anyhow::Result<()> {
        let target = self.world.server_directory("target")?;
        fs::set_permissions(&target, fs::Permissions::from_mode(0o700))
            .with_context(|| format!("cannot close {}", target.display()))?;
        self.world.run(&mut self.command(&["--type=immediate", "restore"])).map(drop)
    }
}

/// An authority, and what it signs: the server, by its address, and the client.
fn certificates(world: &World, server: &str) -> anyhow::Result<()> {
    let place = world.server_directory("tls")?;
    let openssl = |words: &[&str]| {
        let mut command = world.as_server("openssl");
        world.run(command.current_dir(&place).args(words)).map(drop)
    };
    let own = ["-nodes", "-days", "2", "-subj", "/CN=pghydrant-bench", "-keyout", "ca.key", "-out", "ca.crt"];
    openssl(&[&["req", "-x509"], &CURVE[..], &own].concat())?;
    for name in [server, CLIENT] {
        let [key, request, certificate] = ["key", "csr", "crt"].map(|kind| format!("{name}.{kind}"));
        let subject = format!("/CN={name}");
        let asked = ["-nodes", "-subj", &subject, "-keyout", &key, "-out", &request];
        openssl(&[&["req", "-new"], &CURVE[..], &asked].concat())?;
        let signer = ["-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2"];
        openssl(&[&["x509", "-req", "-in", &request, "-out", &certificate], &signer[..]].concat())?;
        let key = place.join(key);
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600))
            .with_context(|| format!("cannot close {}", key.display()))?;
    }
    Ok(())
}
