//! What `pg_hba.conf` and `pg_ident.conf` include: lists of names (`@file` in a field) and, from PostgreSQL 16 on, whole
//! files (`include`, `include_if_exists`, `include_dir`). Where one is missing that must be there, the server does not
//! start.
//!
//! The lines are read as PostgreSQL's lexer reads them (`hba.c`): a line that ends with a backslash goes on in the next,
//! also in a comment; words end at blanks and commas; quotes keep both, and a doubled quote is one. A word that begins
//! with a quote is never a list.
//!
//! This file depends on nothing.

use std::ops::Range;

/// What is included, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `@file`: names.
    List,
    /// `include`
    File,
    /// `include_if_exists`
    IfExists,
    /// `include_dir`
    Directory,
}

/// One inclusion.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Inclusion {
    pub(crate) kind: Kind,
    /// The path as it is written, without quotes.
    pub(crate) path: String,
    /// The line's number among the lines that PostgreSQL sees.
    line: usize,
    /// The word in that line.
    word: Range<usize>,
}

impl Inclusion {
    /// As the user wrote it, for messages.
    pub(crate) fn directive(&self) -> &'static str {
        match self.kind {
            Kind::List => "@",
            Kind::File => "include",
            Kind::IfExists => "include_if_exists",
            Kind::Directory => "include_dir",
        }
    }
}

/// Every inclusion, in order.
pub(crate) fn inclusions(text: &[u8]) -> Vec<Inclusion> {
    let mut found = Vec::new();
    for (number, line) in lines(text).into_iter().enumerate() {
        let words = words(&line.joined);
        let first = words.first().map(|word| word.text.as_slice());
        let whole = match first {
            Some(b"include") => Some(Kind::File),
            Some(b"include_if_exists") => Some(Kind::IfExists),
            Some(b"include_dir") => Some(Kind::Directory),
            _ => None,
        };
        let mut take = |kind, path: &[u8], word: &Word| {
            let path = String::from_utf8_lossy(path).into_owned();
            found.push(Inclusion { kind, path, line: number, word: word.place.clone() });
        };
        if let (Some(kind), Some(path)) = (whole, words.get(1)) {
            take(kind, &path.text, path);
            continue;
        }
        for word in words.iter().filter(|word| !word.quoted) {
            if let Some(path) = word.text.strip_prefix(b"@").filter(|path| !path.is_empty()) {
                take(Kind::List, path, word);
            }
        }
    }
    found
}

/// `text` with other paths in the place of those that `other` gives one for. The lines become comments that begin with
/// `mark`, and are followed by themselves with the new path.
pub(crate) fn replaced(text: &[u8], mark: &str, other: &dyn Fn(&Inclusion) -> Option<String>) -> Vec<u8> {
    let all = inclusions(text);
    let mut out = Vec::with_capacity(text.len());
    for (number, line) in lines(text).into_iter().enumerate() {
        let changes: Vec<(&Inclusion, String)> = all
            .iter()
            .filter(|inclusion| inclusion.line == number)
            .filter_map(|inclusion| Some((inclusion, other(inclusion)?)))
            .collect();
        if changes.is_empty() {
            out.extend_from_slice(line.raw);
            continue;
        }
        for physical in line.raw.split_inclusive(|byte| *byte == b'\n') {
            out.extend_from_slice(mark.as_bytes());
            out.extend_from_slice(physical);
        }
        // A backslash at the end of the file would take our own line into the comment.
        while out.last().is_some_and(|byte| matches!(byte, b'\n' | b'\r' | b'\\')) {
            out.pop();
        }
        out.push(b'\n');
        let mut at = 0;
        for (Inclusion { kind, word, .. }, path) in changes {
            out.extend_from_slice(&line.joined[at..word.start]);
            let sign = if *kind == Kind::List { "@" } else { "" };
            out.extend_from_slice(format!("{sign}\"{}\"", path.replace('"', "\"\"")).as_bytes());
            at = word.end;
        }
        out.extend_from_slice(&line.joined[at..]);
        out.push(b'\n');
    }
    out
}

/// A line as PostgreSQL sees it, and as it stands in the file.
struct Line<'a> {
    raw: &'a [u8],
    joined: Vec<u8>,
}

fn lines(text: &[u8]) -> Vec<Line<'_>> {
    let mut lines = Vec::new();
    let (mut start, mut end, mut joined) = (0, 0, Vec::new());
    for physical in text.split_inclusive(|byte| *byte == b'\n') {
        end += physical.len();
        let bare = physical.strip_suffix(b"\n").unwrap_or(physical);
        let bare = bare.strip_suffix(b"\r").unwrap_or(bare);
        if let Some(goes_on) = bare.strip_suffix(b"\\") {
            joined.extend_from_slice(goes_on);
            if end < text.len() {
                continue;
            }
        } else {
            joined.extend_from_slice(bare);
        }
        lines.push(Line { raw: &text[start..end], joined: std::mem::take(&mut joined) });
        start = end;
    }
    lines
}

/// A word of a line.
struct Word {
    text: Vec<u8>,
    /// It begins with a quote.
    quoted: bool,
    place: Range<usize>,
}

fn words(line: &[u8]) -> Vec<Word> {
    let is_blank = |byte: u8| matches!(byte, b' ' | b'\t' | b'\r');
    let mut words = Vec::new();
    let mut at = 0;
    while let Some(&byte) = line.get(at) {
        if is_blank(byte) || byte == b',' {
            at += 1;
            continue;
        }
        if byte == b'#' {
            break;
        }
        let start = at;
        let (mut text, mut in_quotes, mut after_quote) = (Vec::new(), false, false);
        while let Some(&byte) = line.get(at) {
            if !in_quotes && (is_blank(byte) || byte == b',' || byte == b'#') {
                break;
            }
            if byte != b'"' || after_quote {
                text.push(byte);
            }
            after_quote = in_quotes && byte == b'"' && !after_quote;
            if byte == b'"' {
                in_quotes = !in_quotes;
            }
            at += 1;
        }
        words.push(Word { text, quoted: line[start] == b'"', place: start..at });
    }
    words
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_text_is_read_and_put_together_again(text in r#"[@", #a/\\\r\n]{0,40}"#) {
            let all = inclusions(text.as_bytes());
            prop_assert_eq!(&replaced(text.as_bytes(), "#", &|_| None), text.as_bytes());
            // What a path is replaced by is what is found in its place.
            let with_others = replaced(text.as_bytes(), "# ", &|_| Some("x \"y, #".to_owned()));
            let found = inclusions(&with_others);
            prop_assert_eq!(found.len(), all.len());
            prop_assert!(found.iter().all(|inclusion| inclusion.path == "x \"y, #"));
        }
    }

    fn found(text: &str) -> Vec<(Kind, String)> {
        inclusions(text.as_bytes()).into_iter().map(|inclusion| (inclusion.kind, inclusion.path)).collect()
    }

    #[test]
    fn what_is_included_is_read_as_postgresql_reads_it() {
        let text = "# @a\nlocal @dbs,\"@no\" @\"my users\",x peer # @b\ninclude more.conf\n include_dir \"hba d\"\n\
                    include_if_exists 'q'\nlocal all \\\n  @late trust\n# a comment \\\nlocal all @hidden trust\nhost all @ all md5";
        let wanted = [
            (Kind::List, "dbs"),
            (Kind::List, "my users"),
            (Kind::File, "more.conf"),
            (Kind::Directory, "hba d"),
            (Kind::IfExists, "'q'"),
            (Kind::List, "late"),
        ];
        assert_eq!(found(text), wanted.map(|(kind, path)| (kind, path.to_owned())));
        assert_eq!(found("local \"a\"\"@b\" @\"x\"\"y\" peer"), [(Kind::List, "x\"y".to_owned())]);
    }

    #[test]
    fn a_path_is_replaced_and_its_line_stays_as_a_comment() {
        let text = "local all all peer\nlocal @/etc/pg/dbs \\\n  @/srv/users md5 # why\ninclude /etc/pg/a.conf";
        let other = |inclusion: &Inclusion| inclusion.path.strip_prefix("/etc/pg/").map(str::to_owned);
        assert_eq!(
            String::from_utf8_lossy(&replaced(text.as_bytes(), "#[x] ", &other)),
            "local all all peer\n#[x] local @/etc/pg/dbs \\\n#[x]   @/srv/users md5 # why\n\
             local @\"dbs\"   @/srv/users md5 # why\n#[x] include /etc/pg/a.conf\ninclude \"a.conf\"\n"
        );
        assert_eq!(replaced(text.as_bytes(), "#[x] ", &|_| None), text.as_bytes());
    }

    #[test]
    fn any_bytes_are_read() {
        for text in [&b"\\"[..], b"\\\n", b"\"", b"@", b"include", b"\"\"\"", b"\xff@\xff, @\xfe", b"a\\\n\\\n"] {
            let _ = inclusions(text);
            assert_eq!(replaced(text, "#", &|_| None), text);
        }
    }
}
