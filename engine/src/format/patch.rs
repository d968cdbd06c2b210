//! A patch: the changed pages of a block over an older block that is stored whole.
//!
//! PostgreSQL changes pages in place, so an incremental backup of a random-write workload meets many blocks of
//! which one or two pages differ. Such a block is stored as a patch: a bitmap of the replaced pages, then those
//! pages in order. The base is always a block stored whole, so reading costs at most two runs however many backups
//! went before.
//!
//! Decoded, a patch is 16 bytes of bitmap (little-endian, bit *i* = page *i* of the block) and 8 KiB per bit set.

use crate::format::Malformed;
use crate::units::{BlockSize, PAGE_BYTES};

/// Bytes of the bitmap in front of the pages.
pub const BITMAP_BYTES: usize = size_of::<u128>();
/// The longest patch, decoded: half of the largest block.
pub const PATCH_BYTES_MAX: usize = BITMAP_BYTES + BlockSize::MAX.bytes() / 2;

const _: () = assert!(BlockSize::MAX.bytes() / PAGE_BYTES <= BITMAP_BYTES * 8, "a bit for every page");

/// The patch that makes `new` of `base`, or nothing where storing `new` whole is better: when more than half of its
/// pages differ, or when it is not made of whole pages as `base` is.
pub fn make(base: &[u8], new: &[u8]) -> Option<Vec<u8>> {
    if base.len() != new.len() || !new.len().is_multiple_of(PAGE_BYTES) || new.len() > BlockSize::MAX.bytes() {
        return None;
    }
    let pages = || base.chunks_exact(PAGE_BYTES).zip(new.chunks_exact(PAGE_BYTES)).enumerate();
    let bitmap = pages().filter(|(_, (old, new))| old != new).fold(0_u128, |bitmap, (page, _)| bitmap | 1 << page);
    let replaced = bitmap.count_ones() as usize;
    if replaced * PAGE_BYTES > new.len() / 2 {
        return None;
    }
    let mut patch = Vec::with_capacity(BITMAP_BYTES + replaced * PAGE_BYTES);
    patch.extend_from_slice(&bitmap.to_le_bytes());
    for (page, (_, new)) in pages() {
        if bitmap >> page & 1 == 1 {
            patch.extend_from_slice(new);
        }
    }
    Some(patch)
}

/// Puts the pages of `patch`, decoded, over `block`, the decoded base. Nothing is changed if the patch is refused.
pub fn apply(patch: &[u8], block: &mut [u8]) -> Result<(), Malformed> {
    let Some((bitmap, pages)) = patch.split_first_chunk::<BITMAP_BYTES>() else {
        return Err(Malformed::damaged(0, format!("a patch of {} bytes, shorter than its bitmap", patch.len())));
    };
    let bitmap = u128::from_le_bytes(*bitmap);
    let beyond = 128 - bitmap.leading_zeros() as usize;
    if !block.len().is_multiple_of(PAGE_BYTES) || beyond > block.len() / PAGE_BYTES {
        let last = beyond.saturating_sub(1);
        return Err(Malformed::damaged(0, format!("a patch of page {last} for a block of {} bytes", block.len())));
    }
    let replaced = bitmap.count_ones() as usize;
    if pages.len() != replaced * PAGE_BYTES {
        let detail = format!("a patch of {replaced} pages carries {} bytes", pages.len());
        return Err(Malformed::damaged(BITMAP_BYTES, detail));
    }
    let targets = block.chunks_exact_mut(PAGE_BYTES).enumerate().filter(|(page, _)| bitmap >> page & 1 == 1);
    for ((_, target), page) in targets.zip(pages.chunks_exact(PAGE_BYTES)) {
        target.copy_from_slice(page);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]
    use super::*;
    use proptest::prelude::*;

    fn block(pages: usize) -> Vec<u8> {
        (0..pages).flat_map(|page| vec![page as u8; PAGE_BYTES]).collect()
    }

    #[test]
    fn only_whole_pages_and_at_most_half_of_them() {
        let base = block(16);
        let mut new = base.clone();
        for page in 0..8 {
            new[page * PAGE_BYTES] ^= 0x80;
        }
        assert_eq!(make(&base, &new).map(|patch| patch.len()), Some(16 + 8 * PAGE_BYTES));
        new[8 * PAGE_BYTES] ^= 0x80;
        assert_eq!(make(&base, &new), None);
        assert_eq!(make(&base, &base[..PAGE_BYTES]), None);
        assert_eq!(make(&base[..100], &base[..100]), None);
    }

    #[test]
    fn a_patch_for_another_block_is_refused_and_changes_nothing() {
        let base = block(128);
        let mut new = base.clone();
        new[127 * PAGE_BYTES..].fill(0xFF);
        let patch = make(&base, &new).unwrap();
        for bytes in [0, PAGE_BYTES, 127 * PAGE_BYTES, 128 * PAGE_BYTES - 1] {
            let mut other = base[..bytes].to_vec();
            assert!(apply(&patch, &mut other).is_err());
            assert_eq!(other, base[..bytes]);
        }
        for bytes in [0, 15, 16, patch.len() - 1] {
            assert!(apply(&patch[..bytes], &mut base.clone()).is_err());
        }
        let mut whole = base.clone();
        apply(&patch, &mut whole).unwrap();
        assert_eq!(whole, new);
    }

    proptest! {
        #[test]
        fn base_and_patch_give_the_new_block(
            pages in 1_usize..=128,
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..80),
        ) {
            let base = block(pages);
            let mut new = base.clone();
            for (at, byte) in changes {
                let at = at.index(new.len());
                new[at] = byte;
            }
            if let Some(patch) = make(&base, &new) {
                prop_assert!(patch.len() <= BITMAP_BYTES + new.len() / 2);
                let mut patched = base;
                apply(&patch, &mut patched).unwrap();
                prop_assert!(patched == new);
            }
        }

        #[test]
        fn hostile_bytes_never_panic(patch: Vec<u8>, pages in 0_usize..=128, extra in 0_usize..2) {
            let _ = apply(&patch, &mut vec![0; pages * PAGE_BYTES + extra]);
        }
    }
}
