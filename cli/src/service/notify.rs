//! What systemd is told: that the service is ready, lives, and stops. Nothing where nobody listens.
//!
//! One datagram each to the socket that `NOTIFY_SOCKET` names, as sd_notify(3) has it.

use std::ffi::OsStr;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// Says something to whoever started us, if that is systemd.
pub(super) fn tell(what: &str) {
    let Some(place) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let sent = address(&place).and_then(|address| UnixDatagram::unbound()?.send_to_addr(what.as_bytes(), &address));
    if let Err(cause) = sent {
        tracing::warn!("systemd does not hear \"{}\": {cause}", what.escape_debug());
    }
}

/// Tells for ever that we live, half as far apart as we were told to; returns at once where nobody wants to know.
pub(super) async fn live() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let for_us = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
    let Some(every) = number("WATCHDOG_USEC").filter(|every| for_us && *every > 0) else {
        return std::future::pending().await;
    };
    let mut ticks = tokio::time::interval(Duration::from_micros(every / 2).max(Duration::from_millis(1)));
    loop {
        ticks.tick().await;
        tell("WATCHDOG=1");
    }
}

/// A path, or a name of the abstract namespace behind `@`.
fn address(place: &OsStr) -> std::io::Result<SocketAddr> {
    match place.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        _ => SocketAddr::from_pathname(place),
    }
}
