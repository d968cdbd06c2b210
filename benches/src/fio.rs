//! What the device alone can do, and reads of single files, by fio.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, ensure};
use serde_json::Value;

use crate::world::{World, remove, words};

/// Requests in flight and their size, of which the fastest is the ceiling.
const SHAPES: [(&str, &str); 5] = [("256k", "32"), ("512k", "32"), ("1m", "16"), ("1m", "32"), ("2m", "16")];

/// The device's copy, with the shape and the memory that were fastest here.
#[derive(Clone, Debug)]
pub(crate) struct Ceiling {
    block: &'static str,
    depth: &'static str,
    memory: &'static str,
}

impl Ceiling {
    /// Tries all shapes once, with buffers in huge pages where the system has reserved some.
    pub(crate) fn find(world: &World, source: &Path) -> anyhow::Result<Self> {
        ensure!(world.find("fio").is_some(), "fio is not installed");
        let huge = Self { block: "1m", depth: "16", memory: "mmaphuge" };
        let memory = if huge.read(world, source).is_ok() { "mmaphuge" } else { "malloc" };
        let mut best: Option<(f64, Self)> = None;
        for (block, depth) in SHAPES {
            let shape = Self { block, depth, memory };
            world.drop_caches()?;
            let seconds = shape.copy(world, source)?;
            if best.as_ref().is_none_or(|(fastest, _)| seconds < *fastest) {
                best = Some((seconds, shape));
            }
        }
        best.map(|(_, shape)| shape).context("no shape was tried")
    }

    pub(crate) fn shape(&self) -> String {
        format!("io_uring, O_DIRECT, {} x {}, {}", self.block, self.depth, self.memory)
    }

    fn common(&self, world: &World, source: &Path) -> anyhow::Result<Command> {
        let bytes = fs::metadata(source).with_context(|| format!("{}", source.display()))?.len() >> 21 << 21;
        let mut fio = world.command("fio");
        fio.args(["--output-format=json", "--ioengine=io_uring", "--direct=1"]).arg(format!("--size={bytes}"));
        let huge = if self.memory == "mmaphuge" { Some("--hugepage-size=2m") } else { None };
        fio.arg(format!("--bs={}", self.block)).arg(format!("--iodepth={}", self.depth));
        fio.arg(format!("--iomem={}", self.memory)).args(huge);
        Ok(fio)
    }

    /// Seconds to copy the file, by fio's own clock.
    pub(crate) fn copy(&self, world: &World, source: &Path) -> anyhow::Result<f64> {
        let target = world.target();
        remove(&target)?;
        let mut fio = self.common(world, source)?;
        fio.args(["--name=read", "--rw=read"]);
        fio.args(words([&"--filename", &source]))
            .args(["--name=write", "--rw=write"])
            .args(words([&"--filename", &target]));
        fio.args(["--fallocate=posix", "--end_fsync=1"]);
        runtime(&world.run(&mut fio)?)
    }

    /// Seconds to read the file.
    pub(crate) fn read(&self, world: &World, source: &Path) -> anyhow::Result<f64> {
        let mut fio = self.common(world, source)?;
        fio.args(["--name=read", "--rw=read"]).args(words([&"--filename", &source]));
        runtime(&world.run(&mut fio)?)
    }
}

/// Reads of one file, one reader.
pub(crate) fn read(world: &World, file: &Path, options: &[&str]) -> anyhow::Result<f64> {
    let mut fio = world.command("fio");
    fio.args(["--output-format=json", "--name=read", "--readonly", "--invalidate=0"])
        .args(words([&"--filename", &file]));
    runtime(&world.run(fio.args(options))?)
}

/// The longest of the jobs.
fn runtime(json: &str) -> anyhow::Result<f64> {
    // fio may write a note before its JSON.
    let json = json.find('{').map_or("", |at| &json[at..]);
    let value: Value = serde_json::from_str(json).context("what fio says is no JSON")?;
    let jobs = value["jobs"].as_array().context("fio tells of no jobs")?;
    let of = |job: &Value| ["read", "write"].iter().filter_map(|way| job[*way]["runtime"].as_f64()).fold(0.0, f64::max);
    let milliseconds = jobs.iter().map(of).fold(0.0, f64::max);
    ensure!(milliseconds > 0.0, "fio measured nothing");
    Ok(milliseconds / 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_job_counts_and_notes_before_the_figures_do_not() {
        let said = r#"fio: a note
            { "jobs": [ { "read": { "runtime": 1500 }, "write": { "runtime": 0 } }, { "write": { "runtime": 2500 } } ] }"#;
        assert!(matches!(runtime(said), Ok(seconds) if (seconds - 2.5).abs() < 1e-9));
        assert!(runtime("{}").is_err());
    }
}
