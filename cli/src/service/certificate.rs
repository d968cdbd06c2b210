//! The certificate of the service: given by its operator, or made on its first start.
//!
//! What is made here vouches for nobody: clients know it again by its fingerprint, as SSH's know a host key. So it never
//! expires, and names no host.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use engine::io::durable;
use engine::remote::Fingerprint;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::exit::{Exit, Failure};

/// A certificate, the key to it, and whatever is above it.
pub(super) struct Certificate {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Certificate {
    /// Reads what the operator gives: PEM files.
    pub(super) fn read(chain: &Path, key: &Path) -> anyhow::Result<Self> {
        let refuse = |path: &Path, cause: rustls::pki_types::pem::Error| {
            Failure::new(Exit::Usage, format!("cannot read {}: {cause}", path.display()))
        };
        let certificates = CertificateDer::pem_file_iter(chain).map_err(|cause| refuse(chain, cause))?;
        let certificates = certificates.collect::<Result<Vec<_>, _>>().map_err(|cause| refuse(chain, cause))?;
        if certificates.is_empty() {
            return Err(Failure::new(Exit::Usage, format!("{} holds no certificate", chain.display())).into());
        }
        let read = PrivateKeyDer::from_pem_file(key).map_err(|cause| refuse(key, cause))?;
        Ok(Self { chain: certificates, key: read })
    }

    /// The one that was made on the first start in `directory`, or makes it.
    pub(super) fn own(directory: &Path) -> anyhow::Result<Self> {
        let (chain, key) = Self::paths(directory);
        match std::fs::metadata(&chain) {
            Ok(_) => return Self::read(&chain, &key),
            Err(cause) if cause.kind() == ErrorKind::NotFound => {}
            Err(cause) => return Err(engine::Error::io("examine", &chain, cause).into()),
        }
        let (certificate, private) = make()?;
        // The key first: without the certificate beside it, it is made anew.
        durable::write_atomically(&key, private.as_bytes(), 0o600)?;
        durable::write_atomically(&chain, certificate.as_bytes(), 0o644)?;
        Self::read(&chain, &key)
    }

    fn paths(directory: &Path) -> (PathBuf, PathBuf) {
        (directory.join("certificate.pem"), directory.join("key.pem"))
    }

    /// What clients know it by.
    pub(super) fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.chain[0])
    }

    /// One that is kept nowhere.
    #[cfg(test)]
    pub(super) fn make() -> anyhow::Result<Self> {
        let (certificate, private) = make()?;
        let certificate = CertificateDer::from_pem_slice(certificate.as_bytes())?;
        Ok(Self { chain: vec![certificate], key: PrivateKeyDer::from_pem_slice(private.as_bytes())? })
    }

    /// A client that trusts it.
    #[cfg(test)]
    pub(super) fn client_config(&self) -> anyhow::Result<Arc<rustls::ClientConfig>> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.chain[0].clone())?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
        Ok(Arc::new(builder.with_root_certificates(roots).with_no_client_auth()))
    }

    /// TLS as the service speaks it: 1.3 alone.
    pub(super) fn server_config(&self) -> anyhow::Result<Arc<rustls::ServerConfig>> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ServerConfig::builder_with_provider(provider);
        let builder = builder.with_protocol_versions(&[&rustls::version::TLS13])?.with_no_client_auth();
        let config = builder.with_single_cert(self.chain.clone(), self.key.clone_key());
        Ok(Arc::new(
            config.map_err(|cause| Failure::new(Exit::Usage, format!("the certificate cannot serve: {cause}")))?,
        ))
    }
}

/// A certificate that vouches for nobody, and its key: both as PEM.
fn make() -> anyhow::Result<(String, String)> {
    let pair = rcgen::KeyPair::generate().context("cannot make a key")?;
    let mut parameters = rcgen::CertificateParams::new(vec![NAME.to_owned()])?;
    parameters.distinguished_name = rcgen::DistinguishedName::new();
    parameters.distinguished_name.push(rcgen::DnType::CommonName, NAME);
    parameters.not_before = rcgen::date_time_ymd(2000, 1, 1);
    parameters.not_after = rcgen::date_time_ymd(9999, 12, 31);
    let made = parameters.self_signed(&pair).context("cannot make a certificate")?;
    Ok((made.pem(), pair.serialize_pem()))
}

/// Nobody looks for a host of this name: the fingerprint is what counts.
const NAME: &str = "pghydrant";

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_service_keeps_the_certificate_that_it_made() {
        let directory = tempfile::tempdir().unwrap();
        let first = Certificate::own(directory.path()).unwrap();
        let again = Certificate::own(directory.path()).unwrap();
        assert_eq!(first.fingerprint(), again.fingerprint());
        let key = directory.path().join("key.pem");
        assert_eq!(key.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        again.server_config().unwrap();
        std::fs::write(&key, "nonsense").unwrap();
        let refused = Certificate::own(directory.path()).err().unwrap();
        assert!(refused.to_string().starts_with("cannot read "), "{refused}");
    }
}
