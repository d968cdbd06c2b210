//! The mount server under load: many sessions at once, strangers on its ports, no io_uring; and what systemd hears of it.

use std::io::Write as _;
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Signal;

use crate::service::Stage;
use crate::support::process::wait_until;
use crate::support::*;

const ROWS: i64 = 100_000;
/// What the service may hold with eight sessions.
const MEMORY_KIB_MAX: u64 = 256 << 10;

impl Stage {
    /// Restores to so many directories at once; everything is there in each.
    fn restore_all(&self, name: &str, count: usize) -> Result<()> {
        let place = |number: usize| self.world.scratch.join(&format!("{name}-{number}"));
        let running = (0..count).map(|number| self.server.restore(&self.host, &place(number), &["--target-immediate"]));
        let running = running.map(Run::start).collect::<Result<Vec<_>>>()?;
        for session in running {
            session.wait()?.expect_code(0)?;
        }
        for number in 0..count {
            let restored = Instance::running_in(&place(number))?;
            assert_eq!(restored.number("SELECT count(*) FROM pgbench_accounts")?, ROWS);
            assert_eq!(restored.number("SELECT count(DISTINCT aid) FROM pgbench_accounts")?, ROWS);
            restored.stop("immediate")?;
            std::fs::remove_dir_all(place(number))?;
        }
        Ok(())
    }
}

/// Packs of a repository, none of which is in the page cache any more.
fn forget_packs(repository: &Repository) -> Result<u64> {
    let packs: Vec<PathBuf> =
        repository.files()?.into_iter().filter(|path| path.extension() == Some("pack".as_ref())).collect();
    let mut bytes = 0;
    for pack in packs {
        let file = std::fs::File::open(repository.path().join(pack))?;
        file.sync_all()?;
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        bytes += file.metadata()?.len();
    }
    Ok(bytes)
}

#[test]
fn two_and_eight_sessions_at_once_share_what_was_read_within_bounded_memory() -> Result<()> {
    requires_network!();
    let stage = Stage::of(World::new(1)?, &[])?;
    let stored = forget_packs(&stage.world.repository)?;
    stage.restore_all("two", 2)?;
    let read = stage.server.figure("io", "read_bytes:")?;
    stage.restore_all("eight", 8)?;
    let again = stage.server.figure("io", "read_bytes:")? - read;
    // Once for all of them: blocks stay in the page cache of the mount server as they are stored.
    assert!(again < stored / 4, "{again} of {stored} bytes were read again, {read} before");
    let sent = stage.server.metric("pghydrant_data_bytes_total")?;
    assert!(sent > 8.0 * stored as f64 / 2.0, "{sent} bytes sent of {stored}");
    let peak = stage.server.figure("status", "VmHWM:")?;
    assert!(peak < MEMORY_KIB_MAX, "{peak} KiB");
    assert_eq!(stage.server.sessions()?.iter().filter(|one| one.get("state") == Some(&"finished".into())).count(), 10);
    Ok(())
}

#[test]
fn without_io_uring_and_with_a_thousand_strangers_a_restore_is_done_and_they_are_counted() -> Result<()> {
    requires_network!();
    let stage = Stage::of(World::new(1)?, &["--io", "plain", "--session-rate-limit", "500M"])?;
    let control = stage.server.url().trim_start_matches("https://").to_owned();
    let mut idle = Vec::new();
    for number in 0..1000 {
        let mut stream = TcpStream::connect(&control)?;
        match number % 4 {
            0 => {}
            1 => drop(stream.write_all(b"GET / HTTP/1.1\r\n\r\n")),
            // A record of TLS that is longer than any may be.
            2 => drop(stream.write_all(&[0x16, 3, 1, 0xff, 0xff, 1, 2, 3])),
            _ => drop(stream.shutdown(Shutdown::Write)),
        }
        idle.push(stream);
    }
    let data = stage.server.data_address()?;
    for number in 0..64_u8 {
        let mut stream = TcpStream::connect(&data)?;
        // Whoever was cut off already does not hear it.
        drop(stream.write_all(&vec![number; 100 * usize::from(number)]));
        if number % 2 == 0 {
            idle.push(stream);
        }
    }
    stage.restore_all("restored", 1)?;
    let refused = |port: &str, why: &str| {
        let name = format!("pghydrant_{port}_refused_total{{why=\"{why}\"}}");
        let mut last = 0.0;
        wait_until(&name, Duration::from_secs(60), || {
            last = stage.server.metric(&name)?;
            Ok(last > 0.0)
        })
    };
    refused("control", "too_many")?;
    refused("control", "handshake")?;
    refused("data", "garbage")?;
    // It serves on, and says what it lacks.
    stage.server.command(["list", "--cluster", "main"]).succeed()?;
    assert!(stage.server.said()?.contains("no io_uring"));
    drop(idle);
    Ok(())
}

#[test]
fn systemd_hears_of_a_service_that_is_ready_lives_and_stops() -> Result<()> {
    let scratch = Scratch::new()?;
    let pghydrant = Pghydrant::new(&scratch)?;
    let repository = Repository::init(&scratch, &pghydrant)?;
    let socket = UnixDatagram::bind(scratch.join("notify"))?;
    std::fs::set_permissions(scratch.join("notify"), std::os::unix::fs::PermissionsExt::from_mode(0o777))?;
    socket.set_read_timeout(Some(Duration::from_secs(60)))?;
    let state = scratch.join("state").display().to_string();
    let (shown, anywhere) = (repository.shown(), "127.0.0.1:0");
    let run = pghydrant.command([
        "serve",
        "--repo",
        &shown,
        "--state",
        &state,
        "--listen",
        anywhere,
        "--data-listen",
        anywhere,
    ]);
    let run =
        run.env("NOTIFY_SOCKET", scratch.join("notify")).env("WATCHDOG_USEC", "200000").env_remove("WATCHDOG_PID");
    let server = run.start()?;
    let heard = || {
        let mut memory = [0; 100];
        let bytes = socket.recv(&mut memory)?;
        anyhow::Ok(String::from_utf8_lossy(&memory[..bytes]).into_owned())
    };
    assert_eq!(heard()?, "READY=1");
    assert_eq!([heard()?, heard()?], ["WATCHDOG=1", "WATCHDOG=1"]);
    server.signal(Signal::TERM)?;
    server.wait()?.expect_code(0)?;
    let mut last = heard()?;
    while last == "WATCHDOG=1" {
        last = heard()?;
    }
    assert_eq!(last, "STOPPING=1");
    Ok(())
}

#[test]
fn the_unit_file_is_one_that_systemd_takes_and_its_options_are_ours() -> Result<()> {
    requires!(Tool("systemd-analyze", "systemd"));
    let scratch = Scratch::new()?;
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd/pghydrant.service"))?;
    let line =
        text.lines().find_map(|line| line.strip_prefix("ExecStart=/usr/bin/pghydrant ")).context("no command")?;
    // The command line is refused for the lack of a repository, and for nothing that is not known.
    let words = line.split(' ').map(|word| if word == "/backup" { "/nonexistent/pgh" } else { word });
    let words = words.map(|word| if word == "/var/lib/pghydrant" { "/tmp/pgh-unit" } else { word });
    let words: Vec<String> =
        words.map(|word| word.replace("/tmp/pgh-unit", &scratch.join("state").display().to_string())).collect();
    let refused = Pghydrant::new(&scratch)?.run(&words)?;
    assert!(refused.stderr.contains("/nonexistent/pgh"), "{refused}");
    let unit = scratch.join("pghydrant.service");
    std::fs::write(&unit, text.replace("/usr/bin/pghydrant", "/bin/true").replace("User=postgres\n", ""))?;
    let verified = Run::new("systemd-analyze").arg("verify").arg(&unit).finish()?;
    assert!(!verified.stderr.contains("pghydrant.service:"), "{verified}");
    verified.expect_code(0)?;
    Ok(())
}
