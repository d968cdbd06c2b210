//! The configuration of a restored cluster: what another machine lacks, and what lies outside the data directory.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::support::compare::{Entry, tree};
use crate::support::tools::postgres_program;
use crate::support::*;

/// A self-signed certificate and its key in a directory of the server's user.
fn certificate(directory: &Path) -> Result<(String, String)> {
    let (certificate, key) = (directory.join("server.crt"), directory.join("server.key"));
    Run::new("openssl")
        .user(OsUser::server())
        .args(["req", "-new", "-x509", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-out"])
        .arg(&certificate)
        .arg("-keyout")
        .arg(&key)
        .succeed()?;
    fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    Ok((certificate.display().to_string(), key.display().to_string()))
}

#[test]
fn a_copy_starts_without_tls_where_its_certificate_is_missing() -> Result<()> {
    requires!(Postgres, Tool("openssl", "openssl"));
    let world = World::new(0)?;
    let place = world.scratch.directory("tls")?;
    let (certificate, key) = certificate(&place)?;
    for line in ["ssl = on".to_owned(), format!("ssl_cert_file = '{certificate}'"), format!("ssl_key_file = '{key}'")] {
        world.cluster.configure(&line)?;
    }
    world.cluster.restart()?;
    world.mark("there")?;
    world.backup()?;
    let target = world.target();
    let with = world.restore_to(&target, &["--source", "blocks"])?.expect_code(0)?;
    ensure!(!with.stderr.contains("TLS"), "{with}");
    let restored = Instance::running_in(&target)?;
    assert_eq!(restored.sql("SHOW ssl")?, "on");
    drop(restored);
    fs::remove_dir_all(&target)?;

    fs::remove_dir_all(&place)?;
    let without = world.restore_to(&target, &["--source", "blocks"])?.expect_code(0)?.expect_stderr(&["TLS is off"])?;
    let restored = Instance::running_in(&target)?;
    assert_eq!(restored.sql("SHOW ssl")?, "off", "{without}");
    assert_eq!(marks(&restored)?, "there");
    Ok(())
}

#[test]
fn an_include_that_this_machine_lacks_is_refused_unless_it_may_be_missing() -> Result<()> {
    requires!(Postgres);
    let world = World::new(0)?;
    let place = world.scratch.directory("includes")?;
    fs::write(place.join("demanded.conf"), "work_mem = '5MB'\n")?;
    let (demanded, optional) = (place.join("demanded.conf"), place.join("optional.conf"));
    world.cluster.configure(&format!("include_if_exists = '{}'", optional.display()))?;
    world.cluster.configure(&format!("include = '{}'", demanded.display()))?;
    world.cluster.restart()?;
    world.backup()?;
    let target = world.target();
    fs::rename(&demanded, place.join("away"))?;
    let refused = world.restore_to(&target, &["--source", "blocks"])?.expect_code(3)?;
    let refused = refused.expect_stderr(&[&demanded.display().to_string(), "hint: "])?;
    ensure!(!refused.stderr.contains("optional.conf"), "{refused}");
    ensure!(!target.exists(), "{refused}");
    fs::rename(place.join("away"), &demanded)?;
    let restored = world.restore(&["--source", "blocks"])?;
    assert_eq!(restored.sql("SHOW work_mem")?, "5MB");
    let conf = fs::read_to_string(target.join("postgresql.conf"))?;
    ensure!(conf.contains(&format!("include_if_exists = '{}'", optional.display())), "{conf}");
    Ok(())
}

/// A cluster as Debian lays it out: everything but the data in a directory like `/etc/postgresql/15/main`, a process id
/// file and a log elsewhere.
struct Debian {
    world: World,
    etc: PathBuf,
    run: PathBuf,
    log: PathBuf,
}

impl Debian {
    fn build() -> Result<Self> {
        let world = World::new(0)?;
        world.cluster.stop("fast")?;
        let [etc, run, log] = ["etc", "run", "log"].map(|name| world.scratch.directory(name));
        let (etc, run, log) = (etc?, run?, log?);
        let data = &world.cluster.data;
        for name in ["postgresql.conf", "pg_hba.conf", "pg_ident.conf"] {
            fs::rename(data.join(name), etc.join(name))?;
        }
        let mut conf = fs::read_to_string(etc.join("postgresql.conf"))?;
        for (name, path) in [
            ("data_directory", data),
            ("hba_file", &etc.join("pg_hba.conf")),
            ("ident_file", &etc.join("pg_ident.conf")),
            ("external_pid_file", &run.join("main.pid")),
            ("log_directory", &log),
        ] {
            conf.push_str(&format!("{name} = '{}'\n", path.display()));
        }
        conf.push_str("logging_collector = on\nlog_filename = 'server.log'\ninclude_dir = 'conf.d'\n");
        conf.push_str(&format!("include = '{}'\n", etc.join("more.conf").display()));
        fs::write(etc.join("postgresql.conf"), conf)?;
        fs::write(etc.join("more.conf"), "work_mem = '7MB'\n")?;
        fs::create_dir(etc.join("conf.d"))?;
        fs::write(etc.join("conf.d/10-own.conf"), "cluster_name = 'debian'\nmaintenance_work_mem = '33MB'\n")?;
        fs::write(etc.join("conf.d/not-read.txt"), "port = 1\n")?;
        let debian = Self { world, etc, run, log };
        debian.start()?;
        Ok(debian)
    }

    fn start(&self) -> Result<()> {
        let options = format!("-c config_file='{}'", self.etc.join("postgresql.conf").display());
        Run::new(postgres_program("pg_ctl")?)
            .user(OsUser::server())
            .args(["start", "-w", "-o", &options, "-l"])
            .arg(self.world.cluster.log_file())
            .arg("-D")
            .arg(&self.world.cluster.data)
            .succeed()?;
        Ok(())
    }

    /// All that is the original's and outside its data directory, but for what the original itself goes on writing.
    fn outside(&self) -> Result<BTreeMap<PathBuf, Entry>> {
        let mut all = tree(&self.etc)?;
        all.extend(tree(&self.run)?);
        Ok(all)
    }
}

#[test]
fn a_configuration_outside_the_data_directory_comes_back_in_a_copy_that_stands_alone() -> Result<()> {
    requires!(Postgres, Fuse);
    let debian = Debian::build()?;
    let world = &debian.world;
    world.mark("before")?;
    world.backup()?;
    world.mark("wanted")?;
    world.cluster.sql("SELECT pg_create_restore_point('here')")?;
    world.mark("unwanted")?;
    world.cluster.archive_wal()?;
    let outside = debian.outside()?;
    let log = fs::read_to_string(debian.log.join("server.log"))?;

    // Beside its original, which runs.
    let restored = world.restore(&["--target-name", "here"])?;
    assert_eq!(marks(&restored)?, "before,wanted");
    for (setting, value) in [
        ("work_mem", "7MB".to_owned()),
        ("maintenance_work_mem", "33MB".to_owned()),
        ("cluster_name", "debian".to_owned()),
        ("external_pid_file", String::new()),
        ("log_directory", "log".to_owned()),
        ("data_directory", restored.data.display().to_string()),
        ("config_file", restored.data.join("postgresql.conf").display().to_string()),
        ("hba_file", restored.data.join("pg_hba.conf").display().to_string()),
        ("ident_file", restored.data.join("pg_ident.conf").display().to_string()),
    ] {
        assert_eq!(restored.sql(&format!("SHOW {setting}"))?, value, "{setting}");
    }
    let files = "SELECT string_agg(DISTINCT sourcefile, ',') FROM pg_file_settings WHERE NOT starts_with(sourcefile, current_setting('data_directory'))";
    assert_eq!(restored.sql(files)?, "", "the copy reads the original's files");
    // Alone it starts as well.
    restored.restart()?;
    assert_eq!(marks(&restored)?, "before,wanted");
    restored.stop("fast")?;
    assert_eq!(debian.outside()?, outside, "the original's files were touched");
    let grown = fs::read_to_string(debian.log.join("server.log"))?;
    ensure!(grown.starts_with(&log), "the original's log was written anew");
    ensure!(!grown.contains("starting PostgreSQL") || log.contains("starting PostgreSQL"), "{grown}");
    assert_eq!(world.cluster.sql("SELECT 1")?, "1");
    drop(restored);
    fs::remove_dir_all(world.target())?;

    // On another machine nothing of the original is there.
    for place in [&debian.etc, &debian.run, &debian.log] {
        fs::rename(place, place.with_extension("away"))?;
    }
    let plain = world.scratch.join("plain");
    let finished = world.restore_to(&plain, &["--no-start", "--target-name", "here"])?.expect_code(0)?;
    ensure!(!finished.stderr.contains("warning"), "{finished}");
    Run::new(postgres_program("pg_verifybackup")?).user(OsUser::server()).arg(&plain).succeed()?;
    let restored = world.restore(&["--target-name", "here"])?;
    assert_eq!(marks(&restored)?, "before,wanted");
    assert_eq!(restored.sql("SHOW maintenance_work_mem")?, "33MB");
    drop(restored);
    for place in [&debian.etc, &debian.run, &debian.log] {
        fs::rename(place.with_extension("away"), place)?;
    }
    Ok(())
}

/// PostgreSQL writes `postgresql.auto.conf` anew, without the comments that hid what would overrule the recovery.
#[test]
fn alter_system_while_a_restore_waits_loses_nothing_of_the_original() -> Result<()> {
    requires!(Postgres);
    let world = World::new(0)?;
    for statement in ["log_min_messages = 'error'", "work_mem = '5MB'", "maintenance_work_mem = '34MB'"] {
        world.cluster.sql(&format!("ALTER SYSTEM SET {statement}"))?;
    }
    world.backup()?;
    world.cluster.sql("SELECT pg_create_restore_point('here')")?;
    world.cluster.archive_wal()?;
    let arguments = ["--source", "blocks", "--target-name", "here", "--action", "pause"];
    world.restore_to(&world.target(), &arguments)?.expect_code(0)?;
    let paused = Instance::running_in(&world.target())?;
    paused.sql("ALTER SYSTEM SET work_mem = '6MB'")?;
    paused.sql("ALTER SYSTEM RESET maintenance_work_mem")?;
    let promoted = world.pghydrant.succeed(["promote", &open_session(&world.pghydrant)?])?;
    promoted.expect_stderr(&["maintenance_work_mem, work_mem"])?;
    let restored = Instance::running_in(&world.target())?;
    let of = |name: &str| restored.sql(&format!("SHOW {name}"));
    assert_eq!([of("log_min_messages")?, of("work_mem")?, of("maintenance_work_mem")?], ["error", "6MB", "64MB"]);
    assert_eq!([of("archive_mode")?, of("max_logical_replication_workers")?], ["off", "0"]);
    Ok(())
}

#[test]
fn what_a_first_start_leaves_behind_is_taken_out_by_the_lines_that_the_restore_prints() -> Result<()> {
    requires!(Postgres);
    let world = World::new(0)?;
    world.mark("there")?;
    world.backup()?;
    world.cluster.sql("SELECT pg_create_restore_point('here')")?;
    world.cluster.archive_wal()?;
    let target = world.target();
    let arguments = ["--source", "blocks", "--no-start", "--target-name", "here"];
    let finished = world.restore_to(&target, &arguments)?.expect_code(0)?;
    let lines: Vec<&str> = finished.stdout.lines().filter(|line| line.starts_with("ALTER SYSTEM RESET ")).collect();
    // Only the last port in the file counts, and the original has that of its own.
    let restored =
        Instance { data: target.clone(), port: cluster::free_port()?, sockets: world.cluster.sockets.clone() };
    restored.configure(&format!("port = {}", restored.port))?;
    restored.start()?;
    process::wait_until("the promotion", std::time::Duration::from_secs(180), || {
        Ok(restored.sql("SELECT pg_is_in_recovery()").is_ok_and(|answer| answer == "f"))
    })?;
    for line in lines {
        restored.sql(line)?;
    }
    let left = fs::read_to_string(target.join("postgresql.auto.conf"))?;
    ensure!(!left.contains("recovery_") && !left.contains("restore_command"), "{left}\n{finished}");
    assert_eq!(marks(&restored)?, "there");
    Ok(())
}

#[test]
fn a_place_beside_the_data_directory_is_the_originals() -> Result<()> {
    requires!(Postgres);
    let settings = ["log_directory = '../log'", "external_pid_file = '../main.pid'"];
    let world = World::with(0, &[], &settings)?;
    world.mark("there")?;
    world.backup()?;
    let pid = fs::read_to_string(world.scratch.join("main.pid"))?;
    let restored = world.restore(&["--source", "blocks"])?;
    assert_eq!(marks(&restored)?, "there");
    assert_eq!(restored.sql("SHOW log_directory")?, "log");
    assert_eq!(restored.sql("SHOW external_pid_file")?, "");
    assert_eq!(fs::read_to_string(world.scratch.join("main.pid"))?, pid, "the original's was written");
    Ok(())
}

#[test]
fn a_configuration_that_the_backup_could_not_read_is_named_and_a_least_one_is_written() -> Result<()> {
    requires!(Postgres);
    let debian = Debian::build()?;
    let world = &debian.world;
    world.mark("there")?;
    // Gone since the server was started: it goes on with what it has read.
    fs::rename(&debian.etc, debian.etc.with_extension("away"))?;
    let connection = world.cluster.connection_string();
    let backup = world.repository.arguments(&["backup"], &["--dbname", &connection]);
    world.pghydrant.run(backup)?.expect_code(0)?.expect_stderr(&[
        "postgresql.conf",
        "pg_hba.conf",
        "not in the backup",
    ])?;
    let target = world.target();
    let finished = world.restore_to(&target, &["--source", "blocks"])?.expect_code(0)?;
    let finished = finished.expect_stderr(&[&debian.etc.display().to_string(), "minimal"])?;
    let restored = Instance::running_in(&target)?;
    fs::rename(debian.etc.with_extension("away"), &debian.etc)?;
    // Its `pg_hba.conf` lets the owner in, by its own name.
    let answer = restored.client("psql")?.args(["-XAtqc", "SELECT count(*) FROM marks"]).finish()?;
    ensure!(answer.code == Some(0) || OsUser::server().name != "postgres", "{answer}\n{finished}");
    Ok(())
}
