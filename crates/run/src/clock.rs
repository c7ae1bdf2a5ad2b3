//! Decides whether this machine's clock is in doubt.
//!
//! While it is, copies are made, but nothing is pruned and no event `overdue` opens. What is known
//! of the clock lies in the state folder, `clock.json`. The rules are pure functions: the caller
//! passes the time.

use std::path::Path;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::state_file::StateFile;
use crate::times::is_ahead;

/// In one boot the wall clock and CLOCK_BOOTTIME may move apart by so much between two ticks, and a
/// server's clock may differ by so much.
const APART_MAX: SignedDuration = SignedDuration::from_hours(1);
/// A doubt that nothing confirms or ends is over after so long, while the machine runs.
const DOUBT_MAX: Duration = Duration::from_secs(24 * 3600);

/// With the value 1 in the environment the caller leaves all of this out: the clock is right. For
/// tests.
pub const TRUST_VARIABLE: &str = "SPRAT_TRUST_CLOCK";

/// A moment on all clocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moment {
    /// The wall clock.
    pub wall: Timestamp,
    /// CLOCK_MONOTONIC: since the boot, without sleep.
    pub monotonic: Duration,
    /// CLOCK_BOOTTIME: since the boot, with sleep.
    pub boottime: Duration,
    /// Another one after each boot.
    pub boot_id: String,
}

impl Moment {
    /// Now.
    #[must_use]
    pub fn now() -> Self {
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
        let read = |clock| Duration::try_from(clock_gettime(clock)).unwrap_or_default();
        Self {
            wall: Timestamp::now(),
            monotonic: read(ClockId::Monotonic),
            boottime: read(ClockId::Boottime),
            boot_id: boot_id.unwrap_or_default().trim().to_owned(),
        }
    }
}

/// Why the clock is in doubt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// It was set, by so many seconds.
    Jumped {
        /// Forward, or back if negative.
        seconds: i64,
    },
    /// It is behind a time at which this machine already was.
    BehindState {
        /// That time.
        newest: Timestamp,
    },
    /// A server's clock differs.
    ServerDiffers {
        /// So much is the server ahead of this machine.
        seconds: i64,
    },
}

/// A doubt, and how long it lasts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Doubt {
    /// Why.
    pub cause: Cause,
    /// For how long the machine ran meanwhile.
    pub ran_seconds: u64,
    /// A run reported it.
    #[serde(default)]
    reported: bool,
}

/// The last tick.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Tick {
    boot_id: String,
    wall: Timestamp,
    boottime_seconds: u64,
    monotonic_seconds: u64,
}

/// What is known of this machine's clock.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ClockState {
    tick: Option<Tick>,
    /// The newest time at which this machine was, as far as its clock was not in doubt afterwards.
    newest: Option<Timestamp>,
    doubt: Option<Doubt>,
    /// A doubt ended only by its age.
    unconfirmed: bool,
    /// A server's clock agreed in this boot, and the clock was not set since.
    server_agreed: bool,
    /// Times in the state after the first and up to the second are of a clock that was wrong.
    wrong: Option<(Timestamp, Timestamp)>,
}

impl ClockState {
    /// A run begins, or a check for overdue copies. `synchronised` is [`is_synchronised`]; `times`
    /// are the times in the state of all copies.
    pub fn tick(
        &mut self,
        moment: &Moment,
        synchronised: bool,
        times: impl IntoIterator<Item = Timestamp>,
    ) {
        let now = moment.wall;
        let tick = Tick {
            boot_id: moment.boot_id.clone(),
            wall: now,
            boottime_seconds: moment.boottime.as_secs(),
            monotonic_seconds: moment.monotonic.as_secs(),
        };
        let before = self.tick.replace(tick.clone());
        let same_boot = before.filter(|before| before.boot_id == tick.boot_id);
        if same_boot.is_none() {
            self.server_agreed = false;
        }
        let ran = tick.monotonic_seconds
            - same_boot.as_ref().map_or(0, |before| {
                before.monotonic_seconds.min(tick.monotonic_seconds)
            });
        if let Some(doubt) = &mut self.doubt {
            doubt.ran_seconds = doubt.ran_seconds.saturating_add(ran);
        }
        let wrong = self.wrong;
        let believed =
            |time: &Timestamp| wrong.is_none_or(|(from, to)| *time <= from || *time > to);
        let newest = times.into_iter().filter(believed).chain(self.newest).max();
        self.newest = newest;
        if let Some(seconds) = same_boot.and_then(|before| jump(&before, &tick)) {
            self.server_agreed = false;
            self.begin(Cause::Jumped { seconds });
        }
        if let Some(newest) = newest.filter(|newest| is_ahead(*newest, now)) {
            self.begin(Cause::BehindState { newest });
        }
        self.newest = newest.max(Some(now));
        if synchronised {
            self.confirm(now);
        } else if self.doubt.as_ref().is_some_and(Doubt::is_over) {
            self.end(now);
            self.unconfirmed = true;
        }
    }

    /// A server that is reached by ssh has this clock at `now`: it just wrote a file of this time.
    pub fn server(&mut self, now: Timestamp, synchronised: bool, server: Timestamp) {
        let apart = server.duration_since(now);
        if synchronised || apart.abs() <= APART_MAX {
            self.server_agreed = apart.abs() <= APART_MAX;
            self.confirm(now);
        } else if !self.server_agreed && !self.unconfirmed {
            let seconds = apart.as_secs();
            self.begin(Cause::ServerDiffers { seconds });
        }
    }

    /// Why the clock is in doubt; `None`: it is not.
    #[must_use]
    pub fn doubt(&self) -> Option<&Doubt> {
        self.doubt.as_ref()
    }

    /// Why the clock is in doubt, for the first caller since the doubt began.
    pub fn take_unreported(&mut self) -> Option<Cause> {
        let doubt = self.doubt.as_mut().filter(|doubt| !doubt.reported)?;
        doubt.reported = true;
        Some(doubt.cause.clone())
    }

    /// A doubt ended only because it was old, and nothing confirmed the clock since: the event
    /// `clock` is open.
    #[must_use]
    pub fn is_unconfirmed(&self) -> bool {
        self.unconfirmed
    }

    /// The first cause stays.
    fn begin(&mut self, cause: Cause) {
        self.doubt.get_or_insert(Doubt {
            cause,
            ran_seconds: 0,
            reported: false,
        });
    }

    fn confirm(&mut self, now: Timestamp) {
        self.end(now);
        self.unconfirmed = false;
    }

    /// The clock is right: later times were wrong.
    fn end(&mut self, now: Timestamp) {
        self.doubt = None;
        if let Some(newest) = self.newest.filter(|newest| is_ahead(*newest, now)) {
            let newest = self.wrong.map_or(newest, |(_, to)| newest.max(to));
            self.wrong = Some((now, newest));
            self.newest = Some(now);
        }
        self.wrong = self.wrong.filter(|(_, to)| *to > now);
    }
}

impl Doubt {
    fn is_over(&self) -> bool {
        self.ran_seconds >= DOUBT_MAX.as_secs()
    }
}

/// By how many seconds the wall clock was set between two ticks of one boot, if by more than an
/// hour.
fn jump(before: &Tick, now: &Tick) -> Option<i64> {
    let wall = now.wall.duration_since(before.wall);
    let ran = now.boottime_seconds.saturating_sub(before.boottime_seconds);
    let ran = SignedDuration::from_secs(i64::try_from(ran).ok()?);
    let apart = wall.saturating_sub(ran);
    (apart.abs() > APART_MAX).then_some(apart.as_secs())
}

/// Whether a time service keeps this machine's clock.
#[must_use]
pub fn is_synchronised() -> bool {
    sprat_session::clock_is_synchronised()
}

/// The file with what is known.
#[must_use]
pub fn clock_file(state_dir: &Path) -> StateFile<ClockState> {
    let path = state_dir.join("clock.json");
    StateFile::new(path, "A clock that was set meanwhile is not noticed.")
}

#[cfg(test)]
mod tests;
