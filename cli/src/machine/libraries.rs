//! Where PostgreSQL looks for libraries, and whether one is there: `dfmgr.c`, without loading anything.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::postgres::binaries::Binaries;

/// In every server's library directory, and in no other.
const LANDMARK: &str = "libpqwalreceiver.so";
/// The library directory as seen from the programs'; PostgreSQL finds it in the same way, by the path between the two.
const PLACES: [&str; 6] =
    ["../lib", "../lib/postgresql", "../lib64/pgsql", "../lib/pgsql", "../lib64/postgresql", "../lib64"];

/// `pkglibdir` of these programs: as their own `pg_config` says, else where it is found.
pub(crate) fn directory(binaries: &Binaries) -> Option<PathBuf> {
    let told = super::output(Command::new(binaries.program("pg_config")).arg("--pkglibdir"));
    let told = told.map(|text| PathBuf::from(text.trim_end())).filter(|place| place.join(LANDMARK).exists());
    let places = || {
        let bin = binaries.directory();
        PLACES.iter().map(|place| bin.join(place)).find(|place| place.join(LANDMARK).exists())
    };
    told.or_else(places).map(|place| place.canonicalize().unwrap_or(place))
}

/// The names in `shared_preload_libraries` and its like: separated by commas, quoted where they need it.
pub(crate) fn names(list: &str) -> Vec<String> {
    let mut names = vec![String::new()];
    let mut quoted = false;
    for letter in list.chars() {
        match (letter, names.last_mut()) {
            ('"', _) => quoted = !quoted,
            (',', _) if !quoted => names.push(String::new()),
            (letter, Some(name)) => name.push(letter),
            (_, None) => {}
        }
    }
    names.iter().map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()).collect()
}

/// `pg_cron` of `$libdir/pg_cron` and `/usr/lib/postgresql/15/lib/pg_cron.so`.
pub(crate) fn stem(name: &str) -> &str {
    let file = name.rsplit('/').next().unwrap_or(name);
    file.strip_suffix(".so").unwrap_or(file)
}

/// Whether a library is where PostgreSQL looks for it. One below the data directory is in the backup.
pub(super) fn is_there(name: &str, libraries: &Path, search_path: &str) -> bool {
    let below_libraries = |place: &str| -> Option<PathBuf> {
        let rest = place.strip_prefix("$libdir")?;
        (rest.is_empty() || rest.starts_with('/')).then(|| libraries.join(rest.trim_start_matches('/')))
    };
    let resolved = |place: &str| below_libraries(place).unwrap_or_else(|| PathBuf::from(place));
    let searched = |file: &str| search_path.split(':').map(|place| resolved(place.trim()).join(file)).collect();
    let mut places: Vec<PathBuf> = match name.strip_prefix("$libdir/") {
        _ if !name.contains('/') => searched(name),
        // From PostgreSQL 18 on the search path counts here as well.
        Some(file) if !file.contains('/') => searched(file),
        _ => Vec::new(),
    };
    if name.contains('/') {
        places.push(resolved(name));
    }
    let with_suffix: Vec<PathBuf> =
        places.iter().map(|place| PathBuf::from(format!("{}.so", place.display()))).collect();
    let in_data_directory = |place: &Path| place.is_relative() && !name.starts_with('$');
    places.iter().chain(&with_suffix).any(|place| in_data_directory(place) || place.is_file())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn lists_are_split_as_postgresql_splits_them() {
        assert_eq!(names(" pg_stat_statements, $libdir/pg_cron ,,"), ["pg_stat_statements", "$libdir/pg_cron"]);
        assert_eq!(names("\"a,b\", /opt/x y.so"), ["a,b", "/opt/x y.so"]);
        assert_eq!(names(""), [""; 0]);
        assert_eq!(stem("/usr/lib/postgresql/15/lib/pg_cron.so"), "pg_cron");
        assert_eq!(stem("$libdir/postgis-3"), "postgis-3");
    }

    #[test]
    fn a_library_is_looked_for_where_postgresql_looks() {
        let scratch = tempfile::tempdir().unwrap();
        let (libraries, other) = (scratch.path().join("lib"), scratch.path().join("other"));
        for place in [libraries.join("plugins"), other.clone()] {
            std::fs::create_dir_all(place).unwrap();
        }
        for file in [libraries.join("a.so"), libraries.join("plugins/p.so"), other.join("b.so")] {
            std::fs::write(file, "").unwrap();
        }
        let there = |name: &str, path: &str| is_there(name, &libraries, path);
        for name in ["a", "a.so", "$libdir/a", "$libdir/plugins/p"] {
            assert!(there(name, "$libdir"), "{name}");
        }
        let absolute = other.join("b").display().to_string();
        assert!(there(&absolute, "$libdir"));
        for name in ["b", "$libdir/b", "/nonexistent/a", "$libdirectory/a", "plugins"] {
            assert!(!there(name, "$libdir"), "{name}");
        }
        assert!(there("b", &format!("{}:$libdir", other.display())));
    }
}
