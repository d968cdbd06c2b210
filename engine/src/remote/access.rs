//! What a client needs to be let in: where the service is, its lease, its token, and how the way there is protected.

use std::fmt;
use std::io::Read as _;
use std::net::SocketAddr;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// A lease of one backup to one session.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub [u8; 16]);

/// Proof that a client may use a lease. It is shown by nobody's `Debug`.
#[derive(Clone)]
pub struct Token([u8; 32]);

/// SHA-256 of a certificate, as DER.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint(pub [u8; 32]);

/// How the bytes are protected on their way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Security {
    /// TLS 1.3, with the server that has this certificate and with no other.
    Tls(Fingerprint),
    /// Not at all: for networks that are private already, and for tunnels.
    Plain,
}

/// All of it.
#[derive(Clone, Debug)]
pub struct Access {
    /// Where the mount service listens for the data plane.
    pub address: SocketAddr,
    /// How to speak with it.
    pub security: Security,
    /// Whose blocks are wanted.
    pub lease: LeaseId,
    /// That they may be had.
    pub token: Token,
}

impl Token {
    /// The token of these bytes, which are random.
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Its bytes, for whoever sends or hashes them.
    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// As text, for a private channel.
    pub fn to_hex(&self) -> String {
        hex(&self.0)
    }

    /// The token that [`to_hex`](Self::to_hex) made.
    pub fn from_hex(text: &str) -> Option<Self> {
        from_hex(text).map(Self)
    }
}

/// The file by which a machine reaches a repository that is elsewhere. Named where a repository's directory would be.
#[derive(Clone, Debug)]
pub struct AccessFile {
    /// How it is reached.
    pub access: Access,
    /// For how long a reader waits for a service that is gone.
    pub patience: Duration,
}

/// As JSON. Fields are only ever added.
#[derive(Debug, Serialize, Deserialize)]
struct Written {
    pghydrant_access: u32,
    address: SocketAddr,
    /// The certificate's fingerprint; none where it is not encrypted.
    certificate: Option<String>,
    lease: String,
    token: String,
    patience_seconds: u64,
}

/// Of the only version there is.
const ACCESS_VERSION: u32 = 1;
/// Longer than any of ours.
const ACCESS_BYTES_MAX: u64 = 16 << 10;

impl AccessFile {
    /// Its content.
    pub fn to_json(&self) -> serde_json::Value {
        let certificate = match self.access.security {
            Security::Tls(fingerprint) => Some(fingerprint.to_string()),
            Security::Plain => None,
        };
        serde_json::json!({
            "pghydrant_access": ACCESS_VERSION, "address": self.access.address, "certificate": certificate,
            "lease": self.access.lease.to_string(), "token": self.access.token.to_hex(),
            "patience_seconds": self.patience.as_secs(),
        })
    }

    /// Reads the file at `path`; none where that is no regular file.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        match std::fs::metadata(path) {
            Ok(metadata) if metadata.is_file() => {}
            Ok(_) => return Ok(None),
            Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(cause) => return Err(Error::io("examine", path, cause)),
        }
        let mut text = Vec::new();
        let file = std::fs::File::open(path).map_err(|cause| Error::io("open", path, cause))?;
        file.take(ACCESS_BYTES_MAX).read_to_end(&mut text).map_err(|cause| Error::io("read", path, cause))?;
        Self::parse(&text).map(Some).map_err(|detail| {
            Error::NotFound(format!("{} is neither a repository nor the way to one: {detail}", path.display()))
        })
    }

    /// Reads its content.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        let written: Written = serde_json::from_slice(text).map_err(|cause| cause.to_string())?;
        if written.pghydrant_access != ACCESS_VERSION {
            return Err(format!("version {} is not known here", written.pghydrant_access));
        }
        let security = match written.certificate {
            Some(fingerprint) => Security::Tls(fingerprint.parse()?),
            None => Security::Plain,
        };
        let token = Token::from_hex(&written.token).ok_or("its token is not 64 hex digits")?;
        let access = Access { address: written.address, security, lease: written.lease.parse()?, token };
        Ok(Self { access, patience: Duration::from_secs(written.patience_seconds) })
    }
}

impl PartialEq for Token {
    /// In the same time for all.
    fn eq(&self, other: &Self) -> bool {
        blake3::Hash::from_bytes(self.0) == blake3::Hash::from_bytes(other.0)
    }
}

impl Eq for Token {}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

impl Fingerprint {
    /// Of a certificate.
    pub fn of(certificate: &[u8]) -> Self {
        use sha2::Digest;
        Self(sha2::Sha256::digest(certificate).into())
    }
}

const FINGERPRINT_PREFIX: &str = "SHA256:";

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{FINGERPRINT_PREFIX}{}", hex(&self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Fingerprint {
    type Err = String;

    /// With colons between the bytes too, and in either case, as other tools print it.
    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.strip_prefix(FINGERPRINT_PREFIX).map(|digits| digits.replace(':', "").to_ascii_lowercase());
        let bytes = digits.and_then(|digits| from_hex(&digits));
        bytes.map(Self).ok_or_else(|| format!("\"{text}\" is not {FINGERPRINT_PREFIX} and 64 hex digits"))
    }
}

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for LeaseId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        from_hex(text).map(Self).ok_or_else(|| format!("\"{text}\" is not a lease: 32 hex digits"))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let plain = text.len() == 2 * N && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
    let mut bytes = [0; N];
    for (place, byte) in bytes.iter_mut().enumerate().take(if plain { N } else { 0 }) {
        *byte = u8::from_str_radix(&text[2 * place..2 * place + 2], 16).ok()?;
    }
    plain.then_some(bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn each_comes_back_from_its_text() {
        let fingerprint = Fingerprint::of(b"certificate");
        assert_eq!(fingerprint.to_string().parse(), Ok(fingerprint));
        let loud = format!("SHA256:{}", fingerprint.to_string()[7..].to_uppercase());
        assert_eq!(loud.parse(), Ok(fingerprint));
        let lease = LeaseId([0xa5; 16]);
        assert_eq!(lease.to_string().parse(), Ok(lease));
        let token = Token::new([0x5a; 32]);
        assert_eq!(Token::from_hex(&token.to_hex()), Some(token.clone()));
        assert_eq!(format!("{token:?}"), "Token(..)");
        for bad in ["", "é", "SHA256:00", "SHA256:zz"] {
            assert!(bad.parse::<Fingerprint>().is_err() && bad.parse::<LeaseId>().is_err(), "{bad}");
        }
    }
}
