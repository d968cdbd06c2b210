//! `<label>.json`: what a backup is, readable by people. Its appearance is the commit of the backup.

use serde::{Deserialize, Serialize};

use crate::codec::Compression;
use crate::format::Malformed;
use crate::format::environment::Environment;
use crate::format::json::{read_json, write_json};
use crate::format::repository::check_segment_bytes;
use crate::units::{BackupLabel, BlockSize, ClusterName, Lsn, SystemIdentifier, Timeline};

/// No backup takes more WAL: 16 TiB in segments of the usual size.
const WAL_SEGMENTS_MAX: u64 = 1 << 20;

/// A backup's description. Fields are only ever added; unknown ones are kept readable by serde's default.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BackupInfo {
    /// Format of the repository that wrote it.
    pub format: u16,
    /// The oldest reader that understands it.
    pub minimum_reader: u16,
    /// Its name.
    pub label: BackupLabel,
    /// The cluster it belongs to.
    pub cluster: ClusterName,
    /// The backup that blocks were compared with, if any.
    pub parent: Option<BackupLabel>,
    /// UTC, RFC 3339, of the start and of the end.
    pub started_at: String,
    /// See `started_at`. Recovery targets in time must lie after it.
    pub stopped_at: String,
    /// Seconds since 1970 of the end by the server's clock, for comparison.
    pub stopped_unix: i64,
    /// What the server is.
    pub server: ServerInfo,
    /// Where recovery starts and where the backup is consistent.
    pub wal: WalRange,
    /// `pg_current_snapshot()` when the backup stopped: an XID that is finished in it cannot be a target.
    pub snapshot: Snapshot,
    /// Tablespaces outside the data directory.
    pub tablespaces: Vec<Tablespace>,
    /// Pages whose checksum was wrong, after reading again.
    pub bad_pages: Vec<BadPage>,
    /// Compression it was written with.
    pub compression: Compression,
    /// Block size it was written with.
    pub block_bytes: BlockSize,
    /// The manifest that holds everything else.
    pub manifest: ManifestInfo,
    /// Counts.
    pub totals: Totals,
}

impl BackupInfo {
    /// The file's content.
    pub fn to_json(&self) -> Result<Vec<u8>, Malformed> {
        write_json(self)
    }

    /// What the file's content says.
    pub fn from_json(bytes: &[u8]) -> Result<Self, Malformed> {
        let info: Self = read_json(bytes, "backup")?;
        info.check().map_err(|detail| Malformed::damaged(0, detail))?;
        Ok(info)
    }

    /// What a reader counts and computes with. The checksum says that somebody meant it, not that it makes sense.
    fn check(&self) -> Result<(), String> {
        let WalRange { start, stop, .. } = self.wal;
        let segment_bytes = self.server.wal_segment_bytes;
        check_segment_bytes(segment_bytes)?;
        if start > stop || (stop.0 - start.0) / segment_bytes > WAL_SEGMENTS_MAX {
            return Err(format!("a backup that begins at {start} and ends at {stop} of the WAL"));
        }
        let mut oids: Vec<_> = self.tablespaces.iter().map(|tablespace| tablespace.oid).collect();
        oids.sort_unstable();
        if let Some(pair) = oids.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(format!("two tablespaces {}", pair[0]));
        }
        Ok(())
    }
}

/// The server that was backed up.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServerInfo {
    /// Same for all copies of a cluster.
    pub system_identifier: SystemIdentifier,
    /// `server_version_num`: 150018.
    pub version_num: u32,
    /// Page checksums are on.
    pub data_checksums: bool,
    /// `wal_segment_size`, bytes.
    pub wal_segment_bytes: u64,
    /// `data_directory`.
    pub data_directory: String,
    /// `config_file`, `hba_file`, `ident_file` where they lie outside the data directory.
    pub outside_files: Vec<String>,
    /// Name of the operating system user that owns the data directory.
    pub owner: String,
    /// Other settings as the server ran them: `port`, `max_connections`, `shared_preload_libraries`, `archive_mode`, …
    pub settings: std::collections::BTreeMap<String, String>,
    /// What it found on its machine; unknown of a base backup that was taken over, and of earlier backups.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub environment: Option<Environment>,
}

/// The WAL that makes a backup consistent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WalRange {
    /// Timeline of the backup.
    pub timeline: Timeline,
    /// `START WAL LOCATION`.
    pub start: Lsn,
    /// What `pg_backup_stop` returned: no target lies before it.
    pub stop: Lsn,
}

/// `pg_current_snapshot()`, 64-bit transaction ids.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Everything before is finished.
    pub xmin: u64,
    /// The next to be given out.
    pub xmax: u64,
    /// In progress between the two.
    pub in_progress: Vec<u64>,
}

/// A tablespace outside the data directory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tablespace {
    /// Its OID; the name of its link in `pg_tblspc`.
    pub oid: u32,
    /// Its name in SQL.
    pub name: String,
    /// Its directory in the original.
    pub location: String,
    /// Content bytes.
    pub bytes: u64,
}

/// A page whose checksum is wrong at the source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BadPage {
    /// The file.
    pub path: String,
    /// Page number within the file, from 0.
    pub page: u32,
    /// What the page says.
    pub stored: u16,
    /// What its bytes give.
    pub computed: u16,
}

/// Where the manifest is, and the hash that proves all of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ManifestInfo {
    /// BLAKE3 of the manifest's root chunk, hex.
    pub root_hash: String,
    /// The root chunk in `manifests/<label>.manifest`.
    pub root_offset: u64,
    /// Its bytes.
    pub root_bytes: u32,
}

/// A backup in numbers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Totals {
    /// Regular files.
    pub files: u64,
    /// Directories and links.
    pub directories: u64,
    /// Content bytes of all files.
    pub bytes: u64,
    /// Block records.
    pub blocks: u64,
    /// Bytes that this backup added to the packs.
    pub added_pack_bytes: u64,
    /// Bytes that this backup added to the manifests.
    pub added_manifest_bytes: u64,
    /// Content bytes of blocks that were the same in the parent.
    pub shared_bytes: u64,
    /// Wall time of the whole backup, milliseconds.
    pub milliseconds: u64,
}

impl Totals {
    /// Bytes that the backup added to the repository.
    pub fn added_bytes(&self) -> u64 {
        self.added_pack_bytes.saturating_add(self.added_manifest_bytes)
    }
}
