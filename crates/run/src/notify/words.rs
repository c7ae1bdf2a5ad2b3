//! The words of notices.
//!
//! A headline is made of the kind, the subject and the cause only, so it names no path: it is all that
//! the desktop and ntfy get.

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::Serialize;
use sprat_session::text::harmless;

use crate::notify::events::{Report, State};
use crate::notify::kinds::{Channel, Kind, Subject};

/// What all notices of a machine have in common.
#[derive(Debug, Clone)]
pub struct Sender {
    /// The name of this machine.
    pub host: String,
    /// For times.
    pub zone: TimeZone,
}

/// A notice as JSON, for `command` and `webhook`. Fields are added, never renamed or removed.
#[derive(Debug, Serialize)]
pub struct JsonNotice<'n> {
    schema: u32,
    /// The same in each repetition. Up to the dot: the same in all notices of one event.
    id: &'n str,
    kind: Kind,
    state: State,
    copy: Option<String>,
    container: Option<&'n str>,
    opened: Timestamp,
    cause: JsonCause<'n>,
    text: String,
    hint: &'n str,
    host: &'n str,
}

#[derive(Debug, Serialize)]
struct JsonCause<'n> {
    code: u8,
    class: &'n str,
}

/// The kind of a report: `recovered` when an event closes.
#[must_use]
pub fn kind(report: &Report) -> Kind {
    match report.state {
        State::Closed => Kind::Recovered,
        _ => report.event.key.kind,
    }
}

impl Sender {
    /// A report as JSON.
    #[must_use]
    pub fn json<'n>(&'n self, report: &'n Report) -> JsonNotice<'n> {
        let event = &report.event;
        let details = details(report);
        let mut text = self.headline(report);
        if !details.is_empty() {
            text = format!("{text}\n{details}");
        }
        JsonNotice {
            schema: 1,
            id: &report.id,
            kind: kind(report),
            state: report.state,
            copy: event.key.subject.copy().map(ToString::to_string),
            container: event.key.subject.container(),
            opened: event.opened,
            cause: JsonCause {
                code: event.cause.code,
                class: &event.cause.class,
            },
            text,
            hint: hint(report),
            host: &self.host,
        }
    }

    /// The subject and the text of one mail about all reports.
    #[must_use]
    pub fn mail(&self, reports: &[Report]) -> (String, String) {
        let subject = format!("sprat on {}: {}", self.host, self.all_in_short(reports));
        let mut text = String::new();
        for report in reports {
            let event = &report.event;
            text += &format!("{}\n", self.headline(report));
            if matches!(report.state, State::Opened | State::Changed) {
                text += &format!("Since: {}\n", self.time(event.opened));
            }
            for part in [details(report), hint(report)] {
                if !part.is_empty() {
                    let lines: Vec<_> = part.lines().map(harmless).collect();
                    text += &format!("\n{}\n", lines.join("\n"));
                }
            }
            text += "\n";
        }
        text += &format!(
            "-- \nsprat on {}. \"sprat status\" shows the present state.\n",
            self.host
        );
        (harmless(&subject), text)
    }

    /// The title and the text of one notice about all reports that names no path: for the desktop and
    /// ntfy.
    #[must_use]
    pub fn short(&self, reports: &[Report]) -> (String, String) {
        let mut lines = Vec::new();
        for report in reports {
            lines.push(self.headline(report));
            // A digest has names of copies and numbers only.
            if report.state == State::Digest {
                lines.extend(report.event.text.lines().map(harmless));
            }
        }
        (format!("sprat on {}", self.host), lines.join("\n"))
    }

    fn all_in_short(&self, reports: &[Report]) -> String {
        match reports {
            [] => String::new(),
            [one] => self.headline(one),
            [first, others @ ..] => {
                format!("{}, and {} more", self.headline(first), others.len())
            }
        }
    }

    /// One line about a report, without any path.
    #[must_use]
    pub fn headline(&self, report: &Report) -> String {
        let event = &report.event;
        let (is, was) = phrases(event.key.kind, &event.key.subject);
        let code = match event.cause.code {
            0 => String::new(),
            code => format!(" (code {code})"),
        };
        let subject = match &event.key.subject {
            Subject::Machine => String::new(),
            Subject::Watch(_) | Subject::Copy(_) | Subject::Container(_) => {
                format!("{}: ", event.key.subject)
            }
            Subject::Channel(channel) => format!("{}: ", channel_name(channel)),
        };
        let opened = self.time(event.opened);
        let text = match report.state {
            State::Opened => format!("{subject}{is}{code}"),
            State::Changed => format!("{subject}{is}, for another reason{code}"),
            State::Reminded => format!("{subject}{is}{code}, since {opened}"),
            State::Closed => format!("{subject}recovered: {was}, since {opened}"),
            State::Passed => {
                let closed = self.time(event.closed.unwrap_or(event.opened));
                format!("{subject}{was} from {opened} to {closed}")
            }
            State::Digest => format!("summary of {}", self.host),
            State::Test => "this is a test notice".to_owned(),
        };
        harmless(&text)
    }

    /// As `2026-11-28 14:00`.
    fn time(&self, time: Timestamp) -> String {
        let local = time.to_zoned_datetime(self.zone.clone());
        local.strftime("%Y-%m-%d %H:%M").to_string()
    }
}

fn channel_name(channel: &Channel) -> String {
    match channel {
        Channel::Mail(address) => format!("mail to {address}"),
        other => other.to_string(),
    }
}

/// What the event says beyond the headline.
fn details(report: &Report) -> &str {
    match report.state {
        State::Closed | State::Passed => "",
        _ => &report.event.text,
    }
}

fn hint(report: &Report) -> &str {
    match report.state {
        State::Closed | State::Passed => "",
        _ => &report.event.hint,
    }
}

/// What is so, and what was so.
fn phrases(kind: Kind, subject: &Subject) -> (&'static str, &'static str) {
    match (kind, subject) {
        (Kind::Failure, Subject::Channel(_)) => ("notices have failed for a day", "notices failed"),
        (Kind::Failure, Subject::Container(_)) => ("a hook failed", "a hook failed"),
        (Kind::Failure, _) => ("the backup failed", "the backup failed"),
        (Kind::Incomplete, _) => ("the backup is incomplete", "the backup was incomplete"),
        (Kind::Missing, _) => ("a disk is missing", "a disk was missing"),
        (Kind::Overdue, Subject::Watch(_)) => (
            "the container file is overdue: nothing was written to it",
            "the container file was overdue",
        ),
        (Kind::Overdue, _) => ("the backup is overdue", "the backup was overdue"),
        (Kind::Damage, Subject::Copy(_)) => (
            "the content of a source changed silently",
            "the content of a source had changed silently",
        ),
        (Kind::Damage, _) => ("damage was found", "damage had been found"),
        (Kind::Growth, _) => (
            "the size of the backup is far from the usual",
            "the size of the backup was far from the usual",
        ),
        (Kind::Change, _) => (
            "far more files changed than usual",
            "far more files had changed than usual",
        ),
        (Kind::Held, _) => ("pruning waits for you", "pruning waited for you"),
        (Kind::Space, _) => ("little free space is left", "little free space was left"),
        // The config is wrong, or something that it names is missing: a key file, for example.
        (Kind::Config, Subject::Copy(_)) => {
            ("the backup can't start", "the backup could not start")
        }
        (Kind::Config, _) => ("the config has a mistake", "the config had a mistake"),
        (Kind::Clock, _) => (
            "the clock of this machine may be wrong",
            "the clock of this machine may have been wrong",
        ),
        (Kind::Recovered, _) => ("recovered", "recovered"),
        (Kind::Digest, _) => ("summary", "summary"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::copy_name::CopyName;
    use crate::notify::events::{Events, Wanted};
    use crate::notify::kinds::{Cause, Finding, FoundBy, Key};

    fn at(hours: i64) -> Timestamp {
        Timestamp::from_second(1_795_874_400 + hours * 3600).unwrap()
    }

    fn sender() -> Sender {
        Sender {
            host: "laptop".to_owned(),
            zone: TimeZone::fixed(jiff::tz::offset(1)),
        }
    }

    fn wanted() -> Wanted {
        Wanted {
            on: Kind::ALL.to_vec(),
            remind_after: None,
        }
    }

    #[test]
    fn a_backup_that_cannot_start_is_not_said_to_have_a_config_with_a_mistake() {
        // A missing key file has this kind, too.
        let copy = Subject::Copy(CopyName::new("home", "laptop"));
        assert!(!phrases(Kind::Config, &copy).0.contains("config"));
    }

    fn overdue() -> (Events, Key) {
        let key = Key::new(Kind::Overdue, Subject::Copy(CopyName::new("home", "nas")));
        let mut events = Events::default();
        let found = Finding {
            cause: Cause::new(4, "overdue"),
            text: "No backup since /home was moved.".to_owned(),
            hint: "Run `sprat status home@nas`.".to_owned(),
        };
        events.observe(at(0), &key, Some(&found));
        (events, key)
    }

    fn pending(events: &Events) -> Vec<Report> {
        events.pending(&Channel::Ntfy, &wanted(), at(1))
    }

    #[test]
    fn json_is_as_documented() {
        let (events, _) = overdue();
        let reports = pending(&events);
        let json = serde_json::to_value(sender().json(&reports[0])).unwrap();
        assert_eq!(
            json,
            serde_json::json!({
                "schema": 1,
                "id": reports[0].id,
                "kind": "overdue",
                "state": "opened",
                "copy": "home@nas",
                "container": "nas",
                "opened": "2026-11-28T14:00:00Z",
                "cause": { "code": 4, "class": "overdue" },
                "text": "home@nas: the backup is overdue (code 4)\nNo backup since /home was moved.",
                "hint": "Run `sprat status home@nas`.",
                "host": "laptop",
            })
        );
    }

    #[test]
    fn end_is_recovered_where_the_opening_was_reported_and_one_notice_where_not() {
        let (mut events, key) = overdue();
        let opened = pending(&events).remove(0);
        let mut delivered = events.clone();
        delivered.deliver(&Channel::Ntfy, &opened, at(0));
        for events in [&mut events, &mut delivered] {
            events.observe(at(30), &key, None);
        }
        let (passed, closed) = (pending(&events).remove(0), pending(&delivered).remove(0));
        assert_eq!(kind(&passed), Kind::Overdue);
        assert_eq!(
            sender().headline(&passed),
            "home@nas: the backup was overdue from 2026-11-28 15:00 to 2026-11-29 21:00"
        );
        assert_eq!(kind(&closed), Kind::Recovered);
        assert_eq!(
            sender().headline(&closed),
            "home@nas: recovered: the backup was overdue, since 2026-11-28 15:00"
        );
        let json = serde_json::to_value(sender().json(&closed)).unwrap();
        assert_eq!(json["kind"], "recovered");
        assert_eq!(json["state"], "closed");
        assert_eq!(json["hint"], "");
    }

    #[test]
    fn one_mail_has_all_reports() {
        let (mut events, _) = overdue();
        let space = Key::new(Kind::Space, Subject::Container("nas".to_owned()));
        let found = Finding {
            cause: Cause::new(0, "min_free"),
            text: "evil\u{1b}[2J\nsecond line".to_owned(),
            hint: String::new(),
        };
        events.observe(at(1), &space, Some(&found));
        let (subject, text) = sender().mail(&pending(&events));
        assert_eq!(
            subject,
            "sprat on laptop: home@nas: the backup is overdue (code 4), and 1 more"
        );
        assert_eq!(
            text,
            "home@nas: the backup is overdue (code 4)\nSince: 2026-11-28 15:00\n\n\
             No backup since /home was moved.\n\nRun `sprat status home@nas`.\n\n\
             nas: little free space is left\nSince: 2026-11-28 16:00\n\n\
             evil\\u{1b}[2J\nsecond line\n\n\
             -- \nsprat on laptop. \"sprat status\" shows the present state.\n"
        );
    }

    /// The desktop and ntfy get no text of an event, and so no path.
    #[test]
    fn short_notice_names_no_path() {
        let (events, _) = overdue();
        let (title, text) = sender().short(&pending(&events));
        assert_eq!(title, "sprat on laptop");
        assert_eq!(text, "home@nas: the backup is overdue (code 4)");
    }

    #[test]
    fn every_kind_has_words_of_its_own() {
        let copy = Subject::Copy(CopyName::new("home", "nas"));
        let mut keys: Vec<_> = Kind::ALL
            .into_iter()
            .filter(|kind| !matches!(kind, Kind::Recovered | Kind::Digest))
            .map(|kind| Key::new(kind, copy.clone()))
            .collect();
        let nas = Subject::Container("nas".to_owned());
        keys.push(Key::damage(nas.clone(), FoundBy::Check));
        keys.push(Key::new(Kind::Failure, nas));
        keys.push(Key::new(Kind::Failure, Subject::Channel(Channel::Webhook)));
        keys.push(Key::new(Kind::Overdue, Subject::Watch("pi".to_owned())));
        let phrases: BTreeSet<_> = keys
            .iter()
            .map(|key| phrases(key.kind, &key.subject).0)
            .collect();
        assert_eq!(phrases.len(), keys.len());
    }
}
