//! The `keep_` keys: which snapshots of a job are kept.

use std::time::Duration;

use sprat_snapshot::{KeepCount, KeepRules};
use toml::de::DeValue;

use super::mistake::Wrong;
use super::reader::Table;
use super::values;

/// The largest number in a rule.
const COUNT_MAX: u32 = 10_000;

/// Reads the keys. `None`: there are none, so nothing is removed.
pub(super) fn keep(table: &mut Table<'_, '_, '_>) -> Option<KeepRules> {
    let mut first = None;
    let mut count = |table: &mut Table<'_, '_, '_>, key| {
        if table.has(key) {
            first.get_or_insert(key);
        }
        table.value(key, keep_count).unwrap_or_default()
    };
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
    let first = first.or(table.has("keep_within").then_some("keep_within"))?;
    if keep.is_empty() && table.reader.count() == before {
        let what =
            format!("`{first}`: all rules are 0; to remove nothing, write keep_last = \"all\"");
        table.mistake(first, what);
    }
    Some(keep)
}

fn keep_count(value: &DeValue<'_>) -> Result<KeepCount, Wrong> {
    if value.as_str() == Some("all") {
        return Ok(KeepCount::ALL);
    }
    let wrong = |_| Wrong::must(format!("be a whole number up to {COUNT_MAX}, or \"all\""));
    let count = values::number(value, &(0..=COUNT_MAX)).map_err(wrong)?;
    Ok(KeepCount::new(count))
}
