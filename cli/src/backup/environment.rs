//! What the server found on its machine and beside it: libraries, locales, peers. A restore compares it with its own
//! machine, and tells which of it an isolated copy is without.
//!
//! Each database is asked by a session of its own, one after the other, before the backup begins, so that nothing of
//! the backup waits for it. What cannot be asked is unknown, never a failure: a database that lets nobody in, one whose
//! catalogs somebody has locked, one too many.
//!
//! Always true: no password is asked for. `pg_subscription.subconninfo` and `primary_conninfo` may hold one.

use std::time::{Duration, Instant};

use anyhow::Result;
use engine::format::environment::{
    Collation, Database, Environment, Extension, Library, Locale, Publication, Replication, Slot, Subscription,
};
use tokio_postgres::Row;

use crate::machine;
use crate::postgres::client::{Client, value};
use crate::postgres::conninfo::Conninfo;

/// A session and three questions take some milliseconds.
const DATABASES_MAX: usize = 200;
/// For all databases together, however slow the server is.
const PATIENCE: Duration = Duration::from_secs(20);
/// For one of them to let us in.
const CONNECT_PATIENCE: Duration = Duration::from_secs(10);
/// For one question; catalogs of a million relations are read in less.
const QUESTION_LIMIT: &str = "SET statement_timeout = '10s'";

/// `FirstNormalObjectId`: what is below came with the server.
const NORMAL_OBJECT_FIRST: u32 = 16_384;

/// Asks the server, and then each of its databases; nothing where it does not even tell which it has.
pub(super) fn gather(
    client: &Client,
    conninfo: &Conninfo,
    process: Option<u32>,
    stop: &dyn Fn() -> bool,
) -> Option<Environment> {
    let began = Instant::now();
    let mut databases = told("the databases", databases(client).map(Some))?;
    let mut publications = Vec::new();
    for (asked, database) in databases.iter_mut().filter(|database| database.allows_connections).enumerate() {
        if stop() || asked >= DATABASES_MAX || began.elapsed() >= PATIENCE {
            database.unknown = Some("not asked: too many databases, or too slow a server".to_owned());
            continue;
        }
        match look_into(&conninfo.in_database(&database.name), database) {
            Ok(names) => {
                let of = |name| Publication { database: database.name.clone(), name };
                publications.extend(names.into_iter().map(of));
            }
            Err(error) => database.unknown = Some(format!("{error:#}")),
        }
    }
    Some(Environment {
        libc_version: told("the C library", libc_version(client)).or_else(machine::libc_version),
        icu_version: process.and_then(machine::icu_of_process),
        replication: Replication {
            slots: told("the replication slots", slots(client)),
            subscriptions: told("the subscriptions", subscriptions(client)),
            publications,
        },
        databases,
    })
}

/// What could not be asked is left out.
fn told<T: Default>(what: &str, answer: Result<T>) -> T {
    answer.inspect_err(|error| tracing::info!("not recorded: {what}: {error:#}")).unwrap_or_default()
}

fn databases(client: &Client) -> Result<Vec<Database>> {
    let (provider, name, version) = match client.version_num() {
        ..150_000 => ("'c'", "NULL::text", "NULL::text"),
        150_000..170_000 => ("datlocprovider::text", "daticulocale::text", "datcollversion::text"),
        _ => ("datlocprovider::text", "datlocale::text", "datcollversion::text"),
    };
    let sql = format!(
        "SELECT datname::text, pg_encoding_to_char(encoding)::text, datallowconn, {provider}, datcollate::text, \
            datctype::text, {name}, {version} FROM pg_database ORDER BY datname"
    );
    let database = |row: &Row| {
        Ok(Database {
            name: value(row, 0)?,
            encoding: value(row, 1)?,
            allows_connections: value(row, 2)?,
            locale: locale(row, 3)?,
            ..Database::default()
        })
    };
    client.query(&sql, &[])?.iter().map(database).collect()
}

/// Five columns, from `first` on.
fn locale(row: &Row, first: usize) -> Result<Locale> {
    let provider: String = value(row, first)?;
    let text = |index| Ok::<_, anyhow::Error>(value::<Option<String>>(row, index)?.unwrap_or_default());
    let provider = match provider.as_str() {
        "i" => "icu",
        "b" => "builtin",
        "d" => "default",
        _ => "libc",
    };
    Ok(Locale {
        provider: provider.to_owned(),
        collate: text(first + 1)?,
        ctype: text(first + 2)?,
        name: value(row, first + 3)?,
        version: value(row, first + 4)?,
    })
}

/// By the server's own words, which may run with another C library than we do; only where it has a locale that has a
/// version.
fn libc_version(client: &Client) -> Result<Option<String>> {
    const SQL: &str = "SELECT pg_collation_actual_version(oid) FROM pg_collation \
        WHERE collprovider = 'c' AND collcollate NOT IN ('C', 'POSIX') AND collcollate NOT ILIKE 'C.%' LIMIT 1";
    client.query(SQL, &[])?.first().map_or(Ok(None), |row| value(row, 0))
}

/// What one database has; its publications come back.
fn look_into(conninfo: &Conninfo, database: &mut Database) -> Result<Vec<String>> {
    let client = Client::connect_within(conninfo, CONNECT_PATIENCE)?;
    client.batch(QUESTION_LIMIT)?;
    database.extensions = extensions(&client)?;
    database.libraries = libraries(&client)?;
    database.collations = collations(&client)?;
    let publications = client.query("SELECT pubname::text FROM pg_publication ORDER BY 1", &[])?;
    publications.iter().map(|row| value(row, 0)).collect()
}

fn extensions(client: &Client) -> Result<Vec<Extension>> {
    let rows = client.query("SELECT extname::text, extversion FROM pg_extension ORDER BY 1", &[])?;
    rows.iter().map(|row| Ok(Extension { name: value(row, 0)?, version: value(row, 1)? })).collect()
}

/// Of every schema, and of functions that no extension made as well.
fn libraries(client: &Client) -> Result<Vec<Library>> {
    const SQL: &str = "SELECT DISTINCT p.probin::text, e.extname::text \
        FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang AND l.lanname = 'c' \
        LEFT JOIN pg_depend d ON d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e' \
            AND d.refclassid = 'pg_extension'::regclass \
        LEFT JOIN pg_extension e ON e.oid = d.refobjid \
        WHERE p.oid >= $1 AND p.probin IS NOT NULL ORDER BY 1, 2";
    let mut libraries: Vec<Library> = Vec::new();
    for row in client.query(SQL, &[&NORMAL_OBJECT_FIRST])? {
        let (name, extension): (String, Option<String>) = (value(&row, 0)?, value(&row, 1)?);
        if libraries.last().is_none_or(|last| last.name != name) {
            libraries.push(Library { name, extensions: Vec::new() });
        }
        if let Some(last) = libraries.last_mut() {
            last.extensions.extend(extension);
        }
    }
    Ok(libraries)
}

/// Those that indexes are sorted by, and those of columns; the database's own is called `default`.
fn collations(client: &Client) -> Result<Vec<Collation>> {
    let name = match client.version_num() {
        ..150_000 => "CASE WHEN c.collprovider = 'i' THEN c.collcollate::text END",
        150_000..170_000 => "c.colliculocale::text",
        _ => "c.colllocale::text",
    };
    let sql = format!(
        "SELECT c.collname::text, u.indexes, c.collprovider::text, c.collcollate::text, c.collctype::text, {name}, \
            c.collversion::text \
        FROM (SELECT coll, count(DISTINCT relation) AS indexes FROM ( \
            SELECT unnest(indcollation::oid[]) AS coll, indexrelid AS relation FROM pg_index \
            UNION ALL SELECT attcollation, NULL FROM pg_attribute WHERE attrelid >= $1 AND attcollation NOT IN (0, 100) \
        ) AS used GROUP BY 1) AS u JOIN pg_collation c ON c.oid = u.coll \
        WHERE c.collprovider <> 'c' OR c.collcollate NOT IN ('C', 'POSIX') OR c.collctype NOT IN ('C', 'POSIX') ORDER BY 1"
    );
    let collation = |row: &Row| {
        let indexes: i64 = value(row, 1)?;
        Ok(Collation { name: value(row, 0)?, locale: locale(row, 2)?, indexes: indexes.cast_unsigned() })
    };
    client.query(&sql, &[&NORMAL_OBJECT_FIRST])?.iter().map(collation).collect()
}

/// Those that stay: a backup's own ends with it.
fn slots(client: &Client) -> Result<Vec<Slot>> {
    const SQL: &str = "SELECT slot_name::text, slot_type::text, plugin::text, database::text, active \
        FROM pg_replication_slots WHERE NOT temporary ORDER BY 1";
    let slot = |row: &Row| {
        Ok(Slot {
            name: value(row, 0)?,
            kind: value(row, 1)?,
            plugin: value(row, 2)?,
            database: value(row, 3)?,
            active: value(row, 4)?,
        })
    };
    client.query(SQL, &[])?.iter().map(slot).collect()
}

fn subscriptions(client: &Client) -> Result<Vec<Subscription>> {
    const SQL: &str = "SELECT d.datname::text, s.subname::text, s.subenabled, s.subslotname::text \
        FROM pg_subscription s JOIN pg_database d ON d.oid = s.subdbid ORDER BY 1, 2";
    let subscription = |row: &Row| {
        Ok(Subscription {
            database: value(row, 0)?,
            name: value(row, 1)?,
            enabled: value(row, 2)?,
            slot: value(row, 3)?,
        })
    };
    client.query(SQL, &[])?.iter().map(subscription).collect()
}
