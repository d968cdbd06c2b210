//! The certificate of the data plane: of its own making, known to clients by its fingerprint.

use std::io;
use std::sync::Arc;

use engine::remote::Fingerprint;
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// In the certificate because there has to be one; nobody looks at it.
const NAME: &str = "pghydrant";

/// A certificate and its private key.
pub(crate) struct Certificate {
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

impl Certificate {
    /// A new one.
    pub(crate) fn make() -> io::Result<Self> {
        Self::from_pem(Self::make_pem()?.as_bytes())
    }

    /// A new one as text, private key included: for whoever keeps it.
    pub(crate) fn make_pem() -> io::Result<String> {
        let made = rcgen::generate_simple_self_signed([NAME.to_owned()]).map_err(io::Error::other)?;
        Ok(made.cert.pem() + &made.signing_key.serialize_pem())
    }

    /// The one in `pem`: certificate and private key, one behind the other.
    pub(crate) fn from_pem(pem: &[u8]) -> io::Result<Self> {
        let certificate = CertificateDer::from_pem_slice(pem).map_err(io::Error::other)?;
        let key = PrivateKeyDer::from_pem_slice(pem).map_err(io::Error::other)?;
        Ok(Self { certificate, key })
    }

    /// What clients know it by.
    pub(crate) fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.certificate)
    }

    pub(super) fn server_config(self) -> io::Result<Arc<ServerConfig>> {
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .and_then(|builder| builder.with_no_client_auth().with_single_cert(vec![self.certificate], self.key));
        config.map(Arc::new).map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_certificate_comes_back_from_its_text() {
        let pem = Certificate::make_pem().unwrap();
        let read = Certificate::from_pem(pem.as_bytes()).unwrap();
        assert_eq!(read.fingerprint(), Certificate::from_pem(pem.as_bytes()).unwrap().fingerprint());
        read.server_config().unwrap();
        assert!(Certificate::from_pem(b"none").is_err());
        assert_ne!(Certificate::make().unwrap().fingerprint(), Certificate::make().unwrap().fingerprint());
    }
}
