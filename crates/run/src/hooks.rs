//! Runs hooks: programs of the user around a copy or around the work on a container.
//!
//! A hook is a list of words; no shell sees them. It runs as root or as `user`, in `/`, without
//! input, in a process group of its own, with umask 077 and with a fixed environment. Only the exit
//! of its process counts, not whether a child of it keeps the output open.

mod left;
pub mod pipeline;

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use jiff::Timestamp;
use sprat_session::interrupt::Interrupt;
use sprat_session::{Exit, Failure};

use crate::program::running::{End, Outputs, Running};
use crate::program::start::{NotStarted, prepare};
use left::Note;

/// The variable that is set for every hook: the run that started it.
pub const RUN_VARIABLE: &str = "SPRAT_RUN";
/// With this exit status a `before` hook says "not now": the copy is skipped.
const NOT_NOW: i32 = 75;
/// How long a program may take to end after SIGTERM, before SIGKILL.
const END_LIMIT: Duration = Duration::from_secs(10);

/// One hook.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hook {
    /// The program and its arguments; never empty.
    pub words: Vec<OsString>,
    /// After this time it is ended, and has failed.
    pub timeout: Duration,
    /// Who runs it; `None`: the user of this process.
    pub user: Option<String>,
}

/// Which list a hook is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Before the sources are read, or before the container is opened.
    Before,
    /// As soon as the sources are read.
    After,
    /// After a copy that failed.
    Failed,
    /// At the very end.
    Finally,
    /// Not a hook, but a stage of a `command` job.
    Command,
}

impl Kind {
    /// As in the config.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Before => "before",
            Self::After => "after",
            Self::Failed => "failed",
            Self::Finally => "finally",
            Self::Command => "command",
        }
    }
}

/// What a hook learns from its environment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Context {
    /// `None` for the hooks of a container.
    pub job: Option<String>,
    /// The container.
    pub container: String,
    /// The run.
    pub run: String,
    /// The beginning of the copy, or of the work on the container.
    pub started: Timestamp,
    /// How it ended, once that is known.
    pub result: Option<Outcome>,
    /// The file that names the process of the hook while it runs: see [`end_left`].
    pub note: Option<PathBuf>,
}

/// How a copy ended, for the hooks after it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The exit code; 137 after a run that was killed.
    pub code: u8,
    /// The snapshot.
    pub snapshot: Option<String>,
    /// What went wrong, in one line.
    pub error: Option<String>,
}

impl Outcome {
    /// Of a run that was killed: the next run runs the hooks that are owed.
    #[must_use]
    pub fn killed() -> Self {
        Self {
            code: 137,
            ..Self::default()
        }
    }
}

impl Context {
    fn variables(&self, kind: Kind) -> Vec<(&'static str, String)> {
        let mut all = vec![
            ("SPRAT_HOOK", kind.name().to_owned()),
            ("SPRAT_CONTAINER", self.container.clone()),
            (RUN_VARIABLE, self.run.clone()),
            ("SPRAT_STARTED", self.started.to_string()),
        ];
        all.extend(self.job.clone().map(|job| ("SPRAT_JOB", job)));
        if let Some(result) = &self.result {
            all.push(("SPRAT_EXIT", result.code.to_string()));
            let snapshot = result.snapshot.clone();
            all.extend(snapshot.map(|name| ("SPRAT_SNAPSHOT", name)));
            let error = result.error.clone();
            all.extend(error.map(|text| ("SPRAT_ERROR", text)));
        }
        // A variable can't hold a zero byte.
        all.iter_mut()
            .for_each(|(_, value)| value.retain(|letter| letter != '\0'));
        all
    }
}

/// How a hook ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HookEnd {
    /// With exit status 0.
    Done,
    /// With exit status 75.
    NotNow,
    /// Otherwise, or it did not start, or it took too long.
    Failed(Failure),
    /// It was ended because this process shall end.
    Interrupted,
}

/// What a hook left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HookReport {
    /// The program.
    pub program: OsString,
    /// How it ended.
    pub end: HookEnd,
    /// The last 64 KiB that it wrote to stdout and stderr.
    pub output: Vec<u8>,
}

/// Runs the hooks of a list in order and stops at the first that does not end with 0: `before`.
pub fn run_before(hooks: &[Hook], context: &Context, interrupt: &Interrupt) -> Vec<HookReport> {
    let mut reports = Vec::new();
    for hook in hooks {
        let report = run(hook, Kind::Before, context, Some(interrupt));
        let stop = report.end != HookEnd::Done;
        reports.push(report);
        if stop {
            break;
        }
    }
    reports
}

/// Runs all hooks of a list in order: `after`, `failed` and `finally`. An interrupt does not end
/// them.
pub fn run_all(hooks: &[Hook], kind: Kind, context: &Context) -> Vec<HookReport> {
    let run = |hook| run(hook, kind, context, None);
    hooks.iter().map(run).collect()
}

/// Runs one hook.
pub fn run(
    hook: &Hook,
    kind: Kind,
    context: &Context,
    interrupt: Option<&Interrupt>,
) -> HookReport {
    run_within(hook, kind, context, interrupt, END_LIMIT)
}

fn run_within(
    hook: &Hook,
    kind: Kind,
    context: &Context,
    interrupt: Option<&Interrupt>,
    end_limit: Duration,
) -> HookReport {
    let program = hook.words.first().cloned().unwrap_or_default();
    let started = prepare(&hook.words, hook.user.as_deref(), &context.variables(kind))
        .and_then(|command| Running::start(command, Stdio::null(), Outputs::Together));
    let (end, output) = match started {
        Ok(mut running) => {
            let note = context.note.as_deref().zip(running.pid());
            let _note = note.and_then(|(path, pid)| Note::write(path, pid));
            let ended = running.wait(hook.timeout, interrupt, end_limit);
            let end = end_of(ended, &program, kind, hook.timeout);
            (end, running.into_outputs().next().unwrap_or_default())
        }
        Err(why) => (
            HookEnd::Failed(not_started(&why, &program, kind)),
            Vec::new(),
        ),
    };
    HookReport {
        program,
        end,
        output,
    }
}

/// Ends the hook that `note` names, with all that it started, if it still runs: `kill -9` ended its run and not the
/// hook. Nobody may be running hooks with this note.
pub fn end_left(note: &Path) {
    left::end(note, END_LIMIT);
}

fn not_started(why: &NotStarted, program: &OsStr, kind: Kind) -> Failure {
    let what = format!("the {} hook {program:?} was not run", kind.name());
    let failure = Failure::failed(what).caused_by(why);
    match why {
        NotStarted::WritableByOthers(_) => failure.with_hint(
            "let only root write to the file and to the folders above it: others could replace what \
             root runs",
        ),
        _ => failure,
    }
}

fn end_of(ended: std::io::Result<End>, program: &OsStr, kind: Kind, timeout: Duration) -> HookEnd {
    let what = format!("the {} hook {program:?} failed", kind.name());
    let failed = match ended {
        Ok(End::Exited(status)) if status.success() => return HookEnd::Done,
        Ok(End::Exited(status)) if status.code() == Some(NOT_NOW) => return HookEnd::NotNow,
        Ok(End::Interrupted) => return HookEnd::Interrupted,
        Ok(End::Exited(status)) => Failure::failed(what).because(status.to_string()),
        Ok(End::TimedOut) => Failure::failed(what)
            .because(format!(
                "it did not end within {} s, and was ended",
                timeout.as_secs()
            ))
            .with_hint("raise `timeout` of the hook, or `hook_timeout`, if it needs more time"),
        Err(error) => Failure::failed(what).caused_by(&error),
    };
    HookEnd::Failed(failed)
}

/// Refuses `run` and `backup` in a hook of their own run. `run_variable` is the value of
/// [`RUN_VARIABLE`] in the environment of this process.
pub fn refuse_inside_hook(run_variable: Option<&OsStr>) -> Result<(), Failure> {
    match run_variable {
        None => Ok(()),
        Some(_) => Err(Failure::new(Exit::Usage, "called from its own run")
            .because(format!(
                "the variable {RUN_VARIABLE} is set, as it is for every hook"
            ))
            .with_hint(
                "nothing was started. A hook can't start another backup; add a job instead",
            )),
    }
}

#[cfg(test)]
mod tests;
