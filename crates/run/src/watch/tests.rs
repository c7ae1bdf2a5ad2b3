//! The watch over several days of one machine, with a clock of the test's own and a program that
//! takes the notices.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use sprat_luks::Pins;
use sprat_session::address::Target;
use sprat_session::state::checks::{self, KeptCheck};
use sprat_session::state::history::History;
use sprat_session::state::identity;
use sprat_session::state::key_notes::KeyNotes;
use sprat_session::state::paths::StatePaths;
use sprat_session::{Exit, Failure};
use sprat_testkit::notice_servers::{NoticeServer, Wire, python_module_missing};
use sprat_testkit::requires;
use tempfile::TempDir;

use super::*;
use crate::config::{self, Loaded};
use crate::copy_state;
use crate::notify::{Cause, Finding, Subject};
use crate::public_status::PublicStatus;
use crate::run_history::{RunHistory, RunLine};

const RUN: &str = "0b9f2a1c-0000-4000-8000-000000000001";

/// Saturday, 2026-11-28 14:00 UTC.
const BEGIN: i64 = 1_795_874_400;

fn at(minutes: i64) -> Timestamp {
    Timestamp::from_second(BEGIN + minutes * 60).unwrap()
}

fn now(minutes: i64) -> Now {
    let ran = Duration::from_secs(u64::try_from(minutes).unwrap() * 60);
    Now {
        moment: Moment {
            wall: at(minutes),
            monotonic: ran,
            boottime: ran,
            boot_id: "boot".to_owned(),
        },
        synchronised: false,
        trusted: false,
    }
}

/// One machine: its config, its state, and a command that takes notices.
struct Machine {
    folder: TempDir,
    places: ConfigPlaces,
}

impl Machine {
    fn new(notify: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let places = ConfigPlaces {
            root: false,
            home: None,
            folder: Some(folder.path().to_owned()),
        };
        let machine = Self { folder, places };
        let script = machine.path("take");
        let text = format!("#!/bin/sh\ncat >> {}\n", machine.path("taken").display());
        fs::write(&script, text).unwrap();
        fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).unwrap();
        machine.configure("[job.home]", notify);
        machine
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn configure(&self, job: &str, notify: &str) {
        let take = self.path("take");
        let text = format!(
            "time_zone = \"UTC\"\n\
             [container.nas]\ntarget = \"{}\"\n\
             {job}\ncontainer = \"nas\"\nsources = \"/home\"\nalert_after = \"3 days\"\n\
             [notify]\ncommand = \"{}\"\n{notify}\n",
            self.path("laptop.luks").display(),
            take.display(),
        );
        fs::write(self.path("sprat.toml"), text).unwrap();
    }

    fn loaded(&self) -> Loaded {
        config::load(&[self.path("sprat.toml")], &self.places)
    }

    fn watching<T>(&self, work: impl FnOnce(&mut Watch<'_>) -> T) -> T {
        let loaded = self.loaded();
        let watched = Watched {
            config: &loaded.config,
            mistakes: &loaded.mistakes,
            places: self.places.clone(),
            state_dir: self.path("state"),
            host: "laptop".to_owned(),
            machine_id: String::new(),
        };
        work(&mut Watch::new(watched, Network::with_path(OsStr::new(""))))
    }

    /// What the hourly unit does.
    fn check(&self, minutes: i64) -> Findings {
        self.watching(|watch| watch.ended(&Ended::default(), &now(minutes)))
    }

    /// What a run does with the only copy.
    fn run(&self, minutes: i64, exit: Exit) -> Findings {
        let copy = CopyName::new("home", "nas");
        let mut file = copy_state::copy_file(&self.path("state"), &copy);
        file.change(|state| {
            state.seen(at(minutes));
            state.attempted(copy_state::Attempt {
                run: RUN.to_owned(),
                started: at(minutes),
                ended: at(minutes),
                exit,
                reason: None,
                inputs: String::new(),
            });
        });
        let line = RunLine {
            started: at(minutes),
            ended: at(minutes),
            code: exit.code(),
            sent_bytes: Some(5 << 20),
            bytes: Some((u64::try_from(minutes).unwrap() + 1) << 20),
            newly_excluded: Some(2),
            ..RunLine::default()
        };
        let history = RunHistory::new(&self.path("state"));
        history.append(&copy, &line, at(minutes)).unwrap();
        let attempts = [Attempt {
            copy: copy.clone(),
            by: By::Run,
            exit,
            what: Words {
                class: "class".to_owned(),
                text: "rsync failed".to_owned(),
                hint: String::new(),
            },
            failed_later: None,
            growth: None,
        }];
        self.watching(|watch| {
            watch.begins(&copy, RUN, at(minutes));
            let ended = Ended {
                run: RUN,
                attempts: &attempts,
                ..Ended::default()
            };
            watch.ended(&ended, &now(minutes))
        })
    }

    /// Kind, state and copy of each notice since the last call.
    fn taken(&self) -> Vec<String> {
        let text = fs::read_to_string(self.path("taken")).unwrap_or_default();
        let _ = fs::remove_file(self.path("taken"));
        let notices = text.lines().map(|line| serde_json::from_str(line).unwrap());
        let short = |notice: Value| {
            let field = |name: &str| notice[name].as_str().unwrap_or("-").to_owned();
            format!("{} {} {}", field("kind"), field("state"), field("copy"))
        };
        notices.map(short).collect()
    }
}

const HOUR: i64 = 60;
const DAY: i64 = 24 * HOUR;

#[test]
fn each_alarm_of_a_copy_comes_once_and_so_does_its_end() {
    let machine = Machine::new("");
    let none: [&str; 0] = [];
    assert_eq!(machine.check(0).exit, Exit::Done);
    assert_eq!(machine.run(15, Exit::Done).exit, Exit::Done);
    assert_eq!(machine.taken(), none);
    // A failure is reported, and the next one of the same cause is not.
    let failed = machine.run(DAY, Exit::Failed);
    assert_eq!((failed.exit, failed.delivered), (Exit::Done, 1));
    assert_eq!(failed.open.len(), 1);
    assert_eq!(machine.taken(), ["failure opened home@nas"]);
    machine.run(DAY + 15, Exit::Failed);
    machine.check(DAY + HOUR);
    assert_eq!(machine.taken(), none);
    // Not reached is none, but makes the copy overdue: at the second check.
    machine.run(3 * DAY + 14, Exit::Unreachable);
    assert_eq!(machine.check(3 * DAY + 14).exit, Exit::Done);
    let overdue = machine.check(3 * DAY + 15);
    assert_eq!((overdue.exit, overdue.delivered), (Exit::Overdue, 0));
    machine.check(3 * DAY + 44);
    assert_eq!(machine.taken(), none);
    machine.check(3 * DAY + 45);
    assert_eq!(machine.taken(), ["overdue opened home@nas"]);
    machine.check(3 * DAY + 2 * HOUR);
    assert_eq!(machine.taken(), none);
    let status = PublicStatus::read(&machine.path("state")).unwrap().unwrap();
    assert_eq!((status.code, status.events.len()), (4, 2));
    assert!(status.copies[0].overdue);
    assert_eq!(status.copies[0].failures_since, 3);
    assert_eq!(status.copies[0].last_code, Some(14));
    // An incomplete snapshot ends both, and is an event of its own.
    let made = machine.run(4 * DAY, Exit::Unread);
    assert_eq!((made.exit, made.open.len()), (Exit::Done, 1));
    assert_eq!(
        machine.taken(),
        [
            "recovered closed home@nas",
            "recovered closed home@nas",
            "incomplete opened home@nas"
        ]
    );
    machine.run(5 * DAY, Exit::Done);
    assert_eq!(machine.taken(), ["recovered closed home@nas"]);
    assert_eq!(machine.check(6 * DAY).problems, none);
}

#[test]
fn copy_that_left_the_config_is_not_overdue_and_its_events_close() {
    let machine = Machine::new("");
    machine.run(0, Exit::Failed);
    assert_eq!(machine.taken(), ["failure opened home@nas"]);
    // A file that can't be read takes nothing out, and its [notify] still counts.
    let right = fs::read(machine.path("sprat.toml")).unwrap();
    fs::write(machine.path("sprat.toml"), "not toml [").unwrap();
    let broken = machine.check(10);
    assert_eq!(broken.open.len(), 2);
    assert_eq!(machine.taken(), ["config opened -"]);
    fs::write(machine.path("sprat.toml"), right).unwrap();
    machine.check(20);
    assert_eq!(machine.taken(), ["recovered closed -"]);
    machine.configure("[job.other]", "");
    let gone = machine.check(30 * DAY);
    assert_eq!(machine.taken(), ["recovered closed home@nas"]);
    assert!(gone.open.is_empty());
}

#[test]
fn a_mistake_in_notify_silences_no_alarm() {
    let machine = Machine::new("");
    machine.check(0);
    machine.configure("[job.home]", "webhok = \"https://example.org\"");
    let loaded = machine.loaded();
    assert!(loaded.mistakes[0].concerns_notices());
    machine.run(10, Exit::Failed);
    assert_eq!(
        machine.taken(),
        ["failure opened home@nas", "config opened -"]
    );
    let kept = machine.path("state/notify.toml");
    assert_eq!(kept.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    // A mistake in a job is an event of its copies.
    machine.configure("[job.home]\nevery = \"1 m\"", "");
    machine.check(20);
    machine.check(30);
    assert_eq!(
        machine.taken(),
        ["recovered closed -", "config opened home@nas"]
    );
}

#[test]
fn clock_in_doubt_opens_nothing_overdue() {
    let machine = Machine::new("");
    machine.run(0, Exit::Done);
    // The wall clock is set a year ahead, in one boot.
    let ahead = |minutes: i64| {
        let mut ahead = now(minutes);
        ahead.moment.wall = at(365 * DAY + minutes);
        machine.watching(|watch| watch.ended(&Ended::default(), &ahead))
    };
    ahead(10);
    ahead(50);
    assert_eq!(machine.taken(), [""; 0]);
    // After a day of doubt that nothing ended, the clock itself is the event.
    ahead(26 * HOUR);
    assert_eq!(machine.taken(), ["clock opened -"]);
    ahead(27 * HOUR);
    assert_eq!(machine.taken(), ["overdue opened home@nas"]);
}

#[test]
fn watched_file_is_overdue_by_its_time() {
    let machine = Machine::new("");
    let file = machine.path("pi.luks");
    let text = fs::read_to_string(machine.path("sprat.toml")).unwrap();
    let watch = format!(
        "{text}[watch.pi]\nfile = \"{}\"\nalert_after = \"2 days\"\n",
        file.display()
    );
    fs::write(machine.path("sprat.toml"), watch).unwrap();
    let write = |minutes: i64| {
        let file = fs::File::create(&file).unwrap();
        let seconds = u64::try_from(at(minutes).as_second()).unwrap();
        let time = std::time::UNIX_EPOCH + Duration::from_secs(seconds);
        file.set_modified(time).unwrap();
    };
    write(0);
    machine.run(0, Exit::Done);
    assert_eq!(machine.check(2 * DAY).exit, Exit::Overdue);
    let overdue = machine.check(2 * DAY + 30);
    assert_eq!(overdue.status, Exit::Overdue);
    assert_eq!(machine.taken(), ["overdue opened -"]);
    let status = PublicStatus::read(&machine.path("state")).unwrap().unwrap();
    assert_eq!((status.code, status.watches[0].overdue), (4, true));
    let views =
        |minutes: i64| machine.watching(|watch| WatchView::all(&watch.watched, at(minutes)));
    assert_eq!(views(2 * DAY - 1)[0].exit(), Exit::Done);
    assert_eq!(views(2 * DAY)[0].exit(), Exit::Overdue);
    // A mistake in its table is no recovery.
    let right = fs::read_to_string(machine.path("sprat.toml")).unwrap();
    let wrong = right.replace("alert_after = \"2 days\"", "alert_after = \"2 m\"");
    fs::write(machine.path("sprat.toml"), wrong).unwrap();
    machine.check(2 * DAY + 31);
    assert_eq!(machine.taken(), ["config opened -"]);
    fs::write(machine.path("sprat.toml"), right).unwrap();
    machine.check(2 * DAY + 32);
    assert_eq!(machine.taken(), ["recovered closed -"]);
    write(2 * DAY + 40);
    assert_eq!(machine.check(2 * DAY + 45).exit, Exit::Done);
    assert_eq!(machine.taken(), ["recovered closed -"]);
}

#[test]
fn state_that_is_not_known_closes_no_missing_disk() {
    let machine = Machine::new("");
    machine.run(0, Exit::Done);
    let key = Key::missing(CopyName::new("home", "nas"), "disk");
    let found = Finding {
        cause: Cause::new(0, "disk"),
        text: String::new(),
        hint: String::new(),
    };
    machine.watching(|watch| {
        let events = &mut watch.notifier().events;
        events.change(|events| events.observe(at(1), &key, Some(&found)));
    });
    machine.check(2);
    assert_eq!(machine.check(3).open.len(), 1);
    assert_eq!(machine.taken(), ["missing opened home@nas"]);
}

#[test]
fn digest_comes_at_its_time_and_reports_the_week() {
    let machine = Machine::new("digest = \"weekly\"");
    machine.check(0);
    machine.run(1, Exit::Done);
    machine.run(DAY, Exit::Unread);
    machine.run(DAY + 60, Exit::Failed);
    machine.taken();
    // Monday, 08:00.
    machine.check(DAY + 18 * HOUR - 1);
    assert_eq!(machine.taken(), [""; 0]);
    machine.check(DAY + 18 * HOUR);
    let text = fs::read_to_string(machine.path("taken")).unwrap();
    let digest: Value = serde_json::from_str(text.trim_end()).unwrap();
    assert_eq!(digest["kind"], "digest");
    let text = digest["text"].as_str().unwrap();
    for line in [
        "From 2026-11-28 14:00 to 2026-11-30 08:00",
        "2 open problems:",
        "home@nas: 2 backups, 1 incomplete, 1 failed, 15.0 MiB sent; last backup 2026-11-29 14:00",
        "  exclude_larger_than left out 6 files for the first time",
    ] {
        assert!(text.contains(line), "{text}");
    }
    machine.taken();
    machine.check(DAY + 19 * HOUR);
    assert_eq!(machine.taken(), [""; 0]);
    // The next one compares with the last backup before this one.
    machine.run(3 * DAY, Exit::Done);
    machine.taken();
    machine.check(8 * DAY + 18 * HOUR);
    let text = fs::read_to_string(machine.path("taken")).unwrap();
    let size = "4.2 GiB in all (2.7 GiB more)";
    assert!(text.contains(size), "{text}");
}

#[test]
fn state_that_can_not_be_read_is_not_published_as_success() {
    let machine = Machine::new("");
    let state = machine.path("state");
    machine.run(0, Exit::Done);
    let path = machine.path("laptop.luks").display().to_string();
    let target = Target::parse(&path, Path::new("/")).unwrap();
    let pins = Pins {
        cipher: "aes-xts-plain64".to_owned(),
        key_bits: 512,
        sector_bytes: 4096,
        payload_offset_bytes: 16 << 20,
        iv_tweak: 0,
        volume_key_digest: "00".repeat(32),
        uuid: "8a2ac4f5-8d45-4a0c-a1f3-3c3c7c4fca46".to_owned(),
        sequence_id: 3,
    };
    identity::store(&state, &target, &pins).unwrap();
    let paths = StatePaths::new(&state, &pins.uuid, &target);
    let check = KeptCheck {
        at: at(0),
        exit: Exit::Done,
        finished: true,
        result: Value::Null,
    };
    checks::keep(&paths, vec![(checks::Kind::ReadData, check)]).unwrap();
    History::update(&paths, |history| history.saw_server(at(0), Some(1 << 40))).unwrap();
    KeyNotes::default().store(&state, &pins.uuid).unwrap();
    let code = || PublicStatus::read(&state).unwrap().unwrap().code;
    assert_eq!(machine.check(1).status, Exit::Done);
    assert_eq!(code(), 0);
    for folder in ["containers", "status", "checks", "keys", "runs", "schedule"] {
        let files = fs::read_dir(state.join(folder)).unwrap().flatten();
        let mut files: Vec<_> = files.map(|entry| entry.path()).collect();
        files.retain(|file| file.is_file() && file.extension() != Some(OsStr::new("lock")));
        assert_eq!(files.len(), 1, "{files:?}");
        let (file, aside) = (&files[0], machine.path("aside"));
        fs::rename(file, &aside).unwrap();
        // No user can read that, and none can replace it by a file.
        fs::create_dir_all(file.join("in it")).unwrap();
        for _ in 0..2 {
            let found = machine.check(2);
            assert_eq!((found.status, found.exit), (Exit::Failed, Exit::Failed));
            assert_eq!(code(), 1, "{folder}");
            let names = |problem: &String| problem.contains(&*file.to_string_lossy());
            assert!(found.problems.iter().any(names), "{:?}", found.problems);
        }
        fs::remove_dir_all(file).unwrap();
        fs::rename(&aside, file).unwrap();
        assert_eq!(machine.check(3).status, Exit::Done, "{folder}");
        assert_eq!(code(), 0);
    }
}

#[test]
fn digest_reports_what_can_not_be_read() {
    let machine = Machine::new("digest = \"weekly\"");
    machine.check(0);
    machine.run(1, Exit::Done);
    let history = machine.path("state/runs/home@nas.jsonl");
    fs::remove_file(&history).unwrap();
    fs::create_dir(&history).unwrap();
    machine.check(DAY + 18 * HOUR);
    let text = fs::read_to_string(machine.path("taken")).unwrap();
    let line = "home@nas: the history of its backups can't be read; last backup 2026-11-28 14:01";
    assert!(text.contains(line), "{text}");
    assert!(!text.contains("0 backups"), "{text}");
}

#[test]
fn run_pings_begin_and_end_and_a_dead_channel_fails_nothing() {
    requires!(python_module_missing("http.server"));
    let server = NoticeServer::http(Wire::Plain);
    let url = |path: &str| format!("http://127.0.0.1:{}{path}", server.port);
    let machine = Machine::new(&format!(
        "healthchecks = \"{}\"\nwebhook = \"{}\"\nmetrics = \"/nowhere/sprat.prom\"",
        url("/run"),
        url("/status/500")
    ));
    machine.configure(
        &format!("[job.home]\nhealthchecks = \"{}\"", url("/job")),
        &format!(
            "healthchecks = \"{}\"\nwebhook = \"{}\"\nmetrics = \"/nowhere/sprat.prom\"",
            url("/run"),
            url("/status/500")
        ),
    );
    let failed = machine.run(0, Exit::Failed);
    // The command took it; the webhook will be tried again.
    assert_eq!(machine.taken(), ["failure opened home@nas"]);
    assert_eq!((failed.exit, failed.failed.len()), (Exit::Done, 1));
    assert_eq!(failed.problems.len(), 2, "{:?}", failed.problems);
    let paths = || -> Vec<String> {
        let received = server.received();
        let paths = received.iter().map(|request| request["path"].as_str());
        let paths = paths.map(|path| path.unwrap().replace(RUN, "ID"));
        paths.filter(|path| !path.contains("500")).collect()
    };
    let expected = [
        "/run/start?rid=ID",
        "/job/start?rid=ID",
        "/job/fail?rid=ID",
        "/run/fail?rid=ID",
    ];
    assert_eq!(paths(), expected);
    // A tick without work pings nothing.
    machine.check(15);
    assert_eq!(paths(), expected);
}

#[test]
fn state_that_can_not_be_written_is_a_problem_and_the_notice_is_sent() {
    let machine = Machine::new("");
    fs::write(machine.path("state"), "no folder").unwrap();
    let loaded = machine.loaded();
    let watched = Watched {
        config: &loaded.config,
        mistakes: &loaded.mistakes,
        places: machine.places.clone(),
        state_dir: machine.path("state"),
        host: "laptop".to_owned(),
        machine_id: String::new(),
    };
    let attempts = [Attempt {
        copy: CopyName::new("home", "nas"),
        by: By::Run,
        exit: Exit::Failed,
        what: Words::default(),
        failed_later: None,
        growth: None,
    }];
    let ended = Ended {
        run: RUN,
        attempts: &attempts,
        ..Ended::default()
    };
    let mut watch = Watch::new(watched, Network::default());
    let findings = watch.ended(&ended, &now(0));
    assert_eq!(findings.exit, Exit::Failed);
    assert!(!findings.problems.is_empty());
    // A copy of which nothing can be read keeps all its snapshots.
    let opened = ["failure opened home@nas", "held opened home@nas"];
    assert_eq!(machine.taken(), opened);
}

#[test]
fn owed_hook_that_fails_is_reported_until_the_next_success() {
    let machine = Machine::new("");
    machine.run(0, Exit::Done);
    let owed = [OwedFailed {
        subject: Subject::Copy(CopyName::new("home", "nas")),
        failure: Failure::failed("the after hook failed"),
    }];
    machine.watching(|watch| {
        let ended = Ended {
            run: RUN,
            owed: &owed,
            ..Ended::default()
        };
        watch.ended(&ended, &now(15))
    });
    // The copy itself succeeded.
    let status = |minutes| {
        let read = |watch: &mut Watch<'_>| watch.ended(&Ended::default(), &now(minutes)).status;
        machine.watching(read)
    };
    assert_eq!(status(30), Exit::Failed);
    assert_eq!(machine.taken(), ["failure opened home@nas"]);
    machine.run(DAY, Exit::Done);
    assert_eq!(machine.taken(), ["recovered closed home@nas"]);
    assert_eq!(status(DAY + 1), Exit::Done);
}

#[test]
fn mistakes_are_new_once() {
    let machine = Machine::new("");
    let are_new = || {
        let mut is_new = false;
        machine.watching(|watch| is_new = watch.are_new_mistakes());
        is_new
    };
    assert!(!are_new());
    machine.configure("[job.home]\nevry = \"1 day\"", "");
    assert!(are_new());
    assert!(!are_new());
    machine.configure("[job.home]\nevery = \"1 day\"", "");
    assert!(are_new());
    machine.configure("[job.home]\nevry = \"1 day\"", "");
    assert!(are_new());
}

#[test]
fn copies_in_another_container_count_no_more_after_the_target_has_changed() {
    let machine = Machine::new("");
    machine.run(0, Exit::Done);
    machine.check(1);
    let last = |minutes| {
        let read =
            |watch: &mut Watch<'_>| CopyView::in_container(&watch.watched, "nas", at(minutes));
        machine.watching(read)[0].state.last_success
    };
    assert_eq!(last(1), Some(at(0)));
    let config = machine.path("sprat.toml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("laptop.luks", "other.luks")).unwrap();
    assert_eq!(last(2), None);
    machine.check(2);
    let copy = CopyName::new("home", "nas");
    let state = copy_state::copy_file(&machine.path("state"), &copy).read();
    assert_eq!((state.last_success, state.first_seen), (None, Some(at(2))));
}
