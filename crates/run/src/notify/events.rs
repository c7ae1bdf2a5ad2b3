//! Open events: which state a copy, a container or this machine is in, and which channel reported it.
//!
//! An event is a state with a [`Key`]. It opens, its cause changes, the channels remind of it, and it
//! closes. Each of these is one report by each channel. Only what was *delivered* stops a repetition,
//! so a report arrives at least once.
//!
//! This is the state machine alone: the time is passed in, nothing is read, written or sent.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use sprat_session::{Exit, Failure};

use crate::copy_name::CopyName;
use crate::notify::kinds::{Cause, Channel, Finding, FoundBy, Key, Kind, Subject};
use crate::times::is_ahead;

/// How many events are kept. Beyond it the oldest is dropped and counted.
pub const EVENTS_MAX: usize = 200;
/// How long a report of what is over is tried.
pub const TRIED_FOR: SignedDuration = SignedDuration::from_hours(14 * 24);
/// Longest text of an event, in characters.
const TEXT_CHARACTERS_MAX: usize = 4000;
/// Longest text of a digest, in characters.
const DIGEST_CHARACTERS_MAX: usize = 40_000;

/// All events that are open, or that some channel has not reported to their end.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Events {
    /// Events that were dropped before every channel had reported them, since the last digest.
    #[serde(default)]
    pub dropped: u64,
    events: Vec<Event>,
    /// Damage that a person accepted, and when: what was found before then is not reported again.
    #[serde(default)]
    accepted: Vec<(Key, Timestamp)>,
}

/// One event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Random; the reports' ids begin with it.
    pub id: String,
    /// Which event.
    #[serde(flatten)]
    pub key: Key,
    /// Why it is open, or was last.
    pub cause: Cause,
    /// What happened.
    pub text: String,
    /// What to do next.
    pub hint: String,
    /// When it opened.
    pub opened: Timestamp,
    /// When it closed. A digest is closed from the beginning.
    pub closed: Option<Timestamp>,
    /// Counts what is to be reported: the opening, each change of the cause, the end.
    step: u32,
    /// What each channel delivered last.
    delivered: BTreeMap<Channel, Delivered>,
}

/// What a channel delivered of an event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delivered {
    /// When.
    pub at: Timestamp,
    step: u32,
    /// How often it reminded.
    #[serde(default)]
    reminders: u32,
}

impl Event {
    /// Whether it is still open.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.closed.is_none()
    }

    /// Whether it is about a step after a copy that failed: a hook, or the prune.
    #[must_use]
    pub fn is_of_later_step(&self) -> bool {
        [HOOK, PRUNE].contains(&&*self.cause.class)
    }

    /// What the channels delivered of it last.
    pub fn delivered(&self) -> impl Iterator<Item = (&Channel, Timestamp)> {
        self.delivered
            .iter()
            .map(|(channel, last)| (channel, last.at))
    }
}

/// What a report says about its event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It opened.
    Opened,
    /// It is open and has another cause.
    Changed,
    /// It is still open.
    Reminded,
    /// It closed. The channel had reported that it was open.
    Closed,
    /// It opened and closed before the channel reported anything.
    Passed,
    /// A digest.
    Digest,
    /// A test, sent because a person asked for it.
    Test,
}

/// Something that a channel is to deliver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The same in each repetition, and in no other report to the channel.
    pub id: String,
    /// What it says.
    pub state: State,
    /// The event as it is now.
    pub event: Event,
}

impl Report {
    /// A test notice. It belongs to no event, and nothing is kept of it.
    #[must_use]
    pub fn test(now: Timestamp) -> Self {
        let found = Finding {
            cause: Cause::new(0, "test"),
            text: String::new(),
            hint: String::new(),
        };
        let event = new_event(now, Key::new(Kind::Digest, Subject::Machine), &found);
        Self {
            id: event.id.clone(),
            state: State::Test,
            event,
        }
    }
}

/// Which reports the channels want.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Of which kinds. A digest is always wanted.
    pub on: Vec<Kind>,
    /// How long after its last report an open event is reported again; `None`: never.
    pub remind_after: Option<SignedDuration>,
}

impl Wanted {
    fn has(&self, kind: Kind) -> bool {
        self.on.contains(&kind)
    }
}

/// The class of a cause: a hook failed.
pub const HOOK: &str = "hook";
/// The class of a cause: the prune of a copy failed.
const PRUNE: &str = "prune";

/// An attempt that ended.
#[derive(Debug, Clone)]
pub struct Attempt {
    /// Of which copy.
    pub copy: CopyName,
    /// Who watches it.
    pub by: By,
    /// How it ended.
    pub exit: Exit,
    /// The class and the words of the failure. Nothing for code 0.
    pub what: Words,
    /// A hook of the job, or the prune, that failed. It leaves the snapshot as it is.
    pub failed_later: Option<Words>,
    /// Of a success: why its size is not as usual.
    pub growth: Option<Words>,
}

impl Attempt {
    /// Its code: a step that failed later leaves the snapshot, and is a failure.
    #[must_use]
    pub fn code(&self) -> Exit {
        let later = self.failed_later.as_ref().map(|_| Exit::Failed);
        Exit::worst([self.exit].into_iter().chain(later))
    }
}

/// Who made an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    /// `sprat run`: nobody watches.
    Run,
    /// `sprat backup`: a person watches, so no event opens.
    Backup,
}

/// The class of a cause, and the words for it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Words {
    /// One word.
    pub class: String,
    /// What happened.
    pub text: String,
    /// The state of the data, and the next step.
    pub hint: String,
}

impl Words {
    /// Of a failure; the class is its exit code in words.
    #[must_use]
    pub fn of(failure: &Failure) -> Self {
        let class = serde_json::to_value(failure.exit).ok();
        let class = class.and_then(|class| Some(class.as_str()?.to_owned()));
        Self {
            class: class.unwrap_or_default(),
            text: failure.in_one_line(),
            hint: failure.hint.clone().unwrap_or_default(),
        }
    }

    /// Of a hook that failed.
    #[must_use]
    pub fn of_hook(failure: &Failure) -> Self {
        Self {
            class: HOOK.to_owned(),
            ..Self::of(failure)
        }
    }

    /// Of a prune that failed.
    #[must_use]
    pub fn of_prune(failure: &Failure) -> Self {
        Self {
            class: PRUNE.to_owned(),
            ..Self::of(failure)
        }
    }

    pub(crate) fn finding(&self, exit: Exit) -> Finding {
        Finding {
            cause: Cause::new(exit.code(), self.class.clone()),
            text: self.text.clone(),
            hint: self.hint.clone(),
        }
    }
}

impl Events {
    /// All events, oldest first.
    pub fn all(&self) -> impl Iterator<Item = &Event> {
        self.events.iter()
    }

    /// Those that are open, oldest first.
    pub fn open(&self) -> impl Iterator<Item = &Event> {
        self.events.iter().filter(|event| event.is_open())
    }

    /// How many are open of each kind, kinds without any included.
    #[must_use]
    pub fn open_by_kind(&self) -> BTreeMap<Kind, u64> {
        let kinds = Kind::ALL
            .into_iter()
            .filter(|kind| !matches!(kind, Kind::Recovered | Kind::Digest));
        let mut counts: BTreeMap<_, _> = kinds.map(|kind| (kind, 0)).collect();
        for event in self.open() {
            *counts.entry(event.key.kind).or_default() += 1;
        }
        counts
    }

    /// Notes how a state is now: `Some` opens the event or changes its cause, `None` closes it. What
    /// is as it was stays as it was.
    pub fn observe(&mut self, now: Timestamp, key: &Key, found: Option<&Finding>) {
        debug_assert!(!matches!(key.kind, Kind::Recovered | Kind::Digest));
        let open = self
            .events
            .iter_mut()
            .find(|event| event.is_open() && event.key == *key);
        match (open, found) {
            (Some(event), Some(found)) => {
                if event.cause != found.cause {
                    event.cause = found.cause.clone();
                    event.step += 1;
                }
                event.text = cut(&found.text, TEXT_CHARACTERS_MAX);
                event.hint = cut(&found.hint, TEXT_CHARACTERS_MAX);
            }
            (Some(event), None) => {
                event.closed = Some(now);
                event.step += 1;
            }
            (None, Some(found)) => self.add(new_event(now, key.clone(), found)),
            (None, None) => {}
        }
    }

    /// Closes an event that had opened before `clean`, when its state was found to be good.
    pub fn observe_clean(&mut self, now: Timestamp, key: &Key, clean: Option<Timestamp>) {
        let opened = self.open().find(|event| event.key == *key);
        let opened = opened.map(|event| event.opened);
        if opened
            .zip(clean)
            .is_some_and(|(opened, clean)| opened <= clean)
        {
            self.observe(now, key, None);
        }
    }

    /// Notes how an attempt ended: which events it opens and closes.
    pub fn attempt(&mut self, now: Timestamp, attempt: &Attempt) {
        let success = matches!(attempt.exit, Exit::Done | Exit::Unread);
        let copy = |kind| Key::new(kind, Subject::Copy(attempt.copy.clone()));
        let ended = attempt.what.finding(attempt.exit);
        let mut close = Vec::new();
        let mut open = Vec::new();
        if success {
            close.push(copy(Kind::Overdue));
            match &attempt.failed_later {
                None => close.push(copy(Kind::Failure)),
                Some(later) => open.push((copy(Kind::Failure), later.finding(Exit::Failed))),
            }
            match &attempt.growth {
                None => close.push(copy(Kind::Growth)),
                Some(growth) => open.push((copy(Kind::Growth), growth.finding(Exit::Done))),
            }
        }
        // Every other attempt was begun by a config that is right.
        if attempt.exit != Exit::Usage {
            close.push(copy(Kind::Config));
        }
        match attempt.exit {
            Exit::Done => close.push(copy(Kind::Incomplete)),
            Exit::Unread => open.push((copy(Kind::Incomplete), ended)),
            Exit::Failed | Exit::NoContainer | Exit::WrongKey => {
                open.push((copy(Kind::Failure), ended));
            }
            Exit::Usage => open.push((copy(Kind::Config), ended)),
            Exit::Damaged => {
                let container = Subject::Container(attempt.copy.container.clone());
                open.push((Key::damage(container, FoundBy::Command), ended));
            }
            // They become overdue.
            Exit::Locked | Exit::Unreachable | Exit::Interrupted | Exit::Overdue | Exit::Exists => {
            }
        }
        for key in close {
            self.observe(now, &key, None);
        }
        if attempt.by == By::Run {
            for (key, found) in open {
                self.observe(now, &key, Some(&found));
            }
        }
    }

    /// A clean check or drill of a container: closes the damage that one of its kind found. A check
    /// also closes what a command found.
    pub fn clean(&mut self, now: Timestamp, container: &str, found_by: FoundBy) {
        let found = match found_by {
            FoundBy::Check => [FoundBy::Check, FoundBy::Command].as_slice(),
            FoundBy::Drill => &[FoundBy::Drill],
            FoundBy::Command | FoundBy::Session | FoundBy::Source => &[],
        };
        for found_by in found {
            let key = Key::damage(Subject::Container(container.to_owned()), *found_by);
            self.observe(now, &key, None);
        }
    }

    /// The open events that [`accept`](Self::accept) would close: of a copy, or of a container and of
    /// all copies in it.
    pub fn acceptable(&self, subject: &Subject) -> impl Iterator<Item = &Event> {
        self.open()
            .filter(move |event| is_acceptable(&event.key, subject))
    }

    /// A person accepts what a copy or a container has: closes its events of the kinds `growth`,
    /// `change`, `held` and `damage`.
    pub fn accept(&mut self, now: Timestamp, subject: &Subject) {
        let damage = self.acceptable(subject).map(|event| event.key.clone());
        let damage: Vec<Key> = damage.filter(|key| key.kind == Kind::Damage).collect();
        self.accepted.retain(|(key, _)| !damage.contains(key));
        self.accepted
            .extend(damage.into_iter().map(|key| (key, now)));
        for event in &mut self.events {
            if event.is_open() && is_acceptable(&event.key, subject) {
                event.closed = Some(now);
                event.step += 1;
            }
        }
    }

    /// When a person accepted this damage.
    #[must_use]
    pub fn accepted(&self, damage: &Key) -> Option<Timestamp> {
        let mut accepted = self.accepted.iter();
        accepted.find(|(key, _)| key == damage).map(|(_, at)| *at)
    }

    /// Adds a digest, and counts dropped events from 0 again.
    pub fn digest(&mut self, now: Timestamp, text: &str) {
        let found = Finding {
            cause: Cause::new(0, "digest"),
            text: String::new(),
            hint: String::new(),
        };
        let mut event = new_event(now, Key::new(Kind::Digest, Subject::Machine), &found);
        event.text = cut(text, DIGEST_CHARACTERS_MAX);
        event.closed = Some(now);
        self.dropped = 0;
        self.add(event);
    }

    /// Of a copy that left the config: closes its events.
    pub fn forget(&mut self, now: Timestamp, is_known: impl Fn(&Subject) -> bool) {
        for event in &mut self.events {
            if event.is_open() && !is_known(&event.key.subject) {
                event.closed = Some(now);
                event.step += 1;
            }
        }
    }

    /// What a channel is to deliver now, oldest event first.
    #[must_use]
    pub fn pending(&self, channel: &Channel, wanted: &Wanted, now: Timestamp) -> Vec<Report> {
        self.events
            .iter()
            .filter_map(|event| pending(event, channel, wanted, now))
            .collect()
    }

    /// Notes that a channel delivered a report.
    pub fn deliver(&mut self, channel: &Channel, report: &Report, now: Timestamp) {
        let event = self
            .events
            .iter_mut()
            .find(|event| event.id == report.event.id);
        let Some(event) = event else { return };
        let before = event
            .delivered
            .get(channel)
            .map_or(0, |last| last.reminders);
        let reminders = before + u32::from(report.state == State::Reminded);
        let delivered = Delivered {
            at: now,
            step: report.event.step,
            reminders,
        };
        event.delivered.insert(channel.clone(), delivered);
    }

    /// Removes what is over and needs no channel any more, and what was tried for [`TRIED_FOR`]. With
    /// the clock in doubt nothing expires.
    pub fn settle(
        &mut self,
        now: Timestamp,
        channels: &[Channel],
        wanted: &Wanted,
        clock_is_trusted: bool,
    ) {
        if clock_is_trusted {
            self.repair_times(now);
        }
        let dropped = &mut self.dropped;
        self.events.retain(|event| {
            let Some(closed) = event.closed else {
                return true;
            };
            let mut channels = channels.iter();
            let undelivered =
                channels.any(|channel| pending(event, channel, wanted, now).is_some());
            let expired = clock_is_trusted && now.duration_since(closed) > TRIED_FOR;
            *dropped += u64::from(undelivered && expired);
            undelivered && !expired
        });
    }

    /// Times ahead of now were written while the clock was wrong: they count as now.
    fn repair_times(&mut self, now: Timestamp) {
        for event in &mut self.events {
            let delivered = event.delivered.values_mut().map(|last| &mut last.at);
            let times = delivered.chain(&mut event.closed);
            for time in times.chain([&mut event.opened]) {
                if is_ahead(*time, now) {
                    *time = now;
                }
            }
        }
    }

    fn add(&mut self, event: Event) {
        if self.events.len() >= EVENTS_MAX {
            // What is over goes before what is open; the events lie in the order of their opening.
            let oldest = self.events.iter().position(|event| !event.is_open());
            self.events.remove(oldest.unwrap_or(0));
            self.dropped += 1;
        }
        self.events.push(event);
    }
}

fn is_acceptable(key: &Key, subject: &Subject) -> bool {
    let is_meant = match subject {
        Subject::Container(name) => key.subject.container() == Some(name),
        other => key.subject == *other,
    };
    is_meant && key.kind.is_acceptable()
}

fn new_event(now: Timestamp, key: Key, found: &Finding) -> Event {
    Event {
        id: uuid::Uuid::new_v4().to_string(),
        key,
        cause: found.cause.clone(),
        text: cut(&found.text, TEXT_CHARACTERS_MAX),
        hint: cut(&found.hint, TEXT_CHARACTERS_MAX),
        opened: now,
        closed: None,
        step: 1,
        delivered: BTreeMap::new(),
    }
}

/// At most so many characters of a text.
fn cut(text: &str, characters_max: usize) -> String {
    text.chars().take(characters_max).collect()
}

/// What a channel is to deliver of an event.
fn pending(event: &Event, channel: &Channel, wanted: &Wanted, now: Timestamp) -> Option<Report> {
    let kind = event.key.kind;
    let last = event.delivered.get(channel);
    let moved = last.is_none_or(|last| last.step < event.step);
    // A channel that fails can't report that, and a digest needs more room than a screen's corner.
    let is_own = event.key.subject == Subject::Channel(channel.clone());
    if is_own || (kind == Kind::Digest && *channel == Channel::Desktop) {
        return None;
    }
    let state = match (event.is_open(), last) {
        _ if kind == Kind::Digest => moved.then_some(State::Digest),
        (true, None) => wanted.has(kind).then_some(State::Opened),
        (true, Some(_)) if moved => wanted.has(kind).then_some(State::Changed),
        (true, Some(last)) => {
            let due = wanted
                .remind_after
                .is_some_and(|after| now.duration_since(last.at) >= after);
            (due && wanted.has(kind)).then_some(State::Reminded)
        }
        (false, None) => wanted.has(kind).then_some(State::Passed),
        (false, Some(_)) => (moved && wanted.has(Kind::Recovered)).then_some(State::Closed),
    }?;
    let number = event.step;
    let id = match (state, last) {
        (State::Reminded, Some(last)) => format!("{}.{number}.{}", event.id, last.reminders + 1),
        _ => format!("{}.{number}", event.id),
    };
    Some(Report {
        id,
        state,
        event: event.clone(),
    })
}

#[cfg(test)]
mod tests;
