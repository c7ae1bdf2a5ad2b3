//! Which snapshots of a job are kept, and why: a pure function of names, kinds, rules and time zone.
//!
//! Names are in UTC. Hours are UTC hours, so that the hour that comes twice in autumn is two hours. Days,
//! weeks (Monday to Sunday, ISO 8601), months and years are those of the time zone. Of each of the newest
//! N days that have a snapshot, one is kept: the newest complete one, or else the newest. The same holds
//! for the other periods. A rule that finds fewer than N periods also keeps the oldest complete snapshot,
//! or else the oldest: until there is enough history, none of it is dropped at its old end.
//!
//! "Within" counts back from the newest counted snapshot, not from now, so that a job that no longer runs
//! loses nothing. A snapshot dated in the future, by a wrong clock, is kept and not counted: as the newest
//! one it would make every rule drop real ones. `latest` was made last, so a snapshot dated later than
//! `latest` has such a date, too; and so has one after which a snapshot with an earlier date was made.

use std::collections::{BTreeMap, BTreeSet};

use jiff::civil::Date;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use crate::keep_rules::{KeepCount, KeepPolicy, KeepRules};
use crate::name::SnapshotName;
use crate::record::EntryKind;

/// How far ahead of the clock a snapshot may be dated: clocks differ, and time zones may be wrong.
const AHEAD_MAX: SignedDuration = SignedDuration::from_hours(24);
/// Changed rules may remove so many snapshots at once without a question.
const REMOVED_AT_ONCE_MAX: usize = 5;

/// Whether the name came from a wrong clock: it is more than a day ahead of `now`.
pub(crate) fn is_future(name: SnapshotName, now: Timestamp) -> bool {
    name.moment().duration_since(now) > AHEAD_MAX
}

/// Why a snapshot is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum KeepReason {
    /// It is one of the newest.
    Last,
    /// It represents its hour.
    Hourly,
    /// It represents its day.
    Daily,
    /// It represents its week.
    Weekly,
    /// It represents its month.
    Monthly,
    /// It represents its year.
    Yearly,
    /// It is the oldest one, and a rule found fewer periods than it may keep.
    Oldest,
    /// It is not much older than the newest one.
    Within,
    /// It is the newest complete one. Always kept.
    LastGood,
    /// `latest` points to it. Always kept.
    Latest,
    /// It is the newest one that is counted, although `latest` does not point to it. Always kept.
    Newest,
    /// It is pinned. Always kept.
    Pinned,
    /// It is the newest one with a disk that the newest complete one lacks. Always kept.
    MissingDisk,
    /// It has the last right content of a file that is damaged in a kept snapshot. Always kept.
    RightContent,
    /// It has the last copy of a source file from before that changed silently. Kept until that is accepted.
    OldContent,
    /// It was there when an unusual change of the source was noticed. Kept until that is accepted.
    BeforeChange,
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
    /// A snapshot with an earlier name was made after it: a clock that ran ahead gave it its name.
    pub is_misdated: bool,
}

/// The decision about one snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeepDecision {
    /// The snapshot.
    pub name: SnapshotName,
    /// Why it is kept. If this is empty, it is removed.
    pub keep: Vec<KeepReason>,
}

/// What the decisions depend on, beside the snapshots.
#[derive(Debug, Clone)]
pub struct KeepBy<'a> {
    /// The rules.
    pub rules: &'a KeepRules,
    /// The zone of days, weeks, months and years.
    pub zone: &'a TimeZone,
    /// The time of the decision.
    pub now: Timestamp,
    /// When an unusual change of the source was noticed that nobody has accepted. What was begun before
    /// it is kept.
    pub changed_at: Option<Timestamp>,
}

/// Decides about every finished snapshot of a job. The result is sorted by name.
#[must_use]
pub fn decide(candidates: &[Candidate], by: &KeepBy<'_>) -> Vec<KeepDecision> {
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
    let (future, counted): (Vec<&Candidate>, Vec<&Candidate>) =
        all.into_iter().partition(|candidate| {
            is_future(candidate.name, by.now)
                || candidate.is_misdated
                || latest.is_some_and(|latest| candidate.name > latest)
        });
    for candidate in future {
        mark(candidate.name, KeepReason::Future);
    }
    mark_by_rules(&counted, by, &mut mark);
    mark_protected(&counted, by, &mut mark);
    keep.into_iter()
        .map(|(name, keep)| KeepDecision { name, keep })
        .collect()
}

/// Marks what a rule keeps. `counted` is sorted newest first.
fn mark_by_rules(
    counted: &[&Candidate],
    by: &KeepBy<'_>,
    mark: &mut impl FnMut(SnapshotName, KeepReason),
) {
    let rules = by.rules;
    for candidate in counted.iter().take(rules.last.limit()) {
        mark(candidate.name, KeepReason::Last);
    }
    let is_complete = |one: &&&Candidate| one.kind == EntryKind::Complete;
    let oldest = counted.iter().rfind(is_complete).or(counted.last());
    let mut keep_oldest = false;
    for (count, reason, period) in [
        (rules.hourly, KeepReason::Hourly, hour as Period),
        (rules.daily, KeepReason::Daily, |at, zone| {
            day(date(at, zone))
        }),
        (rules.weekly, KeepReason::Weekly, |at, zone| {
            week(date(at, zone))
        }),
        (rules.monthly, KeepReason::Monthly, |at, zone| {
            month(date(at, zone))
        }),
        (rules.yearly, KeepReason::Yearly, |at, zone| {
            i64::from(date(at, zone).year())
        }),
    ] {
        let kept = one_of_each(counted, count, |one| period(one.name.moment(), by.zone));
        keep_oldest |= kept.len() < count.limit();
        for name in kept {
            mark(name, reason);
        }
    }
    if let Some(oldest) = oldest.filter(|_| keep_oldest) {
        mark(oldest.name, KeepReason::Oldest);
    }
    if let Some(newest) = counted.first()
        && rules.within_s > 0
    {
        let oldest_s = i128::from(newest.name.moment().as_second()) - i128::from(rules.within_s);
        let within =
            |candidate: &&&Candidate| i128::from(candidate.name.moment().as_second()) >= oldest_s;
        for candidate in counted.iter().filter(within) {
            mark(candidate.name, KeepReason::Within);
        }
    }
}

/// Marks what is kept whatever the rules are. `counted` is sorted newest first.
fn mark_protected(
    counted: &[&Candidate],
    by: &KeepBy<'_>,
    mark: &mut impl FnMut(SnapshotName, KeepReason),
) {
    if let Some(good) = counted.iter().find(|one| one.kind == EntryKind::Complete) {
        mark(good.name, KeepReason::LastGood);
    }
    if let Some(newest) = counted.first().filter(|newest| !newest.is_latest) {
        mark(newest.name, KeepReason::Newest);
    }
    for candidate in counted {
        if candidate.is_latest {
            mark(candidate.name, KeepReason::Latest);
        }
        if candidate.pinned {
            mark(candidate.name, KeepReason::Pinned);
        }
        if candidate.has_missing_disk {
            mark(candidate.name, KeepReason::MissingDisk);
        }
        if by.changed_at.is_some_and(|at| candidate.name.moment() < at) {
            mark(candidate.name, KeepReason::BeforeChange);
        }
        if candidate.kind == EntryKind::Unrecorded {
            mark(candidate.name, KeepReason::Unrecorded);
        }
    }
}

/// Whether a prune has to wait for a person: the rules or the zone are not those of the last prune
/// (`before`; `None`: there was none), and they would remove more than half of the snapshots and more
/// than 5. A typo in a rule must not cost the history.
#[must_use]
pub fn is_held(before: Option<&KeepPolicy>, now: &KeepPolicy, decisions: &[KeepDecision]) -> bool {
    let removed = decisions.iter().filter(|one| one.keep.is_empty()).count();
    before != Some(now) && removed > REMOVED_AT_ONCE_MAX && removed * 2 > decisions.len()
}

/// The snapshots to keep, one for each of the newest `count` periods that have any. `counted` is sorted
/// newest first.
fn one_of_each(
    counted: &[&Candidate],
    count: KeepCount,
    period: impl Fn(&Candidate) -> i64,
) -> BTreeSet<SnapshotName> {
    // By period and not by neighbours: where clocks go back over midnight, a day comes twice.
    let mut chosen: BTreeMap<i64, &Candidate> = BTreeMap::new();
    for candidate in counted {
        let one = chosen.entry(period(candidate)).or_insert(candidate);
        if one.kind != EntryKind::Complete && candidate.kind == EntryKind::Complete {
            *one = candidate;
        }
    }
    let newest = chosen.into_values().rev().take(count.limit());
    newest.map(|candidate| candidate.name).collect()
}

/// A number that rises with time and differs for each period.
type Period = fn(Timestamp, &TimeZone) -> i64;

fn hour(at: Timestamp, _: &TimeZone) -> i64 {
    at.as_second().div_euclid(3600)
}

fn date(at: Timestamp, zone: &TimeZone) -> Date {
    zone.to_datetime(at).date()
}

fn day(date: Date) -> i64 {
    i64::from(date.year()) * 400 + i64::from(date.day_of_year())
}

fn week(date: Date) -> i64 {
    let week = date.iso_week_date();
    i64::from(week.year()) * 60 + i64::from(week.week())
}

fn month(date: Date) -> i64 {
    i64::from(date.year()) * 12 + i64::from(date.month())
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
            is_misdated: false,
        }
    }

    fn by<'a>(rules: &'a KeepRules, zone: &'a TimeZone) -> KeepBy<'a> {
        KeepBy {
            rules,
            zone,
            now: now(),
            changed_at: None,
        }
    }

    fn kept(candidates: &[Candidate], rules: &KeepRules) -> Vec<String> {
        decide(candidates, &by(rules, &TimeZone::UTC))
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
            last: KeepCount::new(1),
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
            daily: KeepCount::new(2),
            ..rules()
        };
        assert_eq!(
            kept(&all, &daily),
            ["2026-01-01T23-59-59Z", "2026-01-02T00-00-00Z"]
        );
        // 2026-01-01 and -02 are in the same week. 2024-12-30 is in the first week of 2025.
        let weekly = KeepRules {
            weekly: KeepCount::new(3),
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
            monthly: KeepCount::new(2),
            ..rules()
        };
        assert_eq!(
            kept(&all, &monthly),
            ["2025-12-28T10-00-00Z", "2026-01-02T00-00-00Z"]
        );
        let yearly = KeepRules {
            yearly: KeepCount::new(9),
            ..rules()
        };
        assert_eq!(
            kept(&all, &yearly),
            [
                // There are only three years: the oldest stays, too.
                "2024-12-29T23-59-59Z",
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
        let all = [
            at("2026-01-01T10-00-00Z"),
            incomplete,
            at("2026-01-02T10-00-00Z"),
        ];
        let rules = KeepRules {
            daily: KeepCount::new(2),
            ..KeepRules::default()
        };
        assert_eq!(
            kept(&all, &rules),
            ["2026-01-01T10-00-00Z", "2026-01-02T10-00-00Z"]
        );
        // The newest one stays, too.
        assert_eq!(kept(&all[..2], &rules).len(), 2);
    }

    #[test]
    fn snapshots_from_before_an_unusual_change_stay() {
        let all = [
            at("2026-01-01T00-00-00Z"),
            at("2026-01-02T00-00-00Z"),
            at("2026-01-03T00-00-00Z"),
            at("2026-01-04T00-00-00Z"),
        ];
        let rules = KeepRules {
            last: KeepCount::new(1),
            ..KeepRules::default()
        };
        let utc = TimeZone::UTC;
        let by = KeepBy {
            changed_at: Some(all[2].name.moment()),
            ..by(&rules, &utc)
        };
        let kept: Vec<Vec<KeepReason>> =
            decide(&all, &by).into_iter().map(|one| one.keep).collect();
        assert_eq!(kept[0], [KeepReason::BeforeChange]);
        assert_eq!(kept[1], [KeepReason::BeforeChange]);
        assert!(kept[2].is_empty(), "newer ones go by the rules");
    }

    #[test]
    fn a_prune_by_changed_rules_that_removes_most_is_held() {
        let policy = |daily, zone: &str| KeepPolicy {
            rules: KeepRules {
                daily: KeepCount::new(daily),
                ..KeepRules::default()
            },
            time_zone: zone.to_owned(),
        };
        let decisions = |removed: usize, kept: usize| -> Vec<KeepDecision> {
            let keep = [
                vec![Vec::new(); removed],
                vec![vec![KeepReason::Daily]; kept],
            ]
            .concat();
            let name = at("2026-01-01T00-00-00Z").name;
            keep.into_iter()
                .map(|keep| KeepDecision { name, keep })
                .collect()
        };
        let old = policy(14, "local");
        for (now, removed, kept, held) in [
            (policy(1, "local"), 6, 5, true),
            (policy(14, "UTC"), 6, 5, true),
            // Not more than half.
            (policy(1, "local"), 6, 6, false),
            // Not more than 5.
            (policy(1, "local"), 5, 0, false),
            // The same rules: after a long time without a prune much may go.
            (policy(14, "local"), 60, 5, false),
        ] {
            let held_now = is_held(Some(&old), &now, &decisions(removed, kept));
            assert_eq!(held_now, held, "{now:?} {removed} {kept}");
        }
        assert!(
            is_held(None, &old, &decisions(6, 5)),
            "the first rules of a job are new ones, too"
        );
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
                is_misdated: false,
            }
        });
        proptest::collection::vec(one, 0..60)
    }

    fn rules() -> impl Strategy<Value = KeepRules> {
        let count =
            || prop_oneof![6 => (0..5_u32).prop_map(KeepCount::new), 1 => Just(KeepCount::ALL)];
        let within_s = prop_oneof![Just(0_u64), 0..100_000_000_u64, Just(u64::MAX)];
        let counts = (count(), count(), count(), count(), count(), count());
        (counts, within_s).prop_map(
            |((last, hourly, daily, weekly, monthly, yearly), within_s)| KeepRules {
                last,
                hourly,
                daily,
                weekly,
                monthly,
                yearly,
                within_s,
            },
        )
    }

    /// Without the system's database. The second one goes back over midnight.
    fn zone() -> impl Strategy<Value = TimeZone> {
        prop_oneof![
            Just("CET-1CEST,M3.5.0,M10.5.0/3"),
            Just("NST3:30NDT,M3.2.0/0:01,M11.1.0/0:01"),
            Just("<+14>-14"),
        ]
        .prop_map(|text| TimeZone::posix(text).unwrap())
    }

    proptest! {
        #[test]
        fn protected_snapshots_stay_and_no_rule_keeps_too_many(
            all in candidates(), rules in rules(), zone in zone()
        ) {
            let mut names: Vec<SnapshotName> = Vec::new();
            let all: Vec<Candidate> = all.into_iter().filter(|one| {
                let new = !names.contains(&one.name);
                names.push(one.name);
                new
            }).collect();
            let decisions = decide(&all, &by(&rules, &zone));
            let snapshots = all.iter().filter(|one| one.kind.is_snapshot()).count();
            prop_assert_eq!(decisions.len(), snapshots);
            prop_assert!(decisions.is_sorted_by_key(|decision| decision.name));
            let keeps = |name| decisions.iter().any(|v| v.name == name && !v.keep.is_empty());
            let good = all.iter().filter(|one| one.kind == EntryKind::Complete);
            if let Some(good) = good.max_by_key(|one| one.name) {
                prop_assert!(keeps(good.name));
            }
            if let Some(newest) = all.iter().filter(|one| one.kind.is_snapshot()).max_by_key(|one| one.name) {
                prop_assert!(keeps(newest.name));
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
                (KeepReason::Hourly, rules.hourly),
                (KeepReason::Daily, rules.daily),
                (KeepReason::Weekly, rules.weekly),
                (KeepReason::Monthly, rules.monthly),
                (KeepReason::Yearly, rules.yearly),
            ] {
                let kept = decisions.iter().filter(|v| v.keep.contains(&reason)).count();
                prop_assert!(kept <= most.limit());
                prop_assert!(most.is_zero() || snapshots == 0 || kept > 0);
            }
        }

        #[test]
        fn more_generous_rules_never_drop_what_the_others_keep(
            all in candidates(), rules in rules(), more in rules()
        ) {
            let sum = |a: KeepCount, b: KeepCount| match a.max(b) {
                KeepCount::ALL => KeepCount::ALL,
                _ => KeepCount::new((a.limit() + b.limit()).try_into().unwrap()),
            };
            let generous = KeepRules {
                last: sum(rules.last, more.last),
                hourly: sum(rules.hourly, more.hourly),
                daily: sum(rules.daily, more.daily),
                weekly: sum(rules.weekly, more.weekly),
                monthly: sum(rules.monthly, more.monthly),
                yearly: sum(rules.yearly, more.yearly),
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
            is_misdated: false,
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
