//! Watches over the copies: what opens and closes an event, and which channels report it.
//!
//! A run passes how its attempts ended; `sprat status --alert` passes nothing, each hour, without a
//! server and without the run lock. All else is read from the state folder. Events are written before
//! anything is sent. A notice that fails never fails a backup: it is a problem to print, and is sent
//! again later.

mod accept;
mod events_text;
mod history_text;
mod kept_notify;
mod observe;
mod overview;
mod publish;
mod space;
mod status;
mod status_text;
mod summary;
mod watched_files;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use sprat_session::Exit;

pub use accept::Accepted;
pub use events_text::events_text;
pub use history_text::HistoryOfCopy;
pub use overview::{ContainerView, CopyView, Overview, worst};
pub use space::full_on;
pub use status::{ContainerReport, event_json};
pub use status_text::Shown;
pub use watched_files::WatchView;

use crate::clock::{ClockState, Moment, clock_file, is_synchronised};
use crate::config::{Config, ConfigPlaces, Mistake, Notify};
use crate::copy_name::CopyName;
use crate::copy_state::CopyState;
use crate::notify::channels::Ping;
use crate::notify::{
    Attempt, By, Channel, Delivery, Event, FoundBy, Key, Network, Notifier, Sender, Subject, Tick,
    Wanted, Words,
};
use crate::runner::OwedFailed;
use crate::state_file::StateFile;

/// The check of healthchecks of all runs, in [`Delivery::checks`].
const RUN_CHECK: &str = "run";

/// What is watched, and on which machine.
#[derive(Debug, Clone)]
pub struct Watched<'w> {
    /// The config, as far as it is right.
    pub config: &'w Config,
    /// Its mistakes.
    pub mistakes: &'w [Mistake],
    /// For the last right `[notify]`, which the state folder keeps.
    pub places: ConfigPlaces,
    /// The state folder.
    pub state_dir: PathBuf,
    /// The name of this machine.
    pub host: String,
    /// Identifies this machine: for `spread`.
    pub machine_id: String,
}

/// The moment of a check, and how far the clock is believed.
#[derive(Debug, Clone)]
pub struct Now {
    /// On all clocks.
    pub moment: Moment,
    /// A time service keeps this machine's clock.
    pub synchronised: bool,
    /// The clock is right, whatever it shows ([`crate::clock::TRUST_VARIABLE`]).
    pub trusted: bool,
}

impl Now {
    /// Reads the clocks.
    #[must_use]
    pub fn read(trusted: bool) -> Self {
        Self {
            moment: Moment::now(),
            synchronised: is_synchronised(),
            trusted,
        }
    }
}

/// What a run did. The default is a check without a run.
#[derive(Debug, Clone, Copy, Default)]
pub struct Ended<'e> {
    /// The run's id, a UUID.
    pub run: &'e str,
    /// How its attempts ended. What was skipped is none.
    pub attempts: &'e [Attempt],
    /// The containers whose own hooks ran, and what failed.
    pub container_hooks: &'e [(String, Option<Words>)],
    /// Hooks of a run that was killed, and that failed.
    pub owed: &'e [OwedFailed],
}

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Findings {
    /// What could not be read, written or sent, one line each: to be printed as warnings.
    pub problems: Vec<String>,
    /// 4 if a copy is overdue, 1 if the state could not be kept, else 0. Part of the code of `run`.
    pub exit: Exit,
    /// The code that `status` ends with now.
    pub status: Exit,
    /// The events that are open now.
    pub open: Vec<Event>,
    /// Notices that were delivered.
    pub delivered: usize,
    /// Channels that failed, and why.
    pub failed: Vec<(Channel, String)>,
}

/// The content of `watch.json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct WatchState {
    /// The end of the last run.
    pub(crate) last_run: Option<Timestamp>,
    /// The last digest; before the first one, the first check.
    pub(crate) last_digest: Option<Timestamp>,
    /// The mistakes of the config that a timer has printed.
    pub(crate) mistakes: Vec<String>,
    /// The files of `[watch.NAME]`, by NAME: as if each write were a success.
    pub(crate) files: BTreeMap<String, CopyState>,
}

/// The file of it.
pub(crate) fn watch_file(state_dir: &Path) -> StateFile<WatchState> {
    StateFile::new(
        state_dir.join("watch.json"),
        "When the last digest was sent is not known.",
    )
}

/// Watches over the copies of a config.
#[derive(Debug)]
pub struct Watch<'w> {
    watched: Watched<'w>,
    notify: Notify,
    delivery: Delivery,
    zone: TimeZone,
    notifier: Notifier,
    state: StateFile<WatchState>,
    clock: StateFile<ClockState>,
    /// The checks of healthchecks that know that the run began.
    started: BTreeSet<String>,
    problems: Vec<String>,
}

impl<'w> Watch<'w> {
    /// Reads which notices are wanted. Keeps `[notify]` if it is right, else takes the last right one.
    #[must_use]
    pub fn new(watched: Watched<'w>, network: Network) -> Self {
        let mut problems = Vec::new();
        let notify = kept_notify::in_effect(&watched, &mut problems);
        let zone = watched.config.zone();
        Self {
            delivery: delivery(watched.config, &notify, &watched.host, network),
            notify,
            zone,
            notifier: Notifier::new(&watched.state_dir),
            state: watch_file(&watched.state_dir),
            clock: clock_file(&watched.state_dir),
            started: BTreeSet::new(),
            problems,
            watched,
        }
    }

    /// Whether the config has other mistakes than at the last call of any process.
    pub fn are_new_mistakes(&mut self) -> bool {
        let now: Vec<String> = self
            .watched
            .mistakes
            .iter()
            .map(ToString::to_string)
            .collect();
        self.state.change(|state| {
            let is_new = state.mistakes != now;
            state.mistakes = now;
            is_new
        })
    }

    /// The events and the channels.
    pub fn notifier(&mut self) -> &mut Notifier {
        &mut self.notifier
    }

    /// What is to be delivered, and how.
    #[must_use]
    pub fn delivery(&self) -> &Delivery {
        &self.delivery
    }

    /// A run begins an attempt: sends the start to the checks of healthchecks, each once. `run` is a UUID. A ping
    /// that fails is a problem of [`Self::ended`], and stops nothing.
    pub fn begins(&mut self, copy: &CopyName, run: &str, now: Timestamp) {
        for check in [RUN_CHECK.to_owned(), job_check(&copy.job)] {
            if self.started.insert(check.clone()) {
                self.ping(&check, Ping::Start, run, now);
            }
        }
    }

    /// A run or a backup ended: opens and closes events, then sends what is pending, and writes the
    /// metrics and the public status.
    pub fn ended(&mut self, ended: &Ended<'_>, now: &Now) -> Findings {
        let at = now.moment.wall;
        if ended.attempts.iter().any(|attempt| attempt.by == By::Run) {
            self.state.change(|state| state.last_run = Some(at));
        }
        let is_trusted = self.tick(now);
        let observed = observe::Observed::read(&self.watched, &mut self.state, now, is_trusted);
        let watched = &self.watched;
        self.notifier
            .events
            .change(|events| observed.apply(events, ended, watched, at));
        if is_trusted {
            self.digest(&observed.overview, at);
        }
        let tick = Tick {
            now: at,
            clock_is_trusted: is_trusted,
            at_once: false,
        };
        let outcome = self.notifier.deliver(&self.delivery, tick);
        for (channel, why) in &outcome.failed {
            self.problems
                .push(format!("a notice by {channel} was not delivered: {why}"));
        }
        self.ping_ends(ended, at);
        let events = self.notifier.events.read();
        let last_run = self.state.read().last_run;
        let mut unkept = self.state_problems(observed.problems);
        for problem in &observed.overview.unread {
            if !unkept.contains(problem) {
                unkept.push(problem.clone());
            }
        }
        let status = worst(
            [
                observed.overview.exit(at),
                overview::of_events(events.open()),
                // What can't be read may hold any of the others.
                match unkept.is_empty() {
                    true => Exit::Done,
                    false => Exit::Failed,
                },
            ]
            .into_iter(),
        );
        let unpublished = publish::write(
            &observed.overview,
            &events,
            &publish::To {
                code: status,
                watched: &self.watched,
                metrics: self.notify.metrics.as_deref(),
                last_run,
            },
            at,
            &mut self.problems,
        );
        unkept.extend(unpublished);
        let exits = [
            observed.overview.is_overdue().then_some(Exit::Overdue),
            (!unkept.is_empty()).then_some(Exit::Failed),
        ];
        let mut problems = std::mem::take(&mut self.problems);
        problems.extend(unkept);
        Findings {
            problems,
            exit: Exit::worst(exits.into_iter().flatten()),
            status,
            open: events.open().cloned().collect(),
            delivered: outcome.delivered,
            failed: outcome.failed,
        }
    }

    /// A command found damage in a container of the config: opens the event, and sends what is pending.
    pub fn damage(&mut self, container: &str, what: &Words, now: &Now) -> Findings {
        let key = Key::damage(Subject::Container(container.to_owned()), FoundBy::Command);
        let found = what.finding(Exit::Damaged);
        self.notifier
            .events
            .change(|events| events.observe(now.moment.wall, &key, Some(&found)));
        self.ended(&Ended::default(), now)
    }

    /// Whether the clock is believed.
    pub fn clock_is_trusted(&mut self, now: &Now) -> bool {
        now.trusted || self.clock.read().doubt().is_none()
    }

    /// Notes the time, and whether the clock is believed from now on.
    fn tick(&mut self, now: &Now) -> bool {
        let times = overview::times(&self.watched);
        self.clock.change(|clock| {
            clock.tick(&now.moment, now.synchronised || now.trusted, times);
            clock.doubt().is_none()
        }) || now.trusted
    }

    fn digest(&mut self, overview: &Overview, at: Timestamp) {
        let (notify, zone) = (&self.notify, &self.zone);
        let (delivery, events) = (&self.delivery, &mut self.notifier.events);
        // One process at a time: each digest comes once.
        self.state.change(|state| {
            let last = state.last_digest;
            let Some(last) = last.filter(|last| !crate::times::is_ahead(*last, at)) else {
                // The first one reports from here on.
                state.last_digest = Some(at);
                return;
            };
            if summary::is_due(notify, zone, last, at) {
                let known = events.read();
                let digest = summary::digest(overview, &known, delivery, last, at);
                events.change(|events| events.digest(at, &digest.text(zone)));
                state.last_digest = Some(at);
            }
        });
    }

    fn ping_ends(&mut self, ended: &Ended<'_>, at: Timestamp) {
        let mut checks: BTreeMap<String, Vec<Exit>> = BTreeMap::new();
        for attempt in ended.attempts {
            let job = job_check(&attempt.copy.job);
            match attempt.by {
                By::Run => {
                    for check in [RUN_CHECK.to_owned(), job] {
                        checks.entry(check).or_default().push(attempt.code());
                    }
                }
                // Somebody watches: a failure is no news, a success is.
                By::Backup if matches!(attempt.exit, Exit::Done | Exit::Unread) => {
                    checks.entry(job).or_default().push(attempt.exit);
                }
                By::Backup => {}
            }
        }
        let hook_failed = ended.container_hooks.iter().any(|(_, why)| why.is_some());
        if let (true, Some(run)) = (hook_failed, checks.get_mut(RUN_CHECK)) {
            run.push(Exit::Failed);
        }
        for (check, exits) in checks {
            let worst = Exit::worst(exits.into_iter());
            self.ping(&check, Ping::of(worst.code()), ended.run, at);
        }
    }

    fn ping(&mut self, check: &str, what: Ping, run: &str, now: Timestamp) {
        let sent = self
            .notifier
            .ping(&self.delivery, check, what, run, now)
            .map_err(|why| format!("a ping of healthchecks was not delivered: {why}"));
        self.problems.extend(sent.err());
    }

    /// What of the state could not be read or written.
    fn state_problems(&mut self, observed: Vec<String>) -> Vec<String> {
        let mut problems = observed;
        problems.extend(self.notifier.take_problems());
        problems.extend(self.state.take_problems());
        problems.extend(self.clock.take_problems());
        problems
    }
}

fn job_check(job: &str) -> String {
    format!("job {job}")
}

/// What the notices of `host` are, and how they are delivered.
pub(crate) fn delivery(config: &Config, notify: &Notify, host: &str, network: Network) -> Delivery {
    let jobs = config.jobs.iter();
    let of_jobs = jobs.filter_map(|job| {
        let url = job.healthchecks.clone()?;
        Some((job_check(job.name.as_str()), url))
    });
    let of_runs = notify.healthchecks.clone();
    let of_runs = of_runs.map(|url| (RUN_CHECK.to_owned(), url));
    Delivery {
        channels: notify.channels(),
        wanted: Wanted {
            on: notify.on.clone(),
            remind_after: notify
                .remind_after
                .and_then(|after| SignedDuration::try_from(after).ok()),
        },
        checks: of_runs.into_iter().chain(of_jobs).collect(),
        sender: Sender {
            host: host.to_owned(),
            zone: config.zone(),
        },
        network,
    }
}

#[cfg(test)]
mod tests;
