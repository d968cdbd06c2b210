//! What every store promises to those who read it. Also run from outside of this crate, against the mount service.

use super::{Error, Existing, Store};

/// The store that a test writes to, and what it reads by: both hold the same keys.
type Stores = (Box<dyn Store>, Box<dyn Store>);

/// Runs all of it; `make` gives empty stores for each name.
pub(crate) fn run(make: &dyn Fn(&str) -> Stores) {
    every_byte_is_the_one_that_was_written(&make("bytes"));
    reading_past_the_end_is_corruption(&make("past"));
    what_is_not_there_is_told_apart(&make("absent"));
    a_listing_has_children_only_and_in_order(&make("listing"));
    a_small_read_has_a_limit(&make("limit"));
    a_key_that_was_replaced_is_read_anew(&make("replaced"));
    no_key_leads_out_of_the_store(&make("inside"));
}

fn every_byte_is_the_one_that_was_written((writer, reader): &Stores) {
    let content: Vec<u8> = (0..9_000_001_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for (name, bytes) in [("d/empty", 0), ("d/tiny", 5), ("d/odd", content.len()), ("d/whole", 8 << 20)] {
        writer.put(name, &content[..bytes], Existing::Refuse).unwrap();
        assert_eq!(reader.size(name).unwrap(), Some(bytes as u64));
        assert!(reader.get(name, bytes as u64).unwrap() == content[..bytes], "{name}");
        for (offset, length) in
            [(0, bytes), (bytes / 3, bytes / 2), (bytes, 0), (bytes.saturating_sub(1), bytes.min(1))]
        {
            let mut out = vec![0; length];
            reader.read_at(name, offset as u64, &mut out).unwrap();
            assert!(out == content[offset..offset + length], "{name} from {offset}");
        }
    }
}

fn reading_past_the_end_is_corruption((writer, reader): &Stores) {
    writer.put("key", b"12345", Existing::Refuse).unwrap();
    let mut out = [0; 4];
    reader.read_at("key", 1, &mut out).unwrap();
    assert_eq!(&out, b"2345");
    for offset in [2, 5, 1 << 40] {
        assert!(matches!(reader.read_at("key", offset, &mut out), Err(Error::Corrupt { .. })));
    }
}

fn what_is_not_there_is_told_apart((_, reader): &Stores) {
    assert_eq!(reader.size("no/key").unwrap(), None);
    let missing = |error: Error| assert_eq!(error.raw_os_error(), Some(libc::ENOENT), "{error}");
    missing(reader.read_at("no/key", 0, &mut [0]).unwrap_err());
    missing(reader.get("no/key", 10).unwrap_err());
    missing(reader.list("no").unwrap_err());
}

fn a_listing_has_children_only_and_in_order((writer, reader): &Stores) {
    for key in ["d/b", "d/a", "d/c/deep", "e"] {
        writer.put(key, b"xy", Existing::Refuse).unwrap();
    }
    let entries = reader.list("d").unwrap();
    let seen: Vec<_> = entries.iter().map(|entry| (entry.name(), entry.bytes, entry.is_directory)).collect();
    assert_eq!(seen, [("a", 2, false), ("b", 2, false), ("c", 0, true)]);
    assert_eq!(entries[0].key, "d/a");
    assert_eq!(entries, writer.list("d").unwrap());
}

fn a_small_read_has_a_limit((writer, reader): &Stores) {
    writer.put("key", &[7; 100], Existing::Refuse).unwrap();
    assert!(reader.get("key", 100).is_ok());
    assert!(matches!(reader.get("key", 99), Err(Error::Corrupt { .. })));
}

fn a_key_that_was_replaced_is_read_anew((writer, reader): &Stores) {
    for content in ["old", "newer", "new"] {
        writer.put("key", content.as_bytes(), Existing::Replace).unwrap();
        assert_eq!(reader.get("key", 5).unwrap(), content.as_bytes());
    }
}

fn no_key_leads_out_of_the_store((_, reader): &Stores) {
    for key in ["", "/etc/passwd", "../key", "a/../../key"] {
        assert!(matches!(reader.get(key, 1), Err(Error::Refused(_))), "{key}");
        assert!(matches!(reader.size(key), Err(Error::Refused(_))), "{key}");
        assert!(matches!(reader.read_at(key, 0, &mut [0]), Err(Error::Refused(_))), "{key}");
        assert!(matches!(reader.list(key), Err(Error::Refused(_))), "{key}");
    }
}
