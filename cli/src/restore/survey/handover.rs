//! Looking at where an instance would be handed over to, and at the program that would check it.

use std::path::{Path, PathBuf};

use rustix::fs::Access;

use super::super::check::PG_AMCHECK;
use super::super::handover::{CONFIGURATIONS, DebianCluster, Handover, LOGS, PROGRAMS, Placed, log_of};
use super::super::plan::{Before, Place};
use super::super::preflight::Request;
use super::place::{Found, What, look_at_place};
use crate::postgres::binaries::Binaries;
use crate::postgres::owner::Owner;

/// What was seen.
#[derive(Debug, Default)]
pub(crate) struct HandoverFacts {
    /// The directory of the configuration as it was asked for, and what is there.
    pub(crate) configuration: Option<(PathBuf, Found)>,
    /// For `--register`.
    pub(crate) debian: Option<DebianFacts>,
    /// For `--systemd-unit`.
    pub(crate) unit: Option<UnitFacts>,
    /// Why the programs that were found cannot check.
    pub(crate) no_check: Option<String>,
}

/// What `--register` needs.
#[derive(Debug)]
pub(crate) struct DebianFacts {
    pub(crate) cluster: DebianCluster,
    /// Debian's programs are there, and find a server of that version.
    pub(crate) tools: Result<(), String>,
    /// The server's log can be made, and written by its user.
    pub(crate) log: Result<(), String>,
}

/// What is at the unit's place.
#[derive(Debug)]
pub(crate) struct UnitFacts {
    pub(crate) path: PathBuf,
    pub(crate) exists: bool,
    /// Whether we may write in its directory; if not, why.
    pub(crate) writable: Result<(), String>,
}

impl HandoverFacts {
    /// What will be done, where nothing is in the way.
    pub(crate) fn plan(&self, request: &Request) -> Handover {
        let configuration = self.configuration.as_ref().map(|(_, found)| Placed {
            place: Place {
                path: found.path.clone(),
                before: if found.what == What::Empty { Before::Empty } else { Before::Absent },
                missing_parents: found.missing_parents.clone(),
            },
            cluster: self.debian.as_ref().map(|facts| facts.cluster.clone()),
        });
        Handover { configuration, unit: request.handover.unit.clone() }
    }
}

/// Looks at everything.
pub(super) fn look(request: &Request, owner: Option<&Owner>, binaries: Option<&Binaries>) -> HandoverFacts {
    let wanted = &request.handover;
    let cluster = match (&wanted.register, binaries) {
        (Some(name), Some(binaries)) => Some(DebianCluster { major: binaries.version().major(), name: name.clone() }),
        _ => None,
    };
    let listed = cluster.as_ref().map(|DebianCluster { major, name }| {
        // A name with more in it than a name would lead elsewhere; it is refused for what it is.
        Path::new(CONFIGURATIONS).join(major.to_string()).join(name.replace('/', "_"))
    });
    let directory = wanted.directory.clone().or(listed);
    HandoverFacts {
        configuration: directory.map(|path| (path.clone(), look_at_place(&path, owner))),
        debian: cluster.map(|cluster| DebianFacts {
            tools: tools(cluster.major),
            log: log(&log_of(cluster.major, &cluster.name), owner),
            cluster,
        }),
        unit: wanted.unit.as_deref().map(unit),
        no_check: request.check.and(binaries).and_then(no_check),
    }
}

fn tools(major: u32) -> Result<(), String> {
    let program = "/usr/bin/pg_lsclusters";
    if !Path::new(program).is_file() {
        return Err(format!("this machine has no Debian list of clusters: {program} is missing"));
    }
    let server = Path::new(PROGRAMS).join(major.to_string()).join("bin/postgres");
    if !server.is_file() {
        return Err(format!("Debian's programs start no server but {}, which is missing", server.display()));
    }
    Ok(())
}

fn log(path: &Path, owner: Option<&Owner>) -> Result<(), String> {
    let directory = Path::new(LOGS);
    if !path.exists() {
        let may = rustix::fs::access(directory, Access::WRITE_OK | Access::EXEC_OK);
        return may.map_err(|cause| engine::Error::io("write in", directory, cause).to_string());
    }
    let Some(owner) = owner else { return Ok(()) };
    match owner.test("-w", path) {
        Ok(true) => Ok(()),
        _ => Err(format!("{} is there, and {} cannot write it", path.display(), owner.name)),
    }
}

fn unit(path: &Path) -> UnitFacts {
    let directory = path.parent().unwrap_or(Path::new("/"));
    let may = rustix::fs::access(directory, Access::WRITE_OK | Access::EXEC_OK);
    UnitFacts {
        path: path.to_owned(),
        exists: std::fs::symlink_metadata(path).is_ok(),
        writable: may.map_err(|cause| engine::Error::io("write in", directory, cause).to_string()),
    }
}

/// The program is in another package on some systems, and the extension in the database needs its own files.
fn no_check(binaries: &Binaries) -> Option<String> {
    let directory = binaries.directory().display();
    if !binaries.has(PG_AMCHECK) {
        return Some(format!("{PG_AMCHECK} is missing from {directory}"));
    }
    let shared = std::process::Command::new(binaries.program("pg_config")).arg("--sharedir").output().ok()?;
    let shared = PathBuf::from(String::from_utf8_lossy(&shared.stdout).trim_end());
    let extension = shared.join("extension/amcheck.control");
    (shared.is_absolute() && !extension.is_file())
        .then(|| format!("the extension amcheck is missing: {}", extension.display()))
}
