//! How fast data may be uploaded, by the time of the day. The volume process asks for each write, so a change of
//! the hour counts for a session under way.

use jiff::Timestamp;
use jiff::civil::Time;
use serde::{Deserialize, Serialize};
use sprat_snapshot::time_zone;
use sprat_volume::UploadRate;

use crate::day_part::DayPart;

/// Limits in parts of the day; there is no limit outside of them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UploadRates {
    /// The time zone of the parts, as in the config.
    pub time_zone: String,
    /// Each part, and how many bytes per second may be sent in it. The first that fits counts.
    pub parts: Vec<(DayPart, u64)>,
}

impl UploadRates {
    /// The limit at a time of the day, in bytes per second.
    #[must_use]
    pub fn at(&self, time: Time) -> Option<u64> {
        let mut now = self.parts.iter().filter(|(part, _)| part.contains(time));
        now.next().map(|(_, rate)| *rate)
    }

    /// For the volume; `None`: there is never a limit.
    pub(crate) fn rate(&self) -> Option<UploadRate> {
        if self.parts.is_empty() {
            return None;
        }
        // A zone that is gone since the config was read: its hours are then those of UTC, and the limits stay.
        let zone = time_zone(&self.time_zone).unwrap_or(jiff::tz::TimeZone::UTC);
        let rates = self.clone();
        Some(UploadRate::new(move || {
            rates.at(zone.to_datetime(Timestamp::now()).time())
        }))
    }
}
