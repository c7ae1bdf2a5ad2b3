//! When a copy is overdue, and when its alarm is raised.

use sprat_session::Exit;

use super::*;
use crate::copy_state::Attempt;

const DAY: Duration = Duration::from_secs(24 * 3600);
const THREE_DAYS: Option<Duration> = Some(Duration::from_secs(3 * 24 * 3600));

fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

fn moment(wall: &str, boot: &str, minutes: u64) -> Moment {
    let monotonic = Duration::from_secs(minutes * 60);
    Moment {
        wall: at(wall),
        monotonic,
        boottime: monotonic,
        boot_id: boot.to_owned(),
    }
}

fn succeeded(started: &str) -> CopyState {
    CopyState {
        first_seen: Some(at("2026-01-01T00:00Z")),
        last_success: Some(at(started)),
        ..CopyState::default()
    }
}

#[test]
fn overdue_counts_from_the_last_success_or_from_the_first_sight() {
    let state = succeeded("2026-11-20T09:00Z");
    assert!(!is_overdue(THREE_DAYS, &state, at("2026-11-23T08:59Z")));
    assert!(is_overdue(THREE_DAYS, &state, at("2026-11-23T09:00Z")));
    assert!(!is_overdue(None, &state, at("2036-11-23T09:00Z")));
    let mut new = CopyState::default();
    assert!(!is_overdue(THREE_DAYS, &new, at("2026-11-20T09:00Z")));
    new.seen(at("2026-11-20T09:00Z"));
    new.seen(at("2026-11-21T09:00Z"));
    assert!(!is_overdue(THREE_DAYS, &new, at("2026-11-23T08:59Z")));
    assert!(is_overdue(THREE_DAYS, &new, at("2026-11-23T09:00Z")));
}

#[test]
fn a_success_of_a_clock_that_was_ahead_counts_as_the_moment_when_it_was_seen() {
    let mut state = succeeded("2031-11-20T09:00Z");
    assert!(!is_overdue(THREE_DAYS, &state, at("2026-11-20T09:00Z")));
    state.seen(at("2026-11-20T09:00Z"));
    state.seen(at("2026-11-22T09:00Z"));
    assert!(!is_overdue(THREE_DAYS, &state, at("2026-11-23T08:59Z")));
    assert!(is_overdue(THREE_DAYS, &state, at("2026-11-23T09:00Z")));
    // The moment itself is of a wrong clock as well.
    state.seen(at("2026-10-01T09:00Z"));
    assert!(!is_overdue(THREE_DAYS, &state, at("2026-10-02T09:00Z")));
    assert!(is_overdue(THREE_DAYS, &state, at("2026-10-04T09:00Z")));
}

#[test]
fn the_event_opens_at_the_second_check_half_an_hour_later_in_one_boot() {
    let mut state = succeeded("2026-11-20T09:00Z");
    let check = |state: &mut CopyState, wall, boot, minutes| {
        opens(THREE_DAYS, state, &moment(wall, boot, minutes))
    };
    assert!(!check(&mut state, "2026-11-23T08:00Z", "a", 100));
    assert_eq!(state.found_overdue, None);
    assert!(!check(&mut state, "2026-11-28T08:00Z", "a", 100));
    assert!(!check(&mut state, "2026-11-28T08:29Z", "a", 129));
    // The wall clock alone does not count: the machine slept.
    assert!(!check(&mut state, "2026-11-29T08:29Z", "a", 129));
    assert!(check(&mut state, "2026-11-29T08:30Z", "a", 130));
    assert!(check(&mut state, "2026-11-29T09:30Z", "a", 190));
    // After a boot it begins again.
    assert!(!check(&mut state, "2026-11-30T08:00Z", "b", 200));
    assert!(check(&mut state, "2026-11-30T08:30Z", "b", 230));
    state.attempted(Attempt {
        run: String::new(),
        started: at("2026-11-30T08:31Z"),
        ended: at("2026-11-30T08:32Z"),
        exit: Exit::Done,
        reason: None,
        inputs: String::new(),
    });
    assert!(!check(&mut state, "2026-11-30T09:30Z", "b", 290));
    assert_eq!(state.found_overdue, None);
}

#[test]
fn the_event_waits_while_bytes_move_but_not_for_ever() {
    let mut state = succeeded("2026-11-20T09:00Z");
    let check = |state: &mut CopyState, wall, minutes| {
        opens(THREE_DAYS, state, &moment(wall, "a", minutes))
    };
    assert!(!check(&mut state, "2026-11-23T09:00Z", 0));
    state.bytes_moved_at = Some(at("2026-11-23T10:00Z"));
    assert!(!check(&mut state, "2026-11-23T10:59Z", 119));
    assert!(check(&mut state, "2026-11-23T11:00Z", 120));
    // Twice `alert_after` is the end of all patience.
    state.bytes_moved_at = Some(at("2026-11-26T08:50Z"));
    assert!(!check(&mut state, "2026-11-26T08:59Z", 5000));
    assert!(check(&mut state, "2026-11-26T09:00Z", 5001));
    // Bytes that a wrong clock saw count for nothing.
    state.bytes_moved_at = Some(at("2030-01-01T00:00Z"));
    assert!(check(&mut state, "2026-11-24T09:00Z", 5002));
    assert_eq!(
        overdue_at(Some(DAY), &state, at("2026-11-24T09:00Z")),
        Some(at("2026-11-21T09:00Z"))
    );
}
