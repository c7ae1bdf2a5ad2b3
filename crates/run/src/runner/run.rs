//! `sprat run`: makes what is due, leaves the rest, and reports why.

use jiff::Timestamp;
use serde_json::{Value, json};
use sprat_session::Exit;
use sprat_session::json::exit_json;

use super::clock::RunClock;
use super::outcome::{ContainerDone, End, Outcome};
use super::selection::Selected;
use super::{ContainerWork, CopyWork, Front, Runner};
use crate::clock::{Moment, clock_file};
use crate::config::{Container, Copy, Mistake};
use crate::copy_name::CopyName;
use crate::copy_state::{Place, known_copies};

/// What a run does with each copy that it is about, in the order of the config.
#[derive(Debug)]
pub struct Plan<'c> {
    /// The copies.
    pub copies: Vec<Selected<'c>>,
    /// The containers of which a slice of the check is due.
    pub slices: Vec<&'c Container>,
    /// The containers of which a drill is due.
    pub drills: Vec<&'c Container>,
}

/// What a run did.
#[derive(Debug)]
pub struct RunDone {
    /// How the copies ended that it tried, by containers.
    pub containers: Vec<ContainerDone>,
    /// The copies that mistakes in the config stopped.
    pub stopped: Vec<CopyName>,
    /// The exit code, without what the notices add.
    pub exit: Exit,
}

/// A plan and what came of it.
#[derive(Debug)]
pub struct RunReport<'r, 'c> {
    /// The plan.
    pub plan: &'r Plan<'c>,
    /// What was done; `None`: nothing was to be done.
    pub done: Option<&'r RunDone>,
}

impl RunDone {
    /// The results of the copies.
    pub fn outcomes(&self) -> impl Iterator<Item = &Outcome> {
        self.containers.iter().flat_map(|one| &one.outcomes)
    }
}

impl<'a> Runner<'a> {
    /// A run begins: notes that each copy was seen, and checks the clock. `trusted`: the clock is right.
    pub fn begin(&mut self, moment: &Moment, synchronised: bool, trusted: bool) {
        let now = moment.wall;
        for copy in self.config.copies() {
            let place = Place::of(&self.state_dir, &copy.container.target);
            self.change(&copy.name(), |state| {
                state.is_at(place, now);
                state.seen(now);
            });
        }
        let known = known_copies(&self.state_dir).unwrap_or_default();
        let times: Vec<Timestamp> = known
            .iter()
            .flat_map(|name| self.state(name).times().collect::<Vec<_>>())
            .collect();
        let mut file = clock_file(&self.state_dir);
        let in_doubt = file.change(|clock| {
            clock.tick(moment, synchronised, times);
            clock.doubt().is_some()
        });
        self.report_problems(file.take_problems());
        self.clock = RunClock::new(in_doubt, trusted);
    }

    /// Decides about each of `copies`.
    #[must_use]
    pub fn plan<'c>(&self, copies: &[Copy<'c>], now: Timestamp) -> Plan<'c> {
        let zone = self.config.zone();
        let selecting = self.selecting(&zone, self.anyway, now);
        let select = |copy: &Copy<'c>| selecting.select(*copy, &self.state_with_disk(copy));
        let mut containers: Vec<&'c Container> = Vec::new();
        for container in copies.iter().map(|copy| copy.container) {
            if containers.iter().all(|known| known.name != container.name) {
                containers.push(container);
            }
        }
        let (mut slices, mut drills) = (containers.clone(), containers);
        slices.retain(|container| self.slice_due(container, now).is_some());
        drills.retain(|container| self.is_drill_due(container, now));
        Plan {
            copies: copies.iter().map(select).collect(),
            slices,
            drills,
        }
    }

    /// Carries out a plan. `each` is called when the work on a container has ended.
    pub fn carry_out(
        &self,
        plan: &Plan<'a>,
        mistakes: &[Mistake],
        front: &mut dyn Front,
        each: &mut dyn FnMut(&ContainerDone),
    ) -> RunDone {
        let now = Timestamp::now();
        for stopped in &self.config.stopped {
            self.record_stopped(stopped, mistakes, now);
        }
        for selected in &plan.copies {
            let skip = selected.skip.clone();
            self.change(&selected.copy.name(), |state| match skip {
                Some(why) => state.skip(now, why),
                None => state.skipped = None,
            });
        }
        let mut containers = Vec::new();
        // After an interrupt, too: the copies that did not begin are named.
        for work in plan.work() {
            let done = self.work_on(&work, front);
            each(&done);
            containers.push(done);
        }
        let mut exits: Vec<Exit> = containers.iter().map(ContainerDone::exit).collect();
        exits.extend((!mistakes.is_empty()).then_some(Exit::Usage));
        RunDone {
            containers,
            stopped: self.config.stopped.clone(),
            exit: Exit::worst(exits.into_iter()),
        }
    }

    /// The copies of a run as JSON.
    #[must_use]
    pub fn copies_json(&self, report: &RunReport<'_, '_>, now: Timestamp) -> Value {
        let zone = self.config.zone();
        let selecting = self.selecting(&zone, false, now);
        let copies = report.plan.copies.iter().map(|selected| {
            let name = selected.copy.name();
            let next = selecting.decide(selected.copy, &self.state(&name)).next;
            let mut outcomes = report.done.iter().flat_map(|done| done.outcomes());
            let outcome = outcomes.find(|outcome| outcome.copy == name);
            copy_json(selected, outcome, next)
        });
        let stopped = report.done.iter().flat_map(|done| &done.stopped);
        copies.chain(stopped.map(stopped_json)).collect()
    }
}

impl<'c> Plan<'c> {
    /// Nothing is to be done.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slices.is_empty()
            && self.drills.is_empty()
            && !self.copies.iter().any(Selected::is_tried)
    }

    /// The sessions, in the order of the config, except that a container with a copy that gave way comes last.
    pub(super) fn work(&self) -> Vec<ContainerWork<'c>> {
        let mut all: Vec<ContainerWork<'c>> = Vec::new();
        let gave_way = |work: &ContainerWork<'_>| {
            let mut tried = self.copies.iter().filter(|selected| selected.is_tried());
            tried.any(|one| one.gave_way && one.copy.container.name == work.name)
        };
        for selected in &self.copies {
            let container = selected.copy.container;
            let copy = selected.is_tried().then(|| CopyWork::of(selected.copy));
            let mut beside = self.slices.iter().chain(&self.drills);
            let is_checked = beside.any(|one| one.name == container.name);
            match all.iter_mut().find(|work| work.name == container.name) {
                Some(work) => work.copies.extend(copy),
                None if copy.is_none() && !is_checked => {}
                None => all.push(ContainerWork {
                    name: container.name.clone(),
                    target: container.target.clone(),
                    container: Some(container),
                    copies: copy.into_iter().collect(),
                }),
            }
        }
        all.sort_by_key(gave_way);
        all
    }

    /// The slices of the check that are due, as JSON.
    #[must_use]
    pub fn checks_json(&self) -> Value {
        let slices = self.slices.iter();
        slices.map(|one| json!({ "container": one.name })).collect()
    }

    /// The drills that are due, as JSON.
    #[must_use]
    pub fn drills_json(&self) -> Value {
        let drills = self.drills.iter();
        drills.map(|one| json!({ "container": one.name })).collect()
    }
}

fn copy_json(selected: &Selected<'_>, outcome: Option<&Outcome>, next: Option<Timestamp>) -> Value {
    let name = selected.copy.name();
    let snapshot = outcome.and_then(|outcome| match &outcome.end {
        End::Made(report) => Some(report.name.to_string()),
        _ => None,
    });
    let skipped = outcome.and_then(|outcome| match &outcome.end {
        End::Skipped { why, .. } => Some(why.clone()),
        _ => None,
    });
    let exit = outcome.map(Outcome::exit);
    json!({
        "job": name.job,
        "container": name.container,
        "due": selected.decision.due,
        "reason": skipped.clone().unwrap_or_else(|| selected.reason()),
        "next": next,
        "attempted": outcome.is_some_and(Outcome::is_attempt),
        "result": exit.map(exit_json),
        "snapshot": snapshot,
        "seconds": outcome.map(|outcome| outcome.took.as_secs_f64()),
        "sent_bytes": outcome.map(|outcome| outcome.sent_bytes),
    })
}

fn stopped_json(name: &CopyName) -> Value {
    json!({
        "job": name.job,
        "container": name.container,
        "due": false,
        "reason": "a mistake in the config stops it",
        "next": null,
        "attempted": false,
        "result": exit_json(Exit::Usage),
        "snapshot": null,
        "seconds": null,
        "sent_bytes": null,
    })
}
