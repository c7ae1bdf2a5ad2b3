//! When a digest is due, and what it reports.

use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use sprat_session::Exit;

use super::{Overview, space};
use crate::config::{self, Notify};
use crate::copy_name::CopyName;
use crate::due::{At, AtTime};
use crate::notify::digest::{ContainerDigest, CopyDigest, Digest};
use crate::notify::{Delivery, Event, Events, Report, State};
use crate::run_history::RunLine;

/// A key that nobody rehearsed for so long stands in the digest.
const REHEARSE_WITHIN: jiff::SignedDuration = jiff::SignedDuration::from_hours(365 * 24);

/// Whether a digest is due, after one at `last`.
pub(super) fn is_due(notify: &Notify, zone: &TimeZone, last: Timestamp, now: Timestamp) -> bool {
    let time = match notify.digest {
        config::Digest::Never => return false,
        config::Digest::Daily => AtTime::daily(notify.digest_at.time()),
        config::Digest::Weekly => notify.digest_at,
    };
    let at = At {
        times: vec![time],
        later: Duration::ZERO,
    };
    at.next_after(zone, last).is_some_and(|next| next <= now)
}

/// What happened since `from`.
pub(super) fn digest(
    overview: &Overview,
    events: &Events,
    delivery: &Delivery,
    from: Timestamp,
    until: Timestamp,
) -> Digest {
    let copies = overview.copies.iter().zip(&overview.attempts);
    let copies = copies.map(|(view, lines)| CopyDigest {
        last_success: view.state.last_success,
        is_overdue: view.is_overdue,
        is_state_unread: view.unread.is_some(),
        is_history_unread: lines.is_none(),
        ..copy(&view.copy, lines.as_deref().unwrap_or_default(), from)
    });
    let containers = overview.containers.iter().map(|view| {
        let known = view.known.as_ref();
        let history = known.map(|known| &known.history);
        let room = history.and_then(|history| history.room.as_ref());
        let full = history.and_then(|history| space::full_on(history, until));
        let proved = known.and_then(|known| known.proved);
        ContainerDigest {
            container: view.name.clone(),
            is_unread: view.is_unread,
            volume_free_bytes: room.map(|seen| seen.room.available_bytes),
            server_free_bytes: history
                .and_then(|history| history.server.as_ref())
                .and_then(|seen| seen.available_bytes),
            full_on: full.map(|full| full.to_zoned_datetime(delivery.sender.zone.clone()).date()),
            check: view
                .check()
                .map(|check| (check.at, check.exit == Exit::Done)),
            is_check_late: view.is_check_late(until),
            drill: view.drill(),
            is_key_unrehearsed: known.is_some()
                && proved.is_none_or(|proved| until.duration_since(proved) > REHEARSE_WITHIN),
        }
    });
    let open = events.open().map(|event| headline(event, delivery));
    Digest {
        from: Some(from),
        until,
        copies: copies.collect(),
        containers: containers.collect(),
        open: open.collect(),
        dropped_events: events.dropped,
    }
}

fn headline(event: &Event, delivery: &Delivery) -> String {
    delivery.sender.headline(&Report {
        id: event.id.clone(),
        state: State::Reminded,
        event: event.clone(),
    })
}

fn copy(name: &CopyName, lines: &[RunLine], from: Timestamp) -> CopyDigest {
    let is_success = |line: &&RunLine| matches!(line.code, 0 | 3);
    let since = || lines.iter().filter(|line| line.ended > from);
    let count = |is: &dyn Fn(&&RunLine) -> bool| since().filter(is).count() as u64;
    let size = lines.iter().rev().find_map(|line| line.bytes);
    let before = lines.iter().rev().filter(|line| line.ended <= from);
    let size_before = before.filter_map(|line| line.bytes).next();
    CopyDigest {
        copy: name.clone(),
        successes: count(&is_success),
        incomplete: count(&|line| line.code == 3),
        failures: count(&|line| !matches!(line.code, 0 | 3 | 130)),
        sent_bytes: since().filter_map(|line| line.sent_bytes).sum(),
        size: size.zip(size_before),
        last_success: None,
        is_overdue: false,
        is_state_unread: false,
        is_history_unread: false,
        left_out_files: since().filter_map(|line| line.newly_excluded).sum(),
    }
}
