//! *FORMAT.md* ends with a worked example, a whole small repository in hex. These tests read that very hex: what the
//! document says is what the code writes, and following the document from the JSON down gives the files back.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::cast_possible_truncation, clippy::print_stderr)]

use engine::checksum::{Hash, verify};
use engine::codec::{Codec, Compression, decode, decode_within};
use engine::format::backup::{BackupInfo, ManifestInfo, ServerInfo, Snapshot, Tablespace, Totals, WalRange};
use engine::format::block::{BlockRecord, Content, Extent};
use engine::format::file::{FileKind, FileRecord};
use engine::format::manifest::{
    ChunkRef, Group, IndexChunk, IndexEntry, ManifestHeader, ManifestUse, PackUse, Root, build_index, leaf_from_bytes,
    leaf_to_bytes,
};
use engine::format::pack::PackHeader;
use engine::format::repository::{ClusterInfo, RepositoryId, RepositoryInfo};
use engine::format::wal::WalHeader;
use engine::format::{FORMAT, MINIMUM_READER, manifest::cut::cut_groups, patch};
use engine::units::{BlockNumber, BlockSize, Lsn, PackId, SystemIdentifier, Timeline};

const DOCUMENT: &str = include_str!("../FORMAT.md");
const REPOSITORY: &str = "pghydrant.json";
const CLUSTER: &str = "cluster.json";
const BACKUP: &str = "20261122T081500Z-F.json";
const SYSTEM_IDENTIFIER: SystemIdentifier = SystemIdentifier(7_300_000_000_000_000_001);
const PACK: &str = "00000001.pack";
const MANIFEST: &str = "20261122T081500Z-F.manifest";
const WAL: &str = "00000002.history";
const HISTORY: &[u8] = b"1\t0/3000000\tno recovery target specified\n";

/// The body of the document's code block that begins with three backticks and `title`.
fn code_block(title: &str) -> &'static str {
    let start = DOCUMENT.split_once(&format!("```{title}\n")).unwrap_or_else(|| panic!("no block \"{title}\"")).1;
    start.split_once("\n```").unwrap().0
}

/// The bytes of a block in the form of `hexdump -C`: a line `*` repeats the line before up to the next offset.
fn bytes_of(title: &str) -> Vec<u8> {
    let mut bytes: Vec<u8> = Vec::new();
    for line in code_block(&format!("hex {title}")).lines().filter(|line| *line != "*") {
        let (offset, rest) = line.split_at(8);
        let offset = usize::from_str_radix(offset, 16).unwrap();
        let repeated = bytes.len().checked_sub(16).map(|last| bytes[last..].to_vec());
        while bytes.len() < offset {
            bytes.extend_from_slice(repeated.as_ref().unwrap());
        }
        let hex = rest.split('|').next().unwrap().split_whitespace();
        bytes.extend(hex.map(|byte| u8::from_str_radix(byte, 16).unwrap()));
    }
    bytes
}

/// As `hexdump -C` prints it: for whoever changes the format, to be put into the document.
fn hexdump(bytes: &[u8]) -> String {
    let mut out = String::new();
    let mut before: Option<&[u8]> = None;
    let mut starred = false;
    for (index, line) in bytes.chunks(16).enumerate() {
        if before == Some(line) {
            out += if starred { "" } else { "*\n" };
            starred = true;
            continue;
        }
        (before, starred) = (Some(line), false);
        let hex: Vec<_> = line.iter().map(|byte| format!("{byte:02x}")).collect();
        let (left, right) = hex.split_at(hex.len().min(8));
        let printable = |byte: &u8| if (b' '..=b'~').contains(byte) { char::from(*byte) } else { '.' };
        let text: String = line.iter().map(printable).collect();
        out += &format!("{:08x}  {:<23}  {:<23}  |{text}|\n", index * 16, left.join(" "), right.join(" "));
    }
    out + &format!("{:08x}\n", bytes.len())
}

/// A readable file of the document.
fn json_of(title: &str) -> Vec<u8> {
    format!("{}\n", code_block(&format!("json {title}"))).into_bytes()
}

fn repository() -> RepositoryId {
    RepositoryId::try_from("00112233445566778899aabbccddeeff".to_owned()).unwrap()
}

/// The example's readable files, as the code writes them.
fn json_files(pack: &[u8], manifest: &[u8]) -> [(&'static str, Vec<u8>); 3] {
    let created = || "2026-11-22T08:00:00Z".to_owned();
    let root = &manifest[manifest.len() - 152..];
    let info = BackupInfo {
        format: FORMAT,
        minimum_reader: MINIMUM_READER,
        label: BACKUP.strip_suffix(".json").unwrap().parse().unwrap(),
        cluster: "main".parse().unwrap(),
        parent: None,
        started_at: "2026-11-22T08:15:00Z".to_owned(),
        stopped_at: "2026-11-22T08:15:02.5Z".to_owned(),
        stopped_unix: 1_795_335_302,
        server: ServerInfo {
            system_identifier: SYSTEM_IDENTIFIER,
            version_num: 150_018,
            data_checksums: true,
            wal_segment_bytes: 16 << 20,
            data_directory: "/var/lib/postgresql/15/main".to_owned(),
            outside_files: vec!["/etc/postgresql/15/main/postgresql.conf".to_owned()],
            owner: "postgres".to_owned(),
            settings: [("port".to_owned(), "5432".to_owned())].into(),
            environment: None,
        },
        wal: WalRange { timeline: Timeline(2), start: Lsn(0x0300_0028), stop: Lsn(0x0300_0100) },
        snapshot: Snapshot { xmin: 745, xmax: 747, in_progress: vec![746] },
        tablespaces: vec![Tablespace {
            oid: 16400,
            name: "fast".to_owned(),
            location: "/srv/fast".to_owned(),
            bytes: 0,
        }],
        bad_pages: Vec::new(),
        compression: Compression::Lz4,
        block_bytes: BlockSize::DEFAULT,
        manifest: ManifestInfo {
            root_hash: Hash::of(root).to_string(),
            root_offset: (manifest.len() - root.len()) as u64,
            root_bytes: root.len() as u32,
        },
        totals: Totals {
            files: 3,
            directories: 4,
            bytes: files().iter().map(|file| file.bytes).sum(),
            blocks: 3,
            added_pack_bytes: pack.len() as u64,
            added_manifest_bytes: manifest.len() as u64,
            shared_bytes: 0,
            milliseconds: 2500,
        },
    };
    let cluster = ClusterInfo::new("main".parse().unwrap(), SYSTEM_IDENTIFIER, 16 << 20, created());
    let repository = RepositoryInfo::new(repository(), Compression::Lz4, BlockSize::DEFAULT, created());
    [
        (REPOSITORY, repository.to_json().unwrap()),
        (CLUSTER, cluster.to_json().unwrap()),
        (BACKUP, info.to_json().unwrap()),
    ]
}

fn table() -> Vec<u8> {
    [[b'A'; 8192], [b'B'; 8192]].concat()
}

/// The example's files, in the order of the manifest.
fn files() -> Vec<FileRecord> {
    let file = |path: &str, kind, content: &[u8]| FileRecord {
        path: path.to_owned(),
        mode: if kind == FileKind::Regular { 0o600 } else { 0o700 },
        kind,
        uid: 26,
        gid: 26,
        modified: 1_795_334_400,
        bytes: content.len() as u64,
        crc32c: crc32c::crc32c(content),
        first_block: BlockNumber(0),
    };
    let location = "/srv/fast".to_owned();
    vec![
        file("PG_VERSION", FileKind::Regular, b"15\n"),
        file("base", FileKind::Directory, b""),
        file("base/5", FileKind::Directory, b""),
        file("base/5/16384", FileKind::Regular, &table()),
        file("base/5/16385", FileKind::Regular, &[0; 8192]),
        file("pg_tblspc", FileKind::Directory, b""),
        file("pg_tblspc/16400", FileKind::Tablespace { location }, b""),
    ]
}

/// The runs of the example's pack: "15\n", two pages of A, the patch that makes the second one B.
fn runs(pack: &[u8]) -> [Extent; 3] {
    let at = |offset, stored| Extent { pack: PackId(1), offset, stored };
    let (base, patch) = (8192, 8192 + 75);
    [at(4096, 3), at(base, patch - base), at(patch, pack.len() as u32 - patch)]
}

fn records(pack: &[u8]) -> [BlockRecord; 3] {
    let [version, base, patch] = runs(pack);
    let content = Content::Patched { base, base_codec: Codec::Lz4, patch, patch_codec: Codec::Lz4 };
    [
        BlockRecord { hash: Hash::of(b"15\n"), content: Content::Stored { at: version, codec: Codec::Raw } },
        BlockRecord { hash: Hash::of(&table()), content },
        BlockRecord { hash: Hash::of(&[0; 8192]), content: Content::Zero },
    ]
}

/// The example's manifest file, as the code writes it.
fn manifest_bytes(pack: &[u8]) -> Vec<u8> {
    let label = MANIFEST.strip_suffix(".manifest").unwrap();
    let mut bytes = ManifestHeader { repository: repository(), label: label.parse().unwrap() }.to_bytes();
    let mut put = |chunk: Vec<u8>| {
        let reference = ChunkRef::to(&chunk, 0, bytes.len() as u64);
        bytes.extend_from_slice(&chunk);
        reference
    };
    let leaf = put(leaf_to_bytes(&records(pack)));
    let group = put(Group::new(BlockSize::DEFAULT, files(), vec![leaf]).unwrap().to_bytes());
    let entry = IndexEntry { chunk: group, first_path: "PG_VERSION".to_owned(), files: 7, leaves: 1 };
    let (index, index_level) = build_index(vec![entry], |chunk| Ok::<_, String>(put(chunk)), |error| error).unwrap();
    let root = Root {
        block_size: BlockSize::DEFAULT,
        index: index.chunk,
        index_level,
        files: 7,
        groups: 1,
        leaves: 1,
        blocks: 3,
        bytes: files().iter().map(|file| file.bytes).sum(),
        manifests: vec![ManifestUse {
            label: label.parse().unwrap(),
            bytes: u64::from(leaf.bytes + group.bytes + index.chunk.bytes),
        }],
        packs: vec![PackUse { pack: PackId(1), bytes: runs(pack).iter().map(|run| u64::from(run.stored)).sum() }],
    };
    let root = root.to_bytes().unwrap();
    bytes.extend_from_slice(&root);
    bytes
}

/// The example's pack. Only its header is compared: another lz4 may choose other bytes for the same content.
fn pack_bytes() -> Vec<u8> {
    let mut bytes = PackHeader { repository: repository(), pack: PackId(1), block_size: BlockSize::DEFAULT }.to_bytes();
    bytes.extend_from_slice(b"15\n");
    bytes.resize(8192, 0);
    let base = [b'A'; 16384];
    let patch = patch::make(&base, &table()).unwrap();
    for run in [base.as_slice(), &patch] {
        let mut encoded = Vec::new();
        Compression::Lz4.compress(run, &mut encoded);
        bytes.extend_from_slice(&encoded);
    }
    bytes
}

/// The example's WAL object, as the code writes it.
fn wal_bytes() -> Vec<u8> {
    let at = Extent { pack: PackId(0), offset: 4096, stored: HISTORY.len() as u32 };
    let header = WalHeader {
        repository: repository(),
        system_identifier: SYSTEM_IDENTIFIER,
        name: WAL.to_owned(),
        bytes: HISTORY.len() as u64,
        block_size: BlockSize::DEFAULT,
        blocks: vec![BlockRecord { hash: Hash::of(HISTORY), content: Content::Stored { at, codec: Codec::Raw } }],
    };
    let mut bytes = header.to_bytes().unwrap();
    bytes.extend_from_slice(HISTORY);
    bytes
}

#[test]
fn the_document_has_what_the_code_writes() {
    let pack = bytes_of(PACK);
    for (title, documented, written) in [
        (PACK, pack[..8195].to_vec(), pack_bytes()[..8195].to_vec()),
        (MANIFEST, bytes_of(MANIFEST), manifest_bytes(&pack)),
        (WAL, bytes_of(WAL), wal_bytes()),
    ] {
        assert!(documented == written, "FORMAT.md differs; the code writes {title} as\n{}", hexdump(&written));
    }
    for (title, written) in json_files(&pack, &bytes_of(MANIFEST)) {
        let written = String::from_utf8(written).unwrap();
        assert!(json_of(title) == written.as_bytes(), "FORMAT.md differs; the code writes {title} as\n{written}");
    }
}

/// As FORMAT.md says it: `head -n -2 FILE | b3sum`.
#[test]
fn the_documented_checksums_are_those_of_all_lines_but_two() {
    for title in [REPOSITORY, CLUSTER, BACKUP] {
        let text = String::from_utf8(json_of(title)).unwrap();
        let lines: Vec<_> = text.split_inclusive('\n').collect();
        let (before, after) = lines.split_at(lines.len() - 2);
        let checksum = blake3::hash(before.concat().as_bytes()).to_hex();
        assert_eq!(after.concat(), format!("  \"checksum\": \"{checksum}\"\n}}\n"), "{title}");
    }
}

#[test]
#[ignore = "prints the example anew, for whoever changes the format"]
fn print_the_example() {
    let pack = pack_bytes();
    for (title, json) in json_files(&pack, &manifest_bytes(&pack)) {
        eprintln!("```json {title}\n{}```\n", String::from_utf8(json).unwrap());
    }
    for (title, bytes) in [(PACK, pack.clone()), (MANIFEST, manifest_bytes(&pack)), (WAL, wal_bytes())] {
        eprintln!("```hex {title}\n{}```\n", hexdump(&bytes));
    }
}

#[test]
fn the_documented_bytes_lead_from_the_root_to_every_file() {
    let (manifest, pack) = (bytes_of(MANIFEST), bytes_of(PACK));
    assert_eq!(RepositoryInfo::from_json(&json_of(REPOSITORY)).unwrap().id, repository());
    assert_eq!(PackHeader::from_bytes(&pack).unwrap().repository, repository());
    assert_eq!(ManifestHeader::from_bytes(&manifest).unwrap().repository, repository());
    let chunk = |at: &ChunkRef| {
        let bytes = &manifest[at.offset as usize..][..at.bytes as usize];
        verify(bytes, &at.hash).unwrap().into_inner()
    };

    // Step 1 of the document: the backup's JSON names the root.
    let leads_on = BackupInfo::from_json(&json_of(BACKUP)).unwrap().manifest;
    let root_at = ChunkRef {
        hash: Hash::from_hex(&leads_on.root_hash).unwrap(),
        manifest: 0,
        bytes: leads_on.root_bytes,
        offset: leads_on.root_offset,
    };
    let root = Root::from_bytes(chunk(&root_at)).unwrap();
    assert_eq!(root_at.offset + u64::from(root_at.bytes), manifest.len() as u64);
    let place = |at: &ChunkRef| (at.offset, at.bytes);
    assert_eq!((place(&root_at), place(&root.index)), ((0x12e7, 152), (0x1285, 98)), "as the document's prose says");

    // Steps 2 and 3: index, group.
    let index = IndexChunk::from_bytes(chunk(&root.index)).unwrap();
    assert_eq!((index.level(), index.find_path("base/5/16384"), index.find_leaf(0)), (0, Some(0), Some((0, 0))));
    let group = Group::from_bytes(chunk(&index.entries()[0].chunk)).unwrap();
    assert_eq!((place(&index.entries()[0].chunk), place(&group.leaves()[0])), ((0x10d0, 437), (0x1000, 208)));
    let mut expected = files();
    for (file, first) in expected.iter_mut().zip([0, 1, 1, 1, 2, 3, 3]) {
        file.first_block = BlockNumber(first);
    }
    assert_eq!(group.files(), expected);
    assert_eq!(cut_groups(expected.iter().map(|file| (&file.path, 1))).count(), 1, "one group, by the rule");

    // Steps 4 and 5: the leaf, the runs, the content.
    let leaf = leaf_from_bytes(chunk(&group.leaves()[0])).unwrap();
    assert_eq!(leaf, records(&pack));
    let run = |at: &Extent| &pack[at.offset as usize..at.end() as usize];
    let contents = [b"15\n".to_vec(), table(), vec![0; 8192]];
    for (record, expected) in leaf.iter().zip(contents) {
        let mut block = vec![0; expected.len()];
        match &record.content {
            Content::Zero => {}
            Content::Stored { at, codec } => decode(*codec, run(at), &mut block).unwrap(),
            Content::Patched { base, base_codec, patch, patch_codec } => {
                decode(*base_codec, run(base), &mut block).unwrap();
                let mut pages = vec![0; patch::PATCH_BYTES_MAX];
                let decoded = decode_within(*patch_codec, run(patch), &mut pages).unwrap();
                patch::apply(&pages[..decoded], &mut block).unwrap();
            }
        }
        assert_eq!(*verify(block, &record.hash).unwrap(), expected);
    }
}

#[test]
fn the_documented_wal_object_gives_its_file() {
    let object = bytes_of(WAL);
    let header = WalHeader::from_bytes(&object).unwrap();
    let Content::Stored { at, codec: Codec::Raw } = header.blocks[0].content else { panic!("not stored raw") };
    let run = &object[at.offset as usize..at.end() as usize];
    assert_eq!(verify(run, &header.blocks[0].hash).unwrap().into_inner(), HISTORY);
}
