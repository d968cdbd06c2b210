//! What a copy beside its original must not do, and how it is kept from it.
//!
//! Its catalogs and its configuration are the original's. Let loose, it would write into the original's archive, take
//! the changes of its subscriptions out of their publishers' slots, wait for its standbys, run its jobs a second time.
//! So the settings that let it are off in `postgresql.auto.conf`, which wins over every file, and what they were is
//! told. `--adopt` leaves all of them as they are.
//!
//! Jobs that extensions run by themselves: pg_cron, pg_partman's worker and pglogical begin where the library is
//! loaded at the start, and nowhere else, so these libraries stay unloaded; none of them replays WAL, and their tables can
//! be read, while their functions say what is missing. TimescaleDB's data cannot be read without its library: it gets no
//! workers.
//!
//! Replication slots are in no backup. Publications do nothing by themselves: whoever followed them does so through a
//! slot, at the original.

use engine::format::backup::BackupInfo;
use engine::format::environment::{Replication, Slot};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::conf::Setting;
use crate::machine;

/// Libraries that begin to work by being loaded at the start.
pub(crate) const UNLOADED: [&str; 3] = ["pg_cron", "pg_partman_bgw", "pglogical"];
const PRELOADED: &str = "shared_preload_libraries";
/// The settings that let a server out, and how they are off.
const OFF: [(&str, &str); 5] = [
    ("archive_mode", "off"),
    ("max_logical_replication_workers", "0"),
    ("synchronous_standby_names", ""),
    ("primary_conninfo", ""),
    ("primary_slot_name", ""),
];
/// A library that stays loaded, and the setting that gives it workers.
const WORKERS: (&str, &str) = ("timescaledb", "timescaledb.max_background_workers");
/// May hold a password.
const SECRET: &str = "primary_conninfo";

/// What was switched off.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Isolation {
    /// The settings of the isolated copy.
    pub(crate) settings: Vec<(String, String)>,
    /// Those of them that were on.
    pub(crate) switched_off: Vec<SwitchedOff>,
}

/// A setting that was on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SwitchedOff {
    pub(crate) name: String,
    /// What it was; nothing for what may hold a password.
    pub(crate) was: Option<String>,
    /// The statement that brings it back, at the next start.
    pub(crate) lifted_by: String,
}

impl Default for Isolation {
    /// What every copy gets, where nothing is known of what was on.
    fn default() -> Self {
        let settings = OFF.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Self { settings: settings.collect(), switched_off: Vec::new() }
    }
}

impl Isolation {
    /// The settings whose values decide.
    pub(super) fn asks_for() -> Vec<&'static str> {
        OFF.iter().map(|(name, _)| *name).chain([PRELOADED]).collect()
    }

    /// Decides, from what PostgreSQL makes of the original's configuration. `in_auto` is what `postgresql.auto.conf` says of
    /// a setting: where it says something, `ALTER SYSTEM RESET` takes the original's away together with ours.
    pub(crate) fn of(
        effective: &dyn Fn(&str) -> anyhow::Result<String>,
        in_auto: &dyn Fn(&str) -> Option<String>,
    ) -> anyhow::Result<Self> {
        let mut isolation = Self::default();
        let literal = |value: &str| format!("'{}'", value.replace('\'', "''"));
        let lifted_by = |name: &str, was: &str| match in_auto(name).is_some() && name != SECRET {
            // One literal would become one library of that name.
            true if name == PRELOADED => {
                let each: Vec<String> = machine::library_names(was).iter().map(|name| literal(name)).collect();
                format!("ALTER SYSTEM SET {name} = {}", each.join(", "))
            }
            true => format!("ALTER SYSTEM SET {name} = {}", literal(was)),
            false => format!("ALTER SYSTEM RESET {name}"),
        };
        let mut off = |name: &str, was: &str| {
            let was_told = (name != SECRET).then(|| was.to_owned());
            isolation.switched_off.push(SwitchedOff {
                name: name.to_owned(),
                was: was_told,
                lifted_by: lifted_by(name, was),
            });
        };
        for (name, value) in OFF {
            let was = effective(name)?;
            if was != value {
                off(name, &was);
            }
        }
        let preloaded = effective(PRELOADED)?;
        let names = machine::library_names(&preloaded);
        let is_unloaded = |name: &str| UNLOADED.contains(&machine::library_stem(name));
        if names.iter().any(|name| is_unloaded(name)) {
            off(PRELOADED, &preloaded);
            let kept: Vec<String> = names.iter().filter(|name| !is_unloaded(name)).map(|name| in_list(name)).collect();
            isolation.settings.push((PRELOADED.to_owned(), kept.join(", ")));
        }
        if names.iter().any(|name| machine::library_stem(name) == WORKERS.0) {
            let name = WORKERS.1;
            // Without its library PostgreSQL does not know the setting, and only the file tells what it was.
            let was = in_auto(name);
            let lifted_by = lifted_by(name, was.as_deref().unwrap_or_default());
            isolation.switched_off.push(SwitchedOff { name: name.to_owned(), was, lifted_by });
            isolation.settings.push((name.to_owned(), "0".to_owned()));
        }
        Ok(isolation)
    }

    /// As they stand in the file.
    pub(crate) fn settings(&self) -> Vec<Setting> {
        self.settings.iter().map(|(name, value)| Setting::new(name, value)).collect()
    }

    /// Whether a setting is one of them.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.settings.iter().any(|(known, _)| known == name)
    }
}

/// A name in a list of libraries.
fn in_list(name: &str) -> String {
    if name.contains([',', ' ']) { format!("\"{name}\"") } else { name.to_owned() }
}

/// For people: what is off, and what did not come along. Empty lines of an adopted copy that has lost nothing.
pub(super) fn text(isolation: Option<&Isolation>, info: &BackupInfo, adopted: bool) -> Vec<String> {
    let unknown = Replication::default();
    let replication = info.server.environment.as_ref().map_or(&unknown, |environment| &environment.replication);
    let mut lines = Vec::new();
    if !adopted {
        lines.push("an isolated copy, by its postgresql.auto.conf; each is lifted by".to_owned());
        for SwitchedOff { name, was, lifted_by } in isolation.map_or(&[][..], |isolation| &isolation.switched_off) {
            let was = was.as_ref().map(|was| format!(" (was {was})")).unwrap_or_default();
            lines.push(format!("  {name}{was}: {lifted_by}"));
        }
        lines.push("  pg_wal/pghydrant.copy, which keeps `wal push` from archiving: remove it".to_owned());
    }
    let names = |list: Vec<String>| list.join(", ");
    if !replication.subscriptions.is_empty() {
        let all = replication.subscriptions.iter();
        let off = if adopted { "" } else { " (off)" };
        let all =
            all.map(|one| format!("{}.{}{}", one.database, one.name, if one.enabled { off } else { " (disabled)" }));
        lines.push(format!("subscriptions: {}", names(all.collect())));
        if adopted {
            lines.push(
                "  they go on where their publishers are: what they had received after the target is missing"
                    .to_owned(),
            );
        }
    }
    if !replication.publications.is_empty() {
        let all = replication.publications.iter().map(|one| format!("{}.{}", one.database, one.name));
        let until = if adopted { "until their slots are made again" } else { "here" };
        lines.push(format!("publications, which nobody follows {until}: {}", names(all.collect())));
    }
    if !replication.slots.is_empty() {
        let kind = |slot: &Slot| format!("{} ({})", slot.name, slot.plugin.as_ref().unwrap_or(&slot.kind));
        let all = replication.slots.iter().map(kind).collect();
        lines.push(format!("replication slots, which no backup contains: {}", names(all)));
        if adopted {
            lines.extend(replication.slots.iter().map(|slot| format!("  {}", made_again(slot))));
        }
    }
    lines
}

/// The statement that makes a slot anew; what it kept for its follower is lost.
fn made_again(slot: &Slot) -> String {
    let quoted = |text: &str| format!("'{}'", text.replace('\'', "''"));
    let name = quoted(&slot.name);
    match (&slot.plugin, &slot.database) {
        (Some(plugin), Some(database)) => {
            format!("in {database}: SELECT pg_create_logical_replication_slot({name}, {})", quoted(plugin))
        }
        _ => format!("SELECT pg_create_physical_replication_slot({name})"),
    }
}

/// The same for programs.
pub(super) fn object(isolation: Option<&Isolation>, info: &BackupInfo, adopted: bool) -> Value {
    let replication = info.server.environment.as_ref().map(|environment| &environment.replication);
    json!({
        "adopted": adopted,
        "settings": isolation.filter(|_| !adopted).map(|isolation| isolation.settings.iter().cloned().collect::<std::collections::BTreeMap<_, _>>()),
        "switched_off": isolation.filter(|_| !adopted).map(|isolation| &isolation.switched_off),
        "replication": replication,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn isolation(settings: &[(&str, &str)], in_auto: &[&str]) -> Isolation {
        let of_auto = |name: &str| {
            let found = settings.iter().find(|(known, _)| *known == name).filter(|_| in_auto.contains(&name));
            found.map(|(_, value)| (*value).to_owned())
        };
        let effective = |name: &str| {
            let usual = match name {
                "max_logical_replication_workers" => "4",
                "archive_mode" => "off",
                _ => "",
            };
            let found = settings.iter().find(|(known, _)| *known == name);
            Ok(found.map_or(usual, |(_, value)| value).to_owned())
        };
        Isolation::of(&effective, &of_auto).unwrap()
    }

    fn off(isolation: &Isolation) -> Vec<(&str, Option<&str>, &str)> {
        isolation
            .switched_off
            .iter()
            .map(|off| (off.name.as_str(), off.was.as_deref(), off.lifted_by.as_str()))
            .collect()
    }

    #[test]
    fn what_was_on_is_told_with_what_brings_it_back() {
        let settings = [
            ("archive_mode", "on"),
            ("max_logical_replication_workers", "0"),
            ("synchronous_standby_names", "FIRST 1 (s1, \"it's\")"),
            ("primary_conninfo", "host=other password=secret"),
        ];
        let found = isolation(&settings, &["synchronous_standby_names", "primary_conninfo"]);
        assert_eq!(
            off(&found),
            [
                ("archive_mode", Some("on"), "ALTER SYSTEM RESET archive_mode"),
                (
                    "synchronous_standby_names",
                    Some("FIRST 1 (s1, \"it's\")"),
                    "ALTER SYSTEM SET synchronous_standby_names = 'FIRST 1 (s1, \"it''s\")'"
                ),
                ("primary_conninfo", None, "ALTER SYSTEM RESET primary_conninfo"),
            ]
        );
        assert!(!serde_json::to_string(&found).unwrap().contains("secret"));
        assert_eq!(found.settings, Isolation::default().settings);
    }

    #[test]
    fn what_stood_in_the_file_that_we_write_is_brought_back_as_it_was() {
        let settings = [
            ("shared_preload_libraries", "timescaledb, pg_cron"),
            ("timescaledb.max_background_workers", "16"),
            ("max_logical_replication_workers", "0"),
        ];
        let found = isolation(&settings, &["shared_preload_libraries", "timescaledb.max_background_workers"]);
        let lifted: Vec<&str> = off(&found).iter().map(|(_, _, lifted_by)| *lifted_by).collect();
        assert_eq!(
            lifted,
            [
                "ALTER SYSTEM SET shared_preload_libraries = 'timescaledb', 'pg_cron'",
                "ALTER SYSTEM SET timescaledb.max_background_workers = '16'"
            ]
        );
    }

    #[test]
    fn slots_are_made_again_in_their_databases() {
        let physical = Slot { name: "one".to_owned(), kind: "physical".to_owned(), ..Slot::default() };
        assert_eq!(made_again(&physical), "SELECT pg_create_physical_replication_slot('one')");
        let (plugin, database) = (Some("pgoutput".to_owned()), Some("app".to_owned()));
        let logical = Slot { name: "two".to_owned(), kind: "logical".to_owned(), plugin, database, active: true };
        assert_eq!(made_again(&logical), "in app: SELECT pg_create_logical_replication_slot('two', 'pgoutput')");
    }

    #[test]
    fn jobs_stay_unloaded_and_what_the_data_need_stays_loaded() {
        let of = |list: &str| {
            isolation(&[("shared_preload_libraries", list), ("max_logical_replication_workers", "0")], &[])
        };
        let preloaded = |isolation: &Isolation| {
            isolation.settings.iter().find(|(name, _)| name == PRELOADED).map(|(_, value)| value.clone())
        };
        let jobs = of("pg_stat_statements,$libdir/pg_cron, pg_partman_bgw ,\"a,b\"");
        assert_eq!(preloaded(&jobs).as_deref(), Some("pg_stat_statements, \"a,b\""));
        assert_eq!(off(&jobs)[0].2, "ALTER SYSTEM RESET shared_preload_libraries");
        assert_eq!(preloaded(&of("pg_cron")).as_deref(), Some(""));
        assert_eq!(preloaded(&of("pg_cronometer")), None);
        let series = of("timescaledb");
        assert_eq!(preloaded(&series), None);
        assert!(series.has("timescaledb.max_background_workers") && !jobs.has("timescaledb.max_background_workers"));
    }
}
