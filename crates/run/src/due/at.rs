//! Occurrences of `at`: times of the day in a zone, with its nights on which clocks change.

use std::time::Duration;

use jiff::Timestamp;
use jiff::civil::{Date, Time, Weekday};
use jiff::tz::TimeZone;

use crate::times::add;

/// One time of the day, on some days of the week.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AtTime {
    /// Monday is the first.
    days: [bool; 7],
    time: Time,
}

impl AtTime {
    /// On these days, at this time.
    #[must_use]
    pub fn on(days: impl IntoIterator<Item = Weekday>, time: Time) -> Self {
        let mut set = [false; 7];
        for day in days {
            set[index(day)] = true;
        }
        Self { days: set, time }
    }

    /// Each day at this time.
    #[must_use]
    pub fn daily(time: Time) -> Self {
        let days = [true; 7];
        Self { days, time }
    }

    /// The days of the week, from Monday on.
    pub fn days(&self) -> impl Iterator<Item = Weekday> {
        let numbers = (0_i8..).zip(self.days).filter(|(_, counts)| *counts);
        numbers.filter_map(|(number, _)| Weekday::from_monday_zero_offset(number).ok())
    }

    /// The time of the day.
    #[must_use]
    pub fn time(&self) -> Time {
        self.time
    }
}

/// All times of the day at which a copy is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct At {
    /// In any order.
    pub times: Vec<AtTime>,
    /// How much later each occurrence is ([`spread_part`]).
    pub later: Duration,
}

impl At {
    /// The first occurrence after `after`; `None` if there is none.
    ///
    /// In a gap of the clocks an occurrence is later by the gap. Of a time that comes twice the
    /// first counts.
    #[must_use]
    pub fn next_after(&self, zone: &TimeZone, after: Timestamp) -> Option<Timestamp> {
        let civil = after.saturating_sub(self.later).ok()?;
        // A whole day may be missing in a zone, so the search begins some days before.
        let mut date = zone.to_datetime(civil).date();
        for _ in 0..2 {
            date = date.yesterday().ok()?;
        }
        // Each weekday comes once in seven days. The others are for the days before.
        for _ in 0..11 {
            let occurrences = self.occurrences_on(zone, date);
            if let Some(first) = occurrences.filter(|found| *found > after).min() {
                return Some(first);
            }
            date = date.tomorrow().ok()?;
        }
        None
    }

    /// The longest time between two occurrences, in a week without a change of the clocks. `None`
    /// if there is no occurrence.
    #[must_use]
    pub fn longest_gap(&self) -> Option<Duration> {
        let minute = |day: usize, time: Time| {
            let minutes = u64::from(time.hour().unsigned_abs()) * 60;
            (day as u64) * 24 * 60 + minutes + u64::from(time.minute().unsigned_abs())
        };
        let mut minutes: Vec<u64> = self
            .times
            .iter()
            .flat_map(|at| {
                let days = (0..7).filter(|day| at.days[*day]);
                days.map(|day| minute(day, at.time))
            })
            .collect();
        minutes.sort_unstable();
        let over_the_week_end = minutes.first()? + 7 * 24 * 60 - minutes.last()?;
        let gaps = minutes.windows(2).map(|pair| pair[1] - pair[0]);
        let longest = gaps.max().unwrap_or(0).max(over_the_week_end);
        Some(Duration::from_secs(longest * 60))
    }

    fn occurrences_on(&self, zone: &TimeZone, date: Date) -> impl Iterator<Item = Timestamp> {
        let today = index(date.weekday());
        self.times
            .iter()
            .filter(move |at| at.days[today])
            .filter_map(move |at| zone.to_timestamp(date.to_datetime(at.time)).ok())
            .map(|civil| add(civil, self.later))
    }
}

fn index(day: Weekday) -> usize {
    usize::try_from(day.to_monday_zero_offset()).unwrap_or(0)
}

/// The part of `spread` by which one copy of one machine is later: whole seconds, the same each day.
#[must_use]
pub fn spread_part(spread: Duration, machine_id: &str, job: &str, container: &str) -> Duration {
    let name = format!("{machine_id}\0{job}\0{container}");
    let hash = openssl::sha::sha256(name.as_bytes());
    let mut number = [0; 8];
    number.copy_from_slice(&hash[..8]);
    let seconds = (u128::from(spread.as_secs()) * u128::from(u64::from_be_bytes(number))) >> 64;
    Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}
