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
    record.not_taken(1, Token([1; 16])).unwrap();
    assert!(
        !after_death(dir.path(), record).may_arrive(),
        "it ended in order"
    );
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
        let _ = Content::parse(&bytes[..keep]);
        let _ = Content::parse(&bytes[keep..]);
    }
}
