//! What a machine's state means for a restore, and the command that cures it. Pure.

use engine::io::{Means, Pages};
use serde::Serialize;

use super::survey::{Machine, Place};
use crate::human;
use crate::machine::{self, Weight};

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Verdict {
    /// As it should be.
    Ok,
    /// Works; would be faster or easier with the cure.
    Advice,
    /// A restore cannot do without.
    Missing,
}

impl Verdict {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Advice => "advice",
            Self::Missing => "missing",
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    pub(super) verdict: Verdict,
    pub(super) subject: &'static str,
    pub(super) detail: String,
    pub(super) cure: Option<String>,
}

fn ok(subject: &'static str, detail: impl Into<String>) -> Finding {
    Finding { verdict: Verdict::Ok, subject, detail: detail.into(), cure: None }
}

fn advice(subject: &'static str, detail: impl Into<String>, cure: impl Into<String>) -> Finding {
    Finding { verdict: Verdict::Advice, subject, detail: detail.into(), cure: Some(cure.into()) }
}

fn missing(subject: &'static str, detail: impl Into<String>, cure: impl Into<String>) -> Finding {
    Finding { verdict: Verdict::Missing, subject, detail: detail.into(), cure: Some(cure.into()) }
}

/// Everything that was looked at, in the order in which a restore needs it.
pub(super) fn judge(machine: &Machine) -> Vec<Finding> {
    let mut findings = postgresql(machine);
    findings.extend(repository(machine));
    findings.extend(text(machine));
    findings.extend(newest(machine));
    findings.push(io_uring(machine));
    findings.push(memlock(machine));
    findings.push(huge_pages(machine));
    findings.extend(fuse(machine));
    findings.push(place("sessions", &machine.state, "--state DIR"));
    findings.push(place("mounts", &machine.mount_directory, "mount_dir = \"DIR\" in pghydrant.toml"));
    findings
}

fn postgresql(machine: &Machine) -> Vec<Finding> {
    if machine.postgres.is_empty() {
        let cure = "apt-get install postgresql, or name the directory with --pg-bin or pg_bin";
        return vec![missing("PostgreSQL", "no server programs found", cure)];
    }
    let finding = |server: &super::survey::Server| {
        let mut found = format!("{} in {}", server.version, server.directory.display());
        if let Some(place) = &server.libraries {
            found.push_str(&format!(", libraries in {}", place.display()));
        }
        if let Some(version) = &server.icu {
            found.push_str(&format!(", ICU {version}"));
        }
        if server.absent.is_empty() {
            return ok("PostgreSQL", found);
        }
        let cure = "install the server's contrib package";
        advice("PostgreSQL", format!("{found}, without {}", server.absent.join(", ")), cure)
    };
    machine.postgres.iter().map(finding).collect()
}

fn repository(machine: &Machine) -> Option<Finding> {
    let (path, opened) = machine.repository.as_ref()?;
    Some(match opened {
        Ok(format) => ok("repository", format!("{}, {format}", path.display())),
        Err(refusal) => missing("repository", refusal, format!("pghydrant init --repo {}", path.display())),
    })
}

/// By which rules the machine sorts text.
fn text(machine: &Machine) -> Option<Finding> {
    let (version, count) = machine.text.as_ref()?;
    Some(ok("locales", format!("{}, glibc {version}", human::count(*count as u64, "locale"))))
}

/// What a restore of the newest backup would find out.
fn newest(here: &Machine) -> Vec<Finding> {
    const SUBJECT: &str = "newest backup";
    let newest = match &here.newest {
        None => return Vec::new(),
        Some(Err(refusal)) => return vec![missing(SUBJECT, refusal, "pghydrant verify")],
        Some(Ok(newest)) => newest,
    };
    let mut findings = Vec::new();
    if let Err(refusal) = &newest.programs {
        let cure = format!("install PostgreSQL {}", newest.needs.major());
        findings.push(missing(SUBJECT, refusal, cure));
    }
    let lacking = machine::judge(&newest.needs, &newest.found).into_iter();
    findings.extend(lacking.map(|finding| match finding.weight {
        Weight::Unreadable | Weight::Stops => missing(SUBJECT, finding.what, finding.cure),
        Weight::Warns => advice(SUBJECT, finding.what, finding.cure),
    }));
    if findings.is_empty() {
        findings.push(ok(SUBJECT, format!("{}: its server would find all that it needs", newest.label)));
    }
    findings
}

fn io_uring(machine: &Machine) -> Finding {
    let kernel = &machine.kernel;
    let threads = "the copier uses threads instead, at a higher cost";
    let works = machine.means.as_ref().is_ok_and(|means| means.ring);
    match (works, machine.io_uring_disabled) {
        (true, _) => ok("io_uring", format!("kernel {kernel}")),
        (false, Some(1 | 2)) => {
            advice("io_uring", format!("switched off; {threads}"), "sysctl kernel.io_uring_disabled=0")
        }
        (false, _) => advice(
            "io_uring",
            format!("kernel {kernel} refuses it; {threads}"),
            "a kernel from 5.6 on; in a container, a seccomp profile that allows io_uring_setup, _enter and _register",
        ),
    }
}

/// What the kernel locks for a ring, since 6.14, with room to spare.
const RING_BYTES: u64 = 64 << 10;

/// Buffers that are registered are locked memory.
fn memlock(machine: &Machine) -> Finding {
    const SUBJECT: &str = "locked memory";
    let wanted = machine.buffer_bytes;
    match (&machine.means, machine.memlock_bytes) {
        (Ok(Means { registered: true, .. }), _) => ok(SUBJECT, "enough: buffers are registered with io_uring"),
        (Ok(Means { ring: false, .. }) | Err(_), limit) if limit.is_none_or(|limit| limit >= RING_BYTES) => {
            ok(SUBJECT, "not needed without io_uring")
        }
        (_, limit) => {
            let limit = limit.map_or_else(|| "unlimited".to_owned(), human::bytes);
            advice(
                SUBJECT,
                format!("limit {limit}, buffers want {}: they are not registered", human::bytes(wanted)),
                format!("ulimit -l {} (lasting: memlock in /etc/security/limits.conf)", wanted / 1024),
            )
        }
    }
}

/// The transparent ones: the reserved ones are left to PostgreSQL's shared memory.
fn huge_pages(machine: &Machine) -> Finding {
    const SUBJECT: &str = "huge pages";
    match &machine.means {
        Ok(Means { pages: Pages::Huge, .. }) => ok(SUBJECT, "buffers lie in transparent ones"),
        Ok(Means { pages: Pages::Small, .. }) => advice(
            SUBJECT,
            "buffers got none: direct I/O costs more processor time",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled, as root",
        ),
        Err(refusal) => missing(SUBJECT, refusal.clone(), "less memory: memory = \"64MiB\" in pghydrant.toml"),
    }
}

fn fuse(machine: &Machine) -> Vec<Finding> {
    let way_out = "or restore with --source blocks";
    let mut findings = Vec::new();
    findings.push(match &machine.fuse {
        Ok(()) => ok("FUSE", "this user can mount"),
        Err(reason) => advice("FUSE", reason.message.clone(), format!("{}, {way_out}", reason.cure)),
    });
    if !machine.root {
        findings.push(if machine.user_allow_other {
            ok("user_allow_other", "set in /etc/fuse.conf")
        } else {
            let cure = "echo user_allow_other >> /etc/fuse.conf, as root";
            advice("user_allow_other", "not set: other users cannot see your mounts", cure)
        });
    }
    findings
}

fn place(subject: &'static str, place: &Place, option: &str) -> Finding {
    let free = place.free_bytes.map(|bytes| format!(", {} free", human::bytes(bytes))).unwrap_or_default();
    match &place.writable {
        Ok(()) => ok(subject, format!("{}{free}", place.path.display())),
        Err(cause) => {
            advice(subject, format!("{}: {cause}", place.path.display()), format!("choose another: {option}"))
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::survey::{Newest, Server, allows_other};
    use super::*;
    use crate::machine::Needs;
    use crate::mount::Reason;

    fn place_ok(path: &str) -> Place {
        Place { path: path.into(), writable: Ok(()), free_bytes: Some(1 << 30) }
    }

    fn good() -> Machine {
        Machine {
            root: false,
            kernel: "6.1.0".to_owned(),
            io_uring_disabled: Some(0),
            memlock_bytes: None,
            buffer_bytes: 128 << 20,
            means: Ok(Means { ring: true, registered: true, pages: Pages::Huge }),
            fuse: Ok(()),
            user_allow_other: true,
            postgres: vec![Server {
                directory: "/bin".into(),
                version: "15.1".to_owned(),
                absent: vec![],
                libraries: Some("/lib".into()),
                icu: Some("72".to_owned()),
            }],
            state: place_ok("/var/lib/pghydrant"),
            mount_directory: place_ok("/run/media/pghydrant"),
            repository: None,
            text: Some(("2.36".to_owned(), 3)),
            newest: None,
        }
    }

    fn found(machine: &Machine, subject: &str) -> Finding {
        judge(machine).into_iter().find(|finding| finding.subject == subject).unwrap()
    }

    #[test]
    fn a_good_machine_gets_no_advice() {
        assert!(judge(&good()).iter().all(|finding| finding.verdict == Verdict::Ok && finding.cure.is_none()));
    }

    #[test]
    fn what_a_restore_cannot_do_without_is_missing_and_has_a_cure() {
        let no_server = Machine { postgres: vec![], ..good() };
        assert_eq!(found(&no_server, "PostgreSQL").verdict, Verdict::Missing);
        let no_repository = Machine { repository: Some(("/r".into(), Err("gone".to_owned()))), ..good() };
        assert_eq!(found(&no_repository, "repository").verdict, Verdict::Missing);
    }

    #[test]
    fn what_only_makes_it_better_is_advice_with_a_cure() {
        let poor = Machine {
            memlock_bytes: Some(8 << 20),
            means: Ok(Means { ring: true, registered: false, pages: Pages::Small }),
            fuse: Err(Reason { message: "no fusermount3".to_owned(), cure: "apt-get install fuse3".to_owned() }),
            user_allow_other: false,
            ..good()
        };
        for subject in ["locked memory", "huge pages", "FUSE", "user_allow_other"] {
            let finding = found(&poor, subject);
            assert_eq!(finding.verdict, Verdict::Advice, "{subject}");
            assert!(finding.cure.is_some(), "{subject}");
        }
        assert!(found(&poor, "locked memory").cure.unwrap().starts_with("ulimit -l 131072"));
        let off = Machine {
            means: Ok(Means { ring: false, registered: false, pages: Pages::Huge }),
            io_uring_disabled: Some(2),
            ..poor
        };
        assert_eq!(found(&off, "io_uring").cure.unwrap(), "sysctl kernel.io_uring_disabled=0");
        assert_eq!(found(&off, "locked memory").verdict, Verdict::Ok);
    }

    #[test]
    fn what_a_backups_server_lacks_is_found_before_a_restore() {
        let newest = |programs| Machine {
            newest: Some(Ok(Newest {
                label: "20261122T081500Z-F".to_owned(),
                programs,
                needs: Needs::none(),
                found: machine::Facts::default(),
            })),
            ..good()
        };
        assert_eq!(found(&newest(Ok(())), "newest backup").verdict, Verdict::Ok);
        let finding = found(&newest(Err("not installed".to_owned())), "newest backup");
        assert_eq!(finding.verdict, Verdict::Missing);
        assert!(finding.cure.is_some());
    }

    #[test]
    fn the_settings_of_fuse_are_read() {
        assert!(allows_other("# x\nuser_allow_other\n"));
        assert!(!allows_other("#user_allow_other\n"));
    }
}
