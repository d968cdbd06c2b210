//! The generated cluster: made once, started and stopped as a section needs it, changed page by page.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use engine::page::page_checksum;
use pghydrant_benches::pages::{PAGE_BYTES, Random};

use crate::compare::relations;
use crate::world::World;

pub(crate) const PORT: u16 = 29_876;
const ROWS: &str = include_str!("../realistic.sql");
/// A GiB of `realistic.sql` takes so many rows.
const ROWS_PER_GIB: f64 = 1_000_000.0;
/// Pages of relations from this size on are changed: tables and their indexes, never the catalogue.
const CHANGED_FROM: u64 = 4 << 20;
/// Pages in a relation's first file of this size: their checksums have the block's number in the whole relation.
const SEGMENT_PAGES: u64 = 131_072;

/// The data directory.
pub(crate) fn data(world: &World) -> PathBuf {
    world.path("cluster")
}

/// How a client finds a server of the suite.
pub(crate) fn connection(world: &World) -> String {
    format!("host={} port={PORT} user=postgres dbname=postgres", world.place.display())
}

/// Initializes a cluster, with page checksums and nothing that runs by itself. Its `pg_wal` stays small: those who copy
/// a cluster at rest copy it, a backup does not have it.
pub(crate) fn initialize(world: &World, data: &Path) -> anyhow::Result<()> {
    let mut initdb = world.server_program("initdb");
    initdb.args(["-k", "-A", "trust", "-U", "postgres", "--no-sync", "--locale=C", "-E", "UTF8", "-D"]).arg(data);
    world.run(&mut initdb).context("initdb")?;
    let settings = format!(
        "port = {PORT}\nunix_socket_directories = '{}'\nlisten_addresses = ''\nfsync = off\nmax_wal_size = 64MB\n\
         min_wal_size = 32MB\nwal_level = replica\nautovacuum = off\narchive_mode = on\narchive_command = '/bin/true'\n",
        world.place.display()
    );
    let path = data.join("postgresql.conf");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    fs::write(&path, text + &settings).with_context(|| format!("cannot write {}", path.display()))
}

/// The cluster of the run: `realistic.sql` at the size asked for, stopped.
pub(crate) fn make(world: &World) -> anyhow::Result<()> {
    eprintln!("making a cluster of {} GiB", world.options.size);
    let data = data(world);
    initialize(world, &data)?;
    start(world, &data)?;
    let rows = (world.options.size * ROWS_PER_GIB).max(1000.0) as u64;
    let script = world.path("realistic.sql");
    fs::write(&script, ROWS).with_context(|| format!("cannot write {}", script.display()))?;
    world.give_to_server(&script)?;
    let mut psql = psql(world);
    psql.arg("-v").arg(format!("rows={rows}")).arg("-f").arg(&script);
    world.run(&mut psql).context("the cluster's rows")?;
    // A restored server syncs, as in real life; the original did not need to.
    sql(world, "ALTER SYSTEM SET fsync = on")?;
    stop(world, &data)
}

/// All bytes of the data directory's files.
pub(crate) fn bytes(world: &World) -> anyhow::Result<u64> {
    tree_bytes(&data(world))
}

/// All bytes of the files below.
pub(crate) fn tree_bytes(directory: &Path) -> anyhow::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))? {
        let entry = entry.context("an entry")?;
        let metadata = entry.metadata().with_context(|| format!("{}", entry.path().display()))?;
        bytes += if metadata.is_dir() { tree_bytes(&entry.path())? } else { metadata.len() };
    }
    Ok(bytes)
}

pub(crate) fn start(world: &World, data: &Path) -> anyhow::Result<()> {
    let mut start = world.server_program("pg_ctl");
    start.arg("-D").arg(data).arg("-w").args(["-t", "600"]).arg("-l").arg(data.join("server.log")).arg("start");
    world.run(&mut start).map(drop)
}

/// Starts a server and does not wait.
pub(crate) fn start_only(world: &World, data: &Path) -> anyhow::Result<()> {
    let mut start = world.server_program("pg_ctl");
    start.arg("-D").arg(data).arg("-W").arg("-l").arg(data.join("server.log")).arg("start");
    world.run(&mut start).map(drop)
}

/// Stops a server, if it runs.
pub(crate) fn stop(world: &World, data: &Path) -> anyhow::Result<()> {
    stop_by(world, data, "fast")
}

pub(crate) fn stop_by(world: &World, data: &Path, mode: &str) -> anyhow::Result<()> {
    if !data.join("postmaster.pid").exists() {
        return Ok(());
    }
    let mut stop = world.server_program("pg_ctl");
    stop.arg("-D").arg(data).args(["-w", "-t", "600", "-m", mode, "stop"]);
    world.run(&mut stop).map(drop)
}

fn psql(world: &World) -> std::process::Command {
    let mut psql = world.server_program("psql");
    psql.args(["-XqAt", "-v", "ON_ERROR_STOP=1", "-d"]).arg(connection(world));
    psql
}

/// One statement; answers with what it says.
pub(crate) fn sql(world: &World, statement: &str) -> anyhow::Result<String> {
    world.run(psql(world).args(["-c", statement])).map(|said| said.trim().to_owned())
}

/// Which pages of a relation change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Spread {
    /// Here and there.
    Random,
    /// Side by side, as where rows are added or the newest are updated.
    Together,
}

/// Changes 5 % of the pages of a stopped cluster's large relations, as an UPDATE leaves them: LSN, a tuple's header, a
/// new tuple, the checksum. The rows mean nothing afterwards. Answers with the number of pages.
pub(crate) fn change_pages(world: &World, data: &Path, spread: Spread, seed: u64) -> anyhow::Result<u64> {
    let lsn = checkpoint_lsn(world, data)?;
    let mut random = Random(seed);
    let mut changed = 0;
    for name in relations(data)? {
        let path = data.join(&name);
        let pages = fs::metadata(&path).with_context(|| format!("{}", path.display()))?.len() / PAGE_BYTES as u64;
        let file_name = name.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let (relation, segment) = file_name.split_once('.').unwrap_or((&file_name, "0"));
        // Forks have a name with "_": the free space map, which is rebuilt, not updated.
        if pages * (PAGE_BYTES as u64) < CHANGED_FROM || relation.parse::<u32>().is_err() {
            continue;
        }
        let first_block = segment.parse::<u64>().unwrap_or(0) * SEGMENT_PAGES;
        let file = File::options().read(true).write(true).open(&path);
        let file = file.with_context(|| format!("cannot open {}", path.display()))?;
        for at in chosen(pages, spread, &mut random) {
            change(&file, at, (first_block + at) as u32, lsn, &mut random)
                .with_context(|| format!("cannot change page {at} of {}", path.display()))?;
            changed += 1;
        }
    }
    ensure!(changed > 0, "{} has no relation of {CHANGED_FROM} bytes", data.display());
    rustix::fs::sync();
    Ok(changed)
}

/// One in twenty.
fn chosen(pages: u64, spread: Spread, random: &mut Random) -> Vec<u64> {
    let wanted = pages / 20;
    match spread {
        Spread::Together => (pages - wanted..pages).collect(),
        Spread::Random => {
            let mut chosen = std::collections::BTreeSet::new();
            while (chosen.len() as u64) < wanted {
                chosen.insert(random.below(pages as usize) as u64);
            }
            chosen.into_iter().collect()
        }
    }
}

fn change(file: &File, at: u64, block: u32, lsn: u64, random: &mut Random) -> std::io::Result<()> {
    let mut page = [0; PAGE_BYTES];
    let offset = at * PAGE_BYTES as u64;
    file.read_exact_at(&mut page, offset)?;
    page[0..4].copy_from_slice(&((lsn >> 32) as u32).to_le_bytes());
    page[4..8].copy_from_slice(&(lsn as u32).to_le_bytes());
    let old = 4096 + random.below(3800) / 8 * 8;
    page[old..old + 4].copy_from_slice(&800_000_u32.to_le_bytes());
    let new = 1024 + random.below(2800) / 8 * 8;
    for chunk in page[new..new + 160].chunks_exact_mut(8) {
        chunk.copy_from_slice(&(random.number() >> 24).to_le_bytes());
    }
    let checksum = page_checksum(&page, block);
    page[8..10].copy_from_slice(&checksum.to_le_bytes());
    file.write_all_at(&page, offset)
}

/// Where the WAL stood when the server stopped: no page may be newer.
fn checkpoint_lsn(world: &World, data: &Path) -> anyhow::Result<u64> {
    let said = world.run(world.server_program("pg_controldata").arg(data))?;
    let line = said.lines().find_map(|line| line.strip_prefix("Latest checkpoint location:"));
    let parts = line.and_then(|line| line.trim().split_once('/'));
    let (high, low) = parts.context("pg_controldata tells no checkpoint")?;
    let number = |hex| u64::from_str_radix(hex, 16).context("pg_controldata's checkpoint is no LSN");
    Ok(number(high)? << 32 | number(low)?)
}
