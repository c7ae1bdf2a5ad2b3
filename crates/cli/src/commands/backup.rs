//! `sprat backup`: runs the jobs of the config, or one given on the command line.

use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use jiff::Timestamp;
use serde_json::{Value, json};
use sprat_luks::Secret;
use sprat_run::config::{Config, Copy, job_name};
use sprat_session::state::history::{MadeSnapshot, Run};
use sprat_session::state::identity;
use sprat_session::{Access, ClosedReport, IdentityPolicy, text};
use sprat_snapshot::{RunRecord, SnapshotReport, SnapshotSpec, Warning};

use super::context::{CommandArgs, Context, Resolved};
use crate::output::{Reporter, exit_json, failure_json, result_json, warning_lines};
use crate::{Exit, Failure};

pub(super) const USAGE: &str = "sprat backup [OPTIONS] [JOB]...
       sprat backup [OPTIONS] --name JOB TARGET SOURCE...";

pub(super) const EXAMPLES: &str = "\
Examples:
  sprat backup
  sprat backup home
  sprat backup ssh://u1234@example.org/backup/home.luks --name home /home --exclude .cache/";

pub(super) const NOTES: &str = "\
Success is reported only after the server has all data on its disk. An interrupted run loses
nothing: the next one continues it.

Exit codes: 0 done, 3 some source files unread, others in `sprat --help`.";

#[derive(Debug, Args)]
pub(super) struct BackupArgs {
    /// Jobs of the config, or copies (JOB@CONTAINER) [default: all]; with --name give TARGET SOURCE… instead
    #[arg(value_name = "JOB")]
    words: Vec<OsString>,
    /// Back up without a config, as a job of this name
    #[arg(long, value_name = "JOB")]
    name: Option<String>,
    /// Exclude what matches this rsync pattern (with --name; can be repeated)
    #[arg(long, value_name = "PATTERN", requires = "name")]
    exclude: Vec<String>,
    /// Exclude what matches a pattern in this file (with --name; can be repeated)
    #[arg(long, value_name = "FILE", requires = "name")]
    exclude_from: Vec<PathBuf>,
    /// Stay on the file system of each source (with --name)
    #[arg(long, requires = "name")]
    one_file_system: bool,
    /// Compare the content of every file, not only its size and time; reads all of source and snapshot
    #[arg(long)]
    checksum: bool,
    /// Accept empty sources (with --name)
    #[arg(long, requires = "name")]
    allow_empty: bool,
    /// Stop warning of the disk that was mounted at PATH: it is gone for good (can be repeated)
    #[arg(long, value_name = "PATH")]
    disk_gone: Vec<PathBuf>,
}

/// Largest number of unread files that are listed as text; JSON has all of them.
const UNREAD_SHOWN_MAX: usize = 20;

/// Jobs that share one session.
struct Group {
    resolved: Resolved,
    specs: Vec<SnapshotSpec>,
}

/// The result of one job.
struct Outcome {
    job: String,
    /// The job, and its container if it has several.
    shown: String,
    container: String,
    target: String,
    took: Duration,
    result: Result<SnapshotReport, Failure>,
}

impl Outcome {
    fn exit(&self) -> Exit {
        match &self.result {
            Ok(report) if report.record.complete => Exit::Done,
            Ok(_) => Exit::Unread,
            Err(failure) => failure.exit,
        }
    }
}

impl CommandArgs for BackupArgs {
    const NEEDS_ROOT: bool = true;

    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        let mut groups = plan(context, self)?;
        for spec in groups.iter_mut().flat_map(|group| &mut group.specs) {
            let gone = self.disk_gone.iter();
            spec.disks_gone = gone
                .map(|path| context.environment.absolute(path))
                .collect();
            spec.checksum = self.checksum;
        }
        check_sources(&groups)?;
        if self.name.is_none() {
            // A hook that is not run, or a filter that is not used, must not go unseen.
            for warning in context.config.without_effect() {
                context.output.warning(&warning.to_string());
            }
        }
        // Every key is fetched before the first session: no user should wait at a terminal for hours.
        let mut secrets = Vec::new();
        for group in &groups {
            secrets.push(context.secret(&group.resolved));
            context.interrupt.check()?;
        }
        let mut outcomes = Vec::new();
        let mut sessions = Vec::new();
        let mut skipped = false;
        // If the results can't be printed, the jobs of the next container still run.
        let mut not_printed: Option<Failure> = None;
        for (group, secret) in groups.iter().zip(secrets) {
            if context.interrupt.requested() {
                skipped = true;
                break;
            }
            let (made, closed) = run_group(context, group, secret);
            note(context, group, &made, closed.as_ref());
            for outcome in &made {
                let printed = report(context, outcome);
                not_printed = not_printed.or(printed.err());
            }
            if let Some(closed) = &closed
                && made.iter().any(|outcome| outcome.result.is_ok())
            {
                let printed = report_closed(context, closed);
                not_printed = not_printed.or(printed.err());
            }
            sessions.push(json!({
                "target": group.resolved.target.to_string(),
                "durable": closed.is_some_and(|closed| closed.durable),
                "volume": closed.map(|closed| closed.volume),
            }));
            outcomes.extend(made);
        }
        let exit = match skipped {
            true => Exit::Interrupted,
            false => Exit::worst(outcomes.iter().map(Outcome::exit)),
        };
        if context.output.json {
            let jobs: Vec<Value> = outcomes.iter().map(outcome_json).collect();
            let fields = json!({ "jobs": jobs, "sessions": sessions });
            let json = result_json("backup", exit, fields);
            let printed = context.output.result("", &json);
            not_printed = not_printed.or(printed.err());
        }
        match not_printed {
            Some(failure) => Err(with_states(failure, exit, &outcomes)),
            None => Ok(exit),
        }
    }
}

/// Adds the result of each job to the failure to print the results.
fn with_states(mut failure: Failure, exit: Exit, outcomes: &[Outcome]) -> Failure {
    if !matches!(exit, Exit::Done | Exit::Unread) {
        failure.exit = exit;
    }
    for outcome in outcomes {
        let job = &outcome.shown;
        failure = failure.because(match &outcome.result {
            Ok(report) if report.record.complete => {
                format!("job {job}: snapshot {} is made", report.name)
            }
            Ok(report) => format!(
                "job {job}: snapshot {} is made and lacks {}",
                report.name,
                text::counted(report.record.unread.count, "file", "files")
            ),
            Err(failed) => format!("job {job} failed: {}", failed.what),
        });
    }
    failure.with_hint(
        "every job ran to its end, and each snapshot named here is on the server's disk. See where \
         the output was to go",
    )
}

/// Reports all invalid sources and patterns together. A source that is missing or can't be read fails only
/// its own job.
fn check_sources(groups: &[Group]) -> Result<(), Failure> {
    let mut wrong = Vec::new();
    for spec in groups.iter().flat_map(|group| &group.specs) {
        let mistakes = sprat_snapshot::mistakes(spec).into_iter();
        wrong.extend(mistakes.map(|mistake| format!("job {}: {mistake}", spec.job)));
    }
    if wrong.is_empty() {
        return Ok(());
    }
    let failure = Failure::usage("invalid sources");
    let failure = wrong.into_iter().fold(failure, Failure::because);
    Err(failure.with_hint("nothing was started. Correct all of these, in the config or here"))
}

/// Checks the whole request before anything starts.
fn plan(context: &Context, args: &BackupArgs) -> Result<Vec<Group>, Failure> {
    if let Some(name) = &args.name {
        let Some((target, sources)) = args.words.split_first().filter(|(_, s)| !s.is_empty())
        else {
            return Err(
                Failure::usage("`sprat backup --name` needs a TARGET and a SOURCE")
                    .with_hint("sprat backup TARGET --name JOB SOURCE…"),
            );
        };
        let job = job_name(name).map_err(Failure::usage)?;
        let resolved = context.resolve_os(target)?;
        let environment = &context.environment;
        if sources.iter().any(|source| source.is_empty()) {
            return Err(Failure::usage("a SOURCE is empty").with_hint(
                "nothing was started. Is a variable of the shell not set? `.` is the current folder",
            ));
        }
        let sources = sources
            .iter()
            .map(|source| source_path(&environment.absolute(source.as_ref())))
            .collect::<Result<_, _>>()?;
        let mut spec = SnapshotSpec::new(job, sources);
        spec.excludes.clone_from(&args.exclude);
        spec.exclude_from = args
            .exclude_from
            .iter()
            .map(|path| environment.absolute(path))
            .collect();
        spec.one_file_system = args.one_file_system;
        spec.allow_empty = args.allow_empty;
        return Ok(vec![Group {
            resolved,
            specs: vec![spec],
        }]);
    }
    let copies = copies(&context.config, &args.words)?;
    if copies.is_empty() {
        let failure = context.config.placed(Failure::usage("no job to run"));
        return Err(failure.with_hint(
            "write a [job.NAME] into the config, or: sprat backup TARGET --name JOB SOURCE…",
        ));
    }
    let mut groups: Vec<Group> = Vec::new();
    // One session for each container, in the order of the config.
    for container in &context.config.containers {
        let here = copies
            .iter()
            .filter(|copy| copy.container.name == container.name);
        let specs: Vec<SnapshotSpec> = here.map(|copy| copy.job.spec()).collect();
        if !specs.is_empty() {
            let resolved = context.resolve_container(container)?;
            groups.push(Group { resolved, specs });
        }
    }
    Ok(groups)
}

/// The copies that the words name, or all. None is named twice.
fn copies<'c>(config: &'c Config, words: &[OsString]) -> Result<Vec<Copy<'c>>, Failure> {
    if words.is_empty() {
        return Ok(config.copies().collect());
    }
    let mut copies: Vec<Copy<'c>> = Vec::new();
    for word in words {
        let word = word.to_string_lossy();
        for copy in config.copies_of(&word)? {
            let name = copy.name();
            if copies.iter().any(|earlier| earlier.name() == name) {
                let what = match copy.job.containers.len() {
                    1 => format!("job {} is named twice", name.job),
                    _ => format!("{name} is named twice"),
                };
                return Err(Failure::usage(what));
            }
            copies.push(copy);
        }
    }
    Ok(copies)
}

/// Resolves `..` as the kernel does; a symbolic link at the end stays one. A source must always have the same
/// path: otherwise the next run does not find its files in this run's snapshot.
fn source_path(path: &Path) -> Result<PathBuf, Failure> {
    let is_up = |component: Component<'_>| component == Component::ParentDir;
    if !path.components().any(is_up) {
        return Ok(path.to_owned());
    }
    let resolve = |path: &Path| {
        std::fs::canonicalize(path).map_err(|error| {
            Failure::failed(format!("source {}: can't be found", path.display()))
                .caused_by(&error)
                .with_hint("nothing was started. Check the path")
        })
    };
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => Ok(resolve(parent)?.join(name)),
        _ => resolve(path),
    }
}

/// How a copy is called in text.
fn shown(context: &Context, group: &Group, spec: &SnapshotSpec) -> String {
    match context.config.job(spec.job.as_str()) {
        Ok(job) if job.containers.len() > 1 => format!("{}@{}", spec.job, group.resolved.name),
        _ => spec.job.to_string(),
    }
}

/// Runs one session. Its jobs have succeeded only after it is closed.
fn run_group(
    context: &Context,
    group: &Group,
    secret: Result<Secret, Failure>,
) -> (Vec<Outcome>, Option<ClosedReport>) {
    let target = group.resolved.target.to_string();
    let outcome = |spec: &SnapshotSpec, took, result| Outcome {
        job: spec.job.to_string(),
        shown: shown(context, group, spec),
        container: group.resolved.name.clone(),
        target: target.clone(),
        took,
        result,
    };
    let all_failed = |failure: Failure| {
        let failed = |spec| outcome(spec, Duration::ZERO, Err(failure.clone()));
        (group.specs.iter().map(failed).collect(), None)
    };
    let secret = match secret {
        Ok(secret) => secret,
        Err(failure) => return all_failed(failure),
    };
    let mut reporter = Reporter::new(context.output, format!("{}: ", group.resolved.name));
    let opened = context
        .session_options(&group.resolved, Access::ReadWrite)
        .and_then(|options| context.open(&group.resolved, &secret, options, &mut reporter));
    drop(secret);
    let mut session = match opened {
        Ok(session) => session,
        Err(failure) => return all_failed(failure),
    };
    let mut outcomes = Vec::new();
    for spec in &group.specs {
        reporter.about(format!("{}: ", shown(context, group, spec)));
        let began = Instant::now();
        let result = context
            .interrupt
            .check()
            .and_then(|()| session.take_snapshot(spec.clone(), &mut reporter, &context.interrupt));
        outcomes.push(outcome(spec, began.elapsed(), result));
    }
    reporter.about(format!("{}: ", group.resolved.name));
    match session.close(&mut reporter, &context.interrupt) {
        Ok(closed) => (outcomes, Some(closed)),
        Err(failure) => {
            for outcome in &mut outcomes {
                outcome.result = Err(match &outcome.result {
                    Ok(_) => failure.clone(),
                    Err(first) => first.clone().merge(failure.clone()),
                });
            }
            (outcomes, None)
        }
    }
}

/// Notes the results of the jobs for `sprat status`, if this machine knows the container.
fn note(context: &Context, group: &Group, made: &[Outcome], closed: Option<&ClosedReport>) {
    let state_dir = context.state_dir();
    let Ok(IdentityPolicy::Known(pins)) =
        identity::policy(&state_dir, &group.resolved.target, None)
    else {
        return;
    };
    let at = Timestamp::now();
    context.note_history(&pins.uuid, &group.resolved.target, |history| {
        history.saw(closed.and_then(|closed| closed.room));
        for outcome in made {
            // The run that holds the lock notes its own results.
            if closed.is_none() && outcome.exit() == Exit::Locked {
                continue;
            }
            // The name of a job without a snapshot may be a typing error.
            let in_config = context.config.has_job(&group.resolved.name, &outcome.job);
            if outcome.result.is_err() && !in_config && !history.jobs.contains_key(&outcome.job) {
                continue;
            }
            let failure = outcome.result.as_ref().err();
            let failure = failure.filter(|failure| failure.exit != Exit::Interrupted);
            let run = Run {
                at,
                exit: outcome.exit(),
                failure: failure.map(|failure| failure.what.clone()),
            };
            let report = outcome.result.as_ref().ok();
            let snapshot = report.map(|report| MadeSnapshot::of(at, report));
            history.ran(&outcome.job, run, snapshot);
        }
    });
}

fn report(context: &Context, outcome: &Outcome) -> Result<(), Failure> {
    let report = match &outcome.result {
        Ok(report) => report,
        Err(failure) => {
            let what = match failure.exit {
                Exit::Interrupted => format!("job {} was interrupted", outcome.shown),
                _ => format!("job {} failed", outcome.shown),
            };
            context.output.failure(&failure.clone().context(what));
            return Ok(());
        }
    };
    for (text, matters) in warning_lines(&outcome.shown, &report.record.warnings) {
        if matters {
            context.output.warning(&text);
        } else {
            context.output.note(&text);
        }
    }
    for name in names_of_content(&report.record) {
        context.output.note(&name);
    }
    if context.output.json {
        return Ok(());
    }
    context
        .output
        .result(&summary(&outcome.shown, report, outcome.took), &json!(null))
}

/// The files that warnings of changed content are about; the record has more of them.
fn names_of_content(record: &RunRecord) -> Vec<String> {
    let line = |what: &'static str| {
        move |name: &String| format!("{}: {what}: {}", record.job, text::harmless(name))
    };
    let healed = record.healed.names.iter().map(line("was damaged"));
    let caught_up = record.caught_up.names.iter().map(line("was missed"));
    healed.chain(caught_up).take(UNREAD_SHOWN_MAX).collect()
}

/// The result as text: one line, and the files that could not be read.
fn summary(job: &str, report: &SnapshotReport, took: Duration) -> String {
    let stats = &report.record.stats;
    let seconds = took.as_millis().max(1);
    let rate = u128::from(stats.bytes_transferred) * 1000 / seconds;
    let rate = text::bytes(u64::try_from(rate).unwrap_or(u64::MAX));
    let mut summary = format!(
        "{job}: snapshot {} of {}, {}; {} ({}) copied in {} ({rate}/s)",
        report.name,
        text::counted(stats.files_of_people().unwrap_or(0), "file", "files"),
        text::bytes(stats.bytes_total),
        text::counted(stats.transferred, "file", "files"),
        text::bytes(stats.bytes_transferred),
        text::duration(took),
    );
    let vanished = report.record.vanished.count;
    if vanished > 0 {
        summary.push_str(&format!(
            "; {} vanished while it ran",
            text::counted(vanished, "file", "files")
        ));
    }
    let unread = &report.record.unread;
    if unread.is_empty() {
        summary.push_str(if report.record.complete {
            "\n"
        } else {
            "; NOT complete\n"
        });
        return summary;
    }
    // A folder whose disk was unmounted, or a file without its attributes, is there in part.
    let part = report.record.warnings.iter().any(Warning::lacks_something);
    summary.push_str(&format!(
        "\n{job}: {} could not be read, and NOT stored in this snapshot{}:\n",
        text::counted(unread.count, "source file", "source files"),
        if part { ", or only in part" } else { "" }
    ));
    for name in unread.names.iter().take(UNREAD_SHOWN_MAX) {
        let reason = report
            .record
            .reason_unread(name)
            .map(|reason| format!(": {reason}"));
        summary.push_str(&format!(
            "  {}{}\n",
            text::harmless(name),
            text::harmless(&reason.unwrap_or_default())
        ));
    }
    let shown = u64::try_from(unread.names.len().min(UNREAD_SHOWN_MAX)).unwrap_or(u64::MAX);
    if unread.count > shown {
        summary.push_str(&format!(
            "  … and {} more\n",
            text::count(unread.count - shown)
        ));
    }
    summary.push_str(
        "To leave one out for good, exclude its path: --exclude PATH, or `exclude` of the job.\n",
    );
    summary
}

fn report_closed(context: &Context, closed: &ClosedReport) -> Result<(), Failure> {
    if context.output.json {
        return Ok(());
    }
    let durable = if closed.durable {
        "everything is on the server's disk"
    } else {
        "the server can't report whether it is on its disk"
    };
    let line = format!(
        "{} sent, {} read; {durable}\n",
        text::bytes(closed.volume.written_bytes),
        text::bytes(closed.volume.read_bytes)
    );
    context.output.result(&line, &json!(null))
}

fn outcome_json(outcome: &Outcome) -> Value {
    let (snapshot, failure) = match &outcome.result {
        Ok(report) => (Some(report), None),
        Err(failure) => (None, Some(failure_json(failure))),
    };
    json!({
        "job": outcome.job,
        "container": outcome.container,
        "target": outcome.target,
        "result": exit_json(outcome.exit()),
        "seconds": outcome.took.as_secs_f64(),
        "snapshot": snapshot.map(|report| report.name.to_string()),
        "complete": snapshot.map(|report| report.record.complete),
        "record": snapshot.map(|report| &report.record),
        "failure": failure,
    })
}
