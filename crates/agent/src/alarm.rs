//! Whether more of a container was overwritten than its policy allows.
//!
//! There are two limits. One is a share of the container's data, in windows of counted time. The other one is a
//! multiple of the usual day: the median of the days on which something was overwritten. The usual day rises by
//! at most 10 % a week, so nobody raises it step by step. What generations saved is counted: nothing that a client
//! says counts.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;

use crate::clock::{DAY_S, Now};
use crate::disk::{self, number};
use crate::generation;
use crate::index::{self, Index};
use crate::policy::Policy;
use crate::ranges::{self, BLOCK};
use crate::retention::Candidate;
use crate::time_text::show_bytes;

/// Less is no alarm, however small the container is.
const BLOCKS_MIN: u64 = (64 << 20) / BLOCK;
const WINDOWS_DAYS: [i64; 3] = [1, 7, 30];
/// The median is of at most so many days on which something was overwritten.
const DAYS_MAX: usize = 60;
/// Fewer days have no median.
const DAYS_MIN: usize = 7;
/// The lowest usual day. From almost nothing, 10 % more is nothing.
const USUAL_MIN: u64 = BLOCKS_MIN / 5;

const DAYS: &str = "days";
const DAYS_BYTES_MAX: u64 = 1 << 16;
const ACKED: &str = "acked";
const ALARM: &str = "alarm";

/// A day of the counted clock on which something was overwritten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Day {
    day: i64,
    blocks: u64,
    /// What was usual when it began; 0: not known yet.
    usual: u64,
}

/// A container's days, the oldest first: the file `days`.
#[derive(Debug, Default, PartialEq, Eq)]
struct Days(Vec<Day>);

impl Days {
    fn read(container: &OwnedFd) -> io::Result<Self> {
        let text = disk::text_in(container, DAYS, DAYS_BYTES_MAX)?;
        Ok(Self::parse(&text.unwrap_or_default()))
    }

    /// A line that is none is left out.
    fn parse(text: &str) -> Self {
        let line = |line: &str| {
            let mut words = line.split(' ');
            Some(Day {
                day: words.next()?.parse().ok()?,
                blocks: words.next()?.parse().ok()?,
                usual: words.next()?.parse().ok()?,
            })
        };
        Self(text.lines().filter_map(line).collect())
    }

    fn to_text(&self) -> String {
        let lines = self.0.iter();
        lines
            .map(|one| format!("{} {} {}\n", one.day, one.blocks, one.usual))
            .collect()
    }

    /// Records what was overwritten on a day, which only becomes more. Returns what was usual when it began.
    fn record(&mut self, day: i64, blocks: u64) -> u64 {
        match self.0.binary_search_by_key(&day, |known| known.day) {
            Ok(at) => {
                let known = &mut self.0[at];
                known.blocks = known.blocks.max(blocks);
                known.usual
            }
            Err(_) if blocks == 0 => 0,
            Err(at) => {
                let usual = usual(&self.0[..at], day);
                self.0.insert(at, Day { day, blocks, usual });
                let surplus = self.0.len().saturating_sub(DAYS_MAX);
                self.0.drain(..surplus);
                usual
            }
        }
    }
}

/// What is usual on `day`, after the days `before`.
fn usual(before: &[Day], day: i64) -> u64 {
    if before.len() < DAYS_MIN {
        return 0;
    }
    let mut sorted: Vec<u64> = before.iter().map(|one| one.blocks).collect();
    sorted.sort_unstable();
    let median = sorted[sorted.len() / 2].max(USUAL_MIN);
    let is_known = |one: &&Day| one.usual > 0;
    let a_week_ago = before
        .iter()
        .rev()
        .filter(is_known)
        .find(|one| one.day <= day - 7);
    match a_week_ago.or_else(|| before.iter().find(is_known)) {
        Some(then) => median.min(then.usual / 10 * 11),
        None => median,
    }
}

/// What the administrator confirmed last: the file `acked`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Acked {
    /// By the counted clock.
    at_s: i64,
    /// The newest generation then, and what it had saved.
    newest: u32,
    saved: u64,
}

impl Acked {
    fn read(container: &OwnedFd) -> io::Result<Self> {
        let text = disk::text_in(container, ACKED, 4096)?;
        Ok(Self::parse(&text.unwrap_or_default()))
    }

    /// Without a text nothing was confirmed yet.
    fn parse(text: &str) -> Self {
        Self {
            at_s: number(text, "acked").unwrap_or(i64::MIN),
            newest: number(text, "newest").unwrap_or(0),
            saved: number(text, "saved").unwrap_or(0),
        }
    }

    fn to_text(self) -> String {
        let Self {
            at_s,
            newest,
            saved,
        } = self;
        format!("acked {at_s}\nnewest {newest}\nsaved {saved}\n")
    }
}

/// How many blocks any of some generations has saved.
type Count<'a> = &'a dyn Fn(&[u32]) -> io::Result<u64>;

/// Generations that count: what was overwritten in them after the last confirmation.
struct Since<'a> {
    acked: Acked,
    count: Count<'a>,
}

impl Since<'_> {
    /// A generation that was open at the confirmation counts with what it saved since. So the sum may be too large,
    /// never too small.
    fn blocks(&self, of: &[&Candidate]) -> io::Result<u64> {
        let later = of.iter().filter(|one| one.counted_s > self.acked.at_s);
        let later: Vec<u32> = later.map(|one| one.number).collect();
        let open = of
            .iter()
            .find(|one| one.number == self.acked.newest && one.counted_s <= self.acked.at_s);
        let more = match open {
            Some(open) => (self.count)(&[open.number])?.saturating_sub(self.acked.saved),
            None => 0,
        };
        Ok((self.count)(&later)? + more)
    }
}

/// Records the days that may have changed since the last time, and finds a reason for an alarm. `used` is what
/// the container's data takes, in blocks.
fn judge(
    days: &mut Days,
    all: &[Candidate],
    used: u64,
    since: &Since<'_>,
    policy: &Policy,
    now: Now,
) -> io::Result<Option<String>> {
    let shown = |blocks: u64| show_bytes(blocks.saturating_mul(BLOCK));
    let mut found = None;
    // A generation of the last day may have taken more since.
    let from = days.0.last().map_or(i64::MIN, |last| last.day - 1);
    let mut by_day: BTreeMap<i64, Vec<&Candidate>> = BTreeMap::new();
    for one in all {
        let day = one.counted_s.div_euclid(DAY_S);
        if day >= from {
            by_day.entry(day).or_default().push(one);
        }
    }
    for (day, of_day) in by_day {
        let numbers: Vec<u32> = of_day.iter().map(|one| one.number).collect();
        let usual = days.record(day, (since.count)(&numbers)?);
        let Some(times) = policy.alarm_times.filter(|_| usual > 0) else {
            continue;
        };
        let most = usual.saturating_mul(times).max(BLOCKS_MIN);
        let blocks = since.blocks(&of_day)?;
        if blocks > most {
            found.get_or_insert(format!(
                "{} were overwritten on one day, more than {times} times the usual {}",
                shown(blocks),
                shown(usual)
            ));
        }
    }
    for window in WINDOWS_DAYS {
        let is_in = |one: &&Candidate| now.counted_s - one.counted_s <= window * DAY_S;
        let recent: Vec<&Candidate> = all.iter().filter(is_in).collect();
        let blocks = since.blocks(&recent)?;
        let share = u128::from(used) * u128::from(policy.alarm_percent);
        if blocks >= BLOCKS_MIN && u128::from(blocks) * 100 >= share {
            found.get_or_insert(format!(
                "{} of {} were overwritten in {window} days",
                shown(blocks),
                shown(used)
            ));
        }
    }
    Ok(found)
}

/// Whether there is an alarm, new or not confirmed yet. `all` are the container's generations.
pub fn check(
    container: &OwnedFd,
    all: &[Candidate],
    policy: &Policy,
    now: Now,
) -> io::Result<Option<String>> {
    let mut days = Days::read(container)?;
    let before = days.to_text();
    let since = Since {
        acked: Acked::read(container)?,
        count: &|numbers| count(container, numbers),
    };
    let used = used(container, all)?;
    let found = judge(&mut days, all, used, &since, policy, now)?;
    let alarm = match (disk::text_in(container, ALARM, 4096)?, found) {
        (Some(there), _) => Some(there.trim_end().to_owned()),
        (None, Some(new)) => {
            store(container, ALARM, &format!("{new}\n"))?;
            Some(new)
        }
        (None, None) => None,
    };
    // After the alarm: a day that is recorded is not judged again for ever.
    if days.to_text() != before {
        store(container, DAYS, &days.to_text())?;
    }
    Ok(alarm)
}

/// A full disk does not stop expiry, which frees space. The next run finds the same again.
fn store(container: &OwnedFd, name: &str, text: &str) -> io::Result<()> {
    let stored = disk::replace_in(container, name, text.as_bytes());
    disk::unless_full(stored).map(drop)
}

/// The administrator has seen the alarm. What was overwritten until now gives none any more.
pub fn confirm(container: &OwnedFd, now: Now) -> io::Result<()> {
    let newest = generation::numbers(container)?.last().copied();
    let saved = newest.map_or(Ok(0), |newest| count(container, &[newest]))?;
    let acked = Acked {
        at_s: now.counted_s,
        newest: newest.unwrap_or(0),
        saved,
    };
    disk::replace_in(container, ACKED, acked.to_text().as_bytes())?;
    disk::remove_in(container, ALARM)
}

/// The data of the container when the newest generation began; by an older one if its map is damaged.
fn used(container: &OwnedFd, all: &[Candidate]) -> io::Result<u64> {
    for one in all.iter().rev() {
        let map = generation::read_map(generation::folder(container, one.number)?);
        if let Some(map) = disk::if_whole(map)? {
            return Ok(ranges::count(&map));
        }
    }
    Ok(0)
}

/// Damage hides nothing: then what overlaps counts twice.
fn count(container: &OwnedFd, numbers: &[u32]) -> io::Result<u64> {
    if let Some(blocks) = disk::if_whole(overwritten(container, numbers))? {
        return Ok(blocks);
    }
    let each = numbers.iter();
    Ok(each
        .filter_map(|one| overwritten(container, &[*one]).ok())
        .sum())
}

/// How many blocks any of these generations has saved.
pub fn overwritten(container: &OwnedFd, numbers: &[u32]) -> io::Result<u64> {
    let scratch = || index::scratch(container);
    let open = |n: usize| -> io::Result<Index> {
        let mut index = generation::index_of(container, numbers[n])?;
        // What is known is counted, here and behind it.
        index.damaged = false;
        Ok(index)
    };
    Ok(index::merge(numbers.len(), &open, &|_| true, &scratch, scratch()?)?.entries)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ranges::Blocks;

    const GIB: u64 = (1 << 30) / BLOCK;

    /// A container and a clock: one generation a day, and what the generations saved.
    struct Model {
        days: Days,
        all: Vec<Candidate>,
        saved: Vec<Blocks>,
        acked: Acked,
        used: u64,
        policy: Policy,
    }

    impl Model {
        fn new(used: u64, policy: &str) -> Self {
            Self {
                days: Days::default(),
                all: Vec::new(),
                saved: Vec::new(),
                acked: Acked::parse(""),
                used,
                policy: Policy::parse(policy).unwrap(),
            }
        }

        fn today(&self) -> i64 {
            self.all.last().map_or(0, |one| one.counted_s / DAY_S)
        }

        fn count(&self, numbers: &[u32]) -> u64 {
            let all = numbers.iter();
            let all = all.flat_map(|number| self.saved[*number as usize - 1].clone());
            ranges::count(&ranges::normal(all.collect()))
        }

        /// The next day: its session overwrites these blocks, and `tidy` runs.
        fn day(&mut self, blocks: Blocks) -> Option<String> {
            let day = i64::try_from(self.all.len()).unwrap();
            let counted_s = day * DAY_S + 7200;
            self.all.push(Candidate {
                number: u32::try_from(self.all.len()).unwrap() + 1,
                bucket_s: counted_s,
                counted_s,
                stood_s: 80_000,
                secret: false,
                fixed: false,
            });
            self.saved.push(blocks);
            self.tidy()
        }

        /// What is saved more in the open generation.
        fn more(&mut self, blocks: Blocks) -> Option<String> {
            self.saved.last_mut().unwrap().extend(blocks);
            self.tidy()
        }

        fn tidy(&mut self) -> Option<String> {
            let mut days = std::mem::take(&mut self.days);
            let since = Since {
                acked: self.acked,
                count: &|numbers| Ok(self.count(numbers)),
            };
            let now = self.now();
            let found = judge(&mut days, &self.all, self.used, &since, &self.policy, now).unwrap();
            self.days = Days::parse(&days.to_text());
            assert_eq!(self.days, days);
            found
        }

        fn now(&self) -> Now {
            let counted_s = self.today() * DAY_S + 80_000;
            Now {
                counted_s,
                bucket_s: counted_s,
                wall_s: counted_s,
                apart: false,
            }
        }

        /// What [`confirm`] does.
        fn ack(&mut self) {
            let newest = self.all.last().unwrap().number;
            let acked = Acked {
                at_s: self.now().counted_s,
                newest,
                saved: self.count(&[newest]),
            };
            self.acked = Acked::parse(&acked.to_text());
            assert_eq!(self.acked, acked);
        }
    }

    /// Sixteen pieces, always somewhere else.
    fn spread(day: u64, blocks: u64, used: u64) -> Blocks {
        let place = |n: u64| (day * 7919 + n * 104_729) * 4099 % used;
        let pieces = (0..16).map(|n| place(n)..place(n) + blocks / 16);
        ranges::normal(pieces.collect())
    }

    fn one_piece(at: u64, blocks: u64) -> Blocks {
        std::iter::once(at..at + blocks).collect()
    }

    /// The attacker overwrites 4.99 times the median each day, so the median rises. The usual day does not follow.
    #[test]
    fn an_attacker_who_rises_with_the_median_raises_the_alarm() {
        let mut model = Model::new(1024 * GIB, "alarm = 100% or 5x");
        for day in 0..60 {
            assert_eq!(model.day(spread(day, GIB / 4, 1024 * GIB)), None, "{day}");
        }
        let mut at = 0;
        for day in 0..60 {
            let mut sorted: Vec<u64> = model.days.0.iter().map(|one| one.blocks).collect();
            sorted.sort_unstable();
            let blocks = sorted[30] * 499 / 100;
            let alarm = model.day(one_piece(at, blocks));
            at += blocks;
            if let Some(text) = alarm {
                assert!(text.contains("5 times the usual"), "{text}");
                // The median has risen once, after 30 days.
                assert!((28..32).contains(&day), "{day}");
                return;
            }
        }
        panic!("no alarm, and {at} blocks overwritten");
    }

    /// The attacker first writes nine times the data into free space. So what is overwritten is a small share.
    #[test]
    fn an_attacker_who_first_fills_the_container_raises_the_alarm() {
        for (policy, is_alarm) in [("alarm = 30%", false), ("", true)] {
            let mut model = Model::new(100 * GIB, policy);
            for day in 0..20 {
                assert_eq!(model.day(spread(day, GIB / 8, 100 * GIB)), None);
            }
            model.used *= 10;
            assert_eq!(model.day(one_piece(0, 90 * GIB)).is_some(), is_alarm);
        }
    }

    #[test]
    fn a_usual_day_rises_by_a_tenth_in_a_week() {
        let mut days = Days::default();
        for day in 0..100 {
            days.record(day, if day < 10 { 10_000 } else { 1_000_000 });
        }
        for pair in days.0.windows(8) {
            assert!(pair[7].usual <= pair[0].usual / 10 * 11, "{pair:?}");
        }
        let last = days.0.last().unwrap().usual;
        assert!((20_000..40_000).contains(&last), "{last}");
        assert_eq!(days.0.len(), DAYS_MAX);
        // A smaller day makes it smaller, but not less than the least.
        for day in 100..160 {
            days.record(day, 1);
        }
        assert_eq!(days.0.last().unwrap().usual, USUAL_MIN);
    }

    /// A year: half a percent a day and a virtual machine's image of 1.5 %, which is written as a whole each month.
    #[test]
    fn a_normal_year_gives_no_alarm() {
        let used = 500 * GIB;
        let mut model = Model::new(used, "");
        for day in 0..365 {
            let mut blocks = spread(day, used / 200 * (50 + day * 13 % 100) / 100, used);
            if day % 30 == 29 {
                blocks.extend(one_piece(0, used * 3 / 200));
            }
            assert_eq!(model.day(blocks), None, "{day}");
        }
    }

    /// The image is twenty times the usual day: an alarm each month. Without a multiple it is none.
    #[test]
    fn a_confirmation_does_not_allow_the_same_amount_again() {
        let used = 500 * GIB;
        let image = used / 20;
        let year = |policy: &str| {
            let mut model = Model::new(used, policy);
            let mut alarms = Vec::new();
            for day in 0..365 {
                let mut blocks = spread(day, used / 400, used);
                if day % 30 == 29 {
                    blocks.extend(one_piece(0, image + day * 10));
                }
                if model.day(blocks).is_some() {
                    alarms.push(day);
                    model.ack();
                    assert_eq!(model.tidy(), None, "{day}");
                }
            }
            alarms
        };
        assert_eq!(year("alarm = 30%"), [0_u64; 0]);
        let months: Vec<u64> = (0..12).map(|month| month * 30 + 29).collect();
        assert_eq!(year(""), months);
    }

    /// The generation that was open at the confirmation goes on.
    #[test]
    fn what_is_overwritten_after_a_confirmation_counts() {
        let used = 100 * GIB;
        let mut model = Model::new(used, "alarm = 30%");
        assert_eq!(model.day(one_piece(0, GIB)), None);
        assert!(model.more(one_piece(0, 40 * GIB)).is_some());
        model.ack();
        assert_eq!(model.tidy(), None);
        assert_eq!(model.more(one_piece(40 * GIB, 10 * GIB)), None);
        assert!(model.more(one_piece(50 * GIB, 25 * GIB)).is_some());
        model.ack();
        // The same blocks once more.
        assert!(model.day(one_piece(0, 40 * GIB)).is_some());
    }

    #[test]
    fn a_line_that_is_none_is_left_out() {
        let text = "1 2 3\nx\n4 5\n6 7 8\n";
        assert_eq!(Days::parse(text).to_text(), "1 2 3\n6 7 8\n");
    }
}
