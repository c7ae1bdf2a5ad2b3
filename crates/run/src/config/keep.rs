//! The `keep_` keys: which snapshots of a job are kept.

use std::time::Duration;

use toml::de::DeValue;

use super::mistake::Wrong;
use super::reader::Table;
use super::values;

/// The largest number in a rule.
const COUNT_MAX: u32 = 10_000;

/// The retention rules of a job. A zero keeps nothing by that rule; [`Keep::ALL`] keeps all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Keep {
    /// `keep_last`.
    pub last: u32,
    /// `keep_hourly`.
    pub hourly: u32,
    /// `keep_daily`.
    pub daily: u32,
    /// `keep_weekly`.
    pub weekly: u32,
    /// `keep_monthly`.
    pub monthly: u32,
    /// `keep_yearly`.
    pub yearly: u32,
    /// `keep_within`.
    pub within: Duration,
}

impl Keep {
    /// `"all"`.
    pub const ALL: u32 = u32::MAX;
}

/// Reads the keys. `None`: there are none, so nothing is removed.
pub(super) fn keep(table: &mut Table<'_, '_, '_>) -> Option<Keep> {
    let mut first = None;
    let mut count = |table: &mut Table<'_, '_, '_>, key| {
        if table.has(key) {
            first.get_or_insert(key);
        }
        table.value(key, keep_count).unwrap_or(0)
    };
    let before = table.reader.count();
    let mut keep = Keep {
        last: count(table, "keep_last"),
        hourly: count(table, "keep_hourly"),
        daily: count(table, "keep_daily"),
        weekly: count(table, "keep_weekly"),
        monthly: count(table, "keep_monthly"),
        yearly: count(table, "keep_yearly"),
        within: Duration::ZERO,
    };
    let range = Duration::from_secs(1)..=super::TIME_MAX;
    let within = table.value("keep_within", |value| values::duration(value, &range));
    keep.within = within.unwrap_or_default();
    let first = first.or(table.has("keep_within").then_some("keep_within"))?;
    if keep == Keep::default() && table.reader.count() == before {
        let what =
            format!("`{first}`: all rules are 0; to remove nothing, write keep_last = \"all\"");
        table.mistake(first, what);
    }
    Some(keep)
}

fn keep_count(value: &DeValue<'_>) -> Result<u32, Wrong> {
    if value.as_str() == Some("all") {
        return Ok(Keep::ALL);
    }
    let wrong = |_| Wrong::must(format!("be a whole number up to {COUNT_MAX}, or \"all\""));
    values::number(value, &(0..=COUNT_MAX)).map_err(wrong)
}
