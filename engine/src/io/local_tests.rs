//! One suite for every way of moving bytes.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;

use super::buffer::{BUFFER_BYTES, Buffer, buffers};
use super::disk::{Disk, Found, Open, OpenFile, Part, Queue, Root, Transfer, Way};
use super::local::{Engine, LocalDisk};
use crate::Error;

fn every_way() -> Vec<LocalDisk> {
    let mut all = vec![
        LocalDisk::with(Engine::Plain, true),
        LocalDisk::with(Engine::Plain, false),
        LocalDisk::with_short_requests(4096, true),
        LocalDisk::with_short_requests(1000, false),
    ];
    if LocalDisk::new().describe() == "io_uring" {
        all.extend([LocalDisk::with(Engine::Ring, true), LocalDisk::with(Engine::Ring, false)]);
    }
    all
}

/// A directory on the file system of the sources: the system's own for temporary files may have no O_DIRECT.
fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(concat!(env!("CARGO_MANIFEST_DIR"), "/../target")).or_else(|_| tempfile::tempdir()).unwrap()
}

fn move_all(queue: &mut dyn Queue, way: Way, buffer: Buffer, parts: Vec<Part>) -> (Buffer, crate::Result<()>) {
    queue.submit(Transfer { token: 7, way, buffer, parts });
    let finished = queue.reap(true).unwrap().unwrap();
    assert_eq!(finished.token, 7);
    assert!(queue.reap(true).unwrap().is_none(), "nothing is left in flight");
    (finished.buffer, finished.outcome)
}

fn part(file: &Arc<OpenFile>, offset: u64, at: usize, bytes: usize) -> Part {
    Part { file: Arc::clone(file), offset, at, bytes }
}

fn noise(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|index| (index * 31 + index / 251) as u8).collect()
}

#[test]
fn what_is_written_in_parts_is_read_in_other_parts() {
    for disk in every_way() {
        let directory = directory();
        let root = Root::open(directory.path()).unwrap();
        let content = noise(BUFFER_BYTES);
        let (mut all, _) = buffers(2).unwrap();
        let mut queue = disk.queue(&mut all).unwrap();
        let mut buffer = all.remove(0);
        buffer.copy_from_slice(&content);

        let create = |name: &str| disk.allocate(&disk.open(root.at(name), Open::Create(0o600)).unwrap(), 0).unwrap();
        create("a");
        create("b");
        let (a, b) = (disk.open(root.at("a"), Open::Write).unwrap(), disk.open(root.at("b"), Open::Write).unwrap());
        let half = BUFFER_BYTES / 2;
        let parts = vec![part(&a, 0, half, half), part(&b, 4096, 0, 8192), part(&b, 0, 8192, 4096)];
        let (mut buffer, outcome) = move_all(&mut *queue, Way::Write, buffer, parts);
        outcome.unwrap();
        assert_eq!(std::fs::read(directory.path().join("a")).unwrap(), &content[half..]);
        assert_eq!(
            std::fs::read(directory.path().join("b")).unwrap(),
            [&content[8192..12288], &content[..8192]].concat()
        );

        buffer.fill(0);
        std::fs::write(directory.path().join("tail"), &content[..5001]).unwrap();
        let (tail, a) = (disk.open(root.at("tail"), Open::Read).unwrap(), disk.open(root.at("a"), Open::Read).unwrap());
        let parts = vec![part(&tail, 0, 0, 5001), part(&a, 4096, 8192, 4096), part(&tail, 4096, 16384, 905)];
        let (buffer, outcome) = move_all(&mut *queue, Way::Read, buffer, parts);
        outcome.unwrap();
        assert_eq!(&buffer[..5001], &content[..5001]);
        assert_eq!(&buffer[8192..12288], &content[half + 4096..half + 8192]);
        assert_eq!(&buffer[16384..16384 + 905], &content[4096..5001]);
    }
}

#[test]
fn the_end_of_a_file_is_an_error_that_names_file_and_byte() {
    for disk in every_way() {
        let directory = directory();
        std::fs::write(directory.path().join("short"), noise(4096 + 10)).unwrap();
        let root = Root::open(directory.path()).unwrap();
        let (mut all, _) = buffers(1).unwrap();
        let mut queue = disk.queue(&mut all).unwrap();
        let file = disk.open(root.at("short"), Open::Read).unwrap();
        let (buffer, outcome) = move_all(&mut *queue, Way::Read, all.remove(0), vec![part(&file, 0, 0, 4096 + 11)]);
        let Error::Io { path, source, .. } = outcome.unwrap_err() else { panic!("not of the disk") };
        assert_eq!(path, directory.path().join("short"));
        assert_eq!(source.kind(), std::io::ErrorKind::UnexpectedEof);
        let outside = vec![part(&file, 0, BUFFER_BYTES - 4096, 8192)];
        assert!(move_all(&mut *queue, Way::Read, buffer, outside).1.is_err(), "a part past its buffer");
    }
}

#[test]
fn a_queue_that_is_dropped_with_transfers_in_flight_waits_for_them() {
    for disk in every_way() {
        let directory = directory();
        std::fs::write(directory.path().join("file"), noise(BUFFER_BYTES)).unwrap();
        let root = Root::open(directory.path()).unwrap();
        let file = disk.open(root.at("file"), Open::Read).unwrap();
        let (mut all, _) = buffers(4).unwrap();
        let mut queue = disk.queue(&mut all).unwrap();
        for (token, buffer) in all.into_iter().enumerate() {
            queue.submit(Transfer { token, way: Way::Read, buffer, parts: vec![part(&file, 0, 0, BUFFER_BYTES)] });
        }
        let _ = queue.reap(false).unwrap();
        drop(queue);
    }
}

#[test]
fn no_name_below_a_root_may_be_a_link_or_lead_out() {
    let disk = LocalDisk::new();
    let (directory, outside) = (directory(), directory());
    std::fs::write(outside.path().join("victim"), b"x").unwrap();
    symlink(outside.path(), directory.path().join("way")).unwrap();
    symlink(outside.path().join("victim"), directory.path().join("link")).unwrap();
    let root = Root::open(directory.path()).unwrap();
    for name in ["way/victim", "link", "../x", "way/../x"] {
        assert!(disk.open(root.at(name), Open::WriteBuffered).is_err(), "{name}");
    }
    assert!(disk.open(root.at("way/new"), Open::Create(0o600)).is_err());
    assert!(disk.make_directory(root.at("way/new"), 0o700).is_err());
    assert!(disk.make_directory(root.at("way"), 0o700).is_err(), "a link is no directory");
    assert!(disk.remove_file(root.at("way/victim")).is_err());
    assert!(disk.rename(root.at("link"), root.at("way/new")).is_err());
    assert_eq!(disk.look(root.at("link")).unwrap(), Some(Found::Other));
    assert_eq!(std::fs::read(outside.path().join("victim")).unwrap(), b"x");
}

#[test]
fn names_sizes_and_attributes() {
    let disk = LocalDisk::new();
    let directory = directory();
    let root = Root::open(directory.path()).unwrap();
    assert!(disk.make_directory(root.at("base"), 0o700).unwrap());
    assert!(!disk.make_directory(root.at("base"), 0o700).unwrap());
    let file = disk.open(root.at("base/1"), Open::Create(0o640)).unwrap();
    disk.allocate(&file, 10_000).unwrap();
    disk.write_small(&file, 9_990, b"0123456789").unwrap();
    disk.set_attributes(&file, 0o600, None).unwrap();
    disk.set_modified(&file, 1_000_000_000).unwrap();
    let modified = std::fs::metadata(directory.path().join("base/1")).unwrap().modified().unwrap();
    assert_eq!(modified, std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000));
    assert_eq!(disk.look(root.at("base/1")).unwrap(), Some(Found::File(10_000)));
    assert_eq!(&disk.read_small(&file, 10_000).unwrap()[9_990..], b"0123456789");
    assert!(disk.read_small(&file, 9_999).is_err());
    assert_eq!(disk.look(root.at("base")).unwrap(), Some(Found::Directory));
    assert_eq!(disk.look(root.at("")).unwrap(), Some(Found::Directory));
    assert_eq!(disk.look(root.at("gone/x")).unwrap(), None);
    disk.make_link(root.at("base/l"), Path::new("/nowhere")).unwrap();
    assert_eq!(disk.list(root.at("base")).unwrap(), ["1", "l"]);
    disk.rename(root.at("base/1"), root.at("2")).unwrap();
    disk.sync(&disk.open(root.at(""), Open::Directory).unwrap()).unwrap();
    disk.remove_file(root.at("base/l")).unwrap();
    disk.remove_directory(root.at("base")).unwrap();
    assert_eq!(disk.list(root.at("")).unwrap(), ["2"]);
}
