//! Which package has a library, where that is certain: Debian's and Ubuntu's own, and those of apt.postgresql.org.

/// What the server's own package has beside the server: PostgreSQL's contrib, as far as it is loaded as a library.
const CONTRIB: [&str; 34] = [
    "_int",
    "amcheck",
    "auth_delay",
    "auto_explain",
    "bloom",
    "btree_gin",
    "btree_gist",
    "citext",
    "cube",
    "dblink",
    "dict_int",
    "earthdistance",
    "file_fdw",
    "fuzzystrmatch",
    "hstore",
    "isn",
    "lo",
    "ltree",
    "pageinspect",
    "passwordcheck",
    "pg_buffercache",
    "pg_freespacemap",
    "pg_prewarm",
    "pg_stat_statements",
    "pg_trgm",
    "pg_visibility",
    "pgcrypto",
    "pgrowlocks",
    "pgstattuple",
    "pgxml",
    "postgres_fdw",
    "tablefunc",
    "unaccent",
    "uuid-ossp",
];
/// Libraries and the end of their package's name: `postgresql-15-cron`.
const PACKAGES: [(&str, &str); 20] = [
    ("hll", "hll"),
    ("hypopg", "hypopg"),
    ("ip4r", "ip4r"),
    ("orafce", "orafce"),
    ("pg_cron", "cron"),
    ("pg_partman_bgw", "partman"),
    ("pg_qualstats", "pg-qualstats"),
    ("pg_repack", "repack"),
    ("pg_stat_kcache", "pg-stat-kcache"),
    ("pg_wait_sampling", "pg-wait-sampling"),
    ("pgaudit", "pgaudit"),
    ("pglogical", "pglogical"),
    ("plpgsql_check", "plpgsql-check"),
    ("postgis-3", "postgis-3"),
    ("postgis_raster-3", "postgis-3"),
    ("postgis_topology-3", "postgis-3"),
    ("prefix", "prefix"),
    ("rum", "rum"),
    ("set_user", "set-user"),
    ("wal2json", "wal2json"),
];
/// Languages have the version at the end: `postgresql-plperl-15`.
const LANGUAGES: [&str; 3] = ["plperl", "plpython3", "pltcl"];

/// How a library gets here.
pub(super) fn cure(stem: &str, major: u32, has_apt: bool) -> String {
    match package(stem, major).filter(|_| has_apt) {
        Some(package) => format!("apt-get install {package}"),
        None => format!("install the package that has {stem} for PostgreSQL {major}"),
    }
}

fn package(stem: &str, major: u32) -> Option<String> {
    if CONTRIB.contains(&stem) {
        return Some(format!("postgresql-{major}"));
    }
    if LANGUAGES.contains(&stem) {
        return Some(format!("postgresql-{stem}-{major}"));
    }
    let (_, end) = PACKAGES.iter().find(|(library, _)| *library == stem)?;
    Some(format!("postgresql-{major}-{end}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_is_named_only_where_it_is_certain() {
        assert_eq!(cure("pg_cron", 15, true), "apt-get install postgresql-15-cron");
        assert_eq!(cure("plpython3", 17, true), "apt-get install postgresql-plpython3-17");
        assert_eq!(cure("pg_stat_statements", 16, true), "apt-get install postgresql-16");
        assert_eq!(cure("pg_cron", 15, false), "install the package that has pg_cron for PostgreSQL 15");
        assert_eq!(cure("ours", 15, true), "install the package that has ours for PostgreSQL 15");
    }
}
