//! What must be true at each moment of the year, by the rules of docs/run.md and docs/retention.md in their
//! plainest form: which copies are due, and which snapshots are kept. It shares nothing with the code under
//! test. Times are seconds since 1970.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan};
use sprat_testkit::manifest::Manifest;

pub const MINUTE: i64 = 60;
pub const HOUR: i64 = 60 * MINUTE;
pub const DAY: i64 = 24 * HOUR;

/// A source folder as it was, by its name.
pub type Content = Rc<BTreeMap<&'static str, Manifest>>;

#[derive(Debug, Clone, Copy)]
pub enum When {
    Every(i64),
    /// Each day at this local time.
    At(i8, i8),
}

/// `keep_` rules; 0: no such rule.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rules {
    pub hourly: usize,
    pub daily: usize,
    pub weekly: usize,
    pub monthly: usize,
}

#[derive(Debug, Clone)]
pub struct Snap {
    /// The time that is its name.
    pub name: i64,
    pub complete: bool,
    pub pinned: bool,
    pub content: Content,
}

/// How an attempt ended that left no snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lost {
    Failed,
    NotReached,
}

/// One job in one container.
#[derive(Debug, Clone)]
pub struct Copy {
    pub job: &'static str,
    pub container: &'static str,
    pub when: When,
    pub rules: Rules,
    pub prune_every: i64,
    /// Its snapshots, in the order in which they were made.
    pub snaps: Vec<Snap>,
    last_success: Option<i64>,
    last_lost: Option<(i64, Lost)>,
    not_reached_since: Option<i64>,
    failed_in_a_row: usize,
    last_prune: Option<i64>,
    pruned_by: Option<Rules>,
    /// The prune waits for a person.
    pub held: bool,
    /// What a run had made when it was killed: it is there to the last byte, or not at all.
    pub killed: Option<Snap>,
}

impl Copy {
    pub fn new(job: &'static str, container: &'static str, when: When, rules: Rules) -> Self {
        Self {
            job,
            container,
            when,
            rules,
            prune_every: DAY,
            snaps: Vec::new(),
            last_success: None,
            last_lost: None,
            not_reached_since: None,
            failed_in_a_row: 0,
            last_prune: None,
            pruned_by: None,
            held: false,
            killed: None,
        }
    }

    pub fn name(&self) -> String {
        format!("{}@{}", self.job, self.container)
    }

    pub fn is_due(&self, now: i64, zone: &TimeZone) -> bool {
        let success = self.last_success.filter(|at| *at <= now + 5 * MINUTE);
        let by_schedule = match (success, self.when) {
            (None, _) => true,
            (Some(success), When::Every(every)) => now >= less_slack(success, every),
            (Some(success), When::At(hour, minute)) => success < last_at(now, hour, minute, zone),
        };
        by_schedule && self.waits_until(now, zone).is_none_or(|until| now >= until)
    }

    /// Two hours after the server was not reached for the first time, the next attempt is at the next tick or
    /// in an hour: some milliseconds decide.
    pub fn may_wait(&self, now: i64) -> bool {
        let Some((at, Lost::NotReached)) = self.last_lost else {
            return false;
        };
        let since = self.not_reached_since.unwrap_or(at);
        now > since + 2 * HOUR - MINUTE && now < at + HOUR
    }

    fn waits_until(&self, now: i64, zone: &TimeZone) -> Option<i64> {
        let (at, lost) = self.last_lost.filter(|(at, _)| *at <= now + 5 * MINUTE)?;
        let minutes = match lost {
            Lost::NotReached => {
                let since = self.not_reached_since?;
                if since + 2 * HOUR > at {
                    return None;
                }
                60
            }
            Lost::Failed if self.failed_in_a_row > 4 => {
                let next = match self.when {
                    When::Every(every) => less_slack(at, every),
                    When::At(hour, minute) => last_at(at + DAY, hour, minute, zone),
                };
                return Some(next.max(less_slack(at, 4 * HOUR)));
            }
            Lost::Failed => [15, 30, 60, 120][self.failed_in_a_row - 1],
        };
        Some(less_slack(at, minutes * MINUTE))
    }

    /// An attempt that began at `now` left a snapshot.
    pub fn made(&mut self, now: i64, snap: Snap) {
        self.snaps.push(snap);
        self.last_success = Some(now);
        self.last_lost = None;
        self.not_reached_since = None;
        self.failed_in_a_row = 0;
    }

    /// Its names, sorted.
    pub fn names(&self) -> Vec<i64> {
        let mut names: Vec<i64> = self.snaps.iter().map(|snap| snap.name).collect();
        names.sort_unstable();
        names
    }

    pub fn lost(&mut self, now: i64, lost: Lost) {
        self.last_lost = Some((now, lost));
        match lost {
            Lost::Failed => {
                self.failed_in_a_row += 1;
                self.not_reached_since = None;
            }
            Lost::NotReached => {
                self.not_reached_since.get_or_insert(now);
            }
        }
    }

    /// What a run does after it made the copy.
    pub fn prune(&mut self, now: i64, zone: &TimeZone) {
        let last = self.last_prune.filter(|last| *last <= now + 5 * MINUTE);
        if last.is_none_or(|last| now >= less_slack(last, self.prune_every)) {
            self.prune_now(now, zone);
        }
    }

    /// The same after a failure for lack of room, whenever it was last pruned. One that removes nothing does not
    /// put off the next one.
    pub fn prune_for_room(&mut self, now: i64, zone: &TimeZone) {
        if kept(&self.snaps, &self.rules, now, zone).len() < self.snaps.len() {
            self.prune_now(now, zone);
        }
    }

    fn prune_now(&mut self, now: i64, zone: &TimeZone) {
        if self.held {
            return;
        }
        let kept = kept(&self.snaps, &self.rules, now, zone);
        let gone = self.snaps.len() - kept.len();
        let changed = self.pruned_by != Some(self.rules);
        if changed && gone > 5 && gone * 2 > self.snaps.len() {
            self.held = true;
            return;
        }
        self.snaps.retain(|snap| kept.contains(&snap.name));
        self.last_prune = Some(now);
        self.pruned_by = Some(self.rules);
    }

    /// The name of the next snapshot, if the clock shows `now`.
    pub fn next_name(&self, now: i64) -> i64 {
        // A clock that is up to a day behind, or shows a time at which sprat did not exist.
        let reach = if now < 1_767_225_600 {
            i64::MAX
        } else {
            now + DAY
        };
        let names = self.snaps.iter().map(|snap| snap.name);
        match names.filter(|name| *name <= reach).max() {
            Some(newest) if newest >= now => newest + 1,
            _ => now,
        }
    }
}

fn less_slack(at: i64, wait: i64) -> i64 {
    at + wait - (15 * MINUTE / 2).min(wait / 10)
}

pub fn local(at: i64, zone: &TimeZone) -> DateTime {
    zone.to_datetime(Timestamp::from_second(at).unwrap())
}

/// The last moment up to `now` at which the clocks showed this time.
fn last_at(now: i64, hour: i8, minute: i8, zone: &TimeZone) -> i64 {
    let today = local(now, zone).date();
    let on = |date: jiff::civil::Date| {
        let moment = zone.to_ambiguous_timestamp(date.at(hour, minute, 0, 0));
        moment.compatible().unwrap().as_second()
    };
    let at = on(today);
    if at <= now { at } else { on(today - 1.day()) }
}

/// A snapshot with an earlier name was made after it, unless that one is the misdated one.
fn is_misdated(snaps: &[Snap], number: usize) -> bool {
    let name = snaps[number].name;
    let mut later = (number + 1..snaps.len()).filter(|one| !was_behind(snaps, *one));
    was_behind(snaps, number) || later.any(|one| snaps[one].name < name)
}

/// The clock was behind for one run: the two before it and the one after it show that.
fn was_behind(snaps: &[Snap], number: usize) -> bool {
    let name = |one: usize| snaps.get(one).map(|snap| snap.name);
    match (
        number.checked_sub(2).and_then(name),
        number.checked_sub(1).and_then(name),
        name(number + 1),
    ) {
        (Some(one), Some(two), Some(next)) => {
            let is_before = |other: i64| snaps[number].name < other;
            is_before(one) && is_before(two) && two < next
        }
        _ => false,
    }
}

/// The names of what is kept of `snaps`, which are in the order of their making.
pub fn kept(snaps: &[Snap], rules: &Rules, now: i64, zone: &TimeZone) -> BTreeSet<i64> {
    let mut kept = BTreeSet::new();
    let mut counted: Vec<&Snap> = Vec::new();
    for (number, snap) in snaps.iter().enumerate() {
        let wrong = snap.name > now + DAY || is_misdated(snaps, number);
        if wrong {
            kept.insert(snap.name);
        } else {
            counted.push(snap);
        }
        if snap.pinned {
            kept.insert(snap.name);
        }
    }
    counted.sort_by_key(|snap| -snap.name);
    let newest_complete = counted.iter().find(|snap| snap.complete);
    let oldest = counted
        .iter()
        .rfind(|snap| snap.complete)
        .or(counted.last());
    kept.extend(newest_complete.map(|snap| snap.name));
    kept.extend(counted.first().map(|snap| snap.name));
    // Days, ISO weeks and months are local, hours are UTC.
    for (count, period) in [
        (rules.hourly, "%Y-%m-%d %H"),
        (rules.daily, "%Y-%m-%d"),
        (rules.weekly, "%G-%V"),
        (rules.monthly, "%Y-%m"),
    ] {
        if count == 0 {
            continue;
        }
        let of = |snap: &Snap| match period {
            "%Y-%m-%d %H" => local(snap.name, &TimeZone::UTC)
                .strftime(period)
                .to_string(),
            _ => local(snap.name, zone).strftime(period).to_string(),
        };
        let mut periods: Vec<String> = counted.iter().map(|snap| of(snap)).collect();
        periods.dedup();
        for period in periods.iter().take(count) {
            let mut of_it = counted.iter().filter(|snap| of(snap) == *period);
            let newest = of_it.clone().next();
            kept.extend(
                of_it
                    .find(|snap| snap.complete)
                    .or(newest)
                    .map(|snap| snap.name),
            );
        }
        if periods.len() < count {
            kept.extend(oldest.map(|snap| snap.name));
        }
    }
    kept
}
