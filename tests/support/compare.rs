//! Directory trees, compared file by file and byte by byte.

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use sha2::Digest;

use super::{Context, Result, ensure};

/// What a tree's entry is, for comparison.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    Directory { mode: u32, uid: u32, gid: u32 },
    Link { target: PathBuf },
    File { mode: u32, uid: u32, gid: u32, bytes: u64, hash: String },
    Other,
}

/// All regular files below `root`, relative, sorted.
pub fn files_below(root: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    walk(root, Path::new(""), &mut |path, metadata| {
        if metadata.is_file() {
            files.push(path.to_owned());
        }
        Ok(())
    })?;
    files.sort();
    Ok(files)
}

/// Everything below `root` with its content's hash; links are not followed.
pub fn tree(root: &Path) -> Result<BTreeMap<PathBuf, Entry>> {
    let mut entries = BTreeMap::new();
    walk(root, Path::new(""), &mut |path, metadata| {
        let (mode, uid, gid) = (metadata.mode() & 0o7777, metadata.uid(), metadata.gid());
        let full = root.join(path);
        let entry = if metadata.is_dir() {
            Entry::Directory { mode, uid, gid }
        } else if metadata.is_symlink() {
            Entry::Link { target: fs::read_link(&full)? }
        } else if metadata.is_file() {
            Entry::File { mode, uid, gid, bytes: metadata.len(), hash: hash_file(&full)? }
        } else {
            Entry::Other
        };
        entries.insert(path.to_owned(), entry);
        Ok(())
    })?;
    Ok(entries)
}

/// An error that names the differences of two trees, but for paths that `ignored` holds true for.
pub fn same_trees(
    left: &BTreeMap<PathBuf, Entry>,
    right: &BTreeMap<PathBuf, Entry>,
    ignored: impl Fn(&Path) -> bool,
) -> Result<()> {
    let mut differences = Vec::new();
    for path in left.keys().chain(right.keys().filter(|path| !left.contains_key(*path))) {
        let pair = (left.get(path), right.get(path));
        if pair.0 != pair.1 && !ignored(path) {
            differences.push(format!("{}: {:?} and {:?}", path.display(), pair.0, pair.1));
        }
    }
    let count = differences.len();
    differences.truncate(20);
    ensure!(count == 0, "{count} differences:\n{}", differences.join("\n"));
    Ok(())
}

/// What goes while it is looked at (a backup or an archiver may be at work below `root`) is not there.
fn walk(root: &Path, path: &Path, visit: &mut impl FnMut(&Path, &fs::Metadata) -> Result<()>) -> Result<()> {
    let directory = root.join(path);
    for entry in fs::read_dir(&directory).with_context(|| format!("cannot list {}", directory.display()))? {
        let entry = entry?;
        let below = path.join(entry.file_name());
        let metadata = match entry.metadata() {
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            metadata => metadata.with_context(|| format!("cannot stat {}", entry.path().display()))?,
        };
        visit(&below, &metadata)?;
        if metadata.is_dir() {
            walk(root, &below, visit)?;
        }
    }
    Ok(())
}

/// The hash of a file's content. In configuration files the ids of sessions are masked: two restores of one backup
/// differ in them, and in nothing else.
fn hash_file(path: &Path) -> Result<String> {
    if path.extension().is_some_and(|extension| extension == "conf") {
        let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        return Ok(hex(&sha2::Sha256::digest(without_session_ids(&text))));
    }
    let mut file = fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut hasher = sha2::Sha256::new();
    let mut chunk = vec![0; 1 << 20];
    loop {
        let count = file.read(&mut chunk).with_context(|| format!("cannot read {}", path.display()))?;
        if count == 0 {
            return Ok(hex(&hasher.finalize()));
        }
        hasher.update(&chunk[..count]);
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// `20261122T131215Z-3f9a1c` becomes `SESSION`.
pub fn without_session_ids(text: &[u8]) -> Vec<u8> {
    let is_id = |window: &[u8]| {
        let digit = |range: std::ops::Range<usize>| window[range].iter().all(u8::is_ascii_digit);
        digit(0..8) && window[8] == b'T' && digit(9..15) && window[15] == b'Z'
    };
    let mut masked = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some(&first) = rest.first() {
        if rest.len() >= 16 && is_id(&rest[..16]) {
            masked.extend_from_slice(b"SESSION");
            rest = &rest[16..];
            // Random digits; `-F` and `-I` belong to a backup's label.
            let digits = rest.iter().skip(1).take_while(|byte| byte.is_ascii_hexdigit()).count();
            rest = if rest.starts_with(b"-") && digits >= 4 { &rest[1 + digits..] } else { rest };
        } else {
            masked.push(first);
            rest = &rest[1..];
        }
    }
    masked
}
