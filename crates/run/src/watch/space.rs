//! Room in a container: whether an event is open, and the date when the volume is full.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use sprat_session::Exit;
use sprat_session::state::history::History;
use sprat_session::text::bytes;

use crate::notify::{Cause, Finding};
use crate::times::add;

/// The growth of this time counts.
const LOOK_BACK: SignedDuration = SignedDuration::from_hours(30 * 24);
/// A shorter time shows no growth.
const LOOK_BACK_MIN: SignedDuration = SignedDuration::from_hours(7 * 24);
/// A volume that is full within this time opens an event.
const FULL_WITHIN: Duration = Duration::from_secs(14 * 24 * 3600);

/// When the volume is full, if it grows as in the last 30 days; `None`: it does not grow, or that is not
/// known yet.
#[must_use]
pub fn full_on(history: &History, now: Timestamp) -> Option<Timestamp> {
    let used = |seen: &sprat_session::state::history::SeenRoom| {
        let room = &seen.room;
        room.total_bytes.saturating_sub(room.available_bytes)
    };
    let last = history.room.as_ref()?;
    let first = history
        .room_by_day
        .iter()
        .find(|seen| now.duration_since(seen.at) <= LOOK_BACK)?;
    let time = last.at.duration_since(first.at);
    if time < LOOK_BACK_MIN {
        return None;
    }
    let grown = used(last)
        .checked_sub(used(first))
        .filter(|grown| *grown > 0)?;
    let seconds = u128::try_from(time.as_secs()).ok()?;
    let left = u128::from(last.room.available_bytes) * seconds / u128::from(grown);
    let left = u64::try_from(left).unwrap_or(u64::MAX);
    // A hundred years are as good as never.
    (left < 100 * 366 * 86_400).then(|| add(last.at, Duration::from_secs(left)))
}

/// What is wrong with the room; `None`: nothing is known of it. `Some(None)`: nothing is wrong.
pub(super) fn finding(history: &History, min_free: u64, now: Timestamp) -> Option<Option<Finding>> {
    if history.server.is_none() && history.room.is_none() {
        return None;
    }
    let found = |class: &str, text: String, hint: &str| Finding {
        cause: Cause::new(Exit::Failed.code(), class),
        text,
        hint: hint.to_owned(),
    };
    let server = history
        .server
        .as_ref()
        .and_then(|seen| seen.available_bytes);
    if let Some(free) = server.filter(|free| *free < min_free) {
        let text = format!(
            "{} are free on the server. No backup begins below {} (min_free).",
            bytes(free),
            bytes(min_free)
        );
        let hint = "Nothing is lost. Free space there, or run `sprat prune` and `sprat trim`.";
        return Some(Some(found("min_free", text, hint)));
    }
    let room = history.room.as_ref()?;
    if room.room.is_low() {
        let mut text = format!(
            "{} of {} are free in the volume.",
            bytes(room.room.available_bytes),
            bytes(room.room.total_bytes)
        );
        if let Some(metadata) = room.room.metadata {
            let (left, all) = (metadata.available_bytes, metadata.total_bytes);
            text += &format!(" For metadata: {} of {}.", bytes(left), bytes(all));
        }
        let hint = "Run `sprat prune`, or enlarge the container with `sprat grow`.";
        return Some(Some(found("volume_low", text, hint)));
    }
    let soon = full_on(history, now).filter(|full| *full <= add(now, FULL_WITHIN));
    Some(soon.map(|full| {
        let text = format!(
            "If the volume grows as in the last 30 days, it is full on {}.",
            full.strftime("%Y-%m-%d")
        );
        let hint = "Run `sprat prune`, or enlarge the container with `sprat grow`.";
        found("full_soon", text, hint)
    }))
}

#[cfg(test)]
mod tests {
    use sprat_session::VolumeRoom;

    use super::*;

    const GIB: u64 = 1 << 30;

    fn day(number: i64) -> Timestamp {
        Timestamp::from_second(1_795_874_400 + number * 86_400).unwrap()
    }

    /// One session a day; `free` GiB of 1000 at the end of each.
    fn history(free: impl IntoIterator<Item = u64>) -> History {
        let mut history = History::default();
        for (number, free) in free.into_iter().enumerate() {
            let room = VolumeRoom {
                total_bytes: 1000 * GIB,
                available_bytes: free * GIB,
                inodes: 100,
                free_inodes: 100,
                metadata: None,
            };
            history.saw_room(day(i64::try_from(number).unwrap()), room);
        }
        history
    }

    #[test]
    fn volume_is_full_by_the_growth_of_the_last_30_days() {
        // 2 GiB a day.
        let steady = history((0..20).map(|number| 500 - 2 * number));
        assert_eq!(full_on(&steady, day(19)), Some(day(19 + 231)));
        // Only the last 30 days count: then it grows by 10 GiB a day.
        let faster = (0..60).map(|number| if number < 29 { 900 } else { 1190 - 10 * number });
        assert_eq!(full_on(&history(faster), day(59)), Some(day(59 + 60)));
        // Too short, shrinking, and never.
        for free in [
            &[500, 400, 300][..],
            &[300, 310, 320, 330, 340, 350, 360, 370, 380],
        ] {
            let len = i64::try_from(free.len()).unwrap();
            assert_eq!(full_on(&history(free.to_vec()), day(len)), None, "{free:?}");
        }
        assert_eq!(full_on(&History::default(), day(0)), None);
    }

    #[test]
    fn event_opens_below_min_free_below_5_percent_and_14_days_before_it_is_full() {
        let class = |history: &History, at| {
            let found = finding(history, GIB, at);
            found.map(|found| found.map(|found| found.cause.class))
        };
        assert_eq!(class(&History::default(), day(0)), None);
        let mut fine = history([500; 10]);
        assert_eq!(class(&fine, day(9)), Some(None));
        let some = |class: &str| Some(Some(class.to_owned()));
        fine.saw_server(day(9), Some(GIB - 1));
        assert_eq!(class(&fine, day(9)), some("min_free"));
        fine.saw_server(day(9), Some(GIB));
        assert_eq!(class(&fine, day(9)), Some(None));
        assert_eq!(class(&history([49]), day(0)), some("volume_low"));
        // 20 GiB a day, and 300 GiB are left: 15 days.
        let growing = history((0..11).map(|number| 500 - 20 * number));
        assert_eq!(class(&growing, day(10)), Some(None));
        assert_eq!(class(&growing, day(11)), some("full_soon"));
    }
}
