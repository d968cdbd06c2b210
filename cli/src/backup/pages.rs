//! PostgreSQL's page checksums, verified as the pages go by.
//!
//! The server writes while we read, so a page may be torn: half of it old, half new. It is read again, a few times with a
//! pause. A page that stays wrong is excused if the WAL of this backup makes it right: if its LSN lies between the
//! backup's start and its end. The end is only known later, so such pages are kept as suspects until [`Suspect::is_bad`]
//! can be asked. (PostgreSQL's own `basebackup.c` excuses every LSN after the start, even one that no WAL has reached.)

use std::time::Duration;

use engine::page;
use engine::units::{Lsn, PAGE_BYTES};

/// How often a page that is wrong is read again: a write of 8 KiB is over within microseconds, unless the writer was
/// interrupted in the middle of it.
const REREADS: u32 = 4;
const REREAD_PAUSE: Duration = Duration::from_millis(5);
/// After so many wrong pages of one file it is damaged rather than written to: its pages are read again only once.
const PATIENCE_PAGES: usize = 64;

/// A page that stayed wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Suspect {
    /// Number of the page in its file.
    pub(super) page: u32,
    /// The checksum it carries.
    pub(super) stored: u16,
    /// The checksum of its bytes.
    pub(super) computed: u16,
    /// The LSN it carries.
    pub(super) lsn: Lsn,
}

impl Suspect {
    /// Whether replaying the WAL from `start` to `stop` leaves it wrong.
    pub(super) fn is_bad(&self, start: Lsn, stop: Lsn) -> bool {
        self.lsn < start || self.lsn > stop
    }
}

/// Reads a page of the file again; false if it is there no more.
pub(super) type Reread<'a, E> = dyn FnMut(u32, &mut [u8]) -> Result<bool, E> + 'a;

/// Verifies the pages of one file.
#[derive(Debug)]
pub(super) struct Checker {
    /// The number, within the relation, of the file's first page.
    first_page: u32,
    suspects: Vec<Suspect>,
}

impl Checker {
    pub(super) fn new(first_page: u32) -> Self {
        Self { first_page, suspects: Vec::new() }
    }

    /// Checks the whole pages of `bytes`, which begin with page `page` of the file. A wrong page is read again with
    /// `reread(page, into)`, which says whether the page was still there; a better copy replaces the wrong one.
    pub(super) fn check<E>(&mut self, bytes: &mut [u8], page: u32, reread: &mut Reread<'_, E>) -> Result<(), E> {
        for (index, content) in (page..).zip(bytes.chunks_exact_mut(PAGE_BYTES)) {
            let number = self.first_page.wrapping_add(index);
            let mut attempts = if self.suspects.len() < PATIENCE_PAGES { REREADS } else { 1 };
            while let Err((stored, computed)) = judge(content, number) {
                if attempts == 0 {
                    self.suspects.push(Suspect { page: index, stored, computed, lsn: page::page_lsn(content) });
                    break;
                }
                if attempts < REREADS {
                    std::thread::sleep(REREAD_PAUSE);
                }
                attempts -= 1;
                if !reread(index, content)? {
                    // Truncated meanwhile: replay truncates it again.
                    break;
                }
            }
        }
        Ok(())
    }

    /// As [`Self::check`], where the bytes are all there is.
    pub(super) fn check_once(&mut self, bytes: &[u8], page: u32) {
        for (index, content) in (page..).zip(bytes.chunks_exact(PAGE_BYTES)) {
            if let Err((stored, computed)) = judge(content, self.first_page.wrapping_add(index)) {
                self.suspects.push(Suspect { page: index, stored, computed, lsn: page::page_lsn(content) });
            }
        }
    }

    /// The pages that stayed wrong.
    pub(super) fn into_suspects(self) -> Vec<Suspect> {
        self.suspects
    }
}

/// Whether a page is right; if not, the checksum it carries and the one it should carry.
fn judge(content: &[u8], number: u32) -> Result<(), (u16, u16)> {
    // A page that was added to the file and not filled yet is all zero; one that only looks new is damaged.
    if page::is_new(content) && page::is_zero(content) {
        return Ok(());
    }
    let (stored, computed) = (page::stored_checksum(content), page::page_checksum(content, number));
    if stored == computed && !page::is_new(content) { Ok(()) } else { Err((stored, computed)) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn good_page(number: u32, lsn: u32) -> Vec<u8> {
        let mut page = vec![7; PAGE_BYTES];
        page[..4].fill(0);
        page[4..8].copy_from_slice(&lsn.to_le_bytes());
        let checksum = page::page_checksum(&page, number);
        page[8..10].copy_from_slice(&checksum.to_le_bytes());
        page
    }

    fn check(bytes: &mut [u8], reread: &mut Reread<'_, ()>) -> Vec<Suspect> {
        let mut checker = Checker::new(131_072);
        checker.check(bytes, 10, reread).unwrap();
        checker.into_suspects()
    }

    #[test]
    fn good_and_new_pages_pass_and_the_number_counts_over_the_relation() {
        let mut bytes = [good_page(131_082, 1), vec![0; PAGE_BYTES], good_page(131_084, 1), vec![1; 100]].concat();
        assert_eq!(check(&mut bytes, &mut |_, _| Err(())), []);
        let mut misplaced = good_page(131_083, 1);
        assert_eq!(check(&mut misplaced, &mut |_, _| Ok(true)).len(), 1);
    }

    #[test]
    fn a_torn_page_is_read_again_and_the_better_copy_kept() {
        let good = good_page(131_083, 1);
        let mut bytes = [good_page(131_082, 1), good.clone()].concat();
        bytes[PAGE_BYTES + 5000] ^= 1;
        let mut reads = 0;
        let suspects = check(&mut bytes, &mut |page, into| {
            assert_eq!(page, 11);
            reads += 1;
            if reads == 2 {
                into.copy_from_slice(&good);
            }
            Ok(true)
        });
        assert_eq!((suspects, reads), (Vec::new(), 2));
        assert_eq!(&bytes[PAGE_BYTES..], good);
    }

    #[test]
    fn what_stays_wrong_is_a_suspect_and_the_wal_decides() {
        let mut bytes = good_page(131_082, 0x500);
        bytes[4000] ^= 1;
        let suspects = check(&mut bytes, &mut |_, _| Ok(true));
        let [suspect] = suspects[..] else { panic!("{suspects:?}") };
        assert_eq!((suspect.page, suspect.lsn), (10, Lsn(0x500)));
        assert_ne!(suspect.stored, suspect.computed);
        assert!(!suspect.is_bad(Lsn(0x400), Lsn(0x600)));
        assert!(suspect.is_bad(Lsn(0x501), Lsn(0x600)), "changed before the backup");
        assert!(suspect.is_bad(Lsn(0x100), Lsn(0x4FF)), "an LSN that no WAL has reached");
    }

    #[test]
    fn a_page_that_only_looks_new_is_wrong_and_a_truncated_one_is_not() {
        let mut bytes = vec![0; PAGE_BYTES];
        bytes[5000] = 1;
        assert_eq!(check(&mut bytes, &mut |_, _| Ok(true)).len(), 1);
        assert_eq!(check(&mut bytes, &mut |_, _| Ok(false)), []);
    }
}
