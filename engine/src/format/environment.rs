//! What a server found on its machine and beside it when it was backed up: part of `<label>.json`.
//!
//! The files of a backup say little of the libraries, locales and peers that the server worked with; a restore
//! compares these with what its own machine has. Nothing here is needed to read a backup, and no password is in it.

use serde::{Deserialize, Serialize};

/// The server's surroundings. Every field may be missing: a later version adds some, and not every server tells all.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Environment {
    /// Version of the C library that sorts its text: `2.36`.
    pub libc_version: Option<String>,
    /// Major version of the ICU library that it runs with: `72`.
    pub icu_version: Option<String>,
    /// Its databases.
    pub databases: Vec<Database>,
    /// Whom it fed and whom it followed.
    pub replication: Replication,
}

/// One database.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Database {
    /// Its name.
    pub name: String,
    /// `UTF8`, …
    pub encoding: String,
    /// Who sorts and classifies its text, and by which rules.
    pub locale: Locale,
    /// `ALTER DATABASE … ALLOW_CONNECTIONS`.
    pub allows_connections: bool,
    /// Why nothing below is known of it, if that is so.
    pub unknown: Option<String>,
    /// Its extensions.
    pub extensions: Vec<Extension>,
    /// Libraries that functions of it are in, without those of every server.
    pub libraries: Vec<Library>,
    /// Collations that columns and indexes of it use, without C and POSIX.
    pub collations: Vec<Collation>,
}

/// By which rules text is sorted and classified.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Locale {
    /// `libc`, `icu`, `builtin`.
    pub provider: String,
    /// `LC_COLLATE` of the operating system.
    pub collate: String,
    /// `LC_CTYPE` of the operating system.
    pub ctype: String,
    /// The provider's own name, where it is not the operating system.
    pub name: Option<String>,
    /// The version of the rules that the server has noted down.
    pub version: Option<String>,
}

/// An extension.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Extension {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
}

/// A library, as `pg_proc.probin` names it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Library {
    /// `$libdir/pg_trgm`.
    pub name: String,
    /// Extensions whose functions are in it; none for functions that somebody made by hand.
    pub extensions: Vec<String>,
}

/// A collation in use.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Collation {
    /// Its name; `default` is the database's own.
    pub name: String,
    /// Its rules.
    pub locale: Locale,
    /// How many indexes are sorted by it.
    pub indexes: u64,
}

/// Whom a server fed and whom it followed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Replication {
    /// Replication slots, which no backup contains.
    pub slots: Vec<Slot>,
    /// Subscriptions.
    pub subscriptions: Vec<Subscription>,
    /// Publications.
    pub publications: Vec<Publication>,
}

/// A replication slot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Slot {
    /// Its name.
    pub name: String,
    /// `physical` or `logical`.
    pub kind: String,
    /// The output plugin of a logical one.
    pub plugin: Option<String>,
    /// The database of a logical one.
    pub database: Option<String>,
    /// Somebody was fed through it.
    pub active: bool,
}

/// A subscription.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Subscription {
    /// Its database.
    pub database: String,
    /// Its name.
    pub name: String,
    /// It received changes.
    pub enabled: bool,
    /// The slot at its publisher.
    pub slot: Option<String>,
}

/// A publication.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Publication {
    /// Its database.
    pub database: String,
    /// Its name.
    pub name: String,
}
