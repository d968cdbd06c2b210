//! What a server's log says last: the reason, when it did not start or gave up.

use std::fs::File;
use std::io::{ErrorKind, Read as _, Seek as _, SeekFrom};
use std::path::Path;

use anyhow::{Context as _, Result};

/// How much of a log's end is looked at: enough for hundreds of lines.
const TAIL_BYTES: u64 = 64 << 10;
/// How many lines of a message's `DETAIL`, `HINT` and context are kept.
const FOLLOWING_LINES_MAX: usize = 6;

/// The end of a log from byte `from` on (what was there before belongs to an earlier start), at most 64 KiB of it.
/// A log that does not exist is empty.
pub(crate) fn tail(path: &Path, from: u64) -> Result<String> {
    let read = || -> std::io::Result<String> {
        let mut file = File::open(path)?;
        let end = file.seek(SeekFrom::End(0))?;
        file.seek(SeekFrom::Start(from.max(end.saturating_sub(TAIL_BYTES)).min(end)))?;
        let mut bytes = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    match read() {
        Ok(text) => Ok(text),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

/// The last `FATAL` or `PANIC` of a log with what follows of the same message.
///
/// A process's end is reported by the postmaster with `LOG` lines after the message that explains it, so the last
/// line is seldom the reason. `FATAL:  the database system is starting up` and its like only answer early callers, and
/// `terminating connection due to administrator command` is what sessions are told when somebody stops the server.
pub(crate) fn last_failure(text: &str) -> Option<String> {
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let is_reason = |line: &str| {
        (line.contains("FATAL:  ") || line.contains("PANIC:  "))
            && !line.contains("the database system is ")
            && !line.ends_with(" due to administrator command")
    };
    let at = lines.iter().rposition(|line| is_reason(line))?;
    let following = lines[at + 1..].iter().take(FOLLOWING_LINES_MAX).take_while(|line| {
        ["DETAIL:  ", "HINT:  ", "CONTEXT:  "].iter().any(|kind| line.contains(kind)) || line.starts_with('\t')
    });
    let message: Vec<&str> = std::iter::once(&lines[at]).chain(following).map(|line| without_prefix(line)).collect();
    Some(message.join("\n"))
}

/// Whether the server of this log has started and has shut down, in its own words.
pub(crate) fn tells_of_an_end(text: &str) -> bool {
    text.contains("LOG:  starting PostgreSQL") && text.contains("LOG:  database system is shut down")
}

/// The line from its severity on: what precedes it is `log_line_prefix`.
fn without_prefix(line: &str) -> &str {
    let severities = ["FATAL:  ", "PANIC:  ", "DETAIL:  ", "HINT:  ", "CONTEXT:  "];
    severities.iter().filter_map(|severity| line.find(severity)).min().map_or(line.trim(), |at| &line[at..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_lived_for_a_moment_is_known_by_its_words() {
        let began =
            "LOG:  starting PostgreSQL 15.18 on x86_64\nLOG:  database system was shut down in recovery at 08:15\n";
        assert!(!tells_of_an_end(began));
        assert!(tells_of_an_end(&format!(
            "{began}LOG:  shutdown at recovery target\nLOG:  database system is shut down\n"
        )));
    }

    #[test]
    fn the_reason_is_the_last_fatal_with_its_detail_and_hint() {
        let text = "2026-11-22 08:15:00 UTC [1] LOG:  starting\n\
            2026-11-22 08:15:00 UTC [2] FATAL:  the database system is starting up\n\
            2026-11-22 08:15:01 UTC [3] FATAL:  recovery ended before configured recovery target was reached\n\
            2026-11-22 08:15:01 UTC [3] HINT:  look elsewhere\n\
            2026-11-22 08:15:01 UTC [1] LOG:  startup process (PID 3) exited with exit code 1\n";
        let expected = "FATAL:  recovery ended before configured recovery target was reached\nHINT:  look elsewhere";
        assert_eq!(last_failure(text).as_deref(), Some(expected));
    }

    #[test]
    fn a_log_without_a_failure_has_none() {
        let early = "LOG:  starting\nFATAL:  the database system is starting up\n";
        assert_eq!(last_failure(early), None);
        let stopped = "LOG:  received fast shutdown request\n\
            FATAL:  terminating connection due to administrator command\n\
            LOG:  shutting down\n";
        assert_eq!(last_failure(stopped), None);
        let full = format!("PANIC:  could not write to file: No space left on device\n{stopped}");
        assert!(last_failure(&full).is_some_and(|reason| reason.starts_with("PANIC")));
        assert_eq!(last_failure(""), None);
    }
}
