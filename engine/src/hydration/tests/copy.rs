//! A copy is the backup, whatever it is made of and whichever way it goes.

use proptest::prelude::*;

use super::*;
use crate::Error;
use crate::io::Owner;

const COMPRESSIONS: [Compression; 3] = [Compression::None, Compression::Lz4, Compression::Zstd { level: 1 }];

fn disks() -> Vec<LocalDisk> {
    vec![
        LocalDisk::new(),
        LocalDisk::with(Engine::Plain, true),
        LocalDisk::with(Engine::Plain, false),
        LocalDisk::with_short_requests(8192, true),
        LocalDisk::with_short_requests(3001, false),
    ]
}

#[test]
fn every_source_compression_and_disk_gives_the_same_files() {
    for compression in COMPRESSIONS {
        for sample in [Sample::new(compression, sample_tree()), Sample::incremental(compression, &sample_tree())] {
            for (number, disk) in disks().into_iter().enumerate() {
                for (name, source) in [("blocks", Source::Blocks), ("mount", Source::Mount(sample.mount()))] {
                    let layout = sample.target(&format!("{name}{number}"));
                    let progress = Counting::default();
                    let filled = hydrate_with(&sample, &layout, source, Arc::new(disk), &progress).unwrap();
                    assert_same(&sample.tree, &layout);
                    assert_eq!(filled.present_blocks, 0);
                    assert!(filled.zero_blocks > 0 && filled.bytes > 0 && !filled.io.is_empty());
                    let copied = |(path, entry): (&String, &Entry)| match entry {
                        Entry::File(content) if !is_left_out(path) && !is_placed_last(path) => content.len() as u64,
                        _ => 0,
                    };
                    assert_eq!(progress.bytes(), sample.tree.iter().map(copied).sum::<u64>());
                }
            }
        }
    }
}

#[test]
fn zeros_are_allocated_and_not_written() {
    let sample = Sample::new(Compression::Lz4, sample_tree());
    let layout = sample.target("target");
    hydrate(&sample, &layout, Source::Blocks, Arc::new(LocalDisk::new())).unwrap();
    let zeros = layout.target_path("base/5/zeros");
    assert!(allocated_bytes(&zeros) >= 3 * SIZE.bytes() as u64, "the space is proven");
}

#[test]
fn a_second_run_finds_everything_present() {
    let sample = Sample::new(Compression::Lz4, sample_tree());
    let layout = sample.target("target");
    let first = hydrate(&sample, &layout, Source::Blocks, Arc::new(LocalDisk::new())).unwrap();
    let again = hydrate(&sample, &layout, Source::Blocks, Arc::new(LocalDisk::new())).unwrap();
    assert_eq!((again.blocks, again.zero_blocks), (0, 0));
    assert_eq!(again.present_blocks, first.blocks + first.zero_blocks);
    assert_same(&sample.tree, &layout);
}

#[test]
fn a_file_that_vanished_between_two_runs_is_copied_again() {
    let sample = Sample::new(Compression::Lz4, sample_tree());
    let layout = sample.target("target");
    hydrate(&sample, &layout, Source::Blocks, Arc::new(LocalDisk::new())).unwrap();
    fs::remove_file(layout.target_path("base/5/2600")).unwrap();
    let shortened = fs::OpenOptions::new().write(true).open(layout.target_path("base/5/1259")).unwrap();
    shortened.set_len(100).unwrap();
    hydrate(&sample, &layout, Source::Blocks, Arc::new(LocalDisk::new())).unwrap();
    assert_same(&sample.tree, &layout);
}

#[test]
fn a_map_that_is_closed_is_closed_for_every_step() {
    let sample = Sample::new(Compression::Lz4, sample_tree());
    let layout = sample.target("target");
    let begin = || Hydration::begin(sample.backup.clone(), &layout, &session(), None, Arc::new(LocalDisk::new()));
    let hydration = begin().unwrap();
    let progress = Counting::default();
    hydration.outline(1, &progress).unwrap();
    let filled = hydration.fill(&fill_from(Source::Blocks), &progress).unwrap();
    hydration.place_last(&filled).unwrap();
    hydration.close().unwrap();
    let again = begin().unwrap();
    assert!(again.is_resumed() && again.map().is_closed());
    assert!(matches!(again.outline(1, &progress), Err(Error::Refused(_))));
    assert!(matches!(again.fill(&fill_from(Source::Blocks), &progress), Err(Error::Refused(_))));
    assert!(matches!(again.place_last(&filled), Err(Error::Refused(_))));
    assert_eq!(session_in(&layout.data, &LocalDisk::new()).unwrap(), Some((session(), true)));
    end(&layout, &session(), &LocalDisk::new()).unwrap();
    assert!(!layout.data.join(SESSION_DIRECTORY).exists());
    assert_eq!(session_in(&layout.data, &LocalDisk::new()).unwrap(), None);
}

#[test]
fn a_directory_that_holds_anything_else_is_refused_and_left_as_it_is() {
    let sample = Sample::new(Compression::Lz4, skeleton());
    for occupied in ["data", "fast", "wal"] {
        let layout = sample.target(occupied);
        let stranger = layout.data.with_file_name(occupied).join("stranger");
        fs::create_dir_all(stranger.parent().unwrap()).unwrap();
        fs::write(&stranger, b"x").unwrap();
        let refused = Hydration::begin(sample.backup.clone(), &layout, &session(), None, Arc::new(LocalDisk::new()));
        assert!(matches!(refused.err().unwrap(), Error::Refused(_)), "{occupied}");
        assert!(remove_all(&layout, &session(), &LocalDisk::new()).is_err());
        assert!(stranger.exists());
    }
}

#[test]
fn the_owner_and_the_modes_are_as_asked() {
    let sample = Sample::new(Compression::Lz4, sample_tree());
    let layout = sample.target("target");
    // Only root may give files away; anybody else gives them to himself, by the same calls.
    let owner = if rustix::process::geteuid().is_root() {
        Owner { uid: 12345, gid: 54321 }
    } else {
        Owner { uid: rustix::process::geteuid().as_raw(), gid: rustix::process::getegid().as_raw() }
    };
    let disk: Arc<dyn Disk> = Arc::new(LocalDisk::new());
    let hydration = Hydration::begin(sample.backup.clone(), &layout, &session(), Some(owner), disk).unwrap();
    hydration.outline(2, &Counting::default()).unwrap();
    let filled = hydration.fill(&fill_from(Source::Blocks), &Counting::default()).unwrap();
    hydration.place_last(&filled).unwrap();
    assert_same(&sample.tree, &layout);
    for path in sample.tree.keys().filter(|path| !is_left_out(path)) {
        for path in [layout.target_path(path), layout.data.join(path)] {
            let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
            assert_eq!((metadata.uid(), metadata.gid()), (owner.uid, owner.gid), "{}", path.display());
        }
    }
    assert_eq!(fs::metadata(&layout.data).unwrap().uid(), owner.uid);
}

#[test]
fn what_its_owner_may_not_write_is_written_and_closed_again() {
    let mut tree = skeleton();
    tree.insert("keys".to_owned(), Entry::Directory);
    tree.insert("keys/server.key".to_owned(), Entry::File(pages(1, 3)));
    tree.insert("server.key".to_owned(), Entry::File(pages(1, 4)[..1700].to_vec()));
    let closed = [("keys", 0o500), ("keys/server.key", 0o400), ("server.key", 0o400)];
    let sample = Sample::new(Compression::Lz4, tree);
    let layout = sample.target("target");
    let disk: Arc<dyn Disk> = Arc::new(LocalDisk::new());
    let mode = |path: &str| fs::metadata(layout.target_path(path)).unwrap().permissions().mode() & 0o777;
    // The second time as after a crash, when all is closed already.
    for _ in 0..2 {
        let hydration = Hydration::begin(sample.backup.clone(), &layout, &session(), None, Arc::clone(&disk)).unwrap();
        hydration.outline(2, &Counting::default()).unwrap();
        assert_eq!(closed.map(|(path, _)| mode(path)), [0o700, 0o600, 0o600]);
        let filled = hydration.fill(&fill_from(Source::Blocks), &Counting::default()).unwrap();
        hydration.place_last(&filled).unwrap();
        assert_eq!(closed.map(|(path, _)| mode(path)), [0o500, 0o400, 0o400]);
    }
}

#[test]
fn a_tablespaces_directory_belongs_to_one_restore() {
    let sample = Sample::new(Compression::Lz4, sample_tree());
    let first = sample.target("first");
    let second = Layout { data: sample.target("second").data, wal: None, ..first.clone() };
    let disk: Arc<dyn Disk> = Arc::new(LocalDisk::new());
    let other: SessionId = "s-2".parse().unwrap();
    let begin = |layout: &Layout, session: &SessionId| {
        Hydration::begin(sample.backup.clone(), layout, session, None, Arc::clone(&disk))
    };
    begin(&first, &session()).unwrap();
    let Err(Error::Refused(refused)) = begin(&second, &other) else { panic!("a second restore into it was begun") };
    assert!(refused.contains("restored into by session s-1"), "{refused}");
    hydrate(&sample, &first, Source::Blocks, Arc::clone(&disk)).unwrap();
    // Taking the second back leaves the first's files alone.
    remove_all(&second, &other, &*disk).unwrap_err();
    assert_same(&sample.tree, &first);
    end(&first, &session(), &*disk).unwrap();
    assert!(fs::symlink_metadata(first.tablespaces[&OID].join(SESSION_DIRECTORY)).is_err());
}

#[test]
fn without_a_directory_for_it_a_tablespace_is_refused() {
    let sample = Sample::new(Compression::Lz4, sample_tree());
    let layout = Layout::of_data(sample.directory.path().join("alone"));
    let refused = hydrate(&sample, &layout, Source::Blocks, Arc::new(LocalDisk::new())).unwrap_err();
    assert!(refused.to_string().contains("pg_tblspc/16400"), "{refused}");
}

#[test]
fn a_link_in_place_of_the_wal_never_leads_to_the_original() {
    let mut tree = skeleton();
    tree.retain(|path, _| !path.starts_with("pg_wal"));
    tree.insert("pg_wal".to_owned(), Entry::Link("/original/wal".to_owned()));
    let sample = Sample::new(Compression::Lz4, tree);
    let layout = Layout::of_data(sample.directory.path().join("alone"));
    hydrate(&sample, &layout, Source::Blocks, Arc::new(LocalDisk::new())).unwrap();
    let wal = fs::symlink_metadata(layout.data.join("pg_wal")).unwrap();
    assert!(wal.is_dir() && wal.permissions().mode() & 0o777 == 0o700);
}

#[test]
fn a_restore_that_is_taken_back_leaves_no_trace_and_follows_no_link() {
    let mut tree = sample_tree();
    let outside = directory();
    fs::write(outside.path().join("kept"), b"x").unwrap();
    tree.insert("log".to_owned(), Entry::Link(outside.path().to_str().unwrap().to_owned()));
    let sample = Sample::new(Compression::Lz4, tree);
    let disk: Arc<dyn Disk> = Arc::new(LocalDisk::new());
    let layout = layout_below(&sample.directory.path().join("made/on/the/way"));
    hydrate(&sample, &layout, Source::Blocks, Arc::clone(&disk)).unwrap();
    fs::create_dir_all(layout.data.join("base/pgsql_tmp/deep/er")).unwrap();

    assert!(matches!(remove_all(&layout, &"s-2".parse().unwrap(), &*disk), Err(Error::Refused(_))));
    fs::write(layout.data.join("postmaster.pid"), format!("{}\n/x\n", std::process::id())).unwrap();
    let here = std::env::current_dir().unwrap();
    assert_ne!(here, layout.data, "a process that works elsewhere is no server of this directory");
    remove_all(&layout, &session(), &*disk).unwrap();
    assert!(!sample.directory.path().join("made").exists());
    assert!(outside.path().join("kept").exists());
    remove_all(&layout, &session(), &*disk).unwrap();
}

#[test]
fn a_directory_in_which_a_server_runs_is_not_removed() {
    let sample = Sample::new(Compression::Lz4, skeleton());
    let layout = sample.target("target");
    hydrate(&sample, &layout, Source::Blocks, Arc::new(LocalDisk::new())).unwrap();
    let mut server = std::process::Command::new("sleep").arg("60").current_dir(&layout.data).spawn().unwrap();
    fs::write(layout.data.join("postmaster.pid"), format!("{}\n", server.id())).unwrap();
    let refused = remove_all(&layout, &session(), &LocalDisk::new());
    server.kill().unwrap();
    server.wait().unwrap();
    assert!(matches!(refused, Err(Error::Refused(_))));
    assert_same(&sample.tree, &{
        fs::remove_file(layout.data.join("postmaster.pid")).unwrap();
        layout.clone()
    });
    remove_all(&layout, &session(), &LocalDisk::new()).unwrap();
    assert!(!layout.data.exists());
}

#[test]
fn damage_in_a_pack_is_named_whichever_way_it_is_met() {
    let sample = Sample::new(Compression::Lz4, sample_tree());
    let packs = sample.directory.path().join("repository/clusters/main/packs");
    let pack = fs::read_dir(&packs).unwrap().next().unwrap().unwrap().path();
    let good = fs::read(&pack).unwrap();
    let mut bad = good.clone();
    bad[good.len() / 2] ^= 1;
    let damages: [(&str, Option<&[u8]>); 3] =
        [("bit", Some(&bad)), ("short", Some(&good[..good.len() / 3])), ("gone", None)];
    for (name, damage) in damages {
        match damage {
            Some(bytes) => fs::write(&pack, bytes).unwrap(),
            None => fs::remove_file(&pack).unwrap(),
        }
        let layout = sample.target(name);
        let failure = hydrate(&sample, &layout, Source::Blocks, Arc::new(LocalDisk::new())).unwrap_err();
        let Error::Corrupt { path, .. } = &failure else { panic!("{name}: {failure}") };
        assert_eq!(*path, pack, "{name}");
        assert!(!is_startable(&layout));
        fs::write(&pack, &good).unwrap();
        hydrate(&sample, &layout, Source::Blocks, Arc::new(LocalDisk::new())).unwrap();
        assert_same(&sample.tree, &layout);
    }
}

/// Files of pages and tails, of zeros in any place, and of nothing.
fn any_content() -> impl Strategy<Value = Vec<u8>> {
    let blocks = prop::collection::vec((any::<bool>(), any::<u8>()), 0..6);
    (blocks, 0usize..=4097, any::<bool>()).prop_map(|(blocks, tail, zero_tail)| {
        let mut content: Vec<u8> = blocks
            .iter()
            .flat_map(|(zero, seed)| if *zero { vec![0; SIZE.bytes()] } else { pages(4, usize::from(*seed)) })
            .collect();
        content.extend(if zero_tail { vec![0; tail] } else { pages(1, tail)[..tail].to_vec() });
        content
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_tree_is_copied_as_it_is(
        contents in prop::collection::vec(any_content(), 0..12),
        compression in prop::sample::select(COMPRESSIONS.to_vec()),
        incremental: bool,
        from_mount: bool,
        disk in prop::sample::select((0..5).collect::<Vec<usize>>()),
    ) {
        let mut tree = skeleton();
        for (number, content) in contents.into_iter().enumerate() {
            tree.insert(format!("base/5/{number}"), Entry::File(content));
        }
        tree.insert(format!("pg_tblspc/{OID}"), Entry::Tablespace);
        let sample = if incremental { Sample::incremental(compression, &tree) } else { Sample::new(compression, tree) };
        let source = if from_mount { Source::Mount(sample.mount()) } else { Source::Blocks };
        let layout = sample.target("target");
        hydrate(&sample, &layout, source, Arc::new(disks()[disk])).unwrap();
        assert_same(&sample.tree, &layout);
    }
}
