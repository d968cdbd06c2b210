//! Settings: flag, then `PGHYDRANT_*`, then `pghydrant.toml`, then the default; each remembers where it came from.
//!
//! A setting is resolved once, when it is asked for. An unknown key in the file is an error that names the nearest
//! known one: a misspelt `repositroy` must not send a restore to the default.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
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
}

impl Settings {
    /// Reads the environment and the settings file: the named one, else the first that exists.
    pub(crate) fn load(named: Option<&Path>) -> anyhow::Result<Self> {
        let environment = KEYS
            .iter()
            .filter_map(|(key, _)| Some(((*key).to_owned(), std::env::var_os(environment_name(key))?)))
            .collect();
        let named = named.map(Path::to_owned).or_else(|| std::env::var_os("PGHYDRANT_CONFIG").map(PathBuf::from));
        let path = match named {
            Some(path) => Some(path),
            None => default_files().into_iter().find(|path| path.is_file()),
        };
        let file = match path {
            None => None,
            Some(path) => {
                let text =
                    std::fs::read_to_string(&path).map_err(|cause| engine::Error::io("read settings", &path, cause))?;
                Some((path.clone(), parse(&path, &text)?))
            }
        };
        Ok(Self { file, environment })
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

fn default_files() -> Vec<PathBuf> {
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let user = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from).or(home.map(|home| home.join(".config")));
    let user = user.map(|directory| directory.join("pghydrant/pghydrant.toml"));
    [Some(PathBuf::from("pghydrant.toml")), user, Some(PathBuf::from("/etc/pghydrant/pghydrant.toml"))]
        .into_iter()
        .flatten()
        .collect()
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
        let mut settings = Settings { file, environment: BTreeMap::new() };
        assert_eq!(settings.get("repo", None), Some(("/file".into(), Source::File("f".into()))));
        settings.environment.insert("repo".into(), "/environment".into());
        assert_eq!(settings.get("repo", None).unwrap().0, "/environment");
        assert_eq!(settings.get("repo", Some("/flag".into())), Some(("/flag".into(), Source::Flag)));
        assert_eq!(settings.get("cluster", None), None);
    }
}
