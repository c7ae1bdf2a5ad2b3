//! Separates the header changes of two sessions if a write of the first one arrives late.
//!
//! A machine that went to sleep in the middle of a change may still have one write on its way, which no
//! lease can stop: a key slot's area, or one copy of the header. It must not damage what another machine
//! has changed since.
//!
//! - The sequence increases more under a later lease, and far more if a write of an earlier session may still
//!   arrive. So a late copy is always the older one of the two, and is repaired.
//! - The places for new areas form eight groups. The number of the lease selects the group, and the place in
//!   it is random. So a late area overwrites a used one only by chance, and never if the numbers differ by
//!   less than eight.

use std::ops::Range;

use openssl::rand::rand_bytes;

use crate::LuksError;

/// Areas begin at multiples of this (cryptsetup: lib/luks2/luks2_json_metadata.c,
/// `LUKS2_find_area_gap`).
const AREA_ALIGNMENT: u64 = 4096;

/// The increase of the sequence if a higher one than the one in the header may exist: after a takeover,
/// or when a header is restored over an unknown one. Many times more than a change of keys adds, and a
/// small part of `SEQUENCE_STEP_MAX` in `copies.rs`.
pub(crate) const SEQUENCE_JUMP: u64 = 1 << 27;

/// The highest lease that increases the step. All later ones add the same. If two sessions both follow a
/// takeover and both have such a lease, their order is random.
const LEASE_MAX: u64 = 1 << 16;

/// The number of groups of places for areas.
const GROUPS: u64 = 8;

/// Identifies the session that changes a header, to separate its writes from those of other sessions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Turn {
    /// The number of the session's lease, counted from 1. A later session has a higher one.
    pub lease: u64,
    /// Writes of an earlier session may still arrive.
    pub after_takeover: bool,
}

impl Turn {
    /// How much this session's change increases the sequence. At least 256, at most 2²⁷ + 2²⁵.
    pub(crate) fn sequence_step(self) -> Result<u64, LuksError> {
        let [chance] = random()?;
        let jump = if self.after_takeover {
            SEQUENCE_JUMP
        } else {
            0
        };
        // Two sessions may have the same lease. The random part makes their sequences differ.
        Ok(jump + (self.lease.clamp(1, LEASE_MAX) << 8 | u64::from(chance)))
    }

    /// Whether an area of an earlier session can be at this place only by chance.
    pub(crate) fn owns(self, space: &Range<u64>, area: &Range<u64>) -> bool {
        let unit = unit(area.end - area.start);
        let from_begin = area.start.saturating_sub(space.start);
        from_begin.is_multiple_of(unit) && self.is_in_group(from_begin / unit)
    }

    /// A free place for an area of `len` bytes: one in this session's group, or else any other place, or
    /// else, among areas of other lengths, the first gap that is long enough.
    pub(crate) fn place(
        self,
        space: &Range<u64>,
        taken: &mut [Range<u64>],
        len: u64,
    ) -> Result<Option<u64>, LuksError> {
        let unit = unit(len);
        let places = (space.end.saturating_sub(space.start)) / unit;
        let range = |place: u64| {
            let begin = space.start + place * unit;
            begin..begin + unit
        };
        let free: Vec<u64> = (0..places)
            .filter(|place| !taken.iter().any(|used| overlap(used, &range(*place))))
            .collect();
        let own: Vec<u64> = free
            .iter()
            .copied()
            .filter(|place| self.is_in_group(*place))
            .collect();
        let from = if own.is_empty() { &free } else { &own };
        if from.is_empty() {
            return Ok(gap(space, taken, len));
        }
        let chance = u64::from_le_bytes(random()?) % from.len() as u64;
        let chosen = usize::try_from(chance).ok().and_then(|nth| from.get(nth));
        Ok(chosen.map(|place| range(*place).start))
    }

    fn is_in_group(self, place: u64) -> bool {
        place % GROUPS == self.lease % GROUPS
    }
}

pub(crate) fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
}

fn unit(len: u64) -> u64 {
    len.max(1).next_multiple_of(AREA_ALIGNMENT)
}

/// The first gap of `len` bytes. Sorts `taken`.
fn gap(space: &Range<u64>, taken: &mut [Range<u64>], len: u64) -> Option<u64> {
    taken.sort_by_key(|range| range.start);
    let mut at = space.start;
    for range in taken.iter() {
        if range.start.saturating_sub(at) >= len {
            return Some(at);
        }
        at = at.max(range.end).next_multiple_of(AREA_ALIGNMENT);
    }
    (space.end.saturating_sub(at) >= len).then_some(at)
}

fn random<const N: usize>() -> Result<[u8; N], LuksError> {
    let mut bytes = [0; N];
    rand_bytes(&mut bytes).map_err(|source| LuksError::Crypto {
        op: "choose a place by chance",
        source,
    })?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPACE: Range<u64> = 32 << 10..16 << 20;
    const AREA: u64 = 258_048;

    fn turn(lease: u64) -> Turn {
        Turn {
            lease,
            after_takeover: false,
        }
    }

    #[test]
    fn a_later_session_always_has_the_higher_sequence() {
        let step = |lease, after_takeover| {
            let turn = Turn {
                lease,
                after_takeover,
            };
            turn.sequence_step().unwrap()
        };
        for lease in [0, 1, 2, 7, 1000, LEASE_MAX - 1] {
            assert!(step(lease, false) >= 256);
            assert!(step(lease.max(1) + 1, false) > step(lease, false));
            assert!(step(lease.max(1) + 1, true) > step(lease, true), "{lease}");
        }
        for lease in [LEASE_MAX, 1 << 40, u64::MAX] {
            assert!(step(1, true) > step(lease, false), "{lease}");
            assert!(step(lease, true) < SEQUENCE_JUMP + (1 << 25), "{lease}");
        }
    }

    #[test]
    fn sessions_with_close_numbers_never_choose_the_same_place() {
        let used = SPACE.start..SPACE.start + AREA;
        for _ in 0..200 {
            let place = |lease| {
                let place =
                    turn(lease).place(&SPACE, std::slice::from_mut(&mut used.clone()), AREA);
                place.unwrap().unwrap()
            };
            let places: Vec<u64> = (100..108).map(place).collect();
            for (nth, one) in places.iter().enumerate() {
                let area = *one..*one + AREA;
                assert!(area.start >= used.end && area.end <= SPACE.end);
                assert_eq!(one % AREA_ALIGNMENT, 0);
                for other in &places[..nth] {
                    assert!(!overlap(&area, &(*other..*other + AREA)), "{places:?}");
                }
            }
        }
    }

    #[test]
    fn the_last_free_places_are_used_whatever_their_group() {
        let mut taken: Vec<Range<u64>> = Vec::new();
        // 64 places of this length.
        for _ in 0..64 {
            let place = turn(3).place(&SPACE, &mut taken, AREA).unwrap().unwrap();
            let area = place..place + AREA;
            assert!(!taken.iter().any(|used| overlap(used, &area)));
            taken.push(area);
        }
        assert_eq!(turn(3).place(&SPACE, &mut taken, AREA).unwrap(), None);
        // A shorter one still fits after them.
        let short = turn(3).place(&SPACE, &mut taken, 131_072).unwrap();
        assert_eq!(short, Some(SPACE.start + 64 * AREA));
    }
}
