#![allow(clippy::unwrap_used)]
use engine::format::environment::{Collation, Environment, Library};

use super::super::{Build, Memory};
use super::*;

fn locale(provider: &str, name: &str) -> Locale {
    Locale { provider: provider.to_owned(), collate: name.to_owned(), ctype: name.to_owned(), ..Locale::default() }
}

fn database(name: &str, locale_name: &str) -> Database {
    Database {
        name: name.to_owned(),
        locale: locale("libc", locale_name),
        allows_connections: true,
        collations: vec![Collation { name: "default".to_owned(), locale: locale("default", ""), indexes: 3 }],
        ..Database::default()
    }
}

fn needs(databases: Vec<Database>, settings: &[(&str, &str)]) -> Needs {
    let mut needs = Needs::none();
    needs.version_num = 150_018;
    needs.settings = settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    needs.environment = Some(Environment {
        libc_version: Some("2.31".to_owned()),
        icu_version: Some("67".to_owned()),
        databases,
        ..Environment::default()
    });
    needs
}

fn facts() -> Facts {
    Facts {
        library_directory: Some("/lib/pg".into()),
        missing_libraries: ["pg_cron", "$libdir/postgis-3", "$libdir/plugins/ours"].map(str::to_owned).into(),
        missing_locales: ["de_DE.UTF-8".to_owned()].into(),
        libc_version: Some("2.36".to_owned()),
        icu_version: Some("72".to_owned()),
        build: Some(Build { page_bytes: 8192, relation_segment_pages: 131_072, wal_page_bytes: 8192 }),
        memory: Memory { bytes: 4 << 30, huge_page_bytes: 2 << 20, is_usual_huge_page: true, ..Memory::default() },
        has_apt: true,
    }
}

/// `stop: what | cure`, or `warn: …`.
fn told(needs: &Needs, facts: &Facts) -> Vec<String> {
    let weight = |weight| match weight {
        Weight::Unreadable => "unreadable",
        Weight::Stops => "stop",
        Weight::Warns => "warn",
    };
    let line = |one: Finding| format!("{}: {} | {}", weight(one.weight), one.what, one.cure);
    judge(needs, facts).into_iter().map(line).collect()
}

#[test]
fn a_machine_like_the_originals_gets_no_finding() {
    let same = Facts { libc_version: Some("2.31".to_owned()), icu_version: None, ..facts() };
    assert_eq!(told(&needs(vec![database("app", "en_US.UTF-8")], &[]), &same), [""; 0]);
    // Sorted by bytes: no version matters.
    assert_eq!(told(&needs(vec![database("app", "C.UTF-8")], &[]), &facts()), [""; 0]);
}

#[test]
fn a_library_that_is_loaded_at_the_start_stops_a_restore() {
    let loaded = [("shared_preload_libraries", "pg_stat_statements, pg_cron"), ("local_preload_libraries", "ours")];
    assert_eq!(
        told(&needs(Vec::new(), &loaded), &facts()),
        [
            "stop: shared_preload_libraries names pg_cron, which is not in /lib/pg: the server would not start | apt-get install postgresql-15-cron",
            "stop: local_preload_libraries names $libdir/plugins/ours, which is not in /lib/pg: nobody could connect | install the package that has ours for PostgreSQL 15",
        ]
    );
    let mut isolated = needs(Vec::new(), &loaded[..1]);
    isolated.unloaded = vec!["pg_cron"];
    assert_eq!(told(&isolated, &facts()), [""; 0]);
    assert_eq!(told(&needs(Vec::new(), &loaded), &Facts { library_directory: None, ..facts() }), [""; 0]);
}

#[test]
fn a_library_of_functions_is_a_warning_with_its_extension_and_databases() {
    let mut databases = vec![database("app", "C"), database("maps", "C")];
    for database in &mut databases {
        let extensions = vec!["postgis".to_owned()];
        database.libraries = vec![Library { name: "$libdir/postgis-3".to_owned(), extensions }];
    }
    assert_eq!(
        told(&needs(databases, &[]), &facts()),
        [
            "warn: $libdir/postgis-3 is not in /lib/pg: what uses it fails (extension postgis of databases app, maps) | apt-get install postgresql-15-postgis-3"
        ]
    );
}

#[test]
fn a_missing_locale_stops_where_it_keeps_everybody_out() {
    let german = || database("app", "de_DE.UTF-8");
    let same = Facts { libc_version: Some("2.31".to_owned()), ..facts() };
    let cure = "localedef -i de_DE -f UTF-8 de_DE.UTF-8, as root (it comes with the package locales)";
    let mut template = database("template0", "C");
    template.allows_connections = false;
    assert_eq!(
        told(&needs(vec![german(), template], &[]), &same),
        [format!(
            "stop: this machine lacks the locale de_DE.UTF-8 of database app: nobody could connect to any database | {cure}"
        )]
    );
    assert_eq!(
        told(&needs(vec![german(), database("postgres", "C")], &[]), &same),
        [format!(
            "warn: this machine lacks the locale de_DE.UTF-8 of database app: nobody can connect until it is there | {cure}"
        )]
    );
    assert_eq!(
        told(
            &needs(Vec::new(), &[("lc_messages", "de_DE.UTF-8"), ("lc_numeric", "C"), ("lc_time", "de_DE.UTF-8")]),
            &same
        ),
        [format!(
            "unreadable: lc_messages, lc_time = de_DE.UTF-8, a locale that this machine lacks: the server would not start | {cure}"
        )]
    );
    let mut mixed = database("app", "C");
    mixed.collations.push(Collation { name: "de".to_owned(), locale: locale("libc", "de_DE.UTF-8"), indexes: 0 });
    assert_eq!(
        told(&needs(vec![mixed], &[]), &same),
        [format!(
            "warn: this machine lacks the locale de_DE.UTF-8 of collation de in database app: what is sorted by it fails | {cure}"
        )]
    );
    assert_eq!(told(&needs(vec![german()], &[]), &Facts { missing_locales: BTreeSet::new(), ..same }), [""; 0]);
}

#[test]
fn another_order_of_text_names_the_indexes_at_risk() {
    let mut icu = database("crm", "C");
    icu.locale = Locale { provider: "icu".to_owned(), name: Some("de".to_owned()), ..locale("icu", "C") };
    let mut mixed = database("mixed", "C");
    mixed.collations.push(Collation { name: "de-x-icu".to_owned(), locale: locale("icu", ""), indexes: 1 });
    let databases = vec![database("app", "en_US.UTF-8"), database("plain", "C"), icu, mixed];
    let refresh = "REINDEX DATABASE in each of them, then ALTER DATABASE … REFRESH COLLATION VERSION";
    assert_eq!(
        told(&needs(databases.clone(), &[]), &facts()),
        [
            format!(
                "warn: 3 indexes of database app, sorted by glibc 2.31, may be out of order by glibc 2.36 of this machine: queries miss rows, unique ones take doubles | {refresh}"
            ),
            format!(
                "warn: 4 indexes of databases crm, mixed, sorted by ICU 67, may be out of order by ICU 72 of this machine: queries miss rows, unique ones take doubles | {refresh}"
            ),
        ]
    );
    let mut older = needs(databases, &[]);
    older.version_num = 140_000;
    assert!(told(&older, &facts()).iter().all(|line| line.ends_with("| REINDEX DATABASE in each of them")));
}

#[test]
fn shared_memory_must_fit() {
    let on = [("huge_pages", "on"), ("shared_memory_size", "143MB"), ("shared_buffers", "128MB")];
    let mut machine = facts();
    machine.memory.huge_pages = 100;
    machine.memory.huge_pages_free = 71;
    assert_eq!(
        told(&needs(Vec::new(), &on), &machine),
        [
            "stop: huge_pages is on, and shared_memory_size of 143 MiB takes 72 pages of 2.0 MiB: 71 are free, the server would not start | sysctl vm.nr_hugepages=101"
        ]
    );
    let other = Memory { is_usual_huge_page: false, huge_page_bytes: 1 << 30, ..Memory::default() };
    let cure = &told(&needs(Vec::new(), &on), &Facts { memory: other, ..facts() })[0];
    assert!(cure.ends_with("| echo 1 > /sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages"), "{cure}");
    machine.memory.huge_pages_free = 72;
    assert_eq!(told(&needs(Vec::new(), &on), &machine), [""; 0]);
    let large = [("huge_pages", "try"), ("shared_buffers", "8GB")];
    assert_eq!(
        told(&needs(Vec::new(), &large), &machine),
        [
            "stop: shared_buffers is 8.0 GiB, this machine has 4.0 GiB: the server would not start | restore on a machine with more memory, or copy with --no-start and set shared_buffers before the start"
        ]
    );
    machine.memory.overcommits = true;
    assert_eq!(told(&needs(Vec::new(), &large), &machine), [""; 0]);
}

#[test]
fn programs_of_another_build_are_refused() {
    let mut other = needs(Vec::new(), &[]);
    other.build = Some(Build { page_bytes: 8192, relation_segment_pages: 131_072, wal_page_bytes: 16_384 });
    assert_eq!(
        told(&other, &facts()),
        [
            "stop: the backup has WAL pages of 16384 bytes, the programs here are built for WAL pages of 8192 bytes | name programs that were built as the original's, with --pg-bin"
        ]
    );
}

#[test]
fn what_the_backup_does_not_tell_is_said() {
    let mut silent = needs(Vec::new(), &[]);
    silent.environment = None;
    assert!(told(&silent, &facts())[0].starts_with("warn: the backup does not tell which libraries and locales"));
    let mut closed = database("app", "C");
    closed.unknown = Some("no answer".to_owned());
    assert_eq!(
        told(&needs(vec![closed], &[]), &facts()),
        [
            "warn: the backup does not tell which libraries the extensions of database app need | look at the original, if it is there, with \\dx and \\l"
        ]
    );
}
