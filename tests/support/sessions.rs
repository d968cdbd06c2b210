//! What `sessions` tells.

use super::json::{find_all, find_text};
use super::{Context, Finished, Pghydrant, Result, bail};

/// Ids of the sessions that are not finished.
pub fn open_sessions(pghydrant: &Pghydrant) -> Result<Vec<String>> {
    let listed = pghydrant.succeed(["sessions", "--json"])?.json()?;
    let all = find_all(&listed, "sessions").into_iter().filter_map(serde_json::Value::as_array).flatten();
    let open = all.filter(|session| find_text(session, "state").is_none_or(|state| state != "finished"));
    open.map(|session| find_text(session, "session").context("a session without an id")).collect()
}

/// The one session that is not finished.
pub fn open_session(pghydrant: &Pghydrant) -> Result<String> {
    let mut open = open_sessions(pghydrant)?;
    match (open.pop(), open.is_empty()) {
        (Some(id), true) => Ok(id),
        (None, _) => bail!("no session is open"),
        (Some(id), false) => bail!("{id} and {open:?} are open"),
    }
}

/// The id in the output of `restore --json`.
pub fn session_of(finished: &Finished) -> Result<String> {
    let found = finished.json_lines()?.iter().find_map(|line| find_text(line, "session"));
    found.with_context(|| format!("no session in\n{finished}"))
}
