//! Each rule with a request that breaks it, beside one that breaks none.

#![allow(clippy::unwrap_used)]
use engine::units::{Lsn, SessionId, Timeline};
use engine::wal::history::{Ancestor, History};
use engine::wal::name::SegmentName;
use jiff::Timestamp;

use std::path::{Path, PathBuf};

use super::super::survey::{Contents, FileSystem, PortFacts, Size, Unbegun, WalFacts};
use super::super::target::{Action, Goal, TimelineChoice};
use super::*;
use crate::postgres::owner::Owner;

const NOW: i64 = 1_800_000_000;

fn request() -> Request {
    Request {
        repository: "/repo".into(),
        cluster: "main".parse().unwrap(),
        backup: None,
        data: "/srv/new".into(),
        delta: false,
        goal: Goal::Latest,
        timeline: TimelineChoice::Latest,
        exclusive: false,
        action: Action::Promote,
        port: None,
        tablespaces: vec![("fast".to_owned(), "/fast/new".into())],
        source: Some(Source::Mount),
        io: way::Wanted::Auto,
        trust_repository: false,
        adopt: false,
        no_start: false,
        check: None,
        handover: super::super::handover::Wanted::default(),
        owner: None,
        programs: None,
        mount_directory: None,
        program: "/usr/bin/pghydrant".into(),
    }
}

pub(in crate::restore) fn request_for(goal: Goal, exclusive: bool) -> Request {
    Request { goal, exclusive, ..request() }
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
        contents: Contents { sizes: sizes.into(), conf: Some(Vec::new()), ..Contents::default() },
        needs: machine::Needs::default(),
        machine: machine::Facts::default(),
        wal: Ok(WalFacts { end: Some(Lsn(0x900_0000)), ..WalFacts::default() }),
        places: vec![found("/srv/new"), found("/fast/new")],
        port: PortFacts { number: 5432, ..PortFacts::default() },
        fuse: Ok(()),
        way: way::WayFacts { uring: Ok(()), reflink: Err("another file system".to_owned()), only_blocks: false },
        missing_includes: Vec::new(),
        missing_lists: Vec::new(),
        handover: super::super::survey::HandoverFacts::default(),
        existing: None,
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
    for part in ["in the future", "notes.txt", "permission denied", "port 5432 is in use", "/dev/fuse does not exist"] {
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
fn a_name_that_a_shell_would_look_into_is_refused() {
    let mut facts = facts();
    for name in ["/srv/pg$new", "/srv/`id`", "/srv/a\"b", "/srv/a\\b", "/srv/a\nb"] {
        facts.places[0] = found(name);
        assert!(problems(&request(), &facts)[0].contains("pg_ctl cannot have"), "{name}");
    }
    facts.places[0] = found("/srv/it's 100% a,b");
    assert_eq!(problems(&request(), &facts), [""; 0]);
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
fn a_timeline_that_has_not_begun_in_the_archive_is_not_followed_to_its_end() {
    let mut facts = facts();
    let unbegun = Unbegun {
        first: SegmentName { timeline: Timeline(2), number: 3 },
        left: Ancestor { timeline: Timeline(1), left_at: Lsn(0x300_0100) },
        instead: Timeline(1),
    };
    let seen = WalFacts { end: Some(Lsn(0x300_0000)), unbegun: Some(unbegun), ..WalFacts::default() };
    let at = |goal| Request { goal, ..request() };
    let moment = Timestamp::from_second(NOW - 100).unwrap();
    facts.wal = Ok(seen.clone());
    let refused = judge(&request(), &facts).problems;
    assert!(
        refused[0].what.contains("left timeline 1 at 0/3000100") && refused[0].hint.contains("--target-timeline 1")
    );
    assert_eq!(problems(&at(Goal::Lsn(Lsn(0x2FF_0000))), &facts), [""; 0]);
    assert_eq!(problems(&at(Goal::Immediate), &facts), [""; 0]);
    // A time before a transaction that is known lies before the end.
    let last = Timestamp::from_second(NOW - 99).ok();
    facts.wal = Ok(WalFacts { searched: true, last_transaction: last, ..seen.clone() });
    assert_eq!(problems(&at(Goal::Time(moment)), &facts), [""; 0]);
    facts.wal = Ok(WalFacts { unsearchable: Some("no pg_waldump".to_owned()), archived: last, ..seen.clone() });
    assert!(problems(&at(Goal::Time(moment)), &facts)[0].contains("left timeline 1"));
    let missing = vec![SegmentName { timeline: Timeline(2), number: 3 }];
    facts.wal = Ok(WalFacts { missing, ..seen });
    let refused = judge(&at(Goal::Name("x".into())), &facts).problems;
    assert!(refused[0].hint.ends_with("; or follow --target-timeline 1"), "{}", refused[0].hint);
}

#[test]
fn a_proof_that_is_missing_is_a_warning_and_a_place_that_is_unknown_a_problem() {
    let mut facts = facts();
    let blind = |archived: i64, ended_by| WalFacts {
        end: Some(Lsn(0x900_0000)),
        unsearchable: Some("pg_waldump is missing from /x".to_owned()),
        archived: Timestamp::from_second(archived).ok(),
        ended_by,
        ..WalFacts::default()
    };
    let at = |goal| Request { goal, ..request() };
    let moment = at(Goal::Time(Timestamp::from_second(NOW - 100).unwrap()));
    facts.wal = Ok(blind(NOW - 100, None));
    assert_eq!(problems(&moment, &facts), [""; 0]);
    assert!(judge(&moment, &facts).warnings.iter().any(|told| told.starts_with("not proven: a transaction after")));
    assert!(problems(&at(Goal::Name("x".into())), &facts)[0].contains("restore point \"x\" cannot be looked for"));
    assert!(problems(&at(Goal::Xid(800)), &facts)[0].contains("transaction 800 cannot be looked for"));
    facts.wal = Ok(blind(NOW - 101, Some(Lsn(0x400_0000))));
    assert!(problems(&moment, &facts)[0].contains("lies after the archived WAL"));
    assert_eq!(problems(&at(Goal::Xid(800)), &facts), [""; 0]);
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

#[test]
fn a_place_to_hand_over_to_is_judged_with_everything_else() {
    let mut facts = facts();
    let (asked, mut occupied) = found("/etc/mine");
    occupied.what = What::Occupied("notes.txt".to_owned());
    facts.handover.configuration = Some((asked, occupied));
    facts.handover.unit =
        Some(super::super::survey::UnitFacts { path: "/srv/new/pg.target".into(), exists: true, writable: Ok(()) });
    facts.handover.no_check = Some("pg_amcheck is missing".to_owned());
    let all = Request { check: Some(super::super::check::Thoroughness::Full), no_start: true, ..request() };
    let told = problems(&all, &facts).join("\n");
    for part in [
        "/etc/mine is not empty",
        "pg.target cannot be a unit",
        "pg.target is there already",
        "lies in a directory that the restore fills",
        "--no-start starts none",
        "pg_amcheck is missing",
    ] {
        assert!(told.contains(part), "{part} in\n{told}");
    }
    let (asked, within) = found("/srv/new/etc");
    facts.handover = super::super::survey::HandoverFacts {
        configuration: Some((asked, within)),
        ..super::super::survey::HandoverFacts::default()
    };
    assert!(problems(&request(), &facts).join("\n").contains("lie within each other"));
}

/// A delta over a cluster that may be overwritten.
fn delta_facts() -> (Request, Facts) {
    let mut facts = facts();
    facts.places[0].1.what = What::Cluster(None);
    facts.places[1].1.what = What::Occupied("PG_15_202209061".to_owned());
    let identifier = facts.choice.as_ref().unwrap().0.server.system_identifier;
    facts.existing = Some(Existing {
        identifier: Some(Ok(identifier)),
        version: Some((facts.choice.as_ref().unwrap().0.server.version_num / 10_000).to_string()),
        tablespaces: [(16400, "/fast/new".into())].into(),
        ..Existing::default()
    });
    (Request { delta: true, ..request() }, facts)
}

#[test]
fn a_delta_overwrites_its_own_cluster_and_no_other() {
    let (request, mut facts) = delta_facts();
    assert_eq!(problems(&request, &facts), [""; 0]);
    let existing = facts.existing.as_mut().unwrap();
    existing.identifier = Some(Ok(engine::units::SystemIdentifier(2)));
    existing.version = Some("9.6".to_owned());
    existing.problems = vec![Problem::new("a server on another machine", "stop it")];
    let told = problems(&request, &facts).join("\n");
    for part in ["is another cluster", "of PostgreSQL 9.6", "on another machine"] {
        assert!(told.contains(part), "{part} in\n{told}");
    }
    // What is where its tablespace should be is not its own.
    let (request, mut facts) = delta_facts();
    facts.existing.as_mut().unwrap().tablespaces.clear();
    assert!(problems(&request, &facts)[0].contains("tablespace directory /fast/new is not empty"));
}

#[test]
fn a_delta_needs_room_for_what_is_not_there_and_a_wal_directory_of_its_own() {
    let (request, mut facts) = delta_facts();
    for (_, found) in &mut facts.places {
        found.file_system.as_mut().unwrap().free_bytes = 1 << 30;
    }
    assert!(problems(&request, &facts)[0].contains("are free"));
    let held = engine::hydration::existing::Held { bytes: 1 << 30, names: 100, ..Default::default() };
    let existing = facts.existing.as_mut().unwrap();
    existing.held = [(None, held.clone()), (Some(16400), held)].into();
    assert_eq!(problems(&request, &facts), [""; 0]);
    facts.existing.as_mut().unwrap().wal = Some("/srv/new/elsewhere".into());
    assert!(problems(&request, &facts)[0].contains("is not apart from it"));
}
