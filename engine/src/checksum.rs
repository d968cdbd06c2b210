//! BLAKE3, and the type that says a block was checked.

use std::fmt;
use std::ops::Deref;

/// A BLAKE3-256 hash.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hash(pub [u8; 32]);

impl Hash {
    /// The hash of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// 64 lower-case hex digits, or nothing.
    pub fn from_hex(text: &str) -> Option<Self> {
        blake3::Hash::from_hex(text).ok().map(|hash| Self(*hash.as_bytes()))
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Bytes whose hash was compared with the manifest's. What the mount serves and the copier writes is this type;
/// only [`verify`] makes one.
#[derive(Debug)]
pub struct Verified<B>(B);

impl<B> Verified<B> {
    /// The bytes, without the proof.
    pub fn into_inner(self) -> B {
        self.0
    }
}

impl<B: AsRef<[u8]>> Deref for Verified<B> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0.as_ref()
    }
}

/// The bytes do not have the hash that the manifest names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected BLAKE3 {expected}, found {found}")]
pub struct Mismatch {
    /// What the manifest says.
    pub expected: Hash,
    /// What the bytes have.
    pub found: Hash,
}

/// The bytes as [`Verified`], if their hash is `expected`.
pub fn verify<B: AsRef<[u8]>>(bytes: B, expected: &Hash) -> Result<Verified<B>, Mismatch> {
    let found = Hash::of(bytes.as_ref());
    if found == *expected { Ok(Verified(bytes)) } else { Err(Mismatch { expected: *expected, found }) }
}
