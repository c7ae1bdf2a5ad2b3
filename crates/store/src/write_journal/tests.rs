//! What a journal remembers across kills, torn tails and rewrites.

#![allow(
    clippy::single_range_in_vec_init,
    reason = "a list of one range is meant"
)]

use super::*;
use crate::checksum::crc32;

fn open(dir: &Path) -> WriteJournal {
    WriteJournal::open(dir, "id").unwrap()
}

/// What the next session finds; the current one is dropped as if it had died.
fn after_death(dir: &Path, journal: WriteJournal) -> WriteJournal {
    drop(journal);
    open(dir)
}

/// The journal's entries, without the zeros that may follow.
fn read(journal: &WriteJournal) -> Vec<u8> {
    let mut bytes = std::fs::read(journal.path()).unwrap();
    let entries = bytes[MAGIC.len()..].chunks_exact(ENTRY_BYTES);
    let whole = entries.take_while(|entry| Entry::parse(entry).is_some());
    let len = MAGIC.len() + whole.count() * ENTRY_BYTES;
    assert!(bytes[len..].iter().all(|byte| *byte == 0));
    bytes.truncate(len);
    bytes
}

#[test]
fn crc32_matches_the_standard() {
    assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
}

#[test]
fn ranges_in_flight_are_in_doubt_for_the_next_session() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    assert_eq!(journal.in_doubt(), []);
    journal.before_send(&[0..4096, 8192..12288]).unwrap();
    journal.before_send(&[4096..8192]).unwrap();
    journal.before_send(&[1 << 40..(1 << 40) + 1]).unwrap();
    assert_eq!(journal.in_doubt(), [], "only those of the last session");
    let journal = after_death(dir.path(), journal);
    assert_eq!(journal.in_doubt(), [0..12288, 1 << 40..(1 << 40) + 1]);
    assert!(journal.may_arrive());
    journal.quiet().unwrap();
    let journal = after_death(dir.path(), journal);
    assert!(!journal.may_arrive(), "waited for once");
    let journal = after_death(dir.path(), journal);
    assert!(!journal.may_arrive());
    assert_eq!(
        journal.in_doubt().len(),
        2,
        "they stay through a second death"
    );
    journal.before_send(&[0..4096]).unwrap();
    let journal = after_death(dir.path(), journal);
    assert!(journal.may_arrive(), "sent again");
    journal.all_resolved().unwrap();
    assert_eq!(journal.in_doubt(), []);
    assert_eq!(after_death(dir.path(), journal).in_doubt(), []);
}

#[test]
fn entries_of_an_earlier_journal_do_not_follow_the_new_ones() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    for n in 0..100 {
        journal.before_send(&[n * 8192..n * 8192 + 4096]).unwrap();
    }
    let journal = after_death(dir.path(), journal);
    assert_eq!(journal.in_doubt().len(), 100);
    journal.all_resolved().unwrap();
    // Each takes the file of the last but one.
    let journal = after_death(dir.path(), journal);
    assert_eq!(journal.in_doubt(), []);
    journal.before_send(&[0..4096]).unwrap();
    let journal = after_death(dir.path(), journal);
    assert_eq!(journal.in_doubt(), [0..4096]);
    // Each file keeps its blocks.
    for file in ["id.record", "id.record.new"] {
        let about = std::fs::metadata(dir.path().join(file)).unwrap();
        assert!(about.len() >= 100 * ENTRY_BYTES as u64, "{file}");
    }
}

#[test]
fn resolving_a_range_keeps_in_doubt_ranges_of_the_last_session() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    journal.before_send(&[0..100]).unwrap();
    let journal = after_death(dir.path(), journal);
    journal.before_send(&[50..300]).unwrap();
    journal.resolved(&[0..200]).unwrap();
    assert_eq!(journal.in_doubt(), [0..100]);
    let journal = after_death(dir.path(), journal);
    assert_eq!(journal.in_doubt(), [0..100, 200..300]);
}

#[test]
fn torn_journal_keeps_its_complete_entries() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    for n in 0..5 {
        journal.before_send(&[n * 100..n * 100 + 1]).unwrap();
    }
    let path = journal.path().to_owned();
    drop(journal);
    let whole = std::fs::read(&path).unwrap();
    // The head, boot and lock file of the rewrite and of the session, then five ranges.
    let base = 8 + 4 * ENTRY_BYTES;
    assert_eq!(whole.len(), base + 5 * ENTRY_BYTES);
    for cut in 0..=whole.len() {
        std::fs::write(&path, &whole[..cut]).unwrap();
        let storage = open(dir.path()).in_doubt().len();
        assert_eq!(
            storage,
            cut.saturating_sub(base) / ENTRY_BYTES,
            "cut at {cut}"
        );
    }
    let mut bad = whole.clone();
    bad[base + 2 * ENTRY_BYTES + 9] ^= 1;
    std::fs::write(&path, &bad).unwrap();
    assert_eq!(open(dir.path()).in_doubt().len(), 2);
}

#[test]
fn other_file_is_refused_and_not_treated_as_empty() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("id.record"), "something else").unwrap();
    assert!(matches!(
        WriteJournal::open(dir.path(), "id"),
        Err(LockError::Journal { .. })
    ));
}

#[test]
fn long_session_keeps_the_journal_small_and_complete() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    for n in 0..100_000u64 {
        journal
            .before_send(&[n * 10_000..n * 10_000 + 4096])
            .unwrap();
    }
    assert!(std::fs::metadata(journal.path()).unwrap().len() <= JOURNAL_BYTES_MAX);
    let journal = after_death(dir.path(), journal);
    let in_doubt = journal.in_doubt();
    assert!(in_doubt.len() <= RANGES_MAX);
    for n in 0..100_000u64 {
        let sent = n * 10_000..n * 10_000 + 4096;
        let from = in_doubt.partition_point(|other| other.end < sent.end);
        assert!(in_doubt[from].start <= sent.start, "{sent:?}");
    }
}

#[test]
fn scattered_blocks_of_a_full_buffer_are_recorded_without_the_gaps() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    // 256 MiB in blocks of 4 KiB, all separate.
    let blocks = (0..65_536u64).map(|n| n << 20..(n << 20) + 4096);
    for block in blocks.clone() {
        journal.before_send(&[block]).unwrap();
    }
    let journal = after_death(dir.path(), journal);
    assert!(journal.in_doubt().into_iter().eq(blocks));
}

#[test]
fn crash_of_the_host_is_detected_even_without_the_last_entries() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    assert!(!journal.may_arrive());
    journal.acquiring(1, Token([1; 16])).unwrap();
    let journal = after_death(dir.path(), journal);
    assert!(!journal.may_arrive(), "only it died");
    let path = journal.path().to_owned();
    drop(journal);
    let boot = boot_id();
    let whole = std::fs::read(&path).unwrap();
    let other: Vec<u8> = whole[..8]
        .iter()
        .copied()
        .chain(Entry::Boot(boot ^ 1).encode(0))
        .chain(Entry::Acquiring(1, Token([1; 16])).encode(0))
        .collect();
    std::fs::write(&path, &other).unwrap();
    let journal = open(dir.path());
    assert!(journal.may_arrive() && journal.in_doubt().is_empty());
    journal.quiet().unwrap();
    journal.not_acquired(1, Token([1; 16])).unwrap();
    assert!(
        !after_death(dir.path(), journal).may_arrive(),
        "it ended cleanly"
    );
}

/// The flock of another file proves nothing: a person removed the lock file, or the folder is a copy.
#[test]
fn a_session_may_live_whose_lock_file_is_another_one() {
    let dir = tempfile::tempdir().unwrap();
    let living = open(dir.path());
    assert!(!living.may_live());
    living.acquiring(1, Token([1; 16])).unwrap();
    std::fs::remove_file(dir.path().join("id.lock")).unwrap();
    let other = open(dir.path());
    assert!(other.may_live() && other.may_arrive() && other.owes_quiet());
    // Until the wait was over, also for the sessions after this one.
    other.acquiring(2, Token([2; 16])).unwrap();
    let other = after_death(dir.path(), other);
    assert!(other.may_live() && other.owes_quiet());
    other.quiet().unwrap();
    let other = after_death(dir.path(), other);
    assert!(!other.may_live() && !other.may_arrive());
    // Nothing was sent since the quiet time: what the living session sends next is not known here.
    other.acquiring(3, Token([3; 16])).unwrap();
    other.quiet().unwrap();
    let copy = tempfile::tempdir().unwrap();
    for file in ["id.lock", "id.record"] {
        std::fs::copy(dir.path().join(file), copy.path().join(file)).unwrap();
    }
    let copied = open(copy.path());
    assert!(copied.may_live() && copied.may_arrive());
    // A session that ended is not in doubt.
    other.not_acquired(2, Token([2; 16])).unwrap();
    other.known_free(3).unwrap();
    drop(other);
    std::fs::remove_file(dir.path().join("id.lock")).unwrap();
    assert!(!open(dir.path()).may_live());
}

/// A journal whose session was acquiring lock 1 and died with its host, at another boot.
fn dead_with_its_host(dir: &Path) -> WriteJournal {
    let bytes: Vec<u8> = MAGIC
        .iter()
        .copied()
        .chain(Entry::Boot(boot_id() ^ 1).encode(0))
        .chain(Entry::Acquiring(1, Token([1; 16])).encode(0))
        .collect();
    std::fs::write(dir.join("id.record"), bytes).unwrap();
    open(dir)
}

/// As [`crate::Lock`] does it: acquires the next lock, clears the dead ones.
fn take(journal: &WriteJournal, number: u64) -> Token {
    let token = Token([u8::try_from(number).unwrap(); 16]);
    journal.acquiring(number, token).unwrap();
    for (other, of) in journal.acquisitions() {
        if other != number {
            journal.not_acquired(other, of).unwrap();
        }
    }
    token
}

#[test]
fn interrupted_quiet_time_is_owed_by_the_next_session() {
    for killed in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = dead_with_its_host(dir.path());
        for number in 2..5 {
            assert!(journal.may_arrive() && journal.owes_quiet(), "{number}");
            let token = take(&journal, number);
            assert!(journal.owes_quiet(), "a lock is no wait");
            if !killed {
                // Whatever happens to the lock: without the wait nothing ended cleanly.
                journal.all_resolved().unwrap();
                journal.not_acquired(number, token).unwrap();
            }
            journal = after_death(dir.path(), journal);
        }
        let token = take(&journal, 5);
        journal.quiet().unwrap();
        assert!(!journal.owes_quiet() && journal.may_arrive());
        journal.before_send(&[0..4096]).unwrap();
        assert!(!journal.owes_quiet(), "what is sent now is our own");
        journal.all_resolved().unwrap();
        journal.not_acquired(5, token).unwrap();
        let journal = after_death(dir.path(), journal);
        assert!(!journal.may_arrive() && !journal.owes_quiet());
        assert_eq!(journal.acquisitions(), []);
    }
}

#[test]
fn finished_quiet_time_is_not_owed_again_after_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let journal = dead_with_its_host(dir.path());
    take(&journal, 2);
    journal.quiet().unwrap();
    let journal = after_death(dir.path(), journal);
    assert!(!journal.may_arrive());
    take(&journal, 3);
    let journal = after_death(dir.path(), journal);
    assert!(!journal.may_arrive(), "its host lives and it sent nothing");
    drop(journal);
    // Also if it sent something before it waited.
    let journal = dead_with_its_host(dir.path());
    take(&journal, 4);
    journal.before_send(&[0..4096]).unwrap();
    journal.quiet().unwrap();
    journal.before_send(&[0..4096]).unwrap();
    journal.all_resolved().unwrap();
    let journal = after_death(dir.path(), journal);
    assert!(!journal.may_arrive(), "its host lives and all is resolved");
}

#[test]
fn acquisitions_are_remembered_until_they_are_released() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    let (one, two) = (Token([1; 16]), Token([2; 16]));
    journal.acquiring(1, one).unwrap();
    journal.acquiring(2, two).unwrap();
    let journal = after_death(dir.path(), journal);
    assert_eq!(journal.acquisitions(), [(1, one), (2, two)]);
    journal.not_acquired(1, one).unwrap();
    assert_eq!(after_death(dir.path(), journal).acquisitions(), [(2, two)]);
}

#[test]
fn journal_can_be_open_once() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    let second = WriteJournal::open(dir.path(), "id");
    assert!(matches!(second, Err(LockError::HeldHere { .. })));
    let inherited = journal.fd().try_clone_to_owned().unwrap();
    drop(journal);
    let third = WriteJournal::open(dir.path(), "id");
    assert!(
        matches!(third, Err(LockError::HeldHere { .. })),
        "a process that inherited it is alive"
    );
    drop(inherited);
    open(dir.path());
}

#[test]
fn ids_that_are_not_plain_names_are_refused() {
    for id in ["", ".", "../x", "a/b", ".hidden", "ä"] {
        let dir = tempfile::tempdir().unwrap();
        let opened = WriteJournal::open(dir.path(), id);
        assert!(matches!(opened, Err(LockError::Invalid { .. })), "{id}");
    }
}

proptest::proptest! {
    #[test]
    fn no_bytes_make_the_journal_parser_panic(
        entries in proptest::collection::vec((0u32..8, proptest::prelude::any::<[u8; 32]>()), 0..40),
        cut in 0usize..64,
    ) {
        // The checksums are right, so that everything behind them is parsed.
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
        let _ = JournalContent::parse(&bytes[..keep], RANGES_MAX);
        let _ = JournalContent::parse(&bytes[keep..], RANGES_MAX);
    }

    #[test]
    fn recorded_ranges_survive_a_kill_at_any_moment(
        steps in proptest::collection::vec((0u8..20, sends()), 1..60),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = open_small(dir.path());
        let mut sent = RangeSet::default();
        for (what, ranges) in steps {
            let before = read(&journal);
            match what {
                0 => {
                    drop(journal);
                    journal = open_small(dir.path());
                }
                1..=5 => {
                    journal.resolved(&ranges).unwrap();
                    // The last session's ranges stay.
                    let in_doubt = journal.in_doubt();
                    for range in &ranges {
                        let mut part = RangeSet::default();
                        part.insert(range);
                        for other in &in_doubt {
                            part.remove(other);
                        }
                        for range in part.to_vec() {
                            sent.remove(&range);
                        }
                    }
                }
                6..=10 => {
                    // Recorded already, at least in part.
                    let known: Vec<_> = sent.to_vec().into_iter().take(2).collect();
                    journal.before_send(&known).unwrap();
                }
                _ => {
                    let known = sent.clone();
                    journal.before_send(&ranges).unwrap();
                    let now = read(&journal);
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
            covers(&read(&journal), &sent);
        }
    }
}

/// So few ranges that they are joined all the time.
const FEW: usize = 8;

fn open_small(dir: &Path) -> WriteJournal {
    WriteJournal::open_bounded(dir, "id", FEW, Storage::Disk).unwrap()
}

fn sends() -> impl proptest::strategy::Strategy<Value = Vec<Range<u64>>> {
    use proptest::strategy::Strategy;
    let range = (0u64..300, 1u64..4).prop_map(|(start, len)| start..start + len);
    proptest::collection::vec(range, 1..6)
}

#[track_caller]
fn covers(journal: &[u8], sent: &RangeSet) {
    let found = JournalContent::parse(journal, FEW).unwrap().in_flight;
    for range in sent.to_vec() {
        let mut with = found.clone();
        assert!(
            !with.insert(&range),
            "{range:?} was sent, recorded is {found:?}"
        );
    }
}

#[test]
fn closed_gap_is_recorded_before_anything_is_sent_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path());
    let blocks = RANGES_MAX as u64;
    let block = |n: u64| n << 20..(n << 20) + 4096;
    for n in 0..blocks {
        journal.before_send(&[block(n)]).unwrap();
    }
    // One range more than fits, by a split; noticed at a range that was recorded.
    let middle = (9 << 20) + 1024..(9 << 20) + 2048;
    journal.resolved(&[middle]).unwrap();
    journal.before_send(&[block(3)]).unwrap();
    let sent: Vec<_> = (10..16_000)
        .map(|n| (n << 20) + 8192..(n << 20) + 12288)
        .collect();
    journal.before_send(&sent).unwrap();
    let in_doubt = after_death(dir.path(), journal).in_doubt();
    let missing = sent.iter().filter(|range| {
        let from = in_doubt.partition_point(|other| other.end < range.end);
        in_doubt.get(from).is_none_or(|at| at.start > range.start)
    });
    assert_eq!(missing.count(), 0, "of {}", sent.len());
}

#[test]
fn read_only_folder_is_enough_for_a_read_only_session() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let held = || WriteJournal::open_in_memory(dir, "x").err();
    // No file is created, and the ranges of a dead session are known.
    assert_eq!(
        WriteJournal::open_in_memory(dir, "x").unwrap().in_doubt(),
        []
    );
    assert_eq!(std::fs::read_dir(dir).unwrap().count(), 0);
    let writer = WriteJournal::open(dir, "x").unwrap();
    assert!(matches!(held(), Some(LockError::HeldHere { .. })));
    writer.before_send(&[0..4096]).unwrap();
    drop(writer);
    let before = std::fs::read(dir.join("x.record")).unwrap();
    let reader = WriteJournal::open_in_memory(dir, "x").unwrap();
    assert_eq!(reader.in_doubt(), [0..4096]);
    reader.all_resolved().unwrap();
    assert!(WriteJournal::open(dir, "x").is_err());
    drop(reader);
    assert_eq!(std::fs::read(dir.join("x.record")).unwrap(), before);
}

#[test]
fn free_leases_of_an_earlier_chain_do_not_count() {
    let dir = tempfile::tempdir().unwrap();
    let journal = WriteJournal::open(dir.path(), "id").unwrap();
    journal.acquiring(8, Token([1; 16])).unwrap();
    journal.known_free(8).unwrap();
    // A user removed all leases on the server.
    journal.acquiring(3, Token([2; 16])).unwrap();
    assert!(journal.highest_free() < 3);
    drop(journal);
    let journal = WriteJournal::open(dir.path(), "id").unwrap();
    assert!(journal.highest_free() < 3);
}

#[test]
fn failed_append_refuses_all_further_entries() {
    let dir = tempfile::tempdir().unwrap();
    let journal = WriteJournal::open(dir.path(), "id").unwrap();
    journal.before_send(&[0..4096]).unwrap();
    // The file may end with half an entry.
    journal.state().broken = true;
    journal.before_send(&[8192..12288]).unwrap_err();
    journal.acquiring(3, Token([2; 16])).unwrap_err();
    // Neither what was refused before, nor what is recorded already.
    journal.before_send(&[8192..12288]).unwrap_err();
    journal.before_send(&[0..4096]).unwrap_err();
}
