//! Documents are tested: README's commands run as they stand, and the demo does what it says.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::time::Duration;

use crate::support::tools::{postgres_bin, postgres_program};
use crate::support::*;

/// The lines behind `$ ` of the blocks marked `console`, in their order.
fn console_commands(markdown: &str) -> Vec<String> {
    let mut commands = Vec::new();
    let mut inside = false;
    for line in markdown.lines() {
        match (inside, line) {
            (false, "```console") => inside = true,
            (true, "```") => inside = false,
            (true, _) => commands.extend(line.strip_prefix("$ ").map(str::to_owned)),
            (false, _) => {}
        }
    }
    commands
}

#[test]
fn the_readmes_commands_run_in_their_order() -> Result<()> {
    requires!(Postgres, Fuse);
    let readme = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md"))?;
    let commands = console_commands(&readme);
    ensure!(commands.len() >= 15, "only {} commands in README.md", commands.len());

    let scratch = Scratch::new()?;
    let pghydrant = Pghydrant::new(&scratch)?;
    let home = scratch.directory("home")?;
    fs::create_dir(home.join("15"))?;
    std::os::unix::fs::chown(home.join("15"), Some(OsUser::server().uid), Some(OsUser::server().gid))?;
    let cluster = Cluster::build(&scratch, "home/15/main").start()?;
    let restored_port = cluster::free_port()?.to_string();
    // The reader's places and ports are this test's; everything else stands as printed.
    let places = [
        ("/var/lib/postgresql", home.display().to_string()),
        ("/srv/backup", scratch.join("backup").display().to_string()),
        ("/run/postgresql", cluster.sockets.display().to_string()),
        ("/tmp/backup", scratch.join("look").display().to_string()),
        ("/tmp/postgresql.log", scratch.join("postgresql.log").display().to_string()),
        ("port=5432", format!("port={}", cluster.port)),
        ("5433", restored_port.clone()),
    ];
    let programs = scratch.directory("programs")?;
    symlink(&pghydrant.binary, programs.join("pghydrant"))?;
    let path = format!("{}:{}:/usr/bin:/bin", programs.display(), postgres_bin().context("no server")?.display());
    let mut script = String::from("set -e\n");
    for command in &commands {
        let command = places.iter().fold(command.clone(), |command, (theirs, ours)| command.replace(theirs, ours));
        script.push_str(&format!("echo '$ {}' >&2\n{command}\n", command.replace('\'', "'\\''")));
        if command.contains("pg_switch_wal") {
            // A reader takes longer to type the next command than the archiver to send the segment.
            let status = cluster.data.join("pg_wal/archive_status").display().to_string();
            script.push_str(&format!("while ls {status} | grep -q ready; do sleep 0.1; done\n"));
        }
    }
    let ran = Run::new("bash")
        .args(["-c", &script])
        .user(OsUser::server())
        .env("PATH", &path)
        .env("PGHOST", &cluster.sockets)
        .env("PGPORT", cluster.port.to_string())
        .env("PGUSER", "postgres")
        .env("PGHYDRANT_STATE", &pghydrant.state)
        .finish()?;
    // Whatever the script left running is stopped with this.
    let restored = Instance::running_in(&home.join("15/restored"));
    let ran = ran.expect_code(0)?;
    assert_eq!(restored?.number("SELECT count(*) FROM precious")?, 1000);
    assert!(ran.stdout.contains("1000"), "{ran}");
    assert!(filesystem::fuse_mounts_below(scratch.path()).is_empty());
    Ok(())
}

#[test]
fn the_documents_that_the_readme_links_to_are_there() -> Result<()> {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    let readme = fs::read_to_string(format!("{root}/README.md"))?;
    for link in readme.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
        if !link.starts_with("http") {
            assert!(fs::exists(format!("{root}/{link}"))?, "{link}");
        }
    }
    Ok(())
}

#[test]
fn the_demo_proves_itself_and_cleans_up() -> Result<()> {
    requires!(Postgres);
    let scratch = Scratch::new()?;
    let pghydrant = Pghydrant::new(&scratch)?;
    let bin = postgres_program("postgres")?.parent().map(|bin| bin.display().to_string()).unwrap_or_default();
    let own = tempfile::tempdir_in("/var/tmp")?;
    fs::set_permissions(own.path(), fs::Permissions::from_mode(0o755))?;
    for user in [OsUser::server().clone(), OsUser::current()] {
        let demo = pghydrant.as_user(&user);
        let of_root = user.uid != OsUser::server().uid;
        let kept = if of_root { own.path().join("demo") } else { scratch.join("demo") };
        let keep = kept.display().to_string();
        let ran = demo.succeed(["demo", "--scale", "2", "--pg-bin", &bin, "--keep", &keep])?;
        ensure!(ran.stdout.contains("200,000") && ran.stdout.contains("restore"), "{ran}");
        ensure!(kept.join("restored/PG_VERSION").exists(), "--keep kept nothing\n{ran}");
        for server in ["original", "restored"] {
            ensure!(!kept.join(server).join("postmaster.pid").exists(), "{server} still runs\n{ran}");
        }
        ensure!(filesystem::fuse_mounts_below(&kept).is_empty(), "a mount is left\n{ran}");
        for path in ["", "pghydrant", "pghydrant.toml", "state", "mount"] {
            let found = fs::symlink_metadata(kept.join(path))?;
            ensure!(found.uid() == user.uid && found.mode() & 0o022 == 0, "{path} is not {}'s alone\n{ran}", user.name);
        }
        if of_root {
            // Root would run a program in a directory that somebody else can put another one into.
            let theirs = scratch.join("demo-of-root").display().to_string();
            demo.fail(["demo", "--pg-bin", &bin, "--keep", &theirs], 3, &["belongs to", "--keep"])?;
        }
    }
    Ok(())
}

#[test]
fn an_interrupted_demo_cleans_up_too() -> Result<()> {
    requires!(Postgres);
    let scratch = Scratch::new()?;
    let pghydrant = Pghydrant::new(&scratch)?;
    let kept = scratch.join("demo");
    for milliseconds in [500, 4000, 9000] {
        let mut running = pghydrant.start(["demo", "--scale", "2", "--keep", &kept.display().to_string()])?;
        running.wait_for_output("its first words", |seen| !seen.is_empty())?;
        std::thread::sleep(Duration::from_millis(milliseconds));
        running.signal(rustix::process::Signal::INT)?;
        let finished = running.wait()?;
        ensure!(matches!(finished.code, Some(0 | 130)), "after {milliseconds} ms\n{finished}");
        for server in ["original", "restored"] {
            ensure!(!kept.join(server).join("postmaster.pid").exists(), "{server} still runs\n{finished}");
        }
        ensure!(filesystem::fuse_mounts_below(&kept).is_empty(), "a mount is left\n{finished}");
        if kept.exists() {
            fs::remove_dir_all(&kept)?;
        }
    }
    Ok(())
}

#[test]
fn the_doctor_tells_each_setting_with_its_source() -> Result<()> {
    requires!(Postgres);
    let scratch = Scratch::new()?;
    let pghydrant = Pghydrant::new(&scratch)?.env("PGHYDRANT_MEMORY", "64MiB");
    let file = scratch.join("pghydrant.toml");
    fs::write(&file, "workers = 3\n")?;
    let file = file.display().to_string();
    let told = pghydrant.succeed(["doctor", "--json", "--cluster", "main", "--config", &file])?.json()?;
    let settings = told["settings"].as_array().context("no settings")?;
    let of = |key: &str| {
        let setting = settings.iter().find(|setting| setting["key"] == key);
        setting.map(|setting| format!("{} from {}", setting["value"], setting["source"])).unwrap_or_default()
    };
    assert_eq!(of("cluster"), "\"main\" from \"command line\"");
    assert_eq!(of("memory"), "\"64MiB\" from \"PGHYDRANT_MEMORY\"");
    assert_eq!(of("workers"), format!("\"3\" from \"{file}\""));
    assert_eq!(of("repo"), "null from \"default\"");
    for finding in told["findings"].as_array().context("no findings")? {
        ensure!((finding["verdict"] == "ok") == finding["cure"].is_null(), "{finding}");
    }
    // A repository that does not open is something that a restore cannot do without.
    let missing = pghydrant.run(["doctor", "--repo", "/nonexistent"])?.expect_code(1)?;
    ensure!(missing.stdout.contains("pghydrant init"), "{missing}");
    Ok(())
}

#[test]
fn only_console_blocks_are_run() {
    let text = "```sh\n$ no\n```\n```console\n$ yes\noutput\n$ also\n```\n$ no\n";
    assert_eq!(console_commands(text), ["yes", "also"]);
}
