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
    assert_eq!(record.suspects_since(), None);
    record.before_send(&[0..4096, 8192..12288]).unwrap();
    record.before_send(&[4096..8192]).unwrap();
    record.before_send(&[1 << 40..(1 << 40) + 1]).unwrap();
    assert_eq!(record.suspects(), [], "only those of the holder before");
    let record = after_death(dir.path(), record);
    assert_eq!(record.suspects(), [0..12288, 1 << 40..(1 << 40) + 1]);
    assert!(record.suspects_since().unwrap().elapsed().unwrap() < Duration::from_secs(60));
    assert!(!record.rebooted());
    let record = after_death(dir.path(), record);
    assert_eq!(
        record.suspects().len(),
        2,
        "they stay through a second death"
    );
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
    for n in 0..20_000u64 {
        record
            .before_send(&[n * 10_000..n * 10_000 + 4096])
            .unwrap();
    }
    assert!(std::fs::metadata(record.path()).unwrap().len() <= RECORD_BYTES_MAX);
    let record = after_death(dir.path(), record);
    let suspects = record.suspects();
    assert!(suspects.len() <= RANGES_MAX);
    for n in 0..20_000u64 {
        let sent = n * 10_000..n * 10_000 + 4096;
        assert!(
            suspects
                .iter()
                .any(|s| s.start <= sent.start && sent.end <= s.end),
            "{sent:?}"
        );
    }
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
