//! Opens and closes events by what the state folder knows, and by how attempts ended.

use std::collections::BTreeMap;

use jiff::Timestamp;
use sprat_session::Exit;
use sprat_session::state::history::{MissingPlace, SeenGone};

use super::{ContainerView, Ended, Now, Overview, WatchState, Watched, space};
use crate::clock::clock_file;
use crate::config::Watch as WatchOfFile;
use crate::config::{Mistake, Stops};
use crate::copy_name::CopyName;
use crate::copy_state::{self, HeldWhat, Place};
use crate::notify::{
    Attempt, By, Cause, Event, Events, Finding, FoundBy, Key, Kind, Subject, Words,
};
use crate::overdue;
use crate::state_file::StateFile;

/// The class of an event `config` that the config itself opened.
const MISTAKE: &str = "mistake";

/// What was read before the events change.
pub(super) struct Observed {
    pub(super) overview: Overview,
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
            let place = Place::of(&watched.state_dir, &copy.container.target);
            let verdict = file.change(|state| {
                state.is_at(place, at);
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
        if clock_is_trusted {
            overdue.extend(files_overdue(watched, state, now));
        }
        let mut clock = clock_file(&watched.state_dir);
        Self {
            overview: Overview::read(watched, at),
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
        for owed in ended.owed {
            let key = Key::new(Kind::Failure, owed.subject.clone());
            let found = Words::of_hook(&owed.failure).finding(Exit::Failed);
            events.observe(at, &key, Some(&found));
        }
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
            if let Some(changed) = &view.state.changed {
                let found = Finding {
                    cause: Cause::new(0, "changed"),
                    text: changed.reason.clone(),
                    hint: format!(
                        "Backups continue, and older snapshots are kept. If the changes are right, run \
                         `sprat accept {}`. If not, restore from a snapshot before {}.",
                        view.copy,
                        changed.kept_before.strftime("%Y-%m-%d %H:%M UTC")
                    ),
                };
                events.observe(at, &Key::new(Kind::Change, subject.clone()), Some(&found));
            }
            let silent = view.state.silent.as_ref().map(|silent| Finding {
                cause: Cause::new(Exit::Damaged.code(), "source"),
                text: silent.reason(),
                hint: format!(
                    "The snapshots have the content from before, and one of them is kept. Check the disk, and \
                     restore the files. Then run `sprat accept {}`.",
                    view.copy
                ),
            });
            let key = Key::damage(subject.clone(), FoundBy::Source);
            events.observe(at, &key, silent.as_ref());
            heal(events, &view.state, &subject, at);
            let is_new = |attempt: &Attempt| {
                let made = matches!(attempt.exit, Exit::Done | Exit::Unread);
                attempt.copy == view.copy && attempt.by == By::Run && made
            };
            // Of a state that can't be read nothing is known: no disk has come back.
            if let Some(places) = missing.get(&view.copy) {
                observe_missing(events, &view.copy, places, attempts.iter().any(is_new), at);
            }
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
            self.drill(events, at, view);
            let key = Key::damage(subject.clone(), FoundBy::Session);
            let gone = known.history.gone.as_ref();
            events.observe(at, &key, gone.map(gone_finding).as_ref());
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
                None => events.observe_clean(
                    at,
                    &key,
                    known.each_check().map(|(_, check)| check.at).max(),
                ),
            }
            // A command may have found it anywhere in the data: only a check of all data finds none.
            let read = view.check().filter(|check| check.exit == Exit::Done);
            let key = Key::damage(subject, FoundBy::Command);
            events.observe_clean(at, &key, read.map(|check| check.at));
        }
    }

    /// The last drill of a container.
    fn drill(&self, events: &mut Events, at: Timestamp, view: &ContainerView) {
        let key = Key::damage(Subject::Container(view.name.clone()), FoundBy::Drill);
        let Some((drilled, has_passed)) = view.drill() else {
            return;
        };
        let accepted = events.accepted(&key);
        if has_passed {
            events.observe_clean(at, &key, Some(drilled));
        } else if accepted.is_none_or(|accepted| accepted < drilled) {
            let found = Finding {
                cause: Cause::new(Exit::Damaged.code(), "drill"),
                text: "Files that a drill restored are not what was backed up.".to_owned(),
                hint: format!(
                    "Run `sprat drill {0}`, which names them, and `sprat check {0} --read-data`.",
                    view.name
                ),
            };
            events.observe(at, &key, Some(&found));
        }
    }
}

fn gone_finding(gone: &SeenGone) -> Finding {
    let names: Vec<&str> = gone.snapshots.iter().map(String::as_str).collect();
    Finding {
        cause: Cause::new(Exit::Damaged.code(), "gone"),
        text: format!(
            "Snapshots that this machine saw are not in the container any more: {}. Another machine removed \
             them, or the container was replaced by another copy of it.",
            names.join(", ")
        ),
        hint: "If nobody removed them, search the server for another copy of the container file."
            .to_owned(),
    }
}

/// Notes when each file of `[watch.NAME]` was last written to, and finds which are overdue.
fn files_overdue(
    watched: &Watched<'_>,
    state: &mut StateFile<WatchState>,
    now: &Now,
) -> Vec<(Subject, Option<bool>, Option<Timestamp>)> {
    let watches = &watched.config.watches;
    if watches.is_empty() && state.read().files.is_empty() {
        return Vec::new();
    }
    let at = now.moment.wall;
    let is_known = |name: &str| is_known(&Subject::Watch(name.to_owned()), watched);
    state.change(|state| {
        state.files.retain(|name, _| is_known(name));
        let find = |watch: &WatchOfFile| {
            let file = state.files.entry(watch.name.clone()).or_default();
            super::watched_files::note(watch, file, at);
            let after = Some(watch.alert_after);
            let opens = overdue::opens(after, file, &now.moment);
            let verdict = verdict(opens, overdue::is_overdue(after, file, at));
            (
                Subject::Watch(watch.name.clone()),
                verdict,
                file.last_success,
            )
        };
        watches.iter().map(find).collect()
    })
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
                && !event.is_of_later_step()
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
    // The place stands for a disk of which nothing else is known.
    let disk = |place: &MissingPlace| match place.disk.is_empty() {
        true => place.path.clone(),
        false => place.disk.clone(),
    };
    let over: Vec<Key> = open
        .filter(|event| places.iter().all(|place| disk(place) != event.key.part))
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
        events.observe(at, &Key::missing(copy.clone(), disk(place)), Some(&found));
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
        // A mistake in its table takes it out of the config, too.
        Subject::Watch(name) => {
            let watches = &mut config.watches.iter();
            watches.any(|one| one.name == *name)
                || watched
                    .mistakes
                    .iter()
                    .any(|one| one.stops == Stops::Nothing)
        }
        // The notifier forgets channels.
        Subject::Channel(_) | Subject::Machine => true,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;
    use sprat_session::state::checks::{KeptCheck, KeptChecks};
    use sprat_session::state::history::History;
    use sprat_session::status::LocalStatus;

    use super::*;
    use crate::watch::ContainerView;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_795_874_400 + seconds).unwrap()
    }

    fn open(events: &Events) -> Vec<&str> {
        events.open().map(|event| &*event.key.part).collect()
    }

    #[test]
    fn each_missing_disk_is_an_event_wherever_it_was_mounted() {
        let copy = CopyName::new("home", "nas");
        let place = |path: &str, disk: &str| MissingPlace {
            path: path.to_owned(),
            kept_in: "2026-11-28T14-00-00Z".to_owned(),
            disk: disk.to_owned(),
        };
        let mut events = Events::default();
        let mut observe = |places: &[MissingPlace], seconds| {
            observe_missing(&mut events, &copy, places, true, at(seconds));
            let open: Vec<String> = open(&events).into_iter().map(str::to_owned).collect();
            (open, events.all().count())
        };
        let disks = |disks: &[&str]| disks.iter().map(|disk| (*disk).to_owned()).collect();
        assert_eq!(observe(&[place("/usb", "A")], 0), (disks(&["A"]), 1));
        assert_eq!(observe(&[place("/media", "A")], 1), (disks(&["A"]), 1));
        // At the same place another disk is missing now.
        assert_eq!(observe(&[place("/media", "B")], 2), (disks(&["B"]), 2));
        assert_eq!(observe(&[place("/old", "")], 3), (disks(&["/old"]), 3));
        assert_eq!(observe(&[], 4), (disks(&[]), 3));
    }

    #[test]
    fn what_a_command_found_closes_only_after_a_clean_check_of_all_data() {
        let check = |seconds, finished| {
            Some(KeptCheck {
                at: at(seconds),
                exit: Exit::Done,
                finished,
                result: Value::Null,
            })
        };
        let nas = Subject::Container("nas".to_owned());
        let key = Key::damage(nas, FoundBy::Command);
        let found = Finding {
            cause: Cause::new(13, "damaged"),
            text: String::new(),
            hint: String::new(),
        };
        let stays_open = |quick, read_data| {
            let mut events = Events::default();
            events.observe(at(10), &key, Some(&found));
            let known = LocalStatus {
                uuid: String::new(),
                history: History::default(),
                checks: KeptChecks {
                    quick,
                    read_data,
                    ..KeptChecks::default()
                },
                proved: None,
                written_bytes: None,
                unread: None,
            };
            let containers = vec![ContainerView {
                name: "nas".to_owned(),
                known: Some(known),
                is_unread: false,
                min_free: 0,
                check_every: None,
            }];
            let observed = Observed {
                overview: Overview {
                    copies: Vec::new(),
                    containers,
                    watches: Vec::new(),
                    attempts: Vec::new(),
                    unread: Vec::new(),
                },
                problems: Vec::new(),
                overdue: Vec::new(),
                clock_is_unconfirmed: false,
            };
            observed.containers(&mut events, at(100));
            events.open().count() == 1
        };
        assert!(stays_open(None, None));
        assert!(stays_open(check(20, true), None));
        assert!(stays_open(check(20, true), check(5, true)));
        assert!(stays_open(None, check(20, false)));
        assert!(!stays_open(None, check(20, true)));
    }
}
