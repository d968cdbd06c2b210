//! Servers of this machine, as far as the kernel shows them: for who is about to write into a data directory.
//!
//! `postmaster.pid` alone does not tell: the postmaster may be dead and its children at work, its number may be one of
//! another process namespace (a container's), and somebody may have removed the file. So every process called
//! `postgres` that we may look at is asked where it works, and the shared memory that the file names whether anybody
//! uses it. What stays unseen: other users' processes, unless we are root, and other machines.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// One server, by the first of its processes.
#[derive(Clone, Debug)]
pub(crate) struct Server {
    pub(crate) pid: u32,
    /// The directory it works in, by way of `/proc`.
    directory: PathBuf,
    identity: (u64, u64),
}

/// Every server that can be seen.
pub(crate) fn running() -> Vec<Server> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let mut pids: Vec<u32> = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    pids.sort_unstable();
    let mut servers: Vec<Server> = Vec::new();
    for pid in pids {
        let process = PathBuf::from(format!("/proc/{pid}"));
        if std::fs::read_to_string(process.join("comm")).is_ok_and(|name| name.trim_end() == "postgres")
            && let directory = process.join("cwd")
            && let Ok(metadata) = std::fs::metadata(&directory)
            && !servers.iter().any(|server| server.identity == identity(&metadata))
        {
            servers.push(Server { pid, directory, identity: identity(&metadata) });
        }
    }
    servers
}

impl Server {
    /// Whether it works in `directory` itself.
    pub(crate) fn works_in(&self, directory: &Path) -> bool {
        std::fs::metadata(directory).is_ok_and(|metadata| identity(&metadata) == self.identity)
    }

    /// Whether its WAL or one of its tablespaces lies in `directory`.
    pub(crate) fn has_files_in(&self, directory: &Path) -> bool {
        let Ok(wanted) = std::fs::metadata(directory) else { return false };
        let tablespaces = std::fs::read_dir(self.directory.join("pg_tblspc"));
        let tablespaces = tablespaces.into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
        let mut own = tablespaces.chain([self.directory.join("pg_wal")]);
        own.any(|path| std::fs::metadata(path).is_ok_and(|found| identity(&found) == identity(&wanted)))
    }

    /// Where it works, for messages.
    pub(crate) fn shown(&self) -> String {
        self.directory.read_link().unwrap_or_else(|_| self.directory.clone()).display().to_string()
    }
}

fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// How many processes use the shared memory that the `postmaster.pid` of a data directory names.
pub(crate) fn users_of_shared_memory(data: &Path) -> u64 {
    let file = std::fs::read_to_string(data.join("postmaster.pid")).unwrap_or_default();
    let segments = std::fs::read_to_string("/proc/sysvipc/shm").unwrap_or_default();
    attached(&file, &segments)
}

/// `key` and `id` stand in the seventh line of the file, and lead each line of the list; the sixth number of a
/// line there, behind permissions, size and two processes, counts who is attached.
fn attached(file: &str, segments: &str) -> u64 {
    let numbers = |line: &str| -> Vec<i64> { line.split_whitespace().map_while(|word| word.parse().ok()).collect() };
    let Some([key, id]) = file.lines().nth(6).map(numbers).and_then(|found| <[i64; 2]>::try_from(found).ok()) else {
        return 0;
    };
    // The list has the key signed, the file unsigned.
    let same_key = |listed: i64| listed & 0xFFFF_FFFF == key & 0xFFFF_FFFF;
    let mut listed = segments.lines().map(numbers).filter(|line| line.len() > 6);
    let found = listed.find(|line| same_key(line[0]) && line[1] == id);
    found.and_then(|line| u64::try_from(line[6]).ok()).unwrap_or_default()
}

/// The name of a file system that other machines may have mounted as well, by the number that `statfs` gives.
pub(crate) fn shared_file_system(magic: u64) -> Option<&'static str> {
    Some(match magic & 0xFFFF_FFFF {
        0x6969 => "NFS",
        0x517B | 0xFF53_4D42 | 0xFE53_4D42 => "SMB",
        0x00C3_6400 => "Ceph",
        0x0116_1970 => "GFS2",
        0x7461_636F => "OCFS2",
        0x0BD0_0BD0 => "Lustre",
        0x4750_4653 => "GPFS",
        0x1983_0326 => "BeeGFS",
        0x2003_0528 => "OrangeFS",
        0x5346_414F | 0x6B41_4653 => "AFS",
        0x7372_7279 | 0x7375_7245 => "Coda",
        0x0102_1997 => "9P",
        // virtiofs and GlusterFS are FUSE as well.
        0x6573_5546 => "FUSE",
        0x786F_4256 => "vboxsf",
        0xBACB_ACBC => "vmhgfs",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_uses_the_shared_memory_of_a_server_is_counted() {
        let file = "4711\n/srv/pg\n1763798400\n5433\n/run/postgresql\nlocalhost\n3000000000        17\nready   \n";
        let list = "       key      shmid perms                  size  cpid  lpid nattch   uid   gid\n\
                    -1294967296         17   600                   56  4711  4712      3   101   104\n\
                    -1294967296         18   600                   56  4711  4712      5   101   104\n";
        assert_eq!(attached(file, list), 3);
        assert_eq!(attached(&file.replace("17\n", "19\n"), list), 0);
        assert_eq!(attached("4711\n/srv/pg\n1\n", list), 0);
        assert_eq!(attached("", ""), 0);
    }

    #[test]
    fn file_systems_of_several_machines_are_known() {
        assert_eq!(shared_file_system(0x6969), Some("NFS"));
        assert_eq!(shared_file_system(0xFFFF_FFFF_FF53_4D42), Some("SMB"));
        for local in [0xEF53, 0x5846_5342, 0x9123_683E, 0x0102_1994, 0x794C_7630, 0x2FC1_2FC1] {
            assert_eq!(shared_file_system(local), None);
        }
    }

    #[test]
    fn a_process_that_is_no_server_is_none() {
        assert!(running().iter().all(|server| server.pid != std::process::id()));
    }
}
