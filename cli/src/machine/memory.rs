//! The memory of this machine, as far as a server's shared memory is concerned.

use std::fs;
use std::path::Path;

/// Bytes and pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Memory {
    /// Of the machine, with its swap; zero where it does not say.
    pub(crate) bytes: u64,
    /// The kernel promises more than there is.
    pub(crate) overcommits: bool,
    /// Bytes of a huge page of the size that is asked for; zero where there are none.
    pub(crate) huge_page_bytes: u64,
    /// That size is the kernel's own choice.
    pub(crate) is_usual_huge_page: bool,
    /// Huge pages of that size that are reserved, and how many more a server could have.
    pub(crate) huge_pages: u64,
    pub(crate) huge_pages_free: u64,
}

impl Memory {
    /// `huge_page_bytes` of zero is the kernel's own choice.
    pub(super) fn look(huge_page_bytes: u64) -> Self {
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let overcommit = fs::read_to_string("/proc/sys/vm/overcommit_memory").unwrap_or_default();
        let usual = field(&meminfo, "Hugepagesize").unwrap_or(0) * 1024;
        let huge_page_bytes = if huge_page_bytes == 0 { usual } else { huge_page_bytes };
        let pool = format!("/sys/kernel/mm/hugepages/hugepages-{}kB", huge_page_bytes / 1024);
        let of_pool = |name: &str| number(&Path::new(&pool).join(name));
        Self {
            bytes: (field(&meminfo, "MemTotal").unwrap_or(0) + field(&meminfo, "SwapTotal").unwrap_or(0)) * 1024,
            overcommits: overcommit.trim() == "1",
            huge_page_bytes,
            is_usual_huge_page: huge_page_bytes == usual,
            huge_pages: of_pool("nr_hugepages"),
            huge_pages_free: of_pool("free_hugepages").saturating_sub(of_pool("resv_hugepages"))
                + of_pool("nr_overcommit_hugepages").saturating_sub(of_pool("surplus_hugepages")),
        }
    }
}

fn number(path: &Path) -> u64 {
    fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

/// `HugePages_Free:       12` or `Hugepagesize:       2048 kB`.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_table_is_read() {
        let text = "HugePages_Free:       12\nHugepagesize:       2048 kB\n";
        assert_eq!([field(text, "Hugepagesize"), field(text, "HugePages_Free")], [Some(2048), Some(12)]);
        assert_eq!(field("", "HugePages_Free"), None);
    }
}
