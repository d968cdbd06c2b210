//! `backup_manifest`: the list by which PostgreSQL's `pg_verifybackup` checks the restored directory.
//!
//! It is JSON, of a form that `pg_verifybackup` reads line by line at its end: the last line holds the SHA-256 of all that
//! precedes it. The text is handed out in pieces, so that a cluster with millions of files needs no room for it.

use std::fmt::Write as _;

use engine::format::backup::WalRange;
use engine::units::SystemIdentifier;
use sha2::{Digest as _, Sha256};

/// PostgreSQL 17's manifests name the cluster; before, they did not.
const VERSION_2_FROM: u32 = 170_000;

/// One regular file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Item<'a> {
    pub(super) path: &'a str,
    pub(super) bytes: u64,
    /// Seconds since 1970.
    pub(super) modified: i64,
    pub(super) crc32c: u32,
}

/// The text under way.
pub(super) struct Checklist<'a, E> {
    sink: &'a mut dyn FnMut(&[u8]) -> Result<(), E>,
    hasher: Sha256,
    first: bool,
}

impl<'a, E> Checklist<'a, E> {
    /// Begins the text; its pieces go to `sink`.
    pub(super) fn begin(
        version_num: u32,
        system_identifier: SystemIdentifier,
        sink: &'a mut dyn FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<Self, E> {
        let mut list = Self { sink, hasher: Sha256::new(), first: true };
        if version_num >= VERSION_2_FROM {
            let head = format!("\"System-Identifier\": {system_identifier},\n");
            list.hashed(&format!("{{ \"PostgreSQL-Backup-Manifest-Version\": 2,\n{head}\"Files\": ["))?;
        } else {
            list.hashed("{ \"PostgreSQL-Backup-Manifest-Version\": 1,\n\"Files\": [")?;
        }
        Ok(list)
    }

    /// Adds a file.
    pub(super) fn add(&mut self, item: Item<'_>) -> Result<(), E> {
        let mut line = String::from(if self.first { "\n" } else { ",\n" });
        self.first = false;
        line.push_str("{ \"Path\": ");
        push_json(&mut line, item.path);
        // PostgreSQL prints the CRC's bytes as they lie in memory.
        let crc = item.crc32c.swap_bytes();
        let _ = write!(
            line,
            ", \"Size\": {}, \"Last-Modified\": \"{}\", \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"{crc:08x}\" }}",
            item.bytes,
            gmt(item.modified)
        );
        self.hashed(&line)
    }

    /// Ends the text with the WAL that makes the files consistent, and the checksum.
    pub(super) fn end(mut self, wal: &WalRange) -> Result<(), E> {
        let WalRange { timeline, start, stop } = wal;
        self.hashed(&format!(
            "\n],\n\"WAL-Ranges\": [\n{{ \"Timeline\": {timeline}, \"Start-LSN\": \"{start}\", \"End-LSN\": \"{stop}\" }}\n],\n"
        ))?;
        let digest = self.hasher.finalize().iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        });
        (self.sink)(format!("\"Manifest-Checksum\": \"{digest}\"}}\n").as_bytes())
    }

    fn hashed(&mut self, text: &str) -> Result<(), E> {
        self.hasher.update(text.as_bytes());
        (self.sink)(text.as_bytes())
    }
}

/// A JSON string, escaped as PostgreSQL's reader understands it.
fn push_json(line: &mut String, text: &str) {
    line.push('"');
    for letter in text.chars() {
        match letter {
            '"' => line.push_str("\\\""),
            '\\' => line.push_str("\\\\"),
            letter if u32::from(letter) < 0x20 => {
                let _ = write!(line, "\\u{:04x}", u32::from(letter));
            }
            letter => line.push(letter),
        }
    }
    line.push('"');
}

/// `2026-11-22 08:15:00 GMT`.
fn gmt(seconds: i64) -> String {
    // A time that no calendar has (a damaged inode) is shown as 1970: `pg_verifybackup` does not look at it.
    let time = jiff::Timestamp::from_second(seconds).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    time.strftime("%Y-%m-%d %H:%M:%S GMT").to_string()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use engine::units::{Lsn, Timeline};

    use super::*;

    fn text(version_num: u32) -> String {
        let mut bytes = Vec::new();
        let mut sink = |piece: &[u8]| {
            bytes.extend_from_slice(piece);
            Ok::<_, ()>(())
        };
        let mut list = Checklist::begin(version_num, SystemIdentifier(7), &mut sink).unwrap();
        list.add(Item { path: "PG_VERSION", bytes: 3, modified: 1_795_335_300, crc32c: 0x6463_33d7 }).unwrap();
        list.add(Item { path: "a\"b\\c\n", bytes: 0, modified: 0, crc32c: 0 }).unwrap();
        list.end(&WalRange { timeline: Timeline(1), start: Lsn(0x200_0028), stop: Lsn(0x200_0100) }).unwrap();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn the_text_is_json_with_its_own_checksum() {
        let text = text(150_018);
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(json["PostgreSQL-Backup-Manifest-Version"], 1);
        assert_eq!(json["Files"][0]["Checksum"], "d7336364");
        assert_eq!(json["Files"][0]["Last-Modified"], "2026-11-22 08:15:00 GMT");
        assert_eq!(json["Files"][1]["Path"], "a\"b\\c\n");
        assert_eq!(json["WAL-Ranges"][0]["End-LSN"], "0/2000100");
        let (body, last) = text.split_at(text.find("\"Manifest-Checksum\"").unwrap());
        let digest = Sha256::digest(body.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        assert_eq!(last, format!("\"Manifest-Checksum\": \"{digest}\"}}\n"));
    }

    #[test]
    fn from_17_on_it_names_the_cluster() {
        let json: serde_json::Value = serde_json::from_str(&text(170_000)).unwrap();
        assert_eq!(json["PostgreSQL-Backup-Manifest-Version"], 2);
        assert_eq!(json["System-Identifier"], 7);
    }
}
