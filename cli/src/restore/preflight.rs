//! The judgement over what was seen: a plan, or every reason against it at once.
//!
//! Pure: [`super::survey`] has looked, nothing is touched here. The rules on the directories are in [`places`], those on
//! the target and the WAL that leads to it in [`goal`]; the rest is short and stands here.

mod existing;
mod goal;
mod handover;
mod places;
mod request;

use std::fmt;

use engine::format::backup::BackupInfo;
use serde::Serialize;

use super::conf;
use super::delta::{Delta, wal::LocalFile};
use super::plan::{Before, Place, Plan, Source, TablespacePlan, User};
use super::survey::{Aim, Existing, Facts, Found, What};
use super::target::Target;
use super::way::{self, Io};
use crate::machine::{self, Finding, Weight};
pub(crate) use goal::TargetJudgement;
pub(crate) use request::Request;

/// A reason not to begin, and what cures it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Problem {
    #[serde(rename = "message")]
    pub(crate) what: String,
    pub(crate) hint: String,
}

impl Problem {
    pub(crate) fn new(what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { what: what.into(), hint: hint.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\nhint: {}", self.what, self.hint)
    }
}

/// What the judgement came to.
#[derive(Debug, Default)]
pub(crate) struct Judgement {
    pub(crate) plan: Option<Plan>,
    pub(crate) problems: Vec<Problem>,
    /// Worth knowing, and no reason against it.
    pub(crate) warnings: Vec<String>,
}

/// Judges everything.
pub(crate) fn judge(request: &Request, facts: &Facts) -> Judgement {
    let mut judge = Judge { request, facts, problems: Vec::new(), warnings: Vec::new() };
    let goal = goal::judge(request, facts.now, &facts.choice, &facts.wal);
    judge.users();
    judge.problems.extend(goal.problems);
    judge.server();
    judge.machine();
    judge.places();
    judge.existing();
    judge.tablespaces();
    judge.room();
    judge.way();
    judge.handover();
    let Judge { problems, mut warnings, .. } = judge;
    warnings.extend(goal.warnings);
    let unproven = goal.unproven;
    let plan = if problems.is_empty() { plan(request, facts) } else { None };
    let plan = plan.map(|plan| Plan { unproven, ..plan });
    Judgement { plan, problems, warnings }
}

/// Judges the target alone, of a restore that moves on: everything else is decided.
pub(crate) fn judge_target(request: &Request, aim: &Aim) -> TargetJudgement {
    goal::judge(request, jiff::Timestamp::now(), &aim.choice, &aim.wal)
}

struct Judge<'a> {
    request: &'a Request,
    facts: &'a Facts,
    problems: Vec<Problem>,
    warnings: Vec<String>,
}

impl<'a> Judge<'a> {
    fn refuse(&mut self, what: impl Into<String>, hint: impl Into<String>) {
        let problem = Problem::new(what, hint);
        if !self.problems.contains(&problem) {
            self.problems.push(problem);
        }
    }

    fn backup(&self) -> Option<&'a BackupInfo> {
        self.facts.choice.as_ref().ok().map(|(info, _)| info)
    }

    fn users(&mut self) {
        let facts = self.facts;
        match &facts.owner {
            Err(Problem { what, hint }) => self.refuse(what, hint),
            Ok(owner) if owner.uid == 0 => {
                self.refuse("PostgreSQL does not run as root", "name the instance's user with --os-user");
            }
            Ok(owner) if !facts.we_are_root && owner.name != facts.our_name => {
                self.refuse(
                    format!("{} cannot restore on behalf of {}", facts.our_name, owner.name),
                    format!("run it as root or as {}", owner.name),
                );
            }
            Ok(_) => {
                if let Err(refusal) = &facts.owner_reads {
                    self.refuse(
                        refusal.clone(),
                        "give that user access, or install pghydrant where every user can run it",
                    );
                }
            }
        }
    }

    fn server(&mut self) {
        let Some(info) = self.backup() else { return };
        let (major, minor) = (info.server.version_num / 10_000, info.server.version_num % 10_000);
        match &self.facts.binaries {
            Err(refusal) => {
                let hint = format!("install PostgreSQL {major}, or name its directory with --pg-bin");
                self.refuse(refusal.clone(), hint);
            }
            Ok(binaries) => {
                let found = binaries.version();
                if found.major() != major {
                    self.refuse(
                        format!(
                            "the backup is of PostgreSQL {major}, {} has PostgreSQL {}",
                            binaries.directory().display(),
                            found.major()
                        ),
                        format!("install PostgreSQL {major}, or name its directory with --pg-bin"),
                    );
                } else if found.0 % 10_000 < minor {
                    self.warnings
                        .push(format!("the backup is of PostgreSQL {major}.{minor}, this machine has {found}"));
                }
            }
        }
        let port = &self.facts.port;
        if let (Some(user), false) = (&port.in_use, self.request.no_start) {
            let free = port.suggestion.map_or_else(
                || "choose another with --port".to_owned(),
                |free| format!("choose another: --port {free}"),
            );
            self.refuse(format!("port {} is in use ({user})", port.number), free);
        }
    }

    /// What keeps a server from starting stops a restore that starts one.
    fn machine(&mut self) {
        if self.facts.choice.is_err() {
            return;
        }
        for Finding { weight, what, cure } in machine::judge(&self.facts.needs, &self.facts.machine) {
            match weight {
                Weight::Unreadable => self.refuse(what, cure),
                Weight::Stops if !self.request.no_start => self.refuse(what, cure),
                Weight::Stops | Weight::Warns => self.warnings.push(format!("{what} (cure: {cure})")),
            }
        }
        if self.request.no_start {
            self.hot_standby();
        }
    }

    /// A restore raises what a hot standby needs by itself; who starts the copy later must do so first.
    fn hot_standby(&mut self) {
        let contents = &self.facts.contents;
        let Some(control) = &contents.control else { return };
        for (name, needed) in control.hot_standby_needs() {
            let files = [&contents.auto, &contents.conf].into_iter().flatten();
            let given = files.flat_map(|text| conf::value_of(text, name)).next().and_then(|value| value.parse().ok());
            if let Some(given) = given.filter(|given: &u32| *given < needed) {
                self.warnings.push(format!(
                    "{name} is {given} in the backup's configuration, and its first start needs {needed} (cure: raise it in postgresql.conf before)"
                ));
            }
        }
    }

    fn way(&mut self) {
        let (request, facts) = (self.request, self.facts);
        match way::choose(request.io, request.source, &facts.way) {
            // Without a backup there is nothing to share, and that is told already.
            Err(_) if facts.choice.is_err() => {}
            Err(problem) => self.problems.push(problem),
            Ok((source, io)) => {
                if let (Source::Mount, Err(refusal)) = (source, &facts.fuse) {
                    self.refuse(
                        format!("FUSE cannot be used: {}", refusal.message),
                        format!("{}; or restore without it: --source blocks", refusal.cure),
                    );
                }
                if let (None, true, Err(refusal)) = (request.source, facts.way.only_blocks, &facts.fuse) {
                    self.warnings.push(format!(
                        "FUSE cannot be used ({}): blocks are copied from the mount server directly",
                        refusal.message
                    ));
                }
                self.warnings.extend(way::warnings(request.io, request.trust_repository, io, &facts.way));
            }
        }
        for (directive, path) in &facts.missing_includes {
            self.refuse(
                format!("the backup's configuration has {directive} '{path}', which is neither in the backup nor here"),
                "PostgreSQL does not start without it: bring it here, it may be empty",
            );
        }
        for path in &facts.missing_lists {
            self.warnings.push(format!(
                "pg_hba.conf or pg_ident.conf names \"{path}\", which is not in the backup: the server recovers, and then does not start before the file is in its data directory"
            ));
        }
        let outside = self.backup().map(|info| info.server.outside_files.clone()).unwrap_or_default();
        if facts.choice.is_ok() && facts.contents.conf.is_none() {
            let where_ = if outside.is_empty() { "elsewhere".to_owned() } else { outside.join(", ") };
            self.warnings.push(format!(
                "the backup has no postgresql.conf (the original's lies in {where_}): a minimal one is written, with the recorded settings that recovery needs"
            ));
        }
    }
}

fn plan(request: &Request, facts: &Facts) -> Option<Plan> {
    let (info, path) = facts.choice.as_ref().ok()?;
    let owner = facts.owner.as_ref().ok()?;
    let (source, io) = way::choose(request.io, request.source, &facts.way).ok()?;
    let place = |found: &Found| Place {
        path: found.path.clone(),
        before: match found.what {
            What::Empty => Before::Empty,
            What::Cluster(_) | What::Occupied(_) => Before::Existing,
            _ => Before::Absent,
        },
        missing_parents: found.missing_parents.clone(),
    };
    let mut found = facts.places.iter().map(|(_, found)| found);
    let data = place(found.next()?);
    let tablespaces = info
        .tablespaces
        .iter()
        .zip(found)
        .map(|(tablespace, found)| TablespacePlan {
            oid: tablespace.oid,
            name: tablespace.name.clone(),
            place: place(found),
        })
        .collect();
    Some(Plan {
        repository: request.repository.clone(),
        cluster: request.cluster.clone(),
        backup: info.label.clone(),
        target: Target {
            goal: request.goal.clone(),
            exclusive: request.exclusive,
            timeline: path.timeline,
            action: request.action,
        },
        data,
        tablespaces,
        port: request.port,
        owner: User { name: owner.name.clone(), uid: owner.uid, gid: owner.gid },
        programs: facts.binaries.as_ref().ok()?.directory().to_owned(),
        program: request.program.clone(),
        source,
        io: Some(io),
        trust_repository: request.trust_repository && io == Io::Reflink,
        mount_directory: request.mount_directory.clone(),
        adopt: request.adopt,
        no_start: request.no_start,
        check: request.check,
        handover: facts.handover.plan(request),
        unproven: None,
        gap_behind: facts.wal.as_ref().is_ok_and(|wal| !wal.gaps.is_empty()),
        bytes: info.totals.bytes,
        files: info.totals.files,
        delta: facts.existing.as_ref().map(delta),
    })
}

fn delta(existing: &Existing) -> Delta {
    let (archived, kept): (Vec<_>, Vec<_>) = existing.unarchived.iter().partition(|file| file.for_the_archive);
    let names = |files: Vec<&LocalFile>| files.into_iter().map(|file| file.name.clone()).collect();
    Delta {
        wal: existing.wal.clone(),
        abandoned: existing.abandoned.clone(),
        removed: existing.removed(),
        unarchived: names(archived),
        unfinished: names(kept),
    }
}

#[cfg(test)]
pub(super) mod tests;
