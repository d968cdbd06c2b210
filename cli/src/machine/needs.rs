//! What a backup's server asks of the machine it runs on: from the backup's description, and from the configuration
//! files in the backup where that is silent.

use std::collections::BTreeMap;

use engine::format::backup::BackupInfo;
use engine::format::environment::{Environment, Locale};

use super::{Build, libraries};
use crate::human;
use crate::postgres::control::ControlFile;
use crate::restore::conf;

/// Settings of `postgresql.conf` that name a locale: the server refuses one that it does not know.
const LOCALE_SETTINGS: [&str; 4] = ["lc_messages", "lc_monetary", "lc_numeric", "lc_time"];
/// From here on the server itself sorts by bytes, whatever `LC_COLLATE` says.
const COLLATE_UNUSED_FROM: u32 = 180_000;
/// From PostgreSQL 15 on the server tells how much shared memory it takes in all.
const SHARED_MEMORY: [&str; 2] = ["shared_memory_size", "shared_buffers"];

/// What is needed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Needs {
    pub(crate) version_num: u32,
    pub(crate) build: Option<Build>,
    /// Nothing where the backup does not tell.
    pub(crate) environment: Option<Environment>,
    pub(super) settings: BTreeMap<String, String>,
    /// Libraries, by their stems, that the server will not be told to load.
    pub(super) unloaded: Vec<&'static str>,
}

impl Needs {
    /// A server that needs nothing.
    #[cfg(test)]
    pub(crate) fn none() -> Self {
        Self { environment: Some(Environment::default()), ..Self::default() }
    }

    /// `files` are the backup's configuration files, the one that wins last.
    pub(crate) fn of(
        info: &BackupInfo,
        files: &[Option<&[u8]>],
        control: Option<&ControlFile>,
        unloaded: &[&'static str],
    ) -> Self {
        let entries = files.iter().flatten().flat_map(|text| conf::entries(text));
        let mut settings: BTreeMap<String, String> = entries.map(|entry| (entry.name, entry.value)).collect();
        // As it ran: a file may be overruled by one that it includes, or by the command line.
        settings.extend(info.server.settings.clone());
        Self {
            version_num: info.server.version_num,
            build: control.map(|control| Build {
                page_bytes: control.block_bytes,
                relation_segment_pages: control.relation_segment_pages,
                wal_page_bytes: control.wal_block_bytes,
            }),
            environment: info.server.environment.clone(),
            settings,
            unloaded: unloaded.to_vec(),
        }
    }

    /// A setting, if the backup tells it, and it is not empty.
    pub(super) fn setting(&self, name: &str) -> Option<&str> {
        self.settings.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// The libraries that the server, or each of its sessions, loads, by the setting that says so: one that is missing
    /// keeps the server, or everybody, out.
    pub(super) fn preloaded(&self) -> Vec<(&'static str, String)> {
        let named = |setting| libraries::names(self.setting(setting).unwrap_or_default()).into_iter();
        let shared = named("shared_preload_libraries").filter(|name| !self.unloaded.contains(&libraries::stem(name)));
        let local = named("local_preload_libraries").map(|name| match name.contains('/') {
            true => name,
            false => format!("$libdir/plugins/{name}"),
        });
        let of = |setting| move |name| (setting, name);
        let session = named("session_preload_libraries").map(of("session_preload_libraries"));
        let local = local.map(of("local_preload_libraries"));
        shared.map(of("shared_preload_libraries")).chain(session).chain(local).collect()
    }

    /// Every library that is needed, each once.
    pub(super) fn libraries(&self) -> Vec<String> {
        let databases = self.environment.iter().flat_map(|environment| &environment.databases);
        let of_functions = databases.flat_map(|database| &database.libraries).map(|library| library.name.clone());
        let mut all: Vec<String> = self.preloaded().into_iter().map(|(_, name)| name).chain(of_functions).collect();
        all.sort();
        all.dedup();
        all
    }

    /// The settings that name a locale, with their values.
    pub(super) fn locale_settings(&self) -> impl Iterator<Item = (&'static str, &str)> {
        LOCALE_SETTINGS.iter().filter_map(|name| Some((*name, self.setting(name)?)))
    }

    /// The locales of a database that the operating system must have.
    pub(super) fn locales_of<'a>(&self, locale: &'a Locale) -> impl Iterator<Item = &'a str> + use<'a> {
        let collates = self.version_num < COLLATE_UNUSED_FROM || locale.provider == "libc";
        let names = [Some(&locale.ctype), Some(&locale.collate).filter(|_| collates)];
        names.into_iter().flatten().map(String::as_str)
    }

    /// Every locale that is needed.
    pub(super) fn locales(&self) -> Vec<&str> {
        let mut all: Vec<&str> = self.locale_settings().map(|(_, name)| name).collect();
        for database in self.environment.iter().flat_map(|environment| &environment.databases) {
            all.extend(self.locales_of(&database.locale));
            let collations = database.collations.iter().filter(|one| one.locale.provider == "libc");
            all.extend(collations.map(|one| one.locale.collate.as_str()));
        }
        all
    }

    pub(super) fn library_path(&self) -> String {
        self.setting("dynamic_library_path").unwrap_or("$libdir").to_owned()
    }

    /// Zero: the kernel's usual ones.
    pub(super) fn huge_page_bytes(&self) -> u64 {
        self.setting("huge_page_size").and_then(|text| human::parse_bytes(text).ok()).unwrap_or(0)
    }

    /// The least shared memory that the server takes, and the setting that says so.
    pub(super) fn shared_memory(&self) -> Option<(&'static str, u64)> {
        SHARED_MEMORY.iter().find_map(|name| Some((*name, human::parse_bytes(self.setting(name)?).ok()?)))
    }

    /// The major version.
    pub(crate) fn major(&self) -> u32 {
        self.version_num / 10_000
    }
}
