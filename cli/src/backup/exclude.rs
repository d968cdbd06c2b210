//! What does not belong into a backup: PostgreSQL's own list, from its documentation ("Backing Up the Data Directory")
//! and from `basebackup.c`.
//!
//! What the server empties or makes anew at its start is left out; the directories themselves stay, for their
//! permissions. `backup_label`, `tablespace_map` and `backup_manifest` of this backup are made at its end; those that lie
//! in the data directory are another's. The log directory is kept, as `pg_basebackup` keeps it.

use std::collections::HashSet;

use engine::hydration::existing;

use super::relation::{self, Fork, RelationFile};

/// What becomes of a name in a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rule {
    /// Into the backup.
    Keep,
    /// A directory that is kept without its contents.
    Empty,
    /// Not into the backup.
    LeaveOut,
}

/// Directories of which only the name is kept.
const EMPTIED: [&str; 8] =
    ["pg_dynshmem", "pg_notify", "pg_replslot", "pg_serial", "pg_snapshots", "pg_stat_tmp", "pg_subtrans", "pg_wal"];

/// Names directly in the data directory.
const LEFT_OUT_AT_THE_TOP: [&str; 14] = [
    "postmaster.pid",
    "postmaster.opts",
    "standby.signal",
    "recovery.signal",
    "backup_label",
    "backup_label.old",
    "tablespace_map",
    "tablespace_map.old",
    "backup_manifest",
    "postgresql.auto.conf.tmp",
    "current_logfiles.tmp",
    // Ours: what a restore that was never finished left behind.
    "pghydrant.session",
    // Not PostgreSQL's: a data directory that is the root of a file system has it.
    "lost+found",
    ".DS_Store",
];

/// Decides for `name` in `directory` (a path in the data directory, empty for itself). `unlogged` are the relations of
/// that directory that have an init fork; `statistics` is where the server keeps temporary statistics, if it lies in the
/// data directory (PostgreSQL before 15).
pub(super) fn rule(directory: &str, name: &str, unlogged: &HashSet<u32>, statistics: Option<&str>) -> Rule {
    // Sorts and hash joins that spill, in `base/pgsql_tmp` and in tablespaces; the file sets of parallel workers.
    if name.starts_with("pgsql_tmp") || name.starts_with("pg_internal.init") {
        return Rule::LeaveOut;
    }
    if directory.is_empty() {
        // Of a delta restore: WAL that was never archived, kept aside; and its mark.
        let of_a_delta = name.starts_with(existing::SAVED_WAL) || name == existing::UNFINISHED;
        if LEFT_OUT_AT_THE_TOP.contains(&name) || of_a_delta {
            return Rule::LeaveOut;
        }
        if EMPTIED.contains(&name) {
            return Rule::Empty;
        }
    }
    if let Some(statistics) = statistics
        && statistics.strip_prefix(directory).map(|rest| rest.trim_start_matches('/')) == Some(name)
    {
        return Rule::Empty;
    }
    if relation::is_relation_directory(directory) {
        if relation::is_temporary(name) {
            return Rule::LeaveOut;
        }
        if let Some(file) = RelationFile::parse(name)
            && file.fork != Fork::Init
            && unlogged.contains(&file.number)
        {
            return Rule::LeaveOut;
        }
    }
    Rule::Keep
}

/// The relations among `names`, of one directory, that are unlogged: they have an init fork.
pub(super) fn unlogged<'a>(directory: &str, names: impl Iterator<Item = &'a str>) -> HashSet<u32> {
    if !relation::is_relation_directory(directory) {
        return HashSet::new();
    }
    names.filter_map(RelationFile::parse).filter(|file| file.fork == Fork::Init).map(|file| file.number).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decide(path: &str) -> Rule {
        let (directory, name) = path.rsplit_once('/').unwrap_or(("", path));
        rule(directory, name, &HashSet::from([16390]), Some("stats/tmp"))
    }

    #[test]
    fn the_documented_exclusions() {
        for path in [
            "pg_wal",
            "pg_replslot",
            "pg_dynshmem",
            "pg_notify",
            "pg_serial",
            "pg_snapshots",
            "pg_stat_tmp",
            "pg_subtrans",
            "stats/tmp",
        ] {
            assert_eq!(decide(path), Rule::Empty, "{path}");
        }
        for path in [
            "postmaster.pid",
            "postmaster.opts",
            "standby.signal",
            "recovery.signal",
            "backup_label.old",
            "postgresql.auto.conf.tmp",
            "base/pgsql_tmp",
            "base/5/pgsql_tmp12.3",
            "pg_tblspc/16400/PG_15_202209061/pgsql_tmp",
            "global/pg_internal.init",
            "base/5/pg_internal.init.123",
            "base/5/t3_16384",
            "base/5/16390",
            "base/5/16390.1",
            "base/5/16390_fsm",
            "base/5/16390_vm",
            "pg_tblspc/16400/PG_15_202209061/5/16390",
            "pghydrant.session",
            "pghydrant.unfinished",
            "pghydrant.wal-20261122T081500Z-3f9a1c",
        ] {
            assert_eq!(decide(path), Rule::LeaveOut, "{path}");
        }
    }

    #[test]
    fn everything_else_stays() {
        for path in [
            "PG_VERSION",
            "base",
            "base/5/16384",
            "base/5/16390_init",
            "base/5/PG_VERSION",
            "global/pg_filenode.map",
            "log",
            "log/postgresql.log",
            "current_logfiles",
            "postgresql.conf",
            "postgresql.auto.conf",
            "pg_stat",
            "pg_xact/0000",
            "mine/postmaster.pid",
            "mine/pg_wal",
            "pg_xact/16390",
            "stats",
            "tmp",
        ] {
            assert_eq!(decide(path), Rule::Keep, "{path}");
        }
    }

    #[test]
    fn unlogged_relations_are_known_by_their_init_fork() {
        assert_eq!(unlogged("base/5", ["1", "2_init", "3_fsm"].into_iter()), HashSet::from([2]));
        assert!(unlogged("pg_xact", ["2_init"].into_iter()).is_empty());
    }
}
