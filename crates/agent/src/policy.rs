//! The policy of a root: how long past states stay, and how much space they may take.
//!
//! A file of lines `key = value`; an unknown key is an error. The client can neither read nor change it.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use rustix::fs::OFlags;

use crate::disk::{self, random_u64};
use crate::time_text::{bytes, duration_s};

const BYTES_MAX: u64 = 1 << 16;

/// Which buckets of the calendar keep a state, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bucket {
    /// Every generation.
    All,
    Day,
    Week,
    Month,
}

/// One rule of `keep`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keep {
    pub bucket: Bucket,
    pub for_s: i64,
}

/// What a write to a container's header does: a client that can write it can make all keys useless.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Header {
    Alarm,
    Refuse,
    Free,
}

/// What the policy's file says, with defaults for what it does not say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    pub keep: Vec<Keep>,
    /// Never fewer than this many that stood for six hours.
    pub at_least: usize,
    /// Generations that sessions may begin at once, and how long one more takes.
    pub burst: u64,
    pub token_every_s: u64,
    /// The mean time between secret moments.
    pub secret_s: i64,
    /// Most bytes on the disk of everything in the root.
    pub quota: Option<u64>,
    /// Share of the file system that stays free, in percent.
    pub free_min_percent: u64,
    /// The longest container.
    pub size_max: u64,
    pub containers_max: usize,
    /// New generations are clones (reflinks), not logs.
    pub clones: bool,
    /// Share of a container's data that may be overwritten in one, 7 or 30 days without an alarm.
    pub alarm_percent: u64,
    /// How many times the usual day may be overwritten in one day without an alarm.
    pub alarm_times: Option<u64>,
    /// After an alarm nothing expires until `ack`.
    pub hold_on_alarm: bool,
    /// Overdue after so long without a session that wrote.
    pub expect_s: Option<i64>,
    pub header: Header,
    /// The header is what lies before this.
    pub header_bytes: u64,
    /// The program that `tidy` runs when what is wrong has changed.
    pub notify: Option<PathBuf>,
}

impl Default for Policy {
    fn default() -> Self {
        let keep = |bucket, days: i64| Keep {
            bucket,
            for_s: days * 86_400,
        };
        Self {
            keep: vec![
                keep(Bucket::All, 7),
                keep(Bucket::Day, 30),
                keep(Bucket::Week, 12 * 7),
                keep(Bucket::Month, 12 * 31),
            ],
            at_least: 3,
            burst: 12,
            token_every_s: 3600,
            secret_s: 3600,
            quota: None,
            free_min_percent: 5,
            size_max: 8 << 40,
            containers_max: 4,
            clones: false,
            alarm_percent: 30,
            alarm_times: Some(5),
            hold_on_alarm: true,
            expect_s: None,
            header: Header::Alarm,
            header_bytes: 16 << 20,
            notify: None,
        }
    }
}

impl Policy {
    /// After so long no rule keeps a state.
    pub fn longest_s(&self) -> i64 {
        self.keep.iter().map(|rule| rule.for_s).max().unwrap_or(0)
    }

    /// Parses a policy. The error names the line.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut policy = Self::default();
        for (index, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or_default().trim();
            if line.is_empty() {
                continue;
            }
            let set = line
                .split_once('=')
                .and_then(|(key, value)| policy.set(key.trim(), value.trim()));
            set.ok_or_else(|| format!("line {}: not understood: {line}", index + 1))?;
        }
        Ok(policy)
    }

    fn set(&mut self, key: &str, value: &str) -> Option<()> {
        match key {
            "keep" => self.keep = value.split(',').map(parse_keep).collect::<Option<_>>()?,
            "at_least" => self.at_least = value.parse().ok()?,
            "new" => {
                let (burst, rate) = value.strip_prefix("burst ")?.split_once(", then 1 per ")?;
                self.burst = burst.parse().ok().filter(|burst| *burst > 0)?;
                self.token_every_s = duration_s(rate)?.try_into().ok().filter(|s| *s > 0)?;
            }
            "secret" => self.secret_s = duration_s(value).filter(|s| (1..=6 * 3600).contains(s))?,
            "quota" => self.quota = Some(bytes(value)?),
            "free_min" => self.free_min_percent = percent(value)?,
            "size_max" => self.size_max = bytes(value)?,
            "containers_max" => self.containers_max = value.parse().ok()?,
            "keeper" => {
                self.clones = match value {
                    "log" => false,
                    "clone" => true,
                    _ => return None,
                }
            }
            "alarm" => {
                let (share, times) = match value.split_once(" or ") {
                    Some((share, times)) => (share, Some(times.strip_suffix('x')?.parse().ok()?)),
                    None => (value, None),
                };
                if times.is_some_and(|times| times < 2) {
                    return None;
                }
                self.alarm_percent = percent(share)?;
                self.alarm_times = times;
            }
            "on_alarm" => {
                self.hold_on_alarm = match value {
                    "hold" => true,
                    "note" => false,
                    _ => return None,
                }
            }
            "header" => {
                self.header = match value {
                    "alarm" => Header::Alarm,
                    "refuse" => Header::Refuse,
                    "free" => Header::Free,
                    _ => return None,
                }
            }
            "header_bytes" => self.header_bytes = bytes(value)?,
            "notify" => {
                self.notify = Some(PathBuf::from(value)).filter(|path| path.is_absolute());
                self.notify.as_ref()?;
            }
            "expect" => self.expect_s = Some(duration_s(value)?),
            _ => return None,
        }
        Some(())
    }

    /// The time to the next secret moment, in counted seconds: random, so that nobody knows it, and without
    /// memory, so that one moment shows nothing of the next.
    pub fn secret_delay_s(&self) -> io::Result<i64> {
        // 2^32 values in (0, 1]; their logarithm is never infinite.
        let share = (random_u64()? >> 32) + 1;
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            reason = "below 2^53, and bounded"
        )]
        let delay = (-(share as f64 / 4_294_967_296.0).ln() * self.secret_s as f64) as i64;
        Ok(delay.clamp(1, 6 * 3600))
    }

    /// Reads the policy of a root: `.sprat-agent/policy` where no other file is named.
    pub fn read(agent: &OwnedFd, file: Option<&std::path::Path>) -> io::Result<Self> {
        let opened = match file {
            Some(path) => Some(File::open(path)?),
            None => disk::if_there(disk::open_in(agent, "policy", OFlags::RDONLY))?,
        };
        let Some(opened) = opened else {
            return Ok(Self::default());
        };
        let mut text = String::new();
        (&opened).take(BYTES_MAX).read_to_string(&mut text)?;
        let policy = Self::parse(&text).map_err(|error| disk::bad(format!("policy: {error}")))?;
        // Else an account could let root run any program.
        let owner = opened.metadata()?.uid();
        if policy.notify.is_some() && ![0, rustix::process::geteuid().as_raw()].contains(&owner) {
            return Err(disk::bad(
                "policy: notify: the file belongs to another account; use a policy of your own, or of root",
            ));
        }
        Ok(policy)
    }
}

fn parse_keep(text: &str) -> Option<Keep> {
    let (bucket, time) = text.trim().split_once(' ')?;
    let bucket = match bucket {
        "all" => Bucket::All,
        "daily" => Bucket::Day,
        "weekly" => Bucket::Week,
        "monthly" => Bucket::Month,
        _ => return None,
    };
    // `12m` of `monthly` are months; `mo` means months everywhere.
    let for_s = match time.strip_suffix('m') {
        Some(months) if bucket == Bucket::Month => duration_s(&format!("{months}mo"))?,
        _ => duration_s(time.trim())?,
    };
    Some(Keep { bucket, for_s })
}

fn percent(text: &str) -> Option<u64> {
    text.strip_suffix('%')?
        .parse()
        .ok()
        .filter(|percent| *percent <= 100)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_policy_is_read_and_an_unknown_key_is_an_error() {
        let text = "# mine\nkeep = all 7d, daily 30d, weekly 12w, monthly 12m\nat_least = 3\n\
                    new = burst 12, then 1 per 1h\nsecret = 1h\nalarm = 30% or 5x   # of used blocks\nfree_min = 5%\n\
                    on_alarm = hold\nheader = alarm\nheader_bytes = 16M\nsize_max = 8T\ncontainers_max = 4\nkeeper = log\n";
        assert_eq!(Policy::parse(text).unwrap(), Policy::default());
        let other = Policy::parse("quota = 2T\nexpect = 26h\non_alarm = note\n").unwrap();
        assert_eq!(
            (other.quota, other.expect_s, other.hold_on_alarm),
            (Some(2 << 40), Some(93_600), false)
        );
        let clones = |keeper: &str| {
            Policy::parse(&format!("keeper = {keeper}\n"))
                .unwrap()
                .clones
        };
        assert_eq!(["log", "clone"].map(clones), [false, true]);
        for wrong in [
            "quota 2T",
            "quto = 2T",
            "keep = hourly 3d",
            "secret = 7h",
            "secret = 0s",
            "new = burst 0, then 1 per 1h",
            "alarm = 130%",
            "alarm = 5x",
            "alarm = 30% or 1x",
            "alarm = 30% or 5",
            "on_alarm = maybe",
            "notify = mail",
            "header = no",
            "keeper = clones",
            "at_least = -1",
            "keep =",
        ] {
            let error = Policy::parse(&format!("\n{wrong}\n")).unwrap_err();
            assert!(error.starts_with("line 2"), "{error}");
        }
    }

    #[test]
    fn secret_moments_have_the_mean_of_the_policy() {
        let policy = Policy::default();
        let total: i64 = (0..4000).map(|_| policy.secret_delay_s().unwrap()).sum();
        // Four standard deviations of the mean of 4,000.
        assert!((3360..3840).contains(&(total / 4000)), "{}", total / 4000);
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_a_panic(text in "(keep|new|alarm|quota|secret|at_least)? ?=? ?[a-z0-9%, =#\n]{0,60}") {
            let _ = Policy::parse(&text);
        }
    }
}
