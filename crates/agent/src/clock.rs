//! The agent's own clock: counted seconds, which no wrong wall clock makes faster.
//!
//! Ages are differences of *counted* seconds. They follow CLOCK_BOOTTIME while the machine runs. Across a
//! boot they follow the wall clock, but at most one day, and only after 30 minutes of uptime: a clock
//! that is wrong until NTP answers, and many reboots, count nothing. Buckets of the calendar use counted
//! seconds plus an offset that follows the wall clock by at most one hour a day.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::time::ClockId;

use crate::disk::{Flock, Slots, bad, field, if_whole, number};

pub const DAY_S: i64 = 86_400;
/// Across a boot nothing is counted before this.
const UPTIME_MIN_S: i64 = 1800;
/// The record is written at most this often.
const WRITE_INTERVAL_S: i64 = 60;
/// A tick takes 10 ms at most.
const TICK_MAX_MS: u32 = 20;
pub const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The machine's clocks at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reading {
    pub boot: String,
    /// Seconds since the boot, sleep included.
    pub up_s: i64,
    /// Unix seconds.
    pub wall_s: i64,
}

/// What is counted so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counted {
    pub last: Reading,
    pub counted_s: i64,
    /// Unix seconds when counting began.
    pub adopted_s: i64,
    pub offset_s: i64,
}

/// A moment by the agent's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    pub counted_s: i64,
    /// The moment in the calendar of buckets.
    pub bucket_s: i64,
    pub wall_s: i64,
    /// Wall clock and counted seconds are more than a day apart: nothing expires.
    pub apart: bool,
}

impl Counted {
    /// Begins with so many seconds.
    fn begin(reading: &Reading, counted_s: i64) -> Self {
        Self {
            last: reading.clone(),
            counted_s,
            adopted_s: reading.wall_s - counted_s,
            offset_s: 0,
        }
    }

    /// Counts up to `reading`. Not counted yet: soon after a boot.
    pub fn advance(&self, reading: &Reading) -> Self {
        let step = if reading.boot == self.last.boot {
            (reading.up_s - self.last.up_s).max(0)
        } else if reading.up_s < UPTIME_MIN_S {
            return self.clone();
        } else {
            (reading.wall_s - self.last.wall_s).clamp(0, DAY_S)
        };
        let most = (reading.wall_s - self.adopted_s).saturating_add(DAY_S);
        // Within one boot real time has passed, whatever the wall clock shows.
        let counted_s = if reading.boot == self.last.boot {
            self.counted_s + step
        } else {
            (self.counted_s + step).min(most).max(self.counted_s)
        };
        let may_move = ((counted_s - self.counted_s) * 3600 + DAY_S - 1) / DAY_S;
        let wanted = reading.wall_s - self.adopted_s - counted_s;
        let offset_s = self.offset_s + (wanted - self.offset_s).clamp(-may_move, may_move);
        Self {
            last: reading.clone(),
            counted_s,
            adopted_s: self.adopted_s,
            offset_s,
        }
    }

    /// The administrator says that the wall clock is right.
    pub fn accept(&self, reading: &Reading) -> Self {
        let wanted = reading.wall_s - self.adopted_s;
        let counted_s = wanted.max(self.counted_s);
        let adopted_s = if wanted < self.counted_s {
            reading.wall_s - self.counted_s
        } else {
            self.adopted_s
        };
        Self {
            last: reading.clone(),
            counted_s,
            adopted_s,
            offset_s: 0,
        }
    }

    pub fn now(&self) -> Now {
        let apart = (self.last.wall_s - self.adopted_s - self.counted_s).abs() > DAY_S;
        let bucket_s = self.adopted_s + self.counted_s + self.offset_s;
        Now {
            counted_s: self.counted_s,
            bucket_s,
            wall_s: self.last.wall_s,
            apart,
        }
    }

    fn to_text(&self) -> String {
        format!(
            "boot {}\nup {}\nwall {}\ncounted {}\nadopted {}\noffset {}\n",
            self.last.boot,
            self.last.up_s,
            self.last.wall_s,
            self.counted_s,
            self.adopted_s,
            self.offset_s
        )
    }

    fn parse(text: &str) -> Option<Self> {
        let last = Reading {
            boot: field(text, "boot")?.to_owned(),
            up_s: number(text, "up")?,
            wall_s: number(text, "wall")?,
        };
        Some(Self {
            last,
            counted_s: number(text, "counted")?,
            adopted_s: number(text, "adopted")?,
            offset_s: number(text, "offset")?,
        })
    }
}

/// Reads the machine's clocks.
pub fn reading(boot: &str) -> Reading {
    let wall = SystemTime::now().duration_since(UNIX_EPOCH);
    Reading {
        boot: boot.to_owned(),
        up_s: rustix::time::clock_gettime(ClockId::Boottime).tv_sec,
        wall_s: wall.map_or(0, |wall| i64::try_from(wall.as_secs()).unwrap_or(i64::MAX)),
    }
}

/// Waits until a change of this file gives it a later time: the kernel's times are those of its last tick, some
/// milliseconds apart. False: that takes longer, since the file system knows whole seconds only, or the clock was set back.
pub fn wait_for_later_times(file: &File) -> io::Result<bool> {
    for _ in 0..TICK_MAX_MS {
        let now = rustix::time::clock_gettime(ClockId::RealtimeCoarse);
        let found = file.metadata()?;
        let is_past = match found.ctime_nsec() {
            0 => found.ctime() < now.tv_sec,
            ns => (found.ctime(), ns) < (now.tv_sec, now.tv_nsec),
        };
        if is_past {
            return Ok(true);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(false)
}

/// The id of this boot, 32 hex digits.
pub fn boot_id() -> io::Result<String> {
    let id = std::fs::read_to_string(BOOT_ID)?;
    Ok(id.chars().filter(char::is_ascii_hexdigit).collect())
}

/// The clock's record, shared by all processes of a root.
#[derive(Debug)]
pub struct Clock {
    lock: Flock,
    slots: Slots,
    boot: String,
}

impl Clock {
    /// `folder` is `.sprat-agent`.
    pub fn open(folder: &OwnedFd) -> io::Result<Self> {
        let folder = folder.as_fd();
        Ok(Self {
            lock: Flock::open(folder, "clock.lock")?,
            slots: Slots::open(folder, "clock")?,
            boot: boot_id()?,
        })
    }

    /// The id of this boot.
    pub fn boot(&self) -> &str {
        &self.boot
    }

    pub fn now(&self) -> io::Result<Now> {
        self.update(Counted::advance, None)
    }

    /// Also begins again where the record is damaged: at `at_least_s`, when the youngest state was begun.
    pub fn accept(&self, at_least_s: i64) -> io::Result<Now> {
        self.update(Counted::accept, Some(at_least_s))
    }

    fn update(
        &self,
        change: impl Fn(&Counted, &Reading) -> Counted,
        at_least_s: Option<i64>,
    ) -> io::Result<Now> {
        let _locked = self.lock.exclusive()?;
        let reading = reading(&self.boot);
        let stored = match (if_whole(self.slots.read())?, at_least_s) {
            (Some(found), _) => found.and_then(|(_, text)| Counted::parse(&text)),
            // Nothing becomes older than the youngest state is: so nothing expires too early.
            (None, Some(at_least_s)) => {
                let begun = Counted::begin(&reading, at_least_s);
                self.slots.write(&begun.to_text())?;
                Some(begun)
            }
            (None, None) => {
                return Err(bad(
                    "the record of the clock is damaged; run sprat-agent clock accept",
                ));
            }
        };
        let changed = match &stored {
            Some(stored) => change(stored, &reading),
            None => Counted::begin(&reading, 0),
        };
        let moved = stored.as_ref().is_none_or(|stored| {
            let same_boot = stored.last.boot == changed.last.boot;
            !same_boot
                || changed.adopted_s != stored.adopted_s
                || (changed.counted_s - stored.counted_s).abs() >= WRITE_INTERVAL_S
        });
        if moved {
            self.slots.write(&changed.to_text())?;
        }
        Ok(changed.now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::FileExt;

    fn at(boot: u32, up_s: i64, wall_s: i64) -> Reading {
        Reading {
            boot: boot.to_string(),
            up_s,
            wall_s,
        }
    }

    const WALL: i64 = 1_800_000_000;

    #[test]
    fn a_damaged_record_begins_again_at_the_youngest_state() {
        let folder = tempfile::tempdir().unwrap();
        let clock = Clock::open(&crate::disk::open_folder(folder.path()).unwrap()).unwrap();
        clock.now().unwrap();
        std::fs::write(folder.path().join("clock"), [7; 1024]).unwrap();
        let error = clock.now().unwrap_err().to_string();
        assert!(error.contains("clock accept"), "{error}");
        clock.accept(5_000_000).unwrap();
        let now = clock.now().unwrap();
        assert!((5_000_000..5_000_100).contains(&now.counted_s) && !now.apart);
    }

    #[test]
    fn a_clock_that_is_ten_years_ahead_makes_nothing_older() {
        let begun = Counted::begin(&at(1, 100, WALL), 0);
        let later = begun.advance(&at(1, 700, WALL + 10 * 365 * DAY_S));
        assert_eq!(later.counted_s, 600);
        assert!(later.now().apart);
        let back = later.advance(&at(1, 1300, WALL + 1200));
        assert_eq!(back.counted_s, 1200);
        assert!(!back.now().apart);
    }

    /// Reboots every ten minutes with a clock that is ahead until NTP answers.
    #[test]
    fn reboots_with_a_wrong_clock_count_nothing() {
        let mut counted = Counted::begin(&at(0, 100, WALL), 0);
        for boot in 1..500 {
            let real = WALL + i64::from(boot) * 600;
            counted = counted.advance(&at(boot, 10, real + 40 * DAY_S));
            counted = counted.advance(&at(boot, 590, real + 580));
        }
        assert!(counted.counted_s <= 500 * 600, "{}", counted.counted_s);
        // The machine stays up: the time that passed is counted, at most a day of it.
        let up = counted.advance(&at(500, 2000, WALL + 300_000 + 2000));
        assert_eq!(up.counted_s, counted.counted_s + DAY_S);
    }

    #[test]
    fn days_stay_days_after_one_wrong_reading() {
        let mut counted = Counted::begin(&at(1, 0, WALL), 0);
        counted = counted.advance(&at(1, 100, WALL + 3650 * DAY_S));
        let mut days = std::collections::BTreeSet::new();
        for day in 1..=365 {
            counted = counted.advance(&at(1, 100 + day * DAY_S, WALL + 100 + day * DAY_S));
            days.insert(counted.now().bucket_s.div_euclid(DAY_S));
        }
        assert!(days.len() >= 364, "{} days", days.len());
    }

    #[test]
    fn an_accepted_clock_is_no_longer_apart() {
        let begun = Counted::begin(&at(1, 100, WALL), 0);
        for wall in [WALL + 20 * DAY_S, WALL - 20 * DAY_S] {
            let apart = begun.advance(&at(1, 700, wall));
            assert!(apart.now().apart);
            let accepted = apart.accept(&at(1, 700, wall));
            assert!(!accepted.now().apart && accepted.counted_s >= apart.counted_s);
        }
    }

    proptest! {
        /// Whatever the wall clock shows: counted time never goes back. Within one boot it is the uptime.
        #[test]
        fn counted_time_is_never_faster_than_the_machine(
            steps in proptest::collection::vec((any::<bool>(), 0_i64..100_000, -10_i64..10), 1..40)
        ) {
            let mut counted = Counted::begin(&at(0, 0, WALL), 0);
            let (mut boot, mut up, mut real) = (0, 0, 0);
            for (reboots, step, years) in steps {
                if reboots {
                    boot += 1;
                    up = 0;
                }
                up += step;
                real += step;
                let next = counted.advance(&at(boot, up, WALL + real + years * 365 * DAY_S));
                prop_assert!(next.counted_s >= counted.counted_s);
                if !reboots && counted.last.boot == boot.to_string() {
                    prop_assert_eq!(next.counted_s - counted.counted_s, up - counted.last.up_s);
                } else {
                    prop_assert!(next.counted_s - counted.counted_s <= DAY_S);
                }
                let text = next.to_text();
                prop_assert_eq!(Counted::parse(&text).unwrap(), next.clone());
                counted = next;
            }
        }
    }

    #[test]
    fn after_the_wait_every_change_has_a_later_time() {
        let file = tempfile::tempfile().unwrap();
        for round in 0..20 {
            file.write_all_at(&[round], 0).unwrap();
            assert!(wait_for_later_times(&file).unwrap());
            let found = file.metadata().unwrap();
            let time = (found.ctime(), found.ctime_nsec());
            // The times of files are at least those of this clock.
            let now = rustix::time::clock_gettime(ClockId::RealtimeCoarse);
            assert!(time < (now.tv_sec, now.tv_nsec), "round {round}");
        }
    }
}
