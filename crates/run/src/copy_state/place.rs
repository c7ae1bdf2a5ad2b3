//! Where a copy is made: what is known of the copies in one container is not true of another one.

use std::path::Path;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sprat_session::IdentityPolicy;
use sprat_session::address::Target;
use sprat_session::state::identity;

use super::{CopyState, Held, HeldWhat};

/// A container at a location.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    target: String,
    /// Of the container that this machine knows there. `None`: it has not opened one yet.
    uuid: Option<String>,
}

impl Place {
    /// The container at `target` that this machine knows.
    #[must_use]
    pub fn of(state_dir: &Path, target: &Target) -> Self {
        let uuid = match identity::policy(state_dir, target, None) {
            Ok(IdentityPolicy::Known(pins)) => Some(pins.uuid),
            _ => None,
        };
        Self {
            target: target.to_string(),
            uuid,
        }
    }

    fn is_another_than(&self, known: &Self) -> bool {
        let uuids = self.uuid.as_ref().zip(known.uuid.as_ref());
        self.target != known.target || uuids.is_some_and(|(now, before)| now != before)
    }
}

impl CopyState {
    /// The copy is made into this container. If it was another one before, nothing is known of copies in this one:
    /// the copy is due. What is known of the sources stays.
    pub fn is_at(&mut self, place: Place, now: Timestamp) {
        let known = self.place.as_ref();
        if known.is_some_and(|known| place.is_another_than(known)) {
            let of_container = |held: &Held| held.what == HeldWhat::Prune;
            *self = Self {
                place: Some(place),
                first_seen: Some(now),
                last_attempt: self.last_attempt.take(),
                bytes_moved_at: self.bytes_moved_at,
                held: self.held.take().filter(|held| !of_container(held)),
                growth_accepted: self.growth_accepted,
                changed: self.changed.take(),
                change_accepted: self.change_accepted,
                silent: self.silent.take(),
                skipped: self.skipped.take(),
                begun: self.begun.take(),
                ..Self::default()
            };
            return;
        }
        let uuid = match (known, place.uuid) {
            // What this machine knew of the container may be lost for a while.
            (Some(known), None) => known.uuid.clone(),
            (_, uuid) => uuid,
        };
        self.place = Some(Place { uuid, ..place });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(target: &str, uuid: Option<&str>) -> Place {
        Place {
            target: target.to_owned(),
            uuid: uuid.map(str::to_owned),
        }
    }

    #[test]
    fn copies_in_another_container_do_not_count() {
        let now: Timestamp = "2026-11-28T09:00Z".parse().unwrap();
        let made = |at: Option<Place>| CopyState {
            place: at,
            first_seen: Some(Timestamp::UNIX_EPOCH),
            last_success: Some(Timestamp::UNIX_EPOCH),
            held: Some(Held {
                what: HeldWhat::Prune,
                since: now,
                reason: String::new(),
            }),
            ..CopyState::default()
        };
        let old = || Some(place("nas:a.luks", Some("1")));
        for (before, after, counts) in [
            // An older sprat did not note it.
            (None, place("nas:a.luks", Some("1")), true),
            (old(), place("nas:a.luks", Some("1")), true),
            (old(), place("nas:a.luks", None), true),
            (
                Some(place("nas:a.luks", None)),
                place("nas:a.luks", Some("1")),
                true,
            ),
            (old(), place("nas:b.luks", Some("1")), false),
            (old(), place("nas:b.luks", None), false),
            // Another container was made in its place.
            (old(), place("nas:a.luks", Some("2")), false),
        ] {
            let mut state = made(before.clone());
            state.is_at(after.clone(), now);
            assert_eq!(state.last_success.is_some(), counts, "{before:?} {after:?}");
            assert_eq!(state.held.is_some(), counts);
            assert_eq!(state.first_seen == Some(now), !counts);
            // From now on it is this container.
            state.last_success = Some(now);
            state.is_at(after, now);
            assert_eq!(state.last_success, Some(now));
        }
        let mut state = made(old());
        state.is_at(place("nas:a.luks", None), now);
        state.is_at(place("nas:a.luks", Some("2")), now);
        assert_eq!(state.last_success, None, "it was lost, and is another one");
    }
}
