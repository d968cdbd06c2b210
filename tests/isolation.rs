//! The isolation of a copy, proven on the original's side: its archive, its slots, its subscriptions' source, its
//! tablespaces, during a restore beside it and after, while the copy works.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::support::compare::{Entry, same_trees, tree};
use crate::support::*;

/// A cluster that subscribes to a database of its own, waits for a standby, archives through a script that notes who calls
/// it, logs every connection, and has a tablespace.
struct Original {
    world: World,
    tablespace: PathBuf,
    /// Who archived what.
    calls: PathBuf,
}

impl Original {
    fn build() -> Result<Self> {
        let settings =
            ["wal_level = logical", "log_connections = on", "log_replication_commands = on", "autovacuum = off"];
        let world = World::with(0, &[], &settings)?;
        let cluster = &world.cluster;
        let (calls, script) = (world.scratch.join("calls"), world.scratch.join("archive.sh"));
        let push = format!("{} wal push --repo {}", world.pghydrant.binary.display(), world.repository.shown());
        let noted = format!("#!/bin/sh\necho \"$PWD $1\" >> {}\nexec {push} --cluster main \"$1\"\n", calls.display());
        fs::write(&script, noted)?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
        cluster.sql(&format!("ALTER SYSTEM SET archive_command = '{} %p'", script.display()))?;
        cluster.sql("SELECT pg_reload_conf()")?;

        let tablespace = world.scratch.directory("space")?;
        cluster.sql(&format!("CREATE TABLESPACE space LOCATION '{}'", tablespace.display()))?;
        cluster.sql("CREATE TABLE far TABLESPACE space AS SELECT generate_series(1, 1000) AS i")?;
        cluster.sql("CREATE DATABASE source")?;
        cluster.sql_in("source", "CREATE TABLE fed (i int); CREATE PUBLICATION feed FOR TABLE fed")?;
        cluster.sql_in("source", "SELECT pg_create_logical_replication_slot('feed', 'pgoutput')")?;
        cluster.sql("SELECT pg_create_physical_replication_slot('standby', true)")?;
        let source = format!("host={} port={} user=postgres dbname=source", cluster.sockets.display(), cluster.port);
        cluster.sql("CREATE TABLE fed (i int)")?;
        cluster.sql(&format!(
            "CREATE SUBSCRIPTION feeds CONNECTION '{source}' PUBLICATION feed \
             WITH (create_slot = false, slot_name = 'feed', copy_data = false, enabled = true)"
        ))?;
        cluster.sql_in("source", "INSERT INTO fed VALUES (1)")?;
        process::wait_until("the subscription's first row", std::time::Duration::from_secs(60), || {
            Ok(cluster.number("SELECT count(*) FROM fed")? == 1)
        })?;
        world.mark("before")?;
        // From here on a commit without this setting waits for ever.
        cluster.sql("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")?;
        cluster.sql("ALTER ROLE postgres SET synchronous_commit = local")?;
        cluster.sql("SELECT pg_reload_conf()")?;
        Ok(Self { world, tablespace, calls })
    }

    /// The subscription ends, and changes pile up in its slot: who connects now takes them away.
    fn leave_changes_in_the_slot(&self) -> Result<()> {
        let cluster = &self.world.cluster;
        cluster.sql("ALTER SUBSCRIPTION feeds DISABLE")?;
        process::wait_until("the subscription's end", std::time::Duration::from_secs(60), || {
            Ok(cluster.number("SELECT count(*) FROM pg_replication_slots WHERE active")? == 0)
        })?;
        cluster.sql_in("source", "INSERT INTO fed SELECT generate_series(2, 100)")?;
        Ok(())
    }

    fn slots(&self) -> Result<String> {
        self.world
            .cluster
            .sql("SELECT slot_name, restart_lsn, confirmed_flush_lsn, active FROM pg_replication_slots ORDER BY 1")
    }

    /// What asks for the original's WAL, by its log: it has every connection.
    fn replication_connections(&self) -> Result<usize> {
        let log = fs::read_to_string(self.world.cluster.log_file())?;
        Ok(log.lines().filter(|line| line.contains("replication connection") || line.contains("_REPLICATION")).count())
    }

    /// Whose segments were archived.
    fn archivers(&self) -> Result<Vec<String>> {
        let calls = fs::read_to_string(&self.calls)?;
        let mut archivers: Vec<String> =
            calls.lines().filter_map(|line| Some(line.split_once(' ')?.0.to_owned())).collect();
        archivers.sort();
        archivers.dedup();
        Ok(archivers)
    }

    /// Everything of the original's that a copy could write into.
    fn files(&self) -> Result<BTreeMap<PathBuf, Entry>> {
        let world = &self.world;
        let mut all = BTreeMap::new();
        for root in [world.cluster.data.as_path(), &self.tablespace, world.repository.path()] {
            all.extend(tree(root)?.into_iter().map(|(path, entry)| (root.join(path), entry)));
        }
        Ok(all)
    }

    fn restore(&self, to: &Path) -> Result<Instance> {
        let space = format!("space={}", to.with_extension("space").display());
        let arguments = ["--source", "blocks", "--target-name", "here", "--tablespace", &space];
        self.world.restore_to(to, &arguments)?.expect_code(0)?;
        Instance::running_in(to)
    }
}

/// The copy does all that its original did: commits, archives, subscribes, writes its tablespace, keeps WAL for slots.
fn work(copy: &Instance) -> Result<()> {
    commit(copy, "in the copy")?;
    copy.sql("INSERT INTO far SELECT generate_series(1, 10000)")?;
    copy.sql("CREATE TABLE new TABLESPACE space AS SELECT generate_series(1, 1000) AS i")?;
    for _ in 0..3 {
        switch(copy)?;
    }
    for statement in ["DROP TABLE far", "VACUUM", "CHECKPOINT"] {
        copy.sql(statement)?;
    }
    assert_eq!(copy.sql("SELECT subenabled FROM pg_subscription")?, "t", "the copy has not what could do harm");
    assert_eq!(copy.number("SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'logical replication%'")?, 0);
    assert_eq!(copy.number("SELECT count(*) FROM pg_replication_slots")?, 0);
    Ok(())
}

/// A commit that would wait for a standby. Nobody ends it but the limit of every command here.
fn commit(copy: &Instance, mark: &str) -> Result<()> {
    copy.sql(&format!("SET synchronous_commit = on; INSERT INTO marks VALUES ('{mark}')"))?;
    Ok(())
}

/// A segment for the archive, if there were one.
fn switch(copy: &Instance) -> Result<()> {
    copy.sql("SELECT pg_logical_emit_message(false, 'test', 'x'); SELECT pg_switch_wal()")?;
    copy.sql("CHECKPOINT")?;
    Ok(())
}

#[test]
fn a_copy_beside_its_original_touches_nothing_of_it() -> Result<()> {
    requires!(Postgres);
    let original = Original::build()?;
    let world = &original.world;
    world.backup()?;
    world.cluster.sql("SELECT pg_create_restore_point('here')")?;
    original.leave_changes_in_the_slot()?;
    world.cluster.archive_wal()?;
    let (slots, connections) = (original.slots()?, original.replication_connections()?);
    ensure!(slots.contains("feed") && slots.contains("standby"), "{slots}");
    ensure!(connections > 0, "the original's log does not tell who replicates");

    // Beside the original that runs: its log has whoever came, and the script whoever archived.
    let copy = original.restore(&world.target())?;
    work(&copy)?;
    copy.restart()?;
    work_again(&copy)?;
    assert_eq!(original.slots()?, slots, "the original's slots moved");
    assert_eq!(original.replication_connections()?, connections, "somebody asked for the original's WAL");
    let own = fs::canonicalize(&world.cluster.data)?.display().to_string();
    assert_eq!(original.archivers()?, [own], "somebody else archived");
    drop(copy);

    // Beside one that is down: not a byte of its files changes, nor a file's owner or mode.
    world.cluster.stop("fast")?;
    let before = original.files()?;
    let copy = original.restore(&world.scratch.join("second"))?;
    work(&copy)?;
    copy.stop("fast")?;
    same_trees(&before, &original.files()?, |_| false)
}

/// After a restart by hand it is as isolated as before.
fn work_again(copy: &Instance) -> Result<()> {
    commit(copy, "again")?;
    switch(copy)?;
    assert_eq!(copy.number("SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'logical replication%'")?, 0);
    assert_eq!(copy.sql("SHOW archive_mode")?, "off");
    Ok(())
}
