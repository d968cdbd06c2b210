//! What PostgreSQL itself makes of a configuration.
//!
//! `postgres -C` tells one setting and ends, and its start takes ten times as long as its answer. So all that somebody
//! wants to know is asked at once, by one process for each setting, side by side.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Stdio};

use anyhow::Context as _;

use crate::postgres::binaries::Binaries;
use crate::postgres::owner::Owner;

/// Values of settings, as a server on the data directory would have them.
#[derive(Debug)]
pub(super) struct Effective {
    values: BTreeMap<String, String>,
}

impl Effective {
    /// Asks for the settings `names` of the configuration in `data`.
    pub(super) fn ask(binaries: &Binaries, owner: &Owner, data: &Path, names: &[&str]) -> anyhow::Result<Self> {
        let postgres = binaries.require("postgres")?;
        let ask = |name: &&str| -> anyhow::Result<Child> {
            let mut command = owner.command(&postgres)?;
            command.arg("-D").arg(data).arg("-C").arg(name);
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
            command.spawn().context("cannot run postgres")
        };
        // Every one that was started is waited for, whatever another came to.
        let asked: Vec<_> = names.iter().map(ask).collect();
        let answers: Vec<_> = asked.into_iter().map(|child| answer(child?, data)).collect();
        let values = names.iter().zip(answers).map(|(name, answer)| Ok(((*name).to_owned(), answer?)));
        Ok(Self { values: values.collect::<anyhow::Result<_>>()? })
    }

    /// One that was asked for.
    pub(super) fn of(&self, name: &str) -> anyhow::Result<String> {
        self.values.get(name).cloned().with_context(|| format!("nobody has asked PostgreSQL for {name}"))
    }
}

fn answer(child: Child, data: &Path) -> anyhow::Result<String> {
    let output = child.wait_with_output().context("cannot run postgres")?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        anyhow::bail!("PostgreSQL refuses the configuration in {}: {}", data.display(), words.trim());
    }
    let text = String::from_utf8(output.stdout).context("the value of a setting is not UTF-8")?;
    Ok(text.strip_suffix('\n').unwrap_or(&text).to_owned())
}
