//! After a copy, once a day: some unchanged files of its sources are read again and compared with their backup.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Value, json};
use sprat_session::interrupt::Interrupt;
use sprat_session::state::paths::StatePaths;
use sprat_session::{Failure, idle_io};
use sprat_snapshot::{
    FoundChange, JobName, OldContent, SnapshotError, SnapshotName, SourceCheckReport,
    SourceCheckSpec, check_sources, old_content_in,
};

use super::checks::while_allowed;
use super::outcome::{ContainerDone, Outcome};
use super::selection::conditions;
use super::source_slice::{SourceSlice, failure};
use super::upkeep::{CHECK_INTERVAL, DAY, Upkeep, is_time};
use super::{ContainerWork, Runner};
use crate::config::{Config, Container, Copy};
use crate::copy_name::CopyName;
use crate::copy_state::{SILENT_FILES_MAX, SourceCheckState, copy_file, source_check_file};
use crate::notify::By;
use crate::state_file::StateFile;

/// How much is read in a day.
const BYTES_A_DAY: u64 = 1 << 30;
/// After a longer time without a slice, the next one does not make up for all of it.
const DAYS_MAX: u64 = 7;
/// How long a slice takes at most.
const TIME_MAX: Duration = Duration::from_secs(10 * 60);
/// See [`SourceCheckSpec::unchanged_for`]: at least so long.
const UNCHANGED_FOR_MIN: Duration = Duration::from_secs(60);
/// The kernel writes changed pages only when it needs the memory.
const UNCHANGED_FOR_WITHOUT_WRITEBACK: Duration = DAY;

/// The files of all jobs that changed silently in their sources, as the container has them.
#[must_use]
pub fn old_content(
    config: &Config,
    state_dir: &Path,
    container: &str,
) -> Vec<(JobName, Vec<OldContent>)> {
    let jobs = config.jobs.iter().map(|job| {
        let copy = CopyName::new(job.name.as_str(), container);
        let old = copy_file(state_dir, &copy).read().old_content();
        (job.name.clone(), old)
    });
    jobs.collect()
}

impl Runner<'_> {
    /// Reads a slice of the sources of each copy that was just made, if it is time.
    pub(super) fn check_sources(
        &self,
        work: &ContainerWork<'_>,
        outcomes: &[Outcome],
        done: &mut Upkeep,
    ) {
        let Some(container) = work.container.filter(|_| self.by == By::Run) else {
            return;
        };
        for (copy, outcome) in work.copies.iter().zip(outcomes) {
            let made = outcome.end.report().map(|report| report.name);
            let (Some(job), Some(snapshot)) = (copy.job, made) else {
                continue;
            };
            if self.clock.is_in_doubt() || self.interrupt.requested() {
                return;
            }
            self.check_sources_of(Copy { job, container }, snapshot, done);
        }
    }

    fn check_sources_of(&self, copy: Copy<'_>, snapshot: SnapshotName, done: &mut Upkeep) {
        let job = copy.job.name.as_str();
        let now = Timestamp::now();
        let mut file = source_check_file(&self.state_dir, job);
        let state = file.read();
        let Some(every) = copy.job.source_check_every else {
            return;
        };
        let sources = copy.job.local_sources();
        let lists = self.lists(copy.container, job);
        let Some(lists) = lists.filter(|_| !sources.is_empty() && is_time(state.last, DAY, now))
        else {
            return;
        };
        let days = days_since(state.last, now);
        let is_open = self
            .copies_of(job)
            .any(|copy| self.state(&copy.name()).silent.is_some());
        let reported = state.reported.iter().filter(|_| is_open);
        let spec = SourceCheckSpec {
            lists,
            snapshot,
            sources,
            from: state.next.clone(),
            parts: u32::try_from(every.as_secs() / DAY.as_secs()).unwrap_or(u32::MAX),
            parts_now: u32::try_from(days).unwrap_or(1),
            bytes_max: BYTES_A_DAY * days,
            duration_max: TIME_MAX,
            unchanged_for: unchanged_for(Path::new("/proc/sys/vm")),
            again: state.found.iter().chain(reported).cloned().collect(),
        };
        let read = self.read_slice(copy, &spec);
        match read {
            Ok(Ok(report)) => {
                let slice = self.keep_found(copy, &spec.lists, &mut file, report, now);
                done.failures.extend(failure(&slice));
                done.sources.push(slice);
            }
            // Without lists nothing can be compared. A run has written one only if the volume has one, too.
            Ok(Err(error)) => {
                tracing::warn!(%error, job, "the sources can't be read again");
                file.change(|state| state.last = Some(now));
            }
            Err(failure) => done
                .failures
                .push(failure.context(format!("{job}: the sources could not be read again"))),
        }
        self.report_problems(file.take_problems());
    }

    /// Reads it on a thread that gives way to all others, as long as the conditions of the copy are met.
    fn read_slice(
        &self,
        copy: Copy<'_>,
        spec: &SourceCheckSpec,
    ) -> Result<Result<SourceCheckReport, SnapshotError>, Failure> {
        let (conditions, zone) = (conditions(copy), self.config.zone());
        let check = || {
            let reason = conditions.stop_running(&self.machine, &zone, Timestamp::now());
            reason.filter(|_| !self.anyway)
        };
        let read = |interrupt: &Interrupt| {
            let cancel = interrupt.cancel();
            std::thread::scope(|scope| {
                let reading = scope.spawn(|| {
                    if let Err(error) = idle_io() {
                        tracing::info!(%error, "the sources are read with the usual priority");
                    }
                    check_sources(spec, &cancel)
                });
                reading
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
        };
        let (read, _) = while_allowed(self.interrupt, CHECK_INTERVAL, check, read)?;
        Ok(read)
    }

    /// Notes what a slice found. What an earlier one had found, too, changed silently.
    fn keep_found(
        &self,
        copy: Copy<'_>,
        lists: &Path,
        file: &mut StateFile<SourceCheckState>,
        report: SourceCheckReport,
        now: Timestamp,
    ) -> SourceSlice {
        let job = copy.job.name.as_str();
        let state = file.read();
        let Found {
            confirmed,
            in_doubt,
        } = Found::of(&state, &report);
        let right = |path: &str| report.right_again.contains(path);
        let mut unanswered = BTreeMap::new();
        // The copies first: what a kill leaves undone here is found again.
        for other in self.copies_of(job) {
            let container = &other.container.name;
            let asked = asked_of(&state, container, &confirmed, &right);
            let files = self.old_content_of(other, &asked, lists);
            if files.is_none() {
                unanswered.insert(container.clone(), asked);
            }
            let files = files.unwrap_or_default();
            let has_changed = !report.right_again.is_empty() || !files.is_empty();
            if has_changed {
                self.change(&other.name(), |state| {
                    state.right_again(right);
                    if !files.is_empty() {
                        state.changed_silently(now, files);
                    }
                });
            }
        }
        file.change(|state| {
            state.read_slice(now, &report, &confirmed, &in_doubt);
            state.unanswered = unanswered;
        });
        let names = confirmed.iter().map(|one| one.old.path.clone());
        SourceSlice {
            job: job.to_owned(),
            files: report.files,
            bytes: report.bytes,
            in_doubt: in_doubt.len() as u64,
            silent: names.collect(),
            rewritten: report.rewritten,
        }
    }

    /// What a copy has of files that changed silently. `compared`: the lists with which the files were compared. `None`:
    /// its own lists are not on this machine. The next slice asks again.
    fn old_content_of(
        &self,
        copy: Copy<'_>,
        files: &[FoundChange],
        compared: &Path,
    ) -> Option<Vec<OldContent>> {
        if files.is_empty() {
            return Some(Vec::new());
        }
        let job = copy.job.name.as_str();
        let lists = self.lists(copy.container, job)?;
        if lists == compared {
            return Some(files.iter().map(|one| one.old.clone()).collect());
        }
        let known = self.known(copy.container)?;
        let newest = known.history.jobs.get(job)?.last_snapshot.as_ref()?;
        let newest = SnapshotName::parse(&newest.name).ok()?;
        let found = old_content_in(&lists, newest, files);
        if let Err(error) = &found {
            self.report_problems(vec![format!(
                "{}: can't find out which snapshot has the content from before: {error}",
                copy.name()
            )]);
        }
        found.ok()
    }

    /// This machine's copies of the lists of a job.
    fn lists(&self, container: &Container, job: &str) -> Option<PathBuf> {
        let known = self.known(container)?;
        let paths = StatePaths::new(&self.state_dir, &known.uuid, &container.target);
        Some(paths.change_lists().join(job))
    }

    fn copies_of<'s>(&'s self, job: &'s str) -> impl Iterator<Item = Copy<'s>> {
        let copies = self.config.copies();
        copies.filter(move |copy| copy.job.name.as_str() == job)
    }
}

/// The changes whose old content a container is asked for.
fn asked_of(
    state: &SourceCheckState,
    container: &str,
    confirmed: &[FoundChange],
    is_right: &dyn Fn(&str) -> bool,
) -> Vec<FoundChange> {
    let before = state.unanswered.get(container).into_iter().flatten();
    let before = before.filter(|one| !is_right(&one.old.path));
    let mut asked: Vec<FoundChange> = confirmed.iter().chain(before).cloned().collect();
    asked.truncate(SILENT_FILES_MAX);
    asked
}

/// What a slice found, beside what was reported before.
struct Found {
    /// An earlier slice had found it, too.
    confirmed: Vec<FoundChange>,
    /// The next slice reads it again.
    in_doubt: Vec<FoundChange>,
}

impl Found {
    fn of(state: &SourceCheckState, report: &SourceCheckReport) -> Self {
        let is_in = |list: &[FoundChange], one: &FoundChange| {
            list.iter().any(|known| known.is_same_as(one))
        };
        let new = report
            .silent
            .iter()
            .filter(|one| !is_in(&state.reported, one));
        let (confirmed, mut in_doubt): (Vec<_>, Vec<_>) =
            new.cloned().partition(|one| is_in(&state.found, one));
        let is_open =
            |one: &&FoundChange| !report.read_again || report.backed_up_so.contains(&one.old.path);
        let left = state.found.iter().filter(is_open);
        in_doubt.extend(left.filter(|one| !is_in(&report.silent, one)).cloned());
        in_doubt.truncate(SILENT_FILES_MAX);
        Self {
            confirmed,
            in_doubt,
        }
    }
}

impl SourceCheckState {
    fn read_slice(
        &mut self,
        now: Timestamp,
        report: &SourceCheckReport,
        confirmed: &[FoundChange],
        in_doubt: &[FoundChange],
    ) {
        self.last = Some(now);
        self.next = report.next.clone();
        self.found = in_doubt.to_vec();
        let is_right = |one: &FoundChange| report.right_again.contains(&one.old.path);
        self.reported.retain(|one| !is_right(one));
        self.reported.extend(confirmed.iter().cloned());
        // The oldest ones may be reported again.
        let surplus = self.reported.len().saturating_sub(SILENT_FILES_MAX);
        self.reported.drain(..surplus);
    }
}

/// See [`SourceCheckSpec::unchanged_for`]: twice the time after which the kernel writes a changed page
/// (Documentation/admin-guide/sysctl/vm.rst). In laptop mode that is 10 min.
fn unchanged_for(folder: &Path) -> Duration {
    let hundredths = |name: &str| {
        let text = std::fs::read_to_string(folder.join(name)).ok()?;
        text.trim().parse::<u64>().ok()
    };
    let expire = hundredths("dirty_expire_centisecs");
    match expire.zip(hundredths("dirty_writeback_centisecs")) {
        Some((expire, writeback)) if writeback > 0 => {
            let twice = expire.saturating_add(writeback).saturating_mul(20);
            Duration::from_millis(twice).max(UNCHANGED_FOR_MIN)
        }
        _ => UNCHANGED_FOR_WITHOUT_WRITEBACK,
    }
}

/// How many days a slice is for.
fn days_since(last: Option<Timestamp>, now: Timestamp) -> u64 {
    let seconds = last.map_or(0, |last| now.duration_since(last).as_secs());
    let days = u64::try_from(seconds).unwrap_or(0) / DAY.as_secs();
    days.clamp(1, DAYS_MAX)
}

/// The slices of the sources that were read, as JSON.
#[must_use]
pub fn sources_json(done: &[ContainerDone]) -> Value {
    let slices = done.iter().flat_map(|one| &one.upkeep.sources);
    let json = |slice: &SourceSlice| {
        json!({
            "job": slice.job,
            "files_read": slice.files,
            "bytes_read": slice.bytes,
            "in_doubt": slice.in_doubt,
            "changed_silently": slice.silent,
            "rewritten": slice.rewritten,
        })
    };
    slices.map(json).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str, content: &str) -> FoundChange {
        let json = json!({
            "old": { "path": path, "bytes": 1, "modified": "2026-11-28T10:00:00Z", "file": "0000000000000001" },
            "piece": null,
            "found": content,
        });
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn change_is_reported_when_two_slices_found_the_same_content_and_only_once() {
        let now = Timestamp::UNIX_EPOCH;
        let mut state = SourceCheckState::default();
        let mut slice = |silent: &[&FoundChange], right: &[&str], read_again| {
            let report = SourceCheckReport {
                silent: silent.iter().map(|one| (*one).clone()).collect(),
                right_again: right.iter().map(|path| (*path).to_owned()).collect(),
                read_again,
                ..SourceCheckReport::default()
            };
            let Found {
                confirmed,
                in_doubt,
            } = Found::of(&state, &report);
            state.read_slice(now, &report, &confirmed, &in_doubt);
            let names = |list: Vec<FoundChange>| {
                list.into_iter()
                    .map(|one| one.old.path + &one.found)
                    .collect::<Vec<_>>()
                    .join(" ")
            };
            (names(confirmed), names(in_doubt))
        };
        let texts = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        let (a, other, b) = (found("a", "1"), found("a", "2"), found("b", "1"));
        assert_eq!(slice(&[&a], &[], true), texts("", "a1"));
        // Another content each time: somebody writes to it.
        assert_eq!(slice(&[&other], &[], true), texts("", "a2"));
        // There was no time for it.
        assert_eq!(slice(&[], &[], false), texts("", "a2"));
        assert_eq!(slice(&[&other, &b], &[], true), texts("a2", "b1"));
        assert_eq!(slice(&[&other, &b], &[], true), texts("b1", ""));
        assert_eq!(slice(&[&other, &b], &[], true), texts("", ""));
        // It was healed, and changes once more.
        assert_eq!(slice(&[], &["a"], true), texts("", ""));
        assert_eq!(slice(&[&other], &[], true), texts("", "a2"));
        assert_eq!(slice(&[], &[], true), texts("", ""));
        assert_eq!(slice(&[&other], &[], true), texts("", "a2"));
    }

    #[test]
    fn container_is_asked_again_for_what_it_has_not_answered() {
        let (a, b, c) = (found("a", "1"), found("b", "1"), found("c", "1"));
        let state = SourceCheckState {
            unanswered: BTreeMap::from([("nas".to_owned(), vec![a.clone(), b.clone()])]),
            ..SourceCheckState::default()
        };
        let is_right = |path: &str| path == "b";
        let asked = |container| asked_of(&state, container, std::slice::from_ref(&c), &is_right);
        assert_eq!(asked("nas"), [c.clone(), a]);
        assert_eq!(asked("usb"), std::slice::from_ref(&c));
    }

    #[test]
    fn container_that_got_the_changed_content_decides_nothing() {
        let a = found("a", "1");
        let state = SourceCheckState {
            found: vec![a.clone()],
            ..SourceCheckState::default()
        };
        let mut report = SourceCheckReport {
            read_again: true,
            backed_up_so: ["a".to_owned()].into(),
            ..SourceCheckReport::default()
        };
        assert_eq!(Found::of(&state, &report).in_doubt, [a]);
        report.backed_up_so.clear();
        assert_eq!(Found::of(&state, &report).in_doubt, []);
    }

    #[test]
    fn slice_makes_up_for_a_week_at_most() {
        let at = |text: &str| Some(text.parse::<Timestamp>().unwrap());
        let now = at("2026-11-28T09:00Z").unwrap();
        for (last, days) in [
            (None, 1),
            (at("2026-11-27T09:05Z"), 1),
            (at("2026-11-25T08:00Z"), 3),
            (at("2026-01-01T08:00Z"), 7),
            (at("2027-01-01T08:00Z"), 1),
        ] {
            assert_eq!(days_since(last, now), days, "{last:?}");
        }
    }

    #[test]
    fn mapped_files_count_as_unchanged_when_the_kernel_has_written_them() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(unchanged_for(folder.path()), DAY);
        for (expire, writeback, seconds) in [
            ("3000", "500", 70),
            ("60000", "60000", 2400),
            ("1", "1", 60),
            ("3000", "0", 86_400),
        ] {
            std::fs::write(folder.path().join("dirty_expire_centisecs"), expire).unwrap();
            std::fs::write(folder.path().join("dirty_writeback_centisecs"), writeback).unwrap();
            assert_eq!(unchanged_for(folder.path()).as_secs(), seconds);
        }
    }
}
