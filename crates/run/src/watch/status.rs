//! What `status` reports of one container: what its server reports, what this machine knows, and its copies.

use jiff::Timestamp;
use serde_json::{Map, Value, json};
use sprat_session::Exit;
use sprat_session::address::Target;
use sprat_session::json::{exit_json, failure_json};
use sprat_session::state::checks::KeptCheck;
use sprat_session::status::{ContainerStatus, LocalStatus};

use super::{ContainerView, CopyView, space};
use crate::notify::{Event, Events, Kind};

/// One container.
#[derive(Debug)]
pub struct ContainerReport {
    /// Its name in the config, else the file's name without `.luks`.
    pub name: String,
    /// Its location.
    pub target: Target,
    /// What its server reports, and what this machine knows of it.
    pub status: ContainerStatus,
    /// The copies of the config in it that are to be shown.
    pub copies: Vec<CopyView>,
    /// `min_free`; 0 for a container that is not in the config.
    pub min_free: u64,
    /// The open events of the container and of its copies.
    pub events: Vec<Event>,
}

impl ContainerReport {
    /// The code of it: what is wrong now comes first.
    #[must_use]
    pub fn exit(&self, now: Timestamp) -> Exit {
        // What is known of a copy counts more than what was noted for a person.
        let has_state = |job: &str| {
            let mut copies = self.copies.iter();
            copies.any(|copy| copy.copy.job == job && copy.state.last_attempt.is_some())
        };
        let copies = self.copies.iter().map(CopyView::exit);
        let space = self.status.known().and_then(|known| {
            space::finding(&known.history, self.min_free, now)?.map(|_| Exit::Failed)
        });
        let others = self.status.exits(has_state);
        let events = super::overview::of_events(self.events.iter());
        super::overview::worst(copies.chain(space).chain(others).chain([events]))
    }

    /// As JSON. Fields are added, never renamed or removed.
    #[must_use]
    pub fn json(&self, now: Timestamp) -> Value {
        let known = self.status.known();
        let history = known.map(|known| &known.history);
        let full = history.and_then(|history| space::full_on(history, now));
        json!({
            "name": self.name,
            "target": self.target.to_string(),
            "uuid": known.map(|known| &known.uuid),
            "server": self.status.server.as_ref().and_then(|server| server.as_ref().ok()),
            "failure": self.status.failure().as_ref().map(failure_json),
            "volume": history.and_then(|history| history.room.as_ref()),
            "full_on": full,
            "snapshots_gone": history.and_then(|history| history.gone.as_ref()),
            "written_bytes": known.and_then(|known| known.written_bytes),
            "jobs": self.jobs_json(),
            "jobs_never_run": self.status.never_run().collect::<Vec<_>>(),
            "checks": known.map(checks_json),
            "drill": known.and_then(|known| known.checks.drill.as_ref()).map(check_json),
            "recovery_drill": known.and_then(|known| known.checks.recovery.as_ref()).map(check_json),
            "key_proved": known.and_then(|known| known.proved),
            "events": self.events.iter().map(event_json).collect::<Vec<_>>(),
        })
    }

    /// What sessions noted of each job, and what is known of its copy.
    fn jobs_json(&self) -> Value {
        let history = self.status.known().map(|known| &known.history);
        if history.is_none() && self.copies.is_empty() {
            return Value::Null;
        }
        let mut jobs = Map::new();
        for (job, noted) in history.iter().flat_map(|history| &history.jobs) {
            let noted = json!({
                "last_run": noted.last_run,
                "last_snapshot": noted.last_snapshot,
                "in_config": self.status.in_config(job),
            });
            jobs.insert(job.clone(), noted);
        }
        for copy in &self.copies {
            let job = jobs.entry(copy.copy.job.clone()).or_insert_with(
                || json!({ "last_run": null, "last_snapshot": null, "in_config": true }),
            );
            let growth = self.event(Kind::Growth, copy);
            if let (Some(job), Value::Object(fields)) = (job.as_object_mut(), copy.json(growth)) {
                job.extend(fields);
            }
        }
        jobs.into()
    }

    fn event(&self, kind: Kind, copy: &CopyView) -> Option<&Event> {
        let mut events = self.events.iter();
        events.find(|event| event.key.kind == kind && event.key.subject.copy() == Some(&copy.copy))
    }
}

impl CopyView {
    /// What the state folder knows of it, as fields of the job.
    fn json(&self, growth: Option<&Event>) -> Value {
        let state = &self.state;
        let attempt = state.last_attempt.as_ref().map(|last| {
            json!({
                "started": last.started,
                "ended": last.ended,
                "exit": last.exit,
                "code": last.exit.code(),
                "reason": last.reason,
            })
        });
        json!({
            "last_success": state.last_success,
            "last_complete": state.last_complete,
            "last_attempt": attempt,
            "failures_since": state.failures_since,
            "due": self.decision.due,
            "next": self.decision.next,
            "overdue": self.is_overdue,
            "overdue_at": self.overdue_at,
            "held": state.held.as_ref().map(|held| json!({
                "since": held.since,
                "reason": held.reason,
            })),
            "changed": state.changed.as_ref().map(|changed| json!({
                "since": changed.since,
                "reason": changed.reason,
            })),
            "changed_silently": state.silent.as_ref().map(|silent| json!({
                "since": silent.since,
                "count": silent.count,
                "files": silent.files.iter().map(|file| &file.path).collect::<Vec<_>>(),
            })),
            "skipped": state.skipped.as_ref().map(|skipped| json!({
                "at": skipped.at,
                "reason": skipped.reason,
            })),
            "growth": growth.map(|event| json!({
                "since": event.opened,
                "text": event.text,
            })),
        })
    }
}

impl ContainerView {
    /// The open events of it and of its copies.
    #[must_use]
    pub fn events(name: &str, events: &Events) -> Vec<Event> {
        let of_it = |event: &&Event| event.key.subject.container() == Some(name);
        events.open().filter(of_it).cloned().collect()
    }
}

/// An open event as JSON.
#[must_use]
pub fn event_json(event: &Event) -> Value {
    let subject = &event.key.subject;
    json!({
        "id": event.id,
        "kind": event.key.kind,
        "subject": subject.to_string(),
        "copy": subject.copy().map(ToString::to_string),
        "container": subject.container(),
        "opened": event.opened,
        "closed": event.closed,
        "cause": { "code": event.cause.code, "class": event.cause.class },
        "text": event.text,
        "hint": event.hint,
    })
}

fn checks_json(known: &LocalStatus) -> Value {
    let each = known
        .each_check()
        .map(|(kind, check)| (kind, check_json(check)));
    each.collect::<Map<_, _>>().into()
}

fn check_json(check: &KeptCheck) -> Value {
    json!({
        "at": check.at,
        "result": exit_json(check.exit),
        "finished": check.finished,
    })
}
