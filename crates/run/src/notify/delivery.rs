//! Delivers what is pending: each channel by itself, again at each tick, then hourly.
//!
//! `events.json` holds what each channel delivered, `notify.json` how the channels work. Both are
//! written before anything is sent and after each delivery. If they can't be written, notices are sent
//! all the same, and may come twice.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::notify::channels::{Channels, Network, Ping, ping, takes_all_at_once};
use crate::notify::events::{Events, Report, TRIED_FOR, Wanted};
use crate::notify::kinds::{Cause, Channel, Finding, Key, Kind, Subject};
use crate::notify::private_text::PrivateText;
use crate::notify::words::Sender;
use crate::state_file::StateFile;

/// So long a failing channel is tried at each tick.
const EACH_TICK: SignedDuration = SignedDuration::from_hours(2);
/// Then so long after its last attempt: hourly, less half the time between two ticks.
const HOURLY: SignedDuration = SignedDuration::from_mins(60 - 8);
/// A channel that fails for so long is reported by the others.
const FAILS_LONG: SignedDuration = SignedDuration::from_hours(24);

/// What is to be reported, by what, and from whom.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// The channels of the config.
    pub channels: Channels,
    /// Which reports they want.
    pub wanted: Wanted,
    /// The URLs of the checks of healthchecks, by names that stay the same.
    pub checks: BTreeMap<String, PrivateText>,
    /// Whose notices they are.
    pub sender: Sender,
    /// How the network is used.
    pub network: Network,
}

/// The moment of a delivery.
#[derive(Debug, Clone, Copy)]
pub struct Tick {
    /// Now.
    pub now: Timestamp,
    /// With the clock in doubt nothing expires.
    pub clock_is_trusted: bool,
    /// Also by channels that would wait: a person asks for it.
    pub at_once: bool,
}

/// How a channel works.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelState {
    /// When it last delivered something.
    pub last_success: Option<Timestamp>,
    /// Since when it has failed; `None`: it works.
    pub failing_since: Option<Timestamp>,
    /// When it was last tried.
    pub last_attempt: Option<Timestamp>,
    /// Why it failed last.
    pub error: Option<String>,
}

/// The content of `notify.json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelStates {
    /// By channel.
    pub channels: BTreeMap<Channel, ChannelState>,
    /// Pings that were not delivered, by check.
    #[serde(default)]
    pings: BTreeMap<String, LatePing>,
}

/// The last ping of a check, not delivered yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct LatePing {
    ping: Ping,
    run: String,
    since: Timestamp,
    last_attempt: Timestamp,
}

/// What a delivery came to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Reports that were delivered, by all channels together.
    pub delivered: usize,
    /// Channels that failed, and why.
    pub failed: Vec<(Channel, String)>,
}

/// Events, and the channels that report them, on disk.
#[derive(Debug)]
pub struct Notifier {
    /// The events.
    pub events: StateFile<Events>,
    states: StateFile<ChannelStates>,
    turn: PathBuf,
}

impl Notifier {
    /// Of this state folder.
    #[must_use]
    pub fn new(state_dir: &Path) -> Self {
        Self {
            events: StateFile::new(
                state_dir.join("events.json"),
                "Which events were open is not known; what is still so is reported again.",
            ),
            states: StateFile::new(
                state_dir.join("notify.json"),
                "Since when a channel has failed is not known.",
            ),
            turn: state_dir.join("notify.turn"),
        }
    }

    /// How the channels work.
    pub fn states(&mut self) -> ChannelStates {
        self.states.read()
    }

    /// What could not be read or written. Notices were sent all the same, maybe twice.
    pub fn take_problems(&mut self) -> Vec<String> {
        let mut problems = self.events.take_problems();
        problems.extend(self.states.take_problems());
        problems
    }

    /// Sends what is pending. Another process that does the same is waited for.
    pub fn deliver(&mut self, delivery: &Delivery, tick: Tick) -> Outcome {
        let _turn = self.turn();
        let channels = delivery.channels.list();
        self.report_failing_channels(&channels, tick);
        let settle = |events: &mut Events| {
            events.settle(tick.now, &channels, &delivery.wanted, tick.clock_is_trusted);
        };
        self.events.change(settle);
        let mut outcome = Outcome::default();
        for channel in &channels {
            self.deliver_by(channel, delivery, tick, &mut outcome);
        }
        self.events.change(settle);
        self.retry_pings(delivery, tick);
        outcome
    }

    fn deliver_by(
        &mut self,
        channel: &Channel,
        delivery: &Delivery,
        tick: Tick,
        outcome: &mut Outcome,
    ) {
        let state = self
            .states
            .read()
            .channels
            .remove(channel)
            .unwrap_or_default();
        let pending = self
            .events
            .read()
            .pending(channel, &delivery.wanted, tick.now);
        if pending.is_empty() {
            if state.failing_since.is_some() {
                // What it failed to deliver is over.
                self.note(channel, |state| state.failing_since = None);
            }
            return;
        }
        if !is_due(&state, tick) {
            return;
        }
        let at_once = if takes_all_at_once(channel) {
            pending.len()
        } else {
            1
        };
        let mut error = None;
        let mut in_vain = Duration::ZERO;
        for reports in pending.chunks(at_once) {
            let began = Instant::now();
            let send = delivery.channels.send(
                channel,
                reports,
                tick.now,
                &delivery.sender,
                &delivery.network,
            );
            match send {
                Ok(()) => {
                    self.delivered(channel, reports, tick.now);
                    outcome.delivered += reports.len();
                }
                Err(why) => {
                    tracing::warn!(%channel, error = why, "a notice was not delivered");
                    error = error.or(Some(why));
                    // Only this one may have been refused. A channel that does not answer is waited for once.
                    in_vain = in_vain.saturating_add(began.elapsed());
                    if in_vain >= delivery.network.limit {
                        break;
                    }
                }
            }
        }
        if let Some(error) = error {
            self.failed(channel, &error, state.failing_since, tick.now);
            outcome.failed.push((channel.clone(), error));
        }
    }

    fn delivered(&mut self, channel: &Channel, reports: &[Report], now: Timestamp) {
        self.events.change(|events| {
            for report in reports {
                events.deliver(channel, report, now);
            }
        });
        self.note(channel, |state| {
            *state = ChannelState {
                last_success: Some(now),
                last_attempt: Some(now),
                ..ChannelState::default()
            };
        });
    }

    /// `since`: the channel failed before, since then.
    fn failed(&mut self, channel: &Channel, error: &str, since: Option<Timestamp>, now: Timestamp) {
        self.note(channel, |state| {
            let since = since.filter(|since| *since <= now);
            state.failing_since = since.or(Some(now));
            state.last_attempt = Some(now);
            state.error = Some(error.to_owned());
        });
    }

    fn note(&mut self, channel: &Channel, change: impl FnOnce(&mut ChannelState)) {
        self.states
            .change(|states| change(states.channels.entry(channel.clone()).or_default()));
    }

    /// Opens an event for each channel that has failed for a day, and closes those of the others. A
    /// channel that left the config is forgotten.
    fn report_failing_channels(&mut self, channels: &[Channel], tick: Tick) {
        let known = self.states.read();
        if known
            .channels
            .keys()
            .any(|channel| !channels.contains(channel))
        {
            self.states.change(|states| {
                states
                    .channels
                    .retain(|channel, _| channels.contains(channel));
            });
        }
        self.events.change(|events| {
            for channel in channels {
                let found = known
                    .channels
                    .get(channel)
                    .and_then(|state| failing_long(state, tick));
                let key = Key::new(Kind::Failure, Subject::Channel(channel.clone()));
                events.observe(tick.now, &key, found.as_ref());
            }
            events.forget(tick.now, |subject| match subject {
                Subject::Channel(channel) => channels.contains(channel),
                _ => true,
            });
        });
    }

    /// Sends a test notice by each channel. Nothing is kept of it.
    #[must_use]
    pub fn test(delivery: &Delivery, now: Timestamp) -> Vec<(Channel, Result<(), String>)> {
        let report = Report::test(now);
        let send = |channel: Channel| {
            let sent = delivery.channels.send(
                &channel,
                std::slice::from_ref(&report),
                now,
                &delivery.sender,
                &delivery.network,
            );
            (channel, sent)
        };
        delivery.channels.list().into_iter().map(send).collect()
    }

    /// Sends a ping to a check of [`Delivery::checks`]; `run` is a UUID. One that is not delivered is
    /// sent again by [`deliver`](Self::deliver), unless a later one of that check is. A start is not.
    ///
    /// # Errors
    /// Not delivered, in words that hold no secret.
    pub fn ping(
        &mut self,
        delivery: &Delivery,
        check: &str,
        what: Ping,
        run: &str,
        now: Timestamp,
    ) -> Result<(), String> {
        let Some(url) = delivery.checks.get(check) else {
            return Ok(());
        };
        let sent = url
            .read(delivery.network.limit)
            .and_then(|url| ping(&url, what, run, &delivery.network));
        if what == Ping::Start {
            return sent;
        }
        let late = sent.is_err().then(|| LatePing {
            ping: what,
            run: run.to_owned(),
            since: now,
            last_attempt: now,
        });
        self.states.change(|states| match late {
            Some(late) => drop(states.pings.insert(check.to_owned(), late)),
            None => drop(states.pings.remove(check)),
        });
        sent
    }

    fn retry_pings(&mut self, delivery: &Delivery, tick: Tick) {
        for (check, late) in self.states.read().pings {
            let state = ChannelState {
                failing_since: Some(late.since),
                last_attempt: Some(late.last_attempt),
                ..ChannelState::default()
            };
            let expired = tick.clock_is_trusted && tick.now.duration_since(late.since) > TRIED_FOR;
            let url = delivery.checks.get(&check).filter(|_| !expired);
            if url.is_some() && !is_due(&state, tick) {
                continue;
            }
            let is_over = url.is_none_or(|url| {
                let url = url.read(delivery.network.limit);
                let sent = url.and_then(|url| ping(&url, late.ping, &late.run, &delivery.network));
                sent.is_ok()
            });
            self.states.change(|states| {
                // A later ping of the check stays.
                let kept = states
                    .pings
                    .get_mut(&check)
                    .filter(|kept| kept.run == late.run);
                match kept {
                    Some(_) if is_over => drop(states.pings.remove(&check)),
                    Some(kept) => kept.last_attempt = tick.now,
                    None => {}
                }
            });
        }
    }

    /// Waits until no other process delivers. A folder that can't be written has no other.
    fn turn(&self) -> io::Result<File> {
        let turn = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&self.turn)?;
        flock(&turn, FlockOperation::LockExclusive)?;
        Ok(turn)
    }
}

fn is_due(state: &ChannelState, tick: Tick) -> bool {
    let Some(since) = state.failing_since else {
        return true;
    };
    let Some(last) = state.last_attempt else {
        return true;
    };
    // A time ahead of now was written while the clock was wrong.
    let is_ahead = since > tick.now || last > tick.now;
    tick.at_once
        || is_ahead
        || tick.now.duration_since(since) < EACH_TICK
        || tick.now.duration_since(last) >= HOURLY
}

fn failing_long(state: &ChannelState, tick: Tick) -> Option<Finding> {
    let since = state.failing_since?;
    if tick.now.duration_since(since) < FAILS_LONG {
        return None;
    }
    Some(Finding {
        cause: Cause::new(1, "channel"),
        text: state.error.clone().unwrap_or_default(),
        hint: "Notices are kept for 14 days. Correct [notify], then run `sprat notify test`."
            .to_owned(),
    })
}

#[cfg(test)]
mod tests;
