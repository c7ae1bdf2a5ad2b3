//! Which snapshots of a job are kept, and why: a pure function of names, kinds and rules.
//!
//! Days, weeks (Monday to Sunday, ISO 8601), months and years are those of UTC, as the names are.
//! Of each of the newest N days that have a snapshot, one is kept: the newest without unread
//! files, else the newest. The same for weeks, months and years. "Within" counts back from the
//! newest snapshot, not from now: a job that no longer runs loses nothing by waiting. A snapshot
//! that is dated in the future, by a clock that was wrong, is kept and counts for nothing: as the
//! newest one it would make every rule drop what is real. `latest` was made last, so one that is dated
//! later than `latest` has such a date, too.

use std::collections::BTreeMap;

use jiff::civil::Date;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use crate::name::SnapshotName;
use crate::record::EntryKind;

/// How far ahead of the clock a snapshot may be dated: clocks differ, time zones were mistaken.
const AHEAD_MAX: SignedDuration = SignedDuration::from_hours(24);

/// Whether a clock that was wrong gave the name: it is more than a day ahead of `now`.
pub(crate) fn is_future(name: SnapshotName, now: Timestamp) -> bool {
    name.moment().duration_since(now) > AHEAD_MAX
}

/// How much is kept; zeros keep nothing by that rule.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct KeepRules {
    /// The newest so many snapshots.
    pub last: u32,
    /// One of each of the newest so many days that have any.
    pub daily: u32,
    /// The same for weeks.
    pub weekly: u32,
    /// The same for months.
    pub monthly: u32,
    /// The same for years.
    pub yearly: u32,
    /// All that are at most so many seconds older than the newest one.
    pub within_s: u64,
}

impl KeepRules {
    /// Whether no rule keeps anything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Why a snapshot is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum KeepReason {
    /// One of the newest.
    Last,
    /// The one of its day.
    Daily,
    /// The one of its week.
    Weekly,
    /// The one of its month.
    Monthly,
    /// The one of its year.
    Yearly,
    /// Not much older than the newest.
    Within,
    /// The newest one that holds everything; always kept.
    LastGood,
    /// `latest` points to it; always kept.
    Latest,
    /// Somebody pinned it; always kept.
    Pinned,
    /// It is the newest one that has a disk which the newest whole one lacks; always kept.
    MissingDisk,
    /// It has the last right content of a file that is damaged in a snapshot which is kept; always kept.
    RightContent,
    /// It has no record, so what it is isn't known; never touched.
    Unrecorded,
    /// It is dated in the future; kept, and not counted.
    Future,
}

/// One finished snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// When it was made.
    pub name: SnapshotName,
    /// What it is; others than snapshots are left out.
    pub kind: EntryKind,
    /// `latest` points to it.
    pub is_latest: bool,
    /// It is pinned.
    pub pinned: bool,
    /// The newest whole snapshot lacks a disk, of which this one is the newest copy.
    pub has_missing_disk: bool,
}

/// What becomes of one snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// The snapshot.
    pub name: SnapshotName,
    /// Why it is kept; it is dropped where nothing stands here.
    pub keep: Vec<KeepReason>,
}

/// Decides about every finished snapshot of a job at the moment `now`; the result is in the order
/// of the names.
#[must_use]
pub fn decide(candidates: &[Candidate], rules: &KeepRules, now: Timestamp) -> Vec<Verdict> {
    let mut all: Vec<&Candidate> = candidates
        .iter()
        .filter(|candidate| candidate.kind.is_snapshot())
        .collect();
    all.sort_by_key(|candidate| std::cmp::Reverse(candidate.name));
    let mut keep: BTreeMap<SnapshotName, Vec<KeepReason>> = all
        .iter()
        .map(|candidate| (candidate.name, Vec::new()))
        .collect();
    let mut mark = |name: SnapshotName, reason| {
        keep.entry(name).or_default().push(reason);
    };
    let latest = all.iter().find(|one| one.is_latest).map(|one| one.name);
    let (future, all): (Vec<&Candidate>, Vec<&Candidate>) =
        all.into_iter().partition(|candidate| {
            is_future(candidate.name, now) || latest.is_some_and(|latest| candidate.name > latest)
        });
    for candidate in future {
        mark(candidate.name, KeepReason::Future);
    }
    for candidate in all.iter().take(rules.last as usize) {
        mark(candidate.name, KeepReason::Last);
    }
    for (count, reason, period) in [
        (rules.daily, KeepReason::Daily, day as fn(Date) -> i32),
        (rules.weekly, KeepReason::Weekly, week),
        (rules.monthly, KeepReason::Monthly, month),
        (rules.yearly, KeepReason::Yearly, year),
    ] {
        for name in one_of_each(&all, count, period) {
            mark(name, reason);
        }
    }
    if let Some(newest) = all.first()
        && rules.within_s > 0
    {
        let oldest_s = i128::from(newest.name.moment().as_second()) - i128::from(rules.within_s);
        let within =
            |candidate: &&&Candidate| i128::from(candidate.name.moment().as_second()) >= oldest_s;
        for candidate in all.iter().filter(within) {
            mark(candidate.name, KeepReason::Within);
        }
    }
    if let Some(good) = all.iter().find(|one| one.kind == EntryKind::Good) {
        mark(good.name, KeepReason::LastGood);
    }
    for candidate in &all {
        if candidate.is_latest {
            mark(candidate.name, KeepReason::Latest);
        }
        if candidate.pinned {
            mark(candidate.name, KeepReason::Pinned);
        }
        if candidate.has_missing_disk {
            mark(candidate.name, KeepReason::MissingDisk);
        }
        if candidate.kind == EntryKind::Unrecorded {
            mark(candidate.name, KeepReason::Unrecorded);
        }
    }
    keep.into_iter()
        .map(|(name, keep)| Verdict { name, keep })
        .collect()
}

/// Of each of the newest `count` periods that have a snapshot, the one to keep. `all` is newest
/// first.
fn one_of_each(all: &[&Candidate], count: u32, period: fn(Date) -> i32) -> Vec<SnapshotName> {
    let mut kept: Vec<(i32, &Candidate)> = Vec::new();
    for candidate in all {
        let date = TimeZone::UTC.to_datetime(candidate.name.moment()).date();
        let number = period(date);
        let full = kept.len() >= count as usize;
        match kept.last_mut() {
            Some((last, chosen)) if *last == number => {
                if chosen.kind != EntryKind::Good && candidate.kind == EntryKind::Good {
                    *chosen = candidate;
                }
            }
            _ if full => break,
            _ => kept.push((number, candidate)),
        }
    }
    kept.into_iter().map(|(_, chosen)| chosen.name).collect()
}

/// Numbers that rise with time and differ from period to period.
fn day(date: Date) -> i32 {
    i32::from(date.year()) * 400 + i32::from(date.day_of_year())
}

fn week(date: Date) -> i32 {
    let week = date.iso_week_date();
    i32::from(week.year()) * 60 + i32::from(week.week())
}

fn month(date: Date) -> i32 {
    i32::from(date.year()) * 12 + i32::from(date.month())
}

fn year(date: Date) -> i32 {
    i32::from(date.year())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Later than every name here that isn't meant to be of the future.
    fn now() -> Timestamp {
        Timestamp::from_second(1_800_000_000).unwrap()
    }

    fn at(text: &str) -> Candidate {
        Candidate {
            name: SnapshotName::parse(text).unwrap(),
            kind: EntryKind::Good,
            is_latest: false,
            pinned: false,
            has_missing_disk: false,
        }
    }

    fn kept(candidates: &[Candidate], rules: &KeepRules) -> Vec<String> {
        decide(candidates, rules, now())
            .into_iter()
            .filter(|verdict| !verdict.keep.is_empty())
            .map(|verdict| verdict.name.to_string())
            .collect()
    }

    #[test]
    fn one_that_is_dated_later_than_latest_takes_no_real_ones_place() {
        let mut all = [
            at("2026-01-01T00-00-00Z"),
            at("2026-01-02T00-00-00Z"),
            // A clock ran ahead when it was made: before the other two.
            at("2026-01-02T20-00-00Z"),
        ];
        all[1].kind = EntryKind::Unread;
        all[1].is_latest = true;
        let rules = KeepRules {
            last: 1,
            ..KeepRules::default()
        };
        assert_eq!(
            kept(&all, &rules).len(),
            3,
            "the first is the newest whole one"
        );
    }

    #[test]
    fn one_of_each_day_week_month_and_year_is_kept_by_utc() {
        let all = [
            at("2024-12-29T23-59-59Z"),
            at("2024-12-30T00-00-00Z"),
            at("2025-12-28T10-00-00Z"),
            at("2026-01-01T00-00-00Z"),
            at("2026-01-01T23-59-59Z"),
            at("2026-01-02T00-00-00Z"),
        ];
        let rules = KeepRules::default;
        assert_eq!(kept(&all, &rules()), ["2026-01-02T00-00-00Z"]);
        let daily = KeepRules {
            daily: 2,
            ..rules()
        };
        assert_eq!(
            kept(&all, &daily),
            ["2026-01-01T23-59-59Z", "2026-01-02T00-00-00Z"]
        );
        // 2026-01-01 and -02 are of the same week; 2024-12-30 is of the first week of 2025.
        let weekly = KeepRules {
            weekly: 3,
            ..rules()
        };
        assert_eq!(
            kept(&all, &weekly),
            [
                "2024-12-30T00-00-00Z",
                "2025-12-28T10-00-00Z",
                "2026-01-02T00-00-00Z"
            ]
        );
        let monthly = KeepRules {
            monthly: 2,
            ..rules()
        };
        assert_eq!(
            kept(&all, &monthly),
            ["2025-12-28T10-00-00Z", "2026-01-02T00-00-00Z"]
        );
        let yearly = KeepRules {
            yearly: 9,
            ..rules()
        };
        assert_eq!(
            kept(&all, &yearly),
            [
                "2024-12-30T00-00-00Z",
                "2025-12-28T10-00-00Z",
                "2026-01-02T00-00-00Z"
            ]
        );
        let within = KeepRules {
            within_s: 86_400,
            ..rules()
        };
        assert_eq!(
            kept(&all, &within),
            [
                "2026-01-01T00-00-00Z",
                "2026-01-01T23-59-59Z",
                "2026-01-02T00-00-00Z"
            ]
        );
    }

    #[test]
    fn a_whole_snapshot_stands_for_its_day_before_a_newer_one_with_unread_files() {
        let mut unread = at("2026-01-01T20-00-00Z");
        unread.kind = EntryKind::Unread;
        let all = [at("2026-01-01T10-00-00Z"), unread];
        let rules = KeepRules {
            daily: 1,
            ..KeepRules::default()
        };
        assert_eq!(kept(&all, &rules), ["2026-01-01T10-00-00Z"]);
    }

    fn candidates() -> impl Strategy<Value = Vec<Candidate>> {
        let kind = prop_oneof![
            4 => Just(EntryKind::Good),
            2 => Just(EntryKind::Unread),
            1 => Just(EntryKind::Unrecorded),
            1 => Just(EntryKind::Partial),
        ];
        let one = (1_700_000_000_i64..1_800_000_000, kind, 0..9_u8).prop_map(|(s, kind, mark)| {
            Candidate {
                name: SnapshotName::at(Timestamp::from_second(s).unwrap()),
                kind,
                is_latest: mark == 0,
                pinned: mark == 1,
                has_missing_disk: mark == 2,
            }
        });
        proptest::collection::vec(one, 0..60)
    }

    fn rules() -> impl Strategy<Value = KeepRules> {
        let few = 0..5_u32;
        let within_s = prop_oneof![Just(0_u64), 0..100_000_000_u64, Just(u64::MAX)];
        (
            few.clone(),
            few.clone(),
            few.clone(),
            few.clone(),
            few,
            within_s,
        )
            .prop_map(
                |(last, daily, weekly, monthly, yearly, within_s)| KeepRules {
                    last,
                    daily,
                    weekly,
                    monthly,
                    yearly,
                    within_s,
                },
            )
    }

    proptest! {
        #[test]
        fn what_must_stay_stays_and_no_rule_keeps_more_than_it_says(
            all in candidates(), rules in rules()
        ) {
            let mut names: Vec<SnapshotName> = Vec::new();
            let all: Vec<Candidate> = all.into_iter().filter(|one| {
                let new = !names.contains(&one.name);
                names.push(one.name);
                new
            }).collect();
            let verdicts = decide(&all, &rules, now());
            let snapshots = all.iter().filter(|one| one.kind.is_snapshot()).count();
            prop_assert_eq!(verdicts.len(), snapshots);
            prop_assert!(verdicts.is_sorted_by_key(|verdict| verdict.name));
            let keeps = |name| verdicts.iter().any(|v| v.name == name && !v.keep.is_empty());
            let good = all.iter().filter(|one| one.kind == EntryKind::Good);
            if let Some(good) = good.max_by_key(|one| one.name) {
                prop_assert!(keeps(good.name));
            }
            for one in all.iter().filter(|one| one.kind.is_snapshot()) {
                let protected = one.pinned
                    || one.is_latest
                    || one.has_missing_disk
                    || one.kind == EntryKind::Unrecorded;
                prop_assert!(!protected || keeps(one.name));
            }
            for (reason, most) in [
                (KeepReason::Last, rules.last),
                (KeepReason::Daily, rules.daily),
                (KeepReason::Weekly, rules.weekly),
                (KeepReason::Monthly, rules.monthly),
                (KeepReason::Yearly, rules.yearly),
            ] {
                let kept = verdicts.iter().filter(|v| v.keep.contains(&reason)).count();
                prop_assert!(kept <= most as usize);
                prop_assert!(most == 0 || snapshots == 0 || kept > 0);
            }
        }

        #[test]
        fn more_generous_rules_never_drop_what_the_others_keep(
            all in candidates(), rules in rules(), more in rules()
        ) {
            let generous = KeepRules {
                last: rules.last + more.last,
                daily: rules.daily + more.daily,
                weekly: rules.weekly + more.weekly,
                monthly: rules.monthly + more.monthly,
                yearly: rules.yearly + more.yearly,
                within_s: rules.within_s.saturating_add(more.within_s),
            };
            let few = kept(&all, &rules);
            let many = kept(&all, &generous);
            prop_assert!(few.iter().all(|name| many.contains(name)));
        }

        #[test]
        fn snapshots_of_the_future_stay_and_change_nothing_for_the_real_ones(
            all in candidates(), rules in rules(), ahead in 86_401_i64..1_000_000_000
        ) {
            let mut with = all.clone();
            for (number, kind) in [EntryKind::Good, EntryKind::Unread].into_iter().enumerate() {
                let moment = now().as_second() + ahead + i64::try_from(number).unwrap();
                with.push(Candidate {
                    name: SnapshotName::at(Timestamp::from_second(moment).unwrap()),
                    kind,
                    is_latest: false,
                    pinned: false,
                    has_missing_disk: false,
                });
            }
            let mut expected = kept(&all, &rules);
            expected.extend(with[all.len()..].iter().map(|one| one.name.to_string()));
            prop_assert_eq!(kept(&with, &rules), expected);
        }

        #[test]
        fn pruning_twice_drops_nothing_more(all in candidates(), rules in rules()) {
            let first = kept(&all, &rules);
            let left: Vec<Candidate> = all
                .into_iter()
                .filter(|one| first.contains(&one.name.to_string()))
                .collect();
            prop_assert_eq!(kept(&left, &rules), first);
        }
    }
}
