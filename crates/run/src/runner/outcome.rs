//! How copies ended.

use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Value, json};
use sprat_session::json::{exit_json, failure_json};
use sprat_session::{ClosedReport, Exit, Failure};
use sprat_snapshot::{RunRecord, SnapshotReport};

use super::upkeep::{SliceDone, Upkeep};
use crate::copy_name::CopyName;
use crate::hooks;
use crate::notify::{Attempt, By, Words};
use crate::snapshots_text::lacking;

/// The code for hooks of a copy whose `before` hook said "not now".
const NOT_NOW: u8 = 75;

/// How one copy ended.
#[derive(Debug, Clone)]
pub enum End {
    /// It left a snapshot.
    Made(Box<SnapshotReport>),
    /// It left none.
    Failed(Failure),
    /// It was not made, or stopped in order, for a reason that is no failure.
    Skipped {
        /// The reason.
        why: String,
        /// It had begun, and goes on with the next run.
        stopped: bool,
    },
}

impl End {
    /// The exit code of the copy alone.
    #[must_use]
    pub fn exit(&self) -> Exit {
        match self {
            Self::Made(report) if report.record.complete => Exit::Done,
            Self::Made(_) => Exit::Unread,
            Self::Failed(failure) => failure.exit,
            Self::Skipped { .. } => Exit::Done,
        }
    }

    /// It left a snapshot.
    #[must_use]
    pub fn is_made(&self) -> bool {
        matches!(self, Self::Made(_))
    }

    /// What was made.
    pub(super) fn report(&self) -> Option<&SnapshotReport> {
        match self {
            Self::Made(report) => Some(report),
            _ => None,
        }
    }

    /// A failure that is reported when it happens. A server that is away and a lock are tried again at each
    /// run: such a copy becomes overdue.
    pub(super) fn is_reported_at_once(&self) -> bool {
        let later = [Exit::Unreachable, Exit::Locked, Exit::Interrupted];
        matches!(self, Self::Failed(failure) if !later.contains(&failure.exit))
    }

    /// It failed for lack of room, in the volume or on the server.
    pub(super) fn lacks_room(&self) -> bool {
        matches!(self, Self::Failed(failure) if failure.lacks_room)
    }

    /// What the hooks after it learn.
    pub(super) fn for_hooks(&self) -> hooks::Outcome {
        let code = match self {
            Self::Skipped { stopped: true, .. } => Exit::Interrupted.code(),
            Self::Skipped { stopped: false, .. } => NOT_NOW,
            end => end.exit().code(),
        };
        hooks::Outcome {
            code,
            snapshot: match self {
                Self::Made(report) => Some(report.name.to_string()),
                _ => None,
            },
            error: match self {
                Self::Made(_) => None,
                Self::Failed(failure) => Some(failure.in_one_line()),
                Self::Skipped { why, .. } => Some(why.clone()),
            },
        }
    }
}

/// The result of one copy.
#[derive(Debug)]
pub struct Outcome {
    /// Which.
    pub copy: CopyName,
    /// How it is called in text.
    pub shown: String,
    /// The location of its container.
    pub target: String,
    /// Its beginning; `None`: it never began, because the container was not opened or a person
    /// interrupted.
    pub started: Option<Timestamp>,
    /// How long it took.
    pub took: Duration,
    /// How it ended.
    pub end: End,
    /// Bytes sent to the server, of the session that it was a part of.
    pub sent_bytes: u64,
    /// The hooks after it that failed. They leave the snapshot as it is.
    pub failed_hooks: Vec<Failure>,
    /// Prunes beside it that failed. They leave the snapshot as it is, too.
    pub failed_prunes: Vec<Failure>,
    /// What a person may want to know.
    pub notes: Vec<String>,
    /// Why the size of the snapshot is not as usual.
    pub growth: Option<Words>,
    /// How many snapshots its prune removed.
    pub pruned: Option<usize>,
}

impl Outcome {
    /// It was tried: not skipped, and not interrupted before it began.
    pub(super) fn is_attempt(&self) -> bool {
        match &self.end {
            End::Made(_) => true,
            End::Failed(failure) => failure.exit != Exit::Interrupted || self.started.is_some(),
            End::Skipped { stopped, .. } => *stopped,
        }
    }

    /// What failed and leaves the snapshot as it is.
    pub fn failed_later(&self) -> impl Iterator<Item = &Failure> {
        self.failed_hooks.iter().chain(&self.failed_prunes)
    }

    /// Its part of the exit code of the run.
    #[must_use]
    pub fn exit(&self) -> Exit {
        let later = self.failed_later().map(|_| Exit::Failed);
        Exit::worst(later.chain([self.end.exit()]))
    }
}

/// The result of the work on one container.
#[derive(Debug)]
pub struct ContainerDone {
    /// Its name.
    pub name: String,
    /// It has hooks of its own.
    pub has_hooks: bool,
    /// Its copies, in the order of the config.
    pub outcomes: Vec<Outcome>,
    /// The session; `None`: it was not opened, or did not end in order.
    pub closed: Option<ClosedReport>,
    /// What was done beside the copies.
    pub upkeep: Upkeep,
    /// The container's own hooks that failed.
    pub failed_hooks: Vec<Failure>,
}

impl ContainerDone {
    /// Its part of the exit code of the run.
    #[must_use]
    pub fn exit(&self) -> Exit {
        let hooks = self.failed_hooks.iter().map(|_| Exit::Failed);
        let copies = self.outcomes.iter().map(Outcome::exit);
        Exit::worst(hooks.chain(copies).chain(self.upkeep.exits()))
    }
}

/// The attempts, for events and notices. What was skipped, or interrupted before it began, is none.
#[must_use]
pub fn attempts<'o>(outcomes: impl Iterator<Item = &'o Outcome>, by: By) -> Vec<Attempt> {
    let attempt = |outcome: &Outcome| {
        let (exit, what) = match &outcome.end {
            End::Made(report) if report.record.complete => (Exit::Done, Words::default()),
            End::Made(report) => {
                let lacking = lacking_in(&report.record);
                let lacks = Failure::new(Exit::Unread, format!("the snapshot lacks {lacking}"));
                (Exit::Unread, Words::of(&lacks))
            }
            End::Failed(failure) => (failure.exit, Words::of(failure)),
            End::Skipped { why, .. } => {
                let stopped = Failure::new(Exit::Interrupted, why.clone());
                (Exit::Interrupted, Words::of(&stopped))
            }
        };
        let failed_hook = outcome.failed_hooks.first().map(Words::of_hook);
        Attempt {
            copy: outcome.copy.clone(),
            by,
            exit,
            what,
            failed_later: failed_hook.or(outcome.failed_prunes.first().map(Words::of_prune)),
            growth: outcome.growth.clone(),
        }
    };
    let tried = outcomes.filter(|outcome| outcome.is_attempt());
    tried.map(attempt).collect()
}

fn lacking_in(record: &RunRecord) -> String {
    lacking(record.unread.count, record.without_attributes())
}

/// The containers whose own hooks ran, and what failed of them.
#[must_use]
pub fn hooks_of_containers(done: &[ContainerDone]) -> Vec<(String, Option<Words>)> {
    let ran = done.iter().filter(|one| one.has_hooks);
    let failed = |one: &ContainerDone| one.failed_hooks.first().map(Words::of_hook);
    ran.map(|one| (one.name.clone(), failed(one))).collect()
}

/// The slices that were read, as JSON.
#[must_use]
pub fn slices_json(done: &[ContainerDone]) -> Value {
    let slices = done
        .iter()
        .filter_map(|one| Some((&one.name, one.upkeep.slice?)));
    let json = |(name, slice): (&String, SliceDone)| {
        json!({
            "container": name,
            "files_read": slice.files,
            "bytes_read": slice.bytes,
            "finished": slice.finished,
            "result": exit_json(slice.exit),
        })
    };
    slices.map(json).collect()
}

/// Adds the result of each job to the failure to print the results.
#[must_use]
pub fn with_states<'o>(
    mut failure: Failure,
    exit: Exit,
    outcomes: impl Iterator<Item = &'o Outcome>,
) -> Failure {
    if !matches!(exit, Exit::Done | Exit::Unread) {
        failure.exit = exit;
    }
    for outcome in outcomes {
        let job = &outcome.shown;
        failure = failure.because(match &outcome.end {
            End::Made(report) if report.record.complete => {
                format!("job {job}: snapshot {} is made", report.name)
            }
            End::Made(report) => format!(
                "job {job}: snapshot {} is made and lacks {}",
                report.name,
                lacking_in(&report.record)
            ),
            End::Failed(failed) => format!("job {job} failed: {}", failed.what),
            End::Skipped { why, .. } => format!("job {job} was skipped: {why}"),
        });
    }
    failure.with_hint(
        "every job ran to its end, and each snapshot named here is on the server's disk. Check \
         where the output was redirected to",
    )
}

/// A copy in the result of `backup`.
#[must_use]
pub fn outcome_json(outcome: &Outcome) -> Value {
    let (mut snapshot, mut failure, mut skipped) = (None, None, None);
    match &outcome.end {
        End::Made(report) => snapshot = Some(report),
        End::Failed(failed) => failure = Some(failure_json(failed)),
        End::Skipped { why, .. } => skipped = Some(why),
    }
    let later: Vec<Value> = outcome.failed_later().map(failure_json).collect();
    json!({
        "job": outcome.copy.job,
        "container": outcome.copy.container,
        "target": outcome.target,
        "result": exit_json(outcome.exit()),
        "seconds": outcome.took.as_secs_f64(),
        "snapshot": snapshot.map(|report| report.name.to_string()),
        "complete": snapshot.map(|report| report.record.complete),
        "record": snapshot.map(|report| &report.record),
        "failure": failure,
        "skipped": skipped,
        "failed_later": later,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prune_that_failed_is_not_reported_as_a_hook() {
        let record: RunRecord = serde_json::from_value(json!({
            "format": 1, "job": "home", "name": "2026-11-26T13-21-01Z", "complete": true,
            "started": "2026-11-26T13:21:01Z", "ended": "2026-11-26T13:22:01Z",
        }))
        .unwrap();
        let mut outcome = Outcome {
            copy: CopyName::new("home", "nas"),
            shown: "home".to_owned(),
            target: "host:home.luks".to_owned(),
            started: None,
            took: Duration::ZERO,
            end: End::Made(Box::new(SnapshotReport {
                name: record.name,
                record,
                snapshots: None,
                census: None,
            })),
            sent_bytes: 0,
            failed_hooks: Vec::new(),
            failed_prunes: Vec::new(),
            notes: Vec::new(),
            growth: None,
            pruned: None,
        };
        let class = |outcome: &Outcome| {
            let attempt = attempts([outcome].into_iter(), By::Run).remove(0);
            (attempt.code(), attempt.failed_later.map(|what| what.class))
        };
        assert_eq!(class(&outcome), (Exit::Done, None));
        let failure = || Failure::failed("old snapshots of home were not removed");
        outcome.failed_prunes.push(failure());
        assert_eq!(class(&outcome), (Exit::Failed, Some("prune".to_owned())));
        outcome.failed_hooks.push(failure());
        assert_eq!(class(&outcome), (Exit::Failed, Some("hook".to_owned())));
        assert_eq!(outcome.failed_later().count(), 2);
    }
}
