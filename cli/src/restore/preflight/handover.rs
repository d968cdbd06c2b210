//! The rules on where an instance is handed over to, and on its check.

use std::path::Path;

use super::super::handover::{CONFIGURATIONS, suits_a_unit};
use super::super::survey::What;
use super::Judge;

impl Judge<'_> {
    pub(super) fn handover(&mut self) {
        let debian = self.facts.handover.debian.is_some();
        if let Some((asked, found)) = &self.facts.handover.configuration {
            let role = "configuration directory";
            let cure = if debian {
                "choose another name with --register=NAME"
            } else {
                "nothing is written over: name another with --config-to, or empty it"
            };
            match &found.what {
                What::Absent | What::Empty => self.access(role, found),
                What::Cluster(_) | What::Ours(_) | What::Occupied(_) if debian => {
                    let name = asked.strip_prefix(CONFIGURATIONS).unwrap_or(asked).display();
                    self.refuse(format!("there is a cluster {name} already: {}", asked.display()), cure);
                }
                What::Unknown(reason) => self.refuse(format!("{role}: {reason}"), cure),
                What::NoDirectory => self.refuse(format!("{} is not a directory", asked.display()), cure),
                What::Occupied(example) => {
                    self.refuse(format!("{role} {} is not empty: it holds {example:?}", asked.display()), cure);
                }
                What::Cluster(_) | What::Ours(_) => {
                    self.refuse(format!("{role} {} holds a PostgreSQL cluster", asked.display()), cure);
                }
            }
            self.apart(&found.path);
        }
        self.debian();
        self.unit();
        self.check();
    }

    /// A configuration within a directory that the restore fills, or around one.
    fn apart(&mut self, configuration: &Path) {
        let facts = self.facts;
        for (index, (_, found)) in facts.places.iter().enumerate() {
            let role = if index == 0 { "the data directory" } else { "a tablespace" };
            if configuration.starts_with(&found.path) || found.path.starts_with(configuration) {
                self.refuse(
                    format!(
                        "the configuration, {}, and {role}, {}, lie within each other",
                        configuration.display(),
                        found.path.display()
                    ),
                    "give each a directory of its own; the data directory has a configuration in any case",
                );
            }
        }
    }

    fn debian(&mut self) {
        let Some(facts) = &self.facts.handover.debian else { return };
        let name = &facts.cluster.name;
        let plain = |letter: char| letter.is_ascii_alphanumeric() || "_.-".contains(letter);
        if name.is_empty() || name.starts_with(['.', '-']) || !name.chars().all(plain) {
            self.refuse(
                format!("\"{}\" cannot be the name of a cluster", name.escape_debug()),
                "letters, digits, _ and . are allowed: --register=NAME",
            );
        } else if name.contains('-') {
            self.warnings.push(format!("systemd has trouble with the - in \"{name}\": pg_ctlcluster works"));
        }
        if let Err(refusal) = &facts.tools {
            self.refuse(refusal.clone(), "--systemd-unit FILE writes a unit that needs none of that");
        }
        if let Err(refusal) = &facts.log {
            self.refuse(format!("the cluster's log: {refusal}"), "run it as root");
        }
    }

    fn unit(&mut self) {
        let Some(facts) = &self.facts.handover.unit else { return };
        let path = facts.path.display();
        if !suits_a_unit(&facts.path) {
            self.refuse(
                format!("{path} cannot be a unit of systemd"),
                "a name of letters, digits, - _ . and the end .service",
            );
        }
        if facts.exists {
            self.refuse(
                format!("{path} is there already"),
                "nothing is written over: name another with --systemd-unit",
            );
        } else if let Err(refusal) = &facts.writable {
            let hint = if self.facts.we_are_root { "make that directory" } else { "run it as root, or name another" };
            self.refuse(refusal.clone(), hint);
        }
        if self.facts.places.iter().any(|(_, found)| facts.path.starts_with(&found.path)) {
            self.refuse(
                format!("{path} lies in a directory that the restore fills"),
                "name another with --systemd-unit",
            );
        }
    }

    fn check(&mut self) {
        if self.request.check.is_none() {
            return;
        }
        if self.request.no_start {
            self.refuse(
                "--check looks into a running server, and --no-start starts none",
                "leave one of them out; the pages' checksums are verified in the copy in any case",
            );
        }
        if let Some(refusal) = &self.facts.handover.no_check {
            let major = self.backup().map_or(0, |info| info.server.version_num / 10_000);
            self.refuse(
                format!("the server cannot be checked: {refusal}"),
                format!("install the package of PostgreSQL {major} that has it (contrib), or leave --check out"),
            );
        }
    }
}
