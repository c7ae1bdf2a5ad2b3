//! The `keep_` keys: which snapshots of a job are kept.

use std::time::Duration;

use sprat_snapshot::{KeepCount, KeepRules};
use toml::de::DeValue;

use super::mistake::{Stops, Wrong};
use super::reader::Table;
use super::values;

/// The largest number in a rule.
const COUNT_MAX: u32 = 10_000;

/// The keys, in the order of the page.
const KEYS: [&str; 7] = [
    "keep_last",
    "keep_hourly",
    "keep_daily",
    "keep_weekly",
    "keep_monthly",
    "keep_yearly",
    "keep_within",
];

/// Reads the keys. `None`: there are none, or one of them is wrong. Then nothing is removed.
pub(super) fn keep(table: &mut Table<'_, '_, '_>) -> Option<KeepRules> {
    let count =
        |table: &mut Table<'_, '_, '_>, key| table.value(key, keep_count).unwrap_or_default();
    let before = table.reader.count();
    let mut keep = KeepRules {
        last: count(table, "keep_last"),
        hourly: count(table, "keep_hourly"),
        daily: count(table, "keep_daily"),
        weekly: count(table, "keep_weekly"),
        monthly: count(table, "keep_monthly"),
        yearly: count(table, "keep_yearly"),
        within_s: 0,
    };
    let range = Duration::from_secs(1)..=super::TIME_MAX;
    let within = table.value("keep_within", |value| values::duration(value, &range));
    keep.within_s = within.unwrap_or_default().as_secs();
    let is_given = KEYS.iter().any(|key| table.has(key)) && table.reader.count() == before;
    is_given.then_some(keep)
}

/// Refuses a job whose rules keep nothing, its own and those of `[job_defaults]` together.
pub(super) fn check_keep(table: &Table<'_, '_, '_>, keep: Option<KeepRules>, stops: &Stops) {
    if !keep.is_some_and(|keep| keep.is_empty()) {
        return;
    }
    let own = KEYS.iter().find(|key| table.has_own(key));
    let Some(first) = own.or_else(|| KEYS.iter().find(|key| table.has(key))) else {
        return;
    };
    if let Some(spot) = table.spot_of(first) {
        let what =
            format!("`{first}`: all rules are 0; to remove nothing, write keep_last = \"all\"");
        table.reader.mistake(&spot.that_stops(stops.clone()), what);
    }
}

fn keep_count(value: &DeValue<'_>) -> Result<KeepCount, Wrong> {
    if value.as_str() == Some("all") {
        return Ok(KeepCount::ALL);
    }
    let wrong = |_| Wrong::must(format!("be a whole number up to {COUNT_MAX}, or \"all\""));
    let count = values::number(value, &(0..=COUNT_MAX)).map_err(wrong)?;
    Ok(KeepCount::new(count))
}
