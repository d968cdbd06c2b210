//! Reads this machine: no verdicts here.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::Result;
use engine::io::Means;
use engine::repository::Repository;
use rustix::process::{Resource, getrlimit};

use super::Arguments;
use crate::context::Context;
use crate::machine::{self, Needs};
use crate::mount::{Reason, default_directory, fuse_usable};
use crate::postgres::binaries::Binaries;
use crate::restore;

/// Programs of PostgreSQL that a restore or its checks call.
pub(super) const PROGRAMS: [&str; 6] =
    ["pg_ctl", "pg_controldata", "pg_waldump", "pg_verifybackup", "pg_checksums", "pg_amcheck"];

/// As many buffers as two workers have: what is refused to them is refused to more.
const BUFFERS_TRIED_MAX: u16 = 48;

/// What the machine is like.
#[derive(Clone, Debug)]
pub(super) struct Machine {
    pub(super) root: bool,
    pub(super) kernel: String,
    /// `/proc/sys/kernel/io_uring_disabled`; kernels before 6.6 have none.
    pub(super) io_uring_disabled: Option<u32>,
    /// `None` is unlimited.
    pub(super) memlock_bytes: Option<u64>,
    pub(super) buffer_bytes: u64,
    /// What the copier's buffers got, tried out.
    pub(super) means: Result<Means, String>,
    pub(super) fuse: Result<(), Reason>,
    pub(super) user_allow_other: bool,
    pub(super) postgres: Vec<Server>,
    pub(super) state: Place,
    pub(super) mount_directory: Place,
    /// With the repository's own words when it does not open.
    pub(super) repository: Option<(PathBuf, Result<String, String>)>,
    /// The C library's version, and how many locales there are, where the machine tells.
    pub(super) text: Option<(String, usize)>,
    /// Of the cluster that is named, with the library's own words when it cannot be read.
    pub(super) newest: Option<Result<Newest, String>>,
}

/// The newest backup of a cluster, what its server asks of a machine, and what this one has.
#[derive(Clone, Debug)]
pub(super) struct Newest {
    pub(super) label: String,
    /// Why no server of its version can run here.
    pub(super) programs: Result<(), String>,
    pub(super) needs: Needs,
    pub(super) found: machine::Facts,
}

/// Server programs of one version.
#[derive(Clone, Debug)]
pub(super) struct Server {
    pub(super) directory: PathBuf,
    pub(super) version: String,
    pub(super) absent: Vec<&'static str>,
    /// `pkglibdir`.
    pub(super) libraries: Option<PathBuf>,
    /// The major version of ICU.
    pub(super) icu: Option<String>,
}

/// A directory that we write to, or the nearest existing one above it.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) path: PathBuf,
    pub(super) writable: Result<(), String>,
    pub(super) free_bytes: Option<u64>,
}

pub(super) fn survey(arguments: &Arguments, context: &Context) -> Result<Machine> {
    let buffers = context.memory_bytes()? / engine::io::BUFFER_BYTES as u64;
    let buffers = u16::try_from(buffers).unwrap_or(u16::MAX).clamp(1, BUFFERS_TRIED_MAX);
    let disabled = read_number("/proc/sys/kernel/io_uring_disabled");
    let repository = context.repository_path(&arguments.repository).ok().map(|path| {
        let opened = Repository::open(&path).map_err(|error| error.to_string());
        let described = opened.map(|repository| format!("format {}", repository.info().format));
        (path, described)
    });
    let chosen = context.settings.get("mount_dir", None).map(|(path, _)| PathBuf::from(path));
    Ok(Machine {
        root: rustix::process::geteuid().is_root(),
        kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        io_uring_disabled: disabled,
        memlock_bytes: getrlimit(Resource::Memlock).current,
        buffer_bytes: context.memory_bytes()?,
        means: engine::io::means(buffers).map_err(|error| error.to_string()),
        fuse: fuse_usable(),
        user_allow_other: fs::read_to_string("/etc/fuse.conf").is_ok_and(|text| allows_other(&text)),
        postgres: Binaries::installed().iter().map(Server::of).collect(),
        state: Place::at(&context.state_path()?),
        mount_directory: Place::at(&chosen.unwrap_or_else(default_directory)),
        text: machine::libc_version().zip(machine::locale_count()),
        newest: newest(arguments, context),
        repository,
    })
}

/// Only where a repository opens and a cluster is named: without them there is nothing to ask.
fn newest(arguments: &Arguments, context: &Context) -> Option<Result<Newest, String>> {
    let path = context.repository_path(&arguments.repository).ok()?;
    let repository = Repository::open(&path).ok()?;
    let name = context.optional_cluster_name(&arguments.cluster).ok()??;
    let look = || {
        let Some(cluster) = repository.find_cluster(&name)? else { return Ok(None) };
        let Some(label) = cluster.labels()?.pop() else { return Ok(None) };
        let backup = cluster.backup(&label)?;
        // All of it, as a copy that takes the original's place would need it.
        let needs = restore::survey::needs(&backup.info, &restore::survey::contents(&backup)?, true);
        let chosen = context.settings.get("pg_bin", None).map(|(path, _)| PathBuf::from(path));
        let programs = Binaries::find(chosen.as_deref(), Some(backup.info.server.version_num / 10_000));
        let mut found = machine::look(programs.as_ref().ok(), &needs);
        // The original may run here and have them: on the day of the restore they are free.
        found.memory.huge_pages_free = found.memory.huge_pages;
        let programs = programs.map(drop).map_err(|error| format!("{error:#}"));
        Ok(Some(Newest { label: label.to_string(), programs, needs, found }))
    };
    look().map_err(|error: anyhow::Error| format!("{error:#}")).transpose()
}

/// Why no backup can be mounted by this user here, if that is so.
pub(crate) fn fuse_is_missing() -> Option<String> {
    fuse_usable().err().map(|reason| format!("FUSE cannot be used here ({})", reason.message))
}

/// A line `user_allow_other` that is no comment.
pub(super) fn allows_other(text: &str) -> bool {
    text.lines().any(|line| line.trim() == "user_allow_other")
}

fn read_number(path: &str) -> Option<u32> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The kernel's words without Rust's "(os error N)".
fn words(cause: &io::Error) -> String {
    let text = cause.to_string();
    text.split(" (os error").next().unwrap_or_default().to_lowercase()
}

impl Server {
    fn of(binaries: &Binaries) -> Self {
        Self {
            directory: binaries.directory().to_owned(),
            version: binaries.version().to_string(),
            absent: PROGRAMS.into_iter().filter(|name| !binaries.has(name)).collect(),
            libraries: machine::library_directory(binaries),
            icu: machine::icu_of_programs(binaries),
        }
    }
}

impl Place {
    fn at(path: &Path) -> Self {
        let existing = path.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("/"));
        let access = rustix::fs::access(existing.as_os_str() as &OsStr, rustix::fs::Access::WRITE_OK);
        let free = rustix::fs::statvfs(existing).ok().map(|status| status.f_bavail * status.f_frsize);
        let refused = |errno: rustix::io::Errno| format!("{}: {}", existing.display(), words(&errno.into()));
        Self { path: path.to_owned(), writable: access.map_err(refused), free_bytes: free }
    }
}
