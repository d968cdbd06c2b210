//! What `pg_amcheck` prints, read as it comes: any amount of it is held in a few lines.

use std::collections::BTreeSet;
use std::io::BufRead;

/// So many of the relations are named in the report; all are counted.
const EXAMPLES: usize = 10;
/// A message of the server's is seldom longer, and what it quotes may be.
const EXAMPLE_CHARACTERS_MAX: usize = 300;

/// How far it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) relations: u64,
    pub(super) bytes: u64,
    pub(super) bytes_all: u64,
}

impl Counts {
    /// A line of `--progress`: `173/295 relations (58%),  512/1024 pages (50%)`.
    pub(super) fn parse(line: &str) -> Option<Self> {
        /// What it counts in, whatever the server was built with.
        const PAGE_BYTES: u64 = 8192;
        let (relations, pages) = line.trim().split_once(" relations (")?;
        let (_, pages) = pages.split_once("),")?;
        let (pages, _) = pages.split_once(" pages (")?;
        let of = |text: &str| -> Option<(u64, u64)> {
            let (done, all) = text.trim().split_once('/')?;
            Some((done.trim().parse().ok()?, all.trim().parse().ok()?))
        };
        let ((relations, _), (done, all)) = (of(relations)?, of(pages)?);
        let bytes = |pages: u64| pages.saturating_mul(PAGE_BYTES);
        Some(Self { relations, bytes: bytes(done), bytes_all: bytes(all) })
    }
}

/// The relations with something wrong in them.
#[derive(Debug, Default)]
pub(super) struct Findings {
    relations: BTreeSet<String>,
    examples: Vec<String>,
    /// The example that the next line belongs to.
    open: bool,
}

impl Findings {
    /// Reads to the end.
    pub(super) fn read(stdout: impl BufRead) -> Self {
        let mut findings = Self::default();
        for line in stdout.split(b'\n').map_while(Result::ok) {
            findings.take(&String::from_utf8_lossy(&line));
        }
        findings
    }

    /// `heap table "db.schema.table", block 3, offset 2:`, `btree index "db.schema.index":`, and what is wrong, indented.
    fn take(&mut self, line: &str) {
        let named = ["heap table \"", "btree index \""].into_iter().find_map(|kind| line.strip_prefix(kind));
        if let Some((name, _)) = named.and_then(|rest| rest.rsplit_once('"')) {
            self.open = self.relations.insert(name.to_owned()) && self.examples.len() < EXAMPLES;
            if self.open {
                self.examples.push(line.trim_end_matches(':').to_owned());
            }
        } else if let (true, Some(example)) = (self.open && !line.trim().is_empty(), self.examples.last_mut()) {
            example.push_str(": ");
            example.extend(line.trim().chars().take(EXAMPLE_CHARACTERS_MAX));
            self.open = false;
        }
    }

    /// How many relations.
    pub(super) fn failed(&self) -> u64 {
        self.relations.len() as u64
    }

    /// The first of them, with what is wrong.
    pub(super) fn into_examples(self) -> Vec<String> {
        self.examples
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn progress_is_read_as_pg_amcheck_prints_it() {
        let counts = Counts::parse("173/295 relations (58%),  512/1024 pages (50%)").unwrap();
        assert_eq!(counts, Counts { relations: 173, bytes: 512 * 8192, bytes_all: 1024 * 8192 });
        let padded = Counts::parse("  3/295 relations (1%),    0/1024 pages (0%) (postgres               )\r").unwrap();
        assert_eq!((padded.relations, padded.bytes), (3, 0));
        for other in ["", "pg_amcheck: error: x", "1/2 relations (x", "a/b relations (1%), 1/1 pages (1%)"] {
            assert_eq!(Counts::parse(other), None, "{other}");
        }
    }

    #[test]
    fn each_relation_counts_once_and_is_named_with_the_first_thing_that_is_wrong() {
        let text = "heap table \"db.public.t\", block 0, offset 2:\n    xmin 7 precedes\nheap table \"db.public.t\", block 1:\n    \
                    more\nbtree index \"db.public.a\"b\":\n    ERROR:  item order invariant violated\n    DETAIL:  x\n";
        let findings = Findings::read(text.as_bytes());
        assert_eq!(findings.failed(), 2);
        assert_eq!(
            findings.into_examples(),
            [
                "heap table \"db.public.t\", block 0, offset 2: xmin 7 precedes",
                "btree index \"db.public.a\"b\": ERROR:  item order invariant violated",
            ]
        );
    }

    #[test]
    fn however_much_is_wrong_a_few_lines_tell_it() {
        let mut text = String::new();
        for number in 0..1000 {
            text.push_str(&format!("heap table \"db.public.t{number}\":\n    {}\n", "ü".repeat(1000)));
        }
        let findings = Findings::read(text.as_bytes());
        assert_eq!(findings.failed(), 1000);
        let examples = findings.into_examples();
        let short = |text: &String| text.chars().count() <= EXAMPLE_CHARACTERS_MAX + 50;
        assert!(examples.len() == EXAMPLES && examples.iter().all(short));
    }
}
