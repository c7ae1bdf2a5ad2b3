//! The prune of a copy in a run, by the rules of its job.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use sprat_session::{Exit, Failure, Session};
use sprat_snapshot::{KeepPolicy, KeepRules, PruneReport, PruneSpec, is_held};

use super::checks::while_allowed;
use super::container::Draft;
use super::outcome::End;
use super::{ContainerWork, Front, Runner};
use crate::config::Job;
use crate::copy_state::{CopyState, Held, HeldWhat};
use crate::due::add_less_slack;
use crate::times::is_ahead;

/// How long the prune of one copy may take. The next one goes on.
const TIME_MAX: Duration = Duration::from_secs(30 * 60);
/// How often that is checked.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// Whether a run prunes a copy now.
#[must_use]
pub(super) fn is_due(state: &CopyState, prune_every: Duration, now: Timestamp) -> bool {
    if state
        .held
        .as_ref()
        .is_some_and(|held| held.what == HeldWhat::Prune)
    {
        return false;
    }
    let last = state.last_prune.filter(|last| !is_ahead(*last, now));
    last.is_none_or(|last| add_less_slack(last, prune_every) <= now)
}

impl Runner<'_> {
    /// Prunes a copy that was just made, if its job has rules and it is time.
    pub(super) fn prune(
        &self,
        draft: &mut Draft<'_>,
        session: &mut Session,
        front: &mut dyn Front,
    ) {
        if draft.outcome.end.is_made() && self.prune_is_due(draft) {
            self.prune_by_rules(draft, session, front);
        }
    }

    /// Prunes a copy that may not begin because the server lacks room, if its job has rules and it is time.
    pub(super) fn prune_unmade(
        &self,
        draft: &mut Draft<'_>,
        work: &ContainerWork<'_>,
        session: &mut Session,
        front: &mut dyn Front,
    ) {
        if self.prune_is_due(draft) && self.changes_are_known(draft, work, session, front) {
            self.prune_by_rules(draft, session, front);
        }
    }

    /// A copy failed for lack of room: prunes it, whenever it was last pruned. True if that removed a
    /// snapshot.
    pub(super) fn make_room(
        &self,
        draft: &mut Draft<'_>,
        work: &ContainerWork<'_>,
        session: &mut Session,
        front: &mut dyn Front,
    ) -> bool {
        if draft.work.job.is_none() {
            return false;
        }
        let state = self.state(&draft.outcome.copy);
        if is_due(&state, Duration::ZERO, Timestamp::now())
            && self.changes_are_known(draft, work, session, front)
        {
            self.prune_by_rules(draft, session, front);
        }
        let pruned = &mut draft.outcome.pruned;
        // One that removed nothing does not count as the prune of this `prune_every`.
        *pruned = pruned.filter(|removed| *removed > 0);
        pruned.is_some()
    }

    fn prune_is_due(&self, draft: &Draft<'_>) -> bool {
        // Of a copy that is not in the config there is no state: a file of its name is of another one.
        let Some(job) = draft.work.job else {
            return false;
        };
        let state = self.state(&draft.outcome.copy);
        is_due(&state, job.prune_every, Timestamp::now())
    }

    /// Before a prune without a new snapshot: whether it is known what changed in the sources. After
    /// ransomware the lack of room must not cost the snapshots from before.
    fn changes_are_known(
        &self,
        draft: &mut Draft<'_>,
        work: &ContainerWork<'_>,
        session: &mut Session,
        front: &mut dyn Front,
    ) -> bool {
        let has_rules = draft.work.job.is_some_and(|job| job.keep.is_some());
        if !has_rules || self.clock.is_in_doubt() || self.interrupt.requested() {
            return false;
        }
        let Err(failure) = self.find_changes(draft, work, session, front) else {
            return true;
        };
        if failure.exit != Exit::Interrupted {
            let shown = &draft.outcome.shown;
            let failure = failure.context(format!(
                "nothing of {shown} is pruned for lack of room, because the changes in its sources can't be \
                 counted"
            ));
            draft.outcome.failed_prunes.push(failure);
        }
        false
    }

    fn prune_by_rules(&self, draft: &mut Draft<'_>, session: &mut Session, front: &mut dyn Front) {
        let mut state = self.state(&draft.outcome.copy);
        state.changed = state.changed.or_else(|| draft.changed.clone());
        let outcome = &mut draft.outcome;
        let Some(job) = draft.work.job else { return };
        let Some(rules) = job.keep else { return };
        if self.clock.is_in_doubt() || self.interrupt.requested() {
            return;
        }
        let now = Timestamp::now();
        let policy = self.policy(rules);
        match self.prune_now(job, &policy, &state, session, front) {
            Ok(Some(report)) => {
                let removed = report.snapshots.iter().filter(|one| one.removed).count();
                outcome.pruned = Some(outcome.pruned.unwrap_or(0) + removed);
                // A copy that was made before this counted those, too.
                if let End::Made(made) = &mut outcome.end {
                    let left = made.snapshots.map(|all| all.saturating_sub(removed as u64));
                    made.snapshots = left;
                }
            }
            Ok(None) => outcome.notes.push(format!(
                "{}: the prune was stopped after 30 min; the next run continues it",
                outcome.shown
            )),
            Err(Stopped::Held(reason)) => {
                outcome.notes.push(format!(
                    "{}: nothing is pruned until `sprat accept {}`: {reason}",
                    outcome.shown, outcome.copy
                ));
                self.change(&outcome.copy, |state| {
                    state.held = Some(Held {
                        what: HeldWhat::Prune,
                        since: now,
                        reason,
                    });
                });
            }
            // The end of the session reports it.
            Err(Stopped::Failed(failure)) if failure.exit == Exit::Interrupted => {}
            Err(Stopped::Failed(failure)) => {
                let what = format!("old snapshots of {} were not removed", outcome.shown);
                outcome.failed_prunes.push(failure.context(what));
            }
        }
    }

    /// `None`: it took too long.
    fn prune_now(
        &self,
        job: &Job,
        policy: &KeepPolicy,
        state: &CopyState,
        session: &mut Session,
        front: &mut dyn Front,
    ) -> Result<Option<PruneReport>, Stopped> {
        let mut spec = PruneSpec::new(job.name.clone(), policy.rules);
        spec.time_zone.clone_from(&policy.time_zone);
        spec.sources = Some(job.kept_sources());
        spec.old_content = state.old_content();
        spec.changed_at = state.kept_before();
        let observer = front.observer(&format!("{}: ", job.name));
        if state.pruned_by.as_ref() != Some(policy) {
            let dry = PruneSpec {
                dry_run: true,
                ..spec.clone()
            };
            let planned = session.prune(dry, observer, self.interrupt)?;
            let decisions: Vec<_> = planned
                .snapshots
                .into_iter()
                .map(|one| one.decision)
                .collect();
            if is_held(state.pruned_by.as_ref(), policy, &decisions) && state.released.is_none() {
                let gone = decisions.iter().filter(|one| one.keep.is_empty()).count();
                return Err(Stopped::Held(format!(
                    "the new rules would remove {gone} of {} snapshots",
                    decisions.len()
                )));
            }
        }
        let began = Instant::now();
        let check = || (began.elapsed() >= TIME_MAX).then(String::new);
        let (pruned, stopped) =
            while_allowed(self.interrupt, CHECK_INTERVAL, check, |interrupt| {
                session.prune(spec, observer, interrupt)
            })?;
        match (pruned, stopped) {
            (Ok(report), _) => Ok(Some(report)),
            (Err(failure), Some(_)) if failure.exit == Exit::Interrupted => Ok(None),
            (Err(failure), _) => Err(Stopped::Failed(failure)),
        }
    }

    /// The rules of a job, and the zone of the config.
    pub(super) fn policy(&self, rules: KeepRules) -> KeepPolicy {
        KeepPolicy {
            rules,
            time_zone: self.config.time_zone.clone(),
        }
    }
}

/// Why nothing was pruned.
enum Stopped {
    Held(String),
    Failed(Failure),
}

impl From<Failure> for Stopped {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prune_is_due_once_per_prune_every_and_not_while_held() {
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        let now = at("2026-11-28T09:00Z");
        let day = Duration::from_secs(86_400);
        let mut state = CopyState::default();
        assert!(is_due(&state, day, now));
        for (last, every, due) in [
            ("2026-11-28T08:00Z", day, false),
            ("2026-11-28T08:00Z", Duration::ZERO, true),
            // A run that begins a minute earlier than the last one is on the same tick.
            ("2026-11-27T09:01Z", day, true),
            ("2026-11-27T10:00Z", day, false),
            // The clock was wrong.
            ("2027-11-28T08:00Z", day, true),
        ] {
            state.last_prune = Some(at(last));
            assert_eq!(is_due(&state, every, now), due, "{last}");
        }
        for (what, due) in [(HeldWhat::Copy, true), (HeldWhat::Prune, false)] {
            state.held = Some(Held {
                what,
                since: now,
                reason: String::new(),
            });
            assert_eq!(is_due(&state, Duration::ZERO, now), due);
        }
    }
}
