//! A part of the day, for `window` and for rates by the hour.

use jiff::civil::Time;
use serde::{Deserialize, Serialize};

/// Times of the day, from `from` until before `to`. If `from` is not before `to`, it goes over
/// midnight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DayPart {
    /// The beginning.
    pub from: Time,
    /// The end.
    pub to: Time,
}

impl DayPart {
    /// The whole day.
    pub const WHOLE: Self = Self {
        from: Time::MIN,
        to: Time::MIN,
    };

    /// Whether a time of the day is in it.
    #[must_use]
    pub fn contains(&self, time: Time) -> bool {
        if self.from < self.to {
            self.from <= time && time < self.to
        } else {
            self.from <= time || time < self.to
        }
    }

    /// Whether any time is in both.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        self.contains(other.from) || other.contains(self.from)
    }
}
