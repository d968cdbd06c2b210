//! A test that lacks something of the machine is told of and counted, never passed in silence.
//!
//! Its name and what it lacks go to stderr and to the file that `scripts/run-tests.sh` counts. With `CI=true` or
//! `PGHYDRANT_REQUIRE_ALL=1` the test fails instead. One file for the integration tests and for the unit tests of every
//! crate, which include it; it needs nothing but the standard library.

#![allow(clippy::print_stderr)]

use std::env;
use std::fs::OpenOptions;
use std::io::Write;

/// Tells and counts that `test` is left out because the machine lacks `missing`.
pub(crate) fn leave_out(test: &str, missing: &str) {
    let line = format!("{test}: lacks {missing}");
    let strict = |name: &str| env::var(name).is_ok_and(|value| !value.is_empty() && value != "0" && value != "false");
    assert!(!strict("CI") && !strict("PGHYDRANT_REQUIRE_ALL"), "{line}; no test may be left out here");
    eprintln!("left out: {line}");
    if let Ok(path) = env::var("PGHYDRANT_TESTS_LEFT_OUT") {
        // One short O_APPEND write: lines of parallel tests do not mix.
        let told = OpenOptions::new()
            .append(true)
            .create(true)
            .open(&path)
            .and_then(|mut file| file.write_all(format!("{line}\n").as_bytes()));
        assert!(told.is_ok(), "cannot write {path}: {told:?}");
    }
}
