//! Random reads of a mount, beside a plain directory with the same content.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use engine::codec::Compression;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::sample::{LARGE, Sample};
use crate::support::*;

const FILES: [&str; 8] = [
    LARGE,
    "base/5/16384.1",
    "base/5/zeros",
    "base/5/empty",
    "base/5/one block",
    "PG_VERSION",
    "base/5/many/17",
    "pg_tblspc/16400/PG_15_202209061/5/16401",
];

/// What a reader does.
#[derive(Clone, Debug)]
enum Step {
    Open {
        slot: usize,
        file: usize,
        direct: bool,
    },
    Close {
        slot: usize,
    },
    /// In order from where the slot's last read ended, or somewhere else.
    Read {
        slot: usize,
        jump: Option<u64>,
        length: usize,
    },
    List {
        file: usize,
    },
    Stat {
        file: usize,
    },
}

const SLOTS: usize = 4;

fn step() -> impl Strategy<Value = Step> {
    let length = prop_oneof![Just(8192_usize), Just(128 << 10), Just(1 << 20), 1_usize..200_000];
    let jump = prop_oneof![3 => Just(None), 1 => (0_u64..14 << 20).prop_map(Some), 1 => (0_u64..1500).prop_map(|page| Some(page * 8192))];
    prop_oneof![
        2 => (0..SLOTS, 0..FILES.len(), any::<bool>()).prop_map(|(slot, file, direct)| Step::Open { slot, file, direct }),
        1 => (0..SLOTS).prop_map(|slot| Step::Close { slot }),
        12 => (0..SLOTS, jump, length).prop_map(|(slot, jump, length)| Step::Read { slot, jump, length }),
        1 => (0..FILES.len()).prop_map(|file| Step::List { file }),
        1 => (0..FILES.len()).prop_map(|file| Step::Stat { file }),
    ]
}

struct Reader {
    slots: [Option<(File, File, u64)>; SLOTS],
}

fn listing(path: &Path) -> std::io::Result<BTreeMap<PathBuf, bool>> {
    fs::read_dir(path)?.map(|entry| entry.map(|entry| (entry.file_name().into(), entry.path().is_dir()))).collect()
}

impl Reader {
    fn run(&mut self, mounted: &Path, original: &Path, step: &Step) -> std::io::Result<()> {
        match *step {
            Step::Open { slot, file, direct } => {
                let flags = if direct { libc::O_DIRECT } else { 0 };
                let shown = OpenOptions::new().read(true).custom_flags(flags).open(mounted.join(FILES[file]))?;
                self.slots[slot] = Some((shown, File::open(original.join(FILES[file]))?, 0));
            }
            Step::Close { slot } => self.slots[slot] = None,
            Step::Read { slot, jump, length } => {
                let Some((shown, plain, next)) = &mut self.slots[slot] else { return Ok(()) };
                let offset = jump.unwrap_or(*next);
                let (mut one, mut other) = (vec![1; length], vec![2; length]);
                let (read, expected) = (shown.read_at(&mut one, offset)?, plain.read_at(&mut other, offset)?);
                assert!(one[..read] == other[..expected], "{step:?} at {offset}: {read} and {expected} bytes");
                *next = offset + read as u64;
            }
            Step::List { file } => {
                let parent = Path::new(FILES[file]).parent().unwrap_or(Path::new(""));
                assert_eq!(listing(&mounted.join(parent))?, listing(&original.join(parent))?);
            }
            Step::Stat { file } => {
                let of = |root: &Path| {
                    fs::metadata(root.join(FILES[file])).map(|found| (found.len(), found.mode(), found.mtime()))
                };
                assert_eq!(of(mounted)?, of(original)?);
            }
        }
        Ok(())
    }
}

/// Any reads of any files, in any order and by several readers at once, give what a plain directory with the same content
/// gives.
#[test]
fn random_reads() -> Result<()> {
    requires!(Fuse);
    for (compression, memory) in
        [(Compression::Lz4, "64MiB"), (Compression::None, "1MiB"), (Compression::Zstd { level: 1 }, "4MiB")]
    {
        let sample = Sample::compressed(compression)?;
        let mounted = sample.mount(&OsUser::current(), &["--memory", memory])?;
        let mut runner = TestRunner::new(Config { failure_persistence: None, ..Config::with_cases(24) });
        let readers = prop::collection::vec(prop::collection::vec(step(), 1..80), 1..4);
        runner.run(&readers, |readers| {
            std::thread::scope(|scope| {
                let started: Vec<_> = readers
                    .iter()
                    .map(|steps| {
                        let (mounted, original) = (mounted.join("data"), &sample.original);
                        scope.spawn(move || {
                            let mut reader = Reader { slots: [const { None }; SLOTS] };
                            for step in steps {
                                reader
                                    .run(&mounted, original, step)
                                    .unwrap_or_else(|error| panic!("{step:?}: {error}"));
                            }
                        })
                    })
                    .collect();
                for reader in started {
                    reader.join().map_err(|_| TestCaseError::fail("a reader found something else"))?;
                }
                Ok(())
            })
        })?;
    }
    Ok(())
}
