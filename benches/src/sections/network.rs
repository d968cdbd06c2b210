//! Restores on another machine, at the other end of a pair of virtual network devices: the data plane alone, then the
//! whole restore beside the same restore on one machine and beside other tools over the same link.
//!
//! Restores of ours end with the running server, promoted at the end of the backup, here and there. Other tools only copy.

use engine::codec::Compression;
use pghydrant_benches::data_plane::{FILE_BYTES, Service, files_of, made, read, through};

use crate::cluster;
use crate::compare::same_tables;
use crate::contest::{Contestant, Outcome, hold};
use crate::hosts::Host;
use crate::options::Section;
use crate::ours::{MountServer, Repository};
use crate::peers::peer;
use crate::pgbackrest_tls::Remote;
use crate::processes::own_cpu_seconds;
use crate::report::{Kind, Report, Work};
use crate::world::{World, remove};

/// The protections, by the names of their series.
pub(crate) const PROTECTIONS: [&str; 2] = ["plain", "TLS"];
/// The series of peers that the bars name.
pub(crate) const RSYNC: &str = "rsync -a over SSH";
pub(crate) const PGBACKREST: &str = "pgBackRest over TLS";
const SCP: &str = "scp -r";
const TOOLS: [&str; 6] = ["ip", "mount", "ssh", "ssh-keygen", "sshd", "runuser"];

/// Files of the data plane's own backup: a GiB, or little where the suite is only tried.
const FILES: usize = 32;
const FILES_OF_A_TRIAL: usize = 2;
/// How often one run reads the backup, so that it takes a second.
const PASSES: usize = 4;
const THREADS: usize = 2;

pub(crate) fn run(world: &World, report: &mut Report) -> anyhow::Result<()> {
    if let Some(why) = missing(world) {
        report.leave_out(Section::Network, "all", Kind::Ours, why);
        return Ok(());
    }
    for (name, compression) in [("lz4", Compression::Lz4), ("none", Compression::None)] {
        data_plane(world, report, name, compression)?;
    }
    let host = match Host::new(world) {
        Ok(host) => host,
        Err(error) => {
            world.check_interrupt()?;
            report.leave_out(Section::Network, "restores", Kind::Ours, format!("no other host here: {error:#}"));
            return Ok(());
        }
    };
    restores(world, report, &host)
}

fn missing(world: &World) -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("network namespaces need root".to_owned());
    }
    TOOLS.iter().find(|tool| world.find(tool).is_none()).map(|tool| format!("{tool} is not installed"))
}

/// The names of a data plane's series.
pub(crate) fn plane_of(protection: &str, codec: &str) -> String {
    format!("data plane, {protection} {codec}")
}

/// Client and server in this process, over loopback.
fn data_plane(world: &World, report: &mut Report, codec: &str, compression: Compression) -> anyhow::Result<()> {
    let root = world.path(&format!("data-plane-{codec}"));
    let count = if world.options.size < 1.0 { FILES_OF_A_TRIAL } else { FILES };
    let near = made(&root, compression, count)?;
    let files = files_of(&near)?;
    let (near, files) = (&near, &files);
    let mut services = Vec::new();
    for (protection, encrypted) in PROTECTIONS.into_iter().zip([false, true]) {
        services.push((protection, Service::start(&root, encrypted)?));
    }
    let mut contestants = Vec::new();
    for (protection, service) in &services {
        let far = through(service.offer(near)?, near)?;
        let run = move || {
            let before = own_cpu_seconds();
            (0..PASSES).try_for_each(|_| read(&far, files, THREADS))?;
            Ok(Outcome { own_cpu_seconds: own_cpu_seconds() - before, ..Outcome::default() })
        };
        let contestant = Contestant::with_outcome(Kind::Ours, plane_of(protection, codec), run);
        contestants.push(contestant.prepare(move || read(near, files, THREADS)).hot().without_sync());
    }
    let work = Work::Bytes((count * PASSES) as u64 * FILE_BYTES);
    hold(world, report, Section::Network, work, contestants)?;
    drop(services);
    remove(&root)
}

/// The name of the series of a restore on the other machine.
pub(crate) fn far(protection: &str) -> String {
    format!("pghydrant on another machine, {protection}")
}

/// The same restore on this machine.
pub(crate) const NEAR: &str = "pghydrant on one machine";

fn restores(world: &World, report: &mut Report, host: &Host<'_>) -> anyhow::Result<()> {
    let codec = world.options.codec();
    let repository = Repository::new(world, codec);
    repository.ensure_backup()?;
    let mut servers = Vec::new();
    for protection in PROTECTIONS {
        // Whether they reach each other. Each session brings the program along and takes it away: that is counted.
        let started = MountServer::start(world, &repository, host, protection)
            .and_then(|server| server.restore(&["--plan"]).map(|()| server));
        world.check_interrupt()?;
        match started {
            Ok(server) => servers.push((protection, server)),
            Err(error) => {
                report.leave_out(Section::Network, &far(protection), Kind::Ours, format!("failed: {error:#}"));
            }
        }
    }
    let same = move || same_tables(&cluster::data(world), &world.target());
    let stop = move || cluster::stop_by(world, &world.target(), "immediate");
    let end = ["--target-immediate"];
    let local = || repository.restore_to(&world.target(), "mount", &end);
    let mut contestants = vec![Contestant::new(Kind::Ours, NEAR, local).check(same).finish(stop)];
    for (protection, server) in &servers {
        let run = move || server.restore(&end);
        contestants.push(Contestant::new(Kind::Ours, far(protection), run).check(same).finish(stop));
    }
    copies(world, report, host, &mut contestants);
    match Remote::start(world, codec, host) {
        Ok(remote) => {
            contestants.push(Contestant::new(Kind::Peer, PGBACKREST, move || remote.restore()).check(same));
        }
        Err(why) => report.leave_out(Section::Network, PGBACKREST, Kind::Peer, why),
    }
    hold(world, report, Section::Network, Work::Bytes(report.cluster_bytes), contestants)
}

/// Tools that copy the files of the cluster at rest, over SSH.
fn copies<'w>(world: &'w World, report: &mut Report, host: &'w Host<'_>, contestants: &mut Vec<Contestant<'w>>) {
    let same = move || same_tables(&cluster::data(world), &world.target());
    let target = format!("root@{}:{}", host.address, world.target().display());
    let to = target.clone();
    match peer(world, "scp") {
        Ok(scp) => {
            let run = move || {
                let mut copy = world.command(&scp);
                copy.args(["-r", "-q", "-F"]).arg(host.ssh_config()).arg(cluster::data(world)).arg(&to);
                world.run(&mut copy).map(drop)
            };
            contestants.push(Contestant::new(Kind::Peer, SCP, run).check(same));
        }
        Err(why) => report.leave_out(Section::Network, SCP, Kind::Peer, why),
    }
    match peer(world, "rsync") {
        Ok(rsync) => {
            let run = move || {
                let shell = format!("ssh -F {}", host.ssh_config().display());
                let from = format!("{}/", cluster::data(world).display());
                let mut copy = world.command(&rsync);
                world.run(copy.args(["-a", "--whole-file", "-e", &shell, &from]).arg(&target)).map(drop)
            };
            contestants.push(Contestant::new(Kind::Peer, RSYNC, run).check(same));
        }
        Err(why) => report.leave_out(Section::Network, RSYNC, Kind::Peer, why),
    }
}
