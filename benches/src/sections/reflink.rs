//! Restores that move no bytes: repository and target on one XFS, or btrfs, in a loop-mounted file.

use std::fs::{self, File};
use std::path::Path;

use anyhow::Context as _;

use crate::compare::verify_backup;
use crate::contest::{Contestant, hold};
use crate::options::{CodecName, Section};
use crate::ours::{Repository, restore_has};
use crate::report::{Kind, Report, Work};
use crate::world::{World, remove};

/// File systems that share extents, and how each is made.
const FILE_SYSTEMS: [(&str, &[&str]); 2] = [("xfs", &["-q", "-m", "reflink=1"]), ("btrfs", &["-q"])];

pub(crate) fn run(world: &World, report: &mut Report) -> anyhow::Result<()> {
    if !restore_has(world, "--io")? || !restore_has(world, "reflink")? {
        report.leave_out(
            Section::Reflink,
            "pghydrant reflink",
            Kind::Ours,
            "this pghydrant has no restore --io reflink",
        );
        return Ok(());
    }
    if !world.options.codecs.contains(&CodecName::None) {
        report.leave_out(
            Section::Reflink,
            "pghydrant reflink",
            Kind::Ours,
            "only blocks stored as they are can be shared",
        );
        return Ok(());
    }
    Repository::new(world, CodecName::None).ensure_backup()?;
    for (file_system, options) in FILE_SYSTEMS {
        let program = format!("mkfs.{file_system}");
        let contested = match world.find(&program) {
            None => Err(anyhow::anyhow!("{program} is not installed")),
            Some(program) => on(world, report, file_system, &program, options),
        };
        if let Err(error) = contested {
            world.check_interrupt()?;
            let name = format!("pghydrant reflink {file_system}");
            report.leave_out(Section::Reflink, &name, Kind::Ours, format!("cannot be tried: {error:#}"));
        }
    }
    Ok(())
}

fn on(world: &World, report: &mut Report, name: &str, mkfs: &Path, options: &[&str]) -> anyhow::Result<()> {
    let (image, at) = (world.path("reflink.img"), world.path("reflink"));
    fs::create_dir_all(&at).with_context(|| format!("cannot make {}", at.display()))?;
    let file = File::create(&image).with_context(|| format!("cannot make {}", image.display()))?;
    file.set_len(2 * report.cluster_bytes + (2 << 30)).context("cannot size the image")?;
    world.run(world.command(mkfs).args(options).arg(&image))?;
    world.run(world.command("mount").args(["-o", "loop"]).arg(&image).arg(&at))?;
    let outcome = world.give_to_server(&at).and_then(|()| contest(world, report, name, &at));
    let unmounted = world.run(world.command("umount").arg(&at));
    remove(&image)?;
    outcome.and_then(|()| unmounted.map(drop))
}

fn contest(world: &World, report: &mut Report, file_system: &str, at: &Path) -> anyhow::Result<()> {
    let original = Repository::new(world, CodecName::None);
    let name = format!("{}/repository", at.file_name().unwrap_or_default().to_string_lossy());
    let repository = Repository::named(world, &name, CodecName::None);
    world.run(world.command("cp").arg("-a").arg(&original.path).arg(&repository.path))?;
    let mut ways: Vec<(String, Vec<&str>)> = vec![(format!("reflink {file_system}"), vec!["--io", "reflink"])];
    if restore_has(world, "--trust-repository")? {
        let options = vec!["--io", "reflink", "--trust-repository"];
        ways.push((format!("reflink {file_system}, repository trusted"), options));
    }
    let target = at.join("target");
    let contestants = ways.into_iter().map(|(name, more)| {
        let (repository, restored, checked, emptied) =
            (repository.clone(), target.clone(), target.clone(), target.clone());
        let options = [more, vec!["--target-immediate", "--no-start"]].concat();
        Contestant::new(Kind::Ours, name, move || repository.restore_to(&restored, "blocks", &options))
            .prepare(move || remove(&emptied))
            .check(move || verify_backup(world, &checked))
    });
    let contestants: Vec<_> = contestants.collect();
    hold(world, report, Section::Reflink, Work::Bytes(report.cluster_bytes), contestants)
}
