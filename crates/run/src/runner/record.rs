//! What is kept of each attempt: for the next run, for `status`, and for the history.

use jiff::Timestamp;
use sprat_session::state::history::{History, MadeSnapshot, Run};
use sprat_session::state::identity;
use sprat_session::state::paths::StatePaths;
use sprat_session::{Exit, Failure, IdentityPolicy};
use sprat_snapshot::{FileSystem, RunRecord, RunStats, Warning, keep_list};

use super::alarms::file_list;
use super::container::{Draft, Seen};
use super::outcome::{End, Outcome};
use super::selection::{digest, inputs};
use super::{ContainerWork, Runner};
use crate::config::{Copy, Mistake};
use crate::copy_name::CopyName;
use crate::copy_state::{Attempt, Place};
use crate::due::Schedule;
use crate::notify::By;
use crate::run_history::{RunHistory, RunLine};

impl Runner<'_> {
    /// Records the results of a session.
    pub(super) fn record(&self, work: &ContainerWork<'_>, drafts: &[Draft<'_>], seen: &Seen) {
        self.note(work, drafts, seen);
        let now = Timestamp::now();
        for draft in drafts {
            if let (Some(job), Some(container)) = (draft.work.job, work.container) {
                self.record_copy(Copy { job, container }, &draft.outcome, now);
            }
        }
    }

    fn record_copy(&self, copy: Copy<'_>, outcome: &Outcome, now: Timestamp) {
        let name = &outcome.copy;
        let place = Place::of(&self.state_dir, &copy.container.target);
        self.change(name, |state| state.is_at(place, now));
        if let (Some(_), Some(rules)) = (outcome.pruned, copy.job.keep) {
            self.change(name, |state| {
                state.last_prune = Some(now);
                state.pruned_by = Some(self.policy(rules));
            });
        }
        let (exit, reason) = match &outcome.end {
            End::Skipped {
                stopped: false,
                why,
            } => {
                if self.by == By::Run {
                    self.change(name, |state| state.skip(now, why.clone()));
                }
                return;
            }
            End::Skipped { why, .. } => (Exit::Interrupted, Some(why.clone())),
            End::Failed(_) if !outcome.is_attempt() => return,
            End::Failed(failure) => (failure.exit, Some(failure.in_one_line())),
            End::Made(_) => (outcome.end.exit(), None),
        };
        let before = self.state(name);
        let started = outcome.started.unwrap_or(now);
        let attempt = Attempt {
            run: self.run.clone(),
            started,
            ended: now,
            exit,
            reason: reason.clone(),
            inputs: inputs(copy),
        };
        self.change(name, |state| {
            if outcome.sent_bytes > 0 {
                state.bytes_moved_at = Some(now);
            }
            // A backup by hand that fails must not delay the next one of a run.
            if self.by == By::Run || outcome.end.is_made() {
                state.attempted(attempt);
            }
            if let End::Skipped { why, .. } = &outcome.end {
                state.skip(now, why.clone());
            }
            if let End::Made(report) = &outcome.end {
                state.snapshots = report.snapshots;
                state.passed(outcome.pruned.is_some(), copy.job.keep.is_some());
                let file = copy.container.target.local_path();
                state.file_system = file.and_then(|file| FileSystem::holding(&file));
            }
        });
        let report = outcome.end.report();
        let stats = report.map(|report| &report.record.stats);
        let line = RunLine {
            run: self.run.clone(),
            started,
            ended: now,
            code: exit.code(),
            reason,
            snapshot: report.map(|report| report.name.to_string()),
            files: stats.and_then(RunStats::files_of_people),
            bytes: stats.map(|stats| stats.bytes_total),
            newly_excluded: report.and_then(|report| newly_excluded(&report.record)),
            copied_bytes: stats.map(|stats| stats.bytes_transferred),
            sent_bytes: report.map(|_| outcome.sent_bytes),
            covered: covered(&copy.job.schedule, before.last_success, started),
        };
        self.append(name, &line, now);
    }

    fn append(&self, name: &CopyName, line: &RunLine, now: Timestamp) {
        if let Err(error) = RunHistory::new(&self.state_dir).append(name, line, now) {
            self.report_problems(vec![format!(
                "the attempt at {name} can't be added to the history: {error}"
            )]);
        }
    }

    /// Records an attempt with code 2 for a copy that a mistake in the config stops: once, until the
    /// mistakes change. If its name is the mistake, nothing can be kept of it.
    pub(super) fn record_stopped(&self, name: &CopyName, mistakes: &[Mistake], now: Timestamp) {
        if !name.is_valid() {
            return;
        }
        let words: Vec<String> = mistakes.iter().map(ToString::to_string).collect();
        let inputs = digest(&words.join("\n"));
        let last = self.state(name).last_attempt;
        if last.is_some_and(|last| last.exit == Exit::Usage && last.inputs == inputs) {
            return;
        }
        let reason = Some("a mistake in the config stops it".to_owned());
        let line = RunLine {
            run: self.run.clone(),
            started: now,
            ended: now,
            code: Exit::Usage.code(),
            reason: reason.clone(),
            ..RunLine::default()
        };
        let attempt = Attempt {
            run: self.run.clone(),
            started: now,
            ended: now,
            exit: Exit::Usage,
            reason,
            inputs,
        };
        self.change(name, |state| {
            state.seen(now);
            state.attempted(attempt);
        });
        self.append(name, &line, now);
    }

    /// Notes the results of the jobs for `sprat status`, if this machine knows the container.
    fn note(&self, work: &ContainerWork<'_>, drafts: &[Draft<'_>], seen: &Seen) {
        let policy = identity::policy(&self.state_dir, &work.target, None);
        let Ok(IdentityPolicy::Known(pins)) = policy else {
            return;
        };
        let at = Timestamp::now();
        let paths = StatePaths::new(&self.state_dir, &pins.uuid, &work.target);
        self.keep_lists(&paths, drafts);
        let noted = History::update(&paths, |history| {
            history.saw(seen.closed.and_then(|closed| closed.room));
            if seen.server_free.is_some() {
                history.saw_server(at, seen.server_free);
            }
            for draft in drafts {
                let (job, end) = (&draft.outcome.copy.job, &draft.outcome.end);
                let failure = match end {
                    End::Failed(failure) => Some(failure),
                    End::Made(_) => None,
                    End::Skipped { .. } => continue,
                };
                if !draft.outcome.is_attempt() {
                    continue;
                }
                // The run that holds the lock notes its own results.
                if seen.closed.is_none() && end.exit() == Exit::Locked {
                    continue;
                }
                // The name of a job without a snapshot may be a typing error.
                let in_config = self.config.has_job(&work.name, job);
                let is_known = in_config || history.jobs.contains_key(job);
                if failure.is_some() && !is_known {
                    continue;
                }
                let shown = failure.filter(|failure| failure.exit != Exit::Interrupted);
                let run = Run {
                    at,
                    exit: end.exit(),
                    failure: shown.map(|failure: &Failure| failure.what.clone()),
                };
                let made = match end {
                    End::Made(report) => Some(MadeSnapshot::of(at, report)),
                    _ => None,
                };
                history.ran(job, run, made);
            }
        });
        if let Err(error) = noted {
            self.report_problems(vec![format!(
                "the result can't be saved for `sprat status`: {error}"
            )]);
        }
    }
}

impl Runner<'_> {
    /// The session has ended, so what was made is durable: the lists of its files count from now on.
    fn keep_lists(&self, paths: &StatePaths, drafts: &[Draft<'_>]) {
        for outcome in drafts.iter().map(|draft| &draft.outcome) {
            let made = outcome.end.report();
            if made.is_none_or(|report| report.census.is_none()) {
                continue;
            }
            if let Err(error) = keep_list(&file_list(paths, &outcome.copy.job)) {
                let job = &outcome.copy.job;
                self.report_problems(vec![format!(
                    "the list of the files of job {job} can't be kept: {error}"
                )]);
            }
        }
    }
}

/// Files that `exclude_larger_than` excluded for the first time.
fn newly_excluded(record: &RunRecord) -> Option<u64> {
    let new = |warning: &Warning| match warning {
        Warning::NewTooLarge { files, .. } => Some(*files),
        _ => None,
    };
    record.warnings.iter().find_map(new)
}

/// How many times `every` has passed since the success before, at least once.
fn covered(schedule: &Schedule, before: Option<Timestamp>, started: Timestamp) -> Option<u32> {
    let every = schedule.longest_gap()?.as_secs().max(1);
    let passed = u64::try_from(started.duration_since(before?).as_secs()).unwrap_or(0);
    let rounded = (passed + every / 2) / every;
    Some(u32::try_from(rounded).unwrap_or(u32::MAX).max(1))
}
