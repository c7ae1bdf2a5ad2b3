//! Compares the container with the lists of writes beside it.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::ops::Range;

use sprat_store::lock::PendingComparison;
use sprat_store::{FileName, ReadClass, Store, StoreError, StoreFile};

use crate::Failure;
use crate::volume_process::late::digest::DigestKey;
use crate::volume_process::late::file::{Kind, List};
use crate::volume_process::late::{BLOCK, BLOCK_BYTES};

/// Blocks that are read together.
const BATCH_BLOCKS: usize = 1024;
/// A longer list is compared completely at the end of its time and by `check`. Otherwise so many
/// random blocks of it are compared: a session each hour must not read back each time what the
/// first one wrote.
const SAMPLE_BLOCKS: usize = 64 << 10;

/// The result of a comparison.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Compared {
    /// Blocks of the container file, ascending, whose bytes differ from what the last session wrote
    /// there.
    pub overwritten: Vec<u64>,
    /// Tokens of the sessions whose writes were compared.
    pub compared: Vec<String>,
    /// Sessions whose writes can't be compared, because their list is missing.
    pub uncompared: Vec<PendingComparison>,
    /// The files of the write lists.
    pub files: Vec<FileName>,
    /// The blocks in the write lists.
    pub listed: Vec<Range<u64>>,
    /// Those blocks with the digests of the newest lists, ascending. Empty if a list is missing.
    pub expected: Vec<(u64, u64)>,
}

/// Reads the blocks that the lists name. `whole`: all of them, however many.
///
/// A list of writes is valid only while its note is in the lease. Without a note its time is over,
/// and sessions that wrote later left no lists. If a session with a note has left no list, nobody
/// knows what it wrote, so a difference proves nothing.
///
/// A late-write list has the exact bytes. If a block holds them although a session with a later
/// lease wrote others there, and no session wrote since, then the block was overwritten. This is
/// compared whatever the length of the lists, and also if a list of an earlier session is missing.
pub(crate) fn compare(
    store: &dyn Store,
    file: &dyn StoreFile,
    key: &DigestKey,
    (names, watched): (&[FileName], &[PendingComparison]),
    whole: bool,
) -> Result<Compared, Failure> {
    let (mut lists, mut files) = (Vec::new(), Vec::new());
    for name in names {
        let Some(list) = List::read(store, name, key)? else {
            continue;
        };
        if list.head.kind == Kind::Written {
            files.push(name.clone());
        }
        lists.push(list);
    }
    let is_watched = |list: &&List| watched.iter().any(|note| note.token == list.head.token);
    let of_kind = |kind| lists.iter().filter(move |list| list.head.kind == kind);
    let written: Vec<&List> = of_kind(Kind::Written).filter(is_watched).collect();
    let has_list =
        |note: &PendingComparison| written.iter().any(|list| list.head.token == note.token);
    let compared = written.iter().map(|list| list.head.token.clone()).collect();
    let uncompared: Vec<PendingComparison> = watched
        .iter()
        .filter(|note| !has_list(note))
        .cloned()
        .collect();
    let newest = newest(&written);
    let listed = ranges(newest.keys().copied());
    let mut overwritten = Vec::new();
    let expected: Vec<(u64, u64)> = match uncompared.is_empty() {
        true => newest
            .iter()
            .map(|(block, of)| (*block, of.digest))
            .collect(),
        false => Vec::new(),
    };
    if whole || expected.len() <= SAMPLE_BLOCKS {
        overwritten.extend(differing(file, key, &expected, false)?);
    } else {
        overwritten.extend(differing(file, key, &sample(&expected), false)?);
    }
    // Nobody knows what a session without a list wrote, so the lists before it are no longer valid.
    let last_unknown = watched.iter().rposition(|note| !has_list(note));
    let is_last_word = |token: &str| {
        let place = watched.iter().position(|note| note.token == token);
        place > last_unknown
    };
    for list in of_kind(Kind::Sent) {
        let head = &list.head;
        let is_late = |(block, digest): &&(u64, u64)| {
            // A copy of a process wrote blocks that its twin knows nothing of.
            head.twin
                || newest.get(block).is_some_and(|of| {
                    of.lease > head.lease && of.digest != *digest && is_last_word(of.token)
                })
        };
        let late: Vec<(u64, u64)> = list.entries.iter().filter(is_late).copied().collect();
        overwritten.extend(differing(file, key, &late, true)?);
    }
    overwritten.sort_unstable();
    overwritten.dedup();
    Ok(Compared {
        overwritten,
        compared,
        uncompared,
        files,
        listed,
        expected,
    })
}

/// What the newest list says about a block.
struct Written<'l> {
    lease: u64,
    token: &'l str,
    digest: u64,
}

/// Each block with what the newest list says about it.
fn newest<'l>(written: &[&'l List]) -> BTreeMap<u64, Written<'l>> {
    let mut newest = BTreeMap::<u64, Written<'l>>::new();
    for list in written {
        let (lease, token) = (list.head.lease, &*list.head.token);
        for &(block, digest) in &list.entries {
            let of = Written {
                lease,
                token,
                digest,
            };
            match newest.get(&block) {
                Some(there) if there.lease > lease => {}
                _ => drop(newest.insert(block, of)),
            }
        }
    }
    newest
}

fn sample(entries: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let chance = RandomState::new();
    let part = entries.len().div_ceil(SAMPLE_BLOCKS) as u64;
    entries
        .iter()
        .filter(|(block, _)| chance.hash_one(block) % part == 0)
        .copied()
        .collect()
}

/// Ascending blocks as ranges.
fn ranges(blocks: impl Iterator<Item = u64>) -> Vec<Range<u64>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for block in blocks {
        match ranges.last_mut() {
            Some(last) if last.end == block => last.end += 1,
            _ => ranges.push(block..block + 1),
        }
    }
    ranges
}

/// The blocks whose digest differs, or with `same` the blocks whose digest is equal.
fn differing(
    file: &dyn StoreFile,
    key: &DigestKey,
    entries: &[(u64, u64)],
    same: bool,
) -> Result<Vec<u64>, StoreError> {
    let mut found = Vec::new();
    for batch in entries.chunks(BATCH_BLOCKS) {
        let mut bytes = vec![0; batch.len() * BLOCK_BYTES];
        let mut parts: Vec<(u64, &mut [u8])> = batch
            .iter()
            .map(|(block, _)| block * BLOCK)
            .zip(bytes.chunks_exact_mut(BLOCK_BYTES))
            .collect();
        match file.read_parts_at(&mut parts, ReadClass::Demand) {
            // The file was cut. The check of its length reports that.
            Err(StoreError::Truncated { .. }) => continue,
            read => read?,
        }
        for ((block, digest), bytes) in batch.iter().zip(bytes.chunks_exact(BLOCK_BYTES)) {
            if (key.digest(*block, bytes) == *digest) == same {
                found.push(*block);
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use sprat_testkit::memory::MemoryStore;

    use super::*;
    use crate::volume_process::late::digest::tests::key;

    struct Bench {
        store: MemoryStore,
        names: Vec<FileName>,
        watched: Vec<PendingComparison>,
    }

    impl Bench {
        fn new(blocks: u8) -> Self {
            let store = MemoryStore::new();
            let file = store.create_new(&FileName::new("x.luks").unwrap()).unwrap();
            for block in 0..blocks {
                let bytes = [block; 4096];
                file.write_at(u64::from(block) * BLOCK, &bytes).unwrap();
            }
            Self {
                store,
                names: Vec::new(),
                watched: Vec::new(),
            }
        }

        fn list(&mut self, kind: Kind, lease: u64, twin: bool, blocks: &[(u64, u8)]) {
            let token = format!("{lease:032x}");
            let digest =
                |(block, byte): &(u64, u8)| (*block, key(1).digest(*block, &[*byte; 4096]));
            let entries = blocks.iter().map(digest).collect();
            let name = FileName::new(&format!("x.luks.late-{lease:016x}")).unwrap();
            List::new(kind, (lease, token), twin, entries)
                .write(&self.store, &name, &key(1))
                .unwrap();
            self.names.push(name);
        }

        fn note(&mut self, lease: u64) {
            self.watched.push(PendingComparison {
                host: "h".to_owned(),
                token: format!("{lease:032x}"),
                until_s: 0,
            });
        }

        fn compare(&self) -> Compared {
            let file = self.store.open(
                &FileName::new("x.luks").unwrap(),
                sprat_store::Access::ReadOnly,
            );
            let found = (&self.names[..], &self.watched[..]);
            compare(&self.store, &*file.unwrap(), &key(1), found, false).unwrap()
        }
    }

    #[test]
    fn block_that_differs_from_its_last_write_was_overwritten() {
        let mut bench = Bench::new(8);
        bench.list(Kind::Written, 2, false, &[(1, 1), (2, 9), (3, 9)]);
        bench.note(2);
        assert_eq!(bench.compare().overwritten, [2, 3]);
        bench.list(Kind::Written, 3, false, &[(2, 2), (5, 5)]);
        bench.note(3);
        let compared = bench.compare();
        assert_eq!(compared.overwritten, [3], "block 2 was written again");
        assert_eq!(
            (compared.listed, compared.compared.len()),
            (vec![1..4, 5..6], 2)
        );
        assert!(compared.uncompared.is_empty());
    }

    #[test]
    fn blocks_of_an_unlisted_session_do_not_count_as_overwritten() {
        let mut bench = Bench::new(4);
        bench.list(Kind::Written, 2, false, &[(1, 9)]);
        bench.note(2);
        bench.note(3);
        let compared = bench.compare();
        assert!(compared.overwritten.is_empty());
        assert_eq!(compared.uncompared, bench.watched[1..]);
        // The time of a list without a note is over.
        bench.watched.clear();
        let compared = bench.compare();
        assert!(compared.overwritten.is_empty() && compared.expected.is_empty());
    }

    #[test]
    fn writes_of_a_twin_process_are_found_by_their_bytes() {
        let mut bench = Bench::new(4);
        bench.list(Kind::Sent, 2, false, &[(1, 1)]);
        assert!(bench.compare().overwritten.is_empty(), "it was the holder");
        bench.list(Kind::Sent, 3, true, &[(2, 2), (3, 9)]);
        assert_eq!(bench.compare().overwritten, [2]);
    }

    #[test]
    fn late_writes_over_a_later_session_are_found_by_their_bytes() {
        let mut bench = Bench::new(8);
        // The list of the session that lost its lease. All of its writes are in the file now.
        bench.list(Kind::Sent, 5, false, &[(1, 1), (2, 2), (3, 3), (4, 4)]);
        bench.list(Kind::Written, 6, false, &[(1, 9), (2, 2), (5, 9)]);
        bench.note(4);
        bench.note(6);
        let compared = bench.compare();
        assert_eq!(compared.uncompared, bench.watched[..1]);
        // Block 2 was written with the same bytes. Nobody has written 3 and 4 since. Block 5 may
        // hold what the unknown session wrote.
        assert_eq!(compared.overwritten, [1]);
        // A session whose writes nobody knows may have written that.
        bench.note(7);
        assert!(bench.compare().overwritten.is_empty());
        // The bytes of the session that lost its lease are older than the session that took over,
        // but not older than one before it.
        bench.watched.truncate(2);
        bench.list(Kind::Sent, 8, false, &[(1, 1)]);
        bench.names.remove(0);
        assert!(bench.compare().overwritten.is_empty());
    }

    #[test]
    fn late_writes_are_compared_however_long_the_lists_are() {
        let mut bench = Bench::new(4);
        let many: Vec<(u64, u8)> = (10..3 * SAMPLE_BLOCKS as u64).map(|n| (n, 0)).collect();
        bench.list(
            Kind::Written,
            6,
            false,
            &[&[(1, 9), (2, 9)][..], &many].concat(),
        );
        bench.note(6);
        bench.list(Kind::Sent, 5, false, &[(1, 1), (2, 2)]);
        for _ in 0..8 {
            let compared = bench.compare();
            assert!(compared.overwritten.starts_with(&[1, 2]));
        }
    }

    #[test]
    fn part_of_a_long_list_is_compared_in_between() {
        let entries: Vec<(u64, u64)> = (0..4 * SAMPLE_BLOCKS as u64).map(|n| (n, n)).collect();
        let part = sample(&entries).len();
        assert!(
            (SAMPLE_BLOCKS / 2..2 * SAMPLE_BLOCKS).contains(&part),
            "{part}"
        );
    }
}
