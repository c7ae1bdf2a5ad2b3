//! The state machine of events: a table for each rule.

use super::*;

const MAIL: fn() -> Channel = || Channel::Mail("root@example.org".to_owned());

fn at(hours: i64) -> Timestamp {
    Timestamp::from_second(1_795_000_000 + hours * 3600).unwrap()
}

fn home() -> CopyName {
    CopyName::new("home", "nas")
}

fn of_home(kind: Kind) -> Key {
    Key::new(kind, Subject::Copy(home()))
}

fn found(code: u8, class: &str) -> Finding {
    Finding {
        cause: Cause::new(code, class),
        text: format!("text of {class}"),
        hint: "hint".to_owned(),
    }
}

fn wanted() -> Wanted {
    Wanted {
        on: Kind::ALL.to_vec(),
        remind_after: Some(SignedDuration::from_hours(7 * 24)),
    }
}

fn attempt(by: By, exit: Exit) -> Attempt {
    Attempt {
        copy: home(),
        by,
        exit,
        what: Words {
            class: "class".to_owned(),
            ..Words::default()
        },
        failed_later: None,
        growth: None,
    }
}

fn open_kinds(events: &Events) -> Vec<&'static str> {
    let mut kinds: Vec<_> = events.open().map(|event| event.key.kind.name()).collect();
    kinds.sort_unstable();
    kinds
}

/// What is pending for a channel, as states.
fn states(events: &Events, channel: &Channel, now: Timestamp) -> Vec<State> {
    let pending = events.pending(channel, &wanted(), now);
    pending.iter().map(|report| report.state).collect()
}

fn deliver_all(events: &mut Events, channel: &Channel, now: Timestamp) -> Vec<Report> {
    let pending = events.pending(channel, &wanted(), now);
    for report in &pending {
        events.deliver(channel, report, now);
    }
    pending
}

/// Table F, column "opens": the code of an attempt, what it opens on a copy without events, what it
/// leaves open where everything was open, and the same for an attempt by a person.
#[test]
fn codes_of_attempts_open_and_close_what_the_table_says() {
    const ALL: [&str; 4] = ["config", "failure", "incomplete", "overdue"];
    let table: [(Exit, &[&str], &[&str]); 10] = [
        (Exit::Done, &[], &[]),
        (Exit::Unread, &["incomplete"], &["incomplete"]),
        (
            Exit::Failed,
            &["failure"],
            &["failure", "incomplete", "overdue"],
        ),
        (
            Exit::NoContainer,
            &["failure"],
            &["failure", "incomplete", "overdue"],
        ),
        (
            Exit::WrongKey,
            &["failure"],
            &["failure", "incomplete", "overdue"],
        ),
        (Exit::Usage, &["config"], &ALL),
        (
            Exit::Damaged,
            &["damage"],
            &["damage", "failure", "incomplete", "overdue"],
        ),
        (Exit::Locked, &[], &["failure", "incomplete", "overdue"]),
        (
            Exit::Unreachable,
            &[],
            &["failure", "incomplete", "overdue"],
        ),
        (
            Exit::Interrupted,
            &[],
            &["failure", "incomplete", "overdue"],
        ),
    ];
    for (exit, opens, leaves) in table {
        let mut events = Events::default();
        events.attempt(at(0), &attempt(By::Run, exit));
        assert_eq!(open_kinds(&events), opens, "{exit:?} opens");
        let mut by_hand = Events::default();
        by_hand.attempt(at(0), &attempt(By::Backup, exit));
        assert_eq!(open_kinds(&by_hand), [""; 0], "{exit:?} by hand opens");
        let mut all = Events::default();
        for kind in [Kind::Config, Kind::Failure, Kind::Incomplete, Kind::Overdue] {
            all.observe(at(0), &of_home(kind), Some(&found(1, "before")));
        }
        let mut by_hand = all.clone();
        all.attempt(at(1), &attempt(By::Run, exit));
        assert_eq!(open_kinds(&all), leaves, "{exit:?} leaves");
        by_hand.attempt(at(1), &attempt(By::Backup, exit));
        // What it would open is open since before, and its cause stays.
        let stays: Vec<_> = leaves
            .iter()
            .copied()
            .filter(|kind| *kind != "damage")
            .collect();
        assert_eq!(open_kinds(&by_hand), stays, "{exit:?} by hand leaves");
        assert!(by_hand.open().all(|event| event.cause.class == "before"));
    }
}

#[test]
fn another_copy_closes_nothing() {
    let mut events = Events::default();
    events.attempt(at(0), &attempt(By::Run, Exit::Failed));
    let mut other = attempt(By::Run, Exit::Done);
    other.copy = CopyName::new("home", "usb");
    events.attempt(at(1), &other);
    assert_eq!(open_kinds(&events), ["failure"]);
}

/// A hook that fails at each run is one event, though each run leaves a snapshot.
#[test]
fn a_hook_that_keeps_failing_is_one_event_until_it_works() {
    let mut events = Events::default();
    let mut ended = attempt(By::Run, Exit::Done);
    ended.failed_later = Some(Words {
        class: "hook".to_owned(),
        ..Words::default()
    });
    for hour in 0..3 {
        events.attempt(at(hour), &ended);
        let reports = deliver_all(&mut events, &MAIL(), at(hour));
        assert_eq!(reports.len(), usize::from(hour == 0), "{hour}");
    }
    assert_eq!(open_kinds(&events), ["failure"]);
    events.attempt(at(3), &attempt(By::Run, Exit::Done));
    assert_eq!(states(&events, &MAIL(), at(3)), [State::Closed]);
}

#[test]
fn hook_that_fails_in_a_backup_by_hand_opens_no_event() {
    let mut events = Events::default();
    let failed = |by| Attempt {
        failed_later: Some(Words {
            class: "hook".to_owned(),
            ..Words::default()
        }),
        ..attempt(by, Exit::Done)
    };
    events.attempt(at(0), &failed(By::Backup));
    assert_eq!(open_kinds(&events), [""; 0]);
    // One that a run opened stays until the hook works.
    events.attempt(at(1), &failed(By::Run));
    events.attempt(at(2), &failed(By::Backup));
    assert_eq!(open_kinds(&events), ["failure"]);
    events.attempt(at(3), &attempt(By::Backup, Exit::Done));
    assert_eq!(open_kinds(&events), [""; 0]);
}

/// Table F, column "closes", of the kinds that no attempt closes.
#[test]
fn each_kind_closes_by_what_the_table_says_and_by_nothing_else() {
    let nas = || Subject::Container("nas".to_owned());
    let damage = |found_by| Key::damage(nas(), found_by);
    let keys = || {
        vec![
            Key::missing(home(), "disk 1"),
            Key::missing(home(), "disk 2"),
            damage(FoundBy::Command),
            damage(FoundBy::Check),
            damage(FoundBy::Drill),
            Key::damage(Subject::Copy(home()), FoundBy::Source),
            of_home(Kind::Growth),
            of_home(Kind::Change),
            of_home(Kind::Held),
            Key::new(Kind::Space, nas()),
            Key::new(Kind::Clock, Subject::Machine),
            Key::new(Kind::Failure, nas()),
        ]
    };
    type Act = fn(&mut Events);
    let table: [(&str, Act, &[usize]); 7] = [
        (
            "a success",
            |events| events.attempt(at(1), &attempt(By::Run, Exit::Done)),
            &[6],
        ),
        (
            "a check",
            |events| events.clean(at(1), "nas", FoundBy::Check),
            &[2, 3],
        ),
        (
            "a drill",
            |events| events.clean(at(1), "nas", FoundBy::Drill),
            &[4],
        ),
        (
            "a check elsewhere",
            |events| events.clean(at(1), "usb", FoundBy::Check),
            &[],
        ),
        (
            "accept of the copy",
            |events| events.accept(at(1), &Subject::Copy(home())),
            &[5, 6, 7, 8],
        ),
        (
            "accept of the container",
            |events| events.accept(at(1), &Subject::Container("nas".to_owned())),
            &[2, 3, 4, 5, 6, 7, 8],
        ),
        (
            "the disk is there again",
            |events| events.observe(at(1), &Key::missing(home(), "disk 2"), None),
            &[1],
        ),
    ];
    for (what, act, closes) in table {
        let mut events = Events::default();
        for key in keys() {
            events.observe(at(0), &key, Some(&found(0, "x")));
        }
        assert_eq!(events.open().count(), keys().len());
        act(&mut events);
        let closed: Vec<_> = (0..keys().len())
            .filter(|at| !events.open().any(|event| event.key == keys()[*at]))
            .collect();
        assert_eq!(closed, closes, "{what}");
    }
}

#[test]
fn accept_shows_first_what_it_closes() {
    let mut events = Events::default();
    for kind in [Kind::Growth, Kind::Overdue, Kind::Held] {
        events.observe(at(0), &of_home(kind), Some(&found(0, "x")));
    }
    for subject in [Subject::Copy(home()), Subject::Container("nas".to_owned())] {
        let shown: Vec<_> = events
            .acceptable(&subject)
            .map(|event| event.key.kind)
            .collect();
        assert_eq!(shown, [Kind::Growth, Kind::Held]);
    }
    assert_eq!(events.acceptable(&Subject::Machine).count(), 0);
}

/// New → open → reminded → closed, each once for each channel.
#[test]
fn each_step_is_reported_once_by_each_channel() {
    let mut events = Events::default();
    let overdue = of_home(Kind::Overdue);
    events.observe(at(0), &overdue, Some(&found(4, "overdue")));
    let opened = deliver_all(&mut events, &MAIL(), at(0));
    assert_eq!(opened[0].state, State::Opened);
    // The same again, with another text: nothing new.
    let mut same = found(4, "overdue");
    same.text = "for 5 days".to_owned();
    events.observe(at(1), &overdue, Some(&same));
    assert_eq!(states(&events, &MAIL(), at(1)), []);
    assert_eq!(events.open().next().unwrap().text, "for 5 days");
    // Another channel has not reported it yet.
    assert_eq!(states(&events, &Channel::Ntfy, at(1)), [State::Opened]);
    // Another cause.
    events.observe(at(2), &overdue, Some(&found(4, "watch")));
    let changed = deliver_all(&mut events, &MAIL(), at(2));
    assert_eq!(changed[0].state, State::Changed);
    assert_eq!(states(&events, &MAIL(), at(3)), []);
    assert_eq!(states(&events, &Channel::Ntfy, at(3)), [State::Opened]);
    // Reminders, each `remind_after` after the last report.
    let week = 7 * 24;
    assert_eq!(states(&events, &MAIL(), at(2 + week - 1)), []);
    let first = deliver_all(&mut events, &MAIL(), at(2 + week));
    assert_eq!(first[0].state, State::Reminded);
    assert_eq!(states(&events, &MAIL(), at(2 + week)), []);
    let second = deliver_all(&mut events, &MAIL(), at(2 + 2 * week));
    assert_eq!(second[0].state, State::Reminded);
    // The end: `recovered` where the opening was reported, one notice where not.
    events.observe(at(2 + 2 * week + 1), &overdue, None);
    let now = at(2 + 2 * week + 2);
    assert_eq!(states(&events, &Channel::Ntfy, now), [State::Passed]);
    let closed = deliver_all(&mut events, &MAIL(), now);
    assert_eq!(closed[0].state, State::Closed);
    assert_eq!(states(&events, &MAIL(), now), []);
    // Each report has an id of its own, with the event's before it.
    let mut ids: Vec<_> = [opened, changed, first, second, closed].concat();
    ids.dedup_by_key(|report| report.id.clone());
    assert_eq!(ids.len(), 5);
    assert!(
        ids.iter()
            .all(|report| report.id.starts_with(&ids[0].event.id))
    );
    // The event stays until the last channel has reported its end.
    let both = [MAIL(), Channel::Ntfy];
    events.settle(now, &both, &wanted(), true);
    assert_eq!(events.all().count(), 1);
    deliver_all(&mut events, &Channel::Ntfy, now);
    events.settle(now, &both, &wanted(), true);
    assert_eq!(events.all().count(), 0);
    assert_eq!(events.dropped, 0);
}

#[test]
fn repeated_report_has_the_same_id() {
    let mut events = Events::default();
    events.observe(at(0), &of_home(Kind::Overdue), Some(&found(4, "overdue")));
    let id = |events: &Events, hour| events.pending(&MAIL(), &wanted(), at(hour))[0].id.clone();
    assert_eq!(id(&events, 0), id(&events, 100));
    let before = id(&events, 0);
    // Delivered, but the note of it was lost: the end is not taken for a double.
    events.observe(at(1), &of_home(Kind::Overdue), None);
    assert_ne!(id(&events, 1), before);
}

/// A report that was on its way while the event moved on does not hide what came after it.
#[test]
fn late_delivery_does_not_hide_a_later_step() {
    let mut events = Events::default();
    let key = of_home(Kind::Failure);
    events.observe(at(0), &key, Some(&found(1, "a")));
    let report = events.pending(&MAIL(), &wanted(), at(0)).remove(0);
    events.observe(at(0), &key, Some(&found(12, "b")));
    events.deliver(&MAIL(), &report, at(0));
    assert_eq!(states(&events, &MAIL(), at(0)), [State::Changed]);
}

#[test]
fn only_wanted_kinds_are_reported() {
    let only = |on: &[Kind]| Wanted {
        on: on.to_vec(),
        remind_after: None,
    };
    let mut events = Events::default();
    events.observe(at(0), &of_home(Kind::Overdue), Some(&found(4, "overdue")));
    assert!(
        events
            .pending(&MAIL(), &only(&[Kind::Failure]), at(0))
            .is_empty()
    );
    let overdue = only(&[Kind::Overdue]);
    let report = events.pending(&MAIL(), &overdue, at(0)).remove(0);
    events.deliver(&MAIL(), &report, at(0));
    // `never`: no reminder.
    assert!(events.pending(&MAIL(), &overdue, at(10_000)).is_empty());
    events.observe(at(1), &of_home(Kind::Overdue), None);
    assert!(events.pending(&MAIL(), &overdue, at(1)).is_empty());
    let with_recovered = only(&[Kind::Overdue, Kind::Recovered]);
    assert_eq!(events.pending(&MAIL(), &with_recovered, at(1)).len(), 1);
    events.settle(at(1), &[MAIL()], &overdue, true);
    assert_eq!(events.all().count(), 0);
}

#[test]
fn digest_is_sent_once_and_not_to_the_desktop() {
    let mut events = Events {
        dropped: 3,
        ..Events::default()
    };
    events.digest(at(0), "all is well");
    assert_eq!(events.dropped, 0);
    assert_eq!(events.open().count(), 0);
    let none = Wanted {
        on: Vec::new(),
        remind_after: None,
    };
    let channels = [MAIL(), Channel::Desktop];
    assert!(events.pending(&Channel::Desktop, &none, at(0)).is_empty());
    let report = events.pending(&MAIL(), &none, at(0)).remove(0);
    assert_eq!(report.state, State::Digest);
    events.settle(at(0), &channels, &none, true);
    assert_eq!(events.all().count(), 1);
    events.deliver(&MAIL(), &report, at(0));
    events.settle(at(0), &channels, &none, true);
    assert_eq!(events.all().count(), 0);
}

#[test]
fn a_failing_channel_is_reported_by_the_others_only() {
    let mut events = Events::default();
    let key = Key::new(Kind::Failure, Subject::Channel(MAIL()));
    events.observe(at(0), &key, Some(&found(1, "channel")));
    assert_eq!(states(&events, &MAIL(), at(0)), []);
    assert_eq!(states(&events, &Channel::Ntfy, at(0)), [State::Opened]);
    let other = Channel::Mail("other@example.org".to_owned());
    assert_eq!(states(&events, &other, at(0)), [State::Opened]);
}

#[test]
fn what_is_over_is_tried_for_14_days_and_then_counted() {
    let mut events = Events::default();
    events.observe(at(0), &of_home(Kind::Overdue), Some(&found(4, "overdue")));
    let settle = |events: &mut Events, hour, trusted| {
        events.settle(at(hour), &[MAIL()], &wanted(), trusted);
        (events.all().count(), events.dropped)
    };
    // What is open stays.
    assert_eq!(settle(&mut events, 1000, true), (1, 0));
    events.observe(at(1000), &of_home(Kind::Overdue), None);
    assert_eq!(settle(&mut events, 1000 + 14 * 24, true), (1, 0));
    // A clock that jumped ahead drops nothing.
    assert_eq!(settle(&mut events, 100_000, false), (1, 0));
    assert_eq!(settle(&mut events, 1000 + 14 * 24 + 1, true), (0, 1));
}

#[test]
fn without_a_channel_what_is_over_goes_at_once() {
    let mut events = Events::default();
    events.observe(at(0), &of_home(Kind::Overdue), Some(&found(4, "overdue")));
    events.settle(at(0), &[], &wanted(), true);
    assert_eq!(events.open().count(), 1);
    events.observe(at(1), &of_home(Kind::Overdue), None);
    events.settle(at(1), &[], &wanted(), true);
    assert_eq!((events.all().count(), events.dropped), (0, 0));
}

#[test]
fn beyond_200_the_oldest_is_dropped_and_counted() {
    let mut events = Events::default();
    let key = |number: usize| {
        let copy = CopyName::new(format!("job{number}"), "nas");
        Key::new(Kind::Failure, Subject::Copy(copy))
    };
    for number in 0..EVENTS_MAX {
        events.observe(at(0), &key(number), Some(&found(1, "x")));
    }
    assert_eq!((events.all().count(), events.dropped), (EVENTS_MAX, 0));
    // What is over goes first, though it is younger.
    events.observe(at(1), &key(7), None);
    events.observe(at(1), &key(1000), Some(&found(1, "x")));
    assert_eq!((events.all().count(), events.dropped), (EVENTS_MAX, 1));
    assert!(!events.all().any(|event| event.key == key(7)));
    events.observe(at(1), &key(1001), Some(&found(1, "x")));
    assert_eq!((events.all().count(), events.dropped), (EVENTS_MAX, 2));
    assert!(!events.all().any(|event| event.key == key(0)));
    assert!(events.all().any(|event| event.key == key(1)));
}

#[test]
fn a_clock_that_was_ahead_stops_no_reminder() {
    let mut events = Events::default();
    let year = 365 * 24;
    events.observe(
        at(year),
        &of_home(Kind::Overdue),
        Some(&found(4, "overdue")),
    );
    deliver_all(&mut events, &MAIL(), at(year));
    // The clock is right again.
    events.settle(at(0), &[MAIL()], &wanted(), true);
    assert_eq!(events.open().next().unwrap().opened, at(0));
    assert_eq!(states(&events, &MAIL(), at(7 * 24 - 1)), []);
    assert_eq!(states(&events, &MAIL(), at(7 * 24)), [State::Reminded]);
}

#[test]
fn what_left_the_config_closes() {
    let mut events = Events::default();
    events.observe(at(0), &of_home(Kind::Overdue), Some(&found(4, "overdue")));
    events.observe(
        at(0),
        &Key::new(Kind::Clock, Subject::Machine),
        Some(&found(0, "ahead")),
    );
    events.forget(at(1), |subject| *subject == Subject::Machine);
    assert_eq!(open_kinds(&events), ["clock"]);
}

#[test]
fn open_events_are_counted_by_kind_and_zeros_are_counted_too() {
    let mut events = Events::default();
    events.observe(at(0), &of_home(Kind::Overdue), Some(&found(4, "overdue")));
    let counts = events.open_by_kind();
    assert_eq!(counts.len(), 11);
    assert_eq!((counts[&Kind::Overdue], counts[&Kind::Failure]), (1, 0));
}

#[test]
fn state_reads_back_as_it_was_written() {
    let mut events = Events::default();
    events.observe(
        at(0),
        &Key::missing(home(), "disk 1"),
        Some(&found(0, "disk")),
    );
    events.observe(at(0), &of_home(Kind::Overdue), Some(&found(4, "overdue")));
    deliver_all(&mut events, &MAIL(), at(1));
    events.digest(at(2), "text");
    let json = serde_json::to_string(&events).unwrap();
    assert_eq!(serde_json::from_str::<Events>(&json).unwrap(), events);
}
