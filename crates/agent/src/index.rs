//! Sorted entries of sealed generations: files in pages, a merge of many, and a search in one.
//!
//! Page 0 is `magic, u64 entries, u8 damaged`; each further page has up to 203 entries of 20 bytes:
//! `u64 block, u32 log, u32 place, u32 crc`. The last 12 bytes of a page are `u32 page, u32 entries,
//! u32 crc32`. Sorted by block, each block once. Little endian. Never changed in place.

use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, OFlags};

use crate::disk::{bad, free_bytes, open_in, read_most, remove_in, u32_at, u64_at};
use crate::log::Entry;

const MAGIC: &[u8; 8] = b"sprindx1";
const PAGE_BYTES: usize = 4096;
const ENTRY_BYTES: usize = 20;
const PAGE_ENTRIES: usize = (PAGE_BYTES - 12) / ENTRY_BYTES;
/// Pages that are read at once by who reads on.
const AHEAD_PAGES: usize = 16;
/// With less, what is needed for a while is in memory.
const DISK_FREE_MIN: u64 = 64 << 20;
/// Files of indexes that are open at once in a merge.
const OPEN_MAX: usize = 64;

/// Writes an index.
pub struct Writer {
    file: File,
    page: Vec<u8>,
    pages: u32,
    entries: u64,
    first_blocks: Vec<u64>,
}

impl Writer {
    pub fn new(file: File) -> Self {
        Self {
            file,
            page: Vec::with_capacity(PAGE_BYTES),
            pages: 1,
            entries: 0,
            first_blocks: Vec::new(),
        }
    }

    /// Entries come sorted by block, each block once.
    pub fn push(&mut self, entry: Entry) -> io::Result<()> {
        if self.page.is_empty() {
            self.first_blocks.push(entry.block);
        }
        self.page.extend(entry.block.to_le_bytes());
        for field in [entry.log, entry.place, entry.crc] {
            self.page.extend(field.to_le_bytes());
        }
        self.entries += 1;
        if self.page.len() == PAGE_ENTRIES * ENTRY_BYTES {
            self.end_page()
        } else {
            Ok(())
        }
    }

    fn end_page(&mut self) -> io::Result<()> {
        let count = u32::try_from(self.page.len() / ENTRY_BYTES).unwrap_or(0);
        write_page(&self.file, &mut self.page, self.pages, count)?;
        self.pages += 1;
        Ok(())
    }

    /// Ends the file; nothing is synced.
    pub fn finish(mut self, damaged: bool) -> io::Result<Index> {
        if !self.page.is_empty() {
            self.end_page()?;
        }
        self.page.extend(MAGIC);
        self.page.extend(self.entries.to_le_bytes());
        self.page.push(u8::from(damaged));
        write_page(&self.file, &mut self.page, 0, 0)?;
        Ok(Index {
            file: self.file,
            entries: self.entries,
            damaged,
            first_blocks: self.first_blocks,
            searched: RefCell::default(),
            ahead: RefCell::default(),
        })
    }
}

fn write_page(file: &File, page: &mut Vec<u8>, number: u32, count: u32) -> io::Result<()> {
    page.resize(PAGE_BYTES - 12, 0);
    page.extend(number.to_le_bytes());
    page.extend(count.to_le_bytes());
    page.extend(crc32fast::hash(page).to_le_bytes());
    file.write_all_at(page, u64::from(number) * PAGE_BYTES as u64)?;
    page.clear();
    Ok(())
}

/// An index that can be read in order and searched.
#[derive(Debug)]
pub struct Index {
    file: File,
    pub entries: u64,
    /// What is not in it may have been changed all the same.
    pub damaged: bool,
    /// The first block of each page. Only the writer fills it: an index that is opened can be read in
    /// order, but not searched.
    first_blocks: Vec<u64>,
    /// The page that was searched last: most readers go on behind it.
    searched: RefCell<(u32, Vec<Entry>)>,
    /// The bytes of some pages, from this one on.
    ahead: RefCell<(u32, Vec<u8>)>,
}

impl Index {
    pub fn open(file: File) -> io::Result<Self> {
        let mut index = Self {
            file,
            entries: 0,
            damaged: false,
            first_blocks: Vec::new(),
            searched: RefCell::default(),
            ahead: RefCell::default(),
        };
        let (page, _) = index.bytes(0)?;
        if page[..8] != *MAGIC {
            return Err(bad("not an index"));
        }
        (index.entries, index.damaged) = (u64_at(&page, 8), page[16] != 0);
        Ok(index)
    }

    /// A page, and how many entries it has.
    fn bytes(&self, number: u32) -> io::Result<(Vec<u8>, usize)> {
        let mut ahead = self.ahead.borrow_mut();
        let known = ahead.1.len() / PAGE_BYTES;
        let mut at = number.wrapping_sub(ahead.0) as usize;
        if at >= known {
            let pages = if at == known { AHEAD_PAGES } else { 1 };
            let mut bytes = vec![0; pages * PAGE_BYTES];
            let got = read_most(
                &self.file,
                &mut bytes,
                u64::from(number) * PAGE_BYTES as u64,
            )?;
            bytes.truncate(got.next_multiple_of(PAGE_BYTES).max(PAGE_BYTES));
            (*ahead, at) = ((number, bytes), 0);
        }
        let page = ahead.1[at * PAGE_BYTES..][..PAGE_BYTES].to_vec();
        let count = usize::try_from(u32_at(&page, PAGE_BYTES - 8)).unwrap_or(usize::MAX);
        let whole = u32_at(&page, PAGE_BYTES - 4) == crc32fast::hash(&page[..PAGE_BYTES - 4])
            && u32_at(&page, PAGE_BYTES - 12) == number
            && count <= PAGE_ENTRIES;
        if !whole {
            return Err(bad(format!("page {number} of an index is damaged")));
        }
        Ok((page, count))
    }

    fn page(&self, number: u32) -> io::Result<Vec<Entry>> {
        let (bytes, count) = self.bytes(number)?;
        let entries = bytes.chunks_exact(ENTRY_BYTES).take(count);
        Ok(entries
            .map(|entry| Entry {
                block: u64_at(entry, 0),
                log: u32_at(entry, 8),
                place: u32_at(entry, 12),
                crc: u32_at(entry, 16),
            })
            .collect())
    }

    /// The entries in order. An error comes once, as the last one.
    pub fn iter(&self) -> Iter<'_> {
        Iter {
            index: self,
            page: Vec::new().into_iter(),
            next: 1,
            left: self.entries,
        }
    }

    /// The entry of a block, in an index that a [`Writer`] made just now.
    pub fn find(&self, block: u64) -> io::Result<Option<Entry>> {
        let page = self.first_blocks.partition_point(|first| *first <= block);
        if page == 0 {
            return Ok(None);
        }
        let page = u32::try_from(page).map_err(|_| bad("index too long"))?;
        let mut searched = self.searched.borrow_mut();
        if searched.0 != page {
            *searched = (page, self.page(page)?);
        }
        let entries = &searched.1;
        let found = entries.binary_search_by_key(&block, |entry| entry.block);
        Ok(found.ok().map(|at| entries[at]))
    }

    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }
}

pub struct Iter<'a> {
    index: &'a Index,
    page: std::vec::IntoIter<Entry>,
    next: u32,
    left: u64,
}

impl Iterator for Iter<'_> {
    type Item = io::Result<Entry>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        if self.page.len() == 0 {
            match self.index.page(self.next) {
                Ok(page) if !page.is_empty() => self.page = page.into_iter(),
                other => {
                    self.left = 0;
                    return Some(Err(other
                        .err()
                        .unwrap_or_else(|| bad("an index is too short"))));
                }
            }
            self.next += 1;
        }
        self.left -= 1;
        self.page.next().map(Ok)
    }
}

/// An unnamed file in `folder`; in memory where the disk is almost full, because the past must stay readable then.
pub fn scratch(folder: impl AsFd) -> io::Result<File> {
    if free_bytes(&folder)? < DISK_FREE_MIN {
        let name = "sprat-agent";
        return Ok(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?.into());
    }
    let name = format!("scratch-{}", std::process::id());
    let file = open_in(
        &folder,
        &name,
        OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC,
    )?;
    remove_in(folder, &name)?;
    Ok(file)
}

/// Merges indexes, the oldest first, into `out`: of a block the oldest entry counts. Behind a damaged
/// index nothing counts, since the entry that it lost may have been older. `open` opens the nth.
pub fn merge(
    count: usize,
    open: &dyn Fn(usize) -> io::Result<Index>,
    keep: &dyn Fn(u64) -> bool,
    scratch: &dyn Fn() -> io::Result<File>,
    out: File,
) -> io::Result<Index> {
    if count > OPEN_MAX {
        let mut parts = Vec::new();
        let step = count.div_ceil(OPEN_MAX);
        for first in (0..count).step_by(step) {
            let part = |n: usize| open(first + n);
            parts.push(merge(
                step.min(count - first),
                &part,
                keep,
                scratch,
                scratch()?,
            )?);
        }
        return merge_open(&parts, keep, out);
    }
    let mut indexes = Vec::new();
    for n in 0..count {
        indexes.push(open(n)?);
        if indexes[n].damaged {
            break;
        }
    }
    merge_open(&indexes, keep, out)
}

/// The same of indexes that are open.
pub fn merge_open(indexes: &[Index], keep: &dyn Fn(u64) -> bool, out: File) -> io::Result<Index> {
    let readable = indexes
        .iter()
        .position(|index| index.damaged)
        .map_or(indexes.len(), |first| first + 1);
    let mut readers: Vec<_> = indexes[..readable].iter().map(Index::iter).collect();
    let mut heads: Vec<Option<Entry>> = vec![None; readable];
    let mut heap = BinaryHeap::new();
    let mut advance =
        |n: usize, heads: &mut Vec<Option<Entry>>, heap: &mut BinaryHeap<Reverse<(u64, usize)>>| {
            heads[n] = readers[n].next().transpose()?;
            if let Some(entry) = heads[n] {
                heap.push(Reverse((entry.block, n)));
            }
            io::Result::Ok(())
        };
    for n in 0..readable {
        advance(n, &mut heads, &mut heap)?;
    }
    let mut writer = Writer::new(out);
    let mut last = None;
    while let Some(Reverse((block, n))) = heap.pop() {
        if let Some(entry) = heads[n].filter(|_| last != Some(block) && keep(block)) {
            writer.push(entry)?;
        }
        last = Some(block);
        advance(n, &mut heads, &mut heap)?;
    }
    writer.finish(indexes[..readable].iter().any(|index| index.damaged))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn entry(block: u64, log: u32) -> Entry {
        Entry {
            block,
            log,
            place: log + 1,
            crc: 7,
        }
    }

    fn written(blocks: &BTreeMap<u64, u32>, damaged: bool) -> Index {
        let mut writer = Writer::new(tempfile::tempfile().unwrap());
        for (block, log) in blocks {
            writer.push(entry(*block, *log)).unwrap();
        }
        let written = writer.finish(damaged).unwrap();
        let file = written.file.try_clone().unwrap();
        Index::open(file).unwrap()
    }

    fn merged(lists: &[(BTreeMap<u64, u32>, bool)], keep: &dyn Fn(u64) -> bool) -> Index {
        let open = |n: usize| Ok(written(&lists[n].0, lists[n].1));
        let scratch = || tempfile::tempfile();
        merge(lists.len(), &open, keep, &scratch, scratch().unwrap()).unwrap()
    }

    #[test]
    fn the_oldest_entry_wins_in_a_merge_of_many() {
        let lists: Vec<(BTreeMap<u64, u32>, bool)> = (0..200_u32)
            .map(|log| {
                (
                    (0..40_u64).map(|n| (n * u64::from(log + 1), log)).collect(),
                    false,
                )
            })
            .collect();
        let mut expected: BTreeMap<u64, u32> = BTreeMap::new();
        for (list, _) in &lists {
            for (block, log) in list {
                expected.entry(*block).or_insert(*log);
            }
        }
        let found = merged(&lists, &|_| true);
        let all: Vec<_> = found
            .iter()
            .map(Result::unwrap)
            .map(|entry| (entry.block, entry.log))
            .collect();
        assert_eq!(all, expected.clone().into_iter().collect::<Vec<_>>());
        for block in 0..9000 {
            let entry = found.find(block).unwrap();
            assert_eq!(
                entry.map(|entry| entry.log),
                expected.get(&block).copied(),
                "{block}"
            );
        }
    }

    proptest! {
        #[test]
        fn nothing_newer_than_a_damaged_index_counts(
            lists in proptest::collection::vec((proptest::collection::btree_map(0_u64..50, 0_u32..9, 0..30), any::<bool>()), 1..6),
            from in 0_u64..50,
        ) {
            let mut expected: BTreeMap<u64, u32> = BTreeMap::new();
            let mut damaged = false;
            for (list, is_damaged) in &lists {
                if !damaged {
                    for (block, log) in list.range(from..) {
                        expected.entry(*block).or_insert(*log);
                    }
                }
                damaged |= is_damaged;
            }
            let found = merged(&lists, &|block| block >= from);
            prop_assert_eq!(found.damaged, damaged);
            let all: BTreeMap<_, _> = found.iter().map(Result::unwrap).map(|entry| (entry.block, entry.log)).collect();
            prop_assert_eq!(all, expected);
        }
    }

    #[test]
    fn a_flipped_bit_in_an_index_is_an_error() {
        let list: BTreeMap<u64, u32> = (0..500).map(|n| (n, 1)).collect();
        let index = written(&list, false);
        let len = index.file.metadata().unwrap().len();
        for at in (0..len).step_by(37) {
            let mut byte = [0];
            index.file.read_exact_at(&mut byte, at).unwrap();
            index.file.write_all_at(&[byte[0] ^ 4], at).unwrap();
            let read = Index::open(index.file.try_clone().unwrap())
                .and_then(|index| index.iter().collect::<io::Result<Vec<_>>>());
            read.unwrap_err();
            index.file.write_all_at(&byte, at).unwrap();
        }
    }
}
