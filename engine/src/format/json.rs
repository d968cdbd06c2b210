//! The readable files: JSON with its versions at the beginning and its checksum in the last line but one.
//!
//! ```text
//! {
//!   "format": 1,
//!   "minimum_reader": 1,
//!   ...
//!   "checksum": "<BLAKE3 of every byte before this line>"
//! }
//! ```
//!
//! Versions are looked at first, so that a newer format is told as such, then the checksum, and only then any other
//! field. By hand `head -n -2 FILE | b3sum` gives the checksum. From its line on a file has one form only, so there is no
//! bit in it that can change unseen, white space included.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::checksum::Hash;
use crate::format::Malformed;
use crate::format::header::check_versions;

/// What stands before the checksum's hex digits.
const CHECKSUM_BEGIN: &str = "  \"checksum\": \"";
/// What stands behind them, to the end of the file.
const CHECKSUM_END: &str = "\"\n}\n";
/// From the beginning of the checksum's line to the end of the file.
const CHECKSUM_BYTES: usize = CHECKSUM_BEGIN.len() + 2 * size_of::<Hash>() + CHECKSUM_END.len();
/// How pretty JSON ends where no further field follows.
const OBJECT_END: &str = "\n}";

/// What every one of the readable files begins with, whatever its version.
#[derive(Deserialize)]
struct Versions {
    format: u16,
    minimum_reader: u16,
}

/// The content of a readable file: the fields of `value`, which has some, and the checksum.
pub(super) fn write_json(value: &impl Serialize) -> Result<Vec<u8>, Malformed> {
    let refuse = |detail: &dyn std::fmt::Display| Malformed::damaged(0, format!("cannot be written as JSON: {detail}"));
    let json = serde_json::to_string_pretty(value).map_err(|error| refuse(&error))?;
    let fields = json.strip_suffix(OBJECT_END).ok_or_else(|| refuse(&"it is no object with fields"))?;
    Ok(sealed(&format!("{fields},\n")))
}

/// `before` with the line of its checksum behind it.
pub(super) fn sealed(before: &str) -> Vec<u8> {
    let checksum = Hash::of(before.as_bytes());
    format!("{before}{CHECKSUM_BEGIN}{checksum}{CHECKSUM_END}").into_bytes()
}

/// Reads a file. Unknown fields are passed over, since later writers of the same format add some.
pub(super) fn read_json<T: DeserializeOwned>(bytes: &[u8], what: &str) -> Result<T, Malformed> {
    let refuse = |error: serde_json::Error| {
        Malformed::damaged(offset_of(bytes, error.line(), error.column()), format!("not a {what}'s JSON: {error}"))
    };
    let versions: Versions = serde_json::from_slice(bytes).map_err(refuse)?;
    check_versions(versions.format, versions.minimum_reader, what)?;
    check_checksum(bytes, what)?;
    serde_json::from_slice(bytes).map_err(refuse)
}

fn check_checksum(bytes: &[u8], what: &str) -> Result<(), Malformed> {
    let (before, line) = bytes.split_at(bytes.len().saturating_sub(CHECKSUM_BYTES));
    let hex = line.strip_prefix(CHECKSUM_BEGIN.as_bytes()).and_then(|rest| rest.strip_suffix(CHECKSUM_END.as_bytes()));
    let found = Hash::of(before).to_string();
    match hex {
        Some(expected) if expected == found.as_bytes() => Ok(()),
        Some(expected) => {
            let expected = String::from_utf8_lossy(expected);
            let detail = format!("the {what}'s JSON says it has BLAKE3 {expected}, but it has {found}");
            Err(Malformed::damaged(0, detail))
        }
        None => {
            let detail = format!("the {what}'s JSON does not end with its checksum's line and a brace");
            Err(Malformed::damaged(before.len(), detail))
        }
    }
}

/// The byte at which serde_json stopped, from the line and column that it tells.
fn offset_of(bytes: &[u8], line: usize, column: usize) -> usize {
    let before: usize =
        bytes.split_inclusive(|byte| *byte == b'\n').take(line.saturating_sub(1)).map(<[u8]>::len).sum();
    before.saturating_add(column.saturating_sub(1)).min(bytes.len())
}

#[cfg(test)]
pub(in crate::format) mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// A file that somebody changed and who then gave it the right checksum, or that a later version wrote.
    pub(in crate::format) fn resealed(json: &[u8], from: &str, to: &str) -> Vec<u8> {
        let text = std::str::from_utf8(&json[..json.len() - CHECKSUM_BYTES]).unwrap();
        assert!(text.contains(from), "{from}");
        sealed(&text.replacen(from, to, 1))
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Sample {
        format: u16,
        minimum_reader: u16,
        text: String,
        number: u64,
    }

    fn sample() -> Sample {
        Sample { format: 1, minimum_reader: 1, text: "0/3000028".to_owned(), number: 17 }
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_refused() {
        let json = write_json(&sample()).unwrap();
        assert_eq!(read_json(&json, "sample"), Ok(sample()));
        for bit in 0..json.len() * 8 {
            let mut damaged = json.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let refused = read_json::<Sample>(&damaged, "sample").unwrap_err();
            assert!(matches!(refused, Malformed::Damaged { .. }), "bit {bit}: {refused}");
        }
        for bytes in 0..json.len() {
            assert!(matches!(read_json::<Sample>(&json[..bytes], "sample"), Err(Malformed::Damaged { .. })), "{bytes}");
        }
    }

    #[test]
    fn the_checksum_is_of_all_lines_but_the_last_two() {
        let json = String::from_utf8(write_json(&sample()).unwrap()).unwrap();
        let lines: Vec<_> = json.split_inclusive('\n').collect();
        let (before, line) = lines.split_at(lines.len() - 2);
        let expected = blake3::hash(before.concat().as_bytes()).to_hex();
        assert_eq!(line, [format!("  \"checksum\": \"{expected}\"\n"), "}\n".to_owned()]);
    }

    #[test]
    fn what_was_found_is_told() {
        let json = write_json(&sample()).unwrap();
        let told = |json: &[u8]| read_json::<Sample>(json, "sample").unwrap_err().to_string();
        let edited = String::from_utf8(json.clone()).unwrap().replace("3000028", "3000029");
        assert!(
            told(edited.as_bytes()).contains("the sample's JSON says it has BLAKE3 "),
            "{}",
            told(edited.as_bytes())
        );
        let bare = br#"{"format": 1, "minimum_reader": 1, "text": "", "number": 1}"#;
        assert!(told(bare).contains("does not end with its checksum"), "{}", told(bare));
        // A field of a later writer of this format is passed over, a newer format is told as such.
        assert_eq!(read_json(&resealed(&json, "{\n", "{\n  \"new\": [1],\n"), "sample"), Ok(sample()));
        let newer = br#"{"format": 9, "minimum_reader": 9, "sealed": "in another way"}"#;
        assert!(matches!(read_json::<Sample>(newer, "sample"), Err(Malformed::Unsupported { .. })));
    }

    #[test]
    fn json_of_any_depth_is_refused_or_read_without_a_stack_overflow() {
        for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
            for depth in [100, 200, 1_000_000] {
                let nested = format!("{}1{}", open.repeat(depth), close.repeat(depth));
                let before = format!("{{\n  \"deep\": {nested},\n  \"format\": 1,\n  \"minimum_reader\": 1,\n");
                let _ = read_json::<Sample>(&sealed(&before), "sample").unwrap_err();
                let known = format!("{{\n  \"format\": 1,\n  \"minimum_reader\": 1,\n  \"text\": {nested},\n");
                let _ = read_json::<Sample>(&sealed(&known), "sample").unwrap_err();
            }
        }
    }
}
