//! Who may give orders: tokens, shown once when they are made and kept as hashes.
//!
//! The file is read again at each request that carries a token: what was issued or revoked a moment ago counts, in a
//! service that runs. A token is 256 random bits, so its hash needs no salt and no slowness.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use engine::io::durable;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::exit::{Exit, Failure};
use crate::random;

/// What a token begins with, so that people and secret scanners know it for what it is.
const PREFIX: &str = "pgh_";
/// More than a name needs.
const NAME_CHARACTERS_MAX: usize = 64;

/// A token, as it is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Kept {
    name: String,
    /// BLAKE3 of the token, in hexadecimal digits.
    hash: String,
    issued_at: Timestamp,
}

/// The tokens of a service.
#[derive(Clone, Debug)]
pub(super) struct Tokens {
    path: PathBuf,
}

impl Tokens {
    pub(super) fn of(directory: &Path) -> Self {
        Self { path: directory.join("tokens.json") }
    }

    /// Makes a token for `name`; nobody can read it again.
    pub(super) fn issue(&self, name: &str) -> anyhow::Result<String> {
        let fits = !name.is_empty()
            && name.chars().count() <= NAME_CHARACTERS_MAX
            && !name.chars().any(|letter| letter.is_control());
        if !fits {
            let message =
                format!("\"{}\" cannot name a token: 1 to {NAME_CHARACTERS_MAX} letters", name.escape_debug());
            return Err(Failure::new(Exit::Usage, message).into());
        }
        let mut kept = self.read()?;
        if kept.iter().any(|token| token.name == name) {
            return Err(Failure::new(Exit::Failed, format!("there is a token {name} already"))
                .hint(format!("`pghydrant serve --revoke-token {name}` takes it away"))
                .into());
        }
        let token = format!("{PREFIX}{}", random::hexadecimal(32)?);
        kept.push(Kept { name: name.to_owned(), hash: hash(&token).to_hex().to_string(), issued_at: Timestamp::now() });
        self.write(&kept)?;
        Ok(token)
    }

    /// Takes the token of that name away.
    pub(super) fn revoke(&self, name: &str) -> anyhow::Result<()> {
        let mut kept = self.read()?;
        let before = kept.len();
        kept.retain(|token| token.name != name);
        if kept.len() == before {
            let known = kept.iter().map(|token| token.name.as_str()).collect::<Vec<_>>().join(", ");
            let known = if known.is_empty() { "none".to_owned() } else { known };
            return Err(Failure::new(Exit::Failed, format!("there is no token {name} (there are: {known})")).into());
        }
        self.write(&kept)
    }

    /// Whose token it is, if it is anybody's.
    pub(super) fn holder(&self, token: &str) -> anyhow::Result<Option<String>> {
        let presented = hash(token);
        let mut holder = None;
        // All of them, and in constant time each: what is compared says nothing by how long it takes.
        for kept in self.read()? {
            if blake3::Hash::from_hex(&kept.hash).is_ok_and(|hash| hash == presented) {
                holder = Some(kept.name);
            }
        }
        Ok(holder)
    }

    /// How many there are.
    pub(super) fn count(&self) -> anyhow::Result<usize> {
        Ok(self.read()?.len())
    }

    fn read(&self) -> anyhow::Result<Vec<Kept>> {
        match std::fs::read(&self.path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|cause| engine::Error::corrupt(&self.path, cause.to_string()).into()),
            Err(cause) if cause.kind() == ErrorKind::NotFound => Ok(Vec::new()),
            Err(cause) => Err(engine::Error::io("read", &self.path, cause).into()),
        }
    }

    fn write(&self, kept: &[Kept]) -> anyhow::Result<()> {
        Ok(durable::write_atomically(&self.path, &serde_json::to_vec_pretty(kept)?, 0o600)?)
    }
}

fn hash(token: &str) -> blake3::Hash {
    blake3::hash(token.trim().as_bytes())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_token_opens_until_it_is_revoked_and_is_nowhere_on_disk() {
        let directory = tempfile::tempdir().unwrap();
        let tokens = Tokens::of(directory.path());
        let token = tokens.issue("dba").unwrap();
        let other = tokens.issue("ci").unwrap();
        assert_ne!(token, other);
        assert_eq!(tokens.holder(&token).unwrap().as_deref(), Some("dba"));
        assert_eq!(tokens.holder(&format!("{other}\n")).unwrap().as_deref(), Some("ci"));
        for wrong in ["", "pgh_", &token[..token.len() - 1], &token.to_uppercase()] {
            assert_eq!(tokens.holder(wrong).unwrap(), None, "{wrong}");
        }
        let file = directory.path().join("tokens.json");
        assert!(!std::fs::read_to_string(&file).unwrap().contains(&token[PREFIX.len()..]));
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert!(tokens.issue("dba").is_err());
        tokens.revoke("dba").unwrap();
        assert_eq!(tokens.holder(&token).unwrap(), None);
        assert!(tokens.revoke("dba").is_err());
        assert_eq!(tokens.holder(&other).unwrap().as_deref(), Some("ci"));
    }
}
