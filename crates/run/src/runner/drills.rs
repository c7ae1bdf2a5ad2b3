//! The drill of a container when it is due: a sample is restored and compared, in a session of its own.

use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Value, json};
use sprat_session::drill::Drilled;
use sprat_session::json::exit_json;
use sprat_session::{Exit, Failure};

use super::checks::while_allowed;
use super::named_files::naming;
use super::outcome::ContainerDone;
use super::upkeep::{CHECK_INTERVAL, DAY, RETRY, Upkeep, is_time};
use super::{Front, Runner};
use crate::config::Container;
use crate::copy_state::container_file;

impl Runner<'_> {
    /// Whether a drill is due in a container, and may be done now.
    pub(super) fn is_drill_due(&self, container: &Container, now: Timestamp) -> bool {
        let Some(every) = container.drill_every else {
            return false;
        };
        let tried = container_file(&self.state_dir, &container.name)
            .read()
            .drill_tried;
        let Some(known) = self.known(container) else {
            return false;
        };
        let last = known.checks.drill.as_ref();
        let wait = wait(last.map(|last| last.exit), every);
        // The first one is a day after the first run.
        let from = last
            .map(|last| last.at)
            .or_else(|| self.first_seen(container));
        is_time(from, wait, now)
            && is_time(tried, RETRY, now)
            && known.history.room.is_some()
            && self.why_not_now(container).is_none()
    }

    /// When a run first saw a copy in the container.
    fn first_seen(&self, container: &Container) -> Option<Timestamp> {
        let copies = self.config.copies();
        let of_it = copies.filter(|copy| copy.container.name == container.name);
        of_it
            .filter_map(|copy| self.state(&copy.name()).first_seen)
            .min()
    }

    pub(super) fn drill(&self, container: &Container, done: &mut Upkeep, front: &mut dyn Front) {
        let (name, now) = (&container.name, Timestamp::now());
        self.change_container(name, |state| state.drill_tried = Some(now));
        let check = || self.why_not_now(container);
        let drilled = while_allowed(self.interrupt, CHECK_INTERVAL, check, |interrupt| {
            front.drill(name, interrupt)
        });
        match drilled.and_then(|(drilled, _)| drilled) {
            Ok(drilled) => {
                done.failures.extend(damage(name, &drilled));
                done.drill = Some(drilled);
            }
            Err(failure) => self.failed(failure, &format!("{name}: the drill"), done),
        }
    }
}

/// How long after a drill the next one is due. After one that failed, it is tried again the next day.
fn wait(last: Option<Exit>, every: Duration) -> Duration {
    match last {
        Some(Exit::Done) => every,
        _ => every.min(DAY),
    }
}

/// What did not come back as it was, if anything.
fn damage(name: &str, drilled: &Drilled) -> Option<Failure> {
    if drilled.exit() == Exit::Done {
        return None;
    }
    let failure = Failure::new(Exit::Damaged, format!("{name}: the drill failed"));
    let report = &drilled.report;
    let names = report.damaged.names.iter().chain(&report.unreadable.names);
    Some(naming(failure, names).with_hint(format!(
        "run `sprat check {name} --read-data` to check every file; docs/recovery.md says what to do"
    )))
}

/// The drills that were done, as JSON.
#[must_use]
pub fn drills_json(done: &[ContainerDone]) -> Value {
    let drills = done
        .iter()
        .filter_map(|one| Some((&one.name, one.upkeep.drill.as_ref()?)));
    let json = |(name, drilled): (&String, &Drilled)| {
        json!({
            "container": name,
            "files": drilled.report.files,
            "bytes": drilled.report.bytes,
            "result": exit_json(drilled.exit()),
        })
    };
    drills.map(json).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drill_that_failed_is_tried_again_the_next_day() {
        let month = DAY * 30;
        assert_eq!(wait(Some(Exit::Done), month), month);
        assert_eq!(wait(Some(Exit::Damaged), month), DAY);
        assert_eq!(wait(None, month), DAY);
    }
}
