//! What the machine's state means for a server of a backup. Pure.
//!
//! What keeps the server from starting, or everybody out of it, stops a restore: it is told before the copy instead of
//! after it. What breaks single functions, databases or the order of an index is a warning: all data are there, and the
//! cure needs no second restore.

use std::collections::{BTreeMap, BTreeSet};

use engine::format::environment::{Database, Locale};

use super::{Facts, Needs, libraries, locales, packages};
use crate::human;

/// Databases and the like that a line names.
const NAMES_MAX: usize = 5;
/// From here on the server notes down which version of the rules its indexes were sorted by.
const REFRESH_FROM: u32 = 150_000;

/// What a finding means for a restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Weight {
    /// The configuration cannot be prepared, whoever starts the server.
    Unreadable,
    /// The server would not start, or let nobody in.
    Stops,
    /// All data are there, and something does not work, or not rightly, until it is cured.
    Warns,
}

/// One thing that this machine lacks or does otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    pub(crate) weight: Weight,
    pub(crate) what: String,
    pub(crate) cure: String,
}

/// Everything, the worst first.
pub(crate) fn judge(needs: &Needs, facts: &Facts) -> Vec<Finding> {
    let mut judge = Judge { needs, facts, findings: Vec::new() };
    judge.build();
    judge.preloaded();
    judge.locale_settings();
    judge.shared_memory();
    judge.databases();
    judge.functions();
    judge.order();
    judge.unknown();
    judge.findings.sort_by_key(|finding| finding.weight);
    judge.findings
}

struct Judge<'a> {
    needs: &'a Needs,
    facts: &'a Facts,
    findings: Vec<Finding>,
}

impl<'a> Judge<'a> {
    fn stop(&mut self, what: impl Into<String>, cure: impl Into<String>) {
        self.findings.push(Finding { weight: Weight::Stops, what: what.into(), cure: cure.into() });
    }

    fn warn(&mut self, what: impl Into<String>, cure: impl Into<String>) {
        self.findings.push(Finding { weight: Weight::Warns, what: what.into(), cure: cure.into() });
    }

    fn every_database(&self) -> impl Iterator<Item = &'a Database> + use<'a> {
        self.needs.environment.iter().flat_map(|environment| &environment.databases)
    }

    fn build(&mut self) {
        let (Some(needed), Some(here)) = (self.needs.build, self.facts.build) else { return };
        for (what, needed, here) in [
            ("pages of {} bytes", needed.page_bytes, here.page_bytes),
            ("files of {} pages", needed.relation_segment_pages, here.relation_segment_pages),
            ("WAL pages of {} bytes", needed.wal_page_bytes, here.wal_page_bytes),
        ] {
            if needed != here {
                let text = |number: u32| what.replace("{}", &number.to_string());
                let what = format!("the backup has {}, the programs here are built for {}", text(needed), text(here));
                self.stop(what, "name programs that were built as the original's, with --pg-bin");
            }
        }
    }

    fn preloaded(&mut self) {
        let Some(directory) = &self.facts.library_directory else { return };
        for (setting, name) in self.needs.preloaded() {
            if !self.facts.missing_libraries.contains(&name) {
                continue;
            }
            let end = match setting {
                "shared_preload_libraries" => "the server would not start",
                _ => "nobody could connect",
            };
            let place = directory.display();
            let cure = packages::cure(libraries::stem(&name), self.needs.major(), self.facts.has_apt);
            self.stop(format!("{setting} names {name}, which is not in {place}: {end}"), cure);
        }
    }

    /// PostgreSQL takes no configuration that names a locale it does not know, not even to say what is in it.
    fn locale_settings(&mut self) {
        let mut without: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (setting, name) in self.needs.locale_settings() {
            if self.facts.missing_locales.contains(name) {
                without.entry(name).or_default().push(setting);
            }
        }
        for (name, settings) in without {
            let what = format!(
                "{} = {name}, a locale that this machine lacks: the server would not start",
                settings.join(", ")
            );
            self.findings.push(Finding { weight: Weight::Unreadable, what, cure: locales::cure(name) });
        }
    }

    /// In huge pages, where nothing else will do, or in memory.
    fn shared_memory(&mut self) {
        let memory = &self.facts.memory;
        let Some((setting, bytes)) = self.needs.shared_memory() else { return };
        let size = human::bytes(bytes);
        if self.needs.setting("huge_pages") == Some("on") {
            let page = memory.huge_page_bytes.max(1 << 12);
            let pages = bytes.div_ceil(page);
            if memory.huge_pages_free < pages {
                let wanted = memory.huge_pages + pages - memory.huge_pages_free;
                self.stop(
                    format!(
                        "huge_pages is on, and {setting} of {size} takes {pages} pages of {}: {} are free, the server would not start",
                        human::bytes(page),
                        memory.huge_pages_free
                    ),
                    if memory.is_usual_huge_page {
                        format!("sysctl vm.nr_hugepages={wanted}")
                    } else {
                        let kib = page / 1024;
                        format!("echo {wanted} > /sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages")
                    },
                );
            }
        } else if memory.bytes > 0 && bytes > memory.bytes && !memory.overcommits {
            self.stop(
                format!("{setting} is {size}, this machine has {}: the server would not start", human::bytes(memory.bytes)),
                "restore on a machine with more memory, or copy with --no-start and set shared_buffers before the start",
            );
        }
    }

    /// A database whose locale is missing lets nobody in; so does a server where that is each of them.
    fn databases(&mut self) {
        let missing = &self.facts.missing_locales;
        let mut without: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        let mut open = 0;
        for database in self.every_database().filter(|database| database.allows_connections) {
            match self.needs.locales_of(&database.locale).find(|name| missing.contains(*name)) {
                Some(name) => without.entry(name).or_default().push(&database.name),
                None => open += 1,
            }
        }
        for (locale, databases) in without {
            let names = listed(&databases);
            let what = |end: &str| format!("this machine lacks the locale {locale} of {}: {end}", of_databases(&names));
            if open == 0 {
                self.stop(what("nobody could connect to any database"), locales::cure(locale));
            } else {
                self.warn(what("nobody can connect until it is there"), locales::cure(locale));
            }
        }
        for database in self.every_database() {
            let of_system = database.collations.iter().filter(|collation| collation.locale.provider == "libc");
            for collation in of_system.filter(|collation| missing.contains(&collation.locale.collate)) {
                let (name, locale) = (&collation.name, &collation.locale.collate);
                self.warn(
                    format!(
                        "this machine lacks the locale {locale} of collation {name} in database {}: what is sorted by it fails",
                        database.name
                    ),
                    locales::cure(locale),
                );
            }
        }
    }

    fn functions(&mut self) {
        let Some(directory) = &self.facts.library_directory else { return };
        let mut needed: BTreeMap<&str, (BTreeSet<&str>, Vec<&str>)> = BTreeMap::new();
        for database in self.every_database() {
            for library in database.libraries.iter().filter(|one| self.facts.missing_libraries.contains(&one.name)) {
                let (extensions, databases) = needed.entry(&library.name).or_default();
                extensions.extend(library.extensions.iter().map(String::as_str));
                databases.push(&database.name);
            }
        }
        for (library, (extensions, databases)) in needed {
            let extensions: Vec<&str> = extensions.into_iter().collect();
            let user = match extensions.as_slice() {
                [] => "functions".to_owned(),
                [one] => format!("extension {one}"),
                more => format!("extensions {}", listed(more)),
            };
            let (databases, place) = (of_databases(&listed(&databases)), directory.display());
            let cure = packages::cure(libraries::stem(library), self.needs.major(), self.facts.has_apt);
            self.warn(format!("{library} is not in {place}: what uses it fails ({user} of {databases})"), cure);
        }
    }

    /// Text that was sorted by one version of a library and is looked for by another is not found.
    fn order(&mut self) {
        let Some(environment) = &self.needs.environment else { return };
        let glibc = ("libc", "glibc", &environment.libc_version, &self.facts.libc_version);
        let icu = ("icu", "ICU", &environment.icu_version, &self.facts.icu_version);
        for (provider, library, there, here) in [glibc, icu] {
            let (Some(there), Some(here)) = (there, here) else { continue };
            if there == here {
                continue;
            }
            let mut names = Vec::new();
            let mut indexes: u64 = 0;
            for database in &environment.databases {
                let is_its_own = database.locale.provider == provider && !is_plain(provider, &database.locale.collate);
                let sorted_by = |locale: &Locale| match locale.provider.as_str() {
                    "default" => is_its_own,
                    other => other == provider && !is_plain(provider, &locale.collate),
                };
                // A description may say anything: no sum of it is one to fail on.
                let counts = database.collations.iter().filter(|one| sorted_by(&one.locale)).map(|one| one.indexes);
                let count = counts.fold(0, u64::saturating_add);
                if count > 0 || (is_its_own && database.unknown.is_some()) {
                    names.push(database.name.as_str());
                    indexes = count.saturating_add(indexes);
                }
            }
            if names.is_empty() {
                continue;
            }
            let databases = of_databases(&listed(&names));
            let refresh = if self.needs.version_num >= REFRESH_FROM {
                ", then ALTER DATABASE … REFRESH COLLATION VERSION"
            } else {
                ""
            };
            self.warn(
                format!(
                    "{} of {databases}, sorted by {library} {there}, may be out of order by {library} {here} of this machine: queries miss rows, unique ones take doubles",
                    match indexes {
                        0 => "indexes".to_owned(),
                        1 => "1 index".to_owned(),
                        more => format!("{more} indexes"),
                    }
                ),
                format!("REINDEX DATABASE in each of them{refresh}"),
            );
        }
    }

    /// What the backup could not record.
    fn unknown(&mut self) {
        let cure = "look at the original, if it is there, with \\dx and \\l";
        match &self.needs.environment {
            None => self.warn(
                "the backup does not tell which libraries and locales its databases need: it was taken over from a base backup, or made by an earlier version",
                cure,
            ),
            Some(environment) => {
                let open = environment.databases.iter().filter(|database| database.unknown.is_some());
                let names: Vec<&str> = open.map(|database| database.name.as_str()).collect();
                if !names.is_empty() {
                    let databases = of_databases(&listed(&names));
                    self.warn(format!("the backup does not tell which libraries the extensions of {databases} need"), cure);
                }
            }
        }
    }
}

/// Text that is sorted by its bytes alone is sorted alike everywhere.
fn is_plain(provider: &str, collate: &str) -> bool {
    provider == "libc" && locales::is_plain(collate)
}

fn listed(names: &[&str]) -> String {
    let shown = names[..names.len().min(NAMES_MAX)].join(", ");
    match names.len().saturating_sub(NAMES_MAX) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

fn of_databases(listed: &str) -> String {
    let noun = if listed.contains(", ") || listed.contains(" more") { "databases" } else { "database" };
    format!("{noun} {listed}")
}

#[cfg(test)]
#[path = "judge_tests.rs"]
mod tests;
