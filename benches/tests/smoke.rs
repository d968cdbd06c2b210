//! The suite runs: a tiny cluster, one round, without other tools. What it measures there means nothing.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::path::Path;
use std::process::Command;

#[path = "../../tests/support/left_out.rs"]
mod left_out;

#[test]
fn the_suite_restores_a_tiny_cluster_and_leaves_nothing_behind() {
    let bench = Path::new(env!("CARGO_BIN_EXE_bench"));
    let lacks = [
        (rustix::process::geteuid().is_root(), "root"),
        // A build of the whole workspace has it beside this one.
        (bench.with_file_name("pghydrant").exists(), "pghydrant's own build (cargo build --package pghydrant)"),
        (Path::new("/usr/lib/postgresql").exists(), "PostgreSQL (package postgresql)"),
        (Path::new("/dev/fuse").exists(), "FUSE (/dev/fuse)"),
    ];
    if let Some((_, missing)) = lacks.iter().find(|(there, _)| !there) {
        return left_out::leave_out("the_suite_restores_a_tiny_cluster_and_leaves_nothing_behind", missing);
    }
    let scratch = tempfile::Builder::new().prefix("pghydrant-test-").tempdir_in("/var/tmp").unwrap();
    let place = scratch.path().join("place");
    let mut command = Command::new(bench);
    command.args(["--size", "0.02", "--rounds", "1", "--peers", "none", "--codecs", "lz4", "--warm"]);
    command.args(["--only", "restore,scale"]).arg("--place").arg(&place);
    command.arg("--json").arg(scratch.path().join("figures.json")).arg("--svg").arg(scratch.path());
    // The server's user has to reach the place.
    std::fs::set_permissions(scratch.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(!place.exists(), "{} is left", place.display());

    let figures = std::fs::read_to_string(scratch.path().join("figures.json")).unwrap();
    let figures: serde_json::Value = serde_json::from_str(&figures).unwrap();
    let names: Vec<_> = figures["results"].as_array().unwrap().iter().map(|series| &series["name"]).collect();
    for name in [
        "pghydrant mount lz4",
        "pghydrant blocks lz4",
        "cp -a",
        "pg_basebackup",
        "list, 10 TB",
        "mount and first read, 1,000,000 files",
    ] {
        assert!(names.iter().any(|found| *found == name), "no figure of {name}: {said}");
    }
    let chart = std::fs::read_to_string(scratch.path().join("restore.svg")).unwrap();
    assert!(chart.starts_with("<svg ") && chart.contains("pghydrant blocks lz4"));
    assert!(said.contains("| bar | wanted | got | holds |"), "{said}");
}
