//! Every row of the rules for due copies, and the nights on which clocks change.

use jiff::civil::{Weekday, time};
use sprat_session::Exit;

use super::*;
use crate::copy_state::Attempt;
use sprat_snapshot::time_zone;

const MINUTE: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(24 * 3600);

fn at(text: &str) -> Timestamp {
    text.parse()
        .unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn daily(hour: i8, minute: i8) -> Schedule {
    Schedule::At(At {
        times: vec![AtTime::daily(time(hour, minute, 0, 0))],
        later: Duration::ZERO,
    })
}

fn succeeded(started: &str) -> CopyState {
    CopyState {
        last_success: Some(at(started)),
        ..CopyState::default()
    }
}

/// The times at which a copy is made in `zone`, one after the other, from `from` on.
fn occurrences(schedule: &Schedule, zone: &str, from: &str, count: usize) -> Vec<String> {
    let zone = time_zone(zone).unwrap();
    let mut last = at(from);
    let mut found = Vec::new();
    for _ in 0..count {
        last = next_after(schedule, &zone, last).unwrap();
        found.push(last.to_string());
    }
    found
}

#[test]
fn every_row_of_the_table_of_due_times() {
    let berlin = time_zone("Europe/Berlin").unwrap();
    let night = daily(2, 30);
    let every = |hours: u32| Schedule::Every(DAY / 24 * hours);
    for (what, schedule, success, now, due) in [
        (
            "clocks back",
            &night,
            "2026-10-24T00:31Z",
            "2026-10-25T00:29Z",
            false,
        ),
        (
            "clocks back",
            &night,
            "2026-10-24T00:31Z",
            "2026-10-25T00:30Z",
            true,
        ),
        (
            "second 02:30",
            &night,
            "2026-10-25T00:31Z",
            "2026-10-25T01:31Z",
            false,
        ),
        (
            "forward",
            &night,
            "2027-03-27T01:31Z",
            "2027-03-28T01:15Z",
            false,
        ),
        (
            "forward",
            &night,
            "2027-03-27T01:31Z",
            "2027-03-28T01:30Z",
            true,
        ),
        (
            "asleep",
            &night,
            "2026-11-24T01:31Z",
            "2026-11-28T07:00Z",
            true,
        ),
        (
            "asleep, once",
            &night,
            "2026-11-28T07:00Z",
            "2026-11-28T07:15Z",
            false,
        ),
        (
            "wrong clock",
            &night,
            "2027-11-28T00:00Z",
            "2026-11-28T00:00Z",
            true,
        ),
        (
            "a day",
            &every(24),
            "2026-11-27T09:00Z",
            "2026-11-28T08:45Z",
            false,
        ),
        (
            "a day",
            &every(24),
            "2026-11-27T09:00Z",
            "2026-11-28T08:53Z",
            true,
        ),
        (
            "an hour",
            &every(1),
            "2026-11-27T09:00Z",
            "2026-11-27T09:52Z",
            false,
        ),
        (
            "an hour",
            &every(1),
            "2026-11-27T09:00Z",
            "2026-11-27T09:54Z",
            true,
        ),
        (
            "wrong clock",
            &every(1),
            "2027-11-28T00:00Z",
            "2026-11-28T00:00Z",
            true,
        ),
        (
            "a little ahead",
            &every(1),
            "2026-11-28T00:04Z",
            "2026-11-28T00:00Z",
            false,
        ),
        (
            "never",
            &Schedule::Never,
            "2026-11-27T09:00Z",
            "2029-01-01T00:00Z",
            false,
        ),
    ] {
        let now = at(now);
        let decision = decide(schedule, &berlin, &succeeded(success), "", now);
        assert_eq!(decision.due, due, "{what}: {success} {now} {decision:?}");
        let next_is_later = decision.next.is_none_or(|next| next > now);
        assert_eq!(next_is_later, !due, "{what}: {decision:?}");
    }
    let second = decide(
        &night,
        &berlin,
        &succeeded("2026-10-25T00:31Z"),
        "",
        at("2026-10-25T01:31Z"),
    );
    assert_eq!(second.next, Some(at("2026-10-26T01:30Z")));
}

#[test]
fn a_copy_without_success_is_due_at_once_but_never_by_hand_only() {
    let state = CopyState::default();
    let now = at("2026-11-28T12:00Z");
    for schedule in [daily(2, 30), Schedule::Every(DAY)] {
        let decision = decide(&schedule, &TimeZone::UTC, &state, "", now);
        assert_eq!((decision.due, decision.why), (true, Why::NoSuccess));
    }
    let decision = decide(&Schedule::Never, &TimeZone::UTC, &state, "", now);
    assert_eq!((decision.due, decision.next), (false, None));
}

#[test]
fn occurrences_follow_the_clocks_of_the_zone() {
    let night = daily(2, 30);
    // New York, forward on 2027-03-14 and back on 2026-11-01, both at 02:00.
    assert_eq!(
        occurrences(&night, "America/New_York", "2026-10-31T12:00Z", 2),
        ["2026-11-01T07:30:00Z", "2026-11-02T07:30:00Z"]
    );
    assert_eq!(
        occurrences(&daily(1, 30), "America/New_York", "2026-10-31T12:00Z", 2),
        ["2026-11-01T05:30:00Z", "2026-11-02T06:30:00Z"]
    );
    assert_eq!(
        occurrences(&night, "America/New_York", "2027-03-13T12:00Z", 2),
        ["2027-03-14T07:30:00Z", "2027-03-15T06:30:00Z"]
    );
    // Lord Howe: half an hour, forward on 2026-10-04 at 02:00, back on 2027-04-04 at 02:00.
    assert_eq!(
        occurrences(&daily(2, 15), "Australia/Lord_Howe", "2026-10-03T00:00Z", 2),
        ["2026-10-03T15:45:00Z", "2026-10-04T15:15:00Z"]
    );
    assert_eq!(
        occurrences(&daily(1, 45), "Australia/Lord_Howe", "2027-04-03T00:00Z", 2),
        ["2027-04-03T14:45:00Z", "2027-04-04T15:15:00Z"]
    );
    // Samoa had no 2011-12-30.
    assert_eq!(
        occurrences(&night, "Pacific/Apia", "2011-12-29T00:00Z", 3),
        [
            "2011-12-29T12:30:00Z",
            "2011-12-30T12:30:00Z",
            "2011-12-31T12:30:00Z"
        ]
    );
}

#[test]
fn each_night_of_a_year_has_one_occurrence() {
    for zone in [
        "Europe/Berlin",
        "America/New_York",
        "Australia/Lord_Howe",
        "UTC",
    ] {
        for schedule in [daily(0, 0), daily(2, 0), daily(2, 30), daily(23, 59)] {
            let found = occurrences(&schedule, zone, "2026-06-01T12:00Z", 365);
            let last = at(found.last().unwrap());
            let days = last.duration_since(at(&found[0])).as_hours();
            assert!(
                (364 * 24 - 1..=364 * 24 + 1).contains(&days),
                "{zone} {days}"
            );
        }
    }
}

#[test]
fn days_of_the_week_are_those_of_the_zone() {
    let work = [Weekday::Monday, Weekday::Wednesday];
    let schedule = Schedule::At(At {
        times: vec![
            AtTime::on(work, time(0, 30, 0, 0)),
            AtTime::daily(time(13, 0, 0, 0)),
        ],
        later: Duration::ZERO,
    });
    // 2026-11-29 is a Sunday.
    assert_eq!(
        occurrences(&schedule, "Europe/Berlin", "2026-11-29T13:00Z", 5),
        [
            "2026-11-29T23:30:00Z",
            "2026-11-30T12:00:00Z",
            "2026-12-01T12:00:00Z",
            "2026-12-01T23:30:00Z",
            "2026-12-02T12:00:00Z"
        ]
    );
    let Schedule::At(times) = &schedule else {
        unreachable!()
    };
    assert_eq!(times.longest_gap(), Some(DAY));
    let sunday = AtTime::on([Weekday::Sunday], time(4, 0, 0, 0));
    let weekly = At {
        times: vec![sunday],
        later: MINUTE,
    };
    assert_eq!(weekly.longest_gap(), Some(DAY * 7));
    assert_eq!(
        weekly.next_after(&TimeZone::UTC, at("2026-11-29T04:00Z")),
        Some(at("2026-11-29T04:01Z"))
    );
    assert_eq!(
        weekly.next_after(&TimeZone::UTC, at("2026-11-29T04:01Z")),
        Some(at("2026-12-06T04:01Z"))
    );
    let none = At {
        times: vec![AtTime::on([], time(4, 0, 0, 0))],
        later: MINUTE,
    };
    assert_eq!(
        (
            none.longest_gap(),
            none.next_after(&TimeZone::UTC, at("2026-11-29T04:01Z"))
        ),
        (None, None)
    );
}

#[test]
fn a_change_of_the_zone_moves_the_next_occurrence_only() {
    let night = daily(2, 30);
    let state = succeeded("2026-11-27T01:31Z");
    let now = at("2026-11-27T12:00Z");
    for (zone, next) in [
        ("Europe/Berlin", "2026-11-28T01:30Z"),
        ("America/New_York", "2026-11-27T07:30Z"),
        ("Asia/Tokyo", "2026-11-27T17:30Z"),
    ] {
        let decision = decide(&night, &time_zone(zone).unwrap(), &state, "", now);
        assert_eq!(decision.next, Some(at(next).max(now)), "{zone}");
        assert_eq!(decision.due, at(next) <= now, "{zone}");
    }
}

#[test]
fn spread_is_fixed_by_machine_job_and_container() {
    let hours = Duration::from_secs(12 * 3600);
    let part = spread_part(hours, "a", "home", "nas");
    assert_eq!(part, spread_part(hours, "a", "home", "nas"));
    assert_eq!(
        spread_part(Duration::ZERO, "a", "home", "nas"),
        Duration::ZERO
    );
    let others = [
        ("b", "home", "nas"),
        ("a", "www", "nas"),
        ("a", "home", "usb"),
    ];
    for (machine, job, container) in others {
        assert_ne!(part, spread_part(hours, machine, job, container));
    }
    // A fleet is spread over the whole time.
    let parts: Vec<_> = (0..200)
        .map(|number| spread_part(hours, &number.to_string(), "home", "nas"))
        .collect();
    assert!(parts.iter().all(|part| *part < hours));
    for quarter in 0..4 {
        let from = hours / 4 * quarter;
        let inside = parts
            .iter()
            .filter(|part| **part >= from && **part < from + hours / 4);
        assert!(inside.count() > 20, "{quarter}");
    }
}

fn ended(state: &mut CopyState, exit: Exit, started: &str, ended: &str) {
    state.attempted(Attempt {
        run: String::new(),
        started: at(started),
        ended: at(ended),
        exit,
        reason: None,
        inputs: "old".to_owned(),
    });
}

/// When the next attempt is due after attempts at these times that all end so at once.
fn next_after_attempts(schedule: &Schedule, exit: Exit, attempts: &[&str]) -> Timestamp {
    let mut state = succeeded("2026-11-20T09:00Z");
    for started in attempts {
        ended(&mut state, exit, started, started);
    }
    let last = at(attempts.last().unwrap());
    decide(schedule, &TimeZone::UTC, &state, "old", last)
        .next
        .unwrap()
}

#[test]
fn server_not_reached_or_locked_is_tried_each_tick_for_two_hours_then_hourly() {
    for exit in [Exit::Unreachable, Exit::Locked] {
        for schedule in [Schedule::Every(DAY), daily(2, 30)] {
            let ticks = [
                "2026-11-28T09:00Z",
                "2026-11-28T09:15Z",
                "2026-11-28T10:45Z",
            ];
            assert_eq!(next_after_attempts(&schedule, exit, &ticks), at(ticks[2]));
            let ticks = [
                "2026-11-28T09:00Z",
                "2026-11-28T10:45Z",
                "2026-11-28T11:00Z",
            ];
            assert_eq!(
                next_after_attempts(&schedule, exit, &ticks),
                at("2026-11-28T11:54Z")
            );
        }
    }
}

#[test]
fn failed_attempts_wait_longer_each_time() {
    let attempts = [
        "2026-11-28T09:00Z",
        "2026-11-28T09:15Z",
        "2026-11-28T09:45Z",
        "2026-11-28T10:45Z",
        "2026-11-28T12:45Z",
        "2026-11-28T16:45Z",
    ];
    // A tenth of each wait, at most 7.5 min, is slack.
    let hourly = Schedule::Every(DAY / 24);
    for (count, next) in [
        (1, "2026-11-28T09:13:30Z"),
        (2, "2026-11-28T09:42Z"),
        (3, "2026-11-28T10:39Z"),
        (4, "2026-11-28T12:37:30Z"),
        (5, "2026-11-28T16:37:30Z"),
        (6, "2026-11-28T20:37:30Z"),
    ] {
        let found = next_after_attempts(&hourly, Exit::Failed, &attempts[..count]);
        assert_eq!(found, at(next), "{count}");
    }
    let found = next_after_attempts(&Schedule::Every(DAY * 7), Exit::Failed, &attempts[..4]);
    assert_eq!(found, at("2026-11-28T12:37:30Z"));
    let found = next_after_attempts(&Schedule::Every(DAY * 7), Exit::Failed, &attempts[..5]);
    assert_eq!(found, at("2026-12-05T12:37:30Z"));
    let found = next_after_attempts(&daily(2, 30), Exit::Failed, &attempts[..5]);
    assert_eq!(found, at("2026-11-29T02:30Z"));
}

#[test]
fn wrong_config_key_or_container_waits_for_the_schedule_or_for_a_change() {
    for exit in [
        Exit::Usage,
        Exit::NoContainer,
        Exit::WrongKey,
        Exit::Damaged,
    ] {
        let every = next_after_attempts(&Schedule::Every(DAY), exit, &["2026-11-28T09:00Z"]);
        assert_eq!(every, at("2026-11-29T08:52:30Z"));
        let night = next_after_attempts(&daily(2, 30), exit, &["2026-11-28T09:00Z"]);
        assert_eq!(night, at("2026-11-29T02:30Z"));
        let mut state = succeeded("2026-11-20T09:00Z");
        ended(&mut state, exit, "2026-11-28T09:00Z", "2026-11-28T09:01Z");
        let now = at("2026-11-28T09:15Z");
        let schedule = Schedule::Every(DAY);
        let same = decide(&schedule, &TimeZone::UTC, &state, "old", now);
        assert_eq!((same.due, same.why), (false, Why::WaitsAfter(exit)));
        assert!(decide(&schedule, &TimeZone::UTC, &state, "new", now).due);
    }
}

#[test]
fn interrupted_and_skipped_copies_are_tried_at_the_next_tick() {
    let mut state = succeeded("2026-11-20T09:00Z");
    let now = at("2026-11-28T09:01Z");
    let schedule = Schedule::Every(DAY);
    let due = |state: &CopyState| decide(&schedule, &TimeZone::UTC, state, "old", now).due;
    ended(
        &mut state,
        Exit::Interrupted,
        "2026-11-28T09:00Z",
        "2026-11-28T09:01Z",
    );
    assert!(due(&state));
    state.skip(now, "the disk is absent".to_owned());
    assert!(due(&state));
    ended(
        &mut state,
        Exit::Unread,
        "2026-11-28T09:00Z",
        "2026-11-28T09:01Z",
    );
    assert!(!due(&state));
}

#[test]
fn a_server_that_is_lost_now_and_then_does_not_shorten_the_wait_after_failures() {
    let mut state = succeeded("2026-11-20T09:00Z");
    for started in [
        "2026-11-28T09:00Z",
        "2026-11-28T09:15Z",
        "2026-11-28T09:45Z",
    ] {
        ended(&mut state, Exit::Failed, started, started);
    }
    ended(
        &mut state,
        Exit::Unreachable,
        "2026-11-28T10:45Z",
        "2026-11-28T10:46Z",
    );
    ended(
        &mut state,
        Exit::Failed,
        "2026-11-28T11:00Z",
        "2026-11-28T11:00Z",
    );
    let next = decide(
        &Schedule::Every(DAY),
        &TimeZone::UTC,
        &state,
        "old",
        at("2026-11-28T11:00Z"),
    );
    assert_eq!(next.next, Some(at("2026-11-28T12:52:30Z")));
    assert_eq!(state.failures_since, 5);
}

#[test]
fn attempts_of_a_clock_that_was_ahead_delay_nothing() {
    for exit in Exit::ALL {
        let mut state = succeeded("2026-11-20T09:00Z");
        ended(&mut state, exit, "2031-11-28T09:00Z", "2031-11-28T09:01Z");
        let now = at("2026-11-28T09:00Z");
        for schedule in [Schedule::Every(DAY), daily(2, 30)] {
            let decision = decide(&schedule, &TimeZone::UTC, &state, "old", now);
            assert!(decision.due, "{exit:?} {decision:?}");
        }
    }
    // The clock was years behind, and is right now: the copy is due, once.
    let mut state = succeeded("2001-01-01T00:10Z");
    let now = at("2026-11-28T09:00Z");
    let due = |state: &CopyState| decide(&daily(2, 30), &TimeZone::UTC, state, "old", now).due;
    assert!(due(&state));
    ended(
        &mut state,
        Exit::Done,
        "2026-11-28T09:00Z",
        "2026-11-28T09:00Z",
    );
    assert!(!due(&state));
}
