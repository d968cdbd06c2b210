//! One request over TLS, to a server that is known by its certificate and not by who vouches for it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::known::Address;
use crate::exit::{Exit, Failure};
use engine::remote::Fingerprint;

const CONNECT_MAX: Duration = Duration::from_secs(15);
/// Longer than any refusal of ours.
const REFUSAL_BYTES_MAX: usize = 64 << 10;
/// Longer than any line of ours.
const LINE_BYTES_MAX: usize = 16 << 20;

/// A connection for one request.
pub(super) struct Connection {
    sender: SendRequest<Full<Bytes>>,
    host: String,
}

/// What was answered.
pub(super) struct Answer {
    response: Response<Incoming>,
}

/// The lines of an answer, as they come.
pub(super) struct Lines {
    body: Incoming,
    pending: Vec<u8>,
    pub(super) are_events: bool,
}

impl Connection {
    /// Connects. Where `expected` is none, whatever certificate is shown is taken, and returned.
    pub(super) async fn open(address: &Address, expected: Option<Fingerprint>) -> anyhow::Result<(Self, Fingerprint)> {
        let name = address.name();
        let failed = |why: String| {
            Failure::new(Exit::Failed, format!("cannot reach the mount server at {name}: {why}"))
                .hint("is `pghydrant serve` running there, with --listen on an address that this machine reaches?")
        };
        let verifier = Arc::new(Pinned::new(expected));
        let shown = Arc::clone(&verifier);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ClientConfig::builder_with_provider(provider);
        let builder = builder.with_protocol_versions(&[&rustls::version::TLS13])?;
        let config = builder.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth();
        // Any valid name: the certificate is compared itself.
        let server = ServerName::try_from("pghydrant")?;
        let connect = async {
            let stream = TcpStream::connect((address.host.as_str(), address.port)).await?;
            stream.set_nodelay(true)?;
            TlsConnector::from(Arc::new(config)).connect(server, stream).await
        };
        let stream = match tokio::time::timeout(CONNECT_MAX, connect).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(cause)) => {
                return Err(match (shown.shown(), expected) {
                    (Some(shown), Some(expected)) if shown != expected => changed(&name, shown, expected).into(),
                    _ => failed(cause.to_string()).into(),
                });
            }
            Err(_) => return Err(failed("it does not answer".to_owned()).into()),
        };
        let fingerprint = shown.shown().ok_or_else(|| failed("it showed no certificate".to_owned()))?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await.map_err(|cause| failed(cause.to_string()))?;
        // Its end shows in the answer.
        tokio::spawn(connection);
        Ok((Self { sender, host: name }, fingerprint))
    }

    /// Sends the request; the answer, unless it is a refusal.
    pub(super) async fn send(
        mut self,
        method: &str,
        path: &str,
        token: &str,
        body: Option<&Value>,
    ) -> anyhow::Result<Answer> {
        let bytes = body.map(serde_json::to_vec).transpose()?.unwrap_or_default();
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", &self.host)
            .header("authorization", format!("Bearer {token}"))
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(bytes)))?;
        let response = self.sender.send_request(request).await?;
        let status = response.status();
        if status.is_success() {
            return Ok(Answer { response });
        }
        let body = http_body_util::Limited::new(response.into_body(), REFUSAL_BYTES_MAX).collect().await;
        let body = body.map(|body| body.to_bytes()).unwrap_or_default();
        let refusal: Value = serde_json::from_slice(&body).unwrap_or_default();
        let text = |name: &str| refusal.get(name).and_then(Value::as_str);
        let exit = refusal.get("exit").and_then(Value::as_u64).and_then(|code| u8::try_from(code).ok());
        let message = text("message").map_or_else(|| format!("the mount server answers {status}"), str::to_owned);
        let failure = Failure::new(exit.map_or(Exit::Failed, Exit::of_code), message);
        Err(match text("hint") {
            Some(hint) => failure.hint(hint).into(),
            None => failure.into(),
        })
    }
}

fn changed(name: &str, shown: Fingerprint, expected: Fingerprint) -> Failure {
    Failure::new(
        Exit::Failed,
        format!("the mount server at {name} shows another certificate than before: {shown}, not {expected}"),
    )
    .hint("somebody may be in between; if its certificate was changed, give --fingerprint, and mend known_servers in the state directory")
}

impl Answer {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.response.headers().get(name)?.to_str().ok()
    }

    pub(super) fn lines(self) -> Lines {
        Lines { body: self.response.into_body(), pending: Vec::new(), are_events: false }
    }

    /// The same, of server-sent events.
    pub(super) fn events(self) -> Lines {
        Lines { are_events: true, ..self.lines() }
    }
}

impl Lines {
    /// The next line; none at the end.
    pub(super) async fn next(&mut self) -> anyhow::Result<Option<String>> {
        loop {
            if let Some(at) = self.pending.iter().position(|byte| *byte == b'\n') {
                let rest = self.pending.split_off(at + 1);
                let mut line = std::mem::replace(&mut self.pending, rest);
                line.pop();
                return Ok(Some(String::from_utf8(line)?));
            }
            if self.pending.len() > LINE_BYTES_MAX {
                return Err(Failure::new(Exit::Failed, "the mount server's line has no end").into());
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(frame) => {
                    if let Ok(more) = frame?.into_data() {
                        self.pending.extend_from_slice(&more);
                    }
                }
            }
        }
    }
}

/// Takes the one certificate that is expected, or any and remembers it; the handshake must prove that its key is there.
#[derive(Debug)]
struct Pinned {
    expected: Option<Fingerprint>,
    shown: Mutex<Option<Fingerprint>>,
    provider: CryptoProvider,
}

impl Pinned {
    fn new(expected: Option<Fingerprint>) -> Self {
        Self { expected, shown: Mutex::new(None), provider: rustls::crypto::ring::default_provider() }
    }

    fn shown(&self) -> Option<Fingerprint> {
        *self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let shown = Fingerprint::of(certificate);
        *self.shown.lock().unwrap_or_else(PoisonError::into_inner) = Some(shown);
        match self.expected.is_none_or(|expected| expected == shown) {
            true => Ok(ServerCertVerified::assertion()),
            false => Err(rustls::Error::InvalidCertificate(rustls::CertificateError::ApplicationVerificationFailure)),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_server_is_known_by_its_certificate_whatever_the_clocks_say() {
        let certificate = CertificateDer::from(b"as the server shows it".to_vec());
        let name = ServerName::try_from("backup1").unwrap();
        let pinned = Pinned::new(Some(Fingerprint::of(&certificate)));
        let century = Duration::from_secs(100 * 365 * 24 * 3600);
        for now in [Duration::ZERO, century, 90 * century] {
            let now = UnixTime::since_unix_epoch(now);
            pinned.verify_server_cert(&certificate, &[], &name, &[], now).unwrap();
            let other = CertificateDer::from(b"another".to_vec());
            assert!(pinned.verify_server_cert(&other, &[], &name, &[], now).is_err());
        }
    }
}
