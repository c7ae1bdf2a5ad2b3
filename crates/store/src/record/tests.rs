//! What a record remembers over kills, torn tails and rewrites.

#![allow(
    clippy::single_range_in_vec_init,
    reason = "a list of one range is meant"
)]

use super::*;

fn open(dir: &Path) -> LocalRecord {
    LocalRecord::open(dir, "id").unwrap()
}

/// What the next holder finds; the present one is dropped as if it had died.
fn after_death(dir: &Path, record: LocalRecord) -> LocalRecord {
    drop(record);
    open(dir)
}

#[test]
fn crc32_is_the_usual_one() {
    assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
}

#[test]
fn ranges_in_flight_are_the_next_holders_suspects_until_settled() {
    let dir = tempfile::tempdir().unwrap();
    let record = open(dir.path());
    assert_eq!(record.suspects(), []);
    record.before_send(&[0..4096, 8192..12288]).unwrap();
    record.before_send(&[4096..8192]).unwrap();
    record.before_send(&[1 << 40..(1 << 40) + 1]).unwrap();
    assert_eq!(record.suspects(), [], "only those of the holder before");
    let record = after_death(dir.path(), record);
    assert_eq!(record.suspects(), [0..12288, 1 << 40..(1 << 40) + 1]);
    assert!(record.may_arrive());
    record.quiet().unwrap();
    let record = after_death(dir.path(), record);
    assert!(!record.may_arrive(), "waited for once");
    let record = after_death(dir.path(), record);
    assert!(!record.may_arrive());
    assert_eq!(
        record.suspects().len(),
        2,
        "they stay through a second death"
    );
    record.before_send(&[0..4096]).unwrap();
    let record = after_death(dir.path(), record);
    assert!(record.may_arrive(), "sent again");
    record.all_settled().unwrap();
    assert_eq!(record.suspects(), []);
    assert_eq!(after_death(dir.path(), record).suspects(), []);
}

#[test]
fn settling_a_range_forgets_it_but_not_what_the_last_holder_left() {
    let dir = tempfile::tempdir().unwrap();
    let record = open(dir.path());
    record.before_send(&[0..100]).unwrap();
    let record = after_death(dir.path(), record);
    record.before_send(&[50..300]).unwrap();
    record.settled(&[0..200]).unwrap();
    assert_eq!(record.suspects(), [0..100]);
    let record = after_death(dir.path(), record);
    assert_eq!(record.suspects(), [0..100, 200..300]);
}

#[test]
fn a_record_torn_anywhere_keeps_its_whole_entries() {
    let dir = tempfile::tempdir().unwrap();
    let record = open(dir.path());
    for n in 0..5 {
        record.before_send(&[n * 100..n * 100 + 1]).unwrap();
    }
    let path = record.path().to_owned();
    drop(record);
    let whole = std::fs::read(&path).unwrap();
    // The head, one boot entry of the rewrite, one of the session, then five ranges.
    let base = 8 + 2 * ENTRY_BYTES;
    assert_eq!(whole.len(), base + 5 * ENTRY_BYTES);
    for cut in 0..=whole.len() {
        std::fs::write(&path, &whole[..cut]).unwrap();
        let kept = open(dir.path()).suspects().len();
        assert_eq!(kept, cut.saturating_sub(base) / ENTRY_BYTES, "cut at {cut}");
    }
    let mut bad = whole.clone();
    bad[base + 2 * ENTRY_BYTES + 9] ^= 1;
    std::fs::write(&path, &bad).unwrap();
    assert_eq!(open(dir.path()).suspects().len(), 2);
}

#[test]
fn a_file_that_is_no_record_is_refused_not_taken_for_empty() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("id.record"), "something else").unwrap();
    assert!(matches!(
        LocalRecord::open(dir.path(), "id"),
        Err(LockError::Record { .. })
    ));
}

#[test]
fn a_long_session_keeps_the_record_small_and_covers_everything() {
    let dir = tempfile::tempdir().unwrap();
    let record = open(dir.path());
    for n in 0..100_000u64 {
        record
            .before_send(&[n * 10_000..n * 10_000 + 4096])
            .unwrap();
    }
    assert!(std::fs::metadata(record.path()).unwrap().len() <= RECORD_BYTES_MAX);
    let record = after_death(dir.path(), record);
    let suspects = record.suspects();
    assert!(suspects.len() <= RANGES_MAX);
    for n in 0..100_000u64 {
        let sent = n * 10_000..n * 10_000 + 4096;
        let from = suspects.partition_point(|suspect| suspect.end < sent.end);
        assert!(suspects[from].start <= sent.start, "{sent:?}");
    }
}

#[test]
fn the_blocks_of_a_whole_buffer_are_recorded_without_what_lies_between() {
    let dir = tempfile::tempdir().unwrap();
    let record = open(dir.path());
    // 256 MiB in blocks of 4 KiB, all apart.
    let blocks = (0..65_536u64).map(|n| n << 20..(n << 20) + 4096);
    for block in blocks.clone() {
        record.before_send(&[block]).unwrap();
    }
    let record = after_death(dir.path(), record);
    assert!(record.suspects().into_iter().eq(blocks));
}

#[test]
fn a_holder_that_died_with_its_host_is_told_even_if_its_last_entries_are_lost() {
    let dir = tempfile::tempdir().unwrap();
    let record = open(dir.path());
    assert!(!record.may_arrive());
    record.taking(1, Token([1; 16])).unwrap();
    let record = after_death(dir.path(), record);
    assert!(!record.may_arrive(), "only it died");
    let path = record.path().to_owned();
    drop(record);
    let boot = boot_id();
    let whole = std::fs::read(&path).unwrap();
    let other: Vec<u8> = whole[..8]
        .iter()
        .copied()
        .chain(Entry::Boot(boot ^ 1).encode(0))
        .chain(Entry::Taking(1, Token([1; 16])).encode(0))
        .collect();
    std::fs::write(&path, &other).unwrap();
    let record = open(dir.path());
    assert!(record.may_arrive() && record.suspects().is_empty());
    record.quiet().unwrap();
    record.not_taken(1, Token([1; 16])).unwrap();
    assert!(
        !after_death(dir.path(), record).may_arrive(),
        "it ended in order"
    );
}

/// A record whose holder was taking lock 1 and died with its host, at another boot.
fn dead_with_its_host(dir: &Path) -> LocalRecord {
    let bytes: Vec<u8> = MAGIC
        .iter()
        .copied()
        .chain(Entry::Boot(boot_id() ^ 1).encode(0))
        .chain(Entry::Taking(1, Token([1; 16])).encode(0))
        .collect();
    std::fs::write(dir.join("id.record"), bytes).unwrap();
    open(dir)
}

/// As [`crate::Lock`] does it: takes the next lock, clears the dead ones.
fn take(record: &LocalRecord, number: u64) -> Token {
    let token = Token([u8::try_from(number).unwrap(); 16]);
    record.taking(number, token).unwrap();
    for (other, of) in record.takings() {
        if other != number {
            record.not_taken(other, of).unwrap();
        }
    }
    token
}

#[test]
fn a_wait_that_was_killed_or_interrupted_is_owed_by_the_next_holder() {
    for killed in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let mut record = dead_with_its_host(dir.path());
        for number in 2..5 {
            assert!(record.may_arrive() && record.owes_quiet(), "{number}");
            let token = take(&record, number);
            assert!(record.owes_quiet(), "a lock is no wait");
            if !killed {
                // Whatever happens to the lock: without the wait nothing ended in order.
                record.all_settled().unwrap();
                record.not_taken(number, token).unwrap();
            }
            record = after_death(dir.path(), record);
        }
        let token = take(&record, 5);
        record.quiet().unwrap();
        assert!(!record.owes_quiet() && record.may_arrive());
        record.before_send(&[0..4096]).unwrap();
        assert!(!record.owes_quiet(), "what is sent now is our own");
        record.all_settled().unwrap();
        record.not_taken(5, token).unwrap();
        let record = after_death(dir.path(), record);
        assert!(!record.may_arrive() && !record.owes_quiet());
        assert_eq!(record.takings(), []);
    }
}

#[test]
fn who_waited_and_then_only_died_leaves_no_second_wait() {
    let dir = tempfile::tempdir().unwrap();
    let record = dead_with_its_host(dir.path());
    take(&record, 2);
    record.quiet().unwrap();
    let record = after_death(dir.path(), record);
    assert!(!record.may_arrive());
    take(&record, 3);
    let record = after_death(dir.path(), record);
    assert!(!record.may_arrive(), "its host lives and it sent nothing");
    drop(record);
    // Also where it sent something before it waited.
    let record = dead_with_its_host(dir.path());
    take(&record, 4);
    record.before_send(&[0..4096]).unwrap();
    record.quiet().unwrap();
    record.before_send(&[0..4096]).unwrap();
    record.all_settled().unwrap();
    let record = after_death(dir.path(), record);
    assert!(!record.may_arrive(), "its host lives and all is settled");
}

#[test]
fn takings_are_remembered_until_they_are_given_back() {
    let dir = tempfile::tempdir().unwrap();
    let record = open(dir.path());
    let (one, two) = (Token([1; 16]), Token([2; 16]));
    record.taking(1, one).unwrap();
    record.taking(2, two).unwrap();
    let record = after_death(dir.path(), record);
    assert_eq!(record.takings(), [(1, one), (2, two)]);
    record.not_taken(1, one).unwrap();
    assert_eq!(after_death(dir.path(), record).takings(), [(2, two)]);
}

#[test]
fn a_record_can_be_open_once() {
    let dir = tempfile::tempdir().unwrap();
    let record = open(dir.path());
    let second = LocalRecord::open(dir.path(), "id");
    assert!(matches!(second, Err(LockError::HeldHere { .. })));
    let inherited = record.fd().try_clone_to_owned().unwrap();
    drop(record);
    let third = LocalRecord::open(dir.path(), "id");
    assert!(
        matches!(third, Err(LockError::HeldHere { .. })),
        "whoever inherited it lives"
    );
    drop(inherited);
    open(dir.path());
}

#[test]
fn ids_that_are_no_plain_names_are_refused() {
    for id in ["", ".", "../x", "a/b", ".hidden", "ä"] {
        let dir = tempfile::tempdir().unwrap();
        let opened = LocalRecord::open(dir.path(), id);
        assert!(matches!(opened, Err(LockError::Invalid { .. })), "{id}");
    }
}

proptest::proptest! {
    #[test]
    fn no_bytes_make_the_reader_of_a_record_panic(
        entries in proptest::collection::vec((0u32..8, proptest::prelude::any::<[u8; 32]>()), 0..40),
        cut in 0usize..64,
    ) {
        // Checksums are right, so that everything behind them is reached.
        let mut bytes = MAGIC.to_vec();
        for (kind, body) in entries {
            let mut entry = [0; ENTRY_BYTES];
            entry[4..8].copy_from_slice(&kind.to_le_bytes());
            let len = body.len().min(ENTRY_BYTES - 8);
            entry[8..8 + len].copy_from_slice(&body[..len]);
            let checksum = crc32(&entry[4..]);
            entry[..4].copy_from_slice(&checksum.to_le_bytes());
            bytes.extend_from_slice(&entry);
        }
        let keep = bytes.len().saturating_sub(cut);
        let _ = Content::parse(&bytes[..keep], RANGES_MAX);
        let _ = Content::parse(&bytes[keep..], RANGES_MAX);
    }

    #[test]
    fn what_is_said_to_be_sent_is_covered_after_reopening_at_any_moment(
        steps in proptest::collection::vec((0u8..20, sends()), 1..60),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut record = open_small(dir.path());
        let mut sent = RangeSet::default();
        for (what, ranges) in steps {
            let before = std::fs::read(record.path()).unwrap();
            match what {
                0 => {
                    drop(record);
                    record = open_small(dir.path());
                }
                1..=5 => {
                    record.settled(&ranges).unwrap();
                    // The last holder's stay.
                    let suspects = record.suspects();
                    for range in &ranges {
                        let mut part = RangeSet::default();
                        part.insert(range);
                        for suspect in &suspects {
                            part.remove(suspect);
                        }
                        for range in part.to_vec() {
                            sent.remove(&range);
                        }
                    }
                }
                6..=10 => {
                    // Known already, at least in part.
                    let known: Vec<_> = sent.to_vec().into_iter().take(2).collect();
                    record.before_send(&known).unwrap();
                }
                _ => {
                    let known = sent.clone();
                    record.before_send(&ranges).unwrap();
                    let now = std::fs::read(record.path()).unwrap();
                    // Killed in the middle of that: only what was sent before must be there.
                    for torn in (before.len()..now.len()).step_by(ENTRY_BYTES) {
                        assert!(now.starts_with(&before));
                        covers(&now[..torn], &known);
                    }
                    for range in &ranges {
                        sent.insert(range);
                    }
                }
            }
            covers(&std::fs::read(record.path()).unwrap(), &sent);
        }
    }
}

/// So few ranges that they are joined all the time.
const FEW: usize = 8;

fn open_small(dir: &Path) -> LocalRecord {
    LocalRecord::open_bounded(dir, "id", FEW, Kept::OnDisk).unwrap()
}

fn sends() -> impl proptest::strategy::Strategy<Value = Vec<Range<u64>>> {
    use proptest::strategy::Strategy;
    let range = (0u64..300, 1u64..4).prop_map(|(start, len)| start..start + len);
    proptest::collection::vec(range, 1..6)
}

#[track_caller]
fn covers(record: &[u8], sent: &RangeSet) {
    let found = Content::parse(record, FEW).unwrap().in_flight;
    for range in sent.to_vec() {
        let mut with = found.clone();
        assert!(
            !with.insert(&range),
            "{range:?} was sent, recorded is {found:?}"
        );
    }
}

#[test]
fn a_gap_that_was_closed_in_memory_is_closed_in_the_record_before_anything_is_sent_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let record = open(dir.path());
    let blocks = RANGES_MAX as u64;
    let block = |n: u64| n << 20..(n << 20) + 4096;
    for n in 0..blocks {
        record.before_send(&[block(n)]).unwrap();
    }
    // One more range than fits, by a split; it is seen at a range that was known.
    let middle = (9 << 20) + 1024..(9 << 20) + 2048;
    record.settled(&[middle]).unwrap();
    record.before_send(&[block(3)]).unwrap();
    let sent: Vec<_> = (10..16_000)
        .map(|n| (n << 20) + 8192..(n << 20) + 12288)
        .collect();
    record.before_send(&sent).unwrap();
    let suspects = after_death(dir.path(), record).suspects();
    let missing = sent.iter().filter(|range| {
        let from = suspects.partition_point(|suspect| suspect.end < range.end);
        suspects.get(from).is_none_or(|at| at.start > range.start)
    });
    assert_eq!(missing.count(), 0, "of {}", sent.len());
}

#[test]
fn a_folder_that_can_not_be_written_is_enough_for_reading() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let held = || LocalRecord::open_in_memory(dir, "x").err();
    // No file is made, and what a dead session left is known.
    assert_eq!(
        LocalRecord::open_in_memory(dir, "x").unwrap().suspects(),
        []
    );
    assert_eq!(std::fs::read_dir(dir).unwrap().count(), 0);
    let writer = LocalRecord::open(dir, "x").unwrap();
    assert!(matches!(held(), Some(LockError::HeldHere { .. })));
    writer.before_send(&[0..4096]).unwrap();
    drop(writer);
    let before = std::fs::read(dir.join("x.record")).unwrap();
    let reader = LocalRecord::open_in_memory(dir, "x").unwrap();
    assert_eq!(reader.suspects(), [0..4096]);
    reader.all_settled().unwrap();
    assert!(LocalRecord::open(dir, "x").is_err());
    drop(reader);
    assert_eq!(std::fs::read(dir.join("x.record")).unwrap(), before);
}

#[test]
fn what_was_free_in_an_earlier_chain_says_nothing_of_a_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let record = LocalRecord::open(dir.path(), "id").unwrap();
    record.taking(8, Token([1; 16])).unwrap();
    record.known_free(8).unwrap();
    // Somebody removed all leases on the server.
    record.taking(3, Token([2; 16])).unwrap();
    assert!(record.highest_free() < 3);
    drop(record);
    let record = LocalRecord::open(dir.path(), "id").unwrap();
    assert!(record.highest_free() < 3);
}

#[test]
fn a_record_that_could_not_be_written_once_takes_nothing_more() {
    let dir = tempfile::tempdir().unwrap();
    let record = LocalRecord::open(dir.path(), "id").unwrap();
    record.before_send(&[0..4096]).unwrap();
    // Half an entry may lie there.
    record.state().broken = true;
    record.before_send(&[8192..12288]).unwrap_err();
    record.taking(3, Token([2; 16])).unwrap_err();
    // Neither what was refused before, nor what is recorded already.
    record.before_send(&[8192..12288]).unwrap_err();
    record.before_send(&[0..4096]).unwrap_err();
}
