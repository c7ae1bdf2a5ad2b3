//! Which snapshots of a job are kept, and why: a pure function of names, kinds and rules.
//!
//! Days, weeks (Monday to Sunday, ISO 8601), months and years are in UTC, like the names. Of each of the
//! newest N days that have a snapshot, one is kept: the newest complete one, or else the newest. The
//! same holds for weeks, months and years. "Within" counts back from the newest snapshot, not from now,
//! so that a job that no longer runs loses nothing. A snapshot dated in the future, by a wrong clock, is
//! kept and not counted: as the newest one it would make every rule drop real ones. `latest` was made
//! last, so a snapshot dated later than `latest` has such a date, too.

use std::collections::BTreeMap;

use jiff::civil::Date;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use crate::name::SnapshotName;
use crate::record::EntryKind;

/// How far ahead of the clock a snapshot may be dated: clocks differ, and time zones may be wrong.
const AHEAD_MAX: SignedDuration = SignedDuration::from_hours(24);

/// Whether the name came from a wrong clock: it is more than a day ahead of `now`.
pub(crate) fn is_future(name: SnapshotName, now: Timestamp) -> bool {
    name.moment().duration_since(now) > AHEAD_MAX
}

/// The retention rules. A zero keeps nothing by that rule.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct KeepRules {
    /// How many of the newest snapshots are kept.
    pub last: u32,
    /// For how many of the newest days with a snapshot one is kept.
    pub daily: u32,
    /// The same for weeks.
    pub weekly: u32,
    /// The same for months.
    pub monthly: u32,
    /// The same for years.
    pub yearly: u32,
    /// All snapshots at most this many seconds older than the newest one are kept.
    pub within_s: u64,
}

impl KeepRules {
    /// Whether no rule is given.
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
    /// It is one of the newest.
    Last,
    /// It represents its day.
    Daily,
    /// It represents its week.
    Weekly,
    /// It represents its month.
    Monthly,
    /// It represents its year.
    Yearly,
    /// It is not much older than the newest one.
    Within,
    /// It is the newest complete one. Always kept.
    LastGood,
    /// `latest` points to it. Always kept.
    Latest,
    /// It is pinned. Always kept.
    Pinned,
    /// It is the newest one with a disk that the newest complete one lacks. Always kept.
    MissingDisk,
    /// It has the last right content of a file that is damaged in a kept snapshot. Always kept.
    RightContent,
    /// It has no record, so its content is unknown. Never removed.
    Unrecorded,
    /// It is dated in the future. Kept, and not counted.
    Future,
}

/// One finished snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// Its name, which is the time of the run.
    pub name: SnapshotName,
    /// Its kind. Anything but a snapshot is ignored.
    pub kind: EntryKind,
    /// `latest` points to it.
    pub is_latest: bool,
    /// It is pinned.
    pub pinned: bool,
    /// The newest complete snapshot lacks a disk, and this one has the newest copy of it.
    pub has_missing_disk: bool,
}

/// The decision about one snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeepDecision {
    /// The snapshot.
    pub name: SnapshotName,
    /// Why it is kept. If this is empty, it is removed.
    pub keep: Vec<KeepReason>,
}

/// Decides about every finished snapshot of a job at the time `now`. The result is sorted by name.
#[must_use]
pub fn decide(candidates: &[Candidate], rules: &KeepRules, now: Timestamp) -> Vec<KeepDecision> {
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
    if let Some(good) = all.iter().find(|one| one.kind == EntryKind::Complete) {
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
        .map(|(name, keep)| KeepDecision { name, keep })
        .collect()
}

/// The snapshots to keep, one for each of the newest `count` periods that have any. `all` is sorted
/// newest first.
fn one_of_each(all: &[&Candidate], count: u32, period: fn(Date) -> i32) -> Vec<SnapshotName> {
    let mut kept: Vec<(i32, &Candidate)> = Vec::new();
    for candidate in all {
        let date = TimeZone::UTC.to_datetime(candidate.name.moment()).date();
        let number = period(date);
        let full = kept.len() >= count as usize;
        match kept.last_mut() {
            Some((last, chosen)) if *last == number => {
                if chosen.kind != EntryKind::Complete && candidate.kind == EntryKind::Complete {
                    *chosen = candidate;
                }
            }
            _ if full => break,
            _ => kept.push((number, candidate)),
        }
    }
    kept.into_iter().map(|(_, chosen)| chosen.name).collect()
}

/// A number that rises with time and differs for each day.
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

    /// Later than every name here that is not meant to be in the future.
    fn now() -> Timestamp {
        Timestamp::from_second(1_800_000_000).unwrap()
    }

    fn at(text: &str) -> Candidate {
        Candidate {
            name: SnapshotName::parse(text).unwrap(),
            kind: EntryKind::Complete,
            is_latest: false,
            pinned: false,
            has_missing_disk: false,
        }
    }

    fn kept(candidates: &[Candidate], rules: &KeepRules) -> Vec<String> {
        decide(candidates, rules, now())
            .into_iter()
            .filter(|decision| !decision.keep.is_empty())
            .map(|decision| decision.name.to_string())
            .collect()
    }

    #[test]
    fn a_snapshot_dated_after_latest_is_kept_and_not_counted() {
        let mut all = [
            at("2026-01-01T00-00-00Z"),
            at("2026-01-02T00-00-00Z"),
            // The clock ran ahead when it was made: it is older than the other two.
            at("2026-01-02T20-00-00Z"),
        ];
        all[1].kind = EntryKind::Incomplete;
        all[1].is_latest = true;
        let rules = KeepRules {
            last: 1,
            ..KeepRules::default()
        };
        assert_eq!(
            kept(&all, &rules).len(),
            3,
            "the first is the newest complete one"
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
        // 2026-01-01 and -02 are in the same week. 2024-12-30 is in the first week of 2025.
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
    fn a_complete_snapshot_represents_its_day_before_a_newer_incomplete_one() {
        let mut incomplete = at("2026-01-01T20-00-00Z");
        incomplete.kind = EntryKind::Incomplete;
        let all = [at("2026-01-01T10-00-00Z"), incomplete];
        let rules = KeepRules {
            daily: 1,
            ..KeepRules::default()
        };
        assert_eq!(kept(&all, &rules), ["2026-01-01T10-00-00Z"]);
    }

    fn candidates() -> impl Strategy<Value = Vec<Candidate>> {
        let kind = prop_oneof![
            4 => Just(EntryKind::Complete),
            2 => Just(EntryKind::Incomplete),
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
        fn protected_snapshots_stay_and_no_rule_keeps_too_many(
            all in candidates(), rules in rules()
        ) {
            let mut names: Vec<SnapshotName> = Vec::new();
            let all: Vec<Candidate> = all.into_iter().filter(|one| {
                let new = !names.contains(&one.name);
                names.push(one.name);
                new
            }).collect();
            let decisions = decide(&all, &rules, now());
            let snapshots = all.iter().filter(|one| one.kind.is_snapshot()).count();
            prop_assert_eq!(decisions.len(), snapshots);
            prop_assert!(decisions.is_sorted_by_key(|decision| decision.name));
            let keeps = |name| decisions.iter().any(|v| v.name == name && !v.keep.is_empty());
            let good = all.iter().filter(|one| one.kind == EntryKind::Complete);
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
                let kept = decisions.iter().filter(|v| v.keep.contains(&reason)).count();
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
        fn future_snapshots_stay_and_do_not_affect_real_ones(
            all in candidates(), rules in rules(), ahead in 86_401_i64..1_000_000_000
        ) {
            let mut with = all.clone();
            for (number, kind) in [EntryKind::Complete, EntryKind::Incomplete].into_iter().enumerate() {
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
