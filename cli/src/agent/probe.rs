//! Whether the mount service is reached from here.

use std::io::{BufRead as _, Read as _, Write as _};

use anyhow::Context as _;
use engine::remote::{AccessFile, RemoteStore};

use crate::exit::{Exit, Failure};

/// Longer than any access file.
const ACCESS_BYTES_MAX: u64 = 16 << 10;

/// What `agent probe` answers.
pub(crate) const REACHED: &str = "reached";
pub(crate) const UNREACHED: &str = "not reached";

/// `agent probe`. It is the greeting itself: another service at that address is not the one.
pub(super) fn probe() -> anyhow::Result<Exit> {
    let mut text = Vec::new();
    let stdin = std::io::stdin().lock();
    stdin.take(ACCESS_BYTES_MAX).read_until(b'\n', &mut text).context("cannot read the access file")?;
    let file = AccessFile::parse(&text)
        .map_err(|detail| Failure::new(Exit::Usage, format!("this is no way to a repository: {detail}")))?;
    let answer = if RemoteStore::answers(&file.access) { REACHED } else { UNREACHED };
    writeln!(std::io::stdout(), "{answer}").context("cannot answer")?;
    Ok(Exit::Done)
}
