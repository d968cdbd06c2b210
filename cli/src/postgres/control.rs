//! `global/pg_control`: what the cluster is, and in which state it was left.
//!
//! The file is one C structure at the start of 8192 bytes, guarded by a CRC-32C. Its layout has been the same from
//! PostgreSQL 13 on, but for what version 18 put before the nonce, which moves the CRC by four bytes. The offsets
//! below are those of every 64-bit little-endian platform.
//!
//! A running server rewrites the file in place, so a reader may see a torn one: the CRC tells, and
//! [`read_stable`] reads again.

use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use engine::units::{Lsn, SystemIdentifier, Timeline};

/// The size of the file on disk, in every version.
pub(crate) const FILE_BYTES: usize = 8192;
/// Where it lies in a data directory.
pub(crate) const PATH: &str = "global/pg_control";

/// A torn read is over within microseconds; after this many attempts the file itself is wrong.
const READ_ATTEMPTS: u32 = 100;
const READ_PAUSE: Duration = Duration::from_millis(10);

// Offsets in `ControlFileData`, PostgreSQL 13 to 18.
const SYSTEM_IDENTIFIER: usize = 0;
const CONTROL_VERSION: usize = 8;
const CATALOG_VERSION: usize = 12;
const STATE: usize = 16;
const TIME: usize = 24;
const CHECKPOINT: usize = 32;
/// `checkPointCopy`, a `CheckPoint`.
const COPY: usize = 40;
const COPY_REDO: usize = COPY;
const COPY_TIMELINE: usize = COPY + 8;
const COPY_PREVIOUS_TIMELINE: usize = COPY + 12;
const COPY_NEXT_XID: usize = COPY + 24;
const COPY_TIME: usize = COPY + 64;
const COPY_END: usize = COPY + 88;
const MIN_RECOVERY_POINT: usize = COPY_END + 8;
const MIN_RECOVERY_TIMELINE: usize = MIN_RECOVERY_POINT + 8;
const BACKUP_START: usize = MIN_RECOVERY_TIMELINE + 8;
const BACKUP_END: usize = BACKUP_START + 8;
const BACKUP_END_REQUIRED: usize = BACKUP_END + 8;
const WAL_LEVEL: usize = BACKUP_END_REQUIRED + 4;
const MAX_CONNECTIONS: usize = WAL_LEVEL + 8;
const MAX_WORKER_PROCESSES: usize = MAX_CONNECTIONS + 4;
const MAX_WAL_SENDERS: usize = MAX_WORKER_PROCESSES + 4;
const MAX_PREPARED_XACTS: usize = MAX_WAL_SENDERS + 4;
const MAX_LOCKS_PER_XACT: usize = MAX_PREPARED_XACTS + 4;
const FLOAT_FORMAT: usize = MAX_LOCKS_PER_XACT + 12;
const BLOCK_BYTES: usize = FLOAT_FORMAT + 8;
const RELATION_SEGMENT_PAGES: usize = BLOCK_BYTES + 4;
const WAL_BLOCK_BYTES: usize = RELATION_SEGMENT_PAGES + 4;
const WAL_SEGMENT_BYTES: usize = WAL_BLOCK_BYTES + 4;
const DATA_CHECKSUM_VERSION: usize = WAL_SEGMENT_BYTES + 24;
/// The nonce's 32 bytes follow, then the CRC; from 18 on a flag lies before the nonce.
const CRC_13: usize = DATA_CHECKSUM_VERSION + 4 + 32;
const CRC_18: usize = CRC_13 + 4;

const _: () =
    assert!(MIN_RECOVERY_POINT == 136 && FLOAT_FORMAT == 208 && DATA_CHECKSUM_VERSION == 252 && CRC_13 == 288);

/// What `DBState` says of the last start or stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Starting up.
    StartingUp,
    /// Shut down cleanly as a primary.
    ShutDown,
    /// Shut down cleanly while in recovery.
    ShutDownInRecovery,
    /// Was shutting down.
    ShuttingDown,
    /// Was in crash recovery.
    InCrashRecovery,
    /// Is, or was, in archive recovery.
    InArchiveRecovery,
    /// Is running, or crashed while it was.
    InProduction,
}

impl State {
    fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::StartingUp,
            1 => Self::ShutDown,
            2 => Self::ShutDownInRecovery,
            3 => Self::ShuttingDown,
            4 => Self::InCrashRecovery,
            5 => Self::InArchiveRecovery,
            6 => Self::InProduction,
            _ => return None,
        })
    }
}

impl fmt::Display for State {
    /// In the words of `pg_controldata`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::StartingUp => "starting up",
            Self::ShutDown => "shut down",
            Self::ShutDownInRecovery => "shut down in recovery",
            Self::ShuttingDown => "shutting down",
            Self::InCrashRecovery => "in crash recovery",
            Self::InArchiveRecovery => "in archive recovery",
            Self::InProduction => "in production",
        })
    }
}

/// `wal_level` as a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum WalLevel {
    /// No archiving, no backup.
    Minimal,
    /// Enough for both.
    Replica,
    /// And for logical decoding.
    Logical,
}

/// The contents of `pg_control` that this program uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ControlFile {
    /// Same for all copies of a cluster.
    pub(crate) system_identifier: SystemIdentifier,
    /// Format of this file: 1300, 1800, …
    pub(crate) control_version: u32,
    /// `PG_<major>_<catalog version>` is a tablespace's directory.
    pub(crate) catalog_version: u32,
    /// How the cluster was left.
    pub(crate) state: State,
    /// Last update, seconds since 1970.
    pub(crate) modified_unix: i64,
    /// Latest checkpoint record.
    pub(crate) checkpoint: Lsn,
    /// Where replay from that checkpoint starts.
    pub(crate) redo: Lsn,
    /// Timeline of the checkpoint.
    pub(crate) timeline: Timeline,
    /// The timeline before, where the checkpoint began a new one; else the same.
    pub(crate) previous_timeline: Timeline,
    /// Next transaction id, with its epoch.
    pub(crate) next_xid: u64,
    /// Time of the checkpoint, seconds since 1970.
    pub(crate) checkpoint_unix: i64,
    /// Recovery must reach this before the data are consistent; zero outside recovery.
    pub(crate) min_recovery_point: Lsn,
    /// Timeline of `min_recovery_point`.
    pub(crate) min_recovery_timeline: Timeline,
    /// Set while recovery of a backup has not seen the backup's end.
    pub(crate) backup_start: Lsn,
    /// The same for a backup of a standby.
    pub(crate) backup_end: Lsn,
    /// The end-of-backup record is still awaited.
    pub(crate) backup_end_required: bool,
    /// `wal_level` the cluster ran with.
    pub(crate) wal_level: WalLevel,
    /// A hot standby needs at least as many.
    pub(crate) max_connections: u32,
    /// See `max_connections`.
    pub(crate) max_worker_processes: u32,
    /// See `max_connections`.
    pub(crate) max_wal_senders: u32,
    /// See `max_connections`.
    pub(crate) max_prepared_transactions: u32,
    /// See `max_connections`.
    pub(crate) max_locks_per_transaction: u32,
    /// `BLCKSZ`.
    pub(crate) block_bytes: u32,
    /// Pages of a relation's file before the next one begins.
    pub(crate) relation_segment_pages: u32,
    /// `XLOG_BLCKSZ`.
    pub(crate) wal_block_bytes: u32,
    /// Bytes of a WAL segment.
    pub(crate) wal_segment_bytes: u32,
    /// 0: pages have no checksums.
    pub(crate) data_checksum_version: u32,
}

/// Why bytes are not a control file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Invalid {
    /// Fewer bytes than the structure has.
    #[error("{0} bytes are too few")]
    Short(usize),
    /// Torn or damaged.
    #[error("its CRC-32C is {stored:08x}, its bytes give {computed:08x}")]
    Crc {
        /// What the file says.
        stored: u32,
        /// What its bytes give.
        computed: u32,
    },
    /// Another byte order, or a PostgreSQL that this version does not know.
    #[error("control file version {0} is not known (1300 to 1800 are: PostgreSQL 13 to 18)")]
    Version(u32),
    /// A value that no server writes.
    #[error("{0} is {1}, which no server writes")]
    Value(&'static str, u64),
}

impl ControlFile {
    /// The contents, once length, version and CRC are right.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, Invalid> {
        let fields = Fields(bytes.get(..CRC_18 + 4).ok_or(Invalid::Short(bytes.len()))?);
        let control_version = fields.u32(CONTROL_VERSION);
        let crc_at = match control_version {
            1300..1800 => CRC_13,
            1800 => CRC_18,
            other => return Err(Invalid::Version(other)),
        };
        let (stored, computed) = (fields.u32(crc_at), crc32c::crc32c(&bytes[..crc_at]));
        if stored != computed {
            return Err(Invalid::Crc { stored, computed });
        }
        let state = fields.u32(STATE);
        let wal_level = fields.u32(WAL_LEVEL);
        Ok(Self {
            system_identifier: SystemIdentifier(fields.u64(SYSTEM_IDENTIFIER)),
            control_version,
            catalog_version: fields.u32(CATALOG_VERSION),
            state: State::from_number(state).ok_or(Invalid::Value("state", u64::from(state)))?,
            modified_unix: fields.u64(TIME).cast_signed(),
            checkpoint: Lsn(fields.u64(CHECKPOINT)),
            redo: Lsn(fields.u64(COPY_REDO)),
            timeline: Timeline(fields.u32(COPY_TIMELINE)),
            previous_timeline: Timeline(fields.u32(COPY_PREVIOUS_TIMELINE)),
            next_xid: fields.u64(COPY_NEXT_XID),
            checkpoint_unix: fields.u64(COPY_TIME).cast_signed(),
            min_recovery_point: Lsn(fields.u64(MIN_RECOVERY_POINT)),
            min_recovery_timeline: Timeline(fields.u32(MIN_RECOVERY_TIMELINE)),
            backup_start: Lsn(fields.u64(BACKUP_START)),
            backup_end: Lsn(fields.u64(BACKUP_END)),
            backup_end_required: fields.0[BACKUP_END_REQUIRED] != 0,
            wal_level: match wal_level {
                0 => WalLevel::Minimal,
                1 => WalLevel::Replica,
                2 => WalLevel::Logical,
                other => return Err(Invalid::Value("wal_level", u64::from(other))),
            },
            max_connections: fields.u32(MAX_CONNECTIONS),
            max_worker_processes: fields.u32(MAX_WORKER_PROCESSES),
            max_wal_senders: fields.u32(MAX_WAL_SENDERS),
            max_prepared_transactions: fields.u32(MAX_PREPARED_XACTS),
            max_locks_per_transaction: fields.u32(MAX_LOCKS_PER_XACT),
            block_bytes: fields.u32(BLOCK_BYTES),
            relation_segment_pages: fields.u32(RELATION_SEGMENT_PAGES),
            wal_block_bytes: fields.u32(WAL_BLOCK_BYTES),
            wal_segment_bytes: fields.u32(WAL_SEGMENT_BYTES),
            data_checksum_version: fields.u32(DATA_CHECKSUM_VERSION),
        })
    }
}

impl ControlFile {
    /// Settings of which a hot standby must have at least as much as its original ran with.
    pub(crate) const fn hot_standby_needs(&self) -> [(&'static str, u32); 5] {
        [
            ("max_connections", self.max_connections),
            ("max_worker_processes", self.max_worker_processes),
            ("max_wal_senders", self.max_wal_senders),
            ("max_prepared_transactions", self.max_prepared_transactions),
            ("max_locks_per_transaction", self.max_locks_per_transaction),
        ]
    }
}

/// Little-endian numbers at offsets whose range was checked once.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn u32(&self, at: usize) -> u32 {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&self.0[at..at + 4]);
        u32::from_le_bytes(bytes)
    }

    fn u64(&self, at: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.0[at..at + 8]);
        u64::from_le_bytes(bytes)
    }
}

/// The control file of a data directory, and its bytes: read again until its CRC is right.
pub(crate) fn read_stable(data_directory: &Path) -> Result<(ControlFile, Vec<u8>)> {
    let path = data_directory.join(PATH);
    let mut attempt = 0;
    loop {
        let mut bytes = Vec::with_capacity(FILE_BYTES);
        let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        file.take(2 * FILE_BYTES as u64)
            .read_to_end(&mut bytes)
            .with_context(|| format!("cannot read {}", path.display()))?;
        attempt += 1;
        match ControlFile::parse(&bytes) {
            Ok(control) if bytes.len() == FILE_BYTES => return Ok((control, bytes)),
            Ok(_) => bail!("{} has {} bytes, not {FILE_BYTES}", path.display(), bytes.len()),
            Err(Invalid::Crc { .. } | Invalid::Short(_)) if attempt < READ_ATTEMPTS => std::thread::sleep(READ_PAUSE),
            Err(invalid) => bail!("{} is not a control file: {invalid}", path.display()),
        }
    }
}

/// The control file of a data directory.
pub(crate) fn read(data_directory: &Path) -> Result<ControlFile> {
    Ok(read_stable(data_directory)?.0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn sample(version: u32) -> Vec<u8> {
        let mut bytes = vec![0; FILE_BYTES];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(SYSTEM_IDENTIFIER, &7_300_000_000_000_000_001u64.to_le_bytes());
        put(CONTROL_VERSION, &version.to_le_bytes());
        put(CATALOG_VERSION, &202_209_061u32.to_le_bytes());
        put(STATE, &6u32.to_le_bytes());
        put(COPY_TIMELINE, &3u32.to_le_bytes());
        put(COPY_NEXT_XID, &(1u64 << 32 | 740).to_le_bytes());
        put(WAL_LEVEL, &1u32.to_le_bytes());
        put(WAL_SEGMENT_BYTES, &(16u32 << 20).to_le_bytes());
        put(DATA_CHECKSUM_VERSION, &1u32.to_le_bytes());
        let crc_at = if version >= 1800 { CRC_18 } else { CRC_13 };
        let crc = crc32c::crc32c(&bytes[..crc_at]);
        bytes[crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    #[test]
    fn both_layouts_are_read() {
        for version in [1300, 1800] {
            let control = ControlFile::parse(&sample(version)).unwrap();
            assert_eq!(control.system_identifier, SystemIdentifier(7_300_000_000_000_000_001));
            assert_eq!(control.state, State::InProduction);
            assert_eq!(control.timeline, Timeline(3));
            assert_eq!(control.next_xid, 1 << 32 | 740);
            assert_eq!(control.wal_segment_bytes, 16 << 20);
            assert_eq!(control.data_checksum_version, 1);
        }
    }

    /// The first 296 bytes of the control file of a PostgreSQL 15.18 cluster in production.
    const REAL_15: &str = "\
        ec50b95d61dc026b1405000025770d0c0600000000000000c7dc026b00000000\
        1001001300000000d80000130000000001000000010000000100000000000000\
        ef02000000000000006000000100000000000000cc0200000100000001000000\
        0100000000000000c7dc026b000000000000000000000000ef02000000000000\
        e803000000000000000000000000000000000000000000000000000000000000\
        000000000000000000000000010000000000000064000000080000000a000000\
        000000004000000000000000080000000000000087d632410020000000000200\
        00200000000000014000000020000000cc070000000800000100000001000000\
        7f63bd21fb77bc9e774c7649e51e3b81e38a8164b471c1b63138c0b871c29c9a\
        64d8de3000000000";

    #[test]
    fn a_real_file_is_read_as_pg_controldata_reads_it() {
        let bytes: Vec<u8> =
            (0..REAL_15.len()).step_by(2).map(|at| u8::from_str_radix(&REAL_15[at..at + 2], 16).unwrap()).collect();
        let control = ControlFile::parse(&bytes).unwrap();
        let expected = ControlFile {
            system_identifier: SystemIdentifier(7_710_967_822_754_074_860),
            control_version: 1300,
            catalog_version: 202_209_061,
            state: State::InProduction,
            modified_unix: 1_795_349_703,
            checkpoint: Lsn(0x1300_0110),
            redo: Lsn(0x1300_00D8),
            timeline: Timeline(1),
            previous_timeline: Timeline(1),
            next_xid: 751,
            checkpoint_unix: 1_795_349_703,
            min_recovery_point: Lsn(0),
            min_recovery_timeline: Timeline(0),
            backup_start: Lsn(0),
            backup_end: Lsn(0),
            backup_end_required: false,
            wal_level: WalLevel::Replica,
            max_connections: 100,
            max_worker_processes: 8,
            max_wal_senders: 10,
            max_prepared_transactions: 0,
            max_locks_per_transaction: 64,
            block_bytes: 8192,
            relation_segment_pages: 131_072,
            wal_block_bytes: 8192,
            wal_segment_bytes: 16 << 20,
            data_checksum_version: 1,
        };
        assert_eq!(control, expected);
    }

    #[test]
    fn a_torn_or_foreign_file_is_refused_and_says_why() {
        let mut torn = sample(1300);
        torn[CHECKPOINT] ^= 1;
        assert!(matches!(ControlFile::parse(&torn), Err(Invalid::Crc { .. })));
        assert_eq!(ControlFile::parse(&sample(1300)[..200]), Err(Invalid::Short(200)));
        assert_eq!(ControlFile::parse(&sample(1900)), Err(Invalid::Version(1900)));
        assert!(ControlFile::parse(&[]).is_err());
    }
}
