//! Deliveries to real servers and programs, with a clock of the test's own.

use std::time::Duration;

use jiff::tz::TimeZone;
use sprat_session::Exit;
use sprat_testkit::notice_servers::{NoticeServer, Wire, python_module_missing};
use sprat_testkit::requires;

use super::*;
use crate::copy_name::CopyName;
use crate::notify::events::{Attempt, By, Words};

fn at(minutes: i64) -> Timestamp {
    Timestamp::from_second(1_795_874_400 + minutes * 60).unwrap()
}

fn tick(minutes: i64) -> Tick {
    Tick {
        now: at(minutes),
        clock_is_trusted: true,
        at_once: false,
    }
}

fn delivery(channels: Channels) -> Delivery {
    Delivery {
        channels,
        wanted: Wanted {
            on: Kind::ALL.to_vec(),
            remind_after: Some(SignedDuration::from_hours(7 * 24)),
        },
        checks: BTreeMap::new(),
        sender: Sender {
            host: "laptop".to_owned(),
            zone: TimeZone::UTC,
        },
        network: Network {
            limit: Duration::from_secs(20),
            ..Network::default()
        },
    }
}

fn url(server: &NoticeServer, path: &str) -> Option<PrivateText> {
    let url = format!("http://127.0.0.1:{}{path}", server.port);
    Some(PrivateText::text(&url))
}

/// A URL at which nobody listens, and the listener that can come up there.
fn dead_url(path: &str) -> Option<PrivateText> {
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    Some(PrivateText::text(&format!("http://127.0.0.1:{port}{path}")))
}

fn ended(job: &str, exit: Exit) -> Attempt {
    Attempt {
        copy: CopyName::new(job, "nas"),
        by: By::Run,
        exit,
        what: Words {
            class: "class".to_owned(),
            text: "can't read /home/secret-project".to_owned(),
            hint: "hint".to_owned(),
        },
        failed_later: None,
        growth: None,
    }
}

fn fail(notifier: &mut Notifier, minutes: i64, jobs: &[&str]) {
    notifier.events.change(|events| {
        for job in jobs {
            events.attempt(at(minutes), &ended(job, Exit::Failed));
        }
    });
}

/// All of one run go in one message to ntfy, and one a call to the webhook, each once.
#[test]
fn all_reports_arrive_once_and_ntfy_names_no_path() {
    requires!(python_module_missing("http.server"));
    let folder = tempfile::tempdir().unwrap();
    let server = NoticeServer::http(Wire::Plain);
    let delivery = delivery(Channels {
        webhook: url(&server, "/hook"),
        ntfy: url(&server, "/topic"),
        ..Channels::default()
    });
    let mut notifier = Notifier::new(folder.path());
    fail(&mut notifier, 0, &["home", "db"]);
    let outcome = notifier.deliver(&delivery, tick(0));
    assert_eq!((outcome.delivered, outcome.failed.len()), (4, 0));
    let received = server.received();
    let to = |path: &str| {
        let sent = received.iter().filter(|request| request["path"] == *path);
        sent.collect::<Vec<_>>()
    };
    let hooks = to("/hook");
    assert_eq!(hooks.len(), 2);
    for (hook, job) in hooks.iter().zip(["home@nas", "db@nas"]) {
        let json: serde_json::Value = serde_json::from_str(hook["body"].as_str().unwrap()).unwrap();
        assert_eq!(json["copy"], job);
        assert_eq!(json["state"], "opened");
        assert!(
            json["text"]
                .as_str()
                .unwrap()
                .contains("/home/secret-project")
        );
    }
    let ntfy = to("/topic");
    assert_eq!(ntfy.len(), 1);
    assert_eq!(
        ntfy[0]["body"],
        "sprat on laptop: home@nas: the backup failed (code 1)\ndb@nas: the backup failed (code 1)"
    );
    assert_eq!(ntfy[0]["headers"]["title"], "sprat");
    // Another process, and the same state: nothing is sent again.
    let again = Notifier::new(folder.path()).deliver(&delivery, tick(15));
    assert_eq!(again, Outcome::default());
    // The end of one.
    notifier
        .events
        .change(|events| events.attempt(at(20), &ended("db", Exit::Done)));
    assert_eq!(notifier.deliver(&delivery, tick(30)).delivered, 2);
    assert_eq!(server.received().len(), 5);
    assert_eq!(notifier.events.read().all().count(), 1);
    assert_eq!(notifier.take_problems(), [""; 0]);
}

#[test]
fn channel_that_fails_is_tried_at_each_tick_then_hourly_and_reported_after_a_day() {
    requires!(python_module_missing("http.server"));
    let folder = tempfile::tempdir().unwrap();
    let server = NoticeServer::http(Wire::Plain);
    let mut delivery = delivery(Channels {
        webhook: url(&server, "/status/500"),
        ntfy: url(&server, "/topic"),
        ..Channels::default()
    });
    let mut notifier = Notifier::new(folder.path());
    fail(&mut notifier, 0, &["home"]);
    let day = 24 * 60;
    let mut tried = Vec::new();
    for minutes in (0..day + 60).step_by(15) {
        let outcome = notifier.deliver(&delivery, tick(minutes));
        if let Some((channel, error)) = outcome.failed.first() {
            assert_eq!(*channel, Channel::Webhook);
            assert!(error.contains("500"), "{error}");
            tried.push(minutes);
        }
    }
    let expected: Vec<_> = (0..120).step_by(15).chain([165, 225]).collect();
    assert_eq!(tried[..10], expected);
    assert!(
        tried[10..].windows(2).all(|pair| pair[1] - pair[0] == 60),
        "{tried:?}"
    );
    // ntfy reported the failure, and after a day the channel.
    let received = server.received();
    let topics = received
        .iter()
        .filter(|request| request["path"] == "/topic");
    let texts: Vec<_> = topics
        .map(|request| request["body"].as_str().unwrap())
        .collect();
    assert_eq!(
        texts,
        [
            "sprat on laptop: home@nas: the backup failed (code 1)",
            "sprat on laptop: webhook: notices have failed for a day (code 1)"
        ]
    );
    let state = &notifier.states().channels[&Channel::Webhook];
    assert_eq!(state.failing_since, Some(at(0)));
    // It works again: it gets what it lacks, and ntfy the end.
    delivery.channels.webhook = url(&server, "/hook");
    let tick_now = Tick {
        at_once: true,
        ..tick(day + 61)
    };
    assert_eq!(notifier.deliver(&delivery, tick_now).delivered, 1);
    assert_eq!(notifier.deliver(&delivery, tick(day + 75)).delivered, 1);
    let last = server.received().pop().unwrap();
    assert!(
        last["body"]
            .as_str()
            .unwrap()
            .contains("recovered: notices failed")
    );
}

/// Opened and closed while the channel was away: one notice, not two.
#[test]
fn what_opened_and_closed_before_any_delivery_is_one_notice() {
    requires!(python_module_missing("http.server"));
    let folder = tempfile::tempdir().unwrap();
    let mut delivery = delivery(Channels {
        ntfy: dead_url("/topic"),
        ..Channels::default()
    });
    let mut notifier = Notifier::new(folder.path());
    fail(&mut notifier, 0, &["home"]);
    let failed = notifier.deliver(&delivery, tick(0)).failed;
    assert!(!failed[0].1.contains("topic"), "{failed:?}");
    notifier
        .events
        .change(|events| events.attempt(at(15), &ended("home", Exit::Done)));
    let server = NoticeServer::http(Wire::Plain);
    delivery.channels.ntfy = url(&server, "/topic");
    assert_eq!(notifier.deliver(&delivery, tick(30)).delivered, 1);
    assert_eq!(
        server.received()[0]["body"],
        "sprat on laptop: home@nas: the backup failed from 2026-11-28 14:00 to 2026-11-28 14:15"
    );
    assert_eq!(notifier.events.read().all().count(), 0);
}

/// A state folder that is full or read-only: notices are sent, and the run says what it could not keep.
#[test]
fn without_a_state_folder_notices_are_sent_all_the_same() {
    requires!(python_module_missing("http.server"));
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    std::fs::write(&state, "a file in its place").unwrap();
    let server = NoticeServer::http(Wire::Plain);
    let delivery = delivery(Channels {
        webhook: url(&server, "/hook"),
        ..Channels::default()
    });
    let mut notifier = Notifier::new(&state);
    fail(&mut notifier, 0, &["home"]);
    assert_eq!(notifier.deliver(&delivery, tick(0)).delivered, 1);
    assert_eq!(notifier.deliver(&delivery, tick(15)).delivered, 0);
    assert!(!notifier.take_problems().is_empty());
    assert_eq!(server.received().len(), 1);
}

#[test]
fn command_gets_one_event_a_call_as_json() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path().display();
    let command = |script: String| Channels {
        command: Some(vec!["sh".into(), "-c".into(), script.into()]),
        ..Channels::default()
    };
    let mut notifier = Notifier::new(&folder.path().join("state"));
    fail(&mut notifier, 0, &["home", "db"]);
    let broken = delivery(command(format!(
        "echo x >> {at}/tried; echo secret; exit 1"
    )));
    let failed = notifier.deliver(&broken, tick(0)).failed;
    assert!(!failed[0].1.contains("secret"), "{failed:?}");
    // Each is tried: the program may refuse only one of them.
    assert_eq!(
        std::fs::read_to_string(folder.path().join("tried")).unwrap(),
        "x\nx\n"
    );
    let right = delivery(command(format!("cat >> {at}/received")));
    assert_eq!(notifier.deliver(&right, tick(15)).delivered, 2);
    let received = std::fs::read_to_string(folder.path().join("received")).unwrap();
    let copies = received.lines().map(|line| {
        let json: serde_json::Value = serde_json::from_str(line).unwrap();
        (
            json["schema"].as_u64(),
            json["copy"].as_str().unwrap().to_owned(),
        )
    });
    assert_eq!(
        copies.collect::<Vec<_>>(),
        [
            (Some(1), "home@nas".to_owned()),
            (Some(1), "db@nas".to_owned())
        ]
    );
}

/// The program refuses one of them each time.
#[test]
fn event_that_a_command_refuses_keeps_no_other_back() {
    let folder = tempfile::tempdir().unwrap();
    let got = folder.path().join("got");
    let script = format!(
        "read event; [ -e {0}.all ] || case $event in *first@nas*) exit 1;; esac; echo \"$event\" >> {0}",
        got.display()
    );
    let words = ["sh", "-c", &script].map(std::ffi::OsString::from);
    let delivery = delivery(Channels {
        command: Some(words.to_vec()),
        ..Channels::default()
    });
    let mut notifier = Notifier::new(folder.path());
    fail(&mut notifier, 0, &["first", "second", "third"]);
    let outcome = notifier.deliver(&delivery, tick(0));
    assert_eq!((outcome.delivered, outcome.failed.len()), (2, 1));
    fail(&mut notifier, 15, &["fourth"]);
    let outcome = notifier.deliver(&delivery, tick(15));
    assert_eq!((outcome.delivered, outcome.failed.len()), (1, 1));
    let got = std::fs::read_to_string(&got).unwrap();
    assert_eq!(got.lines().count(), 3, "{got}");
    // It fails as long as one is refused.
    let state = notifier
        .states()
        .channels
        .remove(&Channel::Command)
        .unwrap();
    assert_eq!(state.failing_since, Some(at(0)));
    assert_eq!(state.last_success, Some(at(15)));
    std::fs::write(folder.path().join("got.all"), "").unwrap();
    notifier.deliver(&delivery, tick(30));
    let state = notifier
        .states()
        .channels
        .remove(&Channel::Command)
        .unwrap();
    assert_eq!(state.failing_since, None);
}

#[test]
fn each_address_of_mail_is_a_channel_of_its_own() {
    requires!(python_module_missing("aiosmtpd"));
    use crate::notify::channels::{Mail, MailRoute};

    let folder = tempfile::tempdir().unwrap();
    let server = NoticeServer::smtp(Wire::StartTls, None);
    let mut delivery = delivery(Channels {
        mail: Some(Mail {
            to: ["nobody@example.org", "root@example.org"]
                .map(str::to_owned)
                .to_vec(),
            from: Some("sprat@example.org".to_owned()),
            route: MailRoute::Smtp {
                server: format!("smtp://127.0.0.1:{}", server.port).parse().unwrap(),
                password: None,
            },
        }),
        ..Channels::default()
    });
    delivery.network.only_root = Some(server.certificate());
    let mut notifier = Notifier::new(folder.path());
    fail(&mut notifier, 0, &["home", "db"]);
    let outcome = notifier.deliver(&delivery, tick(0));
    assert_eq!(outcome.failed.len(), 1);
    assert_eq!(
        outcome.failed[0].0,
        Channel::Mail("nobody@example.org".to_owned())
    );
    // One mail with both, and none again.
    assert_eq!(notifier.deliver(&delivery, tick(15)).delivered, 0);
    let received = server.received();
    assert_eq!(received.len(), 1);
    let content = received[0]["content"].as_str().unwrap();
    assert!(content.contains("home@nas: the backup failed"), "{content}");
    assert!(content.contains("db@nas: the backup failed"), "{content}");
}

#[test]
fn test_notice_goes_by_each_channel_and_leaves_nothing() {
    requires!(python_module_missing("http.server"));
    let server = NoticeServer::http(Wire::Plain);
    let delivery = delivery(Channels {
        webhook: url(&server, "/hook"),
        ntfy: url(&server, "/status/403"),
        ..Channels::default()
    });
    let tested = Notifier::test(&delivery, at(0));
    assert_eq!(tested[0], (Channel::Webhook, Ok(())));
    assert!(tested[1].1.as_ref().unwrap_err().contains("403"));
    let body = server.received()[0]["body"].as_str().unwrap().to_owned();
    let json: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(
        (&json["state"], &json["text"]),
        (&"test".into(), &"this is a test notice".into())
    );
}

#[test]
fn late_ping_is_sent_again_unless_a_later_one_was_delivered() {
    requires!(python_module_missing("http.server"));
    let folder = tempfile::tempdir().unwrap();
    let server = NoticeServer::http(Wire::Plain);
    let mut away = delivery(Channels::default());
    away.checks
        .insert("home@nas".to_owned(), dead_url("/key").unwrap());
    let mut back = away.clone();
    back.checks
        .insert("home@nas".to_owned(), url(&server, "/key").unwrap());
    let mut notifier = Notifier::new(folder.path());
    let ping = |notifier: &mut Notifier, delivery: &Delivery, what, run: &str, minutes| {
        notifier
            .ping(delivery, "home@nas", what, run, at(minutes))
            .is_ok()
    };
    assert!(!ping(&mut notifier, &away, Ping::Start, "run1", 0));
    assert!(!ping(&mut notifier, &away, Ping::Fail, "run1", 1));
    notifier.deliver(&away, tick(15));
    notifier.deliver(&back, tick(30));
    notifier.deliver(&back, tick(45));
    let paths = || -> Vec<String> {
        let received = server.received();
        let paths = received
            .iter()
            .map(|request| request["path"].as_str().unwrap().to_owned());
        paths.collect()
    };
    assert_eq!(paths(), ["/key/fail?rid=run1"]);
    assert!(!ping(&mut notifier, &away, Ping::Fail, "run2", 60));
    assert!(ping(&mut notifier, &back, Ping::Complete, "run3", 61));
    notifier.deliver(&back, tick(75));
    assert_eq!(paths()[1..], ["/key?rid=run3"]);
    // Not for ever.
    assert!(!ping(&mut notifier, &away, Ping::Complete, "run4", 80));
    notifier.deliver(&back, tick(80 + 15 * 24 * 60));
    assert_eq!(paths().len(), 2);
    // A check that is not in the config has no ping.
    assert_eq!(
        notifier.ping(&back, "other", Ping::Fail, "run5", at(0)),
        Ok(())
    );
}
