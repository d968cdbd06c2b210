//! The configuration of a restored instance, in three states.
//!
//! | | `postgresql.conf` | `postgresql.auto.conf` |
//! |---|---|---|
//! | while it recovers | a block at its end: target, `restore_command`, private socket, own `pg_hba.conf` | what would overrule the block is silenced |
//! | afterwards | byte for byte the backup's, and a block with what the user chose to keep | the backup's |
//! | not adopted | the same | a block that keeps the copy away from the original's archive and replication |
//!
//! Where the configuration goes elsewhere as well ([`super::handover`]), the block that stays in `postgresql.conf` ends with
//! a line that includes that one, if it is there.
//!
//! The blocks that stay carry no session's id: a copy of a copy has one of each, not one for every restore.
//!
//! The settings of the recovery stand in the file, not on the server's command line, so that they survive a reload, a
//! crash and a reboot: until the server has left recovery, whoever starts it recovers to the target that was asked
//! for. Then the file is reverted and the server started once more, since neither the socket nor the `pg_hba.conf` of
//! a running server can be changed; that start also proves that the instance runs with the configuration that it will
//! have from then on.
//!
//! The isolation of a copy stands in `postgresql.auto.conf`: it must win over every file, it leaves `postgresql.conf`
//! alone, and `ALTER SYSTEM RESET` lifts it, setting by setting.
//!
//! Whether a setting would lead the copy into directories of the original is asked of PostgreSQL itself
//! (`postgres -C`), which knows about included files, defaults and quoting: [`kept`].

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use engine::format::backup::BackupInfo;
use engine::units::SessionId;
use serde::{Deserialize, Serialize};

use super::conf::{self, Setting};
use super::effective::Effective;
use super::files;
use super::isolation::Isolation;
use super::kept;
use super::plan::Plan;
use super::session::Journal;
use super::standby::{RECOVERY_SIGNAL, STANDBY_SIGNAL};
use crate::postgres::binaries::Binaries;
use crate::postgres::control::ControlFile;
use crate::postgres::owner::Owner;

/// What the files were before they were edited.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Originals {
    /// BLAKE3 of `postgresql.conf`, without what stays; none if the backup has none: the original's lies elsewhere.
    pub(crate) conf: Option<String>,
    /// BLAKE3 of `postgresql.auto.conf`, without what stays.
    pub(crate) auto: Option<String>,
    /// The settings that keep the copy out of the original's directories, and the port; they stay.
    pub(crate) kept: Vec<(String, String)>,
}

/// What reverting came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reverted {
    /// Names of the settings that stay in `postgresql.conf`.
    pub(crate) kept: Vec<String>,
    /// Files that somebody changed meanwhile: reverted, with the change in them.
    pub(crate) changed_meanwhile: Vec<&'static str>,
    /// What `ALTER SYSTEM` set or reset meanwhile, by name.
    pub(crate) altered: Vec<String>,
}

const CONF: &str = "postgresql.conf";
const AUTO: &str = "postgresql.auto.conf";
/// In the session's directory, as the backup has it.
const AUTO_ORIGINAL: &str = "postgresql.auto.conf.original";
/// What the blocks that stay are marked with.
const KEPT: &str = "kept settings";
const KEPT_WHY: &str = "Chosen for this copy, and what keeps it out of the original's directories.";
const ISOLATED: &str = "isolated copy";
const FIRST_START: &str = "first start";

/// A socket's path, with `/.s.PGSQL.65535` behind the directory, must fit `sockaddr_un`.
const SOCKET_DIRECTORY_BYTES_MAX: usize = 107 - "/.s.PGSQL.65535".len();

/// The configuration of one restore.
#[derive(Debug)]
pub(crate) struct Configuration<'a> {
    plan: &'a Plan,
    id: &'a SessionId,
    backup: &'a BackupInfo,
    /// The command that PostgreSQL fetches WAL with.
    restore_command: String,
    /// What the original raised after the backup, and replay needs.
    raised: &'a BTreeMap<String, String>,
    /// As it was decided when the configuration was begun.
    isolation: Option<&'a Isolation>,
    /// What stays in `postgresql.conf` for good.
    kept: &'a [(String, String)],
}

impl<'a> Configuration<'a> {
    /// The configuration of a session; `program` is our own binary, as the owner can run it.
    pub(crate) fn new(journal: &'a Journal, backup: &'a BackupInfo, program: &Path) -> Self {
        let Journal { plan, id, raised, isolation, originals, .. } = journal;
        let restore_command = restore_command(program, plan);
        let kept = originals.as_ref().map_or(&[][..], |originals| &originals.kept);
        Self { plan, id, backup, restore_command, raised, isolation: isolation.as_ref(), kept }
    }

    /// Decides how the copy is kept from what its original does; nothing for an adopted one. From files as the backup
    /// has them, so it is done once, and goes into the journal before anything is written into them.
    pub(crate) fn isolate(&self, binaries: &Binaries, owner: &Owner) -> anyhow::Result<Option<Isolation>> {
        if self.plan.adopt {
            return Ok(None);
        }
        self.undo()?;
        self.write_missing_files()?;
        let mut auto = files::read(&self.plan.data().join(AUTO))?.unwrap_or_default();
        if conf::has_block(&auto, ISOLATED) {
            // The original was an isolated copy itself; what was off there is off here.
            auto = conf::without_block(&auto, ISOLATED);
            self.write(AUTO, &auto)?;
        }
        let known = Effective::ask(binaries, owner, self.plan.data(), &Isolation::asks_for())?;
        Isolation::of(&|name| known.of(name), &|name| conf::value_of(&auto, name)).map(Some)
    }

    /// Edits the files for the recovery and puts its signal file in place. Can be done again after a crash anywhere
    /// in it.
    pub(crate) fn begin(&self, binaries: &Binaries, owner: &Owner) -> anyhow::Result<Originals> {
        self.undo()?;
        let data = self.plan.data();
        let had_conf = files::read(&data.join(CONF))?;
        self.write_missing_files()?;
        let original_conf = files::read(&data.join(CONF))?.unwrap_or_default();
        let original_auto = files::read(&data.join(AUTO))?;
        let kept = kept::settings(self.plan, self.own_statistics(), binaries, owner)?;
        let session = self.plan.session_directory();
        files::write(&session.join("postgresql.conf.original"), &original_conf, 0o600, &self.plan.owner)?;
        if let Some(auto) = &original_auto {
            files::write(&session.join(AUTO_ORIGINAL), auto, 0o600, &self.plan.owner)?;
        }
        let originals = Originals {
            conf: had_conf.map(|bytes| hash(&bare(&bytes))),
            auto: original_auto.as_deref().map(|bytes| hash(&bare(bytes))),
            kept: kept.into_iter().map(|setting| (setting.name, setting.value)).collect(),
        };
        self.make_socket_directory()?;
        files::write(&session.join(HBA), PRIVATE_HBA.as_bytes(), 0o600, &self.plan.owner)?;
        files::write(&session.join(IDENT), b"", 0o600, &self.plan.owner)?;

        let recovery = self.recovery_settings()?;
        let names: Vec<&str> = recovery.iter().map(|setting| setting.name.as_str()).collect();
        // auto.conf first: a block that is overruled would be worse than none.
        let auto = conf::silenced(&original_auto.clone().unwrap_or_default(), &self.stamp(), &names);
        let auto = self.isolated(&auto);
        if original_auto.is_some() || !auto.is_empty() {
            self.write(AUTO, &auto)?;
        }
        let why = "Only until the server has left recovery; `pghydrant restore` takes it out again.\n\
                   Until then a start of this server recovers to this target.";
        self.write(CONF, &conf::with_block(&original_conf, &self.stamp(), why, &recovery))?;
        self.signal()?;
        Ok(originals)
    }

    /// Before each start while it recovers: the settings as the plan has them now (a `promote` changes the action),
    /// and a directory for the socket, which a reboot may have taken.
    pub(crate) fn prepare_start(&self) -> anyhow::Result<()> {
        self.make_socket_directory()?;
        // A standby may have a target, but a recovery without one opens at the end of the WAL: never `recovery.signal`
        // beside settings that are not its own.
        if self.plan.target.waits_at_the_end() {
            self.signal()?;
        }
        let settings = self.recovery_settings()?;
        let names: Vec<&str> = settings.iter().map(|setting| setting.name.as_str()).collect();
        if let Some(auto) = files::read(&self.plan.data().join(AUTO))? {
            self.write(AUTO, &conf::silenced(&auto, &self.stamp(), &names))?;
        }
        let conf = files::read(&self.plan.data().join(CONF))?.unwrap_or_default();
        let why = "Only until the server has left recovery; `pghydrant restore` takes it out again.";
        self.write(CONF, &conf::with_block(&conf, &self.stamp(), why, &settings))?;
        self.signal()
    }

    /// Whether the recovery's settings are in the configuration.
    pub(crate) fn is_in_force(&self) -> anyhow::Result<bool> {
        let conf = files::read(&self.plan.data().join(CONF))?;
        Ok(conf.is_some_and(|conf| conf::has_block(&conf, &self.stamp())))
    }

    /// What a hot standby needs more of than the configuration gives: it refuses to start with less than `pg_control` has.
    pub(crate) fn too_small(
        &self,
        binaries: &Binaries,
        owner: &Owner,
        control: &ControlFile,
    ) -> anyhow::Result<Vec<Setting>> {
        let mut lacking = Vec::new();
        let needs = control.hot_standby_needs();
        let known = Effective::ask(binaries, owner, self.plan.data(), &needs.map(|(name, _)| name))?;
        for (name, needed) in needs {
            let given = known.of(name)?;
            if given.parse().is_ok_and(|given: u32| given < needed) {
                lacking.push(Setting::new(name, needed.to_string()));
            }
        }
        Ok(lacking)
    }

    /// Takes the recovery's settings out, and leaves what stays. Can be done again.
    pub(crate) fn revert(&self, originals: &Originals) -> anyhow::Result<Reverted> {
        self.remove_parts()?;
        let mut changed_meanwhile = Vec::new();
        let mut original = |name: &'static str, wanted: &Option<String>| -> anyhow::Result<Option<Vec<u8>>> {
            let text = self.original(name)?;
            if wanted.as_ref().is_some_and(|wanted| *wanted != hash(&bare(text.as_deref().unwrap_or_default()))) {
                changed_meanwhile.push(name);
            }
            Ok(text)
        };
        let (conf, mut auto) = (original(CONF, &originals.conf)?, original(AUTO, &originals.auto)?);
        let mut altered = Vec::new();
        if let Some(saved) = files::read(&self.plan.session_directory().join(AUTO_ORIGINAL))?
            && changed_meanwhile.contains(&AUTO)
        {
            let (text, names) = self.with_alterations(&saved, auto.as_deref().unwrap_or_default())?;
            (auto, altered) = (Some(text), names);
        }
        let mut kept: Vec<Setting> = originals.kept.iter().map(|(name, value)| Setting::new(name, value)).collect();
        if let Some(placed) = &self.plan.handover.configuration {
            // The last word, and none where it is missing.
            let elsewhere = placed.place.path.join(CONF);
            let elsewhere = elsewhere.to_str().context("the path of the configuration is not UTF-8")?;
            kept.push(Setting::new("include_if_exists", elsewhere));
        }
        let names: Vec<&str> = kept.iter().map(|setting| setting.name.as_str()).collect();
        // Each file in one write: a crash in between leaves the one or the other, and both keep the copy isolated.
        let left = self.isolated(&conf::silenced(auto.as_deref().unwrap_or_default(), KEPT, &names));
        if auto.is_some() || !left.is_empty() {
            self.write(AUTO, &left)?;
        }
        let conf = conf.unwrap_or_default();
        let conf = if kept.is_empty() { conf } else { conf::with_block(&conf, KEPT, KEPT_WHY, &kept) };
        self.write(CONF, &conf)?;
        let left = files::read(&self.plan.data().join(CONF))?.unwrap_or_default();
        anyhow::ensure!(!conf::has_block(&left, &self.stamp()), "{CONF} still has the settings of the recovery");
        Ok(Reverted { kept: kept.into_iter().map(|setting| setting.name).collect(), changed_meanwhile, altered })
    }

    /// `ALTER SYSTEM` has written `postgresql.auto.conf` anew, without the lines that were silenced: what it changed goes
    /// into the file as it was saved. Our own isolation, a block no more, is not the user's.
    fn with_alterations(&self, saved: &[u8], found: &[u8]) -> anyhow::Result<(Vec<u8>, Vec<String>)> {
        let recovery = self.recovery_settings()?;
        let names: Vec<&str> = recovery.iter().map(|setting| setting.name.as_str()).collect();
        let saved = bare(saved);
        let written = conf::silenced(&saved, &self.stamp(), &names);
        Ok(conf::merged(&saved, &self.isolated(&written), &self.isolated(&bare(found))))
    }

    /// Everything for a first start that somebody else makes: `postgresql.conf` stays the backup's. What it may need to
    /// be told on the command line comes back: nothing but its own file can say where the data directory is.
    pub(crate) fn leave_for_first_start(&self, binaries: &Binaries, owner: &Owner) -> anyhow::Result<Option<Setting>> {
        self.undo()?;
        let data = self.plan.data();
        self.write_missing_files()?;
        let (elsewhere, kept): (Vec<_>, Vec<_>) = kept::settings(self.plan, self.own_statistics(), binaries, owner)?
            .into_iter()
            .partition(|setting| setting.name == "data_directory");
        let kept: Vec<Setting> =
            kept.into_iter().map(|setting| self.led_elsewhere(setting)).collect::<Result<_, _>>()?;
        let settings = self.first_start_settings();
        let names = |settings: &[Setting]| settings.iter().map(|setting| setting.name.clone()).collect::<Vec<_>>();
        let silenced = |text: &[u8], stamp: &str, names: &[String]| {
            conf::silenced(text, stamp, &names.iter().map(String::as_str).collect::<Vec<_>>())
        };
        let auto = files::read(&data.join(AUTO))?.unwrap_or_default();
        let auto = silenced(&auto, FIRST_START, &names(&settings));
        let mut auto = self.isolated(&silenced(&auto, KEPT, &names(&kept)));
        if !kept.is_empty() {
            auto = conf::with_block(&auto, KEPT, KEPT_WHY, &kept);
        }
        let why = "For the first start. Without recovery.signal, which PostgreSQL removes, they say nothing.";
        self.write(AUTO, &conf::with_block(&auto, FIRST_START, why, &settings))?;
        self.signal()?;
        Ok(elsewhere.into_iter().next())
    }

    /// `postgresql.auto.conf` has the last word, and would overrule a configuration elsewhere.
    fn led_elsewhere(&self, setting: Setting) -> anyhow::Result<Setting> {
        let Some(placed) = &self.plan.handover.configuration else { return Ok(setting) };
        let file = match (setting.name.as_str(), &placed.cluster) {
            ("hba_file", _) => placed.place.path.join(HBA),
            ("ident_file", _) => placed.place.path.join(IDENT),
            ("external_pid_file", Some(cluster)) => cluster.pid_file().into(),
            _ => return Ok(setting),
        };
        let value = file.to_str().context("the path of the configuration is not UTF-8")?;
        Ok(Setting::new(&setting.name, value))
    }

    /// The plan.
    pub(super) fn plan(&self) -> &'a Plan {
        self.plan
    }

    /// The session.
    pub(super) fn id(&self) -> &'a SessionId {
        self.id
    }

    /// What stays in `postgresql.conf`, but for the way elsewhere.
    pub(super) fn kept_in_conf(&self) -> Vec<Setting> {
        self.kept.iter().map(|(name, value)| Setting::new(name, value)).collect()
    }

    /// `text` with what stays, in the place of what stayed.
    pub(super) fn with_kept(text: &[u8], settings: &[Setting]) -> Vec<u8> {
        conf::with_block(text, KEPT, KEPT_WHY, settings)
    }

    /// What PostgreSQL itself makes of the data directory's configuration.
    pub(super) fn effective(&self, owner: &Owner, name: &str) -> anyhow::Result<String> {
        Effective::ask(&Binaries::in_directory(&self.plan.programs)?, owner, self.plan.data(), &[name])?.of(name)
    }

    /// What [`Self::leave_for_first_start`] leaves, and nobody takes out again.
    pub(crate) fn first_start_settings(&self) -> Vec<Setting> {
        let mut settings = self.plan.target.settings();
        settings.push(Setting::new("restore_command", self.restore_command.clone()));
        settings.extend(dangerous_commands());
        settings.extend(self.no_reading_ahead());
        // What an isolated copy keeps is not to be taken out.
        let stays = |name: &str| !self.plan.adopt && self.isolation.is_some_and(|isolation| isolation.has(name));
        settings.retain(|setting| !stays(&setting.name));
        settings
    }

    /// Says to PostgreSQL that it recovers from an archive, and whether it opens at the end. It removes both files when
    /// it has left recovery; where both are there, it is a standby.
    fn signal(&self) -> anyhow::Result<()> {
        let (ours, other) = match self.plan.target.waits_at_the_end() {
            true => (STANDBY_SIGNAL, RECOVERY_SIGNAL),
            false => (RECOVERY_SIGNAL, STANDBY_SIGNAL),
        };
        self.write(ours, b"")?;
        Ok(engine::io::durable::remove_durably(&self.plan.data().join(other))?)
    }

    /// Where the socket is while the server recovers.
    pub(crate) fn socket_directory(&self) -> PathBuf {
        Self::socket_directory_of(self.plan, self.id)
    }

    /// See [`Configuration::socket_directory`].
    pub(crate) fn socket_directory_of(plan: &Plan, id: &SessionId) -> PathBuf {
        let directory = plan.session_directory();
        let listed = directory.as_os_str().as_bytes();
        if listed.len() <= SOCKET_DIRECTORY_BYTES_MAX && !listed.contains(&b',') {
            return directory;
        }
        // Too long for a socket's path, or two of PostgreSQL's list. The name alone does not keep others out: `begin` makes
        // it ours alone.
        PathBuf::from(format!("/tmp/.pghydrant-{}-{id}", plan.owner.uid))
    }

    /// The port while the server recovers: only a part of the socket's name.
    pub(crate) fn recovery_port(&self) -> u16 {
        self.plan.port.unwrap_or(DEFAULT_PORT)
    }

    fn stamp(&self) -> String {
        format!("restore {}", self.id)
    }

    /// A file as the backup has it, with what others may have added since.
    fn original(&self, name: &str) -> anyhow::Result<Option<Vec<u8>>> {
        let text = files::read(&self.plan.data().join(name))?;
        Ok(text.map(|text| conf::restored(&conf::without_block(&text, &self.stamp()), &self.stamp())))
    }

    /// Puts both files back, before PostgreSQL can start here.
    fn undo(&self) -> anyhow::Result<()> {
        self.remove_parts()?;
        for name in [CONF, AUTO] {
            if let Some(original) = self.original(name)? {
                self.write(name, &original)?;
            }
        }
        Ok(())
    }

    /// The socket's directory, where the session's own would give too long a path.
    pub(crate) fn make_socket_directory(&self) -> anyhow::Result<()> {
        // The copier made the session's directory for itself; the server works in it too.
        files::give(&self.plan.session_directory(), &self.plan.owner)?;
        let directory = self.socket_directory();
        if directory == self.plan.session_directory() || files::make_directory(&directory, &self.plan.owner)? {
            return Ok(());
        }
        let metadata = std::fs::symlink_metadata(&directory);
        let metadata = metadata.map_err(|cause| engine::Error::io("stat", &directory, cause))?;
        let ours = metadata.is_dir() && metadata.uid() == self.plan.owner.uid && metadata.mode() & 0o077 == 0;
        anyhow::ensure!(
            ours,
            "{} is in the way: not a private directory of {}",
            directory.display(),
            self.plan.owner.name
        );
        Ok(())
    }

    /// What a crash left of files that were being written.
    fn remove_parts(&self) -> anyhow::Result<()> {
        files::remove_parts(self.plan.data(), &[CONF, AUTO, HBA, IDENT, RECOVERY_SIGNAL, STANDBY_SIGNAL])?;
        files::remove_parts(&self.plan.data().join("pg_wal"), &["pghydrant.copy"])
    }

    /// Takes away what lies outside the data directory.
    pub(crate) fn remove_socket_directory(&self) -> anyhow::Result<()> {
        let directory = self.socket_directory();
        if directory == self.plan.session_directory() { Ok(()) } else { files::remove(&directory) }
    }

    fn isolated(&self, auto: &[u8]) -> Vec<u8> {
        if self.plan.adopt {
            return conf::without_block(auto, ISOLATED);
        }
        let settings = self.isolation.map_or_else(|| Isolation::default().settings(), Isolation::settings);
        let why = "An isolated copy: it must not write into the original's archive, drain its replication slots, wait for\n\
                   its standbys or run its jobs. ALTER SYSTEM RESET lifts each; so does restoring with --adopt.";
        conf::with_block(auto, ISOLATED, why, &settings)
    }

    fn recovery_settings(&self) -> anyhow::Result<Vec<Setting>> {
        let session = self.plan.session_directory();
        let path = |path: PathBuf| path.to_str().map(str::to_owned).context("a path is not UTF-8");
        let mut settings = vec![
            Setting::new("data_directory", path(self.plan.data().to_owned())?),
            Setting::new("hba_file", path(session.join(HBA))?),
            Setting::new("ident_file", path(session.join(IDENT))?),
            Setting::new("external_pid_file", ""),
            Setting::new("unix_socket_directories", path(self.socket_directory())?),
            Setting::new("unix_socket_permissions", "0700"),
            Setting::new("unix_socket_group", ""),
            Setting::new("listen_addresses", ""),
            Setting::new("port", self.recovery_port().to_string()),
            Setting::new("ssl", "off"),
            // All words of the server in one file that is watched, in one language.
            Setting::new("logging_collector", "off"),
            Setting::new("log_destination", "stderr"),
            Setting::new("log_min_messages", "warning"),
            Setting::new("log_line_prefix", "%m [%p] "),
            Setting::new("log_error_verbosity", "default"),
            Setting::new("lc_messages", "C"),
            Setting::new("hot_standby", "on"),
            Setting::new("restore_command", self.restore_command.clone()),
        ];
        settings.extend(dangerous_commands());
        if self.backup.server.version_num < 160_000 {
            settings.push(Setting::new("promote_trigger_file", ""));
        }
        settings.extend(self.own_statistics());
        if self.backup.server.version_num >= 140_000 {
            // Before it recovers, PostgreSQL syncs every file, one by one. Ours are durable; one call covers the rest.
            settings.push(Setting::new("recovery_init_sync_method", "syncfs"));
        }
        if self.plan.target.waits_at_the_end() {
            // How soon it asks again for what was not there, and does what it was told meanwhile.
            settings.push(Setting::new("wal_retrieve_retry_interval", "500ms"));
        }
        settings.extend(self.raised.iter().map(|(name, value)| Setting::new(name, value)));
        settings.extend(self.no_reading_ahead());
        settings.extend(self.plan.target.settings());
        Ok(settings)
    }

    /// Before version 15 a server keeps its statistics in files while it runs, and clears their directory when it starts:
    /// Debian's lies in `/var/run/postgresql`, and is the original's as long as that runs.
    fn own_statistics(&self) -> Option<Setting> {
        let in_files = self.backup.server.version_num < 150_000;
        (in_files && !self.plan.adopt).then(|| Setting::new("stats_temp_directory", "pg_stat_tmp"))
    }

    /// Reading ahead, PostgreSQL asks for the segment behind its target before it is there. Where that one is missing
    /// and later ones exist, `wal fetch` calls it a fault, and the server would die of what it does not need.
    fn no_reading_ahead(&self) -> Option<Setting> {
        let reads_ahead = self.backup.server.version_num >= 150_000;
        (self.plan.gap_behind && reads_ahead).then(|| Setting::new("recovery_prefetch", "off"))
    }

    /// What the backup has not, since the original's lies where the backup could not read it: the least that a server
    /// needs, with what the original ran with and a hot standby must have.
    fn write_missing_files(&self) -> anyhow::Result<()> {
        let recorded = |name: &&str| Some(Setting::new(name, self.backup.server.settings.get(*name)?));
        let mut conf = format!(
            "# Written by pghydrant: the original's configuration lies in {}\n# and is not in the backup.\n",
            self.backup.server.outside_files.join(", ")
        );
        for setting in CARRIED.iter().filter_map(recorded) {
            conf.push_str(&format!("{} = {}\n", setting.name, conf::quoted(&setting.value)));
        }
        for (name, content) in [(CONF, conf.as_str()), (HBA, OWNERS_HBA), (IDENT, "")] {
            if files::read(&self.plan.data().join(name))?.is_none() {
                self.write(name, content.as_bytes())?;
            }
        }
        Ok(())
    }

    /// Writes a file of the data directory, with the mode that it has.
    fn write(&self, name: &str, bytes: &[u8]) -> anyhow::Result<()> {
        let path = self.plan.data().join(name);
        let mode = std::fs::metadata(&path).map_or(0o600, |metadata| metadata.permissions().mode() & 0o777);
        files::write(&path, bytes, mode, &self.plan.owner)
    }
}

const DEFAULT_PORT: u16 = 5432;
const HBA: &str = "pg_hba.conf";
const IDENT: &str = "pg_ident.conf";
/// Behind a directory that only the owner may enter.
const PRIVATE_HBA: &str =
    "# While the restore recovers: only through the private socket beside this file.\nlocal all all trust\n";
const OWNERS_HBA: &str =
    "# Written by pghydrant: the original's pg_hba.conf is not in the backup.\nlocal all all peer\n";
/// Recorded settings that a generated `postgresql.conf` needs: replay stops where a hot standby has less.
const CARRIED: [&str; 9] = [
    "port",
    "max_connections",
    "max_worker_processes",
    "max_wal_senders",
    "max_prepared_transactions",
    "max_locks_per_transaction",
    "shared_preload_libraries",
    "wal_level",
    "shared_buffers",
];

/// Commands and delays that a configuration made for a standby, or for the original, must not carry out here.
fn dangerous_commands() -> [Setting; 5] {
    [
        Setting::new("archive_cleanup_command", ""),
        Setting::new("recovery_end_command", ""),
        Setting::new("recovery_min_apply_delay", "0"),
        Setting::new("primary_conninfo", ""),
        Setting::new("primary_slot_name", ""),
    ]
}

/// `exec '/usr/bin/pghydrant' wal fetch …`: each word quoted for the shell, `%` doubled for PostgreSQL.
fn restore_command(program: &Path, plan: &Plan) -> String {
    let word = |path: &Path| format!("'{}'", path.to_string_lossy().replace('\'', r"'\''")).replace('%', "%%");
    let (program, repository) = (word(program), word(&plan.repository));
    // Without a shell that waits for it.
    format!("exec {program} wal fetch --repo {repository} --cluster '{}' %f %p", plan.cluster)
}

/// Whether a restore has left settings that stay in a `postgresql.conf`.
pub(crate) fn has_kept_settings(text: &[u8]) -> bool {
    conf::has_block(text, KEPT)
}

/// A file without what stays in it.
fn bare(text: &[u8]) -> Vec<u8> {
    [KEPT, ISOLATED].iter().fold(text.to_vec(), |text, stamp| conf::restored(&conf::without_block(&text, stamp), stamp))
}

fn hash(bytes: &[u8]) -> String {
    engine::checksum::Hash::of(bytes).to_string()
}
