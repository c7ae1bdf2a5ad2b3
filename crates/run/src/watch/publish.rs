//! Writes what others read: the Prometheus text file and `public/status.json`.

use std::path::Path;

use jiff::{SignedDuration, Timestamp};
use sprat_session::Exit;

use super::{Overview, Watched};
use crate::copy_state::CopyState;
use crate::metrics::{ContainerMetrics, CopyMetrics, Metrics};
use crate::notify::Events;
use crate::public_status::{
    PublicContainer, PublicCopy, PublicEvent, PublicStatus, PublicWatch, Word,
};
use crate::run_history::RunLine;

/// What is written where.
pub(super) struct To<'w> {
    /// The code of `status`.
    pub(super) code: Exit,
    pub(super) watched: &'w Watched<'w>,
    /// The file of `metrics`.
    pub(super) metrics: Option<&'w Path>,
    /// The end of the last run.
    pub(super) last_run: Option<Timestamp>,
}

/// Writes both. Metrics that can't be written are a problem; returns why the status can't.
pub(super) fn write(
    overview: &Overview,
    events: &Events,
    to: &To<'_>,
    now: Timestamp,
    problems: &mut Vec<String>,
) -> Option<String> {
    let sent = |lines: &Option<Vec<RunLine>>| {
        let mut lines = lines.iter().flatten();
        let last = lines.rfind(|line| matches!(line.code, 0 | 3));
        last.and_then(|line| line.sent_bytes)
    };
    let sent: Vec<Option<u64>> = overview.attempts.iter().map(sent).collect();
    if let Some(path) = to.metrics
        && let Err(error) = metrics(overview, events, to.last_run, &sent).write(path)
    {
        problems.push(format!("can't write {}: {error}", path.display()));
    }
    let state_dir = &to.watched.state_dir;
    let written = match to.watched.config.public_status {
        true => public(overview, events, (now, to.code), &sent).write(state_dir),
        false => PublicStatus::remove(state_dir),
    };
    let error = written.err()?;
    let path = PublicStatus::path(state_dir);
    Some(format!("can't write {}: {error}", path.display()))
}

fn last_code(state: &CopyState) -> Option<u8> {
    state.last_attempt.as_ref().map(|last| last.exit.code())
}

fn metrics(
    overview: &Overview,
    events: &Events,
    last_run: Option<Timestamp>,
    sent: &[Option<u64>],
) -> Metrics {
    let copies = overview
        .copies
        .iter()
        .zip(sent)
        .map(|(view, sent)| CopyMetrics {
            copy: view.copy.clone(),
            last_success: view.state.last_success,
            last_complete: view.state.last_complete,
            last_attempt_code: last_code(&view.state),
            failures_since_success: view.state.failures_since.into(),
            alert_after: view
                .alert_after
                .and_then(|after| SignedDuration::try_from(after).ok()),
            snapshots: view.state.snapshots,
            sent_bytes: *sent,
        });
    let containers = overview.containers.iter().map(|view| {
        let history = view.known.as_ref().map(|known| &known.history);
        ContainerMetrics {
            container: view.name.clone(),
            volume_free_bytes: history
                .and_then(|history| history.room.as_ref())
                .map(|seen| seen.room.available_bytes),
            server_free_bytes: history
                .and_then(|history| history.server.as_ref())
                .and_then(|seen| seen.available_bytes),
            check: view.check().map(|check| check.at),
            drill: view.drill().map(|(at, _)| at),
            drill_passed: view.drill().map(|(_, passed)| passed),
        }
    });
    Metrics {
        last_run,
        copies: copies.collect(),
        containers: containers.collect(),
        open_events: events.open_by_kind(),
    }
}

fn public(
    overview: &Overview,
    events: &Events,
    (now, code): (Timestamp, Exit),
    sent: &[Option<u64>],
) -> PublicStatus {
    let skipped = || Word::try_from("skipped".to_owned()).ok();
    let copies = overview.copies.iter().zip(sent).map(|(view, sent)| {
        let state = &view.state;
        PublicCopy {
            copy: view.copy.clone(),
            last_success: state.last_success,
            last_complete: state.last_complete,
            last_attempt: state.last_attempt.as_ref().map(|last| last.started),
            last_code: last_code(state),
            failures_since: state.failures_since.into(),
            due: view.decision.due,
            next: view.decision.next,
            overdue: view.is_overdue,
            alert_after_seconds: view
                .alert_after
                .and_then(|after| i64::try_from(after.as_secs()).ok()),
            overdue_at: view.overdue_at,
            held: state.held.is_some(),
            skipped: state.skipped.as_ref().and_then(|_| skipped()),
            sent_bytes: *sent,
            snapshots: view.state.snapshots,
        }
    });
    let containers = overview.containers.iter().map(|view| {
        let known = view.known.as_ref();
        let history = known.map(|known| &known.history);
        PublicContainer {
            name: view.name.clone(),
            volume_free_bytes: history
                .and_then(|history| history.room.as_ref())
                .map(|seen| seen.room.available_bytes),
            server_free_bytes: history
                .and_then(|history| history.server.as_ref())
                .and_then(|seen| seen.available_bytes),
            check: view.check().map(|check| check.at),
            drill: view.drill().map(|(at, _)| at),
            drill_passed: view.drill().map(|(_, passed)| passed),
            key_rehearsed: known.and_then(|known| known.proved),
        }
    });
    let watches = overview.watches.iter().map(|view| PublicWatch {
        name: view.name.clone(),
        last_written: view.last_written,
        overdue: view.is_overdue,
        overdue_at: view.overdue_at,
    });
    PublicStatus {
        schema: 1,
        at: now,
        code: code.code(),
        copies: copies.collect(),
        containers: containers.collect(),
        events: events.open().map(PublicEvent::of).collect(),
        watches: watches.collect(),
    }
}
