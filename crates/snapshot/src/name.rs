//! Names of jobs and snapshots: which ones are valid, and how a new snapshot gets its name.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};

/// The longest job name in bytes. `NAME_MAX` is 255; the rest is left for endings that a file system or
/// a user adds.
pub const JOB_NAME_BYTES_MAX: usize = 128;

/// A text is not a valid name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(
    missing_docs,
    reason = "each variant's message says what its fields are"
)]
#[non_exhaustive]
pub enum NameError {
    /// It is not a job name.
    #[error(
        "{text:?} is not a job name: {why} (1 to 128 bytes, no '/', no control characters, no '.' or '-' in front)"
    )]
    Job { text: String, why: &'static str },
    /// It is not a snapshot name.
    #[error("{text:?} is not a snapshot name such as 2026-11-23T13-21-01Z")]
    Snapshot { text: String },
}

/// The name of a job: one folder at the top of the volume.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct JobName(String);

impl JobName {
    /// Parses `text`.
    pub fn new(text: &str) -> Result<Self, NameError> {
        let why = if text.is_empty() {
            "it is empty"
        } else if text.len() > JOB_NAME_BYTES_MAX {
            "it is too long"
        } else if text.starts_with('.') {
            "it begins with a dot"
        } else if text.starts_with('-') {
            "it begins with a dash"
        } else if text.contains('/') {
            "it has a slash in it"
        } else if text.chars().any(char::is_control) {
            "it has a control character in it"
        } else if text.trim() != text {
            "it begins or ends with a space"
        } else if text == "lost+found" {
            "that is the file system's own folder"
        } else {
            return Ok(Self(text.to_owned()));
        };
        Err(NameError::Job {
            text: text.chars().take(200).collect(),
            why,
        })
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for JobName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for JobName {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        Self::new(text)
    }
}

impl TryFrom<String> for JobName {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        Self::new(&text)
    }
}

impl From<JobName> for String {
    fn from(name: JobName) -> Self {
        name.0
    }
}

/// The name of a snapshot: a moment in UTC, in seconds, such as `2026-11-23T13-21-01Z`. Names sort like
/// their moments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SnapshotName(Timestamp);

/// 9999-12-30T00-00-00Z. Later moments might have no next second with a name.
const LAST_S: i64 = 253_402_128_000;
/// 1970. No clock shows an earlier time.
const FIRST_S: i64 = 0;

impl SnapshotName {
    /// The name for the second of `moment`, limited to 1970 to 9999.
    #[must_use]
    pub fn at(moment: Timestamp) -> Self {
        let second = moment.as_second().clamp(FIRST_S, LAST_S);
        Self(Timestamp::from_second(second).unwrap_or(Timestamp::UNIX_EPOCH))
    }

    /// Parses `text`.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let name = parse_moment(text).map(Self::at);
        // Formatted again and compared, so that each moment has exactly one name.
        name.filter(|name| name.to_string() == text)
            .ok_or_else(|| NameError::Snapshot {
                text: text.chars().take(100).collect(),
            })
    }

    /// The moment of the name.
    #[must_use]
    pub fn moment(self) -> Timestamp {
        self.0
    }

    /// The name one second earlier. The first name has none.
    pub(crate) fn second_before(self) -> Option<Self> {
        let before = Timestamp::from_second(self.0.as_second() - 1).ok()?;
        Some(Self::at(before)).filter(|name| *name != self)
    }

    /// The name one second later.
    #[must_use]
    fn next_second(self) -> Self {
        Self::at(Timestamp::from_second(self.0.as_second() + 1).unwrap_or(self.0))
    }
}

fn parse_moment(text: &str) -> Option<Timestamp> {
    let bytes = text.as_bytes();
    if bytes.len() != 20 || !text.is_ascii() || bytes[10] != b'T' || bytes[19] != b'Z' {
        return None;
    }
    let number = |from: usize, to: usize| -> Option<i16> {
        let digits = text.get(from..to)?;
        digits.bytes().all(|b| b.is_ascii_digit()).then_some(())?;
        digits.parse().ok()
    };
    let small = |from: usize| -> Option<i8> { i8::try_from(number(from, from + 2)?).ok() };
    let moment = jiff::civil::DateTime::new(
        number(0, 4)?,
        small(5)?,
        small(8)?,
        small(11)?,
        small(14)?,
        small(17)?,
        0,
    )
    .ok()?;
    TimeZone::UTC.to_timestamp(moment).ok()
}

impl fmt::Display for SnapshotName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let t = TimeZone::UTC.to_datetime(self.0);
        write!(
            f,
            "{:04}-{:02}-{:02}T{:02}-{:02}-{:02}Z",
            t.year(),
            t.month(),
            t.day(),
            t.hour(),
            t.minute(),
            t.second()
        )
    }
}

impl FromStr for SnapshotName {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        Self::parse(text)
    }
}

impl TryFrom<String> for SnapshotName {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        Self::parse(&text)
    }
}

impl From<SnapshotName> for String {
    fn from(name: SnapshotName) -> Self {
        name.to_string()
    }
}

/// If the clock is at most this far behind the newest snapshot, names continue after that one.
const CLOCK_BEHIND_S_MAX: i64 = 24 * 3600;
/// 2026-01-01. A correct clock shows no earlier time, because this program is younger.
const EARLIEST_PLAUSIBLE_S: i64 = 1_767_225_600;

/// The name for a new snapshot, and whether the clock is behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ChosenName {
    pub(crate) name: SnapshotName,
    /// The newest name, if the clock is behind it.
    pub(crate) clock_behind: Option<SnapshotName>,
}

/// Chooses the name of a run that begins at `now`, while the names `taken` are in use.
///
/// The name is the clock's second, or the next free one. Names should sort in the order of the runs,
/// because `latest`, link targets and retention depend on that. So if the clock is up to a day behind
/// the newest name, or shows a year before this program existed, the name is one second after the
/// newest. If the clock is further behind, the newest name came from a clock that ran ahead. To follow
/// it would give wrong dates to all snapshots until that day, so the clock is used.
pub(crate) fn choose_name(now: Timestamp, taken: &BTreeSet<SnapshotName>) -> ChosenName {
    let wanted = SnapshotName::at(now);
    let newest = taken.last().copied();
    // Several runs within some seconds use the names of the following seconds. If the clock is behind,
    // there is a gap.
    let mut free = wanted;
    while taken.contains(&free) && free.next_second() != free {
        free = free.next_second();
    }
    let clock_behind = newest.filter(|newest| *newest > free);
    let plausible = now.as_second() >= EARLIEST_PLAUSIBLE_S;
    let reach = SnapshotName::at(
        Timestamp::from_second(wanted.0.as_second() + CLOCK_BEHIND_S_MAX).unwrap_or(wanted.0),
    );
    let before = if plausible {
        taken.range(..=reach).next_back().copied()
    } else {
        newest
    };
    let mut name = match before {
        Some(before) if before >= wanted => before.next_second(),
        _ => wanted,
    };
    while taken.contains(&name) && name.next_second() != name {
        name = name.next_second();
    }
    ChosenName { name, clock_behind }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn name(text: &str) -> SnapshotName {
        SnapshotName::parse(text).unwrap()
    }

    fn chosen(now: &str, taken: &[&str]) -> String {
        let taken = taken.iter().map(|t| name(t)).collect();
        choose_name(name(now).moment(), &taken).name.to_string()
    }

    #[test]
    fn quick_runs_do_not_count_as_a_clock_that_is_behind() {
        let taken = [
            "2026-11-28T10-00-00Z",
            "2026-11-28T10-00-01Z",
            "2026-11-28T10-00-02Z",
        ];
        let taken = taken.iter().map(|t| name(t)).collect();
        let chosen = choose_name(name("2026-11-28T10-00-00Z").moment(), &taken);
        assert_eq!(chosen.name, name("2026-11-28T10-00-03Z"));
        assert_eq!(chosen.clock_behind, None);
        let chosen = choose_name(name("2026-11-28T09-59-58Z").moment(), &taken);
        assert_eq!(chosen.clock_behind, Some(name("2026-11-28T10-00-02Z")));
    }

    #[test]
    fn job_names_are_single_path_components() {
        let long = "a".repeat(128);
        for good in ["home", "büro 2", "a.b", "a-b", "*", "日本", long.as_str()] {
            assert_eq!(JobName::new(good).unwrap().as_str(), good);
        }
        let too_long = "a".repeat(129);
        for bad in [
            "",
            ".",
            "..",
            ".sprat",
            "a/b",
            "/",
            "-rf",
            "a\nb",
            "a\0b",
            "a\u{85}b",
            " a",
            "a ",
            "lost+found",
            too_long.as_str(),
        ] {
            assert!(JobName::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_snapshot_name_has_one_spelling() {
        assert_eq!(
            name("2026-11-23T13-21-01Z").to_string(),
            "2026-11-23T13-21-01Z"
        );
        for bad in [
            "",
            "2026-11-23",
            "2026-11-23T13:21:01Z",
            "2026-13-23T13-21-01Z",
            "2026-11-23T13-21-60Z",
            "2026-02-30T13-21-01Z",
            "2026-11-23T24-00-00Z",
            "2026-11-23T13-21-01z",
            "2026-11-23T13-21-01Z.partial",
            "+026-11-23T13-21-01Z",
            "2026-11-23T13-21-0éZ",
            "1026-11-23T13-21-01Z",
        ] {
            assert!(SnapshotName::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_second_run_in_one_second_gets_the_next_free_name() {
        assert_eq!(chosen("2026-11-23T13-21-01Z", &[]), "2026-11-23T13-21-01Z");
        assert_eq!(
            chosen(
                "2026-11-23T13-21-01Z",
                &["2026-11-23T13-21-01Z", "2026-11-23T13-21-02Z"]
            ),
            "2026-11-23T13-21-03Z"
        );
    }

    #[test]
    fn names_sort_after_the_last_run_if_the_clock_is_slightly_behind() {
        assert_eq!(
            chosen("2026-11-23T13-00-00Z", &["2026-11-23T14-00-00Z"]),
            "2026-11-23T14-00-01Z"
        );
        assert_eq!(
            chosen("1970-01-01T00-00-05Z", &["2026-11-23T14-00-00Z"]),
            "2026-11-23T14-00-01Z"
        );
    }

    #[test]
    fn one_run_with_a_clock_far_ahead_does_not_shift_later_names() {
        let taken = ["2026-11-22T00-00-00Z", "2031-01-01T00-00-00Z"];
        assert_eq!(
            chosen("2026-11-23T13-00-00Z", &taken),
            "2026-11-23T13-00-00Z"
        );
        let set = taken.iter().map(|t| name(t)).collect();
        let found = choose_name(name("2026-11-23T13-00-00Z").moment(), &set);
        assert_eq!(found.clock_behind, Some(name("2031-01-01T00-00-00Z")));
    }

    proptest! {
        #[test]
        fn every_moment_prints_and_parses_and_sorts(a in 0i64..253_402_100_000, b in 0i64..253_402_100_000) {
            let at = |s| SnapshotName::at(Timestamp::from_second(s).unwrap());
            prop_assert_eq!(SnapshotName::parse(&at(a).to_string()).unwrap(), at(a));
            prop_assert_eq!(at(a).to_string().cmp(&at(b).to_string()), a.cmp(&b));
        }

        #[test]
        fn a_chosen_name_is_never_taken(now in 0i64..4_000_000_000, offsets in prop::collection::vec(-5i64..5, 0..12)) {
            let taken: BTreeSet<_> = offsets.iter()
                .map(|o| SnapshotName::at(Timestamp::from_second(now + o).unwrap())).collect();
            prop_assert!(!taken.contains(&choose_name(Timestamp::from_second(now).unwrap(), &taken).name));
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in ".{0,24}") {
            let _ = SnapshotName::parse(&text);
            let _ = JobName::new(&text);
        }
    }
}
