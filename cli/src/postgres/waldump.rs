//! What happened where in the WAL, read with `pg_waldump`.
//!
//! A recovery target that is a name or a transaction says nothing about its place, so the records are looked at. The
//! segments come out of the archive by a callback, a few at a time, into a directory of ours: a search through a
//! terabyte of WAL needs the room of some segments only. Neighbouring windows share a segment, so that a record which
//! crosses from one to the next is whole in one of them.
//!
//! `pg_waldump` ends with an error where the WAL ends; that is told as [`Scanned::reached_end`], not as a failure.

use std::io::{BufRead as _, BufReader, Read as _};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use engine::units::{Lsn, Timeline};
use engine::wal::name::{SegmentName, is_segment_size};

/// Segments that lie in the directory at one time: 128 MiB at the default size.
const WINDOW_SEGMENTS: u64 = 8;
const _: () = assert!(WINDOW_SEGMENTS >= 2, "windows share one segment");

/// Which records to look for; other resource managers' are skipped by `pg_waldump` itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Commits and aborts.
    Transactions,
    /// Named restore points.
    RestorePoints,
    /// Tablespaces that are created.
    Tablespaces,
}

/// What a record says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A transaction committed (or a prepared one).
    Commit {
        /// Its id.
        xid: u32,
        /// Microseconds since 1970.
        time_micros: i64,
    },
    /// A transaction aborted.
    Abort {
        /// Its id.
        xid: u32,
        /// Microseconds since 1970.
        time_micros: i64,
    },
    /// `pg_create_restore_point(name)`.
    RestorePoint {
        /// Its name.
        name: String,
    },
    /// `CREATE TABLESPACE`.
    CreateTablespace {
        /// Its OID.
        oid: u32,
        /// The path that the replay uses, whatever the tablespace was remapped to.
        location: String,
    },
}

/// A record and its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    /// Where it begins.
    pub(crate) lsn: Lsn,
    /// What it says.
    pub(crate) event: Event,
}

/// How far a scan came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Scanned {
    /// The WAL ended (no further segment, or no valid record) before the range did.
    pub(crate) reached_end: bool,
}

/// A piece of one timeline.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Range {
    /// Which timeline's files.
    pub(crate) timeline: Timeline,
    /// First byte.
    pub(crate) from: Lsn,
    /// Where to stop; to the end without it.
    pub(crate) to: Option<Lsn>,
    /// Bytes of a segment.
    pub(crate) segment_bytes: u64,
}

/// Looks at all records of `kind` in `range`, in order, until `visit` breaks. `fetch(name, to)` puts a segment into the
/// directory, or says that there is none. `directory` must be empty, and is empty again afterwards.
pub(crate) fn scan(
    pg_waldump: &Path,
    directory: &Path,
    range: Range,
    kind: Kind,
    fetch: &mut dyn FnMut(&str, &Path) -> Result<bool>,
    visit: &mut dyn FnMut(Record) -> ControlFlow<()>,
) -> Result<Scanned> {
    let Range { timeline, from, to, segment_bytes } = range;
    if !is_segment_size(segment_bytes) {
        bail!("{segment_bytes} is not the size of a WAL segment");
    }
    let mut window = Window { directory: directory.to_owned(), present: Vec::new() };
    let mut first = from.0 / segment_bytes;
    let mut seen_until = None;
    loop {
        let mut complete = true;
        for number in first..first + WINDOW_SEGMENTS {
            if to.is_some_and(|to| number * segment_bytes >= to.0) {
                break;
            }
            let name = SegmentName { timeline, number }.file_name(segment_bytes);
            if !window.ensure(number, &name, fetch)? {
                complete = false;
                break;
            }
        }
        let Some(last) = window.present.last().map(|(number, _)| *number) else {
            return Ok(Scanned { reached_end: true });
        };
        let start = Lsn(from.0.max(first * segment_bytes));
        let window_end = (last + 1) * segment_bytes;
        let end = Lsn(to.map_or(window_end, |to| to.0.min(window_end)));
        if start >= end {
            return Ok(Scanned { reached_end: !complete });
        }
        let mut found = |record: Record| {
            // The shared segment's records were seen in the window before.
            if seen_until.is_some_and(|seen| record.lsn <= seen) {
                return ControlFlow::Continue(());
            }
            seen_until = Some(record.lsn);
            visit(record)
        };
        let ran = dump(pg_waldump, directory, timeline, (start, end), kind, &mut found)?;
        if ran == Ran::Stopped {
            return Ok(Scanned { reached_end: false });
        }
        if to.is_some_and(|to| end == to) && complete {
            return Ok(Scanned { reached_end: ran == Ran::Invalid });
        }
        if !complete || ran == Ran::Invalid {
            return Ok(Scanned { reached_end: true });
        }
        first = last;
        window.keep_from(first)?;
    }
}

/// The segments that lie in the directory.
struct Window {
    directory: PathBuf,
    present: Vec<(u64, PathBuf)>,
}

impl Window {
    fn ensure(&mut self, number: u64, name: &str, fetch: &mut dyn FnMut(&str, &Path) -> Result<bool>) -> Result<bool> {
        if self.present.iter().any(|(known, _)| *known == number) {
            return Ok(true);
        }
        let path = self.directory.join(name);
        let found = fetch(name, &path).with_context(|| format!("cannot fetch WAL segment {name}"))?;
        if found {
            self.present.push((number, path));
        }
        Ok(found)
    }

    fn keep_from(&mut self, first: u64) -> Result<()> {
        for (_, path) in self.present.extract_if(.., |(number, _)| *number < first) {
            std::fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
        Ok(())
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        for (_, path) in self.present.drain(..) {
            // The directory is a temporary one: whoever made it removes what is left.
            let _ = std::fs::remove_file(path);
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ran {
    /// To the end that was asked for.
    Whole,
    /// `visit` had enough.
    Stopped,
    /// It met something that is no record: the end of the WAL, as a rule.
    Invalid,
}

fn dump(
    pg_waldump: &Path,
    directory: &Path,
    timeline: Timeline,
    (start, end): (Lsn, Lsn),
    kind: Kind,
    found: &mut dyn FnMut(Record) -> ControlFlow<()>,
) -> Result<Ran> {
    let mut command = Command::new(pg_waldump);
    command.arg("--path").arg(directory).arg("--timeline").arg(timeline.to_string());
    command.arg("--start").arg(start.to_string()).arg("--end").arg(end.to_string());
    command.arg("--rmgr").arg(match kind {
        Kind::Transactions => "Transaction",
        Kind::RestorePoints => "XLOG",
        Kind::Tablespaces => "Tablespace",
    });
    // Times are printed in the process's zone, messages in its language.
    command.env("TZ", "UTC").env("LC_ALL", "C").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("cannot run {}", pg_waldump.display()))?;
    let (Some(stdout), Some(mut stderr)) = (child.stdout.take(), child.stderr.take()) else {
        bail!("{} has no output", pg_waldump.display());
    };
    let words = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // At most a page of it; a pipe that breaks has said enough.
        let _ = stderr.by_ref().take(8192).read_to_end(&mut bytes);
        let _ = std::io::copy(&mut stderr, &mut std::io::sink());
        String::from_utf8_lossy(&bytes).trim().to_owned()
    });
    let mut stopped = false;
    let mut lines = BufReader::new(stdout);
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = lines.read_until(b'\n', &mut line).context("cannot read the output of pg_waldump")?;
        if read == 0 {
            break;
        }
        if let Some(record) = parse_line(String::from_utf8_lossy(&line).trim_end_matches('\n'))
            && found(record).is_break()
        {
            stopped = true;
            // It may have ended by itself meanwhile.
            let _ = child.kill();
            break;
        }
    }
    let status = child.wait().context("cannot wait for pg_waldump")?;
    let words = words.join().unwrap_or_default();
    if stopped {
        return Ok(Ran::Stopped);
    }
    if status.success() {
        return Ok(Ran::Whole);
    }
    // "error in WAL record at …", "could not find a valid record after …": nothing more to read here.
    if words.contains("error in WAL record") || words.contains("could not find a valid record") {
        return Ok(Ran::Invalid);
    }
    bail!("pg_waldump from {start} to {end} on timeline {timeline} failed ({status}): {words}");
}

/// One line of `pg_waldump`, if it is one of our records:
/// `rmgr: Transaction len (rec/tot):     34/    34, tx:        736, lsn: 0/030001B0, prev 0/03000148, desc: COMMIT 2026-11-22 08:15:00.123456 UTC`
fn parse_line(line: &str) -> Option<Record> {
    let (head, description) = line.split_once(", desc: ")?;
    let field = |name: &str| head.split_once(name).map(|(_, rest)| rest.split(',').next().unwrap_or_default().trim());
    let lsn = field("lsn: ")?.parse().ok()?;
    let (verb, rest) = description.split_once(' ')?;
    let event = match (field("rmgr: ")?.split_whitespace().next()?, verb) {
        ("XLOG", "RESTORE_POINT") => Event::RestorePoint { name: rest.to_owned() },
        ("Tablespace", "CREATE") => {
            let (oid, location) = rest.split_once(' ')?;
            let location = location.strip_prefix('"')?.strip_suffix('"')?.to_owned();
            Event::CreateTablespace { oid: oid.parse().ok()?, location }
        }
        ("Transaction", "COMMIT") => Event::Commit { xid: field("tx: ")?.parse().ok()?, time_micros: micros(rest)? },
        ("Transaction", "ABORT") => Event::Abort { xid: field("tx: ")?.parse().ok()?, time_micros: micros(rest)? },
        ("Transaction", "COMMIT_PREPARED" | "ABORT_PREPARED") => {
            let (xid, time) = rest.split_once(": ")?;
            let (xid, time_micros) = (xid.parse().ok()?, micros(time)?);
            match verb {
                "COMMIT_PREPARED" => Event::Commit { xid, time_micros },
                _ => Event::Abort { xid, time_micros },
            }
        }
        _ => return None,
    };
    Some(Record { lsn, event })
}

/// `2026-11-22 08:15:00.123456 UTC; subxacts: 5 6` in microseconds since 1970.
fn micros(text: &str) -> Option<i64> {
    let time = text.split(';').next()?.trim().strip_suffix(" UTC")?;
    let time: jiff::civil::DateTime = time.parse().ok()?;
    Some(time.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp().as_microsecond())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_read_from_the_lines_of_pg_waldump() {
        let commit = "rmgr: Transaction len (rec/tot):     46/    46, tx:        736, lsn: 0/030001B0, \
            prev 0/03000148, desc: COMMIT 2026-11-22 08:15:00.000123 UTC; subxacts: 737 738";
        let expected = Event::Commit { xid: 736, time_micros: 1_795_335_300_000_123 };
        assert_eq!(parse_line(commit), Some(Record { lsn: Lsn(0x0300_01B0), event: expected }));
        let prepared = "rmgr: Transaction len (rec/tot):     46/    46, tx:          0, lsn: 1/00000028, \
            prev 0/03000148, desc: ABORT_PREPARED 740: 1970-01-01 00:00:01.000000 UTC";
        let expected = Event::Abort { xid: 740, time_micros: 1_000_000 };
        assert_eq!(parse_line(prepared), Some(Record { lsn: Lsn(0x1_0000_0028), event: expected }));
        let named = "rmgr: XLOG        len (rec/tot):     98/    98, tx:          0, lsn: 0/03000148, \
            prev 0/03000110, desc: RESTORE_POINT before, desc: drop";
        let expected = Event::RestorePoint { name: "before, desc: drop".to_owned() };
        assert_eq!(parse_line(named).map(|record| record.event), Some(expected));
        let created = "rmgr: Tablespace  len (rec/tot):     40/    40, tx:        741, lsn: 0/03000188, \
            prev 0/03000148, desc: CREATE 16400 \"/srv/a \"space\"\"";
        let expected = Event::CreateTablespace { oid: 16400, location: "/srv/a \"space\"".to_owned() };
        assert_eq!(parse_line(created).map(|record| record.event), Some(expected));
        for other in
            ["", "first record is after 0/3000000, at 0/3000028, skipping over 40 bytes", "rmgr: XLOG, desc: x"]
        {
            assert_eq!(parse_line(other), None);
        }
    }
}
