//! The benchmark suite that anybody can run: whole backups, restores, deltas, mounts and WAL of a generated cluster,
//! beside the device's own ceiling and beside the other tools that are installed here, in one run.
//!
//! Rounds are interleaved, so that a noisy minute hits all contestants alike. Each run starts with cold caches and ends
//! with `sync`. What is written down is the median of the rounds with their spread; what differs by less than the spread
//! of either is called equal. What each contestant restored is checked once, which is not counted. What cannot run here
//! says why, in the table and in the JSON.
//!
//! Always true: nothing is left behind, neither files nor servers nor mounts, also after Ctrl-C.

#![allow(clippy::print_stdout, clippy::print_stderr)]
// Figures for people: megabytes, seconds and their ratios.
#![allow(clippy::cast_possible_truncation, clippy::cast_precision_loss, clippy::cast_sign_loss)]

mod bars;
mod chart;
mod cluster;
mod compare;
mod contest;
mod fio;
mod hosts;
mod machine;
mod measure;
mod options;
mod ours;
mod peers;
mod pgbackrest_tls;
mod processes;
mod query;
mod report;
mod sections;
mod world;

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;

use options::{Options, Section};
use report::Report;
use world::World;

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// True where everything of ours ran to its end.
fn run(options: &Options) -> anyhow::Result<bool> {
    let world = World::new(options)?;
    let mut report = Report::new(machine::Machine::survey(&world));
    eprintln!("{}", report.machine);
    world.check_space()?;
    cluster::make(&world)?;
    report.cluster_bytes = cluster::bytes(&world)?;
    let outcome = contests(&world, &mut report);
    report.machine.load_at_the_end = machine::load();
    println!("\n{report}");
    println!("{}", bars::table(&report));
    write_files(options, &report)?;
    outcome?;
    Ok(!report.ours_failed())
}

/// In the order in which the sections leave the cluster as the next one needs it.
fn contests(world: &World, report: &mut Report) -> anyhow::Result<()> {
    for section in Section::ALL {
        if !world.options.wants(section) {
            continue;
        }
        eprintln!("{section}");
        match section {
            Section::Backup => sections::backup::run(world, report),
            Section::Restore => sections::restore::run(world, report),
            Section::Mount => sections::mount::run(world, report),
            Section::Small => sections::small::run(world, report),
            Section::Reflink => sections::reflink::run(world, report),
            Section::Network => sections::network::run(world, report),
            Section::Scale => sections::scale::run(world, report),
            Section::Wal => sections::wal::run(world, report),
            Section::Delta => sections::delta::run(world, report),
        }
        .with_context(|| format!("{section}"))?;
    }
    Ok(())
}

fn write_files(options: &Options, report: &Report) -> anyhow::Result<()> {
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&report.to_json()).context("the figures")?;
        std::fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(directory) = &options.svg {
        std::fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
        for section in report.sections() {
            let path = directory.join(format!("{section}.svg"));
            std::fs::write(&path, chart::svg(report, section))
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
    }
    Ok(())
}
