//! PostgreSQL's configuration files as text: what they say, and how a restore adds to them and takes it out again.
//!
//! Two edits are enough. [`with_block`] appends a marked block of settings: the last line of `postgresql.conf` wins
//! over all before it and over every included file. [`silenced`] comments out single lines of
//! `postgresql.auto.conf`, which is read after `postgresql.conf` and would win over the block. Each has its inverse,
//! which needs nothing but the text, so that a line that somebody adds in between is not lost.
//!
//! Everything works on bytes, since a `postgresql.conf` may be in any encoding, and follows the lexer of PostgreSQL
//! (`guc-file.l`): a value never spans lines, names ignore case, `=` is optional, quotes are doubled or escaped.
//!
//! Always true, for a text without our marks: `without_block(with_block(text)) == text`,
//! `restored(silenced(text)) == text`, byte for byte; and adding a block twice is the same as adding it once.
//!
//! This file depends on nothing, so that the fuzzer can include it.

use std::collections::{BTreeMap, BTreeSet};

/// One setting, as it will be written: the value is quoted by [`with_block`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Setting {
    /// The parameter, or an empty string for a comment line.
    pub(crate) name: String,
    /// Its value, unquoted.
    pub(crate) value: String,
}

impl Setting {
    /// `name = 'value'`.
    pub(crate) fn new(name: &str, value: impl Into<String>) -> Self {
        Self { name: name.to_owned(), value: value.into() }
    }
}

/// One line of a configuration file that sets something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The line, from 0.
    pub(crate) line: usize,
    /// The parameter, in lower case; `include`, `include_dir` and `include_if_exists` are entries too.
    pub(crate) name: String,
    /// The value, unquoted.
    pub(crate) value: String,
}

/// `value` in single quotes as PostgreSQL's lexer reads it back: quotes and backslashes doubled. What no quoted value
/// can hold, a line break or a NUL, becomes a space.
pub(crate) fn quoted(value: &str) -> String {
    let mut out = String::with_capacity(value.len() + 2);
    out.push('\'');
    for letter in value.chars() {
        match letter {
            '\'' => out.push_str("''"),
            '\\' => out.push_str("\\\\"),
            '\n' | '\r' | '\0' => out.push(' '),
            other => out.push(other),
        }
    }
    out.push('\'');
    out
}

/// `text` with a block of `settings` at its end, between two lines that carry `stamp`. A block of the same stamp
/// that is already there is replaced.
pub(crate) fn with_block(text: &[u8], stamp: &str, why: &str, settings: &[Setting]) -> Vec<u8> {
    let mut out = without_block(text, stamp);
    let joined = out.last().is_some_and(|byte| *byte != b'\n');
    if joined {
        out.push(b'\n');
    }
    let begin = if joined { begin_after_open_line(stamp) } else { begin(stamp) };
    out.extend_from_slice(begin.as_bytes());
    for line in why.lines() {
        out.extend_from_slice(format!("# {line}\n").as_bytes());
    }
    for setting in settings {
        out.extend_from_slice(format!("{} = {}\n", setting.name, quoted(&setting.value)).as_bytes());
    }
    out.extend_from_slice(end(stamp).as_bytes());
    out
}

/// `text` without the block of `stamp`, if it has one; the inverse of [`with_block`].
pub(crate) fn without_block(text: &[u8], stamp: &str) -> Vec<u8> {
    let mut out = text.to_vec();
    while let Some((start, stop, joined)) = find_block(&out, stamp) {
        // The line break before the block is ours where the text had none at its end. Text that somebody added
        // behind the block still needs it.
        let start = if joined && stop == out.len() { start - 1 } else { start };
        out.drain(start..stop);
    }
    out
}

/// True where `text` has a whole block of `stamp`.
pub(crate) fn has_block(text: &[u8], stamp: &str) -> bool {
    find_block(text, stamp).is_some()
}

/// `text` with every line that sets one of `names` commented out under `stamp`.
pub(crate) fn silenced(text: &[u8], stamp: &str, names: &[&str]) -> Vec<u8> {
    let silent: BTreeSet<usize> = entries(text)
        .into_iter()
        .filter(|entry| names.contains(&entry.name.as_str()))
        .map(|entry| entry.line)
        .collect();
    let prefix = silence(stamp);
    let mut out = Vec::with_capacity(text.len() + silent.len() * prefix.len());
    for (number, line) in lines(text).enumerate() {
        if silent.contains(&number) {
            out.extend_from_slice(prefix.as_bytes());
        }
        out.extend_from_slice(line);
    }
    out
}

/// `text` with what [`silenced`] commented out back in force.
pub(crate) fn restored(text: &[u8], stamp: &str) -> Vec<u8> {
    let prefix = silence(stamp);
    lines(text).flat_map(|line| line.strip_prefix(prefix.as_bytes()).unwrap_or(line)).copied().collect()
}

/// `original` with what somebody set or unset in `found`, a file that began as `written`, and the names of that. For a
/// file that PostgreSQL has written anew: it keeps no comment, and so nothing of what [`silenced`] left in one.
pub(crate) fn merged(original: &[u8], written: &[u8], found: &[u8]) -> (Vec<u8>, Vec<String>) {
    let values = |text: &[u8]| -> BTreeMap<String, String> {
        entries(text).into_iter().map(|entry| (entry.name, entry.value)).collect()
    };
    let (before, given, now) = (values(original), values(written), values(found));
    // What is as it was before stays, so that it can be done again.
    let set = now.into_iter().filter(|(name, value)| given.get(name) != Some(value) && before.get(name) != Some(value));
    let set: BTreeMap<String, String> = set.collect();
    let found: Vec<String> = entries(found).into_iter().map(|entry| entry.name).collect();
    let unset = given.into_keys().filter(|name| !found.contains(name));
    let names: BTreeSet<String> = set.keys().cloned().chain(unset).collect();
    let gone: BTreeSet<usize> =
        entries(original).into_iter().filter(|entry| names.contains(&entry.name)).map(|entry| entry.line).collect();
    let mut out: Vec<u8> = lines(original)
        .enumerate()
        .filter(|(number, _)| !gone.contains(number))
        .flat_map(|(_, line)| line)
        .copied()
        .collect();
    if out.last().is_some_and(|byte| *byte != b'\n') {
        out.push(b'\n');
    }
    for (name, value) in set {
        out.extend_from_slice(format!("{name} = {}\n", quoted(&value)).as_bytes());
    }
    (out, names.into_iter().collect())
}

/// Every line that sets something, in order. Lines that PostgreSQL would refuse are left out.
pub(crate) fn entries(text: &[u8]) -> Vec<Entry> {
    lines(text).enumerate().filter_map(|(line, bytes)| entry(line, bytes)).collect()
}

/// The value that counts: the last one set for `name`.
pub(crate) fn value_of(text: &[u8], name: &str) -> Option<String> {
    entries(text).into_iter().rfind(|entry| entry.name == name).map(|entry| entry.value)
}

fn begin(stamp: &str) -> String {
    format!("# --- pghydrant {stamp}: begin ---\n")
}

/// Says that the line break before it is not the original's.
fn begin_after_open_line(stamp: &str) -> String {
    format!("# --- pghydrant {stamp}: begin (the line before had no line break) ---\n")
}

fn end(stamp: &str) -> String {
    format!("# --- pghydrant {stamp}: end ---\n")
}

fn silence(stamp: &str) -> String {
    format!("#[pghydrant {stamp}] ")
}

/// Where the block of `stamp` starts and ends, and whether the line break before it is ours.
fn find_block(text: &[u8], stamp: &str) -> Option<(usize, usize, bool)> {
    let (plain, joined, end) = (begin(stamp), begin_after_open_line(stamp), end(stamp));
    let mut started: Option<(usize, bool)> = None;
    let mut offset = 0;
    for line in lines(text) {
        if line == plain.as_bytes() {
            started = Some((offset, false));
        } else if line == joined.as_bytes() && offset > 0 {
            started = Some((offset, true));
        } else if let (true, Some((start, joined))) = (line == end.as_bytes(), started) {
            return Some((start, offset + line.len(), joined));
        }
        offset += line.len();
    }
    None
}

/// The lines of `text` with their line breaks.
fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split_inclusive(|byte| *byte == b'\n')
}

/// `name [=] value [# comment]`.
fn entry(line: usize, bytes: &[u8]) -> Option<Entry> {
    let bytes = skip_blank(bytes);
    let name_bytes = bytes.iter().position(|byte| !is_name(*byte)).unwrap_or(bytes.len());
    let (name, rest) = bytes.split_at(name_bytes);
    if name.is_empty() || name[0].is_ascii_digit() {
        return None;
    }
    let rest = skip_blank(rest);
    let rest = skip_blank(rest.strip_prefix(b"=").unwrap_or(rest));
    let value = match rest.first()? {
        b'\'' => unquoted(&rest[1..])?,
        b'#' | b'\n' => return None,
        _ => {
            let stop = rest.iter().position(|byte| is_blank(*byte) || *byte == b'#').unwrap_or(rest.len());
            rest[..stop].to_vec()
        }
    };
    let name = String::from_utf8_lossy(name).to_ascii_lowercase();
    Some(Entry { line, name, value: String::from_utf8_lossy(&value).into_owned() })
}

/// A parameter's name, qualified ones (`pg_stat_statements.max`) included.
fn is_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'.' || byte >= 0x80
}

fn is_blank(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\r' | b'\n')
}

fn skip_blank(bytes: &[u8]) -> &[u8] {
    let start = bytes.iter().position(|byte| !is_blank(*byte)).unwrap_or(bytes.len());
    &bytes[start..]
}

/// What stands between the quote before `bytes` and the one that ends it, as `DeescapeQuotedString` reads it.
fn unquoted(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    let mut at = 0;
    loop {
        match *bytes.get(at)? {
            b'\n' => return None,
            b'\'' if bytes.get(at + 1) == Some(&b'\'') => {
                out.push(b'\'');
                at += 2;
            }
            b'\'' => return Some(out),
            b'\\' => {
                let (byte, taken) = escape(&bytes[at + 1..])?;
                out.push(byte);
                at += 1 + taken;
            }
            byte => {
                out.push(byte);
                at += 1;
            }
        }
    }
}

/// The byte that an escape stands for, and how many bytes follow the backslash.
fn escape(bytes: &[u8]) -> Option<(u8, usize)> {
    Some(match *bytes.first()? {
        b'\n' => return None,
        b'b' => (8, 1),
        b'f' => (12, 1),
        b'n' => (b'\n', 1),
        b'r' => (b'\r', 1),
        b't' => (b'\t', 1),
        b'0'..=b'7' => {
            let digits = bytes.iter().take(3).take_while(|byte| (b'0'..=b'7').contains(*byte)).count();
            let value = bytes[..digits].iter().fold(0_u32, |value, digit| value * 8 + u32::from(*digit - b'0'));
            (value.to_le_bytes()[0], digits)
        }
        other => (other, 1),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STAMP: &str = "restore 20261122T081500Z";

    #[test]
    fn what_stands_in_the_file_is_read_as_postgresql_reads_it() {
        let text = b"port = 5432 # why\nPORT 5433\n  work_mem='4MB'\nfoo.bar = 'it''s \\'x\\' \\\\ \\101'\n\
                     # port = 1\n= 3\nport =\nbroken = 'open\ninclude_dir 'conf.d'\nlog_line_prefix = '%m # '\r\nssl=on";
        let found: Vec<_> = entries(text).into_iter().map(|entry| (entry.line, entry.name, entry.value)).collect();
        let wanted = [
            (0, "port", "5432"),
            (1, "port", "5433"),
            (2, "work_mem", "4MB"),
            (3, "foo.bar", "it's 'x' \\ A"),
            (8, "include_dir", "conf.d"),
            (9, "log_line_prefix", "%m # "),
            (10, "ssl", "on"),
        ];
        assert_eq!(found, wanted.map(|(line, name, value)| (line, name.to_owned(), value.to_owned())));
        assert_eq!(value_of(text, "port").as_deref(), Some("5433"));
    }

    #[test]
    fn the_block_comes_last_and_a_missing_line_break_is_remembered() {
        let settings = [Setting::new("port", "5433"), Setting::new("restore_command", "cp '/a b/%f' \\x")];
        let text = with_block(b"port = 5432", STAMP, "Why.", &settings);
        assert_eq!(
            String::from_utf8_lossy(&text),
            "port = 5432\n\
             # --- pghydrant restore 20261122T081500Z: begin (the line before had no line break) ---\n\
             # Why.\n\
             port = '5433'\n\
             restore_command = 'cp ''/a b/%f'' \\\\x'\n\
             # --- pghydrant restore 20261122T081500Z: end ---\n"
        );
        assert_eq!(without_block(&text, STAMP), b"port = 5432");
        assert_eq!(value_of(&text, "restore_command").as_deref(), Some("cp '/a b/%f' \\x"));
    }

    #[test]
    fn what_was_added_behind_the_block_survives_it() {
        for original in ["a = 1\n", "a = 1", ""] {
            let mut text = with_block(original.as_bytes(), STAMP, "", &[Setting::new("port", "1")]);
            text.extend_from_slice(b"b = 2\n");
            let reverted = without_block(&text, STAMP);
            let names: Vec<_> = entries(&reverted).into_iter().map(|entry| entry.name).collect();
            assert_eq!(names.last().map(String::as_str), Some("b"), "{original:?}");
            assert_eq!(names.len(), if original.is_empty() { 1 } else { 2 }, "{original:?}");
        }
    }

    #[test]
    fn a_block_of_another_restore_is_part_of_the_text() {
        let old = with_block(b"a = 1\n", "restore old", "", &[Setting::new("port", "1")]);
        let new = with_block(&old, STAMP, "", &[Setting::new("port", "2")]);
        assert!(has_block(&new, "restore old") && has_block(&new, STAMP));
        assert_eq!(without_block(&new, STAMP), old);
    }

    #[test]
    fn only_the_lines_that_would_overrule_are_silenced() {
        let text = b"# Do not edit\nwork_mem = '4MB'\nRecovery_Target_Name = 'x'\nport = 1";
        let silent = silenced(text, STAMP, &["recovery_target_name", "port"]);
        assert_eq!(entries(&silent).len(), 1);
        assert_eq!(restored(&silent, STAMP), text);
    }

    #[test]
    fn what_was_silenced_survives_a_file_that_postgresql_wrote_anew() {
        let original = b"# Do not edit\nport = 1\nwork_mem = '4MB'\nrestore_command = 'cp'\nssl = on";
        let written = silenced(original, STAMP, &["port", "restore_command"]);
        let found = b"# Do not edit\nport = '7'\nwork_mem = '5MB'\n";
        let (text, names) = merged(original, &written, found);
        let wanted = "# Do not edit\nrestore_command = 'cp'\nport = '7'\nwork_mem = '5MB'\n";
        assert_eq!(String::from_utf8_lossy(&text), wanted);
        assert_eq!(names, ["port", "ssl", "work_mem"]);
        assert_eq!(merged(original, &written, &text).0, text, "again");
        assert_eq!(
            merged(original, &written, &written),
            (b"# Do not edit\nport = 1\nwork_mem = '4MB'\nrestore_command = 'cp'\nssl = on\n".to_vec(), vec![])
        );
    }

    /// Lines that look like a configuration's, with and without their line break, quotes and carriage returns.
    fn texts() -> impl Strategy<Value = Vec<u8>> {
        let line = prop_oneof![
            "[a-z_.]{1,8} ?=? ?'?[ -~\r]{0,12}'?",
            Just("port = 5432".to_owned()),
            Just("# --- pghydrant kept: begin ---".to_owned()),
            Just(String::new()),
        ];
        (prop::collection::vec(line, 0..8), any::<bool>(), prop::collection::vec(any::<u8>(), 0..4)).prop_map(
            |(lines, open, tail)| {
                let mut text = lines.join("\n").into_bytes();
                if !open {
                    text.push(b'\n');
                }
                text.extend(tail);
                text
            },
        )
    }

    proptest! {
        #[test]
        fn reverting_gives_back_every_byte(text in texts(), value in "\\PC{0,20}") {
            let settings = [Setting::new("port", "5433"), Setting::new("cluster_name", value.clone())];
            let once = with_block(&text, STAMP, "Why.\nAnd.", &settings);
            prop_assert_eq!(&with_block(&once, STAMP, "Why.\nAnd.", &settings), &once);
            prop_assert_eq!(without_block(&once, STAMP), text.clone());
            prop_assert_eq!(value_of(&once, "cluster_name"), Some(value));
            let silent = silenced(&text, STAMP, &["port"]);
            prop_assert_eq!(value_of(&silent, "port"), None);
            prop_assert_eq!(&silenced(&silent, STAMP, &["port"]), &silent);
            prop_assert_eq!(restored(&silent, STAMP), text);
        }

        #[test]
        fn any_bytes_are_read_without_a_panic(text in prop::collection::vec(any::<u8>(), 0..200)) {
            let settings = [Setting::new("port", "1")];
            prop_assert_eq!(without_block(&with_block(&text, STAMP, "", &settings), STAMP), text.clone());
            prop_assert_eq!(restored(&silenced(&text, STAMP, &["port"]), STAMP), text);
        }
    }
}
