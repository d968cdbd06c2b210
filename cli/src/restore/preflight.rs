//! The judgement over what was seen: a plan, or every reason against it at once.
//!
//! Pure: [`super::survey`] has looked, nothing is touched here.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use engine::format::backup::BackupInfo;
use engine::units::{BackupLabel, ClusterName};
use serde::Serialize;

use super::moment;
use super::plan::{Before, Place, Plan, Source, TablespacePlan, User};
use super::staging;
use super::survey::{Facts, Found, What};
use super::target::{Action, Goal, Target, TimelineChoice};
use crate::human;

/// What the user asked for.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) repository: PathBuf,
    pub(crate) cluster: ClusterName,
    pub(crate) backup: Option<BackupLabel>,
    pub(crate) data: PathBuf,
    pub(crate) goal: Goal,
    pub(crate) timeline: TimelineChoice,
    pub(crate) exclusive: bool,
    pub(crate) action: Action,
    pub(crate) port: Option<u16>,
    /// By name or OID, in the order given.
    pub(crate) tablespaces: Vec<(String, PathBuf)>,
    pub(crate) source: Source,
    pub(crate) adopt: bool,
    pub(crate) no_start: bool,
    pub(crate) owner: Option<String>,
    pub(crate) programs: Option<PathBuf>,
    pub(crate) mount_directory: Option<PathBuf>,
    /// Our own binary.
    pub(crate) program: PathBuf,
}

impl Request {
    /// Where each tablespace of a backup goes, by OID: where the user says, else where it was.
    pub(crate) fn tablespace_directories(&self, info: &BackupInfo) -> Vec<(u32, PathBuf)> {
        let chosen = |tablespace: &engine::format::backup::Tablespace| {
            let of = |name: &str| *name == tablespace.name || name == tablespace.oid.to_string();
            let chosen = self.tablespaces.iter().find(|(name, _)| of(name)).map(|(_, directory)| directory.clone());
            (tablespace.oid, chosen.unwrap_or_else(|| PathBuf::from(&tablespace.location)))
        };
        info.tablespaces.iter().map(chosen).collect()
    }
}

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

/// What WAL that PostgreSQL keeps and recycles needs beside the staging.
const WAL_KEPT_SEGMENTS: u64 = 8;
/// Directories, journals and extents that no file's size tells.
const OVERHEAD_BYTES: u64 = 16 << 20;

/// Judges everything.
pub(crate) fn judge(request: &Request, facts: &Facts) -> Judgement {
    let mut judge = Judge { request, facts, problems: Vec::new(), warnings: Vec::new() };
    judge.users();
    judge.target();
    judge.server();
    judge.places();
    judge.tablespaces();
    judge.room();
    judge.wal();
    judge.way();
    let Judge { problems, warnings, .. } = judge;
    let plan = if problems.is_empty() { plan(request, facts) } else { None };
    Judgement { plan, problems, warnings }
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
            Err(refusal) => self.refuse(refusal.clone(), "name the instance's user with --os-user"),
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

    fn target(&mut self) {
        if let Err(problem) = &self.facts.choice {
            self.refuse(problem.what.clone(), problem.hint.clone());
        }
        if let Goal::Time(moment) = &self.request.goal
            && *moment > self.facts.now
        {
            self.refuse(
                format!(
                    "time {} is in the future: it is {} now",
                    moment::for_people(*moment),
                    moment::for_people(whole_second(self.facts.now))
                ),
                "leave --target-time out to recover to the end of the WAL",
            );
        }
        let acts = self.request.action != Action::Promote;
        if acts && self.request.goal == Goal::Latest && !self.request.no_start {
            self.refuse(
                format!("PostgreSQL ignores --action {} without a recovery target", self.request.action.name()),
                "name a target, such as --target-time, or leave --action out",
            );
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

    fn places(&mut self) {
        let facts = self.facts;
        for (index, (asked, found)) in facts.places.iter().enumerate() {
            let (role, cure) = if index == 0 {
                ("data directory", "name another with --to, or empty it")
            } else {
                ("tablespace directory", "name another with --tablespace NAME=DIR")
            };
            let path = asked.display();
            match &found.what {
                What::Absent | What::Empty => self.access(role, found),
                What::Ours(id) => self.refuse(
                    format!("{role} {path} belongs to restore {id}, which is not finished"),
                    format!("`pghydrant retry {id}` goes on with it, `pghydrant cancel {id}` gives it up"),
                ),
                What::Cluster(Some(pid)) => {
                    self.refuse(format!("a PostgreSQL server (process {pid}) runs in {role} {path}"), cure);
                }
                What::Cluster(None) => self.refuse(format!("{role} {path} holds a PostgreSQL cluster"), cure),
                What::Occupied(example) => {
                    self.refuse(format!("{role} {path} is not empty: it holds {example:?}"), cure);
                }
                What::NoDirectory => self.refuse(format!("{path} is not a directory"), cure),
                What::Unknown(reason) => self.refuse(format!("{role}: {reason}"), cure),
            }
        }
        self.overlaps();
    }

    fn access(&mut self, role: &str, found: &Found) {
        let (facts, nearest) = (self.facts, found.nearest.display());
        let Ok(owner) = &facts.owner else { return };
        if let Err(cause) = &found.writable {
            let hint =
                if facts.we_are_root { "mount it for writing" } else { "run it as root, or give yourself access" };
            self.refuse(
                format!("{role} {}: {} cannot write in {nearest}: {cause}", found.path.display(), facts.our_name),
                hint,
            );
        } else if !found.reachable {
            self.refuse(
                format!("{role} {}: {} cannot get through the directories above it", found.path.display(), owner.name),
                format!("give {} the right to search {nearest}", owner.name),
            );
        } else if found.what == What::Empty && !facts.we_are_root && found.owner_uid != owner.uid {
            self.refuse(
                format!("{role} {} belongs to another user", found.path.display()),
                format!(
                    "PostgreSQL starts only in a directory of its own user: chown {} {}",
                    owner.name,
                    found.path.display()
                ),
            );
        }
    }

    /// One directory for two roles, or one within the other.
    fn overlaps(&mut self) {
        let facts = self.facts;
        let repository =
            std::fs::canonicalize(&self.request.repository).unwrap_or_else(|_| self.request.repository.clone());
        let mut all: Vec<(&Path, &str)> = vec![(&repository, "the repository")];
        for (index, (_, found)) in facts.places.iter().enumerate() {
            let role = if index == 0 { "the data directory" } else { "a tablespace" };
            for (other, other_role) in &all {
                let hint = "give each a directory of its own";
                if found.path == *other {
                    self.problems.push(Problem::new(
                        format!("{} would hold {other_role} and {role}", found.path.display()),
                        hint,
                    ));
                } else if found.path.starts_with(other) {
                    self.problems.push(Problem::new(
                        format!("{} ({role}) lies within {other_role}, {}", found.path.display(), other.display()),
                        hint,
                    ));
                } else if other.starts_with(&found.path) {
                    self.problems.push(Problem::new(
                        format!("{other_role}, {}, lies within {} ({role})", other.display(), found.path.display()),
                        hint,
                    ));
                }
            }
            all.push((&found.path, role));
        }
    }

    fn tablespaces(&mut self) {
        let Some(info) = self.backup() else { return };
        let known: Vec<String> = info.tablespaces.iter().map(|tablespace| tablespace.name.clone()).collect();
        let oids: Vec<String> = info.tablespaces.iter().map(|tablespace| tablespace.oid.to_string()).collect();
        let mut seen: Vec<&String> = Vec::new();
        for (name, _) in &self.request.tablespaces {
            if !known.contains(name) && !oids.contains(name) {
                let hint = if known.is_empty() {
                    "the backup has none".to_owned()
                } else {
                    format!("the backup has {}", known.join(", "))
                };
                self.refuse(format!("the backup has no tablespace \"{name}\""), hint);
            } else if seen.contains(&name) {
                self.refuse(format!("tablespace \"{name}\" is named twice"), "name each once");
            }
            seen.push(name);
        }
    }

    fn room(&mut self) {
        let Some(info) = self.backup() else { return };
        let facts = self.facts;
        let segment_bytes = info.server.wal_segment_bytes;
        let window = staging::WINDOW_SEGMENTS + WAL_KEPT_SEGMENTS;
        let backup_wal = info.wal.stop.0.saturating_sub(info.wal.start.0);
        let wal_bytes = if self.request.no_start { backup_wal + 2 * segment_bytes } else { window * segment_bytes };
        let oids = std::iter::once(None).chain(info.tablespaces.iter().map(|tablespace| Some(tablespace.oid)));
        let mut needs: BTreeMap<u64, (u64, u64, u64, u64, bool, &Path)> = BTreeMap::new();
        for ((_, found), oid) in facts.places.iter().zip(oids) {
            let file_system = match &found.file_system {
                Ok(file_system) => file_system,
                Err(refusal) => {
                    self.refuse(refusal.clone(), "the free space cannot be told");
                    continue;
                }
            };
            let size = facts.contents.sizes.get(&oid).copied().unwrap_or_default();
            let extra = if oid.is_none() { wal_bytes + OVERHEAD_BYTES } else { 0 };
            let need = needs.entry(file_system.device).or_insert((
                0,
                0,
                file_system.free_bytes,
                file_system.free_inodes,
                file_system.counts_inodes,
                &found.nearest,
            ));
            need.0 += size.bytes + extra;
            need.1 += size.inodes;
        }
        for (bytes, inodes, free_bytes, free_inodes, counts_inodes, path) in needs.into_values() {
            let path = path.display();
            if bytes > free_bytes {
                self.refuse(
                    format!(
                        "the restore needs {} on the file system of {path}, {} are free",
                        human::bytes(bytes),
                        human::bytes(free_bytes)
                    ),
                    format!("free {} more, or choose another place", human::bytes(bytes - free_bytes)),
                );
            }
            if counts_inodes && inodes > free_inodes {
                self.refuse(
                    format!(
                        "the restore needs {inodes} files on the file system of {path}, {free_inodes} inodes are free"
                    ),
                    "remove files there, or choose another place",
                );
            }
        }
    }

    fn wal(&mut self) {
        let Some(info) = self.backup() else { return };
        let facts = match &self.facts.wal {
            Ok(facts) => facts,
            Err(refusal) => {
                return self
                    .refuse(format!("the WAL cannot be looked at: {refusal}"), "mend that, or choose another target");
            }
        };
        let segment_bytes = info.server.wal_segment_bytes;
        let goal = &self.request.goal;
        let end = facts.end.map_or_else(|| "nothing".to_owned(), |end| end.to_string());
        if let (Goal::Lsn(lsn), Some(archive_end)) = (goal, facts.end)
            && *lsn > archive_end
        {
            return self.refuse(
                format!("LSN {lsn} lies after the end of the archived WAL ({archive_end})"),
                "archive the rest of the WAL first, or choose an earlier target",
            );
        }
        if let Some(first) = facts.missing.first() {
            return self.refuse(
                format!(
                    "WAL segment {} is not in the archive, and {} in all are missing between the backup's start ({}) and the target",
                    first.file_name(segment_bytes),
                    facts.missing.len(),
                    info.wal.start
                ),
                "archive them with `pghydrant wal push`, or choose another backup or an earlier target",
            );
        }
        let gap = facts.gaps.first().map(|segment| segment.file_name(segment_bytes));
        match (goal, gap) {
            (Goal::Latest, Some(gap)) => self.refuse(
                format!("WAL segment {gap} is missing before the end of the archive ({end})"),
                "archive it with `pghydrant wal push`, or choose a target before it",
            ),
            (Goal::Time(moment), gap) if facts.searched => {
                let reached = facts
                    .last_transaction
                    .is_some_and(|last| last > *moment || (self.request.exclusive && last == *moment));
                if !reached && *moment <= self.facts.now {
                    let last = facts.last_transaction.map_or_else(|| "none".to_owned(), moment::for_people);
                    let place = gap.map_or_else(
                        || "in the archived WAL".to_owned(),
                        |gap| format!("before the missing WAL segment {gap}"),
                    );
                    self.refuse(
                        format!(
                            "time {} is not before the last transaction {place} ({last})",
                            moment::for_people(*moment)
                        ),
                        "leave --target-time out to recover to the end of the WAL, or archive the rest of it first",
                    );
                }
            }
            (Goal::Xid(_) | Goal::Name(_), gap) if facts.searched && facts.place.is_none() => {
                let place =
                    gap.map_or_else(|| format!("up to {end}"), |gap| format!("before the missing segment {gap}"));
                self.refuse(
                    format!("{goal} is not in the WAL after the backup's end ({}), {place}", info.wal.stop),
                    "check it, choose an earlier backup with --backup, or archive the rest of the WAL first",
                );
            }
            _ => {}
        }
    }

    fn way(&mut self) {
        if let (Source::Mount, Err(refusal)) = (self.request.source, &self.facts.fuse) {
            self.refuse(
                format!("FUSE cannot be used: {}", refusal.message),
                format!("{}; or restore without it: --source blocks", refusal.cure),
            );
        }
        let facts = self.facts;
        for (directive, path) in &facts.missing_includes {
            self.refuse(
                format!(
                    "the backup's postgresql.conf has {directive} '{path}', which is neither in the backup nor here"
                ),
                "PostgreSQL does not start without it: bring it here, it may be empty",
            );
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

fn whole_second(moment: jiff::Timestamp) -> jiff::Timestamp {
    jiff::Timestamp::from_second(moment.as_second()).unwrap_or(moment)
}

fn plan(request: &Request, facts: &Facts) -> Option<Plan> {
    let (info, path) = facts.choice.as_ref().ok()?;
    let owner = facts.owner.as_ref().ok()?;
    let place = |found: &Found| Place {
        path: found.path.clone(),
        before: if found.what == What::Empty { Before::Empty } else { Before::Absent },
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
        source: request.source,
        mount_directory: request.mount_directory.clone(),
        adopt: request.adopt,
        no_start: request.no_start,
        gap_behind: facts.wal.as_ref().is_ok_and(|wal| !wal.gaps.is_empty()),
        bytes: info.totals.bytes,
        files: info.totals.files,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use engine::units::{Lsn, SessionId, Timeline};
    use engine::wal::history::History;
    use engine::wal::name::SegmentName;
    use jiff::Timestamp;

    use super::super::survey::{Contents, FileSystem, PortFacts, Size, WalFacts};
    use super::*;
    use crate::postgres::owner::Owner;

    const NOW: i64 = 1_800_000_000;

    fn request() -> Request {
        Request {
            repository: "/repo".into(),
            cluster: "main".parse().unwrap(),
            backup: None,
            data: "/srv/new".into(),
            goal: Goal::Latest,
            timeline: TimelineChoice::Latest,
            exclusive: false,
            action: Action::Promote,
            port: None,
            tablespaces: vec![("fast".to_owned(), "/fast/new".into())],
            source: Source::Mount,
            adopt: false,
            no_start: false,
            owner: None,
            programs: None,
            mount_directory: None,
            program: "/usr/bin/pghydrant".into(),
        }
    }

    fn found(path: &str) -> (PathBuf, Found) {
        let nearest = Path::new(path).parent().unwrap_or(Path::new("/")).to_owned();
        let file_system = FileSystem { device: 1, free_bytes: 10 << 30, free_inodes: 1000, counts_inodes: true };
        let found = Found {
            path: path.into(),
            what: What::Absent,
            missing_parents: Vec::new(),
            nearest,
            writable: Ok(()),
            reachable: true,
            owner_uid: 101,
            file_system: Ok(file_system),
        };
        (path.into(), found)
    }

    /// Everything as it should be, but for the programs, which a machine without PostgreSQL has not.
    fn facts() -> Facts {
        let mut info = super::super::choose::tests::backup("20261122T081500Z-F", 1, 0x300_0100, NOW - 1000);
        info.wal.start = Lsn(0x200_0028);
        info.tablespaces = vec![engine::format::backup::Tablespace {
            oid: 16400,
            name: "fast".to_owned(),
            location: "/fast/old".to_owned(),
            bytes: 0,
        }];
        let sizes = [(None, Size { bytes: 1 << 30, inodes: 100 }), (Some(16400), Size { bytes: 1 << 30, inodes: 10 })];
        Facts {
            now: Timestamp::from_second(NOW).unwrap(),
            we_are_root: true,
            our_name: "root".to_owned(),
            owner: Ok(Owner { name: "postgres".to_owned(), uid: 101, gid: 104, home: "/".into() }),
            binaries: Err("no programs".to_owned()),
            choice: Ok((info, History::root(Timeline(1)))),
            contents: Contents { sizes: sizes.into(), conf: Some(Vec::new()), auto: None },
            wal: Ok(WalFacts { end: Some(Lsn(0x900_0000)), ..WalFacts::default() }),
            places: vec![found("/srv/new"), found("/fast/new")],
            port: PortFacts { number: 5432, ..PortFacts::default() },
            fuse: Ok(()),
            missing_includes: Vec::new(),
            owner_reads: Ok(()),
        }
    }

    fn problems(request: &Request, facts: &Facts) -> Vec<String> {
        let judged = judge(request, facts);
        assert!(judged.plan.is_none(), "without programs there is no plan");
        judged.problems.into_iter().map(|problem| problem.what).filter(|what| what != "no programs").collect()
    }

    #[test]
    fn a_good_request_has_no_problem() {
        assert_eq!(problems(&request(), &facts()), [""; 0]);
    }

    #[test]
    fn all_problems_are_told_at_once() {
        let mut facts = facts();
        facts.places[0].1.what = What::Occupied("notes.txt".to_owned());
        facts.places[1].1.writable = Err("permission denied".to_owned());
        facts.port.in_use = Some("127.0.0.1:5432".to_owned());
        facts.fuse =
            Err(crate::mount::Reason { message: "/dev/fuse does not exist".to_owned(), cure: "modprobe".to_owned() });
        let request = Request { goal: Goal::Time(Timestamp::from_second(NOW + 60).unwrap()), ..request() };
        let told = problems(&request, &facts).join("\n");
        for part in
            ["in the future", "notes.txt", "permission denied", "port 5432 is in use", "/dev/fuse does not exist"]
        {
            assert!(told.contains(part), "{part} in\n{told}");
        }
    }

    #[test]
    fn a_directory_of_a_session_names_it() {
        let mut facts = facts();
        let id: SessionId = "20261122T081500Z".parse().unwrap();
        facts.places[0].1.what = What::Ours(id);
        let judged = judge(&request(), &facts);
        let problem = judged.problems.iter().find(|problem| problem.what.contains("not finished")).unwrap();
        assert!(problem.hint.contains("pghydrant retry 20261122T081500Z"));
    }

    #[test]
    fn a_running_server_is_named_by_its_process() {
        let mut facts = facts();
        facts.places[0].1.what = What::Cluster(Some(4711));
        assert!(problems(&request(), &facts)[0].contains("process 4711"));
    }

    #[test]
    fn directories_for_two_roles_are_refused() {
        let mut facts = facts();
        facts.places[1] = found("/srv/new/fast");
        assert!(problems(&request(), &facts)[0].contains("lies within the data directory"));
        facts.places[1] = found("/srv/new");
        assert!(problems(&request(), &facts)[0].contains("would hold the data directory and a tablespace"));
        facts.places[1] = found("/repo/fast");
        assert!(problems(&request(), &facts)[0].contains("lies within the repository"));
        facts.places[0] = found("/");
        assert!(problems(&request(), &facts)[0].contains("the repository, /repo, lies within / (the data directory)"));
    }

    #[test]
    fn room_is_counted_by_file_system() {
        let mut facts = facts();
        let small = |free_bytes, free_inodes| FileSystem { device: 1, free_bytes, free_inodes, counts_inodes: true };
        for place in &mut facts.places {
            place.1.file_system = Ok(small(2 << 30, 1000));
        }
        assert!(problems(&request(), &facts)[0].contains("2.4 GiB on the file system of /srv, 2.0 GiB are free"));
        facts.places[1].1.file_system = Ok(FileSystem { device: 2, ..small(2 << 30, 9) });
        assert!(problems(&request(), &facts)[0].contains("10 files on the file system of /fast, 9 inodes are free"));
        facts.places[1].1.file_system = Ok(FileSystem { device: 2, counts_inodes: false, ..small(2 << 30, 0) });
        assert_eq!(problems(&request(), &facts), [""; 0]);
    }

    #[test]
    fn tablespaces_are_known_by_name_and_by_oid() {
        let with = |names: &[&str]| Request {
            tablespaces: names.iter().map(|name| ((*name).to_owned(), PathBuf::from("/fast/new"))).collect(),
            ..request()
        };
        assert_eq!(problems(&with(&["16400"]), &facts()), [""; 0]);
        assert!(problems(&with(&["slow"]), &facts())[0].contains("no tablespace \"slow\""));
        assert!(problems(&with(&["fast", "fast"]), &facts())[0].contains("named twice"));
    }

    #[test]
    fn wal_must_reach_the_target() {
        let mut facts = facts();
        let segment = |number| SegmentName { timeline: Timeline(1), number };
        let wal = |facts: &mut Facts, wal: WalFacts| facts.wal = Ok(WalFacts { end: Some(Lsn(0x900_0000)), ..wal });
        wal(&mut facts, WalFacts { missing: vec![segment(3)], ..WalFacts::default() });
        assert!(problems(&request(), &facts)[0].contains("000000010000000000000003 is not in the archive"));
        wal(&mut facts, WalFacts { gaps: vec![segment(5)], ..WalFacts::default() });
        assert!(problems(&request(), &facts)[0].contains("missing before the end of the archive"));
        let at = |goal| Request { goal, ..request() };
        assert!(problems(&at(Goal::Lsn(Lsn(0x900_0001))), &facts)[0].contains("after the end of the archived WAL"));

        let moment = Timestamp::from_second(NOW - 100).unwrap();
        let searched = WalFacts { searched: true, last_transaction: Some(moment), ..WalFacts::default() };
        wal(&mut facts, searched);
        assert!(problems(&at(Goal::Time(moment)), &facts)[0].contains("is not before the last transaction"));
        assert_eq!(problems(&Request { exclusive: true, ..at(Goal::Time(moment)) }, &facts), [""; 0]);
        assert!(problems(&at(Goal::Xid(800)), &facts)[0].contains("transaction 800 is not in the WAL"));
    }

    #[test]
    fn a_user_restores_for_itself_alone() {
        let mut facts = facts();
        facts.we_are_root = false;
        facts.our_name = "alice".to_owned();
        assert!(problems(&request(), &facts)[0].contains("alice cannot restore on behalf of postgres"));
        facts.owner = Ok(Owner { name: "root".to_owned(), uid: 0, gid: 0, home: "/".into() });
        assert!(problems(&request(), &facts)[0].contains("does not run as root"));
    }
}
