//! `every`, `at`, `window` and `alert_after`: when copies are made, and when one is overdue.

use std::time::Duration;

use jiff::civil::{Time, Weekday};
use toml::de::DeValue;

use super::TIME_MAX;
use super::mistake::{Stops, Wrong};
use super::reader::Table;
use super::values;
use crate::day_part::DayPart;
use crate::due::{At, AtTime, Schedule};
use crate::timer::RUN_EVERY_MINUTES;

const DAY: Duration = Duration::from_secs(86_400);
const QUARTER: Duration = Duration::from_secs(15 * 60);
const DAYS: [(&str, Weekday); 7] = [
    ("Mon", Weekday::Monday),
    ("Tue", Weekday::Tuesday),
    ("Wed", Weekday::Wednesday),
    ("Thu", Weekday::Thursday),
    ("Fri", Weekday::Friday),
    ("Sat", Weekday::Saturday),
    ("Sun", Weekday::Sunday),
];

/// Reads `every` or `at`. The one that stands in a job replaces both of `[job_defaults]`.
pub(super) fn read(table: &mut Table<'_, '_, '_>) -> Schedule {
    let keys = ["every", "at"];
    let is_own = keys.iter().any(|key| table.has_own(key));
    let counts = |table: &Table<'_, '_, '_>, key: &str| match is_own {
        true => table.has_own(key),
        false => table.has(key),
    };
    let (every, at) = (counts(table, "every"), counts(table, "at"));
    table.knows("every");
    table.knows("at");
    if every && at {
        table.mistake("at", "`at`: a job has either `at` or `every`");
    }
    if at {
        let times = table.list("at", at_time);
        if times.is_empty() && table.find("at").is_some_and(|(_, v)| is_empty_list(v)) {
            table.mistake("at", "`at`: the list is empty");
        }
        return Schedule::At(At {
            times: times.into_iter().map(|(_, time)| time).collect(),
            later: Duration::ZERO,
        });
    }
    let range = QUARTER..=TIME_MAX;
    let every = match every {
        true => table.value("every", |value| values::duration_or_never(value, &range)),
        false => {
            table.default("every", "1 day".into());
            None
        }
    };
    match every {
        Some(Some(time)) => Schedule::Every(time),
        Some(None) => Schedule::Never,
        None => Schedule::Every(DAY),
    }
}

fn is_empty_list(value: &DeValue<'_>) -> bool {
    value.as_array().is_some_and(|list| list.is_empty())
}

/// The value of `alert_after`; `None`: never.
pub(super) fn alert_time(value: &DeValue<'_>) -> Result<Option<Duration>, Wrong> {
    values::duration_or_never(value, &(Duration::from_secs(1)..=TIME_MAX))
}

/// Reads `alert_after`, whose default depends on the schedule. It is checked against the schedule only
/// in a job: in `[job_defaults]` the schedule may be another one.
pub(super) fn alert_after(
    table: &mut Table<'_, '_, '_>,
    schedule: &Schedule,
    stops: &Stops,
) -> Option<Duration> {
    let gap = schedule.longest_gap();
    let default = gap.map(|gap| gap * 2 + DAY);
    let set = table.value("alert_after", alert_time);
    if !table.has("alert_after") {
        let shown = default.map_or_else(|| "never".to_owned(), values::duration_text);
        table.default("alert_after", shown.into());
    }
    if let (Some(Some(set)), Some(gap), Some(spot)) = (set, gap, table.spot_of("alert_after"))
        && set <= gap
    {
        let what = format!(
            "`alert_after`: it must be longer than {}, the time between two copies",
            values::duration_text(gap)
        );
        table.reader.mistake(&spot.that_stops(stops.clone()), what);
    }
    // By hand only: never overdue.
    gap.and(set.unwrap_or(default))
}

/// A time of `at` outside of the window would never begin a copy. A window that the timer may not meet is
/// a warning.
pub(super) fn check_window(
    table: &Table<'_, '_, '_>,
    schedule: &Schedule,
    window: Option<DayPart>,
    stops: &Stops,
) {
    let Some(window) = window else { return };
    let warn_if_short = |begin: Time, key: &str| {
        let minute = |time: Time| i16::from(time.hour()) * 60 + i16::from(time.minute());
        let minutes = (minute(window.to) - minute(begin)).rem_euclid(24 * 60);
        if minutes < i16::from(RUN_EVERY_MINUTES) {
            let what = format!(
                "`{key}`: only {minutes} min of `window` follow {}. The timer calls sprat every \
                 {RUN_EVERY_MINUTES} min, so it may never begin a copy in that time",
                begin.strftime("%H:%M")
            );
            table.warn(key, what);
        }
    };
    let at = match schedule {
        Schedule::Every(_) => return warn_if_short(window.from, "window"),
        Schedule::Never => return,
        Schedule::At(at) => at,
    };
    for at in at.times.iter().filter(|at| window.contains(at.time())) {
        warn_if_short(at.time(), "at");
    }
    let outside = at.times.iter().find(|at| !window.contains(at.time()));
    if let (Some(at), Some(spot)) = (outside, table.spot_of("at")) {
        let what = format!(
            "`at`: {} is outside of `window`",
            at.time().strftime("%H:%M")
        );
        table.reader.mistake(&spot.that_stops(stops.clone()), what);
    }
}

/// `[DAYS] HH:MM`; DAYS is a list of days and of ranges of days, such as `Mon,Wed` or `Mon-Fri`.
pub(super) fn at_time(value: &DeValue<'_>) -> Result<AtTime, Wrong> {
    let shown = values::text(value)?;
    let (days, time) = match shown.trim().rsplit_once(' ') {
        Some((days, time)) => (Some(days.trim()), time),
        None => (None, shown.trim()),
    };
    let Some(time) = values::time_of_day(time) else {
        return Err(Wrong::because(format!(
            "{shown:?}: write a time such as 02:30 or Mon-Fri 02:30"
        )));
    };
    let Some(names) = days else {
        return Ok(AtTime::daily(time));
    };
    let mut days = [false; 7];
    for part in names.split(',') {
        let (first, last) = match part.split_once('-') {
            Some((first, last)) => (weekday(first)?, weekday(last)?),
            None => (weekday(part)?, weekday(part)?),
        };
        let mut day = first;
        loop {
            days[day] = true;
            if day == last {
                break;
            }
            day = (day + 1) % 7;
        }
    }
    let days = DAYS.iter().zip(days).filter(|(_, counts)| *counts);
    Ok(AtTime::on(days.map(|((_, day), _)| *day), time))
}

/// 0 for Monday.
fn weekday(name: &str) -> Result<usize, Wrong> {
    let name = name.trim();
    let found = DAYS
        .iter()
        .position(|(day, _)| day.eq_ignore_ascii_case(name));
    found.ok_or_else(|| Wrong::not_one_of(name, &DAYS.map(|(day, _)| day)))
}
