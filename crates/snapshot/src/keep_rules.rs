//! The retention rules of a job, and how many periods a rule keeps.

use std::fmt;
use std::str::FromStr;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The largest number in a rule. Who wants more wants `all`.
const COUNT_MAX: u32 = 10_000;

/// How many snapshots, or periods with a snapshot, a rule keeps: 0 to 10,000, or all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct KeepCount(u32);

impl KeepCount {
    /// Every one.
    pub const ALL: Self = Self(u32::MAX);

    /// The first `number`; more than 10,000 counts as 10,000.
    #[must_use]
    pub const fn new(number: u32) -> Self {
        Self(if number > COUNT_MAX {
            COUNT_MAX
        } else {
            number
        })
    }

    /// Whether the rule keeps nothing.
    #[must_use]
    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// The number, with [`KeepCount::ALL`] as the largest one.
    pub(crate) const fn limit(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for KeepCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::ALL => f.write_str("all"),
            Self(number) => write!(f, "{number}"),
        }
    }
}

impl FromStr for KeepCount {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            _ if text == "all" => Ok(Self::ALL),
            Ok(number @ 0..=COUNT_MAX) => Ok(Self(number)),
            _ => Err("a number from 0 to 10000, or all, is needed".to_owned()),
        }
    }
}

impl Serialize for KeepCount {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match *self {
            Self::ALL => to.serialize_str("all"),
            Self(number) => to.serialize_u32(number),
        }
    }
}

/// As it stands in a file.
#[derive(Deserialize)]
#[serde(untagged)]
enum Written {
    Number(u32),
    Word(String),
}

impl<'de> Deserialize<'de> for KeepCount {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = match Written::deserialize(from)? {
            Written::Number(number) => number.to_string(),
            Written::Word(word) => word,
        };
        text.parse().map_err(D::Error::custom)
    }
}

/// The retention rules. A zero keeps nothing by that rule.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct KeepRules {
    /// How many of the newest snapshots are kept.
    pub last: KeepCount,
    /// For how many of the newest hours (UTC) with a snapshot one is kept.
    pub hourly: KeepCount,
    /// The same for days of the job's time zone.
    pub daily: KeepCount,
    /// The same for ISO weeks, Monday to Sunday.
    pub weekly: KeepCount,
    /// The same for months.
    pub monthly: KeepCount,
    /// The same for years.
    pub yearly: KeepCount,
    /// All snapshots at most this many seconds older than the newest counted one are kept.
    pub within_s: u64,
}

impl KeepRules {
    /// Whether no rule is given.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// The rules and the time zone by which a job was pruned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeepPolicy {
    /// The rules.
    pub rules: KeepRules,
    /// The time zone: see [`crate::time_zone`].
    pub time_zone: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_read_and_written_as_numbers_or_all() {
        for (text, count) in [
            ("0", Some(KeepCount::default())),
            ("14", Some(KeepCount::new(14))),
            ("10000", Some(KeepCount::new(10_000))),
            ("10001", None),
            ("all", Some(KeepCount::ALL)),
            ("All", None),
            ("-1", None),
            ("", None),
        ] {
            assert_eq!(text.parse().ok(), count, "{text:?}");
            if let Some(count) = count {
                assert_eq!(count.to_string(), text);
            }
        }
        let rules = KeepRules {
            daily: KeepCount::new(14),
            yearly: KeepCount::ALL,
            ..KeepRules::default()
        };
        let json = serde_json::to_string(&rules).unwrap();
        assert!(
            json.contains(r#""daily":14"#) && json.contains(r#""yearly":"all""#),
            "{json}"
        );
        assert_eq!(serde_json::from_str::<KeepRules>(&json).unwrap(), rules);
        assert!(serde_json::from_str::<KeepRules>(r#"{"daily": 10001}"#).is_err());
    }
}
