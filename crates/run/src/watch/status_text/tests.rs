//! Tests of what `status` shows.

use std::path::Path;

use serde_json::Value;
use sprat_session::address::Target;
use sprat_session::state::checks::{KeptCheck, KeptChecks};
use sprat_session::state::history::{History, MadeSnapshot, Run, SeenRoom};
use sprat_session::status::{ContainerStatus, LockStatus};
use sprat_session::{Failure, VolumeRoom};

use super::*;
use crate::copy_name::CopyName;
use crate::copy_state::{Attempt, CopyState, Held, HeldWhat, Skipped};
use crate::due::Decision;
use crate::notify::{Cause, Events, Finding, FoundBy, Key, Subject, Words};
use crate::watch::ContainerView;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_795_600_000 + second).unwrap()
}

fn shown(second: i64) -> Shown {
    Shown {
        now: at(second),
        zone: TimeZone::UTC,
    }
}

fn found(
    server: Option<Result<ServerStatus, Failure>>,
    known: Option<LocalStatus>,
) -> ContainerReport {
    ContainerReport {
        name: "laptop".to_owned(),
        target: Target::parse("host:x.luks", Path::new("/")).unwrap(),
        status: ContainerStatus {
            known: Ok(known),
            jobs: None,
            server,
        },
        copies: Vec::new(),
        min_free: 0,
        events: Vec::new(),
    }
}

#[test]
fn state_that_can_not_be_read_is_a_failure_and_is_shown() {
    let known = LocalStatus {
        uuid: String::new(),
        history: History::default(),
        checks: KeptChecks::default(),
        proved: None,
        written_bytes: None,
        unread: Some(Failure::failed("can't read /state/checks/1.json")),
    };
    let report = found(None, Some(known));
    assert_eq!(report.exit(at(0)), Exit::Failed);
    let text = report.text(&shown(0));
    let row = "known here  not all: can't read /state/checks/1.json";
    assert!(text.contains(row), "{text}");
}

#[test]
fn what_is_in_order_and_what_is_not_are_both_told() {
    let mut history = History {
        room: Some(SeenRoom {
            at: at(0),
            room: VolumeRoom {
                total_bytes: 5 << 40,
                available_bytes: 1 << 30,
                inodes: 1000,
                free_inodes: 900,
                metadata: None,
            },
        }),
        ..History::default()
    };
    let run = |failure: Option<&str>| Run {
        at: at(3600),
        exit: Exit::Done,
        failure: failure.map(str::to_owned),
    };
    let made = MadeSnapshot {
        at: at(0),
        name: "2026-11-25T13-21-01Z".to_owned(),
        complete: false,
        missing: Vec::new(),
    };
    let kept = |exit, finished| KeptCheck {
        at: at(0),
        exit,
        finished,
        result: Value::Null,
    };
    history.ran("home", run(None), Some(made));
    history.ran("www", run(Some("no \u{1b}[2Jline")), None);
    let known = LocalStatus {
        uuid: "u".to_owned(),
        history,
        checks: KeptChecks {
            quick: Some(kept(Exit::Done, true)),
            read_data: Some(kept(Exit::Damaged, false)),
            ..KeptChecks::default()
        },
        proved: None,
        written_bytes: Some(WRITTEN_MANY_BYTES - 1),
        unread: None,
    };
    let server = ServerStatus {
        available_bytes: Some(1 << 20),
        total_bytes: Some(1 << 40),
        container_bytes: 5 << 40,
        allocated_bytes: None,
        reserve_bytes: 0,
        locked: Some(LockStatus {
            file: "x.luks.lock.3".to_owned(),
            since: Some(at(3000)),
            renewed: None,
        }),
    };
    let mut all = found(Some(Ok(server)), Some(known));
    insta::assert_snapshot!(all.text(&shown(7200)), @r"
    laptop: host:./x.luks
      server     1.0 MiB of 1.0 TiB free; LOW: free space there, or run `sprat prune` and `sprat trim`
      container  may grow to 5.0 TiB; the server can't report what it takes now
      reserve    none: on a full disk even pruning may not work
      lock       locked since 2026-11-25 10:36, 1 h 10 min ago (x.luks.lock.3): a session runs, or one died
      volume     1.0 GiB of 5.0 TiB and 900 files free (2026-11-25 09:46, 2 h 0 min ago); NEARLY FULL: run `sprat prune` or `sprat grow`
      checks     quick: no damage, 2 h 0 min ago; --read-data: DAMAGED, 2 h 0 min ago
      drill      none by this machine yet: run `sprat drill`
      keys       never tested here: `sprat key rehearse` tests the recovery sheet
      job home   last snapshot 2026-11-25T13-21-01Z, incomplete, 2 h 0 min ago
      job www    no snapshot by this machine yet; last run FAILED 1 h 0 min ago: no \u{1b}[2Jline
    ");
    if let Ok(Some(known)) = &mut all.status.known {
        known.written_bytes = Some(WRITTEN_MANY_BYTES);
        let text = all.text(&shown(7200));
        assert!(
            text.contains("1.0 TiB were written with one volume key"),
            "{text}"
        );
    }
    // The damage that a check found comes first; then what failed; then what is missing.
    assert_eq!(all.exit(at(7200)), Exit::Damaged);
    if let Ok(Some(known)) = &mut all.status.known {
        known.checks = KeptChecks {
            recovery: Some(kept(Exit::Damaged, true)),
            ..KeptChecks::default()
        };
    }
    assert_eq!(all.exit(at(7200)), Exit::Damaged, "found by a drill");
    if let Ok(Some(known)) = &mut all.status.known {
        known.checks = KeptChecks {
            quick: Some(kept(Exit::Done, true)),
            ..KeptChecks::default()
        };
    }
    assert_eq!(all.exit(at(7200)), Exit::Failed);
    if let (Ok(Some(known)), Some(Ok(server))) = (&mut all.status.known, &mut all.status.server) {
        known.history.room = None;
        server.available_bytes = Some(1 << 40);
    }
    assert_eq!(all.exit(at(7200)), Exit::Failed, "the job www");
    all.status.jobs = Some(vec!["home".to_owned()]);
    assert_eq!(all.exit(at(7200)), Exit::Unread, "of the job home");
    assert!(
        all.text(&shown(7200))
            .contains("job www    not in the config; no snapshot")
    );
    let gone = Failure::new(Exit::Unreachable, "the server was not reached");
    let gone = found(Some(Err(gone)), None);
    assert_eq!(gone.exit(at(7200)), Exit::Unreachable);
    insta::assert_snapshot!(gone.text(&shown(7200)), @r"
    laptop: host:./x.luks
      server      the server was not reached
      known here  nothing: no session of this machine yet
    ");
}

#[test]
fn copy_shows_what_is_wrong_first_and_when_it_is_next() {
    let mut report = found(None, None);
    let copy =
        |state: CopyState, overdue_at: Option<Timestamp>, next: Option<Timestamp>| CopyView {
            copy: CopyName::new("home", "nas"),
            state,
            alert_after: None,
            is_overdue: overdue_at.is_some(),
            overdue_at,
            unread: None,
            decision: Decision {
                due: next.is_some_and(|next| next <= at(7200)),
                why: Why::NoSuccess,
                next,
            },
        };
    let line = |report: &ContainerReport| {
        let text = report.text(&shown(7200));
        let line = text
            .lines()
            .find_map(|line| line.trim_start().strip_prefix("job home"));
        line.unwrap_or_default().trim().to_owned()
    };
    report.copies = vec![copy(CopyState::default(), None, Some(at(7200)))];
    assert_eq!(
        line(&report),
        "no run by this machine has ended yet; due now"
    );
    assert_eq!(report.exit(at(7200)), Exit::Done);
    let mut state = CopyState {
        last_success: Some(at(0)),
        last_attempt: Some(Attempt {
            run: String::new(),
            started: at(3600),
            ended: at(3600),
            exit: Exit::Unreachable,
            reason: Some("the server was not reached".to_owned()),
            inputs: String::new(),
        }),
        failures_since: 3,
        ..CopyState::default()
    };
    report.copies = vec![copy(state.clone(), None, Some(at(9000)))];
    assert_eq!(
        line(&report),
        "last backup 2026-11-25 09:46, 2 h 0 min ago; last run FAILED 1 h 0 min ago: the server was \
         not reached; 3 failures since the last backup; next 2026-11-25 12:16"
    );
    assert_eq!(report.exit(at(7200)), Exit::Unreachable);
    state.held = Some(Held {
        what: HeldWhat::Prune,
        since: at(0),
        reason: "the new rules would remove 12 of 20 snapshots".to_owned(),
    });
    state.skipped = Some(Skipped {
        at: at(7140),
        reason: "on battery".to_owned(),
    });
    state.last_attempt = None;
    report.copies = vec![copy(state, Some(at(7000)), None)];
    assert_eq!(
        line(&report),
        "OVERDUE since 2026-11-25 11:43; last backup 2026-11-25 09:46, 2 h 0 min ago; held since \
         2026-11-25 09:46: the new rules would remove 12 of 20 snapshots. `sprat accept home@nas` releases \
         it; skipped 1 min 0 s ago: on battery"
    );
    assert_eq!(report.exit(at(7200)), Exit::Overdue);
    let json = report.json(at(7200));
    let job = &json["jobs"]["home"];
    assert_eq!(job["last_run"], Value::Null);
    assert_eq!(
        (&job["overdue"], &job["due"]),
        (&true.into(), &false.into())
    );
    assert_eq!(
        job["held"]["reason"],
        "the new rules would remove 12 of 20 snapshots"
    );
    assert_eq!(job["skipped"]["reason"], "on battery");
    assert_eq!(job["failures_since"], 3);
}

#[test]
fn what_waits_for_a_person_is_shown_with_its_command() {
    let mut events = Events::default();
    let found_damage = Finding {
        cause: Cause::new(13, "check"),
        text: "The check (quick) found damage.\nmore".to_owned(),
        hint: String::new(),
    };
    let nas = Subject::Container("nas".to_owned());
    events.observe(
        at(0),
        &Key::damage(nas, FoundBy::Check),
        Some(&found_damage),
    );
    let mut report = found(None, None);
    report.events = ContainerView::events("nas", &events);
    assert_eq!(report.exit(at(7200)), Exit::Damaged);
    let text = report.text(&shown(7200));
    let line = "waits       damage since 2026-11-25 09:46: The check (quick) found damage. `sprat accept nas`";
    assert!(text.contains(line), "{text}");
    assert!(ContainerView::events("usb", &events).is_empty());
}

#[test]
fn hook_or_prune_that_failed_is_shown_although_the_copy_succeeded() {
    let failure = Failure::failed("it failed");
    for words in [Words::of_hook(&failure), Words::of_prune(&failure)] {
        let mut events = Events::default();
        let copy = Subject::Copy(CopyName::new("home", "nas"));
        let key = Key::new(Kind::Failure, copy);
        events.observe(at(0), &key, Some(&words.finding(Exit::Failed)));
        let mut report = found(None, None);
        assert_eq!(report.exit(at(7200)), Exit::Done);
        report.events = ContainerView::events("nas", &events);
        assert_eq!(report.exit(at(7200)), Exit::Failed);
        let text = report.text(&shown(7200));
        let row = format!(
            "{:<12}FAILED since 2026-11-25 09:46: home@nas: it failed\n",
            words.class
        );
        assert!(text.contains(&row), "{text}");
    }
}
