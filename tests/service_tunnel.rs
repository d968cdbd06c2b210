//! A target that cannot reach the mount server's data plane: blocks go through SSH.

use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::service::Stage;
use crate::support::process::wait_until;
use crate::support::*;

/// On the mount server's own loopback.
fn unreachable_address() -> Result<String> {
    Ok(format!("127.0.0.1:{}", cluster::free_port()?))
}

fn the_tunnel(stage: &Stage, address: &str) -> Result<Pid> {
    let mut found = Vec::new();
    wait_until("one tunnel", Duration::from_secs(120), || {
        found = stage.server.tunnels(address)?;
        Ok(found.len() == 1)
    })?;
    Ok(found[0])
}

#[test]
fn a_target_without_a_way_to_the_data_plane_gets_a_tunnel_that_comes_back() -> Result<()> {
    requires_network!();
    let address = unreachable_address()?;
    let mut stage = Stage::new(&["--data-listen", &address, "--retries", "20", "--retry-every", "3s"])?;
    let client = stage.server.restore(&stage.host, &stage.target(), &[]).start()?;
    let first = the_tunnel(&stage, &address)?;
    stage.host.slow(16)?;
    stage.wait_for_copy()?;
    kill_process(first, Signal::KILL)?;
    wait_until("another tunnel", Duration::from_secs(120), || {
        Ok(stage.server.tunnels(&address)?.iter().any(|pid| *pid != first))
    })?;
    stage.server.kill()?;
    wait_until("no tunnel of a service that is dead", Duration::from_secs(60), || {
        Ok(stage.server.tunnels(&address)?.is_empty())
    })?;
    stage.server.start_again()?;
    the_tunnel(&stage, &address)?;
    stage.host.cut()?;
    std::thread::sleep(Duration::from_secs(2));
    stage.host.mend()?;
    stage.host.speed_up()?;
    client.wait()?.expect_code(0)?.expect_stderr(&["through a tunnel of SSH"])?;
    stage.check()?;
    assert!(stage.server.tunnels(&address)?.is_empty());
    Ok(())
}

#[test]
fn nothing_unprotected_goes_through_a_tunnel() -> Result<()> {
    requires_network!();
    let address = unreachable_address()?;
    let stage = Stage::new(&["--data-listen", &address, "--data-plane", "plain"])?;
    let refused = stage.server.restore(&stage.host, &stage.target(), &[]).finish()?;
    refused.expect_code(1)?.expect_stderr(&["does not reach the mount server", "--data-plane tls"])?;
    assert!(!stage.target().exists() && stage.server.tunnels(&address)?.is_empty());
    Ok(())
}
