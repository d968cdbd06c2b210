//! Where a restored instance is handed over to: a configuration elsewhere, Debian's list of clusters, a systemd unit.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::support::compare::tree;
use crate::support::tools::{find_program, postgres_program};
use crate::support::*;

fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// `pg_ctl -D DIRECTORY VERB`, as the server's user.
fn pg_ctl(directory: &Path, verb: &str, log: &Path) -> Result<()> {
    let run = Run::new(postgres_program("pg_ctl")?).user(OsUser::server()).args([verb, "-w", "-s", "-D"]);
    let run = run.arg(directory);
    if verb == "start" { run.arg("-l").arg(log) } else { run }.succeed()?;
    Ok(())
}

/// A cluster whose configuration is in several files, some of them named by others.
fn with_many_files() -> Result<World> {
    let world = World::new(0)?;
    let data = &world.cluster.data;
    fs::create_dir_all(data.join("conf.d/more"))?;
    fs::create_dir(data.join("empty.d"))?;
    for (name, text) in [
        ("conf.d/10-own.conf", "work_mem = '7MB'\ninclude 'more/deep.inc'\n"),
        ("conf.d/more/deep.inc", "maintenance_work_mem = '33MB'\n"),
        ("admins", "postgres, @more_admins\n"),
        ("more_admins", "somebody\n"),
    ] {
        fs::write(data.join(name), text)?;
    }
    world.cluster.configure("include_dir = 'conf.d'")?;
    world.cluster.configure("include_dir 'empty.d'")?;
    let hba = fs::read_to_string(data.join("pg_hba.conf"))?;
    fs::write(data.join("pg_hba.conf"), format!("local all @admins trust\n{hba}"))?;
    Run::new("chown")
        .args(["-R", &format!("{}:{}", OsUser::server().uid, OsUser::server().gid)])
        .arg(data)
        .succeed()?;
    world.cluster.restart()?;
    world.mark("there")?;
    world.backup()?;
    Ok(world)
}

/// The settings that tell which files a server has read.
fn files_of(instance: &Instance) -> Result<[String; 5]> {
    let of = |name: &str| instance.sql(&format!("SHOW {name}"));
    Ok([of("hba_file")?, of("ident_file")?, of("data_directory")?, of("work_mem")?, of("maintenance_work_mem")?])
}

#[test]
fn a_configuration_elsewhere_is_complete_and_the_data_directory_starts_with_it_and_without() -> Result<()> {
    requires!(Postgres);
    let world = with_many_files()?;
    let (target, elsewhere) = (world.target(), world.scratch.join("etc/15/restored"));
    let occupied = world.scratch.directory("occupied")?;
    fs::write(occupied.join("mine"), "")?;
    for bad in [&occupied, &target.join("within")] {
        let refused = world.restore_to(&target, &["--source", "blocks", "--config-to", &shown(bad)])?;
        refused.expect_code(3)?.expect_stderr(&[&shown(bad), "hint: "])?;
    }
    ensure!(!target.exists(), "something was touched");

    let restored = world.restore(&["--source", "blocks", "--config-to", &shown(&elsewhere)])?;
    let expected = [
        shown(&elsewhere.join("pg_hba.conf")),
        shown(&elsewhere.join("pg_ident.conf")),
        shown(&target),
        "7MB".to_owned(),
        "33MB".to_owned(),
    ];
    assert_eq!(files_of(&restored)?, expected);
    let names: Vec<String> = compare::files_below(&elsewhere)?.iter().map(|path| shown(path)).collect();
    let wanted = [
        "admins",
        "conf.d/10-own.conf",
        "conf.d/more/deep.inc",
        "more_admins",
        "pg_hba.conf",
        "pg_ident.conf",
        "postgresql.conf",
    ];
    assert_eq!(names, wanted);
    ensure!(elsewhere.join("empty.d").is_dir(), "an included directory is missing");
    // What is changed there counts, however the server is started.
    let own = elsewhere.join("conf.d/10-own.conf");
    let text = fs::read_to_string(&own)?;
    fs::write(&own, text.replace("7MB", "8MB"))?;
    let log = world.scratch.join("restored.log");
    for directory in [&elsewhere, &target] {
        pg_ctl(&target, "stop", &log)?;
        pg_ctl(directory, "start", &log)?;
        let again = files_of(&restored)?;
        assert_eq!((again[0].as_str(), again[3].as_str()), (expected[0].as_str(), "8MB"), "{}", directory.display());
        assert_eq!(restored.number("SHOW port")?, i64::from(restored.port));
    }
    // Its own backup has the configuration that is in force, and a copy of it needs nothing of this one.
    let connection = restored.connection_string();
    world.pghydrant.succeed(["init", "--repo", &shown(&world.scratch.join("second"))])?;
    let repository = ["--repo", &shown(&world.scratch.join("second")), "--cluster", "second"].map(str::to_owned);
    let verb = |name: &str, more: &[&str]| {
        let more = more.iter().map(|&text| text.to_owned());
        std::iter::once(name.to_owned()).chain(repository.clone()).chain(more).collect::<Vec<_>>()
    };
    restored.sql("ALTER SYSTEM RESET archive_mode")?;
    fs::remove_file(target.join("pg_wal/pghydrant.copy"))?;
    let push = format!(
        "{} wal push --repo {} --cluster second %p",
        world.pghydrant.binary.display(),
        world.scratch.join("second").display()
    );
    restored.sql(&format!("ALTER SYSTEM SET archive_command = '{push}'"))?;
    pg_ctl(&target, "stop", &log)?;
    pg_ctl(&target, "start", &log)?;
    world.pghydrant.succeed(verb("backup", &["--dbname", &connection]))?;
    pg_ctl(&target, "stop", &log)?;
    fs::rename(&elsewhere, world.scratch.join("away"))?;
    let second = world.scratch.join("again");
    let port = cluster::free_port()?.to_string();
    world.pghydrant.succeed(verb("restore", &["--to", &shown(&second), "--port", &port, "--source", "blocks"]))?;
    let again = Instance::running_in(&second)?;
    let files = files_of(&again)?;
    assert_eq!((files[0].clone(), files[2].clone()), (shown(&second.join("pg_hba.conf")), shown(&second)));
    assert_eq!((files[3].as_str(), marks(&again)?.as_str()), ("8MB", "there"));
    drop(again);
    // Without the directory the data directory starts with what it has.
    pg_ctl(&target, "start", &log)?;
    assert_eq!(files_of(&restored)?[0], shown(&target.join("pg_hba.conf")));
    assert_eq!(restored.sql("SHOW work_mem")?, "7MB");
    Ok(())
}

#[test]
fn a_copy_that_is_not_started_is_handed_over_as_well() -> Result<()> {
    requires!(Postgres, Tool("systemd-analyze", "systemd"));
    let world = with_many_files()?;
    let (target, elsewhere) = (world.target(), world.scratch.directory("etc")?);
    let unit = world.scratch.join("restored.service");
    let (directory, file) = (shown(&elsewhere), shown(&unit));
    let arguments = ["--source", "blocks", "--no-start", "--config-to", &directory, "--systemd-unit", &file];
    let finished = world.restore_to(&target, &arguments)?.expect_code(0)?;
    ensure!(finished.stdout.contains(&format!("pg_ctl -D {directory} start")), "{finished}");
    Run::new(postgres_program("pg_verifybackup")?).user(OsUser::server()).arg(&target).succeed()?;
    let text = fs::read_to_string(&unit)?;
    ensure!(text.contains(&format!("-D \"{directory}\"\n")) && text.contains("\nType=notify\n"), "{text}");
    let verified = Run::new(find_program("systemd-analyze").context("no systemd-analyze")?)
        .args(["verify", "--man=no"])
        .arg(&unit)
        .env("SYSTEMD_LOG_LEVEL", "warning")
        .finish()?;
    ensure!(!verified.stderr.contains("restored.service"), "{verified}\n{text}");

    let log = world.scratch.join("restored.log");
    let conf = fs::read_to_string(elsewhere.join("postgresql.conf"))?;
    let port = cluster::free_port()?;
    fs::write(elsewhere.join("postgresql.conf"), format!("{conf}port = {port}\n"))?;
    pg_ctl(&elsewhere, "start", &log)?;
    let restored = Instance::running_in(&target)?;
    process::wait_until("the promotion", std::time::Duration::from_secs(60), || {
        Ok(restored.sql("SELECT pg_is_in_recovery()").is_ok_and(|answer| answer == "f"))
    })?;
    assert_eq!((restored.port, marks(&restored)?.as_str()), (port, "there"));
    assert_eq!(files_of(&restored)?[0], shown(&elsewhere.join("pg_hba.conf")));
    // The unit stands where it is: another restore does not write over it.
    let elsewhere = shown(&world.scratch.join("other"));
    let refused = world.restore_to(Path::new(&elsewhere), &["--source", "blocks", "--systemd-unit", &file])?;
    refused.expect_code(3)?.expect_stderr(&["is there already"])?;
    assert_eq!(fs::read_to_string(&unit)?, text);
    Ok(())
}

#[test]
fn what_is_in_the_way_at_the_end_is_told_and_a_retry_goes_on() -> Result<()> {
    requires!(Postgres);
    let world = World::new(0)?;
    world.mark("there")?;
    world.backup()?;
    let (target, elsewhere) = (world.target(), world.scratch.join("etc"));
    let unit = world.scratch.join("restored.service");
    let (directory, file) = (shown(&elsewhere), shown(&unit));
    let arguments = ["--source", "blocks", "--action", "pause", "--config-to", &directory, "--systemd-unit", &file];
    world.restore_to(&target, &arguments)?.expect_code(0)?;
    let id = open_session(&world.pghydrant)?;
    ensure!(!elsewhere.exists() && !unit.exists(), "it was handed over before the server left recovery");
    world.scratch.directory("etc")?;
    fs::write(elsewhere.join("postgresql.conf"), "somebody's\n")?;
    let stopped = world.pghydrant.run(["promote", &id])?.expect_code(6)?;
    stopped.expect_stderr(&[&directory, "is not empty any more", "hint: "])?;
    assert_eq!(fs::read_to_string(elsewhere.join("postgresql.conf"))?, "somebody's\n");
    let own = fs::read_to_string(target.join("postgresql.conf"))?;
    ensure!(!own.contains(&directory), "it includes somebody else's configuration:\n{own}");
    fs::remove_file(elsewhere.join("postgresql.conf"))?;
    fs::write(&unit, "somebody's\n")?;
    world.pghydrant.run(["retry", &id])?.expect_code(6)?.expect_stderr(&[&file, "hint: "])?;
    assert_eq!(fs::read_to_string(&unit)?, "somebody's\n");
    // What was finished before is left as it is from then on: somebody may have mended it.
    let conf = fs::read_to_string(elsewhere.join("postgresql.conf"))?;
    fs::write(elsewhere.join("postgresql.conf"), format!("{conf}work_mem = '9MB'\n"))?;
    fs::remove_file(&unit)?;
    world.pghydrant.succeed(["retry", &id])?;
    let restored = Instance::running_in(&target)?;
    assert_eq!([restored.sql("SHOW work_mem")?, marks(&restored)?], ["9MB", "there"]);
    ensure!(unit.is_file(), "no unit");
    let left = compare::files_below(&elsewhere)?;
    ensure!(left.len() == 3, "something of the session is left: {left:?}");
    Ok(())
}

/// A cluster in Debian's list; dropped with all that it has.
struct Listed {
    name: String,
}

impl Listed {
    const MAJOR: &'static str = "15";

    fn configuration(&self) -> PathBuf {
        Path::new("/etc/postgresql").join(Self::MAJOR).join(&self.name)
    }

    /// `pg_ctlcluster 15 NAME VERB`.
    fn ctl(&self, verb: &str) -> Result<()> {
        Run::new("pg_ctlcluster").args([Self::MAJOR, &self.name, verb]).env("LC_ALL", "C").succeed()?;
        Ok(())
    }

    /// Port, status, owner, data directory and log, as `pg_lsclusters` prints them.
    fn listed(&self) -> Result<Vec<String>> {
        let lines = Run::new("pg_lsclusters").args(["-h", Self::MAJOR, &self.name]).succeed()?.stdout;
        Ok(lines.split_whitespace().skip(2).map(str::to_owned).collect())
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        if self.configuration().exists() {
            let _ = Run::new("pg_dropcluster").args(["--stop", Self::MAJOR, &self.name]).env("LC_ALL", "C").finish();
            // Files that it does not know stay behind.
            let _ = fs::remove_dir_all(self.configuration());
        }
    }
}

#[test]
fn a_cluster_of_pg_createcluster_comes_back_beside_itself_in_debians_list() -> Result<()> {
    requires!(
        Root,
        Postgres,
        Tool("pg_createcluster", "postgresql-common"),
        Tool("pg_lsclusters", "postgresql-common")
    );
    let scratch = Scratch::new()?;
    let pghydrant = Pghydrant::new(&scratch)?;
    let repository = Repository::init(&scratch, &pghydrant)?;
    let number = std::process::id();
    // Dropped before the directory goes.
    let original = Listed { name: format!("pghydrant_original_{number}") };
    let copy = Listed { name: format!("pghydrant_copy_{number}") };
    let later = Listed { name: format!("pghydrant_later_{number}") };
    let (data, sockets) = (scratch.join("data"), scratch.directory("s")?);
    fs::set_permissions(&sockets, fs::Permissions::from_mode(0o755))?;
    let port = cluster::free_port()?;
    Run::new("pg_createcluster")
        // The key of Debian's certificate is for a group that not every process of the server's user here is in.
        .args(["-o", "ssl=off", "--start-conf=manual", "-u", &OsUser::server().name, "-p", &port.to_string(), "-d"])
        .arg(&data)
        .arg("-s")
        .arg(&sockets)
        .args([Listed::MAJOR, &original.name, "--", "-A", "trust", "-U", "postgres", "--no-sync", "--locale=C"])
        .env("LC_ALL", "C")
        .succeed()?;
    let etc = original.configuration();
    let push = format!("{} wal push --repo {} --cluster main %p", pghydrant.binary.display(), repository.shown());
    let own = format!("archive_mode = on\narchive_command = '{push}'\nfsync = off\nwork_mem = '7MB'\n");
    fs::write(etc.join("conf.d/own.conf"), own)?;
    fs::write(etc.join("admins"), "postgres\n")?;
    let hba = fs::read_to_string(etc.join("pg_hba.conf"))?;
    fs::write(etc.join("pg_hba.conf"), format!("local all @{} trust\n{hba}", shown(&etc.join("admins"))))?;
    original.ctl("start")?;
    let running = Instance::running_in(&data)?;
    running.sql("CREATE TABLE marks (name text); INSERT INTO marks VALUES ('there')")?;
    let connection = running.connection_string();
    pghydrant.succeed(repository.arguments(&["backup"], &["--dbname", &connection]))?;
    let shown_backup = pghydrant.succeed(repository.arguments(&["show"], &["latest"]))?;
    ensure!(shown_backup.stdout.contains(&shown(&etc.join("postgresql.conf"))), "{shown_backup}");
    let (before, listed) = (tree(&etc)?, original.listed()?);

    let target = scratch.join("restored");
    let copys_port = cluster::free_port()?.to_string();
    let register = format!("--register={}", copy.name);
    let arguments = ["--source", "blocks", "--port", &copys_port, &register];
    for (bad, why) in [(format!("--register={}", original.name), "already"), ("--register=a b".to_owned(), "a b")] {
        let refused = repository.restore(&target, &["--source", "blocks", "--port", &copys_port, &bad])?;
        refused.expect_code(3)?.expect_stderr(&[why, "hint: "])?;
    }
    // As root, as whoever administrates the machine: all of it is the instance's own user's all the same.
    let root = repository.with(&pghydrant.as_user(&OsUser::current()));
    let finished = root.restore(&target, &arguments)?.expect_code(0)?;
    ensure!(finished.stdout.contains(&format!("pg_ctlcluster {} {}", Listed::MAJOR, copy.name)), "{finished}");
    let restored = Instance::running_in(&target)?;
    let log = format!("/var/log/postgresql/postgresql-{}-{}.log", Listed::MAJOR, copy.name);
    let online = [&copys_port, "online", &OsUser::server().name, &shown(&target), &log].map(str::to_owned);
    assert_eq!(copy.listed()?, online);
    ensure!(fs::read_to_string(&log)?.contains("ready to accept connections"), "the server logs elsewhere");
    assert_eq!(original.listed()?, listed);
    let owned = tree(&copy.configuration())?;
    ensure!(owned.len() >= 8, "{owned:?}");
    for (path, entry) in owned {
        let (compare::Entry::File { mode, uid, .. } | compare::Entry::Directory { mode, uid, .. }) = entry else {
            bail!("{} is no file", path.display());
        };
        let wanted = if path.starts_with("pg_hba.conf") || path.starts_with("pg_ident.conf") { 0o640 } else { 0o644 };
        ensure!(uid == OsUser::server().uid && mode & 0o666 == wanted, "{}: {uid}, {mode:o}", path.display());
    }

    copy.ctl("stop")?;
    assert_eq!(copy.listed()?[1], "down");
    copy.ctl("start")?;
    assert_eq!(copy.listed()?, online);
    let of = |name: &str| restored.sql(&format!("SHOW {name}"));
    assert_eq!(of("config_file")?, shown(&copy.configuration().join("postgresql.conf")));
    assert_eq!(of("hba_file")?, shown(&copy.configuration().join("pg_hba.conf")));
    assert_eq!([of("work_mem")?, of("archive_mode")?, marks(&restored)?], ["7MB", "off", "there"]);
    let hba = "SELECT count(*) FROM pg_hba_file_rules WHERE error IS NOT NULL";
    assert_eq!(restored.number(hba)?, 0);
    let foreign = format!("SELECT count(*) FROM pg_file_settings WHERE starts_with(sourcefile, '{}')", shown(&etc));
    assert_eq!(restored.number(&foreign)?, 0, "the copy reads the original's files");
    // Its data directory alone does as well.
    copy.ctl("stop")?;
    pg_ctl(&target, "start", Path::new(&log))?;
    assert_eq!([of("config_file")?, of("work_mem")?], [shown(&target.join("postgresql.conf")), "7MB".to_owned()]);

    // Left to systemd, which waits for the pid file: of a recovery that it starts itself, too.
    let unstarted = scratch.join("unstarted");
    let (laters_port, register) = (cluster::free_port()?.to_string(), format!("--register={}", later.name));
    root.restore(&unstarted, &["--source", "blocks", "--no-start", "--port", &laters_port, &register])?
        .expect_code(0)?;
    later.ctl("start")?;
    let pid_file = format!("/var/run/postgresql/{}-{}.pid", Listed::MAJOR, later.name);
    let started = fs::read_to_string(unstarted.join("postmaster.pid"))?;
    assert_eq!(fs::read_to_string(&pid_file).ok().as_deref().map(str::trim), started.lines().next(), "{pid_file}");

    assert_eq!(tree(&etc)?, before, "the original's configuration was touched");
    assert_eq!(running.sql("SHOW port")?, port.to_string());
    Ok(())
}
