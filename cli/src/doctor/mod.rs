//! The verb `doctor`: what this machine lacks, with the command that cures it, and each setting with its source.
//!
//! Looking and judging are apart: [`survey`] reads the machine into a [`Machine`], [`judge`] is pure, so every verdict
//! has a test that needs no such machine. Exit code 1 says that something is missing which a restore cannot do
//! without; advice alone ends with 0.

mod judge;
mod survey;

use std::fmt::Write as _;

use serde_json::json;

use crate::context::Context;
use crate::exit::Exit;
use crate::options::{ClusterOption, JsonOption, RepositoryOption};
use crate::settings::{KEYS, Source};

use judge::{Finding, Verdict, judge};
pub(crate) use survey::fuse_is_missing;

/// Options of the verb.
#[derive(clap::Args, Debug)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) repository: RepositoryOption,
    #[command(flatten)]
    pub(crate) cluster: ClusterOption,
    #[command(flatten)]
    pub(crate) output: JsonOption,
}

pub(crate) fn run(arguments: &Arguments, context: &Context) -> anyhow::Result<Exit> {
    let settings = settings(arguments, context);
    let findings = judge(&survey::survey(arguments, context)?);
    let object = json!({
        "findings": findings,
        "settings": settings.iter().map(Setting::object).collect::<Vec<_>>(),
    });
    context.output.result(&text(&findings, &settings), &object);
    let missing = findings.iter().any(|finding| finding.verdict == Verdict::Missing);
    Ok(if missing { Exit::Failed } else { Exit::Done })
}

/// A setting as it is in force.
struct Setting {
    key: &'static str,
    meaning: &'static str,
    value: Option<String>,
    source: String,
}

impl Setting {
    fn object(&self) -> serde_json::Value {
        json!({"key": self.key, "value": self.value, "source": self.source})
    }
}

fn settings(arguments: &Arguments, context: &Context) -> Vec<Setting> {
    let flag = |key: &str| match key {
        "repo" => arguments.repository.repo.clone().map(Into::into),
        "cluster" => arguments.cluster.cluster.as_ref().map(|name| name.as_str().into()),
        _ => None,
    };
    let default = |key: &str| match key {
        "state" => context.state_path().ok().map(|path| path.display().to_string()),
        "memory" => context.memory_bytes().ok().map(crate::human::bytes),
        "workers" => context.workers().ok().map(|workers| workers.to_string()),
        _ => None,
    };
    let setting = |&(key, meaning): &(&'static str, &'static str)| {
        let (value, source) = match context.settings.get(key, flag(key)) {
            Some((value, source)) => (Some(value.to_string_lossy().into_owned()), source),
            None => (default(key), Source::Default),
        };
        Setting { key, meaning, value, source: source.to_string() }
    };
    KEYS.iter().map(setting).collect()
}

fn text(findings: &[Finding], settings: &[Setting]) -> String {
    let mut text = String::new();
    // Writing into a String cannot fail.
    for Finding { verdict, subject, detail, cure } in findings {
        let _ = writeln!(text, "{:<8} {subject:<18} {detail}", verdict.name());
        if let Some(cure) = cure {
            let _ = writeln!(text, "{:<8} {:<18} cure: {cure}", "", "");
        }
    }
    text.push('\n');
    for Setting { key, meaning, value, source } in settings {
        let value = value.as_deref().unwrap_or("not set");
        let _ = writeln!(text, "{key:<10} {value:<34} {source:<18} {meaning}");
    }
    text
}
