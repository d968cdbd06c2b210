//! The server that is backed up: what it is, and the backup API in the words of its version.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use engine::format::backup::{ServerInfo, Snapshot};
use engine::units::{Lsn, PAGE_BYTES, SystemIdentifier};

use crate::exit::{Exit, Failure};
use crate::postgres::binaries::Version;
use crate::postgres::client::{Client, value};
use crate::postgres::conninfo::Conninfo;
use crate::postgres::control::{self, ControlFile};
use crate::postgres::owner::Owner;
use crate::postgres::postmaster;

use super::environment;
use super::late::Attributes;
use super::relation::SEGMENT_PAGES;

/// The major versions whose backup API, control file and exclusions are known here.
const MAJOR_MIN: u32 = 13;
const MAJOR_MAX: u32 = 18;
/// `pg_backup_start` and `pg_backup_stop` are called `pg_start_backup` and `pg_stop_backup` before.
const BACKUP_START_FROM: u32 = 150_000;
/// A checkpoint of a large, busy server may take this long, even a fast one.
const CHECKPOINT_LIMIT: Duration = Duration::from_secs(6 * 3600);
/// The server notes its start in seconds, once by its clock and once in `postmaster.pid`.
const START_DIFFERENCE_MAX_SECONDS: i64 = 5;

/// Settings that a restore wants to know whatever their source.
const SETTINGS: [&str; 38] = [
    "archive_command",
    "archive_mode",
    "config_file",
    "data_checksums",
    "data_directory",
    "data_directory_mode",
    "dynamic_library_path",
    "external_pid_file",
    "hba_file",
    "huge_page_size",
    "huge_pages",
    "ident_file",
    "lc_collate",
    "lc_ctype",
    "lc_messages",
    "lc_monetary",
    "lc_numeric",
    "lc_time",
    "listen_addresses",
    "local_preload_libraries",
    "log_directory",
    "logging_collector",
    "max_connections",
    "max_locks_per_transaction",
    "max_prepared_transactions",
    "max_wal_senders",
    "max_worker_processes",
    "port",
    "primary_slot_name",
    "server_encoding",
    "session_preload_libraries",
    "shared_buffers",
    "shared_memory_size",
    "shared_preload_libraries",
    "synchronous_standby_names",
    "unix_socket_directories",
    "wal_level",
    "wal_segment_size",
];
/// `BOOTSTRAP_SUPERUSERID`: who `initdb` made.
const BOOTSTRAP_SUPERUSER: u32 = 10;
/// Not to be shown by `show --json`: may hold a password.
const SECRET: [&str; 2] = ["primary_conninfo", "ssl_passphrase_command"];

/// A server that may be backed up.
#[derive(Debug)]
pub(super) struct Server {
    /// The data directory, with links resolved.
    pub(super) data: PathBuf,
    pub(super) control: ControlFile,
    pub(super) info: ServerInfo,
    /// Owner and group of the data directory, and whether the group may read it.
    pub(super) owner: Owner,
    pub(super) gid: u32,
    pub(super) group_access: bool,
    /// It replays another server's WAL.
    pub(super) is_standby: bool,
}

impl Server {
    /// Looks at the server behind `client`, and refuses what cannot be backed up.
    pub(super) fn survey(client: &Client) -> Result<Self> {
        let version = Version(client.version_num());
        if !(MAJOR_MIN..=MAJOR_MAX).contains(&version.major()) {
            return Err(refuse(format!(
                "the server is PostgreSQL {version}; {MAJOR_MIN} to {MAJOR_MAX} can be backed up"
            ))
            .into());
        }
        let is_standby = client.one("SELECT pg_is_in_recovery()", &[])?;
        let data = data_directory(client)?;
        refuse_unreadable(&data)?;
        let control = control::read(&data)?;
        refuse_another_servers_directory(client, &data, &control)?;
        refuse_other_builds(&control)?;
        refuse_isolated_copy(&data)?;
        let metadata = std::fs::metadata(&data).with_context(|| format!("cannot stat {}", data.display()))?;
        let owner = Owner::of(&data)?;
        let group_access = metadata.mode() & 0o050 != 0;
        let info = server_info(client, &data, &control, &owner)?;
        Ok(Self { data, control, info, owner, gid: metadata.gid(), group_access, is_standby })
    }

    /// Records what it found on its machine and beside it.
    pub(super) fn look_around(&mut self, client: &Client, conninfo: &Conninfo, stop: &dyn Fn() -> bool) {
        let process = postmaster::running_in(&self.data).ok().flatten().map(|file| file.pid);
        self.info.environment = environment::gather(client, conninfo, process, stop);
    }

    /// Its version.
    pub(super) fn version(&self) -> Version {
        Version(self.info.version_num)
    }

    /// What a file that we make in its data directory looks like, as the server would make it.
    pub(super) fn attributes(&self, modified: i64) -> Attributes {
        let mode = if self.group_access { 0o640 } else { 0o600 };
        Attributes { mode, uid: self.owner.uid, gid: self.gid, modified }
    }

    /// `PG_15_202209061`: what this server calls its directory in a tablespace.
    pub(super) fn version_directory(&self) -> String {
        format!("PG_{}_{}", self.version().major(), self.control.catalog_version)
    }

    /// `stats_temp_directory` of PostgreSQL before 15, if it lies in the data directory.
    pub(super) fn statistics_directory(&self) -> Option<String> {
        let directory = self.info.settings.get("stats_temp_directory")?;
        let relative = Path::new(directory).strip_prefix(&self.data).unwrap_or(Path::new(directory));
        relative.to_str().filter(|path| !path.is_empty() && !path.starts_with('/')).map(str::to_owned)
    }

    /// Tablespaces besides the two that lie in the data directory: name and location by OID.
    pub(super) fn tablespaces(client: &Client) -> Result<BTreeMap<u32, (String, String)>> {
        let sql = "SELECT oid, spcname::text, pg_tablespace_location(oid) FROM pg_tablespace \
            WHERE spcname NOT IN ('pg_default', 'pg_global')";
        client.query(sql, &[])?.iter().map(|row| Ok((value(row, 0)?, (value(row, 1)?, value(row, 2)?)))).collect()
    }
}

/// `pg_backup_start`: from here on the server keeps what a backup needs.
pub(super) fn start(client: &Client, label: &str, stop: &dyn Fn() -> bool) -> Result<Lsn> {
    let sql = if client.version_num() >= BACKUP_START_FROM {
        "SELECT pg_backup_start($1, true)::text"
    } else {
        "SELECT pg_start_backup($1, true, false)::text"
    };
    let rows = client.query_until(sql, &[&label], CHECKPOINT_LIMIT, stop)?;
    lsn(rows.first().context("pg_backup_start returned nothing")?, 0)
}

/// What the server gives back at the end of a backup.
#[derive(Debug)]
pub(super) struct Stopped {
    /// Where the files are consistent.
    pub(super) lsn: Lsn,
    /// `backup_label`, byte for byte.
    pub(super) label: String,
    /// `tablespace_map`, byte for byte; empty without tablespaces.
    pub(super) tablespace_map: String,
    /// What was finished by then.
    pub(super) snapshot: Snapshot,
    /// Microseconds since 1970, by the server's clock.
    pub(super) at_micros: i64,
}

/// `pg_backup_stop`, without waiting for the archive: whoever reads the WAL waits.
///
/// Snapshot and clock are taken *after* it. A transaction that is unfinished in this snapshot, or a time after this clock,
/// comes after the end of the backup, so recovery can stop there. Taken before, both would promise some moments that
/// still belong to the backup itself, where recovery cannot stop.
///
/// On a standby both are careful in the same direction. Its snapshot lists no unfinished transactions (they are among
/// its subtransactions, which SQL does not see), so all below `xmax` count as finished. Its clock may be behind the
/// primary's, whose commits it has replayed: the later of the two counts.
pub(super) fn stop(client: &Client, stop: &dyn Fn() -> bool) -> Result<Stopped> {
    let sql = if client.version_num() >= BACKUP_START_FROM {
        "SELECT lsn::text, labelfile, spcmapfile FROM pg_backup_stop(false)"
    } else {
        "SELECT lsn::text, labelfile, spcmapfile FROM pg_stop_backup(false, false)"
    };
    let rows = client.query_until(sql, &[], CHECKPOINT_LIMIT, stop)?;
    let row = rows.first().context("pg_backup_stop returned nothing")?;
    let after = client.row(
        "SELECT pg_current_snapshot()::text, \
            (extract(epoch FROM greatest(clock_timestamp(), pg_last_xact_replay_timestamp())) * 1000000)::bigint",
        &[],
    )?;
    let snapshot: String = value(&after, 0)?;
    Ok(Stopped {
        lsn: lsn(row, 0)?,
        label: value(row, 1)?,
        tablespace_map: value::<Option<String>>(row, 2)?.unwrap_or_default(),
        snapshot: parse_snapshot(&snapshot).with_context(|| format!("pg_current_snapshot() is \"{snapshot}\""))?,
        at_micros: value(&after, 1)?,
    })
}

fn lsn(row: &tokio_postgres::Row, index: usize) -> Result<Lsn> {
    let text: String = value(row, index)?;
    text.parse().map_err(anyhow::Error::msg)
}

/// `10:20:10,14,15`: xmin, xmax, in progress.
fn parse_snapshot(text: &str) -> Option<Snapshot> {
    let mut parts = text.split(':');
    let (xmin, xmax, list) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?, parts.next()?);
    let in_progress =
        list.split(',').filter(|xid| !xid.is_empty()).map(|xid| xid.parse().ok()).collect::<Option<_>>()?;
    Some(Snapshot { xmin, xmax, in_progress })
}

fn refuse(message: impl Into<String>) -> Failure {
    Failure::new(Exit::Refused, message)
}

/// The major version that `PG_VERSION` says, if its directories are known here.
pub(super) fn known_major(text: &str) -> Result<u32> {
    let major = text.trim().parse().ok().filter(|major| (MAJOR_MIN..=MAJOR_MAX).contains(major));
    let unknown = || {
        let found = text.trim().escape_debug().to_string();
        refuse(format!("the directory is of PostgreSQL {found}; {MAJOR_MIN} to {MAJOR_MAX} can be backed up"))
    };
    Ok(major.ok_or_else(unknown)?)
}

/// Seconds since 1970; a second that has begun is over.
pub(super) fn whole_seconds(micros: i64) -> i64 {
    micros.div_euclid(1_000_000) + i64::from(micros.rem_euclid(1_000_000) != 0)
}

fn data_directory(client: &Client) -> Result<PathBuf> {
    let sql = "SELECT setting FROM pg_settings WHERE name = 'data_directory'";
    let Some(row) = client.query(sql, &[])?.into_iter().next() else {
        return Err(refuse("the server does not tell this user its data directory")
            .hint("connect as a superuser, or grant pg_read_all_settings and the backup functions to the user")
            .into());
    };
    let setting: String = value(&row, 0)?;
    std::fs::canonicalize(&setting).map_err(|error| {
        let failure = refuse(format!("cannot read the server's data directory {setting}: {error}"));
        let hint = if error.kind() == std::io::ErrorKind::PermissionDenied {
            "run the backup as the owner of the data directory, or as root"
        } else {
            "the backup reads the data directory itself: run it on the server's machine"
        };
        failure.hint(hint).into()
    })
}

/// PostgreSQL opens its directory to the owner, at most to the owner's group.
fn refuse_unreadable(data: &Path) -> Result<()> {
    use rustix::fs::{Access, AtFlags, CWD, accessat};
    use rustix::io::Errno;
    match accessat(CWD, data, Access::READ_OK | Access::EXEC_OK, AtFlags::EACCESS) {
        Err(Errno::ACCESS | Errno::PERM) => {
            let message = format!("cannot read the server's data directory {}: permission denied", data.display());
            Err(refuse(message).hint("run the backup as the owner of the data directory, or as root").into())
        }
        // Whatever else may be wrong is told by the first read.
        _ => Ok(()),
    }
}

/// A copy on this machine may lie where the server, on another, has its own: only the directory in which this very server
/// runs will do.
fn refuse_another_servers_directory(client: &Client, data: &Path, control: &ControlFile) -> Result<()> {
    let row = client.row(
        "SELECT (SELECT system_identifier FROM pg_control_system()), \
            extract(epoch FROM pg_postmaster_start_time())::bigint",
        &[],
    )?;
    let (identifier, started): (i64, i64) = (value(&row, 0)?, value(&row, 1)?);
    let identifier = SystemIdentifier(identifier.cast_unsigned());
    let here = postmaster::PostmasterFile::read(data)?;
    let same_start = here.is_some_and(|file| (file.started_unix - started).abs() <= START_DIFFERENCE_MAX_SECONDS);
    if control.system_identifier == identifier && same_start {
        return Ok(());
    }
    Err(refuse(format!("{} on this machine is not the directory that the server runs in", data.display()))
        .hint("the backup reads the data directory itself: run it on the server's machine")
        .into())
}

pub(super) fn refuse_other_builds(control: &ControlFile) -> Result<()> {
    if control.block_bytes as usize != PAGE_BYTES || control.relation_segment_pages != SEGMENT_PAGES {
        return Err(refuse(format!(
            "the server was built with pages of {} bytes and {} pages to a file; only {PAGE_BYTES} and {SEGMENT_PAGES} are supported",
            control.block_bytes, control.relation_segment_pages
        ))
        .into());
    }
    Ok(())
}

/// An isolated copy archives nowhere; a backup of it would put its WAL among the original's.
fn refuse_isolated_copy(data: &Path) -> Result<()> {
    let marker = data.join("pg_wal/pghydrant.copy");
    if marker.exists() {
        return Err(refuse(format!(
            "{} is an isolated copy of another cluster ({} says so)",
            data.display(),
            marker.display()
        ))
        .hint("remove the marker to make it a cluster of its own, and give it another name in the repository")
        .into());
    }
    Ok(())
}

fn server_info(client: &Client, data: &Path, control: &ControlFile, owner: &Owner) -> Result<ServerInfo> {
    let sql = "SELECT name, current_setting(name) FROM pg_settings \
        WHERE (name = ANY ($1) OR source NOT IN ('default', 'override', 'client', 'session')) \
        AND source NOT IN ('database', 'user', 'database user')";
    let mut settings: BTreeMap<String, String> = BTreeMap::new();
    for row in client.query(sql, &[&SETTINGS.map(str::to_owned).to_vec()])? {
        let (name, setting): (String, Option<String>) = (value(&row, 0)?, value(&row, 1)?);
        if !SECRET.contains(&name.as_str()) {
            settings.insert(name, setting.unwrap_or_default());
        }
    }
    // Whose name stands in no file of the data directory, and who can log in whatever else happened to the roles.
    let superuser = client.query("SELECT rolname::text FROM pg_roles WHERE oid = $1", &[&BOOTSTRAP_SUPERUSER])?;
    if let Some(row) = superuser.first() {
        settings.insert("bootstrap_superuser".to_owned(), value(row, 0)?);
    }
    let statistics = client.query("SELECT name, setting FROM pg_settings WHERE name = 'stats_temp_directory'", &[])?;
    for row in &statistics {
        settings.insert(value(row, 0)?, value(row, 1)?);
    }
    let outside = |name: &&str| {
        settings.get(*name).filter(|path| {
            let path = std::fs::canonicalize(path).unwrap_or_else(|_| PathBuf::from(path));
            !path.as_os_str().is_empty() && !path.starts_with(data)
        })
    };
    let outside_files = ["config_file", "hba_file", "ident_file"].iter().filter_map(outside).cloned().collect();
    Ok(ServerInfo {
        system_identifier: control.system_identifier,
        version_num: client.version_num(),
        data_checksums: control.data_checksum_version != 0,
        wal_segment_bytes: u64::from(control.wal_segment_bytes),
        data_directory: data.display().to_string(),
        outside_files,
        owner: owner.name.clone(),
        settings,
        environment: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshots_are_read() {
        let snapshot = Snapshot { xmin: 10, xmax: 20, in_progress: vec![10, 14] };
        assert_eq!(parse_snapshot("10:20:10,14"), Some(snapshot));
        assert_eq!(parse_snapshot("740:740:"), Some(Snapshot { xmin: 740, xmax: 740, in_progress: Vec::new() }));
        assert_eq!(parse_snapshot("740"), None);
        assert_eq!(parse_snapshot("1:2:x"), None);
    }
}
