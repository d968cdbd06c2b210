//! `backup_manifest`, as `pg_basebackup` writes it: what every file of a base backup must be.
//!
//! Its last line holds the SHA-256 of all that precedes it, so the list is whole or refused. The files are compared as they
//! are read into the repository: PostgreSQL's usual CRC-32C is computed there anyway. The SHA-2 digests that
//! `--manifest-checksums` can ask for take another reading, in which the CRC-32C ties what is digested to what was stored.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use engine::Error;
use engine::format::backup::WalRange;
use engine::format::file::{FileKind, FileRecord};
use engine::units::{Lsn, Timeline};
use serde::Deserialize;
use sha2::{Digest as _, Sha224, Sha256, Sha384, Sha512};

use super::copy::Read;

/// PostgreSQL itself read none that was larger before version 17.
pub(super) const BYTES_MAX: u64 = 1 << 30;
/// What `pg_verifybackup` does not compare either: `pg_basebackup --write-recovery-conf` writes them behind the list.
const NOT_COMPARED: [&str; 4] = ["backup_manifest", "postgresql.auto.conf", "recovery.signal", "standby.signal"];
/// Where the last line begins.
const CHECKSUM_KEY: &str = "\"Manifest-Checksum\"";
const READ_BYTES: usize = 1 << 20;

/// The list.
#[derive(Debug)]
pub(super) struct Listed {
    files: BTreeMap<String, Expected>,
    /// Names that are not UTF-8, in hexadecimal.
    pub(super) encoded: Vec<String>,
    pub(super) ranges: Vec<WalRange>,
    /// From PostgreSQL 17 on.
    pub(super) system_identifier: Option<u64>,
}

/// What a file must be.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Expected {
    bytes: u64,
    checksum: Option<Checksum>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Checksum {
    Crc32c(u32),
    Sha(Algorithm, String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Algorithm {
    Sha224,
    Sha256,
    Sha384,
    Sha512,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Text {
    #[serde(rename = "PostgreSQL-Backup-Manifest-Version")]
    version: u32,
    #[serde(rename = "System-Identifier")]
    system_identifier: Option<u64>,
    files: Vec<Line>,
    #[serde(rename = "WAL-Ranges")]
    ranges: Vec<Range>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Line {
    #[serde(rename = "Path")]
    path: Option<String>,
    #[serde(rename = "Encoded-Path")]
    encoded: Option<String>,
    #[serde(rename = "Size")]
    bytes: u64,
    #[serde(rename = "Checksum-Algorithm")]
    algorithm: Option<String>,
    #[serde(rename = "Checksum")]
    checksum: Option<String>,
}

#[derive(Deserialize)]
struct Range {
    #[serde(rename = "Timeline")]
    timeline: u32,
    #[serde(rename = "Start-LSN")]
    start: String,
    #[serde(rename = "End-LSN")]
    end: String,
}

impl Listed {
    /// The list in `bytes`, or what is wrong with them.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let text = std::str::from_utf8(bytes).map_err(|_| "it is not UTF-8".to_owned())?;
        let last = text.rfind(CHECKSUM_KEY).ok_or("it ends before its checksum")?;
        let stored = text[last + CHECKSUM_KEY.len()..].trim_start_matches([':', ' ', '"']).get(..64);
        if stored != Some(hex(&Sha256::digest(&bytes[..last])).as_str()) {
            return Err("its own checksum is wrong".to_owned());
        }
        let text: Text = serde_json::from_str(text).map_err(|error| error.to_string())?;
        if !(1..=2).contains(&text.version) {
            return Err(format!("its version is {}, and 1 and 2 are known", text.version));
        }
        let mut listed = Self {
            files: BTreeMap::new(),
            encoded: Vec::new(),
            ranges: text.ranges.iter().map(Range::parse).collect::<Result<_, _>>()?,
            system_identifier: text.system_identifier,
        };
        for line in text.files {
            let expected = line.expected()?;
            // `--manifest-force-encode` encodes names that need not be.
            let decoded = || line.encoded.as_deref().and_then(unhex).and_then(|name| String::from_utf8(name).ok());
            match (line.path.clone().or_else(decoded), line.encoded) {
                (Some(path), _) => {
                    if listed.files.insert(path.clone(), expected).is_some() {
                        return Err(format!("it has {path} twice"));
                    }
                }
                (None, Some(encoded)) => listed.encoded.push(encoded),
                (None, None) => return Err("it has a file without a path".to_owned()),
            }
        }
        Ok(listed)
    }

    /// The first file of PostgreSQL 17's incremental base backups, which are no backup without those before them.
    pub(super) fn incremental(&self) -> Option<&str> {
        let is_incremental =
            |path: &&String| path.rsplit('/').next().is_some_and(|name| name.starts_with("INCREMENTAL."));
        self.files.keys().find(is_incremental).map(String::as_str)
    }

    /// The bytes of all files together.
    pub(super) fn bytes(&self) -> u64 {
        self.files.values().fold(0, |sum, expected| expected.bytes.saturating_add(sum))
    }

    /// What is wrong with the names: files that are not there, and files that are not on the list.
    pub(super) fn compare_names(&self, files: &[FileRecord], is_there: impl Fn(&str) -> bool) -> Vec<String> {
        let regular = |file: &&FileRecord| file.kind == FileKind::Regular;
        let strange = files.iter().filter(regular).map(|file| file.path.as_str());
        let strange = strange.filter(|path| !NOT_COMPARED.contains(path) && !self.files.contains_key(*path));
        let mut wrong: Vec<String> = strange.map(|path| format!("{path} is not in backup_manifest")).collect();
        let missing = self.files.keys().filter(|path| !NOT_COMPARED.contains(&path.as_str()));
        let missing = missing.filter(|path| !is_there(path));
        wrong.extend(missing.map(|path| format!("{path} is missing")));
        wrong
    }

    /// What is wrong with a file that was read as `read`.
    pub(super) fn compare(&self, path: &str, read: Option<&Read>) -> Option<String> {
        let expected = self.files.get(path).filter(|_| !NOT_COMPARED.contains(&path))?;
        let Some(read) = read else { return Some(format!("{path} vanished while it was read")) };
        if read.bytes != expected.bytes {
            return Some(format!("{path} has {} bytes, not {}", read.bytes, expected.bytes));
        }
        match &expected.checksum {
            Some(Checksum::Crc32c(crc32c)) if *crc32c != read.crc32c => {
                Some(format!("{path} has another checksum than backup_manifest says"))
            }
            _ => None,
        }
    }

    /// Reads the files again whose digest is more than a CRC-32C; what is wrong with them. `content` gives the bytes of
    /// one of `read`.
    pub(super) fn compare_digests(
        &self,
        read: &[(&str, Option<usize>, Read)],
        content: impl Fn(&str, Option<usize>, &mut dyn FnMut(&[u8])) -> Result<(), Error> + Sync,
        workers: usize,
        stop: &(dyn Fn() -> bool + Sync),
    ) -> Result<Vec<String>, Error> {
        let next = AtomicUsize::new(0);
        let work = || {
            let mut wrong = Vec::new();
            while let Some((path, place, read)) = read.get(next.fetch_add(1, Ordering::Relaxed)) {
                if stop() {
                    return Err(Error::Cancelled);
                }
                let Some(Expected { checksum: Some(Checksum::Sha(algorithm, stored)), .. }) = self.files.get(*path)
                else {
                    continue;
                };
                if NOT_COMPARED.contains(path) {
                    continue;
                }
                let (digest, crc32c) = digest(*algorithm, |take| content(path, *place, take))?;
                if digest != *stored || crc32c != read.crc32c {
                    wrong.push(format!("{path} has another checksum than backup_manifest says"));
                }
            }
            Ok(wrong)
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..workers.max(1)).map(|_| scope.spawn(work)).collect();
            let mut wrong = Vec::new();
            for thread in threads {
                let panicked = |_| Error::Refused("a thread that compares checksums panicked".to_owned());
                wrong.extend(thread.join().map_err(panicked)??);
            }
            wrong.sort();
            Ok(wrong)
        })
    }
}

impl Line {
    fn expected(&self) -> Result<Expected, String> {
        let name = self.path.as_deref().or(self.encoded.as_deref()).unwrap_or_default();
        let bad = || format!("the checksum of {name} is none");
        let checksum = match (self.algorithm.as_deref(), self.checksum.as_deref()) {
            (None, _) => None,
            // PostgreSQL prints the CRC's bytes as they lie in memory.
            (Some("CRC32C"), Some(text)) if text.len() == 8 => {
                Some(Checksum::Crc32c(u32::from_str_radix(text, 16).map_err(|_| bad())?.swap_bytes()))
            }
            (Some(name), Some(text)) => {
                let algorithm = match name {
                    "SHA224" => Algorithm::Sha224,
                    "SHA256" => Algorithm::Sha256,
                    "SHA384" => Algorithm::Sha384,
                    "SHA512" => Algorithm::Sha512,
                    _ => return Err(bad()),
                };
                Some(Checksum::Sha(algorithm, text.to_ascii_lowercase()))
            }
            (Some(_), None) => return Err(bad()),
        };
        Ok(Expected { bytes: self.bytes, checksum })
    }
}

impl Range {
    fn parse(&self) -> Result<WalRange, String> {
        let lsn = |text: &str| text.parse::<Lsn>().map_err(|error| error.to_string());
        Ok(WalRange { timeline: Timeline(self.timeline), start: lsn(&self.start)?, stop: lsn(&self.end)? })
    }
}

/// The digest of the bytes that `produce` hands over, and their CRC-32C.
fn digest(
    algorithm: Algorithm,
    produce: impl FnOnce(&mut dyn FnMut(&[u8])) -> Result<(), Error>,
) -> Result<(String, u32), Error> {
    match algorithm {
        Algorithm::Sha224 => digest_with::<Sha224>(produce),
        Algorithm::Sha256 => digest_with::<Sha256>(produce),
        Algorithm::Sha384 => digest_with::<Sha384>(produce),
        Algorithm::Sha512 => digest_with::<Sha512>(produce),
    }
}

fn digest_with<D: sha2::Digest>(
    produce: impl FnOnce(&mut dyn FnMut(&[u8])) -> Result<(), Error>,
) -> Result<(String, u32), Error> {
    let (mut hasher, mut crc32c) = (D::new(), 0);
    produce(&mut |piece| {
        hasher.update(piece);
        crc32c = crc32c::crc32c_append(crc32c, piece);
    })?;
    Ok((hex(&hasher.finalize()), crc32c))
}

/// Hands over the bytes of a file.
pub(super) fn read_file(path: &Path, take: &mut dyn FnMut(&[u8])) -> Result<(), Error> {
    let mut file = File::open(path).map_err(|cause| Error::io("open", path, cause))?;
    let mut piece = vec![0; READ_BYTES];
    loop {
        match file.read(&mut piece).map_err(|cause| Error::io("read", path, cause))? {
            0 => return Ok(()),
            read => take(&piece[..read]),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u8>> =
        text.chars().map(|digit| digit.to_digit(16).and_then(|digit| u8::try_from(digit).ok())).collect();
    let digits = digits.filter(|digits| digits.len().is_multiple_of(2))?;
    Some(digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn sealed(body: &str) -> String {
        format!("{body}{CHECKSUM_KEY}: \"{}\"}}\n", hex(&Sha256::digest(body.as_bytes())))
    }

    const BODY: &str = "{ \"PostgreSQL-Backup-Manifest-Version\": 1,\n\"Files\": [\n\
        { \"Path\": \"PG_VERSION\", \"Size\": 3, \"Last-Modified\": \"2026-11-22 16:01:52 GMT\", \
        \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"8a744722\" },\n\
        { \"Path\": \"base/1/1\", \"Size\": 3, \"Last-Modified\": \"2026-11-22 16:01:52 GMT\" }\n],\n\
        \"WAL-Ranges\": [\n{ \"Timeline\": 1, \"Start-LSN\": \"0/2000028\", \"End-LSN\": \"0/2000100\" }\n],\n";

    #[test]
    fn a_list_is_read_and_files_are_compared() {
        let listed = Listed::parse(sealed(BODY).as_bytes()).unwrap();
        assert_eq!(listed.ranges[0].stop, Lsn(0x200_0100));
        let crc32c = crc32c::crc32c(b"15\n");
        let read = |bytes, crc32c| Read { bytes, crc32c, modified: 0 };
        assert_eq!(listed.compare("PG_VERSION", Some(&read(3, crc32c))), None);
        assert!(listed.compare("PG_VERSION", Some(&read(3, crc32c ^ 1))).unwrap().contains("checksum"));
        assert!(listed.compare("base/1/1", Some(&read(4, 0))).unwrap().contains("4 bytes, not 3"));
        assert_eq!(listed.compare("base/1/1", Some(&read(3, 9))), None, "it has no checksum");
        assert!(listed.compare("base/1/1", None).unwrap().contains("vanished"));
    }

    #[test]
    fn a_name_that_was_encoded_without_need_is_like_any_other() {
        let encode = |name: &str| BODY.replace("\"Path\": \"base/1/1\"", &format!("\"Encoded-Path\": \"{name}\""));
        let list = |name: &str| Listed::parse(sealed(&encode(name)).as_bytes());
        let listed = list("626173652f312f31").unwrap();
        let read = Read { bytes: 4, crc32c: 0, modified: 0 };
        assert!(listed.compare("base/1/1", Some(&read)).unwrap().contains("4 bytes, not 3"));
        assert!(listed.encoded.is_empty());
        for bad in ["ff", "6", "6g"] {
            assert_eq!(list(bad).unwrap().encoded, [bad]);
        }
        assert!(list("50475f56455253494f4e").unwrap_err().contains("PG_VERSION twice"));
    }

    #[test]
    fn a_list_that_was_changed_or_cut_is_refused() {
        let whole = sealed(BODY);
        assert!(Listed::parse(whole.replace("\"Size\": 3", "\"Size\": 4").as_bytes()).is_err());
        for cut in [0, 10, BODY.len(), whole.len() - 20] {
            assert!(Listed::parse(&whole.as_bytes()[..cut]).is_err(), "{cut}");
        }
        let newer = sealed(&BODY.replace("Version\": 1", "Version\": 3"));
        assert!(Listed::parse(newer.as_bytes()).unwrap_err().contains("version is 3"));
    }

    #[test]
    fn digests_of_every_kind_are_compared() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("PG_VERSION"), "15\n").unwrap();
        let right = [
            ("SHA224", hex(&Sha224::digest("15\n"))),
            ("SHA256", hex(&Sha256::digest("15\n"))),
            ("SHA384", hex(&Sha384::digest("15\n"))),
            ("SHA512", hex(&Sha512::digest("15\n"))),
        ];
        let read = [("PG_VERSION", None, Read { bytes: 3, crc32c: crc32c::crc32c(b"15\n"), modified: 0 })];
        for (name, digest) in right {
            for (digest, wrong) in [(digest.clone(), 0), (digest.replace(&digest[..2], "zz"), 1)] {
                let body = BODY.replacen("CRC32C", name, 1).replace("8a744722", &digest);
                let listed = Listed::parse(sealed(&body).as_bytes()).unwrap();
                let content =
                    |path: &str, _, take: &mut dyn FnMut(&[u8])| read_file(&directory.path().join(path), take);
                let found = listed.compare_digests(&read, content, 2, &|| false).unwrap();
                assert_eq!(found.len(), wrong, "{name}");
            }
        }
    }
}
