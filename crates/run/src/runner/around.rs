//! The hooks around a copy, and around the work on a container: which run when, and which are owed.
//!
//! What has begun is recorded before the first hook runs. After a kill the next run pays what is owed: it
//! runs `after` and `finally` with `SPRAT_EXIT=137`.

use jiff::Timestamp;
use sprat_session::{Exit, Failure, text};

use super::outcome::End;
use super::{Runner, problems_of};
use crate::config::{Container, Job};
use crate::copy_name::CopyName;
use crate::copy_state::{BegunHooks, container_file, copy_file, known_containers, known_copies};
use crate::hooks::{
    Context, Hook, HookEnd, HookReport, Kind, Outcome, end_left, run_all, run_before,
};
use crate::notify::Subject;
use crate::run_lock::RunLock;

/// How much of what a hook wrote last is shown where it failed, in characters.
const SHOWN_MAX: usize = 200;

/// The hooks around one copy, or around the work on one container.
pub(super) struct Around<'r> {
    runner: &'r Runner<'r>,
    owner: Owner<'r>,
    context: Context,
    /// Nobody else runs these hooks, or pays what is owed of them, while this exists.
    _lock: RunLock,
}

/// Whose hooks they are.
#[derive(Clone, Copy)]
enum Owner<'r> {
    Copy(&'r Job, &'r CopyName),
    Container(&'r Container),
}

/// The same. The config may have it no longer.
#[derive(Clone, Copy)]
enum OwnerName<'n> {
    Copy(&'n CopyName),
    Container(&'n str),
}

impl OwnerName<'_> {
    /// One name for the hooks of a job in all its containers: they may stop the same application.
    fn lock_name(self) -> String {
        match self {
            Self::Copy(name) => name.job.clone(),
            Self::Container(name) => format!("@{name}"),
        }
    }

    fn subject(self) -> Subject {
        match self {
            Self::Copy(name) => Subject::Copy(name.clone()),
            Self::Container(name) => Subject::Container(name.to_owned()),
        }
    }

    fn kind(self) -> &'static str {
        match self {
            Self::Copy(_) => "job",
            Self::Container(_) => "container",
        }
    }

    fn in_words(self) -> String {
        let name = match self {
            Self::Copy(name) => &*name.job,
            Self::Container(name) => name,
        };
        format!("{} {name}", self.kind())
    }

    fn begun(self, runner: &Runner<'_>) -> Option<BegunHooks> {
        match self {
            Self::Copy(name) => copy_file(&runner.state_dir, name).read().begun,
            Self::Container(name) => container_file(&runner.state_dir, name).read().begun,
        }
    }

    fn record(self, runner: &Runner<'_>, begun: Option<BegunHooks>) {
        match self {
            Self::Copy(name) => runner.change(name, |state| state.begun = begun),
            Self::Container(name) => {
                let mut file = container_file(&runner.state_dir, name);
                file.change(|state| state.begun = begun);
                runner.report_problems(problems_of(&mut file));
            }
        }
    }
}

impl<'r> Owner<'r> {
    fn hooks(self, kind: Kind) -> &'r [Hook] {
        match (self, kind) {
            (Self::Copy(job, _), Kind::Before) => &job.before,
            (Self::Copy(job, _), Kind::After) => &job.after,
            (Self::Copy(job, _), Kind::Failed) => &job.failed,
            (Self::Copy(job, _), Kind::Finally) => &job.finally,
            (Self::Container(container), Kind::Before) => &container.before,
            (Self::Container(container), Kind::Finally) => &container.finally,
            (Self::Copy(..), Kind::Command) | (Self::Container(_), _) => &[],
        }
    }

    fn has_hooks(self) -> bool {
        let kinds = [Kind::Before, Kind::After, Kind::Failed, Kind::Finally];
        kinds.iter().any(|kind| !self.hooks(*kind).is_empty())
    }

    fn name(self) -> OwnerName<'r> {
        match self {
            Self::Copy(_, name) => OwnerName::Copy(name),
            Self::Container(container) => OwnerName::Container(&container.name),
        }
    }

    /// Acquires the lock of the hooks; `None`: another process has it. Ends a hook of a run that was killed.
    fn lock(self, runner: &Runner<'_>) -> Result<Option<RunLock>, Failure> {
        let name = self.name().lock_name();
        let lock = RunLock::of_hooks(&runner.runtime_dir, &name)?;
        if lock.is_some() {
            end_left(&RunLock::note_of_hook(&runner.runtime_dir, &name));
        }
        Ok(lock)
    }

    fn context(self, runner: &Runner<'_>, run: &str, started: Timestamp) -> Context {
        let (job, container) = match self {
            Self::Copy(_, name) => (Some(name.job.clone()), name.container.clone()),
            Self::Container(container) => (None, container.name.clone()),
        };
        Context {
            job,
            container,
            run: run.to_owned(),
            started,
            result: None,
            note: Some(RunLock::note_of_hook(
                &runner.runtime_dir,
                &self.name().lock_name(),
            )),
        }
    }
}

impl<'r> Around<'r> {
    /// The hooks of a copy that begins; `None`: its job has none.
    pub(super) fn of_copy(
        runner: &'r Runner<'r>,
        job: &'r Job,
        name: &'r CopyName,
        started: Timestamp,
    ) -> Result<Option<Self>, Failure> {
        Self::begin(runner, Owner::Copy(job, name), started)
    }

    /// The hooks of a container on which work begins; `None`: it has none.
    pub(super) fn of_container(
        runner: &'r Runner<'r>,
        container: &'r Container,
        started: Timestamp,
    ) -> Result<Option<Self>, Failure> {
        Self::begin(runner, Owner::Container(container), started)
    }

    fn begin(
        runner: &'r Runner<'r>,
        owner: Owner<'r>,
        started: Timestamp,
    ) -> Result<Option<Self>, Failure> {
        if !owner.has_hooks() {
            return Ok(None);
        }
        let lock = owner.lock(runner)?.ok_or_else(|| {
            Failure::new(
                Exit::Locked,
                format!(
                    "another sprat runs the hooks of {}",
                    owner.name().in_words()
                ),
            )
            .with_hint("nothing was started. Run the command again when the other one has ended")
        })?;
        Ok(Some(Self {
            runner,
            owner,
            context: owner.context(runner, &runner.run, started),
            _lock: lock,
        }))
    }

    /// Records what is owed from now on, and runs `before`. `Err`: the first that did not end with 0 decides
    /// how the copy ends.
    pub(super) fn before(&self) -> Result<(), End> {
        let begun = BegunHooks {
            run: self.context.run.clone(),
            started: self.context.started,
            after: matches!(self.owner, Owner::Copy(..)),
            finally: true,
            reported: false,
        };
        self.owner.name().record(self.runner, Some(begun));
        let _hold = self.runner.interrupt.hold();
        let hooks = self.owner.hooks(Kind::Before);
        let reports = run_before(hooks, &self.context, self.runner.interrupt);
        reports.iter().for_each(log);
        let Some(last) = reports.last() else {
            return Ok(());
        };
        Err(match &last.end {
            HookEnd::Done => return Ok(()),
            HookEnd::NotNow => End::Skipped {
                why: format!(
                    "its `before` hook {:?} ended with 75 (not now)",
                    last.program
                ),
                stopped: false,
            },
            HookEnd::Interrupted => End::Failed(Failure::interrupted()),
            HookEnd::Failed(failure) => End::Failed(with_output(failure, last)),
        })
    }

    /// Runs `after`: the sources are no longer read.
    pub(super) fn after(&mut self, end: &End) -> Vec<Failure> {
        let failed = self.run(Kind::After, end.for_hooks());
        let begun = self.owner.name().begun(self.runner);
        let begun = begun.map(|begun| BegunHooks {
            after: false,
            ..begun
        });
        self.owner.name().record(self.runner, begun);
        failed
    }

    /// Runs `failed` if that is what it did, and `finally`: the result is known. Nothing is owed any more.
    pub(super) fn end(mut self, is_failure: bool, outcome: Outcome) -> Vec<Failure> {
        let mut failed = Vec::new();
        if is_failure {
            failed = self.run(Kind::Failed, outcome.clone());
        }
        failed.extend(self.run(Kind::Finally, outcome));
        self.owner.name().record(self.runner, None);
        failed
    }

    fn run(&mut self, kind: Kind, outcome: Outcome) -> Vec<Failure> {
        self.context.result = Some(outcome);
        let _hold = self.runner.interrupt.hold();
        let reports = run_all(self.owner.hooks(kind), kind, &self.context);
        reports.iter().for_each(log);
        failures(&reports)
    }
}

/// Hooks that a killed run owed, and that failed now. They are not run again.
#[derive(Debug, Clone)]
pub struct OwedFailed {
    /// Whose hooks they are.
    pub subject: Subject,
    /// What failed.
    pub failure: Failure,
}

/// Runs what runs that were killed owe for these copies, and for their containers. Returns what failed.
pub(super) fn pay<'r>(
    runner: &'r Runner<'r>,
    copies: &[(&'r Job, CopyName)],
    containers: &[&'r Container],
) -> Vec<OwedFailed> {
    let copies = copies.iter().map(|(job, name)| Owner::Copy(job, name));
    let containers = containers.iter().map(|one| Owner::Container(one));
    let mut failed = Vec::new();
    for owner in copies.chain(containers) {
        let failures = pay_one(runner, owner).unwrap_or_else(|failure| vec![failure]);
        failed.extend(failures.into_iter().map(|failure| OwedFailed {
            subject: owner.name().subject(),
            failure: failure.context(format!(
                "the last run of {} was killed, and a hook that it owed failed",
                owner.name().in_words()
            )),
        }));
    }
    failed
}

/// Reports, once each, what runs that were killed owe for jobs and containers that are not in the config: what
/// to run is not known. It is owed until the job or the container is back.
pub(super) fn report_unknown(runner: &Runner<'_>) -> Vec<OwedFailed> {
    let (config, state_dir) = (runner.config, &runner.state_dir);
    let copies = known_copies(state_dir).unwrap_or_default();
    let gone = |name: &&CopyName| config.copies().all(|copy| copy.name() != **name);
    let copies = copies.iter().filter(gone).map(OwnerName::Copy);
    let containers = known_containers(state_dir).unwrap_or_default();
    let gone = |name: &&String| config.containers.iter().all(|one| one.name != **name);
    let containers = containers.iter().filter(gone);
    let containers = containers.map(|name| OwnerName::Container(name));
    copies
        .chain(containers)
        .filter_map(|name| report_unknown_one(runner, name))
        .collect()
}

fn report_unknown_one(runner: &Runner<'_>, name: OwnerName<'_>) -> Option<OwedFailed> {
    name.begun(runner).filter(|begun| !begun.reported)?;
    // `None`: the process that runs them lives, with the config of before.
    let _lock = RunLock::of_hooks(&runner.runtime_dir, &name.lock_name()).ok()??;
    let begun = name.begun(runner)?;
    let hooks = match begun.after {
        true => "its `after` and `finally` hooks",
        false => "its `finally` hooks",
    };
    let failure = Failure::failed(format!(
        "the last run of {} was killed, and {hooks} did not run: the {} is not in the config",
        name.in_words(),
        name.kind()
    ))
    .with_hint("check whether what its `before` hooks stopped or changed is as it should be");
    let reported = BegunHooks {
        reported: true,
        ..begun
    };
    name.record(runner, Some(reported));
    Some(OwedFailed {
        subject: name.subject(),
        failure,
    })
}

fn pay_one<'r>(runner: &'r Runner<'r>, owner: Owner<'r>) -> Result<Vec<Failure>, Failure> {
    if owner.name().begun(runner).is_none() {
        return Ok(Vec::new());
    }
    let Some(lock) = owner.lock(runner)? else {
        // The process that runs them lives.
        return Ok(Vec::new());
    };
    // Another one may have paid while the lock was acquired.
    let Some(begun) = owner.name().begun(runner) else {
        return Ok(Vec::new());
    };
    tracing::warn!(
        of = owner.name().in_words(),
        "a run was killed: its hooks run now"
    );
    let mut around = Around {
        runner,
        owner,
        context: owner.context(runner, &begun.run, begun.started),
        _lock: lock,
    };
    let mut failed = Vec::new();
    if begun.after {
        failed = around.run(Kind::After, Outcome::killed());
    }
    if begun.finally {
        failed.extend(around.run(Kind::Finally, Outcome::killed()));
    }
    owner.name().record(runner, None);
    Ok(failed)
}

fn failures(reports: &[HookReport]) -> Vec<Failure> {
    let failures = reports.iter().filter_map(|report| match &report.end {
        HookEnd::Failed(failure) => Some(with_output(failure, report)),
        // Only a `before` hook can say so.
        HookEnd::NotNow => Some(Failure::failed(format!(
            "the hook {:?} failed: exit status 75",
            report.program
        ))),
        HookEnd::Done | HookEnd::Interrupted => None,
    });
    failures.collect()
}

/// The failure with the last line that the hook wrote.
fn with_output(failure: &Failure, report: &HookReport) -> Failure {
    let output = String::from_utf8_lossy(&report.output);
    let mut lines = output.lines().rev().map(str::trim);
    match lines.find(|line| !line.is_empty()) {
        None => failure.clone(),
        Some(line) => failure.clone().because(format!(
            "it wrote: {}",
            text::harmless_within(line, SHOWN_MAX)
        )),
    }
}

fn log(report: &HookReport) {
    let output = String::from_utf8_lossy(&report.output);
    tracing::info!(program = ?report.program, end = ?report.end, %output, "a hook ended");
}
