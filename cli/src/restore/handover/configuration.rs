//! A configuration outside the data directory: complete, with the places of the instance in it.
//!
//! It has what `postgresql.conf`, `pg_hba.conf` and `pg_ident.conf` of the restored data directory say and include from
//! there, at the same relative paths, so that relative includes lead to its own files.
//!
//! A file names the session while the directory is being filled, and `postgresql.conf` comes last. So after a crash an
//! unfinished directory is known as ours and filled again, and a finished one is left alone, since somebody may have
//! mended it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _, fchown};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use engine::Error;
use engine::io::durable;
use engine::units::SessionId;
use rustix::fs::{Mode, OFlags};

use super::super::conf::{self, Setting};
use super::super::configure::Configuration;
use super::super::plan::{Before, Plan, User};
use super::super::{files, hba};
use super::{Placed, debian};
use crate::exit::{Exit, Failure};
use crate::postgres::owner::Owner;

const CONF: &str = "postgresql.conf";
const AUTHENTICATION: [(&str, &str); 2] = [("hba_file", "pg_hba.conf"), ("ident_file", "pg_ident.conf")];
/// Says whose an unfinished directory is.
const MARK: &str = ".pghydrant-session";
/// What leads here is a circle.
const FILES_MAX: usize = 1000;

impl Configuration<'_> {
    /// Marks the directory as ours, before anything names it.
    pub(in crate::restore) fn claim_elsewhere(&self, placed: &Placed) -> anyhow::Result<()> {
        let (plan, id) = (self.plan(), self.id());
        if is_of(&placed.place.path, plan.data())? { Ok(()) } else { begin(placed, plan, id).map(drop) }
    }

    /// Fills the directory, unless that is done.
    pub(in crate::restore) fn place_elsewhere(&self, placed: &Placed, owner: &Owner) -> anyhow::Result<()> {
        let (plan, id, to) = (self.plan(), self.id(), placed.place.path.as_path());
        if is_of(to, plan.data())? {
            files::remove(&to.join(MARK))?;
            return files::give(to, &plan.owner);
        }
        let held = begin(placed, plan, id)?;
        let mut gathered = Gathered::default();
        let text = files::read(&plan.data().join(CONF))?.unwrap_or_default();
        gathered.settings(plan.data(), Path::new(CONF), text)?;
        let path = |path: &Path| path.to_str().map(str::to_owned).context("a path is not UTF-8");
        let mut settings = vec![Setting::new("data_directory", path(plan.data())?)];
        for (setting, name) in AUTHENTICATION {
            let in_force = PathBuf::from(self.effective(owner, setting)?);
            let inside = if in_force.starts_with(plan.data()) { in_force } else { plan.data().join(name) };
            let text = files::read(&inside)?.unwrap_or_default();
            gathered.authentication(inside.parent().unwrap_or(plan.data()), Path::new(name), text)?;
            settings.push(Setting::new(setting, path(&to.join(name))?));
        }
        if let Some(cluster) = &placed.cluster {
            settings.push(Setting::new("external_pid_file", cluster.pid_file()));
        }
        let chosen = |setting: &&Setting| !settings.iter().any(|ours| ours.name == setting.name);
        let chosen: Vec<Setting> = self.kept_in_conf().into_iter().filter(|setting| chosen(&setting)).collect();
        settings.extend(chosen);
        let text = gathered.files.remove(Path::new(CONF)).unwrap_or_default();
        let text = Self::with_kept(&text, &settings);

        if let Some(cluster) = &placed.cluster {
            for (name, text) in debian::FILES {
                gathered.files.insert(PathBuf::from(name), text.as_bytes().to_vec());
            }
            debian::make_log(cluster, &plan.owner)?;
        }
        let written = write(&held, &gathered, &text, &Modes::of(placed), &plan.owner);
        written.with_context(|| format!("cannot write the configuration in {}", to.display()))
    }
}

/// Writes what was gathered, `postgresql.conf` last.
fn write(held: &Held, gathered: &Gathered, conf: &[u8], modes: &Modes, owner: &User) -> anyhow::Result<()> {
    let to = held.path.as_path();
    let names: Vec<&str> = gathered.files.keys().filter_map(|path| path.file_name()?.to_str()).chain([CONF]).collect();
    files::remove_parts(to, &names)?;
    for directory in &gathered.directories {
        make_directory(&to.join(directory), modes.directory)?;
        files::remove_parts(&to.join(directory), &names)?;
    }
    for (name, text) in &gathered.files {
        let authenticates = AUTHENTICATION.iter().any(|(_, known)| Path::new(known) == name);
        let mode = if authenticates { modes.authentication } else { modes.file };
        files::write(&to.join(name), text, mode, owner)?;
    }
    for directory in &gathered.directories {
        durable::sync_directory(&to.join(directory))?;
        files::give(&to.join(directory), owner)?;
    }
    files::write(&to.join(CONF), conf, modes.file, owner)?;
    files::remove(&to.join(MARK))?;
    durable::sync_directory(to)?;
    held.give(owner)
}

/// The directory, open. Its name may lead elsewhere at any moment: the directory above can be the instance's owner's, who
/// then could have root write and remove wherever a link leads. So root takes the directory itself for its own, works in
/// that one whatever its name is, and gives it to the owner at the end.
struct Held {
    directory: File,
    path: PathBuf,
}

impl Held {
    fn open(path: &Path) -> anyhow::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = rustix::fs::open(path, flags, Mode::empty()).map(File::from);
        let directory = directory.map_err(|cause| Error::io("open", path, cause))?;
        if !rustix::process::geteuid().is_root() {
            return Ok(Self { directory, path: path.to_owned() });
        }
        let path = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()));
        Ok(Self { directory, path })
    }

    /// From here on nobody but root changes what is in it.
    fn take(&self) -> anyhow::Result<()> {
        self.give_to(0, None)
    }

    fn give(&self, owner: &User) -> anyhow::Result<()> {
        self.give_to(owner.uid, Some(owner.gid))
    }

    fn give_to(&self, uid: u32, gid: Option<u32>) -> anyhow::Result<()> {
        if !rustix::process::geteuid().is_root() {
            return Ok(());
        }
        let given = fchown(&self.directory, Some(uid), gid);
        Ok(given.map_err(|cause| Error::io("change the owner of", &self.path, cause))?)
    }

    /// The mark of this session is in it, or nothing is; else a name.
    fn foreign(&self, id: &SessionId) -> anyhow::Result<Option<String>> {
        if files::read(&self.path.join(MARK))?.as_deref() == Some(id.to_string().as_bytes()) {
            return Ok(None);
        }
        files::remove_parts(&self.path, &[MARK])?;
        let failed = |cause| Error::io("list", &self.path, cause);
        let first = std::fs::read_dir(&self.path).map_err(failed)?.next().transpose().map_err(failed)?;
        Ok(first.map(|entry| entry.file_name().to_string_lossy().into_owned()))
    }
}

/// Whether the directory has a finished configuration of this instance.
fn is_of(to: &Path, data: &Path) -> anyhow::Result<bool> {
    let text = files::read(&to.join(CONF))?;
    let of = text.and_then(|text| conf::value_of(&text, "data_directory"));
    Ok(of.is_some_and(|of| Path::new(&of) == data))
}

/// Makes the directory and marks it as ours; one that has something else in it is left alone.
fn begin(placed: &Placed, plan: &Plan, id: &SessionId) -> anyhow::Result<Held> {
    let to = placed.place.path.as_path();
    for missing in &placed.place.missing_parents {
        let made = std::fs::DirBuilder::new().mode(0o755).create(missing);
        made.or_else(unless_there).map_err(|cause| Error::io("create", missing, cause))?;
    }
    make_directory(to, Modes::of(placed).directory)?;
    let held = Held::open(to)?;
    let before = held.directory.metadata().map_err(|cause| Error::io("examine", to, cause))?.uid();
    let mut foreign = held.foreign(id)?;
    if foreign.is_none() {
        held.take()?;
        // Again: until now others could put something there.
        foreign = held.foreign(id)?;
        if foreign.is_some() {
            held.give_to(before, None)?;
        }
    }
    if let Some(name) = foreign {
        let message = format!("{} is not empty any more: it holds {name:?}", to.display());
        return Err(Failure::new(Exit::Failed, message)
            .hint(format!("nothing there is written over: empty it, then `pghydrant retry {id}`"))
            .into());
    }
    files::write(&held.path.join(MARK), id.to_string().as_bytes(), 0o600, &plan.owner)?;
    durable::sync_directory(to.parent().unwrap_or(Path::new("/")))?;
    Ok(held)
}

/// Removes what a session has put there.
pub(super) fn take_away(placed: &Placed, data: &Path, id: &SessionId) -> anyhow::Result<()> {
    let to = placed.place.path.as_path();
    if !to.is_dir() {
        return Ok(());
    }
    let held = Held::open(to)?;
    let begun = files::read(&held.path.join(MARK))?.as_deref() == Some(id.to_string().as_bytes());
    if !begun && !is_of(&held.path, data)? {
        return Ok(());
    }
    held.take()?;
    let entries = std::fs::read_dir(&held.path).map_err(|cause| Error::io("list", to, cause))?;
    for entry in entries {
        let name = entry.map_err(|cause| Error::io("list", to, cause))?.file_name();
        if name != MARK {
            files::remove(&held.path.join(name))?;
        }
    }
    files::remove(&held.path.join(MARK))?;
    if placed.place.before == Before::Absent {
        // None of this removes what is not empty.
        let made = std::iter::once(&placed.place.path).chain(placed.place.missing_parents.iter().rev());
        let _ = made.map(std::fs::remove_dir).take_while(Result::is_ok).count();
    }
    Ok(())
}

fn unless_there(cause: std::io::Error) -> std::io::Result<()> {
    if cause.kind() == std::io::ErrorKind::AlreadyExists { Ok(()) } else { Err(cause) }
}

/// Makes a directory with this very mode, whatever the umask is; one that is there stays as it is.
fn make_directory(path: &Path, mode: u32) -> anyhow::Result<()> {
    match std::fs::DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => {
            let set = std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode));
            Ok(set.map_err(|cause| Error::io("change the mode of", path, cause))?)
        }
        Err(cause) => Ok(unless_there(cause).map_err(|cause| Error::io("create", path, cause))?),
    }
}

/// Who may read it: the owner alone, but for Debian's programs, which everybody may use.
struct Modes {
    directory: u32,
    file: u32,
    authentication: u32,
}

impl Modes {
    fn of(placed: &Placed) -> Self {
        match placed.cluster {
            Some(_) => Self { directory: 0o755, file: 0o644, authentication: 0o640 },
            None => Self { directory: 0o700, file: 0o600, authentication: 0o600 },
        }
    }
}

/// Files with what they include, by their paths relative to where they are read and to where they go.
#[derive(Debug, Default)]
struct Gathered {
    files: BTreeMap<PathBuf, Vec<u8>>,
    directories: BTreeSet<PathBuf>,
}

/// Of a file's text, what it includes: whether each is a directory, and its path.
type Includes<'a> = &'a dyn Fn(&[u8]) -> Vec<(bool, String)>;

impl Gathered {
    fn settings(&mut self, root: &Path, name: &Path, text: Vec<u8>) -> anyhow::Result<()> {
        self.follow(root, name, text, &|text| {
            let entries = conf::entries(text).into_iter();
            let includes = entries.filter(|entry| entry.name.starts_with("include"));
            includes.map(|entry| (entry.name == "include_dir", entry.value)).collect()
        })
    }

    fn authentication(&mut self, root: &Path, name: &Path, text: Vec<u8>) -> anyhow::Result<()> {
        self.follow(root, name, text, &|text| {
            let includes = hba::inclusions(text).into_iter();
            includes.map(|inclusion| (inclusion.kind == hba::Kind::Directory, inclusion.path)).collect()
        })
    }

    /// Takes a file and all that it includes by a relative path below `root`.
    fn follow(&mut self, root: &Path, name: &Path, text: Vec<u8>, includes: Includes<'_>) -> anyhow::Result<()> {
        let mut waiting = vec![(name.to_owned(), text)];
        while let Some((name, text)) = waiting.pop() {
            if self.files.contains_key(&name) {
                continue;
            }
            anyhow::ensure!(self.files.len() < FILES_MAX, "the configuration has more than {FILES_MAX} files");
            let above = name.parent().unwrap_or(Path::new("")).to_owned();
            for (is_directory, path) in includes(&text) {
                let Some(included) = below(&above, &path) else { continue };
                if is_directory {
                    self.directory(&included);
                    for name in conf_files(&root.join(&included))? {
                        if let Some(text) = files::read(&root.join(&included).join(&name))? {
                            waiting.push((included.join(name), text));
                        }
                    }
                } else if let Some(text) = files::read(&root.join(&included))? {
                    waiting.push((included, text));
                }
            }
            self.directory(&above);
            self.files.insert(name, text);
        }
        Ok(())
    }

    fn directory(&mut self, path: &Path) {
        let all: Vec<PathBuf> = path.ancestors().map(Path::to_owned).collect();
        self.directories.extend(all.into_iter().filter(|path| !path.as_os_str().is_empty()));
    }
}

/// A relative path without `.` and `..`; none where it leads out.
fn below(above: &Path, path: &str) -> Option<PathBuf> {
    use std::path::Component;
    let mut place = above.to_owned();
    for part in Path::new(path).components() {
        match part {
            Component::Normal(name) => place.push(name),
            Component::CurDir => {}
            Component::ParentDir => place.pop().then_some(())?,
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    (!place.as_os_str().is_empty()).then_some(place)
}

/// What PostgreSQL reads of an included directory.
fn conf_files(directory: &Path) -> anyhow::Result<Vec<String>> {
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(cause) => return Err(Error::io("list", directory, cause).into()),
    };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    Ok(names.filter(|name| name.ends_with(".conf") && !name.starts_with('.')).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn only_what_the_session_has_put_there_is_taken_away() {
        let root = tempfile::tempdir().unwrap();
        let place = super::super::super::plan::Place {
            path: root.path().join("above/etc"),
            before: Before::Absent,
            missing_parents: vec![root.path().join("above")],
        };
        let placed = Placed { place, cluster: None };
        let (to, data) = (placed.place.path.clone(), Path::new("/srv/data"));
        let id = |text: &str| SessionId::try_from(text.to_owned()).unwrap();
        let (ours, other) = (id("20261122T081500Z-3f9a1c"), id("20261122T081500Z-3f9a1d"));
        let fill = |mark: Option<&SessionId>, conf: &str| {
            std::fs::create_dir_all(to.join("conf.d")).unwrap();
            std::fs::write(to.join("conf.d/a.conf"), "").unwrap();
            std::fs::write(to.join(CONF), conf).unwrap();
            if let Some(id) = mark {
                std::fs::write(to.join(MARK), id.to_string()).unwrap();
            }
        };
        for (mark, conf, goes) in [
            (Some(&ours), "", true),
            (None, "data_directory = '/srv/data'", true),
            (Some(&other), "", false),
            (None, "data_directory = '/srv/other'", false),
        ] {
            fill(mark, conf);
            take_away(&placed, data, &ours).unwrap();
            assert_eq!(!root.path().join("above").exists(), goes, "{mark:?} {conf}");
            let _ = std::fs::remove_dir_all(root.path().join("above"));
        }
        take_away(&placed, data, &ours).unwrap();
    }

    #[test]
    fn relative_includes_are_followed_and_those_that_lead_out_are_not() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("conf.d/more")).unwrap();
        std::fs::create_dir(root.path().join("empty")).unwrap();
        for (name, text) in [
            ("conf.d/a.conf", "include 'more/b.inc'\ninclude '../c'"),
            ("conf.d/not-read", ""),
            ("conf.d/more/b.inc", "include '../a.conf'"),
            ("c", "include_if_exists 'none'\ninclude '/etc/passwd'\ninclude '../../x'"),
            ("users", "a, @more_users"),
            ("more_users", "b"),
        ] {
            std::fs::write(root.path().join(name), text).unwrap();
        }
        let mut gathered = Gathered::default();
        let conf = b"include_dir 'conf.d'\ninclude_dir = './empty'\n".to_vec();
        gathered.settings(root.path(), Path::new(CONF), conf).unwrap();
        gathered.authentication(root.path(), Path::new("pg_hba.conf"), b"local all @users peer".to_vec()).unwrap();
        let files: Vec<_> = gathered.files.keys().map(|path| path.to_str().unwrap()).collect();
        let wanted =
            ["c", "conf.d/a.conf", "conf.d/more/b.inc", "more_users", "pg_hba.conf", "postgresql.conf", "users"];
        assert_eq!(files, wanted);
        let directories: Vec<_> = gathered.directories.iter().map(|path| path.to_str().unwrap()).collect();
        assert_eq!(directories, ["conf.d", "conf.d/more", "empty"]);
    }
}
