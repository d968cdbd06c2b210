//! Settings: flag, then `PGHYDRANT_*`, then `pghydrant.toml`, then the default; each remembers where it came from.
//!
//! A setting is resolved once, when it is asked for. An unknown key in the file is an error that names the nearest
//! known one: a misspelt `repositroy` must not send a restore to the default.
//!
//! The file names programs to run and places to write to. The one in the working directory counts only if nobody but its
//! owner could have written it, and that is who we are, or root: else whoever can write to a directory commands everyone
//! who works in it.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::fs::{File, Metadata};
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use crate::exit::{Exit, Failure};

/// Every key of `pghydrant.toml`; the environment's name is `PGHYDRANT_` and the key in capitals.
pub(crate) const KEYS: &[(&str, &str)] = &[
    ("repo", "the backup repository"),
    ("cluster", "the cluster's name in the repository"),
    ("state", "where sessions are kept"),
    ("mount_dir", "where restores mount the backup"),
    ("pg_bin", "directory of the PostgreSQL server's programs"),
    ("memory", "memory for buffers and caches, such as 64MiB"),
    ("rate_limit", "the most that backups read from the data directory a second, such as 50M"),
    ("server", "the mount server, https://HOST:PORT"),
    ("token_file", "file that holds the token for it"),
    ("workers", "copy workers; as many as cores unless set"),
];

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Flag,
    Environment(String),
    File(PathBuf),
    Default,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag => f.write_str("command line"),
            Self::Environment(name) => f.write_str(name),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Default => f.write_str("default"),
        }
    }
}

/// The file's and the environment's values; flags are handed in where they are known.
#[derive(Debug, Default)]
pub(crate) struct Settings {
    file: Option<(PathBuf, BTreeMap<String, String>)>,
    environment: BTreeMap<String, OsString>,
    /// The file that would have counted, and why it does not.
    pub(crate) skipped: Option<String>,
}

impl Settings {
    /// Reads the environment and the settings file: the named one, else the first that exists.
    pub(crate) fn load(named: Option<&Path>) -> anyhow::Result<Self> {
        let environment = KEYS
            .iter()
            .filter_map(|(key, _)| Some(((*key).to_owned(), std::env::var_os(environment_name(key))?)))
            .collect();
        let named = named.map(Path::to_owned).or_else(|| std::env::var_os("PGHYDRANT_CONFIG").map(PathBuf::from));
        let (file, skipped) = match named {
            Some(path) => (Some(open(path)?), None),
            None => find()?,
        };
        let file = file.map(read).transpose()?;
        Ok(Self { file, environment, skipped })
    }

    /// The value of `key` and where it came from; `None` if nothing sets it.
    pub(crate) fn get(&self, key: &str, flag: Option<OsString>) -> Option<(OsString, Source)> {
        debug_assert!(KEYS.iter().any(|(known, _)| *known == key), "{key} is not a setting");
        if let Some(value) = flag {
            return Some((value, Source::Flag));
        }
        if let Some(value) = self.environment.get(key) {
            return Some((value.clone(), Source::Environment(environment_name(key))));
        }
        let (path, values) = self.file.as_ref()?;
        Some((values.get(key)?.into(), Source::File(path.clone())))
    }
}

fn environment_name(key: &str) -> String {
    format!("PGHYDRANT_{}", key.to_ascii_uppercase())
}

/// The first settings file that exists, and what is to be told of the one in the working directory if it does not count.
fn find() -> anyhow::Result<(Option<Opened>, Option<String>)> {
    let mut skipped = None;
    let here = PathBuf::from("pghydrant.toml");
    if here.is_file() {
        let (path, file) = open(here)?;
        let failed = |cause| engine::Error::io("examine", &path, cause);
        let (own, above) = (file.metadata().map_err(failed)?, std::fs::metadata(".").map_err(failed)?);
        match distrust(&Access::of(&own), &Access::of(&above), rustix::process::geteuid().as_raw()) {
            None => return Ok((Some((path, file)), None)),
            Some(why) => skipped = Some(format!("./{} is not used: {why}", path.display())),
        }
    }
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let user = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from).or(home.map(|home| home.join(".config")));
    let user = user.map(|directory| directory.join("pghydrant/pghydrant.toml"));
    let all = [user, Some(PathBuf::from("/etc/pghydrant/pghydrant.toml"))];
    let found = all.into_iter().flatten().find(|path| path.is_file());
    Ok((found.map(open).transpose()?, skipped))
}

/// A settings file, and what it is called.
type Opened = (PathBuf, File);

fn open(path: PathBuf) -> engine::Result<Opened> {
    let file = File::open(&path).map_err(|cause| engine::Error::io("read settings", &path, cause))?;
    Ok((path, file))
}

fn read((path, mut file): Opened) -> anyhow::Result<(PathBuf, BTreeMap<String, String>)> {
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(|cause| engine::Error::io("read settings", &path, cause))?;
    let values = parse(&path, &text)?;
    Ok((path, values))
}

/// Who may write to a file or directory.
struct Access {
    uid: u32,
    gid: u32,
    mode: u32,
}

impl Access {
    fn of(metadata: &Metadata) -> Self {
        Self { uid: metadata.uid(), gid: metadata.gid(), mode: metadata.mode() }
    }

    /// The group with the user's own number is the user: many distributions give everyone one, and let it write.
    fn others_write(&self) -> bool {
        self.mode & 0o002 != 0 || (self.mode & 0o020 != 0 && self.gid != self.uid)
    }
}

/// Why a settings file that merely lies where we work does not count, if so.
fn distrust(file: &Access, directory: &Access, us: u32) -> Option<&'static str> {
    const STICKY: u32 = 0o1000;
    if file.uid != us && file.uid != 0 {
        Some("it belongs to another user (name it with --config to use it all the same)")
    } else if file.others_write() {
        Some("others can write to it (chmod go-w)")
    } else if directory.others_write() && directory.mode & STICKY == 0 {
        Some("others can write to the directory (chmod go-w, or name the file with --config)")
    } else {
        None
    }
}

fn parse(path: &Path, text: &str) -> anyhow::Result<BTreeMap<String, String>> {
    let refuse = |message: String| Failure::new(Exit::Usage, format!("{}: {message}", path.display()));
    let table: toml::Table = text.parse().map_err(|cause: toml::de::Error| refuse(cause.message().to_owned()))?;
    let mut values = BTreeMap::new();
    for (key, value) in table {
        if !KEYS.iter().any(|(known, _)| *known == key) {
            return Err(refuse(format!("unknown setting \"{key}\"")).hint(nearest(&key)).into());
        }
        let value = match value {
            toml::Value::String(text) => text,
            toml::Value::Integer(number) => number.to_string(),
            other => return Err(refuse(format!("\"{key}\" is {}, not text or a number", other.type_str())).into()),
        };
        values.insert(key, value);
    }
    Ok(values)
}

fn nearest(key: &str) -> String {
    let known = KEYS.iter().map(|(known, _)| *known);
    let names = known.clone().collect::<Vec<_>>().join(", ");
    match known.min_by_key(|known| edit_distance(known, key)) {
        Some(nearest) if edit_distance(nearest, key) <= 3 => format!("did you mean \"{nearest}\"?"),
        _ => format!("known settings: {names}"),
    }
}

/// Levenshtein's distance; keys are a few letters long.
fn edit_distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            let shortest = replaced.min(row[j] + 1).min(row[j + 1] + 1);
            diagonal = std::mem::replace(&mut row[j + 1], shortest);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_unknown_key_names_the_nearest() {
        let error = parse(Path::new("pghydrant.toml"), "rep = \"/x\"").unwrap_err();
        assert_eq!(error.to_string(), "pghydrant.toml: unknown setting \"rep\"");
        assert_eq!(Failure::hint_of(&error).unwrap(), "did you mean \"repo\"?");
        assert_eq!(Failure::exit_of(&error), Exit::Usage);
    }

    #[test]
    fn a_flag_beats_the_environment_and_the_environment_beats_the_file() {
        let file = Some((PathBuf::from("f"), [("repo".to_owned(), "/file".to_owned())].into()));
        let mut settings = Settings { file, ..Settings::default() };
        assert_eq!(settings.get("repo", None), Some(("/file".into(), Source::File("f".into()))));
        settings.environment.insert("repo".into(), "/environment".into());
        assert_eq!(settings.get("repo", None).unwrap().0, "/environment");
        assert_eq!(settings.get("repo", Some("/flag".into())), Some(("/flag".into(), Source::Flag)));
        assert_eq!(settings.get("cluster", None), None);
    }

    #[test]
    fn a_file_that_others_could_have_written_does_not_count() {
        let access = |uid, gid, mode| Access { uid, gid, mode };
        let (us, mine, roots) = (1000, access(1000, 1000, 0o644), access(0, 0, 0o644));
        let directory = access(1000, 1000, 0o755);
        for good in [&mine, &roots, &access(1000, 1000, 0o664)] {
            assert_eq!(distrust(good, &directory, us), None);
        }
        for bad in [access(1001, 1000, 0o644), access(1000, 100, 0o664), access(0, 0, 0o666)] {
            assert!(distrust(&bad, &directory, us).is_some());
        }
        assert!(distrust(&mine, &roots, 0).is_some(), "root does not obey a user");
        assert!(distrust(&mine, &access(0, 0, 0o777), us).is_some());
        assert_eq!(distrust(&mine, &access(0, 0, 0o1777), us), None, "nobody renames our file in /tmp");
    }
}
