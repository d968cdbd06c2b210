//! Pages to measure with: of a real cluster where there is one, else pages that compress as a shop's tables do.

use std::fs;
use std::path::PathBuf;

/// The size of a page.
pub const PAGE_BYTES: usize = 8192;

/// SplitMix64: the same sequence on every machine, which is all that a benchmark asks of randomness.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ mixed >> 31
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: usize) -> usize {
        (self.number() % limit as u64) as usize
    }
}

/// About `bytes` of whole MiBs, and where they are from. `PGHYDRANT_BENCH_PAGES` names a database's directory
/// (`base/5`) of a stopped cluster, such as `realistic.sql` makes: its relations, a part of each.
pub fn pages(bytes: usize) -> (Vec<u8>, &'static str) {
    match std::env::var_os("PGHYDRANT_BENCH_PAGES") {
        Some(directory) => (read_relations(&directory.into(), bytes), "PGHYDRANT_BENCH_PAGES"),
        None => (generate(bytes), "generated heap pages"),
    }
}

/// Takes from all relations in proportion, so that no table decides alone.
fn read_relations(directory: &PathBuf, bytes: usize) -> Vec<u8> {
    let mut relations: Vec<_> = fs::read_dir(directory).into_iter().flatten().flatten().map(|e| e.path()).collect();
    relations.sort();
    let contents: Vec<_> =
        relations.into_iter().filter_map(|path| fs::read(path).ok()).filter(|r| r.len() >= 1 << 20).collect();
    let total: usize = contents.iter().map(Vec::len).sum();
    assert!(total > 0, "PGHYDRANT_BENCH_PAGES names no directory with relations of a MiB or more");
    let mut out = Vec::new();
    for content in contents {
        let share = (content.len() as u128 * bytes as u128 / total as u128) as usize;
        out.extend_from_slice(&content[..content.len().min(share.next_multiple_of(1 << 20)) >> 20 << 20]);
    }
    out
}

/// Heap pages of a table of orders: headers and line pointers as PostgreSQL lays them out, keys and times that grow, a
/// status from a short list, JSON with the same keys in every row, a random identifier.
fn generate(bytes: usize) -> Vec<u8> {
    let mut random = Random(42);
    let mut out = vec![0; bytes >> 20 << 20];
    let mut id = 1_u64;
    for page in out.chunks_exact_mut(PAGE_BYTES) {
        let mut lower = 24;
        let mut upper = PAGE_BYTES;
        loop {
            let tuple = tuple(id, &mut random);
            if upper - tuple.len() < lower + 4 {
                break;
            }
            upper -= tuple.len();
            page[upper..upper + tuple.len()].copy_from_slice(&tuple);
            let pointer = upper as u32 | 1 << 15 | (tuple.len() as u32) << 17;
            page[lower..lower + 4].copy_from_slice(&pointer.to_le_bytes());
            lower += 4;
            id += 1;
        }
        page[4..8].copy_from_slice(&(id as u32 * 150).to_le_bytes());
        page[8..10].copy_from_slice(&(random.number() as u16).to_le_bytes());
        for (at, value) in [(12, lower), (14, upper), (16, PAGE_BYTES), (18, PAGE_BYTES | 4)] {
            page[at..at + 2].copy_from_slice(&(value as u16).to_le_bytes());
        }
    }
    out
}

fn tuple(id: u64, random: &mut Random) -> Vec<u8> {
    const STATUS: [&str; 6] = ["new", "paid", "packed", "shipped", "delivered", "returned"];
    let mut tuple = Vec::with_capacity(256);
    tuple.extend_from_slice(&745_u32.to_le_bytes());
    tuple.extend_from_slice(&[0; 14]);
    tuple.extend_from_slice(&[7, 0, 2, 9, 24, 0]);
    tuple.extend_from_slice(&id.to_le_bytes());
    tuple.extend_from_slice(&(random.number() % 2_000_000).to_le_bytes());
    tuple.extend_from_slice(&(660_000_000_000_000 + id * 31_000_000).to_le_bytes());
    tuple.extend_from_slice(STATUS[random.below(STATUS.len())].as_bytes());
    for _ in 0..2 {
        let (article, price) = (random.below(20_000), random.below(10_000));
        let line =
            format!("{{\"article\": {article}, \"price\": {}.{:02}, \"quantity\": 1}}", price / 100, price % 100);
        tuple.extend_from_slice(line.as_bytes());
    }
    for _ in 0..2 {
        tuple.extend_from_slice(&random.number().to_le_bytes());
    }
    tuple.resize(tuple.len().next_multiple_of(8), 0);
    tuple
}

/// Changes `share` of the pages at random as an UPDATE does: a new tuple where there was none, the old one's header, a
/// line pointer, LSN and checksum.
pub fn update(pages: &mut [u8], share: f64, random: &mut Random) {
    let count = pages.len() / PAGE_BYTES;
    let mut changed = vec![false; count];
    let wanted = (count as f64 * share) as usize;
    let mut done = 0;
    while done < wanted {
        let at = random.below(count);
        if std::mem::replace(&mut changed[at], true) {
            continue;
        }
        done += 1;
        let page = &mut pages[at * PAGE_BYTES..(at + 1) * PAGE_BYTES];
        page[4..10].copy_from_slice(&random.number().to_le_bytes()[..6]);
        page[400..404].copy_from_slice(&random.number().to_le_bytes()[..4]);
        let old = 4096 + random.below(3800) / 8 * 8;
        page[old..old + 4].copy_from_slice(&800_000_u32.to_le_bytes());
        let tuple = tuple(random.number() >> 40, random);
        let new = 1024 + random.below(2800) / 8 * 8;
        page[new..new + tuple.len()].copy_from_slice(&tuple);
    }
}
