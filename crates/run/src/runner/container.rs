//! The work on one container: its hooks, one session, and the copies in it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use sprat_session::interrupt::Interrupt;
use sprat_session::state::paths::StatePaths;
use sprat_session::state::snapshots;
use sprat_session::{
    ClosedReport, Exit, Failure, Notice, Observer, Phase, Session, SessionProgress, text,
};
use sprat_snapshot::{SnapshotSpec, SourcesAhead};

use super::around::Around;
use super::checks::while_allowed;
use super::outcome::{ContainerDone, End, Outcome};
use super::selection::{conditions, disk_absent};
use super::upkeep::Upkeep;
use super::{ContainerWork, CopyWork, Front, Runner};
use crate::config::Copy;
use crate::copy_state::{Changed, copy_file};
use crate::hooks;
use crate::notify::By;
use crate::sources;

/// How often the conditions of a copy under way are checked.
const CHECK_INTERVAL: Duration = Duration::from_secs(60);
/// A copy that takes longer stops in order if a copy in another container is due.
const TURN_MAX: Duration = Duration::from_secs(12 * 3600);
/// How often it is noted that a copy moves bytes, at most.
const MOVED_INTERVAL: Duration = Duration::from_secs(600);
/// How often a lease that another session has is tried again.
const LEASE_INTERVAL: Duration = Duration::from_secs(15);

/// One copy while the work goes on.
pub(super) struct Draft<'w> {
    pub(super) work: &'w CopyWork<'w>,
    pub(super) outcome: Outcome,
    /// Far more files changed than usual, as this run found.
    pub(super) changed: Option<Changed>,
    around: Option<Around<'w>>,
}

/// What a session left.
#[derive(Default)]
pub(super) struct Seen {
    /// `None`: it was not opened, or did not end in order.
    pub(super) closed: Option<ClosedReport>,
    /// What was free on the server when it began, if the server reports it.
    pub(super) server_free: Option<u64>,
}

/// Notes how much is sent.
struct Meter<'o> {
    inner: &'o mut dyn Observer,
    sent: &'o AtomicU64,
}

impl Observer for Meter<'_> {
    fn phase(&mut self, phase: Phase) {
        self.inner.phase(phase);
    }

    fn progress(&mut self, progress: &SessionProgress) {
        self.sent
            .store(progress.volume.written_bytes, Ordering::Relaxed);
        self.inner.progress(progress);
    }

    fn notice(&mut self, notice: Notice) {
        self.inner.notice(notice);
    }

    fn wants_files(&self) -> bool {
        self.inner.wants_files()
    }

    fn copied(&mut self, path: &str) {
        self.inner.copied(path);
    }
}

impl<'a> Runner<'a> {
    /// Makes the copies of one session. Whatever fails, the hooks that have to run then have run, and the
    /// result of each copy is recorded.
    pub fn work_on(&self, work: &ContainerWork<'_>, front: &mut dyn Front) -> ContainerDone {
        let started = Timestamp::now();
        let target = work.target.to_string();
        let mut drafts: Vec<Draft<'_>> = work
            .copies
            .iter()
            .map(|copy| Draft::new(copy, &target))
            .collect();
        if self.interrupt.requested() {
            return ContainerDone::not_begun(&work.name, drafts);
        }
        // The copies before them may have taken hours.
        let stops = drafts
            .iter()
            .map(|draft| self.stop_beginning(draft.work, work));
        let stops = stops.collect::<Option<Vec<_>>>();
        if let Some(stops) = stops.filter(|stops| !stops.is_empty()) {
            for (draft, end) in drafts.iter_mut().zip(stops) {
                draft.outcome.end = end;
            }
            self.record(work, &drafts, &Seen::default());
            return ContainerDone::not_begun(&work.name, drafts);
        }
        let around = match work.container {
            Some(container) => Around::of_container(self, container, started),
            None => Ok(None),
        };
        let has_hooks = matches!(around, Ok(Some(_)));
        let begun = match &around {
            Ok(Some(around)) => around.before(),
            Ok(None) => Ok(()),
            Err(failure) => Err(End::Failed(failure.clone())),
        };
        let mut upkeep = Upkeep::default();
        let may_begin = begun.is_ok();
        let seen = match begun {
            Ok(()) if drafts.is_empty() => Seen::default(),
            Ok(()) => self.in_session(work, &mut drafts, front),
            Err(end) if drafts.is_empty() => {
                let failure = match end {
                    End::Failed(failure) => Some(failure),
                    End::Made(_) | End::Skipped { .. } => None,
                };
                upkeep = self.no_slice(work, failure);
                Seen::default()
            }
            Err(end) => {
                end_all(&mut drafts, &end);
                Seen::default()
            }
        };
        for draft in drafts.iter().filter(|draft| draft.outcome.is_attempt()) {
            front.begins(&draft.work.name);
        }
        self.record(work, &drafts, &seen);
        let outcomes: Vec<Outcome> = drafts.into_iter().map(|one| self.end_copy(one)).collect();
        if may_begin {
            upkeep = self.upkeep(work, seen.closed.is_some(), front);
        }
        let mut failed_hooks = Vec::new();
        if let Ok(Some(around)) = around {
            let exits = outcomes.iter().map(Outcome::exit);
            let exit = Exit::worst(exits.chain(upkeep.exits()));
            let result = hooks::Outcome {
                code: exit.code(),
                ..hooks::Outcome::default()
            };
            failed_hooks = around.end(false, result);
        }
        self.check_sources(work, &outcomes, &mut upkeep);
        ContainerDone {
            name: work.name.clone(),
            has_hooks,
            outcomes,
            closed: seen.closed,
            upkeep,
            failed_hooks,
        }
    }

    /// The result is known: the last hooks of the copy.
    fn end_copy(&self, draft: Draft<'_>) -> Outcome {
        let Draft {
            work,
            mut outcome,
            around,
            ..
        } = draft;
        let is_failure = matches!(outcome.end, End::Failed(_));
        let around = match (around, work.job) {
            (Some(around), _) => Some(around),
            // The container was not opened.
            (None, Some(job)) if outcome.started.is_none() && outcome.end.is_reported_at_once() => {
                let begun = Around::of_copy(self, job, &work.name, Timestamp::now());
                begun.unwrap_or_default()
            }
            _ => None,
        };
        if let Some(around) = around {
            let failed = around.end(is_failure, outcome.end.for_hooks());
            outcome.failed_hooks.extend(failed);
        }
        outcome
    }

    /// Opens the session, makes the copies, prunes, and closes it.
    fn in_session<'d>(
        &'d self,
        work: &'d ContainerWork<'_>,
        drafts: &mut [Draft<'d>],
        front: &mut dyn Front,
    ) -> Seen {
        if let Some(absent) = self.absent(work) {
            end_all(drafts, &absent);
            return Seen::default();
        }
        let ahead = SourcesAhead::begin(ready(work).cloned().collect());
        let opened = self.open(work, front);
        drop(ahead);
        let mut session = match opened {
            Ok(session) => session,
            Err(failure) => {
                end_all(drafts, &End::Failed(failure));
                return Seen::default();
            }
        };
        self.compare_clock(&session);
        let server_free = session.facts().available_bytes;
        let low = self.too_little_room(work, server_free);
        let sent = AtomicU64::new(0);
        for draft in drafts.iter_mut() {
            if let Some(low) = &low {
                draft.outcome.end = low.clone();
                self.prune_unmade(draft, work, &mut session, front);
                continue;
            }
            let before = sent.load(Ordering::Relaxed);
            self.make(draft, work, &mut session, front, &sent);
            let may_prune = self.by == By::Run && draft.outcome.end.lacks_room();
            if may_prune && self.make_room(draft, work, &mut session, front) {
                self.make(draft, work, &mut session, front, &sent);
            }
            draft.outcome.sent_bytes = sent.load(Ordering::Relaxed).saturating_sub(before);
        }
        if self.by == By::Run {
            for draft in drafts.iter_mut() {
                self.prune(draft, &mut session, front);
            }
        }
        let observer = front.observer(&format!("{}: ", work.name));
        match session.close(observer, self.interrupt) {
            Ok(closed) => {
                share(drafts, closed.volume.written_bytes);
                Seen {
                    closed: Some(closed),
                    server_free,
                }
            }
            Err(failure) => {
                let failure = not_interrupted(failure, self.interrupt.requested());
                for draft in drafts {
                    draft.lose(&failure);
                }
                Seen {
                    closed: None,
                    server_free,
                }
            }
        }
    }

    /// The disk of a local container is away, now that the container's hooks could mount it.
    fn absent(&self, work: &ContainerWork<'_>) -> Option<End> {
        let container = work.container.filter(|_| self.by == By::Run)?;
        let seen = self.disk_seen(&container.name);
        let why = disk_absent(container, seen.as_ref())?;
        Some(End::Skipped {
            why,
            stopped: false,
        })
    }

    /// No copy of a run begins while less than `min_free` is free on the server.
    fn too_little_room(&self, work: &ContainerWork<'_>, free: Option<u64>) -> Option<End> {
        let min = work.container.filter(|_| self.by == By::Run)?.min_free;
        let free = free.filter(|free| *free < min)?;
        Some(End::Skipped {
            why: format!(
                "{} are free on the server, less than min_free, {}",
                text::bytes(free),
                text::bytes(min)
            ),
            stopped: false,
        })
    }

    /// Why a copy of a run may not begin now.
    fn stop_beginning(&self, copy: &CopyWork<'_>, work: &ContainerWork<'_>) -> Option<End> {
        let (Some(job), Some(container), By::Run) = (copy.job, work.container, self.by) else {
            return None;
        };
        if self.anyway {
            return None;
        }
        let conditions = conditions(Copy { job, container });
        let (zone, now) = (self.config.zone(), Timestamp::now());
        let why = conditions.stop_beginning(&self.machine, &zone, now)?;
        Some(End::Skipped {
            why,
            stopped: false,
        })
    }

    /// Opens the session. `run` waits for the lease of another one for a while.
    fn open(&self, work: &ContainerWork<'_>, front: &mut dyn Front) -> Result<Session, Failure> {
        let wait = work.container.filter(|_| self.by == By::Run);
        let wait = wait.map_or(Duration::ZERO, |container| container.lock_wait);
        let deadline = Instant::now() + wait;
        loop {
            self.interrupt.check()?;
            match front.open(&work.name) {
                Err(failure) if failure.exit == Exit::Locked => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(failure);
                    }
                    let next = Instant::now() + left.min(LEASE_INTERVAL);
                    self.interrupt.wait_until(next)?;
                }
                opened => return opened,
            }
        }
    }

    /// Makes one copy, with the hooks around it.
    fn make<'d>(
        &'d self,
        draft: &mut Draft<'d>,
        work: &'d ContainerWork<'_>,
        session: &mut Session,
        front: &mut dyn Front,
        sent: &AtomicU64,
    ) {
        if let Err(failure) = self.interrupt.check() {
            draft.outcome.end = End::Failed(failure);
            return;
        }
        // The copies before it may have taken hours.
        if let Some(stopped) = self.stop_beginning(draft.work, work) {
            draft.outcome.end = stopped;
            return;
        }
        let (started, began) = (Timestamp::now(), Instant::now());
        draft.outcome.started = Some(started);
        let around = match (draft.around.take(), draft.work.job) {
            // The second try.
            (Some(around), _) => Ok(Some(around)),
            (None, Some(job)) => Around::of_copy(self, job, &draft.work.name, started),
            (None, None) => Ok(None),
        };
        draft.outcome.end = match around {
            Err(failure) => End::Failed(failure),
            Ok(around) => {
                let begun = around.as_ref().map_or(Ok(()), Around::before);
                draft.around = around;
                match begun {
                    Err(end) => end,
                    Ok(()) => {
                        front.begins(&draft.work.name);
                        self.snapshot(draft.work, work, session, front, sent)
                    }
                }
            }
        };
        self.note_alarms(draft, work);
        if let Some(around) = &mut draft.around {
            let failed = around.after(&draft.outcome.end);
            draft.outcome.failed_hooks.extend(failed);
        }
        draft.outcome.took += began.elapsed();
    }

    /// Takes the snapshot, as long as the conditions of the copy are met.
    fn snapshot(
        &self,
        copy: &CopyWork<'_>,
        work: &ContainerWork<'_>,
        session: &mut Session,
        front: &mut dyn Front,
        sent: &AtomicU64,
    ) -> End {
        let mut observer = Meter {
            inner: front.observer(&format!("{}: ", copy.shown)),
            sent,
        };
        let mut spec = copy.spec.clone();
        let paths = StatePaths::new(&self.state_dir, &session.facts().uuid, &work.target);
        spec.census = self.census_spec(copy, work, &paths);
        spec.change_lists = Some(paths.change_lists().join(&copy.name.job));
        spec.edited = snapshots::edited(&paths);
        let about = hooks::Context {
            job: Some(copy.name.job.clone()),
            container: copy.name.container.clone(),
            run: self.run.clone(),
            started: Timestamp::now(),
            result: None,
            note: None,
        };
        let take = |observer: &mut Meter<'_>, interrupt: &Interrupt| {
            sources::take_snapshot(session, copy.job, spec, &about, observer, interrupt)
        };
        let (Some(job), Some(container), By::Run) = (copy.job, work.container, self.by) else {
            return End::of(take(&mut observer, self.interrupt), None);
        };
        let check = self.checks(Copy { job, container }, sent, TURN_MAX);
        let taken = while_allowed(self.interrupt, CHECK_INTERVAL, check, |interrupt| {
            take(&mut observer, interrupt)
        });
        match (session.too_much(), taken) {
            (Some(census), _) => self.hold(Copy { job, container }, &census),
            (None, Ok((taken, reason))) => {
                End::of(taken, reason.filter(|_| !self.interrupt.requested()))
            }
            (None, Err(failure)) => End::Failed(failure),
        }
    }

    /// What is checked each minute: why the copy stops, if it does. After `turn` it gives way to a copy in
    /// another container.
    fn checks<'c>(
        &'c self,
        copy: Copy<'c>,
        sent: &'c AtomicU64,
        turn: Duration,
    ) -> impl FnMut() -> Option<String> + Send + 'c {
        let conditions = conditions(copy);
        let zone = self.config.zone();
        let (began, mut moved_at, mut known) = (Instant::now(), None::<Instant>, 0);
        move || {
            let now = Timestamp::now();
            let all = sent.load(Ordering::Relaxed);
            if all > known && moved_at.is_none_or(|at| at.elapsed() >= MOVED_INTERVAL) {
                (known, moved_at) = (all, Some(Instant::now()));
                let mut file = copy_file(&self.state_dir, &copy.name());
                file.change(|state| state.bytes_moved_at = Some(now));
            }
            let reason = conditions.stop_running(&self.machine, &zone, now);
            if let Some(reason) = reason.filter(|_| !self.anyway) {
                return Some(reason);
            }
            if began.elapsed() < turn || !self.another_is_due(copy, now) {
                return None;
            }
            self.change(&copy.name(), |state| state.gave_way = true);
            Some("it took 12 hours, and a copy in another container is due".to_owned())
        }
    }

    fn another_is_due(&self, copy: Copy<'_>, now: Timestamp) -> bool {
        let zone = self.config.zone();
        let selecting = self.selecting(&zone, false, now);
        let others = self.config.copies();
        let mut others = others.filter(|other| other.container.name != copy.container.name);
        others.any(|other| {
            selecting
                .select(other, &self.state_with_disk(&other))
                .is_tried()
        })
    }
}

impl<'w> Draft<'w> {
    fn new(work: &'w CopyWork<'w>, target: &str) -> Self {
        let outcome = Outcome {
            copy: work.name.clone(),
            shown: work.shown.clone(),
            target: target.to_owned(),
            started: None,
            took: Duration::ZERO,
            end: End::Failed(Failure::interrupted()),
            sent_bytes: 0,
            failed_hooks: Vec::new(),
            failed_prunes: Vec::new(),
            notes: Vec::new(),
            growth: None,
            pruned: None,
        };
        Self {
            work,
            outcome,
            changed: None,
            around: None,
        }
    }

    /// The session did not end in order: nothing of it counts.
    fn lose(&mut self, failure: &Failure) {
        self.outcome.pruned = None;
        let end = &mut self.outcome.end;
        *end = match end {
            End::Made(_) => End::Failed(failure.clone()),
            End::Failed(first) => End::Failed(first.clone().merge(failure.clone())),
            End::Skipped { .. } => return,
        };
    }
}

impl ContainerDone {
    /// Neither a hook nor a session began.
    fn not_begun(name: &str, drafts: Vec<Draft<'_>>) -> Self {
        Self {
            name: name.to_owned(),
            has_hooks: false,
            outcomes: drafts.into_iter().map(|draft| draft.outcome).collect(),
            closed: None,
            upkeep: Upkeep::default(),
            failed_hooks: Vec::new(),
        }
    }
}

impl End {
    fn of(
        taken: Result<sprat_snapshot::SnapshotReport, Failure>,
        stopped_by: Option<String>,
    ) -> Self {
        match (taken, stopped_by) {
            (Ok(report), _) => Self::Made(Box::new(report)),
            (Err(failure), Some(why)) if failure.exit == Exit::Interrupted => {
                Self::Skipped { why, stopped: true }
            }
            (Err(failure), _) => Self::Failed(failure),
        }
    }
}

/// The jobs whose sources are there before the container is opened. A hook may mount those of the others.
fn ready<'w>(work: &'w ContainerWork<'_>) -> impl Iterator<Item = &'w SnapshotSpec> {
    let has_hook = |copy: &CopyWork<'_>| copy.job.is_some_and(|job| !job.before.is_empty());
    let copies = work.copies.iter().filter(move |copy| !has_hook(copy));
    copies.map(|copy| &copy.spec)
}

/// The container was not opened: all its copies end so.
fn end_all(drafts: &mut [Draft<'_>], end: &End) {
    for draft in drafts {
        draft.outcome.end = end.clone();
    }
}

/// What a session sends at its end belongs to the last copy that it made.
fn share(drafts: &mut [Draft<'_>], written_bytes: u64) {
    let counted: u64 = drafts.iter().map(|draft| draft.outcome.sent_bytes).sum();
    let mut made = drafts
        .iter_mut()
        .filter(|draft| draft.outcome.end.is_made());
    if let Some(last) = made.next_back() {
        last.outcome.sent_bytes += written_bytes.saturating_sub(counted);
    }
}

/// A check that stopped a copy while the connection was down ends the session as an interrupt does. No person
/// interrupted it.
fn not_interrupted(failure: Failure, interrupted: bool) -> Failure {
    match failure.exit {
        Exit::Interrupted if !interrupted => Failure {
            exit: Exit::Unreachable,
            ..failure
        },
        _ => failure,
    }
}

#[cfg(test)]
mod tests;
