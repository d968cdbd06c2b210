//! The editor of `postgresql.conf`: any text is read, and what an edit adds its inverse takes out, byte for byte.

#![no_main]

// The file depends on nothing; the program that it belongs to is a binary and cannot be linked to.
#[allow(dead_code)]
#[path = "../../cli/src/restore/conf.rs"]
mod conf;

use conf::{Setting, entries, has_block, quoted, restored, silenced, value_of, with_block, without_block};
use libfuzzer_sys::fuzz_target;

const STAMP: &str = "restore 20261122T081500Z";
const NAMES: [&str; 3] = ["port", "recovery_target_name", "include"];

fuzz_target!(|data: &[u8]| {
    // The first line is a value to set, the rest the text to edit.
    let (value, text) = data.split_at(data.iter().position(|byte| *byte == b'\n').unwrap_or(0));
    let value = String::from_utf8_lossy(value).replace(['\r', '\0'], "");
    if entries(text).iter().any(|entry| entry.name.is_empty()) {
        panic!("an entry without a name");
    }
    // A text that has our marks already is the outcome of an edit, not its input.
    if text.windows(9).any(|window| window == b"pghydrant") {
        let _ = (without_block(text, STAMP), restored(text, STAMP), has_block(text, STAMP));
        return;
    }

    let settings = [Setting::new("port", "5433"), Setting::new("cluster_name", value.clone())];
    let once = with_block(text, STAMP, "Why.", &settings);
    assert_eq!(with_block(&once, STAMP, "Why.", &settings), once);
    assert!(has_block(&once, STAMP));
    assert_eq!(value_of(&once, "cluster_name"), Some(value.clone()), "quoted as {}", quoted(&value));
    assert_eq!(without_block(&once, STAMP), text);

    let silent = silenced(text, STAMP, &NAMES);
    assert!(entries(&silent).iter().all(|entry| !NAMES.contains(&entry.name.as_str())));
    assert_eq!(silenced(&silent, STAMP, &NAMES), silent);
    assert_eq!(restored(&silent, STAMP), text);
});
