//! Is a copy right? Where nobody wrote a `backup_manifest` that `pg_verifybackup` could read, the tables are compared.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};

use crate::world::World;

/// Relations from this size on do not change while the server idles: they are compared byte by byte. Others, of the
/// catalogue, may differ by hints.
const COMPARED_FROM: u64 = 1 << 20;
const CHUNK: usize = 1 << 20;

/// `pg_verifybackup` of a directory; its WAL is not its own to check.
pub(crate) fn verify_backup(world: &World, directory: &Path) -> anyhow::Result<()> {
    world.run(world.server_program("pg_verifybackup").args(["--no-parse-wal", "--quiet"]).arg(directory)).map(drop)
}

/// All files of the cluster's databases are in the copy with their size; the large ones with the same bytes.
pub(crate) fn same_tables(cluster: &Path, copy: &Path) -> anyhow::Result<()> {
    let mut compared = 0;
    for name in relations(cluster)? {
        let (original, copied) = (cluster.join(&name), copy.join(&name));
        let bytes = fs::metadata(&original).with_context(|| format!("{}", original.display()))?.len();
        if bytes < COMPARED_FROM {
            continue;
        }
        ensure!(same_bytes(&original, &copied)?, "{} is not what it was", copied.display());
        compared += 1;
    }
    ensure!(compared > 0, "{} has no table of {COMPARED_FROM} bytes", cluster.display());
    Ok(())
}

/// The files in `base/*`, relative to the data directory.
pub(crate) fn relations(data: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let base = data.join("base");
    for database in fs::read_dir(&base).with_context(|| format!("cannot read {}", base.display()))? {
        let database = database.context("an entry of base")?.path();
        for file in fs::read_dir(&database).with_context(|| format!("cannot read {}", database.display()))? {
            let path = file.context("a file of a database")?.path();
            found.extend(path.strip_prefix(data).ok().map(Path::to_owned));
        }
    }
    found.sort();
    Ok(found)
}

fn same_bytes(one: &Path, other: &Path) -> anyhow::Result<bool> {
    let open = |path: &Path| File::open(path).with_context(|| format!("cannot open {}", path.display()));
    let (mut one, mut other) = (open(one)?, open(other)?);
    let (mut left, mut right) = (Vec::with_capacity(CHUNK), Vec::with_capacity(CHUNK));
    loop {
        left.clear();
        right.clear();
        one.by_ref().take(CHUNK as u64).read_to_end(&mut left).context("cannot read the cluster")?;
        other.by_ref().take(CHUNK as u64).read_to_end(&mut right).context("cannot read the copy")?;
        if left != right || left.is_empty() {
            return Ok(left == right);
        }
    }
}
