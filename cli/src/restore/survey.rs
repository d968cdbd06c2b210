//! Looking at everything that a restore depends on, touching nothing.
//!
//! What is found becomes [`Facts`]; [`super::preflight`] judges them. Whatever cannot be looked at is a fact too. The
//! directories are looked at in [`place`], the archive in [`wal`].

mod created;
mod existing;
mod handover;
mod place;
mod wal;

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use engine::blocks::Scratch;
use engine::format::backup::BackupInfo;
use engine::format::file::FileKind;
use engine::repository::{Backup, Cluster};
use engine::units::{BackupLabel, Lsn};
use engine::wal::history::History;
use jiff::Timestamp;

use super::choose::{self, Choice};
use super::conf;
use super::hba;
use super::isolation;
use super::preflight::{Problem, Request};
use super::target::Goal;
use super::way::{self, WayFacts};
use crate::exit::{Exit, Failure};
use crate::machine::{self, Needs};
use crate::postgres::binaries::Binaries;
use crate::postgres::control::{self, ControlFile};
use crate::postgres::owner::Owner;
pub(crate) use created::{Created, Location};
pub(crate) use existing::{Existing, identifier, servers};
pub(crate) use handover::HandoverFacts;
#[cfg(test)]
pub(crate) use handover::UnitFacts;
#[cfg(test)]
pub(crate) use place::FileSystem;
use place::look_at_place;
pub(crate) use place::{Found, What};
use wal::{Known, histories, locate, wal_facts};
pub(crate) use wal::{Unbegun, WalFacts};

/// Everything that was seen.
#[derive(Debug)]
pub(crate) struct Facts {
    pub(crate) now: Timestamp,
    pub(crate) we_are_root: bool,
    pub(crate) our_name: String,
    pub(crate) owner: Result<Owner, Problem>,
    pub(crate) binaries: Result<Binaries, String>,
    pub(crate) choice: Result<(BackupInfo, History), Problem>,
    pub(crate) contents: Contents,
    pub(crate) wal: Result<WalFacts, String>,
    /// By the directory as it was asked for: the data directory, then each tablespace that is known.
    pub(crate) places: Vec<(PathBuf, Found)>,
    pub(crate) needs: Needs,
    /// What of that is here.
    pub(crate) machine: machine::Facts,
    pub(crate) port: PortFacts,
    pub(crate) fuse: Result<(), crate::mount::Reason>,
    /// What the copy could be done with.
    pub(crate) way: WayFacts,
    /// The cluster that a delta would overwrite.
    pub(crate) existing: Option<Existing>,
    /// What the backup's configuration includes, or names as a list of users or databases, and is neither in the backup nor here.
    pub(crate) missing_includes: Vec<(String, String)>,
    /// What it names beside `pg_hba.conf`, and the backup has not: nobody can bring that before the copy.
    pub(crate) missing_lists: Vec<String>,
    /// The places of `--config-to`, `--register` and `--systemd-unit`, and the program of `--check`.
    pub(crate) handover: HandoverFacts,
    /// Whether the owner, who runs `wal fetch`, can use our program and read the repository.
    pub(crate) owner_reads: Result<(), String>,
}

/// What a file system allocates at least.
const ALLOCATION_BYTES: u64 = 4096;
/// The files of a backup whose room is counted one by one: some hundredths of a second.
const COUNTED_FILES_MAX: u64 = 10_000;

/// What the chosen backup holds.
#[derive(Clone, Debug, Default)]
pub(crate) struct Contents {
    /// Bytes on disk and files of the data directory (`None`) and of each tablespace, by OID.
    pub(crate) sizes: BTreeMap<Option<u32>, Size>,
    /// `postgresql.conf` and `postgresql.auto.conf`, where the backup has them.
    pub(crate) conf: Option<Vec<u8>>,
    pub(crate) auto: Option<Vec<u8>>,
    pub(crate) control: Option<ControlFile>,
    /// `pg_hba.conf` and `pg_ident.conf`, as far as the backup has them.
    pub(crate) authentication: Vec<Vec<u8>>,
}

/// Room that files need.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) bytes: u64,
    pub(crate) inodes: u64,
}

/// The port, and who uses it.
#[derive(Clone, Debug, Default)]
pub(crate) struct PortFacts {
    pub(crate) number: u16,
    /// What says so: `127.0.0.1:5432`, or a socket's path.
    pub(crate) in_use: Option<String>,
    /// One that is free.
    pub(crate) suggestion: Option<u16>,
}

/// Who runs PostgreSQL unless somebody says otherwise.
const USUAL_OWNER: &str = "postgres";
/// Included files that are followed: more are a circle, which PostgreSQL refuses by itself.
const INCLUDES_MAX: usize = 100;

/// Looks at everything.
pub(crate) fn look(request: &Request, cluster: &Cluster) -> anyhow::Result<Facts> {
    let Aim { binaries, choice, mut wal, .. } = aim(request, cluster, None)?;
    let backup = choice.as_ref().ok().map(|(info, _)| cluster.backup(&info.label)).transpose()?;
    let contents = backup.as_ref().map(contents).transpose()?.unwrap_or_default();
    let owner = owner(request, choice.as_ref().ok().map(|(info, _)| info));
    let existing = existing::look(request, backup.as_ref());
    if let (Some(existing), Ok(WalFacts { created: Some(created), .. })) = (&existing, &mut wal) {
        existing.give_way_to(created);
    }
    let found = existing.as_ref().map(|existing| existing.tablespaces.clone()).unwrap_or_default();
    let tablespaces =
        choice.as_ref().ok().map(|(info, _)| request.tablespace_directories(info, &found)).unwrap_or_default();
    let directories =
        std::iter::once(request.data.clone()).chain(tablespaces.into_iter().map(|(_, directory)| directory));
    let places: Vec<_> = directories.map(|path| (path.clone(), look_at_place(&path, owner.as_ref().ok()))).collect();
    let port = look_at_port(request, choice.as_ref().ok().map(|(info, _)| info), &contents);
    let stored = |path: &str| match &backup {
        Some(backup) => included(backup, path),
        None => Ok(None),
    };
    let needs = choice.as_ref().ok().map(|(info, _)| needs(info, &contents, request.adopt)).unwrap_or_default();
    let mut missing_lists = Vec::new();
    let mut missing = missing_includes(contents.conf.as_deref().unwrap_or_default(), &in_settings, &stored)?;
    for text in &contents.authentication {
        let found = missing_includes(text, &in_authentication, &stored)?;
        let (elsewhere, beside): (Vec<_>, Vec<_>) =
            found.into_iter().partition(|(_, path)| Path::new(path).is_absolute());
        missing.extend(elsewhere);
        missing_lists.extend(beside.into_iter().map(|(_, path)| path));
    }
    let fuse = crate::mount::fuse_usable();
    Ok(Facts {
        machine: machine::look(binaries.as_ref().ok(), &needs),
        needs,
        missing_includes: missing,
        missing_lists,
        handover: handover::look(request, owner.as_ref().ok(), binaries.as_ref().ok()),
        now: Timestamp::now(),
        we_are_root: rustix::process::geteuid().is_root(),
        our_name: Owner::current().map_or_else(|_| "this user".to_owned(), |owner| owner.name),
        owner_reads: owner.as_ref().map_or(Ok(()), |owner| owner_reads(owner, request)),
        owner,
        binaries,
        choice,
        contents,
        wal,
        port,
        way: way::look(
            request.repository.is_file() && fuse.is_err(),
            backup.as_ref(),
            places.iter().map(|(_, found)| found.nearest.as_path()),
        ),
        fuse,
        places,
        existing,
    })
}

/// What the server will ask of this machine.
pub(crate) fn needs(info: &BackupInfo, contents: &Contents, adopt: bool) -> Needs {
    let files = [contents.conf.as_deref(), contents.auto.as_deref()];
    let unloaded = if adopt { &[][..] } else { &isolation::UNLOADED };
    Needs::of(info, &files, contents.control.as_ref(), unloaded)
}

/// What was seen of the target and of the way there.
#[derive(Debug)]
pub(crate) struct Aim {
    pub(crate) binaries: Result<Binaries, String>,
    /// The programs that look into the WAL.
    pub(crate) searcher: Option<Binaries>,
    pub(crate) choice: Result<(BackupInfo, History), Problem>,
    pub(crate) wal: Result<WalFacts, String>,
}

/// Looks at the target, the backup that leads to it, and the WAL all the way: from the backup's start, or `from` where a
/// server goes on.
pub(crate) fn aim(request: &Request, cluster: &Cluster, from: Option<Lsn>) -> anyhow::Result<Aim> {
    let backups = descriptions(cluster, request.backup.as_ref())?;
    let archive = cluster.wal();
    let histories = histories(&archive)?;
    let binaries = find_binaries(request.programs.as_deref(), request, &backups);
    let searcher = searcher(binaries.as_ref().ok(), request, &backups);
    let place = locate(request, &backups, from, &histories, &archive, searcher.as_ref());
    let found_place = place.as_ref().ok().copied().flatten();
    let choice =
        choose::choose(&backups, request.backup.as_ref(), request.timeline, &request.goal, found_place, &histories)
            .map(|Choice { backup, path }| (backup.clone(), path));
    let wal = match (&choice, place) {
        (Ok((info, path)), Ok(place)) => {
            let ended_by = match &request.goal {
                Goal::Xid(xid) => choose::ended_by(&backups, info, path, *xid),
                _ => None,
            };
            wal_facts(request, info, path, Known { from, place, ended_by }, &archive, searcher.as_ref())
                .map_err(|error| format!("{error:#}"))
        }
        (_, Err(error)) => Err(format!("{error:#}")),
        (Err(_), Ok(_)) => Ok(WalFacts::default()),
    };
    Ok(Aim { binaries, searcher, choice, wal })
}

/// The backups there are. A damaged one is a reason to refuse, but not where the user has named another.
fn descriptions(cluster: &Cluster, named: Option<&BackupLabel>) -> anyhow::Result<Vec<BackupInfo>> {
    let mut infos = Vec::new();
    for label in cluster.labels()? {
        match cluster.backup_info(&label) {
            Ok(info) => infos.push(info),
            Err(engine::Error::Corrupt { .. }) if named.is_some_and(|named| *named != label) => {}
            Err(error @ engine::Error::Corrupt { .. }) if named.is_none() => {
                let failure = Failure::new(Exit::Corrupt, error.to_string());
                return Err(failure.hint("mend the file, or name a backup with --backup: pghydrant list").into());
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(infos)
}

fn find_binaries(chosen: Option<&Path>, request: &Request, backups: &[BackupInfo]) -> Result<Binaries, String> {
    let wanted = match &request.backup {
        Some(label) => backups.iter().find(|info| info.label == *label),
        None => backups.last(),
    };
    let major = wanted.map(|info| info.server.version_num / 10_000);
    Binaries::find(chosen, major).map_err(|error| format!("{error:#}"))
}

/// The programs for a look into the WAL: others of the version will do as well, where the chosen ones cannot.
fn searcher(chosen: Option<&Binaries>, request: &Request, backups: &[BackupInfo]) -> Option<Binaries> {
    let looks = |found: &Binaries| found.has(wal::PG_WALDUMP);
    if let Some(chosen) = chosen.filter(|found| looks(found)) {
        return Some(chosen.clone());
    }
    let major = chosen.map(|found| found.version().major());
    let other = major.and_then(|major| {
        Binaries::installed().into_iter().find(|found| found.version().major() == major && looks(found))
    });
    other.or_else(|| chosen.cloned()).or_else(|| find_binaries(None, request, backups).ok())
}

/// The user who will run the instance: named, ourselves, or who owns the place.
fn owner(request: &Request, info: Option<&BackupInfo>) -> Result<Owner, Problem> {
    let found = match &request.owner {
        Some(name) => Owner::named(name),
        None if !rustix::process::geteuid().is_root() => Owner::current(),
        None => match owner_of_place(&request.data) {
            Ok(owner) if owner.uid == 0 => {
                let recorded = info.and_then(|info| Owner::named(&info.server.owner).ok());
                refuse_recorded(recorded.as_ref())?;
                Owner::named(USUAL_OWNER)
            }
            found => found,
        },
    };
    found.map_err(|error| Problem::new(format!("{error:#}"), "name the instance's user with --os-user"))
}

fn owner_of_place(data: &Path) -> anyhow::Result<Owner> {
    Owner::of(data.ancestors().find(|path| path.is_dir()).context("the path has no directory")?)
}

/// Whoever can write the repository can write any name into it, and what this user runs can be written there too: so
/// root runs nothing as a user that only the backup names.
fn refuse_recorded(owner: Option<&Owner>) -> Result<(), Problem> {
    match owner.filter(|owner| owner.uid != 0 && owner.name != USUAL_OWNER) {
        None => Ok(()),
        Some(Owner { name, .. }) => Err(Problem::new(
            format!("the backup says that its server ran as {name}: root runs nothing as that user unasked"),
            format!("if the instance is to run as {name}, say so: --os-user {name}"),
        )),
    }
}

pub(crate) fn contents(backup: &Backup) -> anyhow::Result<Contents> {
    let mut contents = Contents { sizes: sizes(backup)?, ..Contents::default() };
    contents.conf = small_file(backup, "postgresql.conf")?;
    contents.auto = small_file(backup, "postgresql.auto.conf")?;
    contents.control = small_file(backup, control::PATH)?.and_then(|bytes| ControlFile::parse(&bytes).ok());
    for name in ["pg_hba.conf", "pg_ident.conf"] {
        contents.authentication.extend(small_file(backup, name)?);
    }
    Ok(contents)
}

/// The room that a backup needs, by tablespace. Of very many files it is reckoned from what the description and the
/// manifest's index tell, since a plan must not take the longer the larger the backup is.
fn sizes(backup: &Backup) -> anyhow::Result<BTreeMap<Option<u32>, Size>> {
    if backup.manifest.file_count() <= COUNTED_FILES_MAX {
        return counted_sizes(backup);
    }
    let totals = &backup.info.totals;
    let mut sizes = BTreeMap::new();
    // A relation's file ends with a page, so only the others and directories take more than their bytes: a few in a
    // database, which is a directory.
    let rounded = totals.directories.saturating_mul(4 * ALLOCATION_BYTES);
    let mut rest = Size { bytes: totals.bytes.saturating_add(rounded), inodes: backup.manifest.file_count() };
    for tablespace in &backup.info.tablespaces {
        let path = format!("pg_tblspc/{}", tablespace.oid);
        let Some(first) = backup.manifest.index_of(&path)? else { continue };
        let inodes = backup.manifest.index_after(&path)?.saturating_sub(first);
        let bytes = tablespace.bytes.saturating_add(rounded.min(inodes.saturating_mul(ALLOCATION_BYTES)));
        sizes.insert(Some(tablespace.oid), Size { bytes, inodes });
        rest.bytes = rest.bytes.saturating_sub(tablespace.bytes);
        rest.inodes = rest.inodes.saturating_sub(inodes);
    }
    sizes.insert(None, rest);
    Ok(sizes)
}

/// The same, file by file.
fn counted_sizes(backup: &Backup) -> anyhow::Result<BTreeMap<Option<u32>, Size>> {
    let known: Vec<u32> = backup.info.tablespaces.iter().map(|tablespace| tablespace.oid).collect();
    let mut sizes: BTreeMap<_, Size> = BTreeMap::new();
    for file in backup.manifest.files() {
        let file = file?;
        let oid = file.path.strip_prefix("pg_tblspc/").and_then(|rest| rest.split('/').next()?.parse().ok());
        let size = sizes.entry(oid.filter(|oid| known.contains(oid))).or_default();
        size.inodes += 1;
        size.bytes += match file.kind {
            FileKind::Directory => ALLOCATION_BYTES,
            FileKind::Regular => file.bytes.next_multiple_of(ALLOCATION_BYTES),
            FileKind::Symlink { .. } | FileKind::Tablespace { .. } => 0,
        };
    }
    Ok(sizes)
}

/// A file of the backup, if it is there and no larger than a configuration may be.
pub(super) fn small_file(backup: &Backup, path: &str) -> anyhow::Result<Option<Vec<u8>>> {
    const BYTES_MAX: u64 = 16 << 20;
    let Some(file) =
        backup.manifest.file(path)?.filter(|file| file.kind == FileKind::Regular && file.bytes <= BYTES_MAX)
    else {
        return Ok(None);
    };
    let mut bytes = vec![0; usize::try_from(file.bytes)?];
    let read = backup.blocks().read_range(&file, 0, &mut bytes, &mut Scratch::default())?;
    bytes.truncate(read);
    Ok(Some(bytes))
}

/// A file that a configuration includes; of a directory an empty text.
fn included(backup: &Backup, path: &str) -> anyhow::Result<Option<Vec<u8>>> {
    if engine::format::manifest::path::check(path).is_err() {
        return Ok(None);
    }
    let directory = backup.manifest.file(path)?.is_some_and(|file| file.kind == FileKind::Directory);
    if directory { Ok(Some(Vec::new())) } else { small_file(backup, path) }
}

fn look_at_port(request: &Request, info: Option<&BackupInfo>, contents: &Contents) -> PortFacts {
    let setting = |name: &str| {
        let from_files =
            [&contents.auto, &contents.conf].into_iter().flatten().find_map(|text| conf::value_of(text, name));
        from_files.or_else(|| info?.server.settings.get(name).cloned())
    };
    let number = request.port.or_else(|| setting("port")?.parse().ok()).unwrap_or(5432);
    let addresses = setting("listen_addresses").unwrap_or_else(|| "localhost".to_owned());
    let sockets = setting("unix_socket_directories").unwrap_or_else(|| "/var/run/postgresql".to_owned());
    let in_use = |number: u16| port_in_use(number, &addresses, &sockets);
    let suggestion = || (number.checked_add(1)?..=number.saturating_add(100)).find(|number| in_use(*number).is_none());
    let used = in_use(number);
    PortFacts { number, suggestion: used.as_ref().and_then(|_| suggestion()), in_use: used }
}

/// What uses a port, on the addresses and in the socket directories of the configuration.
fn port_in_use(number: u16, addresses: &str, sockets: &str) -> Option<String> {
    let names =
        |list: &str| list.split(',').map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()).collect();
    let addresses: Vec<String> = names(addresses);
    let address = addresses.iter().find_map(|address| {
        let host = if address == "*" { "0.0.0.0" } else { address.as_str() };
        let refused = TcpListener::bind((host, number)).err()?;
        (refused.kind() == ErrorKind::AddrInUse).then(|| format!("{host}:{number}"))
    });
    let sockets: Vec<String> = names(sockets);
    address.or_else(|| {
        sockets
            .iter()
            .map(|directory| format!("{directory}/.s.PGSQL.{number}"))
            .find(|path| UnixStream::connect(path).is_ok())
    })
}

/// A line that includes something: its directive, the path, and whether PostgreSQL starts without.
type Include = (String, String, bool);

fn in_settings(text: &[u8]) -> Vec<Include> {
    let entries = conf::entries(text).into_iter().filter(|entry| entry.name.starts_with("include"));
    let demanded = |name: &str| ["include", "include_dir"].contains(&name);
    entries
        .map(|entry| (demanded(&entry.name), entry))
        .map(|(demanded, entry)| (entry.name, entry.value, demanded))
        .collect()
}

fn in_authentication(text: &[u8]) -> Vec<Include> {
    let all = hba::inclusions(text).into_iter();
    all.map(|one| (one.directive().to_owned(), one.path, one.kind != hba::Kind::IfExists)).collect()
}

/// What a configuration demands, the files that it includes as well: PostgreSQL does not start without. `stored` is
/// what the backup has: of a directory an empty text. `include_if_exists` may be missing.
fn missing_includes(
    conf: &[u8],
    includes: &dyn Fn(&[u8]) -> Vec<Include>,
    stored: &dyn Fn(&str) -> anyhow::Result<Option<Vec<u8>>>,
) -> anyhow::Result<Vec<(String, String)>> {
    let mut missing = Vec::new();
    let mut waiting = vec![(PathBuf::new(), conf.to_vec())];
    for _ in 0..INCLUDES_MAX {
        let Some((directory, text)) = waiting.pop() else { break };
        for (name, value, demanded) in includes(&text) {
            let path = directory.join(&value);
            let here = match path.to_str().filter(|_| path.is_relative()) {
                Some(relative) => match stored(relative.trim_end_matches('/'))? {
                    Some(text) => {
                        waiting.push((path.parent().unwrap_or(Path::new("")).to_owned(), text));
                        true
                    }
                    None => false,
                },
                None => path.exists(),
            };
            if demanded && !here {
                missing.push((name, value));
            }
        }
    }
    Ok(missing)
}

fn owner_reads(owner: &Owner, request: &Request) -> Result<(), String> {
    let cluster = request.repository.join("clusters").join(request.cluster.as_str());
    let runs = format!(
        "{} cannot run {}, which PostgreSQL needs as its restore_command",
        owner.name,
        request.program.display()
    );
    let mut asked = vec![("-x", request.program.clone(), runs)];
    if request.repository.is_file() {
        // The way to a mount service is given to that user once the restore begins.
        let directory = request.repository.parent().unwrap_or(Path::new("/"));
        let reaches = format!("{} cannot reach {}", owner.name, request.repository.display());
        asked.push(("-x", directory.to_owned(), reaches));
    } else {
        for (flag, path) in [
            ("-r", request.repository.join("pghydrant.json")),
            ("-r", cluster.join("cluster.json")),
            ("-x", cluster.join("wal")),
        ] {
            if path.exists() {
                let what = "which holds the WAL that PostgreSQL fetches";
                let reads = format!("{} cannot read {}, {what}", owner.name, path.display());
                asked.push((flag, path, reads));
            }
        }
    }
    // Programs that hardly do anything, side by side: each takes some milliseconds to start.
    std::thread::scope(|scope| {
        let tests: Vec<_> =
            asked.iter().map(|(flag, path, _)| scope.spawn(|| owner.test(flag, path).unwrap_or(false))).collect();
        let may: Vec<bool> = tests.into_iter().map(|test| test.join().unwrap_or(false)).collect();
        let refused = asked.iter().zip(may).find(|(_, may)| !may);
        refused.map_or(Ok(()), |((_, _, why), _)| Err(why.clone()))
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn root_runs_nothing_as_a_user_that_only_the_backup_names() {
        let owner = |name: &str, uid| Owner { name: name.to_owned(), uid, gid: 100, home: "/".into() };
        for usual in [None, Some(owner("postgres", 101)), Some(owner("root", 0))] {
            assert_eq!(refuse_recorded(usual.as_ref()), Ok(()));
        }
        let refused = refuse_recorded(Some(&owner("alice", 1000))).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "the backup says that its server ran as alice: root runs nothing as that user unasked\n\
             hint: if the instance is to run as alice, say so: --os-user alice"
        );
    }

    #[test]
    fn an_include_that_only_the_original_has_is_told() {
        let conf = b"include '/no/such/file'\ninclude_dir='conf.d'\ninclude_if_exists '/no/such/other'\n\
                     include_dir '/'\ninclude = 'more/a.conf'\ninclude gone.conf\n";
        let stored = |path: &str| {
            Ok(match path {
                "conf.d" => Some(Vec::new()),
                "more/a.conf" => Some(b"include b.conf\ninclude_if_exists c.conf\n".to_vec()),
                _ => None,
            })
        };
        let missing = missing_includes(conf, &in_settings, &stored).unwrap();
        let missing: Vec<_> = missing.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        assert_eq!(missing, [("include", "/no/such/file"), ("include", "gone.conf"), ("include", "b.conf")]);
    }
}
