//! Somebody who may write into the repository, and gives everything its right checksum.

use super::*;
use crate::format::backup::Tablespace;
use crate::progress::Counting;
use crate::units::SystemIdentifier;

/// What a forger changes in the description of the one backup, sealed again; what the reader says of it.
fn forged(change: impl Fn(&mut BackupInfo)) -> Error {
    let directory = tempfile::tempdir().unwrap();
    let cluster = cluster_of(&repository_in(directory.path())).unwrap();
    let mut info = back_up_small(&cluster).unwrap();
    let label = info.label.clone();
    change(&mut info);
    std::fs::write(cluster.store().describe(&keys::backup(cluster.name(), &label)), info.to_json().unwrap()).unwrap();
    let proof = Verification::plan(&cluster, None).unwrap().run(&Counting::default()).unwrap();
    assert!(
        proof.findings.iter().any(|finding| finding.path.ends_with(format!("{label}.json"))),
        "{:?}",
        proof.findings
    );
    cluster.backup(&label).map(drop).unwrap_err()
}

#[test]
fn a_forged_description_is_refused_before_anybody_counts_with_it() {
    let tablespace = |oid| Tablespace { oid, name: "t".to_owned(), location: "/t".to_owned(), bytes: u64::MAX };
    let refusals = [
        forged(|info| info.wal.stop = Lsn(u64::MAX)),
        forged(|info| info.wal.start = Lsn(info.wal.stop.0 + 1)),
        forged(|info| info.server.wal_segment_bytes = 1),
        forged(|info| info.server.wal_segment_bytes = 0),
        forged(|info| info.server.wal_segment_bytes = 1 << 30),
        forged(|info| info.server.system_identifier = SystemIdentifier(8)),
        forged(|info| info.tablespaces = vec![tablespace(16400), tablespace(16400)]),
        forged(|info| info.manifest.root_bytes = u32::MAX),
        forged(|info| info.manifest.root_offset = u64::MAX),
        forged(|info| info.manifest.root_hash = "../../etc/passwd".to_owned()),
        forged(|info| info.cluster = "other".parse().unwrap()),
        forged(|info| info.label = "20000101T000000Z-F".parse().unwrap()),
    ];
    for refused in refusals {
        assert!(matches!(refused, Error::Corrupt { .. } | Error::Io { .. }), "{refused}");
    }
}

#[test]
fn names_that_lead_elsewhere_are_no_labels_and_no_clusters() {
    let directory = tempfile::tempdir().unwrap();
    let cluster = cluster_of(&repository_in(directory.path())).unwrap();
    let info = back_up_small(&cluster).unwrap();
    let json = String::from_utf8(info.to_json().unwrap()).unwrap();
    for name in ["../../../etc/x", "/etc/x", "a/b", "..", "\\u001b[2J", "\\u0000", "", &"x".repeat(65)] {
        for (field, old) in [("label", info.label.as_str()), ("cluster", "main")] {
            let line = format!("  \"{field}\": \"{old}\"");
            assert!(json.contains(&line));
            let before = json.replace(&line, &format!("  \"{field}\": \"{name}\""));
            let before = &before[..before.find("  \"checksum\"").unwrap()];
            let sealed = format!("{before}  \"checksum\": \"{}\"\n}}\n", crate::checksum::Hash::of(before.as_bytes()));
            assert!(BackupInfo::from_json(sealed.as_bytes()).is_err(), "{field} {name}");
        }
    }
}

fn special(path: &str, kind: FileKind) -> FileRecord {
    FileRecord {
        path: path.to_owned(),
        kind,
        mode: 0o700,
        uid: 0,
        gid: 0,
        modified: 0,
        bytes: 0,
        crc32c: 0,
        first_block: BlockNumber(0),
    }
}

#[test]
fn a_link_in_one_group_and_a_file_below_it_in_the_next_are_found() {
    let directory = tempfile::tempdir().unwrap();
    let cluster = cluster_of(&repository_in(directory.path())).unwrap();
    let writer = cluster.begin_backup(Parent::Full).unwrap();
    let link = special("base", FileKind::Symlink { target: "/etc".to_owned() });
    writer.commit_group(0, &[link], Vec::new()).unwrap();
    writer.commit_group(1, &[special("base/passwd", FileKind::Regular)], Vec::new()).unwrap();
    let info = writer.finish(description()).unwrap();
    let refused = cluster.backup(&info.label).unwrap().manifest.verify_all().unwrap_err();
    assert!(refused.to_string().contains("\"base/passwd\" lies below \"base\""), "{refused}");
    let proof = Verification::plan(&cluster, None).unwrap().run(&Counting::default()).unwrap();
    assert!(proof.findings.iter().any(|finding| finding.detail.contains("lies below")), "{:?}", proof.findings);
}

#[test]
fn what_no_reader_would_take_does_not_become_a_backup() {
    let directory = tempfile::tempdir().unwrap();
    let cluster = cluster_of(&repository_in(directory.path())).unwrap();
    let wrong: [fn(&mut Description); 3] = [
        |description| description.server.system_identifier = SystemIdentifier(8),
        |description| description.server.wal_segment_bytes = 1 << 24,
        |description| description.wal.stop = Lsn(0),
    ];
    for change in wrong {
        let writer = cluster.begin_backup(Parent::Full).unwrap();
        writer.commit_group(0, &[special("base", FileKind::Directory)], Vec::new()).unwrap();
        let mut description = description();
        change(&mut description);
        assert!(writer.finish(description).is_err());
        assert_eq!(cluster.labels().unwrap(), []);
    }
}
