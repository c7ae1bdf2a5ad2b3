//! What is not as usual about a copy: much more to upload, many more changes, or a dump that shrank.

use jiff::{SignedDuration, Timestamp};
use sprat_session::state::paths::{STATUS, StatePaths};
use sprat_session::{Failure, Session, text};
use sprat_snapshot::{Census, CensusSpec, SnapshotReport, Warning};

use super::container::Draft;
use super::outcome::End;
use super::{ContainerWork, CopyWork, Front, Runner};
use crate::config::{Copy, Growth, Job};
use crate::copy_name::CopyName;
use crate::copy_state::{Changed, Held, HeldWhat};
use crate::growth::{PastUpload, is_change, most_bytes, usual_bytes};
use crate::notify::{By, Words};
use crate::run_history::RunHistory;
use crate::sources::census_text;

impl Runner<'_> {
    /// What is counted before a copy; `None`: no alarm needs it.
    pub(super) fn census_spec(
        &self,
        copy: &CopyWork<'_>,
        work: &ContainerWork<'_>,
        paths: &StatePaths,
    ) -> Option<CensusSpec> {
        let job = copy.job.filter(|_| work.container.is_some())?;
        let rules = job.growth;
        if rules.growth == Growth::Off && rules.change_limit.is_none() {
            return None;
        }
        // A person who runs `sprat backup` has asked for it.
        let stops = rules.growth == Growth::Stop
            && self.by == By::Run
            && self.state(&copy.name).growth_accepted.is_none();
        Some(CensusSpec {
            list: file_list(paths, job.name.as_str()),
            stop_over_bytes: match stops {
                true => most_bytes(self.usual(job, &copy.name), rules.growth_limit),
                false => None,
            },
        })
    }

    /// Bytes that are usual for the next upload.
    fn usual(&self, job: &Job, name: &CopyName) -> Option<u64> {
        let every = SignedDuration::try_from(job.schedule.longest_gap()?).ok()?;
        let lines = RunHistory::new(&self.state_dir)
            .load(name)
            .unwrap_or_default();
        let made = lines.iter().filter(|line| matches!(line.code, 0 | 3));
        let mut before = None;
        let uploads: Vec<PastUpload> = made
            .map(|line| PastUpload {
                begun: line.started,
                before: before.replace(line.started),
                sent_bytes: line.copied_bytes.or(line.sent_bytes).unwrap_or(0),
            })
            .collect();
        usual_bytes(&uploads, every, Timestamp::now())
    }

    /// A copy waits for a person: far more would be uploaded than usual.
    pub(super) fn hold(&self, copy: Copy<'_>, census: &Census) -> End {
        let name = copy.name();
        let reason = growth_text(census, self.usual(copy.job, &name));
        self.change(&name, |state| {
            state.held = Some(Held {
                what: HeldWhat::Copy,
                since: Timestamp::now(),
                reason: reason.clone(),
            });
        });
        End::Skipped {
            why: format!("held until `sprat accept {name}`: {reason}"),
            stopped: false,
        }
    }

    /// Before a copy is pruned that was not made: notes whether far more files changed than usual, so that the
    /// prune keeps what was there before. A failure: that is not known, so nothing may be pruned.
    pub(super) fn find_changes(
        &self,
        draft: &mut Draft<'_>,
        work: &ContainerWork<'_>,
        session: &mut Session,
        front: &mut dyn Front,
    ) -> Result<(), Failure> {
        let copy = draft.work;
        let Some(job) = copy.job.filter(|job| job.growth.change_limit.is_some()) else {
            return Ok(());
        };
        if self.state(&copy.name).change_accepted.is_some() {
            return Ok(());
        }
        let paths = StatePaths::new(&self.state_dir, &session.facts().uuid, &work.target);
        let census = self.census_spec(copy, work, &paths);
        let mut spec = copy.spec.clone();
        spec.census = census.map(|census| CensusSpec {
            stop_over_bytes: None,
            ..census
        });
        if spec.census.is_none() {
            return Ok(());
        }
        let observer = front.observer(&format!("{}: ", copy.shown));
        let census = session.count_new(spec, observer, self.interrupt)?;
        let census = census.ok_or_else(|| Failure::failed("the sources can't be walked"))?;
        if let Some(reason) = changes(job, &census) {
            let now = Timestamp::now();
            self.note_changes(
                draft,
                Changed {
                    since: now,
                    kept_before: now,
                    reason,
                    not_made: true,
                },
            );
        }
        Ok(())
    }

    /// Far more files changed than usual: older snapshots are kept from now on.
    fn note_changes(&self, draft: &mut Draft<'_>, changed: Changed) {
        let outcome = &mut draft.outcome;
        outcome.notes.push(format!(
            "{}: {}. Older snapshots are kept until `sprat accept {}`",
            outcome.shown, changed.reason, outcome.copy
        ));
        self.change(&outcome.copy, |state| {
            // What was there when the first of them was found.
            let known = state.changed.get_or_insert_with(|| changed.clone());
            known.not_made = changed.not_made;
        });
        // The state folder may be full.
        draft.changed.get_or_insert(changed);
    }

    /// Notes what is not as usual about a snapshot that was made.
    pub(super) fn note_alarms(&self, draft: &mut Draft<'_>, work: &ContainerWork<'_>) {
        let outcome = &mut draft.outcome;
        let (End::Made(report), Some(job)) = (&outcome.end, draft.work.job) else {
            return;
        };
        if work.container.is_none() {
            return;
        }
        outcome.growth = self
            .growth(job, &outcome.copy, report)
            .or_else(|| report.record.warnings.iter().find_map(shrunk_dump));
        let shown = &outcome.shown;
        let growth = outcome.growth.iter().filter(|words| words.class == GROWTH);
        outcome
            .notes
            .extend(growth.map(|words| format!("{shown}: {}", words.text)));
        let reason = known(report).and_then(|census| changes(job, census));
        let accepted = self.state(&outcome.copy).change_accepted.is_some();
        let Some(reason) = reason.filter(|_| !accepted) else {
            return;
        };
        let changed = Changed {
            since: Timestamp::now(),
            kept_before: report.name.moment(),
            reason,
            not_made: false,
        };
        self.note_changes(draft, changed);
        let is_kept = self.state(&draft.outcome.copy).changed.is_some();
        if let End::Made(report) = &mut draft.outcome.end
            && !is_kept
        {
            // The next run compares with the snapshot before this one again.
            report.census = None;
        }
    }

    fn growth(&self, job: &Job, name: &CopyName, report: &SnapshotReport) -> Option<Words> {
        let census = known(report)?;
        let rules = job.growth;
        if rules.growth == Growth::Off || self.state(name).growth_accepted.is_some() {
            return None;
        }
        let usual = self.usual(job, name);
        let most = most_bytes(usual, rules.growth_limit)?;
        (census.bytes > most).then(|| Words {
            class: GROWTH.to_owned(),
            text: growth_text(census, usual),
            hint:
                "The snapshot was made. Exclude what you do not need, or wait for the next usual \
                   backup."
                    .to_owned(),
        })
    }
}

/// The class of a cause: much was uploaded.
const GROWTH: &str = "growth";

/// The local list of the files of the last snapshot of a job.
#[must_use]
pub fn file_list(paths: &StatePaths, job: &str) -> std::path::PathBuf {
    paths.file(STATUS, &format!(".{job}.files"))
}

/// What was counted, if the last snapshot was known.
fn known(report: &SnapshotReport) -> Option<&Census> {
    let census = report.census.as_ref();
    census.filter(|census| census.files_before.is_some())
}

/// Why the changes are not as usual; `None`: they are, or the last snapshot is not known.
fn changes(job: &Job, census: &Census) -> Option<String> {
    let (before, limit) = (census.files_before?, job.growth.change_limit?);
    let other = census.changed + census.gone;
    is_change(other, before, limit.into()).then(|| {
        format!(
            "{} of the {} of the last snapshot changed or are gone, more than {limit} %",
            text::count(other),
            text::counted(before, "file", "files"),
        )
    })
}

fn growth_text(census: &Census, usual: Option<u64>) -> String {
    let usual = usual.map(|usual| format!(", {} are usual", text::bytes(usual)));
    format!("{}{}", census_text(census), usual.unwrap_or_default())
}

fn shrunk_dump(warning: &Warning) -> Option<Words> {
    let Warning::DumpShrank {
        path,
        bytes,
        before_bytes,
    } = warning
    else {
        return None;
    };
    Some(Words {
        class: "dump_shrank".to_owned(),
        text: format!(
            "{path} has {}, less than half of the {} that it had before.",
            text::bytes(*bytes),
            text::bytes(*before_bytes)
        ),
        hint: "The snapshot was made. Check what the job's command writes.".to_owned(),
    })
}
