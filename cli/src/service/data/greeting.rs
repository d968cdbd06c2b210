//! Letting a connection in.

use std::io;

use engine::remote::frame::{Hello, VERSION, Welcome};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

use super::leases::{Admitted, Leases};
use super::{REQUESTS_MAX, Shared};

/// A connection, encrypted or not.
pub(super) enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// Why a connection is not served.
#[derive(Debug)]
pub(super) enum Turned {
    /// It does not speak the protocol, or not to its end.
    Garbage,
    /// It has no lease that lets it in.
    Away,
}

impl From<io::Error> for Turned {
    fn from(_: io::Error) -> Self {
        Self::Garbage
    }
}

/// Greets, under TLS if there is a certificate.
pub(super) async fn greet(socket: TcpStream, shared: &Shared) -> Result<(Stream, Admitted), Turned> {
    socket.set_nodelay(true)?;
    match &shared.tls {
        None => {
            let mut socket = socket;
            let admitted = admit(&mut socket, &shared.leases).await?;
            Ok((Stream::Plain(socket), admitted))
        }
        Some(acceptor) => {
            let mut session = acceptor.accept(socket).await?;
            let admitted = admit(&mut session, &shared.leases).await?;
            Ok((Stream::Tls(Box::new(session)), admitted))
        }
    }
}

async fn admit(stream: &mut (impl AsyncReadExt + AsyncWriteExt + Unpin), leases: &Leases) -> Result<Admitted, Turned> {
    let mut hello = [0; Hello::BYTES];
    stream.read_exact(&mut hello).await?;
    let hello = Hello::from_bytes(&hello).map_err(|_| Turned::Garbage)?;
    let admitted = leases.admit(&hello.lease, &hello.token);
    let refusal = admitted.as_ref().err().copied();
    let requests_max = if refusal.is_some() { 0 } else { REQUESTS_MAX };
    let welcome = Welcome { version: VERSION, refusal, requests_max };
    stream.write_all(&welcome.to_bytes()).await?;
    stream.flush().await?;
    match admitted {
        // A client of another version has been told so, and hangs up.
        Ok(admitted) if hello.version == VERSION => Ok(admitted),
        Ok(_) | Err(_) => {
            // What it may still say is not waited for.
            let _ = stream.shutdown().await;
            Err(Turned::Away)
        }
    }
}
