//! Somebody who may write into the repository but not where it is restored to, and bad luck of the same kind. What must
//! hold: a clear line and the right exit code, nothing written elsewhere, nothing sent to the terminal, no endless wait.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::support::repository::resealed;
use crate::support::*;

/// No command here has much to read.
const TIME_LIMIT: Duration = Duration::from_secs(30);

/// A copy of the sample repository, which needs no server.
struct Sample {
    scratch: Scratch,
    pghydrant: Pghydrant,
    root: PathBuf,
}

impl Sample {
    fn new() -> Result<Self> {
        let scratch = Scratch::new()?;
        let pghydrant = Pghydrant::new(&scratch)?.time_limit(TIME_LIMIT);
        let root = scratch.join("repo");
        let sample = concat!(env!("CARGO_MANIFEST_DIR"), "/../engine/samples/v1");
        copy_for_the_server(Path::new(sample), &root)?;
        Ok(Self { scratch, pghydrant, root })
    }

    fn run(&self, verb: &[&str], arguments: &[&str]) -> Result<Finished> {
        let root = self.root.display().to_string();
        let finished = self.pghydrant.run([verb, &["--repo", &root, "--cluster", "main"], arguments].concat())?;
        ensure!(!finished.stderr.contains("panicked") && finished.signal.is_none(), "{finished}");
        Ok(finished)
    }

    fn newest(&self) -> Result<PathBuf> {
        let mut backups = Vec::new();
        for entry in fs::read_dir(self.root.join("clusters/main/backups"))? {
            backups.push(entry?.path());
        }
        backups.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
        backups.into_iter().max().context("no backup")
    }

    /// Changes the newest backup's description and gives it its right checksum.
    fn forge(&self, from: &str, to: &str) -> Result<()> {
        let path = self.newest()?;
        let text = fs::read_to_string(&path)?;
        ensure!(text.contains(from), "{from} is not in {text}");
        fs::write(&path, resealed(&text.replacen(from, to, 1))?)?;
        Ok(())
    }
}

fn copy_for_the_server(from: &Path, to: &Path) -> Result<()> {
    let user = OsUser::server();
    if from.is_dir() {
        fs::create_dir(to)?;
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            copy_for_the_server(&entry.path(), &to.join(entry.file_name()))?;
        }
    } else {
        fs::copy(from, to)?;
    }
    chown(to, Some(user.uid), Some(user.gid)).with_context(|| format!("cannot chown {}", to.display()))
}

#[test]
fn what_a_repository_says_is_shown_and_never_sent_to_the_terminal() -> Result<()> {
    let sample = Sample::new()?;
    sample.forge("/var/lib/postgresql/15/main", "/srv\\u001b]0;owned\\u0007\\u009b2J\\r/main")?;
    sample.forge("\"fast\"", "\"fa\\u202est\\u001b[8m\"")?;
    for (verb, arguments) in [(&["list"][..], &[][..]), (&["show"], &[]), (&["show"], &["latest"]), (&["verify"], &[])]
    {
        let finished = sample.run(verb, arguments)?.expect_code(0)?;
        let hostile = |letter: char| (letter.is_control() && letter != '\n' && letter != '\t') || letter == '\u{202e}';
        ensure!(!finished.stdout.contains(hostile) && !finished.stderr.contains(hostile), "{verb:?}\n{finished:?}");
    }
    let shown = sample.run(&["show"], &["latest"])?.stdout;
    ensure!(shown.contains("\\u{1b}]0;owned"), "{shown}");
    Ok(())
}

#[test]
fn a_forged_description_is_refused_in_a_moment_and_with_4() -> Result<()> {
    for (from, to) in [
        // Every segment that there can be is needed.
        ("\"stop\": \"0/300100\"", "\"stop\": \"FFFFFFFF/FFFFFFFF\""),
        ("\"wal_segment_bytes\": 1048576", "\"wal_segment_bytes\": 1"),
        ("\"system_identifier\": \"7300000000000000001\"", "\"system_identifier\": \"1\""),
        ("\"cluster\": \"main\"", "\"cluster\": \"../../main\""),
        ("\"root_bytes\": ", "\"root_bytes\": 9"),
        (
            "\"tablespaces\": [",
            &format!("\"deep\": {}{},\n  \"tablespaces\": [", "[".repeat(100_000), "]".repeat(99_999)),
        ),
    ] {
        let sample = Sample::new()?;
        sample.forge(from, to)?;
        let name = sample.newest()?.file_name().context("no name")?.to_string_lossy().into_owned();
        let stem = name.trim_end_matches(".json").to_owned();
        sample.run(&["verify"], &[])?.expect_code(4)?.expect_stderr(&[&stem])?;
        let to = sample.scratch.join("restored").display().to_string();
        let arguments = ["--to", &to, "--no-start", "--source", "blocks", "--backup", &stem];
        let finished = sample.run(&["restore"], &arguments)?.expect_code(4)?;
        ensure!(!Path::new(&to).exists(), "{finished}");
    }
    Ok(())
}

#[test]
fn a_link_in_the_place_of_a_lock_is_refused_and_what_it_leads_to_is_left_alone() -> Result<()> {
    let sample = Sample::new()?;
    let victim = sample.scratch.join("victim");
    fs::write(&victim, "precious")?;
    let before = fs::metadata(&victim)?;
    let locks = sample.root.join("clusters/main/locks");
    fs::create_dir(&locks)?;
    symlink(&victim, locks.join("push"))?;
    let segment = "000000020000000000000003";
    let fetched = sample.scratch.directory("fetched")?.join(segment).display().to_string();
    sample.run(&["wal", "fetch"], &[segment, &fetched])?.expect_code(0)?;
    // As whoever may write to the victim: root, if the tests run as root.
    let pghydrant = sample.pghydrant.as_user(&OsUser::current());
    let root = sample.root.display().to_string();
    let finished = pghydrant.run(["wal", "push", "--repo", &root, "--cluster", "main", &fetched])?;
    finished.expect_code(4)?.expect_stderr(&["locks/push", "symbolic link"])?;
    let after = fs::metadata(&victim)?;
    assert_eq!((before.uid(), before.len()), (after.uid(), after.len()));
    Ok(())
}

#[test]
fn root_writes_through_no_link_in_a_repository_and_gives_nothing_away_behind_it() -> Result<()> {
    requires!(Root);
    let sample = Sample::new()?;
    let elsewhere = sample.scratch.join("elsewhere");
    fs::create_dir(&elsewhere)?;
    fs::write(elsewhere.join("push"), "precious")?;
    symlink(&elsewhere, sample.root.join("clusters/main/locks"))?;
    let segment = "000000020000000000000003";
    let fetched = sample.scratch.directory("fetched")?.join(segment).display().to_string();
    sample.run(&["wal", "fetch"], &[segment, &fetched])?.expect_code(0)?;
    let pghydrant = sample.pghydrant.as_user(&OsUser::current());
    let root = sample.root.display().to_string();
    let finished = pghydrant.run(["wal", "push", "--repo", &root, "--cluster", "main", &fetched])?;
    finished.expect_code(1)?.expect_stderr(&["clusters/main/locks is a symbolic link"])?;
    assert_eq!(fs::read(elsewhere.join("push"))?, b"precious");
    assert_eq!(fs::metadata(elsewhere.join("push"))?.uid(), 0);
    assert_eq!(fs::read_dir(&elsewhere)?.count(), 1);
    Ok(())
}

#[test]
fn a_backup_by_root_carries_off_nothing_that_the_servers_user_cannot_read() -> Result<()> {
    requires!(Root, Postgres);
    let world = World::new(0)?;
    let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode));
    let closed = world.scratch.join("closed");
    fs::create_dir(&closed)?;
    mode(&closed, 0o700)?;
    let open = world.scratch.join("open");
    for path in [closed.join("secret"), open.clone()] {
        fs::write(&path, "content")?;
        mode(&path, 0o644)?;
    }
    let data = &world.cluster.data;
    symlink(closed.join("secret"), data.join("leak"))?;
    symlink(&closed, data.join("pg_stat/leaks"))?;
    symlink(&open, data.join("kept"))?;

    let (repo, connection) = (world.repository.shown(), world.cluster.connection_string());
    let pghydrant = world.pghydrant.as_user(&OsUser::current());
    let backup = pghydrant.run(["backup", "--repo", &repo, "--cluster", "main", "--dbname", &connection])?;
    let backup = backup.expect_code(0)?;
    ensure!(backup.stderr.contains("/leak is left out") && backup.stderr.contains("may not read it"), "{backup}");
    ensure!(backup.stderr.contains("pg_stat/leaks is left out"), "{backup}");
    let plain = world.scratch.join("plain");
    world.restore_to(&plain, &["--no-start", "--source", "blocks"])?.expect_code(0)?;
    ensure!(!plain.join("leak").exists() && !plain.join("pg_stat/leaks").exists(), "the secret is out");
    assert_eq!(fs::read(plain.join("kept"))?, b"content");
    Ok(())
}

#[test]
fn a_settings_file_of_somebody_else_in_the_working_directory_does_not_count() -> Result<()> {
    requires!(Root);
    let scratch = Scratch::new()?;
    let pghydrant = Pghydrant::new(&scratch)?.as_user(&OsUser::current());
    let place = scratch.directory("place")?;
    let settings = place.join("pghydrant.toml");
    fs::write(&settings, "repo = \"/nowhere\"\n")?;
    let list = || pghydrant.command(["list"]).current_dir(&place).finish();
    list()?.expect_code(1)?.expect_stderr(&["/nowhere"])?;
    chown(&settings, Some(OsUser::server().uid), None)?;
    list()?.expect_code(2)?.expect_stderr(&["./pghydrant.toml is not used", "no repository is named"])?;
    Ok(())
}

#[test]
fn a_pipe_in_the_place_of_a_file_is_not_waited_for() -> Result<()> {
    for place in ["pghydrant.json", "clusters/main/cluster.json", "clusters/main/packs/00000001.pack"] {
        let sample = Sample::new()?;
        let path = sample.root.join(place);
        fs::remove_file(&path)?;
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, 0o666.into())?;
        sample.run(&["verify"], &[])?.expect_code(4)?.expect_stderr(&[place])?;
    }
    Ok(())
}
