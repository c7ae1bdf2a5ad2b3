//! Which generations stay: a pure decision by the policy and the agent's clock.
//!
//! Of each bucket of the calendar three stay: the FIRST one, the one that STOOD LONGEST, and the first
//! SECRET one. The first does not depend on anything a client does later. Who shows damage only for
//! moments does not stand long, and nobody knows the secret moments.

use std::collections::{BTreeMap, BTreeSet};

use crate::clock::{DAY_S, Now};
use crate::policy::{Bucket, Policy};
use crate::time_text::civil;

/// A state counts for `at_least` if it stood this long.
const STOOD_MIN_S: i64 = 6 * 3600;

/// What decides about one generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    pub number: u32,
    /// The state's place in the calendar.
    pub bucket_s: i64,
    /// When the generation was begun, by the counted clock.
    pub counted_s: i64,
    pub stood_s: i64,
    pub secret: bool,
    /// Pinned or held: stays whatever the policy says.
    pub fixed: bool,
}

/// The generations that may be removed, ascending. `all` is sorted by number; the last one takes old
/// contents and always stays.
pub fn expired(all: &[Candidate], policy: &Policy, now: Now) -> Vec<u32> {
    let Some((newest, older)) = all.split_last() else {
        return Vec::new();
    };
    // Wall clock and counted clock are apart: nobody knows how old anything is.
    if now.apart {
        return Vec::new();
    }
    let mut stays: BTreeSet<u32> = BTreeSet::from([newest.number]);
    stays.extend(older.iter().filter(|one| one.fixed).map(|one| one.number));
    for rule in &policy.keep {
        let young = |one: &&Candidate| now.counted_s - one.counted_s <= rule.for_s;
        let mut buckets: BTreeMap<(i64, i64), Vec<Candidate>> = BTreeMap::new();
        for one in all {
            buckets
                .entry(bucket(rule.bucket, one))
                .or_default()
                .push(*one);
        }
        for inside in buckets.values() {
            let picks = [
                inside.first(),
                // Of those that stood as long the first one: a later one changes nothing.
                inside.iter().rev().max_by_key(|one| one.stood_s),
                inside.iter().find(|one| one.secret),
            ];
            stays.extend(
                picks
                    .into_iter()
                    .flatten()
                    .filter(young)
                    .map(|one| one.number),
            );
        }
    }
    let stood = older.iter().rev().filter(|one| one.stood_s >= STOOD_MIN_S);
    stays.extend(stood.take(policy.at_least).map(|one| one.number));
    all.iter()
        .map(|one| one.number)
        .filter(|number| !stays.contains(number))
        .collect()
}

fn bucket(bucket: Bucket, one: &Candidate) -> (i64, i64) {
    let day = one.bucket_s.div_euclid(DAY_S);
    match bucket {
        Bucket::All => (i64::from(one.number), 0),
        Bucket::Day => (day, 0),
        // 1970-01-01 was a Thursday; weeks begin on Mondays.
        Bucket::Week => ((day + 3).div_euclid(7), 0),
        Bucket::Month => {
            let (year, month, _) = civil(day);
            (year, month)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const START: i64 = 1_800_000_000;

    fn at(number: u32, counted_s: i64, stood_s: i64, secret: bool) -> Candidate {
        Candidate {
            number,
            bucket_s: START + counted_s,
            counted_s,
            stood_s,
            secret,
            fixed: false,
        }
    }

    fn now(counted_s: i64) -> Now {
        Now {
            counted_s,
            bucket_s: START + counted_s,
            wall_s: START + counted_s,
            apart: false,
        }
    }

    /// Removes what has expired, day after day, as `tidy` does; a step is a list of new ones.
    fn live(history: &[Candidate], until_s: i64, policy: &Policy) -> Vec<Candidate> {
        let mut kept: Vec<Candidate> = Vec::new();
        let mut next = history.iter().peekable();
        // Every day, and at the end.
        for time in (0..until_s).step_by(86_400).chain([until_s]) {
            while let Some(one) = next.next_if(|one| one.counted_s <= time) {
                kept.push(*one);
            }
            let gone = expired(&kept, policy, now(time));
            kept.retain(|one| !gone.contains(&one.number));
        }
        kept
    }

    #[test]
    fn nightly_states_are_thinned_by_day_week_and_month() {
        let history: Vec<_> = (0..400)
            .map(|day| {
                at(
                    u32::try_from(day).unwrap() + 1,
                    day * DAY_S + 7200,
                    80_000,
                    false,
                )
            })
            .collect();
        let kept = live(&history, 400 * DAY_S, &Policy::default());
        assert!((45..60).contains(&kept.len()), "{}", kept.len());
        let ages: Vec<i64> = kept.iter().map(|one| 400 - one.counted_s / DAY_S).collect();
        assert_eq!(ages.iter().filter(|age| **age <= 30).count(), 30);
        assert!(ages[0] >= 330, "{ages:?}");
    }

    /// For months an intruder garbles the container at 00:00:01 and puts it right at 00:00:21: the first
    /// state of each day, week and month is a damaged one. He also burns the tokens before the honest night.
    #[test]
    fn flips_at_midnight_leave_undamaged_states() {
        let mut history = Vec::new();
        let mut damaged = BTreeSet::new();
        let mut number = 0;
        let mut add = |counted_s: i64, stood_s: i64, secret: bool, is_damaged: bool| {
            number += 1;
            history.push(at(number, counted_s, stood_s, secret));
            if is_damaged {
                damaged.insert(number);
            }
        };
        // START is at 08:00; midnight is 16 hours later.
        for day in 0..140 {
            let midnight = day * DAY_S + 16 * 3600;
            add(midnight + 1, 20, false, true);
            for burnt in 0..10 {
                add(midnight + 3600 + burnt, 1, false, true);
            }
            add(midnight + 2 * 3600, 80_000, false, false);
            add(midnight + 9 * 3600 + day % 7 * 600, 600, true, day % 3 == 0);
        }
        let kept = live(&history, 140 * DAY_S, &Policy::default());
        let good = |one: &&Candidate| {
            !damaged.contains(&one.number) && 140 * DAY_S - one.counted_s > 8 * DAY_S
        };
        let good = kept.iter().filter(good).count();
        assert!(good >= 30, "{good} undamaged states are older than 8 days");
    }

    #[test]
    fn the_last_ones_that_stood_stay_however_old_they_are() {
        let mut all: Vec<_> = (1..6)
            .map(|n| at(n, i64::from(n) * 100, 30_000, false))
            .collect();
        all.extend((6..50).map(|n| at(n, 10_000 + i64::from(n), 60, false)));
        let gone = expired(&all, &Policy::default(), now(4000 * DAY_S));
        let kept: Vec<u32> = all
            .iter()
            .map(|one| one.number)
            .filter(|n| !gone.contains(n))
            .collect();
        assert_eq!(kept, [3, 4, 5, 49]);
    }

    #[test]
    fn nothing_expires_while_the_clocks_are_apart_or_it_is_held() {
        let mut all = vec![at(1, 0, 0, false), at(2, 1, 0, false), at(3, 2, 0, false)];
        let late = now(4000 * DAY_S);
        assert_eq!(expired(&all, &Policy::default(), late), [1, 2]);
        assert!(
            expired(
                &all,
                &Policy::default(),
                Now {
                    apart: true,
                    ..late
                }
            )
            .is_empty()
        );
        all[0].fixed = true;
        assert_eq!(expired(&all, &Policy::default(), late), [2]);
    }

    fn any_history() -> impl Strategy<Value = Vec<(i64, i64, bool)>> {
        proptest::collection::vec((0_i64..3 * DAY_S, 0_i64..2 * DAY_S, any::<bool>()), 1..60)
    }

    fn candidates(steps: &[(i64, i64, bool)]) -> Vec<Candidate> {
        let mut time = 0;
        let numbered = steps.iter().zip(1..);
        numbered
            .map(|((step, stood, secret), number)| {
                time += step;
                at(number, time, *stood, *secret)
            })
            .collect()
    }

    proptest! {
        /// The first ones of their buckets that are kept of before a moment do not depend on what comes later.
        #[test]
        fn later_generations_remove_no_first_one(before in any_history(), after in any_history()) {
            let policy = Policy { at_least: 0, ..Policy::default() };
            let all = candidates(&[before.clone(), after].concat());
            let early = &all[..before.len()];
            let end = all.last().unwrap().counted_s;
            let firsts = |list: &[Candidate]| {
                let mut firsts = BTreeSet::new();
                for rule in &policy.keep {
                    let mut seen = BTreeSet::new();
                    for one in list {
                        let is_first = seen.insert(bucket(rule.bucket, one));
                        if is_first && end - one.counted_s <= rule.for_s {
                            firsts.insert(one.number);
                        }
                    }
                }
                firsts
            };
            let kept: BTreeSet<u32> = live(&all, end, &policy).iter().map(|one| one.number).collect();
            for number in firsts(early) {
                prop_assert!(kept.contains(&number), "{number}");
            }
        }

        /// Nothing younger than `all` goes, the newest stays, and running it twice changes nothing.
        #[test]
        fn what_is_young_stays_and_a_second_run_finds_nothing(steps in any_history()) {
            let all = candidates(&steps);
            let moment = now(all.last().unwrap().counted_s);
            let policy = Policy::default();
            let gone = expired(&all, &policy, moment);
            prop_assert!(!gone.contains(&all.last().unwrap().number));
            let mut kept = Vec::new();
            for one in &all {
                let is_gone = gone.contains(&one.number);
                prop_assert!(!(is_gone && moment.counted_s - one.counted_s <= 7 * DAY_S));
                if !is_gone {
                    kept.push(*one);
                }
            }
            prop_assert_eq!(expired(&kept, &policy, moment), Vec::<u32>::new());
        }
    }
}
