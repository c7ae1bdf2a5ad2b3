//! Opens and closes events by what the state folder knows, and by how attempts ended.

use std::collections::BTreeMap;

use jiff::Timestamp;
use sprat_session::Exit;
use sprat_session::state::history::MissingPlace;

use super::{Ended, Now, Overview, WatchState, Watched, space};
use crate::clock::clock_file;
use crate::config::{Mistake, Stops};
use crate::copy_name::CopyName;
use crate::copy_state::{self, HeldWhat};
use crate::notify::events::HOOK;
use crate::notify::{Attempt, By, Cause, Event, Events, Finding, FoundBy, Key, Kind, Subject};
use crate::overdue;
use crate::state_file::StateFile;

/// The class of an event `config` that the config itself opened.
const MISTAKE: &str = "mistake";

/// What was read before the events change.
pub(super) struct Observed {
    pub(super) overview: Overview,
    /// A file of `[watch.NAME]` is overdue.
    pub(super) file_is_overdue: bool,
    /// What could not be read or written.
    pub(super) problems: Vec<String>,
    /// What is overdue: `Some(true)`: the event opens; `Some(false)`: it closes; `None`: as it is.
    overdue: Vec<(Subject, Option<bool>, Option<Timestamp>)>,
    clock_is_unconfirmed: bool,
}

/// Whether an event `overdue` opens or closes.
fn verdict(opens: bool, is_overdue: bool) -> Option<bool> {
    match (opens, is_overdue) {
        (true, _) => Some(true),
        (false, true) => None,
        (false, false) => Some(false),
    }
}

impl Observed {
    /// Notes the check in the state of each copy, and reads all that the events depend on. With the
    /// clock in doubt nothing becomes overdue.
    pub(super) fn read(
        watched: &Watched<'_>,
        state: &mut StateFile<WatchState>,
        now: &Now,
        clock_is_trusted: bool,
    ) -> Self {
        let at = now.moment.wall;
        let mut problems = Vec::new();
        let mut overdue = Vec::new();
        let copies = watched.config.copies().filter(|_| clock_is_trusted);
        for copy in copies {
            let alert_after = copy.job.alert_after;
            let name = copy.name();
            let mut file = copy_state::copy_file(&watched.state_dir, &name);
            let verdict = file.change(|state| {
                state.seen(at);
                let opens = overdue::opens(alert_after, state, &now.moment);
                let last = state.last_success;
                (
                    verdict(opens, overdue::is_overdue(alert_after, state, at)),
                    last,
                )
            });
            problems.extend(file.take_problems());
            overdue.push((Subject::Copy(name), verdict.0, verdict.1));
        }
        let mut file_is_overdue = false;
        if clock_is_trusted && !(watched.config.watches.is_empty() && state.read().files.is_empty())
        {
            let watches = &watched.config.watches;
            let found = state.change(|state| {
                super::watched_files::note(watches, &mut state.files, at);
                let mut found = Vec::new();
                for watch in watches {
                    let state = state.files.entry(watch.name.clone()).or_default();
                    let after = Some(watch.alert_after);
                    let opens = overdue::opens(after, state, &now.moment);
                    let is_overdue = overdue::is_overdue(after, state, at);
                    found.push((&watch.name, verdict(opens, is_overdue), state.last_success));
                }
                found
            });
            file_is_overdue = found.iter().any(|(_, verdict, _)| *verdict != Some(false));
            overdue.extend(
                found
                    .into_iter()
                    .map(|(name, verdict, last)| (Subject::Watch(name.clone()), verdict, last)),
            );
        }
        let mut clock = clock_file(&watched.state_dir);
        Self {
            overview: Overview::read(watched, at),
            file_is_overdue,
            problems,
            overdue,
            clock_is_unconfirmed: clock.read().is_unconfirmed() && !now.trusted,
        }
    }

    /// Changes the events.
    pub(super) fn apply(
        &self,
        events: &mut Events,
        ended: &Ended<'_>,
        watched: &Watched<'_>,
        at: Timestamp,
    ) {
        let is_stopped = |copy: &CopyName| watched.config.stopped.contains(copy);
        for attempt in ended.attempts {
            // Its event is opened by the config below.
            if !(attempt.exit == Exit::Usage && is_stopped(&attempt.copy)) {
                events.attempt(at, attempt);
            }
        }
        for (container, failed) in ended.container_hooks {
            let key = Key::new(Kind::Failure, Subject::Container(container.clone()));
            let found = failed.as_ref().map(|what| what.finding(Exit::Failed));
            events.observe(at, &key, found.as_ref());
        }
        self.overdue(events, at);
        self.copies(events, ended.attempts, at);
        self.containers(events, at);
        config(events, watched, at);
        let clock = self.clock_is_unconfirmed.then(|| Finding {
            cause: Cause::new(0, "unconfirmed"),
            text: "The clock was changed, or differs from the clock of a server. No time service \
                   (NTP) is active."
                .to_owned(),
            hint: "Backups and pruning continue. Set the clock, and start a time service."
                .to_owned(),
        });
        events.observe(at, &Key::new(Kind::Clock, Subject::Machine), clock.as_ref());
        if watched.mistakes.iter().all(|one| one.stops != Stops::File) {
            events.forget(at, |subject| is_known(subject, watched));
        }
    }

    fn overdue(&self, events: &mut Events, at: Timestamp) {
        for (subject, verdict, last) in &self.overdue {
            let Some(opens) = verdict else { continue };
            let found = opens.then(|| overdue_finding(subject, *last));
            events.observe(
                at,
                &Key::new(Kind::Overdue, subject.clone()),
                found.as_ref(),
            );
        }
    }

    fn copies(&self, events: &mut Events, attempts: &[Attempt], at: Timestamp) {
        let missing = self.missing();
        for view in &self.overview.copies {
            let subject = Subject::Copy(view.copy.clone());
            let held = view.state.held.as_ref().map(|held| {
                let found = Finding {
                    cause: Cause::new(0, "held"),
                    text: held.reason.clone(),
                    hint: format!(
                        "Nothing is lost. Run `sprat accept {}`: it shows what waits, and releases \
                         it.",
                        view.copy
                    ),
                };
                (held.what, found)
            });
            let prune = held.as_ref().filter(|(what, _)| *what == HeldWhat::Prune);
            let prune = prune.map(|(_, found)| found);
            events.observe(at, &Key::new(Kind::Held, subject.clone()), prune);
            if let Some((HeldWhat::Copy, found)) = &held {
                events.observe(at, &Key::new(Kind::Growth, subject.clone()), Some(found));
            }
            heal(events, &view.state, &subject, at);
            let is_new = |attempt: &Attempt| {
                let made = matches!(attempt.exit, Exit::Done | Exit::Unread);
                attempt.copy == view.copy && attempt.by == By::Run && made
            };
            let places = missing.get(&view.copy).copied().unwrap_or_default();
            observe_missing(events, &view.copy, places, attempts.iter().any(is_new), at);
        }
    }

    /// What the last snapshot of each copy lacks.
    fn missing(&self) -> BTreeMap<CopyName, &[MissingPlace]> {
        let containers = self.overview.containers.iter();
        let jobs = containers.flat_map(|container| {
            let jobs = container.known.iter().flat_map(|known| &known.history.jobs);
            jobs.map(|(job, history)| (CopyName::new(job, &container.name), history))
        });
        let made = jobs
            .filter_map(|(copy, history)| Some((copy, &*history.last_snapshot.as_ref()?.missing)));
        made.collect()
    }

    fn containers(&self, events: &mut Events, at: Timestamp) {
        for view in &self.overview.containers {
            let Some(known) = &view.known else { continue };
            let subject = Subject::Container(view.name.clone());
            if let Some(found) = space::finding(&known.history, view.min_free, at) {
                events.observe(at, &Key::new(Kind::Space, subject.clone()), found.as_ref());
            }
            let bad = known
                .each_check()
                .filter(|(_, check)| check.exit != Exit::Done);
            let bad = bad.max_by_key(|(_, check)| check.at);
            let key = Key::damage(subject.clone(), FoundBy::Check);
            match bad {
                Some((kind, check)) => {
                    // What a person accepted is reported again only if a later check finds it.
                    if events
                        .accepted(&key)
                        .is_none_or(|accepted| accepted < check.at)
                    {
                        let found = Finding {
                            cause: Cause::new(Exit::Damaged.code(), "check"),
                            text: format!("The check ({kind}) found damage."),
                            hint: format!(
                                "Run `sprat check {}`. It names the damage, and says what to do.",
                                view.name
                            ),
                        };
                        events.observe(at, &key, Some(&found));
                    }
                }
                None => {
                    let clean = known.each_check().map(|(_, check)| check.at).max();
                    let is_older = |event: &Event| clean.is_some_and(|clean| event.opened <= clean);
                    for found_by in [FoundBy::Check, FoundBy::Command] {
                        let key = Key::damage(subject.clone(), found_by);
                        if events
                            .open()
                            .any(|event| event.key == key && is_older(event))
                        {
                            events.observe(at, &key, None);
                        }
                    }
                }
            }
        }
    }
}

fn overdue_finding(subject: &Subject, last: Option<Timestamp>) -> Finding {
    let last = match last {
        Some(last) => format!("since {}", last.strftime("%Y-%m-%d %H:%M UTC")),
        None => "since it was set up".to_owned(),
    };
    let (text, hint) = match subject {
        Subject::Watch(_) => (
            format!("Nothing was written to the file {last}."),
            "Check the machine that writes into it.".to_owned(),
        ),
        _ => (
            format!("There was no backup {last}."),
            format!("`sprat status {subject}` shows how the last attempt ended."),
        ),
    };
    Finding {
        cause: Cause::new(Exit::Overdue.code(), "overdue"),
        text,
        hint,
    }
}

/// Closes what a success closed while nothing watched: the process was killed before it could.
fn heal(events: &mut Events, state: &copy_state::CopyState, subject: &Subject, at: Timestamp) {
    for (kind, since) in [
        (Kind::Failure, state.last_success),
        (Kind::Incomplete, state.last_complete),
    ] {
        let key = Key::new(kind, subject.clone());
        let is_over = |event: &Event| {
            event.key == key
                && event.cause.class != HOOK
                && since.is_some_and(|since| event.opened < since && since <= at)
        };
        if events.open().any(is_over) {
            events.observe(at, &key, None);
        }
    }
}

fn observe_missing(
    events: &mut Events,
    copy: &CopyName,
    places: &[MissingPlace],
    opens: bool,
    at: Timestamp,
) {
    let subject = Subject::Copy(copy.clone());
    let open = events
        .open()
        .filter(|event| event.key.kind == Kind::Missing && event.key.subject == subject);
    let over: Vec<Key> = open
        .filter(|event| places.iter().all(|place| place.path != event.key.part))
        .map(|event| event.key.clone())
        .collect();
    for key in over {
        events.observe(at, &key, None);
    }
    for place in places.iter().filter(|_| opens) {
        let found = Finding {
            cause: Cause::new(0, "disk"),
            text: format!(
                "The disk of {} was not mounted. Snapshot {} has this disk, and is kept.",
                place.path, place.kept_in
            ),
            hint: "Mount the disk. If it is gone for good, run one backup with --disk-gone."
                .to_owned(),
        };
        events.observe(at, &Key::missing(copy.clone(), &*place.path), Some(&found));
    }
}

/// The events `config`: one for each copy that a mistake stops, one of the machine for the rest.
fn config(events: &mut Events, watched: &Watched<'_>, at: Timestamp) {
    let config = watched.config;
    let text = |concerns: &dyn Fn(&Stops) -> bool| -> Option<String> {
        let mistakes = watched.mistakes.iter().filter(|one| concerns(&one.stops));
        let lines: Vec<String> = mistakes.map(ToString::to_string).collect();
        (!lines.is_empty()).then(|| lines.join("\n"))
    };
    let found = |text: String| Finding {
        cause: Cause::new(Exit::Usage.code(), MISTAKE),
        text,
        hint: "Everything else continues. Correct the config. `sprat config check` shows all \
               mistakes."
            .to_owned(),
    };
    for copy in &config.stopped {
        let of_copy = |stops: &Stops| match stops {
            Stops::Job(job) => *job == copy.job,
            Stops::Container(container) => *container == copy.container,
            Stops::EveryJob => true,
            Stops::Nothing | Stops::Notices | Stops::File => false,
        };
        let text = text(&of_copy).unwrap_or_else(|| "A mistake stops this copy.".to_owned());
        let key = Key::new(Kind::Config, Subject::Copy(copy.clone()));
        events.observe(at, &key, Some(&found(text)));
    }
    let over: Vec<Key> = events
        .open()
        .filter(|event| event.key.kind == Kind::Config && event.cause.class == MISTAKE)
        .filter(|event| match &event.key.subject {
            Subject::Copy(copy) => !config.stopped.contains(copy),
            _ => false,
        })
        .map(|event| event.key.clone())
        .collect();
    for key in over {
        events.observe(at, &key, None);
    }
    let has_copy = |stops: &Stops| match stops {
        Stops::Job(job) => config.stopped.iter().any(|copy| copy.job == *job),
        Stops::Container(name) => config.stopped.iter().any(|copy| copy.container == *name),
        Stops::EveryJob => !config.stopped.is_empty(),
        Stops::Nothing | Stops::Notices | Stops::File => false,
    };
    let rest = text(&|stops| !has_copy(stops)).map(found);
    events.observe(at, &Key::new(Kind::Config, Subject::Machine), rest.as_ref());
}

/// Whether the config still has what an event is about.
fn is_known(subject: &Subject, watched: &Watched<'_>) -> bool {
    let config = watched.config;
    match subject {
        Subject::Copy(copy) => {
            config.stopped.contains(copy) || config.has_job(&copy.container, &copy.job)
        }
        Subject::Container(name) => {
            let stops = |one: &Mistake| one.stops == Stops::Container(name.clone());
            config.containers.iter().any(|one| one.name == *name)
                || watched.mistakes.iter().any(stops)
        }
        Subject::Watch(name) => config.watches.iter().any(|one| one.name == *name),
        // The notifier forgets channels.
        Subject::Channel(_) | Subject::Machine => true,
    }
}
